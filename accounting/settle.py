"""Turns absolute readings into amounts to add: the only place where a difference is made. Pure.

The rules, per kernel counter:

* same epoch and nothing went back: the amount is what was added since the stored level;
* another epoch, or a value below the stored level: the counter began again at zero, the amount is the whole
  reading, and what it counted between the last pass and its end is lost, which is said as a gap;
* never seen before: the amount is the whole reading, because a counter that we make begins at zero.

Where two counters see what an address receives, one of them counts and of the other only the level is taken: the
better one (``Received``) if its level is known, else the first one, which went on counting. If that began as well since
the last pass, it is the one that counted more, wholly. So neither going from one to the other nor back counts anything twice.

Levels belong to the kernel's counter, not to whoever is charged, so a change of owner counts nothing twice.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from accounting.errors import AccountingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Set

    from accounting.model import CountReading, GaugeReading, Pass, ProcessReading

# bytes_in, bytes_out, packets_in, packets_out, quantity: the columns that the tables level, account and
# sample share.
Amounts: TypeAlias = tuple[int, int, int, int, int]
NOTHING: Amounts = (0, 0, 0, 0, 0)

LARGEST = 2**63 - 1  # of an SQLite integer; the kernel's 64th bit is some 9 exabytes away
MICROSECONDS = 1_000_000
# what datetime can say: the years 1 to 9999
_FIRST_TIME, _LAST_TIME = -62_135_596_800, 253_402_300_800
TRAFFIC = "traffic"
RECEIVED = "received"  # has a level, and no account: its amounts are those of the traffic
CPU = "cpu_seconds"
IO_READ = "io_read_bytes"
IO_WRITE = "io_write_bytes"


class Meter(NamedTuple):
    """One kernel counter of a partition; the last three are empty where it belongs to no address."""

    partition: str
    name: str
    address: str = ""
    family: str = ""
    scope: str = ""


class Level(NamedTuple):
    """How far a counter had come when it was last read."""

    epoch: str
    raw: Amounts


class ProcessKey(NamedTuple):
    """A process, unlike every other since the kernel was made."""

    pid: int
    started: int
    boot: str


class ProcessLevel(NamedTuple):
    """Whom a process was charged to last, how much it had used (microseconds, bytes), and its parent's pid."""

    partition: str
    cpu: int
    io_read: int = 0
    io_written: int = 0
    parent: int = 0


@dataclass(frozen=True, slots=True)
class Books:
    """What the ledger holds before a pass.

    ``skip_new_readings`` and ``skip_new_processes`` are set in the first pass after a damaged ledger was
    set aside: what was counted before is in the damaged file and perhaps billed, so only the levels are
    taken.
    """

    levels: Mapping[Meter, Level]
    processes: Mapping[ProcessKey, ProcessLevel]
    skip_new_readings: bool = False
    skip_new_processes: bool = False


@dataclass(slots=True)
class Settlement:
    """What a pass changes.

    ``amounts`` has every meter of the pass, with zeros too, so that an idle address has an account.
    ``levels`` and ``processes`` have what differs from the books, ``ended`` the processes that are no more,
    ``restarted`` the meters that began again.
    """

    amounts: dict[Meter, Amounts] = field(default_factory=dict)
    levels: dict[Meter, Level] = field(default_factory=dict)
    processes: dict[ProcessKey, ProcessLevel] = field(default_factory=dict)
    ended: list[ProcessKey] = field(default_factory=list)
    restarted: list[Meter] = field(default_factory=list)


def settle(reading: Pass, books: Books) -> Settlement:
    """Compare a pass with the books. Raises AccountingError ``accounting.reading``; changes nothing."""
    if not (math.isfinite(reading.at) and _FIRST_TIME <= reading.at < _LAST_TIME):
        raise _refuse("the clock", f"is no time: {reading.at}")
    if reading.uptime is not None and not 0 <= reading.uptime < _LAST_TIME:
        raise _refuse("the uptime", f"is no time: {reading.uptime}")
    settlement = Settlement()
    levels, amounts = books.levels, settlement.amounts
    for meter, level in _levels(reading).items():
        last = levels.get(meter)
        if level == last:
            amounts[meter] = NOTHING
            continue
        amounts[meter] = _difference(meter, level, last, settlement, skip_new=books.skip_new_readings)
        settlement.levels[meter] = level
    _settle_received(reading, books, settlement)
    if reading.processes is not None:
        _settle_processes(reading.processes, reading.unreadable, books, settlement)
    check_gauges(reading.gauges)
    return settlement


