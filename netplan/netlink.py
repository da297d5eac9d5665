"""Netlink framing: one socket, dumps, single answers and acknowledged batches, with ``struct`` alone.

Why not pyroute2: it costs 150 ms to import and 293 ms to decode 1000 objects (measured, facts/peer_figures.md
7), which is the whole budget of a pass without change.  Here a message is bytes, an attribute is cut out only
when somebody wants it.

Layouts: include/uapi/linux/netlink.h; netlink(7).
"""

import contextlib
import errno
import os
import select
import socket
import struct
import sys
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple, Self

from netplan.errors import NetplanError

NETLINK_ROUTE = 0
NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400

NLA_TYPE_MASK = 0x3FFF  # the two upper bits say nested and network byte order
NLA_F_NESTED = 0x8000

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLMSG_OVERRUN = 4
_ENDS = frozenset((_NLMSG_ERROR, _NLMSG_DONE, _NLMSG_OVERRUN))
SOL_NETLINK = 270
_SO_SNDBUFFORCE = 32
_SPARE = 64 << 10
_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h
_NETLINK_CAP_ACK = 10  # an error repeats the header of the request only, not the request
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12  # dumps honour the filter of their request, since Linux 4.20
_NLMSGERR_ATTR_MSG = 1

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_INT = struct.Struct("=i")
_DONE = _HEADER.size + _INT.size

# The kernel gives a dump in pieces of at most 32 KiB (net/netlink/af_netlink.c, netlink_dump).
_BUFFER = 1 << 16
# Refusals wait in our receive buffer while the rest of a write is worked on; each accounts for less than 1.5
# KiB.  So many at once cannot fill the smallest default buffer (208 KiB), and a write still costs next to
# nothing per request.
_BATCH = 64
_DUMP_TRIES = 8


class Request(NamedTuple):
    """One request: message type, flags beside NLM_F_REQUEST, and its payload (fixed header and attributes)."""

    kind: int
    flags: int
    payload: bytes


class Refusal(NamedTuple):
    """What the kernel said to a request it did not carry out: errno, and its own words (may be empty)."""

    errno: int
    message: str

    def text(self) -> str:
        """Return both in one phrase."""
        reason = os.strerror(self.errno)
        return f"{reason}: {self.message}" if self.message else reason


class Message(NamedTuple):
    """One message of an answer: its type, and its payload as ``data[start:end]``."""

    kind: int
    data: bytes
    start: int
    end: int


def attribute(kind: int, value: bytes) -> bytes:
    """Pack one attribute, padded to four bytes."""
    length = 4 + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + b"\0" * (-length & 3)


def attributes(data: bytes, start: int, end: int, wanted: Container[int]) -> dict[int, bytes]:
    """Return the values of the wanted attributes in ``data[start:end]``; the last of a kind wins."""
    found = {}
    unpack = _ATTRIBUTE.unpack_from
    while start + 4 <= end:
        length, kind = unpack(data, start)
        if length < 4:
            break
        kind &= NLA_TYPE_MASK
        if kind in wanted:
            found[kind] = data[start + 4 : start + length]
        start += (length + 3) & ~3
    return found


def elements(data: bytes, start: int = 0, end: int | None = None) -> list[bytes]:
    """Return the values of a list of attributes, whatever their kinds."""
    found = []
    end = len(data) if end is None else end
    while start + 4 <= end:
        length, _ = _ATTRIBUTE.unpack_from(data, start)
        if length < 4:
            break
        found.append(data[start + 4 : start + length])
        start += (length + 3) & ~3
    return found


