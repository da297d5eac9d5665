"""The rhythm of lanes: pauses between passes, drawn so that the nodes of a master do not come together.

Pure but for the dice, so that ten thousand nodes can be simulated with what the daemon does (``tests/bench/polling.py``).
"""

from __future__ import annotations

import random

from slap_client.backoff import Backoff

# what failed is tried again within minutes, also in a lane that has work only once a day
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
# the share of an interval by which a pause may be shorter or longer
JITTER = 0.1
# A whole site comes up together after its power does: what began so soon after the machine spreads its first question.
AFTER_BOOT, SPREAD = 300.0, 30.0
# the master's own word on when to come back is not the same for everybody: some of it is added
_LATER = 0.2


def first_pause(uptime: float, rng: random.Random | None = None) -> float:
    """Seconds to wait before the first question to the master, ``uptime`` seconds after the machine came up."""
    return _dice(rng).uniform(0, SPREAD) if uptime < AFTER_BOOT else 0.0


class Pace:
    """How long one lane waits after each pass; ``interval`` seconds may be set anew.

    ``phase``, from 0 to 1 and the same for all lanes of a node, is where in the interval its second pass falls: nodes that
    started together are apart from then on, and its lanes stay together. Jitter alone would take hours to do it.
    """

    def __init__(self, interval: float, rng: random.Random | None = None, phase: float | None = None) -> None:
        self.interval = interval
        self._phase = phase
        self._rng = _dice(rng)
        self._backoff = Backoff(base=min(FIRST_PAUSE, interval), cap=LONGEST_PAUSE, rng=self._rng)

    @property
    def failures(self) -> int:
        """How many passes failed in a row."""
        return self._backoff.attempts

    def good(self) -> float:
        """After a pass that went well."""
        self._backoff.reset()
        if self._phase is not None:
            phase, self._phase = self._phase, None
            return self.interval * (JITTER + phase)
        return self.interval * self._rng.uniform(1 - JITTER, 1 + JITTER)

    def bad(self, retry_after: float | None = None) -> float:
        """After a pass that failed; ``retry_after`` is what the master asked for, or when it will be asked again."""
        pause = self._backoff.next()
        if retry_after is None:
            return pause
        return max(pause, retry_after * self._rng.uniform(1, 1 + _LATER))

    def joins(self, left: float) -> bool:
        """Whether a pass that is due in so many seconds is taken now, as another lane has the master's answer.

        What is due within the jitter would as well have been drawn for now; what failed waits for just that.
        """
        return bool(self.failures) or left <= 2 * JITTER * self.interval


def _dice(rng: random.Random | None) -> random.Random:
    return rng if rng is not None else random.SystemRandom()
