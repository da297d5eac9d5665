"""The packet filter of legacy hosts: the same ownership and meters as rules of iptables.  Pure.

iptables has no sets, so one rule for each address is what there is, and a packet would pass all of them.
Therefore each list is in two steps: neighbouring addresses (the same but for the last 4 bits) have a chain of
their own, which all others pass by with one rule.  500 partitions in a row cost 32 + 16 rules instead of 500.
Where an address's rule stands follows from the address alone: it stays there, with its counters, when others
come and go.

All is in the table ``filter``, in chains of ours, with one jump at the head of INPUT, FORWARD and OUTPUT.
Ours never accept: what passes them meets the host's own rules.  Comments say what a rule counts, in the names
that the counters of nftables have.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_network
from socket import AF_INET, AF_INET6, AddressFamily
from typing import Literal, NamedTuple

from netplan import held_port
from netplan.closed_port import RULE as CLOSED
from netplan.mesh_guard import RULE as MESH
from netplan.mesh_guard import counter
from netplan.metering import counter_name
from netplan.model import ClosedPort, DesiredNetwork, HeldPort, MeshSpec, PartitionNetwork
from netplan.once import once, once_each
from netplan.ownership import RULES
from netplan.xtables import ANY_USER, Chains, Entry, Rule, entry

PREFIX = "PARTITIOND-"
"""What the name of each of our chains starts with; of at most 28 characters (XT_EXTENSION_MAXNAMELEN)."""

_JUMPS = {"INPUT": "IN", "FORWARD": "FORWARD", "OUTPUT": "OUT"}
REFUSED, SHARED = "refused", "shared"
"""What the comments of the rules start with that count refusals, and use of the host's own address."""

_LO = "lo"
_LO = "lo"
_BITS = 4  # the addresses of one chain differ in so many


_Side = Literal["source", "destination"]


@dataclass(frozen=True, slots=True)
class LegacyFilter:
    """The rules of one desired state: our chains by family, and what the built-in chains begin with.

    The chain of notes (:mod:`netplan.legacy_filter`) is not among them.
    """

    chains: Mapping[AddressFamily, Chains]
    jumps: Mapping[AddressFamily, Mapping[str, Entry]]
    fingerprint: str


class _Owned(NamedTuple):
    """An address or range of a partition; ``kind`` is the family of its meters, ``tun`` for what has none.

    ``neighbours`` is the network of those that share a chain with it.
    """

    partition: str
    uid: int
    kind: str
    text: str
    length: int
    neighbours: str


def _of(rule: Rule, side: _Side, address: str) -> Rule:
    return replace(rule, source=address) if side == "source" else replace(rule, destination=address)


class _Draft:
    """Chains while they are written, by what of their name is behind the prefix."""

    def __init__(self) -> None:
        self.chains: dict[str, list[Rule]] = {}

    def chain(self, name: str, rules: Iterable[Rule]) -> str:
        """Add rules to a chain, and return its full name."""
        self.chains.setdefault(name, []).extend(rules)
        return PREFIX + name

    def look_up(
        self,
        name: str,
        side: _Side,
        owned: Sequence[_Owned],
        make: Callable[[_Owned], Iterator[Rule]],
        end: str,
    ) -> str:
        """Write chains that lead what has an address as its ``side`` to the rules that ``make`` has for it, and
        all else to the chain ``end`` ("": back).  Return the name of the first.

        Longest prefix first: whoever is sent to the neighbours of an address goes on to the ranges from there.
        """
        for length in sorted({one.length for one in owned}):
            first = f"{name}{length}"
            last = [Rule(end, goto=True)] if end else []
            places: dict[str, tuple[dict[str, None], list[Rule]]] = {}  # networks that lead there, rules
            for one in (one for one in owned if one.length == length):
                place = f"{first}-{hashlib.blake2b(one.neighbours.encode(), digest_size=3).hexdigest()}"
                networks, rules = places.setdefault(place, ({}, []))
                networks[one.neighbours] = None
                rules += make(one)
            for place, (networks, rules) in places.items():
                way = Rule(self.chain(place, (*rules, *last)), goto=True)
                self.chain(first, (_of(way, side, network) for network in networks))
            end = self.chain(first, last)
        return end


