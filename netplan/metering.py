"""What each address carried: the metering part of the packet filter.  Pure.

The hooks lie behind those of other filters (output at 300, input at 10), and what :mod:`netplan.ownership` lets
pass is sent here by it, so a refused packet is billed to nobody.  Named counters behind maps from address to
counter cost the same for 1 and for 500 partitions (facts/packets.md, A).  Traffic between addresses of this host
runs over ``lo``, passes both hooks and has counters of its own (scope ``local``).

What a partition's user exchanges with other hosts from the host's own address is counted by that user, in sets
that have a counter for those who did.  On input that is the socket which early demultiplexing has found
(net/ipv4/ip_input.c, ip_rcv_finish_core): TCP but for listeners, and UDP that is connected and the first of its slot.
The programs at the cgroup see the rest as well (:mod:`netplan.bpf_programs`); where they count, this is not looked at.
"""

from collections.abc import Iterator, Sequence
from itertools import product

from netplan.model import PartitionNetwork
from netplan.once import once_each
from netplan.rate_limits import NO_WAYS, Ways
from netplan.ruleset import Part, text

SCOPES = ("remote", "local")
DIRECTIONS = ("in", "out")
_WAYS = tuple(product(SCOPES, DIRECTIONS))  # each address has a counter for each, in this order

_TYPE = {
    "ipv6": "type ipv6_addr : counter",
    "range": "type ipv6_addr : counter; flags interval",
    "ipv4": "type ipv4_addr : counter",
    "public4": "type ipv4_addr : counter",
    "vpn4": "type ipv4_addr : counter",
    "routable4": "type ipv4_addr : counter",
}
_VERSION = {"ipv6": "6", "range": "6", "ipv4": "4", "public4": "4", "vpn4": "4", "routable4": "4"}
SHARED = "shared_"
"""What the names of the sets start with that count what uses the host's own address; ``ipv6_in`` follows."""

TRAFFIC = "traffic/"
"""What the names of the counters of addresses start with."""

_MOST_USERS = 4096
IN, OUT = "priority 10", "priority 300"
_HOOKS = {"meter_in": f"input {IN}", "meter_out": f"output {OUT}"}


def counter_name(partition: str, family: str, scope: str, direction: str, address: str) -> str:
    """Return the counter's name; no partition id has a slash, so it says exactly what it counts.

    An address that changes gets a counter of its own: it takes nothing along of what another one carried. Names of nft have
    no colons.
    """
    return f"{TRAFFIC}{partition}/{family}/{scope}/{direction}/{address.replace(':', '.')}"


def address_of(family: str, named: str) -> str:
    """Return the address as it stands at the end of such a name."""
    return named.replace(".", ":") if _VERSION.get(family) == "6" else named


def metering(
    partitions: Sequence[PartitionNetwork],
    first: Sequence[str] = (),
    *,
    alone: bool = True,
    limits: Ways = NO_WAYS,
) -> Part:
    """Return the counters of every address of every partition, and the maps and chains that lead there; not
    ``alone``: no hooks of their own.  On output, rules ``first`` come before them; ``limits`` stand where remote traffic is
    metered.
    """
    owned: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {}
    for one in partitions:
        for family, meters in _meters(one).items():
            owned.setdefault(family, []).append(meters)
    maps: dict[str, str] = {}
    elements: dict[str, list[str]] = {}
    counters: list[str] = []
    for family, meters_of in owned.items():
        for place, (scope, direction) in enumerate(_WAYS):
            counters += (names[place] for names, _ in meters_of)
            which = f"{family}_{scope}_{direction}"
            maps[which] = _TYPE[family]
            elements[which] = [values[place] for _, values in meters_of]
    sets = {"metered": "type uid"}
    sets |= {
        f"{SHARED}ipv{version}_{direction}": f"type uid; size {_MOST_USERS}; flags dynamic"
        for version, direction in product("64", DIRECTIONS)
    }
    hooks = _HOOKS if alone else {}
    elements["metered"] = [str(one.uid) for one in partitions]
    chains = _chains([one for one in _TYPE if one in owned], limits)
    chains["meter_out"] = [*first, *chains["meter_out"]]
    return Part(sets, maps, elements, counters, chains, hooks)


@once_each
def _meters(partition: PartitionNetwork) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the counters and the elements of each family, by the place of scope and direction in ``_WAYS``."""
    found = {}
    for family, address in addresses(partition):
        names = tuple(counter_name(partition.id, family, *way, address) for way in _WAYS)
        found[family] = (names, tuple(f'{address} : "{name}"' for name in names))
    return found


def addresses(partition: PartitionNetwork) -> Iterator[tuple[str, str]]:
    """Yield family and address for each address that is metered."""
    if partition.ipv6:
        yield "ipv6", text(partition.ipv6)
    if partition.ipv6_range:
        yield "range", text(partition.ipv6_range)
    if partition.ipv4:
        yield "ipv4", text(partition.ipv4)
    if partition.public_ipv4:
        yield "public4", text(partition.public_ipv4)
    if partition.vpn_ipv4:
        yield "vpn4", text(partition.vpn_ipv4)
    if partition.routable_ipv4:
        yield "routable4", text(partition.routable_ipv4.interface.ip)


def _chains(families: Sequence[str], limits: Ways) -> dict[str, list[str]]:
    """Return one chain per scope, direction and IP version: the first map that knows the address ends the
    search.
    """
    chains = {}
    for direction, end, side in (("in", "iif", "daddr"), ("out", "oif", "saddr")):
        for scope in SCOPES:
            for version, protocol in (("6", "ip6"), ("4", "ip")):
                way = f"{version}_{direction}" if scope == "remote" else ""
                chains[f"meter{version}_{scope}_{direction}"] = [
                    *(["tcp flags & rst == rst accept"] if scope == "local" else []),
                    *limits.before.get(way, ()),
                    *(
                        rule
                        for family in families
                        if _VERSION[family] == version
                        for rule in (
                            *(limits.ranges.get(way, ()) if family == "range" else ()),
                            f"counter name {protocol} {side} map @{family}_{scope}_{direction} accept",
                        )
                    ),
                    *limits.behind.get(way, ()),
                    *([_shared(version, direction)] if scope == "remote" else []),
                ]
        for version in "64":
            chains[f"meter{version}_{direction}"] = [
                f"{end} 1 goto meter{version}_local_{direction}",
                f"goto meter{version}_remote_{direction}",
            ]
        chains[f"meter_{direction}"] = [
            f"meta nfproto ipv6 goto meter6_{direction}",
            f"meta nfproto ipv4 goto meter4_{direction}",
        ]
    return chains


def _shared(version: str, direction: str) -> str:
    return f"meta skuid @metered add @{SHARED}ipv{version}_{direction} {{ meta skuid counter }}"
