"""HTTP over a Unix socket: how our own control socket and supervisord are spoken to."""

from __future__ import annotations

import http.client
import socket
import struct


class UnixConnection(http.client.HTTPConnection):
    """A connection to the socket at ``path``; ``timeout`` in seconds, None to wait for ever."""

    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect. Raises OSError."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if self.timeout is not None:
            # a socket of Python's with a timeout does not block, and then a full queue is EAGAIN at once (connect(2))
            seconds, rest = divmod(self.timeout, 1)
            value = struct.pack("ll", int(seconds), int(rest * 1e6))
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
        self.sock.connect(self._path)
        self.sock.settimeout(self.timeout)
