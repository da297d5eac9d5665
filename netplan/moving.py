"""Addresses and routes that change their link as a whole: what a port takes along into its bridge, and back.

They are somebody else's, so nothing of them may be lost: each is kept as the kernel wrote it, and only what
binds it to the old link is rewritten.  Layouts: include/uapi/linux/{if_addr,rtnetlink}.h.
"""

import socket
import struct
import sys
from collections.abc import Container, Iterator

from netplan.model import PROTOCOL_MARK, Moving, address_text
from netplan.netlink import (
    NLM_F_CREATE,
    NLM_F_REPLACE,
    Message,
    NetlinkSocket,
    Request,
    attribute,
    attributes,
)
from netplan.rtnetlink import (
    IFA_F_DADFAILED,
    IFA_F_NODAD,
    IFA_F_NOPREFIXROUTE,
    IFA_F_PERMANENT,
    IFA_F_TENTATIVE,
    IFADDR,
    ROUTE_LOCAL,
    RTMSG,
)

_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTM_NEWROUTE, _RTM_GETROUTE = 24, 26

_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_BROADCAST, _IFA_CACHEINFO, _IFA_FLAGS = 1, 2, 3, 4, 6, 8
_IFA_RT_PRIORITY, _IFA_PROTO = 9, 11
_IFA_KEPT = (_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_CACHEINFO, _IFA_RT_PRIORITY)
_IFA_F_TEMPORARY = 0x01  # of IPv6; the same bit says "secondary" of IPv4

_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 2, 4, 5, 6, 7
_RTA_METRICS, _RTA_MULTIPATH, _RTA_FLOW, _RTA_CACHEINFO, _RTA_TABLE = 8, 9, 11, 12, 15
_RTA_VIA, _RTA_PREF, _RTA_ENCAP_TYPE, _RTA_ENCAP, _RTA_EXPIRES = 18, 20, 21, 22, 23
_RTA_KEPT = (
    _RTA_DST,
    _RTA_SRC,
    _RTA_GATEWAY,
    _RTA_PRIORITY,
    _RTA_PREFSRC,
    _RTA_METRICS,
    _RTA_FLOW,
    _RTA_TABLE,
    _RTA_VIA,
    _RTA_PREF,
    _RTA_ENCAP_TYPE,
    _RTA_ENCAP,
)
_RTPROT_KERNEL = 2  # made by the kernel for an address, and so made again with it
_RTM_F_CLONED = 0x200
_RTNH_F_ONLINK = 4
_ROUTE_KINDS_OF_KERNEL = frozenset((ROUTE_LOCAL, 3, 4, 5))  # local, broadcast, anycast, multicast
_USER_HZ = 100

_NEXTHOP = struct.Struct("=HBBi")  # length, flags, hops, index
_U32 = struct.Struct("=I")


def observe_moving(sock: NetlinkSocket, links: Container[int]) -> tuple[Moving, ...]:
    """Return the addresses, then the routes of these links that somebody gave them; none of ours, none that the
    kernel makes by itself (link-local, temporary, prefix routes).
    """
    found = [
        *map(_address, sock.dump(_RTM_GETADDR, IFADDR.pack(0, 0, 0, 0, 0))),
        *(
            _route(message)
            for family in (socket.AF_INET, socket.AF_INET6)
            for message in sock.dump(_RTM_GETROUTE, RTMSG.pack(family, *[0] * 8))
        ),
    ]
    return tuple(one for one in found if one is not None and one.link in links)


def _address(message: Message) -> Moving | None:
    _, data, start, end = message
    family, prefixlen, flags, _, link = IFADDR.unpack_from(data, start)
    have = attributes(data, start + 8, end, (_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS, _IFA_PROTO))
    packed = have.get(_IFA_LOCAL) or have.get(_IFA_ADDRESS, b"")
    flags = _number(have.get(_IFA_FLAGS), flags)
    protocol = _number(have.get(_IFA_PROTO), 0)
    if protocol == PROTOCOL_MARK:
        return None
    if family == socket.AF_INET6 and (flags & _IFA_F_TEMPORARY or packed[:2] == b"\xfe\x80"):
        return None
    text = f"{address_text(packed)}/{prefixlen}"
    return Moving(data[start:end], text, link, family, packed, prefixlen, protocol)


