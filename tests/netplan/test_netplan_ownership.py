"""Who may use which address, with real sockets of real users."""

import socket

import pytest
from netplan_scene import (
    BASE,
    HOST4,
    NEIGHBOUR4,
    NEIGHBOUR6,
    NOTHING,
    UID,
    as_user,
    connect,
    know_each_other,
    read_counters,
    send,
    serving,
    sink,
    wanted,
)

pytestmark = pytest.mark.usefixtures("backend")

A, B, NOBODY, ROOT = UID, UID + 1, 1234, 0
A6, B6 = "2001:db8:1::2", "2001:db8:1::3"
A4, B4 = "10.0.0.2", "10.0.0.3"
A_RANGE, B_RANGE = "2001:db8:1:0:4001::5", "2001:db8:1:0:4002::5"
WORLD = "2001:4860::1"


@pytest.fixture
def guarded(node):
    node.converge(wanted(3, ranges=True))
    know_each_other(node)
    return node


@pytest.mark.parametrize(
    ("uid", "source", "udp", "tcp"),
    [
        (A, A6, "ok", "ok"),
        (A, A_RANGE, "ok", "ok"),
        (A, None, "ok", "ok"),
        (A, str(BASE.ip), "ok", "ok"),
        (A, B6, "EPERM", "ECONNREFUSED"),
        (A, B_RANGE, "EPERM", "ECONNREFUSED"),
        (A, WORLD, "EPERM", "timeout"),
        (NOBODY, None, "ok", "ok"),
        (NOBODY, str(BASE.ip), "ok", "ok"),
        (NOBODY, A6, "EPERM", "ECONNREFUSED"),
        (NOBODY, A_RANGE, "EPERM", "ECONNREFUSED"),
        (NOBODY, WORLD, "EPERM", "timeout"),
        (NOBODY, NEIGHBOUR6, "EPERM", "timeout"),
        (ROOT, A6, "ok", "ok"),
        (ROOT, A_RANGE, "ok", "ok"),
    ],
)
def test_ipv6_to_the_wire(guarded, uid, source, udp, tcp):
    with sink(guarded) as port, sink(guarded, kind=socket.SOCK_STREAM) as listener:
        assert as_user(uid, lambda: send(source, NEIGHBOUR6, port)) == udp
        patience = 0.7 if tcp == "timeout" else 5
        assert as_user(uid, lambda: connect(source, NEIGHBOUR6, listener, patience=patience)) == tcp


def test_freebind_needs_no_privilege_and_gets_nowhere(node):
    node.converge(wanted(1))
    with sink(node) as port:
        assert as_user(NOBODY, lambda: send(WORLD, NEIGHBOUR6, port, free=True)) == "EPERM"


def test_a_refused_foreign_source_sends_nothing_at_all(guarded):
    """An RST or ICMP error in answer would go to whoever really has that address."""
    with guarded.at_neighbour():
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x86DD))
    with tap, sink(guarded, kind=socket.SOCK_STREAM) as listener:
        as_user(NOBODY, lambda: send(None, NEIGHBOUR6))  # both know each other now
        tap.settimeout(0.3)
        assert as_user(NOBODY, lambda: connect(WORLD, NEIGHBOUR6, listener, patience=0.7)) == "timeout"
        world = socket.inet_pton(socket.AF_INET6, WORLD)
        try:
            while True:
                assert world not in tap.recv(2048)
        except TimeoutError:
            pass


@pytest.mark.parametrize(
    ("uid", "expected"), [(A, "ok"), (ROOT, "ok"), (B, "ECONNREFUSED"), (NOBODY, "ECONNREFUSED")]
)
def test_private_ipv4_is_its_owners_and_roots(guarded, uid, expected):
    with serving(A, A4) as port, serving(A, A4, socket.SOCK_DGRAM) as datagrams:
        assert as_user(uid, lambda: connect(None, A4, port)) == expected
        udp = expected if expected == "ok" else "EPERM"
        assert as_user(uid, lambda: send(None, A4, datagrams)) == udp
        if uid != A:
            assert as_user(uid, lambda: connect("127.0.0.1", A4, port)) == expected


def test_private_ipv4_is_not_the_lans(guarded):
    with serving(A, A4) as port, guarded.at_neighbour():
        assert as_user(NOBODY, lambda: connect(None, HOST4, port)) == "ECONNREFUSED"  # the wire works
        assert as_user(NOBODY, lambda: connect(None, A4, port, patience=0.7)) == "timeout"


@pytest.mark.parametrize("uid", [B, NOBODY])
def test_private_ipv4_is_no_source_for_others(guarded, uid):
    with sink(guarded, NEIGHBOUR4) as port:
        assert as_user(uid, lambda: send(A4, NEIGHBOUR4, port)) == "EPERM"
        assert as_user(uid, lambda: send(None, NEIGHBOUR4, port)) == "ok"


