"""What a hostile guest tries, each with how a sink tells that it came through.

Two ways: by the means of the guest's own system (another address or MAC on its card, then a datagram or ``arping``),
and frames put on the wire as they are. A frame of the second kind is known by itself, byte for byte; one of the first by
who it says that it is from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address

from kvm_frames import (
    ALL_NODES,
    ARP,
    BROADCAST,
    IPV4,
    IPV6,
    LOCAL_EXPERIMENT,
    PADDING,
    PROVIDER_VLAN,
    ROUTER_ALERT,
    SNAP_IPV4,
    SPANNING_TREE,
    VLAN,
    advertisement,
    arp,
    behind_options,
    bridge_protocol,
    dhcp_offer,
    ethernet,
    icmp4,
    icmp6,
    in_a_fragment,
    ipv4,
    mac_bytes,
    multicast_query,
    packed,
    redirect,
    redirect4,
    router_advertisement,
    solicitation,
    solicited_node,
    sources,
    udp,
)
from kvm_scene import NODE4, NODE6, PREFIX6, ROUTER4, ROUTER6

_ZERO_MAC, _STRANGE_MAC = "00:00:00:00:00:00", "52:54:00:66:66:66"
_PREFIX, _TOKEN = "2001:db8:666::", b"spoofed by a guest, " * 2


@dataclass(frozen=True, slots=True)
class Spoof:
    """One attempt: lines for the guest's shell, and whether a frame is of it."""

    name: str
    lines: tuple[str, ...]
    seen_in: Callable[[bytes], bool]


@dataclass(frozen=True, slots=True)
class Lan:
    """Who is who, as the guest can find out: itself, and those whom it wants to be."""

    mac: str
    ipv4: str
    ipv6: str
    link_local: str
    router_mac: str
    node_mac: str
    tap_mac: str
    partition6: str


# --- with the guest's own means -------------------------------------------------------------------------------------------


def _spoken(foreign, target):
    width = 128 if ":" in foreign else 32
    detection = "/proc/sys/net/ipv6/conf/eth0/accept_dad"  # without it an address can be used at once
    return (
        f"echo 0 >{detection}; ip address add {foreign}/{width} dev eth0",
        f"send datagram {foreign} {target}",
        f"ip address del {foreign}/{width} dev eth0; echo 1 >{detection}",
    )


def _address(lan, what, foreign, target):
    """Take an address, and speak from it: with ARP or neighbour discovery first, where the target's MAC is not known."""
    value = packed(foreign)
    return Spoof(
        f"datagram from {what}",
        _spoken(foreign, target),
        lambda frame: sources(frame) == (mac_bytes(lan.mac), value),
    )


def _gratuitous(lan, foreign):
    value = packed(foreign)
    return Spoof(
        "arping announces the router's address",
        (
            f"ip address add {foreign}/32 dev eth0",
            f"arping -q -U -c 1 -w 1 -I eth0 -s {foreign} {foreign} || true",
            f"ip address del {foreign}/32 dev eth0",
        ),
        lambda frame: sources(frame) == (mac_bytes(lan.mac), value) and frame[12:14] == b"\x08\x06",
    )


def _card(lan, what, mac, target):
    """Give the card another MAC; the addresses stay the guest's own, by which its frames are known."""
    value, own = mac_bytes(mac), {packed(lan.ipv4), packed(lan.ipv6), packed(lan.link_local)}

    def seen(frame):
        source, said = sources(frame)
        return source == value and said in own

    return Spoof(
        f"card with {what}",
        (
            f"ip link set eth0 address {mac}",
            f"send datagram {lan.ipv4} {target}",
            f"ip link set eth0 address {lan.mac}",
        ),
        seen,
    )


# --- frames as they are ---------------------------------------------------------------------------------------------------


def _raw(name, frame, core=None):
    """``core``: what is left of the frame behind a bridge, where that is not all."""
    token = frame if core is None else core
    return Spoof(name, (f"send frame eth0 {frame.hex()}",), lambda seen: token in seen)


