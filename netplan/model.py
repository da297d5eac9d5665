"""The nouns of the node's network: what is wanted and what was seen.  No I/O.

Wanted things are dataclasses that refuse nonsense when they are made.  Seen things come in thousands and are
compared, not kept, so they are named tuples of plain integers and bytes: making 500 ``ipaddress`` objects
costs more than reading the kernel.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Literal, NamedTuple

from netplan.errors import NetplanError

PROTOCOL_MARK = 112
"""The address protocol (IFA_PROTO) and route protocol of what we made; rt_protos of iproute2 leaves 112 free.

Kernels before 5.18 ignore IFA_PROTO; :mod:`netplan.rtnetlink` tells how an address is marked there.
"""

MOVED_MARK = 113
"""The address protocol of what was moved from a port to its bridge, so that it can be moved back."""

ALIAS_MARK = "partitiond:"
"""What the alias of each of our links starts with; the partition's id follows."""

BRIDGE_ALIAS = ALIAS_MARK + "bridge/"
"""The alias of a bridge that we made; no partition's id has a slash."""

PORT_ALIAS = ALIAS_MARK + "port/"
"""What the alias of a port that we put into the bridge starts with; the alias that it had before follows."""

MESH_ALIAS = ALIAS_MARK + "mesh/"
"""The alias of the interface of the mesh."""

GROUP_MAKING = 1 << 29
"""A link of ours in this group was just made and has no alias yet, which the kernel takes only afterwards."""

GROUP_GOING = 1 << 30
"""Links of ours in a group from here on are being removed together."""

GUARDED_PORT = 0xFFFD
"""Which frames to 01:80:c2:00:00:0X a bridge forwards from the port of a guarded tap: all but pause frames, which it
drops.

Not to forward them, for the guard refuses them then.  The others a bridge takes past all filters and learns their
sender by them, LLDP always and BPDUs with spanning tree (net/bridge/br_input.c, br_handle_frame): a guest who sent
one as the router would get what is sent to the router.
"""

_PARTITION_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_LINK_NAME = re.compile(r"[A-Za-z0-9_.-]{1,15}")  # IFNAMSIZ is 16 with the final NUL
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")


Network = IPv4Network | IPv6Network

Backend = Literal["nftables", "iptables"]
"""What the packet filter is made of: iptables is for hosts that have nothing else, and holds less
(:mod:`netplan.legacy_cases`).
"""


@dataclass(frozen=True, slots=True)
class TapGuard:
    """What may leave a tap: ``own`` are the guest's addresses, ``mac`` its MAC (None: the first that is seen;
    ``proposed`` is then kept free for it).

    ``strict``: from its own addresses only; a family without one is blocked as a whole.  Else from any that
    nobody else owns (:class:`Protected`).
    """

    strict: bool
    own: tuple[Network, ...] = ()
    mac: str | None = None
    proposed: str | None = None

    def __post_init__(self) -> None:
        for mac in (self.mac, self.proposed):
            if mac is not None and not _MAC.fullmatch(mac):
                raise _invalid("tap", f"{mac!r} is no MAC (six lower-case hex pairs and colons)")


@dataclass(frozen=True, slots=True)
class Protected:
    """What no guest may claim besides what partitions own: addresses of the node, its routers and resolvers,
    networks of VPNs; MACs of the node.
    """

    networks: tuple[Network, ...] = ()
    macs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TapSpec:
    """A persistent tap: its name, who may open it, the MAC of the host's end, the bridge it is a port of
    (None: routed), what may leave it (None: everything).

    Of a routed tap, ``ipv6`` is the host's end; its network is routed to the guest, who has the first address
    of it. ``ipv4`` is the guest's own address.
    """

    name: str
    owner_uid: int
    mac: str
    bridge: str | None = None
    ipv6: IPv6Interface | None = None
    ipv4: IPv4Address | None = None
    guard: TapGuard | None = None

    def __post_init__(self) -> None:
        _check_link(self.name)
        if not _MAC.fullmatch(self.mac):
            raise _invalid(
                f"tap/{self.name}", f"{self.mac!r} is no MAC (six lower-case hex pairs and colons)"
            )
        if self.bridge and (self.ipv6 or self.ipv4):
            raise _invalid(f"tap/{self.name}", "a tap in a bridge has no addresses of its own")


