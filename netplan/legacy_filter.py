"""The packet filter of legacy hosts in the kernel: what is loaded, and what brings it to what is wanted.

Nothing is remembered outside the tables.  A chain that no rule leads to has notes as comments of its rules:

    wanted <fingerprint>     what was loaded
    epoch <number>           since when the counters count: made when our chains were made anew, in all families
    life <number> <counters> since when those of one address do that came later, or came again
    found/<setting>/<value>  a kernel setting as we found it (netplan.sysctls), with IPv4 alone

The kernel tells nobody of changes, and has no number that they would raise: each look compares every rule.
"""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from socket import AF_INET, AddressFamily
from typing import NamedTuple

from netplan.errors import NetplanError
from netplan.legacy_rules import PREFIX, LegacyFilter
from netplan.legacy_tables import Edit, families, is_there, locked, read, write
from netplan.metering import TRAFFIC
from netplan.model import FilterState
from netplan.nfnetlink import CounterValue
from netplan.operations import Operation
from netplan.sysctls import ALL, NOTES
from netplan.xtables import Chains, Counted, Entry, Rule, comment, entry

_TRIES = 3
_NOTES_CHAIN = PREFIX + "NOTES"
_NOTHING = LegacyFilter({}, {}, "")
_GONE = Entry(b"", "")
"""What stands for a rule that is to be made again; it is like none."""


class LegacyState(NamedTuple):
    """What is loaded, and the names of the kernel settings that we changed."""

    filter: FilterState = FilterState()
    notes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyOperation(Operation):
    """The change of the rules of iptables to ``wanted`` (None: they go); ``notes`` of kernel settings come with
    them.
    """

    wanted: LegacyFilter | None = None
    notes: tuple[str, ...] = ()

    @property
    def forgets(self) -> bool:
        """Whether counters may go: a rule takes its own along, be it that it comes again at another place."""
        return self.action != "create"


def observe_legacy(wanted: LegacyFilter | None) -> LegacyState:
    """Return what is loaded, and how it differs from what was loaded."""
    found = {family: _entries(read(family)) for family in families() if is_there(family)}
    notes = {family: _notes(chains, family) for family, chains in found.items()}
    if not any(_ours(chains) for chains in found.values()):
        return LegacyState()
    noted = {_noted(notes.get(family, ()), "wanted") for family in families()}
    loaded = noted.pop() if len(noted) == 1 else ""
    same = wanted is not None and loaded == wanted.fingerprint
    drift = tuple(_drift(found, wanted)) if wanted and same else ()
    if same and not _epoch(notes.values()):
        drift = (*drift, f"chain {_NOTES_CHAIN} was changed")
    state = FilterState(loaded=True, wanted=loaded, drift=drift)
    settings = notes.get(AF_INET, ())
    return LegacyState(state, frozenset(one.name for one in ALL if one.note in settings))


def _entries(chains: Mapping[str, tuple[Counted, ...]]) -> Chains:
    return {name: tuple(one.entry for one in rules) for name, rules in chains.items()}


def _ours(chains: Iterable[str]) -> list[str]:
    return [name for name in chains if name.startswith(PREFIX)]


def _notes(chains: Chains, family: AddressFamily) -> list[str]:
    return [comment(one, family) for one in chains.get(_NOTES_CHAIN, ())]


def _noted(notes: Iterable[str], what: str) -> str:
    return next((one.removeprefix(f"{what} ") for one in notes if one.startswith(f"{what} ")), "")


def _counters(one: Entry, family: AddressFamily) -> str:
    """Return what the counter of an address belongs to, with that of the other direction; "" for other rules."""
    name = comment(one, family)
    words = name.removeprefix(TRAFFIC).split("/", 4) if name.startswith(TRAFFIC) else []
    return "/".join((*words[:3], words[4])) if len(words) == 5 else ""


def _lives(notes: Iterable[str]) -> dict[str, str]:
    """Return the lives of counters that are noted, by what they belong to."""
    words = (one.split(" ", 2) for one in notes if one.startswith("life "))
    return {one[2]: one[1] for one in words if len(one) == 3}


def _beginning(found: Chains, wanted: Chains, family: AddressFamily) -> set[str]:
    """Return whose counters the change makes anew."""
    edits = (one for name, rules in wanted.items() for one in _difference(name, found.get(name, ()), rules))
    return {_counters(one.entry, family) for one in edits if one.kind == "insert"} - {""}


def _epoch(notes: Iterable[Iterable[str]]) -> str:
    """Return since when the counters of all families count; "" when they do not agree."""
    epochs = {_noted(one, "epoch") for one in notes}
    return epochs.pop() if len(epochs) == 1 else ""


def _drift(found: Mapping[AddressFamily, Chains], wanted: LegacyFilter) -> Iterator[str]:
    """Yield each chain that is not as wanted."""
    for family, chains in found.items():
        tool = "iptables" if family == AF_INET else "ip6tables"
        want = wanted.chains[family]
        for name in want.keys() | set(_ours(chains)) - {_NOTES_CHAIN}:
            if name not in chains:
                yield f"{tool} chain {name} was removed"
            elif name not in want:
                yield f"{tool} chain {name} was added"
            elif chains[name] != want[name]:
                yield f"{tool} chain {name} was changed"
        if any(_jumps(chains, wanted.jumps[family])):
            yield f"{tool} does not lead to our chains first"


def changes(
    found: Chains, wanted: Chains, jumps: Mapping[str, Entry], *, anew: bool = False
) -> Iterator[Edit]:
    """Yield what brings a table to what is wanted; rules that stay are not touched, unless all is made
    ``anew``.
    """
    ours = _ours(found)
    yield from (Edit("create", name) for name in wanted if name not in found)
    yield from _jumps(found, jumps)
    if anew:
        yield from (Edit("flush", name) for name in ours)
    gone = [name for name in ours if name not in wanted]
    yield from (Edit("flush", name) for name in gone)
    for name, rules in wanted.items():
        yield from _difference(name, () if anew else found.get(name, ()), rules)
    yield from (Edit("remove", name) for name in gone)


