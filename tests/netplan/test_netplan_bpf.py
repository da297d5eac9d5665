"""What the programs at the cgroup close and give, with real sockets of real users."""

import os
import socket
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface

import pytest
from netplan_scene import (
    BASE,
    HOST4,
    NEIGHBOUR4,
    NEIGHBOUR6,
    UID,
    as_user,
    ask,
    echoing,
    family_of,
    know_each_other,
    wanted,
)

from netplan.bpf_state import read_refusals
from netplan.model import RoutableIPv4

A, B, C, NOBODY, ROOT = UID, UID + 1, UID + 2, 1234, 0
A6, B6, C6 = "2001:db8:1::2", "2001:db8:1::3", "2001:db8:1::4"
A4, B4 = "10.0.0.2", "10.0.0.3"
A_RANGE, B_RANGE = "2001:db8:1:0:4001::5", "2001:db8:1:0:4002::5"
A_WORLD4, B_WORLD4 = "192.0.2.101", "192.0.2.102"
HOST6 = str(BASE.ip)
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM

pytestmark = pytest.mark.skipif(
    not os.path.ismount("/sys/fs/bpf"), reason="the machine gives no cgroup of its own"
)


def hooked(count=3, **more):
    """A and B have routable IPv4, C has not."""
    desired = wanted(count, **{"ranges": True, "cgroup_bpf": True, "host_ipv4": IPv4Address(HOST4), **more})
    world = (A_WORLD4, B_WORLD4)
    partitions = tuple(
        replace(
            one, routable_ipv4=RoutableIPv4(IPv4Interface(f"{world[one.index]}/24"), IPv4Address(NEIGHBOUR4))
        )
        if one.index < 2
        else one
        for one in desired.partitions
    )
    return replace(desired, partitions=partitions)


@pytest.fixture
def guarded(node):
    node.converge(hooked())
    know_each_other(node)
    return node


def bind(address, kind=TCP, family=None):
    with socket.socket(family or family_of(address), kind) as one:
        one.bind((address, 0))
        return "ok"


# --- bind -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TCP, UDP])
@pytest.mark.parametrize(
    ("uid", "address", "expected"),
    [
        *(
            (A, address, "ok")
            for address in (A6, A_RANGE, A4, A_WORLD4, "::", "0.0.0.0", "::1", "127.0.0.1", HOST6, HOST4)
        ),
        *((ROOT, address, "ok") for address in (A6, A_RANGE, A4, A_WORLD4)),
        *((uid, address, "EPERM") for uid in (B, NOBODY) for address in (A6, A_RANGE, A4, A_WORLD4)),
    ],
)
def test_who_may_bind(guarded, uid, address, expected, kind):
    assert as_user(uid, lambda: bind(address, kind)) == expected
    if ":" not in address:
        assert as_user(uid, lambda: bind(f"::ffff:{address}", kind, socket.AF_INET6)) == expected


def test_refused_binds_are_counted_by_who_tried(guarded):
    for _ in range(3):
        as_user(B, lambda: bind(A6))
    as_user(B, lambda: bind(A_RANGE))
    as_user(NOBODY, lambda: bind(A4, UDP))
    as_user(A, lambda: bind(A6))
    assert read_refusals() == {(B, "bind"): 4, (NOBODY, "bind"): 1}


def test_without_the_programs_the_same_binds_succeed(node):
    node.converge(hooked(cgroup_bpf=False))
    for address in (A6, A_RANGE, A4, A_WORLD4):
        assert as_user(B, lambda address=address: bind(address)) == "ok"
    assert read_refusals() == {}


# --- the source of clients that bind nothing --------------------------------------------------------------------------

WAYS = [(TCP, True), (UDP, True), (UDP, False)]


@pytest.mark.parametrize(("kind", "connected"), WAYS, ids=["tcp", "udp", "sendto"])
@pytest.mark.parametrize("wildcard", [False, True])
@pytest.mark.parametrize(
    ("uid", "target", "server", "seen"),
    [
        (A, B6, B, A6),
        (A, A6, A, A6),
        (C, B6, B, C6),
        (A, B_RANGE, B, A6),
        (NOBODY, B6, B, HOST6),
        (ROOT, B6, B, HOST6),
        (A, B_WORLD4, B, A_WORLD4),
        (A, A_WORLD4, A, A_WORLD4),
        (C, B_WORLD4, B, HOST4),
        (NOBODY, B_WORLD4, B, HOST4),
        (A, A4, A, A4),
        (ROOT, A4, A, A4),
        (A, "127.0.0.1", ROOT, "127.0.0.1"),
        (A, "::1", ROOT, "::1"),
        (A, HOST6, ROOT, None),
        (A, HOST4, ROOT, None),
        (C, HOST4, ROOT, HOST4),
        (NOBODY, HOST6, ROOT, HOST6),
        (NOBODY, HOST6, NOBODY, HOST6),
    ],
)
def test_sources_on_the_node(guarded, uid, target, server, seen, wildcard, kind, connected):
    """``seen`` None: the node's own, or the client's own; what matters is the answer."""
    if wildcard and target == B_RANGE and kind == UDP:
        pytest.skip("no server knows where a datagram went to unless it asks (IPV6_RECVPKTINFO)")
    address = ("::" if ":" in target else "0.0.0.0") if wildcard else target
    with echoing(server, address, kind) as port:
        found = as_user(uid, lambda: ask(target, port, kind, connected=connected))
        assert found == seen if seen else found in {HOST6, A6, HOST4, A_WORLD4}
        if ":" not in target:
            mapped = as_user(
                uid, lambda: ask(f"::ffff:{target}", port, kind, connected=connected, family=socket.AF_INET6)
            )
            assert mapped == found


@pytest.mark.parametrize(("kind", "connected"), WAYS, ids=["tcp", "udp", "sendto"])
@pytest.mark.parametrize(
    ("uid", "target", "seen"),
    [
        (A, NEIGHBOUR6, A6),
        (NOBODY, NEIGHBOUR6, HOST6),
        (ROOT, NEIGHBOUR6, HOST6),
        (A, NEIGHBOUR4, A_WORLD4),
        (C, NEIGHBOUR4, HOST4),
        (NOBODY, NEIGHBOUR4, HOST4),
    ],
)
def test_sources_on_the_wire(guarded, uid, target, seen, kind, connected):
    with guarded.at_neighbour():
        server = echoing(ROOT, target, kind)
        port = server.__enter__()
    try:
        assert as_user(uid, lambda: ask(target, port, kind, connected=connected)) == seen
        own = A_RANGE if uid == A and ":" in target else None
        if own:
            assert as_user(uid, lambda: ask(target, port, kind, connected=connected, bound=own)) == own
    finally:
        server.__exit__(None, None, None)


@pytest.mark.parametrize("kind", [TCP, UDP])
def test_a_wildcard_server_answers_the_wire_from_its_own(guarded, kind):
    with echoing(A, "::", kind) as port, guarded.at_neighbour():
        assert ask(A6, port, kind) == NEIGHBOUR6
