"""The hands of one user of the isolation matrix: a program that runs as this user and tries what it is told to.

It needs nothing but the standard library, for it is copied to where every user can read it.  It connects to the hub,
says who it is, and answers one line of JSON with another.  What arrives at its sockets is read by a thread, so that no
buffer runs full.
"""

import contextlib
import errno
import json
import os
import re
import resource
import selectors
import signal
import socket
import struct
import sys
import threading
import traceback

import isolation_files
import isolation_network
import isolation_processes

TOKEN = re.compile(rb"#[0-9a-f]{8}#")
ATTEMPTS = {**isolation_files.ATTEMPTS, **isolation_processes.ATTEMPTS, **isolation_network.ATTEMPTS}


def outcome(verb, *words):
    """``ok`` with what an attempt says, or the name of its error."""
    try:
        said = ATTEMPTS[verb](*words)
    except OSError as error:
        return errno.errorcode.get(error.errno, f"E?{error}")
    return "ok" if said is None else f"ok {said}"


class Inbox(threading.Thread):
    """Reads every socket that was given to it; keeps what it saw as [where, token, source]."""

    def __init__(self):
        super().__init__(daemon=True)
        self._selector = selectors.DefaultSelector()
        self._wake, self._poke = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self.seen = []

    def add(self, sock, where, kind):
        if kind == "tap":
            os.set_blocking(sock, False)
        else:
            sock.setblocking(False)
        with self._lock:
            self._selector.register(sock, selectors.EVENT_READ, (where, kind))
            os.write(self._poke, b"x")

    def drop(self, sock):
        with self._lock:
            self._selector.unregister(sock)

    def run(self):
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake, 4096)
                else:
                    self._read(key.fileobj, *key.data)

    def _read(self, sock, where, kind):
        try:
            for _ in range(64):
                if kind == "tap":
                    self._frame(where, os.read(sock, 2048))
                elif kind == "listen":
                    connection, source = sock.accept()
                    self._note(where, b"", source[0])
                    self.add(connection, where, "stream")
                elif kind == "stream":
                    if not (data := sock.recv(2000)):
                        self._close(sock)
                        return
                    self._note(where, data, sock.getpeername()[0])
                elif kind == "frames":
                    self._frame(where, sock.recv(2048))
                else:
                    data, source = sock.recvfrom(2000)
                    self._note(where, data, source[0])
        except BlockingIOError:
            pass
        except OSError:  # a reset connection, or one that the other thread closes
            if kind == "stream":
                self._close(sock)

    def _close(self, sock):
        with contextlib.suppress(KeyError, ValueError):
            self.drop(sock)
        sock.close()

    def _note(self, where, data, source):
        found = TOKEN.search(data)
        self.seen.append([where, found.group().decode() if found else "", source])

    def _frame(self, where, frame):
        kind, source = int.from_bytes(frame[12:14], "big"), ""
        if kind == 0x86DD and len(frame) >= 54:
            source = socket.inet_ntop(socket.AF_INET6, frame[22:38])
        elif kind == 0x0800 and len(frame) >= 34:
            source = socket.inet_ntop(socket.AF_INET, frame[26:30])
        found = TOKEN.search(frame)
        if found:
            self.seen.append([where, found.group().decode(), source])
        elif kind in (0x86DD, 0x0800, 0x0806):
            self.seen.append([where, frame[:86].hex(), source])


class Agent:
    """One user's sockets and what they received."""

    def __init__(self):
        self.inbox = Inbox()
        self.inbox.start()
        self.kept = {}

    def attempt(self, items):
        return [outcome(*item) for item in items]

    def listen(self, items):
        """Open sockets and keep them: [name, variant, address, port]."""
        said = []
        for name, variant, address, port in items:
            try:
                sock, kind = isolation_network.listener(variant, address, port)
            except OSError as error:
                said.append(errno.errorcode.get(error.errno, str(error)))
                continue
            self.kept[name] = sock
            self.inbox.add(sock, name, kind)
            said.append("ok")
        return said

    def capture(self, name, interface):
        """Keep every frame of an interface: root's."""
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        sock.setsockopt(socket.SOL_SOCKET, 33, 64 * 2**20)  # SO_RCVBUFFORCE
        sock.bind((interface, 0))
        self.kept[name] = sock
        self.inbox.add(sock, name, "frames")

    def guest(self, tap, frame):
        """Be the guest behind a tap from now on: say something, and keep every frame that comes."""
        descriptor = isolation_network.attached(tap, tap=True)
        isolation_network.wait_for_carrier(tap)
        os.write(descriptor, bytes.fromhex(frame))
        self.kept["guest"] = descriptor
        self.inbox.add(descriptor, "guest", "tap")

    def wire(self, interface, frames):
        """Put frames on the wire: root's."""
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((interface, 0))
            for frame in frames:
                sock.send(bytes.fromhex(frame))

    def lost(self, name):
        """Frames that a capture could not keep up with."""
        return struct.unpack("II", self.kept[name].getsockopt(263, 6, 8))[1]  # SOL_PACKET, PACKET_STATISTICS

    def close(self, prefix):
        for name in [one for one in self.kept if one.startswith(prefix)]:
            sock = self.kept.pop(name)
            self.inbox.drop(sock)
            if isinstance(sock, int):
                os.close(sock)
            else:
                sock.close()

    def received(self):
        """What arrived since the last time."""
        seen, self.inbox.seen = self.inbox.seen, []
        return seen

    def connect(self, items, patience):
        return isolation_network.connect_all(items, patience)

    def own(self, what):
        return isolation_processes.lay_out(self.kept, what)

    def disown(self, what):
        isolation_processes.take_up(self.kept, what)


def answered(work, words):
    """What the hub is told; a mistake of ours goes there whole, and not into a log that nobody reads."""
    try:
        return [work(*words), ""]
    except Exception:  # noqa: BLE001 - whatever it is
        return [None, traceback.format_exc()]


def main(hub, name):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16384)), hard))
    signal.signal(signal.SIGUSR1, lambda *_: None)  # what the others send if they can
    agent = Agent()
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(hub)
        stream = channel.makefile("rw")
        print(
            json.dumps({"name": name, "pid": os.getpid(), "uid": os.getuid(), "groups": os.getgroups()}),
            file=stream,
            flush=True,
        )
        for line in stream:
            verb, *words = json.loads(line)
            print(json.dumps(answered(getattr(agent, verb), words)), file=stream, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
