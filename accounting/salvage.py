"""Takes over from a damaged ledger what no counter says again: documents for the master, and what tenants said.

What a pass recorded is not taken over: it can not be told from what the damage left of it. So days that had ended and had
no documents yet get none; the sentence names them. Row by row where a page is gone.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TABLES = ("document", "intake", "incident")
_ABSENT = 2000  # so many numbers in a row without a row: the end


def take_over(path: Path, fresh: sqlite3.Connection) -> str:
    """Copy what can be read of ``TABLES``, with its numbers, in the caller's transaction; say what was copied."""
    copied, lost, days = 0, 0, ""
    try:
        with closing(sqlite3.connect(path.absolute().as_uri() + "?mode=ro", uri=True)) as damaged:
            there = {
                name for (name,) in damaged.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
            }
            for table in TABLES:
                if table not in there:
                    continue  # of version 1
                for row in _rows(damaged, fresh, table):
                    if row is not None and _insert(fresh, table, row):
                        copied += 1
                    else:
                        lost += 1
            if "period" in there:
                days = _unreported(damaged)
    except sqlite3.DatabaseError as error:
        return f"reports that were not sent yet are in that file, it can not be read ({error})"
    if lost:
        return f"of its reports {copied} rows were taken over, {lost} or more could not be read{days}"
    return f"of its reports all {copied} rows were taken over{days}"


def _unreported(damaged: sqlite3.Connection) -> str:
    """Name the days that had ended without documents."""
    try:
        rows = damaged.execute(
            "SELECT day FROM period WHERE documented = 0 AND until_seq IS NOT NULL ORDER BY id"
        )
        days = [str(day) for (day,) in rows]
    except sqlite3.DatabaseError as error:
        return f"; of which days it had made none yet can not be read ({error})"
    return f"; what was metered on {', '.join(days)} is in none and will be in none" if days else ""


def _rows(
    damaged: sqlite3.Connection, fresh: sqlite3.Connection, table: str
) -> Iterator[dict[str, object] | None]:
    """Give the rows of a table, ``None`` for each that can not be read."""
    names = [name for _, name, *_ in fresh.execute(f"PRAGMA table_info({table})")]
    columns = ", ".join(names)
    try:
        rows = damaged.execute(f"SELECT {columns} FROM {table}").fetchall()  # noqa: S608 (our own names)
    except sqlite3.DatabaseError:
        for row in _one_by_one(damaged, table, columns):
            yield None if row is None else dict(zip(names, row, strict=True))
        return
    yield from (dict(zip(names, row, strict=True)) for row in rows)


def _one_by_one(damaged: sqlite3.Connection, table: str, columns: str) -> Iterator[tuple[object, ...] | None]:
    absent = 0
    # old rows may have been let go of
    first, last = (_edge(damaged, table, which) for which in ("min", "max"))
    for number in count(first or 1) if last is None else range(first or 1, last + 1):
        try:
            row = damaged.execute(f"SELECT {columns} FROM {table} WHERE id = ?", (number,)).fetchone()  # noqa: S608 (likewise)
        except sqlite3.DatabaseError:
            absent += 1
            yield None
        else:
            absent = absent + 1 if row is None else 0
            if row is not None:
                yield row
        if last is None and absent > _ABSENT:
            return


def _edge(damaged: sqlite3.Connection, table: str, which: str) -> int | None:
    """Give the first number or the last, if it can be read."""
    with suppress(sqlite3.DatabaseError):
        number: int | None = damaged.execute(f"SELECT {which}(id) FROM {table}").fetchone()[0]  # noqa: S608 (likewise)
        return number
    return None


def _insert(fresh: sqlite3.Connection, table: str, row: dict[str, object]) -> bool:
    columns, places = ", ".join(row), ", ".join("?" for _ in row)
    try:
        fresh.execute(f"INSERT INTO {table} ({columns}) VALUES ({places})", tuple(row.values()))  # noqa: S608 (likewise)
    except sqlite3.IntegrityError:  # not of its type, or twice: a page of something else
        return False
    return True
