"""``make bench-packets``: what isolation and metering cost a packet, beside no rules at all, in one run.

Each variant is a node of its own in a network namespace, with a neighbour behind a veth; the last partition is
measured, the worst place in any list.  Variants take turns, so that what else the machine does meets all of them.
Printed are medians, and what they are of those without rules:

- **udp out**, **udp in**: 64-byte packets of a partition's socket to the neighbour, and of the neighbour to it: ns of
  one pinned sender, which does the work of both ends;
- **node in**: likewise to a partition's socket at the node's own address, which is counted by the socket's user;
- **tcp out**: one bulk connection, Gbit/s;
- **tap**: 64-byte UDP of a guest through the bridge to the neighbour, ns a frame;
- **load**, **one more**: milliseconds to load the whole filter anew (and what stands beside it), and for a partition more.
"""

import argparse
import os
import statistics
import struct
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

from pyroute2 import IPRoute

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / "netplan"))
import netplan_scene as scene  # noqa: E402 - beside the tests that it serves

from netplan import nftables  # noqa: E402
from netplan.apply import apply  # noqa: E402
from netplan.model import RateLimit, TapGuard  # noqa: E402
from netplan.observe import observe  # noqa: E402
from netplan.plan import plan  # noqa: E402
from partitiond import sandbox  # noqa: E402

PROGRAM = Path("/srv/packets")
PORT = 4000
GUEST_MAC = "02:00:00:00:00:07"


WALLS = ("meters", "ownership", "bpf", "guard")


@dataclass
class Variant:
    """A node with ``count`` partitions and the first few of the :data:`WALLS`, and what was measured of it."""

    name: str
    count: int
    walls: tuple[str, ...]
    backend: str = "nftables"
    stack: ExitStack = field(default_factory=ExitStack)
    figures: dict[str, list[float]] = field(default_factory=dict)

    def desired(self, count: int):
        partitions = scene.wanted(count, ranges=True).partitions
        if "guard" in self.walls and self.backend == "nftables":
            partitions = tuple(_guarded(one) for one in partitions)
        return replace(
            scene.wanted(0),
            partitions=partitions,
            packet_filter=bool(self.walls),
            ownership="ownership" in self.walls,
            cgroup_bpf="bpf" in self.walls,
            backend=self.backend,
            limits=_limits(partitions) if "quotas" in self.walls else {},
        )

    def up(self) -> None:
        self.neighbour, self.own = scene.leave_for_a_new_one(), scene.leave_for_a_new_one()
        ipr = self.stack.enter_context(IPRoute())
        self.node = scene.Node(ipr, self.own, self.neighbour, scene.wire(ipr, self.neighbour))
        self.node.converge(self.desired(self.count))
        self.last = self.desired(self.count).partitions[-1]
        own = [str(one.ipv6.ip) for one in self.desired(self.count).partitions]
        _know(self.node, [str(scene.BASE.ip), *own])

    def note(self, what: str, value: float) -> None:
        self.figures.setdefault(what, []).append(value)


def _limits(partitions):
    """Everybody may be limited, and every second one is; not the last one, which is measured."""
    return {
        one.id: RateLimit(10**6, in_force=one.index % 2 == 0 and one is not partitions[-1])
        for one in partitions
    }


def _guarded(one):
    own = (IPv6Network(f"2001:db8:1:7:{one.index:x}::/80"),)
    return replace(one, tap=replace(one.tap, guard=TapGuard(strict=True, own=own)))


def _know(node, addresses) -> None:
    """Pin both MACs: no packet waits for a neighbour, and none is sent to find one."""
    mac = node.ipr.get_links(node.bridge)[0].get_attr("IFLA_ADDRESS")
    with node.at_neighbour(), IPRoute() as other:
        (wire,) = other.link_lookup(ifname="wire")
        theirs = other.get_links(wire)[0].get_attr("IFLA_ADDRESS")
        for address in addresses:
            other.neigh("replace", dst=address, lladdr=mac, ifindex=wire, state="permanent")
    node.ipr.neigh("replace", dst=scene.NEIGHBOUR6, lladdr=theirs, ifindex=node.bridge, state="permanent")


def _run(namespace: int, uid: int, *words: object, cpu: int = 0) -> float:
    """Run the program as a user in a namespace; return the number that it prints."""
    with scene.inside(namespace):
        done = subprocess.run(
            [PROGRAM, *map(str, words)],
            check=True,
            capture_output=True,
            text=True,
            user=uid,
            group=uid,
            extra_groups=[],
            preexec_fn=lambda: os.sched_setaffinity(0, {cpu % os.cpu_count()}),
        )
    return float(done.stdout)