@dataclass(frozen=True, slots=True)
class TunSpec:
    """A persistent tun: its name, who may open it, the host's addresses on it with their networks, and whether what
    leaves it must be of these networks.
    """

    name: str
    owner_uid: int
    ipv6: IPv6Interface | None = None
    ipv4: IPv4Interface | None = None
    guarded: bool = False

    def __post_init__(self) -> None:
        _check_link(self.name)


@dataclass(frozen=True, slots=True)
class BridgeSpec:
    """The bridge of the taps, made where it is missing, and the interfaces that belong into it.

    What a port has of addresses and routes moves to the bridge with it.  ``mac`` is that of a bridge without
    ports; with ports it takes that of the first, so that neighbours notice nothing.
    """

    name: str
    mac: str
    ports: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.name, *self.ports):
            _check_link(name)
        if self.name in self.ports:
            raise _invalid(f"bridge/{self.name}", "a bridge cannot be a port of itself")
        _unique("port", self.ports)


@dataclass(frozen=True, slots=True)
class MeshSpec:
    """The flat IPv4 space that nodes share by a VPN: a persistent tun that only root may attach a program to, the whole
    ``network``, this node's ``own`` part of it and, of that, the node's own ``address``; ``port`` is that of the program.

    ``taken``: somebody else's link has that name.  Nothing is put on it then, and nothing of the mesh passes it.
    """

    interface: str
    network: IPv4Network
    own: IPv4Network
    address: IPv4Address
    port: int = 655
    taken: bool = False

    def __post_init__(self) -> None:
        _check_link(self.interface)
        if not self.own.subnet_of(self.network):
            raise _invalid(f"mesh/{self.interface}", f"{self.own} is no part of {self.network}")
        if self.address not in self.own:
            raise _invalid(f"mesh/{self.interface}", f"{self.address} is not in {self.own}")


@dataclass(frozen=True, slots=True)
class RoutableIPv4:
    """An IPv4 address that the world reaches, with its network, and the gateway that its packets leave by."""

    interface: IPv4Interface
    gateway: IPv4Address

    def __post_init__(self) -> None:
        if self.gateway == self.interface.ip:
            raise _invalid(f"address/{self.interface.ip}", "an address cannot be its own gateway")


@dataclass(frozen=True, slots=True)
class PartitionNetwork:
    """The share of the network that one partition owns; ``uid`` is the user that its processes run as.

    ``ipv4`` is private: only that user reaches it.  ``public_ipv4`` takes the place of ``ipv6`` on a node
    without IPv6.  ``vpn_ipv4`` is of the node's part of the mesh, and on its interface.
    """

    id: str
    index: int
    uid: int
    tap: TapSpec | None = None
    ipv6: IPv6Interface | None = None
    ipv6_range: IPv6Network | None = None
    ipv4: IPv4Address | None = None
    tun: TunSpec | None = None
    public_ipv4: IPv4Address | None = None
    routable_ipv4: RoutableIPv4 | None = None
    vpn_ipv4: IPv4Address | None = None

    @property
    def stand_in_ipv4(self) -> IPv4Address | None:
        """What stands in for the IPv6 where there is none."""
        return self.public_ipv4 or (None if self.ipv6 else self.vpn_ipv4)

    @property
    def world_ipv4(self) -> tuple[IPv4Address, ...]:
        """The IPv4 addresses that others reach: that of an IPv4-only node, and the routable one."""
        routable = self.routable_ipv4.interface.ip if self.routable_ipv4 else None
        return tuple(one for one in (self.public_ipv4, routable) if one is not None)

    @property
    def reached_ipv6(self) -> tuple[IPv6Interface, ...]:
        """The IPv6 addresses that the host has for it: others reach them, its user alone sends from them."""
        ends = (self.ipv6, self.tun.ipv6 if self.tun else None)
        return tuple(one for one in ends if one is not None)

    @property
    def reached_ipv4(self) -> tuple[IPv4Address, ...]:
        """The IPv4 addresses that the host has for it, but the private one: likewise."""
        tun = self.tun.ipv4.ip if self.tun and self.tun.ipv4 else None
        return (*self.world_ipv4, *(one for one in (self.vpn_ipv4, tun) if one))

    def __post_init__(self) -> None:
        # the id becomes part of nft's text and of link aliases
        if not _PARTITION_ID.fullmatch(self.id):
            raise _invalid(
                f"partition/{self.id}", f"{self.id!r} is no partition id (letters, digits, '_', '-', '.')"
            )
        if self.uid <= 0:
            raise _invalid(f"partition/{self.id}", f"uid {self.uid} cannot be a partition's")


