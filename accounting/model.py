"""What meters say and what a usage report says: plain frozen data, no I/O.

Readings are absolute: what the kernel has counted so far, never what was added since. So a reading that got
lost, or that is recorded twice, changes no sum. The ledger alone makes differences of them. They are tuples,
because a pass makes thousands of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping

Family = Literal["ipv4", "ipv6", "tap"]
Scope = Literal["remote", "local"]
CountName = Literal[
    "denied_packets", "denied_frames", "denied_calls", "cpu_seconds", "io_read_bytes", "io_write_bytes"
]
DENIED: tuple[CountName, ...] = ("denied_packets", "denied_frames", "denied_calls")
"""What was refused to a partition's processes on output, to its guest, and when it bound or received; each is
counted elsewhere in the kernel, so each has an epoch of its own.  A report has their sum.
"""
GaugeName = Literal["memory_bytes", "disk_bytes", "processes"]


class Received(NamedTuple):
    """What a second counter, which sees more, says that an address received, in bytes and packets.

    It takes the place of what the first one received, as soon as both were read by a pass (accounting.settle); never are both
    added. ``epoch`` is empty while it does not count. Read before the first counter and, as ``later_…``, once more
    after it, so that whichever of the two goes on counts nothing that the other had counted.
    """

    epoch: str
    bytes: int = 0
    packets: int = 0
    later_bytes: int = 0
    later_packets: int = 0


class TrafficReading(NamedTuple):
    """The four kernel counters of one address (or tap, named by its interface) of one partition.

    ``in`` is towards the partition. ``scope`` is ``local`` for what never left the node. ``epoch`` names
    the life of the kernel object: it must differ whenever the counters may have begun again at zero. For a
    named nft counter that is boot id, handle of the table and handle of the counter; for a tap, boot id and
    interface index. The counters of one reading are one object: where one went back, all are taken to have
    restarted. An address that has ``received`` has it in each pass.
    """

    partition: str
    address: str
    family: Family
    scope: Scope
    epoch: str
    bytes_in: int
    bytes_out: int
    packets_in: int
    packets_out: int
    received: Received | None = None


class CountReading(NamedTuple):
    """Any other number that only grows within ``epoch``: packets, or seconds (kept to the microsecond).

    ``part`` names what has a counter of its own where several make up one number, which a report adds up: such as the rule
    that denied. One that is not read any more is no restart of the others, nor of itself.
    """

    partition: str
    name: CountName
    epoch: str
    value: float
    part: str = ""


class ProcessReading(NamedTuple):
    """What one process has used since it started: processor time in microseconds, bytes read and written.

    ``boot`` is the kernel's boot id and ``started`` the start in clock ticks since that boot (field 22 of
    proc_pid_stat(5)): with ``pid`` they name a process for ever, also when the wall clock is set.

    ``io_read_bytes`` and ``io_write_bytes`` are ``None`` where that can not be read. Once a process has
    waited for a child, they hold the child's as well (kernel/exit.c, wait_task_zombie), which processor
    time does not; ``parent`` is the pid of the parent, 0 if unknown.
    """

    partition: str
    boot: str
    pid: int
    started: int
    cpu_microseconds: int
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    parent: int = 0


class GaugeReading(NamedTuple):
    """A level that goes up and down: bytes, or a number of processes."""

    partition: str
    name: GaugeName
    value: int


@dataclass(frozen=True, slots=True)
class Pass:
    """All that was read at one moment.

    ``at`` is in seconds of Unix time. ``owners`` lists every partition of the node with the GUID of its
    instance, ``None`` where it is free; what a partition that is not listed used is nobody's. A meter that
    failed leaves its readings out. ``processes`` must be whole or ``None``: a process that is missing in it
    has ended, unless its pid is among the ``unreadable``, which were there and could not be read. ``uptime``
    is how long the kernel boot ``boot`` had been up, suspended time included (CLOCK_BOOTTIME), in seconds:
    what tells a clock that was set from time that went by.
    """

    at: float
    owners: Mapping[str, str | None]
    traffic: tuple[TrafficReading, ...] = ()
    counts: tuple[CountReading, ...] = ()
    gauges: tuple[GaugeReading, ...] = ()
    processes: tuple[ProcessReading, ...] | None = None
    boot: str = ""
    uptime: float | None = None
    unreadable: frozenset[int] = frozenset()


class AddressJson(TypedDict):
    """One address in the contract's ``usage``."""

    address: str
    family: str
    scope: str
    bytes_in: int
    bytes_out: int
    packets_in: int
    packets_out: int


