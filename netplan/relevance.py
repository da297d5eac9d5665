"""Which changes of the kernel's network state concern us.  No I/O: messages in, notices out.

The kernel tells a group of listeners of everything: that a tenant's machine opened its tap, that a router
advertised the same prefix once more, that somebody's container came and went.  None of that is drift, and none
of it may cost a look at the whole node.  So what concerns us is remembered as it was told last, and only a
difference is a notice.

Facts on which this stands (Linux 5.10 to 6.18):

- RTM_NEWLINK tells of each change of a link, also of its carrier and queues; the bridge tells of its ports in
  messages of the same type with family AF_BRIDGE (net/bridge/br_netlink.c), which say nothing that the others
  do not.
- RTM_NEWADDR is sent for each router advertisement that renews an address (net/ipv6/addrconf.c,
  addrconf_prefix_rcv).
- A route that is replaced is told of by the new one alone, with NLM_F_REPLACE (net/ipv6/ip6_fib.c).
- nlmsg_pid would name the asker, but is 0 for links and IPv6 addresses: our own work cannot be told by it.
"""

import socket
import struct
from collections.abc import Iterable
from typing import Literal, NamedTuple

from netplan import rtnetlink
from netplan.model import (
    ALIAS_MARK,
    BRIDGE_ALIAS,
    MESH_ALIAS,
    PORT_ALIAS,
    PROTOCOL_MARK,
    Address,
    Link,
    Route,
    address_text,
)
from netplan.netlink import Message, attributes
from netplan.nfnetlink import FAMILIES, TABLE
from netplan.rtnetlink import (
    ROUTE_UNICAST,
    ROUTE_UNREACHABLE,
    RTMSG,
    TABLE_LOCAL,
    TABLE_LOCAL_SOURCE,
    TABLE_MAIN,
)

Change = Literal["appeared", "changed", "gone", "lost"]

_NEWLINK, _DELLINK = 16, 17
_NEWADDR, _DELADDR = 20, 21
_NEWROUTE, _DELROUTE = 24, 25
_NEWRULE, _DELRULE = 32, 33
_GONE = frozenset((_DELLINK, _DELADDR, _DELROUTE, _DELRULE))

_IFINFO_SIZE, _IFLA_WIRELESS = 16, 11
_U32 = struct.Struct("=I")
_FRA_SRC, _FRA_PRIORITY, _FRA_TABLE, _FRA_PROTOCOL = 2, 6, 15, 21
_FAMILIES = frozenset(FAMILIES.values())
_DELTABLE = 10 << 8 | 2  # NFNL_SUBSYS_NFTABLES, NFT_MSG_DELTABLE
_TABLE_BYTES = TABLE.encode() + b"\0"
# the first attribute of every nft message about something in a table is the table's name
_NFTA_TABLE = 1

_TABLE_COMPAT = 252  # what a message's header says of a table above 255
_RouteKey = tuple[int, int, bytes, int, int]


class Notice(NamedTuple):
    """Something that concerns us changed.

    ``cause`` names it as the plan's operations do (``tap/slaptap3``, ``address/10.0.0.3``,
    ``filter/partitiond``); ``link/br0`` is an interface that is not ours; ``network/lost`` stands for
    anything: notices were lost.  ``ours``: it bears, or bore, our mark.
    """

    cause: str
    change: Change
    ours: bool


LOST = Notice("network/lost", "lost", ours=False)


