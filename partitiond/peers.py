"""Who asks at the control socket: what the kernel says of the peer, and what it may see by that.

Promises: nothing that the peer says counts; credentials are those of the moment in which it connected (unix(7), SO_PEERCRED).
"""

from __future__ import annotations

import ctypes
import errno
import grp
import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitiond.bounded_http import Pool

if TYPE_CHECKING:
    from collections.abc import Callable

    from partitiond.node import Node

GROUP = "partitiond"
"""Whose members see all, and may apply."""

_PEERGROUPS = 59  # SO_PEERGROUPS, Linux 4.13: include/uapi/asm-generic/socket.h; Python has no name for it
_CREDENTIALS = struct.Struct("3i")
_PENALTY = 0.1
_SHORT, _LONG = 256, 65536  # groups; NGROUPS_MAX

# a root's request may be a build: who asks and listens does so for as long as it likes
_ROOT = Pool("root", 64, "root", 64, 60.0)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who asks.  ``partition``: the one whose user it is; ``sees_all``: root and the members of the group."""

    uid: int
    partition: str | None = None
    sees_all: bool = False

    @property
    def is_root(self) -> bool:
        """Whether it may do everything."""
        return self.uid == 0


def groups(connection: socket.socket) -> frozenset[int]:
    """Return the numbers of the peer's groups, the primary one too.  Raises OSError."""
    _, _, primary = _credentials(connection)
    for most in (_SHORT, _LONG):
        buffer = (ctypes.c_uint32 * most)()
        length = ctypes.c_uint32(ctypes.sizeof(buffer))
        # Python's own getsockopt(2) takes 1 KiB at most, which are 256 groups
        answer = _LIBC.getsockopt(
            connection.fileno(), socket.SOL_SOCKET, _PEERGROUPS, buffer, ctypes.byref(length)
        )
        if answer == 0:
            return frozenset((primary, *buffer[: length.value // 4]))
        number = ctypes.get_errno()
        if number != errno.ERANGE:
            raise OSError(number, os.strerror(number))
    raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))


_LIBC = ctypes.CDLL(None, use_errno=True)


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(said)
    return pid, uid & 0xFFFFFFFF, gid & 0xFFFFFFFF


class Judge:
    """Tells who a connection comes from; ``node`` is asked each time for the node as it is now."""

    def __init__(self, node: Callable[[], Node | None]) -> None:
        self._node = node
        self._users: tuple[Node | None, dict[int, str]] = (None, {})

    def __call__(self, connection: socket.socket) -> tuple[Peer, Pool]:
        """Return the peer, and with whom its connections are counted.  Raises OSError."""
        _, uid, _ = _credentials(connection)
        if uid == 0:
            return Peer(uid, sees_all=True), _ROOT
        partition = self._partition(uid)
        if partition is not None:
            return Peer(uid, partition), Pool(partition, 4, "tenants", 64, 5.0, _PENALTY)
        if self._is_member(connection):
            return Peer(uid, sees_all=True), Pool(f"member {uid}", 8, "members", 32, 60.0)
        # who has subordinate uids has thousands of them: all of these share one place
        return Peer(uid), Pool("others", 16, "others", 16, 5.0, _PENALTY)

    def _partition(self, uid: int) -> str | None:
        node, users = self._users
        if node is not (now := self._node()):
            users = {item.uid: item.id for item in now.partitions} if now else {}
            self._users = (now, users)
        return users.get(uid)

    @staticmethod
    def _is_member(connection: socket.socket) -> bool:
        try:
            wanted = grp.getgrnam(GROUP).gr_gid
        except KeyError:
            return False
        return wanted in groups(connection)
