"""Meters composed: kernel counters, taps, processes and disks of all partitions into one pass of the ledger."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from accounting import documents, outbox
from accounting.errors import AccountingError
from accounting.ledger import Ledger, LedgerReader
from accounting.model import CountReading, GaugeReading, Pass, Received, TrafficReading
from accounting.processes import ProcessMeter
from netplan import counters
from netplan.bpf_state import Arrived, ReceivedShared, read_received, read_refusals
from netplan.errors import NetplanError
from netplan.metering import addresses
from partitiond import storage, users
from partitiond.disk_sizes import DiskSizes, Tree
from partitiond.errors import PartitiondError, sentence
from partitiond.ledger_care import LedgerCare
from partitiond.rising_counts import RisingCounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from accounting.model import Gap, PartitionUsage
    from partitiond.context import Context
    from partitiond.node import Node

logger = logging.getLogger(__name__)

_OF_TAP = "tap-"
_LAST_PASS = 5.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_SHARED_ADDRESSES = {"ipv6": "::", "ipv4": "0.0.0.0"}  # noqa: S104 - nothing listens there
"""What stands for the node's own addresses in what is metered: they may change, and belong to all."""


def _uptime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the passes until now recorded: totals by partition, and refusals by partition and rule since the daemon began; and
    how many documents for the master are in each state.
    """

    totals: tuple[PartitionUsage, ...] = ()
    denied: Mapping[tuple[str, str], int] = field(default_factory=dict)
    documents: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Metering:
    """The meters and the open ledger of a node; one pass at a time, from whatever thread."""

    path: Path
    clock: Callable[[], float] = time.time
    uptime: Callable[[], float] = _uptime
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _ledger: Ledger | None = None
    _processes: ProcessMeter = field(default_factory=ProcessMeter)
    _sizes: DiskSizes = field(default_factory=DiskSizes)
    _measured: dict[str, GaugeReading] = field(default_factory=dict)  # after the last pass, for the next one
    _care: LedgerCare = field(init=False)
    _denied: RisingCounts = field(default_factory=RisingCounts)
    _of_mesh: RisingCounts = field(default_factory=RisingCounts)
    _passes: int = 0
    _damaged: Mapping[str, PartitiondError] = field(
        default_factory=dict
    )  # what is wrong with the state of which instance
    _told: tuple[int, Recorded] = (0, Recorded())  # as of so many passes
    _telling: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Look after the ledger from the start."""
        self._care = LedgerCare(self.path)

    def record(self, context: Context, node: Node) -> tuple[Gap, ...]:
        """Read all meters and post them. Raises AccountingError, NetplanError; the next pass makes up for a failed one."""
        with self._turn, self._care.watching(context.events):
            trees = _trees(node)
            if not self._sizes.knows(trees):
                self._measure(trees)
            reading = self._read(context, node)
            try:
                gaps = self._care.post(self._opened(), reading, context.events)
            except AccountingError as error:
                self._care.keep(reading, error)
                raise
            self._measured.clear()
            self._passes += 1
            # the counters of a pass do not wait for walks
            self._measure(trees)
            return gaps

    def settle(self, context: Context, node: Node) -> None:
        """Book what was used until now: before owners change, or counters go. What fails holds up nothing that it is for."""
        try:
            self.record(context, node)
        except (AccountingError, NetplanError, PartitiondError) as error:
            logger.warning("usage: %s", sentence(error))

    def ledger(self) -> Ledger:
        """The ledger, for whoever makes documents of it. Raises AccountingError."""
        with self._turn:
            return self._opened()

    def reader(self) -> LedgerReader:
        """The ledger for who only reads, also while a pass goes on. Raises AccountingError."""
        try:
            reader = Ledger.open_readonly(self.path)
        except AccountingError as error:
            self.note(error)
            raise
        reader.told = self.note
        return reader

    def has_due(self) -> bool:
        """Whether a day has ended of which no documents are made yet. Raises AccountingError."""
        return self.newest_due() is not None

    def newest_due(self) -> int | None:
        """The last of the days that have ended and of which no documents are made yet. Raises AccountingError."""
        with self.ledger().transaction() as connection:
            return max((period.id for period in documents.due(connection)), default=None)

    def _opened(self) -> Ledger:
        if self._ledger is None:
            self._ledger = Ledger(self.path)
        return self._ledger

    def open_cases(self) -> list[str]:
        """What is wrong with the ledger."""
        doubt = None if self._ledger is None else self._ledger.doubt
        found = [] if doubt is None else [f"{doubt}; the next pass of the meters looks at all of it"]
        found += [
            f"{partition}: the state of its instance {error}: its usage is that of the instance before; {error.hint}"
            for partition, error in self._damaged.items()
        ]
        return found + self._care.cases()

    def note(self, error: AccountingError) -> None:
        """Hear of an error that somebody met who read the ledger: where it is damaged, the next pass begins a new one."""
        if self._ledger is not None:
            self._ledger.note(error)

    @property
    def passes(self) -> int:
        """How many were recorded by this process."""
        return self._passes

    def recorded(self) -> Recorded:
        """Return what was recorded, the same object until the next pass; read when first asked for after a pass, and not
        while one goes on.  Raises AccountingError.
        """
        with self._telling:
            passes = self._passes
            if self._told[0] != passes:
                with self.reader() as ledger:
                    totals = ledger.totals()
                    with ledger.transaction() as connection:
                        counts = outbox.count(connection)
                present = {entry.id for entry in totals}
                denied = {key: count for key, count in self._denied.now().items() if key[0] in present}
                self._told = (
                    passes,
                    Recorded(totals, denied, {state: counts.get(state, 0) for state in outbox.STATES}),
                )
            return self._told[1]

    def mesh_dropped(self) -> dict[tuple[str, str], int]:
        """Packets that the mesh's own rules dropped, by direction and reason (:class:`netplan.mesh_guard.Verdict`)."""
        return self._of_mesh.now()

    def forget(self, partition: str) -> None:
        """Let go of a partition's directories before they are emptied."""
        with self._turn:
            self._sizes.forget(partition)
            self._measured.pop(partition, None)

    def close(self) -> None:
        """Close the ledger; nothing is kept back in memory. A pass that hangs is not waited for longer than a few seconds."""
        if not self._turn.acquire(timeout=_LAST_PASS):
            logger.warning("usage: the ledger is not closed: a pass of the meters does not end")
            return
        try:
            self._sizes.close()
            if self._ledger is not None:
                self._ledger.close()
                self._ledger = None
        finally:
            self._turn.release()

    def holders(self, context: Context) -> dict[str, str | None]:
        """Whose instance each partition has. Raises AccountingError."""
        return self._holders(context, self.ledger)

    def _holders(self, context: Context, ledger: Callable[[], Ledger]) -> dict[str, str | None]:
        """By the states of the instances; of those that cannot be read, as it was."""
        states, damaged = context.store.readable()
        found = {partition: state.instance_guid for partition, state in states.items()}
        if damaged:
            before = ledger().owners()
            found |= {partition: before.get(partition) for partition in damaged}
        if damaged.keys() - self._damaged.keys():
            for error in damaged.values():
                logger.warning("usage: %s", sentence(error))
        self._damaged = damaged
        return found

    def _read(self, context: Context, node: Node) -> Pass:
        holders = self._holders(context, self._opened)
        owners = {item.id: holders.get(item.id) for item in node.partitions}
        known = {item.id: item for item in node.partitions}
        before = read_received()
        reading = counters.read_in_force(node.config.packet_filter)
        after = read_received()
        # those that the node has no room for any more have counters until the next load of the filter
        owners |= {one: holders.get(one) for one in {row.partition for row in reading.traffic} - known.keys()}
        whose = _users(node, owners.keys() - known.keys())
        refused, (epoch, calls) = refusals(reading, node, whose), refused_calls(whose)
        self._denied.take(refused | calls)
        self._of_mesh.take({(one.direction, one.reason): packets for one, packets in reading.mesh.items()})
        scan = self._processes.scan(whose)
        return Pass(
            at=self.clock(),
            boot=_BOOT_ID.read_text("ascii").strip(),
            uptime=self.uptime(),
            owners=owners,
            traffic=(*_addresses(reading, node), *_shared(reading, before, after, whose), *_taps(owners)),
            counts=(*_denied(reading, refused), *_denied_calls(epoch, calls, whose.values())),
            gauges=(*scan.gauges(), *(self._measured[one] for one in self._measured if one in known)),
            processes=scan.processes,
            unreadable=scan.unreadable,
        )

    def _measure(self, trees: Mapping[str, Tree]) -> None:
        self._measured |= {gauge.partition: gauge for gauge in self._sizes.measure(trees)}


