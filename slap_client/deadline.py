"""HTTP whose every answer ends in time, and from whom it should: an adapter for requests.

The timeout of requests bounds one wait for bytes. A master, or something in front of it, that drips a byte
now and then would hold a lane of the daemon for days. Here each wait is cut to what is left of the call.

Where a certificate is pinned, nothing is sent to whoever has another. Of a call that failed, it is known whether it
went over a connection that had served before, and whether a single byte came back.
"""

import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.ssl_ import create_urllib3_context, resolve_cert_reqs

from slap_client.trust import UnpinnedError, fingerprint


class _Call(threading.local):
    """The call that this thread is in; http.client leaves no other way to hand something to a response."""

    ends_at: float | None = None
    reused = False
    answered = False


_call = _Call()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Let reads of this thread from a :class:`DeadlineAdapter` fail with TimeoutError after ``seconds``."""
    _call.ends_at, _call.reused, _call.answered = time.monotonic() + seconds, False, False
    try:
        yield
    finally:
        _call.ends_at = None


def went_stale() -> bool:
    """Whether this thread's last call went over a kept connection on which then nothing came back.

    The other side may have closed it while we wrote. It may as well have read the request and died.
    """
    return _call.reused and not _call.answered


def stayed_silent() -> bool:
    """Whether not a byte came back in this thread's last call."""
    return not _call.answered


class _DeadlineReader(io.RawIOBase):
    """The raw stream of an answer; a read waits for the socket's own timeout or the deadline, if sooner."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        super().__init__()
        self._raw = raw
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:  # the buffer protocol has no name before Python 3.12
        if _call.ends_at is None:
            return cast("int | None", self._raw.readinto(buffer))
        count = self._read_in_time(buffer, _call.ends_at)
        _call.answered = _call.answered or bool(count)
        return count

    def _read_in_time(self, buffer: Any, ends_at: float) -> int | None:
        left = ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer did not end in time")
        usual = self._sock.gettimeout()
        self._sock.settimeout(left if usual is None else min(usual, left))
        try:
            return cast("int | None", self._raw.readinto(buffer))
        finally:
            # The connection may serve the next call, which has a deadline of its own.
            self._sock.settimeout(usual)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _DeadlineResponse(http.client.HTTPResponse):
    """http.client's response, which reads from ``fp`` only."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_DeadlineReader(self.fp.detach(), sock))


class _Reuse:
    """Tells the call whether its connection is one that has served before."""

    _served = False

    def connect(self) -> None:
        self._served = _call.reused = False
        super().connect()  # type: ignore[misc]  # of the connection that this is mixed into

    def request(self, *args: Any, **kwargs: Any) -> None:
        # one that was closed meanwhile has no socket, and connects again in here
        _call.reused = self._served and getattr(self, "sock", None) is not None
        super().request(*args, **kwargs)  # type: ignore[misc]
        self._served = True


class _Connection(_Reuse, HTTPConnection):
    response_class = _DeadlineResponse


class TLSConnection(_Reuse, HTTPSConnection):
    """A connection that, with a ``pin``, goes by the certificate's fingerprint alone."""

    response_class = _DeadlineResponse
    pin = ""

    def connect(self) -> None:
        """Connect; raise UnpinnedError before anything of HTTP is sent."""
        self.ssl_context = _lenient(self.cert_reqs)
        super().connect()
        if not self.pin:
            return
        der = cast("ssl.SSLSocket", self.sock).getpeercert(binary_form=True) or b""
        if fingerprint(der) != self.pin:
            self.close()
            raise UnpinnedError(der)
        self.is_verified = True  # else urllib3 warns of a server that nobody knows


def _lenient(cert_reqs: int | str | None) -> ssl.SSLContext:
    """Make what one connection verifies the server by: the chain and the name, and not each word of RFC 5280.

    From Python 3.13 on urllib3 sets X509_V_FLAG_X509_STRICT, too (as ssl.create_default_context does). It refuses chains whose
    certificates do not name the key that signed them, and those are what ``openssl x509 -req`` and most authorities that
    operators made themselves have issued for decades: an upgrade to Debian 13 would cut a node off from its master. Each
    connection has its own, as urllib3 puts authorities and our pair into it.
    """
    context = create_urllib3_context(cert_reqs=resolve_cert_reqs(cert_reqs))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _pools(pin: str) -> dict[str, type[HTTPConnectionPool]]:
    connection = type("_PinnedConnection", (TLSConnection,), {"pin": pin})

    class Pool(HTTPConnectionPool):
        ConnectionCls = _Connection

    class TLSPool(HTTPSConnectionPool):
        ConnectionCls = connection

    return {"http": Pool, "https": TLSPool}


# A NAT or firewall on the way may forget a connection without a word: the kernel finds out, not the next call.
_OPTIONS = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 45),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


class DeadlineAdapter(HTTPAdapter):
    """The adapter of requests, without retries, with connections that keep to :func:`deadline` and to a pin.

    One connection is kept; calls at the same time open others, which end with the call.
    """

    def __init__(self, pin: str = "") -> None:
        self._pools = _pools(pin)
        super().__init__(pool_maxsize=1)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Make the pools that connect to the master itself."""
        super().init_poolmanager(*args, socket_options=_OPTIONS, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        """Make the pools that connect by way of a proxy."""
        manager = super().proxy_manager_for(*args, socket_options=_OPTIONS, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def close(self) -> None:
        """Close all connections now.

        urllib3 2 leaves it to the garbage collector, and an error that somebody keeps may keep a pool alive.
        """
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for pool in map(manager.pools.get, manager.pools.keys()):
                if pool is not None:  # another thread may have pushed it out meanwhile
                    pool.close()
        super().close()