class PartitionJson(TypedDict):
    """One partition under one owner in the contract's ``usage``."""

    id: str
    instance_guid: str | None
    addresses: list[AddressJson]
    denied_packets: int
    cpu_seconds: float
    memory_bytes: int
    disk_bytes: int
    io_read_bytes: int
    io_write_bytes: int
    processes: int


# ``from`` is a keyword, so the functional form is the only one.
GapJson = TypedDict("GapJson", {"from": str | None, "to": str, "reason": str})
UsageJson = TypedDict(
    "UsageJson",
    {"from": str | None, "to": str | None, "partitions": list[PartitionJson], "gaps": list[GapJson]},
)


@dataclass(frozen=True, slots=True)
class AddressUsage:
    """What went over one address of a partition; bytes are IP length, for a tap Ethernet frame length."""

    address: str
    family: str
    scope: str
    bytes_in: int = 0
    bytes_out: int = 0
    packets_in: int = 0
    packets_out: int = 0

    def as_json(self) -> AddressJson:
        """Give the contract's object."""
        return {
            "address": self.address,
            "family": self.family,
            "scope": self.scope,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "packets_in": self.packets_in,
            "packets_out": self.packets_out,
        }


@dataclass(frozen=True, slots=True)
class PartitionUsage:
    """What one instance used in one partition.

    ``memory_bytes``, ``disk_bytes`` and ``processes`` are the latest values that were measured for this owner up to the
    end of the interval (also before its start, where nothing changed within), 0 where none ever was. All
    else is a sum.
    """

    id: str
    instance_guid: str | None
    addresses: tuple[AddressUsage, ...] = ()
    denied_packets: int = 0
    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0
    io_read_bytes: int = 0
    io_write_bytes: int = 0
    processes: int = 0

    def as_json(self) -> PartitionJson:
        """Give the contract's object."""
        return {
            "id": self.id,
            "instance_guid": self.instance_guid,
            "addresses": [address.as_json() for address in self.addresses],
            "denied_packets": self.denied_packets,
            "cpu_seconds": self.cpu_seconds,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "io_read_bytes": self.io_read_bytes,
            "io_write_bytes": self.io_write_bytes,
            "processes": self.processes,
        }


@dataclass(frozen=True, slots=True)
class Gap:
    """A time (Unix seconds) in which usage may be missing, and why; ``start`` is ``None`` if unknown."""

    start: float | None
    end: float
    reason: str

    def as_json(self) -> GapJson:
        """Give the contract's object."""
        return {
            "from": None if self.start is None else iso_utc(self.start),
            "to": iso_utc(self.end),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Usage after ``start`` up to and including ``end``.

    ``start`` is ``None``: since the ledger began. ``end`` is the end that was asked for, else the time of
    the last pass, ``None`` where there was none. A partition appears once per owner, the present owner
    last.
    """

    start: float | None
    end: float | None
    partitions: tuple[PartitionUsage, ...] = field(default=())
    gaps: tuple[Gap, ...] = field(default=())

    def as_json(self) -> UsageJson:
        """Give the fields of the contract's ``usage``, without ``schema``."""
        return {
            "from": None if self.start is None else iso_utc(self.start),
            "to": None if self.end is None else iso_utc(self.end),
            "partitions": [partition.as_json() for partition in self.partitions],
            "gaps": [gap.as_json() for gap in self.gaps],
        }


def iso_utc(at: float) -> str:
    """Give Unix time as ISO 8601 text in UTC, to the microsecond, which is what the ledger keeps."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