class Relevance:
    """What was told last of everything that concerns us.

    ``names`` are the links that matter whether they bear our mark or not: the interface, the bridge, and
    whatever has the name of one of our taps.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self._links: dict[int, Link] = {}
        self._addresses: dict[tuple[int, bytes], Address] = {}
        self._routes: dict[_RouteKey, Route] = {}
        self._defaults: set[Route] = set()
        self._shapes: set[tuple[int, int, int]] = set()

    def begin(self, links: Iterable[Link], addresses: Iterable[Address], routes: Iterable[Route]) -> None:
        """Start from what is there now."""
        self._links = {link.ifindex: link for link in links}
        self._addresses = {(one.link, one.packed): one for one in addresses if self._concerns(one)}
        self._routes, self._defaults, self._shapes = {}, set(), set()
        for route in routes:
            if route.protocol == PROTOCOL_MARK:
                self._know(route)
            elif _is_default(route):
                self._defaults.add(route)

    def links(self) -> Iterable[Link]:
        """Return every link that there is, also those that do not concern us."""
        return self._links.values()

    def attend(self, names: frozenset[str]) -> bool:
        """Let other names matter; say whether there is a link of which more is to be known now."""
        different = names ^ self.names
        self.names = names
        return any(link.name in different for link in self._links.values())

    def judge(self, message: Message) -> Notice | None:
        """Return the notice that a message of rtnetlink is, or None when it does not concern us."""
        gone = message.kind in _GONE
        if message.kind in (_NEWLINK, _DELLINK):
            return self._link(message, gone)
        if message.kind in (_NEWADDR, _DELADDR):
            return self._address(rtnetlink.read_address(message), gone)
        if message.kind in (_NEWROUTE, _DELROUTE):
            return self._route(message, gone)
        if message.kind in (_NEWRULE, _DELRULE):
            return _rule(message, gone)
        return None

    def _link(self, message: Message, gone: bool) -> Notice | None:
        if message.data[message.start] != socket.AF_UNSPEC:
            return None
        if attributes(message.data, message.start + _IFINFO_SIZE, message.end, (_IFLA_WIRELESS,)):
            return None  # an event of a wireless card, which says nothing else (net/wireless/wext-core.c)
        now = rtnetlink.read_link(message)
        before = self._links.get(now.ifindex)
        if gone:
            self._links.pop(now.ifindex, None)
        elif now == before:
            return None
        else:
            self._links[now.ifindex] = now
        both = (now,) if before is None else (now, before)
        ours = any(one.alias.startswith(ALIAS_MARK) for one in both)
        named = any(one.name in self.names for one in both)
        if not (ours or named or self._port_moved(now, before, gone)):
            return None
        return Notice(f"{_kind(now, before)}/{now.name}", _change(gone, before is not None), ours)

    def _port_moved(self, now: Link, before: Link | None, gone: bool) -> bool:
        """Whether a link became, or no longer is, a port of a bridge of ours."""
        masters = {0 if gone else now.master, before.master if before else 0}
        return len(masters) == 2 and any(
            found is not None and found.name in self.names for found in map(self._links.get, masters)
        )

    def _concerns(self, address: Address) -> bool:
        if address.protocol == PROTOCOL_MARK:
            return True
        link = self._links.get(address.link)
        # link-local ones come and go with the link and are nobody's base
        return link is not None and link.name in self.names and not _is_link_local(address.packed)

    def _address(self, now: Address, gone: bool) -> Notice | None:
        key = (now.link, now.packed)
        before = self._addresses.get(key)
        if before is None and not self._concerns(now):
            return None
        if gone:
            self._addresses.pop(key, None)
        elif now == before:
            return None
        else:
            self._addresses[key] = now
        ours = PROTOCOL_MARK in (now.protocol, before.protocol if before else 0)
        return Notice(f"address/{address_text(now.packed)}", _change(gone, before is not None), ours)

    def _know(self, route: Route) -> None:
        """Remember a route of ours, and how a message begins that tells of one in its place."""
        self._routes[_key(route)] = route
        table = route.table if route.table < 256 else _TABLE_COMPAT
        self._shapes.add((route.family, table, route.prefixlen))

    def _route(self, message: Message, gone: bool) -> Notice | None:
        family, length, _, _, table, protocol, _, kind, _ = RTMSG.unpack_from(message.data, message.start)
        ours = protocol == PROTOCOL_MARK
        default = not length and table == TABLE_MAIN and kind == ROUTE_UNICAST
        if not (ours or default or (family, table, length) in self._shapes):
            return None  # a router's tables come by the hundred thousand
        now = rtnetlink.read_route(message)
        key = _key(now)
        before = self._routes.get(key)
        if ours:
            if gone:
                self._routes.pop(key, None)
            elif now == before:
                return None
            else:
                self._know(now)
            return Notice(_route_cause(now), _change(gone, before is not None), ours=True)
        if before is not None and not gone:  # took the place of ours, or stands beside it
            return Notice(_route_cause(now), "changed", ours=True)
        if not default or (not gone and now in self._defaults):
            return None
        (self._defaults.discard if gone else self._defaults.add)(now)
        return Notice(_route_cause(now), "gone" if gone else "appeared", ours=False)


def _kind(now: Link, before: Link | None) -> str:
    """The kind of resource that a link is to the plan; its own mark may just have been taken from it."""
    for link in (now, before or now):
        for mark, kind in ((BRIDGE_ALIAS, "bridge"), (PORT_ALIAS, "port"), (MESH_ALIAS, "mesh")):
            if link.alias.startswith(mark):
                return kind
    if now.kind == "tun":
        return "tap" if now.tap else "tun"
    return "link"


def _change(gone: bool, known: bool) -> Change:
    return "gone" if gone else "changed" if known else "appeared"


def _is_link_local(packed: bytes) -> bool:
    return len(packed) == 16 and packed[0] == 0xFE and packed[1] & 0xC0 == 0x80


def _is_default(route: Route) -> bool:
    return route.prefixlen == 0 and route.table == TABLE_MAIN


def _key(route: Route) -> _RouteKey:
    return route.family, route.table, route.destination, route.prefixlen, route.metric


def _route_cause(route: Route) -> str:
    if route.table > TABLE_LOCAL_SOURCE:
        return f"gateway/{route.table}/{route.text()}"
    kind = {TABLE_LOCAL: "range", TABLE_LOCAL_SOURCE: "source"}.get(route.table, "route")
    kind = "unreachable" if route.kind == ROUTE_UNREACHABLE else kind
    return f"{kind}/{route.text()}"


def _rule(message: Message, gone: bool) -> Notice | None:
    """Rules are few; those that lead to the tables where ours lead are looked at, whoever made them."""
    family, _, _, _, table, _, _, _, _ = RTMSG.unpack_from(message.data, message.start)
    wanted = (_FRA_SRC, _FRA_PRIORITY, _FRA_TABLE, _FRA_PROTOCOL)
    have = attributes(message.data, message.start + 12, message.end, wanted)
    ours = have.get(_FRA_PROTOCOL) == bytes((PROTOCOL_MARK,))
    if _FRA_TABLE in have:
        table = _U32.unpack(have[_FRA_TABLE])[0]
    local = family == socket.AF_INET6 and table in (TABLE_LOCAL, TABLE_LOCAL_SOURCE)
    if not (ours or local):
        return None
    if local:
        name = "local-source"
    elif _FRA_SRC in have:
        name = f"from-{address_text(have[_FRA_SRC])}"
    else:
        name = str(_U32.unpack(have[_FRA_PRIORITY])[0]) if _FRA_PRIORITY in have else "0"
    return Notice(f"rule/{name}", "gone" if gone else "changed", ours)


def judge_nft(message: Message) -> Notice | None:
    """Return the notice that a message of nf_tables is: something in our tables changed, or one is gone.

    Others' transactions only raise the generation, which makes the next look compare; nothing is wrong yet.
    """
    start = message.start
    if message.data[start] not in _FAMILIES:  # nfgen_family of struct nfgenmsg
        return None
    have = attributes(message.data, start + 4, message.end, (_NFTA_TABLE,))
    if have.get(_NFTA_TABLE) != _TABLE_BYTES:
        return None
    return Notice(f"filter/{TABLE}", "gone" if message.kind == _DELTABLE else "changed", ours=True)
