"""The sockets of the strict master: a port that may be closed and opened again, and that knows its connections."""

import contextlib
import socket
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for them
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A node that is killed while it is answered, or that trusts us not, is what tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60
    listener = None

    def setup(self):
        # here and not in accept(): who says nothing holds up nobody
        self.listener.enter(self.request)
        if self.listener.context is not None:
            self.request = self.listener.context.wrap_socket(self.request, server_side=True)
            self.listener.enter(self.request)
        super().setup()

    def finish(self):
        try:
            super().finish()
        finally:
            self.listener.leave(self.request)
            if self.listener.context is not None:
                self.request.close()

    def serve(self):
        parts = urlsplit(self.path)
        text = parts.query or self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            fields = dict(parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text)))
            self.listener.answer(self, self.command, parts.path.strip("/"), fields, headers)
        except OSError:
            raise
        except Exception:  # noqa: BLE001 - kept for the test, which fails by it
            self.listener.mistakes.append(f"a mistake in the test master: {traceback.format_exc()}")
            self.reply(500, b"", {})

    do_GET = do_POST = do_PUT = serve  # noqa: N815 - http.server looks for these names

    def reply(self, status, body, headers):
        """Answer as a whole."""
        self.send_response(status)
        for name, value in {"Content-Type": "text/plain; charset=utf-8", **headers}.items():
            self.send_header(name, value)
        if status != 304:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):  # noqa: A002 - http.server's name
        pass


class Listener:
    """``answer(handler, method, endpoint, fields, headers)`` answers; ``mistakes`` takes what went wrong in it."""

    def __init__(self, answer, context, mistakes):
        self.answer, self.context, self.mistakes = answer, context, mistakes
        self._live, self._lock = set(), threading.Lock()
        self._server = self._thread = None
        self._closed = False
        self._port = 0
        self.open()
        self.url = f"{'http' if context is None else 'https'}://127.0.0.1:{self._port}/"

    def open(self):
        """Listen, again at the same port."""
        self._closed = False
        handler = type("Handler", (_Handler,), {"listener": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def enter(self, connection):
        with self._lock:
            self._live.add(connection)
            closed = self._closed
        if closed:  # it was accepted while all others were ended
            connection.shutdown(socket.SHUT_RDWR)

    def leave(self, connection):
        with self._lock:
            self._live.discard(connection)

    def drop(self):
        """End all connections."""
        with self._lock:
            live = list(self._live)
        for connection in live:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        """Listen no more, end all connections, and wait for who serves them."""
        if self._server is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._server.socket.close()
        with self._lock:
            self._closed = True
        self.drop()
        self._server.server_close()
        self._server = None
