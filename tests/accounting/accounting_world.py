"""Short ways to say readings, and to ask for sums, for the tests of the ledger."""

import sqlite3
from contextlib import closing

from accounting import CountReading, GaugeReading, LedgerReader, Pass, ProcessReading, TrafficReading

EVER = (None, None)


def traffic(
    partition="slappart0", value=0, *, address="2001:db8::1", family="ipv6", scope="remote", epoch="e1"
):
    """A reading whose four counters differ but all follow from one value."""
    return TrafficReading(partition, address, family, scope, epoch, value, 2 * value, value // 10, value // 5)


def count(name, value, *, partition="slappart0", epoch="e1"):
    return CountReading(partition, name, epoch, value)


def gauge(name, value, *, partition="slappart0"):
    return GaugeReading(partition, name, value)


def process(pid, cpu, *, partition="slappart0", started=1, boot="b1", io=(None, None), parent=0):
    return ProcessReading(partition, boot, pid, started, cpu, *io, parent)


def a_pass(at, *readings, owners=None, processes=None, boot="", uptime=None, unreadable=()):
    """A pass of readings of any kind; partitions are free unless owners are given."""
    kinds = {TrafficReading: [], CountReading: [], GaugeReading: []}
    for reading in readings:
        kinds[type(reading)].append(reading)
    return Pass(
        at,
        {"slappart0": None} if owners is None else owners,
        tuple(kinds[TrafficReading]),
        tuple(kinds[CountReading]),
        tuple(kinds[GaugeReading]),
        None if processes is None else tuple(processes),
        boot,
        uptime,
        frozenset(unreadable),
    )


def bytes_in(ledger: LedgerReader, start=None, end=None, partition=None):
    """Bytes towards each partition under each owner, where there are any."""
    return {
        (entry.id, entry.instance_guid): total
        for entry in ledger.usage(start, end, partition).partitions
        if (total := sum(address.bytes_in for address in entry.addresses))
    }


def back_to_version_1(path):
    """Take out of a closed ledger what version 2 has more, as if an older partitiond had written it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for table in ("period", "thinned", "intake", "document", "incident", "balanced", "balance", "clock"):
            connection.execute(f"DROP TABLE {table}")
        for column in ("reported_seq", "gone"):
            connection.execute(f"ALTER TABLE owner DROP COLUMN {column}")
        for column in ("io_read", "io_written", "parent"):
            connection.execute(f"ALTER TABLE process DROP COLUMN {column}")
        connection.execute("PRAGMA user_version = 1")
