"""Two nodes and a router between them: the node of the test, and another one in a sandbox inside of the test's sandbox.

The other one has users, files, a network and a supervisord of its own, and ends with its sandbox whatever it did. Between the
two is a namespace with a router, where everything that they say to each other can be heard.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from network_scene import SYS, inside, ip, ip_lines, links
from tunnel_node import ROOT, Agent, Node, program, until

ROUTER = "router"
_PACKET_STATISTICS = 6  # include/uapi/linux/if_packet.h
_SOL_PACKET = 263
_SO_RCVBUFFORCE = 33
_ALL_PROTOCOLS = 0x0003
_ENOUGH_BUFFER = 256 << 20


@dataclass(frozen=True)
class Side:
    """Where a node stands: its address and its router's, and the network of its partitions where it has IPv4 alone."""

    address: str
    gateway: str
    length: int
    network: str | None = None

    def lines(self, link):
        """What ip(8) is told on the node."""
        return (
            "link set lo up",
            f"link set {link} up",
            f"address add {self.address}/{self.length} dev {link}{self._nodad}",
            f"route add default via {self.gateway} dev {link}",
        )

    def router_lines(self, link):
        """And at the router."""
        return (
            "link set lo up",
            f"link set {link} up",
            f"address add {self.gateway}/{self.length} dev {link}{self._nodad}",
            *((f"route add {self.network} via {self.address}",) if self.network else ()),
        )

    @property
    def _nodad(self):
        return " nodad" if ":" in self.address else ""


SIDES = {
    "IPv6": (Side("2001:db8:1::2", "2001:db8:1::1", 64), Side("2001:db8:2::2", "2001:db8:2::1", 64)),
    "IPv4": (
        Side("192.0.2.2", "192.0.2.1", 24, "10.64.0.0/16"),
        Side("198.51.100.2", "198.51.100.1", 24, "10.65.0.0/16"),
    ),
}


class Capture:
    """What passes at the router's links, by packets; ``lost`` are those that the kernel had no room for."""

    def __init__(self, *links):
        self.packets, self.lost = [], 0
        self._sockets = []
        with inside(ROUTER):
            for link in links:
                heard = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
                heard.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ENOUGH_BUFFER)
                heard.bind((link, _ALL_PROTOCOLS))
                heard.settimeout(0.1)
                self._sockets.append(heard)
        self._stopping = False
        self._threads = [threading.Thread(target=self._listen, args=(one,)) for one in self._sockets]
        for thread in self._threads:
            thread.start()

    def _listen(self, heard):
        while True:
            try:
                self.packets.append(heard.recv(1 << 17))
            except TimeoutError:
                if self._stopping:
                    return

    def close(self):
        self._stopping = True
        for thread in self._threads:
            thread.join()
        for heard in self._sockets:
            statistics = heard.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
            self.lost += int.from_bytes(statistics[4:8], sys.byteorder)
            heard.close()

    @property
    def size(self):
        return sum(map(len, self.packets))

    def count(self, content):
        """In how many packets some eight bytes of it are found, aligned to eight."""
        pieces = [content[start : start + 8] for start in range(0, len(content), 8)]
        return sum(any(piece in packet for piece in pieces) for packet in self.packets)


class World:
    """``here`` and ``there`` are the nodes, each with some partitions."""

    def __init__(self, family, partitions):
        self.sides, self._partitions = SIDES[family], partitions
        self._agents = []
        self._sandbox = self.here = self.there = None

    # --- up and down

    def up(self):
        near, far = self.sides
        ip("netns", "add", ROUTER)
        ip_lines(f"link add eth0 type veth peer name near netns {ROUTER}", *near.lines("eth0"))
        ip_lines(*near.router_lines("near"), namespace=ROUTER)
        self._begin_other()
        # made at the router, as eth0 is taken here
        ip_lines(f"link add far type veth peer name eth0 netns {self._pid}", namespace=ROUTER)
        ip_lines(*far.router_lines("far"), namespace=ROUTER)
        self._there("/usr/sbin/ip", "-batch", "-", input="".join(f"{line}\n" for line in far.lines("eth0")))
        with inside(ROUTER):
            for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                (SYS / name).write_text("1")
        self.here = Node("/srv/here/slapos.cfg")
        self.there = Node("/srv/there/slapos.cfg", view=self._view, enter=self._enter)
        self._configure(self.here, near)
        # numbers of users are the machine's: these are not those of the other node
        self._configure(self.there, far, uid_base=7000)
        self.here.apply()
        self.there.apply()
        return self

    def _begin_other(self):
        command = [
            sys.executable,
            "-P",
            "-m",
            "partitiond.sandbox",
            "--bind",
            f"{ROOT}:{ROOT}",
            "--",
            "/bin/cat",
        ]
        self._sandbox = subprocess.Popen(
            command, cwd="/", env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE
        )
        self._pid = until(self._payload, "the other sandbox to be there")
        cgroup = Path(f"/proc/{self._pid}/cgroup").read_text().rpartition("0::")[2].strip()
        self._view = Path(f"/proc/{self._pid}/root")
        # nsenter(1) of Debian 12 stays in its cgroup, and what is attached to that of the other node would not see it
        move = f'echo $$ > "/sys/fs/cgroup{cgroup}/cgroup.procs"; exec "$@"'
        self._enter = (
            *(("/bin/sh", "-ec", move, "sh") if os.path.ismount("/sys/fs/bpf") else ()),
            *("/usr/bin/nsenter", "-t", str(self._pid), "-a", "--"),
        )

    def _payload(self):
        """The process that keeps the other sandbox, once it runs: the last of a line of only children."""
        pid = self._sandbox.pid
        try:
            while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                pid = int(children[0])
            return pid if Path(f"/proc/{pid}/comm").read_text() == "cat\n" else None
        except (FileNotFoundError, ProcessLookupError):
            return None  # one of those that make it (mount and the like) ended while it was looked at

    def _there(self, *command, **options):
        subprocess.run([*self._enter, *command], cwd="/", check=True, text=True, **options)

    def _configure(self, node, side, **keys):
        network = {"ipv4_partition_network": side.network} if side.network else {}
        node.configure(
            slapformat={"interface_name": "eth0", "partition_amount": self._partitions},
            partitiond={**network, **keys},
        )

    def down(self):
        for agent in self._agents:
            agent.close()
        for node in (self.here, self.there):
            if node is not None:
                node.close()
        if self.here is not None:
            self.here("teardown", "--purge")
            shutil.rmtree(self.here.configuration.parent)
        if self._sandbox is not None:
            self._sandbox.stdin.close()
            self._sandbox.wait(30)
        if "eth0" in links():
            ip("link", "delete", "eth0")
        ip("netns", "delete", ROUTER)

    # --- the wire

    def on_the_wire(self, name, *arguments):
        """Start a program of this directory at the router, as its root."""
        started = Agent(["/usr/sbin/ip", "netns", "exec", ROUTER, *program(name, *arguments)])
        self._agents.append(started)
        return started

    def on_the_node(self, name, *arguments):
        """Start one on the first node, as its root."""
        started = Agent(program(name, *arguments))
        self._agents.append(started)
        return started

    @contextlib.contextmanager
    def heard(self):
        """Listen to all that passes between the nodes."""
        capture = Capture("near", "far")
        try:
            yield capture
        finally:
            capture.close()


@contextlib.contextmanager
def standing(family, partitions=3):
    made = World(family, partitions)
    try:
        yield made.up()
    finally:
        made.down()
