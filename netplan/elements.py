"""Elements of nft sets: from the kernel's bytes to the text that nft would be given for them.  Pure.

Only the types that our sets have (:data:`SIZES` and concatenations of them); what cannot be read with
certainty is None, and its set is then filled anew.
"""

import sys
from collections.abc import Iterable
from socket import AF_INET, AF_INET6, inet_ntop

from netplan.nfnetlink import Element

SIZES = {"uid": 4, "ipv4_addr": 4, "ipv6_addr": 16, "ifname": 16, "ether_addr": 6} | {
    "iifname": 16,
    "@nh,64,128": 16,
    "@ll,48,48": 6,
}
"""The types of fields, with their bytes; in a concatenation each begins at a multiple of four.  What is declared
by ``typeof`` a raw field is a number: ``0x20010db8000000000000000000000001``, ranges with their two ends.
"""


def field_types(grammar: str) -> tuple[str, ...]:
    """Return the types of the fields of a set or map of that grammar."""
    declared = grammar.partition(";")[0].removeprefix("typeof ").removeprefix("type ")
    return tuple(declared.partition(" : ")[0].strip().split(" . "))


def padded(size: int) -> int:
    """Return what a field takes in a concatenation (include/net/netfilter/nf_tables.h, NFT_REG32_SIZE)."""
    return (size + 3) & ~3


def texts(grammar: str, found: Iterable[Element]) -> frozenset[str] | None:
    """Return the elements of a set of that grammar (``type uid . ipv6_addr; flags interval``) as text."""
    kinds = field_types(grammar)
    try:
        if "interval" in grammar.partition(";")[2] and len(kinds) == 1:
            return frozenset(_ranges(kinds[0], list(found)))
        return frozenset(_text(kinds, one) for one in found)
    except ValueError:
        return None


def _text(kinds: tuple[str, ...], element: Element) -> str:
    fields = []
    offset = 0
    for kind in kinds:
        size = SIZES[kind]
        first, last = element.key[offset : offset + size], element.last[offset : offset + size]
        # nft puts numbers into network order where ranges must be sorted, that is where there is a last key
        fields.append(
            _network(kind, first, last)
            if last and first != last
            else _value(kind, first, sortable=bool(last))
        )
        offset += padded(size)
    if offset != padded(len(element.key)) or element.end:
        raise ValueError
    return _with_counter(" . ".join(fields), element)


def _ranges(kind: str, found: list[Element]) -> Iterable[str]:
    """Pair the starts of ranges with the ends behind them (net/netfilter/nft_set_rbtree.c)."""
    # where one range ends and the next begins there are two elements of the same key: the end comes first
    found.sort(key=lambda one: (one.key, not one.end))
    if found and found[0].end and not any(found[0].key):  # nft says so where nothing begins at the very start
        del found[0]
    if len(found) % 2:
        raise ValueError
    for place in range(0, len(found), 2):
        start, end = found[place : place + 2]
        if start.end or not end.end:
            raise ValueError
        last = int.from_bytes(end.key, "big") - 1
        yield _with_counter(_network(kind, start.key, last.to_bytes(len(start.key), "big")), start)


def _with_counter(key: str, element: Element) -> str:
    return f'{key} : "{element.counter}"' if element.counter else key


def _value(kind: str, data: bytes, *, sortable: bool) -> str:
    if kind == "uid":
        return str(int.from_bytes(data, "big" if sortable else sys.byteorder))
    if kind.startswith("@"):
        return f"0x{data.hex()}"
    if kind in {"ifname", "iifname"}:
        return f'"{data.rstrip(bytes(1)).decode()}"'
    if kind == "ether_addr":
        return data.hex(":")
    return inet_ntop(AF_INET if kind == "ipv4_addr" else AF_INET6, data)


def _network(kind: str, first: bytes, last: bytes) -> str:
    """Return a range of addresses as a network; raises ValueError when it is none."""
    if kind.startswith("@"):
        return f"0x{first.hex()}" if first == last else f"0x{first.hex()}-0x{last.hex()}"
    lowest, highest = int.from_bytes(first, "big"), int.from_bytes(last, "big")
    size = highest - lowest + 1
    if size < 1 or size & (size - 1) or lowest % size:
        raise ValueError
    family = AF_INET if len(first) == 4 else AF_INET6
    return f"{inet_ntop(family, first)}/{8 * len(first) - size.bit_length() + 1}"
