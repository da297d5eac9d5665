"""Posts a settled pass. Every function runs inside the caller's transaction."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from accounting import balances
from accounting.clock import SLACK
from accounting.model import Gap
from accounting.settle import (
    NOTHING,
    Books,
    Meter,
    Settlement,
    restart_reasons,
)
from accounting.store import PROCESSES, READINGS

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

    from accounting.memory import Memory
    from accounting.model import GaugeReading, Pass

_INSERT_LEVEL = "INSERT INTO level VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_UPDATE_LEVEL = (
    "UPDATE level SET epoch = ?, bytes_in = ?, bytes_out = ?, packets_in = ?, packets_out = ?, quantity = ?"
    " WHERE partition = ? AND name = ? AND address = ? AND family = ? AND scope = ?"
)
_ADD_TO_ACCOUNT = (
    "UPDATE account SET bytes_in = bytes_in + ?, bytes_out = bytes_out + ?, packets_in = packets_in + ?,"
    " packets_out = packets_out + ?, quantity = quantity + ? WHERE id = ?"
)
_UPSERT_PROCESS = (
    "INSERT INTO process (pid, started, boot, partition, cpu, io_read, io_written, parent)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT DO UPDATE SET partition = excluded.partition, cpu = excluded.cpu,"
    " io_read = excluded.io_read, io_written = excluded.io_written, parent = excluded.parent"
)


def begin_pass(connection: sqlite3.Connection, at: int) -> tuple[int, int | None]:
    """Number a pass at ``at`` (microseconds); give its ``seq`` and when the one before was."""
    previous = None
    for last, previous in connection.execute("SELECT seq, at FROM pass ORDER BY seq DESC LIMIT 1").fetchall():
        balances.strike(connection, last, previous, at)
    cursor = connection.execute("INSERT INTO pass (at, previous_at) VALUES (?, ?)", (at, previous))
    seq = int(cursor.lastrowid or 0)
    _keep_period(connection, seq, at)
    return seq, previous


def _keep_period(connection: sqlite3.Connection, seq: int, at: int) -> None:
    """Close the day under way when the pass is of a later one, or the clock went back by more than it is ever corrected."""
    day = day_of(at)
    row = connection.execute("SELECT id, day, began FROM period WHERE until_seq IS NULL").fetchone()
    if row is not None:
        number, under_way, began = row
        if day <= under_way and at >= began - SLACK:
            return
        connection.execute("UPDATE period SET until_seq = ? WHERE id = ?", (seq - 1, number))
    connection.execute("INSERT INTO period (day, began, first_seq) VALUES (?, ?, ?)", (day, at, seq))


def day_of(at: int) -> str:
    """The day in UTC of a time in microseconds, as ``2026-11-22``."""
    return datetime.fromtimestamp(at / 1e6, UTC).date().isoformat()


def present_owners(
    connection: sqlite3.Connection, seq: int, reading: Pass, settled: Settlement
) -> dict[str, int]:
    """Bring the owners up to date; give the id of the owner of each partition that the pass is about."""
    present = {meter.partition for meter in settled.amounts} | {gauge.partition for gauge in reading.gauges}
    wanted = {partition: reading.owners.get(partition) or "" for partition in present | reading.owners.keys()}
    owners: dict[str, int] = {}
    rows = connection.execute("SELECT id, partition, guid FROM owner WHERE until_seq IS NULL").fetchall()
    for owner, partition, guid in rows:
        if wanted.get(partition) == guid:
            owners[partition] = owner
        else:
            connection.execute("UPDATE owner SET until_seq = ? WHERE id = ?", (seq, owner))
    for partition, guid in wanted.items():
        if partition not in owners:
            row = connection.execute(
                "INSERT INTO owner (partition, guid, first_seq) VALUES (?, ?, ?)"
                " ON CONFLICT DO UPDATE SET until_seq = NULL, gone = 0 RETURNING id",
                (partition, guid, seq),
            ).fetchone()
            owners[partition] = int(row[0])
    return owners


def post(
    connection: sqlite3.Connection, seq: int, settled: Settlement, owners: dict[str, int], memory: Memory
) -> None:
    """Add the amounts to the accounts of the present owners, and store the new levels."""
    accounts = memory.accounts_of(connection, owners)
    _open_accounts(connection, settled, owners, accounts)
    amounts = sorted(
        (accounts[meter], amount) for meter, amount in settled.amounts.items() if amount is not NOTHING
    )
    connection.executemany(_ADD_TO_ACCOUNT, [(*amount, account) for account, amount in amounts])
    connection.executemany(
        "INSERT INTO sample VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(seq, account, *amount) for account, amount in amounts],
    )
    # an insertion that becomes an update costs twice what either does
    known, new = [], []
    for meter, (epoch, raw) in settled.levels.items():
        if meter in memory.levels:
            known.append((epoch, *raw, *meter))
        else:
            new.append((*meter, epoch, *raw))
    connection.executemany(_UPDATE_LEVEL, known)
    connection.executemany(_INSERT_LEVEL, new)
    connection.executemany(
        "DELETE FROM process WHERE pid = ? AND started = ? AND boot = ?", list(settled.ended)
    )
    connection.executemany(_UPSERT_PROCESS, [(*key, *level) for key, level in settled.processes.items()])


def post_gauges(
    connection: sqlite3.Connection,
    seq: int,
    gauges: tuple[GaugeReading, ...],
    owners: Mapping[str, int],
    memory: Memory,
) -> None:
    """Store the gauges that differ from their last value under the same owner."""
    changed = []
    for reading in gauges:
        owner = owners[reading.partition]
        gauge, value = memory.gauges.get((owner, reading.name), (None, None))
        if value == reading.value:
            continue
        if gauge is None:
            cursor = connection.execute(
                "INSERT INTO gauge (owner, name, first_seq, seq, value) VALUES (?, ?, ?, ?, ?)",
                (owner, reading.name, seq, seq, reading.value),
            )
            gauge = int(cursor.lastrowid or 0)
        memory.gauges[owner, reading.name] = (gauge, reading.value)
        changed.append((seq, reading.value, gauge))
    connection.executemany("UPDATE gauge SET seq = ?, value = ? WHERE id = ?", changed)
    connection.executemany("INSERT INTO gauge_sample (seq, value, gauge) VALUES (?, ?, ?)", changed)


def post_gaps(
    connection: sqlite3.Connection, settled: Settlement, previous: int | None, at: int
) -> tuple[Gap, ...]:
    """Write down which partitions' counters began again; give the gaps, one for each reason."""
    # A clock that was set back must not make a gap that ends before it starts.
    start = at if previous is None else min(previous, at)
    reasons = restart_reasons(settled.restarted)
    connection.executemany(
        "INSERT INTO gap (partition, start, until, reason) VALUES (?, ?, ?, ?)",
        [(partition, start, at, reason) for partition, reason in sorted(reasons.items())],
    )
    return tuple(Gap(start / 1e6, at / 1e6, reason) for reason in sorted(set(reasons.values())))


