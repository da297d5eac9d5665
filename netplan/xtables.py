"""Rules of legacy iptables: as words, and as the bytes that the kernel keeps of them.  Pure.

One layout serves both ways, so what is wanted and what the kernel has are compared as they are, and nobody
has to ask libxtables what a rule means.  Chains that a rule leads to are named: the kernel has offsets there.

Layouts, the same since Linux 2.6.24: include/uapi/linux/netfilter/{x_tables,xt_owner,xt_comment,xt_addrtype,
xt_tcpudp}.h, linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_network
from socket import AF_INET, AF_INET6, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP, AddressFamily
from typing import NamedTuple

BUILT_IN: Mapping[int, str] = {1: "INPUT", 2: "FORWARD", 3: "OUTPUT"}
"""The built-in chains of the table ``filter`` by the number of their hook."""

ANY_USER = (1, (1 << 32) - 2)
"""Every user but root.  ``--uid-owner`` with a range, not inverted, matches only packets of a socket that a
process opened: not those without a socket, nor those of the kernel's own sockets, which have no file
(net/netfilter/xt_owner.c).  ``! --uid-owner`` and ``--socket-exists`` match them, and so break RST and ping.
"""

FAMILIES = (AF_INET6, AF_INET)

_VERDICTS = {"DROP": -1, "ACCEPT": -2, "RETURN": -5}  # -NF_DROP - 1, -NF_ACCEPT - 1, XT_RETURN
_OF_VERDICT = {value: name for name, value in _VERDICTS.items()}

_MODULE = struct.Struct("=H29sB")  # of a match or target: size, name, revision
_STANDARD = struct.Struct("=i4x")
_OWNER = struct.Struct("=4I2B6x")
_OWNER_UID = 1
_COMMENT_SIZE = 256
_ADDRTYPE = struct.Struct("=HHI")
_ADDRTYPE_LOCAL, _INVERT_SOURCE = 1 << 2, 1
_TCP = struct.Struct("=4H4B4x")
_RST = 4
_SYN, _BEGINS = 2, 0x17  # of SYN, ACK, RST and FIN, SYN alone
_UDP = struct.Struct("=4HB7x")
_ICMP = struct.Struct("=4B4x")
_REJECT = struct.Struct("=I4x")
_OFFSETS = struct.Struct("=HH")
_COUNTERS = struct.Struct("=QQ")
_INTERFACE = 16  # IFNAMSIZ


class _Layout(NamedTuple):
    """Where a family has what: the part about addresses ends at ``ip``, the offsets, counters and matches are
    at.
    """

    address: int
    ip: int
    offsets: int
    counters: int
    matches: int
    tail: struct.Struct  # protocol, flags, inverted
    says_protocol: int
    goto: int
    echo: tuple[str, int, int]
    tcp_reset: int


_LAYOUTS: Mapping[AddressFamily, _Layout] = {
    AF_INET: _Layout(4, 84, 88, 96, 112, struct.Struct("=HBB"), 0, 2, ("icmp", IPPROTO_ICMP, 8), 7),
    AF_INET6: _Layout(
        16, 136, 140, 152, 168, struct.Struct("=HxBB3x"), 1, 4, ("icmp6", IPPROTO_ICMPV6, 128), 6
    ),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule in words.  ``target`` is ``RETURN``, ``DROP``, ``RESET`` (of a TCP connection) or one of our
    chains, to come back from unless it is a ``goto``.

    ``link_in`` and ``link_out`` are the names of the links that it comes and leaves by.
    ``users`` are the first and last number of the users whose sockets match; ``unlike_local`` wants a source
    that the host does not have, ``to_local`` a destination that it has; ``port`` is a destination of TCP,
    ``from_port`` a source, with ``udp`` those of UDP; ``syn`` is what begins a TCP connection.
    """

    target: str
    goto: bool = False
    source: str = ""
    destination: str = ""
    link_in: str = ""
    link_out: str = ""
    tcp: bool = False
    rst: bool = False
    syn: bool = False
    udp: bool = False
    port: int = 0
    from_port: int = 0
    echo_request: bool = False
    users: tuple[int, int] | None = None
    unlike_local: bool = False
    to_local: bool = False
    comment: str = ""