def _resolution(lan):
    """Lies about who has which MAC."""
    bad = _STRANGE_MAC

    def announce(mac, address):
        return arp(2, mac, address, BROADCAST, address)

    def advertise(source, target, mac):
        return icmp6(source, "ff02::1", advertisement(target, mac))

    probe = arp(1, lan.mac, NODE4, _ZERO_MAC, "192.0.2.250")
    claim = icmp6("::", solicited_node(NODE6), solicitation(NODE6))
    group = packed(solicited_node(NODE6))[12:].hex(":")
    return (
        _raw("ARP: the router is here", ethernet(lan.mac, BROADCAST, ARP, announce(lan.mac, ROUTER4))),
        _raw("ARP: the node is here", ethernet(lan.mac, BROADCAST, ARP, announce(lan.mac, NODE4))),
        _raw("ARP request in the node's name", ethernet(lan.mac, BROADCAST, ARP, probe)),
        _raw("ARP: own address at another MAC", ethernet(lan.mac, BROADCAST, ARP, announce(bad, lan.ipv4))),
        _raw(
            "NA: the router is here",
            ethernet(lan.mac, ALL_NODES, IPV6, advertise(ROUTER6, ROUTER6, lan.mac)),
        ),
        _raw(
            "NA for the node from own address",
            ethernet(lan.mac, ALL_NODES, IPV6, advertise(lan.link_local, NODE6, lan.mac)),
        ),
        _raw(
            "NA for another partition",
            ethernet(lan.mac, ALL_NODES, IPV6, advertise(lan.link_local, lan.partition6, lan.mac)),
        ),
        _raw(
            "NA for own address at another MAC",
            ethernet(lan.mac, ALL_NODES, IPV6, advertise(lan.ipv6, lan.ipv6, bad)),
        ),
        _raw("NS: claims the node's address", ethernet(lan.mac, f"33:33:{group}", IPV6, claim)),
    )


def _routers(lan):
    """To be the router, or to say who is."""
    source, everybody = lan.link_local, "ff02::1"
    advertised = router_advertisement(_PREFIX, lan.mac)
    passed = ipv4(NODE4, "198.51.100.9", 17, bytes(8))
    asked6, asked4 = multicast_query()
    return (
        _raw("RA", ethernet(lan.mac, ALL_NODES, IPV6, icmp6(source, everybody, advertised))),
        _raw(
            "RA behind an options header",
            ethernet(lan.mac, ALL_NODES, IPV6, behind_options(source, everybody, advertised, PADDING)),
        ),
        _raw(
            "RA in a fragment",
            ethernet(lan.mac, ALL_NODES, IPV6, in_a_fragment(source, everybody, advertised)),
        ),
        _raw(
            "ICMPv6 redirect",
            ethernet(lan.mac, ALL_NODES, IPV6, icmp6(source, everybody, redirect(source, "2001:db8:9::9"))),
        ),
        _raw(
            "ICMP redirect",
            ethernet(lan.mac, BROADCAST, IPV4, icmp4(lan.ipv4, NODE4, redirect4(lan.ipv4, passed))),
        ),
        _raw(
            "MLD query",
            ethernet(lan.mac, ALL_NODES, IPV6, behind_options(source, everybody, asked6, ROUTER_ALERT)),
        ),
        _raw(
            "IGMP query", ethernet(lan.mac, "01:00:5e:00:00:01", IPV4, ipv4(lan.ipv4, "224.0.0.1", 2, asked4))
        ),
        _raw("root of the spanning tree", ethernet(lan.mac, SPANNING_TREE, None, bridge_protocol(lan.mac))),
    )


def _servers(lan):
    offer = dhcp_offer(lan.ipv4, "192.0.2.200", lan.node_mac)
    advertise = bytes.fromhex("02005afe") + _TOKEN
    first = udp(lan.ipv4, "255.255.255.255", 67, 68, offer)[20:]
    return (
        _raw(
            "DHCP server",
            ethernet(lan.mac, BROADCAST, IPV4, udp(lan.ipv4, "255.255.255.255", 67, 68, offer)),
        ),
        _raw(
            "DHCP server in fragments",
            ethernet(lan.mac, BROADCAST, IPV4, ipv4(lan.ipv4, "255.255.255.255", 17, first[:128], more=True)),
        ),
        _raw(
            "DHCPv6 server",
            ethernet(lan.mac, ALL_NODES, IPV6, udp(lan.link_local, "ff02::1", 547, 546, advertise)),
        ),
    )