def restart_reasons(restarted: Iterable[Meter]) -> dict[str, str]:
    """Give one sentence for each partition in which counters began again."""
    kinds: dict[str, set[str]] = {}
    for meter in restarted:
        kinds.setdefault(meter.partition, set()).add(meter.family or meter.name)
    return {
        partition: f"counters restarted ({', '.join(sorted(names))})" for partition, names in kinds.items()
    }


def check_gauges(gauges: Iterable[GaugeReading]) -> None:
    """Refuse a gauge that can not be true or that is given twice; raises ``accounting.reading``."""
    seen = set()
    for gauge in gauges:
        where = f"{gauge.partition}/{gauge.name}"
        if where in seen:
            raise _refuse(where, "is given twice in one pass")
        seen.add(where)
        _check(where, gauge.value)


def _difference(
    meter: Meter, level: Level, last: Level | None, settlement: Settlement, *, skip_new: bool
) -> Amounts:
    if last is None:
        return NOTHING if skip_new else level.raw
    # Element by element, not with zip in a comprehension: this runs for each counter of the node in each
    # pass.
    new, old = level.raw, last.raw
    a, b, c, d, e = new[0] - old[0], new[1] - old[1], new[2] - old[2], new[3] - old[3], new[4] - old[4]
    if level.epoch != last.epoch or a < 0 or b < 0 or c < 0 or d < 0 or e < 0:
        settlement.restarted.append(meter)
        return new
    return (a, b, c, d, e)


def _settle_received(reading: Pass, books: Books, settlement: Settlement) -> None:
    restarted = set(settlement.restarted)
    for traffic in reading.traffic:
        if traffic.received is None:
            continue
        meter = Meter(traffic.partition, TRAFFIC, traffic.address, traffic.family, traffic.scope)
        second = meter._replace(name=RECEIVED)
        first, last = books.levels.get(meter), books.levels.get(second)
        epoch, octets, packets, *later = traffic.received
        if any(number >> 63 for number in (octets, packets, *later)):
            raise _refuse("/".join(meter), f"is not within 0 and 2^63-1: {traffic.received}")
        level = Level(epoch, (octets, 0, packets, 0, 0))
        before = _known_before(level, last)
        if last is not None and last.epoch and before is None:
            settlement.restarted.append(meter)
        # wholly only what surely began after the last pass, as the first one has counted until then; and whatever saw more
        began = first is None or (last is not None and meter in restarted)
        if epoch and (before is not None or (began and later[0] >= traffic.bytes_in)):
            if before is None:
                before = level.raw if books.skip_new_readings else NOTHING
            _, out, _, packets_out, _ = settlement.amounts[meter]
            amounts = (octets - before[0], out, packets - before[2], packets_out, 0)
            settlement.amounts[meter] = amounts if any(amounts) else NOTHING
        else:
            level = Level(epoch, (later[0], 0, later[1], 0, 0))
        if level != last:
            settlement.levels[second] = level


def _known_before(level: Level, last: Level | None) -> Amounts | None:
    """Give how far the same counter had come."""
    if last is None or level.epoch != last.epoch or not level.epoch:
        return None
    return last.raw if level.raw[0] >= last.raw[0] and level.raw[2] >= last.raw[2] else None


def _levels(reading: Pass) -> dict[Meter, Level]:
    found: dict[Meter, Level] = {}
    # What makes a Meter and a Level without a call of a function each: this runs for each counter of the node.
    make = tuple.__new__
    for partition, address, family, scope, epoch, a, b, c, d, _ in reading.traffic:
        meter = make(Meter, (partition, TRAFFIC, address, family, scope))
        if (a | b | c | d) >> 63:
            raise _refuse("/".join(meter), f"is not within 0 and 2^63-1: {(a, b, c, d)}")
        found[meter] = make(Level, (epoch, (a, b, c, d, 0)))
    for count in reading.counts:
        if count.name in (CPU, IO_READ, IO_WRITE) and reading.processes is not None:
            raise _refuse(
                f"{count.partition}/{count.name}",
                "is given as a count and by processes: it would count twice",
            )
        value = _quantity(count)
        _check(f"{count.partition}/{count.name}", value)
        found[Meter(count.partition, count.name)] = Level(count.epoch, (0, 0, 0, 0, value))
    if len(found) != len(reading.traffic) + len(reading.counts):
        raise _refuse(_given_twice(reading), "is given twice in one pass")
    return found


def _given_twice(reading: Pass) -> str:
    names = Counter(f"{t.partition}/{t.address}/{t.family}/{t.scope}" for t in reading.traffic)
    names.update(f"{count.partition}/{count.name}" for count in reading.counts)
    return names.most_common(1)[0][0]