class Entry(NamedTuple):
    """A rule as the kernel has it: what it matches, the chain, verdict or module that it leads to, and what
    else it tells a module.
    """

    head: bytes
    target: str
    data: bytes = b""


class Counted(NamedTuple):
    """A rule in the kernel with its counters."""

    entry: Entry
    packets: int
    bytes: int


Chains = Mapping[str, tuple[Entry, ...]]
"""Chains by name."""


@lru_cache(maxsize=1 << 16)
def entry(rule: Rule, family: AddressFamily) -> Entry:
    """Return the rule as the kernel has it."""
    layout = _LAYOUTS[family]
    matches = b"".join(_matches(rule, layout))
    protocol = _protocol(rule, layout)
    flags = (layout.says_protocol if protocol else 0) | (layout.goto if rule.goto else 0)
    source, source_mask = _network(rule.source, layout.address)
    destination, destination_mask = _network(rule.destination, layout.address)
    links = b"".join(map(_link, (rule.link_in, rule.link_out)))
    links += b"".join(map(_link_mask, (rule.link_in, rule.link_out)))
    head = (
        source + destination + source_mask + destination_mask + links + layout.tail.pack(protocol, flags, 0)
    )
    if rule.target == "RESET":
        return Entry(head + matches, "REJECT", _REJECT.pack(layout.tcp_reset))
    return Entry(head + matches, rule.target)


def _protocol(rule: Rule, layout: _Layout) -> int:
    if rule.udp:
        return IPPROTO_UDP
    if rule.tcp or rule.rst or rule.syn or rule.port or rule.from_port:
        return IPPROTO_TCP
    return layout.echo[1] if rule.echo_request else 0


def _link(name: str) -> bytes:
    return name.encode().ljust(_INTERFACE, b"\0")


def _link_mask(name: str) -> bytes:
    """Return what is compared of a name: with the byte behind it, as another name may begin alike."""
    return (b"\xff" * (len(name) + 1 if name else 0)).ljust(_INTERFACE, b"\0")


def _matches(rule: Rule, layout: _Layout) -> Iterator[bytes]:
    """Yield the matches, the cheapest first."""
    if rule.rst:
        yield _module("tcp", 0, _TCP.pack(0, 0xFFFF, 0, 0xFFFF, 0, _RST, _RST, 0))
    if rule.syn:
        yield _module("tcp", 0, _TCP.pack(0, 0xFFFF, 0, 0xFFFF, 0, _BEGINS, _SYN, 0))
    for ports in (_one_port(0, rule.port), _one_port(rule.from_port, 0)):
        if ports and rule.udp:
            yield _module("udp", 0, _UDP.pack(*ports, 0))
        elif ports:
            yield _module("tcp", 0, _TCP.pack(*ports, 0, 0, 0, 0))
    if rule.echo_request:
        name, _, kind = layout.echo
        yield _module(name, 0, _ICMP.pack(kind, 0, 0xFF, 0))
    if rule.users:
        yield _module("owner", 1, _OWNER.pack(*rule.users, 0, 0, _OWNER_UID, 0))
    if rule.unlike_local:
        yield _module("addrtype", 1, _ADDRTYPE.pack(_ADDRTYPE_LOCAL, 0, _INVERT_SOURCE))
    if rule.to_local:
        yield _module("addrtype", 1, _ADDRTYPE.pack(0, _ADDRTYPE_LOCAL, 0))
    if rule.comment:
        yield _module("comment", 0, rule.comment.encode().ljust(_COMMENT_SIZE, b"\0"))


def _one_port(source: int, destination: int) -> tuple[int, int, int, int] | None:
    """Return the ranges of source and destination that one port of either is, None without any."""
    if not source and not destination:
        return None
    return (source, source or 0xFFFF, destination, destination or 0xFFFF)


