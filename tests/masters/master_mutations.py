"""Damaged answers of a master: from a good one, seeded, by kind; and a server of a few lines that gives them.

A mutation is the bytes that follow a request on the wire. None of them is another good answer: what the network or a broken
master can do to a document, not what a master could mean.
"""

import random
import re
import socket
import threading
from dataclasses import dataclass

_SCALAR = re.compile(r"<(string|int)>[^<]*</\1>|<none/>|<string/>")
_ENTRY = re.compile(r'<object id="i\d+" module="[^"]*" class="(?:ComputerPartition|SoftwareRelease)">')
_HUGE = 200_000


@dataclass(frozen=True)
class Mutation:
    kind: str
    wire: bytes
    close: bool = False  # end the connection after it


def whole(body, status="200 OK", headers=""):
    """An answer whose HTTP is fine."""
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Mutator:
    """``make(kind)`` gives the next mutation of a kind; the same ones for the same seed."""

    def __init__(self, good, seed):
        self._good, self._text = good, good.decode()
        self._dice = random.Random(seed)  # noqa: S311 - the same each time
        self._spans = [match.span() for match in _SCALAR.finditer(self._text)]
        self._entries = [match.start() for match in _ENTRY.finditer(self._text)]

    def make(self, kind):
        made = getattr(self, f"_{kind}")()
        return made if isinstance(made, Mutation) else Mutation(kind, whole(made))

    def _replace(self, text):
        begin, end = self._dice.choice(self._spans)
        return (self._text[:begin] + text + self._text[end:]).encode()

    def _insert(self, text):
        begin, _ = self._dice.choice(self._spans)
        return (self._text[:begin] + text + self._text[begin:]).encode()

    # --- the document

    def _truncated(self):
        body = self._good[: self._dice.randrange(len(self._good))]
        if self._dice.random() < 0.7:
            return body
        return Mutation(
            "truncated", whole(self._good)[: -self._dice.randrange(1, len(self._good))], close=True
        )

    def _nested(self):
        depth = self._dice.choice((65, 100, 1000, 5000, 20_000))
        tag = self._dice.choice(("list", "tuple"))
        return self._replace(f"<{tag}>" * depth + "<none/>" + f"</{tag}>" * depth)

    def _bombs(self):
        count = self._dice.randrange(25, 60)
        levels = "".join(
            f'<list id="b{n + 1}"><reference id="b{n}"/><reference id="b{n}"/></list>' for n in range(count)
        )
        entities = "".join(f'<!ENTITY e{n + 1} "&e{n};&e{n};&e{n};&e{n};">' for n in range(20))
        bombs = (
            lambda: self._replace(f'<tuple><list id="b0"/>{levels}</tuple>'),
            f'<!DOCTYPE m [<!ENTITY e0 "ha">{entities}]><marshal><string>&e20;</string></marshal>'.encode,
            lambda: b'<!DOCTYPE m SYSTEM "file:///etc/passwd"><marshal><none/></marshal>',
            lambda: (
                b'<!DOCTYPE m [<!ENTITY x SYSTEM "file:///etc/passwd">]><marshal><string>&x;</string></marshal>'
            ),
            lambda: self._replace(f"<int>{'9' * _HUGE}</int>"),
            lambda: self._replace(f"<float>{'9' * _HUGE}.0</float>"),
            lambda: self._replace(f"<x{'y' * _HUGE}/>"),
            lambda: self._replace(
                f'<list id="{"z" * 100}" {" ".join(f"a{n}=" + chr(34) * 2 for n in range(3000))}/>'
            ),
            lambda: self._replace('<list id="r"><reference id="r"/></list>'),
            lambda: self._replace('<reference id="nobody"/>'),
            lambda: self._insert(f"<!--{'-' * 2}{'c' * _HUGE}-->"),
            f"<marshal>{'<' * _HUGE}</marshal>".encode,
        )
        return self._dice.choice(bombs)()

    def _wrong_types(self):
        wrong = (
            "<list/>",
            "<dictionary/>",
            "<tuple/>",
            "<bool>1</bool>",
            "<float>1.5</float>",
            "<tuple><none/></tuple>",
        )
        more = (
            "<set/>",
            "<string><int>1</int></string>",
            "<bool>yes</bool>",
            "<int>one</int>",
            "<int/>",
            "<none>x</none>",
        )
        odd = ("<float>nan</float>", "<float>inf</float>", "<complex>1j</complex>", "<code/>", "text between")
        return self._replace(self._dice.choice((*wrong, *more, *odd)))

    def _duplicates(self):
        begin, end = self._dice.choice(self._spans)
        start = self._dice.choice(self._entries)
        entry = self._object_at(start)
        again = re.sub(r' id="i\d+"', "", entry)
        choices = (
            lambda: self._text[:start] + again + self._text[start:],
            lambda: self._text[:start] + entry + self._text[start:],
            lambda: self._text * 2,
            lambda: self._text.replace("</marshal>", "<none/></marshal>"),
            lambda: self._text[:end] + self._text[begin:end] + self._text[end:],
            lambda: self._text.replace('id="i3"', 'id="i2"'),
        )
        return self._dice.choice(choices)().encode()

    def _object_at(self, start):
        depth, at = 0, start
        for match in re.compile(r"<object |</object>").finditer(self._text, start):
            depth += 1 if match[0] == "<object " else -1
            at = match.end()
            if depth == 0:
                break
        return self._text[start:at]

    def _foreign(self):
        swaps = (
            ('class="Computer"', 'class="OpenOrder"'), ('module="slapos.slap.slap"', 'module="os"'),
            ('class="ComputerPartition"', 'class="SoftwareRelease"'), ('class="SoftwareRelease"', 'class="Supply"'),
            ("COMP-1", "COMP-2"), ("<marshal>", "<html>"), ("slappart0", "../../etc"), ("slappart1", "slappart\u202e1"),
            ("started", "Started"), ("stopped", "running"), ("_computer_partition_list", "_partitions"),
            ("_requested_state", "_state"), ("software.cfg", "soft ware.cfg"), ("software.cfg", "${buildout:x}"),
            ("slappart", "p" * 70), ("<marshal>", "<?xml version='1.0' encoding='utf-16'?><marshal>"),
        )  # fmt: skip
        old, new = self._dice.choice(swaps)
        assert old in self._text
        where = self._dice.choice([match.start() for match in re.finditer(re.escape(old), self._text)])
        if old in ("started", "COMP-1", "slappart0", "_requested_state", "software.cfg", "slappart"):
            return self._text.replace(old, new).encode()  # in one place of several it may say nothing
        return (self._text[:where] + new + self._text[where + len(old) :]).encode()

    def _noise(self):
        body = bytearray(self._good)
        for _ in range(self._dice.choice((1, 2, 8, 64))):
            body[self._dice.randrange(len(body))] = self._dice.randrange(256)
        return bytes(body)

    # --- HTTP

    def _redirects(self):
        status = self._dice.choice((300, 301, 302, 303, 305, 307, 308))
        where = self._dice.choice(
            ("http://127.0.0.1:1/", "file:///etc/passwd", "/", "//", "\x7f", "x" * 5000, "")
        )
        return Mutation("redirects", whole(self._good, f"{status} Elsewhere", f"Location: {where}\r\n"))

    def _statuses(self):
        status = self._dice.choice(
            (204, 206, 304, 400, 401, 403, 404, 408, 410, 418, 429, 451, 500, 502, 503, 504, 599)
        )
        body = b"" if status in (204, 304) else self._good if status >= 400 else self._good[:-9]
        wait = self._dice.choice(
            ("", "Retry-After: 99999999999\r\n", "Retry-After: -1\r\n", "Retry-After: x\r\n")
        )
        if status in (204, 304):
            return Mutation("statuses", f"HTTP/1.1 {status} X\r\n{wait}\r\n".encode())
        return Mutation("statuses", whole(body, f"{status} X", wait))

    def _protocol(self):
        good = self._good
        wires = (
            b"", b"\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/9.9 200 OK\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9x9\r\n\r\n" + good[:-5],
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n" + good,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + good,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n<mars",
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\n\x1f\x8b\x08ab",
            b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n" + good,
            b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n" + good,
            b"HTTP/1.1 200 " + b"O" * 70_000 + b"\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 5,
            b"HTTP/1.1 200 OK\r\n\x00\xff: \x01\r\n\r\n",
            bytes(self._dice.randrange(256) for _ in range(200)),
        )  # fmt: skip
        return Mutation("protocol", self._dice.choice(wires), close=True)


