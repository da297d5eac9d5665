"""Counts that never fall, made of counters that begin anew now and then: with another table, another program, another boot."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

Key = tuple[str, str]


class RisingCounts:
    """Sums what is added between two readings; of a counter that fell, all that it has since."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._last: dict[Key, int] = {}
        self._sums: dict[Key, int] = {}

    def take(self, reading: Mapping[Key, int]) -> None:
        """Add a reading; a counter that it does not have is at 0."""
        with self._turn:
            for key, value in reading.items():
                before = self._last.get(key, 0)
                self._sums[key] = self._sums.get(key, 0) + (value - before if value >= before else value)
            self._last = dict(reading)

    def now(self) -> dict[Key, int]:
        """Return the sums."""
        with self._turn:
            return dict(self._sums)
