"""What accounts had at times gone by, so that a question about a year need not add a year up.

At the end of ten minutes of the clock the ledger writes down what every account has. What was used in an interval is then the
difference of two such balances, and of the samples between them and the interval's borders. That a balance is the sum of all
samples up to its pass holds by the way it is made: from the accounts, in the transaction of the next pass, before that adds
anything. Every function runs inside the caller's transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from accounting.schema import AMOUNT_COLUMNS

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterator

    from accounting.settle import Amounts

TEN_MINUTES, HOUR, DAY, WEEK = 600, 3600, 86_400, 604_800
_SECOND = 10**6

# A balance costs as much as some passes do: none is struck, however the clock flaps, so soon after the last.
_PASSES = 50
_PASSES_AT_DAYS = 5

_COLUMNS = ", ".join(AMOUNT_COLUMNS)
_SUMS = ", ".join(f"sum({column})" for column in AMOUNT_COLUMNS)

# Both in order of seq and account, appended at the end of their tables. The gauges are said again so that their values then
# are found without a search.
_STRIKE = f"""
INSERT INTO balance SELECT ?, id, {_COLUMNS} FROM account
    WHERE bytes_in != 0 OR bytes_out != 0 OR packets_in != 0 OR packets_out != 0 OR quantity != 0 ORDER BY id
"""  # noqa: S608 (our own column names, as below)
_RESTATE = """
INSERT OR IGNORE INTO gauge_sample SELECT ?, gauge.id, value FROM gauge JOIN owner ON owner.id = gauge.owner
    WHERE until_seq IS NULL ORDER BY gauge.id
"""


class _Side(NamedTuple):
    """A state of the accounts: that of ``anchor`` and the samples to the pass ``seq``, forward or backward.

    ``anchor`` is the pass of a balance, 0 for the beginning, where nothing was used, or ``None`` for now.
    """

    seq: int
    anchor: int | None
    first: int
    last: int
    backward: bool
    passes: int


def bucket(at: int, seconds: int) -> int:
    """Number the stretch of ``seconds`` that a time in microseconds is in; its end belongs to it, as in a report."""
    return (at - 1) // (seconds * _SECOND)


def strike(connection: sqlite3.Connection, seq: int, previous: int, at: int) -> None:
    """Write down what the accounts have after the pass ``seq`` at ``previous``, if ten minutes end between it and ``at``."""
    ended = [
        width for width in (TEN_MINUTES, HOUR, DAY, WEEK) if bucket(previous, width) != bucket(at, width)
    ]
    if not ended:
        return
    (last,) = connection.execute("SELECT coalesce(max(seq), 0) FROM balanced").fetchone()
    (passes,) = connection.execute(
        "SELECT count(*) FROM (SELECT 1 FROM pass WHERE seq > ? LIMIT ?)", (last, _PASSES)
    ).fetchone()
    if passes < (_PASSES_AT_DAYS if DAY in ended else _PASSES):
        return
    connection.execute("INSERT INTO balanced VALUES (?, ?)", (seq, ended[-1]))
    connection.execute(_STRIKE, (seq,))
    connection.execute(_RESTATE, (seq,))


def drop(connection: sqlite3.Connection, first: int, last: int) -> None:
    """Let go of the balances of the passes ``first`` to ``last``."""
    connection.execute("DELETE FROM balance WHERE seq BETWEEN ? AND ?", (first, last))
    connection.execute("DELETE FROM balanced WHERE seq BETWEEN ? AND ?", (first, last))


def used(connection: sqlite3.Connection, after: int, until: int) -> dict[int, Amounts]:
    """Give what each account got in passes after ``after`` and up to ``until`` (microseconds); who got nothing may lack."""
    return _add_up(connection, list(_ranges(connection, after, until)), None)


def used_in(
    connection: sqlite3.Connection, first: int, last: int, accounts: Collection[int] | None = None
) -> dict[int, Amounts]:
    """Give what each account, or only those of ``accounts``, got in the passes ``first`` to ``last``.  Who got
    nothing may lack.
    """
    if first > last or (accounts is not None and not accounts):
        return {}
    return _add_up(connection, [(first, last)], accounts)


def _add_up(
    connection: sqlite3.Connection, ranges: list[tuple[int, int]], accounts: Collection[int] | None
) -> dict[int, Amounts]:
    anchors = _anchors(connection)
    terms: list[str] = []
    values: list[int] = []
    for first, last in ranges:
        for term, borders in _terms(connection, anchors, first, last, accounts):
            terms.append(term)
            values += borders
    if not terms:
        return {}
    rows = connection.execute(
        f"SELECT account, {_SUMS} FROM ({' UNION ALL '.join(terms)}) GROUP BY account",  # noqa: S608 (our own names and signs)
        values,
    )
    return {account: (a, b, c, d, e) for account, a, b, c, d, e in rows}


def _anchors(connection: sqlite3.Connection) -> list[int]:
    """Give the passes of which there are balances; a ledger of version 1 has none."""
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'balanced'").fetchone():
        return []
    return [seq for (seq,) in connection.execute("SELECT seq FROM balanced ORDER BY seq")]


def _ranges(connection: sqlite3.Connection, after: int, until: int) -> Iterator[tuple[int, int]]:
    """Give the first and the last pass of each run of passes in the interval: one, where the clock was never set back."""
    inside, first, last = connection.execute(
        "SELECT count(*), min(seq), max(seq) FROM pass WHERE at > ? AND at <= ?", (after, until)
    ).fetchone()
    if not inside:
        return
    if inside == _count(connection, first, last):
        yield first, last
        return
    begun, before = None, first
    for seq, there in connection.execute(
        "SELECT seq, at > ? AND at <= ? FROM pass WHERE seq BETWEEN ? AND ? ORDER BY seq",
        (after, until, first, last),
    ):
        if there and begun is None:
            begun = seq
        elif not there and begun is not None:
            yield begun, before
            begun = None
        before = seq
    if begun is not None:
        yield begun, last


def _terms(
    connection: sqlite3.Connection,
    anchors: list[int],
    first: int,
    last: int,
    accounts: Collection[int] | None,
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give what adds up to the usage of the passes ``first`` to ``last``, as few rows as can be."""
    among = _among(accounts)
    before, after = _side(connection, anchors, first - 1), _side(connection, anchors, last)
    if _count(connection, first, last) <= before.passes + after.passes + 2:
        yield _samples(first, last, 1, among)
        return
    for side, sign in ((after, 1), (before, -1)):
        if side.anchor is None:
            yield f"SELECT id AS account, {_signed(sign)} FROM account WHERE true{among.format('id')}", ()  # noqa: S608
        elif side.anchor:
            which = f"seq = ?{among.format('account')}"
            yield f"SELECT account, {_signed(sign)} FROM balance WHERE {which}", (side.anchor,)  # noqa: S608
        if side.passes:
            yield _samples(side.first, side.last, -sign if side.backward else sign, among)


