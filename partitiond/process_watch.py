"""The thread that hears at once when a process of supervisord's ends, or supervisord itself: nobody is asked for it.

Our plug-in in supervisord sends a datagram for each process that ended; what is sent while no daemon listens is lost, and found
by the sweep. That supervisord is gone is told by the kernel (pidfd_open(2)), or found out by who looks for it, where it ended
before anybody watched it; to start it again is the sweep's, which is woken.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

from partitiond.process_events import ProcessEnded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from partitiond.context import Context

logger = logging.getLogger(__name__)

SUPERVISOR = ""
"""The name of supervisord among those that are watched."""

EVENTS = "events.sock"
_DATAGRAM = 65536
_AFTER_ERROR = 5.0
# the sweep is woken for one that is not there, and then ever more seldom, up to its own rhythm: it may not be able to start it
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 60.0


class ProcessWatch(threading.Thread):
    """Calls ``context.process_ended`` for each process that ended, and ``wake`` when supervisord has."""

    def __init__(self, context: Context, wake: Callable[[], None]) -> None:
        super().__init__(name="processes", daemon=True)
        self._context, self._wake = context, wake
        self._turn = threading.Lock()
        self._watched: tuple[int, int] | None = None  # supervisord's process id and a descriptor of it
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._events: socket.socket | None = None
        self._stopping = False
        self._pause, self._wakes_at = _FIRST_PAUSE, 0.0

    def attend(self, pids: Mapping[str, int]) -> None:
        """Watch this supervisord from now on; for one that is not there (any more) the sweep is woken."""
        pid = pids.get(SUPERVISOR, 0)
        with self._turn:
            if self._watched is not None and self._watched[0] == pid:
                return
            self._let_go()
            with contextlib.suppress(ProcessLookupError):
                self._watched = (pid, os.pidfd_open(pid)) if pid else None
            missed = self._is_missed()
        self._poke()
        if missed:
            self._wake()

    def _is_missed(self) -> bool:
        now = time.monotonic()
        if self._watched is not None:
            self._pause, self._wakes_at = _FIRST_PAUSE, now
            return False
        if now < self._wakes_at:
            return False
        self._wakes_at, self._pause = now + self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        return True

    def _let_go(self) -> None:
        if self._watched is not None:
            os.close(self._watched[1])
            self._watched = None

    def _poke(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full: there is something to read
            os.write(self._write, b"x")

    def run(self) -> None:
        """Wait for the end of a process, until :meth:`close`."""
        while not self._stopping:
            try:
                if self._events is None:
                    self._events = _listen(self._context.supervisor.directory)
                self._round(self._events)
            except Exception:
                # who watches must not end because of a mistake of ours: nobody would miss it
                logger.exception("watching processes: unexpected error")
                time.sleep(_AFTER_ERROR)

    def _round(self, sender: socket.socket) -> None:
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        poll.register(sender, select.POLLIN)
        with self._turn:
            watched = self._watched
        if watched is not None:
            poll.register(watched[1], select.POLLIN)
        ready = {descriptor for descriptor, what in poll.poll() if what & select.POLLIN}
        if self._read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._read, 4096)
        gone = False
        with self._turn:
            # who attends may have closed it meanwhile, and its number may be another's by now
            if watched is not None and watched == self._watched and _has_ended(watched[1]):
                self._let_go()
                gone = True
        if self._stopping or self._context.stop.is_set():
            return
        if sender.fileno() in ready:
            self._tell(sender)
        if gone:
            logger.warning("supervisord ended; it is started again")
            self._wake()

    def _tell(self, sender: socket.socket) -> None:
        while True:
            try:
                told = sender.recv(_DATAGRAM)
            except BlockingIOError:
                return
            try:
                ended = ProcessEnded(**json.loads(told))
            except (ValueError, TypeError):  # of a supervisord with a plug-in of another version
                logger.warning("supervisord told what nobody understands: %r", told[:200])
                continue
            self._context.process_ended(ended)

    def close(self) -> None:
        """End the thread and let go of everything."""
        self._stopping = True
        self._poke()
        if self.is_alive():
            self.join(2.0)
        with self._turn:
            self._let_go()
        if self._events is not None:
            self._events.close()
            (self._context.supervisor.directory / EVENTS).unlink(missing_ok=True)
        os.close(self._read)
        os.close(self._write)


def _listen(directory: Path) -> socket.socket:
    """A socket in a directory of root's: nobody else can send to it. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    held = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        (directory / EVENTS).unlink(missing_ok=True)
        # by the descriptor: a path may be longer than the address of a socket can be
        made.bind(f"/proc/self/fd/{held}/{EVENTS}")
    except OSError:
        made.close()
        raise
    finally:
        os.close(held)
    return made


def _has_ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
