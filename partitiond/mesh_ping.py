"""One echo request to each of some addresses, side by side, over a raw socket of root's (icmp(7), RFC 792)."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ipaddress import IPv4Address

_REQUEST, _REPLY = 8, 0
_HEADER = struct.Struct("!BBHHH")
_MOST = 2048


def round_trips(
    targets: Sequence[IPv4Address], source: IPv4Address, within: float
) -> dict[IPv4Address, float]:
    """Seconds until each answered; who did not, ``within`` so many seconds, is left out. Raises OSError."""
    found: dict[IPv4Address, float] = {}
    if not targets:
        return found
    token = os.urandom(16)
    mark = int.from_bytes(token[:2], "big")
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as channel:
        channel.bind((str(source), 0))
        sent: dict[int, float] = {}
        for number, target in enumerate(targets):
            began = time.monotonic()  # before: what is sent may be answered before this process runs again
            try:
                channel.sendto(_request(mark, number, token), (str(target), 0))
            except OSError:
                continue  # no route, no tincd, or our own filter: it does not answer
            sent[number] = began
        deadline = time.monotonic() + within
        while len(found) < len(sent) and (left := deadline - time.monotonic()) > 0:
            if not select.select([channel], [], [], left)[0]:
                break
            packet, (address, _) = channel.recvfrom(_MOST)
            number = _answered(packet, mark, token)
            if number in sent and str(targets[number]) == address:
                found.setdefault(targets[number], time.monotonic() - sent[number])
    return found


def _request(mark: int, number: int, token: bytes) -> bytes:
    whole = _HEADER.pack(_REQUEST, 0, 0, mark, number) + token
    return _HEADER.pack(_REQUEST, 0, _checksum(whole), mark, number) + token


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def _answered(packet: bytes, mark: int, token: bytes) -> int:
    """The number of the request that a packet answers, -1 for any other packet."""
    start = (packet[0] & 0x0F) * 4
    body = packet[start:]
    if len(body) < _HEADER.size:
        return -1
    kind, _, _, found, number = _HEADER.unpack_from(body)
    if (kind, found, body[_HEADER.size :]) != (_REPLY, mark, token):
        return -1
    return int(number)
