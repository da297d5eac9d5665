"""The nouns of the node's network: what is wanted, what was seen, and the operations between them.  No I/O.

Wanted things are dataclasses that refuse nonsense when they are made.  Seen things come in thousands and are
compared, not kept, so they are named tuples of plain integers and bytes: making 500 ``ipaddress`` objects
costs more than reading the kernel.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Interface, IPv6Network
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Literal, NamedTuple

from netplan.errors import NetplanError

PROTOCOL_MARK = 112
"""The address protocol (IFA_PROTO) and route protocol of what we made; rt_protos of iproute2 leaves 112 free.

Kernels before 5.18 ignore IFA_PROTO: there every pass would find our addresses unmarked.  A fallback is still
to come.
"""

ALIAS_MARK = "partitiond:"
"""What the alias of each of our links starts with; the partition's id follows."""

GROUP_GOING = 1 << 30
"""Links of ours in a group from here on are being removed together."""

_PARTITION_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_LINK_NAME = re.compile(r"[A-Za-z0-9_.-]{1,15}")  # IFNAMSIZ is 16 with the final NUL
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")

Action = Literal["create", "change", "remove"]


@dataclass(frozen=True, slots=True)
class TapSpec:
    """A persistent tap: its name, who may open it, the MAC of the host's end, the bridge it is a port of
    (None: routed).
    """

    name: str
    owner_uid: int
    mac: str
    bridge: str | None = None

    def __post_init__(self) -> None:
        if not _LINK_NAME.fullmatch(self.name) or self.name in {".", ".."}:
            raise _invalid(f"tap/{self.name}", f"{self.name!r} cannot be the name of a network interface")
        if not _MAC.fullmatch(self.mac):
            raise _invalid(
                f"tap/{self.name}", f"{self.mac!r} is no MAC (six lower-case hex pairs and colons)"
            )


@dataclass(frozen=True, slots=True)
class PartitionNetwork:
    """The share of the network that one partition owns; ``uid`` is the user that its processes run as."""

    id: str
    index: int
    uid: int
    tap: TapSpec | None = None
    ipv6: IPv6Interface | None = None
    ipv6_range: IPv6Network | None = None
    ipv4: IPv4Address | None = None

    def __post_init__(self) -> None:
        # the id becomes part of nft's text and of link aliases
        if not _PARTITION_ID.fullmatch(self.id):
            raise _invalid(
                f"partition/{self.id}", f"{self.id!r} is no partition id (letters, digits, '_', '-', '.')"
            )
        if self.uid <= 0:
            raise _invalid(f"partition/{self.id}", f"uid {self.uid} cannot be a partition's")


@dataclass(frozen=True, slots=True)
class DesiredNetwork:
    """What the node's network should have.  Without partitions and interface: nothing that is ours.

    ``host_ipv6`` is the source hint for unbound IPv6 traffic; ``ownership`` False leaves only metering in the
    packet filter; ``packet_filter`` False leaves no packet filter at all; ``local_source_table`` gives
    unbound clients of a partition on the same host the host's source address (where cgroup BPF is not there
    to do better).
    """

    interface: str | None = None
    partitions: tuple[PartitionNetwork, ...] = ()
    host_ipv6: IPv6Address | None = None
    ownership: bool = True
    packet_filter: bool = True
    local_source_table: bool = False

    def __post_init__(self) -> None:
        partitions = self.partitions
        _unique("partition", (one.id for one in partitions))
        _unique("uid", (one.uid for one in partitions))
        _unique("tap", (one.tap.name for one in partitions if one.tap))
        own = () if self.host_ipv6 is None else (self.host_ipv6,)
        _unique("address", (*own, *(one.ipv6.ip for one in partitions if one.ipv6)))
        _unique("address", (one.ipv4 for one in partitions if one.ipv4))
        _unique("range", (one.ipv6_range for one in partitions if one.ipv6_range))
        if self.interface is None and any(one.ipv6 or one.ipv4 for one in partitions):
            raise _invalid("interface", "addresses are wanted, but no interface to put them on")
        if self.local_source_table and self.host_ipv6 is None:
            raise _invalid("rule/localtab", "a local source table needs host_ipv6")

    @property
    def filtered(self) -> bool:
        """Whether there shall be a packet filter."""
        return self.packet_filter and bool(self.partitions)


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
    """A network interface.  ``tap_owner`` is -1 for a tap without owner and for what is no tap; ``master`` 0
    for none.
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
    """An IPv6 route; ``destination``, ``gateway`` and ``source`` packed, empty for none (a default route has
    no destination).

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

    def text(self) -> str:
        """Return the destination as ``address/prefixlen`` or ``default``."""
        return f"{address_text(self.destination)}/{self.prefixlen}" if self.destination else "default"