def begin_after_damage(connection: sqlite3.Connection, written: float | None, at: int, reason: str) -> None:
    """Say in a new ledger that the one before was lost; its first pass will take levels only."""
    start = None if written is None else min(round(written * 1e6), at)
    cursor = connection.execute(
        "INSERT INTO gap (start, until, reason) VALUES (?, ?, ?)", (start, at, reason)
    )
    rows = [(what, cursor.lastrowid) for what in (READINGS, PROCESSES)]
    connection.executemany("INSERT INTO pending VALUES (?, ?)", rows)


def end_damage(connection: sqlite3.Connection, reading: Pass, books: Books, at: int) -> None:
    """Once the levels are taken, count again; the gap reaches up to here."""
    done = []
    if books.skip_new_readings and (reading.traffic or reading.counts):
        done.append(READINGS)
    if books.skip_new_processes and reading.processes is not None:
        done.append(PROCESSES)
    for what in done:
        connection.execute(
            "UPDATE gap SET until = max(until, ?) WHERE id = (SELECT gap FROM pending WHERE what = ?)",
            (at, what),
        )
        connection.execute("DELETE FROM pending WHERE what = ?", (what,))


def _open_accounts(
    connection: sqlite3.Connection, settled: Settlement, owners: Mapping[str, int], accounts: dict[Meter, int]
) -> None:
    """Open those accounts that meters of the pass lack under their partition's owner."""
    for meter in [one for one in settled.amounts if one not in accounts]:
        cursor = connection.execute(
            "INSERT INTO account (owner, name, address, family, scope, bytes_in, bytes_out, packets_in,"
            " packets_out, quantity) VALUES (?, ?, ?, ?, ?, 0, 0, 0, 0, 0)",
            (owners[meter.partition], *meter[1:]),
        )
        accounts[meter] = int(cursor.lastrowid or 0)
