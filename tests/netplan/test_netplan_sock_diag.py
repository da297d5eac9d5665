"""TCP sockets by NETLINK_SOCK_DIAG: real ones on loopback, of IPv4, of IPv6, and of both at once."""

import errno
import functools
import os
import resource
import socket
import struct
import time
from contextlib import contextmanager
from ipaddress import ip_address

import pytest

from netplan import sock_diag
from netplan.errors import NetplanError
from netplan.netlink import NLM_F_DUMP_INTR, NetlinkSocket, Refusal
from netplan.sock_diag import count_sessions, destroy, destroy_all, listeners, sessions

SOMEBODY = 4242
# where the listener listens, and by which address it is reached
KINDS = {"ipv4": ("127.0.0.2", "127.0.0.2"), "ipv6": ("::1", "::1"), "both": ("::", "127.0.0.2")}


@contextmanager
def as_user(uid):
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


class Listener:
    """A listener with its connections, both ends of each."""

    def __init__(self, listens, reached, port=0):
        family = socket.AF_INET6 if ":" in listens else socket.AF_INET
        self.socket = socket.create_server(
            (listens, port), family=family, backlog=4096, dualstack_ipv6=listens == "::"
        )
        self.reached, self.port = reached, self.socket.getsockname()[1]
        self.endpoint = (ip_address(reached), self.port)
        self.connections = []

    def connect(self, source_port=0):
        family = socket.AF_INET6 if ":" in self.reached else socket.AF_INET
        client = socket.socket(family)
        client.settimeout(5)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind(("", source_port))
        client.connect((self.reached, self.port))
        server = self.socket.accept()[0]
        server.settimeout(5)
        self.connections.append((client, server))
        return client, server

    def close(self):
        for pair in self.connections:
            for one in pair:
                one.close()
        self.socket.close()


@pytest.fixture
def listen():
    made = []

    def make(kind="ipv4", port=0):
        made.append(Listener(*KINDS[kind], port))
        return made[-1]

    yield make
    for one in made:
        one.close()


def endpoint_of(one):
    return (ip_address(one[0].removeprefix("::ffff:")), one[1])


def works(pair):
    client, server = pair
    client.sendall(b"there")
    server.sendall(server.recv(5) + b" and back")
    return client.recv(100) == b"there and back"


def was_cut(pair):
    for one in pair:
        with pytest.raises(ConnectionError):  # noqa: PT012 - the first call may still take what it is given
            one.sendall(b"x")
            one.recv(1)
    return True


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_of_a_session(listen, kind):
    with as_user(SOMEBODY):
        listener = listen(kind)
        client, server = listener.connect()
    beside, silent = listen(kind), (ip_address("127.0.0.9"), listener.port)
    beside.connect()
    found = sessions([listener.endpoint, silent])
    assert found.keys() == {listener.endpoint, silent}
    assert found[silent] == ()
    (one,) = found[listener.endpoint]
    assert (one.local, one.remote) == (listener.endpoint, endpoint_of(client.getsockname()))
    assert (one.uid, one.inode, one.link) == (SOMEBODY, os.fstat(server.fileno()).st_ino, 0)
    assert one.cookie == struct.unpack("=2I", server.getsockopt(socket.SOL_SOCKET, 57, 8))  # SO_COOKIE
    assert count_sessions([listener.endpoint, silent]) == {listener.endpoint: 1, silent: 0}


def test_nothing_asked_is_nothing_listed():
    assert (sessions([]), count_sessions([]), listeners([]), destroy_all([])) == ({}, {}, {}, 0)


def test_listeners_by_user(listen):
    own = listen("ipv4")
    with as_user(SOMEBODY):
        theirs, everywhere = listen("ipv6"), listen("both")
    own.connect()
    asked = [own.endpoint, theirs.endpoint, everywhere.endpoint, (own.endpoint[0], 1)]
    assert listeners(asked) == {own.endpoint: {0}, theirs.endpoint: {SOMEBODY}}
    assert listeners([(ip_address("::"), everywhere.port)]) == {
        (ip_address("::"), everywhere.port): {SOMEBODY}
    }


