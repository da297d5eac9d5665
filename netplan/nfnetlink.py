"""Reading our nft tables as raw nfnetlink: their handles, the generation, chains, rules, sets, elements,
counters.

libnftables writes (:mod:`netplan.nftables`); for reading, a JSON listing of 500 partitions would cost ten
times as much as these dumps.  Layouts: include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h.  Integers in
attributes are big endian.
"""

import atexit
import errno
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from netplan.errors import NetplanError
from netplan.netlink import (
    NETLINK_NETFILTER,
    NLA_F_NESTED,
    Message,
    NetlinkSocket,
    Refusal,
    attribute,
    attributes,
    elements,
    messages,
)

TABLE = "partitiond"

_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
FAMILIES = {"inet": 1, "bridge": 7, "arp": 3}
"""The families that tables of ours can have, with their numbers (NFPROTO_*, include/uapi/linux/netfilter.h)."""

_GETTABLE, _GETCHAIN, _GETRULE, _GETSET, _GETSETELEM, _GETGEN, _GETOBJ = (
    _SUBSYSTEM | number for number in (1, 4, 7, 10, 13, 16, 19)
)

_TABLE_NAME, _TABLE_FLAGS, _TABLE_HANDLE = 1, 2, 4
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_USE = 1, 3, 6
_CHAIN_ITSELF = frozenset(range(1, 13)) - {_CHAIN_USE}  # how many rules jump here is those rules' affair
_RULE_TABLE, _RULE_CHAIN, _RULE_USERDATA = 1, 2, 7
_SET_TABLE, _SET_NAME, _SET_FLAGS = 1, 2, 3
# flags, key and data types and sizes, timeout, kind of objects, handle; not how many elements there are
_SET_ITSELF = frozenset((_SET_FLAGS, 4, 5, 6, 7, 11, 15, 16))
_ELEM_TABLE, _ELEM_SET, _ELEM_LIST = 1, 2, 3
_ELEM_KEY, _ELEM_FLAGS, _ELEM_EXPR, _ELEM_OBJECT, _ELEM_KEY_END = 1, 3, 7, 9, 10
_EXPR_DATA = 2
_COUNTER_BYTES, _COUNTER_PACKETS = 1, 2
_ELEM_INTERVAL_END = 1
_OBJ_TABLE, _OBJ_NAME, _OBJ_TYPE, _OBJ_DATA, _OBJ_HANDLE = 1, 2, 3, 4, 6
_GEN_ID = 1
_LIMIT_ATTRIBUTES = (1, 2, 3, 4, 5)
_OBJECT_COUNTER, _OBJECT_LIMIT = 1, 4
_SET_ANONYMOUS, _SET_EVAL = 0x1, 0x20
_SET_MAPPING = 0x8 | 0x40  # to data or verdicts, to objects
_ELEM_ATTRIBUTES = frozenset((_ELEM_KEY, _ELEM_FLAGS, _ELEM_OBJECT, _ELEM_KEY_END))
_COMMENT = 0  # type of the user data that nft makes of a rule's comment (libnftnl, udata.h)

_GENMSGS = {family: struct.pack("!BBH", number, 0, 0) for family, number in FAMILIES.items()}
_GENMSG = _GENMSGS["inet"]
_OF_TABLE = attribute(1, TABLE.encode() + b"\0")
_TABLE_BYTES = TABLE.encode() + b"\0"
# NFTA_OBJ_DATA of a counter: bytes and packets, each an attribute of 12 bytes (net/netfilter/nft_counter.c)
_COUNTER = struct.Struct("!4xQ4xQ")
_OF_VALUE = frozenset(
    struct.pack("=HH", 4 + _COUNTER.size, nested | _OBJ_DATA) for nested in (0, NLA_F_NESTED)
)
_U32 = struct.Struct("!I")
_U64 = struct.Struct("!Q")
_TRIES = 8


_NAMESPACE = Path("/proc/thread-self/ns/net")
# sockets that wait for the next who needs one, by process and network namespace
_idle: list[tuple[tuple[int, int], NetlinkSocket]] = []
_MOST_IDLE = 2  # one reads while another commits


