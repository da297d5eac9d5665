"""Whether the packet filter in the kernel is still the one that was loaded, without a file to remember it by.

With each load we note in the table itself, as comments of rules in a chain that no hook reaches:

    wanted <fingerprint>      structure <fingerprint>      the filter that was loaded, and its rules alone
    generation <number>                                    the state of nft as a whole, right after this very
    note chain out <digest>        set owner6 <digest> …        each object as the kernel gives it back, elements aside

While the kernel's generation is the noted one, no transaction of anybody was committed since: nothing can
differ, and an observation costs a few small requests at any number of partitions.  Otherwise somebody changed
something, mostly in a table of their own, and the objects are read and compared one by one, the elements with
those that are wanted.

A process that loaded the filter itself also knows the elements by heart, as long as the generation stays: a
daemon adds a partition without reading what it wrote for the others.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from netplan import holding, nfbatch, nftables
from netplan.elements import texts
from netplan.errors import NetplanError
from netplan.model import FilterContents, FilterState
from netplan.netlink import NetlinkSocket
from netplan.nfnetlink import (
    TABLE,
    Chunk,
    chunks,
    comments,
    counters_of,
    families,
    generation,
    limits_of,
    nft_socket,
    parsed,
    split_name,
    table,
)
from netplan.packet_filter import FINGERPRINT_CHAIN, Filter, removal
from netplan.rate_limits import BURST, parse
from netplan.sysctls import NOTES

_TRIES = 3
_DORMANT = 1


class _Loaded(NamedTuple):
    """What this process loaded last; ``place`` is the network namespace, the table's handle, the generation."""

    place: tuple[int, int, int]
    filter: Filter
    counters: frozenset[str]


_last: _Loaded | None = None


def observe_filter(wanted: Filter | None) -> FilterState:
    """Return what is loaded; the contents of the table are read only when it is not what is wanted."""
    with nft_socket() as sock:
        info = table(sock)
        if info is None:
            return FilterState(loaded=wanted is None and bool(families(sock)))
        noted, number = _read_notes(sock), generation(sock)
        loaded, structure = noted.pop("wanted", ""), noted.pop("structure", "")
        untouched = noted.pop("generation", "") == str(number) and not info.flags & _DORMANT
        same = wanted is not None and loaded == wanted.fingerprint
        if untouched and (wanted is None or same):
            return FilterState(loaded=True, wanted=loaded, as_of=number if same else 0)
        if untouched and wanted and _last and _last.place == (sock.namespace(), info.handle, number):
            contents = _by_heart(_last, wanted, noted, number)
            return FilterState(loaded=True, wanted=loaded, contents=contents)
        there = families(sock)
        found = chunks(sock, without=FINGERPRINT_CHAIN, among=sorted(there))
        known = _elements(found, wanted) if wanted and structure == wanted.structure else {}
        digests = noted if untouched else _digests(found)
        changes = {} if untouched else _changes(noted, digests)
        if same and wanted and not untouched:
            changes |= _foreign_elements(found, wanted, known)
            changes |= {f"limit {name}": "was changed" for name in _strange(limits_of(sock, there))}
        if info.flags & _DORMANT:
            changes[f"table {TABLE}"] = "is dormant"
        drift = tuple(f"{what} {change}" for what, change in changes.items())
        if wanted is None or (same and not drift):
            return FilterState(loaded=True, wanted=loaded, drift=drift, as_of=number if same else 0)
        # a set that somebody added just goes; a changed rule or type means that the rules are written anew
        as_noted = all(digests.get(what) == value for what, value in noted.items())
        intact = (
            structure == wanted.structure
            and as_noted
            and not any(what[:6] in {"chain ", "table "} for what in changes)
        )
        contents = replace(
            _objects(sock, found, there),
            elements=known if untouched or same else {},
            intact=intact,
            generation=number,
            digests=noted,
        )
    return FilterState(loaded=True, wanted=loaded, drift=drift, contents=contents)


def _by_heart(last: _Loaded, wanted: Filter, noted: Mapping[str, str], number: int) -> FilterContents:
    old, same = last.filter, last.filter.structure == wanted.structure
    return FilterContents(
        families=frozenset(old.families),
        sets=frozenset(old.sets),
        maps=frozenset(old.maps),
        chains=old.chains,
        counters=last.counters,
        limits=old.limits,
        elements={name: frozenset(values) for name, values in old.elements.items()} if same else {},
        intact=same,
        generation=number,
        digests=noted,
    )


def _read_notes(sock: NetlinkSocket) -> dict[str, str]:
    notes = {}
    for comment in comments(sock, FINGERPRINT_CHAIN):
        what, _, value = comment.rpartition(" ")
        notes[what] = value
    return notes


