"""``/metrics`` by HTTP at ``metrics_listen``, for the operator's monitoring.

Partitions' users do not get there: the packet filter refuses them.  Where it is missing or was flushed, this is the second
wall: of a connection from this host the kernel is asked whose socket it is, and of one from elsewhere whether the address is a
partition's, which its guest has.  The subordinate uids of partitions' users (subuid(5)) are refused by this wall alone.

Promises: a port that is taken, or an address that the node does not have, is an open case and is tried again, and everything
else goes on; an edited configuration is followed.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from netplan import sock_diag
from netplan.errors import NetplanError
from partitiond import metrics
from partitiond.bounded_http import Answer, BoundedServer, Pool, Refusal, Text, Unknown
from partitiond.subordinate import SubordinateUids

if TYPE_CHECKING:
    from collections.abc import Callable

    from netplan.model import ClosedPort
    from netplan.sock_diag import Endpoint
    from partitiond.node import Node

logger = logging.getLogger(__name__)

_AGAIN = 10.0
_ROOT = "uid 0"
_REFUSED = Pool("refused", 2, "refused", 2, 1.0)


class _Caller(NamedTuple):
    """Whether who connected may be told."""

    allowed: bool


class _Server(BoundedServer[_Caller]):
    allow_reuse_address = True

    def __init__(self, where: ClosedPort, judge: Any, answer: Any) -> None:
        self.address_family = socket.AF_INET if where.address.version == 4 else socket.AF_INET6
        super().__init__((str(where.address), where.port), judge, answer)

    def server_bind(self) -> None:
        """Bind, to one family alone: the rule of the packet filter is of that family, too."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()


class Judge:
    """Tells who may be told: not the users of partitions, nor that which builds what tenants ask for, nor guests."""

    def __init__(
        self,
        node: Callable[[], Node | None],
        software: Callable[[], tuple[str, int] | None],
        subordinate: SubordinateUids | None = None,
    ) -> None:
        self._node, self._software = node, software
        self._subordinate = subordinate or SubordinateUids()

    def __call__(self, connection: socket.socket) -> tuple[_Caller, Pool]:
        """Return whether to answer, and with whom the connection is counted.  Raises OSError: it is gone."""
        caller, own = (_endpoint(name) for name in (connection.getpeername(), connection.getsockname()))
        try:
            found = [one for one in sock_diag.sessions([caller])[caller] if one.remote == own]
        except NetplanError as error:
            logger.warning("metrics: whose connection it is cannot be told, so it is refused: %s", error)
            return _Caller(False), _REFUSED
        if not found:
            # it came from another host, or a guest; of this host, a socket that nobody has any more
            if caller[0].is_loopback or _is_a_partitions(self._node(), caller[0]):
                return _Caller(False), _REFUSED
            return _Caller(True), Pool(str(caller[0]), 8, "all", 16, 10.0)
        # a closed socket has no inode, and is root's to sock_diag (net/core/sock.c, sock_i_uid)
        if not all(one.inode and self._is_told(one.uid) for one in found):
            return _Caller(False), _REFUSED
        name = f"uid {found[0].uid}"
        return _Caller(True), Pool(name, 8, name if name == _ROOT else "users", 16, 10.0)

    def _is_told(self, uid: int) -> bool:
        node = self._node()
        users = {item.user: item.uid for item in node.partitions} if node else {}
        users |= dict(filter(None, (self._software(),)))
        return uid not in users.values() and self._subordinate.owner(uid, users) is None


def _endpoint(name: Any) -> Endpoint:
    return ipaddress.ip_address(name[0].partition("%")[0]), name[1]


def _is_a_partitions(node: Node | None, address: sock_diag.IPAddress) -> bool:
    for item in node.partitions if node else ():
        network = item.network
        own = (item.ipv4, *network.reached_ipv4, *(one.ip for one in network.reached_ipv6))
        guests = network.tap.guard.own if network.tap and network.tap.guard else ()
        tap = network.tap
        routed = (tap.ipv6.network if tap and tap.ipv6 else None, network.ipv6_range, *guests)
        if address in own or (tap and address == tap.ipv4):
            return True
        if any(address in one for one in routed if one is not None):
            return True
    return False


class MetricsListener(threading.Thread):
    """Listens where it is told to.  ``trouble`` says why it does not, or is empty."""

    def __init__(self, text: Callable[[], bytes], judge: Judge) -> None:
        super().__init__(name="metrics", daemon=True)
        self._text, self._judge = text, judge
        self._changed = threading.Condition()
        self._wanted: ClosedPort | None = None
        self._server: _Server | None = None
        self._ended = False
        self.trouble = ""

    def attend(self, wanted: ClosedPort | None) -> None:
        """Listen there from now on; None: nowhere."""
        with self._changed:
            if wanted != self._wanted:
                self._wanted = wanted
                self._interrupt()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._ended = True
            self._interrupt()
        if self.is_alive():
            self.join()

    def _interrupt(self) -> None:
        if self._server is not None:
            self._server.stop()
        self._changed.notify()

    def run(self) -> None:
        """Until it is closed."""
        while True:
            with self._changed:
                if self._ended:
                    return
                wanted = self._wanted
                self._server = self._open(wanted)
                if self._server is None:
                    self._changed.wait(None if wanted is None else _AGAIN)
                    continue
            try:
                self._server.serve_forever()
            finally:
                with self._changed:
                    server, self._server = self._server, None
                server.server_close()

    def _open(self, wanted: ClosedPort | None) -> _Server | None:
        if wanted is None:
            self.trouble = ""
            return None
        where = f"[{wanted.address}]" if wanted.address.version == 6 else str(wanted.address)
        try:
            server = _Server(wanted, self._judge, self._answer)
        except OSError as error:
            reason = error.strerror or str(error)
            trouble = f"metrics_listen: nothing listens at {where}:{wanted.port}: {reason}"
            if trouble != self.trouble:
                logger.warning("[metrics.listen] %s; tried again every %.0f s", trouble, _AGAIN)
            self.trouble = trouble
            return None
        if self.trouble:
            logger.info("metrics_listen: %s:%d is served", where, wanted.port)
        self.trouble = ""
        return server

    def _answer(self, method: str, path: str, _body: dict[str, Any], caller: _Caller) -> Answer:
        if not caller.allowed:
            raise Refusal(403, "metrics.forbidden", "partitions are told at the control socket alone")
        if method != "GET":
            raise Refusal(405, "metrics.method", "there is GET alone")
        if path.partition("?")[0] != "/metrics":
            raise Unknown
        return Text(metrics.CONTENT_TYPE, self._text())
