"""When to look at the node after the kernel told of changes: soon, once for many, and ever more seldom in a fight.

Pure but for its memory; times are seconds of one monotonic clock. A *cause* names what changed (``tap/slaptap3``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# changes come in bursts: wait until it is quiet, but not long
QUIET, LONGEST_WAIT = 0.05, 0.2
# so often a cause is answered at once; then it has to wait, twice as long each time, up to the rhythm of the sweep
FREE, FIRST_HOLD, LONGEST_HOLD = 3, 0.5, 60.0
# what stayed quiet for so long, or for twice its last hold, starts anew
_FORGOTTEN = 30.0


@dataclass(slots=True)
class _Strikes:
    """How often a cause made us look, when last, and until when it has to wait."""

    count: int = 0
    last: float = 0.0
    until: float = 0.0


class Pacer:
    """What waits to be looked at, and when that is due.  Not thread safe."""

    def __init__(self) -> None:
        self._strikes: dict[str, _Strikes] = {}
        # each by its first notice: waiting for quiet, held back in a fight, announced and not yet looked at
        self._open: dict[str, float] = {}
        self._held: dict[str, float] = {}
        self._announced: dict[str, float] = {}
        self._first = self._last = 0.0
        self._urgent = False

    def note(self, cause: str, now: float, *, urgent: bool = False) -> None:
        """Something changed; ``urgent``: do not wait for quiet."""
        if cause in self._announced or cause in self._held:
            return
        strikes = self._strikes.get(cause)
        if strikes is not None and strikes.until > now:
            self._held[cause] = now
            return
        if not self._open:
            self._first = now
        self._last = now
        self._urgent = self._urgent or urgent
        self._open.setdefault(cause, now)

    def due(self) -> float | None:
        """When the next look is due; None: when the kernel tells of something."""
        times = [self._strikes[cause].until for cause in self._held]
        if self._open:
            quiet = min(self._last + QUIET, self._first + LONGEST_WAIT)
            times.append(self._first if self._urgent else quiet)
        return min(times, default=None)

    def announce(self, now: float) -> bool:
        """Whether a look is due now; the caller sees to it that one is taken."""
        due = self.due()
        if due is None or due > now:
            return False
        # one look answers everything
        self._announced |= self._held | self._open
        self._held, self._open, self._urgent = {}, {}, False
        return True

    def take(self) -> dict[str, float]:
        """Return all causes that wait, with the time of the first notice of each: they are being looked at now."""
        found = self._announced | self._held | self._open
        self._announced, self._held, self._open, self._urgent = {}, {}, {}, False
        return found

    def strike(self, causes: Iterable[str], now: float) -> list[str]:
        """Count a look that these causes led to; return those that are now held back, as a fight, for the first time."""
        self._forget(now)
        fights = []
        for cause in causes:
            strikes = self._strikes.setdefault(cause, _Strikes())
            strikes.count += 1
            strikes.last = now
            if strikes.count > FREE:
                doublings = min(strikes.count - FREE - 1, 20)
                strikes.until = now + min(LONGEST_HOLD, FIRST_HOLD * 2**doublings)
                if not doublings:
                    fights.append(cause)
        return fights

    def _forget(self, now: float) -> None:
        quiet = [
            cause
            for cause, one in self._strikes.items()
            if now - one.last > max(_FORGOTTEN, 2 * (one.until - one.last)) and cause not in self._held
        ]
        for cause in quiet:
            del self._strikes[cause]


class Allowance:
    """So much each partition may have told in so long: what tenants and strangers do must not fill the logs."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._used: dict[str, tuple[float, int]] = {}

    def left(self, partition: str) -> int:
        """How much may still be told."""
        began, used = self._used.get(partition, (0.0, 0))
        return self._most - used if time.monotonic() - began < self._seconds else self._most

    def take(self, partition: str, count: int) -> None:
        """Note what was told."""
        now = time.monotonic()
        began, used = self._used.get(partition, (now, 0))
        self._used[partition] = (began, used + count) if now - began < self._seconds else (now, count)
