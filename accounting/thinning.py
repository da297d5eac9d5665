"""Joins old passes: the older, the longer the stretch of which one is left; what was used is kept to the byte.

The last pass of a stretch takes over the samples of the others, and of their gauges the last values. Accounts are not touched,
and a query whose borders are those of stretches gives the same before and after. A stretch is a run of passes one after the
other with the same number of ``balances.bucket``, so none crosses midnight UTC, wherever the clock went meanwhile; and none
crosses the border of a period, or is in one that is not closed and documented.

The age of a pass is not read from its own clock, which may have been years ahead, but from the latest one that is old enough:
whatever was recorded before that is older. Every function runs inside the caller's transaction; between two steps the ledger
is whole, a stretch may be joined in part.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from accounting import balances
from accounting.balances import DAY, HOUR, WEEK, bucket
from accounting.schema import AMOUNT_COLUMNS

if TYPE_CHECKING:
    import sqlite3

MINUTE = 60
_SECOND = 10**6


class Stage(NamedTuple):
    """Passes older than ``age`` are joined to one in ``seconds``; of their balances those at the end of ``keep`` stay."""

    seconds: int
    age: int
    keep: int


STAGES = (Stage(MINUTE, DAY, HOUR), Stage(HOUR, 7 * DAY, DAY), Stage(DAY, 90 * DAY, WEEK))

# One step: bounded in rows, so that it takes some hundredths of a second on a slow disk and its share of the log is small.
_ROWS = 2000
_PASSES = 100
_PAGES = 100
_FREE_PART = (
    0.1  # pages are given back where more than this part of all is free; the others are soon used again
)

_SUMS = ", ".join(f"sum({column})" for column in AMOUNT_COLUMNS)
_MOVE_SAMPLES = f"""
INSERT OR REPLACE INTO sample SELECT :last, account, {_SUMS} FROM sample
    WHERE seq BETWEEN :first AND :last GROUP BY account
"""  # noqa: S608 (our own column names)
# A bare column beside max() is of the row with the maximum, https://sqlite.org/lang_select.html#bareagg
_MOVE_GAUGES = """
INSERT OR REPLACE INTO gauge_sample SELECT :last, gauge, value
    FROM (SELECT gauge, value, max(seq) FROM gauge_sample WHERE seq BETWEEN :first AND :last GROUP BY gauge)
