"""What one pass of the meters costs: reading the counters, the scan of processes beside psutil, and the ledger's commit.

Run it in a sandbox (partitiond/sandbox.py), from the source tree: ``python3 -P tests/bench/accounting_meters.py [COUNT…]``.
For each number of partitions the node is applied as a whole, with taps, IPv6 ranges and the packet filter; two processes
run for each partition. Figures are medians in milliseconds of wall time; ``CPU`` is processor time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from node import configuration, scene

from accounting.ledger import Ledger
from accounting.processes import ProcessMeter
from netplan import counters
from partitiond import config, converge, sandbox
from partitiond.context import Context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from accounting.model import Pass
    from partitiond.node import Node

ROUNDS = 9
EACH = 2  # processes of a partition
SETTLED = 1.5


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table: milliseconds."""

    what: str
    wall: float
    cpu: float


def measured(what: str, work: Callable[[], object], before: Callable[[], object] = int) -> Figure:
    """Run ``work`` some times, each after ``before``, which is not measured."""
    walls, cpus = [], []
    for _ in range(ROUNDS):
        before()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return Figure(what, statistics.median(walls) * 1e3, statistics.median(cpus) * 1e3)


@contextmanager
def running(node: Node, each: int = EACH) -> Iterator[None]:
    """Let so many processes of each partition's user wait."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for item in node.partitions:
            for _ in range(each):
                waiting = subprocess.Popen(["/bin/sleep", "600"], user=item.uid, group=item.gid)
                processes.append(waiting)
        time.sleep(SETTLED)
        yield
    finally:
        for one in processes:
            one.kill()
            one.wait()


def with_psutil() -> int:
    """The same scan by psutil."""
    wanted = ["uids", "cpu_times", "memory_info", "io_counters", "status"]
    return sum(1 for _ in psutil.process_iter(wanted))


def grown(reading: Pass, by: int) -> Pass:
    """The same readings with traffic on every address and work in every process."""
    return replace(
        reading,
        at=reading.at + by,
        traffic=tuple(
            one._replace(
                bytes_in=one.bytes_in + by * 1000,
                bytes_out=one.bytes_out + by * 900,
                packets_in=one.packets_in + by,
                packets_out=one.packets_out + by,
            )
            for one in reading.traffic
        ),
        processes=tuple(
            one._replace(cpu_microseconds=one.cpu_microseconds + by * 10_000)
            for one in reading.processes or ()
        ),
    )


def figures(context: Context, node: Node) -> Iterator[Figure]:
    """Measure each part, and the whole."""
    users = {item.uid: item.id for item in node.partitions}
    scan = ProcessMeter()
    yield measured("counters of the packet filter", counters.read_counters)
    yield measured("counters of taps", counters.read_taps)
    yield measured(f"scan of {len(psutil.pids())} processes", lambda: scan.scan(users))
    yield measured("  the same by psutil", with_psutil)
    meters = context.meters
    meters.record(context, node)
    yield measured("all readings of a pass", lambda: meters._read(context, node))
    reading = meters._read(context, node)
    meters.close()
    with Ledger(meters.path) as ledger:
        for what, step in (("nothing changed", 0), ("everything changed", 1)):
            readings = iter([grown(reading, (one + 1) * step) for one in range(ROUNDS)])
            yield measured(f"commit, {what}", lambda readings=readings: ledger.record(next(readings)))
    yield measured("a whole pass, a quiet node", lambda: meters.record(context, node))
    meters.close()


def bench(count: int) -> None:
    """Measure with so many partitions, and tell."""
    context = Context.of(config.load(configuration(count)))
    outcome = converge.apply(context)
    if outcome.failures or context.node is None:
        sys.exit(f"cannot apply: {outcome.failures}")
    with running(context.node):
        for figure in figures(context, context.node):
            print(
                f"{count:>4}  {figure.what:<34}{figure.wall:8.1f} ms{figure.cpu:8.1f} ms CPU",
                flush=True,
            )


if __name__ == "__main__":
    if os.geteuid() != 0 or not sandbox.inside():
        sys.exit("run this in private namespaces")
    sys.path.insert(0, str(Path(__file__).parent))
    scene()
    for number in [int(one) for one in sys.argv[1:]] or [100, 500]:
        bench(number)
