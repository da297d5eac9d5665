"""supervisord's loop woken by what happens instead of once a second.

A child that ends wakes it (its signal, by ``signal.set_wakeup_fd``), and so does the moment at which a process changes its
state by time alone: it has run for long enough, is to be started again, or has not ended in time. Else it sleeps. When it
wakes it looks at the groups that something has happened to, and not at each of a thousand processes for each line of a log.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Any

from supervisor.poller import PollPoller
from supervisor.states import ProcessStates, SupervisorStates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# what nobody has thought of waits no longer than this
_LONGEST = 30.0
_ENDING = 0.02
_A_MOMENT = 0.002
IN_TRANSIT = (ProcessStates.STARTING, ProcessStates.BACKOFF, ProcessStates.STOPPING)


class Poller(PollPoller):  # type: ignore[misc]
    """Waits for as long as nothing can be due; ``hurry``: something has changed, so there is another turn at once.

    ``restless`` are the groups that are looked at in the next turn. ``finish`` returns whether there is nothing left that has
    to be tried again soon.
    """

    hurry = True

    def __init__(self, options: Any, sockets: dict[int, Any]) -> None:
        super().__init__(options)
        self._sockets = sockets
        # by id: processes of supervisor compare as equal by priority, and cannot be hashed
        self._in_transit: dict[int, Any] = {}
        self.outputs = Outputs()
        self.foreign: set[str] = set()  # groups whose processes are supervisor's own
        self._groups: dict[str, Any] = {}
        self.finish: Callable[[], bool] = _nothing_left
        self.restless: set[str] = set()

    def attend(self, supervisord: Any) -> None:
        """Let the loop of this supervisord wait for one descriptor instead of one for each process of ours."""
        self._groups = groups = supervisord.process_groups

        def of_others() -> dict[int, Any]:
            found: dict[int, Any] = {}
            for name in self.foreign & groups.keys():
                found.update(groups[name].get_dispatchers())
            return found

        supervisord.get_process_map = of_others

    def close(self) -> None:
        """End with the loop: when supervisord begins anew in place, the numbers of descriptors will be others'."""
        self.outputs.close()
        super().close()

    def attend_group(self, group: Any) -> None:
        """Let a group that is new take its turns only when it is restless, as it is now."""
        name, turn = group.config.name, group.transition

        def transition() -> None:
            if name in self.restless and self._is_there(name, group):
                self.restless.discard(name)
                turn()  # what changes by that is told, and makes it restless again
                if any(process.state in IN_TRANSIT for process in group.processes.values()):
                    self.restless.add(name)

        group.transition = transition
        self.restless.add(name)
        self.hurry = True

    def _is_there(self, name: str, group: Any) -> bool:
        """Whether supervisord still has a group: it lists them before it waits, and one that was exchanged for another
        meanwhile must not take the turn of that.
        """
        return self._groups.get(name) is group

    def changed(self, process: Any) -> None:
        """Take note of a process that has another state now."""
        self.hurry = True
        if process.group is not None:
            self.restless.add(process.group.config.name)
        if process.state in IN_TRANSIT:
            self._in_transit[id(process)] = process
        else:
            self._in_transit.pop(id(process), None)

    def poll(self, timeout: float) -> Any:
        """Wait; how long supervisord would is of no account."""
        del timeout
        pause, self.hurry = self._pause(), False
        found = super().poll(pause)
        if pause == _LONGEST:
            self.restless.update(self._groups)  # what nobody has thought of
        return found

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
        if not self.finish():
            found.append(_ENDING)
        # somebody may set the clock
        return max(0.0, min((*found, 1.0 if found else _LONGEST)))


def _nothing_left() -> bool:
    return True


def _due(process: Any) -> float:
    """When the state of a process changes by time alone."""
    if process.state == ProcessStates.STARTING:
        return float(process.laststart + process.config.startsecs)
    return float(process.delay)


class Outputs:
    """What processes say, and the ends of those that were taken over, behind one descriptor (epoll(7))."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._dispatchers: dict[int, Any] = {}

    def begin(self, sockets: dict[int, Any]) -> None:
        """Join the loop."""
        for number, one in list(sockets.items()):
            if isinstance(one, Outputs):
                del sockets[number]
        sockets[self._epoll.fileno()] = self

    def add(self, dispatchers: dict[int, Any]) -> None:
        """Wait for these, too."""
        for number, one in dispatchers.items():
            self._dispatchers[number] = one
            self._epoll.register(number, select.EPOLLIN)

    def discard(self, numbers: Iterable[int]) -> None:
        """Wait for these no longer; before they are closed: a child that is just being made has them, too."""
        for number in numbers:
            if self._dispatchers.pop(number, None) is not None:
                self._epoll.unregister(number)

    def close(self) -> None:
        """Wait for nothing any more."""
        self._dispatchers = {}
        self._epoll.close()

    def readable(self) -> bool:
        """Always waited for, until the loop ends."""
        return not self._epoll.closed

    def writable(self) -> bool:
        """Nothing is written."""
        return False

    def handle_read_event(self) -> None:
        """Somebody said something."""
        for number, _ in self._epoll.poll(0):
            one = self._dispatchers.get(number)
            if one is None:
                continue
            try:
                one.handle_read_event()
            except Exception:  # noqa: BLE001 - as supervisor's own loop has it: one must not end all
                one.handle_error()
            if not one.readable():
                self.discard([number])

    def handle_error(self) -> None:
        """A mistake of ours; each of them has its own."""


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
