"""HTTP whose every answer ends in time: an adapter for requests with a deadline over headers and body.

The timeout of requests bounds one wait for bytes. A master, or something in front of it, that drips a byte
now and then would hold a lane of the daemon for days. Here each wait is cut to what is left of the call.
"""

import http.client
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket
from typing import Any, cast

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


class _Call(threading.local):
    """The call that this thread is in; http.client leaves no other way to hand something to a response."""

    ends_at: float | None = None


_call = _Call()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Let reads of this thread from a :class:`DeadlineAdapter` fail with TimeoutError after ``seconds``."""
    _call.ends_at = time.monotonic() + seconds
    try:
        yield
    finally:
        _call.ends_at = None


class _DeadlineReader(io.RawIOBase):
    """The raw stream of an answer; a read waits for the socket's own timeout or the deadline, if sooner."""

    def __init__(self, raw: io.RawIOBase, sock: socket) -> None:
        super().__init__()
        self._raw = raw
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:  # the buffer protocol has no name before Python 3.12
        if _call.ends_at is None:
            return cast("int | None", self._raw.readinto(buffer))
        left = _call.ends_at - time.monotonic()
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

    def __init__(self, sock: socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_DeadlineReader(self.fp.detach(), sock))


class _Connection(HTTPConnection):
    response_class = _DeadlineResponse


class _TLSConnection(HTTPSConnection):
    response_class = _DeadlineResponse


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


_POOLS = {"http": _Pool, "https": _TLSPool}


class DeadlineAdapter(HTTPAdapter):
    """The adapter of requests, without retries, with connections that keep to :func:`deadline`."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Make the pools that connect to the master itself."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        """Make the pools that connect by way of a proxy."""
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
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
