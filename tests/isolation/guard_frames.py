"""Frames as a guest may write them, right and wrong: built byte by byte, with the checksums that receivers want."""

import struct
from ipaddress import IPv4Address, IPv6Address

IP, ARP, IP6 = 0x0800, 0x0806, 0x86DD
BROADCAST = "ff:ff:ff:ff:ff:ff"
ALL_NODES, ALL_ROUTERS, MLD_ROUTERS = "ff02::1", "ff02::2", "ff02::16"
TCP, UDP, ICMP, IGMP, ICMP6, ESP = 6, 17, 1, 2, 58, 50
HOP_BY_HOP, ROUTING, FRAGMENT, NOTHING_MORE, OPTIONS = 0, 43, 44, 59, 60
SOURCE_LINK, TARGET_LINK, PREFIX, NONCE = 1, 2, 3, 14


def mac(text):
    return bytes.fromhex(text.replace(":", ""))


def four(text):
    return IPv4Address(text).packed


def six(text):
    return IPv6Address(text).packed


def solicited(address):
    return str(IPv6Address(six("ff02::1:ff00:0")[:13] + six(address)[13:]))


def group_mac(address):
    """The Ethernet address of a multicast group."""
    if ":" in address:
        return "33:33:" + six(address)[12:].hex(":")
    return "01:00:5e:" + bytes((four(address)[1] & 0x7F, *four(address)[2:])).hex(":")


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ether(target, source, kind, payload, tags=()):
    """A frame; ``tags`` are pairs of EtherType and VLAN number, the outer one first."""
    between = b"".join(struct.pack("!HH", tag, number) for tag, number in tags)
    return mac(target) + mac(source) + between + struct.pack("!H", kind) + payload


def ip4(source, target, protocol, payload, *, fragment=0, options=b"", length=None, version=0x40, words=None):
    words = words if words is not None else 5 + len(options) // 4
    length = 20 + len(options) + len(payload) if length is None else length
    head = struct.pack("!BBHHHBBH", version | words, 0, length, 7, fragment, 64, protocol, 0)
    head += four(source) + four(target) + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def ip6(source, target, following, payload, *, hops=64, length=None, version=0x60):
    length = len(payload) if length is None else length
    return struct.pack("!IHBB", version << 24, length, following, hops) + six(source) + six(target) + payload


def _transport6(source, target, protocol, data, place):
    pseudo = six(source) + six(target) + struct.pack("!II", len(data), protocol)
    return data[:place] + struct.pack("!H", checksum(pseudo + data)) + data[place + 2 :]


def udp(source_port, target_port, data=b"", *, source=None, target=None):
    head = struct.pack("!HHHH", source_port, target_port, 8 + len(data), 0) + data
    if source is None or ":" not in source:
        return head
    return _transport6(source, target, UDP, head, 6)


def tcp(source_port, target_port, data=b""):
    return struct.pack("!HHIIBBHHH", source_port, target_port, 1, 0, 0x50, 2, 1024, 0, 0) + data


def icmp6(source, target, kind, body, *, code=0, protocol=ICMP6):
    return _transport6(source, target, protocol, struct.pack("!BBH", kind, code, 0) + body, 2)


def icmp4(kind, body, code=0):
    data = struct.pack("!BBH", kind, code, 0) + body
    return data[:2] + struct.pack("!H", checksum(data)) + data[4:]


def option(kind, data):
    """An option of neighbour discovery."""
    return bytes((kind, (len(data) + 2) // 8)) + data


def arp(
    operation,
    sender_mac,
    sender,
    target,
    target_mac="00:00:00:00:00:00",
    *,
    kind=1,
    protocol=IP,
    sizes=(6, 4),
):
    return (
        struct.pack("!HHBBH", kind, protocol, *sizes, operation)
        + (mac(sender_mac) + four(sender))
        + (mac(target_mac) + four(target))
    )


def extension(following, data=b"\x01\x04\0\0\0\0"):
    """A header of options (six bytes of padding), or whatever has its form."""
    return bytes((following, len(data) // 8)) + data


def fragment(following, offset, more, payload, number=9):
    """A piece; ``offset`` in units of 8 bytes."""
    return struct.pack("!BBHI", following, 0, offset << 3 | more, number) + payload


ROUTER_ALERT = b"\x05\x02\0\0\x01\0"


def dhcp4(chaddr, operation=1, sizes=(1, 6)):
    body = struct.pack("!BBBBIHH", operation, *sizes, 0, 0x1234, 0, 0) + bytes(16) + mac(chaddr) + bytes(10)
    return body + bytes(192) + b"\x63\x82\x53\x63\x35\x01\x01\xff"
