"""What stands between the node and its master: it counts the requests, and can answer in the master's place, badly."""

import contextlib
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from slap_client.marshal import dumps, loads

WISHES = "getFullComputerInformation"


@dataclass(frozen=True)
class Seen:
    method: str
    endpoint: str
    fields: dict[str, str]


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for them
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """A node that is killed while it is answered is what some tests are about."""


class Front:
    """Forwards to ``master`` unless ``answers`` has a function for the endpoint, or for "*"; ``seen`` are the requests."""

    def __init__(self, master, port):
        self.master, self.port = master, port
        self.url = f"http://127.0.0.1:{port}/"
        self.seen: list[Seen] = []
        self.answers = {}
        self.closing = threading.Event()
        self.held_up = 0
        self._counting = threading.Lock()
        self._server = self._thread = None
        self.open()

    def open(self):
        """Listen (again)."""
        front = self

        class Handler(BaseHTTPRequestHandler):
            # HTTP/1.0: each request has a connection of its own, so that a closed port is seen at once
            timeout = 30

            def serve(self):
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                fields = dict(parse_qsl(parts.query or body.decode()))
                endpoint = parts.path.strip("/")
                front.seen.append(Seen(self.command, endpoint, fields))
                answer = front.answers.get(endpoint) or front.answers.get("*") or front.forward
                answer(self, body)

            do_GET = do_POST = serve  # noqa: N815 - http.server looks for these names

            def log_message(self, format, *args):  # noqa: A002 - http.server's name
                pass

        self.closing.clear()
        self._server = _Server(("127.0.0.1", self.port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self):
        """Refuse connections, as a master that is down."""
        self.closing.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def forward(self, handler, body):
        status, content = self.ask(handler.command, handler.path.lstrip("/"), body, handler.headers)
        send(handler, status, content)

    def ask(self, method, path, body=b"", headers=None):
        """Ask the real master."""
        kept = {
            name: value
            for name, value in (headers or {}).items()
            if name in ("Content-Type", "Authorization")
        }
        request = urllib.request.Request(self.master + path, body or None, kept, method=method)  # noqa: S310 - the loopback
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - the loopback
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def wishes(self, computer):
        """The master's present answer about the computer, as bytes."""
        status, body = self.ask("GET", f"{WISHES}?computer_id={computer}")
        assert status == 200, body
        return body

    @contextlib.contextmanager
    def hanging(self):
        """Count who waits for the end of an answer."""
        with self._counting:
            self.held_up += 1
        try:
            yield
        finally:
            with self._counting:
                self.held_up -= 1

    def count(self, endpoint, since=0):
        return sum(1 for one in self.seen[since:] if one.endpoint == endpoint)


def send(handler, status, content):
    with contextlib.suppress(OSError):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


def always(content, status=200):
    """Answer with these bytes."""
    return lambda handler, _body: send(handler, status, content)


def drip(front):
    """Begin an answer and never end it: a byte now and then, until the front is closed or the answers change."""

    def answer(handler, _body):
        with front.hanging(), contextlib.suppress(OSError):
            handler.send_response(200)
            handler.send_header("Content-Length", "100000")
            handler.end_headers()
            while not front.closing.is_set() and front.answers.get("*") is answer:
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)

    return answer


# --- answers that are well-formed and wrong -----------------------------------------------------------------------------


def _computer(content, **attributes):
    computer = loads(content)
    return dumps(replace(computer, attributes={**computer.attributes, **attributes}))


def without_partitions(content):
    return _computer(content, _computer_partition_list=[])


def all_free(content):
    """Every partition listed as free, without a word that an instance is to be destroyed."""
    rows = loads(content).attributes["_computer_partition_list"]
    kept = {"_computer_id", "_partition_id", "_need_modification", "_instance_guid"}
    free = [
        replace(
            row,
            attributes={
                **{name: value for name, value in row.attributes.items() if name in kept},
                "_requested_state": "destroyed",
                "_software_release_document": None,
            },
        )
        for row in rows
    ]
    return _computer(content, _computer_partition_list=free)
