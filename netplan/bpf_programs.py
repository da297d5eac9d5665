"""The cgroup programs that hold addresses to their owners where the packet filter cannot.  Pure.

``bind4 bind6``: nobody but its owner and root binds an address that is a partition's.
``connect4 connect6 sendmsg4 sendmsg6``: a client that bound nothing gets the source that is its user's own.
The kernel would give it the node's, and towards an address of this host that address itself (RFC 6724, rule 1).
``ingress``: what comes for a partition's address is delivered to no other user's socket, however that got there:
a wildcard, or SO_REUSEADDR.  What comes from other hosts for the node's own addresses it counts, by the user of the
socket that gets it: only here is that known of every packet (early demultiplexing, which the packet filter has to go by,
finds no listener, and of UDP only what is connected).  Broadcast and multicast are not counted: they were sent to nobody
in particular, and pass here once for each socket.

Every program first asks which network namespace it is in, as a cgroup has processes of many.  An IPv4 address
is written as IPv6 does (::ffff:192.0.2.1) so that sockets of both kinds meet the same entry.

ICMP is not refused: the answer to an unbound ping of a partition on this host comes to that partition's own
address (facts/probes.md, section 5), and who hears it is told by the ping's number.  bind(2) of ping and raw sockets
passes no hook (net/ipv6/af_inet6.c, inet6_bind_sk); the packet filter refuses what they send.
"""

import hashlib
import struct
import sys
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

from netplan.bpf_assembler import FRAME, RESULT, Assembler, Code
from netplan.bpf_syscall import ARRAY, CGROUP_SKB, CGROUP_SOCK_ADDR, HASH, LPM_TRIE, MapKind

NODE = 0xFFFFFFFF
"""Stands for the node where otherwise a user's number does; it is nobody's number (chown(2))."""

PRIVATE = 1
"""A flag of an address: only its owner and root reach it, by what the kernel itself gives as the source."""

COOKIE = "cookie"
"""The number by which a program knows its network namespace."""


class Refusal(IntEnum):
    """Why something was refused; the names are those of the rules."""

    BIND = 1
    RECEIVE = 2


OWNERS, RANGES, SOURCES, REFUSED, NOTE = "owners", "ranges", "sources", "refused", "note"
RECEIVED = "received"
MAPS = {
    # address → user, flags; prefix length and address → the same; user → its IPv6, its IPv4, its IPv4 of the mesh, and
    # network and mask of the mesh (0 without one)
    OWNERS: MapKind(HASH, 16, 8, 16384),
    RANGES: MapKind(LPM_TRIE, 20, 8, 4096),
    SOURCES: MapKind(HASH, 4, 56, 4096),
    # user, rule → how often; user, IP version → bytes, packets.  These two are written by programs, and by nobody else.
    REFUSED: MapKind(HASH, 8, 8, 16384),
    RECEIVED: MapKind(HASH, 8, 16, 8192),
    # what the first three were filled with
    NOTE: MapKind(ARRAY, 4, 16, 1),
}