def _module(name: str, revision: int, data: bytes) -> bytes:
    return _MODULE.pack(_MODULE.size + len(data), name.encode(), revision) + data


@lru_cache(maxsize=1 << 14)
def _network(text: str, size: int) -> tuple[bytes, bytes]:
    if not text:
        return bytes(size), bytes(size)
    network = ip_network(text)
    return network.network_address.packed, network.netmask.packed


def packed(one: Entry, family: AddressFamily) -> bytes:
    """Return an entry for libiptc, which turns the names of chains into offsets."""
    layout = _LAYOUTS[family]
    data = one.data or _STANDARD.pack(0)
    target = _MODULE.pack(_MODULE.size + len(data), one.target.encode(), 0) + data
    matches = one.head[layout.ip :]
    behind = layout.matches + len(matches)
    buffer = bytearray(behind)
    buffer[: layout.ip] = one.head[: layout.ip]
    _OFFSETS.pack_into(buffer, layout.offsets, behind, behind + len(target))
    buffer[layout.matches :] = matches
    return bytes(buffer) + target


def comment(one: Entry, family: AddressFamily) -> str:
    """Return the comment of a rule that has one as its only or last match, else ""."""
    return _comment(one.head[_LAYOUTS[family].ip :])


_COMMENT_HEAD = _MODULE.pack(_MODULE.size + _COMMENT_SIZE, b"comment", 0)


@lru_cache(maxsize=1 << 14)
def _comment(matches: bytes) -> str:
    last = matches[-len(_COMMENT_HEAD) - _COMMENT_SIZE :]
    if not last.startswith(_COMMENT_HEAD):
        return ""
    return last[len(_COMMENT_HEAD) :].rstrip(b"\0").decode(errors="replace")


def parse(blob: bytes, hooks: Mapping[int, int], family: AddressFamily) -> dict[str, tuple[Counted, ...]]:
    """Return every chain of a table; ``hooks`` has where each built-in chain begins.

    The last rule of each chain, which the kernel demands, and the policy, are left out.
    """
    layout = _LAYOUTS[family]
    starts = {offset: BUILT_IN[hook] for hook, offset in hooks.items() if hook in BUILT_IN}
    places: list[tuple[int, int]] = []  # of rules, and of their targets
    offset = 0
    while offset < len(blob):
        behind, size = _OFFSETS.unpack_from(blob, offset + layout.offsets)
        target = offset + behind
        if blob.startswith(b"ERROR\0", target + 2):  # the name of a chain: whoever jumps to it jumps behind
            name = blob[target + _MODULE.size : offset + size].partition(b"\0")[0]
            starts[offset + size] = name.decode(errors="replace")
        else:
            places.append((offset, target))
        offset += size
    chains: dict[str, list[Counted]] = {}
    rules: list[Counted] = []
    for offset, target in places:
        if offset in starts:
            rules = chains.setdefault(starts[offset], [])
        rules.append(_counted(blob, offset, target, layout, starts))
    return {name: tuple(rules[:-1]) for name, rules in chains.items()}


def _counted(blob: bytes, offset: int, target: int, layout: _Layout, starts: Mapping[int, str]) -> Counted:
    """Return a rule, with the verdict or chain by name that the kernel has as a number."""
    head = blob[offset : offset + layout.ip] + blob[offset + layout.matches : target]
    packets, octets = _COUNTERS.unpack_from(blob, offset + layout.counters)
    size, raw, _ = _MODULE.unpack_from(blob, target)
    data = blob[target + _MODULE.size : target + size]
    if raw[0]:
        return Counted(Entry(head, raw.rstrip(b"\0").decode(errors="replace"), data), packets, octets)
    (verdict,) = _STANDARD.unpack(data)
    known = _OF_VERDICT.get(verdict) or starts.get(verdict, f"verdict {verdict}")
    return Counted(Entry(head, known), packets, octets)
