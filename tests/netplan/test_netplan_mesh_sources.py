"""Clients that bind nothing, towards the mesh: the programs at the cgroup give them their own address of it."""

import os
import socket
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface

import pytest
from mesh_scene import NODE4, OTHER, attached, ends, meshed, packets, vpn
from netplan_scene import (
    HOST4,
    NEIGHBOUR4,
    UID,
    as_user,
    ask,
    connect,
    echoing,
    know_each_other,
    read_counters,
    serving,
)

from netplan.bpf_state import read_refusals
from netplan.model import RoutableIPv4

A, B, C, NOBODY, ROOT = UID, UID + 1, UID + 2, 1234, 0
WORLD4 = "192.0.2.101"
THERE = str(OTHER[2])
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM

pytestmark = pytest.mark.skipif(
    not os.path.ismount("/sys/fs/bpf"), reason="the machine gives no cgroup of its own"
)


@pytest.fixture
def hooked(node):
    """A has a routable IPv4 besides its address of the mesh."""
    desired = meshed(3, cgroup_bpf=True, local_source_table=True, host_ipv4=IPv4Address(HOST4))
    routable = RoutableIPv4(IPv4Interface(f"{WORLD4}/24"), IPv4Address(NEIGHBOUR4))
    first, *rest = desired.partitions
    node.converge(replace(desired, partitions=(replace(first, routable_ipv4=routable), *rest)))
    know_each_other(node)
    return node


def reach_out(target, kind, *, connected=True, family=socket.AF_INET):
    with socket.socket(family, kind) as one:
        one.setblocking(False)
        if kind == UDP and not connected:
            return str(one.sendto(b"x", (target, 9)))
        if (result := one.connect_ex((target, 9))) not in (0, 115):  # EINPROGRESS
            raise OSError(result, "connect")
        return str(one.send(b"x") if kind == UDP else "begun")


WAYS = [
    (TCP, {}),
    (UDP, {}),
    (UDP, {"connected": False}),
    (TCP, {"family": socket.AF_INET6}),
    (UDP, {"family": socket.AF_INET6}),
    (UDP, {"family": socket.AF_INET6, "connected": False}),
]


@pytest.mark.parametrize(("kind", "how"), WAYS)
@pytest.mark.parametrize(
    ("uid", "source"), [(A, vpn(0)), (B, vpn(1)), (C, vpn(2)), (NOBODY, NODE4), (ROOT, NODE4)]
)
def test_sources_towards_other_nodes(hooked, uid, source, kind, how):
    target = f"::ffff:{THERE}" if "family" in how else THERE
    with attached() as device:
        assert as_user(uid, lambda: reach_out(target, kind, **how)) in {"1", "begun"}
        assert {ends(packet) for packet in packets(device)} == {(source, THERE)}


@pytest.mark.parametrize("kind", [TCP, UDP])
@pytest.mark.parametrize(
    ("uid", "source"), [(A, vpn(0)), (B, vpn(1)), (C, vpn(2)), (NOBODY, NODE4), (ROOT, NODE4)]
)
def test_sources_on_the_node(hooked, uid, source, kind):
    with echoing(B, vpn(1), kind) as port:
        assert as_user(uid, lambda: ask(vpn(1), port, kind)) == source
        mapped = f"::ffff:{vpn(1)}"
        assert as_user(uid, lambda: ask(mapped, port, kind, family=socket.AF_INET6)) == source


def test_the_rest_of_the_world_is_left_as_it_was(hooked):
    with hooked.at_neighbour():
        server = echoing(ROOT, NEIGHBOUR4, TCP)
        port = server.__enter__()
    try:
        assert as_user(A, lambda: ask(NEIGHBOUR4, port, TCP)) == WORLD4
        assert as_user(B, lambda: ask(NEIGHBOUR4, port, TCP)) == HOST4
    finally:
        server.__exit__(None, None, None)


def test_addresses_of_the_mesh_are_bound_by_their_owners_alone(hooked):
    def bind(address):
        with socket.socket(socket.AF_INET, TCP) as one:
            one.bind((address, 0))
            return "ok"

    assert as_user(A, lambda: bind(vpn(0))) == "ok"
    assert as_user(B, lambda: bind(vpn(0))) == "EPERM"
    assert as_user(B, lambda: bind(NODE4)) == "ok"
    assert as_user(ROOT, lambda: bind(vpn(0))) == "ok"
    assert read_refusals().counts == {(B, "bind"): 1}


def test_what_comes_for_an_address_reaches_no_foreign_wildcard(hooked):
    with serving(B, "0.0.0.0") as port:
        assert as_user(A, lambda: connect(None, vpn(0), port, patience=0.3)) == "timeout"
        assert as_user(A, lambda: connect(None, vpn(1), port)) == "ok"


def test_a_wildcard_server_answers_from_its_own_address(hooked):
    with echoing(B, "0.0.0.0", UDP) as port:
        assert as_user(A, lambda: ask(vpn(1), port, UDP, connected=False)) == vpn(0)


def test_what_is_given_is_metered(hooked):
    with attached() as device:
        assert as_user(B, lambda: reach_out(THERE, UDP, connected=False)) == "1"
        assert len(packets(device)) == 1
    (meter,) = (
        one
        for one in read_counters().traffic
        if (one.partition, one.family, one.scope) == ("slappart1", "vpn4", "remote")
    )
    assert (meter.packets_out, meter.bytes_out) == (1, 29)


def test_without_the_programs_it_is_the_nodes_own(node):
    node.converge(meshed(2, local_source_table=True))
    with attached() as device:
        assert as_user(B, lambda: reach_out(THERE, UDP)) == "1"
        assert {ends(packet) for packet in packets(device)} == {(NODE4, THERE)}