def here() -> tuple[int, int]:
    """Return what a socket can be used in: this process, and the network namespace of this thread."""
    return os.getpid(), _NAMESPACE.stat().st_ino


@contextmanager
def nft_socket() -> Iterator[NetlinkSocket]:
    """Yield a socket to nf_tables that is the caller's alone; afterwards it is kept for the next one, but where an error
    came through.

    Closing one waits until the kernel has destroyed what the transactions before took away (nft_rcv_nl_event in
    net/netfilter/nf_tables_api.c): 5 to 10 ms after each change of the filter.
    """
    where = here()
    sock = _waiting(where) or NetlinkSocket(NETLINK_NETFILTER)
    try:
        yield sock
    except BaseException:
        sock.close()  # an answer may still be under way
        raise
    if len(_idle) < _MOST_IDLE:
        _idle.append((where, sock))
    else:
        sock.close()


def _waiting(wanted: tuple[int, int]) -> NetlinkSocket | None:
    while _idle:
        try:
            where, sock = _idle.pop()
        except IndexError:  # another thread was faster
            return None
        if where == wanted:
            return sock
        sock.close()
    return None


@atexit.register
def close_idle() -> None:
    """Close the sockets that wait for the next who needs one: each keeps its network namespace."""
    _waiting((0, 0))


class TableInfo(NamedTuple):
    """The handle of our table (new each time the table is made) and its flags (1: dormant)."""

    handle: int
    flags: int


class Chunk(NamedTuple):
    """What belongs to one ``chain``, ``set`` or ``map``, as the kernel wrote it; ``name``: see :func:`full_name`.

    ``parts`` are the rules of a chain, or the elements of a set (those of a hash in no particular order).
    """

    kind: str
    name: str
    head: bytes
    parts: tuple[bytes, ...]


class Element(NamedTuple):
    """An element of a set: its key, the last key of its range (of concatenations), and the object it leads
    to.

    In other interval sets an element that is an ``end`` says where, after its key, a range is over.
    """

    key: bytes
    last: bytes
    counter: str
    end: bool


class CounterKey(NamedTuple):
    """A named counter, and its handle, which no other object of its table ever has: one that is made again has another."""

    name: str
    handle: int


class CounterValue(NamedTuple):
    """A named counter."""

    name: str
    packets: int
    bytes: int


def generation(sock: NetlinkSocket) -> int:
    """Return the number that each committed nft transaction of this network namespace raises
    (nf_tables_api.c).
    """
    message = _answer(sock.get(_GETGEN, _GENMSG))
    found = attributes(message.data, message.start + 4, message.end, (_GEN_ID,))
    return int(_U32.unpack(found[_GEN_ID])[0])


def full_name(family: str, name: str) -> str:
    """Return what an object of one of our tables is called among those of all: ``out``, ``bridge/guard``."""
    return name if family == "inet" else f"{family}/{name}"


def split_name(full: str) -> tuple[str, str]:
    """Return family and name of what :func:`full_name` made; the name of a counter may have slashes itself."""
    family, slash, name = full.partition("/")
    return (family, name) if slash and family in FAMILIES else ("inet", full)


def families(sock: NetlinkSocket) -> frozenset[str]:
    """Return the families in which there is a table of ours."""
    return frozenset(family for family in FAMILIES if table(sock, family) is not None)


def table(sock: NetlinkSocket, family: str = "inet") -> TableInfo | None:
    """Return our table of that family, None when there is none."""
    message = sock.get(_GETTABLE, _GENMSGS[family] + _OF_TABLE)
    # a kernel without tables of a family has none of ours
    if isinstance(message, Refusal) and message.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
        return None
    message = _answer(message)
    found = attributes(message.data, message.start + 4, message.end, (_TABLE_FLAGS, _TABLE_HANDLE))
    flags = _U32.unpack(found[_TABLE_FLAGS])[0] if _TABLE_FLAGS in found else 0
    return TableInfo(_U64.unpack(found[_TABLE_HANDLE])[0], flags)


def _answer(message: Message | Refusal) -> Message:
    if isinstance(message, Refusal):
        raise NetplanError(
            "network.packet_filter",
            f"the kernel does not answer about nft: {message.text()}",
            hint="the kernel needs nf_tables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)",
        )
    return message


