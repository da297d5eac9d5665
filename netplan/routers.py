"""The routers that this node reaches others by: what no guest may claim.

Read at each look at the node, so it is made for many routes of which few have a gateway: those that the kernel made
itself, one for each tap, are left out by one byte.  Layouts: include/uapi/linux/rtnetlink.h.
"""

import socket
import struct
import sys
from collections.abc import Container, Iterator

from netplan.netlink import NETLINK_ROUTE, Message, NetlinkSocket, attributes
from netplan.rtnetlink import ROUTE_UNICAST, RTMSG

_RTM_GETROUTE = 26
_RTA_OIF, _RTA_GATEWAY, _RTA_MULTIPATH, _RTA_VIA = 4, 5, 9, 18
_ROUTE_ATTRIBUTES = frozenset((_RTA_OIF, _RTA_GATEWAY, _RTA_MULTIPATH, _RTA_VIA))
_PROTOCOL, _MADE_BY_KERNEL = 5, 2  # the place of rtm_protocol, RTPROT_KERNEL
_NEXT_HOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, weight, link


def routers(near: Container[int]) -> frozenset[bytes]:
    """Return the gateways of all routes, of any table, as 4 or 16 packed bytes; link-local ones of the links ``near``
    alone.  Raises ``network.netlink``.
    """
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        return frozenset(
            gateway
            for family in (socket.AF_INET, socket.AF_INET6)
            for gateway, link in _gateways(sock, family)
            if link in near or gateway[:1] != b"\xfe"
        )


def _gateways(sock: NetlinkSocket, family: int) -> Iterator[tuple[bytes, int]]:
    payload = RTMSG.pack(family, 0, 0, 0, 0, 0, 0, ROUTE_UNICAST, 0)
    for message in sock.dump(_RTM_GETROUTE, payload, absent=True):
        if message.data[message.start + _PROTOCOL] != _MADE_BY_KERNEL:
            yield from _of_route(message)


def _of_route(message: Message) -> Iterator[tuple[bytes, int]]:
    have = attributes(message.data, message.start + RTMSG.size, message.end, _ROUTE_ATTRIBUTES)
    yield from _of_hop(have, int.from_bytes(have.get(_RTA_OIF, b""), sys.byteorder))
    hops = have.get(_RTA_MULTIPATH, b"")
    while len(hops) >= _NEXT_HOP.size:
        length, _, _, link = _NEXT_HOP.unpack_from(hops)
        length = max(length, _NEXT_HOP.size)
        hop = attributes(hops, _NEXT_HOP.size, min(length, len(hops)), _ROUTE_ATTRIBUTES)
        yield from _of_hop(hop, link)
        hops = hops[(length + 3) & ~3 :]


def _of_hop(have: dict[int, bytes], link: int) -> Iterator[tuple[bytes, int]]:
    if gateway := have.get(_RTA_GATEWAY):
        yield gateway, link
    if via := have.get(_RTA_VIA):  # of the other family, which comes first, in two bytes
        yield via[2:], link
