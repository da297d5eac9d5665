"""Answers what was used between two times, from the tables of the ledger.

A sample counts in the interval in which its pass happened: after ``start``, up to and including ``end``. So
intervals that touch (the end of one is the start of the next) share no sample and miss none, whatever the
clock did. Every function runs inside the caller's read transaction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from accounting import balances
from accounting.model import DENIED, AddressUsage, Gap, PartitionUsage, UsageReport
from accounting.settle import CPU, IO_READ, IO_WRITE, NOTHING, TRAFFIC, Amounts
from accounting.store import microseconds

if TYPE_CHECKING:
    import sqlite3

_TIMELESS = 2**62  # later than any clock, in microseconds


class _Owner(NamedTuple):
    id: int
    partition: str
    guid: str
    first_seq: int
    until_seq: int | None


@dataclass(slots=True)
class _Sums:
    """What is gathered for one owner."""

    addresses: list[AddressUsage] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    used: bool = False


def usage(
    connection: sqlite3.Connection, start: float | None, end: float | None, partition: str | None
) -> UsageReport:
    """Report the interval; ``None`` leaves that side open. See ``Ledger.usage``."""
    after = -_TIMELESS if start is None else microseconds(start)
    until = _TIMELESS if end is None else microseconds(end)
    owners = _owners(connection, partition)
    sums = _sums(connection, owners, balances.used(connection, after, until))
    first, last = _last_pass(connection, after), _last_pass(connection, until)
    gauges = _gauges(connection, last)
    partitions = [
        _partition(owner, sums[owner.id], gauges)
        for owner in owners
        if _listed(owner, sums[owner.id], first, last)
    ]
    return UsageReport(
        start=start,
        end=_end(connection, start, end),
        partitions=tuple(partitions),
        gaps=_gaps(connection, after, until, partition),
    )


def totals(connection: sqlite3.Connection) -> tuple[PartitionUsage, ...]:
    """Give one entry per partition of the node: sums over all its owners, gauges of the present one."""
    present = {owner.partition for owner in _owners(connection, None) if owner.until_seq is None}
    merged: dict[str, PartitionUsage] = {}
    for entry in usage(connection, None, None, None).partitions:  # the present owner comes last
        before = merged.get(entry.id)
        merged[entry.id] = entry if before is None else _merge(before, entry)
    return tuple(entry for partition, entry in merged.items() if partition in present)


def _owners(connection: sqlite3.Connection, partition: str | None) -> list[_Owner]:
    """Give owners by partition (slappart2 before slappart10), the present one last."""
    rows = connection.execute(
        "SELECT id, partition, guid, first_seq, until_seq FROM owner WHERE ?1 IS NULL OR partition = ?1",
        (partition,),
    )
    owners = [_Owner(*row) for row in rows]
    return sorted(owners, key=lambda o: (_natural(o.partition), o.until_seq is None, o.until_seq or 0))


def _natural(name: str) -> tuple[str, int, str]:
    digits = re.search(r"[0-9]{1,18}$", name)
    return (name[: digits.start()], int(digits.group()), name) if digits else (name, -1, name)


def _sums(
    connection: sqlite3.Connection, owners: list[_Owner], amounts: dict[int, Amounts]
) -> dict[int, _Sums]:
    sums = {owner.id: _Sums() for owner in owners}
    for account, owner, name, address, family, scope in connection.execute(
        "SELECT id, owner, name, address, family, scope FROM account ORDER BY address, family, scope DESC"
    ):
        gathered = sums.get(owner)
        if gathered is None:
            continue
        amount = amounts.get(account, NOTHING)
        gathered.used = gathered.used or amount != NOTHING
        if name == TRAFFIC:
            gathered.addresses.append(AddressUsage(address, family, scope, *amount[:4]))
        else:
            gathered.counts[name] = gathered.counts.get(name, 0) + amount[4]
    return sums


def _last_pass(connection: sqlite3.Connection, until: int) -> int:
    row = connection.execute("SELECT max(seq) FROM pass WHERE at <= ?", (until,)).fetchone()
    return int(row[0] or 0)


def _listed(owner: _Owner, sums: _Sums, first: int, last: int) -> bool:
    """Say whether an owner belongs in the report: it used something, or held the partition then."""
    if sums.used:
        return True
    held = owner.first_seq <= last and (owner.until_seq is None or owner.until_seq > first)
    # That a partition was once free for a while, and nothing was used, is no news.
    return held and (owner.guid != "" or owner.until_seq is None)


def _gauges(connection: sqlite3.Connection, last: int) -> dict[tuple[int, str], int]:
    """Give the latest value of each gauge (by owner and name) up to the pass ``last``."""
    found: dict[tuple[int, str], int] = {}
    changed_since: dict[int, tuple[int, str]] = {}
    for gauge, owner, name, first_seq, seq, value in connection.execute("SELECT * FROM gauge"):
        if seq <= last:
            found[owner, name] = value
        elif first_seq <= last:
            changed_since[gauge] = (owner, name)
    if changed_since:
        # Backwards from there: what has changed since changes often, so it is soon found.
        for gauge, value in connection.execute(
            "SELECT gauge, value FROM gauge_sample WHERE seq <= ? ORDER BY seq DESC", (last,)
        ):
            key = changed_since.pop(gauge, None)
            if key is not None:
                found[key] = value
                if not changed_since:
                    break
    return found


def _partition(owner: _Owner, sums: _Sums, gauges: dict[tuple[int, str], int]) -> PartitionUsage:
    return PartitionUsage(
        id=owner.partition,
        instance_guid=owner.guid or None,
        addresses=tuple(sums.addresses),
        denied_packets=sum(sums.counts.get(name, 0) for name in DENIED),
        cpu_seconds=sums.counts.get(CPU, 0) / 1e6,
        memory_bytes=gauges.get((owner.id, "memory_bytes"), 0),
        disk_bytes=gauges.get((owner.id, "disk_bytes"), 0),
        io_read_bytes=sums.counts.get(IO_READ, 0),
        io_write_bytes=sums.counts.get(IO_WRITE, 0),
        processes=gauges.get((owner.id, "processes"), 0),
    )


def _end(connection: sqlite3.Connection, start: float | None, end: float | None) -> float | None:
    if end is not None:
        return end
    row = connection.execute("SELECT at FROM pass ORDER BY seq DESC LIMIT 1").fetchone()
    if row is None:
        return start
    last = float(row[0]) / 1e6
    return last if start is None else max(start, last)


def _gaps(connection: sqlite3.Connection, after: int, until: int, partition: str | None) -> tuple[Gap, ...]:
    rows = connection.execute(
        "SELECT DISTINCT start, until, reason FROM gap"
        " WHERE until > ?1 AND (start IS NULL OR start < ?2)"
        " AND (?3 IS NULL OR partition IS NULL OR partition = ?3) ORDER BY until, start, reason",
        (after, until, partition),
    )
    return tuple(
        Gap(None if start is None else start / 1e6, end / 1e6, reason) for start, end, reason in rows
    )


def _merge(before: PartitionUsage, entry: PartitionUsage) -> PartitionUsage:
    addresses = {(a.address, a.family, a.scope): a for a in before.addresses}
    for a in entry.addresses:
        old = addresses.get((a.address, a.family, a.scope))
        addresses[a.address, a.family, a.scope] = (
            a
            if old is None
            else replace(
                a,
                bytes_in=a.bytes_in + old.bytes_in,
                bytes_out=a.bytes_out + old.bytes_out,
                packets_in=a.packets_in + old.packets_in,
                packets_out=a.packets_out + old.packets_out,
            )
        )
    return replace(
        entry,
        addresses=tuple(addresses.values()),
        denied_packets=before.denied_packets + entry.denied_packets,
        # Of whole microseconds, so that a total never falls by a rounding error.
        cpu_seconds=round((before.cpu_seconds + entry.cpu_seconds) * 1e6) / 1e6,
        io_read_bytes=before.io_read_bytes + entry.io_read_bytes,
        io_write_bytes=before.io_write_bytes + entry.io_write_bytes,
    )
