"""What a partition may exchange with other nodes each second, while it is limited: a part of the packet filter.  Pure.

One named limit for each direction, which all that is the partition's leads to: its addresses, its user where it uses the
host's own address, its tap and tun.  Who is limited is a matter of elements alone: the rules are there as long as anybody may
become so, and cost others a look-up in an empty map.  A bridged tap has limits of its own, since the tables of two families
share none.

The rules stand before the meters, so what is dropped is not metered; but for taps and tuns, which the kernel counts by itself.
What passes ``lo`` does not come here.

A limit of bytes is a bucket that holds what one second and the burst allow (nft_limit_init in net/netfilter/nft_limit.c).  The
burst is more than the largest packet: an aggregate of segmentation offload that fits into no bucket would never pass.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from netplan.model import PartitionNetwork, RateLimit
from netplan.ruleset import Part, refused, text

RULE = "quota"
"""What is dropped is counted as."""

COUNTED = "refused"
"""What the names of the counters of what was dropped start with; the rule and the user's number follow."""

BURST = 131072
"""Bytes; see above."""

PREFIX = "rate"
"""What the names of limits start with; partition, direction and bytes a second follow."""

_DIRECTIONS = ("in", "out")
_MOST_TAPS = 4096
_PRIORITIES = {
    "out": "prerouting priority -309",
    "in": "postrouting priority 310",
}  # right behind the guards, and last


class Limit(NamedTuple):
    """A named limit."""

    partition: str
    direction: str
    bytes_per_second: int


def limit_name(limit: Limit) -> str:
    """Return its name, which says all of it: with another rate it is another limit.  No partition id has a slash."""
    return f"{PREFIX}/{limit.partition}/{limit.direction}/{limit.bytes_per_second}"


def parse(name: str) -> Limit | None:
    """Read such a name; None where it is none of ours."""
    match name.split("/"):
        case [prefix, partition, direction, rate] if prefix == PREFIX and rate.isdecimal():
            return Limit(partition, direction, int(rate))
    return None


class Ways(NamedTuple):
    """The rules that stand before the meters of addresses, before that of ranges, and behind all, by IP version and direction
    (``6_out``).  What an address has been metered for does not come to the ranges, whose look-ups cost most.
    """

    before: Mapping[str, Sequence[str]]
    ranges: Mapping[str, Sequence[str]]
    behind: Mapping[str, Sequence[str]]


NO_WAYS = Ways({}, {}, {})


def ways(partitions: Sequence[PartitionNetwork], limits: Mapping[str, RateLimit]) -> Ways:
    """Return the rules that lead remote traffic to the limits."""
    if not limits:
        return NO_WAYS
    has_ranges = any(one.ipv6_range for one in partitions if one.id in limits)
    before: dict[str, tuple[str, ...]] = {}
    ranges: dict[str, tuple[str, ...]] = {}
    behind: dict[str, tuple[str, ...]] = {}
    for direction, side in (("in", "daddr"), ("out", "saddr")):
        before[f"6_{direction}"] = (_rule(f"ip6 {side}", "6", direction),)
        before[f"4_{direction}"] = (_rule(f"ip {side}", "4", direction),)
        if has_ranges:
            ranges[f"6_{direction}"] = (_rule(f"ip6 {side}", "range6", direction),)
        for version in "64":
            behind[f"{version}_{direction}"] = (_rule("meta skuid", "user", direction),)
    return Ways(before, ranges, behind)


def _rule(key: str, kind: str, direction: str) -> str:
    return f"limit name {key} map @limited_{kind}_{direction} counter name {key} map @over_{kind} drop"


def rate_limits(partitions: Sequence[PartitionNetwork], limits: Mapping[str, RateLimit]) -> tuple[Part, ...]:
    """Return the maps that lead to limits, and the chains of taps and tuns; none where nobody can be limited."""
    of = [one for one in partitions if one.id in limits]
    if not of:
        return ()
    bridged = [one for one in of if one.tap and one.tap.bridge]
    parts = [_addresses(of, limits), _links("inet", of, limits)]
    if bridged:
        parts.append(_links("bridge", bridged, limits))
    return tuple(part for part in parts if part is not None)


_TYPES = {"6": "ipv6_addr", "range6": "ipv6_addr", "4": "ipv4_addr", "user": "uid"}
_FLAGS = {"range6": "; flags interval"}


