"""Kinds of what is neither: other protocols, fragments, options, tags, broken headers."""

from guard_cast import BOTH, LOCAL6, MINE4, MINE6, NEITHER, UNSPECIFIED, Kind, my_mac, routers, told
from guard_frames import (
    ALL_NODES,
    ARP,
    BROADCAST,
    ESP,
    FRAGMENT,
    HOP_BY_HOP,
    ICMP,
    ICMP6,
    IGMP,
    IP,
    IP6,
    MLD_ROUTERS,
    OPTIONS,
    ROUTER_ALERT,
    ROUTING,
    TCP,
    UDP,
    arp,
    dhcp4,
    ether,
    group_mac,
    icmp4,
    icmp6,
    ip4,
    ip6,
    six,
    tcp,
    udp,
)
from guard_packets import datagram4, datagram6, piece, routing, wrapped


def _packet4(protocol, payload, source=MINE4, to=None, **fields):
    def make(cast, end, token):
        target = to or end.four
        packet = ip4(told(source, cast), target, protocol, told(payload, cast) + token, **fields)
        groups = {EVERYBODY: BROADCAST} | ({target: group_mac(target)} if target.startswith("224.") else {})
        return ether(groups.get(target, end.mac), cast.me.mac, IP, packet)

    return make


def _packet6(protocol, payload, source=MINE6, to=None, headers=(), **fields):
    """``payload``: bytes, or what makes them of source and target."""

    def make(cast, end, token):
        address, target = told(source, cast), to or end.six
        packet, following = payload(address, target) if callable(payload) else payload, protocol
        for number, wrap in headers:
            packet, following = wrap(following, packet), number
        destination = group_mac(target) if target.startswith("ff") else end.mac
        return ether(destination, cast.me.mac, IP6, ip6(address, target, following, packet, **fields) + token)

    return make


def _udp6(source_port, target_port, data=b"x" * 16):
    return lambda source, target: udp(source_port, target_port, data, source=source, target=target)


def _icmp6(kind, body=bytes(4)):
    return lambda source, target: icmp6(source, target, kind, body)


EVERYBODY = "255.255.255.255"
_ALERT = [(HOP_BY_HOP, wrapped(ROUTER_ALERT))]
_REPORT = bytes.fromhex("00000001 04000000") + six("ff02::1:ff00:1")