# numbers of the kernel's functions (include/uapi/linux/bpf.h)
_LOOKUP, _UPDATE, _CURRENT_USER, _SKB_LOAD, _SOCKET_USER, _BIND, _NETNS_COOKIE = 1, 2, 15, 26, 47, 64, 122
_NOEXIST = 1
# struct bpf_sock_addr, struct bpf_sock, struct __sk_buff
_USER_IP4, _USER_IP6, _SOURCE_IP4, _SOURCE_IP6, _SOCKET = 4, 8, 40, 44, 64
_SOCKET_IP4, _SOCKET_IP6 = 24, 28
_PACKET_LENGTH, _PACKET_TYPE, _PACKET_PROTOCOL, _PACKET_LINK = 0, 4, 16, 40
_PACKET_HOST = 0  # include/uapi/linux/if_packet.h
_LOOPBACK = 1  # of every network namespace (LOOPBACK_IFINDEX, include/net/flow.h)
_ETH_P_IP, _ETH_P_IPV6 = 0x0800, 0x86DD
_IPPROTO_ICMP, _IPPROTO_TCP, _IPPROTO_ICMPV6 = 1, 6, 58
_TCP_FLAGS, _TCP_RST = 13, 4
_AF_INET, _AF_INET6 = 2, 10
_ALLOW, _DENY = 1, 0
# in an entry of SOURCES: where the IPv6 is, the IPv4, and behind that by how much the rest of the mesh
_IPV6, _IPV4, _TO_MESH, _MESH_NETWORK, _MESH_MASK = 0, 16, 16, 48, 52
# registers: arguments are 1 to 5, a call leaves 6 to 9 as they are
_CONTEXT, _USER, _IS_OWNED, _FLAGS_AT = 6, 7, 8, 9
# the stack: a key of RANGES is the length followed by the address, a key of OWNERS is the address
_ADDRESS, _LENGTH, _SOURCE_KEY, _REFUSED_KEY, _ONE, _SOCKADDR, _HEADER = -16, -20, -24, -32, -40, -72, -80
# of what comes in: its version in place of _IS_OWNED; no flags to look at, as it is for everybody
_VERSION, _RECEIVED_KEY, _BEGINNING = _IS_OWNED, _REFUSED_KEY, _SOCKADDR
_FOR_ALL = -1


class Program(NamedTuple):
    """A program and where it is attached; ``hook`` is enum bpf_attach_type."""

    kind: int
    hook: int
    code: Code


def programs(*, ingress_everywhere: bool) -> dict[str, Program]:
    """Return the programs by name.

    ``ingress_everywhere``: before Linux 6.15 a program that sees packets cannot ask for the namespace, so it then acts
    on equal addresses in all of them, but for private ones, which may well be used twice, and counts nothing.
    """
    return {
        "bind4": Program(CGROUP_SOCK_ADDR, 8, _bind(_address4)),
        "bind6": Program(CGROUP_SOCK_ADDR, 9, _bind(_address6)),
        "connect4": Program(CGROUP_SOCK_ADDR, 10, _give_source4(_bind_to_4, connecting=True)),
        "connect6": Program(CGROUP_SOCK_ADDR, 11, _give_source6(_bind_to_6, connecting=True)),
        "sendmsg4": Program(CGROUP_SOCK_ADDR, 14, _give_source4(_write_4, connecting=False)),
        "sendmsg6": Program(CGROUP_SOCK_ADDR, 15, _give_source6(_write_6, connecting=False)),
        "ingress": Program(CGROUP_SKB, 0, _ingress(everywhere=ingress_everywhere)),
    }


@lru_cache(maxsize=2)
def version(*, ingress_everywhere: bool) -> str:
    """Return a name for the programs and their maps that changes with them."""
    digest = hashlib.blake2b(repr(sorted(MAPS.items())).encode(), digest_size=8)
    for name, one in programs(ingress_everywhere=ingress_everywhere).items():
        maps = {name: place for place, name in enumerate(MAPS)}
        digest.update(
            name.encode() + struct.pack("=II", one.kind, one.hook) + one.code.linked(maps, {COOKIE: 0})
        )
    return digest.hexdigest()


def _word(packed: bytes) -> int:
    """Return 2 or 4 bytes as a program reads them from memory, as a signed number of 32 bits."""
    number = int.from_bytes(packed, sys.byteorder)
    return number - (1 << 32) if number >> 31 else number


def _begin(*, here: bool = True) -> Assembler:
    made = Assembler()
    made.copy(_CONTEXT, 1)
    if here:
        made.call(_NETNS_COOKIE)
        made.load_late(1, COOKIE)
        made.jump_if_registers(RESULT, "!=", 1, "allow")
    return made


def _end(made: Assembler) -> Code:
    made.label("allow")
    made.leave(_ALLOW)
    return made.finished()


def _current_user(made: Assembler) -> None:
    made.call(_CURRENT_USER)
    made.copy_word(_USER, RESULT)


def _look_up(made: Assembler, name: str, key: int) -> None:
    made.load_late(1, name)
    made.copy(2, FRAME)
    made.add(2, key)
    made.call(_LOOKUP)