@dataclass(frozen=True, slots=True)
class ClosedPort:
    """A TCP port of this host that no partition's user may reach, at one address or (``::``, ``0.0.0.0``) at all of a
    family.
    """

    address: IPv4Address | IPv6Address
    port: int

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise _invalid(f"port/{self.port}", "a port is from 1 to 65535")


@dataclass(frozen=True, slots=True)
class RateLimit:
    """What a partition may exchange with other nodes each second, in each direction; not ``in_force``: it may be so limited
    one day.
    """

    bytes_per_second: int
    in_force: bool = False

    def __post_init__(self) -> None:
        # the kernel reckons in nanoseconds times bytes, in 64 bits (net/netfilter/nft_limit.c)
        if not 0 < self.bytes_per_second <= 12_500_000_000:
            raise _invalid("limit", f"{self.bytes_per_second} bytes a second cannot be a limit")


@dataclass(frozen=True, slots=True)
class HeldPort:
    """A TCP port of 127.0.0.1 and ::1 at which one user alone, besides root, may answer."""

    port: int
    uid: int

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise _invalid(f"port/{self.port}", "a port is from 1 to 65535")


@dataclass(frozen=True, slots=True)
class DesiredNetwork:
    """What the node's network should have.  Without partitions and interface: nothing that is ours.

    ``interface`` gets the partitions' addresses, ``ipv4_interface`` those of IPv4 where that is another one.
    ``bridge`` None: no bridge is made, one that is there may still be named by taps.  ``host_ipv6`` is the
    source hint for unbound IPv6 traffic; ``ownership`` False leaves only metering in the packet filter;
    ``packet_filter`` False leaves no packet filter at all; ``backend`` says what it is made of;
    ``local_source_table`` gives unbound clients of a partition on the same host the host's source address,
    ``host_ipv6`` or ``host_ipv4`` (of the mesh: its ``address``), where nothing does better;
    ``cgroup_bpf``: programs at the cgroup shall, if this kernel and our rights allow it;
    ``protected`` is what no guest behind a tap may claim;
    ``mesh`` is the VPN that nodes share;
    ``closed`` is a port that partitions' users cannot reach, ``held`` are ports of the loopback that have an owner;
    ``limits`` has those who are limited, or may become so, by their ids.
    """

    interface: str | None = None
    partitions: tuple[PartitionNetwork, ...] = ()
    host_ipv6: IPv6Address | None = None
    ownership: bool = True
    packet_filter: bool = True
    local_source_table: bool = False
    cgroup_bpf: bool = False
    host_ipv4: IPv4Address | None = None
    bridge: BridgeSpec | None = None
    ipv4_interface: str | None = None
    protected: Protected = Protected()
    backend: Backend = "nftables"
    closed: ClosedPort | None = None
    limits: Mapping[str, RateLimit] = field(default_factory=dict)
    mesh: MeshSpec | None = None
    held: tuple[HeldPort, ...] = ()

    def __post_init__(self) -> None:
        partitions = self.partitions
        _unique("partition", (one.id for one in partitions))
        _unique("uid", (one.uid for one in partitions))
        mesh = (self.mesh.interface,) if self.mesh else ()
        taps = (link.name for one in partitions for link in (one.tap, one.tun) if link)
        _unique("interface", (*mesh, *taps))
        own = () if self.host_ipv6 is None else (self.host_ipv6,)
        _unique("address", (*own, *(end.ip for one in partitions for end in one.reached_ipv6)))
        own4 = tuple(one for one in (self.host_ipv4, self.mesh.address if self.mesh else None) if one)
        _unique(
            "address",
            (*own4, *(ip for one in partitions for ip in (one.ipv4, *one.reached_ipv4) if ip)),
        )
        _unique("port", (one.port for one in self.held))
        _unique("range", (one.ipv6_range for one in partitions if one.ipv6_range))
        if self.interface is None and any(one.ipv6 or one.ipv4 or one.world_ipv4 for one in partitions):
            raise _invalid("interface", "addresses are wanted, but no interface to put them on")
        for one in partitions:
            if one.vpn_ipv4 and (self.mesh is None or one.vpn_ipv4 not in self.mesh.own):
                raise _invalid(f"address/{one.vpn_ipv4}", "is not of this node's part of a mesh")
        if self.local_source_table and not (self.host_ipv6 or self.host_ipv4 or self.mesh):
            raise _invalid("rule/localtab", "a local source table needs host_ipv6, host_ipv4 or a mesh")

    @property
    def filtered(self) -> bool:
        """Whether there shall be a packet filter."""
        return self.packet_filter and bool(self.partitions or self.mesh)

    @property
    def hooked(self) -> bool:
        """Whether there shall be programs at the cgroup."""
        return self.cgroup_bpf and self.ownership and bool(self.partitions)