def test_a_squatters_listener_is_not_reached(guarded):
    with serving(A, A6) as own, serving(B, A6) as squatted, guarded.at_neighbour():
        assert as_user(NOBODY, lambda: connect(None, A6, own)) == "ok"
        assert as_user(NOBODY, lambda: connect(None, A6, squatted, patience=0.7)) == "timeout"


@pytest.mark.parametrize("uid", [A, NOBODY, ROOT])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_loopback_is_everybodys(guarded, uid, address):
    with serving(NOBODY, address) as port:
        assert as_user(uid, lambda: connect(None, address, port)) == "ok"


def test_partitions_reach_each_other_from_their_own_addresses(guarded):
    with serving(B, B6) as port, serving(B, B_RANGE) as ranged:
        assert as_user(A, lambda: connect(A6, B6, port)) == "ok"
        assert as_user(A, lambda: connect(A_RANGE, B6, port)) == "ok"
        assert as_user(A, lambda: connect(A6, B_RANGE, ranged)) == "ok"


def test_what_the_kernel_itself_sends_passes(guarded):
    with guarded.at_neighbour():
        assert as_user(NOBODY, lambda: connect(None, A6, 9)) == "ECONNREFUSED"  # RST
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one:
            one.settimeout(1)
            one.connect((A6, 9))
            one.send(b"x")
            with pytest.raises(ConnectionRefusedError):  # ICMP error
                one.recv(1)
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as ping:
            ping.settimeout(1)
            ping.sendto(b"\x80\0\0\0\0\1\0\1", (A6, 0))
            while ping.recv(100)[0] != 129:  # echo reply
                pass


def test_spoofed_from_the_wire(guarded):
    with serving(B, B6, socket.SOCK_DGRAM) as port, guarded.at_neighbour():
        for source in (A6, A_RANGE):
            assert send(source, B6, port, count=3, free=True) == "ok"
        assert send(NEIGHBOUR6, B6, port, count=2) == "ok"
    (found,) = [one for one in read_counters().traffic if one[:3] == ("slappart1", "ipv6", "remote")]
    assert found.packets_in == 2


def test_refusals_are_counted_by_who_tried_and_billed_to_nobody(guarded, backend):
    with sink(guarded) as port:
        for _ in range(5):
            assert as_user(B, lambda: send(A6, NEIGHBOUR6, port)) == "EPERM"
        for _ in range(3):
            assert as_user(NOBODY, lambda: send(A6, NEIGHBOUR6, port)) == "EPERM"
        assert as_user(B, lambda: connect(A6, NEIGHBOUR6, port)) == "ECONNREFUSED"
        assert as_user(B, lambda: send(WORLD, NEIGHBOUR6, port)) == "EPERM"
        assert as_user(B, lambda: send(None, A4)) == "EPERM"
        assert as_user(A, lambda: send(B_RANGE, NEIGHBOUR6, port)) == "EPERM"
    reading = read_counters()
    others = {(NOBODY, "address", 3)} if backend == "nftables" else set()  # case refusals-of-others
    assert {(one.uid, one.rule, one.packets) for one in reading.refused} == others | {
        (B, "address", 6),
        (B, "foreign", 1),
        (B, "private", 1),
        (A, "address", 1),
    }
    assert not any(one.bytes_out or one.bytes_in for one in reading.traffic if one.partition == "slappart0")


def test_what_was_refused_stays_counted_over_every_change(guarded):
    assert as_user(B, lambda: send(A6, NEIGHBOUR6)) == "EPERM"
    guarded.converge(wanted(5, ranges=True))  # elements
    guarded.converge(wanted(5))  # rules
    assert as_user(B, lambda: send(A6, NEIGHBOUR6)) == "EPERM"
    guarded.converge(wanted(2, ranges=True))
    assert [(one.uid, one.rule, one.packets) for one in read_counters().refused] == [(B, "address", 2)]


def test_without_ownership_only_the_meters_are_there(node):
    node.converge(wanted(2, ownership=False))
    with sink(node) as port:
        assert as_user(B, lambda: send(A6, NEIGHBOUR6, port)) == "ok"
    assert read_counters().refused == ()
    node.converge(wanted(2))
    with sink(node) as port:
        assert as_user(B, lambda: send(A6, NEIGHBOUR6, port)) == "EPERM"
    node.converge(wanted(2, ownership=False))
    node.converge(NOTHING)


def test_without_any_rules_the_same_attempts_succeed(node):
    """The other tests can fail."""
    node.converge(wanted(2, packet_filter=False))
    with sink(node) as port, serving(A, A4) as private:
        assert as_user(B, lambda: send(A6, NEIGHBOUR6, port)) == "ok"
        assert as_user(NOBODY, lambda: send(A6, NEIGHBOUR6, port)) == "ok"
        assert as_user(B, lambda: connect(None, A4, private)) == "ok"
        with node.at_neighbour():
            assert as_user(NOBODY, lambda: connect(None, A4, private)) == "ok"
