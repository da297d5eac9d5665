"""HTTP servers that withstand those they answer: who may speak is decided before a thread is made, and for how long.

Promises: one request a connection; connections are counted by whom they come from, so nobody takes the place of another, and
nobody that of root; who is slow to ask or to listen is cut off at a fixed time, however busy it looks meanwhile; a server that
has nothing to do sleeps.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import select
import socket
import socketserver
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from partitiond.errors import FAMILY, WrongUseError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

BODY_LIMIT = 64 * 1024
_REQUEST_LIMIT = BODY_LIMIT + 16 * 1024
Peer = TypeVar("Peer")
_REFUSED_PAUSE = 0.001
_PAUSE = 0.05  # where the process has no descriptors left, accepting again at once would be a busy loop


class Unknown(Exception):  # noqa: N818 - an answer, not an error: there is no such thing here
    """What is asked for is not there."""


class Refusal(Exception):  # noqa: N818 - likewise
    """An answer with a status of its own."""

    def __init__(self, status: int, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.said = {"code": code, "message": message, "hint": hint}


@dataclass(frozen=True, slots=True)
class Text:
    """An answer that is no JSON."""

    content_type: str
    content: bytes


Answer = dict[str, Any] | Text


class Pool(NamedTuple):
    """Whose connections are counted together: by ``name``, of which there may be ``most``, and by ``group``, of which there
    may be ``together``; and the seconds that a request, and listening to the answer, may take.  ``penalty`` are the seconds for
    which the place stays taken of who asked for nothing, or too often.
    """

    name: str
    most: int
    group: str
    together: int
    seconds: float
    penalty: float = 0.0


class Doors:
    """Counts who is inside."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._inside: Counter[str] = Counter()

    def enter(self, pool: Pool) -> bool:
        """Count one more, unless there are as many as there may be."""
        with self._turn:
            if (
                self._inside[f"name {pool.name}"] >= pool.most
                or self._inside[f"group {pool.group}"] >= pool.together
            ):
                return False
            self._inside.update((f"name {pool.name}", f"group {pool.group}"))
            return True

    def leave(self, pool: Pool) -> None:
        """Count one less."""
        with self._turn:
            for key in (f"name {pool.name}", f"group {pool.group}"):
                self._inside[key] -= 1
                if not self._inside[key]:
                    del self._inside[key]


