"""The scene of the tests: a node with a bridge in a namespace of its own, its neighbour, and what partitions want."""

import ctypes
import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Interface

from pyroute2 import IPRoute

from netplan import counters, nftables
from netplan.addresses import host_tap_mac, partition_ipv6, partition_range, private_ipv4
from netplan.apply import apply
from netplan.model import DesiredNetwork, PartitionNetwork, TapSpec
from netplan.observe import observe
from netplan.operations import Operation
from netplan.plan import plan
from netplan.sysctls import BRIDGE_FILTERS

CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)

BASE = IPv6Interface("2001:db8:1::1/64")
NEIGHBOUR6 = "2001:db8:1::ffff:1"
HOST4, NEIGHBOUR4 = "192.0.2.2", "192.0.2.1"
PRIVATE = IPv4Network("10.0.0.0/16")
UID = 61000
backend = "nftables"  # the fixture of that name may say otherwise


def namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def enter(descriptor: int) -> None:
    if LIBC.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def leave_for_a_new_one() -> int:
    if LIBC.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare: run the tests as root")
    return namespace()


@contextmanager
def inside(descriptor: int) -> Iterator[None]:
    before = namespace()
    try:
        enter(descriptor)
        yield
    finally:
        enter(before)
        os.close(before)


@dataclass
class Node:
    """The node's namespace, which the test runs in, and its neighbour's."""

    ipr: IPRoute
    own: int
    neighbour: int
    bridge: int
    last: tuple[Operation, ...] = field(default=())

    def at_neighbour(self):
        return inside(self.neighbour)

    def link(self, name: str):
        found = self.ipr.link_lookup(ifname=name)
        return found[0] if found else None

    def plan(self, desired: DesiredNetwork) -> dict[str, Operation]:
        self.last = plan(desired, observe(desired))
        return {one.id: one for one in self.last}

    def converge(self, desired: DesiredNetwork) -> dict[str, Operation]:
        """Apply, and check that nothing failed and that nothing is left to do."""
        operations = self.plan(desired)
        failures = apply(self.last)
        assert not failures, [(one.operation.id, one.error.message) for one in failures]
        done, left = self.last, self.plan(desired)
        assert not left, left
        self.last = done
        return operations


def wire(ipr: IPRoute, neighbour: int) -> int:
    for setting in BRIDGE_FILTERS:  # where br_netfilter is loaded, they are 1 in every new namespace
        with suppress(FileNotFoundError):
            setting.path.write_text("0")
    ipr.link("set", index=1, state="up")
    ipr.link("add", ifname="br0", kind="bridge")
    bridge = ipr.link_lookup(ifname="br0")[0]
    ipr.link("add", ifname="eth0", kind="veth", peer={"ifname": "wire", "net_ns_fd": neighbour})
    port = ipr.link_lookup(ifname="eth0")[0]
    ipr.link("set", index=port, address="52:54:00:00:00:01")  # a random one may begin with anything
    ipr.link("set", index=port, master=bridge, state="up")
    ipr.link("set", index=bridge, state="up")
    ipr.addr("add", index=bridge, address=str(BASE.ip), prefixlen=64, flags=2)
    ipr.addr("add", index=bridge, address=HOST4, prefixlen=24)
    with inside(neighbour), IPRoute() as other:
        wire = other.link_lookup(ifname="wire")[0]
        other.link("set", index=1, state="up")
        other.link("set", index=wire, state="up")
        other.addr("add", index=wire, address=NEIGHBOUR6, prefixlen=64, flags=2)
        other.addr("add", index=wire, address=NEIGHBOUR4, prefixlen=24)
        other.route("add", dst="10.0.0.0/16", gateway=HOST4)
        other.route("add", dst="2001:db8:1:0:4000::/66", gateway=str(BASE.ip))
    ipr.route("add", dst="default", gateway=NEIGHBOUR6, family=10)
    ipr.route("add", dst="default", gateway=NEIGHBOUR4)
    return bridge


def partition(index: int, *, tap: bool = True, ranges: bool = False, bridge: str | None = "br0"):
    name = f"slappart{index}"
    spec = TapSpec(f"slaptap{index}", UID + index, host_tap_mac("COMP-1", name), bridge) if tap else None
    return PartitionNetwork(
        name,
        index,
        UID + index,
        spec,
        partition_ipv6(BASE, index),
        partition_range(BASE, index, 16) if ranges else None,
        private_ipv4(PRIVATE, index),
    )


def wanted(count: int = 3, *, tap: bool = True, ranges: bool = False, **more) -> DesiredNetwork:
    partitions = tuple(partition(index, tap=tap, ranges=ranges) for index in range(count))
    return DesiredNetwork("br0", partitions, **{"host_ipv6": BASE.ip, "backend": backend, **more})


NOTHING = DesiredNetwork("br0")


def iptables(*lines: str) -> None:
    """Change the rules of legacy iptables in one commit; each line is one of iptables-restore, of both families."""
    for tool in ("iptables", "ip6tables"):
        text = "\n".join(("*filter", *lines, "COMMIT\n"))
        line = [f"/usr/sbin/{tool}-legacy-restore", "--noflush", "--wait"]
        subprocess.run(line, input=text, text=True, check=True)


def break_rules() -> None:
    """Take rules out of our filter that count nothing."""
    if backend == "iptables":
        iptables("-F PARTITIOND-REST")
    else:
        nftables.run("flush chain inet partitiond in\n")


