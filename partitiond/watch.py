"""The thread that listens to the kernel and wakes the converge lane when something of ours changes."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from typing import TYPE_CHECKING

from netplan.errors import NetplanError
from netplan.legacy_monitor import GLANCE_SECONDS, LegacyMonitor
from netplan.monitor import Monitor
from partitiond.errors import sentence
from partitiond.pacing import Pacer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from netplan.model import Link
    from partitiond.config import Config
    from partitiond.reflexes import Reflexes

logger = logging.getLogger(__name__)

_AFTER_ERROR = 5.0


def names(config: Config) -> frozenset[str]:
    """The links that matter to a node whether they bear our mark or not."""
    keys, amount = config.network, range(config.partition_amount)
    taps = (f"{config.tap_base}{index}" for index in amount) if config.create_tap else ()
    tuns = (f"slaptun{index}" for index in amount) if keys.create_tun else ()
    mesh = (config.mesh.interface,) if config.mesh else ()
    return frozenset(
        (keys.interface, keys.ipv4_interface, keys.bridge or "", *keys.bridge_ports, *mesh, *taps, *tuns)
    )


def _legacy(config: Config) -> LegacyMonitor | None:
    """Of rules of iptables nobody tells: they are looked at."""
    return LegacyMonitor() if config.packet_filter == "iptables" else None


class Watch(threading.Thread):
    """Listens from when it is made; wakes from when it is started.  Raises NetplanError ``network.netlink`` when made.

    ``reflexes`` are called at once, by this thread, when a table of the packet filter is gone or a tap changed.
    """

    def __init__(self, config: Config, wake: Callable[[], None], reflexes: Reflexes | None = None) -> None:
        super().__init__(name="watch", daemon=True)
        self._wake, self._reflexes = wake, reflexes
        self._pacer = Pacer()
        self._turn = threading.Lock()
        self._stopping = False
        self._ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._legacy = _legacy(config)
            self._monitor = Monitor(names(config))
        except NetplanError:
            self._close_pipe()
            raise

    def close(self) -> None:
        """Stop listening; waits for the thread."""
        self._stopping = True
        self._nudge()
        if self.is_alive():
            self.join()
        self._monitor.close()
        self._close_pipe()

    def _close_pipe(self) -> None:
        for end in self._ends:
            os.close(end)

    def _nudge(self) -> None:
        """Make the thread look at the time again."""
        with contextlib.suppress(BlockingIOError):  # it is about to
            os.write(self._ends[1], b"x")

    def attend(self, config: Config) -> None:
        """Listen for the links of another configuration."""
        with self._turn:
            self._monitor.attend(names(config))
            self._legacy = _legacy(config)
        self._nudge()  # it may be time to look at once a second, or no more

    def take(self) -> dict[str, float]:
        """Return what changed until now, by cause, with the time of its first notice; a look that follows answers it.

        Called before that look: what changes while it is taken is told of again.
        """
        with self._turn:
            self._read()
            return self._pacer.take()

    def links(self) -> Mapping[str, Link] | None:
        """Every link, as the kernel has told of it until now; None while it does not tell, which the thread logs."""
        with self._turn:
            self._nudge()  # what is read here is the thread's to announce, and what fails here its to log
            try:
                self._read()
            except NetplanError:
                return None
            return self._monitor.links()

    def strike(self, causes: Iterable[str]) -> list[str]:
        """Count a look for these causes; return those that from now on have to wait (see :class:`Pacer`)."""
        with self._turn:
            return self._pacer.strike(causes, time.monotonic())

    def _read(self) -> tuple[bool, bool]:
        """Note what the kernel told; return whether a table of the packet filter is gone, and whether a tap changed."""
        any_exposed = changed = False
        for notice in (*self._monitor.read(), *(self._legacy.read() if self._legacy else ())):
            # without the packet filter every address is anybody's: that waits for nothing
            exposed = notice.cause.startswith("filter/") and notice.change == "gone"
            self._pacer.note(notice.cause, time.monotonic(), urgent=exposed)
            any_exposed |= exposed
            changed |= notice.cause.startswith("tap/") and notice.change == "changed"
        return any_exposed, changed

    def run(self) -> None:
        """Until it is closed: wait for the kernel, then for quiet, then wake the lane."""
        poll = select.poll()
        for descriptor in (*self._monitor.filenos(), self._ends[0]):
            poll.register(descriptor, select.POLLIN)
        while not self._stopping:
            poll.poll(self._timeout())
            try:
                self._turn_once()
            except NetplanError as error:
                logger.warning(
                    "%s; until then the sweep alone finds drift; again in %.0f s",
                    sentence(error),
                    _AFTER_ERROR,
                )
                self._rest()
            except Exception:
                # a watch that ended would go unnoticed until something drifts
                logger.exception("watch: unexpected error; again in %.0f s", _AFTER_ERROR)
                self._rest()

    def _turn_once(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._ends[0], 1024)
        with self._turn:
            exposed, changed = self._read()
            links = self._monitor.links() if changed else None
            due = self._pacer.announce(time.monotonic())
        if self._reflexes is not None and (exposed or changed):
            self._reflexes(exposed=exposed, links=links)
        if due:
            self._wake()

    def _rest(self) -> None:
        end = time.monotonic() + _AFTER_ERROR
        while not self._stopping and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _timeout(self) -> float | None:
        """Milliseconds until something is due; None to wait for the kernel."""
        with self._turn:
            due = self._pacer.due()
            if self._legacy is not None:
                due = min(due or float("inf"), time.monotonic() + GLANCE_SECONDS)
        return None if due is None else max(0.0, due - time.monotonic()) * 1000 + 1
