"""The daemon's end of runs of promises: the process that starts them, and one run from its begin to its end.

Promises: a run is heard up to a bound in bytes and in time and then ended; whatever becomes of the process that starts runs,
the caller gets what was said, or an error of the family.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitiond import execute, promise_plugins
from partitiond.errors import PartitiondError
from partitiond.promise_results import Ran, take_line
from partitiond.promise_runner import LINE_LIMIT, MOST

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# isolated, and without site: nothing of the environment, and a start in some 20 ms
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from partitiond.promise_server import main; main()"
_ANSWER_LIMIT = MOST * LINE_LIMIT
_OVERTIME = 10.0  # a run knows its time itself; this is for one that was kept from it
_LOOK = 0.5
_END_WITHIN = 10.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is to be, and as whom: ``pin`` and ``ipc`` name the namespaces, none where they are the node's own."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    cwd: str
    pin: str = ""
    ipc: str = ""


class PromiseServer:
    """The process that starts runs; from any thread."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._turn = threading.Lock()
        self._number = 0
        self._channel = ours
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, str(Path(__file__).resolve().parent.parent)],
                cwd="/",
                env={"PATH": execute.PATH, "LANG": "C.UTF-8"},
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise _gone(f"cannot be started: {error.strerror}") from error
        finally:
            theirs.close()

    def close(self) -> None:
        """End it, with all that it still runs."""
        self._channel.close()
        # Popen.wait with a limit looks again and again, with pauses; nobody else reaps it, so the number is still its own
        with os.fdopen(os.pidfd_open(self._process.pid)) as watch:
            poll = select.poll()
            poll.register(watch, select.POLLIN)
            if not poll.poll(_END_WITHIN * 1000):
                self._process.kill()
        self._process.wait()

    def run(self, place: Place, job: Mapping[str, Any], stop: threading.Event) -> Ran:
        """Have one run made; ends it when ``stop`` is set. Raises PartitiondError ``promises.server``."""
        began = time.monotonic()
        with _as_file(job) as content:
            reading, writing = os.pipe2(os.O_CLOEXEC)
            try:
                number = self._send_job(place, content, writing)
            except BaseException:
                os.close(reading)
                raise
            finally:
                os.close(writing)
        try:
            ran = self._listen(number, reading, began + job["budget"] + job["timeout"] + _OVERTIME, stop)
        finally:
            os.close(reading)
        ran.seconds = time.monotonic() - began
        return ran

    def _send_job(self, place: Place, content: int, writing: int) -> int:
        with self._turn:
            self._number += 1
            number = self._number
        message = {
            "run": number,
            "uid": place.uid,
            "gid": place.gid,
            "groups": place.groups,
            "cwd": place.cwd,
            "pin": place.pin,
            "ipc": place.ipc,
        }
        self._send(message, [content, writing])
        return number

    def _send(self, message: Mapping[str, object], descriptors: list[int]) -> None:
        try:
            socket.send_fds(
                self._channel, [json.dumps(message).encode("ascii")], descriptors, socket.MSG_NOSIGNAL
            )
        except OSError as error:
            raise _gone(f"does not listen: {error.strerror}") from error

    def _listen(self, number: int, reading: int, deadline: float, stop: threading.Event) -> Ran:
        """Hear a run to its end: nobody holds the other end any more."""
        ran, buffer, heard, killed = Ran(), bytearray(), 0, False
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        while True:
            if poll.poll(_LOOK * 1000):
                piece = os.read(reading, 1 << 16)
                if not piece:
                    break
                heard += len(piece)
                if not killed:
                    buffer += piece
                    _take(ran, buffer)
            over = time.monotonic() > deadline
            if killed and over:
                break  # in uninterruptible sleep; what it says is nobody's now
            if not killed and (over or stop.is_set() or ran.fault or heard > _ANSWER_LIMIT):
                killed, deadline = True, time.monotonic() + _END_WITHIN
                ran.fault = ran.fault or ("its time was over" if over else "it said too much")
                self._send({"kill": number}, [])
        if not ran.whole and not ran.fault:
            ran.fault = "the run was ended from outside"
        return ran


def _take(ran: Ran, buffer: bytearray) -> None:
    *lines, rest = buffer.split(b"\n")
    for line in lines:
        try:
            take_line(ran, bytes(line))
        except (ValueError, RecursionError) as error:
            ran.fault = f"the run said what cannot be understood: {error}"[:500]
            return
    if len(rest) > LINE_LIMIT:
        ran.fault = "the run said what cannot be understood: a line without end"
    buffer[:] = rest


@contextmanager
def _as_file(job: Mapping[str, Any]) -> Iterator[int]:
    """What a run is to do, as a file of memory: names may be long, and messages of sockets may not."""
    descriptor = os.memfd_create("promises", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as stream:
            # its text: where it lies may be out of the partition's sight
            text = Path(promise_plugins.__file__).read_text("utf-8")
            stream.write(json.dumps({**job, "program": text}).encode("ascii"))
        yield descriptor
    finally:
        os.close(descriptor)


def _gone(why: str) -> PartitiondError:
    return PartitiondError(
        "promises.server",
        f"the process that runs promises {why}",
        hint="it is tried again by itself; the log of the daemon says what was wrong",
        retryable=True,
    )
