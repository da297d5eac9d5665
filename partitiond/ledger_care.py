"""Keeps the ledger at work whatever becomes of its file, and tells the operator once: service goes on, usage is made up for."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accounting.errors import AccountingError
from accounting.model import iso_utc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from accounting.ledger import Ledger
    from accounting.model import Gap, Pass
    from partitiond.events import EventLog

logger = logging.getLogger(__name__)

_THIN_SECONDS = 0.05
_DAMAGED = "accounting.ledger_damaged"
_OF_THE_READING = "accounting.reading"
_MOST_KEPT = 30  # passes; some 3 MB each at 500 partitions
_EVENTS = {_DAMAGED: "usage.damaged", "accounting.ledger_full": "usage.full"}


@dataclass(slots=True)
class LedgerCare:
    """What is wrong with the ledger at ``path``, as far as the operator was told; not to be used by two threads at once."""

    path: Path
    _trouble: AccountingError | None = None
    _told: str | None = None
    _kept: list[Pass] = field(default_factory=list)  # passes that could not be recorded, the oldest first

    @contextmanager
    def watching(self, events: EventLog) -> Iterator[None]:
        """Tell of an error that is another than the last, and when there is none any more; errors pass through."""
        try:
            yield
        except AccountingError as error:
            self._note(error, events)
            raise
        if self._trouble is not None:
            events.record("usage.resumed", "usage is recorded again", resource=str(self.path))
            self._trouble = None

    def post(self, ledger: Ledger, reading: Pass, events: EventLog) -> tuple[Gap, ...]:
        """Record a pass and join some old ones; begin a new ledger where it proves damaged. Raises AccountingError."""
        if ledger.doubt is not None:
            _look(ledger, ledger.doubt)
        gaps: tuple[Gap, ...] = ()
        while self._kept:
            gaps += _record(ledger, self._kept[0])
            del self._kept[0]
        gaps += _record(ledger, reading)
        _thin(ledger, reading.at)
        if ledger.recovered is not None and ledger.recovered != self._told:
            self._told = ledger.recovered
            logger.warning("usage: %s", ledger.recovered)
            events.record("usage.damaged", ledger.recovered, resource=str(self.path))
        return gaps

    def keep(self, reading: Pass, error: AccountingError) -> None:
        """Keep a pass that could not be recorded, for before the next one. Where that has all of its counters, and they are
        whose they were, it makes up for this one; else they were read for the last time: a partition goes, or its owner.
        """
        if error.code == _OF_THE_READING:
            return
        known, owners = _counters(reading), reading.owners
        self._kept = [one for one in self._kept if one.owners != owners or not _counters(one) <= known]
        if reading not in self._kept:
            self._kept.append(reading)
        if len(self._kept) > _MOST_KEPT:
            logger.warning(
                "usage: a pass of %s is given up: it could not be recorded since", iso_utc(self._kept[0].at)
            )
            del self._kept[0]

    def cases(self) -> list[str]:
        """What stays open of it, for ``status``."""
        found = (
            [] if self._trouble is None else [f"usage is not recorded: {self._trouble}; {self._trouble.hint}"]
        )
        return found + [
            f"a usage ledger that was found damaged or out of place is kept as {kept}: usage in it is in no report of the"
            " present one; move it away once it is not needed"
            for kept in sorted(self.path.parent.glob(f"{self.path.name}.damaged-*"))
            if not kept.name.endswith(("-wal", "-shm"))
        ]

    def _note(self, error: AccountingError, events: EventLog) -> None:
        if self._trouble is None or self._trouble.code != error.code:
            events.record(
                _EVENTS.get(error.code, "usage.unrecorded"),
                str(error),
                resource=error.resource,
                code=error.code,
                hint=error.hint,
            )
        self._trouble = error


def _counters(reading: Pass) -> set[tuple[str, ...]]:
    """All counters of a pass, each unlike those that were there before it."""
    found = {(one.partition, one.address, one.family, one.scope, one.epoch) for one in reading.traffic}
    return found | {(one.partition, one.name, one.epoch) for one in reading.counts}


def _record(ledger: Ledger, reading: Pass) -> tuple[Gap, ...]:
    try:
        return ledger.record(reading)
    except AccountingError as error:
        if error.code != _DAMAGED:
            raise
        ledger.recover(str(error.__cause__ or error))
        return ledger.record(reading)


def _look(ledger: Ledger, doubt: AccountingError) -> None:
    """Begin a new ledger if the file is damaged, as somebody found who read what no pass does."""
    try:
        ledger.check()
    except AccountingError as error:
        if error.code != _DAMAGED:
            raise
        ledger.recover(str(error.__cause__ or error))
    else:
        logger.warning("usage: the ledger was checked and is sound, in spite of this: %s", doubt)


def _thin(ledger: Ledger, at: float) -> None:
    """Join some old passes. The pass before is recorded, and a failure here is none of it."""
    try:
        ledger.thin(at, _THIN_SECONDS)
    except AccountingError as error:
        logger.warning("usage: old passes are not joined: %s", error)
        if error.code == _DAMAGED:
            ledger.recover(str(error.__cause__ or error))
