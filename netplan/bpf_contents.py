"""What the maps of the cgroup programs hold: whose each address is, and each user's own source.  Pure."""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

from netplan.bpf_programs import NODE, OWNERS, PRIVATE, RANGES, SOURCES
from netplan.model import DesiredNetwork, HookState, MeshSpec, PartitionNetwork
from netplan.once import once, once_each
from netplan.operations import Operation

_MAPPED = bytes(10) + b"\xff\xff"
_NOTHING = bytes(16)

Entries = Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """The entries of each map by its name, and a fingerprint of them all."""

    maps: Mapping[str, Entries]
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HookOperation(Operation):
    """The programs to be in force with ``wanted`` in their maps; None: to be removed.  ``state`` is what was seen."""

    wanted: Contents | None = None
    state: HookState


class _Share(NamedTuple):
    owners: dict[bytes, bytes]
    ranges: dict[bytes, bytes]
    sources: dict[bytes, bytes]
    digest: bytes


def _shared(owners: dict[bytes, bytes], ranges: dict[bytes, bytes], sources: dict[bytes, bytes]) -> _Share:
    digest = hashlib.blake2b(digest_size=16)
    for entries in (owners, ranges, sources):
        digest.update(struct.pack("=I", len(entries)))
        for item in entries.items():
            digest.update(b"".join(item))
    return _Share(owners, ranges, sources, digest.digest())


@once
def contents(desired: DesiredNetwork) -> Contents:
    """Return what the maps shall hold."""
    mesh = desired.mesh
    node = _node(desired.host_ipv6, desired.host_ipv4, mesh)
    network = None if mesh is None or mesh.taken else mesh.network
    shares = [node, *(_share(one, network) for one in desired.partitions)]
    owners: dict[bytes, bytes] = {}
    ranges: dict[bytes, bytes] = {}
    sources: dict[bytes, bytes] = {}
    for one in shares:
        owners |= one.owners
        ranges |= one.ranges
        sources |= one.sources
    digest = hashlib.blake2b(b"".join(one.digest for one in shares), digest_size=16)
    return Contents({OWNERS: owners, RANGES: ranges, SOURCES: sources}, digest.hexdigest())


def _node(ipv6: IPv6Address | None, ipv4: IPv4Address | None, mesh: MeshSpec | None) -> _Share:
    vpn, network = (mesh.address, mesh.network) if mesh and not mesh.taken else (None, None)
    known = [one for one in (ipv6, ipv4, vpn) if one is not None]
    owners = {_address(one): _owner(NODE) for one in known}
    return _shared(owners, {}, _source(NODE, ipv6, ipv4, vpn, network) if known else {})


@once_each
def _share(one: PartitionNetwork, mesh: IPv4Network | None) -> _Share:
    reached: list[IPv4Address | IPv6Address] = [*(end.ip for end in one.reached_ipv6), *one.reached_ipv4]
    owners = {_address(address): _owner(one.uid) for address in reached}
    if one.ipv4:
        owners[_address(one.ipv4)] = _owner(one.uid, PRIVATE)
    ranges = {_range(one.ipv6_range): _owner(one.uid)} if one.ipv6_range else {}
    ipv4 = one.routable_ipv4.interface.ip if one.routable_ipv4 else one.public_ipv4
    ipv6 = one.ipv6.ip if one.ipv6 else None
    # who has neither is there as well: what it receives at the node's addresses is counted
    return _shared(owners, ranges, _source(one.uid, ipv6, ipv4, one.vpn_ipv4 if mesh else None, mesh))


def _address(address: IPv4Address | IPv6Address) -> bytes:
    return _MAPPED + address.packed if address.version == 4 else address.packed


def _range(network: IPv6Network) -> bytes:
    return struct.pack("=I", network.prefixlen) + network.network_address.packed


def _owner(uid: int, flags: int = 0) -> bytes:
    return struct.pack("=II", uid, flags)


def _source(
    uid: int,
    ipv6: IPv6Address | None,
    ipv4: IPv4Address | None,
    vpn: IPv4Address | None,
    mesh: IPv4Network | None,
) -> dict[bytes, bytes]:
    value = (ipv6.packed if ipv6 else _NOTHING) + (_address(ipv4) if ipv4 else _NOTHING)
    value += _address(vpn) if vpn else _NOTHING
    value += mesh.network_address.packed + mesh.netmask.packed if mesh else bytes(8)
    return {struct.pack("=I", uid): value}