def _update(made: Assembler, name: str, key: int, value: int) -> None:
    """Set a value that is not there yet."""
    made.load_late(1, name)
    for register, place in ((2, key), (3, value)):
        made.copy(register, FRAME)
        made.add(register, place)
    made.set(4, _NOEXIST)
    made.call(_UPDATE)


def _look_up_range(made: Assembler) -> None:
    made.store_number(FRAME, _LENGTH, 128)
    _look_up(made, RANGES, _LENGTH)


def _address4(made: Assembler) -> None:
    """Take the address of the call as the key; an IPv4 one is in register 1 afterwards."""
    made.store_number(FRAME, _ADDRESS, 0, 8)
    made.store_number(FRAME, _ADDRESS + 8, _word(b"\0\0\xff\xff"))
    made.load(1, _CONTEXT, _USER_IP4)
    made.store(FRAME, _ADDRESS + 12, 1)


def _address6(made: Assembler) -> None:
    """Likewise an IPv6 one, whose words are in registers 1 to 4 afterwards."""
    for place in range(4):
        made.load(1 + place, _CONTEXT, _USER_IP6 + 4 * place)
        made.store(FRAME, _ADDRESS + 4 * place, 1 + place)


def _allow_owner(made: Assembler, of_node: str = "allow") -> None:
    """Allow it where the address, whose entry register 0 points at, is the user's or the node's."""
    made.load(1, RESULT, 0)
    made.jump_if_word(1, "==", -1, of_node)
    made.jump_if_registers(1, "==", _USER, "allow")


def _allow_reset(made: Assembler) -> None:
    """Allow an RST: it brings nothing, and is how the packet filter tells a client at once that it was refused.

    The source of what is refused may be another's: towards an address of this host the kernel takes that one.
    """
    made.jump_if(_FLAGS_AT, "==", 0, "refused")
    made.copy(1, _CONTEXT)
    made.copy(2, _FLAGS_AT)
    made.copy(3, FRAME)
    made.add(3, _HEADER)
    made.set(4, 1)
    made.call(_SKB_LOAD)
    made.jump_if(RESULT, "!=", 0, "refused")
    made.load(1, FRAME, _HEADER, 1)
    made.jump_if(1, "&", _TCP_RST, "allow")
    made.label("refused")


def _refuse(made: Assembler, rule: Refusal) -> None:
    """Refuse, and count by whom."""
    made.store(FRAME, _REFUSED_KEY, _USER)
    made.store_number(FRAME, _REFUSED_KEY + 4, rule)
    _look_up(made, REFUSED, _REFUSED_KEY)
    made.jump_if(RESULT, "!=", 0, "again")
    made.store_number(FRAME, _ONE, 1, 8)
    _update(made, REFUSED, _REFUSED_KEY, _ONE)
    made.jump_if(RESULT, "==", 0, "refuse")
    _look_up(made, REFUSED, _REFUSED_KEY)  # another processor may have been first
    made.jump_if(RESULT, "==", 0, "refuse")
    made.label("again")
    made.set(1, 1)
    made.count(RESULT, 0, 1)
    made.label("refuse")
    made.leave(_DENY)


def _bind(address: Callable[[Assembler], None]) -> Code:
    made = _begin()
    _current_user(made)
    made.jump_if_word(_USER, "==", 0, "allow")
    address(made)
    _look_up(made, OWNERS, _ADDRESS)
    made.jump_if(RESULT, "!=", 0, "owned")
    _look_up_range(made)
    made.jump_if(RESULT, "==", 0, "allow")
    made.label("owned")
    _allow_owner(made)
    _refuse(made, Refusal.BIND)
    return _end(made)


def _ingress(*, everywhere: bool) -> Code:
    made = _begin(here=not everywhere)
    made.copy(1, _CONTEXT)
    made.call(_SOCKET_USER)
    made.copy_word(_USER, RESULT)
    made.jump_if_word(_USER, "==", 0, "allow")
    _destination(made)
    _look_up(made, OWNERS, _ADDRESS)
    made.jump_if(RESULT, "!=", 0, "owned")
    _look_up_range(made)
    made.jump_if(RESULT, "==", 0, "allow" if everywhere else "count")
    made.label("owned")
    if everywhere:
        made.load(1, RESULT, 4)
        made.jump_if_word(1, "&", PRIVATE, "allow")
    _allow_owner(made, "allow" if everywhere else "count")
    made.jump_if(_FLAGS_AT, "==", _FOR_ALL, "allow")
    _allow_reset(made)
    _refuse(made, Refusal.RECEIVE)
    if not everywhere:
        _count_received(made)
    return _end(made)