class NetlinkSocket:
    """One netlink socket in the network namespace of the calling thread.  Not thread safe; close it.

    Every method raises ``NetplanError("network.netlink")`` when the answer as a whole fails.
    """

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.bind((0, 0))
            for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
                self._socket.setsockopt(SOL_NETLINK, option, 1)
        except OSError:
            self._socket.close()
            raise
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def namespace(self) -> int:
        """Return a number that no other network namespace of this boot has; -1 before Linux 5.14."""
        try:
            return int.from_bytes(
                self._socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder
            )
        except OSError:
            return -1

    def make_room(self, size: int) -> None:
        """Let a write of so many bytes pass, where we may: one must fit into the socket's buffer as a whole (208 KiB by
        default).
        """
        # the kernel counts twice what is asked for, and its own bookkeeping (net/core/sock.c, __sock_set_sndbuf)
        if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < size + _SPARE:
            with contextlib.suppress(PermissionError):
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size + _SPARE)

    def dump(self, kind: int, payload: bytes, *, absent: bool = False) -> list[Message]:
        """Return all that the kernel has of a kind.  A dump that a change ran into is taken again.

        ``absent``: what is asked for may not be there (ENOENT, as a routing table), which is nothing then.
        """
        for _ in range(_DUMP_TRIES):
            sequence = self._send([Request(kind, NLM_F_DUMP, payload)], acknowledge=False)
            found: list[Message] = []
            if self._collect(sequence, found, fine=errno.ENOENT if absent else 0):
                return found
        raise NetplanError(
            "network.netlink", "the network keeps changing while it is being read", retryable=True
        )

    def stream(self, kind: int, payload: bytes) -> bytes:
        """Return a dump as it came, one message behind the other, its end (NLMSG_DONE) included.

        For those who know where in it is what they want. Nothing is said of a change that the dump ran into.
        """
        sequence = self._send([Request(kind, NLM_F_DUMP, payload)], acknowledge=False)
        parts: list[bytes] = []
        while True:
            data = self._datagram()
            length, first, _, number, _ = _HEADER.unpack_from(data)
            if number != sequence:
                continue
            if first in _ENDS and (first != _NLMSG_DONE or _INT.unpack_from(data, 16)[0]):
                refusal = _refusal(Message(first, data, 16, length))
                raise NetplanError(
                    "network.netlink", f"the kernel refused to list: {refusal.text()}", retryable=True
                )
            parts.append(data)
            # the end may bear words of the kernel, and then only taking all apart finds it
            if _is_end(data, sequence) or (
                not self._waiting() and any(one.kind == _NLMSG_DONE for one in messages(data))
            ):
                return b"".join(parts)

    def get(self, kind: int, payload: bytes) -> Message | Refusal:
        """Return the single answer to a request, or why there is none."""
        sequence = self._send([Request(kind, 0, payload)], acknowledge=False)
        while True:
            for message, number, _ in self._receive():
                if number != sequence:
                    continue
                return _refusal(message) if message.kind == _NLMSG_ERROR else message

    def batch(self, requests: Sequence[Request]) -> dict[int, Refusal]:
        """Send the requests in few writes, in order; return the refused ones by their place.

        Only the last request of each write asks for an acknowledgement: the kernel works through a write in
        order and reports each failure without being asked (netlink_rcv_skb), so the last answer says that all
        are done.
        """
        refused: dict[int, Refusal] = {}
        for first in range(0, len(requests), _BATCH):
            chunk = requests[first : first + _BATCH]
            last = self._send(chunk, acknowledge=True)
            offset = first - (last - len(chunk) + 1)
            finished = False
            while not finished:
                for message, number, _ in self._receive():
                    if message.kind != _NLMSG_ERROR or number + offset < first:
                        continue
                    refusal = _refusal(message)
                    if refusal.errno:
                        refused[number + offset] = refusal
                    finished = finished or number == last
        return refused

    def transaction(self, requests: Sequence[Request], *, acknowledged: int) -> Refusal | None:
        """Send the requests as one write that the kernel carries out whole or not at all; return why it did not.

        ``acknowledged`` is the place of the request that asks for an answer.  After a refusal the socket is of
        no more use: others may follow it.
        """
        marked = [
            one._replace(flags=one.flags | NLM_F_ACK) if place == acknowledged else one
            for place, one in enumerate(requests)
        ]
        first = self._send(marked, acknowledge=False) - len(requests) + 1
        while True:
            for message, number, _ in self._receive():
                if message.kind != _NLMSG_ERROR or number < first:
                    continue
                refusal = _refusal(message)
                if refusal.errno:
                    return refusal
                if number == first + acknowledged:
                    return None

    def _send(self, requests: Sequence[Request], *, acknowledge: bool) -> int:
        """Write the requests as one datagram; return the sequence number of the last."""
        parts = []
        last = len(requests) - 1
        for place, (kind, flags, payload) in enumerate(requests):
            self._sequence += 1
            flags |= NLM_F_REQUEST | (NLM_F_ACK if acknowledge and place == last else 0)  # noqa: PLW2901 - the loop's own copy
            parts.append(_HEADER.pack(16 + len(payload), kind, flags, self._sequence, 0))
            parts.append(payload + b"\0" * (-len(payload) & 3))
        try:
            self._socket.send(b"".join(parts))
        except OSError as error:
            raise NetplanError(
                "network.netlink", f"cannot write to netlink: {error.strerror}", retryable=True
            ) from error
        return self._sequence

    def _receive(self) -> Iterator[tuple[Message, int, int]]:
        """Read one datagram: its messages with sequence number and flags."""
        data = self._datagram()
        position = 0
        while position + 16 <= len(data):
            length, kind, message_flags, number, _ = _HEADER.unpack_from(data, position)
            if length < 16:
                break
            yield Message(kind, data, position + 16, position + length), number, message_flags
            position += (length + 3) & ~3

    def _datagram(self) -> bytes:
        try:
            data, _, flags, _ = self._socket.recvmsg(_BUFFER)
        except OSError as error:  # ENOBUFS: answers were lost, so nothing is known of their requests
            raise NetplanError(
                "network.netlink", f"cannot read from netlink: {error.strerror}", retryable=True
            ) from error
        if flags & socket.MSG_TRUNC:
            raise NetplanError("network.netlink", "an answer of netlink was cut off")
        return data

    def _waiting(self) -> bool:
        """Say whether there is more to read. The kernel writes the next piece of a dump while one is read."""
        asked = select.poll()  # select(2) takes no descriptor above 1023
        asked.register(self._socket, select.POLLIN)
        return bool(asked.poll(0))

    def _collect(self, sequence: int, found: list[Message], fine: int) -> bool:
        """Read a dump to its end; False when it must be taken again.

        A loop of its own, not over :meth:`_receive`: 300 partitions are 2000 messages.
        """
        consistent = True
        unpack, append = _HEADER.unpack_from, found.append
        while True:
            data = self._datagram()
            position, last = 0, len(data) - 16
            while position <= last:
                length, kind, flags, number, _ = unpack(data, position)
                if length < 16:
                    break
                message = Message(kind, data, position + 16, position + length)
                position += (length + 3) & ~3
                if number != sequence:
                    continue
                if flags & NLM_F_DUMP_INTR:
                    consistent = False
                if kind not in _ENDS:
                    append(message)
                    continue
                refusal = _refusal(message)
                if refusal.errno not in {0, fine}:
                    raise NetplanError(
                        "network.netlink", f"the kernel refused to list: {refusal.text()}", retryable=True
                    )
                return consistent