@contextmanager
def _serving(namespace: int, uid: int, *words: object):
    with scene.inside(namespace):
        one = subprocess.Popen(
            [PROGRAM, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            user=uid,
            group=uid,
            extra_groups=[],
        )
    with one:
        assert one.stdout.readline() == "ready\n"
        yield
        one.stdin.close()
        one.wait(20)


def measure(variant: Variant, packets: int, octets: int) -> None:
    """One round of everything."""
    mine, uid = str(variant.last.ipv6.ip), variant.last.uid
    with _serving(variant.neighbour, 0, "sink", scene.NEIGHBOUR6, PORT):
        variant.note("udp out", _run(variant.own, uid, "udp", mine, scene.NEIGHBOUR6, PORT, packets))
        frame = _frame(variant)
        variant.note("tap", _run(variant.own, uid, "tap", variant.last.tap.name, frame.hex(), packets))
    with _serving(variant.own, uid, "sink", mine, PORT):
        variant.note("udp in", _run(variant.neighbour, 0, "udp", scene.NEIGHBOUR6, mine, PORT, packets))
    with _serving(variant.own, uid, "sink", scene.BASE.ip, PORT):
        own = (scene.NEIGHBOUR6, scene.BASE.ip, PORT, packets)
        variant.note("node in", _run(variant.neighbour, 0, "udp", *own))
    with _serving(variant.neighbour, 0, "serve", scene.NEIGHBOUR6, PORT + 1):
        rate = _run(variant.own, uid, "tcp", mine, scene.NEIGHBOUR6, PORT + 1, octets)
        variant.note("tcp out", rate * 8 / 1e9)


def _frame(variant: Variant) -> bytes:
    """A UDP packet of 64 bytes from the guest behind the last tap to the neighbour."""
    with scene.inside(variant.neighbour), IPRoute() as other:
        (wire,) = other.link_lookup(ifname="wire")
        target = other.get_links(wire)[0].get_attr("IFLA_ADDRESS")
    source = IPv6Address(f"2001:db8:1:7:{variant.last.index:x}::5").packed
    to = IPv6Address(scene.NEIGHBOUR6).packed
    body = struct.pack("!HHHH", 5000, PORT, 24, 0) + bytes(16)
    total = sum(struct.unpack("!28H", source + to + struct.pack("!II", 24, 17) + body[:16])) + sum(
        struct.unpack("!4H", body[16:])
    )
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:6] + struct.pack("!H", ~total & 0xFFFF) + body[8:]
    macs = bytes.fromhex(target.replace(":", "")) + bytes.fromhex(GUEST_MAC.replace(":", ""))
    return macs + b"\x86\xdd" + struct.pack("!IHBB", 0x60000000, 24, 17, 64) + source + to + body


def reload(variant: Variant) -> None:
    """The whole filter anew, as after a flush; and one partition more, and less again."""
    with scene.inside(variant.own):
        _flush(variant)
        variant.note("load", _applied(variant, variant.count))
        variant.note("one more", _applied(variant, variant.count + 1))
        _applied(variant, variant.count)


def _flush(variant: Variant) -> None:
    if variant.backend == "nftables":
        nftables.run("flush ruleset\n")
        return
    for tool in ("iptables", "ip6tables"):
        for option in ("-F", "-X"):
            subprocess.run([f"/usr/sbin/{tool}-legacy", option], check=True)


def _applied(variant: Variant, count: int) -> float:
    """Milliseconds to apply what concerns the filter of a node with so many partitions."""
    desired = variant.desired(count)
    operations = plan(desired, observe(desired))
    filters = [one for one in operations if one.resource in ("filter", "bpf")]
    began = time.perf_counter()
    failures = apply(filters)
    spent = time.perf_counter() - began
    assert not failures, failures
    failures = apply([one for one in operations if one not in filters])
    assert not failures, failures
    return spent * 1000


def table(variants: list[Variant]) -> str:
    """What was measured, each beside the first variant."""
    kinds = ("udp out", "udp in", "node in", "tcp out", "tap", "load", "one more")
    lines = ["".join((f"{'':16}", *(f"{kind:>18}" for kind in kinds)))]
    for variant in variants:
        cells = []
        for kind in kinds:
            values, base = variant.figures.get(kind), variants[0].figures.get(kind)
            if not values:
                cells.append(f"{'-':>18}")
                continue
            middle = statistics.median(values)
            beside = f" x{middle / statistics.median(base):.2f}" if base else " ms"
            cells.append(f"{middle:>11.2f}{beside:<7}")
        lines.append(f"{variant.name:16}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("counts", nargs="*", type=int, default=[1, 100, 500])
    parser.add_argument(
        "--walls", action="store_true", help="also what each wall costs, at the largest count"
    )
    parser.add_argument(
        "--quotas", action="store_true", help="what limits by rate cost who is not limited, too"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--packets", type=int, default=100_000)
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    parser.add_argument("--iptables", action="store_true", help="the backend of legacy hosts, too")
    options = parser.parse_args()
    subprocess.run(["gcc", "-O2", "-o", PROGRAM, ROOT / "packets.c"], check=True)
    Path("/dev/net/tun").chmod(0o666)  # as udev does it, in this sandbox
    most = max(options.counts)
    variants = [Variant("no rules", most, ())]
    variants += [Variant(f"all, {count}", count, WALLS) for count in options.counts]
    if options.walls:
        variants += [
            Variant(f"to {WALLS[place - 1]}, {most}", most, WALLS[:place]) for place in range(1, len(WALLS))
        ]
    if options.quotas:
        variants += [Variant(f"limits, {count}", count, (*WALLS, "quotas")) for count in options.counts]
    if options.iptables:
        variants += [
            Variant(f"iptables, {count}", count, WALLS, backend="iptables") for count in options.counts
        ]
    home = scene.namespace()
    for variant in variants:
        variant.up()
    for _ in range(options.rounds):
        for variant in variants:
            measure(variant, options.packets, options.bytes)
            if variant.walls[: len(WALLS)] == WALLS:
                reload(variant)
    print(table(variants), flush=True)
    for variant in variants:
        scene.enter(variant.own)
        variant.node.converge(scene.NOTHING)
        variant.stack.close()
    scene.enter(home)


if __name__ == "__main__":
    if os.geteuid() != 0 or not sandbox.inside():
        sys.exit("make bench-packets runs this in private namespaces")
    main()
