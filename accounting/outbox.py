"""The documents on their way to the master: none is lost, and none is knowingly sent twice.

    waiting ──▶ sending ──▶ accepted | refused | ambiguous | waiting again, when it certainly did not arrive

``sending`` is committed before the request is made. So who is killed in between, or hears no answer, leaves a document of which
nobody can know whether the master has it: ``ambiguous``, and since masters do not recognise what they had before, it is the
operator's to say whether it goes out again (``resend``) or not (``drop``). Every function runs in the caller's transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from accounting.errors import AccountingError

if TYPE_CHECKING:
    import sqlite3

State = Literal["waiting", "sending", "accepted", "refused", "ambiguous", "dropped"]
STATES: tuple[State, ...] = get_args(State)
_COLUMNS = "id, reference, day, kind, partition, guid, state, made, changed, tries, reason"
_AGAIN: tuple[State, ...] = ("ambiguous", "refused", "dropped")
_DROPPABLE: tuple[State, ...] = ("ambiguous", "refused", "waiting")
_KEPT_DAYS = 400
_SINCE = 2  # of the schema's versions


@dataclass(frozen=True, slots=True)
class Entry:
    """A document and where it is; times are Unix seconds. ``changed``: since when, ``reason``: why."""

    id: int
    reference: str
    day: str
    kind: str
    partition: str
    guid: str
    state: State
    made: float
    changed: float
    tries: int
    reason: str


def entries(connection: sqlite3.Connection, *states: State, newest: int | None = None) -> list[Entry]:
    """Give the documents in some states, in the order in which they are sent; with ``newest`` at most so many, the latest."""
    if not _there(connection):
        return []
    marks = ", ".join("?" * len(states))
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM document WHERE state IN ({marks}) ORDER BY id DESC LIMIT ?",  # noqa: S608 - our own names
        (*states, -1 if newest is None else newest),
    ).fetchall()
    return [
        Entry(number, reference, day, kind, partition, guid, state, made / 1e6, changed / 1e6, tries, reason)
        for number, reference, day, kind, partition, guid, state, made, changed, tries, reason in reversed(
            rows
        )
    ]


def count(connection: sqlite3.Connection) -> dict[str, int]:
    """Give how many documents are in each state."""
    if not _there(connection):
        return {}
    return dict(connection.execute("SELECT state, count(*) FROM document GROUP BY state").fetchall())


def content(connection: sqlite3.Connection, reference: str) -> str | None:
    """Give the TioXML of a document; None when there is none of that reference, empty when it is no longer kept."""
    if not _there(connection):
        return None
    row = connection.execute("SELECT content FROM document WHERE reference = ?", (reference,)).fetchone()
    return None if row is None else str(row[0])


def begin(connection: sqlite3.Connection, entry: Entry, now: float) -> None:
    """Note that a document is about to be sent."""
    connection.execute(
        "UPDATE document SET state = 'sending', changed = ?, tries = tries + 1, reason = '' WHERE id = ?",
        (round(now * 1e6), entry.id),
    )


def end(connection: sqlite3.Connection, entry: Entry, state: State, now: float, reason: str = "") -> None:
    """Note what became of a document that was being sent."""
    connection.execute(
        "UPDATE document SET state = ?, changed = ?, reason = ? WHERE id = ?",
        (state, round(now * 1e6), reason, entry.id),
    )


def find_cut_off(connection: sqlite3.Connection, now: float) -> list[Entry]:
    """Make those ambiguous whose sender is no more; for the one who sends, before it does."""
    found = entries(connection, "sending")
    for entry in found:
        end(connection, entry, "ambiguous", now, "partitiond ended while it was being sent")
    return found


def resend(connection: sqlite3.Connection, reference: str, now: float) -> None:
    """Let a document be sent again. Raises AccountingError ``accounting.document``."""
    _change(connection, reference, _AGAIN, "waiting", now, "the operator had it sent again")


def drop(connection: sqlite3.Connection, reference: str, now: float) -> None:
    """Let a document not be sent (again); it is kept. Raises AccountingError ``accounting.document``."""
    _change(connection, reference, _DROPPABLE, "dropped", now, "the operator dropped it")


def forget_old(connection: sqlite3.Connection, now: float) -> None:
    """Let go of what the master has had for long, and of what was wrong as long ago. References stay, which are never given
    again, and rows of intake, which tell what a document is made of.
    """
    before = round((now - _KEPT_DAYS * 86400) * 1e6)
    connection.execute(
        "UPDATE document SET content = '' WHERE state = 'accepted' AND changed < ? AND content != ''",
        (before,),
    )
    connection.execute(
        "UPDATE intake SET movements = '[]' WHERE at < ?1 AND removed = 1 AND movements != '[]'"
        " AND document IN (SELECT id FROM document WHERE state = 'accepted' AND changed < ?1)",
        (before,),
    )
    # once all days that have ended have their documents, nothing of an incident that ended so long ago will be in one
    connection.execute(
        "DELETE FROM incident WHERE ended < ?"
        " AND NOT EXISTS (SELECT 1 FROM period WHERE until_seq IS NOT NULL AND documented = 0)",
        (before,),
    )


def _there(connection: sqlite3.Connection) -> bool:
    """Whether the ledger has documents: readers also meet one that no daemon of this version has opened yet."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0]) >= _SINCE


def _change(
    connection: sqlite3.Connection,
    reference: str,
    allowed: tuple[State, ...],
    state: State,
    now: float,
    reason: str,
) -> None:
    row = connection.execute("SELECT id, state FROM document WHERE reference = ?", (reference,)).fetchone()
    if row is None:
        raise AccountingError(
            "accounting.document",
            "there is no such document",
            resource=reference,
            hint="partitiond report list names them",
        )
    if row[1] not in allowed:
        raise AccountingError(
            "accounting.document",
            f"it is {row[1]}; this can be done with what is {' or '.join(allowed)}",
            resource=reference,
            hint="partitiond report list says where each is",
        )
    connection.execute(
        "UPDATE document SET state = ?, changed = ?, reason = ? WHERE id = ?",
        (state, round(now * 1e6), reason, row[0]),
    )
