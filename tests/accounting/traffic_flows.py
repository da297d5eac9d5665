"""Those who send known amounts: processes of partition users, guests behind taps, and the neighbour on the wire.

Each is a child of the test that opens its sockets as its user, in its network, begins when it is told to, goes on until it is
told to stop, and then says what it sent: {label: (packets, bytes)}.  Bytes are IP lengths, of guests those of frames.
``REFUSED`` is how often it was refused, which is not sent.
"""

import contextlib
import fcntl
import os
import pickle
import random
import select
import signal
import socket
import struct
import threading
import time
import traceback
from ipaddress import ip_address

from network_scene import inside

HEADERS = {4: 20 + 8, 6: 40 + 8}  # IP and UDP
TUNSETIFF, IFF_TAP_NO_PI = 0x400454CA, 0x1002
ETHER = b"\x88\xb5"  # IEEE 802, for experiments: nobody answers it
PAUSE = 0.04  # after each round of an agent: a dozen of them share two processors
PATIENCE = 20.0
REFUSED = "refused"


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def bound(address, port=0, kind=socket.SOCK_DGRAM, target=None):
    """A socket bound to an address, or to nothing."""
    one = socket.socket(family(address or target), kind)
    try:
        if kind == socket.SOCK_STREAM:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address:
            one.bind((address, port))
    except OSError:
        one.close()
        raise
    return one