def _check_link(name: str) -> None:
    if not _LINK_NAME.fullmatch(name) or name in {".", ".."}:
        raise _invalid(f"link/{name}", f"{name!r} cannot be the name of a network interface")


def _unique(resource: str, values: Iterable[object]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise NetplanError(
                "network.duplicate",
                f"{resource} {value} is wanted twice",
                resource=f"{resource}/{value}",
            )
        seen.add(value)


def _invalid(resource: str, message: str) -> NetplanError:
    return NetplanError("network.invalid", message, resource=resource)


def address_text(packed: bytes) -> str:
    """Return 4 or 16 packed bytes as text."""
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)


class Link(NamedTuple):
    """A network interface.  ``tap`` False with kind ``tun`` is a tun; ``tap_owner`` is -1 for one without
    owner and for what is neither; ``master`` 0 for none.  ``forwards``: see :data:`GUARDED_PORT`.
    """

    ifindex: int
    name: str
    kind: str
    alias: str
    master: int
    up: bool
    mac: str
    group: int
    tap: bool
    tap_owner: int
    forwards: int = 0


class Address(NamedTuple):
    """An address on a link: 4 or 16 packed bytes, IFA_PROTO, IFA_FLAGS."""

    link: int
    packed: bytes
    prefixlen: int
    protocol: int
    flags: int

    def text(self) -> str:
        """Return ``address/prefixlen``."""
        return f"{address_text(self.packed)}/{self.prefixlen}"


class Route(NamedTuple):
    """A route; ``destination``, ``gateway`` and ``source`` packed, empty for none (a default route has no
    destination).

    ``flags`` says whether the gateway counts as on-link although no prefix covers it (RTNH_F_ONLINK).
    """

    table: int
    kind: int
    protocol: int
    destination: bytes
    prefixlen: int
    gateway: bytes
    link: int
    metric: int
    source: bytes
    flags: int
    family: int = AF_INET6

    def text(self) -> str:
        """Return the destination as ``address/prefixlen`` or ``default``."""
        return f"{address_text(self.destination)}/{self.prefixlen}" if self.destination else "default"


