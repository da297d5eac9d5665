"""The control socket: HTTP and JSON on a Unix socket, for root.

Promises: the peer is known by the kernel (SO_PEERCRED), never by what it says; while the daemon runs, verbs that change the
node are done by it and not beside it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import select
import socket
import socketserver
import struct
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from partitiond.errors import FAMILY, PartitiondError
from partitiond.unix_http import UnixConnection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

_BODY_LIMIT = 64 * 1024


class Unknown(Exception):  # noqa: N818 - an answer, not an error: there is no such thing here
    """What is asked for is not there."""


@dataclass(frozen=True, slots=True)
class Text:
    """An answer that is no JSON."""

    content_type: str
    content: bytes


Answer = dict[str, Any] | Text


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64
    timeout = 0  # of handle_request, which is called when there is one

    def __init__(self, path: Path, handle: Callable[[str, str, dict[str, Any]], Answer]) -> None:
        self.handle = handle
        super().__init__(str(path), _Handler)
        self._wake, self._poke = os.pipe2(os.O_CLOEXEC)
        self._ended = threading.Event()

    def serve_forever(self, poll_interval: float = 0.5) -> None:  # noqa: ARG002 - signature of the base class
        """Answer until ``shutdown``; waits without looking at the clock: an idle daemon sleeps."""
        poll = select.poll()
        for descriptor in (self.fileno(), self._wake):
            poll.register(descriptor, select.POLLIN)
        try:
            while self._wake not in dict(poll.poll()):
                self.handle_request()
        finally:
            self._ended.set()

    def shutdown(self) -> None:
        """End ``serve_forever``, which runs in another thread, and wait for that."""
        os.write(self._poke, b"x")
        self._ended.wait()

    def server_close(self) -> None:
        """Close the sockets."""
        super().server_close()
        os.close(self._wake)
        os.close(self._poke)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - signature of the base class
        logger.debug("a client of the control socket went away")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 30

    def do_GET(self) -> None:
        """Answer a reader."""
        self._answer({})

    def do_POST(self) -> None:
        """Answer a verb that changes the node."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 <= length <= _BODY_LIMIT:
            self._send(413, {"code": "control.too_large", "message": f"at most {_BODY_LIMIT} bytes"})
            return
        try:
            body = json.loads(self.rfile.read(length) or b"{}")
        except ValueError:
            body = None
        if not isinstance(body, dict):
            self._send(400, {"code": "control.body", "message": "the body is no JSON object"})
            return
        self._answer(body)

    def _answer(self, body: dict[str, Any]) -> None:
        credentials = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", credentials)
        if uid != 0:
            self._send(403, {"code": "control.forbidden", "message": f"uid {uid} may not do this"})
            return
        try:
            answer = self.server.handle(self.command, self.path, body)
        except Unknown:
            self._send(404, {"code": "control.unknown", "message": f"there is no {self.path}"})
        except FAMILY as error:
            self._send(
                409,
                {"code": error.code, "message": str(error), "resource": error.resource, "hint": error.hint},
            )
        except OSError as error:
            said = {"code": "system", "message": error.strerror or str(error)}
            self._send(
                500, {**said, "resource": str(error.filename or ""), "hint": "look at the resource named"}
            )
        except Exception as error:
            # whoever asked must not take a mistake of ours for the end of the daemon
            logger.exception("%s %s: unexpected error", self.command, self.path)
            message = f"{type(error).__name__}: {error}"
            self._send(
                500, {"code": "internal", "message": message, "hint": "report it with the daemon's log"}
            )
        else:
            self._send(200, answer)

    def _send(self, status: int, value: Answer) -> None:
        if not isinstance(value, Text):
            value = Text("application/json", json.dumps(value).encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):
            self.send_response(status)
            self.send_header("Content-Type", value.content_type)
            self.send_header("Content-Length", str(len(value.content)))
            self.end_headers()
            self.wfile.write(value.content)

    def address_string(self) -> str:
        """A Unix socket has no address of its peer."""
        return "local"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - signature of the base class
        logger.debug(format, *args)


def serve(path: Path, handle: Callable[[str, str, dict[str, Any]], Answer]) -> _Server:
    """Make the socket (root only, 0600) and return the server; the caller runs ``serve_forever`` in a thread.

    ``handle`` is given method, path (with its query) and the JSON object of the body.
    """
    path.unlink(missing_ok=True)
    mask = os.umask(0o177)
    try:
        return _Server(path, handle)
    finally:
        os.umask(mask)


def call(path: Path, method: str, target: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Ask the daemon; None when none listens. Raises the daemon's own error as a PartitiondError."""
    connection = UnixConnection(str(path), None)  # a build may take hours
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