def _trees(node: Node) -> dict[str, Tree]:
    """What counts as disk space: each partition's directory, and those on other disks."""
    data = storage.observe(node.config).data
    return {item.id: Tree(item.id, item.path, item.uid) for item in node.partitions} | {
        f"{item.id} {place.name}": Tree(item.id, place / item.id, item.uid)
        for place in data
        for item in node.partitions
    }


def _users(node: Node, leaving: AbstractSet[str]) -> dict[int, str]:
    """Whose a user's processes and packets are; of those that the node has no room for any more, as long as they count."""
    whose = {item.uid: item.id for item in node.partitions}
    for one in users.observe().users.values() if leaving else ():
        if one.partition is not None and one.partition in leaving:
            whose.setdefault(one.uid, one.partition)
    return whose


def _addresses(reading: counters.CounterReading, node: Node) -> Iterator[TrafficReading]:
    unnamed = any(not one.address for one in reading.traffic)
    todays = {item.id: dict(addresses(item.network)) for item in node.partitions} if unnamed else {}
    for traffic in reading.traffic:
        # of the release before, which told them apart by what the partition has, and had no lives
        address = traffic.address or todays.get(traffic.partition, {}).get(traffic.family)
        if address is None:
            continue
        yield TrafficReading(
            partition=traffic.partition,
            address=address,
            family="ipv6" if traffic.family in ("ipv6", "range") else "ipv4",
            scope="local" if traffic.scope == "local" else "remote",
            epoch=f"{reading.epoch}/{traffic.life}" if traffic.life else reading.epoch,
            bytes_in=traffic.bytes_in,
            bytes_out=traffic.bytes_out,
            packets_in=traffic.packets_in,
            packets_out=traffic.packets_out,
        )


