"""Delays between attempts, so that a fleet of nodes does not knock at a recovering master in step.

Pure arithmetic: no clock and no sleeping, so that the daemon's lanes can be tested without waiting.
"""

import random

# 2**64 base delays are beyond any cap in use; stopping there keeps the power a small number for ever.
_MAX_DOUBLINGS = 64


class Backoff:
    """Exponential backoff with jitter.

    ``base`` and ``cap`` are seconds, ``0 < base <= cap``. The n-th delay in a row (from 0) lies in
    ``[(1 - jitter) * w, w]`` with ``w = min(cap, base * 2**n)``: ``jitter`` 0 is plain doubling, 0.5 "equal
    jitter", 1 "full jitter". With a seeded ``rng`` the delays are the same each time. Not thread-safe: one
    per lane.

    Raises ValueError when the numbers make no sense (a mistake in the program, not in the master).
    """

    def __init__(
        self, base: float, cap: float, jitter: float = 0.5, rng: random.Random | None = None
    ) -> None:
        if not 0 < base <= cap < float("inf"):
            raise ValueError(f"a backoff needs 0 < base <= cap, not base {base} and cap {cap}")
        if not 0 <= jitter <= 1:
            raise ValueError(f"a jitter is a share between 0 and 1, not {jitter}")
        self._base = base
        self._cap = cap
        self._jitter = jitter
        self._rng = rng if rng is not None else random.SystemRandom()
        self._attempts = 0

    @property
    def attempts(self) -> int:
        """How many delays were handed out since the last :meth:`reset`."""
        return self._attempts

    def next(self) -> float:
        """Return how many seconds to wait before the next attempt, and count it."""
        window = min(self._cap, self._base * 2.0 ** min(self._attempts, _MAX_DOUBLINGS))
        self._attempts += 1
        return window - self._jitter * window * self._rng.random()

    def reset(self) -> None:
        """Start over: the last attempt was fine."""
        self._attempts = 0
