"""Whether somebody answers at an address: echo requests of ICMP, RFC 792 and RFC 4443."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# linux: a raw socket of ICMP gets the packet with its IPv4 header, one of ICMPv6 without (raw(7), RFC 3542)
_ECHO = struct.Struct("!BBHHH")  # type, code, checksum, identifier, number
_KINDS = {4: (8, 0), 6: (128, 129)}  # request, reply
_ROUNDS = 3


def answering(
    addresses: Iterable[IPv4Address | IPv6Address], seconds: float = 1.5
) -> list[IPv4Address | IPv6Address]:
    """Those of the addresses at which another host answers within so many seconds; asked three times. Needs root.

    What cannot be asked (no route, a family that the kernel lacks) does not answer.
    """
    wanted = {one for one in addresses if not _is_here(one)}
    found: set[IPv4Address | IPv6Address] = set()
    for version in (4, 6):
        mine = {one for one in wanted if one.version == version}
        if mine:
            found |= _ask(version, mine, seconds)
    # once more: one that was tentative then (RFC 4862, section 5.4) may have become this machine's meanwhile
    found = {one for one in found if not _is_here(one)}
    return sorted(found, key=lambda one: (one.version, int(one)))


def _is_here(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is this machine's own: to one of these the kernel speaks from itself (RFC 6724, section 5, rule 1)."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))  # nothing is sent
            return str(probe.getsockname()[0]) == str(address)
    except OSError:
        return False


def _ask(
    version: int, wanted: set[IPv4Address | IPv6Address], seconds: float
) -> set[IPv4Address | IPv6Address]:
    family, protocol = (
        (socket.AF_INET, socket.IPPROTO_ICMP) if version == 4 else (socket.AF_INET6, socket.IPPROTO_ICMPV6)
    )
    identifier, found = os.getpid() & 0xFFFF, set[IPv4Address | IPv6Address]()
    try:
        raw = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    except OSError:
        return found
    with raw:
        for number in range(_ROUNDS):
            for one in wanted - found:
                _send(raw, version, one, identifier, number)
            end = time.monotonic() + seconds / _ROUNDS
            while wanted - found and (left := end - time.monotonic()) > 0:
                if select.select([raw], [], [], left)[0]:
                    found |= wanted & _heard(raw, version, identifier)
    return found


def _send(
    raw: socket.socket, version: int, target: IPv4Address | IPv6Address, identifier: int, number: int
) -> None:
    kind = _KINDS[version][0]
    total = (
        (kind << 8) + identifier + number
    )  # the kernel sums ICMPv6 itself, as its sum has the addresses in it
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~total & 0xFFFF if version == 4 else 0
    try:
        raw.sendto(_ECHO.pack(kind, 0, checksum, identifier, number), (str(target), 0))
    except OSError:
        return  # unreachable: it does not answer


def _heard(raw: socket.socket, version: int, identifier: int) -> set[IPv4Address | IPv6Address]:
    try:
        data, sender = raw.recvfrom(2048)
    except OSError:  # an ICMP error about another one
        return set()
    start = (data[0] & 0x0F) * 4 if version == 4 and data else 0
    if len(data) < start + _ECHO.size:
        return set()
    kind, _, _, ours, _ = _ECHO.unpack_from(data, start)
    if kind != _KINDS[version][1] or ours != identifier:
        return set()
    text = str(sender[0]).partition("%")[0]
    return {IPv4Address(text) if version == 4 else IPv6Address(text)}