def comments(sock: NetlinkSocket, chain: str) -> list[str]:
    """Return the comments of the rules of one of our chains, in order."""
    request = _GENMSG + _OF_TABLE + attribute(_RULE_CHAIN, chain.encode() + b"\0")
    found = []
    for message in sock.dump(_GETRULE, request):
        have = attributes(
            message.data, message.start + 4, message.end, (_RULE_TABLE, _RULE_CHAIN, _RULE_USERDATA)
        )
        if _name(have[_RULE_TABLE]) != TABLE or _name(have[_RULE_CHAIN]) != chain:
            continue
        data = have.get(_RULE_USERDATA, b"")
        if len(data) > 2 and data[0] == _COMMENT:
            found.append(_name(data[2 : 2 + data[1]]))
    return found


def _name(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="surrogateescape")


def chunks(
    sock: NetlinkSocket, *, without: str, filled: bool = True, among: Iterable[str] = ("inet",)
) -> list[Chunk]:
    """Return all chains, sets and maps of our tables in the families ``among``, with their rules and, if ``filled``,
    elements, but for the chain ``without``.

    Handles are left in: whoever removes a rule and adds it again has changed the table.  Named objects are
    not read: the kernel keeps them as long as an element or rule refers to them.  What the kernel itself puts
    into sets is not read either.
    """
    return [one for family in among for one in _chunks(sock, family, without, filled=filled)]


def _chunks(sock: NetlinkSocket, family: str, without: str, *, filled: bool) -> Iterator[Chunk]:
    rules: dict[str, list[bytes]] = {}
    header = _GENMSGS[family]
    for message in sock.dump(_GETRULE, header + _OF_TABLE):
        body, have = _body(message, (_RULE_TABLE, _RULE_CHAIN))
        if have[_RULE_TABLE] == _TABLE_BYTES:
            rules.setdefault(_name(have[_RULE_CHAIN]), []).append(body)
    for message in sock.dump(_GETCHAIN, header):
        body, have = _body(message, (_CHAIN_TABLE, _CHAIN_NAME))
        name = _name(have[_CHAIN_NAME])
        if have[_CHAIN_TABLE] == _TABLE_BYTES and name != without:
            about = attributes(body, 0, len(body), _CHAIN_ITSELF)
            yield Chunk("chain", full_name(family, name), _sorted(about), tuple(rules.get(name, ())))
    for message in sock.dump(_GETSET, header + _OF_TABLE):
        body, have = _body(message, (_SET_TABLE, _SET_NAME, _SET_FLAGS))
        flags = _U32.unpack(have[_SET_FLAGS])[0] if _SET_FLAGS in have else 0
        if have[_SET_TABLE] == _TABLE_BYTES and not flags & _SET_ANONYMOUS:  # those are part of their rules
            name = _name(have[_SET_NAME])
            kind = "map" if flags & _SET_MAPPING else "set"
            about = attributes(body, 0, len(body), _SET_ITSELF)
            read = filled and not flags & _SET_EVAL
            parts = tuple(set_elements(sock, family, name)) if read else ()
            yield Chunk(kind, full_name(family, name), _sorted(about), parts)


def _sorted(about: dict[int, bytes]) -> bytes:
    return repr(sorted(about.items())).encode()


def _body(message: Message, wanted: tuple[int, ...]) -> tuple[bytes, dict[int, bytes]]:
    start = message.start + 4  # the header holds the generation, which others move
    return message.data[start : message.end], attributes(message.data, start, message.end, wanted)


def set_elements(sock: NetlinkSocket, family: str, name: str) -> list[bytes]:
    """Return the elements of a set of ours, as the kernel writes them."""
    found: list[bytes] = []
    request = (
        _GENMSGS[family] + attribute(_ELEM_TABLE, _TABLE_BYTES) + attribute(_ELEM_SET, name.encode() + b"\0")
    )
    for message in sock.dump(_GETSETELEM, request):
        for part in attributes(message.data, message.start + 4, message.end, (_ELEM_LIST,)).values():
            found += elements(part)
    return found