def _elements(found: Sequence[Chunk], wanted: Filter) -> dict[str, frozenset[str]]:
    """Return the elements of the sets that the wanted filter has, too; without those that cannot be read."""
    known = {}
    for one in found:
        grammar = wanted.maps.get(one.name) or wanted.sets.get(one.name)
        ours = grammar and one.kind != "chain" and one.name in wanted.elements
        values = texts(grammar, map(parsed, one.parts)) if grammar and ours else None
        if values is not None:
            known[one.name] = values
    return known


def _changes(noted: Mapping[str, str], digests: Mapping[str, str]) -> dict[str, str]:
    """Return what happened to each object that is not as noted."""
    changed = {what: "was changed" for what in noted if what in digests and noted[what] != digests[what]}
    gone = {what: "was removed" for what in noted if what not in digests}
    added = {what: "was added" for what in digests if what not in noted}
    return changed | gone | added


def _foreign_elements(
    found: Sequence[Chunk], wanted: Filter, known: Mapping[str, frozenset[str]]
) -> dict[str, str]:
    """Return the sets and maps that have other elements than those of the loaded, and still wanted, filter."""
    return {
        f"{one.kind} {one.name}": "was changed"
        for one in found
        if one.name in wanted.elements and known.get(one.name) != frozenset(wanted.elements[one.name])
    }