def _destination(made: Assembler) -> None:
    """Take the packet's destination as the key; find its version, and where an RST would be seen (0: nowhere)."""
    made.load(1, _CONTEXT, _PACKET_PROTOCOL)
    made.jump_if(1, "==", _word(struct.pack("!H", _ETH_P_IPV6)), "six")
    made.jump_if(1, "!=", _word(struct.pack("!H", _ETH_P_IP)), "allow")
    _header(made, 20)
    made.set(_VERSION, 4)
    made.load(1, FRAME, _HEADER + 9, 1)
    made.set(_FLAGS_AT, _FOR_ALL)
    made.jump_if(1, "==", _IPPROTO_ICMP, "four")
    made.set(_FLAGS_AT, 0)
    made.jump_if(1, "!=", _IPPROTO_TCP, "four")
    made.load(_FLAGS_AT, FRAME, _HEADER, 1)
    made.mask_word(_FLAGS_AT, 0x0F)
    made.shift_left(_FLAGS_AT, 2)
    made.add(_FLAGS_AT, _TCP_FLAGS)
    made.label("four")
    made.store_number(FRAME, _ADDRESS, 0, 8)
    made.store_number(FRAME, _ADDRESS + 8, _word(b"\0\0\xff\xff"))
    made.load(1, FRAME, _HEADER + 16)
    made.store(FRAME, _ADDRESS + 12, 1)
    made.jump("look")
    made.label("six")
    _header(made, 40)
    made.set(_VERSION, 6)
    made.load(1, FRAME, _HEADER + 6, 1)
    made.set(_FLAGS_AT, _FOR_ALL)
    made.jump_if(1, "==", _IPPROTO_ICMPV6, "destination")
    made.set(_FLAGS_AT, 0)
    made.jump_if(1, "!=", _IPPROTO_TCP, "destination")
    made.set(_FLAGS_AT, 40 + _TCP_FLAGS)
    made.label("destination")
    for place in (0, 8):
        made.load(1, FRAME, _HEADER + 24 + place, 8)
        made.store(FRAME, _ADDRESS + place, 1, 8)
    made.label("look")


def _count_received(made: Assembler) -> None:
    """Allow what is for no partition's address, and count it where it comes from elsewhere for a partition's user.

    The length has the IP header in it (kernel/bpf/cgroup.c, __cgroup_bpf_run_filter_skb).
    """
    made.label("count")
    made.load(1, _CONTEXT, _PACKET_LINK)
    made.jump_if_word(1, "==", _LOOPBACK, "allow")
    made.load(1, _CONTEXT, _PACKET_TYPE)
    made.jump_if_word(1, "!=", _PACKET_HOST, "allow")
    made.store(FRAME, _RECEIVED_KEY, _USER)
    made.store(FRAME, _RECEIVED_KEY + 4, _VERSION)
    _look_up(made, RECEIVED, _RECEIVED_KEY)
    made.jump_if(RESULT, "!=", 0, "counted")
    made.store(FRAME, _SOURCE_KEY, _USER)
    _look_up(made, SOURCES, _SOURCE_KEY)  # has all users of partitions
    made.jump_if(RESULT, "==", 0, "allow")
    made.store_number(FRAME, _BEGINNING, 0, 8)
    made.store_number(FRAME, _BEGINNING + 8, 0, 8)
    _update(made, RECEIVED, _RECEIVED_KEY, _BEGINNING)
    _look_up(made, RECEIVED, _RECEIVED_KEY)  # whoever was first
    made.jump_if(RESULT, "==", 0, "allow")
    made.label("counted")
    made.load(1, _CONTEXT, _PACKET_LENGTH)
    made.count(RESULT, 0, 1)
    made.set(1, 1)
    made.count(RESULT, 8, 1)