def parsed(element: bytes) -> Element:
    """Read one element as :func:`chunks` gives it."""
    have = attributes(element, 0, len(element), _ELEM_ATTRIBUTES)
    flags = _U32.unpack(have[_ELEM_FLAGS])[0] if _ELEM_FLAGS in have else 0
    # NFTA_SET_ELEM_KEY and _KEY_END nest one attribute, the value
    return Element(
        have.get(_ELEM_KEY, b"")[4:],
        have.get(_ELEM_KEY_END, b"")[4:],
        _name(have.get(_ELEM_OBJECT, b"")),
        bool(flags & _ELEM_INTERVAL_END),
    )


def dynamic_sets(sock: NetlinkSocket, family: str) -> list[str]:
    """Return the names of the sets of our table that the kernel fills itself."""
    found = []
    for message in sock.dump(_GETSET, _GENMSGS[family] + _OF_TABLE):
        _, have = _body(message, (_SET_TABLE, _SET_NAME, _SET_FLAGS))
        flags = _U32.unpack(have[_SET_FLAGS])[0] if _SET_FLAGS in have else 0
        if have[_SET_TABLE] == _TABLE_BYTES and flags & _SET_EVAL and not flags & _SET_ANONYMOUS:
            found.append(_name(have[_SET_NAME]))
    return found


class Counted(NamedTuple):
    """An element of a set that bears a counter."""

    key: bytes
    packets: int
    bytes: int


def counted(sock: NetlinkSocket, family: str, name: str) -> list[Counted]:
    """Return the elements of one of our sets with what their counters say."""
    return [_counted(one) for one in set_elements(sock, family, name)]


def _counted(element: bytes) -> Counted:
    have = attributes(element, 0, len(element), (_ELEM_KEY, _ELEM_EXPR))
    expression = have.get(_ELEM_EXPR, b"")
    data = attributes(expression, 0, len(expression), (_EXPR_DATA,)).get(_EXPR_DATA, b"")
    values = attributes(data, 0, len(data), (_COUNTER_BYTES, _COUNTER_PACKETS))
    packets, octets = (
        _U64.unpack(values[one])[0] if one in values else 0 for one in (_COUNTER_PACKETS, _COUNTER_BYTES)
    )
    return Counted(have.get(_ELEM_KEY, b"")[4:], packets, octets)


class _Layout(NamedTuple):
    """Where in a dump of our counters their values are, for each dump that is like ``rest`` wherever ``mask`` has ones:
    everything but the values, and of the headers what tells one dump from another.

    ``keys`` are of the counters in the order of the dump; ``values`` cuts out bytes and packets of each.
    """

    length: int
    mask: int
    rest: int
    keys: tuple[CounterKey, ...]
    values: struct.Struct


_layout: _Layout | None = None


def counters_of(sock: NetlinkSocket) -> list[CounterValue]:
    """Return every named counter of our table, without resetting any."""
    keys, values = counter_values(sock)
    numbers = iter(values)
    return [CounterValue(key.name, next(numbers), octets) for key, octets in zip(keys, numbers, strict=False)]


def counter_values(sock: NetlinkSocket) -> tuple[tuple[CounterKey, ...], tuple[int, ...]]:
    """Return all our counters, and bytes and packets of each in turn; nothing is reset.

    The first is the same object again as long as they are the same. A dump of 500 partitions is 6000 messages, and
    to take each apart is most of the work. As the kernel gives the same objects in the same order until somebody
    changes them, mostly the dump differs from the one before in its values alone, which one comparison of it all as
    a number tells.
    """
    global _layout  # noqa: PLW0603 - the one that was seen last; a tuple, replaced whole
    request = _GENMSG + _OF_TABLE + attribute(_OBJ_TYPE, _U32.pack(_OBJECT_COUNTER))
    for _ in range(_TRIES):
        before = generation(sock)
        stream = sock.stream(_GETOBJ, request)
        if generation(sock) != before:
            continue  # a change ran into it
        layout = _layout
        if layout is None or not _fits(layout, stream):
            layout = _layout = _found_layout(stream, layout)
        return layout.keys, layout.values.unpack_from(stream)
    raise NetplanError(
        "network.packet_filter",
        "nft tables are changed each time that the counters are read",
        resource=f"filter/{TABLE}",
        retryable=True,
    )


