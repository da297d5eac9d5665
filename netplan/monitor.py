"""Listening to the kernel: what of the network that concerns us changes, as it changes.

Promises: what is not read in time is not forgotten but reported as lost (:data:`netplan.relevance.LOST`), so that the
reader looks at everything; a change that was made before :meth:`Monitor.read` is called is among what it returns, since
the kernel queues its notices while it makes the change.

Groups: include/uapi/linux/rtnetlink.h (RTNLGRP_*), linux/netfilter/nfnetlink.h (NFNLGRP_NFTABLES); netlink(7).
"""

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Self

from netplan import rtnetlink
from netplan.errors import NetplanError
from netplan.model import PROTOCOL_MARK, Link
from netplan.netlink import (
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
    SOL_NETLINK,
    Message,
    NetlinkSocket,
    messages,
)
from netplan.relevance import LOST, Notice, Relevance, judge_nft
from netplan.rtnetlink import ROUTE_UNICAST, TABLE_MAIN

_ADD_MEMBERSHIP = 1
_SO_RCVBUFFORCE = 33
# links, IPv4 addresses, routes and rules, IPv6 addresses, routes and rules
_ROUTE_GROUPS = (1, 5, 7, 8, 9, 11, 19)
_NFT_GROUPS = (7,)
# A bound, taken only while notices wait: making 500 partitions yields some 10 000 of up to 4 KiB.
_QUEUE = 16 << 20
_BUFFER = 1 << 16
_NFT_SUBSYSTEM = 10


class Monitor:
    """The sockets that listen, in the network namespace of the thread that makes it.  Not thread safe; close it.

    ``names``: see :class:`netplan.relevance.Relevance`; may be set anew.  Raises ``network.netlink``.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._relevance = Relevance(names)
        self._lost = False
        with contextlib.ExitStack() as stack:
            self._route = stack.enter_context(_listener(NETLINK_ROUTE, _ROUTE_GROUPS))
            self._nft = stack.enter_context(_listener(NETLINK_NETFILTER, _NFT_GROUPS))
            # listening comes first: what changes in between is told once too often, not never
            self._begin()
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._stack.close()

    def filenos(self) -> tuple[int, int]:
        """The descriptors to poll for input."""
        return self._route.fileno(), self._nft.fileno()

    def attend(self, names: frozenset[str]) -> None:
        """Listen for other links from now on."""
        if self._relevance.attend(names):
            self._begin()

    def links(self) -> dict[str, Link]:
        """Return every link of the namespace by name, as the kernel has told of it until the last :meth:`read`."""
        return {link.name: link for link in self._relevance.links()}

    def read(self) -> list[Notice]:
        """Return what concerns us of all that was told since; never waits.  Raises ``network.netlink``."""
        found = []
        for sock, judge in ((self._route, self._relevance.judge), (self._nft, _judge_nft)):
            try:
                found += [notice for message in _waiting(sock) if (notice := judge(message))]
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise _broken(error) from error
                _discard(sock)
                self._lost = True
        if self._lost:
            self._begin()  # where that fails, it is still to be done
            self._lost = False
            found.append(LOST)
        return found

    def _begin(self) -> None:
        with NetlinkSocket(NETLINK_ROUTE) as sock:
            self._relevance.begin(
                rtnetlink.links(sock).values(),
                rtnetlink.addresses(sock),
                (
                    *rtnetlink.routes(sock, protocol=PROTOCOL_MARK),
                    *rtnetlink.routes(sock, family=socket.AF_INET, protocol=PROTOCOL_MARK),
                    *rtnetlink.routes(sock, table=TABLE_MAIN, kind=ROUTE_UNICAST),
                    *rtnetlink.routes(sock, family=socket.AF_INET, table=TABLE_MAIN, kind=ROUTE_UNICAST),
                ),
            )


def _listener(protocol: int, groups: tuple[int, ...]) -> socket.socket:
    try:
        sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol
        )
    except OSError as error:
        raise _broken(error) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE)
        sock.bind((0, 0))
        for group in groups:
            sock.setsockopt(SOL_NETLINK, _ADD_MEMBERSHIP, group)
    except OSError as error:
        sock.close()
        raise _broken(error) from error
    return sock


def _waiting(sock: socket.socket) -> Iterator[Message]:
    """Yield the messages that wait.  Raises OSError; ENOBUFS when some were lost."""
    while True:
        try:
            data = sock.recv(_BUFFER)
        except BlockingIOError:
            return
        yield from messages(data)


def _discard(sock: socket.socket) -> None:
    """Empty the queue of a socket that lost something: until then the kernel drops what comes without saying so again
    (net/netlink/af_netlink.c, netlink_overrun).
    """
    while True:
        try:
            sock.recv(_BUFFER)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise _broken(error) from error


def _judge_nft(message: Message) -> Notice | None:
    return judge_nft(message) if message.kind >> 8 == _NFT_SUBSYSTEM else None


def _broken(error: OSError) -> NetplanError:
    return NetplanError(
        "network.netlink",
        f"cannot listen to the kernel: {error.strerror}",
        hint="the kernel needs NETLINK_ROUTE and nf_tables; the daemon needs CAP_NET_ADMIN",
        retryable=True,
    )
