"""Programs run as another user: clean environment, bounded in time, ended with everything they started.

The switch of user is left to util-linux's ``setpriv`` (about 2 ms), which also forbids new privileges and asks the kernel
to end the program when the daemon dies, so that a build never runs twice side by side.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from partitiond import files, procfs
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SETPRIV = "/usr/bin/setpriv"
_GRACE = 5.0  # seconds from SIGTERM to SIGKILL
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: its exit status (negative: the signal), and whether we ended it."""

    status: int
    cut_short: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with status 0."""
        return self.status == 0 and self.cut_short is None


class Running(Protocol):
    """A program that leads a session of its own, as whoever started it can wait for it."""

    @property
    def pid(self) -> int:
        """Its number, which nobody else gets as long as it is not waited for."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative for a signal. Raises subprocess.TimeoutExpired."""


class _Program:
    """A child of ours, of which only the end is waited for.

    waitpid(2) tells of a stop, too, when the child has made us its debugger (``PTRACE_TRACEME``), and leave it there.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self.pid = process, process.pid
        try:
            self._ends = os.pidfd_open(process.pid)
        except OSError:  # no descriptors left: nobody could watch over it
            process.kill()
            process.wait()
            raise

    def wait(self, timeout: float | None = None) -> int:
        """As :meth:`Running.wait`."""
        poll = select.poll()
        poll.register(self._ends, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self._process.wait()

    def close(self) -> None:
        """Have it taken away, too, when it was not waited for: it is killed by now."""
        self.wait()
        os.close(self._ends)


def environment(home: str, user: str) -> dict[str, str]:
    """The whole environment of such a program: nothing of the daemon's own."""
    return {
        "HOME": home,
        "USER": user,
        "LOGNAME": user,
        "SHELL": "/bin/sh",
        "PATH": PATH,
        "LANG": "C.UTF-8",
        "PYTHONNOUSERSITE": "1",
    }


def switch(user: str, group: str, *options: str) -> tuple[str, ...]:
    """The words before a command that let root run it as a user, with that user's groups and no way to gain more.

    An ordinary user runs what it runs as itself (``setpriv`` takes options alone, too).
    """
    if os.geteuid() != 0:
        return (SETPRIV, *options, "--") if options else ()
    return (
        *(SETPRIV, "--reuid", user, "--regid", group, "--init-groups", *options),
        *("--no-new-privs", "--"),
    )


def as_user(
    user: str,
    group: str,
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: int,
    stop: threading.Event,
    timeout: float | None = None,
    record: Path | None = None,
    enter: Sequence[str] = (),
) -> Outcome:
    """Run a command as a user with that user's groups; output goes to the descriptor ``log``.

    Ends the program when ``stop`` is set or ``timeout`` (seconds) is over, and what is left of its session in any case.
    ``enter`` are words that let it begin in other namespaces (``namespaces.entry``).
    ``record`` is a file of root's that names the session while it lives: what a killed daemon left of it is ended first.
    Raises PartitiondError ``execute.failed`` when it cannot be started.
    """
    if record is not None:
        end_cut_off(record)
    try:
        process = subprocess.Popen(
            [*enter, *switch(user, group, "--pdeathsig", "KILL"), *command],
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            umask=0o027,
        )
    except OSError as error:
        raise PartitiondError(
            "execute.failed",
            f"cannot run {command[0]}: {error.strerror}",
            resource=str(cwd),
            hint="is util-linux installed?",
        ) from error
    with contextlib.closing(_Program(process)) as program:
        return watch(program, user, stop=stop, timeout=timeout, record=record)


def watch(
    process: Running,
    user: str,
    *,
    stop: threading.Event,
    timeout: float | None = None,
    record: Path | None = None,
) -> Outcome:
    """Wait for a program of a user's, and end it and its session as :func:`as_user` says."""
    try:
        if record is not None:
            _write_record(record, process.pid, user)
        return _wait(process, stop, None if timeout is None else time.monotonic() + timeout)
    finally:
        _end_session(process.pid)
        if record is not None:
            record.unlink(missing_ok=True)


def _wait(process: Running, stop: threading.Event, deadline: float | None) -> Outcome:
    pause = 0.01
    while True:
        try:
            return Outcome(process.wait(pause))
        except subprocess.TimeoutExpired:
            pause = min(pause * 1.5, 0.5)
        if stop.is_set():
            return _end(process, "the daemon is stopping")
        if deadline is not None and time.monotonic() > deadline:
            return _end(process, "took too long")


def _end(process: Running, why: str) -> Outcome:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
    return Outcome(process.wait(), why)


def _write_record(record: Path, session: int, user: str) -> None:
    record.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    files.write_path(record, f"{session} {pwd.getpwnam(user).pw_uid}\n".encode(), mode=0o600)


def end_cut_off(record: Path) -> None:
    """End what is left of a program whose daemon was killed.

    The kernel ends the program itself (``--pdeathsig``), but not what it had started. The user is compared as well: after a
    restart of the machine the number may be somebody else's session.
    """
    try:
        session, uid = map(int, record.read_bytes().split())
    except FileNotFoundError:
        return
    except ValueError:
        record.unlink(missing_ok=True)
        return
    _end_session(session, uid)
    record.unlink(missing_ok=True)


def _end_session(session: int, uid: int | None = None) -> None:
    """Kill what a program left running in its session, with ``uid`` only that user's processes.

    The session and not only the process group: a shell with job control gives each job a group of its own. Its number
    is not given to another process as long as one of its members lives.
    """
    for _ in range(100):
        found = [
            pid
            for pid in procfs.pids()
            if procfs.session_of(pid) == session and uid in (None, procfs.user_of(pid))
        ]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def end_processes_of(uid: int, gid: int) -> None:
    """End every process of a user, also those that fork meanwhile.

    ``kill(-1)`` by the user itself reaches all of its processes in one sweep of the kernel (kill(2)), which a scan of
    ``/proc`` cannot promise. Raises PartitiondError ``execute.survivors``, or ``execute.root`` for root, of whose
    processes we are one.
    """
    if uid == os.geteuid() != 0:
        return  # of an unmanaged node, whose user has much else that runs; supervisord has ended what was the partition's
    if uid <= 0:
        raise PartitiondError(
            "execute.root", "root's processes are not ended", hint="give the user a uid of its own"
        )
    command = [
        SETPRIV,
        "--reuid",
        str(uid),
        "--regid",
        str(gid),
        "--clear-groups",
        "--",
        # the shell's own kill: the program of that name is in procps, which a small Debian lacks
        "/bin/sh",
        "-c",
        "kill -KILL -1",
    ]
    swept = False
    for _ in range(20):
        found = _has_processes(uid)
        if found is False or (found is None and swept):
            return
        subprocess.run(
            command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"PATH": PATH}
        )
        swept = True
        time.sleep(0.02)
    raise PartitiondError(
        "execute.survivors",
        f"processes of uid {uid} do not end (in uninterruptible sleep?)",
        hint="look at them with ps, then try again",
        retryable=True,
    )


def _has_processes(uid: int) -> bool | None:
    """Whether the user has a process that is not a zombie; None where nobody can say.

    One that forks and ends again and again has ended when it is looked at, and its child is not in the list. So it may be
    whatever has ended since it was listed, or is a zombie.
    """
    ended = False
    for pid in procfs.pids():
        owner = procfs.user_of(pid)
        if owner == uid:
            return True
        ended = ended or owner is None
    return None if ended else False
