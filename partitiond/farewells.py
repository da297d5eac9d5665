"""Which instances take their leave at this moment: one that is wanted back is never started beside its own end.

Promises: whoever has cut a farewell short finds no program of it any more, also not of one that a killed daemon had begun.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from partitiond import execute

if TYPE_CHECKING:
    from pathlib import Path

_PAUSE = 0.02


class Farewells:
    """The farewells under way in this process, by partition. Whoever begins one holds the node's lock at that moment."""

    def __init__(self) -> None:
        self._going: dict[str, threading.Event] = {}

    def begin(self, partition: str) -> threading.Event:
        """Note that one begins; the event is set when it is to end. :meth:`ended` must follow."""
        return self._going.setdefault(partition, threading.Event())

    def ended(self, partition: str) -> None:
        """Note that nothing of it runs any more."""
        del self._going[partition]

    def is_going(self, partition: str) -> bool:
        """Whether one is under way."""
        return partition in self._going

    def cut_short(self, partition: str, record: Path) -> None:
        """End a farewell whose session is in that record, and wait for it."""
        # said before the program is ended: else the next one follows it
        while (asked := self._going.get(partition)) is not None:
            asked.set()
            execute.end_cut_off(record)
            time.sleep(_PAUSE)
        execute.end_cut_off(record)