def test_a_listener_on_a_mapped_address(listen):
    with socket.socket(socket.AF_INET6) as one:
        one.bind(("::ffff:127.0.0.4", 0))
        one.listen()
        endpoint = (ip_address("127.0.0.4"), one.getsockname()[1])
        assert listeners([endpoint]) == {endpoint: {0}}


def test_half_closed_is_a_session_and_ended_is_none(listen):
    listener = listen()
    theirs, ours, waits, rests, open_ = (listener.connect() for _ in range(5))
    theirs[0].close()  # CLOSE_WAIT here
    ours[1].shutdown(socket.SHUT_WR)  # FIN_WAIT2 here
    waits[1].shutdown(socket.SHUT_WR)
    waits[0].close()  # TIME_WAIT here
    rests[1].close()  # FIN_WAIT2, and nobody's: the kernel keeps its numbers only
    wanted = {os.fstat(one[1].fileno()).st_ino for one in (theirs, ours, open_)}
    # an acknowledgement may be held back for some hundredths of a second
    until(lambda: {one.inode for one in sessions([listener.endpoint])[listener.endpoint]} == wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_asked_one_is_cut(listen, kind):
    listener = listen(kind)
    pairs = [listener.connect() for _ in range(5)]
    inode = os.fstat(pairs[2][1].fileno()).st_ino
    (asked,) = [one for one in sessions([listener.endpoint])[listener.endpoint] if one.inode == inode]
    assert destroy(asked) is True
    assert was_cut(pairs.pop(2))
    assert destroy(asked) is False
    assert all(works(pair) for pair in pairs)
    assert works(listener.connect())
    assert count_sessions([listener.endpoint]) == {listener.endpoint: 5}


@pytest.mark.parametrize("kind", KINDS)
def test_who_came_to_the_same_ports_is_not_cut(listen, kind):
    listener = listen(kind)
    pair = listener.connect()
    (old,) = sessions([listener.endpoint])[listener.endpoint]
    assert destroy(old)
    assert was_cut(pair)
    source_port = old.remote[1]
    for one in pair:
        one.close()
    again = listener.connect(source_port)
    (new,) = sessions([listener.endpoint])[listener.endpoint]
    assert (new.local, new.remote) == (old.local, old.remote)
    assert destroy(old) is False
    assert works(again)
    assert destroy_all([old, new]) == 1
    assert was_cut(again)


def test_thousands_in_many_reads(listen, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    reads = []
    original = NetlinkSocket._datagram
    monkeypatch.setattr(NetlinkSocket, "_datagram", lambda one: reads.append(1) or original(one))
    try:
        listener, beside = listen("ipv6"), listen("ipv6")
        pairs = [listener.connect() for _ in range(3000)]
        neighbour = beside.connect()
        found = sessions([listener.endpoint])[listener.endpoint]
        assert len(reads) > 10
        assert {one.inode for one in found} == {os.fstat(pair[1].fileno()).st_ino for pair in pairs}
        assert len({one.cookie for one in found}) == len(found) == 3000
        cut = {one.inode for one in found[::2]}
        assert destroy_all(found[::2]) == 1500
        assert count_sessions([listener.endpoint]) == {listener.endpoint: 1500}
        for pair in pairs:
            assert (was_cut if os.fstat(pair[1].fileno()).st_ino in cut else works)(pair)
        assert works(neighbour)
        assert destroy_all(found) == 1500
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_endpoints_than_one_filter_holds(listen):
    made = [listen(kind, port) for kind, port in (("ipv4", 20001), ("ipv6", 22500), ("both", 24999))]
    for listener in made:
        listener.connect()
    everything = [
        (host, port) for port in range(20000, 25000) for host in map(ip_address, ("127.0.0.2", "::1"))
    ]
    counts = count_sessions(everything)
    assert len(counts) == 10000
    assert {endpoint for endpoint, count in counts.items() if count} == {one.endpoint for one in made}
    assert listeners(everything).keys() == {one.endpoint for one in made[:2]}


def test_an_interrupted_listing_is_taken_again(listen, monkeypatch):
    listener = listen()
    listener.connect()
    original, interrupted = NetlinkSocket._datagram, []

    def datagram(one):
        data = bytearray(original(one))
        if len(interrupted) < 2:
            interrupted.append(1)
            (flags,) = struct.unpack_from("=H", data, 6)
            struct.pack_into("=H", data, 6, flags | NLM_F_DUMP_INTR)
        return bytes(data)

    monkeypatch.setattr(NetlinkSocket, "_datagram", datagram)
    assert count_sessions([listener.endpoint]) == {listener.endpoint: 1}
    assert len(interrupted) == 2


def test_who_may_not_is_told_so(listen):
    listener = listen()
    pair = listener.connect()
    (one,) = sessions([listener.endpoint])[listener.endpoint]
    with as_user(SOMEBODY), pytest.raises(NetplanError) as caught:
        destroy(one)
    assert caught.value.code == "sockets.not_permitted"
    assert f"/{listener.port}/" in caught.value.resource
    assert works(pair)


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EOPNOTSUPP, "sockets.destroy_unsupported"), (errno.ENOMEM, "sockets.destroy")],
)
def test_what_the_kernel_refuses_is_told(listen, monkeypatch, number, code):
    listener = listen()
    pairs = [listener.connect() for _ in range(2)]
    found = sessions([listener.endpoint])[listener.endpoint]
    original = NetlinkSocket.batch
    monkeypatch.setattr(
        NetlinkSocket,
        "batch",
        lambda one, requests: original(one, requests[1:]) | {0: Refusal(number, "a test says so")},
    )
    with pytest.raises(NetplanError) as caught:
        destroy_all(found)
    assert caught.value.code == code
    cut = [pair for pair in pairs if os.fstat(pair[1].fileno()).st_ino == found[1].inode]
    assert was_cut(*cut)  # the others are tried all the same