def _among(accounts: Collection[int] | None) -> str:
    """The condition of some accounts, with a place for the column."""
    return "" if accounts is None else f" AND {{}} IN ({', '.join(map(str, sorted(accounts)))})"


def _samples(first: int, last: int, sign: int, among: str) -> tuple[str, tuple[int, ...]]:
    # of few accounts: looked up in each pass
    rows = "pass CROSS JOIN sample ON sample.seq = pass.seq" if among else "sample"
    which = f"{'pass' if among else 'sample'}.seq BETWEEN ? AND ?{among.format('account')}"
    return f"SELECT account, {_signed(sign)} FROM {rows} WHERE {which}", (first, last)  # noqa: S608


def _signed(sign: int) -> str:
    return _COLUMNS if sign > 0 else ", ".join(f"-{column} AS {column}" for column in AMOUNT_COLUMNS)


def _side(connection: sqlite3.Connection, anchors: list[int], seq: int) -> _Side:
    """Give the state after the pass ``seq`` from whatever has the fewest passes in between."""
    below = max((anchor for anchor in anchors if anchor <= seq), default=0)
    above = min((anchor for anchor in anchors if anchor > seq), default=None)
    (end,) = connection.execute("SELECT max(seq) FROM pass").fetchone()
    forward = _Side(seq, below, below + 1, seq, False, _count(connection, below + 1, seq))
    stop = end if above is None else above
    backward = _Side(seq, above, seq + 1, stop, True, _count(connection, seq + 1, stop))
    return min(forward, backward, key=lambda side: side.passes)


def _count(connection: sqlite3.Connection, first: int, last: int) -> int:
    row = connection.execute("SELECT count(*) FROM pass WHERE seq BETWEEN ? AND ?", (first, last)).fetchone()
    return int(row[0])