PROTOCOLS = [
    Kind("ping", BOTH, _packet4(ICMP, icmp4(8, bytes(4)))),
    Kind("ping6", BOTH, _packet6(ICMP6, _icmp6(128))),
    Kind("TCP over IPv4", BOTH, _packet4(TCP, tcp(4000, 80))),
    Kind("TCP over IPv6", BOTH, _packet6(TCP, (tcp(4000, 80)))),
    Kind("ESP over IPv6", BOTH, _packet6(ESP, (bytes(range(32))))),
    Kind("unreachable", BOTH, _packet4(ICMP, icmp4(3, bytes(4)))),
    Kind("packet too big", BOTH, _packet6(ICMP6, _icmp6(2))),
    Kind("IPv4 record route", BOTH, datagram4(MINE4, options=b"\x07\x07\x04\0\0\0\0\0")),
    Kind("IPv6 with destination options", BOTH, datagram6(MINE6, headers=[(OPTIONS, wrapped())])),
    Kind(
        "DHCP discover",
        BOTH,
        _packet4(UDP, lambda c: udp(68, 67, dhcp4(c.me.mac)), "0.0.0.0", EVERYBODY),
    ),
    Kind("DHCP request of its own", BOTH, _packet4(UDP, lambda c: udp(68, 67, dhcp4(c.me.mac)))),
    Kind("DHCPv6 solicit", BOTH, _packet6(UDP, _udp6(546, 547), LOCAL6, "ff02::1:2")),
    Kind(
        "IGMP report",
        BOTH,
        _packet4(IGMP, b"\x22\0\0\0" + bytes(4), to="224.0.0.22", options=b"\x94\x04\0\0"),
    ),
    Kind(
        "IGMP report from nobody",
        BOTH,
        _packet4(
            IGMP,
            b"\x16\0\0\0" + bytes(4),
            "0.0.0.0",
            "224.0.0.22",
            options=b"\x94\x04\0\0",
        ),
    ),
    Kind("MLD report", BOTH, _packet6(ICMP6, _icmp6(143, _REPORT), LOCAL6, MLD_ROUTERS, _ALERT, hops=1)),
    Kind(
        "MLD report from nobody",
        BOTH,
        _packet6(ICMP6, _icmp6(143, _REPORT), UNSPECIFIED, MLD_ROUTERS, _ALERT, hops=1),
    ),
    Kind("IPv4 first fragment", BOTH, _packet4(UDP, udp(4000, 9, bytes(24)), fragment=0x2000)),
    Kind("IPv4 last fragment", BOTH, _packet4(UDP, bytes(32), fragment=4)),
    Kind(
        "IPv6 first fragment",
        BOTH,
        _packet6(UDP, _udp6(4000, 9, bytes(24)), headers=[(FRAGMENT, piece(more=1))]),
    ),
    Kind("IPv6 last fragment", BOTH, _packet6(UDP, (bytes(32)), headers=[(FRAGMENT, piece(4))])),
    Kind(
        "large ping6, first fragment",
        BOTH,
        _packet6(ICMP6, _icmp6(128, bytes(60)), headers=[(FRAGMENT, piece(more=1))]),
    ),
    Kind(
        "TCP behind an atomic fragment",
        BOTH,
        _packet6(TCP, (tcp(4000, 80)), headers=[(FRAGMENT, piece())]),
    ),
    Kind("DHCP offer", NEITHER, _packet4(UDP, lambda c: udp(67, 68, dhcp4(c.other.mac, 2)), to=EVERYBODY)),
    Kind(
        "DHCP offer as the router",
        NEITHER,
        _packet4(UDP, lambda c: udp(67, 68, dhcp4(c.other.mac, 2)), lambda c: c.router.four, EVERYBODY),
    ),
    Kind(
        "DHCP offer from another port", NEITHER, _packet4(UDP, lambda c: udp(1067, 68, dhcp4(c.other.mac, 2)))
    ),
    Kind("DHCP relay", NEITHER, _packet4(UDP, lambda c: udp(67, 67, dhcp4(c.me.mac)))),
    Kind(
        "DHCP offer behind options",
        NEITHER,
        _packet4(UDP, lambda c: udp(67, 68, dhcp4(c.other.mac, 2)), options=b"\x94\x04\0\0"),
    ),
    Kind(
        "DHCP offer, first fragment",
        NEITHER,
        _packet4(UDP, lambda c: udp(67, 68, dhcp4(c.other.mac, 2)), fragment=0x2000),
    ),
    Kind(
        "DHCP discover for another's MAC",
        NEITHER,
        _packet4(UDP, lambda c: udp(68, 67, dhcp4(c.other.mac)), "0.0.0.0", EVERYBODY),
    ),
    Kind("DHCP release of another's", NEITHER, _packet4(UDP, lambda c: udp(68, 67, dhcp4(c.other.mac)))),
    Kind(
        "DHCP discover with a long MAC",
        NEITHER,
        _packet4(UDP, lambda c: udp(68, 67, dhcp4(c.me.mac, sizes=(1, 16))), "0.0.0.0", EVERYBODY),
    ),
    Kind(
        "DHCP discover in a fragment",
        NEITHER,
        _packet4(UDP, lambda c: udp(68, 67, dhcp4(c.me.mac)), "0.0.0.0", EVERYBODY, fragment=0x2000),
    ),
    Kind(
        "last fragment from nobody",
        NEITHER,
        _packet4(UDP, bytes(32), "0.0.0.0", EVERYBODY, fragment=4),
    ),
    Kind(
        "UDP from nobody to the DHCP port of one",
        NEITHER,
        _packet4(UDP, lambda c: udp(68, 67, dhcp4(c.me.mac)), "0.0.0.0"),
    ),
    Kind("DHCPv6 reply", NEITHER, _packet6(UDP, _udp6(547, 546), LOCAL6)),
    Kind("DHCPv6 reply from another port", NEITHER, _packet6(UDP, _udp6(1547, 546), LOCAL6)),
    Kind(
        "DHCPv6 reply behind options",
        NEITHER,
        _packet6(UDP, _udp6(547, 546), LOCAL6, headers=[(OPTIONS, wrapped())]),
    ),
    Kind(
        "DHCPv6 reply in a fragment",
        NEITHER,
        _packet6(UDP, _udp6(547, 546), LOCAL6, headers=[(FRAGMENT, piece(more=1))]),
    ),
    Kind("ICMP redirect", NEITHER, _packet4(ICMP, icmp4(5, bytes(4) + bytes(20)))),
    Kind(
        "ICMP redirect as the router",
        NEITHER,
        _packet4(ICMP, icmp4(5, bytes(4) + bytes(20)), lambda c: c.router.four),
    ),
    Kind(
        "ICMP redirect behind options",
        NEITHER,
        _packet4(ICMP, icmp4(5, bytes(4) + bytes(20)), options=b"\x94\x04\0\0"),
    ),
    Kind(
        "ICMP redirect, first fragment",
        NEITHER,
        _packet4(ICMP, icmp4(5, bytes(4) + bytes(24)), fragment=0x2000),
    ),
    Kind("ICMP router advertisement", NEITHER, _packet4(ICMP, icmp4(9, bytes(4)), to="224.0.0.1")),
    Kind(
        "IGMP query",
        NEITHER,
        _packet4(IGMP, b"\x11\0\0\0" + bytes(4), to="224.0.0.1", options=b"\x94\x04\0\0"),
    ),
    Kind("MLD query", NEITHER, _packet6(ICMP6, _icmp6(130, bytes(20)), LOCAL6, ALL_NODES, _ALERT, hops=1)),
    Kind(
        "MLD query without an alert",
        NEITHER,
        _packet6(ICMP6, _icmp6(130, bytes(20)), LOCAL6, ALL_NODES, hops=1),
    ),
    Kind("multicast router advertisement", NEITHER, _packet6(ICMP6, _icmp6(151), LOCAL6, ALL_NODES)),
    Kind(
        "MLD report as the router",
        NEITHER,
        _packet6(ICMP6, _icmp6(143, _REPORT), lambda c: c.router.local, MLD_ROUTERS, _ALERT),
    ),
    Kind("IPv4 loose source route", NEITHER, datagram4(MINE4, options=b"\x83\x07\x04\x01\x01\x01\x01\0")),
    Kind("IPv4 strict source route", NEITHER, datagram4(MINE4, options=b"\x89\x07\x04\x01\x01\x01\x01\0")),
    Kind(
        "IPv4 source route behind padding",
        NEITHER,
        datagram4(MINE4, options=b"\x01\x83\x07\x04\x01\x01\x01\x01"),
    ),
    Kind(
        "IPv4 options that cannot be read",
        NEITHER,
        datagram4(MINE4, options=b"\x83\x03\x04\x01\x07\x27\x04\0"),
    ),
    Kind("IPv6 routing header 0", NEITHER, datagram6(MINE6, headers=[(ROUTING, routing(0))])),
    Kind(
        "IPv6 routing header behind options",
        NEITHER,
        datagram6(MINE6, headers=[(ROUTING, routing(0)), (OPTIONS, wrapped())]),
    ),
    Kind(
        "IPv6 first fragment without transport",
        NEITHER,
        _packet6(OPTIONS, (b"\x3a\x02" + bytes(6)), headers=[(FRAGMENT, piece(more=1))]),
    ),
    Kind(
        "IPv6 first fragment of nothing",
        NEITHER,
        _packet6(UDP, (b""), headers=[(FRAGMENT, piece(more=1))]),
    ),
    Kind(
        "IPv4 first fragment of nothing",
        NEITHER,
        lambda c, to, _: ether(
            to.mac, c.me.mac, IP, ip4(c.me.four, to.four, UDP, b"\x12\x34", fragment=0x2000)
        ),
    ),
    Kind(
        "spoofed first fragment",
        NEITHER,
        _packet4(UDP, udp(4000, 9, bytes(24)), lambda c: c.router.four, fragment=0x2000),
    ),
    Kind(
        "spoofed last fragment",
        NEITHER,
        _packet4(UDP, bytes(32), lambda c: c.router.four, fragment=4),
    ),
    Kind(
        "spoofed last IPv6 fragment",
        NEITHER,
        _packet6(UDP, (bytes(32)), routers, headers=[(FRAGMENT, piece(4))]),
    ),
    Kind(
        "ICMPv6 over IPv4 as the router",
        NEITHER,
        _packet4(ICMP6, bytes(16), lambda c: c.router.four),
    ),
    Kind("RST as the router", NEITHER, _packet4(TCP, tcp(443, 4000), lambda c: c.router.four)),
    Kind(
        "IPv6 in IPv4 as the host",
        NEITHER,
        _packet4(41, lambda c: ip6(c.me.six, c.host.six, 59, b""), lambda c: c.host.four),
    ),
]