def _datagrams(lan):
    """Data in another's name, or in nobody's."""

    def data(source, target, token=_TOKEN):
        return udp(source, target, 40000, 9, token)

    everybody4, everybody6 = "192.0.2.255", "ff02::1"
    once, twice, cut = (data(NODE4, everybody4, _TOKEN + word) for word in (b"once", b"twice", b"cut off"))
    tag = b"\0\2" + IPV4.to_bytes(2, "big")
    back = b"\x83\7\4" + packed(lan.ipv4) + b"\0"  # loose source and record route: RFC 791
    doubly = b"\0\3" + VLAN.to_bytes(2, "big") + tag
    return (
        _raw("UDP from the node's address", ethernet(lan.mac, BROADCAST, IPV4, data(NODE4, everybody4))),
        _raw("UDP from the router's IPv6", ethernet(lan.mac, ALL_NODES, IPV6, data(ROUTER6, everybody6))),
        _raw(
            "UDP from another partition", ethernet(lan.mac, ALL_NODES, IPV6, data(lan.partition6, everybody6))
        ),
        _raw("UDP from 127.0.0.1", ethernet(lan.mac, BROADCAST, IPV4, data("127.0.0.1", everybody4))),
        _raw(
            "UDP from another tap's MAC",
            ethernet(lan.tap_mac, BROADCAST, IPV4, data(lan.ipv4, everybody4)),
        ),
        # the kernel keeps the outer tag beside the frame (skb_vlan_untag), so a packet socket sees the frame without it
        _raw("802.1Q", ethernet(lan.mac, BROADCAST, VLAN, tag + once), once),
        _raw("802.1ad with 802.1Q", ethernet(lan.mac, BROADCAST, PROVIDER_VLAN, doubly + twice), twice),
        _raw("unknown EtherType", ethernet(lan.mac, BROADCAST, LOCAL_EXPERIMENT, _TOKEN)),
        _raw(
            "UDP from the node in 802.2",
            ethernet(lan.mac, BROADCAST, None, SNAP_IPV4 + data(NODE4, everybody4)),
        ),
        _raw(
            "IPv4 with a route back",
            ethernet(
                lan.mac,
                BROADCAST,
                IPV4,
                ipv4(lan.ipv4, everybody4, 17, data(NODE4, everybody4)[20:], options=back),
            ),
        ),
        _raw("cut off IPv4 header", ethernet(lan.mac, BROADCAST, IPV4, cut[:11])),
    )


def strangers(lan):
    """To use addresses that nobody has: what a machine does that is plugged into a LAN."""
    return (
        _address(lan, "a free IPv4", "192.0.2.60", ROUTER4),
        _address(lan, "a free IPv6", f"{PREFIX6}60", ROUTER6),
    )


def routed(foreign, beyond):
    """A datagram from ``foreign`` to somebody ``beyond`` the node, which puts its own MAC before it."""
    value = packed(foreign)
    return Spoof(
        f"datagram from {foreign}",
        _spoken(foreign, beyond),
        lambda frame: sources(frame)[1] == value and foreign.encode() in frame,
    )


def honest(lan, text, *, to=(BROADCAST, "192.0.2.255")):
    """A line that sends ``text`` as who the guest is; ``to`` a MAC and an address."""
    mac, target = to
    frame = ethernet(lan.mac, mac, IPV4, udp(lan.ipv4, target, 40001, 9, text.encode()))
    return f"send frame eth0 {frame.hex()}"


def spoofs(lan):
    """All attempts; those that draw others' MACs to the tap come last, as they disturb the guest itself."""
    return (
        _address(lan, "the node's IPv4", NODE4, ROUTER4),
        _address(lan, "the router's IPv4", ROUTER4, NODE4),
        _address(lan, "the node's IPv6", NODE6, ROUTER6),
        _address(lan, "the router's IPv6", ROUTER6, NODE6),
        _address(lan, "another partition's IPv6", lan.partition6, ROUTER6),
        _gratuitous(lan, ROUTER4),
        *_resolution(lan),
        *_routers(lan),
        *_servers(lan),
        *_datagrams(lan),
        _card(lan, "another MAC", _STRANGE_MAC, ROUTER4),
        _card(lan, "another tap's MAC", lan.tap_mac, ROUTER4),
        _card(lan, "the node's MAC", lan.node_mac, ROUTER4),
        _card(lan, "the router's MAC", lan.router_mac, NODE4),
    )


def link_local(mac):
    """The address that a card makes of its MAC: RFC 4291, appendix A."""
    octets = mac_bytes(mac)
    identifier = bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return str(ip_address(b"\xfe\x80".ljust(8, b"\0") + identifier))
