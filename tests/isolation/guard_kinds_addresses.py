"""Kinds of frames by whose addresses they bear: sources of IPv4 and IPv6, MACs, ARP."""

from guard_cast import BOTH, LOCAL6, MINE4, MINE6, NEITHER, ONLY_LAN, ZERO_MAC, Kind, my_mac, told
from guard_frames import ARP, BROADCAST, arp, ether
from guard_packets import datagram4, datagram6

SOURCES = [
    Kind("IPv4 own", BOTH, datagram4(MINE4)),
    Kind("IPv6 own", BOTH, datagram6(MINE6)),
    Kind("IPv6 own link-local", BOTH, datagram6(LOCAL6)),
    Kind("IPv4 that nobody owns", ONLY_LAN, datagram4(lambda c: c.free.four)),
    Kind("IPv6 that nobody owns", ONLY_LAN, datagram6(lambda c: c.free.six)),
    *(
        Kind(f"IPv4 {name}", NEITHER, datagram4(source))
        for name, source in {
            "of the host": lambda c: c.host.four,
            "of the router": lambda c: c.router.four,
            "of the resolver": lambda c: c.resolver,
            "of the other tap": lambda c: c.other.four,
            "of a partition": lambda c: c.partition.four,
            "private to a partition": lambda c: c.private,
            "of the VPN": lambda c: c.vpn,
            "loopback": "127.0.0.1",
            "0.0.0.0": "0.0.0.0",
            "of this network": "0.1.2.3",
            "multicast": "224.0.0.5",
            "reserved": "240.1.2.3",
            "broadcast": "255.255.255.255",
        }.items()
    ),
    *(
        Kind(f"IPv6 {name}", NEITHER, datagram6(source))
        for name, source in {
            "of the host": lambda c: c.host.six,
            "link-local of the host": lambda c: c.host.local,
            "of the router": lambda c: c.router.six,
            "link-local of the router": lambda c: c.router.local,
            "of the other tap": lambda c: c.other.six,
            "link-local of the other tap": lambda c: c.other.local,
            "of a partition": lambda c: c.partition.six,
            "loopback": "::1",
            "unspecified": "::",
            "multicast": "ff02::1",
            "IPv4-mapped": "::ffff:192.0.2.2",
        }.items()
    ),
    Kind("IPv4 that nobody owns, to the world", ONLY_LAN, datagram4("198.51.100.9")),
]


def _from(mac_of, source=MINE4):
    return datagram4(source, mac_of)


_INVALID = "a bridge drops such a source (is_valid_ether_addr)"
MACS = [
    Kind("MAC of the host", NEITHER, _from(lambda c: c.host.mac)),
    Kind("MAC of the router", NEITHER, _from(lambda c: c.router.mac)),
    Kind("MAC of the other tap", NEITHER, _from(lambda c: c.other.mac)),
    Kind("MAC proposed to the other tap", NEITHER, _from(lambda c: c.proposed)),
    Kind("a second MAC", NEITHER, _from(lambda c: c.second)),
    Kind("MAC multicast", NEITHER, _from("03:00:5e:00:00:01"), _INVALID),
    Kind("MAC broadcast", NEITHER, _from(BROADCAST), _INVALID),
    Kind("MAC zero", NEITHER, _from(ZERO_MAC), _INVALID),
    Kind("MAC and IPv6 of the router", NEITHER, datagram6(lambda c: c.router.six, lambda c: c.router.mac)),
]


def _arp(operation, sender, target=None, *, sender_mac=None, cut=None, unicast=False, **fields):
    def make(cast, to, token):
        asked = told(target, cast) if target else to.four
        body = arp(operation, told(sender_mac or my_mac, cast), told(sender, cast), asked, **fields)
        body = body[:cut] if cut else body + token
        return ether(to.mac if unicast else BROADCAST, cast.me.mac, ARP, body)

    return make


NOBODY4 = "0.0.0.0"


ARPS = [
    Kind("ARP request", BOTH, _arp(1, MINE4)),
    Kind("ARP reply", BOTH, _arp(2, MINE4, unicast=True)),
    Kind("ARP gratuitous request", BOTH, _arp(1, MINE4, MINE4)),
    Kind("ARP gratuitous reply", BOTH, _arp(2, MINE4, MINE4)),
    Kind("ARP probe for its own", BOTH, _arp(1, NOBODY4, MINE4)),
    Kind("ARP probe for a free address", ONLY_LAN, _arp(1, NOBODY4, lambda c: c.free.four)),
    Kind(
        "ARP announcement of a free address", ONLY_LAN, _arp(1, lambda c: c.free.four, lambda c: c.free.four)
    ),
    *(
        Kind(
            f"ARP {what} as {whom}",
            NEITHER,
            _arp(operation, sender, sender if what == "gratuitous" else None),
        )
        for what, operation in {"request": 1, "reply": 2, "gratuitous": 1}.items()
        for whom, sender in {
            "the router": lambda c: c.router.four,
            "the host": lambda c: c.host.four,
            "the other tap": lambda c: c.other.four,
            "the resolver": lambda c: c.resolver,
            "a partition": lambda c: c.private,
        }.items()
    ),
    Kind("ARP unicast reply as the router", NEITHER, _arp(2, lambda c: c.router.four, unicast=True)),
    Kind("ARP with another's MAC", NEITHER, _arp(2, MINE4, sender_mac=lambda c: c.router.mac)),
    Kind("ARP with a second MAC", NEITHER, _arp(2, MINE4, sender_mac=lambda c: c.second)),
    Kind("ARP with a broadcast MAC", NEITHER, _arp(2, MINE4, sender_mac=BROADCAST)),
    Kind("ARP probe for the router's", NEITHER, _arp(1, NOBODY4, lambda c: c.router.four)),
    Kind("ARP probe for the other tap's", NEITHER, _arp(1, NOBODY4, lambda c: c.other.four)),
    Kind("ARP reply from nobody", NEITHER, _arp(2, NOBODY4, MINE4)),
    Kind("ARP of loopback", NEITHER, _arp(1, "127.0.0.1")),
    Kind("ARP of multicast", NEITHER, _arp(1, "224.0.0.1")),
    Kind("ARP cut before the target", NEITHER, _arp(1, MINE4, cut=20)),
    Kind("ARP cut in the target", NEITHER, _arp(1, MINE4, cut=26)),
    Kind("ARP of another hardware", NEITHER, _arp(1, MINE4, kind=6)),
    Kind("ARP of another protocol", NEITHER, _arp(1, MINE4, protocol=0x1234)),
    Kind("ARP of other sizes", NEITHER, _arp(1, MINE4, sizes=(8, 4))),
    Kind("RARP operation in ARP", NEITHER, _arp(3, MINE4)),
    Kind("inverse ARP", NEITHER, _arp(8, MINE4)),
]