@once
def render_legacy(desired: DesiredNetwork) -> LegacyFilter:
    """Return the rules of a desired state."""
    chains: dict[AddressFamily, Chains] = {}
    jumps: dict[AddressFamily, Mapping[str, Entry]] = {}
    digest = hashlib.sha256()
    shares = [_share(one) for one in desired.partitions]
    for family in (AF_INET6, AF_INET):
        draft = _Draft()
        owned = [one for share in shares for one in share[family]]
        if desired.closed and (family == AF_INET) == (desired.closed.address.version == 4):
            _closed_port(draft, desired.partitions, desired.closed)
        if desired.held:
            _held_ports(draft, desired.held, family)
        if desired.mesh:
            _mesh(draft, desired.partitions, desired.mesh, family)
        if desired.ownership:
            _ownership(draft, desired.partitions, owned)
        _metering(draft, desired, owned, family)
        chains[family] = {
            PREFIX + name: tuple(entry(rule, family) for rule in rules)
            for name, rules in draft.chains.items()
        }
        jumps[family] = {
            hook: entry(Rule(PREFIX + name), family) for hook, name in _JUMPS.items() if name in draft.chains
        }
        for name, entries in chains[family].items():
            digest.update(name.encode())
            for one in entries:
                digest.update(b"\0".join((one.head, one.target.encode(), one.data)))
    return LegacyFilter(chains, jumps, digest.hexdigest()[:32])


@once_each
def _share(one: PartitionNetwork) -> Mapping[AddressFamily, tuple[_Owned, ...]]:
    routable = one.routable_ipv4.interface.ip if one.routable_ipv4 else None
    tun6 = one.tun.ipv6.ip if one.tun and one.tun.ipv6 else None
    tun4 = one.tun.ipv4.ip if one.tun and one.tun.ipv4 else None
    six = {"ipv6": one.ipv6.ip if one.ipv6 else None, "tun": tun6, "range": one.ipv6_range}
    four = {
        "ipv4": one.ipv4,
        "public4": one.public_ipv4,
        "vpn4": one.vpn_ipv4,
        "routable4": routable,
        "tun": tun4,
    }
    return {
        family: tuple(_owned(one, kind, str(what)) for kind, what in have.items() if what is not None)
        for family, have in ((AF_INET6, six), (AF_INET, four))
    }


def _owned(one: PartitionNetwork, kind: str, text: str) -> _Owned:
    network = ip_network(text)
    neighbours = str(network.supernet(min(_BITS, network.prefixlen)))
    return _Owned(one.id, one.uid, kind, text, network.prefixlen, neighbours)


def _by_user(
    draft: _Draft, name: str, partitions: Sequence[PartitionNetwork], counted: str, then: str = "RETURN"
) -> str:
    """Write a chain that counts packets by the partition's user who sent them, and return its name; with ``then`` they
    go on to that chain.
    """
    blocks: dict[int, list[int]] = {}
    for one in partitions:
        blocks.setdefault(one.uid >> _BITS, []).append(one.uid)
    for block, users in blocks.items():
        goto = then != "RETURN"
        each = (Rule(then, goto=goto, users=(uid, uid), comment=f"{counted}/{uid}") for uid in users)
        place = draft.chain(f"{name}-{block}", each)
        of_these = (block << _BITS, (block + 1 << _BITS) - 1)
        draft.chain(name, [Rule(place, goto=True, users=of_these)])
    return draft.chain(name, ())


def _closed_port(draft: _Draft, partitions: Sequence[PartitionNetwork], closed: ClosedPort) -> None:
    """Write the rules of :mod:`netplan.closed_port`."""
    deny = draft.chain(f"DENY-{CLOSED.upper()}", (Rule("RESET", tcp=True), Rule("DROP")))
    kept_out = _by_user(draft, CLOSED.upper(), partitions, f"{REFUSED}/{CLOSED}", deny)
    everywhere = closed.address.is_unspecified
    address = "" if everywhere else str(closed.address)
    draft.chain(
        "OUT",
        [Rule(kept_out, destination=address, port=closed.port, to_local=everywhere, users=ANY_USER)],
    )


