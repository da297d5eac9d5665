"""The ledger: adds absolute readings up, so that each byte is counted once whatever dies in between.

A pass is one transaction. It holds the new levels of the kernel's counters and the amounts that they make
together, so a daemon that is killed at any instruction has recorded the pass wholly or not at all, and the
next pass, being absolute, makes up for one that is missing.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

from accounting import accepted, incidents, intake, memory, posting, report, store, thinning
from accounting.clock import keep_clock
from accounting.errors import AccountingError
from accounting.salvage import take_over
from accounting.settle import settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from accounting.incidents import Changes, Incident, Look
    from accounting.intake import Room, Taken
    from accounting.model import Gap, PartitionUsage, Pass, UsageReport
    from accounting.tioxml import Movement


class LedgerReader:
    """The ledger as those read it who do not meter: the command line beside a daemon, a page of metrics.

    Each question sees one consistent state. Safe to use from several threads; they wait for each other.
    Made by ``Ledger.open_readonly``; close it, or use it as a context manager.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.RLock()
        self.told: Callable[[AccountingError], None] = lambda _: None  # whom errors are told, too

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; may be called twice."""
        with self._lock:
            self._connection.close()

    def usage(self, start: float | None, end: float | None, partition: str | None = None) -> UsageReport:
        """Give what one partition or all used after ``start`` up to and including ``end`` (Unix seconds).

        Without ``start``: since the ledger began, from the totals. Without ``end``: up to the last pass.
        What a pass added counts in the interval in which the pass happened, also where it began to accrue
        before. Where the clock was set back, passes count by the clock of their time. A partition that is
        unknown gives an empty report. Raises AccountingError: ``accounting.interval``,
        ``accounting.ledger_…``.
        """
        if start is not None and end is not None and start > end:
            raise AccountingError(
                "accounting.interval",
                f"the interval ends ({end}) before it starts ({start})",
                hint="give the earlier time first",
            )
        with self.transaction("DEFERRED") as connection:
            return report.usage(connection, start, end, partition)

    def totals(self) -> tuple[PartitionUsage, ...]:
        """Give the totals since the ledger began, one entry per present partition, for metrics.

        They are sums over all owners that the partition had, so they never fall; memory, disk and
        ``instance_guid`` are those of the present owner. Raises AccountingError ``accounting.ledger_…``.
        """
        with self.transaction("DEFERRED") as connection:
            return report.totals(connection)

    def incidents(self) -> tuple[Incident, ...]:
        """Give the incidents that are not over, the oldest first. Raises AccountingError ``accounting.ledger_…``."""
        with self.transaction("DEFERRED") as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            return incidents.open_ones(connection) if version > 1 else ()

    def owners(self) -> dict[str, str | None]:
        """Give who held the partitions in the last pass (``None``: nobody). Raises AccountingError ``accounting.ledger_…``."""
        with self.transaction("DEFERRED") as connection:
            rows = connection.execute("SELECT partition, guid FROM owner WHERE until_seq IS NULL").fetchall()
            return {partition: guid or None for partition, guid in rows}

    def intake_waiting(self) -> tuple[Taken, ...]:
        """Give what usage files said that is in no document yet. Raises AccountingError ``accounting.ledger_…``."""
        with self.transaction("DEFERRED") as connection:
            return intake.waiting(connection)

    def intake_left(self) -> dict[str, frozenset[str]]:
        """Give the sources of usage files that may still be there, by partition. Raises AccountingError."""
        with self.transaction("DEFERRED") as connection:
            return intake.left(connection)

    def intake_room(self, partition: str, guid: str) -> Room:
        """Give what the next document of an instance has of its files. Raises AccountingError ``accounting.ledger_…``."""
        with self.transaction("DEFERRED") as connection:
            return intake.room(connection, partition, guid)

    @contextmanager
    def transaction(self, kind: str = "DEFERRED") -> Iterator[sqlite3.Connection]:
        """Let the block ask several questions of one state; ``IMMEDIATE`` to write. Raises AccountingError ``…ledger_…``."""
        try:
            with (
                self._lock,
                store.ledger_errors(self.path),
                store.transaction(self._connection, kind),
            ):
                yield self._connection
        except AccountingError as error:
            self.told(error)
            raise


class Ledger(LedgerReader):
    """The ledger as the one process has it that meters.

    ``path`` is the file, mode 0600; its directory must be there and belong to root alone. A file that turns
    out damaged is kept as ``<name>.damaged-<time>``, a new ledger is begun whose first pass takes the
    levels of the counters without adding them (the damaged file has them, and they may be billed), a gap in
    every report says so, and ``recovered`` holds the sentence for the log; else it is ``None``. Likewise where
    a ledger that was begun is not there any more: whoever moved it away has what the counters say in it.
    ``clock`` gives Unix seconds.

    Raises AccountingError ``accounting.ledger_version``, ``…_busy``, ``…_full``, ``…_unavailable``.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._memory: memory.Memory | None = None
        self.recovered: str | None = None
        self._lost = False  # the file could not be opened again after it was set aside or put back
        self.doubt: AccountingError | None = None
        super().__init__(path, self._open())
        self.told = self.note

    def note(self, error: AccountingError) -> None:
        """Take note of an error that somebody met who read the file: ``doubt`` keeps it where it is damage, until
        ``check`` was asked or ``recover`` called.
        """
        if error.code == "accounting.ledger_damaged":
            self.doubt = error

    def check(self) -> None:
        """Read the whole file (some six seconds per gigabyte). Raises AccountingError: ``accounting.ledger_damaged``
        (call ``recover``), ``…ledger_…``.
        """
        with self._lock:
            self._reopen()
            store.check(self.path)
            self.doubt = None

    def _open(self) -> sqlite3.Connection:
        # before it is opened, which may write what is left in its WAL
        written = store.last_written(self.path)
        begun = store.was_begun(self.path)
        if begun and store.place(self.path) is None:
            self.recovered = _begin_anew(self.path, self._clock(), written, None)
        try:
            connection = store.open_writer(self.path, empty=not begun)
        except AccountingError as error:
            if error.code != "accounting.ledger_damaged":
                raise
            self.recovered = _begin_anew(self.path, self._clock(), written, str(error.__cause__ or error))
            connection = store.open_writer(self.path)
        try:
            self._place = store.place(self.path)
            store.note_begun(self.path)
            with store.ledger_errors(self.path), store.transaction(connection):
                at = store.microseconds(self._clock())
                older = accepted.catch_up(connection, accepted.read(self.path), written, at)
            self.recovered = older or self.recovered
        except BaseException:
            connection.close()
            raise
        return connection

    def _reopen(self) -> None:
        """Open the file again where that failed when it was set aside or put back: its cause may be gone."""
        if self._lost:
            self._connection = self._open()
            self._lost = False

    def close(self) -> None:
        """Close the file, for good; may be called twice. All is in the file itself then, also while somebody reads it."""
        with self._lock:
            self._lost = False
            with suppress(
                sqlite3.Error
            ):  # what it cannot write stays in the log beside it, and is in the ledger all the same
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            super().close()

    @contextmanager
    def transaction(self, kind: str = "DEFERRED") -> Iterator[sqlite3.Connection]:
        """Like that of who reads; opens the file again where that failed before."""
        with self._lock:
            self._reopen()
            with super().transaction(kind) as connection:
                yield connection

    @classmethod
    def open_readonly(cls, path: Path) -> LedgerReader:
        """Open for reading only; where there is no ledger yet, every report is empty.

        Raises AccountingError ``accounting.ledger_damaged``, ``…_version``, ``…_busy``, ``…_unavailable``.
        """
        return LedgerReader(path, store.open_reader(path))

    def record(self, reading: Pass) -> tuple[Gap, ...]:
        """Add a pass, wholly or not at all; give the gaps that it found.

        What accrued since the pass before goes to those who own the partitions now: record a pass before an
        owner changes. Passes must be recorded in the order in which they were read. Recording one twice
        adds nothing.

        Raises AccountingError: ``accounting.reading``, ``accounting.ledger_busy``, ``…_full``,
        ``…_unavailable`` (all retryable: the next pass makes up for this one), ``…_damaged`` (call
        ``recover``).
        """
        with self._lock:
            self._reopen()
            self._stay_in_place()
            # whatever fails, and even if only the answer to the commit is lost, the next pass reads all anew
            kept, self._memory = self._memory, None
            with self.transaction("IMMEDIATE") as connection:
                if kept is None or not kept.holds(connection):
                    kept = memory.read(connection)
                books = kept.books(connection)
                settled = settle(reading, books)
                at = store.microseconds(reading.at)
                seq, previous = posting.begin_pass(connection, at)
                owners = posting.present_owners(connection, seq, reading, settled)
                posting.post(connection, seq, settled, owners, kept)
                posting.post_gauges(connection, seq, reading.gauges, owners, kept)
                posting.end_damage(connection, reading, books, at)
                jumps = keep_clock(connection, reading, previous, at)
                gaps = (*jumps, *posting.post_gaps(connection, settled, previous, at))
            kept.posted(seq, settled)
            self._memory = kept
            return gaps

    def _stay_in_place(self) -> None:
        """Write the file anew if it was removed while in use, or another was put in its place; SQLite would not notice."""
        if store.place(self.path) == self._place:
            return
        aside = store.name_aside(self.path, self._clock())
        store.put_back(self._connection, self.path, aside)
        found = f"another file was there and is kept as {aside}" if aside.exists() else "its file was gone"
        self.recovered = (
            f"the usage ledger {self.path} was put back from memory and disk, nothing is lost: {found}"
        )
        self._let_go()
        self._reopen()

    def _let_go(self) -> None:
        self._lost = True
        self._memory = None
        self._connection.close()

    def thin(self, now: float, limit: float) -> bool:
        """Join old passes for about ``limit`` seconds, in one transaction; say whether there is more to do.

        Recent days stay as they are, totals for ever; see ``accounting.thinning``. To be called between
        passes, never instead of one. Raises AccountingError ``accounting.ledger_…``; nothing is changed then.
        """
        with self.transaction("IMMEDIATE") as connection:
            return thinning.thin(connection, store.microseconds(now), limit)

    def reader(self) -> LedgerReader:
        """Open the same file for reading only: what takes long then holds up no pass. Raises AccountingError."""
        try:
            reader = Ledger.open_readonly(self.path)
        except AccountingError as error:
            self.note(error)
            raise
        reader.told = self.note
        return reader

    def try_out(self) -> None:
        """Write to the file what changes nothing, before something is done that only counts if it can be written down.

        Raises AccountingError ``accounting.ledger_…``.
        """
        with self.transaction("IMMEDIATE") as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute(f"PRAGMA user_version = {version}")

    def take_in(
        self, partition: str, guid: str, source: str, movements: Iterable[Movement], at: float
    ) -> bool:
        """Keep what a usage file said, durably; False where it was taken before and may still be there.

        ``source`` tells the file from every other. Raises AccountingError ``accounting.ledger_…``.
        """
        with self.transaction("IMMEDIATE") as connection:
            return intake.take_in(connection, partition, guid, source, movements, at)

    def note_accepted(self, document: accepted.Accepted) -> None:
        """Remember beside the file that the master has a document, before the ledger says so. Raises AccountingError."""
        with store.ledger_errors(self.path):
            accepted.append(self.path, document)

    def removed(self, partition: str, sources: Iterable[str]) -> None:
        """Say that usage files are not there any more. Raises AccountingError ``accounting.ledger_…``."""
        with self.transaction("IMMEDIATE") as connection:
            intake.removed(connection, partition, sources)

    def observe_incidents(
        self,
        kind: str,
        at: float,
        looked: Mapping[str, Look],
        *,
        whole: bool = True,
        jumped: bool = False,
        unseen: float = incidents.UNSEEN,
    ) -> Changes:
        """Post what was found wrong at a time; see ``incidents.observe``. Raises AccountingError ``accounting.ledger_…``."""
        with self.transaction("IMMEDIATE") as connection:
            return incidents.observe(connection, kind, at, looked, whole=whole, jumped=jumped, unseen=unseen)

    def recover(self, reason: str) -> str:
        """Set the file aside and begin a new ledger, as opening does, after ``accounting.ledger_damaged``.

        Gives the sentence that ``recovered`` then holds. Raises AccountingError like the constructor; whatever is asked
        of the ledger next opens it again.
        """
        with self._lock:
            written = store.last_written(self.path)
            self._let_go()
            self.recovered = sentence = _begin_anew(self.path, self._clock(), written, reason)
            self._reopen()
            self.doubt = None
            return sentence


def _begin_anew(path: Path, at: float, written: float | None, damage: str | None) -> str:
    """Make the new ledger beside the damaged one, with all it has to say, then exchange them in one step; ``damage`` is
    ``None`` where there is no file. Gives the sentence that says so.

    Killed at any instruction, either all is as it was or the new one knows that it follows another: a new ledger that did
    not know would count anew what the one before had counted.
    """
    aside = store.name_aside(path, at)
    fresh = store.open_fresh(path)
    try:
        with store.ledger_errors(path), store.transaction(fresh):
            if damage is None:
                sentence = (
                    f"the usage ledger {path} is not there any more: a new one was begun, which counts from here on; what the"
                    " one before it had counted, and reports that it had not sent, are in no report of this one"
                )
            else:
                sentence = (
                    f"the usage ledger was damaged ({damage}); it is kept as {aside}, a new one was begun;"
                    f" {take_over(path, fresh)}"
                )
            posting.begin_after_damage(fresh, written, store.microseconds(at), sentence)
    finally:
        fresh.close()
    store.exchange(path, aside)
    return sentence
