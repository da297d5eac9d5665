"""Two nodes, each a machine of its own, joined by one cable: what can be measured between nodes without a wire that delays."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import tunnel_load
from tunnel_load import wait_for

from partitiond.demo.internet import Internet, Site
from partitiond.demo.node import Node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunnel_load import Place

LOGS = Path("/srv/pairs")
RAW = "raw, IPv6"
SERVICE, LISTEN, ENTRY = 7000, 4000, 6000
# as the other users of this machine's kernel, partitions of all four nodes have uids of their own
_NUMBERS = {"IPv6": (1, 2), "mesh": (3, 4)}
_PARTITION = "slappart0"
_NOBODY = "http://192.0.2.1:9/"  # apply asks no master


class Cable:
    """A veth from one machine to the other; stands in for the internet of a world."""

    def __init__(self) -> None:
        self._ends: list[tuple[int, Site]] = []

    def attach(self, _name: str, pid: int, where: Site) -> None:
        """Remember the first, join the second to it."""
        self._ends.append((pid, where))
        if len(self._ends) < 2:
            return
        (near, _), (far, _) = self._ends
        _ip(near, f"link add eth0 type veth peer name eth0 netns {far}")
        for one, site in self._ends:
            nodad, bits = (" nodad", 128) if ":" in site.address else ("", 32)
            _ip(
                one,
                "link set lo up",
                "link set eth0 up",
                f"address add {site.address}/{site.length} dev eth0{nodad}",
                f"route add {site.gateway}/{bits} dev eth0",
                f"route add default via {site.gateway} dev eth0",
            )

    def detach(self, _name: str) -> None:
        """The cable is gone with the machine."""


def _ip(pid: int, *lines: str) -> None:
    """Run lines of ip(8) in the network of a process."""
    subprocess.run(
        ["/usr/bin/nsenter", "-t", str(pid), "-n", "--", "/usr/sbin/ip", "-batch", "-"],
        input="".join(f"{line}\n" for line in lines),
        text=True,
        check=True,
    )


SITES = {
    "IPv6": (
        Site("2001:db8:1::1", "2001:db8:2::1", "2001:db8:1::/64"),
        Site("2001:db8:2::1", "2001:db8:1::1", "2001:db8:2::/64"),
    ),
    "mesh": (
        Site("192.0.2.1", "198.51.100.1", "192.0.2.0/24"),
        Site("198.51.100.1", "192.0.2.1", "198.51.100.0/24"),
    ),
}


@dataclass
class Pair:
    """``server`` and ``client``; ``kind`` is IPv6, or mesh: then nobody has an IPv6 address, and they are joined by tinc."""

    kind: str
    server: Node = field(init=False)
    client: Node = field(init=False)

    def up(self) -> None:
        """Make both nodes, and a tunnel from a partition of one to a partition of the other, by the product."""
        LOGS.mkdir(exist_ok=True)
        cable = cast("Internet", Cable())
        names = (f"{self.kind}-server", f"{self.kind}-client")
        self.server, self.client = (
            Node(name, number, cable, site, LOGS / f"{name}.log")
            for name, number, site in zip(names, _NUMBERS[self.kind], SITES[self.kind], strict=True)
        )
        for node in self.nodes:
            node.power_on()
        for node in self.nodes:
            node.connect()
            shutil.copy(tunnel_load.PROGRAM, node.seen(tunnel_load.PROGRAM))
        self._configure()
        self._bridge()
        # one tuple of addresses and port has not enough ports for all rounds when each rests a minute
        self.client.run("/usr/sbin/sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1")

    @property
    def nodes(self) -> tuple[Node, Node]:
        """Both."""
        return self.server, self.client

    def _configure(self) -> None:
        mesh = self.kind == "mesh"
        for node in self.nodes:
            node.configure(node.first_sections(_NOBODY, partitions=1, mesh=mesh))
            node.verb("apply")
        if mesh:
            blocks = "".join(node.say("mesh", "export") for node in self.nodes)
            for node in self.nodes:
                node.say("mesh", "import", "-", said=blocks)

    def _bridge(self) -> None:
        server, client = self.nodes
        _declare(server, f"mode = server\nlisten = {LISTEN}\nconnect = {SERVICE}\nallow = {_pin(client)}\n")
        far = server.public(_PARTITION)
        far = f"[{far}]" if ":" in far else far
        _declare(
            client, f"mode = client\nlisten = {ENTRY}\nconnect = {far}:{LISTEN}\npeer = {_pin(server)}\n"
        )
        for node in self.nodes:
            node.verb("apply")

    def down(self) -> None:
        """End both."""
        for node in self.nodes:
            node.power_off()

    def pids(self, *names: str) -> list[int]:
        """The processes of these names on both nodes."""
        return [
            pid
            for node in self.nodes
            for pid, (_, line) in node.processes().items()
            if Path(line.partition(" ")[0]).name.startswith(names)
        ]


def _pin(node: Node) -> str:
    return f"cert:{node.resource(_PARTITION)['certificate']}"


def _declare(node: Node, text: str) -> None:
    """As the buildout of an instance does it."""
    place = node.path(_PARTITION) / "etc" / "tunnel"
    node.run(*node.as_user(_PARTITION, "/bin/mkdir", "-p", str(place)))
    file = place / "bench.cfg"
    node.run(*node.as_user(_PARTITION, "/usr/bin/tee", str(file)), said=f"[tunnel]\n{text}")


@dataclass(frozen=True)
class Way:
    """One way from the client's node to a service on the server's: where it leads, and which processes carry it."""

    name: str
    pair: Pair
    place: Place
    partition: bool
    programs: tuple[str, ...] = ()

    def words(self, *arguments: object) -> list[str]:
        """The command of a load, on the client's node, as the partition's user where the way begins at its address."""
        return _words(self.pair.client, *arguments, partition=self.partition)

    def numbers(self, *arguments: object) -> list[float]:
        """Run a load to its end; the numbers that it prints."""
        command = self.words(arguments[0], *self.place, *arguments[1:])
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{self.name}: {' '.join(command[-6:])} exited {done.returncode}: {done.stderr}")
        return [float(one) for one in done.stdout.split()]

    def cpu(self) -> dict[int, float]:
        """Processor seconds so far of those who carry it, by process."""
        return (
            {pid: tunnel_load.cpu([pid]) for pid in self.pair.pids(*self.programs)} if self.programs else {}
        )


def _words(node: Node, *arguments: object, partition: bool) -> list[str]:
    command = tunnel_load.words(*arguments)
    return node.words(*(node.as_user(_PARTITION, *command) if partition else command))


@contextmanager
def _serving(node: Node, host: str, *, partition: bool) -> Iterator[None]:
    """A service on a node; it ends with its standard input."""
    command = _words(node, "serve", host, SERVICE, partition=partition)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        if service.stdout.readline() != "ready\n":
            sys.exit(f"no service at {host} on {node.name}")
        yield


@contextmanager
def ways() -> Iterator[list[Way]]:
    """All ways, up and with services behind them."""
    with ExitStack() as stack:
        pairs = {kind: Pair(kind) for kind in SITES}
        for pair in pairs.values():
            stack.callback(pair.down)
            pair.up()
        plain, mesh = pairs["IPv6"], pairs["mesh"]
        inner = mesh.server.verb("mesh", "status")["address"]
        outer = plain.server.site.address
        for pair, host in ((plain, outer), (mesh, inner)):
            stack.enter_context(_serving(pair.server, host, partition=False))
            stack.enter_context(_serving(pair.server, pair.server.private(_PARTITION), partition=True))
        found = [
            Way(RAW, plain, (outer, SERVICE), partition=False),
            Way("stunnel over IPv6", plain, (plain.client.private(_PARTITION), ENTRY), True, ("stunnel",)),
            Way("tinc", mesh, (inner, SERVICE), False, ("tincd",)),
            Way(
                "stunnel over tinc",
                mesh,
                (mesh.client.private(_PARTITION), ENTRY),
                True,
                ("stunnel", "tincd"),
            ),
        ]
        for way in found:
            wait_for(f"an answer by {way.name}", lambda: _answers(way))  # noqa: B023 - called within this turn
        yield found


def _answers(way: Way) -> bool:
    command = way.words("ask", *way.place, 10)
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
