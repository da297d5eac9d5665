"""The rows of what tenants' own usage files said: each file is counted once, whatever dies while it is taken.

A file is taken in three steps: its row is committed, the file is removed, the row is marked as removed. Whoever is killed
between two of them leaves a row that says that the file may still be there; a file with such a row is removed and not counted
again. Once a row is marked, a file that is the same to the last bit is another file, and counts.

Every function runs inside the caller's transaction.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from accounting.store import microseconds

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

    from accounting.tioxml import Movement


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
    text = json.dumps([[one.resource, one.title, str(one.quantity)] for one in movements])
    connection.execute(
        "INSERT INTO intake (partition, guid, source, at, movements) VALUES (?, ?, ?, ?, ?)",
        (partition, guid, source, microseconds(at), text),
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
