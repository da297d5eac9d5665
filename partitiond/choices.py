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

    from partitiond.slapformat import FormattedNode

_NAMED = 5  # partitions in a warning that are named one by one


@dataclass(frozen=True, slots=True)
class Rules:
    """What the configuration and the node's own addresses say about those of the partitions.

    ``partitions`` are the ids by index. ``base`` is the node's own IPv6, None without one: then nobody has any.
    ``partition_network`` is that of the IPv4 addresses that stand in for IPv6, None where none do. ``mesh_range`` is the node's
    part of the mesh.
    ``tap_gateway`` is the address of ``tap_gateway_interface``, None where taps get no IPv4. ``taken`` are IPv4 addresses
    that something else on this node uses, ``elsewhere`` IPv4 networks that the node uses or routes elsewhere: they turn
    away new choices, never old ones.
    """

    partitions: tuple[str, ...]
    base: IPv6Interface | None
    prefixshift: int
    ipv4_network: IPv4Network
    partition_network: IPv4Network | None = None
    mesh_range: IPv4Network | None = None
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
    vpn_ipv4: IPv4Address | None = None


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
    vpn_ipv4: IPv4Address | None = None


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
    "vpn_ipv4": IPv4Address,
}


@dataclass(frozen=True, slots=True)
class Choice:
    """The outcome: the addresses of each partition, what to remember of it, and what an operator should know.

    ``rules``, ``remembered`` and ``formatted``, what slapos.core left, are what it was made of.
    """

    rules: Rules
    remembered: Mapping[str, Kept]
    chosen: Mapping[str, Chosen]
    kept: Mapping[str, Kept]
    warnings: tuple[str, ...] = ()
    formatted: FormattedNode | None = None

    def in_place(self, pending: frozenset[str | None]) -> dict[str, Kept]:
        """What may be remembered while the network of the partitions in ``pending`` is not as it should be: of those, what
        was before.
        """
        before = {
            name: kept for name, kept in self.remembered.items() if name in pending and name in self.kept
        }
        return {name: kept for name, kept in self.kept.items() if name not in pending} | before


def imported(node: FormattedNode) -> dict[str, Kept]:
    """What slapos.core chose, as something to keep."""
    return {
        one.reference: Kept(
            ipv4=one.ipv4,
            ipv6=one.ipv6,
            ipv6_range=one.ipv6_range,
            tap_ipv6=one.tap.ipv6 if one.tap else None,
            tap_ipv4=one.tap.ipv4 if one.tap else None,
            tun_ipv6=one.tun.ipv6 if one.tun else None,
            tun_ipv4=one.tun.ipv4 if one.tun else None,
        )
        for one in node.partitions
    }


def choose(
    rules: Rules,
    remembered: Mapping[str, Kept],
    found: Mapping[str, Kept] | None = None,
    last: Choice | None = None,
) -> Choice:
    """Choose for all partitions; ``found`` is what slapos.core left.

    ``last`` is the choice before: what was settled then, by the same rules, is taken from it and not derived again. Raises
    NetplanError ``network.prefix_too_small`` or ``network.address_collision`` when there is no room.
    """
    work = _Work(rules)
    done = _settled(rules, remembered, last)
    for index, name in enumerate(rules.partitions):
        before = remembered.get(name)
        if name in done:
            work.repeat(done[name])
        elif before is not None:
            work.keep(index, before, settled=True)
        elif found and name in found:
            work.keep(index, found[name], settled=False)
    for index, name in enumerate(rules.partitions):
        if name not in done:
            work.complete(index)
    return Choice(
        rules=rules,
        remembered=remembered,
        chosen={
            name: done.get(name) or Chosen(**value)
            for name, value in zip(rules.partitions, work.values, strict=True)
        },
        kept={
            name: remembered[name] if name in done else _same_or_new(remembered.get(name), kept)
            for name, kept in zip(rules.partitions, work.kept, strict=True)
        },
        warnings=tuple(_warning(words, problem, names) for (words, problem), names in work.lost.items()),
    )


def _settled(rules: Rules, remembered: Mapping[str, Kept], last: Choice | None) -> dict[str, Chosen]:
    """What the choice before gave to partitions that are remembered with the same today.

    Only by the same rules, but for how many partitions there are and what turns away new choices, and only where nobody had
    to give way: then each still fits, and none meets another.
    """
    if last is None or last.warnings:
        return {}
    old = dataclasses.replace(
        last.rules, partitions=rules.partitions, taken=rules.taken, elsewhere=rules.elsewhere
    )
    if old != rules:
        return {}
    return {
        name: chosen
        for name, chosen in last.chosen.items()
        if name in remembered and remembered[name] == last.kept[name]
    }


def _same_or_new(before: Kept | None, kept: Mapping[str, Any]) -> Kept:
    if not kept:
        return NATURAL
    now = Kept(**kept)
    return before if before is not None and before == now else now


def _warning(words: str, problem: str, names: list[str]) -> str:
    more = len(names) - _NAMED
    whose = ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"{words} of {whose}: {problem}, derived anew"


