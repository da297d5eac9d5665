"""Errands that root has done as other users, side by side: each in a child that lives no longer than its errand.

Promises: a child is its user with nothing of root's (no group, no privilege to gain, no open file), and nobody of that user
can look into it; it is ended when its time is over, when the caller goes, and whatever else happens; what it says is bounded,
and what it does not say is told as such. Everything that a job needs is loaded before: the user may not be able to read it.

Forked and not executed: an interpreter of its own would take a tenth of a second for each partition. So the caller must have
no other thread (os.fork), which holds for a verb of the command line and not for the daemon.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import selectors
import signal
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROCESSES = 32
"""Children at the same time."""
THREADS = 16
"""Jobs at the same time in one of them."""
_SPARE_SECONDS = 5.0
_ANSWER_LIMIT = 16 * 1024  # bytes for each job
_PIECE = 65536

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Errand:
    """What is to be done as one user: jobs that give what JSON can say, none of which should take longer than ``seconds``."""

    uid: int
    gid: int
    jobs: Sequence[Callable[[], Any]]
    seconds: float

    @property
    def longest(self) -> float:
        """Seconds after which its child is ended."""
        return math.ceil(len(self.jobs) / THREADS) * self.seconds + _SPARE_SECONDS


@dataclass(frozen=True, slots=True)
class Answer:
    """What a job gave, in the words of somebody who may be anybody; or why it gave nothing."""

    value: Any = None
    fault: str = ""


@dataclass(slots=True)
class _Child:
    number: int
    pid: int
    pipe: int
    deadline: float
    said: bytearray = field(default_factory=bytearray)


def run(errands: Sequence[Errand]) -> list[list[Answer]]:
    """Do all errands; the answers stand where the jobs do. Raises OSError when no child can be made."""
    waiting = list(enumerate(errands))[::-1]
    answers = [[Answer(fault="it was not done")] * len(errand.jobs) for errand in errands]
    children: dict[int, _Child] = {}
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or children:
                while waiting and len(children) < PROCESSES:
                    child = _begin(*waiting.pop())
                    children[child.pipe] = child
                    selector.register(child.pipe, selectors.EVENT_READ)
                for child in _ended(selector, children, errands):
                    _fill(answers[child.number], bytes(child.said))
                    selector.unregister(child.pipe)
                    _end(children.pop(child.pipe))
        finally:
            for child in children.values():
                _end(child)
    return answers


def _begin(number: int, errand: Errand) -> _Child:
    reading, writing = os.pipe()
    caller = os.getpid()
    try:
        pid = os.fork()
        if not pid:
            _live(errand, writing, caller)
    except OSError:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    os.set_blocking(reading, False)
    return _Child(number, pid, reading, time.monotonic() + errand.longest)


def _ended(
    selector: selectors.BaseSelector, children: dict[int, _Child], errands: Sequence[Errand]
) -> list[_Child]:
    """Wait until somebody says something or is late; give those who are done with."""
    first = min(child.deadline for child in children.values())
    found = [children[key.fd] for key, _ in selector.select(max(0.0, first - time.monotonic()))]
    done = [child for child in found if _hear(child, len(errands[child.number].jobs) * _ANSWER_LIMIT)]
    now = time.monotonic()
    return done + [child for child in children.values() if child.deadline <= now and child not in done]


def _hear(child: _Child, limit: int) -> bool:
    """Take what a child says; whether that was all, or too much."""
    piece = os.read(child.pipe, _PIECE)
    child.said += piece
    return not piece or len(child.said) > limit


def _end(child: _Child) -> None:
    """End a child. Its number is its own until it is waited for."""
    os.close(child.pipe)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # where the caller was started with SIGCHLD ignored
        os.waitpid(child.pid, 0)


def _fill(answers: list[Answer], said: bytes) -> None:
    """Read what a child said; a line that it did not finish is none."""
    answers[:] = [Answer(fault="it came to no end in time, or was ended")] * len(answers)
    for line in said.split(b"\n")[:-1]:
        try:
            found = json.loads(line)
            number, value, fault = found["job"], found["value"], found["fault"]
        except (ValueError, RecursionError, TypeError, KeyError):
            continue
        if isinstance(number, int) and 0 <= number < len(answers) and isinstance(fault, str):
            answers[number] = Answer(value, fault)


# --- the child --------------------------------------------------------------------------------------------------------


def _live(errand: Errand, pipe: int, caller: int) -> NoReturn:
    """Be the child: nothing of the caller's is unwound, flushed or closed twice."""
    status = 1
    try:
        gc.disable()  # an old object that is collected would close a number that is somebody else's by now
        _become(errand, pipe, caller)
        with ThreadPoolExecutor(THREADS) as pool:
            pending = [pool.submit(_line, number, job) for number, job in enumerate(errand.jobs)]
            for future in as_completed(pending):
                _say(pipe, future.result())
        status = 0
    finally:
        os._exit(status)


def _become(errand: Errand, pipe: int, caller: int) -> None:
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    os.closerange(3, pipe)
    os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX"))
    os.setgroups([])
    os.setresgid(errand.gid, errand.gid, errand.gid)
    os.setresuid(errand.uid, errand.uid, errand.uid)
    # after the change of user, which undoes the second (prctl(2))
    for option, value in (
        (_PR_SET_NO_NEW_PRIVS, 1),
        (_PR_SET_PDEATHSIG, signal.SIGKILL),
        (_PR_SET_DUMPABLE, 0),
    ):
        if _libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != caller:
        raise ProcessLookupError("the caller has gone")


def _line(number: int, job: Callable[[], Any]) -> bytes:
    try:
        return json.dumps({"job": number, "value": job(), "fault": ""}).encode() + b"\n"
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told, and other jobs go on
        return (
            json.dumps({"job": number, "value": None, "fault": f"{type(error).__name__}: {error}"}).encode()
            + b"\n"
        )


def _say(pipe: int, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(pipe, rest) :]
