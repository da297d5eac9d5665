"""The packet filter as the text of nft transactions.  Pure.

The filter is a sum of parts (:mod:`netplan.ownership`, :mod:`netplan.metering`, :mod:`netplan.tap_guard`,
:mod:`netplan.tun_guard`,
:mod:`netplan.mesh_guard`, :mod:`netplan.rate_limits`) in the tables ``inet``, ``bridge`` and ``arp partitiond``, of
which only the first is always there; it has all named counters.  A transaction changes what differs and nothing
else: elements of those who stay are not touched, what the kernel put into sets itself never, and rules only when
they changed.

Why not flush everything and fill it again in one transaction, which is said to be atomic: a set look-up that
runs while a commit is finished may see neither the old nor the new element (seen here: 1 packet in a million
uncounted; upstream's "restart set lookup on base_seq change" closes most of it from Linux 6.17 on).  For the
same reason there are no verdict maps without a name: theirs die with the old rules while a packet is still in
them. Named counters are objects of their own and keep counting whatever happens to maps (facts/packets.md,
A).
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from netplan import closed_port, nfbatch
from netplan.mesh_guard import mesh_guard, ways_out
from netplan.metering import TRAFFIC, metering
from netplan.model import DesiredNetwork, FilterContents
from netplan.netlink import Request
from netplan.nfnetlink import TABLE, full_name, split_name
from netplan.once import once
from netplan.operations import Operation
from netplan.ownership import ownership
from netplan.rate_limits import BURST, parse, rate_limits, ways
from netplan.ruleset import Part
from netplan.sysctls import NOTES
from netplan.tap_guard import tap_guard
from netplan.tun_guard import tun_guard

FINGERPRINT_CHAIN = "fingerprint"
"""A chain that no hook reaches; the comments of its rules say what was loaded (:mod:`netplan.filter_state`).
"""

_COUNTER_OF_RULE = re.compile(r"counter name (\S+)")


def removal(families: Iterable[str]) -> str:
    """Return the text that takes our tables away."""
    return "".join(f"delete table {family} {TABLE}\n" for family in sorted(families))


@dataclass(frozen=True, slots=True)
class Filter:
    """The packet filter of one desired state.

    ``sets`` and ``maps`` have the grammar by name (:func:`netplan.nfnetlink.full_name`), ``elements`` what
    belongs into them, as nft writes it; of the sets without elements here the kernel makes them itself.
    ``declarations`` and ``rules`` are the text of the chains.  ``structure`` is the fingerprint of all but
    elements and counters, ``fingerprint`` that of everything.
    """

    families: tuple[str, ...]

    sets: Mapping[str, str]
    maps: Mapping[str, str]
    elements: Mapping[str, Sequence[str]]
    counters: frozenset[str]
    limits: frozenset[str]
    chains: frozenset[str]
    declarations: str
    rules: str
    structure: str
    fingerprint: str

    def transaction(self, loaded: FilterContents, notes: Sequence[str] = ()) -> str:
        """Return the text that brings our tables, which are there, from ``loaded`` to this state.

        No table is named as one to add: nft would ask for one without flags (:mod:`netplan.holding`).
        ``notes`` of kernel settings (:mod:`netplan.sysctls`) are added; those that are there stay.
        """
        if loaded.intact:
            parts = [f"flush chain inet {TABLE} {FINGERPRINT_CHAIN}\n"]
        else:
            parts = [f"flush table {family} {TABLE}\n" for family in self.families]
        # counters come first: nft 1.0.6 sends the elements of a new interval map together with the map itself
        parts += (f"add counter inet {TABLE} {name}\n" for name in sorted(self.counters - loaded.counters))
        parts += (_limit(name) for name in sorted(self.limits - loaded.limits - loaded.strange_limits))
        parts += (
            "" if loaded.intact else self.declarations,
            *(f"add counter inet {TABLE} {one}\n" for one in notes),
        )
        less, more = self._difference(loaded)
        again = (_limit(name) for name in sorted(self.limits & loaded.strange_limits))
        parts += (*less, *self._stale(loaded), *again, *more)
        parts.append("" if loaded.intact else self.rules)
        return "".join(parts)

    def bare(self) -> "Filter":
        """Return the same rules with nothing in their sets, and with those counters alone that rules name."""
        return replace(
            self,
            elements=dict.fromkeys(self.elements, ()),
            counters=self.counters.intersection(_COUNTER_OF_RULE.findall(self.rules)),
            limits=frozenset(),
        )

    def transactions(
        self, loaded: FilterContents, notes: Sequence[str] = (), *, persist: bool = False
    ) -> Iterator[str]:
        """Yield the texts to try in this order, each good for more than the one before.

        Changes alone; everything filled again; the table replaced, for what cannot be changed in place (such
        as the type of a set).  Only with the last do the counters begin anew, which their epoch tells.  With
        ``persist`` such tables can be held (:mod:`netplan.holding`), where the kernel knows that too.
        """
        yield self.transaction(loaded, notes)
        yield self.transaction(replace(loaded, elements={}, intact=False), notes)
        there = {one for one in loaded.counters if one.startswith(NOTES)}
        everything = sorted({*self.families, *loaded.families})
        anew = self.transaction(FilterContents(), sorted(there.union(notes)))
        for flags in (" { flags persist; }", "") if persist else ("",):
            tables = (f"add table {family} {TABLE}{flags}\n" for family in self.families)
            yield removal(everything) + "".join(tables) + anew

    def small_change(self, loaded: FilterContents, notes: Sequence[str] = ()) -> list[Request] | None:
        """Return what brings the table from ``loaded`` to this state by elements and counters alone; None where
        more than that differs, or something of it is not known.
        """
        grammars = {**self.maps, **self.sets}
        if (
            not loaded.intact
            or self.elements.keys() != loaded.elements.keys()
            or grammars.keys() != loaded.sets | loaded.maps
            or loaded.strange_limits
            or list(self._stale_objects(loaded))
        ):
            return None
        less: list[Request] = []
        more: list[Request] = []
        for name, wanted in self.elements.items():
            grammar, known = grammars[name], loaded.elements[name]
            gone = sorted(known.difference(wanted))
            less += nfbatch.elements(name, grammar, gone, add=False)
            more += nfbatch.elements(name, grammar, [one for one in wanted if one not in known], add=True)
        unused = (one for one in loaded.counters - self.counters if not one.startswith(NOTES))
        return [
            *nfbatch.counters(sorted((self.counters - loaded.counters).union(notes)), add=True),
            *nfbatch.limits(sorted(self.limits - loaded.limits), BURST, add=True),
            *less,
            *nfbatch.counters(sorted(unused), add=False),
            *nfbatch.limits(sorted(loaded.limits - self.limits), BURST, add=False),
            *more,
        ]

    def _difference(self, loaded: FilterContents) -> tuple[list[str], list[str]]:
        """Return what takes elements away and what adds them."""
        less, more = [], []
        for name, wanted in self.elements.items():
            known = loaded.elements.get(name, frozenset())
            if loaded.strange_limits and self.maps.get(name, "").partition(";")[0].endswith(": limit"):
                known = frozenset()  # what they lead to is made again
            gone = known.difference(wanted)
            if name in loaded.sets | loaded.maps and len(gone) == len(known):
                # nothing is known or nothing stays: filled anew
                less.append(f"flush {'map' if name in self.maps else 'set'} {_place(name)}\n")
                known = frozenset()
            else:
                less.append(_elements("delete", name, sorted(one.partition(" : ")[0] for one in gone)))
            more.append(_elements("add", name, [one for one in wanted if one not in known]))
        return less, more

    def _stale(self, loaded: FilterContents) -> Iterator[str]:
        """Yield what takes away what we do not know; what refers goes before what is referred to."""
        yield from self._stale_objects(loaded)
        gone = (name for name in sorted(loaded.counters - self.counters) if not name.startswith(NOTES))
        yield from (f"delete counter inet {TABLE} {name}\n" for name in gone)
        yield from (
            f"delete limit {_place(name)}\n"
            for name in sorted((loaded.limits - self.limits) | loaded.strange_limits)
            if split_name(name)[0] in self.families
        )

    def _stale_objects(self, loaded: FilterContents) -> Iterator[str]:
        tables = loaded.families.difference(self.families)
        yield from (f"delete table {family} {TABLE}\n" for family in sorted(tables))
        for kind, there, ours in (
            ("map", loaded.maps, self.maps.keys()),
            ("set", loaded.sets, self.sets.keys()),
            ("chain", loaded.chains, self.chains),
        ):
            yield from (
                f"delete {kind} {_place(name)}\n"
                for name in sorted(there - ours)
                if split_name(name)[0] not in tables
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterOperation(Operation):
    """The change of the packet filter from ``loaded`` to ``wanted`` (None: the table goes)."""

    wanted: Filter | None = None
    loaded: FilterContents = field(default_factory=FilterContents)
    notes: tuple[str, ...] = ()

    @property
    def forgets(self) -> bool:
        """Whether counters may go: with addresses that are no one's any more, or with a table that may have to be replaced."""
        if self.wanted is None:
            return True
        if self.loaded.chains and not self.loaded.intact:
            return True
        return any(name.startswith(TRAFFIC) for name in self.loaded.counters - self.wanted.counters)