def _jumps(found: Chains, jumps: Mapping[str, Entry]) -> Iterator[Edit]:
    """Yield what makes the jump to us the first rule of a built-in chain, and the only one that leads to us: any
    other would keep our chains from being removed.
    """
    for name, rules in found.items():
        if name.startswith(PREFIX):
            continue
        stays = bool(rules) and rules[0] == jumps.get(name)
        for place in range(len(rules) - 1, -1, -1):
            if rules[place].target.startswith(PREFIX) and not (stays and place == 0):
                yield Edit("delete", name, place)
        if name in jumps and not stays:
            yield Edit("insert", name, 0, jumps[name])


def _difference(name: str, have: Sequence[Entry], want: Sequence[Entry]) -> Iterator[Edit]:
    if have == want:
        return
    if not have:
        yield from (Edit("insert", name, -1, one) for one in want)
        return
    steps = SequenceMatcher(None, have, want, autojunk=False).get_opcodes()
    for what, first, last, start, end in reversed(steps):  # from behind: places before stay as they are
        if what == "equal":
            continue
        yield from (Edit("delete", name, place) for place in range(last - 1, first - 1, -1))
        yield from (Edit("insert", name, first, want[place]) for place in range(end - 1, start - 1, -1))


def load_legacy(wanted: LegacyFilter, notes: Iterable[str] = ()) -> None:
    """Bring the rules to what is wanted, one commit for each family.  Raises ``network.packet_filter``."""
    with locked():
        found = {family: _entries(read(family)) for family in families()}
        noted = {family: _notes(chains, family) for family, chains in found.items()}
        kept = _epoch(noted.values())
        epoch = kept or secrets.token_hex(8)
        settings = [one for one in noted[AF_INET] if one.startswith(NOTES)]
        for family, chains in found.items():
            lines = [f"wanted {wanted.fingerprint}", f"epoch {epoch}"]
            if family == AF_INET:
                lines += dict.fromkeys((*settings, *notes))
            _commit(family, chains, wanted, lines, anew=not kept)


def remove_legacy() -> None:
    """Remove all that is ours."""
    with locked():
        for family in families():
            if is_there(family):
                _commit(family, _entries(read(family)), _NOTHING, ())


def note_legacy(note: str, *, add: bool) -> None:
    """Add or delete the note of a kernel setting; everything else stays as it is."""
    with locked():
        rules = _entries(read(AF_INET)).get(_NOTES_CHAIN, ())
        one = entry(Rule("RETURN", comment=note), AF_INET)
        want = (*(known for known in rules if known != one), *((one,) if add else ()))
        write(AF_INET, _difference(_NOTES_CHAIN, rules, want))


def _commit(
    family: AddressFamily, found: Chains, wanted: LegacyFilter, notes: Iterable[str], *, anew: bool = False
) -> None:
    """Change one family; again from what is there, when somebody who does not know the lock came between."""
    rules = wanted.chains.get(family, {})
    for left in range(_TRIES - 1, -1, -1):
        begin = set[str]() if anew else _beginning(found, rules, family)
        lines = (*notes, *(() if anew else _notes_of_lives(found, rules, begin, family)))
        chains = dict(rules)
        if lines:
            chains[_NOTES_CHAIN] = tuple(entry(Rule("RETURN", comment=one), family) for one in lines)
        # both directions begin anew where one does: they have one life
        known = {
            name: tuple(_GONE if begin and _counters(one, family) in begin else one for one in have)
            for name, have in found.items()
        }
        steps = list(changes(known, chains, wanted.jumps.get(family, {}), anew=anew))
        if not steps:
            return
        try:
            write(family, steps)
        except NetplanError as error:
            if not (left and error.retryable):
                raise
            found = _entries(read(family))
        else:
            return


def _notes_of_lives(
    found: Chains, wanted: Chains, begin: Iterable[str], family: AddressFamily
) -> Iterator[str]:
    """Yield the notes of the lives of wanted counters: those that go on, and of those that ``begin`` a new one."""
    there = {_counters(one, family) for rules in wanted.values() for one in rules}
    lives = {of: life for of, life in _lives(_notes(found, family)).items() if of in there}
    lives |= dict.fromkeys(begin, secrets.token_hex(4))
    yield from (f"life {life} {of}" for of, life in sorted(lives.items()))


class LegacyCounters(NamedTuple):
    """All that is counted by name, and since when; ``epoch`` is "" when our rules are not whole.

    ``lives`` are those of counters that begun later, by partition, family, scope and address as in the name.
    """

    epoch: str
    values: list[CounterValue]
    lives: dict[str, str]


def read_legacy_counters() -> LegacyCounters:
    """Read the counters of our rules.

    Whoever changes a table, be it with rules of their own, takes its counters out and puts them back a moment
    later: without the lock, a reading in between would look like counters that began anew.
    """
    values: dict[str, tuple[int, int]] = {}
    with locked():
        found = {family: read(family) for family in families() if is_there(family)}
    for family, chains in found.items():
        for name in _ours(chains):
            for one in chains[name]:
                if counter := comment(one.entry, family):
                    packets, octets = values.get(counter, (0, 0))
                    values[counter] = (packets + one.packets, octets + one.bytes)
    notes = [_notes(_entries(found.get(family, {})), family) for family in families()]
    lives = {of: life for one in notes for of, life in _lives(one).items()}
    return LegacyCounters(
        _epoch(notes), [CounterValue(name, *value) for name, value in values.items()], lives
    )
