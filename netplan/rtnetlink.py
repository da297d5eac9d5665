"""Links, addresses, routes and rules as rtnetlink messages: only the attributes that partitiond needs.

Layouts: include/uapi/linux/{rtnetlink,if_link,if_addr,if_tun,fib_rules}.h; rtnetlink(7).

How our addresses are told from others: by IFA_PROTO, which kernels before 5.18 neither keep nor give back.  So
each also has a metric for its prefix route (IFA_RT_PRIORITY, Linux 4.18) of our own, which all kernels give
back, and which moves nothing: our addresses have no prefix route.
"""

import errno
import socket
import struct
import sys
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

from netplan.errors import NetplanError
from netplan.model import GROUP_MAKING, PROTOCOL_MARK, Address, Link, Route, Rule
from netplan.netlink import (
    NLA_F_NESTED,
    NLA_TYPE_MASK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    NetlinkSocket,
    Refusal,
    Request,
    attribute,
    attributes,
)

TABLE_MAIN = 254
TABLE_LOCAL = 255
TABLE_LOCAL_SOURCE = 11200  # ours, see netplan.plan_rules
ROUTE_UNICAST = 1
ROUTE_LOCAL = 2
ROUTE_UNREACHABLE = 7

IFA_F_NODAD = 0x02
IFA_F_DADFAILED = 0x08
IFA_F_DEPRECATED = 0x20
IFA_F_TENTATIVE = 0x40
IFA_F_PERMANENT = 0x80
IFA_F_NOPREFIXROUTE = 0x200

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 17, 18, 19
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_RTM_NEWRULE, _RTM_DELRULE, _RTM_GETRULE = 32, 33, 34

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_IFALIAS = 1, 3, 10, 18, 20
_IFLA_STATS64, _IFLA_GROUP, _IFLA_EXT_MASK = 23, 27, 29
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _IFLA_INFO_SLAVE_KIND, _IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
_IFLA_BRPORT_GROUP_FWD_MASK = 31
_IFLA_TUN_OWNER, _IFLA_TUN_TYPE = 1, 3
_IFLA_BR_FORWARD_DELAY, _IFLA_BR_STP_STATE = 1, 5
_ABOUT_LINK = frozenset((_IFLA_INFO_KIND, _IFLA_INFO_DATA, _IFLA_INFO_SLAVE_DATA))
_LINK_ATTRIBUTES = frozenset(
    (_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_STATS64, _IFLA_GROUP)
)
_RTEXT_FILTER_SKIP_STATS = 8
_IFF_UP = 1
_IFF_TAP = 2

_IFA_ADDRESS, _IFA_LOCAL, _IFA_CACHEINFO, _IFA_FLAGS, _IFA_RT_PRIORITY, _IFA_PROTO = 1, 2, 6, 8, 9, 11
_ADDRESS_ATTRIBUTES = frozenset((_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS, _IFA_RT_PRIORITY, _IFA_PROTO))
_PRIORITY_MARK = 0x70617274  # "part"
_SCOPE_LINK = 253
_SCOPE_HOST = 254
_FOREVER = 0xFFFFFFFF

_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE = 1, 4, 5, 6, 7, 15
_ROUTE_ATTRIBUTES = frozenset((_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE))

_RTNH_F_ONLINK = 4

_FRA_SRC, _FRA_PRIORITY, _FRA_TABLE, _FRA_PROTOCOL = 2, 6, 15, 21
_RULE_ATTRIBUTES = frozenset((_FRA_SRC, _FRA_PRIORITY, _FRA_TABLE, _FRA_PROTOCOL))
_FR_ACT_TO_TBL = 1

_IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, change
IFADDR = struct.Struct("=BBBBI")
"""struct ifaddrmsg: family, prefixlen, flags, scope, index."""
RTMSG = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags."""
_U32 = struct.Struct("=I")
_WITHOUT_STATISTICS = attribute(_IFLA_EXT_MASK, _U32.pack(_RTEXT_FILTER_SKIP_STATS))
_CACHEINFO = struct.Struct("=IIII")  # preferred, valid, created, updated
_ATTRIBUTE = struct.Struct("=HH")
_STATS64 = struct.Struct("=4Q")  # rx_packets, tx_packets, rx_bytes, tx_bytes


def _number(value: bytes | None, default: int = 0) -> int:
    return int.from_bytes(value, sys.byteorder) if value else default


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="surrogateescape")


Seen = TypeVar("Seen")


class _Decoder(Generic[Seen]):
    """Decodes one kind of message, and remembers what it made of those of the last time.

    What has not changed is the same bytes, and the same bytes mean the same: cutting up the links and addresses
    of 300 partitions costs 15 ms, looking them up 1 ms.
    """

    def __init__(self, decode: Callable[[Message], Seen]) -> None:
        self._decode = decode
        self._known: dict[Hashable, dict[bytes, Seen]] = {}

    def __call__(self, messages: Iterable[Message], question: Hashable = None) -> list[Seen]:
        """Decode the answer to a question."""
        known = self._known.get(question, {})
        found: dict[bytes, Seen] = {}
        for message in messages:
            raw = message.data[message.start : message.end]
            found[raw] = known[raw] if raw in known else self._decode(message)
        self._known[question] = found
        return list(found.values())


class LinkCounters(NamedTuple):
    """What went through a link since it was made, seen from the host: received means coming from the other
    end.
    """

    ifindex: int
    name: str
    alias: str
    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int


def links(sock: NetlinkSocket) -> dict[str, Link]:
    """Return every link by name, without statistics."""
    found = _links(sock.dump(_RTM_GETLINK, _IFINFO.pack(0, 0, 0, 0, 0) + _WITHOUT_STATISTICS))
    return {link.name: link for link in found}


def link(sock: NetlinkSocket, index: int) -> Link | None:
    """Return the link of that number, without statistics, or None."""
    found = sock.get(_RTM_GETLINK, _IFINFO.pack(0, 0, index, 0, 0) + _WITHOUT_STATISTICS)
    if isinstance(found, Refusal):
        if found.errno != errno.ENODEV:
            raise NetplanError(
                "network.netlink", f"the kernel refused a link: {found.text()}", retryable=True
            )
        return None
    return _link(found)


def _link(message: Message) -> Link:
    _, data, start, end = message
    _, _, index, flags, _ = _IFINFO.unpack_from(data, start)
    have = attributes(data, start + 16, end, _LINK_ATTRIBUTES)
    info = have.get(_IFLA_LINKINFO, b"")
    kind, tap, owner, forwards = "", False, -1, 0
    if info:
        about = attributes(info, 0, len(info), _ABOUT_LINK)
        kind = _text(about.get(_IFLA_INFO_KIND, b""))
        if kind == "tun":
            details = about.get(_IFLA_INFO_DATA, b"")
            tun = attributes(details, 0, len(details), (_IFLA_TUN_OWNER, _IFLA_TUN_TYPE))
            tap = _number(tun.get(_IFLA_TUN_TYPE)) == _IFF_TAP
            owner = _number(tun.get(_IFLA_TUN_OWNER), -1)
            port = about.get(_IFLA_INFO_SLAVE_DATA, b"")
            mask = attributes(port, 0, len(port), (_IFLA_BRPORT_GROUP_FWD_MASK,))
            forwards = int.from_bytes(mask.get(_IFLA_BRPORT_GROUP_FWD_MASK, b""), sys.byteorder)
    return Link(
        index,
        _text(have[_IFLA_IFNAME]),
        kind,
        _text(have.get(_IFLA_IFALIAS, b"")),
        _number(have.get(_IFLA_MASTER)),
        bool(flags & _IFF_UP),
        have.get(_IFLA_ADDRESS, b"").hex(":"),
        _number(have.get(_IFLA_GROUP)),
        tap,
        owner,
        forwards,
    )


_links = _Decoder(_link)


def link_counters(sock: NetlinkSocket) -> list[LinkCounters]:
    """Return the 64-bit counters of every link."""
    global _known_heads  # noqa: PLW0603 - those of the last reading, replaced whole
    known, heads = _known_heads, {}
    found = []
    for _, data, start, end in sock.dump(_RTM_GETLINK, _IFINFO.pack(0, 0, 0, 0, 0)):
        index = _IFINFO.unpack_from(data, start)[2]
        head = known.get(index)
        if head is None or not data.startswith(head.raw, start):
            head = _head(data, start, end)
        heads[index] = head
        values = _STATS64.unpack_from(data, start + len(head.raw))
        found.append(LinkCounters(index, head.name, head.alias, *values))
    _known_heads = heads
    return found


class _Head(NamedTuple):
    """What stands before the counters of a link, the head of their attribute included, and what it says.

    The same bytes say the same again; to take 40 attributes of each of 500 links apart takes longer than to
    read them.
    """

    raw: bytes
    name: str
    alias: str


_known_heads: dict[int, _Head] = {}


def _head(data: bytes, start: int, end: int) -> _Head:
    # rtnl_fill_ifinfo (net/core/rtnetlink.c): the statistics come behind name and alias
    position = start + _IFINFO.size
    while position + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if kind & NLA_TYPE_MASK == _IFLA_STATS64:
            raw = data[start : position + 4]
            have = attributes(raw, _IFINFO.size, len(raw), _LINK_ATTRIBUTES)
            return _Head(raw, _text(have[_IFLA_IFNAME]), _text(have.get(_IFLA_IFALIAS, b"")))
        position += (max(length, 4) + 3) & ~3
    raise NetplanError("network.netlink", "the kernel says nothing of the counters of a link")


def set_link(
    name: str, *, alias: str | None, mac: str | None, master: int | None, up: bool, group: int | None = None
) -> Request:
    """Ask for the settings that are not None; ``master`` 0 takes the link out of its bridge; ``up`` False
    leaves it as it is.

    The link is found by name, so that one that was just made needs no look-up.  The kernel sets MAC, alias
    and master before it brings the link up (net/core/rtnetlink.c, do_setlink).
    """
    parts = [_IFINFO.pack(0, 0, 0, _IFF_UP if up else 0, _IFF_UP if up else 0)]
    parts.append(attribute(_IFLA_IFNAME, name.encode() + b"\0"))
    if alias is not None:
        parts.append(attribute(_IFLA_IFALIAS, alias.encode()))
    if mac is not None:
        parts.append(attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", ""))))
    if master is not None:
        parts.append(attribute(_IFLA_MASTER, _U32.pack(master)))
    if group is not None:
        parts.append(attribute(_IFLA_GROUP, _U32.pack(group)))
    return Request(_RTM_SETLINK, 0, b"".join(parts))


def set_port(name: str, forwards: int) -> Request:
    """Ask for a port of a bridge to forward frames to these groups (:data:`netplan.model.GUARDED_PORT`)."""
    data = attribute(_IFLA_BRPORT_GROUP_FWD_MASK, forwards.to_bytes(2, sys.byteorder))
    info = attribute(_IFLA_INFO_SLAVE_KIND, b"bridge\0") + attribute(
        _IFLA_INFO_SLAVE_DATA | NLA_F_NESTED, data
    )
    payload = b"".join(
        (
            _IFINFO.pack(0, 0, 0, 0, 0),
            attribute(_IFLA_IFNAME, name.encode() + b"\0"),
            attribute(_IFLA_LINKINFO | NLA_F_NESTED, info),
        )
    )
    return Request(_RTM_NEWLINK, 0, payload)


def set_down(name: str) -> Request:
    """Ask for a link to be down."""
    return Request(
        _RTM_SETLINK, 0, _IFINFO.pack(0, 0, 0, 0, _IFF_UP) + attribute(_IFLA_IFNAME, name.encode() + b"\0")
    )


def make_bridge(name: str, index: int, mac: str) -> Request:
    """Ask for a bridge with that number, without spanning tree, whose ports forward at once; in the group of
    what is still to be marked.

    Without STP a port still waits twice the forward delay (net/bridge/br_stp_if.c, br_stp_enable_port), which
    would cut the node off for 30 s.
    """
    data = attribute(_IFLA_BR_FORWARD_DELAY, _U32.pack(0)) + attribute(_IFLA_BR_STP_STATE, _U32.pack(0))
    info = attribute(_IFLA_INFO_KIND, b"bridge\0") + attribute(_IFLA_INFO_DATA | NLA_F_NESTED, data)
    payload = b"".join(
        (
            _IFINFO.pack(0, 0, index, 0, 0),
            attribute(_IFLA_IFNAME, name.encode() + b"\0"),
            attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", ""))),
            attribute(_IFLA_GROUP, _U32.pack(GROUP_MAKING)),
            attribute(_IFLA_LINKINFO | NLA_F_NESTED, info),
        )
    )
    return Request(_RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, payload)


def delete_link(name: str) -> Request:
    """Ask for the removal of a link."""
    return Request(
        _RTM_DELLINK, 0, _IFINFO.pack(0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, name.encode() + b"\0")
    )


def delete_group(group: int) -> Request:
    """Ask for the removal of every link of a group in one go.

    Each removal by itself waits for a grace period of RCU (17 ms measured); a group waits once (46 ms for 100
    links).
    """
    return Request(_RTM_DELLINK, 0, _IFINFO.pack(0, 0, 0, 0, 0) + attribute(_IFLA_GROUP, _U32.pack(group)))


def addresses(sock: NetlinkSocket) -> tuple[Address, ...]:
    """Return every IPv4 and IPv6 address of every link."""
    return tuple(_addresses(sock.dump(_RTM_GETADDR, IFADDR.pack(0, 0, 0, 0, 0))))


def _address(message: Message) -> Address:
    _, data, start, end = message
    _, prefixlen, flags, _, link = IFADDR.unpack_from(data, start)
    have = attributes(data, start + 8, end, _ADDRESS_ATTRIBUTES)
    # on point-to-point links IFA_ADDRESS is the peer and IFA_LOCAL our own (if_addr.h); plain IPv6 has no
    # IFA_LOCAL
    packed = have.get(_IFA_LOCAL) or have.get(_IFA_ADDRESS, b"")
    protocol = _number(have.get(_IFA_PROTO))
    if not protocol and _number(have.get(_IFA_RT_PRIORITY)) == _PRIORITY_MARK:
        protocol = PROTOCOL_MARK
    return Address(link, packed, prefixlen, protocol, _number(have.get(_IFA_FLAGS), flags))


_addresses = _Decoder(_address)


def set_address(address: Address) -> Request:
    """Ask for an address, deprecated from the start; an equal one of the link is changed in place.

    Deprecated means a preferred lifetime of 0: no outgoing IPv6 traffic is given that source by itself (RFC
    6724, rule 3). IPv4 does not look at it, but leaves out addresses of scope ``host`` (net/ipv4/devinet.c,
    inet_select_addr), which those without a network of their own are.
    """
    ipv6 = len(address.packed) == 16
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    alone = address.prefixlen == 32 if not ipv6 else bool(address.flags & IFA_F_NOPREFIXROUTE)
    scope = _SCOPE_HOST if alone and not ipv6 else 0
    payload = b"".join(
        (
            IFADDR.pack(family, address.prefixlen, address.flags & 0xFF, scope, address.link),
            attribute(_IFA_LOCAL, address.packed),
            attribute(_IFA_ADDRESS, address.packed),
            attribute(_IFA_FLAGS, _U32.pack(address.flags)),
            attribute(_IFA_CACHEINFO, _CACHEINFO.pack(0, _FOREVER, 0, 0)),
            attribute(_IFA_PROTO, bytes((address.protocol,))),
            attribute(_IFA_RT_PRIORITY, _U32.pack(_PRIORITY_MARK)) if alone else b"",
        )
    )
    return Request(_RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, payload)


def delete_address(address: Address) -> Request:
    """Ask for the removal of an address."""
    family = socket.AF_INET6 if len(address.packed) == 16 else socket.AF_INET
    payload = IFADDR.pack(family, address.prefixlen, 0, 0, address.link)
    payload += attribute(_IFA_LOCAL, address.packed) + attribute(_IFA_ADDRESS, address.packed)
    return Request(_RTM_DELADDR, 0, payload)


def routes(
    sock: NetlinkSocket,
    *,
    family: int = socket.AF_INET6,
    table: int = 0,
    protocol: int = 0,
    kind: int = 0,
    link: int = 0,
) -> tuple[Route, ...]:
    """Return the routes that match what is not 0; the kernel itself filters (ip6_fib.c, inet6_dump_fib)."""
    payload = RTMSG.pack(family, 0, 0, 0, 0, protocol, 0, kind, 0)
    if table:
        payload += attribute(_RTA_TABLE, _U32.pack(table))
    if link:
        payload += attribute(_RTA_OIF, _U32.pack(link))
    return tuple(_routes(sock.dump(_RTM_GETROUTE, payload, absent=True), payload))


def _route(message: Message) -> Route:
    _, data, start, end = message
    family, prefixlen, _, _, table, protocol, _, kind, flags = RTMSG.unpack_from(data, start)
    have = attributes(data, start + 12, end, _ROUTE_ATTRIBUTES)
    return Route(
        _number(have.get(_RTA_TABLE), table),
        kind,
        protocol,
        have.get(_RTA_DST, b""),
        prefixlen,
        have.get(_RTA_GATEWAY, b""),
        _number(have.get(_RTA_OIF)),
        _number(have.get(_RTA_PRIORITY)),
        have.get(_RTA_PREFSRC, b""),
        flags & _RTNH_F_ONLINK,
        family,
    )


_routes = _Decoder(_route)


def set_route(route: Route) -> Request:
    """Ask for a route; one with the same destination and metric is replaced."""
    return Request(_RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, _route_payload(route))


def delete_route(route: Route) -> Request:
    """Ask for the removal of exactly this route."""
    return Request(_RTM_DELROUTE, 0, _route_payload(route))


def _route_payload(route: Route) -> bytes:
    # IPv6 has no scopes of routes; in IPv4 a next hop is looked up among routes of a narrower one, see
    # fib_check_nh in net/ipv4/fib_semantics.c
    scope = 0
    if route.family == socket.AF_INET:
        scope = _SCOPE_HOST if route.kind == ROUTE_LOCAL else 0 if route.gateway else _SCOPE_LINK
    head = (route.family, route.prefixlen, 0, 0, min(route.table, 255), route.protocol, scope, route.kind)
    parts = [
        RTMSG.pack(*head, route.flags),
        attribute(_RTA_TABLE, _U32.pack(route.table)),
        attribute(_RTA_PRIORITY, _U32.pack(route.metric)),
    ]
    for kind, value in (
        (_RTA_DST, route.destination),
        (_RTA_GATEWAY, route.gateway),
        (_RTA_PREFSRC, route.source),
    ):
        if value:
            parts.append(attribute(kind, value))
    if route.link:
        parts.append(attribute(_RTA_OIF, _U32.pack(route.link)))
    return b"".join(parts)


def rules(sock: NetlinkSocket, family: int = socket.AF_INET6) -> tuple[Rule, ...]:
    """Return the rules that send everything, or what comes from one address, to a table."""
    found = []
    whole = 8 * (16 if family == socket.AF_INET6 else 4)
    for _, data, start, end in sock.dump(_RTM_GETRULE, RTMSG.pack(family, *[0] * 8)):
        _, dst_len, src_len, _, table, _, _, action, flags = RTMSG.unpack_from(data, start)
        if dst_len or src_len not in {0, whole} or flags or action != _FR_ACT_TO_TBL:
            continue
        have = attributes(data, start + 12, end, _RULE_ATTRIBUTES)
        found.append(
            Rule(
                _number(have.get(_FRA_PRIORITY)),
                _number(have.get(_FRA_TABLE), table),
                _number(have.get(_FRA_PROTOCOL)),
                family,
                have.get(_FRA_SRC, b""),
            )
        )
    return tuple(found)


def set_rule(rule: Rule) -> Request:
    """Ask for a rule; an equal one is refused with EEXIST."""
    return Request(_RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, _rule_payload(rule))


def delete_rule(rule: Rule) -> Request:
    """Ask for the removal of a rule."""
    return Request(_RTM_DELRULE, 0, _rule_payload(rule))


def _rule_payload(rule: Rule) -> bytes:
    head = (rule.family, 0, 8 * len(rule.source), 0, min(rule.table, 255), 0, 0, _FR_ACT_TO_TBL)
    return b"".join(
        (
            RTMSG.pack(*head, 0),
            attribute(_FRA_SRC, rule.source) if rule.source else b"",
            attribute(_FRA_PRIORITY, _U32.pack(rule.preference)),
            attribute(_FRA_TABLE, _U32.pack(rule.table)),
            attribute(_FRA_PROTOCOL, bytes((rule.protocol,))),
        )
    )


# the same decoding for notifications, which come one at a time (netplan.relevance)
read_link, read_address, read_route = _link, _address, _route