class BoundedServer(socketserver.ThreadingMixIn, socketserver.TCPServer, Generic[Peer]):
    """A server that asks ``judge`` who a connection comes from, and which pool that belongs to, before it gives it a thread.

    ``judge`` may raise OSError: then the connection is closed.  ``answer`` is given method, path (with its query), the JSON
    object of the body, and the peer.
    """

    daemon_threads = True
    request_queue_size = 1024
    timeout: float = 0  # of handle_request, which is called when there is one

    def __init__(
        self,
        address: Any,
        judge: Callable[[socket.socket], tuple[Peer, Pool]],
        answer: Callable[[str, str, dict[str, Any], Peer], Answer],
    ) -> None:
        self.answer = answer
        self._judge = judge
        self._doors = Doors()
        self._known: dict[int, tuple[Peer, Pool]] = {}
        self._idle: set[int] = set()
        self._wake, self._poke = os.pipe2(os.O_CLOEXEC)
        self._ended = threading.Event()
        super().__init__(address, BoundedHandler)  # calls server_close() where it cannot bind

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

    def stop(self) -> None:
        """End ``serve_forever`` soon, which may not have begun yet."""
        os.write(self._poke, b"x")

    def shutdown(self) -> None:
        """End ``serve_forever``, which runs in another thread, and wait for that."""
        self.stop()
        self._ended.wait()

    def server_close(self) -> None:
        """Close the sockets."""
        super().server_close()
        os.close(self._wake)
        os.close(self._poke)

    def get_request(self) -> tuple[Any, Any]:
        """Accept one."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_PAUSE)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002 - signature of the base class
        """Whether this one may speak; who may not is told so, if it listens."""
        try:
            peer, pool = self._judge(request)
        except OSError:
            return False
        if not self._doors.enter(pool):
            # else who connects again and again would keep a processor busy
            time.sleep(_REFUSED_PAUSE)
            with contextlib.suppress(OSError):
                request.send(_BUSY, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                # who closes with something unread resets the connection, and the answer may be lost with it
                request.recv(_REQUEST_LIMIT, socket.MSG_DONTWAIT)
            return False
        self._known[id(request)] = (peer, pool)
        return True

    def known(self, request: object) -> tuple[Peer, Pool]:
        """Who a connection that may speak comes from."""
        return self._known[id(request)]

    def in_vain(self, request: object) -> None:
        """Note that a connection asked for nothing, or too often: its place stays taken for a moment."""
        self._idle.add(id(request))

    def shutdown_request(self, request: Any) -> None:
        """End a connection; called once for each, whatever became of it."""
        known, in_vain = self._known.pop(id(request), None), id(request) in self._idle
        self._idle.discard(id(request))
        try:
            super().shutdown_request(request)
        finally:
            if known is not None:
                if in_vain:
                    time.sleep(known[1].penalty)
                self._doors.leave(known[1])

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - signature of the base class
        """Whoever goes away in the middle is no trouble of ours."""
        logger.debug("a client went away")


_SAID = b'{"code": "control.busy", "message": "too many connections at once"}\n'
_BUSY = (
    b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_SAID), _SAID)
)


class _Incoming(io.RawIOBase):
    """What a peer says, until a time, and up to a size."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + seconds
        self._left = _REQUEST_LIMIT

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some.  Raises TimeoutError."""
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self._connection.settimeout(seconds)
        length = self._connection.recv_into(buffer, min(len(buffer), self._left)) if self._left else 0
        self._left -= length
        return length


class BoundedHandler(BaseHTTPRequestHandler):
    """Reads one request and sends the answer."""

    server: BoundedServer[Any]
    server_version, sys_version = "partitiond", ""

    def setup(self) -> None:
        """Listen to the peer for so long, and no longer."""
        super().setup()
        self._peer, self._pool = self.server.known(self.request)
        self._in_vain = True
        self.rfile = io.BufferedReader(_Incoming(self.connection, self._pool.seconds))

    def finish(self) -> None:
        """End it."""
        if self._in_vain:
            self.server.in_vain(self.request)
        super().finish()

    def do_GET(self) -> None:
        """Answer a reader."""
        self._answer({})

    def do_POST(self) -> None:
        """Answer a verb that changes the node."""
        said = self.headers.get("Content-Length") or "0"
        length = int(said) if said.isascii() and said.isdigit() and len(said) < 10 else -1
        if not 0 <= length <= BODY_LIMIT:
            self._send(413, {"code": "control.too_large", "message": f"at most {BODY_LIMIT} bytes"})
            return
        try:
            body = json.loads(self.rfile.read(length) or b"{}")
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self._send(400, {"code": "control.body", "message": "the body is no JSON object"})
            return
        self._answer(body)

    def _answer(self, body: dict[str, Any]) -> None:
        try:
            answer = self.server.answer(self.command, self.path, body, self._peer)
        except Unknown:
            self._send(404, {"code": "control.unknown", "message": f"there is no {self.path}"})
        except Refusal as refusal:
            more = {"Retry-After": "1"} if refusal.status == 429 else {}
            self._send(refusal.status, refusal.said, more)
        except FAMILY as error:
            said = {"code": error.code, "message": str(error), "resource": error.resource, "hint": error.hint}
            self._send(400 if isinstance(error, WrongUseError) else 409, said)
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

    def _send(self, status: int, value: Answer, more: Mapping[str, str] | None = None) -> None:
        if not isinstance(value, Text):
            value = Text("application/json", json.dumps(value).encode() + b"\n")
        self._in_vain = status == 429
        self.connection.settimeout(self._pool.seconds)  # of sendall(), for all of it
        with contextlib.suppress(BrokenPipeError):
            self.send_response(status)
            self.send_header("Content-Type", value.content_type)
            self.send_header("Content-Length", str(len(value.content)))
            for name, text in (more or {}).items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(value.content)

    def address_string(self) -> str:
        """Who asks is known by its pool; a Unix socket has no address of its peer."""
        return self._pool.name

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - signature of the base class
        """Not in the daemon's log, which is no log of requests."""
        logger.debug(format, *args)
