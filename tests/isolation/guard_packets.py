"""Datagrams of the spoof matrix, and what may stand in front of them."""

from guard_cast import my_mac, told
from guard_frames import IP, IP6, UDP, ether, extension, fragment, ip4, ip6, udp


def datagram4(source, sender=None, options=b"", port=4000, dport=9):
    def make(cast, to, token):
        packet = ip4(
            told(source, cast),
            to.four,
            UDP,
            udp(port, dport, token),
            options=options,
        )
        return ether(to.mac, told(sender or my_mac, cast), IP, packet)

    return make


def datagram6(source, sender=None, port=4000, dport=9, headers=()):
    def make(cast, to, token):
        address = told(source, cast)
        packet = udp(port, dport, token, source=address, target=to.six)
        following = UDP
        for number, wrap in headers:
            packet, following = wrap(following, packet), number
        return ether(to.mac, told(sender or my_mac, cast), IP6, ip6(address, to.six, following, packet))

    return make


def wrapped(data=b"\x01\x04\0\0\0\0"):
    return lambda following, payload: extension(following, data) + payload


def routing(kind):
    return lambda following, payload: bytes((following, 0, kind, 0)) + bytes(4) + payload


def piece(offset=0, more=0):
    return lambda following, payload: fragment(following, offset, more, payload)