def _route(message: Message) -> Moving | None:
    _, data, start, end = message
    family, prefixlen, _, _, _, protocol, _, kind, flags = RTMSG.unpack_from(data, start)
    if protocol in {_RTPROT_KERNEL, PROTOCOL_MARK} or kind in _ROUTE_KINDS_OF_KERNEL or flags & _RTM_F_CLONED:
        return None
    have = attributes(data, start + 12, end, (_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_MULTIPATH))
    link = _number(have.get(_RTA_OIF), 0)
    if not link and _RTA_MULTIPATH in have:
        link = next((index for index, _, _ in _nexthops(have[_RTA_MULTIPATH])), 0)
    gateway = have.get(_RTA_GATEWAY, b"")
    destination = f"{address_text(have[_RTA_DST])}/{prefixlen}" if _RTA_DST in have else "default"
    text = f"route {destination}" + (f" via {address_text(gateway)}" if gateway else "")
    source = have.get(_RTA_PREFSRC, b"")
    return Moving(data[start:end], text, link, family, gateway, -1, protocol, source)


def put_address(one: Moving, target: int, names: tuple[str, str], protocol: int) -> Request:
    """Ask for the address on link ``target``, marked with ``protocol``; ``names`` of the old link and the new.

    It is not asked for in the neighbourhood again (IFA_F_NODAD): it was in use a moment ago, on the same wire.
    """
    family, prefixlen, flags, scope, _ = IFADDR.unpack_from(one.message)
    have = attributes(one.message, 8, len(one.message), (*_IFA_KEPT, _IFA_LABEL, _IFA_FLAGS))
    flags = _number(have.get(_IFA_FLAGS), flags)
    flags &= ~(IFA_F_TENTATIVE | IFA_F_DADFAILED | IFA_F_PERMANENT)
    if family == socket.AF_INET6:
        flags |= IFA_F_NODAD
    parts = [
        IFADDR.pack(family, prefixlen, flags & 0xFF, scope, target),
        *(attribute(kind, have[kind]) for kind in _IFA_KEPT if kind in have),
        attribute(_IFA_FLAGS, _U32.pack(flags)),
        attribute(_IFA_PROTO, bytes((protocol,))),
    ]
    label = have.get(_IFA_LABEL, b"").rstrip(b"\0").decode(errors="replace")
    old, new = names
    if label.startswith(f"{old}:"):  # the kernel takes no label that does not begin with the link's name
        parts.append(attribute(_IFA_LABEL, (new + label.removeprefix(old))[:15].encode() + b"\0"))
    return Request(_RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, b"".join(parts))


def take_address(one: Moving) -> Request:
    """Ask for the removal of the address from its old link."""
    family, prefixlen, _, _, link = IFADDR.unpack_from(one.message)
    payload = IFADDR.pack(family, prefixlen, 0, 0, link)
    return Request(
        _RTM_DELADDR,
        0,
        payload + attribute(_IFA_LOCAL, one.packed) + attribute(_IFA_ADDRESS, one.packed),
    )


def has_prefix_route(one: Moving) -> bool:
    """Say whether the kernel made a route for the address' network."""
    have = attributes(one.message, 8, len(one.message), (_IFA_FLAGS,))
    return not _number(have.get(_IFA_FLAGS), 0) & IFA_F_NOPREFIXROUTE


def put_route(one: Moving, target: int) -> Request:
    """Ask for the route over link ``target``, in the place of the old one."""
    head = list(RTMSG.unpack_from(one.message))
    head[8] &= _RTNH_F_ONLINK
    have = attributes(
        one.message, 12, len(one.message), (*_RTA_KEPT, _RTA_OIF, _RTA_MULTIPATH, _RTA_CACHEINFO)
    )
    parts = [RTMSG.pack(*head), *(attribute(kind, have[kind]) for kind in _RTA_KEPT if kind in have)]
    if _RTA_OIF in have:
        parts.append(attribute(_RTA_OIF, _U32.pack(target)))
    if _RTA_MULTIPATH in have:
        hops = b"".join(
            _NEXTHOP.pack(
                8 + len(rest), flags & _RTNH_F_ONLINK, count, target if index == one.link else index
            )
            + rest
            for index, (flags, count), rest in _nexthops(have[_RTA_MULTIPATH])
        )
        parts.append(attribute(_RTA_MULTIPATH, hops))
    left = struct.unpack_from("=i", have[_RTA_CACHEINFO], 8)[0] if _RTA_CACHEINFO in have else 0
    if left > 0:  # of a router advertisement: it ends when that does
        parts.append(attribute(_RTA_EXPIRES, _U32.pack(max(1, left // _USER_HZ))))
    return Request(_RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, b"".join(parts))


def _nexthops(value: bytes) -> Iterator[tuple[int, tuple[int, int], bytes]]:
    """Yield index, (flags, hops) and attributes of each next hop."""
    position = 0
    while position + _NEXTHOP.size <= len(value):
        length, flags, hops, index = _NEXTHOP.unpack_from(value, position)
        if length < _NEXTHOP.size:
            return
        yield index, (flags, hops), value[position + _NEXTHOP.size : position + length]
        position += (length + 3) & ~3


def _number(value: bytes | None, default: int) -> int:
    return int.from_bytes(value, sys.byteorder) if value else default
