"""Elements and counters more or less, as one raw nfnetlink transaction.

libnftables reads all objects of the table before it adds one element: 12 ms at 300 partitions, most of what a
partition more costs.  Here the same is 0.3 ms.  And it looks up each number of a user as a name first, in a
database of as many users: 300 partitions from nothing cost it 130 ms, 500 twice as much, here 50 and 80 ms.

Only for what :mod:`netplan.packet_filter` adds and removes when partitions come and go: elements of its kinds
of sets, counters, and the rules without effect that bear our notes.  How nft writes elements of each kind is
read back by :mod:`netplan.elements`, and the tests compare both ways.

Layouts: include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h.
"""

import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from ipaddress import ip_network
from socket import AF_INET, AF_INET6, inet_pton

from netplan.elements import SIZES, field_types, padded
from netplan.errors import NetplanError
from netplan.netlink import NLA_F_NESTED, NLM_F_CREATE, NetlinkSocket, Refusal, Request, attribute
from netplan.nfnetlink import FAMILIES, TABLE, split_name

_BEGIN, _END = 0x10, 0x11  # NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_NEWTABLE, _DELTABLE, _NEWRULE, _DELRULE, _NEWSETELEM, _DELSETELEM, _NEWOBJ, _DELOBJ = (
    _SUBSYSTEM << 8 | number for number in (0, 2, 6, 8, 12, 14, 18, 20)
)
_NLM_F_APPEND = 0x800
_GENMSGS = {family: bytes((number, 0, 0, 0)) for family, number in FAMILIES.items()}  # NFNETLINK_V0
_GENMSG = _GENMSGS["inet"]
_BATCH = b"\0\0" + _SUBSYSTEM.to_bytes(2, "big")
_BATCH_GENID = 1
_OBJECT_COUNTER, _OBJECT_LIMIT = 1, 4
_LIMIT_BYTES, _LIMIT_OVER = 1, 1  # NFT_LIMIT_PKT_BYTES, NFT_LIMIT_F_INV
_INTERVAL_END = 1
_RETURN = -5  # NFT_RETURN
_COMMENT = 0  # NFTNL_UDATA_RULE_COMMENT
_LISTED = 1 | NLA_F_NESTED  # NFTA_LIST_ELEM
_ATTRIBUTE = struct.Struct("=HH")
_FILL = (b"", b"\0\0\0", b"\0\0", b"\0")
_TABLE_NAME = attribute(1, TABLE.encode() + b"\0")

# an attribute says its own length in 16 bits (include/uapi/linux/netlink.h, struct nlattr)
_MOST_LISTED = 60_000
_MOST_BYTES = 32 << 20
"""A transaction is one write: 2.5 KiB for each partition, and memory of the kernel's while it lasts."""


class RefusedError(NetplanError):
    """The kernel refused a transaction: all of it."""

    def __init__(self, refusal: Refusal) -> None:
        self.errno = refusal.errno
        super().__init__(
            "network.packet_filter",
            f"the kernel refused the transaction: {refusal.text()}",
            resource=f"filter/{TABLE}",
            hint="the rules that were loaded before are still in force",
        )


def commit(sock: NetlinkSocket, generation: int, requests: Sequence[Request]) -> bool:
    """Commit all of them or none, if nobody else has committed anything since ``generation``.

    False when it is too much for one write.  Raises ``network.packet_filter`` with the kernel's words.
    """
    size = sum(len(one.payload) + 20 for one in requests)
    if size > _MOST_BYTES:
        return False
    sock.make_room(size)
    begin = Request(_BEGIN, 0, _BATCH + attribute(_BATCH_GENID, generation.to_bytes(4, "big")))
    refusal = sock.transaction([begin, *requests, Request(_END, 0, _BATCH)], acknowledged=len(requests))
    if refusal is not None:
        raise RefusedError(refusal)
    return True


def tables(families: Iterable[str], flags: int) -> Iterator[Request]:
    """Yield what makes our tables, or gives them other flags (NFT_TABLE_F_*)."""
    about = _TABLE_NAME + attribute(2, flags.to_bytes(4, "big"))
    yield from (Request(_NEWTABLE, NLM_F_CREATE, _GENMSGS[family] + about) for family in families)


def no_tables(families: Iterable[str]) -> Iterator[Request]:
    """Yield what removes our tables, with all that is in them."""
    yield from (Request(_DELTABLE, 0, _GENMSGS[family] + _TABLE_NAME) for family in families)


def counters(names: Iterable[str], *, add: bool) -> Iterator[Request]:
    """Yield what adds or deletes counters."""
    kind, flags = (_NEWOBJ, NLM_F_CREATE) if add else (_DELOBJ, 0)
    about = attribute(3, _OBJECT_COUNTER.to_bytes(4, "big"))
    if add:
        # from 0 on: bytes and packets, each 64 bits (net/netfilter/nft_counter.c)
        about += _nested(4, attribute(1, bytes(8)) + attribute(2, bytes(8)))
    where = _GENMSG + _TABLE_NAME
    for name in names:
        yield Request(kind, flags, where + _name(2, name) + about)


def limit_values(bytes_per_second: int, burst: int) -> tuple[int, ...]:
    """Return the attributes of a limit that matches what is too much, in their order (NFTA_LIMIT_*)."""
    return bytes_per_second, 1, burst, _LIMIT_BYTES, _LIMIT_OVER