def _addresses(of: Sequence[PartitionNetwork], limits: Mapping[str, RateLimit]) -> Part:
    kinds = [kind for kind in _TYPES if kind != "range6" or any(one.ipv6_range for one in of)]
    maps: dict[str, str] = {}
    elements: dict[str, list[str]] = {}
    for kind in kinds:
        end = _FLAGS.get(kind, "")
        maps[f"over_{kind}"] = f"type {_TYPES[kind]} : counter{end}"
        elements[f"over_{kind}"] = [f'{key} : "{_counter(one)}"' for one in of for key in _keys(one, kind)]
        for direction in _DIRECTIONS:
            name = f"limited_{kind}_{direction}"
            maps[name] = f"type {_TYPES[kind]} : limit{end}"
            elements[name] = [
                f'{key} : "{limit}"'
                for one, limit in _in_force(of, limits, direction)
                for key in _keys(one, kind)
            ]
    return Part(
        sets={},
        maps=maps,
        elements=elements,
        counters=[_counter(one) for one in of],
        chains={},
        hooks={},
        limits=_names(of, limits),
    )


def _links(family: str, of: Sequence[PartitionNetwork], limits: Mapping[str, RateLimit]) -> Part | None:
    """Return what limits taps and tuns that the hooks of a family see."""
    links = {one.id: names for one in of if (names := tuple(_links_of(one, family)))}
    if not links:
        return None
    maps = {f"limited_link_{direction}": "type ifname : limit" for direction in _DIRECTIONS}
    elements = {
        f"limited_link_{direction}": [
            f'"{name}" : "{limit}"'
            for one, limit in _in_force(of, limits, direction)
            for name in links.get(one.id, ())
        ]
        for direction in _DIRECTIONS
    }
    chains = {
        f"limit_link_{direction}": (
            f"limit name {end} map @limited_link_{direction} add @{refused(RULE)} {{ {end} counter }} drop",
        )
        for direction, end in (("in", "oifname"), ("out", "iifname"))
    }
    return Part(
        sets={refused(RULE): f"type ifname; size {_MOST_TAPS}; flags dynamic"},
        maps=maps,
        elements=elements,
        counters=(),
        chains=chains,
        hooks={f"limit_link_{direction}": hook for direction, hook in _PRIORITIES.items()},
        family=family,
        dynamic=frozenset((refused(RULE),)),
        # those of inet are the ones that the addresses lead to
        limits=_names(of, limits) if family != "inet" else (),
    )


def _links_of(one: PartitionNetwork, family: str) -> Iterator[str]:
    if one.tap and bool(one.tap.bridge) == (family == "bridge"):
        yield one.tap.name
    if one.tun and family == "inet":
        yield one.tun.name


def _keys(one: PartitionNetwork, kind: str) -> Iterator[str]:
    """Yield what of a partition is metered, of one kind, as nft writes it."""
    if kind == "user":
        yield str(one.uid)
    elif kind == "6" and one.ipv6:
        yield text(one.ipv6)
    elif kind == "range6" and one.ipv6_range:
        yield text(one.ipv6_range)
    elif kind == "4":
        yield from (text(address) for address in (one.ipv4, *one.world_ipv4, one.vpn_ipv4) if address)


def _counter(one: PartitionNetwork) -> str:
    return f"{COUNTED}/{RULE}/{one.uid}"


def _in_force(
    of: Iterable[PartitionNetwork], limits: Mapping[str, RateLimit], direction: str
) -> Iterator[tuple[PartitionNetwork, str]]:
    for one in of:
        limit = limits[one.id]
        if limit.in_force:
            yield one, limit_name(Limit(one.id, direction, limit.bytes_per_second))


def _names(of: Sequence[PartitionNetwork], limits: Mapping[str, RateLimit]) -> tuple[str, ...]:
    return tuple(name for direction in _DIRECTIONS for _, name in _in_force(of, limits, direction))


def changes(wanted: Iterable[str], loaded: Iterable[str]) -> Iterator[str]:
    """Yield what is about to change, for the reason of a plan; names of limits of all families."""
    before, after = ({one[0]: one for one in map(parse, names) if one} for names in (loaded, wanted))
    for partition in sorted(before.keys() | after.keys()):
        new = after.get(partition)
        if new is None:
            yield f"{partition} is not to be limited any more"
        elif partition not in before or before[partition].bytes_per_second != new.bytes_per_second:
            yield f"{partition} is to be limited to {8 * new.bytes_per_second} bit/s each way"