def _mesh(
    draft: _Draft, partitions: Sequence[PartitionNetwork], mesh: MeshSpec, family: AddressFamily
) -> None:
    """Write the rules of :mod:`netplan.mesh_guard`; what comes is seen on input, and where it would be forwarded."""
    link = mesh.interface
    if not mesh.taken:
        forwarded = _dropped("forward", "any")
        draft.chain("FORWARD", (replace(forwarded, link_in=link), replace(forwarded, link_out=link)))
    if family == AF_INET:
        _mesh_out(draft, partitions, mesh)
        _mesh_in(draft, mesh)
    elif not mesh.taken:
        draft.chain("OUT", [replace(_dropped("out", "ipv6"), link_out=link)])
        draft.chain("IN", [replace(_dropped("in", "ipv6"), link_in=link)])


def _dropped(direction: str, reason: str) -> Rule:
    return Rule("DROP", comment=counter(direction, reason))


def _mesh_out(draft: _Draft, partitions: Sequence[PartitionNetwork], mesh: MeshSpec) -> None:
    link, network, own = mesh.interface, str(mesh.network), str(mesh.own)
    by_user = _by_user(draft, MESH.upper(), partitions, f"{REFUSED}/{MESH}")

    def deny(reason: str) -> tuple[Rule, ...]:
        reset = Rule("RESET", tcp=True, comment=counter("out", reason))
        return (Rule(by_user), reset, _dropped("out", reason))

    passing = [Rule("RETURN", link_out=_LO)]
    if not mesh.taken:
        passing.append(Rule("RETURN", link_out=link))
        wrong = draft.chain("MESH-DESTINATION", deny("destination"))
        carried = draft.chain("MESH-PORT", deny("port"))
        destinations = (
            Rule(wrong, goto=True, destination=own),
            Rule(carried, goto=True, destination=network, udp=True, from_port=mesh.port),
            Rule("RETURN", destination=network),
            Rule(wrong, goto=True),
        )
        sources = (Rule(draft.chain("MESH-OWN", destinations), goto=True, source=own), *deny("source"))
        draft.chain("OUT", [Rule(draft.chain("MESH-OUT", sources), link_out=link)])
    elsewhere = draft.chain("MESH-AWAY-OUT", (*passing, *deny("elsewhere")))
    draft.chain("OUT", (Rule(elsewhere, source=network), Rule(elsewhere, destination=network)))


def _mesh_in(draft: _Draft, mesh: MeshSpec) -> None:
    link, network, own = mesh.interface, str(mesh.network), str(mesh.own)
    wrong, elsewhere = _dropped("in", "source"), _dropped("in", "elsewhere")
    passing = [Rule("RETURN", link_in=_LO)]
    if not mesh.taken:
        passing.append(Rule("RETURN", link_in=link))
        carried = replace(_dropped("in", "port"), destination=own, port=mesh.port)
        destinations = (
            replace(carried, udp=True),
            replace(carried, syn=True),
            Rule("RETURN", destination=own),
            _dropped("in", "destination"),
        )
        others = Rule(draft.chain("MESH-OTHERS", destinations), goto=True, source=network)
        sources = (replace(wrong, source=own), others, wrong)
        draft.chain("IN", [Rule(draft.chain("MESH-IN", sources), link_in=link)])
    away = draft.chain("MESH-AWAY-IN", (*passing, elsewhere))
    draft.chain("IN", (Rule(away, source=network), Rule(away, destination=network)))
    draft.chain("FORWARD", (replace(elsewhere, source=network), replace(elsewhere, destination=network)))


def _held_ports(draft: _Draft, held: Sequence[HeldPort], family: AddressFamily) -> None:
    """Write the rules of :mod:`netplan.held_port`."""
    source = str(held_port.ADDRESSES[family == AF_INET6])
    deny = draft.chain("DENY-HELD", (Rule("RESET", tcp=True), Rule("DROP")))
    for one in held:
        others = ((ANY_USER[0], one.uid - 1), (one.uid + 1, ANY_USER[1]))
        draft.chain(
            "OUT",
            [
                Rule(deny, goto=True, source=source, from_port=one.port, users=users)
                for users in others
                if users[0] <= users[1]
            ],
        )


