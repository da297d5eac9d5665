"""Which address is whose: what was remembered, else what slapos.core had chosen, else what follows from the index. Pure.

Promises: what a partition has stays its own while it fits the networks that the configuration and the node's own address
give, whatever else comes to the node or goes from it; no two partitions get overlapping addresses or ranges; what a new
partition gets does not depend on those after it. What fits no longer is derived anew, and a warning says so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import TYPE_CHECKING, Any

from netplan import addresses
from netplan.addresses import Occupied
from netplan.errors import NetplanError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_NAMED = 5  # partitions in a warning that are named one by one


@dataclass(frozen=True, slots=True)
class Rules:
    """What the configuration and the node's own addresses say about those of the partitions.

    ``partitions`` are the ids by index. ``base`` is the node's own IPv6, None without one: then nobody has any.
    ``partition_network`` is that of the IPv4 addresses that stand in for IPv6, None where none do.
    ``tap_gateway`` is the address of ``tap_gateway_interface``, None where taps get no IPv4. ``taken`` are IPv4 addresses
    that something else on this node uses, ``elsewhere`` IPv4 networks that the node uses or routes elsewhere: they turn
    away new choices, never old ones.
    """

    partitions: tuple[str, ...]
    base: IPv6Interface | None
    prefixshift: int
    ipv4_network: IPv4Network
    partition_network: IPv4Network | None = None
    ipv6_range: bool = True
    tap_ipv6: bool = False
    tap_gateway: IPv4Interface | None = None
    tun_ipv6: bool = False
    tun_ipv4: bool = False
    taken: frozenset[IPv4Address] = frozenset()
    elsewhere: tuple[IPv4Network, ...] = ()


@dataclass(frozen=True, slots=True)
class Chosen:
    """The addresses of a partition; None for what does not apply.

    ``tap_ipv6``, ``tun_ipv6`` and ``tun_ipv4`` are the host's ends with their networks, ``tap_ipv4`` is the guest's.
    """

    ipv4: IPv4Address
    ipv6: IPv6Interface | None = None
    ipv6_range: IPv6Network | None = None
    tap_ipv6: IPv6Interface | None = None
    tap_ipv4: IPv4Address | None = None
    tun_ipv6: IPv6Interface | None = None
    tun_ipv4: IPv4Interface | None = None
    public_ipv4: IPv4Address | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """What is remembered of a partition: None stands for what follows from its index and the networks alone.

    That of ``tap_ipv4`` and ``tun_ipv4`` is never None where they apply: it hangs on the gateway's own address and on
    the number of partitions.
    """

    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None
    ipv6_range: IPv6Network | None = None
    tap_ipv6: IPv6Interface | None = None
    tap_ipv4: IPv4Address | None = None
    tun_ipv6: IPv6Interface | None = None
    tun_ipv4: IPv4Interface | None = None
    public_ipv4: IPv4Address | None = None


NATURAL = Kept()


def _same(value: Any) -> Any:
    return value


def _nothing(_index: int) -> None:
    return None


FIELDS = tuple(one.name for one in dataclasses.fields(Kept))
PARSERS: Mapping[str, Callable[[str], object]] = {
    "ipv4": IPv4Address,
    "ipv6": IPv6Address,
    "ipv6_range": IPv6Network,
    "tap_ipv6": IPv6Interface,
    "tap_ipv4": IPv4Address,
    "tun_ipv6": IPv6Interface,
    "tun_ipv4": IPv4Interface,
    "public_ipv4": IPv4Address,
}


@dataclass(frozen=True, slots=True)
class Choice:
    """The outcome: the addresses of each partition, what to remember of it, and what an operator should know.

    ``rules`` and ``remembered`` are what it was made of.
    """

    rules: Rules
    remembered: Mapping[str, Kept]
    chosen: Mapping[str, Chosen]
    kept: Mapping[str, Kept]
    warnings: tuple[str, ...] = ()


def choose(rules: Rules, remembered: Mapping[str, Kept], found: Mapping[str, Kept] | None = None) -> Choice:
    """Choose for all partitions; ``found`` is what slapos.core left.

    Raises NetplanError ``network.prefix_too_small`` or ``network.address_collision`` when there is no room.
    """
    kinds = _kinds(rules)
    old = {name: kept for name in rules.partitions if (kept := remembered.get(name, (found or {}).get(name)))}
    values: dict[str, dict[str, Any]] = {name: {} for name in rules.partitions}
    lost: dict[tuple[str, str], list[str]] = {}
    for index, name in enumerate(rules.partitions):
        if name not in old:
            continue
        for kind in kinds.values():
            value, problem = _old(kind, getattr(old[name], kind.name), index, settled=name in remembered)
            if problem:
                lost.setdefault((kind.words, problem), []).append(name)
            elif value is not None:
                values[name][kind.name] = value
    for index, name in enumerate(rules.partitions):
        for kind in kinds.values():
            if kind.name not in values[name]:
                value = values[name][kind.name] = kind.new(index)
                kind.claim(value)
    return Choice(
        rules=rules,
        remembered=remembered,
        chosen={name: Chosen(**value) for name, value in values.items()},
        kept={
            name: _keep(kinds, index, values[name], old.get(name, NATURAL))
            for index, name in enumerate(rules.partitions)
        },
        warnings=tuple(_warning(words, problem, names) for (words, problem), names in lost.items()),
    )


@dataclass(frozen=True, slots=True)
class _Kind:
    """One field of :class:`Chosen`, and how it is dealt with.

    ``natural`` gives what follows from the index alone (None: nothing does), ``new`` the same or, where that is not free,
    another. ``fits`` turns what was kept into a value, None when it is outside of ``where``, the networks of today.
    ``claim`` takes a value for a partition, False when another has it. ``bare`` is what is kept of a value.
    """

    name: str
    words: str
    where: str
    natural: Callable[[int], Any]
    new: Callable[[int], Any]
    fits: Callable[[Any], Any]
    claim: Callable[[Any], bool]
    bare: Callable[[Any], Any] = _same


def _old(kind: _Kind, kept: Any, index: int, *, settled: bool) -> tuple[Any, str]:
    """The value that a partition had, claimed; None for none; and why it cannot keep it."""
    value = kind.fits(kept) if kept is not None else _natural(kind, index) if settled else None
    if value is None:
        return None, f"outside of {kind.where}" if kept is not None else ""
    return (value, "") if kind.claim(value) else (None, "in use twice")


def _natural(kind: _Kind, index: int) -> Any:
    try:
        return kind.natural(index)
    except NetplanError:
        return None


def _keep(kinds: Mapping[str, _Kind], index: int, values: Mapping[str, Any], old: Kept) -> Kept:
    """What to remember: what does not apply today is carried on, for it may again tomorrow."""
    kept = {}
    for name in FIELDS:
        kind = kinds.get(name)
        value = kind.bare(values[name]) if kind and name in values else getattr(old, name)
        if value is None:
            continue
        natural = _natural(kind, index) if kind else None
        if kind is None or natural is None or value != kind.bare(natural):
            kept[name] = value
    if not kept:
        return NATURAL
    now = Kept(**kept)
    return old if now == old else now


def _warning(words: str, problem: str, names: list[str]) -> str:
    more = len(names) - _NAMED
    whose = ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"{words} of {whose}: {problem}, derived anew"


# --- the kinds ----------------------------------------------------------------------------------------------------------


def _kinds(rules: Rules) -> dict[str, _Kind]:
    found = {kind.name: kind for kind in (*_kinds_of_ipv4(rules), *_kinds_of_ipv6(rules))}
    return {name: found[name] for name in FIELDS if name in found}


def _kinds_of_ipv4(rules: Rules) -> Iterator[_Kind]:
    network, gateway, amount = rules.ipv4_network, rules.tap_gateway, len(rules.partitions)
    used, given = set(rules.taken), set[IPv4Address]()
    tuns = set[IPv4Address]()

    def claim(value: IPv4Address) -> bool:
        # what is taken by something else turns away new choices only
        used.add(value)
        return _add(given, value)

    yield _Kind(
        name="ipv4",
        words="private IPv4",
        where=f"ipv4_local_network = {network}",
        natural=lambda index: addresses.private_ipv4(network, index),
        new=lambda index: addresses.private_ipv4(network, index, used, rules.elsewhere),
        fits=lambda kept: kept if kept in network else None,
        claim=claim,
    )
    world = rules.partition_network
    if world is not None:
        yield _Kind(
            name="public_ipv4",
            words="public IPv4",
            where=f"ipv4_partition_network = {world}",
            natural=lambda index: addresses.private_ipv4(world, index),
            new=lambda index: addresses.private_ipv4(world, index, used, rules.elsewhere),
            fits=lambda kept: kept if kept in world else None,
            claim=claim,
        )
    if gateway is not None:
        yield _Kind(
            name="tap_ipv4",
            words="IPv4 of the tap",
            where=f"{gateway.network}, the network of tap_gateway_interface",
            natural=_nothing,
            new=lambda index: addresses.tap_ipv4(gateway, index, used),
            fits=lambda kept: kept if kept in gateway.network and kept != gateway.ip else None,
            claim=claim,
        )
    if rules.tun_ipv4:
        yield _Kind(
            name="tun_ipv4",
            words="IPv4 of the tun",
            where=f"{addresses.TUN_NETWORK}",
            natural=_nothing,
            new=lambda index: addresses.tun_ipv4(index, amount, tuns),
            fits=lambda kept: kept if kept.ip in addresses.TUN_NETWORK else None,
            claim=lambda value: _add(tuns, value.ip),
        )


def _add(given: set[IPv4Address], value: IPv4Address) -> bool:
    new = value not in given
    given.add(value)
    return new


def _kinds_of_ipv6(rules: Rules) -> Iterator[_Kind]:
    if rules.base is None:
        return
    base, network, shift = rules.base, rules.base.network, rules.prefixshift
    first, where = int(network.network_address), f"{network}, the node's network"
    occupied = Occupied()

    def natural_ipv6(index: int) -> IPv6Interface | None:
        found = addresses.partition_ipv6(base, index)
        return found if int(found.ip) == first + index + 2 else None

    def fits_ipv6(kept: IPv6Address) -> IPv6Interface | None:
        if kept not in network or kept == base.ip:
            return None
        return IPv6Interface((int(kept), network.prefixlen))

    def claim(value: IPv6Network) -> bool:
        return occupied.add(int(value.network_address), int(value.broadcast_address))

    yield _Kind(
        name="ipv6",
        words="IPv6",
        where=where,
        natural=natural_ipv6,
        new=lambda index: addresses.partition_ipv6(base, index, occupied),
        fits=fits_ipv6,
        claim=lambda value: occupied.add(int(value.ip), int(value.ip)),
        bare=lambda value: value.ip,
    )
    if rules.ipv6_range:
        yield _Kind(
            name="ipv6_range",
            words="IPv6 range",
            where=where,
            natural=lambda index: addresses.partition_range(base, index, shift),
            new=lambda index: addresses.partition_range(base, index, shift, occupied),
            fits=lambda kept: kept if kept.subnet_of(network) else None,
            claim=claim,
        )
    for applies, name, words, rule in (
        (rules.tap_ipv6, "tap_ipv6", "IPv6 of the tap", addresses.tap_ipv6),
        (rules.tun_ipv6, "tun_ipv6", "IPv6 of the tun", addresses.tun_ipv6),
    ):
        if applies:
            yield _Kind(
                name=name,
                words=words,
                where=where,
                natural=partial(rule, base, shift=shift),
                new=partial(rule, base, shift=shift, occupied=occupied),
                fits=lambda kept: kept if kept.network.subnet_of(network) else None,
                claim=lambda value: claim(value.network),
            )
