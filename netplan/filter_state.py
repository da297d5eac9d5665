"""Whether the packet filter in the kernel is still the one that was loaded, without a file to remember it by.

After each load we note in the table itself, as comments of rules in a chain that no hook reaches:

    wanted <fingerprint>      structure <fingerprint>      the filter that was loaded, and its rules alone
    generation <number>                                    the state of nft as a whole, right after this very
    note chain out <digest>        set owner6 <digest> …        each object as the kernel gives it back

While the kernel's generation is the noted one, no transaction of anybody was committed since: nothing can
differ, and an observation costs two small requests at any number of partitions.  Otherwise somebody changed
something, mostly in a table of their own, and the objects are read and compared one by one.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from netplan import nftables
from netplan.elements import texts
from netplan.errors import NetplanError
from netplan.model import FilterContents, FilterState
from netplan.netlink import NETLINK_NETFILTER, NetlinkSocket
from netplan.nfnetlink import TABLE, Chunk, chunks, comments, counters_of, generation, parsed, table
from netplan.packet_filter import FINGERPRINT_CHAIN, Filter

_TRIES = 3
_DORMANT = 1


def observe_filter(wanted: Filter | None) -> FilterState:
    """Return what is loaded; the contents of the table are read only when it is not what is wanted."""
    with NetlinkSocket(NETLINK_NETFILTER) as sock:
        info = table(sock)
        if info is None:
            return FilterState()
        notes = _read_notes(sock)
        loaded, structure = notes.pop("wanted", ""), notes.pop("structure", "")
        untouched = notes.pop("generation", "") == str(generation(sock)) and not info.flags & _DORMANT
        if untouched and (wanted is None or loaded == wanted.fingerprint):
            return FilterState(loaded=True, wanted=loaded)
        found = chunks(sock, without=FINGERPRINT_CHAIN)
        changes = {} if untouched else _compare(found, notes)
        if info.flags & _DORMANT:
            changes[f"table {TABLE}"] = "is dormant"
        drift = tuple(f"{what} {change}" for what, change in changes.items())
        if wanted is None or (loaded == wanted.fingerprint and not drift):
            return FilterState(loaded=True, wanted=loaded, drift=drift)
        counters = _counters(sock)
    contents = _contents(found, counters, changes, wanted if structure == wanted.structure else None)
    return FilterState(loaded=True, wanted=loaded, drift=drift, contents=contents)


def _read_notes(sock: NetlinkSocket) -> dict[str, str]:
    notes = {}
    for comment in comments(sock, FINGERPRINT_CHAIN):
        what, _, value = comment.rpartition(" ")
        notes[what] = value
    return notes


def _compare(found: Sequence[Chunk], noted: Mapping[str, str]) -> dict[str, str]:
    """Return what happened to each object that is not as noted."""
    digests = _digests(found)
    changed = {what: "was changed" for what in noted if what in digests and noted[what] != digests[what]}
    gone = {what: "was removed" for what in noted if what not in digests}
    added = {what: "was added" for what in digests if what not in noted}
    return changed | gone | added


def _digests(found: Sequence[Chunk]) -> dict[str, str]:
    return {
        f"{one.kind} {one.name}": hashlib.blake2b(
            b"\0".join((one.head, *one.parts)), digest_size=12
        ).hexdigest()
        for one in found
    }


def _counters(sock: NetlinkSocket) -> frozenset[str]:
    return frozenset(value.name for value in counters_of(sock))


def _contents(
    found: Sequence[Chunk], counters: frozenset[str], changes: Mapping[str, str], same: Filter | None
) -> FilterContents:
    """Return what the table has; ``same`` is the wanted filter when its rules are those that were loaded."""
    names: dict[str, set[str]] = {"set": set(), "map": set(), "chain": set()}
    elements = {}
    for one in found:
        names[one.kind].add(one.name)
        if same is None or one.kind == "chain" or f"{one.kind} {one.name}" in changes:
            continue
        grammar = same.maps.get(one.name) or same.sets.get(one.name)
        known = texts(grammar, map(parsed, one.parts)) if grammar else None
        if known is not None:
            elements[one.name] = known
    return FilterContents(
        sets=frozenset(names["set"]),
        maps=frozenset(names["map"]),
        chains=frozenset(names["chain"]) | {FINGERPRINT_CHAIN},
        counters=counters,
        elements=elements,
        intact=same is not None and all(what.startswith(("set ", "map ")) for what in changes),
    )


def load_filter(wanted: Filter, loaded: FilterContents, notes: Sequence[str] = ()) -> None:
    """Bring the packet filter from ``loaded`` to ``wanted`` in one transaction; note in a second what was
    loaded.

    ``notes``: see :meth:`netplan.packet_filter.Filter.transaction`.  Raises ``network.packet_filter``; what
    was in force then stays.
    """
    with NetlinkSocket(NETLINK_NETFILTER) as sock:
        for _ in range(_TRIES):
            before = generation(sock)
            _run_first(wanted.transactions(loaded, notes))
            if generation(sock) == _after(before) and _note(sock, wanted, _after(before)):
                return
            # what is there now is not known, but it is ours: next time all is filled again
            loaded = _contents(chunks(sock, without=FINGERPRINT_CHAIN), _counters(sock), {}, None)
        # a note that may describe a foreign change must not stay: without one, the next observation finds
        # drift
        nftables.run(f"flush chain inet {TABLE} {FINGERPRINT_CHAIN}\n")
    raise NetplanError(
        "network.packet_filter",
        "the packet filter is loaded, but somebody else keeps changing nft rules while it is being checked",
        resource=f"filter/{TABLE}",
        retryable=True,
    )


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


def _note(sock: NetlinkSocket, wanted: Filter, loaded: int) -> bool:
    """Write the notes; False when another transaction came between, so that they may describe its work."""
    digests = _digests(chunks(sock, without=FINGERPRINT_CHAIN))
    notes = [
        f"wanted {wanted.fingerprint}",
        f"structure {wanted.structure}",
        f"generation {_after(loaded)}",
        *(f"{what} {value}" for what, value in digests.items()),
    ]
    rules = "".join(f'  return comment "{note}"\n' for note in notes)
    nftables.run(f"table inet {TABLE} {{\n chain {FINGERPRINT_CHAIN} {{\n{rules} }}\n}}\n")
    return generation(sock) == _after(loaded)


def _after(number: int) -> int:
    """Return the generation after the next commit: 32 bits, never 0 (nf_tables_api.c, nf_tables_commit)."""
    return (number + 1) % (1 << 32) or 1
