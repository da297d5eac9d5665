"""What no guest behind a tap may claim: addresses of the node, its routers and resolvers, networks of VPNs and of the mesh, the
node's MACs.

Looked at in every pass, so that an address that the node gets or loses is protected, or free, with the next one. What
partitions own need not be here: the packet filter knows it. Nor the MACs of others: it hears them.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from netplan.model import PROTOCOL_MARK, Protected
from netplan.routers import routers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from netplan.model import Link, Network
    from netplan.observe import Look
    from partitiond.config import Config

# the second has those that the first names by a loopback address alone (systemd-resolved.service(8))
_RESOLVERS = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
_NAMESERVER = re.compile(rb"^[ \t]*nameserver[ \t]+([0-9A-Fa-f.:]+)", re.MULTILINE)
# links that lead into a VPN as a whole: behind them, all addresses of their network are somebody's
_VPN_KINDS = frozenset(("tun", "wireguard", "ipip", "gre", "ip6tnl", "ip6gre", "sit", "vti", "xfrm"))
NOTHING = Protected()


class _Seen(NamedTuple):
    """What it is made of: addresses, packed, with the length of their prefix; MACs."""

    own: frozenset[tuple[bytes, int]]
    networks: frozenset[tuple[bytes, int]]
    macs: frozenset[str]


def look(config: Config, seen: Look) -> Protected:
    """Return what is protected now; as long as that stays the same, it is the same object.

    Raises NetplanError ``network.netlink``.
    """
    if not config.create_tap or config.guard.mode == "off" or config.packet_filter != "nftables":
        return NOTHING
    taps = {link.ifindex for link in seen.links.values() if link.tap}
    vpns = {link.ifindex for link in seen.links.values() if link.kind in _VPN_KINDS} - taps
    # the link-local address of the host's end of a tap is there for its own guest alone
    # and what is link-local elsewhere (containers, VPNs) is nobody's where guests are
    near = _near(config, seen.links.values())
    found = [
        one
        for one in seen.addresses
        if one.protocol != PROTOCOL_MARK
        and one.link not in taps
        and (one.link in near or not _is_link_local(one.packed))
    ]
    others = routers(near) | {_packed(one) for one in _resolvers()}
    own = {(one.packed, one.prefixlen) for one in found} | {(one, 8 * len(one)) for one in others}
    return _protected(
        _Seen(
            frozenset(own),
            frozenset(
                (one.packed, one.prefixlen)
                for one in found
                if one.link in vpns and not _is_link_local(one.packed)
            )
            | _mesh(config),
            frozenset(link.mac for link in seen.links.values() if link.mac and link.ifindex in near),
        )
    )


def _mesh(config: Config) -> frozenset[tuple[bytes, int]]:
    """The network of the mesh, with its interface and without: all of it is other nodes'."""
    network = config.mesh.network if config.mesh else None
    return frozenset({(network.network_address.packed, network.prefixlen)} if network else ())


@functools.lru_cache(maxsize=4)
def _protected(seen: _Seen) -> Protected:
    addresses = [_address(packed) for packed, _ in seen.own]
    networks: set[Network] = {ipaddress.ip_network(one) for one in addresses if not one.is_loopback}
    networks |= {ipaddress.ip_network((packed, length), strict=False) for packed, length in seen.networks}
    for packed, length in seen.own:
        if len(packed) == 4 and length < 31:
            # who sends from these makes everybody answer
            around = ipaddress.IPv4Network((packed, length), strict=False)
            networks |= {ipaddress.IPv4Network(around[0]), ipaddress.IPv4Network(around[-1])}
    ordered = sorted(networks, key=lambda one: (one.version, int(one.network_address), one.prefixlen))
    return Protected(
        tuple(one for one in ordered if not one.network_address.is_loopback), tuple(sorted(seen.macs))
    )


def _address(packed: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.IPv4Address(packed) if len(packed) == 4 else ipaddress.IPv6Address(packed)


def _is_link_local(packed: bytes) -> bool:
    """Whether it is of fe80::/10 or 169.254.0.0/16."""
    if len(packed) == 4:
        return packed[:2] == b"\xa9\xfe"
    return packed[0] == 0xFE and packed[1] & 0xC0 == 0x80


def _near(config: Config, links: Iterable[Link]) -> frozenset[int]:
    """The links where guests are: the interfaces of the node's addresses, the bridge and its ports but taps."""
    keys = config.network
    names = {keys.interface, keys.ipv4_interface, keys.bridge, *keys.bridge_ports}
    links = list(links)
    bridges = {link.ifindex for link in links if link.name == keys.bridge}
    return frozenset(
        link.ifindex for link in links if not link.tap and (link.name in names or link.master in bridges)
    )


def _resolvers() -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    for path in _RESOLVERS:
        try:
            found += _nameservers(path.read_bytes())
        except OSError:  # a node without resolver has none to protect
            continue
    return found


@functools.lru_cache(maxsize=2)
def _nameservers(content: bytes) -> tuple[str, ...]:
    found = []
    for word in _NAMESERVER.findall(content):
        try:
            found.append(str(ipaddress.ip_address(word.decode("ascii"))))
        except ValueError:
            continue  # the system's resolver skips it, too
    return tuple(found)


def _packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed
