"""What was wrong with an instance and for how long: observations compared with the rows of the ledger.

An incident begins when it is first seen and ends when it is first seen gone. Where nobody looked for a while (no daemon), it
went on if it is there afterwards, and else it ended when it was last seen. One that comes again within ``COALESCE`` is the same
one, and the time between counts to it: what flaps is down. Where the clock jumped, what was open ends when it was last seen and
begins anew.

Functions that take a connection run inside the caller's transaction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from accounting.store import microseconds

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping

SERVICE = "service"
PROMISE = "promise"

COALESCE = 60.0
"""Seconds within which an incident that comes again is the same one."""
UNSEEN = 180.0
"""Seconds after the last look from which on nobody looked: three sweeps."""
_SEEN_EVERY = 30 * 10**6  # how far ``seen`` may lag behind: not every look is worth a write
_MOST_OPEN = 200  # of a partition; twice what it may have of programs
_COLUMNS = "id, partition, guid, kind, name, begun, seen, ended, reported, reason"


@dataclass(frozen=True, slots=True)
class Look:
    """What was found of one partition: whose it is, whether it is meant to work, and what is wrong by name.

    Of one that is not ``alive`` nothing can be wrong, of no kind. ``since``: when what is found only now was seen first.
    """

    guid: str
    alive: bool
    troubles: Mapping[str, str] = field(default_factory=dict)
    since: Mapping[str, float] = field(default_factory=dict)


class Incident(NamedTuple):
    """A row; times and ``reported`` are in microseconds."""

    id: int
    partition: str
    guid: str
    kind: str
    name: str
    begun: int
    seen: int
    ended: int | None
    reported: int
    reason: str

    @property
    def microseconds(self) -> int:
        """How long it lasted, as far as is known."""
        return (self.seen if self.ended is None else self.ended) - self.begun


@dataclass(frozen=True, slots=True)
class Changes:
    """What an observation makes of the rows; those begun have no id yet. ``kept`` went on, also those that came again;
    ``resting`` ended before, and may still come again.
    """

    begun: tuple[Incident, ...] = ()
    kept: tuple[Incident, ...] = ()
    ended: tuple[Incident, ...] = ()
    resting: tuple[Incident, ...] = ()


class Unreported(NamedTuple):
    """So many microseconds of an incident that are in no document yet."""

    id: int
    partition: str
    guid: str
    kind: str
    name: str
    microseconds: int


def compare(
    kind: str,
    now: int,
    rows: Iterable[Incident],
    looked: Mapping[str, Look],
    *,
    whole: bool,
    jumped: bool,
    unseen: float = UNSEEN,
) -> Changes:
    """Compare what was found of a kind with the rows that are open or ended not long ago; times in microseconds. Pure.

    ``whole``: a partition that is not among those looked at is none any more, and what it had ends.
    """
    kept, ended, resting = [], [], []
    left = {
        (partition, name): reason
        for partition, look in looked.items()
        if look.alive
        for name, reason in sorted(look.troubles.items())[:_MOST_OPEN]
    }
    for row in rows:
        look = looked.get(row.partition)
        other = not whole if look is None else look.alive and row.kind != kind
        key = (row.partition, row.name)
        same = look is not None and look.guid == row.guid and row.kind == kind and key in left
        if same and not other and not jumped:
            del left[key]
            kept.append(row._replace(seen=max(now, row.seen), ended=None))
        elif row.ended is not None:
            resting.append(row)
        elif not other:
            late = jumped or now - row.seen > unseen * 1e6
            ended.append(row._replace(ended=row.seen if late else max(now, row.seen)))
    begun = (
        Incident(
            0,
            partition,
            looked[partition].guid,
            kind,
            name,
            _since(looked[partition], name, now),
            now,
            None,
            0,
            why,
        )
        for (partition, name), why in left.items()
    )
    return Changes(tuple(begun), tuple(kept), tuple(ended), tuple(resting))


def _since(look: Look, name: str, now: int) -> int:
    return min(now, microseconds(look.since[name])) if name in look.since else now


def observe(
    connection: sqlite3.Connection,
    kind: str,
    at: float,
    looked: Mapping[str, Look],
    *,
    whole: bool = True,
    jumped: bool = False,
    unseen: float = UNSEEN,
) -> Changes:
    """Post what was found at a time; doing it twice changes nothing. Give what began, went on and ended, with their ids."""
    now = microseconds(at)
    before = {row.id: row for row in _recent(connection, now)}
    changes = compare(kind, now, before.values(), looked, whole=whole, jumped=jumped, unseen=unseen)
    connection.executemany(
        "UPDATE incident SET ended = ? WHERE id = ?", [(row.ended, row.id) for row in changes.ended]
    )
    for row in changes.kept:
        if before[row.id].ended is not None or row.seen - before[row.id].seen >= _SEEN_EVERY:
            connection.execute("UPDATE incident SET seen = ?, ended = NULL WHERE id = ?", (row.seen, row.id))
    begun = tuple(_begin(connection, row) for row in changes.begun)
    return replace(changes, begun=begun)


def _begin(connection: sqlite3.Connection, row: Incident) -> Incident:
    cursor = connection.execute(
        "INSERT INTO incident (partition, guid, kind, name, begun, seen, reason) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (row.partition, row.guid, row.kind, row.name, row.begun, row.seen, row.reason),
    )
    return row._replace(id=int(cursor.lastrowid or 0))


def _recent(connection: sqlite3.Connection, now: int) -> list[Incident]:
    """Those that are open, then those that may come again, the last one to end first."""
    ended = connection.execute(
        f"SELECT {_COLUMNS} FROM incident WHERE ended >= ? ORDER BY ended DESC",  # noqa: S608 - names of our own
        (now - round(COALESCE * 1e6),),
    )
    return [*open_ones(connection), *(Incident(*row) for row in ended)]


def open_ones(connection: sqlite3.Connection) -> tuple[Incident, ...]:
    """Give the incidents that are not over, the oldest first."""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM incident WHERE ended IS NULL ORDER BY begun, id"  # noqa: S608 - names of our own
    )
    return tuple(Incident(*row) for row in rows)


def waiting(connection: sqlite3.Connection, until: float) -> tuple[Unreported, ...]:
    """Give what of incidents up to a time is in no document yet; of open ones as far as they were seen."""
    rows = connection.execute(
        "SELECT id, partition, guid, kind, name, min(coalesce(ended, seen), ?1) - begun - reported AS rest FROM incident"
        " WHERE coalesce(ended, seen) - begun > reported AND min(coalesce(ended, seen), ?1) - begun > reported ORDER BY id",
        (microseconds(until),),
    )
    return tuple(Unreported(*row) for row in rows)


def mark_reported(connection: sqlite3.Connection, number: int, amount: int) -> None:
    """Say that so many microseconds more of an incident are in a document."""
    connection.execute("UPDATE incident SET reported = reported + ? WHERE id = ?", (amount, number))