def _strange(limits: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Return the limits that are not what their names say.  That none is missing, the elements that lead to them say."""
    found = {full: parse(split_name(full)[1]) for full in limits}
    return frozenset(
        full
        for full, one in found.items()
        if one is None or limits[full] != nfbatch.limit_values(one.bytes_per_second, BURST)
    )


def _digests(found: Sequence[Chunk]) -> dict[str, str]:
    """Return a digest of each object, of sets without their elements."""
    return {
        f"{one.kind} {one.name}": hashlib.blake2b(
            b"\0".join((one.head, *one.parts)) if one.kind == "chain" else one.head, digest_size=12
        ).hexdigest()
        for one in found
    }


def _objects(sock: NetlinkSocket, found: Sequence[Chunk], there: frozenset[str]) -> FilterContents:
    """Return the names of all that is in the tables, and nothing of what it says."""
    names = {
        kind: frozenset(one.name for one in found if one.kind == kind) for kind in ("set", "map", "chain")
    }
    limits = limits_of(sock, there)
    strange = _strange(limits)
    return FilterContents(
        families=there,
        sets=names["set"],
        maps=names["map"],
        chains=names["chain"] | {FINGERPRINT_CHAIN},
        counters=frozenset(value.name for value in counters_of(sock)),
        limits=frozenset(limits).difference(strange),
        strange_limits=strange,
    )


def load_filter(wanted: Filter, loaded: FilterContents, notes: Sequence[str] = ()) -> None:
    """Bring the packet filter from ``loaded`` to ``wanted`` in one transaction, and note what was loaded: with
    it where the rules stay, else in a second, when the kernel has said what it made of them.  Where there is no
    table yet, the rules come first, and all that they look up with the notes.

    ``notes``: see :meth:`netplan.packet_filter.Filter.transaction`.  Raises ``network.packet_filter``; what
    was in force then stays, or rules that guard nobody and bear no note.
    """
    with nft_socket() as sock:
        number = generation(sock)
        if not loaded.chains:
            loaded = _load_bare(sock, wanted)
            number = generation(sock)
        if loaded.generation == number and _load_elements(wanted, loaded, notes):
            _remember(sock, wanted, loaded, notes, _after(number))
            return
        holding.release()  # libnftables has a socket of its own
        if loaded.generation != generation(sock):
            # somebody committed something since the table was read: what it was is not known
            loaded = replace(loaded, elements={}, intact=False)
        for _ in range(_TRIES):
            if missing := frozenset(wanted.families) - families(sock):
                holding.make_tables(sock, missing)
            holding.wake_tables(sock)
            before = generation(sock)
            _run_first(wanted.transactions(loaded, notes, persist=nftables.knows_persist()))
            if generation(sock) == _after(before) and _note(sock, wanted, _after(before)):
                _remember(sock, wanted, loaded, notes, _after(_after(before)))
                return
            # what is there now is not known, but it is ours: next time all is filled again
            loaded = _look(sock)
        # a note that may describe a foreign change must not stay: without one, the next observation finds
        # drift
        nftables.run(f"flush chain inet {TABLE} {FINGERPRINT_CHAIN}\n")
    raise NetplanError(
        "network.packet_filter",
        "the packet filter is loaded, but somebody else keeps changing nft rules while it is being checked",
        resource=f"filter/{TABLE}",
        retryable=True,
    )


def keep(found: FilterState) -> None:
    """Take hold of a filter that was ``found`` as it is wanted, if this process is to hold it and does not yet; and note
    that nothing of ours was changed by what others have committed since it was loaded.

    Nothing is done by a process that is not to hold it.  Raises ``network.packet_filter``.
    """
    if not found.as_of or not holding.wanted():
        return
    with nft_socket() as sock:
        noted, number = _read_notes(sock), generation(sock)
        if number != found.as_of:
            return  # changed meanwhile: the next look at it sees to that
        if noted.get("generation") == str(number) and (holding.held() or not holding.possible(sock)):
            return
        noted["generation"] = str(_after(number))
        if _commit_notes(sock, number, (f"{what} {value}" for what, value in noted.items())):
            _still(number)


def remove_filter() -> None:
    """Remove all our tables.  Raises ``network.packet_filter``."""
    holding.release()
    with nft_socket() as sock:
        there = families(sock)
    if there:
        nftables.run(removal(there))


def note_setting(note: str, *, there: bool) -> None:
    """Add or delete the note of a kernel setting.  Raises ``network.packet_filter``."""
    with nft_socket() as sock:
        holding.commit(sock, generation(sock), list(nfbatch.counters([note], add=there)))


def _load_bare(sock: NetlinkSocket, wanted: Filter) -> FilterContents:
    """Load the rules where there is no table at all: with nothing in their sets they guard nobody, as nobody was guarded a
    moment ago.  Return what is there then; of generation 0 when somebody came between.
    """
    bare = wanted.bare()
    # somebody may have made one since it was looked for
    holding.release()
    holding.make_tables(sock, bare.families, anew=families(sock))
    before = generation(sock)
    nftables.run(bare.transaction(FilterContents()))
    there = frozenset(bare.families)
    found = chunks(sock, without=FINGERPRINT_CHAIN, filled=False, among=sorted(there))
    loaded = _objects(sock, found, there)
    if generation(sock) != _after(before):
        return loaded
    nothing: dict[str, frozenset[str]] = {name: frozenset() for name in bare.elements}
    return replace(loaded, elements=nothing, intact=True, generation=_after(before), digests=_digests(found))


def _look(sock: NetlinkSocket) -> FilterContents:
    there = families(sock)
    return _objects(sock, chunks(sock, without=FINGERPRINT_CHAIN, filled=False, among=sorted(there)), there)


def _load_elements(wanted: Filter, loaded: FilterContents, notes: Sequence[str]) -> bool:
    """Change elements and counters alone, notes included; False when that is not all, or is refused.

    The kernel itself sees to it that nobody else committed anything since ``loaded`` was read.
    """
    change = wanted.small_change(loaded, notes)
    if change is None:
        return False
    change += nfbatch.notes(FINGERPRINT_CHAIN, _notes(wanted, loaded.digests, _after(loaded.generation)))
    try:
        with nft_socket() as sock:
            return holding.commit(sock, loaded.generation, change)
    except NetplanError:
        return False  # tried again by nft, whose refusal is told


def _remember(
    sock: NetlinkSocket, wanted: Filter, loaded: FilterContents, notes: Sequence[str], number: int
) -> None:
    global _last  # noqa: PLW0603 - what the kernel has is one for the process, too
    info = table(sock)
    there = frozenset(one for one in loaded.counters if one.startswith(NOTES))
    counters = wanted.counters | there.union(notes)
    place = (sock.namespace(), info.handle, number) if info else None
    # without a number for the namespace, another one with an equal table could be taken for this
    _last = _Loaded(place, wanted, counters) if place and place[0] >= 0 else None


def _still(number: int) -> None:
    """Remember that what this process loaded is the same in the generation after ``number``."""
    global _last  # noqa: PLW0603 - as above
    if _last is not None and _last.place[2] == number:
        _last = _last._replace(place=(*_last.place[:2], _after(number)))


def _run_first(texts: Iterable[str]) -> None:
    """Run the first of the transactions that nft accepts; raise what it said to the first when it accepts
    none.
    """
    refusal: NetplanError | None = None
    for text in texts:
        try:
            nftables.run(text)
        except NetplanError as error:
            refusal = refusal or error
        else:
            return
    if refusal:
        raise refusal


def _note(sock: NetlinkSocket, wanted: Filter, number: int) -> bool:
    """Write the notes; False when there was another transaction since ``number``, which they may describe."""
    there = families(sock)
    digests = _digests(chunks(sock, without=FINGERPRINT_CHAIN, filled=False, among=sorted(there)))
    return _commit_notes(sock, number, _notes(wanted, digests, _after(number)))


def _commit_notes(sock: NetlinkSocket, number: int, texts: Iterable[str]) -> bool:
    try:
        return holding.commit(sock, number, list(nfbatch.notes(FINGERPRINT_CHAIN, texts)))
    except nfbatch.RefusedError:
        if generation(sock) == number:
            raise
        return False


def _notes(wanted: Filter, digests: Mapping[str, str], number: int) -> list[str]:
    """Return what is to be noted; ``number`` is the generation that the notes become part of."""
    return [
        f"wanted {wanted.fingerprint}",
        f"structure {wanted.structure}",
        f"generation {number}",
        *(f"{what} {value}" for what, value in digests.items()),
    ]


def _after(number: int) -> int:
    """Return the generation after the next commit: 32 bits, never 0 (nf_tables_api.c, nf_tables_commit)."""
    return (number + 1) % (1 << 32) or 1
