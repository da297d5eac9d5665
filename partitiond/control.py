"""The control socket: HTTP and JSON on a Unix socket that everybody may open, each request judged by who the kernel says asks.

Promises: while the daemon runs, verbs that change the node are done by it and not beside it.  What each may do is in
:mod:`partitiond.api`, what keeps the socket usable beside hostile users in :mod:`partitiond.bounded_http`.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from typing import TYPE_CHECKING, Any

from partitiond.bounded_http import BoundedServer
from partitiond.errors import PartitiondError
from partitiond.peers import Peer
from partitiond.unix_http import UnixConnection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from partitiond.bounded_http import Answer, Pool


class _Server(BoundedServer[Peer]):
    address_family = socket.AF_UNIX


def serve(
    path: Path,
    answer: Callable[[str, str, dict[str, Any], Peer], Answer],
    judge: Callable[[socket.socket], tuple[Peer, Pool]],
) -> _Server:
    """Make the socket, which everybody may open (0666); the caller runs ``serve_forever`` of the server in a thread."""
    path.unlink(missing_ok=True)
    mask = os.umask(0o111)
    try:
        return _Server(str(path), judge, answer)
    finally:
        os.umask(mask)


def call(
    path: Path, method: str, target: str, body: dict[str, Any] | None = None, *, timeout: float | None = None
) -> dict[str, Any] | None:
    """Ask the daemon; None when none listens. Raises the daemon's own error as a PartitiondError.

    ``timeout`` in seconds; None to wait for ever: a build may take hours.
    """
    connection = UnixConnection(str(path), timeout)
    try:
        try:
            connection.request(method, target, None if body is None else json.dumps(body))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
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
    finally:
        connection.close()
    if response.status != 200 or not isinstance(answer, dict):
        raise PartitiondError(
            str(answer.get("code", "control.failed")),
            str(answer.get("message", "the daemon refused")),
            resource=str(answer.get("resource", "")),
            hint=str(answer.get("hint", "")),
        )
    return answer