def take_rules_away() -> None:
    """Remove the packet filter, as others do."""
    if backend == "iptables":
        for tool in ("iptables", "ip6tables"):
            for option in ("-F", "-X"):
                subprocess.run([f"/usr/sbin/{tool}-legacy", "--wait", option], check=True)
    else:
        nftables.run("delete table inet partitiond\n")


def read_counters():
    return counters.read_counters(backend)


def as_user(uid: int, work: Callable[[], object]) -> str:
    """Run ``work`` in a child of that user; return what it returned as text, or the name of its OSError's
    errno.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            try:
                result = str(work())
            except TimeoutError:
                result = "timeout"
            except OSError as error:
                result = errno.errorcode.get(error.errno, repr(error))
            os.write(writer, result.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read().decode()
    os.waitpid(child, 0)
    return text


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def endpoint(
    kind: socket.SocketKind, address: str | None, target: str, *, free: bool = False
) -> socket.socket:
    """Make a socket for ``target`` bound to ``address`` (None: unbound; free: although the host does not have it)."""
    one = socket.socket(family_of(target), kind)
    if free:
        one.setsockopt(41, 78, 1)  # IPPROTO_IPV6, IPV6_FREEBIND: no privilege needed
    if address:
        one.bind((address, 0))
    return one


def send(
    address: str | None, target: str, port: int = 9, *, count: int = 1, size: int = 52, free: bool = False
):
    with endpoint(socket.SOCK_DGRAM, address, target, free=free) as one:
        for _ in range(count):
            one.sendto(b"x" * size, (target, port))
    return "ok"


def connect(address: str | None, target: str, port: int, *, patience: float = 5):
    with endpoint(socket.SOCK_STREAM, address, target) as one:
        one.settimeout(
            patience
        )  # the first neighbour solicitation may be early, the second comes after a second
        one.connect((target, port))
        return "ok"


@contextmanager
def opened_by(uid: int) -> Iterator[None]:
    """Open sockets in the name of a user: nft sees the fsuid of the opener."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def serving(uid: int, address: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[int]:
    """Listen as a user; the kernel itself completes TCP handshakes."""
    with opened_by(uid):
        one = socket.socket(family_of(address), kind)
    with one:
        one.bind((address, 0))
        if kind == socket.SOCK_STREAM:
            one.listen()
        yield one.getsockname()[1]


@contextmanager
def sink(node: Node, address: str = NEIGHBOUR6, kind: socket.SocketKind = socket.SOCK_DGRAM) -> Iterator[int]:
    """Listen at the neighbour, so that nothing comes back as an ICMP error."""
    with node.at_neighbour():
        manager = serving(0, address, kind)
        port = manager.__enter__()
    try:
        yield port
    finally:
        manager.__exit__(None, None, None)


def know_each_other(node: Node) -> None:
    """Pin the MACs at both ends: no packet waits for one, and no neighbour solicitation is among those counted."""
    mac = node.ipr.get_links(node.bridge)[0].get_attr("IFLA_ADDRESS")
    with node.at_neighbour(), IPRoute() as other:
        (wire_link,) = other.link_lookup(ifname="wire")
        theirs = other.get_links(wire_link)[0].get_attr("IFLA_ADDRESS")
        for address in (str(BASE.ip), *(f"2001:db8:1::{number}" for number in range(2, 9)), HOST4):
            other.neigh("replace", dst=address, lladdr=mac, ifindex=wire_link, state="permanent")
    for address in (NEIGHBOUR6, NEIGHBOUR4):
        node.ipr.neigh("replace", dst=address, lladdr=theirs, ifindex=node.bridge, state="permanent")


@contextmanager
def echoing(
    uid: int,
    address: str,
    kind: socket.SocketKind,
    *,
    port: int = 0,
    options: tuple[tuple[int, int], ...] = (),
) -> Iterator[int]:
    """Be, in a process of that user, a server that answers each client with the address that it sees of it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            with socket.socket(family_of(address), kind) as one:
                for level, option in options:
                    one.setsockopt(level, option, 1)
                one.bind((address, port))
                if kind == socket.SOCK_STREAM:
                    one.listen()
                os.write(writer, str(one.getsockname()[1]).encode())
                while True:
                    _echo(one, kind)
        except OSError as error:
            os.write(writer, errno.errorcode[error.errno].encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb", 0) as stream:
            text = stream.read(16).decode()
        assert text.isdigit(), text
        yield int(text)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _echo(one: socket.socket, kind: socket.SocketKind) -> None:
    if kind == socket.SOCK_STREAM:
        with one.accept()[0] as peer, suppress(OSError):
            peer.sendall(peer.getpeername()[0].encode())
        return
    _, sender = one.recvfrom(64)
    with suppress(OSError):
        one.sendto(sender[0].encode(), sender)


def ask(
    target: str,
    port: int,
    kind: socket.SocketKind,
    *,
    bound: str | None = None,
    connected: bool = True,
    family: socket.AddressFamily | None = None,
    patience: float = 2,
) -> str:
    """Ask an echoing server which address it sees; of an answer from elsewhere, say so."""
    with socket.socket(family or family_of(target), kind) as one:
        one.settimeout(patience)
        if bound:
            one.bind((bound, 0))
        if kind == socket.SOCK_STREAM or connected:
            one.connect((target, port))
            if kind == socket.SOCK_DGRAM:
                one.send(b"x")
            return one.recv(64).decode()
        one.sendto(b"x", (target, port))
        text, sender = one.recvfrom(64)
        return text.decode() if sender[0] == target else f"answered by {sender[0]}"