def _is_end(data: bytes, sequence: int) -> bool:
    """Say whether a datagram closes a dump: its last message is an NLMSG_DONE, a header and an int."""
    if len(data) < _DONE:
        return False
    length, kind, _, number, _ = _HEADER.unpack_from(data, len(data) - _DONE)
    return (length, kind, number) == (_DONE, _NLMSG_DONE, sequence)


def messages(data: bytes) -> Iterator[Message]:
    """Yield the messages of one datagram of notifications."""
    position = 0
    while position + 16 <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, position)
        if length < 16:
            break
        yield Message(kind, data, position + 16, position + length)
        position += (length + 3) & ~3


def _refusal(message: Message) -> Refusal:
    """Read an NLMSG_ERROR or NLMSG_DONE: errno 0 is success."""
    _, data, start, end = message
    code = _INT.unpack_from(data, start)[0] if end - start >= 4 else 0
    if message.kind != _NLMSG_ERROR or not code:
        return Refusal(-code, "")
    # the error code, the header of our request (CAP_ACK keeps it at that), the kernel's words
    words = attributes(data, start + 20, end, (_NLMSGERR_ATTR_MSG,)).get(_NLMSGERR_ATTR_MSG, b"")
    return Refusal(-code, words.rstrip(b"\0").decode(errors="replace"))
