"""``make bench-polling``: what a master sees of its nodes: how evenly they ask, and how much, beside slapos.core's.

**spread**: so many nodes, simulated with the daemon's own pacing (``partitiond/polling.py``, ``partitiond/wishes.py``), all
started in the same second, with the master away for an hour; and slapos.core's cron, which begins each minute and waits for
up to 30 s (software) and 20 s (instances). Questions per second, in seconds of each phase.

**day**: requests and bytes of HTTP, both ways, without TLS and TCP, of an unchanged node with so many partitions. Ours are
those that a simulated node makes in a day; theirs, and the size of each request, are from facts of the peer's run and from
requests to a real slapproxy that has so many busy partitions; where a master gives an ETag, from the strict test master.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "masters")]  # started with -P

import production_master  # noqa: E402
import requests  # noqa: E402

from partitiond.polling import Pace, first_pause  # noqa: E402
from partitiond.wishes import Wishes  # noqa: E402
from slap_client.capacity import capacity_document  # noqa: E402
from slap_client.client import SlapClient  # noqa: E402
from slap_client.errors import SlapError  # noqa: E402
from slap_client.marshal import dumps  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

INTERVAL = 300.0
HOUR = 3600.0
LANES = ("software", "instances")
PEER_DELAYS = (30.0, 20.0)
COMPUTER = "COMP-BENCH"
# of the client that slapgrid has
PEER_HEADERS = {
    "Accept": "*/*",
    "User-agent": "slapos.core/1.26.1",
    "Accept-Encoding": "gzip, deflate",
    "Connection": "keep-alive",
}
SLAPOS = Path(sys.prefix) / "master" / "bin" / "slapos"


# --- the spread


class World:
    """The time, the master's state, and all questions by second."""

    def __init__(self, outage: tuple[float, float]) -> None:
        self.now = 0.0
        self.outage = outage
        self.asked: Counter[int] = Counter()

    def computer(self) -> object:
        """In place of SlapClient's: one question."""
        self.asked[int(self.now)] += 1
        if self.outage[0] <= self.now < self.outage[1]:
            raise SlapError("slap.unreachable", "no connection", hint="wait", retryable=True)
        return self

    posted = 0


class SimulatedNode:
    """The lanes of one node; what ``partitiond.daemon.Lane`` does, without threads."""

    def __init__(self, world: World, seed: int, wake: Callable[[float, SimulatedNode, str], None]) -> None:
        dice = random.Random(seed)  # noqa: S311 - the same each time
        self._world, self._wake = world, wake
        phase = dice.random()
        self.paces = {lane: Pace(INTERVAL, dice, phase) for lane in LANES}
        self.due = dict.fromkeys(LANES, 0.0)
        self._wishes = Wishes(answered=self._answered, clock=lambda: world.now)

    def start(self, at: float) -> None:
        for lane in LANES:
            self.due[lane] = at
            self._wake(at, self, lane)

    def run(self, lane: str) -> None:
        """A pass of a lane."""
        try:
            self._wishes.ask(self._world, lane, INTERVAL)  # type: ignore[arg-type] - a world is client enough
            pause = self.paces[lane].good()
        except SlapError as error:
            pause = self.paces[lane].bad(error.retry_after)
        self.due[lane] = self._world.now + pause
        self._wake(self.due[lane], self, lane)

    def _answered(self, lane: str) -> None:
        for other in LANES:
            left = self.due[other] - self._world.now
            if other != lane and left > 0 and self.paces[other].joins(left):
                self.due[other] = self._world.now
                self._wake(self._world.now, self, other)


def simulate(nodes: int, seconds: float, outage: tuple[float, float], uptime: float) -> Counter[int]:
    """Questions by second; all daemons start at once, ``uptime`` seconds after their machines."""
    world = World(outage)
    events: list[tuple[float, int, SimulatedNode, str]] = []
    order = itertools.count()

    def wake(at: float, node: SimulatedNode, lane: str) -> None:
        heapq.heappush(events, (at, next(order), node, lane))

    for number in range(nodes):
        dice = random.Random(-number)  # noqa: S311
        SimulatedNode(world, number, wake).start(first_pause(uptime, dice))
    while events and events[0][0] < seconds:
        at, _, node, lane = heapq.heappop(events)
        if node.due[lane] != at:
            continue  # it went along with another before
        world.now = at
        node.run(lane)
    return world.asked


