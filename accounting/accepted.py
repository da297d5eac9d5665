"""Which documents the master has taken, remembered beside the ledger: so one that is put back from a copy tells nothing again.

A ledger never forgets a reference, and commits it before the document is sent. So a reference in this file that the ledger
does not have says that the ledger is older than what was told: what its counters had since is in documents, too.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from accounting import posting

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable
    from pathlib import Path


class Accepted(NamedTuple):
    """A document that the master has."""

    reference: str
    day: str
    kind: str
    partition: str
    guid: str


def file_of(ledger: Path) -> Path:
    """Where they are kept: a line of JSON for each."""
    return ledger.with_name(f"{ledger.stem}.accepted")


def append(ledger: Path, one: Accepted) -> None:
    """Remember a document, durably. Raises OSError."""
    descriptor = os.open(file_of(ledger), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # what was cut short before it is ended first
        os.write(descriptor, f"\n{json.dumps(one)}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(ledger: Path) -> list[Accepted]:
    """Give what is remembered; lines that were cut short are left out. Raises OSError."""
    lines: list[str] = []
    with suppress(FileNotFoundError):
        lines = file_of(ledger).read_text("utf-8", "replace").splitlines()
    found = {}
    for line in lines:
        with suppress(ValueError, TypeError):
            one = Accepted(*json.loads(line))
            found[one.reference] = one
    return list(found.values())


def catch_up(
    connection: sqlite3.Connection, known: Iterable[Accepted], written: float | None, at: int
) -> str | None:
    """Bring the ledger up to what the master has; give a sentence where it is older. In the caller's transaction."""
    states = dict(connection.execute("SELECT reference, state FROM document"))
    missing = []
    for one in known:
        if one.reference not in states:
            missing.append(one)
            _remember(connection, one, at)
        elif states[one.reference] != "accepted":
            connection.execute(
                "UPDATE document SET state = 'accepted', changed = ?, reason = '' WHERE reference = ?",
                (at, one.reference),
            )
    (passes,) = connection.execute("SELECT max(seq) FROM pass").fetchone()
    if passes is None or not _take_as_told(connection, missing, passes):
        return None  # nothing is missing, or it is a new one, which says itself what it follows
    sentence = (
        f"the usage ledger is older than {len(missing)} documents that the master has, put back from a copy: what they tell of"
        " is not counted again, nor what was used since and is in none"
    )
    connection.execute("DELETE FROM pending")
    posting.begin_after_damage(connection, written, at, sentence)
    return sentence


def _take_as_told(connection: sqlite3.Connection, missing: list[Accepted], passes: int) -> bool:
    """Take as told what the missing documents may tell, and let go of the levels of what they may have counted; say whether
    there was anything.
    """
    node = max((one.day for one in missing if one.kind == "node"), default="")
    gone = [one for one in missing if one.kind == "instance"]
    connection.execute("UPDATE period SET documented = 1 WHERE until_seq IS NOT NULL AND day <= ?", (node,))
    if connection.execute("SELECT 1 FROM period WHERE until_seq IS NULL AND day <= ?", (node,)).fetchone():
        connection.execute("UPDATE owner SET reported_seq = ?", (passes,))
    for one in gone:
        connection.execute(
            "UPDATE owner SET reported_seq = ?, gone = 1 WHERE partition = ? AND guid = ?",
            (passes, one.partition, one.guid),
        )
    names = {
        name
        for (name,) in connection.execute("SELECT partition FROM level UNION SELECT partition FROM process")
    }
    names = names if node else names & {one.partition for one in gone}
    for table in ("level", "process"):
        connection.executemany(f"DELETE FROM {table} WHERE partition = ?", [(name,) for name in names])  # noqa: S608 - our own names
    return bool(node or gone)


def _remember(connection: sqlite3.Connection, one: Accepted, at: int) -> None:
    """Have a row of a document whose text is in another ledger; what a partition had said until then is in it."""
    (number,) = connection.execute(
        "INSERT INTO document (reference, day, kind, partition, guid, content, state, made, changed, reason)"
        " VALUES (?, ?, ?, ?, ?, '', 'accepted', ?, ?, 'told by another ledger') RETURNING id",
        (*one, at, at),
    ).fetchone()
    if one.kind == "partition":
        connection.execute(
            "UPDATE intake SET document = ? WHERE document IS NULL AND partition = ? AND guid = ?",
            (number, one.partition, one.guid),
        )
