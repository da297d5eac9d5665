"""The rows of what tenants' own usage files said: each file is counted once, whatever dies while it is taken.

A file is taken in three steps: its row is committed, the file is removed, the row is marked as removed. Whoever is killed
between two of them leaves a row that says that the file may still be there; a file with such a row is removed and not counted
again. Once a row is marked, a file that is the same to the last bit is another file, and counts.

What waits becomes one document for each instance, which is read, kept and sent as a whole: :class:`Room` bounds it.

Every function runs inside the caller's transaction.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from accounting import tioxml
from accounting.elements import refusal
from accounting.store import microseconds

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

    from accounting.tioxml import Movement

MOST_MOVEMENTS = 2000
"""Of an instance's next document, those of the same resource and title added up."""
MOST_BYTES = 1024 * 1024
"""Of that document, and of the files' movements as they wait for it."""
# what wider quantities than those of one file need: sums of as many as there is room for
_WIDEST = tioxml.LARGEST * 10**6 + tioxml.SMALLEST


class Said(NamedTuple):
    """One movement of a usage file, as it was accepted; its reference is the guid."""

    resource: str
    title: str
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class Taken:
    """What one file said that is in no document yet; ``at`` is when it was taken, in Unix seconds."""

    id: int
    partition: str
    guid: str
    at: float
    movements: tuple[Said, ...]


@dataclass(slots=True)
class Room:
    """What the next document of one instance has of files already, and so what it has room for."""

    told: set[tuple[str, str]] = field(default_factory=set)
    document_bytes: int = 0
    waiting_bytes: int = 0

    def take(self, movements: Sequence[Movement]) -> None:
        """Take the room that movements need; raises AccountingError, and takes none, where it is not there."""
        new = {(one.resource, one.title): one for one in movements}
        for known in self.told & new.keys():
            del new[known]
        if len(self.told) + len(new) > MOST_MOVEMENTS:
            told = f"{len(self.told) + len(new)} different movements, and {MOST_MOVEMENTS}"
            raise refusal(f"with it, what waits to be reported has {told} are the most")
        document = self.document_bytes + sum(map(_written, new.values()))
        waiting = self.waiting_bytes + len(_text(movements))
        if max(document, waiting) > MOST_BYTES:
            told = f"{max(document, waiting)} bytes, and {MOST_BYTES}"
            raise refusal(f"with it, what waits to be reported has {told} are the most")
        self.told |= new.keys()
        self.document_bytes, self.waiting_bytes = document, waiting


def _written(movement: Movement) -> int:
    return tioxml.size(replace(movement, quantity=_WIDEST))


def _text(movements: Iterable[Movement]) -> str:
    return json.dumps([[one.resource, one.title, str(one.quantity)] for one in movements])


def room(connection: sqlite3.Connection, partition: str, guid: str) -> Room:
    """Give what of the files of an instance is in no document yet."""
    found = Room()
    rows = connection.execute(
        "SELECT movements FROM intake WHERE document IS NULL AND partition = ? AND guid = ?",
        (partition, guid),
    )
    for (text,) in rows:
        found.waiting_bytes += len(text)
        for resource, title, _ in json.loads(text):
            if (resource, title) not in found.told:
                found.told.add((resource, title))
                found.document_bytes += _written(tioxml.Movement(resource, guid, _WIDEST, title))
    return found


def take_in(
    connection: sqlite3.Connection,
    partition: str,
    guid: str,
    source: str,
    movements: Iterable[Movement],
    at: float,
) -> bool:
    """Keep what a file said; return False, and keep nothing, where it was taken already and may still be there."""
    # the words are those of the index
    known = connection.execute(
        "SELECT 1 FROM intake WHERE removed = 0 AND source = ? AND partition = ?", (source, partition)
    ).fetchone()
    if known is not None:
        return False
    connection.execute(
        "INSERT INTO intake (partition, guid, source, at, movements) VALUES (?, ?, ?, ?, ?)",
        (partition, guid, source, microseconds(at), _text(movements)),
    )
    return True


def removed(connection: sqlite3.Connection, partition: str, sources: Iterable[str]) -> None:
    """Mark the files of a partition as removed; for when they are, also after a power cut."""
    connection.executemany(
        "UPDATE intake SET removed = 1 WHERE removed = 0 AND source = ? AND partition = ?",
        [(source, partition) for source in sources],
    )


def left(connection: sqlite3.Connection) -> dict[str, frozenset[str]]:
    """Give the sources of the files that may still be there, by partition."""
    found: dict[str, set[str]] = {}
    for partition, source in connection.execute("SELECT partition, source FROM intake WHERE removed = 0"):
        found.setdefault(partition, set()).add(source)
    return {partition: frozenset(sources) for partition, sources in found.items()}


def waiting(connection: sqlite3.Connection) -> tuple[Taken, ...]:
    """Give what is in no document yet, in the order in which it was taken."""
    rows = connection.execute(
        "SELECT id, partition, guid, at, movements FROM intake WHERE document IS NULL ORDER BY id"
    )
    return tuple(
        Taken(
            number,
            partition,
            guid,
            at / 1e6,
            tuple(Said(resource, title, Decimal(quantity)) for resource, title, quantity in json.loads(text)),
        )
        for number, partition, guid, at, text in rows
    )
