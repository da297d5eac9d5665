"""A master of a few lines: a real HTTP server on the loopback that gives each request to a function."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    fields: dict[str, str]
    headers: dict[str, str]
    peer: tuple[str, int]
    text: str


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for them

    def handle_error(self, request, client_address):
        """A client that goes away while it is served is what some tests are about."""


class Master:
    """``answer(handler)`` writes the answer; ``seen`` are the requests; ``closing`` ends slow answers."""

    def __init__(self, context=None):
        self.seen: list[Seen] = []
        self.closing = threading.Event()
        self.answer = reply(b"")
        master = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def setup(self):
                if context is not None:
                    self.request = context.wrap_socket(self.request, server_side=True)
                super().setup()

            def finish(self):
                super().finish()
                if context is not None:
                    self.request.close()

            def serve(self):
                parts = urlsplit(self.path)
                length = int(self.headers.get("Content-Length", "0"))
                text = parts.query or self.rfile.read(length).decode("utf-8")
                fields = dict(parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                master.seen.append(Seen(self.command, parts.path, fields, headers, self.client_address, text))
                master.answer(self)

            do_GET = do_POST = serve  # noqa: N815 - http.server looks for these names

            def log_message(self, format, *args):  # noqa: A002 - http.server's name
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        scheme = "http" if context is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def running(context=None):
    master = Master(context)
    try:
        yield master
    finally:
        master.close()


def reply(body, status=200, **headers):
    """An answer as a whole."""
    data = body.encode() if isinstance(body, str) else body

    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def raw(data):
    """Bytes on the wire in place of an answer, after which the connection is closed."""

    def answer(handler):
        handler.wfile.write(data)
        handler.close_connection = True

    return answer
