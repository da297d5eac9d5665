"""How long a mesh takes to be one: network namespaces at one bridge, each with a real tincd that connects to all others.

From the start of all tincds, or from the kill of one, until each node has had an answer of each other one over the mesh. The
pings are ours, from sockets that were opened in the namespaces, so that no process has to be started for any.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import nodes_tinc
from network_scene import checksum, inside, ip, ip_lines
from tunnel_table import middle, row

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nodes_tinc import Member

ROOT = Path("/srv/mesh")
INTERNET = "internet"
# what takes longer is counted, and not waited for
PATIENCE = 12.0
# as nodes whose peers all have an address render it, and as those do that pass on between peers
KINDS = {"as rendered": (), "passing on": ("TunnelServer = no",)}
TICK = 0.02
# a tun that no program holds has no carrier, and its route is not taken
_AWAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENOBUFS)
_ECHO, _REPLY = 8, 0
_HEADER = struct.Struct("!BBHHH")
# of an IPv4 header without options
_IPV4 = 20

Pair = tuple[str, str]


@dataclass(slots=True)
class Seen:
    """Pings of all directed pairs since a moment: seconds until the first answer of each, and the longest without one."""

    first: dict[Pair, float] = field(default_factory=dict)
    gaps: dict[Pair, float] = field(default_factory=dict)

    def whole(self, name: str = "") -> float:
        """Until each pair had answered, or each that one node is part of."""
        return max(value for pair, value in self.first.items() if not name or name in pair)

    def disturbed(self, name: str) -> float:
        """The longest time without an answer among those that a node is no part of."""
        return max((value for pair, value in self.gaps.items() if name not in pair), default=0.0)


class Mesh:
    """So many nodes; tincds run between ``start`` and ``stop``. ``options`` are lines of tinc.conf before all others."""

    def __init__(self, members: list[Member], options: tuple[str, ...] = ()) -> None:
        self.members, self._options = members, options
        self._tincds: dict[str, subprocess.Popen[bytes]] = {}
        self._sockets: dict[str, socket.socket] = {}
        self._names = {str(one.address): one.name for one in members}
        # only answers to the pings of one watch count
        self._watch = itertools.count(os.getpid() & 0x7FFF)
        self._pairs = [(one, other) for one in members for other in members if one is not other]

    def up(self) -> None:
        """Make the namespaces and what is in them before tincd starts."""
        ip("netns", "add", INTERNET)
        ip_lines("link add bridge type bridge", "link set bridge up", namespace=INTERNET)
        for one in self.members:
            ip("netns", "add", one.name)
            ip_lines(
                f"link add {one.name} type veth peer name eth0 netns {one.name}",
                f"link set {one.name} up master bridge",
                namespace=INTERNET,
            )
            ip_lines(
                "link set lo up",
                "link set eth0 up",
                f"address add {one.reached}/24 dev eth0",
                *nodes_tinc.lines_of_ip(one),
                namespace=one.name,
            )
            nodes_tinc.write(ROOT / one.name, one, self.members, self._options)
            with inside(one.name):
                heard = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
            heard.setblocking(False)
            self._sockets[one.name] = heard

    def down(self) -> None:
        """Take it all away."""
        self.stop()
        for one in self._sockets.values():
            one.close()
        for name in (*self._sockets, INTERNET):
            ip("netns", "delete", name)
        shutil.rmtree(ROOT)

    def start(self, names: Iterable[str] | None = None) -> None:
        """Start tincds."""
        for name in names or self._sockets:
            enter = ["/usr/bin/nsenter", f"--net=/run/netns/{name}", "--"]
            with (ROOT / name / "log").open("ab") as log:
                self._tincds[name] = subprocess.Popen(
                    [*enter, *nodes_tinc.command(ROOT / name)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    def kill(self, name: str) -> None:
        """End one as nobody expects it."""
        process = self._tincds.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End all."""
        for process in self._tincds.values():
            process.terminate()
        for process in self._tincds.values():
            process.wait()
        self._tincds.clear()

    def watch(self, began: float, *, everybody: bool) -> Seen | None:
        """Ping until each pair has answered, seconds since ``began``; ``everybody``: also who has answered is pinged on.

        None when a pair has not answered in time, although all tincds run.
        """
        number = next(self._watch) & 0xFFFF
        seen, last = Seen(), dict.fromkeys(((a.name, b.name) for a, b in self._pairs), began)
        due = began
        while len(seen.first) < len(last):
            now = time.perf_counter()
            if now > began + PATIENCE:
                self._check()
                return None
            if now >= due:
                self._ask(number, seen, everybody=everybody)
                due = max(due + TICK, now)
            for pair in self._answers(number, max(0.0, due - time.perf_counter())):
                now = time.perf_counter()
                seen.first.setdefault(pair, now - began)
                seen.gaps[pair] = max(seen.gaps.get(pair, 0.0), now - last[pair])
                last[pair] = now
        return seen

    def _ask(self, number: int, seen: Seen, *, everybody: bool) -> None:
        head = _HEADER.pack(_ECHO, 0, 0, number, 0)
        packet = _HEADER.pack(_ECHO, 0, checksum(head), number, 0)
        for one, other in self._pairs:
            if everybody or (one.name, other.name) not in seen.first:
                try:
                    self._sockets[one.name].sendto(packet, (str(other.address), 0))
                except OSError as error:
                    if error.errno not in _AWAY:
                        raise

    def _answers(self, number: int, seconds: float) -> Iterator[Pair]:
        names = {heard: name for name, heard in self._sockets.items()}
        ready, _, _ = select.select(list(names), [], [], seconds)
        for heard in ready:
            while True:
                try:
                    data, (address, _) = heard.recvfrom(2048)
                except BlockingIOError:
                    break
                kind, _, _, found, _ = _HEADER.unpack_from(data, _IPV4)
                if (kind, found) == (_REPLY, number):
                    yield names[heard], self._names[address]

    def _check(self) -> None:
        for name, process in self._tincds.items():
            if process.poll() is not None:
                sys.exit(f"tincd of {name} ended: {(ROOT / name / 'log').read_text()[-2000:]}")


