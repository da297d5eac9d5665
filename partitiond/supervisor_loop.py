"""supervisord's loop woken by what happens instead of once a second.

A child that ends wakes it (its signal, by ``signal.set_wakeup_fd``), and so does the moment at which a process changes its
state by time alone: it has run for long enough, is to be started again, or has not ended in time. Else it sleeps.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

from supervisor.poller import PollPoller
from supervisor.states import ProcessStates, SupervisorStates

# what nobody has thought of waits no longer than this
_LONGEST = 30.0
_ENDING = 0.02
_A_MOMENT = 0.002
IN_TRANSIT = (ProcessStates.STARTING, ProcessStates.BACKOFF, ProcessStates.STOPPING)


class Poller(PollPoller):  # type: ignore[misc]
    """Waits for as long as nothing can be due; ``hurry``: something has changed, so all are looked at again at once."""

    hurry = True

    def __init__(self, options: Any, sockets: dict[int, Any]) -> None:
        super().__init__(options)
        self._sockets = sockets
        # by id: processes of supervisor compare as equal by priority, and cannot be hashed
        self._in_transit: dict[int, Any] = {}

    def changed(self, process: Any) -> None:
        """Take note of a process that has another state now."""
        self.hurry = True
        if process.state in IN_TRANSIT:
            self._in_transit[id(process)] = process
        else:
            self._in_transit.pop(id(process), None)

    def poll(self, timeout: float) -> Any:
        """Wait; how long supervisord would is of no account."""
        del timeout
        pause, self.hurry = self._pause(), False
        return super().poll(pause)

    def _pause(self) -> float:
        # it takes one signal at a turn
        if self.hurry or self.options.signal_receiver._signals_recvd:  # noqa: SLF001 - it has no other way to ask
            return 0.0
        if self.options.mood < SupervisorStates.RUNNING:
            return _ENDING
        now = time.time()
        found = [_due(process) - now + _A_MOMENT for process in self._in_transit.values()]
        # answers that wait for something look for it again after their own pause
        found += [one.delay for one in self._sockets.values() if getattr(one, "delay", 0)]
        # somebody may set the clock
        return max(0.0, min((*found, 1.0 if found else _LONGEST)))


def _due(process: Any) -> float:
    """When the state of a process changes by time alone."""
    if process.state == ProcessStates.STARTING:
        return float(process.laststart + process.config.startsecs)
    return float(process.delay)


class Wake:
    """Lets a signal end the loop's sleep, and what ended be seen before the next turn of the processes."""

    def __init__(self, supervisord: Any) -> None:
        self._supervisord = supervisord
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def begin(self, sockets: dict[int, Any]) -> None:
        """Join the loop; one of a run before (SIGHUP) has lost its descriptors."""
        for number, one in list(sockets.items()):
            if isinstance(one, Wake):
                del sockets[number]
        sockets[self._read] = self
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def readable(self) -> bool:
        """Always waited for."""
        return True

    def writable(self) -> bool:
        """Nothing is written by the loop."""
        return False

    def handle_read_event(self) -> None:
        """Children may have ended."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)
        self._supervisord.reap()

    def handle_error(self) -> None:
        """A mistake of ours, or of supervisord's own in :meth:`handle_read_event`; what was missed comes up in the loop."""
        self._supervisord.options.logger.critical("reaping failed")