class _Work:
    """A choice in the making: by index, the values of each partition and what is to be remembered of them."""

    def __init__(self, rules: Rules) -> None:
        self._names = rules.partitions
        self._kinds = (*_kinds_of_ipv4(rules), *_kinds_of_ipv6(rules))
        self.values: list[dict[str, Any]] = [{} for _ in rules.partitions]
        self.kept: list[dict[str, Any]] = [{} for _ in rules.partitions]
        self.lost: dict[tuple[str, str], list[str]] = {}

    def repeat(self, chosen: Chosen) -> None:
        """Let a partition have what the choice before gave it."""
        for kind in self._kinds:
            if kind.applies:
                kind.claim(getattr(chosen, kind.name))

    def keep(self, index: int, before: Kept, *, settled: bool) -> None:
        """Take what a partition had, as far as it fits. ``settled``: where nothing is said, it had the natural one."""
        # what no kind stands for today is carried on: it may apply again tomorrow
        kept = {name: value for name in FIELDS if (value := getattr(before, name)) is not None}
        for kind in self._kinds:
            had = kept.pop(kind.name, None)
            if kind.applies:
                self._take(kind, index, had, settled=settled)
            elif had is not None:
                self._remember(kind, index, had)
        self.kept[index].update(kept)

    def _take(self, kind: _Kind, index: int, had: Any, *, settled: bool) -> None:
        if had is None and not settled:
            return
        value = _natural(kind, index) if had is None else kind.fits(had)
        if value is not None and kind.claim(value):
            self.values[index][kind.name] = value
            if had is not None:
                self._remember(kind, index, had)
        elif value is not None or had is not None:
            problem = f"outside of {kind.where}" if value is None else "in use twice"
            self.lost.setdefault((kind.words, problem), []).append(self._names[index])

    def complete(self, index: int) -> None:
        """Give a partition what it still lacks."""
        for kind in self._kinds:
            if kind.applies and kind.name not in self.values[index]:
                value = self.values[index][kind.name] = kind.new(index)
                kind.claim(value)
                self._remember(kind, index, kind.bare(value))

    def _remember(self, kind: _Kind, index: int, bare: Any) -> None:
        natural = _natural(kind, index)
        if natural is None or kind.bare(natural) != bare:
            self.kept[index][kind.name] = bare


@dataclass(frozen=True, slots=True)
class _Kind:
    """One field of :class:`Chosen`, and how it is dealt with; ``applies`` says whether anybody wants it today.

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
    applies: bool = True


def _natural(kind: _Kind, index: int) -> Any:
    try:
        return kind.natural(index)
    except NetplanError:
        return None


# --- the kinds ----------------------------------------------------------------------------------------------------------


def _kinds_of_ipv4(rules: Rules) -> Iterator[_Kind]:
    network, gateway, amount = rules.ipv4_network, rules.tap_gateway, len(rules.partitions)
    used, given = set(rules.taken), set[IPv4Address]()
    tuns = set[IPv4Address]()

    def claim(value: IPv4Address) -> bool:
        # what is taken by something else turns away new choices only
        used.add(value)
        return _add(given, value)

    where = f"ipv4_local_network = {network}"
    yield _ipv4_of("ipv4", "private IPv4", where, network, used, rules.elsewhere, claim)
    for name, words, key, world in (
        ("public_ipv4", "public IPv4", "ipv4_partition_network", rules.partition_network),
        ("vpn_ipv4", "IPv4 of the mesh", "[tinc] range", rules.mesh_range),
    ):
        if world is not None:
            yield _ipv4_of(name, words, f"{key} = {world}", world, used, rules.elsewhere, claim)
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


def _ipv4_of(
    name: str,
    words: str,
    where: str,
    network: IPv4Network,
    used: set[IPv4Address],
    elsewhere: tuple[IPv4Network, ...],
    claim: Callable[[IPv4Address], bool],
) -> _Kind:
    """An address of a network that is dealt out by index."""
    return _Kind(
        name=name,
        words=words,
        where=where,
        natural=lambda index: addresses.private_ipv4(network, index),
        new=lambda index: addresses.private_ipv4(network, index, used, elsewhere),
        fits=lambda kept: kept if kept in network else None,
        claim=claim,
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
    own = int(base)
    occupied = Occupied()

    def natural_ipv6(index: int) -> IPv6Interface | None:
        found = addresses.partition_ipv6(base, index)
        return found if int(found.ip) == first + index + 2 else None

    def fits_ipv6(kept: IPv6Address) -> IPv6Interface | None:
        return IPv6Interface((int(kept), network.prefixlen)) if kept in network else None

    def claim_ipv6(value: IPv6Interface) -> bool:
        # slapformat gives a partition the node's own address where that is on its place
        number = int(value)
        return number != own and occupied.add(number, number)

    def claim(value: IPv6Network) -> bool:
        return occupied.add(int(value.network_address), int(value.broadcast_address))

    yield _Kind(
        name="ipv6",
        words="IPv6",
        where=where,
        natural=natural_ipv6,
        new=lambda index: addresses.partition_ipv6(base, index, occupied),
        fits=fits_ipv6,
        claim=claim_ipv6,
        bare=lambda value: value.ip,
    )
    yield _Kind(
        name="ipv6_range",
        words="IPv6 range",
        where=where,
        applies=rules.ipv6_range,
        natural=lambda index: addresses.partition_range(base, index, shift),
        new=lambda index: addresses.partition_range(base, index, shift, occupied),
        fits=lambda kept: kept if kept.subnet_of(network) else None,
        claim=claim,
    )
    for applies, name, words, rule in (
        (rules.tap_ipv6, "tap_ipv6", "IPv6 of the tap", addresses.tap_ipv6),
        (rules.tun_ipv6, "tun_ipv6", "IPv6 of the tun", addresses.tun_ipv6),
    ):
        yield _Kind(
            name=name,
            words=words,
            where=where,
            applies=applies,
            natural=partial(rule, base, shift=shift),
            new=partial(rule, base, shift=shift, occupied=occupied),
            fits=lambda kept: kept if kept.network.subnet_of(network) else None,
            claim=lambda value: claim(value.network),
        )
