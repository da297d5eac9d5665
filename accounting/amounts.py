"""What the ledger holds of each meter that can be reported, between two passes. Reads only, in the caller's transaction."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from accounting import balances
from accounting.settle import CPU, MICROSECONDS, TRAFFIC

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterator, Mapping

    from accounting.settle import Amounts

LEVELS: Mapping[str, str] = {"memory_bytes": "memory", "disk_bytes": "disk"}
"""Meters that are levels, by the name of their gauge."""

_FEW = 1000  # accounts
_COUNTS = {"io_read_bytes": "io_read", "io_write_bytes": "io_write"}
_SPAN = 300  # seconds; a level is looked up at the end of each of these
_HOUR = 3600


class Ways(NamedTuple):
    """The meters of one kind of address: bytes in and out, packets in and out."""

    bytes_in: str
    bytes_out: str
    packets_in: str = ""
    packets_out: str = ""


_REMOTE = Ways("network_in", "network_out", "packets_in", "packets_out")
_LOCAL = Ways("local_in", "local_out")
_TAP = Ways("tap_in", "tap_out")


def of_samples(
    connection: sqlite3.Connection, first: int, until: int, told: Mapping[int, int]
) -> Iterator[tuple[int, str, Decimal]]:
    """Give owner, meter and amount (bytes, packets, seconds) of the passes ``first`` to ``until``; a meter may come more than
    once. ``told``: whose, and up to which pass each owner's samples are told already.
    """
    meters = {
        number: (owner, name, family, scope)
        for number, owner, name, family, scope in connection.execute(
            "SELECT id, owner, name, family, scope FROM account"
        )
        if owner in told
    }
    late: dict[int, list[int]] = {}  # accounts of those who have been told of up to some pass of the range
    for number, (owner, *_) in meters.items():
        if told[owner] >= first:
            late.setdefault(told[owner] + 1, []).append(number)
    late_ones = {number for numbers in late.values() for number in numbers}
    ranges = [(first, [number for number in meters if number not in late_ones]), *sorted(late.items())]
    for begin, numbers in ranges:
        # those of most are sooner found among all
        few = None if len(numbers) > _FEW else numbers
        found = balances.used_in(connection, begin, until, few)
        for number in numbers:
            if number in found:
                yield from _named(*meters[number], found[number])


def _named(
    owner: int, name: str, family: str, scope: str, values: Amounts
) -> Iterator[tuple[int, str, Decimal]]:
    if name == TRAFFIC:
        ways = _TAP if family == "tap" else _LOCAL if scope == "local" else _REMOTE
        for meter, value in zip(ways, values, strict=False):
            if meter and value:
                yield owner, meter, Decimal(value)
    elif name == CPU and values[4]:
        yield owner, "cpu", Decimal(values[4]) / MICROSECONDS
    elif name in _COUNTS and values[4]:
        yield owner, _COUNTS[name], Decimal(values[4])


class _Span(NamedTuple):
    """A stretch of the clock: its last pass, and from when to when it counts (Unix seconds)."""

    last: int
    begin: float
    end: float


def of_levels(
    connection: sqlite3.Connection, first: int, until: int, told: Mapping[int, int], *, ended: bool
) -> Iterator[tuple[int, str, Decimal]]:
    """Give owner, meter and byte-hours of the passes ``first`` to ``until``, of the owners of ``told``.

    A level counts for each span of five minutes in which there was a pass, with its value after the last pass of the span:
    times in which nobody looked count nothing. Where more passes may come (not ``ended``), the last span counts up to the
    last pass; and for who is told of up to some pass of a span, from that pass on.
    """
    spans = _spans(connection, first, until, ended=ended)
    gauges = {
        number: (owner, LEVELS[name], since, seq, value)
        for number, owner, name, since, seq, value in connection.execute(
            "SELECT id, owner, name, first_seq, seq, value FROM gauge"
        )
        if name in LEVELS and owner in told
    }
    ends, heard = _ends(connection), _heard(connection, told, first)
    now = _values_before(connection, first, gauges)
    changes = _changes(connection, first, until, gauges)
    sums = dict.fromkeys(gauges, 0.0)
    for span in spans:
        while changes and changes[-1][0] <= span.last:
            _, gauge, value = changes.pop()
            now[gauge] = value
        for gauge, value in now.items():
            if gauge not in gauges:
                continue
            owner = gauges[gauge][0]
            if told[owner] <= span.last < ends.get(owner, span.last + 1):
                sums[gauge] += value * max(0.0, span.end - max(span.begin, heard.get(owner, span.begin)))
    for gauge, total in sums.items():
        if total:
            yield gauges[gauge][0], gauges[gauge][1], Decimal(total) / _HOUR


def _spans(connection: sqlite3.Connection, first: int, until: int, *, ended: bool) -> list[_Span]:
    """The spans of time in which there was a pass, in the order of their last ones."""
    rows = connection.execute(
        f"SELECT max(seq), at / {_SPAN * MICROSECONDS} FROM pass WHERE seq BETWEEN ? AND ?"  # noqa: S608 - a number
        f" GROUP BY at / {_SPAN * MICROSECONDS}",
        (first, until),
    )
    spans = sorted(_Span(seq, number * _SPAN, (number + 1) * _SPAN) for seq, number in rows)
    if spans and not ended:
        at = connection.execute("SELECT at FROM pass WHERE seq = ?", (spans[-1].last,)).fetchone()[0]
        spans[-1] = spans[-1]._replace(end=at / MICROSECONDS)
    return spans


def _heard(connection: sqlite3.Connection, told: Mapping[int, int], first: int) -> dict[int, float]:
    """When the pass was up to which an owner is told of, of those of whom that is one of the range."""
    found = {}
    for owner, seq in told.items():
        if seq >= first:
            row = connection.execute(
                "SELECT at FROM pass WHERE seq >= ? ORDER BY seq LIMIT 1", (seq,)
            ).fetchone()
            if row is not None:
                found[owner] = row[0] / MICROSECONDS
    return found


def _ends(connection: sqlite3.Connection) -> dict[int, int]:
    """From which pass on an owner did not hold its partition any more."""
    return dict(connection.execute("SELECT id, until_seq FROM owner WHERE until_seq IS NOT NULL").fetchall())


def _changes(
    connection: sqlite3.Connection, first: int, until: int, gauges: Collection[int]
) -> list[tuple[int, int, int]]:
    """The last value of each of the gauges in each span in which it changed, the latest first."""
    among = f" AND gauge IN ({', '.join(map(str, gauges))})" if len(gauges) <= _FEW else ""
    rows = connection.execute(
        "SELECT max(gauge_sample.seq), gauge, value FROM pass CROSS JOIN gauge_sample ON gauge_sample.seq = pass.seq"  # noqa: S608 - a number
        f" WHERE pass.seq BETWEEN ? AND ?{among} GROUP BY gauge, at / {_SPAN * MICROSECONDS}",
        (first, until),
    )
    return sorted(rows, reverse=True)


def _values_before(
    connection: sqlite3.Connection, first: int, gauges: Mapping[int, tuple[int, str, int, int, int]]
) -> dict[int, int]:
    """The values with which the range begins."""
    found: dict[int, int] = {}
    wanted: set[int] = set()
    for gauge, (_, _, since, seq, value) in gauges.items():
        if seq < first:
            found[gauge] = value
        elif since < first:
            wanted.add(gauge)
    if wanted:
        for gauge, value in connection.execute(
            "SELECT gauge, value FROM gauge_sample WHERE seq < ? ORDER BY seq DESC", (first,)
        ):
            if gauge in wanted:
                found[gauge] = value
                wanted.remove(gauge)
                if not wanted:
                    break
    return found