def _header(made: Assembler, size: int) -> None:
    """Copy the packet's IP header; what is too short for one would not have come so far."""
    made.copy(1, _CONTEXT)
    made.set(2, 0)
    made.copy(3, FRAME)
    made.add(3, _HEADER)
    made.set(4, size)
    made.call(_SKB_LOAD)
    made.jump_if(RESULT, "!=", 0, "allow")


def _give_source4(give: Callable[[Assembler], None], *, connecting: bool) -> Code:
    made = _begin()
    _only_unbound(made, (_SOCKET_IP4,) if connecting else (), (_SOURCE_IP4,))
    _address4(made)
    _but_special4(made, 1)
    _choose(made, connecting=connecting, place=_IPV4)
    give(made)
    return _end(made)


def _give_source6(give: Callable[[Assembler], None], *, connecting: bool) -> Code:
    made = _begin()
    six = range(4)
    _only_unbound(
        made,
        [_SOCKET_IP6 + 4 * place for place in six] if connecting else (),
        [_SOURCE_IP6 + 4 * place for place in six],
    )
    _address6(made)
    made.jump_if_word(1, "!=", 0, "six")
    made.jump_if_word(2, "!=", 0, "six")
    made.jump_if_word(3, "!=", _word(b"\0\0\xff\xff"), "allow")  # :: and ::1
    if connecting:  # a datagram to a mapped address meets sendmsg4 (net/ipv6/udp.c, udpv6_sendmsg)
        _but_special4(made, 4)
        _choose(made, connecting=connecting, place=_IPV4)
        give(made)
    made.jump("allow")
    made.label("six")
    made.copy_word(2, 1)
    made.mask_word(2, _word(b"\xff\0\0\0"))
    made.jump_if_word(2, "==", _word(b"\xff\0\0\0"), "allow")  # ff00::/8
    made.mask_word(1, _word(b"\xff\xc0\0\0"))
    made.jump_if_word(1, "==", _word(b"\xfe\x80\0\0"), "allow")  # fe80::/10
    _choose(made, connecting=connecting, place=_IPV6)
    give(made)
    return _end(made)


def _only_unbound(
    made: Assembler, of_socket: "tuple[int, ...] | list[int]", of_call: "tuple[int, ...] | list[int]"
) -> None:
    """Go on only where there is no source yet: of the socket, or in what the call itself names."""
    base = _CONTEXT
    if of_socket:
        made.load(3, _CONTEXT, _SOCKET, 8)
        base = 3
    made.set(2, 0)
    for place in of_socket or of_call:
        made.load(1, base, place)
        made.or_register(2, 1)
    made.jump_if(2, "!=", 0, "allow")


def _but_special4(made: Assembler, register: int) -> None:
    """Leave 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, multicast and broadcast to the kernel."""
    made.copy_word(2, register)
    made.mask_word(2, _word(b"\xff\0\0\0"))
    made.jump_if_word(2, "==", 0, "allow")
    made.jump_if_word(2, "==", _word(b"\x7f\0\0\0"), "allow")
    made.copy_word(2, register)
    made.mask_word(2, _word(b"\xff\xff\0\0"))
    made.jump_if_word(2, "==", _word(b"\xa9\xfe\0\0"), "allow")
    made.copy_word(2, register)
    made.mask_word(2, _word(b"\xe0\0\0\0"))
    made.jump_if_word(2, "==", _word(b"\xe0\0\0\0"), "allow")