def cron(nodes: int, seconds: float) -> Counter[int]:
    """Questions by second of slapos.core's cron: the same minute everywhere, as clocks are set by NTP."""
    dice = random.Random(1)  # noqa: S311
    asked: Counter[int] = Counter()
    for minute in range(int(seconds // 60)):
        for delay in PEER_DELAYS:
            asked.update(minute * 60 + int(dice.uniform(0, delay)) for _ in range(nodes))
    return asked


def row(name: str, asked: Counter[int], begin: float, end: float) -> None:
    """Print how a phase looked to the master."""
    rates = sorted(asked[second] for second in range(int(begin), int(end)))
    mean = statistics.fmean(rates)
    p50, p99 = rates[len(rates) // 2], rates[int(len(rates) * 0.99)]
    ratio = f"{rates[-1] / mean:.1f}" if mean else "-"
    print(f"{name:<58}{f'{mean:.3g}':>8}{p50:>8}{p99:>8}{rates[-1]:>8}{ratio:>10}", flush=True)


def head(name: str) -> None:
    """Print what the columns of rows are."""
    print(f"{name:<58}{'mean':>8}{'p50':>8}{'p99':>8}{'max':>8}{'max/mean':>10}", flush=True)


def spread(nodes: int) -> None:
    print(f"\nspread: questions per second of {nodes} nodes, interval {INTERVAL:.0f} s")
    head("phase")
    outage = (HOUR, 2 * HOUR)
    booted = simulate(nodes, 4 * HOUR, outage, uptime=30.0)
    row("ours: first minute, machines and daemons started at once", booted, 0, 60)
    row("ours: first hour, after the first minute", booted, 60, HOUR)
    row("ours: the master is away, first minute", booted, HOUR, HOUR + 60)
    row("ours: the master is away, second half hour", booted, 1.5 * HOUR, 2 * HOUR)
    row("ours: it is back, first 10 minutes", booted, 2 * HOUR, 2 * HOUR + 600)
    row("ours: the two hours after that", booted, 2 * HOUR + 600, 4 * HOUR)
    restarted = simulate(nodes, HOUR, (2 * HOUR, 2 * HOUR), uptime=10**6)
    row("ours: only daemons restarted, all in one second: minute 1", restarted, 0, 60)
    row("ours: then, to the end of the hour", restarted, 60, HOUR)
    peer = cron(nodes, HOUR)
    row("slapos.core's cron, at any time, the master away or not", peer, 0, HOUR)


# --- a day


class Size(NamedTuple):
    """Bytes of HTTP that a request and its answer take."""

    sent: int
    received: int

    @property
    def both(self) -> int:
        return self.sent + self.received


class Counting:
    """Passes connections on to a port, and counts the bytes both ways."""

    def __init__(self, port: int) -> None:
        self.sent = self.received = 0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                threading.Thread(target=self._pump, args=(near, far, "sent"), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, "received"), daemon=True).start()

    def _pump(self, one: socket.socket, two: socket.socket, counter: str) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                setattr(self, counter, getattr(self, counter) + len(data))
                two.sendall(data)
            two.shutdown(socket.SHUT_WR)

    def measure(self, call: Callable[[], object]) -> Size:
        """Count one call."""
        before = self.sent, self.received
        call()
        last = -1
        while last != self.sent + self.received:  # what is on its way
            last = self.sent + self.received
            time.sleep(0.02)
        return Size(self.sent - before[0], self.received - before[1])

    def close(self) -> None:
        self._listener.close()


class Proxy(NamedTuple):
    """A slapproxy that runs."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@contextmanager
def slapproxy(partitions: int, computers: Sequence[str] = (COMPUTER,)) -> Iterator[Proxy]:
    """A slapproxy with so many busy partitions on each of these computers."""
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken.close()
        file = Path(directory, "proxy.cfg")
        file.write_text(
            f"[slapos]\ncomputer_id = {COMPUTER}\nmaster_url = http://127.0.0.1:{port}/\nsoftware_root = {directory}\n"
            f"instance_root = {directory}\n[slapproxy]\nhost = 127.0.0.1\nport = {port}\n"
            f"database_uri = {directory}/proxy.db\n"
        )
        quiet = subprocess.DEVNULL
        command = [SLAPOS, "proxy", "start", "--cfg", file]
        process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
        try:
            proxy = Proxy(port, process.pid)
            _await(proxy.url)
            for computer in computers:
                _fill(proxy.url, partitions, computer)
            yield proxy
        finally:
            process.terminate()
            process.wait(20)


def _capacity(partitions: int, computer: str = COMPUTER) -> str:
    def addresses(number: int) -> list[dict[str, str]]:
        return [
            {"addr": f"10.0.0.{number}", "netmask": "255.255.255.255"},
            {"addr": f"2001:db8::{number}", "netmask": "ffff::"},
        ]

    rows = [
        {"reference": f"slappart{n}", "address_list": addresses(n + 2), "tap": {"name": f"slaptap{n}"}}
        for n in range(partitions)
    ]
    node = {"reference": computer, "address": "2001:db8::1", "netmask": "ffff::", "partition_list": rows}
    return capacity_document(node)  # type: ignore[arg-type]


def _await(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            requests.get(f"{url}getRunId", timeout=5).raise_for_status()
            break
        except requests.RequestException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _fill(url: str, partitions: int, computer: str) -> None:
    with SlapClient(url, computer) as client:
        client.post_capacity(_capacity(partitions, computer))
    release = "https://lab.example/software/demo/software.cfg"
    marshalled = lambda value: dumps(value).decode()  # noqa: E731
    requests.post(
        f"{url}supplySupply", {"url": release, "computer_id": computer, "state": "available"}, timeout=60
    )
    for number in range(partitions):
        fields = {
            "software_release": release,
            "software_type": "default",
            "partition_reference": f"{computer} {number}",
            "partition_parameter_xml": marshalled(
                {"_": json.dumps({"name": f"instance{number}", "port": 8000})}
            ),
            "filter_xml": marshalled({"computer_guid": computer}),
            "state": marshalled("started"),
            "shared_xml": marshalled(False),
        }
        requests.post(f"{url}requestComputerPartition", fields, timeout=60).raise_for_status()


def _peer_sizes(way: Counting) -> dict[str, Size]:
    """What each request of slapgrid takes, with the headers of its client."""
    place = {"computer_id": COMPUTER, "computer_partition_id": "slappart0"}
    told = {
        **PEER_HEADERS,
        "Authorization": f"X-SlapPartition computer_id={COMPUTER}, computer_partition_id=slappart0",
    }
    with requests.Session() as session:

        def get(name: str, **query: str) -> requests.Response:
            return session.get(way.url + name, params=query, headers=PEER_HEADERS, timeout=60)

        return {
            "hateoas": way.measure(lambda: get("getHateoasUrl")),
            "wishes": way.measure(lambda: get("getFullComputerInformation", computer_id=COMPUTER)),
            "started": way.measure(
                lambda: session.post(f"{way.url}startedComputerPartition", place, headers=told, timeout=60)
            ),
        }


def _print_day(name: str, counts: dict[str, tuple[float, Size]]) -> None:
    number = sum(count for count, _ in counts.values())
    volume = sum(count * size.both for count, size in counts.values())
    parts = ", ".join(f"{count:.0f} {what} ({size.both} bytes)" for what, (count, size) in counts.items())
    print(f"{name:<34}{number:>10.0f}{volume / 1e6:>12.2f}   {parts}")


def day(partitions: int) -> None:
    print(f"\nday: an unchanged node of {partitions} partitions")
    polls = sum(simulate(1, 25 * HOUR, (10**9, 10**9), uptime=10**6).values()) * 24 / 25
    with ExitStack() as stack:
        way = Counting(stack.enter_context(slapproxy(partitions)).port)
        stack.callback(way.close)
        client = stack.enter_context(SlapClient(way.url, COMPUTER))
        wishes = way.measure(client.computer)
        capacity = way.measure(lambda: client.post_capacity(_capacity(partitions)))
        usage = way.measure(lambda: client.use_computer("<journal/>" + " " * 40_000))
        theirs = _peer_sizes(way)
        master = production_master.ProductionMaster(COMPUTER, tls=False)
        stack.callback(master.close)
        master.offer(*(f"slappart{n}" for n in range(partitions)))
        for number in range(partitions):
            master.want(f"slappart{number}", "https://lab.example/software/demo/software.cfg")
        other = Counting(int(master.url.rstrip("/").rpartition(":")[2]))
        stack.callback(other.close)
        conditional = stack.enter_context(SlapClient(other.url, COMPUTER))
        first, unchanged = other.measure(conditional.computer), other.measure(conditional.computer)
    print(f"{'':<34}{'requests':>10}{'MB':>12}")
    daily = {"capacity": (1.0, capacity), "report": (1.0, usage)}
    _print_day("ours, slapproxy (no ETag)", {"polls": (polls, wishes), **daily})
    _print_day(
        "ours, a master with ETags", {"unchanged": (polls - 1, unchanged), "whole": (1.0, first), **daily}
    )
    minutes, hours = 1440.0, 24.0
    peer = {
        "getHateoasUrl": (2 * minutes + 2 * hours, theirs["hateoas"]),
        "whole": (2 * minutes + hours, theirs["wishes"]),
        "started": (minutes * partitions, theirs["started"]),
        "capacity": (hours, capacity),
        "report": (hours, usage),
    }
    _print_day("slapos.core, slapproxy", peer)
    # production says "#access", which counts as no error: slapgrid then has nothing to report (facts, section 4)
    _print_day("slapos.core, production", {key: value for key, value in peer.items() if key != "started"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--partitions", type=int, default=100)
    parser.add_argument("--only", choices=("spread", "day"))
    said = parser.parse_args()
    if said.only != "day":
        spread(said.nodes)
    if said.only != "spread":
        subprocess.run(["/usr/sbin/ip", "link", "set", "lo", "up"], check=True)
        day(said.partitions)


if __name__ == "__main__":
    main()
