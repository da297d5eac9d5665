"""``make bench-accounting``: what metering costs a node, and how its ledger grows and answers, in private namespaces.

For each number of partitions, on a real node that was applied (taps in a bridge, IPv6 ranges, packet filter):

- **counters**: reading all of them, beside ``nft -j list counters``; **taps** likewise, by netlink;
- **pass**: one pass of all meters with the ledger's commit, quiet (nothing was sent since the last) and busy (each
  partition sent on every address and on its tap), with the processes that then run;
- **processes**: the scan of /proc alone, beside psutil;
- **scrape**: making ``/metrics``; then of a ledger with a year in it: **query** over that year, its last day, since ever.

**growth** is the ledger's size for a partition whose every meter moves in every pass, as it is after a month: a day of
passes each 10 s, then minutes, hours.  Figures are medians in ms, with their range.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))  # started with -P
import ledger_load
import node as scene

from accounting import Ledger
from accounting.processes import ProcessMeter
from netplan import counters
from partitiond import config, converge, metrics, sandbox, teardown
from partitiond.context import Context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from partitiond.node import Node

SECTIONS = ("node", "query", "growth")
FAR = "2001:db8:1::ffff"
PORT = 9
MOST_MILLISECONDS = 5000  # of one figure
TUNSETIFF, IFF_TAP_NO_PI = 0x400454CA, 0x1002


class Target(NamedTuple):
    """At most so many milliseconds, at this number of partitions."""

    most: float
    count: int = 500


COUNTERS, PASS, SCRAPE, QUERY = Target(10), Target(50), Target(50), Target(100)


def row(count: int, what: str, values: list[float], target: Target | None = None) -> None:
    """Print one line: median and range, and whether the target is met."""
    median = statistics.median(values)
    end = ""
    if target:
        verdict = "met" if median <= target.most else "MISSED"
        where = "" if count == target.count else f" at {target.count}"
        end = f"  target <= {target.most:g} ms{where}: {verdict}"
    print(f"{count:>10}  {what:<52}{median:>9.2f}  [{min(values):.2f}..{max(values):.2f}]{end}", flush=True)


def timed(work: Callable[[], object]) -> float:
    """Milliseconds that it takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def times(work: Callable[[], object], repetitions: int, before: Callable[[], object] = int) -> list[float]:
    """Do ``before`` and ``work`` again and again; the milliseconds of ``work``, the first time left out if it is not long."""
    values = []
    while len(values) <= repetitions and sum(values) < MOST_MILLISECONDS:
        before()
        values.append(timed(work))
    return values[1:] or values


# --- a node ---------------------------------------------------------------------------------------------------------


@contextmanager
def standing(count: int) -> Iterator[tuple[Context, Node]]:
    """A node that was applied, and is taken down."""
    context = Context.of(config.load(scene.configuration(count)))
    try:
        outcome = converge.apply(context)
        if outcome.failures or outcome.left:
            sys.exit(f"the node could not be applied: {outcome.failures or outcome.left}")
        found = context.node
        assert found is not None
        yield context, found
    finally:
        context.meters.close()
        teardown.run(context, purge=True)


class Traffic:
    """What each partition sends: by its addresses to a neighbour, within the node, and by its tap."""

    def __init__(self, node: Node, stack: ExitStack) -> None:
        scene.ip("neigh", "replace", FAR, "lladdr", _mac("far"), "dev", scene.BRIDGE)
        self._six, self._four, self._taps = [], [], []
        for item in node.partitions:
            network = item.network
            own = [network.ipv6.ip, network.ipv6_range[5]] if network.ipv6 and network.ipv6_range else []
            for address in own:
                one = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
                one.bind((str(address), 0))
                self._six.append(one)
            one = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            one.bind((str(item.ipv4), 0))
            self._four.append(one)
            if network.tap:
                self._taps.append(_guest(network.tap.name, stack))

    def send(self) -> None:
        """One packet on each."""
        for one in self._six:
            one.sendto(b"x" * 52, (FAR, PORT))
        for one in self._four:
            one.sendto(b"x" * 52, one.getsockname())
            one.recv(100)
        for tap in self._taps:
            os.write(tap, b"\xff" * 6 + b"\x02\0\0\0\0\1\x88\xb5" + bytes(46))