def _choose(made: Assembler, *, connecting: bool, place: int) -> None:
    """Find the source for the address: register 0 points at it, in the user's or the node's entry.

    A partition's user has its own.  Anybody else, and who has none of this family, has the
    node's towards partitions, and what the kernel chooses towards the rest.  Towards the mesh each has
    that of the mesh.  A datagram to the node may be the answer
    of a wildcard server, which must come from where the question went; a connection there is left to the kernel.
    """
    own, node, give = (made.fresh(name) for name in ("own", "node", "give"))
    ranged = made.fresh("ranged")
    _current_user(made)
    _look_up(made, OWNERS, _ADDRESS)
    made.jump_if(RESULT, "==", 0, ranged)
    made.load(1, RESULT, 4)
    made.jump_if_word(1, "&", PRIVATE, "allow")
    made.load(1, RESULT, 0)
    made.set(_IS_OWNED, 0)
    made.jump_if_word(1, "==", -1, "allow" if connecting else own)
    made.set(_IS_OWNED, 1)
    made.jump(own)
    made.label(ranged)
    _look_up_range(made)
    made.set(_IS_OWNED, 0)
    made.jump_if(RESULT, "==", 0, own)
    made.set(_IS_OWNED, 1)
    made.label(own)
    made.store(FRAME, _SOURCE_KEY, _USER)
    _look_up(made, SOURCES, _SOURCE_KEY)
    made.jump_if(RESULT, "==", 0, node)
    _choose_mesh(made, place)
    made.load(
        1, RESULT, place + (12 if place else 0)
    )  # the first word of IPv6 and the last of IPv4 are never 0
    made.jump_if_word(1, "!=", 0, give)
    made.label(node)
    made.jump_if(_IS_OWNED, "==", 0, "allow")
    made.store_number(FRAME, _SOURCE_KEY, -1)
    _look_up(made, SOURCES, _SOURCE_KEY)
    made.jump_if(RESULT, "==", 0, "allow")
    _choose_mesh(made, place)
    made.load(1, RESULT, place + (12 if place else 0))
    made.jump_if_word(1, "==", 0, "allow")
    made.label(give)
    made.add(RESULT, place)


def _choose_mesh(made: Assembler, place: int) -> None:
    """Take the entry's IPv4 of the mesh for its IPv4 where the address is of the mesh; register 0 points at the entry.

    Who has none there is left to the kernel, which knows the node's.  Without a mesh it is one comparison.
    """
    if place != _IPV4:
        return
    elsewhere = made.fresh("elsewhere")
    made.load(1, RESULT, _MESH_MASK)
    made.jump_if_word(1, "==", 0, elsewhere)
    made.load(2, FRAME, _ADDRESS + 12)
    made.mask_register(2, 1)
    made.load(1, RESULT, _MESH_NETWORK)
    made.jump_if_registers(1, "!=", 2, elsewhere)
    made.add(RESULT, _TO_MESH)
    made.load(1, RESULT, _IPV4 + 12)
    made.jump_if_word(1, "==", 0, "allow")
    made.label(elsewhere)


def _bind_to_4(made: Assembler) -> None:
    made.load(1, RESULT, 12)
    made.store_number(FRAME, _SOCKADDR, _AF_INET, 2)
    made.store_number(FRAME, _SOCKADDR + 2, 0, 2)  # no port
    made.store(FRAME, _SOCKADDR + 4, 1)
    made.store_number(FRAME, _SOCKADDR + 8, 0, 8)
    _call_bind(made, 16)


def _bind_to_6(made: Assembler) -> None:
    made.store_number(FRAME, _SOCKADDR, _AF_INET6, 2)
    made.store_number(FRAME, _SOCKADDR + 2, 0, 2)
    made.store_number(FRAME, _SOCKADDR + 4, 0)
    for place in range(0, 16, 4):
        made.load(1, RESULT, place)
        made.store(FRAME, _SOCKADDR + 8 + place, 1)
    made.store_number(FRAME, _SOCKADDR + 24, 0)
    _call_bind(made, 28)


def _call_bind(made: Assembler, size: int) -> None:
    """Bind the socket as IP_BIND_ADDRESS_NO_PORT does: the port is chosen when the destination is known.

    What it says does not matter: where the address is not there, or the socket has a port already, the kernel chooses.
    """
    made.copy(1, _CONTEXT)
    made.copy(2, FRAME)
    made.add(2, _SOCKADDR)
    made.set(3, size)
    made.call(_BIND)


def _write_4(made: Assembler) -> None:
    made.load(1, RESULT, 12)
    made.store(_CONTEXT, _SOURCE_IP4, 1)


def _write_6(made: Assembler) -> None:
    for place in range(0, 16, 4):
        made.load(1, RESULT, place)
        made.store(_CONTEXT, _SOURCE_IP6 + place, 1)