def _elements(verb: str, name: str, elements: Sequence[str]) -> str:
    return f"{verb} element {_place(name)} {{ {', '.join(elements)} }}\n" if elements else ""


def _place(full: str) -> str:
    """Return how nft is told of an object."""
    family, name = split_name(full)
    return f"{family} {TABLE} {name}"


def _limit(full: str) -> str:
    found = parse(split_name(full)[1])
    assert found is not None  # noqa: S101 - we made the name
    rate = f"rate over {found.bytes_per_second} bytes/second burst {BURST} bytes"
    return f"add limit {_place(full)} {{ {rate}; }}\n"


@once
def render(desired: DesiredNetwork) -> Filter:
    """Return the packet filter of a desired state."""
    first: tuple[str, ...] = (closed_port.way(desired.closed),) if desired.closed else ()
    parts = [closed_port.closed_port(desired.partitions)] if desired.closed else []
    if desired.mesh:
        first += ways_out(desired.mesh)
        parts.append(mesh_guard(desired.mesh, "out4" if desired.ownership else "meter4_out"))
    limited = ways(desired.partitions, desired.limits)
    if desired.ownership:
        parts += [
            metering(desired.partitions, alone=False, limits=limited),
            ownership(desired.partitions, first),
        ]
    else:
        parts.append(metering(desired.partitions, first, limits=limited))
    parts += tap_guard(desired.partitions, desired.protected)
    parts += tun_guard(desired.partitions)
    parts += rate_limits(desired.partitions, desired.limits)
    declarations = "".join(line for part in parts for line in _declarations(part))
    declarations += f"add chain inet {TABLE} {FINGERPRINT_CHAIN}\n"
    rules = "".join(line for part in parts for line in _rules(part))
    elements = {_of(part, name): values for part in parts for name, values in part.elements.items()}
    counters = [name for part in parts for name in part.counters]
    limits = frozenset(_of(part, name) for part in parts for name in part.limits)
    structure = hashlib.sha256((declarations + rules).encode())
    everything = structure.copy()
    for name, values in elements.items():
        everything.update(_elements("add", name, values).encode())
    everything.update("".join(counters).encode())
    return Filter(
        families=tuple(dict.fromkeys(("inet", *(part.family for part in parts)))),
        sets={_of(part, name): grammar for part in parts for name, grammar in part.sets.items()},
        maps={_of(part, name): grammar for part in parts for name, grammar in part.maps.items()},
        elements=elements,
        counters=frozenset(counters),
        limits=limits,
        chains=frozenset(_of(part, name) for part in parts for name in part.chains) | {FINGERPRINT_CHAIN},
        declarations=declarations,
        rules=rules,
        structure=structure.hexdigest()[:32],
        fingerprint=everything.hexdigest()[:32],
    )


def _of(part: Part, name: str) -> str:
    return full_name(part.family, name)


def _declarations(part: Part) -> Iterator[str]:
    where = f"{part.family} {TABLE}"
    for name, grammar in part.sets.items():
        yield f"add set {where} {name} {{ {grammar}; }}\n"
    for name, grammar in part.maps.items():
        yield f"add map {where} {name} {{ {grammar}; }}\n"
    for name in part.chains:
        hook = part.hooks.get(name)
        about = f" {{ type filter hook {hook}; policy accept; }}" if hook else ""
        yield f"add chain {where} {name}{about}\n"


def _rules(part: Part) -> Iterator[str]:
    for name, rules in part.chains.items():
        yield from (f"add rule {part.family} {TABLE} {name} {rule}\n" for rule in rules)