def _quantity(count: CountReading) -> int:
    where = f"{count.partition}/{count.name}"
    try:
        # Whole microseconds, because sums of binary fractions drift and would not equal the sum of their
        # samples.
        return round(count.value * MICROSECONDS) if count.name == CPU else int(count.value)
    except (ValueError, OverflowError) as error:  # not a number, or infinite
        raise _refuse(where, f"is no number: {count.value}") from error


def _settle_processes(
    processes: Iterable[ProcessReading], unreadable: Set[int], books: Books, settlement: Settlement
) -> None:
    """Charge each process with what it used since the last pass; one that is new, with all it used so far."""
    present: dict[ProcessKey, ProcessReading] = {}
    for process in processes:
        key = ProcessKey(process.pid, process.started, process.boot)
        cpu, read, written = process.cpu_microseconds, process.io_read_bytes, process.io_write_bytes
        if key in present:
            raise _refuse(f"{process.partition}/process {process.pid}", "is given twice in one pass")
        if (cpu | (read or 0) | (written or 0)) >> 63:
            where = f"{process.partition}/process {process.pid}"
            raise _refuse(where, f"is not within 0 and 2^63-1: {(cpu, read, written)}")
        present[key] = process
    # One that is there keeps its level: when it can be read again, it is charged with what was added. So does a child of
    # such a one, until it is known what the parent got of it.
    settlement.ended.extend(
        key
        for key, level in books.processes.items()
        if key not in present and key.pid not in unreadable and level.parent not in unreadable
    )
    waited_for = _waited_for(present, settlement.ended, books.processes)
    used: dict[tuple[str, str], int] = {}
    for key, process in present.items():
        last = books.processes.get(key)
        level = _process_level(process, last)
        # A process whose partition differs has changed its user: the level is still its own.
        before = last or (level if books.skip_new_processes else ProcessLevel("", 0))
        read, written = waited_for.get(key, (0, 0))
        _add(used, level.partition, CPU, level.cpu - before.cpu)
        if process.io_read_bytes is not None:
            _add(used, level.partition, IO_READ, max(0, level.io_read - before.io_read - read))
        if process.io_write_bytes is not None:
            _add(used, level.partition, IO_WRITE, max(0, level.io_written - before.io_written - written))
        if level != last:
            settlement.processes[key] = level
    for (partition, name), amount in used.items():
        settlement.amounts[Meter(partition, name)] = (0, 0, 0, 0, amount) if amount else NOTHING


def _add(used: dict[tuple[str, str], int], partition: str, name: str, amount: int) -> None:
    used[partition, name] = used.get((partition, name), 0) + amount


def _process_level(process: ProcessReading, last: ProcessLevel | None) -> ProcessLevel:
    """Give the new level: never below the last one, since an amount that was taken back would be counted again."""
    if last is None:
        last = ProcessLevel("", 0)
    _, cpu, read, written, _ = last
    return ProcessLevel(
        process.partition,
        max(process.cpu_microseconds, cpu),
        max(process.io_read_bytes or 0, read),
        max(process.io_write_bytes or 0, written),
        process.parent,
    )


def _waited_for(
    present: Iterable[ProcessKey], ended: Iterable[ProcessKey], levels: Mapping[ProcessKey, ProcessLevel]
) -> dict[ProcessKey, tuple[int, int]]:
    """Give for each process the bytes, read and written, of ended children that were charged to themselves.

    The kernel adds them to the parent that waits for the child: of what the parent has now, they were counted.
    Where the parent ended too, it is its parent that has both. (A parent that ignores SIGCHLD gets nothing
    added, and a child that outlived its parent goes to init; such a parent, or the one above, pays up to as
    much too little in this pass. Which of them it was, no reading tells.)
    """
    found: dict[ProcessKey, tuple[int, int]] = {}
    running = {key.pid: key for key in present}
    gone = {key.pid: key for key in ended}
    for key in gone.values():
        level = levels[key]
        if not (level.io_read or level.io_written):
            continue
        child, above, seen = key, level.parent, {key.pid}
        while above not in running and above in gone and above not in seen:
            seen.add(above)
            child, above = gone[above], levels[gone[above]].parent
        parent = running.get(above)
        # a pid that was taken anew is no parent: it started later
        if parent is not None and parent.boot == child.boot and parent.started <= child.started:
            read, written = found.get(parent, (0, 0))
            found[parent] = (read + level.io_read, written + level.io_written)
    return found


def _check(where: str, value: int) -> None:
    if not 0 <= value <= LARGEST:
        raise _refuse(where, f"is not within 0 and 2^63-1: {value}")


def _refuse(where: str, what: str) -> AccountingError:
    return AccountingError(
        "accounting.reading",
        f"the reading {where} {what}",
        resource=where,
        hint="this is a fault of the meter that read it; nothing of this pass was recorded",
    )