@contextmanager
def standing(count: int, options: tuple[str, ...] = ()) -> Iterator[Mesh]:
    """A mesh of so many nodes, whose tincds do not run yet."""
    members = [nodes_tinc.member(number, f"192.0.2.{number + 1}") for number in range(count)]
    mesh = Mesh(members, options)
    with ExitStack() as stack:
        stack.callback(mesh.down)
        mesh.up()
        yield mesh


@dataclass(slots=True)
class Rounds:
    """What was seen: seconds from the start, from a kill, and of the others' longest gap; how often it took too long."""

    started: list[float] = field(default_factory=list)
    back: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    late: int = 0
    late_back: int = 0

    def take(self, mesh: Mesh, victim: str) -> None:
        """Start all, and where they found each other kill one, which is started again at once."""
        began = time.perf_counter()
        mesh.start()
        seen = mesh.watch(began, everybody=False)
        if seen is None:
            self.late += 1
            return
        self.started.append(seen.whole())
        began = time.perf_counter()
        mesh.kill(victim)
        mesh.start([victim])
        seen = mesh.watch(began, everybody=True)
        if seen is None:
            self.late_back += 1
            return
        self.back.append(seen.whole(victim))
        self.gaps.append(seen.disturbed(victim))

    def columns(self) -> list[str]:
        """As they are shown: what took too long is in no median."""
        tries = len(self.started) + self.late
        return [
            middle(self.started) if self.started else "-",
            f"{self.late} of {tries}",
            middle(self.back) if self.back else "-",
            f"{self.late_back} of {len(self.started)}",
            middle(self.gaps) if self.gaps else "-",
        ]


def print_convergence(counts: Iterable[int], rounds: int) -> None:
    """From the start of all tincds, and after the kill of each of some in turn."""
    print()
    late = f"not in {PATIENCE:.0f} s"
    heads = ("all started", late, "one killed -9", late, "others' longest gap")
    row("seconds until every directed pair answers", *heads)
    for count in counts:
        for kind, options in KINDS.items():
            found = Rounds()
            with standing(count, options) as mesh:
                for one in range(rounds):
                    found.take(mesh, mesh.members[one % count].name)
                    mesh.stop()
            row(f"  {count} nodes, {count * (count - 1)} pairs, {kind}", *found.columns())
