"""Ledgers as they are after a month and a year, made in seconds: passes, and balances of the accounts, at the spacing that
thinning leaves (accounting/thinning.py).
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from accounting import Ledger, Pass
from accounting.model import CountReading, GaugeReading, ProcessReading, TrafficReading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DAY = 86400
NOW = 1_800_057_600  # a midnight
_AMOUNTS = "bytes_in, bytes_out, packets_in, packets_out, quantity"
# up to so many days ago, a pass each so many seconds, in which one of so many accounts has something new, and a balance of all
# at the end of so many seconds
SPACING = ((1, 10, 5, 600), (7, 60, 2, 3600), (90, 3600, 1, DAY), (366, DAY, 1, 7 * DAY))


def busy_pass(at: float, number: int, partitions: int) -> Pass:
    """Everything of every partition has moved since the pass before: four ways of its addresses, tap, processes."""
    names = [f"slappart{index}" for index in range(partitions)]
    ways = (
        ("2001:db8::1", "ipv6", "remote"),
        ("2001:db8::1", "ipv6", "local"),
        ("10.0.0.1", "ipv4", "local"),
    )
    traffic = [
        TrafficReading(name, address, family, scope, "e", *(number * 10**6 + n for n in range(4)))
        for name in names
        for address, family, scope in (*ways, ("slaptap", "tap", "remote"))
    ]
    return Pass(
        at,
        dict.fromkeys(names, "SOFTINST-1"),
        tuple(traffic),
        tuple(CountReading(name, "denied_packets", "e", number) for name in names),
        tuple(GaugeReading(name, "memory_bytes", number * 4096) for name in names),
        tuple(ProcessReading(name, "b", pid, 1, number * 10**4) for pid, name in enumerate(names, 1)),
    )


class Spaced(NamedTuple):
    """When a pass was, of how many accounts one moves in it, and whether there is a balance."""

    at: float
    share: int
    balance: bool


def passes(days: int) -> Iterator[Spaced]:
    """The passes of the last days, the oldest first."""
    before = 0
    spans = []
    for until, seconds, share, balance in SPACING:
        first, last = min(until, days) * DAY, min(before, days) * DAY
        spans.append(
            [Spaced(NOW - ago, share, (NOW - ago) % balance == 0) for ago in range(first, last, -seconds)]
        )
        before = until
    for span in reversed(spans):
        yield from span


def a_month(path: Path, partitions: int) -> None:
    """A ledger of busy partitions as it is after 30 days, written pass by pass."""
    with Ledger(path) as ledger:
        for number, one in enumerate(passes(30), 1):
            ledger.record(busy_pass(one.at, number, partitions))


def a_day_joined(path: Path, partitions: int, limit: float) -> tuple[int, int, list[float]]:
    """Thin what a day has left, a week later: the size before and after, and the seconds of each step."""
    with Ledger(path) as ledger:
        for number in range(1, 8642):
            ledger.record(busy_pass(NOW + 10.0 * number, number, partitions))
        with ledger.transaction("IMMEDIATE") as connection:
            connection.execute("UPDATE period SET documented = 1")
    before, steps, more = path.stat().st_size, [], True
    with Ledger(path) as ledger:
        while more:
            start = time.perf_counter()
            more = ledger.thin(NOW + 9.0 * DAY, limit)
            steps.append(time.perf_counter() - start)
    return before, path.stat().st_size, steps


def bytes_of_a_pass(path: Path, partitions: int, count: int = 1000) -> float:
    """What a busy pass adds to the file."""
    with Ledger(path) as ledger:
        for number in range(1, count + 1):
            ledger.record(busy_pass(NOW + 10.0 * number, number, partitions))
    first = path.stat().st_size
    with Ledger(path) as ledger:
        for number in range(count + 1, 2 * count + 1):
            ledger.record(busy_pass(NOW + 10.0 * number, number, partitions))
    size = path.stat().st_size
    path.unlink()
    return (size - first) / count


def a_year(path: Path, partitions: int) -> None:
    """A ledger after a year: the accounts by real passes, the rest in SQL, for it is some ten million rows."""
    first = NOW - 367.0 * DAY
    with Ledger(path) as ledger:
        ledger.record(busy_pass(first, 1, partitions))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        stretch: list[tuple[int, int]] = []
        for seq, one in enumerate(passes(366), 2):
            at = round(one.at * 1e6)
            connection.execute("INSERT INTO pass (seq, at, previous_at) VALUES (?, ?, ?)", (seq, at, at))
            connection.execute(_SAMPLES, (seq, one.share))
            connection.execute(_GAUGES, (seq, one.share))
            stretch.append((seq, one.share))
            if one.balance:
                _balance(connection, stretch, one.at)
        _balance(connection, stretch, NOW + DAY)
        connection.execute("COMMIT")
    _check(path, first)


_SAMPLES = (
    f"INSERT INTO sample (seq, account, {_AMOUNTS}) SELECT ?1, id, 1000000, 2000000, 1000, 2000, 0 FROM account"  # noqa: S608
    " WHERE (?1 + id) % ?2 = 0"
)
_GAUGES = "INSERT INTO gauge_sample (seq, gauge, value) SELECT ?1, id, 4096 * ?1 FROM gauge WHERE (?1 + id) % ?2 = 0"


def _balance(connection: sqlite3.Connection, stretch: list[tuple[int, int]], at: float) -> None:
    """Bring the accounts up to the samples of a stretch, and write down what they have."""
    last = stretch[-1][0]
    connection.execute(
        "UPDATE account SET (bytes_in, bytes_out, packets_in, packets_out) = (bytes_in + count * 1000000,"
        " bytes_out + count * 2000000, packets_in + count * 1000, packets_out + count * 2000)"
        " FROM (SELECT account AS moved, count(*) AS count FROM sample WHERE seq BETWEEN ? AND ? GROUP BY account)"
        " WHERE id = moved",
        (stretch[0][0], last),
    )
    connection.execute("UPDATE gauge SET seq = ?, value = 4096 * ?", (last, last))
    stretch.clear()
    if at > NOW:
        return
    ends = max(width for width in (600, 3600, DAY, 7 * DAY) if at % width == 0)
    connection.execute("INSERT INTO balanced (seq, ends) VALUES (?, ?)", (last, ends))
    connection.execute(
        f"INSERT INTO balance (seq, account, {_AMOUNTS}) SELECT ?, id, {_AMOUNTS} FROM account",  # noqa: S608
        (last,),
    )
    connection.execute(
        "INSERT OR IGNORE INTO gauge_sample (seq, gauge, value) SELECT ?, id, value FROM gauge", (last,)
    )


def _check(path: Path, first: float) -> None:
    """What was made is a ledger that agrees with itself: by balances or by adding up, usage is the same."""
    with Ledger.open_readonly(path) as ledger:
        month = NOW - 30 * DAY
        ways = (((None, None),), ((first - 1, month), (month, None)))
        sums = [
            sum(a.bytes_in for span in way for p in ledger.usage(*span).partitions for a in p.addresses)
            for way in ways
        ]
    assert sums[0] == sums[1] > 0, sums