def _found_layout(stream: bytes, last: _Layout | None) -> _Layout:
    keys: list[CounterKey] = []
    cuts: list[str] = ["!"]
    mask = bytearray(b"\xff" * len(stream))
    behind = 0
    for _, data, start, end in messages(stream):
        # flags, sequence and port of the header (netlink(7)), and the generation (struct nfgenmsg)
        mask[start - 10 : start] = bytes(10)
        mask[start + 2 : start + 4] = bytes(2)
        # the value comes last, behind what names the counter and does not change (nf_tables_fill_obj_info)
        value = end - _COUNTER.size
        if data[value - 4 : value] not in _OF_VALUE:
            value = _value_at(data, start + 4, end)  # of an object with a comment, for instance
        key = _counter_key(data[start + 4 : value - 4])
        if key is not None and value < end:
            keys.append(key)
            cuts.append(f"{value - behind}x{_COUNTER.format[1:]}")
            behind = value + _COUNTER.size
            # "!4xQ4xQ": only the numbers, not what stands before each
            for number in (value + 4, value + 16):
                mask[number : number + 8] = bytes(8)
    found = tuple(keys)
    if last is not None and last.keys == found:
        found = last.keys
    bits = int.from_bytes(mask, "little")
    rest = int.from_bytes(stream, "little") & bits
    return _Layout(len(stream), bits, rest, found, struct.Struct("".join(cuts)))


def _fits(layout: _Layout, stream: bytes) -> bool:
    return len(stream) == layout.length and int.from_bytes(stream, "little") & layout.mask == layout.rest


def _value_at(data: bytes, start: int, end: int) -> int:
    """Return where the value of a counter begins in its attributes; ``end`` when there is none."""
    while start + 4 <= end:
        if data[start : start + 4] in _OF_VALUE:
            return start + 4
        start += (max(int.from_bytes(data[start : start + 2], sys.byteorder), 4) + 3) & ~3
    return end


@lru_cache(maxsize=1 << 13)
def _counter_key(head: bytes) -> CounterKey | None:
    """Return which counter of our table it is; None for what is something else."""
    have = attributes(head, 0, len(head), (_OBJ_TABLE, _OBJ_NAME, _OBJ_TYPE, _OBJ_HANDLE))
    if have.get(_OBJ_TABLE) != _TABLE_BYTES or have.get(_OBJ_TYPE) != _U32.pack(_OBJECT_COUNTER):
        return None
    return CounterKey(_name(have[_OBJ_NAME]), _U64.unpack(have[_OBJ_HANDLE])[0])


def limits_of(sock: NetlinkSocket, among: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the named limits of our tables (:func:`full_name`): rate, seconds that it is for, burst, type, flags."""
    found = {}
    for family in among:
        request = _GENMSGS[family] + _OF_TABLE + attribute(_OBJ_TYPE, _U32.pack(_OBJECT_LIMIT))
        for message in sock.dump(_GETOBJ, request):
            _, have = _body(message, (_OBJ_TABLE, _OBJ_NAME, _OBJ_TYPE, _OBJ_DATA))
            if have.get(_OBJ_TABLE) == _TABLE_BYTES and have.get(_OBJ_TYPE) == _U32.pack(_OBJECT_LIMIT):
                about = attributes(have[_OBJ_DATA], 0, len(have[_OBJ_DATA]), _LIMIT_ATTRIBUTES)
                values = tuple(int.from_bytes(about.get(one, b""), "big") for one in _LIMIT_ATTRIBUTES)
                found[full_name(family, _name(have[_OBJ_NAME]))] = values
    return found


def has_counter(sock: NetlinkSocket, name: str) -> bool:
    """Say whether our table has a counter of that name."""
    request = _GENMSG + _OF_TABLE + attribute(_OBJ_NAME, name.encode() + b"\0")
    request += attribute(_OBJ_TYPE, _U32.pack(_OBJECT_COUNTER))
    return not isinstance(sock.get(_GETOBJ, request), Refusal)