class Rule(NamedTuple):
    """A routing rule: preference, table, who made it (FRA_PROTOCOL), and the one source address that it
    matches (empty: everything).
    """

    preference: int
    table: int
    protocol: int
    family: int = AF_INET6
    source: bytes = b""


class Moving(NamedTuple):
    """An address or route that moves to another link with its port, as the kernel wrote it.

    ``message`` is the payload of its netlink message. ``packed`` is the address, or the gateway of a route
    (empty for none); ``prefixlen`` is that of the address, and -1 for a route.
    """

    message: bytes
    text: str
    link: int
    family: int
    packed: bytes
    prefixlen: int
    protocol: int
    source: bytes = b""

    @property
    def is_route(self) -> bool:
        """Whether it is a route."""
        return self.prefixlen < 0


@dataclass(frozen=True, slots=True)
class FilterContents:
    """What is in the tables of our packet filter, by name (:func:`netplan.nfnetlink.full_name`).

    ``elements`` has those of the sets and maps that can be read, written as nft does.  ``intact``: the chains
    are as we left them, and as they are wanted now; then ``digests`` says what they and the sets are, as of
    the nft ``generation`` (0: not known).  ``strange_limits`` are not what their names say.
    """

    sets: frozenset[str] = frozenset()
    maps: frozenset[str] = frozenset()
    chains: frozenset[str] = frozenset()
    counters: frozenset[str] = frozenset()
    elements: Mapping[str, frozenset[str]] = field(default_factory=dict)
    intact: bool = False
    generation: int = 0
    families: frozenset[str] = frozenset()
    digests: Mapping[str, str] = field(default_factory=dict)
    limits: frozenset[str] = frozenset()
    strange_limits: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class FilterState:
    """What is loaded of our packet filter.

    ``wanted`` is the fingerprint of the filter it was loaded for ("" when there is none), ``drift`` what was
    changed since by somebody else; ``contents`` are read only when they are needed.  ``as_of`` is the nft
    generation at which it was found to be as wanted (0: it was not).
    """

    loaded: bool = False
    wanted: str = ""
    drift: tuple[str, ...] = ()
    as_of: int = 0
    contents: FilterContents = field(default_factory=FilterContents)


@dataclass(frozen=True, slots=True)
class HookState:
    """What there is of our programs at the cgroup.

    ``version`` names those in force ("" when there are none, or not all), ``contents`` is the fingerprint of what
    their maps hold, ``leftover`` names other directories with pins of ours. ``refused`` says why there can be none.
    ``everywhere``: what comes in is checked in other network namespaces, too (:mod:`netplan.bpf_programs`).
    """

    version: str = ""
    contents: str = ""
    leftover: tuple[str, ...] = ()
    refused: str = ""
    everywhere: bool = False


@dataclass(frozen=True, slots=True)
class ObservedNetwork:
    """What the kernel has, as far as :func:`netplan.plan.plan` needs it.

    ``routes`` are those with our mark, the local ones to ``lo``, and those of the main table that a plan looks
    at. ``moving`` is what the ports of the bridge, or a bridge that goes, have of addresses and routes.
    ``sysctls`` are the settings that a plan may change (absent: not in this kernel), ``notes`` the names of
    those that we changed, as our table says; ``legacy`` and ``legacy_notes`` say the same of iptables.
    ``address_marks``: the kernel keeps IFA_PROTO.  ``mesh_ipv6``: IPv6 is on at the interface of the mesh.
    """

    links: Mapping[str, Link]
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    rules: tuple[Rule, ...] = ()
    moving: tuple[Moving, ...] = ()
    sysctls: Mapping[str, str] = field(default_factory=dict)
    notes: frozenset[str] = frozenset()
    address_marks: bool = True
    mesh_ipv6: bool = False
    filter: FilterState = field(default_factory=FilterState)
    hooks: HookState = field(default_factory=HookState)
    legacy: FilterState = field(default_factory=FilterState)
    legacy_notes: frozenset[str] = frozenset()
