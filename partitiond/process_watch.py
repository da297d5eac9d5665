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
        """Watch just these processes from now on."""
        with self._turn:
            if {name: pid for name, (pid, _) in self._watched.items()} == dict(pids):
                return
            for name in [name for name, (pid, _) in self._watched.items() if pids.get(name) != pid]:
                os.close(self._watched.pop(name)[1])
            for name, pid in pids.items():
                if name not in self._watched:
                    with contextlib.suppress(ProcessLookupError):
                        self._watched[name] = (pid, os.pidfd_open(pid))
        self._poke()

    def _poke(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full: there is something to read
            os.write(self._write, b"x")

    def run(self) -> None:
        """Wait for the end of a process, until :meth:`close`."""
        while not self._stopping:
            poll = select.poll()
            poll.register(self._read, select.POLLIN)
            with self._turn:
                names = {descriptor: name for name, (_, descriptor) in self._watched.items()}
            for descriptor in names:
                poll.register(descriptor, select.POLLIN)
            ready = [descriptor for descriptor, _ in poll.poll()]
            if self._read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._read, 4096)
            ended = [names[descriptor] for descriptor in ready if descriptor in names]
            if ended and not self._stopping:
                self._ended(ended)

    def _ended(self, names: list[str]) -> None:
        gone: dict[str, int] = {}
        with self._turn:
            for name in names:
                if name in self._watched:
                    gone[name], descriptor = self._watched.pop(name)
                    os.close(descriptor)
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
