"""What the demonstration's tenants do on the network; run as a partition's user.

``python -I -m partitiond.demo.traffic VERB …``: exits 0 when every byte was right, or, for ``refused…``, when the kernel
refused; the last line says what happened.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import ssl
import sys
import time
import urllib.request
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_TIMEOUT = 10.0
_ITEM = 900_000  # below memcached's limit of 1 MiB an item
_REFUSALS = (errno.ECONNREFUSED, errno.EPERM, errno.EACCES, errno.ECONNRESET)


def memcached(host: str, port: str, items: str, pause: str) -> str:
    """Set and get items of 900 kB and compare every byte."""
    count = int(items)
    total = 0
    with (
        socket.create_connection((host, int(port)), _TIMEOUT) as connection,
        connection.makefile("rwb") as stream,
    ):
        for index in range(count):
            value = os.urandom(_ITEM)
            stream.write(f"set demo{index} 0 0 {len(value)}\r\n".encode() + value + b"\r\n")
            stream.flush()
            if (answer := stream.readline()) != b"STORED\r\n":
                raise ValueError(f"set was answered {answer!r}")
            stream.write(f"get demo{index}\r\n".encode())
            stream.flush()
            head = stream.readline().split()
            back = stream.read(int(head[3]))
            if (stream.readline(), stream.readline()) != (b"\r\n", b"END\r\n") or back != value:
                raise ValueError("get gave other bytes than were set")
            total += len(value)
            time.sleep(float(pause))
    return f"{count} values set and read back, {total} bytes each way, every byte equal"


def echo(source: str, host: str, port: str, size: str) -> str:
    """Send bytes from an own address to an echo server and compare."""
    data = os.urandom(int(size))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT)
        connection.bind((source, 0))
        connection.connect((host, int(port)))
        back = b""
        for start in range(0, len(data), 16384):
            connection.sendall(data[start : start + 16384])
            while len(back) < min(start + 16384, len(data)):
                piece = connection.recv(65536)
                if not piece:
                    raise ValueError("the other side closed early")
                back += piece
    if hashlib.sha256(back).digest() != hashlib.sha256(data).digest():
        raise ValueError("other bytes came back")
    return f"{len(data)} bytes there and back, every byte equal"


def refused_connect(host: str, port: str) -> str:
    """Try to reach somebody else's private service."""
    return _refused(None, host, port)


def refused_source(source: str, host: str, port: str) -> str:
    """Try to speak to the world from somebody else's address."""
    return _refused(source, host, port)


def refused_tls(host: str, port: str) -> str:
    """Try to speak TLS to somebody else's tunnel without a certificate that it knows."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, int(port)), _TIMEOUT) as plain,
            context.wrap_socket(plain) as connection,
        ):
            # the server's verdict comes after its own half of the handshake (RFC 8446, 4.4.2.4)
            connection.sendall(b"version\r\n")
            if said := connection.recv(1):
                raise ValueError(f"was let in: {said!r}")
    except ssl.SSLError as error:
        return f"refused: {error.reason}"
    except ConnectionResetError as error:
        return f"refused: {error.strerror}"
    return "refused: the connection was closed"


def page(url: str) -> str:
    """Get a page by HTTP."""
    with urllib.request.urlopen(url, timeout=2 * _TIMEOUT) as answer:  # noqa: S310 - the demonstration's own
        return str(answer.read().decode())


def _refused(source: str | None, host: str, port: str) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    start = time.monotonic()
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT)
        try:
            if source is not None:
                connection.bind((source, 0))
            connection.connect((host, int(port)))
        except OSError as error:
            if error.errno in _REFUSALS:
                return f"refused after {1000 * (time.monotonic() - start):.1f} ms: {error.strerror}"
            raise
    raise ValueError("was not refused")


_VERBS: dict[str, Callable[..., str]] = {
    "memcached": memcached,
    "echo": echo,
    "refused-connect": refused_connect,
    "refused-source": refused_source,
    "refused-tls": refused_tls,
    "page": page,
}


def main(arguments: list[str]) -> int:
    """Run one verb."""
    try:
        said = _VERBS[arguments[0]](*arguments[1:])
    except (OSError, ValueError, IndexError) as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\n")
        return 1
    sys.stdout.write(f"{said}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