def _mac(link: str) -> str:
    """The MAC of a link, by ioctl (netdevice(7), SIOCGIFHWADDR)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        found = fcntl.ioctl(sock, 0x8927, struct.pack("16s24x", link.encode()))
    return found[18:24].hex(":")


def _guest(tap: str, stack: ExitStack) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", tap.encode(), IFF_TAP_NO_PI))
    return descriptor


@contextmanager
def processes(node: Node, count: int) -> Iterator[None]:
    """So many processes of the partitions' users."""
    started = []
    try:
        for number in range(count):
            item = node.partitions[number % len(node.partitions)]
            started.append(
                subprocess.Popen(["/bin/sleep", "100000"], user=item.uid, group=item.gid, extra_groups=[])
            )
        yield
    finally:
        for one in started:
            one.send_signal(signal.SIGKILL)
        for one in started:
            one.wait()


def by_psutil() -> list[psutil.Process]:
    """What the process meter reads, as psutil gives it."""
    return list(psutil.process_iter(["pid", "uids", "cpu_times", "memory_info", "create_time"]))


def measure_node(count: int, repetitions: int, running: int) -> None:
    """What reading and recording costs."""
    with standing(count) as (context, node), ExitStack() as stack:
        nft = ["/usr/sbin/nft", "-j", "list", "counters"]
        row(count, "reading all counters", times(counters.read_counters, repetitions), COUNTERS)
        row(count, "  nft -j list counters", times(lambda: subprocess.check_output(nft), repetitions))
        row(count, "reading all taps", times(counters.read_taps, repetitions))
        traffic = Traffic(node, stack)

        def a_pass() -> None:
            context.meters.record(context, node)

        traffic.send()
        a_pass()
        row(count, "one pass with commit, quiet", times(a_pass, repetitions), PASS)
        row(count, "one pass with commit, busy", times(a_pass, repetitions, traffic.send), PASS)
        with processes(node, running):
            users = {item.uid: item.id for item in node.partitions}
            meter = ProcessMeter()
            row(count, f"scan of {running} processes", times(lambda: meter.scan(users), repetitions))
            row(count, "  psutil", times(by_psutil, repetitions))
            what = f"one pass with {running} processes, busy"
            row(count, what, times(a_pass, repetitions, traffic.send), PASS)
        tally = metrics.Tally()
        row(count, "a scrape", times(lambda: metrics.everything(context, tally), repetitions), SCRAPE)


# --- the ledger -----------------------------------------------------------------------------------------------------


def measure_query(count: int, repetitions: int) -> None:
    """Usage of a node whose ledger has a year in it."""
    path = scene.ROOT / "year.sqlite"
    took = timed(lambda: ledger_load.a_year(path, count))
    size = path.stat().st_size / 2**20
    print(f"{count:>10}  a year's ledger: {size:.0f} MiB, made in {took / 1000:.0f} s", flush=True)
    now = ledger_load.NOW
    with Ledger.open_readonly(path) as ledger:
        for what, start, end, target in (
            ("a year up to now", now - 365 * 86400, None, QUERY),
            ("a year up to a month ago", now - 365 * 86400, now - 30 * 86400, QUERY),
            ("the last month", now - 30 * 86400, None, None),
            ("the last day", now - 86400, None, None),
            ("since ever", None, None, None),
        ):
            found = times(lambda start=start, end=end: ledger.usage(start, end), repetitions)
            row(count, f"usage: {what}", found, target)
    path.unlink()


def measure_growth() -> None:
    """What a busy partition adds to the ledger."""
    path = scene.ROOT / "month.sqlite"
    partitions = 4
    took = timed(lambda: ledger_load.a_month(path, partitions))
    size = path.stat().st_size / partitions / 2**20
    a_pass = ledger_load.bytes_of_a_pass(scene.ROOT / "day.sqlite", partitions) / partitions
    print(
        f"{'':>10}  growth: {size:.1f} MiB a busy partition after its first month, thinned; {a_pass:.0f} bytes a pass,"
        f" so {a_pass * 30 * 8640 / 2**20:.0f} MiB a month if nothing were thinned (took {took / 1000:.0f} s)",
        flush=True,
    )
    path.unlink()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", default=SECTIONS, metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--counts", nargs="*", type=int, default=[100, 300, 500])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--processes", type=int, default=1000)
    options = parser.parse_args()
    if unknown := set(options.sections).difference(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    scene.scene()
    print(f"{'partitions':>10}  {'':<52}{'ms':>9}  range")
    for count in options.counts:
        if "node" in options.sections:
            measure_node(count, options.repetitions, options.processes)
        if "query" in options.sections:
            scene.ROOT.mkdir(exist_ok=True)
            measure_query(count, max(3, options.repetitions // 5))
    if "growth" in options.sections:
        scene.ROOT.mkdir(exist_ok=True)
        measure_growth()
    shutil.rmtree(scene.ROOT, ignore_errors=True)


if __name__ == "__main__":
    if os.geteuid() != 0 or not sandbox.inside():
        sys.exit("make bench-accounting runs this in private namespaces")
    main()