def _tagged(*tags, source=MINE4):
    def make(cast, to, token):
        packet = ip4(told(source, cast), to.four, UDP, udp(4000, 9, token))
        return ether(to.mac, cast.me.mac, IP, packet, [(tag, number) for tag, number in tags])

    return make


def _other(kind, payload=b"\x42" * 46, to=None, sender=None):
    def make(cast, end, token):
        return ether(to or end.mac, told(sender or my_mac, cast), kind, payload + token)

    return make


def _broken4(change, **fields):
    def make(cast, to, token):
        packet = ip4(cast.me.four, to.four, UDP, udp(4000, 9, token), **fields)
        return ether(to.mac, cast.me.mac, IP, change(packet))

    return make


def _broken6(change, **fields):
    def make(cast, to, token):
        packet = ip6(
            cast.me.six, to.six, UDP, udp(4000, 9, token, source=cast.me.six, target=to.six), **fields
        )
        return ether(to.mac, cast.me.mac, IP6, change(packet))

    return make


def _same(packet):
    return packet


_BPDU = b"\x42\x42\x03" + bytes(35)
_LINK = "a bridge keeps what is sent to 01:80:c2:00:00:0X"
FRAMES = [
    Kind("VLAN tag", NEITHER, _tagged((0x8100, 7))),
    Kind("VLAN tag of number 0", NEITHER, _tagged((0x8100, 0))),
    Kind("VLAN tag and the router's address", NEITHER, _tagged((0x8100, 7), source=lambda c: c.router.four)),
    Kind("service tag", NEITHER, _tagged((0x88A8, 7))),
    Kind("two tags", NEITHER, _tagged((0x8100, 7), (0x8100, 8))),
    Kind("service and VLAN tag", NEITHER, _tagged((0x88A8, 7), (0x8100, 8))),
    Kind("three tags", NEITHER, _tagged((0x8100, 0), (0x8100, 0), (0x8100, 1))),
    Kind("tag of 0x9100", NEITHER, _tagged((0x9100, 7))),
    Kind(
        "tag around ARP as the router",
        NEITHER,
        lambda c, to, token: ether(
            BROADCAST, c.me.mac, ARP, arp(2, c.me.mac, c.router.four, to.four) + token, [(0x8100, 0)]
        ),
    ),
    Kind("BPDU", NEITHER, lambda c, _, token: ether("01:80:c2:00:00:00", c.me.mac, 38, _BPDU + token)),
    Kind("BPDU to one", NEITHER, lambda c, to, token: ether(to.mac, c.me.mac, 38, _BPDU + token)),
    Kind(
        "IPv4 in SNAP",
        NEITHER,
        lambda c, to, token: ether(
            to.mac,
            c.me.mac,
            60,
            b"\xaa\xaa\x03\0\0\0\x08\0" + ip4(c.router.four, to.four, UDP, udp(1, 9, token)),
        ),
    ),
    Kind("IPX in 802.3", NEITHER, _other(40, b"\xff\xff" + bytes(38))),
    Kind("RARP", NEITHER, _other(0x8035)),
    Kind("PPPoE", NEITHER, _other(0x8863)),
    Kind("MPLS", NEITHER, _other(0x8847)),
    Kind("EAPOL to one", NEITHER, _other(0x888E)),
    Kind("MACsec", NEITHER, _other(0x88E5)),
    Kind("batman", NEITHER, _other(0x4305)),
    Kind("unknown EtherType", NEITHER, _other(0x1234)),
    Kind("loopback test", NEITHER, _other(0x9000)),
    Kind("LLDP", NEITHER, _other(0x88CC, to="01:80:c2:00:00:0e"), _LINK),
    Kind("LACP", NEITHER, _other(0x8809, to="01:80:c2:00:00:02"), _LINK),
    Kind("pause", NEITHER, _other(0x8808, to="01:80:c2:00:00:01"), _LINK),
    Kind("IPv4 of version 6", NEITHER, _broken4(_same, version=0x60)),
    Kind("IPv4 with a short header", NEITHER, _broken4(_same, words=4)),
    Kind("IPv4 longer than its frame", NEITHER, _broken4(_same, length=400)),
    Kind("IPv4 shorter than its header", NEITHER, _broken4(_same, length=12)),
    Kind(
        "IPv4 header cut",
        NEITHER,
        lambda c, to, _: ether(to.mac, c.me.mac, IP, ip4(c.me.four, to.four, UDP, b"")[:14]),
    ),
    Kind("IPv4 with options cut", NEITHER, _broken4(_same, words=15)),
    Kind("IPv6 of version 4", NEITHER, _broken6(_same, version=0x40)),
    Kind("IPv6 longer than its frame", NEITHER, _broken6(_same, length=400)),
    Kind(
        "IPv6 header cut",
        NEITHER,
        lambda c, to, _: ether(to.mac, c.me.mac, IP6, ip6(c.me.six, to.six, UDP, b"")[:30]),
    ),
    Kind(
        "IPv6 with headers that do not end",
        NEITHER,
        lambda c, to, token: ether(
            to.mac, c.me.mac, IP6, ip6(c.me.six, to.six, OPTIONS, b"\x11\x20" + token)
        ),
    ),
    Kind(
        "IPv6 in the frame of IPv4",
        NEITHER,
        lambda c, to, token: ether(to.mac, c.me.mac, IP, ip6(c.router.six, to.six, UDP, udp(1, 9, token))),
    ),
    Kind(
        "IPv4 in the frame of IPv6",
        NEITHER,
        lambda c, to, token: ether(to.mac, c.me.mac, IP6, ip4(c.router.four, to.four, UDP, udp(1, 9, token))),
    ),
]
