"""The control sockets: HTTP and JSON on a Unix socket that everybody may open, each request judged by who the kernel says asks.

There are two doors to it, as whoever connects again and again fills the queue of a socket, in which all wait alike: everybody's
``control.sock``, and beside it ``root.sock``, which root alone may open and which our own command line tries first.

Promises: while the daemon runs, verbs that change the node are done by it and not beside it.  What each may do is in
:mod:`partitiond.api`, what keeps the socket usable beside hostile users in :mod:`partitiond.bounded_http`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
from typing import TYPE_CHECKING, Any

from partitiond.bounded_http import BoundedServer
from partitiond.errors import PartitiondError
from partitiond.peers import Peer
from partitiond.unix_http import UnixConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from partitiond.bounded_http import Answer, Pool


class _Server(BoundedServer[Peer]):
    address_family = socket.AF_UNIX


def serve(
    path: Path,
    answer: Callable[[str, str, dict[str, Any], Peer], Answer],
    judge: Callable[[socket.socket], tuple[Peer, Pool]],
    *,
    mode: int = 0o666,
) -> _Server:
    """Make a socket, which everybody may open; the caller runs ``serve_forever`` of the server in a thread."""
    path.unlink(missing_ok=True)
    mask = os.umask(0o777 & ~mode)
    try:
        return _Server(str(path), judge, answer)
    finally:
        os.umask(mask)


@contextlib.contextmanager
def answering(
    path: Path,
    answer: Callable[[str, str, dict[str, Any], Peer], Answer],
    judge: Callable[[socket.socket], tuple[Peer, Pool]],
) -> Iterator[None]:
    """Answer at both doors until the end of the block."""
    with contextlib.ExitStack() as stack:
        for door, mode in ((roots_own(path), 0o600), (path, 0o666)):
            server = serve(door, answer, judge, mode=mode)
            stack.callback(door.unlink, missing_ok=True)
            stack.callback(server.server_close)
            threading.Thread(target=server.serve_forever, name=door.stem, daemon=True).start()
            stack.callback(server.shutdown)
        yield


def roots_own(path: Path) -> Path:
    """Return the path of root's door beside that of everybody."""
    return path.with_name("root.sock")


def call(
    path: Path, method: str, target: str, body: dict[str, Any] | None = None, *, timeout: float | None = None
) -> dict[str, Any] | None:
    """Ask the daemon; None when none listens. Raises the daemon's own error as a PartitiondError.

    ``timeout`` in seconds; None to wait for ever: a build may take hours.
    """
    try:
        connection = _connected(path, timeout)
        if connection is None:
            return None
        with contextlib.closing(connection):
            connection.request(method, target, None if body is None else json.dumps(body))
            response = connection.getresponse()
            answer = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PartitiondError(
            "control.lost",
            f"the daemon went away: {error}",
            resource=str(path),
            hint="look at its log, then try again",
            retryable=True,
        ) from error
    if response.status != 200 or not isinstance(answer, dict):
        raise PartitiondError(
            str(answer.get("code", "control.failed")),
            str(answer.get("message", "the daemon refused")),
            resource=str(answer.get("resource", "")),
            hint=str(answer.get("hint", "")),
        )
    return answer


def _connected(path: Path, timeout: float | None) -> UnixConnection | None:
    for door in (roots_own(path), path) if os.geteuid() == 0 else (path,):
        connection = UnixConnection(str(door), timeout)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            if not isinstance(error, FileNotFoundError | ConnectionRefusedError):
                raise
        else:
            return connection
    return None