"""
_JOIN = (
    _MOVE_SAMPLES,
    "DELETE FROM sample WHERE seq >= :first AND seq < :last",
    _MOVE_GAUGES,
    "DELETE FROM gauge_sample WHERE seq >= :first AND seq < :last",
    "UPDATE pass SET previous_at = (SELECT previous_at FROM pass WHERE seq = :first) WHERE seq = :last",
    "DELETE FROM pass WHERE seq >= :first AND seq < :last",
)


def thin(connection: sqlite3.Connection, now: int, limit: float) -> bool:
    """Take steps for about ``limit`` seconds; say whether there is more to do."""
    deadline = time.monotonic() + limit
    if _clock_in_doubt(connection, now):
        return False
    closed = _closed(connection)
    for stage in STAGES:
        # backwards by seq: soon found, since what the stage before has left to this one is about as old
        row = connection.execute(
            "SELECT seq FROM pass WHERE seq <= ? AND +at <= ? ORDER BY seq DESC LIMIT 1",
            (closed, now - stage.age * _SECOND),
        ).fetchone()
        closed = 0 if row is None else int(row[0])
        while _step(connection, stage, closed):
            if time.monotonic() >= deadline:
                return True
        # the next stage joins what this one has left
        closed = min(closed, _mark(connection, stage))
    return _give_back(connection, deadline)


def _clock_in_doubt(connection: sqlite3.Connection, now: int) -> bool:
    """Say whether the clock was set less than a day ago: if that was wrong, nothing should have been joined by it."""
    row = connection.execute("SELECT jumped FROM clock WHERE jumped IS NOT NULL").fetchone()
    return row is not None and 0 <= now - row[0] < DAY * _SECOND


def _closed(connection: sqlite3.Connection) -> int:
    """Give the last pass before the first day that is under way or without its documents."""
    (first,) = connection.execute(
        "SELECT min(first_seq) FROM period WHERE until_seq IS NULL OR documented = 0"
    ).fetchone()
    (last,) = connection.execute("SELECT coalesce(max(seq), 0) FROM pass").fetchone()
    return int(last if first is None else first - 1)


def _mark(connection: sqlite3.Connection, stage: Stage) -> int:
    row = connection.execute("SELECT until_seq FROM thinned WHERE seconds = ?", (stage.seconds,)).fetchone()
    return 0 if row is None else int(row[0])


def _step(connection: sqlite3.Connection, stage: Stage, closed: int) -> bool:
    """Let go of one balance, or join the oldest stretch, wholly or in part; say whether there was any."""
    mark = _mark(connection, stage)
    row = connection.execute(
        "SELECT seq FROM balanced WHERE seq <= ? AND ends < ? ORDER BY seq LIMIT 1", (mark, stage.keep)
    ).fetchone()
    if row is not None:
        balances.drop(connection, row[0], row[0])
        return True
    if mark >= closed:
        return False
    run, whole = _run(connection, stage, mark)
    if not run or (whole and run[-1] > closed) or run[0] > closed:
        return False
    run = [seq for seq in run if seq <= closed]
    joined = _portion(connection, run)
    if len(joined) > 1:
        _join(connection, joined[0], joined[-1])
    if whole and joined[-1] == run[-1]:
        connection.execute(
            "INSERT INTO thinned VALUES (?, ?) ON CONFLICT DO UPDATE SET until_seq = excluded.until_seq",
            (stage.seconds, run[-1]),
        )
    return len(joined) > 1 or whole


def _run(connection: sqlite3.Connection, stage: Stage, mark: int) -> tuple[list[int], bool]:
    """Give the passes of the stretch that begins after ``mark``, and whether these are all."""
    rows = connection.execute(
        "SELECT pass.seq, at, period.id FROM pass LEFT JOIN period ON period.first_seq = pass.seq"
        " WHERE pass.seq > ? ORDER BY pass.seq LIMIT ?",
        (mark, _PASSES),
    ).fetchall()
    run = [seq for seq, _, _ in rows[:1]]
    for (_, before, _), (seq, at, period) in pairwise(rows):
        if period is not None or bucket(before, stage.seconds) != bucket(at, stage.seconds):
            return run, True
        run.append(seq)
    return run, len(rows) < _PASSES


def _portion(connection: sqlite3.Connection, run: list[int]) -> list[int]:
    """Give the first passes of a stretch, two at least, with about as many rows as a step is to join."""
    rows = 0
    for index, seq in enumerate(run):
        (samples,) = connection.execute(
            "SELECT (SELECT count(*) FROM sample WHERE seq = ?1) + (SELECT count(*) FROM gauge_sample WHERE seq = ?1)",
            (seq,),
        ).fetchone()
        rows += samples
        if rows > _ROWS and index > 1:
            return run[:index]
    return run


def _join(connection: sqlite3.Connection, first: int, last: int) -> None:
    borders = {"first": first, "last": last}
    for statement in _JOIN:
        connection.execute(statement, borders)
    # none is left within a stretch by the marks above; one that were would be wrong after the samples moved
    balances.drop(connection, first, last - 1)


def _give_back(connection: sqlite3.Connection, deadline: float) -> bool:
    """Cut free pages off the end of the file while there is time."""
    while _free_part(connection) > _FREE_PART:
        # it gives a row for each page and works while these are read
        connection.execute(f"PRAGMA incremental_vacuum({_PAGES})").fetchall()
        if time.monotonic() >= deadline:
            return _free_part(connection) > _FREE_PART
    return False


def _free_part(connection: sqlite3.Connection) -> float:
    free = int(connection.execute("PRAGMA freelist_count").fetchone()[0])
    pages = int(connection.execute("PRAGMA page_count").fetchone()[0])
    return free / max(pages, 1)