def limits(names: Iterable[str], burst: int, *, add: bool) -> Iterator[Request]:
    """Yield what adds or deletes limits (:func:`netplan.nfnetlink.full_name` of :func:`netplan.rate_limits.limit_name`)."""
    kind, flags = (_NEWOBJ, NLM_F_CREATE) if add else (_DELOBJ, 0)
    for full in names:
        family, name = split_name(full)
        about = attribute(3, _OBJECT_LIMIT.to_bytes(4, "big"))
        if add:
            values = limit_values(int(name.rpartition("/")[2]), burst)
            sized = zip(values, (8, 8, 4, 4, 4), strict=True)
            data = (attribute(at, value.to_bytes(size, "big")) for at, (value, size) in enumerate(sized, 1))
            about += _nested(4, b"".join(data))
        yield Request(kind, flags, _GENMSGS[family] + _TABLE_NAME + _name(2, name) + about)


def elements(name: str, grammar: str, texts: Sequence[str], *, add: bool) -> Iterator[Request]:
    """Yield what adds elements to a set or map, or deletes them, written as nft does.  Raises ValueError.

    ``name``: see :func:`netplan.nfnetlink.full_name`.
    """
    if not texts:
        return
    kind, flags = (_NEWSETELEM, NLM_F_CREATE) if add else (_DELSETELEM, 0)
    family, bare = split_name(name)
    where = _GENMSGS[family] + _TABLE_NAME + _name(2, bare)
    types, interval = _grammar(grammar)
    listed: list[bytes] = []
    size = 0
    for text in texts:
        element = _element(types, text, interval, add)
        if size + len(element) > _MOST_LISTED:
            yield Request(kind, flags, where + _nested(3, b"".join(listed)))
            listed, size = [], 0
        listed.append(element)
        size += len(element)
    yield Request(kind, flags, where + _nested(3, b"".join(listed)))


def notes(chain: str, comments: Iterable[str]) -> Iterator[Request]:
    """Yield what replaces the rules of a chain by rules that return, each with a comment."""
    where = _GENMSG + _TABLE_NAME + _name(2, chain)
    yield Request(_DELRULE, 0, where)
    verdict = _nested(2, _nested(2, attribute(1, (_RETURN % (1 << 32)).to_bytes(4, "big"))))
    data = _nested(2, attribute(1, bytes(4)) + verdict)  # into the verdict register, number 0
    body = _nested(4, _nested(1, _name(1, "immediate") + data))
    for comment in comments:
        text = comment.encode() + b"\0"
        yield Request(
            _NEWRULE,
            NLM_F_CREATE | _NLM_F_APPEND,
            where + body + attribute(7, bytes((_COMMENT, len(text))) + text),
        )


@cache
def _grammar(text: str) -> tuple[tuple[str, ...], bool]:
    """Return the types of a set's fields, and whether there may be ranges."""
    return field_types(text), "interval" in text.partition(";")[2]


@lru_cache(maxsize=1 << 15)
def _element(types: tuple[str, ...], text: str, interval: bool, referring: bool) -> bytes:
    """Return an element; of a range in a plain interval set also its end, an element of its own.

    Remembered for when all are loaded again, after somebody flushed them: that is when it has to be quick.
    """
    key, _, counter = text.partition(" : ")
    reference = _name(9, counter.strip('"')) if counter and referring else b""
    fields = key.split(" . ")
    if len(fields) != len(types):
        raise ValueError(text)
    ends = [_field(kind, field, sortable=interval) for kind, field in zip(types, fields, strict=True)]
    if len(types) > 1:
        ends = [(_pad(lowest), _pad(highest)) for lowest, highest in ends]
    first = b"".join([end[0] for end in ends])
    if not interval:
        # most elements are so: headers that are always the same are packed once
        body = _key_head(len(first)) + first + _FILL[len(first) & 3] + reference
        return _ATTRIBUTE.pack(4 + len(body), _LISTED) + body
    last = b"".join([end[1] for end in ends])
    if len(types) > 1:
        return _nested(1, _key(1, first) + _key(10, last) + reference)
    behind = (int.from_bytes(last, "big") + 1).to_bytes(len(last), "big")
    return _nested(1, _key(1, first) + reference) + _nested(
        1, _key(1, behind) + attribute(3, _INTERVAL_END.to_bytes(4, "big"))
    )


@lru_cache(maxsize=1 << 12)
def _field(kind: str, text: str, *, sortable: bool) -> tuple[bytes, bytes]:
    """Return the first and the last value that a field stands for."""
    if kind == "uid":
        value = int(text).to_bytes(4, "big" if sortable else sys.byteorder)
        return value, value
    if kind.startswith("@"):
        first, _, last = text.partition("-")
        low, high = bytes.fromhex(first[2:]), bytes.fromhex((last or first)[2:])
        if not len(low) == len(high) == SIZES[kind]:
            raise ValueError(text)
        return low, high
    if kind in {"ifname", "iifname"}:
        value = text.strip('"').encode().ljust(SIZES[kind], b"\0")
        return value, value
    if kind == "ether_addr":
        value = bytes.fromhex(text.replace(":", ""))
        return value, value
    if "/" in text:
        network = ip_network(text)
        return network.network_address.packed, network.broadcast_address.packed
    value = inet_pton(AF_INET if kind == "ipv4_addr" else AF_INET6, text)
    return value, value


@cache
def _key_head(size: int) -> bytes:
    """Return the headers before the value of a key that has so many bytes."""
    inner = 4 + size
    return _ATTRIBUTE.pack(4 + padded(inner), 1 | NLA_F_NESTED) + _ATTRIBUTE.pack(inner, 1)


def _pad(value: bytes) -> bytes:
    return value.ljust(padded(len(value)), b"\0")


def _key(kind: int, value: bytes) -> bytes:
    return _nested(kind, attribute(1, value))


def _name(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode() + b"\0")


def _nested(kind: int, value: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, value)