class Agent:
    """A child that works; ``work`` is called with ``go_on``, a function that says whether to, and returns what it sent."""

    def __init__(self, name, prepare, *, uid=0, namespace=None, processor=None):
        self.name = name
        self._stop_read, self._stop = os.pipe()
        self._said, said = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                for descriptor in (self._stop, self._said):
                    os.close(descriptor)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                if processor is not None:
                    os.sched_setaffinity(0, {processor})
                answer = self._live(prepare, uid, namespace, said)
                status = 0
            except BaseException:  # noqa: BLE001 - told to the test, whatever it was
                answer = traceback.format_exc()
            finally:
                with os.fdopen(said, "wb") as stream:
                    pickle.dump(answer, stream)
                os._exit(status)
        os.close(said)
        os.close(self._stop_read)

    def _live(self, prepare, uid, namespace, said):
        with contextlib.ExitStack() as stack:
            if namespace:
                stack.enter_context(inside(namespace))
            if uid:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            work = prepare()
            os.write(said, b"r")
            os.read(self._stop_read, 1)  # to begin
            return work(lambda: not select.select([self._stop_read], [], [], PAUSE)[0])

    def wait_until_ready(self):
        """Its sockets are open."""
        first = os.read(self._said, 1)
        if first != b"r":
            raise AssertionError(f"{self.name}: {pickle.loads(first + self._rest())}")  # noqa: S301 - our own child's

    def begin(self):
        os.write(self._stop, b"g")

    def stop(self):
        with contextlib.suppress(BrokenPipeError):  # it ended by a mistake, which it tells
            os.write(self._stop, b"s")

    def end(self):
        """What it sent; raises AssertionError with the traceback of a mistake."""
        answer = pickle.loads(self._rest())  # noqa: S301 - our own child wrote it
        self._reap()
        assert isinstance(answer, dict), f"{self.name}: {answer}"
        return answer

    def kill(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self._reap()

    def _rest(self):
        parts = []
        while part := os.read(self._said, 65536):
            parts.append(part)
        return b"".join(parts)

    def _reap(self):
        os.waitpid(self.pid, 0)
        self.pid = 0
        os.close(self._stop)
        os.close(self._said)


def udp(flows, *, seed, burst=4):
    """Send datagrams of all sizes; ``flows`` are {label: (source or None, target, port)}."""

    def prepare():
        sockets = {label: bound(source, target=target) for label, (source, target, _) in flows.items()}

        def work(go_on):
            dice = random.Random(seed)  # noqa: S311 - dice of a test
            sent = {label: [0, 0] for label in (*flows, REFUSED)}
            while go_on():
                for label, (_, target, port) in flows.items():
                    for _ in range(burst):
                        size = dice.randrange(0, 1400)
                        try:
                            sockets[label].sendto(bytes(size), (target, port))
                        except PermissionError:
                            sent[REFUSED][0] += 1
                            continue
                        sent[label][0] += 1
                        sent[label][1] += size + HEADERS[ip_address(target).version]
            return {label: tuple(counts) for label, counts in sent.items()}

        return work

    return prepare


def asking(label, back, source, target, port, *, seed, connected=True):
    """Send datagrams to somebody who sends them back: nothing is on its way at the end."""

    def prepare():
        one = bound(source, target=target)
        one.settimeout(PATIENCE)
        if connected:
            one.connect((target, port))

        def work(go_on):
            dice = random.Random(seed)  # noqa: S311 - dice of a test
            packets = octets = 0
            while go_on():
                size = dice.randrange(1, 1400)
                if connected:
                    one.send(bytes(size))
                else:
                    one.sendto(bytes(size), (target, port))
                assert len(one.recv(2000)) == size
                packets, octets = packets + 1, octets + size + HEADERS[ip_address(target).version]
            return {label: (packets, octets), back: (packets, octets)}

        return work

    return prepare


def echo(addresses, port):
    """Send back what comes."""

    def prepare():
        sockets = [bound(one, port) for one in addresses]
        for one in sockets:
            one.setblocking(False)

        def work(go_on):
            while go_on():
                while ready := select.select(sockets, [], [], 0.02)[0]:
                    for one in ready:
                        text, sender = one.recvfrom(2000)
                        one.sendto(text, sender)
            return {}

        return work

    return prepare


def guest(tap, out, back):
    """Be the guest behind a tap: frames written are ``out``, frames read ``back``, whoever sent them."""

    def prepare():
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", tap.encode(), IFF_TAP_NO_PI))

        def work(go_on):
            written, read = [0, 0], [0, 0]
            while go_on():
                frame = b"\xff" * 6 + b"\x02\0\0\0\0\x07" + ETHER + bytes(46 + written[0] % 1400)
                written[0], written[1] = written[0] + 1, written[1] + os.write(descriptor, frame)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        size = len(os.read(descriptor, 4000))
                        read[0], read[1] = read[0] + 1, read[1] + size
            return {out: tuple(written), back: tuple(read)}

        return work

    return prepare


def frames(link):
    """Send frames to all from the wire."""

    def prepare():
        one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        one.bind((link, 0))

        def work(go_on):
            count = 0
            while go_on():
                one.send(b"\xff" * 6 + b"\x02\0\0\0\0\x08" + ETHER + bytes(46 + count % 1400))
                count += 1
            assert count
            return {}

        return work

    return prepare


# --- TCP --------------------------------------------------------------------------------------------------------------


SIZE = struct.Struct("!I")


def serve(addresses, port):
    """Take in what each client says, answer with half as much, and close."""

    def prepare():
        listeners = [bound(address, port, socket.SOCK_STREAM) for address in addresses]
        for one in listeners:
            one.listen(64)
        for one in listeners:
            threading.Thread(target=_take_in, args=(one,), daemon=True).start()

        def work(go_on):
            while go_on():
                time.sleep(0.02)
            return {}

        return work

    return prepare


def _take_in(listener):
    while True:
        connection, _ = listener.accept()
        with connection:
            (size,) = SIZE.unpack(connection.recv(SIZE.size, socket.MSG_WAITALL))
            left = size
            while left:
                left -= len(connection.recv(65536))
            connection.sendall(bytes(size // 2))


def converse(flows, *, seed, hasty=True):
    """Connections one after the other, each with some kilobytes there and back; who is ``hasty`` closes first.

    ``flows`` are [(source or None, target, port)].  What went over the wire, acknowledgements and all, only the oracle knows.
    """

    def prepare():
        def work(go_on):
            dice = random.Random(seed)  # noqa: S311 - dice of a test
            refused = 0
            while go_on():
                for source, target, port in flows:
                    try:
                        _converse(source, target, port, dice.randrange(0, 30_000), hasty=hasty)
                    except (PermissionError, ConnectionError):
                        refused += 1
            return {REFUSED: (refused, 0)}

        return work

    return prepare


def _converse(source, target, port, size, *, hasty):
    with bound(source, kind=socket.SOCK_STREAM, target=target) as one:
        one.settimeout(PATIENCE)
        one.connect((target, port))
        one.sendall(SIZE.pack(size) + bytes(size))
        if hasty:
            one.shutdown(socket.SHUT_WR)
        back = 0
        while part := one.recv(65536):
            back += len(part)
        assert back == size // 2
        if not hasty:
            one.shutdown(socket.SHUT_WR)
        # the end of it passed while the socket was still its user's: the server's FIN came, and its acknowledgement went
