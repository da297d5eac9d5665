"""Members of a mesh without a node around them: what tincd reads, as the product renders it, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

from netplan import tinc, tinc_config, tinc_keys

if TYPE_CHECKING:
    from pathlib import Path

TINCD = "/usr/sbin/tincd"
INTERFACE = "sltinc"
NETWORK = IPv4Network("10.64.0.0/16")
_PREFIX = 23
_KEY = "rsa_key.priv"


@dataclass(frozen=True)
class Member:
    """A node of the mesh; ``reached`` is its address on the internet below, ``own`` the part of the network that it has."""

    name: str
    reached: str
    own: IPv4Network

    @property
    def address(self) -> IPv4Address:
        """The node's own address of the mesh."""
        return self.own.network_address + 1

    @cached_property
    def key(self) -> str:
        """Made when it is first asked for."""
        return tinc_keys.make()

    @cached_property
    def block(self) -> tinc.HostBlock:
        """What all others know of it."""
        public = tinc_keys.public_of(self.key)
        return tinc.HostBlock(self.name, public, (self.own,), (tinc.Endpoint(self.reached),))


def member(number: int, reached: str) -> Member:
    """The node that has the so-manieth part of the network."""
    start = int(NETWORK.network_address) + number * 2 ** (32 - _PREFIX)
    return Member(f"node{number}", reached, IPv4Network((start, _PREFIX)))


def write(directory: Path, own: Member, members: list[Member], options: tuple[str, ...] = ()) -> None:
    """Write what tincd of one member reads: it connects to all others. ``options`` come first, and so are in force."""
    peers = tuple(one.block for one in members if one is not own)
    mesh = tinc_config.Mesh(
        own=own.block,
        peers=peers,
        connect_to=tuple(one.name for one in peers),
        interface=INTERFACE,
        private_key=directory / _KEY,
        relays=tinc_config.need_a_relay(peers),
    )
    for name, text in mesh.files().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        first = "".join(f"{one}\n" for one in options) if name == tinc_config.TINC_CONF else ""
        path.write_text(first + text)
    key = directory / _KEY
    key.touch(mode=0o600)
    key.write_text(own.key)


def command(directory: Path) -> list[str]:
    """Run tincd in the foreground."""
    return [TINCD, "-D", "-c", str(directory), f"--pidfile={directory}/tincd.pid"]


def lines_of_ip(own: Member) -> tuple[str, ...]:
    """What ip(8) is told on a node before tincd starts: the link stays while tincd is away."""
    return (
        f"tuntap add dev {INTERFACE} mode tun",
        f"link set {INTERFACE} up",
        f"address add {own.address}/32 dev {INTERFACE}",
        f"route add {NETWORK} dev {INTERFACE} src {own.address}",
    )