def _shared(
    reading: counters.CounterReading, before: ReceivedShared, after: ReceivedShared, whose: Mapping[int, str]
) -> Iterator[TrafficReading]:
    """What left and came with the node's own addresses, by whose processes it was.  The packet filter counts both; of what
    came, the programs at the cgroup see more, where they count: they were read ``before`` it and ``after``.
    """
    if not reading.epoch:
        return
    found = {(one.uid, one.family): one for one in reading.shared}
    epoch = before.epoch if before.epoch == after.epoch else ""
    nothing = Arrived(0, 0)
    for key in sorted({*found, *before.counts, *after.counts}):
        uid, family = key
        if uid not in whose:
            continue
        one = found.get(key, counters.Shared(uid, family, 0, 0, 0, 0))
        came = Received("")
        if epoch:
            came = Received(
                f"{epoch}/{uid}", *before.counts.get(key, nothing), *after.counts.get(key, nothing)
            )
        yield TrafficReading(
            partition=whose[uid],
            address=_SHARED_ADDRESSES[family],
            family="ipv6" if family == "ipv6" else "ipv4",
            scope="remote",
            epoch=reading.epoch,
            bytes_in=one.bytes_in,
            bytes_out=one.bytes_out,
            packets_in=one.packets_in,
            packets_out=one.packets_out,
            received=came,
        )


def refusals(
    reading: counters.CounterReading, node: Node, whose: Mapping[int, str]
) -> dict[tuple[str, str], int]:
    """What was refused, by partition and rule (``tap-arp``: a guest's frame, ``tap-tun``: what came out of its tun);
    those who never tried are not there.
    """
    taps = {
        link.name: item.id
        for item in node.partitions
        for link in (item.network.tap, item.network.tun)
        if link
    }
    found: dict[tuple[str, str], int] = {}
    for one in reading.refused:
        partition = whose.get(one.uid) if one.uid is not None else taps.get(one.tap or "")
        if partition is not None:
            key = (partition, one.rule if one.tap is None else f"{_OF_TAP}{one.rule}")
            found[key] = found.get(key, 0) + one.packets
    return found


def refused_calls(whose: Mapping[int, str]) -> tuple[str, dict[tuple[str, str], int]]:
    """What the programs at the cgroup refused, by partition and rule, and its epoch (empty: there are none)."""
    epoch, counts = read_refusals()
    return epoch, {(whose[uid], rule): count for (uid, rule), count in counts.items() if uid in whose}


def _denied_calls(
    epoch: str, refused: Mapping[tuple[str, str], int], partitions: Iterable[str]
) -> Iterator[CountReading]:
    if not epoch:
        return
    calls = dict.fromkeys(partitions, 0)
    for (partition, _), count in refused.items():
        calls[partition] += count
    for partition, count in calls.items():
        yield CountReading(partition, "denied_calls", epoch, count)


def _denied(
    reading: counters.CounterReading, refused: Mapping[tuple[str, str], int]
) -> Iterator[CountReading]:
    """What :func:`refusals` gave, each rule by itself: one that goes, with its counters, takes no other's along."""
    if not reading.epoch:
        return
    for (partition, rule), count in refused.items():
        if rule.startswith(_OF_TAP):
            yield CountReading(partition, "denied_frames", reading.tap_epoch, count, rule)
        else:
            yield CountReading(partition, "denied_packets", reading.epoch, count, rule)


def _taps(known: Mapping[str, str | None]) -> Iterator[TrafficReading]:
    for tap in counters.read_taps():
        if tap.partition in known:
            yield TrafficReading(
                tap.partition,
                tap.tap,
                "tap",
                "remote",
                tap.epoch,
                tap.bytes_in,
                tap.bytes_out,
                tap.packets_in,
                tap.packets_out,
            )


def ledger_path(state_dir: Path) -> Path:
    """Where the ledger lies."""
    return state_dir / "ledger.sqlite"
