"""Forgetting what the kernel learned of a guest: its MAC, and the addresses that it uses.

Both stay with a tap for as long as one instance has it (:mod:`netplan.tap_rules`); the next one is another machine.
What counts refusals stays: it is the partition's.
"""

from collections.abc import Iterator

from netplan import holding, nfbatch
from netplan.elements import texts
from netplan.errors import NetplanError
from netplan.netlink import NetlinkSocket, Request
from netplan.nfnetlink import dynamic_sets, families, full_name, generation, nft_socket, parsed, set_elements
from netplan.tap_rules import HEARD, OF_ALL_TAPS, learned_sets

_TRIES = 5


def forget(tap: str) -> None:
    """Forget what was learned of the guest behind a tap, in one transaction.  Raises ``network.packet_filter``."""
    for tries_left in reversed(range(_TRIES)):
        with nft_socket() as sock:
            number = generation(sock)
            requests = list(_less(sock, tap))
            try:
                if not requests or holding.commit(sock, number, requests):
                    return
            except NetplanError:
                # somebody committed something, or what is used no more timed out meanwhile
                if not tries_left:
                    raise


def _less(sock: NetlinkSocket, tap: str) -> Iterator[Request]:
    """Yield what takes its elements away, and those of the sets of all taps that are its own."""
    for family in sorted(families(sock)):
        there = frozenset(dynamic_sets(sock, family))  # none where no tap of a family is guarded
        grammars = {name: text for name, text in learned_sets(family).items() if name in there}
        of_it: dict[str, list[str]] = {}
        for name in sorted(grammars.keys() - {*OF_ALL_TAPS.values(), *HEARD}):
            found = _elements(sock, family, name)
            of_it[name] = [text for text in found if text.partition(" . ")[0] == f'"{tap}"']
            yield from nfbatch.elements(full_name(family, name), grammars[name], of_it[name], add=False)
        for name, shared in OF_ALL_TAPS.items():
            keys = [text.partition(" . ")[2] for text in of_it.get(name, ())]
            if shared in grammars and keys:
                gone = sorted(_elements(sock, family, shared) & {_as(grammars[shared], key) for key in keys})
                yield from nfbatch.elements(full_name(family, shared), grammars[shared], gone, add=False)


def _elements(sock: NetlinkSocket, family: str, name: str) -> frozenset[str]:
    found = texts(learned_sets(family)[name], map(parsed, set_elements(sock, family, name)))
    return frozenset() if found is None else found


def _as(grammar: str, key: str) -> str:
    """Return an element as a set of that grammar has it: a MAC, where it is not a raw field."""
    if grammar.startswith("type ether_addr"):
        return bytes.fromhex(key.removeprefix("0x")).hex(":")
    return key
