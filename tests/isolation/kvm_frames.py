"""Frames as a guest's root can put them on the wire, and what a sink needs to tell them from everybody else's."""

import struct
from ipaddress import ip_address

BROADCAST = "ff:ff:ff:ff:ff:ff"
ALL_NODES = "33:33:00:00:00:01"
SPANNING_TREE = "01:80:c2:00:00:00"
PADDING, ROUTER_ALERT = b"\1\4\0\0\0\0", b"\5\2\0\0\1\0"  # options of IPv6: RFC 8200, RFC 2711
SNAP_IPV4 = bytes.fromhex("aaaa030000000800")
ARP, IPV4, IPV6, VLAN, PROVIDER_VLAN, LOCAL_EXPERIMENT = 0x0806, 0x0800, 0x86DD, 0x8100, 0x88A8, 0x88B5
_UDP, _ICMP, _ICMP6, _HOP_BY_HOP, _FRAGMENT = 17, 1, 58, 0, 44


def mac_bytes(text):
    return bytes.fromhex(text.replace(":", ""))


def packed(address):
    return ip_address(address).packed


def ethernet(source, target, kind, body):
    """``kind``: the EtherType, or None for the length that IEEE 802.3 has there."""
    kind = len(body) if kind is None else kind
    return mac_bytes(target) + mac_bytes(source) + struct.pack("!H", kind) + body


def arp(operation, sender_mac, sender, target_mac, target):
    head = struct.pack("!HHBBH", 1, IPV4, 6, 4, operation)
    return head + mac_bytes(sender_mac) + packed(sender) + mac_bytes(target_mac) + packed(target)


def _checksum(data):
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source, target, protocol, body, *, more=False, options=b""):
    """``more``: a first fragment."""
    words, length = 5 + len(options) // 4, 20 + len(options) + len(body)
    head = struct.pack("!BBHHHBBH", 0x40 | words, 0, length, 1, more << 13, 64, protocol, 0)
    head += packed(source) + packed(target) + options
    return head[:10] + struct.pack("!H", _checksum(head)) + head[12:] + body


def ipv6(source, target, header, body, *, hops=255):
    return struct.pack("!IHBB", 6 << 28, len(body), header, hops) + packed(source) + packed(target) + body


def _pseudo(source, target, length, protocol):
    return packed(source) + packed(target) + struct.pack("!II", length, protocol)


def icmp4(source, target, body):
    return ipv4(source, target, _ICMP, body[:2] + struct.pack("!H", _checksum(body)) + body[4:])


def _icmp6_body(source, target, body):
    total = _checksum(_pseudo(source, target, len(body), _ICMP6) + body)
    return body[:2] + struct.pack("!H", total) + body[4:]


def icmp6(source, target, body):
    return ipv6(source, target, _ICMP6, _icmp6_body(source, target, body))


def behind_options(source, target, body, option):
    """An ICMPv6 message behind a hop-by-hop header with an option of six bytes."""
    return ipv6(source, target, _HOP_BY_HOP, bytes([_ICMP6, 0]) + option + _icmp6_body(source, target, body))


def in_a_fragment(source, target, body):
    """A whole ICMPv6 message in an atomic fragment (RFC 6946)."""
    header = struct.pack("!BBHI", _ICMP6, 0, 0, 0x5AFE)
    return ipv6(source, target, _FRAGMENT, header + _icmp6_body(source, target, body))


def udp(source, target, source_port, target_port, body):
    head = struct.pack("!HHHH", source_port, target_port, 8 + len(body), 0)
    if ":" not in source:
        return ipv4(source, target, _UDP, head + body)  # no checksum: RFC 768
    total = _checksum(_pseudo(source, target, len(head + body), _UDP) + head + body) or 0xFFFF
    return ipv6(source, target, _UDP, head[:6] + struct.pack("!H", total) + body)


# --- neighbour discovery ----------------------------------------------------------------------------------------------


def advertisement(target, mac):
    """A neighbour advertisement that overrides what others know: RFC 4861, 4.4."""
    return struct.pack("!BBHI", 136, 0, 0, 0x20000000) + packed(target) + b"\2\1" + mac_bytes(mac)


def solicitation(target):
    """A neighbour solicitation without the option of a source: from ``::``, duplicate address detection."""
    return struct.pack("!BBHI", 135, 0, 0, 0) + packed(target)


def solicited_node(address):
    """Where a solicitation for the address goes to: RFC 4291, 2.7.1."""
    return str(ip_address(packed("ff02::1:ff00:0")[:13] + packed(address)[13:]))


def router_advertisement(prefix, mac):
    """An advertisement of oneself as a router, with a prefix to make addresses of: RFC 4861, 4.2."""
    head = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
    information = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 3600, 3600, 0) + packed(prefix)
    return head + b"\1\1" + mac_bytes(mac) + information


def redirect(target, destination):
    """RFC 4861, 4.5: whoever goes to ``destination`` shall go by ``target``."""
    return struct.pack("!BBHI", 137, 0, 0, 0) + packed(target) + packed(destination)


def redirect4(gateway, packet):
    """RFC 792: the packet's target is better reached by ``gateway``."""
    return struct.pack("!BBH", 5, 1, 0) + packed(gateway) + packet[:28]


def dhcp_offer(server, offered, mac):
    """What a DHCP server answers: RFC 2131."""
    head = (
        struct.pack("!BBBBIHH", 2, 1, 6, 0, 0x5AFE, 0, 0x8000) + bytes(4) + packed(offered) + packed(server)
    )
    head += bytes(4) + mac_bytes(mac).ljust(16, b"\0") + bytes(192)
    return head + bytes.fromhex("63825363 350102 3604") + packed(server) + b"\3\4" + packed(server) + b"\xff"


def multicast_query():
    """Who asks so is the querier, to whom switches send all groups: RFC 2710, RFC 2236."""
    return struct.pack("!BBHHH", 130, 0, 0, 1000, 0) + bytes(16), bytes.fromhex("1164ee9b00000000")


def bridge_protocol(mac):
    """Be the root of the spanning tree: IEEE 802.1D, 9.3.1."""
    root = b"\0\0" + mac_bytes(mac)
    return b"\x42\x42\3" + bytes(5) + root + bytes(4) + root + bytes.fromhex("8001 0000 1400 0200 0f00")


# --- what is seen -----------------------------------------------------------------------------------------------------


def sources(frame):
    """Who a frame says that it is from: the Ethernet source, and the addresses as sender of ARP or IP."""
    kind, rest = int.from_bytes(frame[12:14], "big"), frame[14:]
    said = b""
    if kind == ARP:
        said = rest[14:18]
    elif kind == IPV4:
        said = rest[12:16]
    elif kind == IPV6:
        said = rest[8:24]
    return frame[6:12], said
