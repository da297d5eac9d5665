"""What a client that binds nothing pays for its source, with the programs at the cgroup and without.

Run it in a sandbox (partitiond/sandbox.py), from the source tree: ``python3 -P tests/bench/sources.py [COUNT…]``. For each
number of partitions: connect(2) of a new datagram socket and one unconnected datagram, to the wire, by a partition's
user; a look at the programs, loading them, a partition more. Medians of rounds that take turns.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT.parent), str(ROOT / "netplan")]

from conftest import node  # noqa: E402 - the scene of netplan's tests
from netplan_scene import NEIGHBOUR6, NOTHING, UID, as_user, know_each_other, partition, sink, wanted  # noqa: E402

from netplan import bpf_state  # noqa: E402
from netplan.bpf_contents import contents  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from netplan.model import DesiredNetwork

ROUNDS, CALLS = 7, 2000


def per_call(work: Callable[[], None]) -> float:
    """Microseconds for one call, in a process of a partition's user."""

    def timed() -> float:
        began = time.perf_counter()
        for _ in range(CALLS):
            work()
        return (time.perf_counter() - began) / CALLS * 1e6

    return float(as_user(UID, timed))


def connecting(port: int) -> float:
    """A new socket, connected and closed."""

    def work() -> None:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one:
            one.connect((NEIGHBOUR6, port))

    return per_call(work)


def sending(port: int) -> float:
    """A datagram of 64 bytes from a socket that stays."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one:
        return per_call(lambda: one.sendto(b"x" * 64, (NEIGHBOUR6, port)))


def timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def programs(count: int) -> None:
    """Measure what it costs to have the programs, and tell."""
    desired = wanted(count, tap=False, ranges=True, cgroup_bpf=True)
    more = replace(desired, partitions=(*desired.partitions, partition(count, tap=False, ranges=True)))
    bpf_state.remove_hooks()
    load = timed(lambda: load_hooks(desired))
    looks = [timed(lambda: bpf_state.observe_hooks(wanted=True)) for _ in range(50)]
    changes = [timed(lambda other=other: load_hooks(other)) for other in (more, desired) * 10]
    print(
        f"{count:>4}  programs: load {load:.1f} ms, a look {statistics.median(looks):.2f} ms,"
        f" a look and a partition more or less {statistics.median(changes):.2f} ms"
    )


def load_hooks(desired: DesiredNetwork) -> None:
    """Look, and bring them where they should be."""
    bpf_state.load_hooks(contents(desired), bpf_state.observe_hooks(wanted=True))


def bench(count: int) -> None:
    """Measure with so many partitions, and tell."""
    kinds = {
        "nothing but addresses": {"packet_filter": False},
        "filter and table": {"local_source_table": True},
        "filter, table and programs": {"local_source_table": True, "cgroup_bpf": True},
    }
    for scene in node.__wrapped__():
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for _ in range(ROUNDS):
            for name, options in kinds.items():
                scene.converge(wanted(count, tap=False, ranges=True, **options))
                know_each_other(scene)
                with sink(scene) as port:
                    figures[name].append((connecting(port), sending(port)))
        for name, rows in figures.items():
            connect, send = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"{count:>4}  {name:<28} connect {connect:7.1f} us   send {send:7.1f} us")
        programs(count)
        scene.converge(NOTHING)


if __name__ == "__main__":
    os.chdir("/")
    for number in [int(one) for one in sys.argv[1:]] or [100, 500]:
        bench(number)
