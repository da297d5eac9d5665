"""What may leave a tap: the guard of guests' frames.  Pure.

A tap whose partition's network says so (:class:`netplan.model.TapGuard`) sends frames of one MAC, and of addresses that
are its own (``strict``), or of none but what others own (``lan``).  The rules are in :mod:`netplan.tap_rules`, the
same for any number of taps; here is what fills their sets.

The kernel notes the first MAC of each tap in sets of its own, and keeps it until :func:`netplan.learned.forget`.
"""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import NamedTuple

from netplan.model import Network, PartitionNetwork, Protected, TapGuard, TapSpec
from netplan.once import once, once_each
from netplan.ruleset import Part
from netplan.tap_rules import HOOKS, STATIC, chains, counting_sets, learned_sets, static_sets

_Range = tuple[int, int, str]
"""First and last address of a network as numbers, the last one negative so that the larger of two that begin alike
comes first; and how nft writes it as an element of a set of ranges.
"""


@once
def tap_guard(partitions: Sequence[PartitionNetwork], protected: Protected) -> tuple[Part, ...]:
    """Return the sets and chains that hold each tap to what is its own; none when no tap is guarded."""
    guarded = [one for one in partitions if one.tap and one.tap.guard]
    bridged = [one for one in guarded if one.tap and one.tap.bridge]
    routed = [one for one in guarded if one.tap and not one.tap.bridge]
    if not guarded:
        return ()
    taken = _taken(partitions, protected)
    found = [_part("bridge", bridged, taken)] if bridged else []
    found += [_part(family, routed, taken) for family in ("inet", "arp") if routed]
    return tuple(found)


class _Taken(NamedTuple):
    """What nobody may claim but those whose own it is, as elements."""

    four: list[str]
    six: list[str]
    macs: list[str]


class _Elements(NamedTuple):
    """The elements of one tap by set, and what it takes from all others."""

    of: dict[str, list[str]]
    four: list[_Range]
    six: list[_Range]
    macs: list[str]


def _part(family: str, partitions: Sequence[PartitionNetwork], taken: _Taken) -> Part:
    static, learned, counting = static_sets(family), learned_sets(family), counting_sets(family)
    elements: dict[str, list[str]] = {name: [] for name in STATIC}
    for one in partitions:
        for name, values in _elements(one).of.items():
            elements[name] += values
    elements |= {"taken4": taken.four, "taken6": taken.six, "taken_macs": taken.macs}
    return Part(
        sets={**static, **learned, **counting},
        maps={},
        elements={name: elements[name] for name in static},
        counters=(),
        chains=chains(family),
        hooks=HOOKS[family],
        family=family,
        dynamic=frozenset({*learned, *counting}),
    )


@once_each
def _elements(one: PartitionNetwork) -> _Elements:
    """Return what one partition has; of one without a guarded tap only what it takes from others."""
    of: dict[str, list[str]] = {}
    addresses: list[IPv4Address | IPv6Address] = [
        *(end.ip for end in one.reached_ipv6),
        *one.reached_ipv4,
        *([one.ipv4] if one.ipv4 else []),
    ]
    networks: list[Network] = [
        *([one.ipv6_range] if one.ipv6_range else []),
        *(ip_network(ip) for ip in addresses),
    ]
    if one.tun:
        networks += [end.network for end in (one.tun.ipv6, one.tun.ipv4) if end]
    if one.tun:
        networks += [end.network for end in (one.tun.ipv4, one.tun.ipv6) if end]
    macs: list[str] = []
    tap = one.tap
    if tap is not None:
        macs.append(tap.mac)
        if tap.ipv6:
            networks.append(tap.ipv6.network)
        if tap.ipv4:
            networks.append(ip_network(tap.ipv4))
        if tap.guard:
            networks += tap.guard.own
            macs += [mac for mac in (tap.guard.mac, tap.guard.proposed) if mac]
            of = _own(tap, tap.guard)
    return _Elements(
        of,
        [_range(each) for each in networks if each.version == 4],
        [_range(each) for each in networks if each.version == 6],
        macs,
    )


def _own(tap: TapSpec, guard: TapGuard) -> dict[str, list[str]]:
    name = f'"{tap.name}"'
    four = _apart(_range(each) for each in guard.own if each.version == 4)
    six = _apart(_range(each) for each in guard.own if each.version == 6)
    return {
        "guarded_taps": [name],
        "strict_taps": [name] if guard.strict else [],
        "silent4": [name] if guard.strict and not four else [],
        "silent6": [name] if guard.strict and not six else [],
        "fixed_mac_taps": [name] if guard.mac else [],
        "fixed_macs": [f"{name} . {_number(guard.mac)}"] if guard.mac else [],
        "proposed_macs": [f"{name} . {_number(guard.proposed)}"] if guard.proposed and not guard.mac else [],
        # of concatenations, a single address is no range (netplan.elements)
        "own4": [f"{name} . {text.removesuffix('/32')}" for _, _, text in four],
        "own6": [f"{name} . {text}" for _, _, text in six],
        "gateways6": [_hex(tap.ipv6.ip)] if tap.ipv6 else [],
    }


def _taken(partitions: Sequence[PartitionNetwork], protected: Protected) -> _Taken:
    each = [_elements(one) for one in partitions]
    four = [_range(one) for one in protected.networks if one.version == 4]
    six = [_range(one) for one in protected.networks if one.version == 6]
    for one in each:
        four += one.four
        six += one.six
    macs = {*protected.macs, *(mac for one in each for mac in one.macs)}
    return _Taken([text for _, _, text in _apart(four)], [text for _, _, text in _apart(six)], sorted(macs))


def _range(network: Network) -> _Range:
    first, last = network.network_address, network.broadcast_address
    if isinstance(first, IPv4Address):
        return int(first), -int(last), str(network)
    text = _hex(first) if first == last else f"{_hex(first)}-{_hex(last)}"
    return int(first), -int(last), text


_LAST = frozenset((2**32 - 1, 2**128 - 1))


def _apart(ranges: Iterable[_Range]) -> list[_Range]:
    """Leave out what lies in another one: a set of ranges takes none that meet, and of networks one of two lies in
    the other where they do.
    """
    found: list[_Range] = []
    end = -1
    for one in sorted(set(ranges)):
        # one that ends with the very last address has no end that could be written behind it, and is nobody's source
        if -one[1] > end and -one[1] not in _LAST:
            found.append(one)
            end = -one[1]
    return found


def _hex(address: IPv4Address | IPv6Address) -> str:
    """Return an address as nft writes a raw field."""
    return f"0x{address.packed.hex()}"


def _number(mac: str) -> str:
    return f"0x{mac.replace(':', '')}"