def test_a_session_over_a_link(listen):
    """Whose peer has an address of one link only is bound to that link, by which the kernel looks it up."""
    with socket.socket() as one, socket.socket() as client:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        one.bind(("127.0.0.5", 0))
        one.listen()
        endpoint = (ip_address("127.0.0.5"), one.getsockname()[1])
        client.connect(one.getsockname())
        with one.accept()[0]:
            (found,) = sessions([endpoint])[endpoint]
            assert found.link == socket.if_nametoindex("lo")
            assert destroy(found) is True


@functools.cache
def starts_of(program):
    place, starts = 0, set()
    while place < len(program):
        starts.add(place)
        place += program[place + 1]
    assert place == len(program)
    return starts


def run(program, host, port):
    """What the kernel does with a filter (inet_diag_bc_run, and the checks of inet_diag_bc_audit)."""
    place, steps, starts = 0, 0, starts_of(program)
    while place < len(program):
        assert place in starts
        steps += 1
        code, length, other = struct.unpack_from("=BBH", program, place)
        if code == sock_diag._JUMP:
            holds = False
        elif code == sock_diag._PORT_AT_MOST:
            holds = port <= struct.unpack_from("=H", program, place + 6)[0]
        else:
            holds = (port, host.packed) == (
                struct.unpack_from("=i", program, place + 8)[0],
                program[place + 12 : place + length],
            )
        place += length if holds else other
    assert place in (len(program), len(program) + 4)
    return place == len(program), steps


@pytest.mark.parametrize("count", [1, 2, 3, 7, 300, 1000])
def test_the_filter_takes_just_these(count):
    hosts = [ip_address(host) for host in ("10.0.0.1", "2001:db8::1", "2001:db8::2")]
    wanted = {(hosts[number % 2], 1000 + number * 7 // 3) for number in range(count)}
    program = sock_diag._filter(wanted)
    assert len(program) < 1 << 16
    for host in hosts:
        for port in (0, *range(990, 1010 + count * 7 // 3), 65535):
            taken, steps = run(program, host, port)
            assert taken is ((host, port) in wanted)
            assert steps < 20
    # all at one port, as a service that many partitions offer
    many = [(ip_address(f"2001:db8::{number:x}"), 3306) for number in range(1000)]
    program = sock_diag._filter(many)
    assert len(program) < 1 << 16
    assert all(run(program, *one)[0] for one in many)
    assert not run(program, ip_address("2001:db8::ffff"), 3306)[0]
