"""Ledgers as they are after a month and a year, made in seconds: passes at the spacing that thinning leaves.

10 s for a day, minutes for a week, hours for 90 days, days before (docs/design/accounting.md).
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from accounting import Ledger, Pass
from accounting.model import CountReading, GaugeReading, ProcessReading, TrafficReading
from accounting.settle import LARGEST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DAY = 86400
NOW = 1_800_000_000
# up to so many days ago, a pass each so many seconds, in which one of so many accounts has something new
SPACING = ((1, 10, 5), (7, 60, 2), (90, 3600, 1), (365, DAY, 1))


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


def passes(days: int) -> Iterator[tuple[float, int]]:
    """The time of each pass of the last days, the oldest first, and of how many accounts one moves in it."""
    before = 0
    spans = []
    for until, seconds, share in SPACING:
        first, last = min(until, days) * DAY, min(before, days) * DAY
        spans.append([(NOW - ago, share) for ago in range(first, last, -seconds)])
        before = until
    for span in reversed(spans):
        yield from span


def a_month(path: Path, partitions: int) -> None:
    """A ledger of busy partitions as it is after 30 days, written pass by pass."""
    with Ledger(path) as ledger:
        for number, (at, _) in enumerate(passes(30), 1):
            ledger.record(busy_pass(at, number, partitions))


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
    """A ledger after a year: the accounts by a real pass, the rest in SQL, for it is some ten million rows."""
    with Ledger(path) as ledger:
        ledger.record(busy_pass(NOW - 366.0 * DAY, 1, partitions))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        connection.execute("CREATE TEMP TABLE share (seq INTEGER PRIMARY KEY, share INTEGER)")
        rows = [(seq, round(at * 1e6), share) for seq, (at, share) in enumerate(passes(365), 2)]
        connection.executemany(
            "INSERT INTO pass (seq, at, previous_at) VALUES (?1, ?2, ?2)", (r[:2] for r in rows)
        )
        connection.executemany("INSERT INTO temp.share VALUES (?, ?)", ((r[0], r[2]) for r in rows))
        connection.execute(
            "INSERT INTO sample (seq, account, bytes_in, bytes_out, packets_in, packets_out, quantity)"
            " SELECT seq, id, 1000000, 2000000, 1000, 2000, 0 FROM temp.share CROSS JOIN account"
            " WHERE (seq + id) % share = 0"
        )
        connection.execute(
            "UPDATE account SET (bytes_in, bytes_out, packets_in, packets_out) ="
            " (SELECT bytes_in + count(*) * 1000000, bytes_out + count(*) * 2000000, packets_in + count(*) * 1000,"
            " packets_out + count(*) * 2000 FROM temp.share WHERE (seq + account.id) % share = 0)"
        )
        connection.execute("COMMIT")
        (most,) = connection.execute("SELECT max(bytes_out) FROM account").fetchone()
    assert 0 < most < LARGEST