def _drip(connection, over):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while not over.wait(0.02):
        connection.sendall(b"<")


def endless(size):
    """An answer of so many bytes, never in memory as a whole here."""
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n<marshal>".encode()

    def answer(connection, _over):
        connection.sendall(head)
        part = b"<string>0123456789</string>" * 40_000
        for _ in range(size // len(part) + 1):
            connection.sendall(part)

    return answer


class Server:
    """Gives ``answer`` to each GET: a Mutation, or a function of the connection and an event that ends it. A POST gets None."""

    SLOW = staticmethod(_drip)

    def __init__(self, context=None):
        self.answer = Mutation("", b"")
        self.context = context
        self.gets = self.posts = 0
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}/"
        self._threads, self._live = [], set()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self):
        while True:
            connection, _ = self._listener.accept()
            if self._over.is_set():
                connection.close()
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            self._live.add(connection)
            thread.start()

    def _serve(self, plain):
        connection = plain
        try:
            if self.context is not None:
                connection = self.context.wrap_socket(plain, server_side=True)
                self._live.add(connection)
            while self._one(connection):
                pass
        except OSError:
            pass  # a client that went away, or trusts us not
        finally:
            self._live.discard(plain)
            self._live.discard(connection)
            connection.close()
            plain.close()

    def _one(self, connection):
        head = b""
        while b"\r\n\r\n" not in head:
            more = connection.recv(65536)
            if not more:
                return False
            head += more
        if head.startswith(b"POST"):
            self.posts += 1
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nNone")
            return False
        self.gets += 1
        answer = self.answer
        if callable(answer):
            answer(connection, self._over)
            return False
        connection.sendall(answer.wire)
        return not answer.close

    def close(self):
        self._over.set()
        with socket.create_connection(self._listener.getsockname()):
            pass
        self._thread.join(10)
        for connection in list(self._live):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join(10)
        self._listener.close()