class Rule(NamedTuple):
    """An IPv6 routing rule that matches everything: preference, table, and who made it (FRA_PROTOCOL)."""

    preference: int
    table: int
    protocol: int


@dataclass(frozen=True, slots=True)
class FilterContents:
    """What is in the table of our packet filter, by name.

    ``elements`` has those of the sets and maps that are as we left them, written as nft does.  ``intact``:
    the chains are as we left them, and as they are wanted now.
    """

    sets: frozenset[str] = frozenset()
    maps: frozenset[str] = frozenset()
    chains: frozenset[str] = frozenset()
    counters: frozenset[str] = frozenset()
    elements: Mapping[str, frozenset[str]] = field(default_factory=dict)
    intact: bool = False


@dataclass(frozen=True, slots=True)
class FilterState:
    """What is loaded of our packet filter.

    ``wanted`` is the fingerprint of the filter it was loaded for ("" when there is none), ``drift`` what was
    changed since by somebody else; ``contents`` are read only when they are needed.
    """

    loaded: bool = False
    wanted: str = ""
    drift: tuple[str, ...] = ()
    contents: FilterContents = field(default_factory=FilterContents)


@dataclass(frozen=True, slots=True)
class ObservedNetwork:
    """What the kernel has, as far as :func:`netplan.plan.plan` needs it.

    ``routes`` are those with our mark, the local ones to ``lo``, and the default routes of the main table.
    ``nonlocal_bind_note``: our table says that ``ip_nonlocal_bind`` was off before we came.
    """

    links: Mapping[str, Link]
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    rules: tuple[Rule, ...] = ()
    nonlocal_bind: bool = False
    nonlocal_bind_note: bool = False
    filter: FilterState = field(default_factory=FilterState)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One step of a plan.  The strings are for people; subclasses carry what :mod:`netplan.apply` needs."""

    id: str
    action: Action
    partition: str | None = None
    before: str | None = None
    after: str | None = None
    reason: str

    @property
    def resource(self) -> str:
        """The kind of thing: what stands before the first slash of the id."""
        return self.id.partition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedOperation(Operation):
    """Something that must not be done; it stays in the plan until a person resolves it."""

    error: NetplanError


@dataclass(frozen=True, slots=True, kw_only=True)
class SysctlOperation(Operation):
    """``ip_nonlocal_bind`` on or off; ``note``: with a note in our table that it was off before, or taking
    that note away.
    """

    enable: bool
    note: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TapOperation(Operation):
    """A tap to be made (or given to ``owner``, when not None), and then set up; or removed."""

    name: str
    owner: int | None = None
    alias: str | None = None
    mac: str | None = None
    master: int | None = None
    up: bool = False
    group: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressOperation(Operation):
    """Addresses to take away first, then the one to set (None: none)."""

    delete: tuple[Address, ...] = ()
    add: Address | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteOperation(Operation):
    """A route to set, or one to take away."""

    delete: Route | None = None
    add: Route | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleOperation(Operation):
    """Routing rules to make, then rules to take away, in this order."""

    add: tuple[Rule, ...] = ()
    delete: tuple[Rule, ...] = ()
