"""``make bench-tunnels``: what an encrypted bridge costs beside stunnel's defaults, haproxy and no bridge, in one run.

The way of a byte: client, private IPv4, [client's end], TLS 1.3 with certificates on both sides over IPv6, [server's end],
private IPv4, service; all of it on this machine.  Sections, all of them by default:

- **bridge**: speed.  Bridges take turns within each measurement and each round, so that what else the machine does meets
  all of them; ratios are of pairs in a round.  stunnel's default is ``verifyChain`` with ``checkHost``, its services log
  at ``notice`` like ours; full handshakes at both ends but in the row that says so.  haproxy logs no connections.
- **memory**: PSS of each bridge that runs alone.
- **scale**, **sessions**, **reload**: of a real node (``tunnel_node.py``).

Figures are medians with their range; ``ARGS="bridge reload --rounds 3"`` chooses.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # started with -P
import node
import tunnel_load as load
import tunnel_node
from tunnel_bridges import FAR, FLOOR, KINDS, SERVICE, SOURCE, Bridge, Kind
from tunnel_table import Found, at_least, at_most, middle, print_found, row, shown

from partitiond import sandbox

if TYPE_CHECKING:
    from collections.abc import Iterable

SECTIONS = ("bridge", "memory", "scale", "sessions", "reload")
BULK_BYTES = 600_000_000
CONNECT_SECONDS, CONNECT_MOST = 2.0, 10_000
REQUESTS = 5000
IDLE_SESSIONS = 500
MORE_TUNNELS = 30
MEMORY_ROUNDS = 3
# of each process: stunnel takes 125 clients for 256 of them (src/fd.c), so this is for 10 000
DESCRIPTORS = 20_480

BULK = "bulk, one connection, MB/s"
CONNECTS = "new connections/s, 16 at once"
# what is measured, and at least so many times stunnel's default
TARGETS = {BULK: 0.97, CONNECTS: 1.25}

Figures = dict[str, float]


# --- bridges ----------------------------------------------------------------------------------------------------------


def bulk(bridge: Bridge) -> Figures:
    """One connection."""
    before = load.cpu(bridge.pids)
    figures = {BULK: load.numbers("bulk", *bridge.entry, BULK_BYTES)[0] / 1e6}
    if bridge.pids:
        figures["processor s a GB, both ends"] = (load.cpu(bridge.pids) - before) / BULK_BYTES * 1e9
    return figures


def connects(bridge: Bridge) -> Figures:
    """New connections, many at once; processor time has steps of 10 ms."""
    before = load.cpu(bridge.pids)
    count, rate, _, _ = load.numbers("connect", *bridge.entry, 16, CONNECT_SECONDS, CONNECT_MOST)
    figures = {CONNECTS: rate}
    if bridge.pids:
        figures["processor us a connection, both ends"] = (load.cpu(bridge.pids) - before) / count * 1e6
    return figures


def connects_one(bridge: Bridge) -> Figures:
    """New connections, one at a time."""
    _, _, p50, _ = load.numbers("connect", *bridge.entry, 1, CONNECT_SECONDS / 3, CONNECT_MOST)
    return {"a new connection and a byte, p50 ms": p50 / 1000}


def requests(bridge: Bridge) -> Figures:
    """64 bytes there and back through a connection that is open."""
    p50, p99 = load.numbers("ask", *bridge.entry, REQUESTS)
    return {"64-byte request, p50 us": p50, "64-byte request, p99 us": p99}


def speed(rounds: int) -> Found:
    """Measure all bridges by turns, each round beginning with another one."""
    found: Found = {}
    with ExitStack() as stack:
        bridges = [(kind, stack.enter_context(kind.up())) for kind in KINDS]
        for one in range(rounds):
            turn = one % len(bridges)
            for measure in (bulk, connects, bulk, connects_one, requests):
                for kind, bridge in (*bridges[turn:], *bridges[:turn]):
                    _note(found, kind, measure(bridge))
    return found


def memory(rounds: int) -> Found:
    """Measure each bridge alone, as what processes share is counted in parts."""
    found: Found = {}
    for _ in range(rounds):
        for kind in KINDS[: KINDS.index(FLOOR)]:
            _note(found, kind, _memory(kind))
    return found


def _memory(kind: Kind) -> Figures:
    with kind.up() as bridge:
        idle = [load.pss([pid]) for pid in bridge.pids]
        with load.holding(bridge.entry, IDLE_SESSIONS) as held:
            server, client = (
                (load.pss([pid]) - before) / held.count for pid, before in zip(bridge.pids, idle, strict=True)
            )
    with kind.up(1 + MORE_TUNNELS) as bridge:
        more = (load.pss(bridge.pids) - sum(idle)) / MORE_TUNNELS / 2
    return {
        "a process with one tunnel, KiB": sum(idle) / 2,
        "a tunnel more, KiB": more,
        "an idle session, KiB, server's end": server,
        "an idle session, KiB, client's end": client,
    }


def _note(found: Found, kind: Kind, figures: Figures) -> None:
    for what, value in figures.items():
        found.setdefault(what, {}).setdefault(kind, []).append(value)


# --- a node -----------------------------------------------------------------------------------------------------------


def print_scale(counts: Iterable[int], rounds: int) -> None:
    """Many tunnels in many partitions."""
    print()
    row("many tunnels: partitiond apply, seconds", "from declared", "after a reboot", "PSS, MiB")
    for count in counts:
        done = [tunnel_node.scale(count) for _ in range(rounds)]
        columns = [
            [one.declared for one in done],
            [one.rebooted for one in done],
            [one.memory for one in done],
        ]
        target = ""
        if count == 33:
            target = at_most(statistics.median(columns[2]), 90, "MiB")
        elif count == 100:
            target = at_most(statistics.median(columns[0]), 5, "s")
        row(f"  {count * tunnel_node.EACH} in {count} partitions", *map(middle, columns), end=target)


def print_sessions(asked: int) -> None:
    """Many sessions in one tunnel."""
    one = tunnel_node.sessions(asked)
    print()
    heads = ("held", "opened in, s", "answered afterwards", "KiB, server's end", "KiB, client's end")
    row("sessions at once through one tunnel", *heads)
    figures = (one.held, one.seconds, one.answered, one.server, one.client)
    row(f"  {asked} asked for", *map(shown, figures), end=at_least(one.answered, asked))
    print(f"  (descriptors: at most {one.descriptors} a process)", flush=True)


def print_reloads(tunnels: int, repetitions: int) -> None:
    """What is refused meanwhile."""
    reloaded, killed = tunnel_node.reloads(tunnels, repetitions)
    print()
    row(f"outages, {repetitions} times each", "no listener, ms", "refused", "longest wait, ms", "reset")
    for name, outages in ((f"SIGHUP, {tunnels} tunnels", reloaded), ("kill -9 under supervisord", killed)):
        columns = zip(*((one.window, one.refused, one.wait, one.reset) for one in outages), strict=True)
        row(f"  {name}", *map(middle, columns))
    rate = statistics.median(one.connects for one in reloaded) / tunnel_node.RELOAD_SECONDS
    print(f"  (one connection after the other, each to the next tunnel, {rate:.0f} a second)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=5, help="of bridge; memory at most 3")
    parser.add_argument(
        "--partitions", type=int, nargs="*", default=[33, 100], help="of scale, three tunnels each"
    )
    parser.add_argument("--scale-rounds", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=9000)
    parser.add_argument("--tunnels", type=int, default=30, help="of reload")
    parser.add_argument("--reloads", type=int, default=7)
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: no section; allowed: {', '.join(SECTIONS)}")
    sections = options.sections or SECTIONS
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS, hard), hard))
    load.compile_program()
    node.scene()
    for address in (FAR, SOURCE):
        node.ip("address", "add", f"{address}/128", "dev", "lo", "nodad")
    with load.serving(SERVICE):
        if "bridge" in sections:
            print_found(speed(options.rounds), TARGETS)
        if "memory" in sections:
            print_found(memory(min(options.rounds, MEMORY_ROUNDS)), {})
    if "scale" in sections:
        print_scale(options.partitions, options.scale_rounds)
    if "sessions" in sections:
        print_sessions(options.sessions)
    if "reload" in sections:
        print_reloads(options.tunnels, options.reloads)


if __name__ == "__main__":
    if os.geteuid() != 0 or not sandbox.inside():
        sys.exit("make bench-tunnels runs this in private namespaces")
    main()