def _ownership(draft: _Draft, partitions: Sequence[PartitionNetwork], owned: Sequence[_Owned]) -> None:
    """Write the rules of :mod:`netplan.ownership`."""
    private = [one for one in owned if one.kind == "ipv4"]
    reached = [one for one in owned if one.kind != "ipv4"]
    needed = {"address": bool(reached), "private": bool(private), "foreign": True}
    deny = {}
    for rule in (rule for rule in RULES if needed[rule]):
        count = Rule(_by_user(draft, rule.upper(), partitions, f"{REFUSED}/{rule}"))
        # as in nftables: a drop is EPERM for send(2), only connect(2) of TCP would wait without a reset; and
        # the answer to a source that is not on this host would leave it
        reset = () if rule == "foreign" else (Rule("RESET", tcp=True),)
        deny[rule] = draft.chain(f"DENY-{rule.upper()}", (count, *reset, Rule("DROP")))
    foreign = Rule(deny["foreign"], goto=True, users=ANY_USER, unlike_local=True)
    rest = draft.chain("REST", [foreign])

    def own(one: _Owned) -> Iterator[Rule]:
        yield Rule("RETURN", source=one.text, users=(one.uid, one.uid))
        if one.kind not in ("ipv4", "range"):  # see "same6" of the nft rules
            yield Rule("RETURN", source=one.text, destination=one.text, echo_request=True)
        why = "private" if one.kind == "ipv4" else "address"
        yield Rule(deny[why], goto=True, source=one.text, users=ANY_USER)

    def reach(one: _Owned) -> Iterator[Rule]:
        yield Rule("RETURN", destination=one.text, users=(one.uid, one.uid))
        yield Rule(deny["private"], goto=True, destination=one.text, users=ANY_USER)

    if private:
        draft.chain("OUT", [Rule(draft.look_up("REACH", "destination", private, reach, ""))])
    draft.chain("OUT", [Rule(draft.look_up("OWN", "source", owned, own, rest))])
    if reached:  # nobody else sends from these; private addresses: see _metering
        spoofed = draft.look_up(
            "SPOOF", "source", reached, lambda one: iter([Rule("DROP", source=one.text)]), ""
        )
        draft.chain("FORWARD", [Rule(spoofed)])


def _metering(draft: _Draft, desired: DesiredNetwork, owned: Sequence[_Owned], family: AddressFamily) -> None:
    """Write the counters behind the rules of ownership, by side of lo and direction."""
    metered = [one for one in owned if one.kind != "tun"]

    def counters(scope: str, direction: str, end: str = "") -> str:
        side: _Side = "source" if direction == "out" else "destination"

        def count(one: _Owned) -> Iterator[Rule]:
            if desired.ownership and one.kind == "ipv4" and (scope, direction) == ("remote", "in"):
                yield Rule("DROP", destination=one.text)  # the weak host model would let the LAN in
                return
            name = counter_name(one.partition, one.kind, scope, direction, one.text)
            yield _of(Rule("RETURN", comment=name), side, one.text)

        return draft.look_up(f"{scope[0]}{direction}".upper(), side, metered, count, end)

    version = "ipv6" if family == AF_INET6 else "ipv4"
    shared = _by_user(draft, "SHARED", desired.partitions, f"{SHARED}/{version}")
    to_lo = (
        [Rule(counters("local", "out"), goto=True, link_out=_LO)]
        if metered
        else [Rule("RETURN", link_out=_LO)]
    )
    draft.chain(
        "OUT",
        (
            Rule("RETURN", link_out=_LO, rst=True),  # of what ownership refused, see netplan.metering
            *to_lo,
            Rule(counters("remote", "out", shared), goto=True),
        ),
    )
    if metered:
        forwarded = draft.chains.get("FORWARD", ())
        spoofed = [one.target for one in forwarded if one.target.startswith(PREFIX)]
        draft.chain(
            "IN",
            (
                Rule("RETURN", link_in=_LO, rst=True),
                Rule(counters("local", "in"), goto=True, link_in=_LO),
                *(Rule(name) for name in spoofed),
                Rule(counters("remote", "in"), goto=True),
            ),
        )
