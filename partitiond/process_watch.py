"""The thread that hears at once when supervisord or a stunnel ends: else it takes a second, or a minute, to be found.

supervisord looks at its children once a second, and takes two looks to start one again (supervisor 4.2, ``runforever``), but
also whenever somebody asks it something; so it is asked. That it is gone itself is found by the sweep only, so that is woken.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from typing import TYPE_CHECKING

from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from partitiond.context import Context

logger = logging.getLogger(__name__)

SUPERVISOR = ""
"""The name of supervisord among those that are watched; the others are groups."""

_ASKED = 20
_PAUSE = 0.02
_AFTER_ERROR = 5.0


class ProcessWatch(threading.Thread):
    """Watches the processes that :meth:`attend` names; ``wake`` is called when supervisord ends."""

    def __init__(self, context: Context, wake: Callable[[], None]) -> None:
        super().__init__(name="processes", daemon=True)
        self._context, self._wake = context, wake
        self._turn = threading.Lock()
        self._watched: dict[
            str, tuple[int, int]
        ] = {}  # by name: process id and a descriptor of it, pidfd_open(2)
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopping = False

    def attend(self, pids: Mapping[str, int]) -> None:
        """Watch just these processes from now on; one that is gone already is passed over.

        Of one that was heard of since the caller looked, it is the newer that is watched on.
        """
        with self._turn:
            for name in self._watched.keys() - pids.keys():
                os.close(self._watched.pop(name)[1])
            for name, pid in pids.items():
                self._watch(name, pid)
        self._poke()

    def _watch(self, name: str, pid: int) -> None:
        before = self._watched.get(name)
        if before is not None and before[0] == pid:
            return
        try:
            self._watched[name] = (pid, os.pidfd_open(pid))
        except ProcessLookupError:
            return
        if before is not None:
            os.close(before[1])

    def _poke(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full: there is something to read
            os.write(self._write, b"x")

    def run(self) -> None:
        """Wait for the end of a process, until :meth:`close`."""
        while not self._stopping:
            try:
                self._round()
            except Exception:
                # who watches must not end because of a mistake of ours: nobody would miss it
                logger.exception("watching processes: unexpected error")
                time.sleep(_AFTER_ERROR)

    def _round(self) -> None:
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        with self._turn:
            names = {descriptor: name for name, (_, descriptor) in self._watched.items()}
        for descriptor in names:
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, what in poll.poll() if what & select.POLLIN}
        if self._read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._read, 4096)
        gone: dict[str, int] = {}
        with self._turn:
            for descriptor in ready & names.keys():
                name = names[descriptor]
                # who attends may have closed it meanwhile, and its number may be another's by now
                if self._watched.get(name, (0, -1))[1] == descriptor and _has_ended(descriptor):
                    gone[name] = self._watched.pop(name)[0]
                    os.close(descriptor)
        if self._stopping or self._context.stop.is_set():
            return
        if SUPERVISOR in gone:
            logger.warning("supervisord ended; it is started again")
            self._wake()
        elif gone:
            self._hasten(gone)

    def _hasten(self, gone: Mapping[str, int]) -> None:
        """Let supervisord take its turns now; what it does not start again is the sweep's to find."""
        supervisor, began = self._context.supervisor, time.monotonic()
        left = dict(gone)
        try:
            for _ in range(_ASKED):
                found = {item.group: item.pid for item in supervisor.processes() if item.group in left}
                for name, pid in found.items():
                    if pid not in (0, left[name]):
                        logger.info("%s ended and runs again after %.3f s", name, time.monotonic() - began)
                        del left[name]
                        with self._turn:
                            self._watch(name, pid)
                if not left:
                    return
                time.sleep(_PAUSE)
        except PartitiondError as error:
            logger.info("supervisord does not answer: %s", error)

    def close(self) -> None:
        """End the thread and let go of everything."""
        self._stopping = True
        self._poke()
        if self.is_alive():
            self.join(2.0)
        self.attend({})
        os.close(self._read)
        os.close(self._write)


def _has_ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return any(what & select.POLLIN for _, what in poll.poll(0))
