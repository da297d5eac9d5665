"""What the counters say is what was sent, to the packet and the byte."""

import os
import socket
import threading

import pytest
from netplan_scene import (
    BASE,
    NEIGHBOUR4,
    NEIGHBOUR6,
    NOTHING,
    UID,
    as_user,
    break_rules,
    inside,
    know_each_other,
    read_counters,
    send,
    serving,
    sink,
    take_rules_away,
    wanted,
)

from netplan.counters import read_taps

pytestmark = pytest.mark.usefixtures("backend")

A, B = UID, UID + 1
A6, B6, A4 = "2001:db8:1::2", "2001:db8:1::3", "10.0.0.2"
A_RANGE = "2001:db8:1:0:4001::5"
UDP6, UDP4 = 40 + 8 + 52, 20 + 8 + 52  # IP length of what scene's send() sends


def _read(partition, family="ipv6", scope="remote"):
    (found,) = [one for one in read_counters().traffic if one[:3] == (partition, family, scope)]
    return found[3:7]


@pytest.fixture
def metered(node):
    node.converge(wanted(3, ranges=True))
    know_each_other(node)
    return node


@pytest.mark.parametrize(("source", "family"), [(A6, "ipv6"), (A_RANGE, "range")])
def test_out_to_the_wire(metered, source, family):
    with sink(metered) as port:
        as_user(A, lambda: send(source, NEIGHBOUR6, port, count=137))
    assert _read("slappart0", family) == (0, 137 * UDP6, 0, 137)
    assert _read("slappart0", family, "local") == (0, 0, 0, 0)


@pytest.mark.parametrize(("target", "family"), [(A6, "ipv6"), (A_RANGE, "range")])
def test_in_from_the_wire(metered, target, family):
    with serving(A, target, socket.SOCK_DGRAM) as port, metered.at_neighbour():
        send(None, target, port, count=1)
        before = _read_in(metered, family)
        send(None, target, port, count=137)
        after = _read_in(metered, family)
    assert (after[0] - before[0], after[2] - before[2]) == (137 * UDP6, 137)


def _read_in(node, family):
    with inside(node.own):
        return _read("slappart0", family)


def test_between_partitions_of_the_host(metered):
    with serving(B, B6, socket.SOCK_DGRAM) as port:
        as_user(A, lambda: send(A6, B6, port, count=41))
    assert _read("slappart0", scope="local") == (0, 41 * UDP6, 0, 41)
    assert _read("slappart1", scope="local") == (41 * UDP6, 0, 41, 0)
    assert _read("slappart0") == _read("slappart1") == (0, 0, 0, 0)


def test_private_ipv4(metered):
    with serving(A, A4, socket.SOCK_DGRAM) as port:
        as_user(A, lambda: send(None, A4, port, count=23))
    assert _read("slappart0", "ipv4", "local") == (23 * UDP4, 23 * UDP4, 23, 23)
    assert _read("slappart0", "ipv4", "remote") == (0, 0, 0, 0)


def test_nothing_is_lost_while_others_come_and_go_and_the_rules_are_repaired(metered):
    desired = wanted(3, ranges=True)
    count, loads = 150_000, 0
    with sink(metered) as port:
        child = os.fork()
        if child == 0:
            try:
                os.setgid(A)
                os.setuid(A)
                send(A6, NEIGHBOUR6, port, count=count)
            finally:
                os._exit(0)
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            metered.converge(wanted(4 + loads % 2, ranges=True))
            break_rules()
            loads += 1
    metered.converge(desired)
    assert loads >= 5
    assert _read("slappart0") == (0, count * UDP6, 0, count)


def test_counters_of_those_who_stay_go_on_and_the_others_are_gone(metered):
    with sink(metered) as port:
        as_user(A, lambda: send(A6, NEIGHBOUR6, port, count=5))
        epoch = read_counters().epoch
        metered.converge(wanted(5, ranges=True))
        metered.converge(wanted(1))
        as_user(A, lambda: send(A6, NEIGHBOUR6, port, count=5))
    reading = read_counters()
    assert reading.epoch == epoch
    assert {one[:2] for one in reading.traffic} == {("slappart0", "ipv6"), ("slappart0", "ipv4")}
    assert _read("slappart0")[3] == 10


def test_a_new_table_is_a_new_epoch(metered):
    epoch = read_counters().epoch
    take_rules_away()
    assert read_counters().epoch == ""
    metered.converge(wanted(3, ranges=True))
    assert read_counters().epoch not in {epoch, ""}


def test_ids_with_every_allowed_character(node):
    from dataclasses import replace

    ids = ("a-b", "a_b", "a.b", "9", "denied", "A" * 64, "_")
    parts = wanted(len(ids), tap=False).partitions
    parts = tuple(replace(one, id=name) for one, name in zip(parts, ids, strict=True))
    node.converge(replace(wanted(0), partitions=parts))
    reading = read_counters()
    assert {one.partition for one in reading.traffic} == set(ids)
    node.converge(NOTHING)


def test_taps_are_read_towards_the_guest(node):
    import fcntl
    import struct

    node.converge(wanted(2))
    guest = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(guest, 0x400454CA, struct.pack("16sH22x", b"slaptap0", 0x1002))
        frame = b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + b"x" * 86
        before = {one.partition: one for one in read_taps()}["slappart0"]
        for _ in range(7):
            os.write(guest, frame)
        after = {one.partition: one for one in read_taps()}["slappart0"]
    finally:
        os.close(guest)
    assert (after.packets_out - before.packets_out, after.bytes_out - before.bytes_out) == (7, 700)
    assert before.epoch == after.epoch
    assert {(one.partition, one.tap) for one in read_taps()} == {
        ("slappart0", "slaptap0"),
        ("slappart1", "slaptap1"),
    }


def test_what_uses_the_hosts_own_address_is_counted_by_owner(node, backend):
    """Out by the socket's maker; in by the socket that the kernel has found already: TCP, and connected UDP."""
    node.converge(wanted(2))
    know_each_other(node)
    with sink(node) as port, sink(node, NEIGHBOUR4) as port4:
        assert as_user(UID, lambda: send(str(BASE.ip), NEIGHBOUR6, port, count=5, size=52)) == "ok"
        assert as_user(UID + 1, lambda: send(None, NEIGHBOUR4, port4, count=3, size=72)) == "ok"
        assert as_user(1234, lambda: send(None, NEIGHBOUR4, port4, count=3)) == "ok"
        assert send(None, NEIGHBOUR4, port4) == "ok"
    found = {(one.uid, one.family): one for one in read_counters().shared}
    assert found.keys() == {(UID, "ipv6"), (UID + 1, "ipv4")}
    assert found[UID, "ipv6"][2:] == (0, 5 * 100, 0, 5)
    assert found[UID + 1, "ipv4"][2:] == (0, 3 * 100, 0, 3)

    def answered():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.settimeout(5)
            one.connect((NEIGHBOUR4, echo.getsockname()[1]))
            one.send(b"x" * 72)
            return len(one.recv(100))

    with node.at_neighbour():
        echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with echo:
        echo.bind((NEIGHBOUR4, 0))
        thread = threading.Thread(target=lambda: echo.sendto(*echo.recvfrom(100)))
        thread.start()
        assert as_user(UID + 1, answered) == "72"
        thread.join()
    found = {(one.uid, one.family): one for one in read_counters().shared}
    came = (100, 1) if backend == "nftables" else (0, 0)  # case own-address-in
    assert found[UID + 1, "ipv4"][2:] == (came[0], 4 * 100, came[1], 4)
