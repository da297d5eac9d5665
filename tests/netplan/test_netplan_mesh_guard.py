"""The mesh's own source checks, with real packets: two nodes whose tuns are joined as tincd would join them, unlooked at."""

import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Network

import netplan_scene
import pytest
from mesh_scene import (
    INTERFACE,
    NETWORK,
    NODE4,
    OTHER,
    OWN,
    Pump,
    attached,
    datagram,
    ends,
    ipv4,
    meshed,
    packets,
    syn,
    vpn,
)
from netplan_scene import (
    HOST4,
    NEIGHBOUR4,
    NOTHING,
    UID,
    Node,
    as_user,
    ask,
    connect,
    echoing,
    inside,
    iptables,
    opened_by,
    read_counters,
    send,
)
from pyroute2 import IPRoute

from netplan import mesh_guard, nftables
from netplan.mesh_guard import Verdict

pytestmark = pytest.mark.usefixtures("backend")

THERE = str(OTHER[2])
"""The first partition of another node."""
STRANGER = "198.51.100.9"


@pytest.fixture
def here(node) -> Node:
    node.converge(meshed(2, tap=False, local_source_table=True))
    return node


def raw(packet):
    """Send a packet that root has written itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as one:
        one.sendto(packet, (ends(packet)[1], 0))
    return "ok"


def sent(device, work):
    """What leaves by the mesh for ``work``, and what it said."""
    said = work()
    return said, [ends(packet) for packet in packets(device)]


def refused_by(work):
    """Return the name of the errno of ``work``."""
    return as_user(0, work)


def dropped():
    """What the mesh's rules dropped until now."""
    return dict(read_counters().mesh)


def test_what_is_the_nodes_own_leaves(here):
    with attached() as device:
        for uid, bound, source in (
            (UID, vpn(0), vpn(0)),
            (UID, None, NODE4),
            (0, None, NODE4),
            (0, vpn(1), vpn(1)),
        ):
            work = partial(as_user, uid, partial(send, bound, THERE))
            assert sent(device, work) == ("ok", [(source, THERE)])
    assert dropped() == {}


def test_a_partition_sends_from_its_own_address_alone(here):
    with attached() as device:
        assert sent(device, lambda: as_user(UID, lambda: send(vpn(1), THERE))) == ("EPERM", [])
    (refused,) = read_counters().refused
    assert (refused.uid, refused.rule) == (UID, "address")


def test_from_anothers_part_nothing_leaves(here):
    """Root may write any source into a packet, and a user bind any by IP_FREEBIND: an honest node lets none out."""
    with attached() as device:
        for source in (THERE, HOST4, STRANGER, "127.0.0.1"):
            said, left = sent(device, partial(refused_by, partial(raw, datagram(source, str(OTHER[9]), 9))))
            assert (said, left) == ("EPERM", []), source

        def freebind():
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
                one.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
                one.bind((THERE, 0))
                return one.sendto(b"x", (str(OTHER[9]), 9))

        # a source that is not here is no user's to send from: routing itself refuses it
        assert sent(device, lambda: as_user(UID, freebind)) == ("ENETUNREACH", [])
        assert sent(device, lambda: as_user(UID, lambda: send(HOST4, THERE))) == ("EPERM", [])
    assert dropped() == {Verdict("out", "source"): 5}
    assert {(one.uid, one.rule): one.packets for one in read_counters().refused}[UID, "mesh"] == 1


def test_tcp_that_is_refused_is_told_at_once(here):
    with attached() as device:
        assert as_user(UID, lambda: connect(HOST4, THERE, 9)) == "ECONNREFUSED"
        assert as_user(UID, lambda: connect(vpn(0), NEIGHBOUR4, 9)) == "ECONNREFUSED"
        assert packets(device) == []


def test_nothing_leaves_for_what_is_not_of_the_mesh_or_the_nodes_own(here):
    here.ipr.route("add", dst=STRANGER + "/32", oif=here.link(INTERFACE))
    with attached() as device:
        for target in (STRANGER, str(OWN[400]), "224.0.0.9"):
            one = datagram(NODE4, target, 9)

            def work(one=one):
                with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, INTERFACE.encode())
                    return sock.sendto(one, (ends(one)[1], 0))

            assert sent(device, lambda work=work: refused_by(work)) == ("EPERM", []), target
    assert dropped() == {Verdict("out", "destination"): 3}


def test_nothing_of_the_mesh_leaves_elsewhere(here):
    """Neither with such a source nor for such a destination, whatever routes say, also when the tun is gone."""
    with (
        here.at_neighbour(),
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)) as wire,
    ):
        wire.bind(("wire", 0x0800))
        with inside(here.own):
            assert as_user(UID, lambda: send(vpn(0), NEIGHBOUR4)) == "EPERM"
            assert refused_by(lambda: raw(datagram(THERE, NEIGHBOUR4, 9))) == "EPERM"
            here.ipr.link("del", index=here.link(INTERFACE))
            assert as_user(UID, lambda: send(None, THERE)) in {"EHOSTUNREACH", "ENETUNREACH"}
            here.ipr.route("add", dst=str(NETWORK), gateway=NEIGHBOUR4)
            assert as_user(UID, lambda: send(HOST4, THERE)) == "EPERM"
            assert as_user(0, lambda: send(None, THERE)) == "EPERM"
            assert as_user(UID, lambda: connect(None, THERE, 9)) == "ECONNREFUSED"
            assert send(None, NEIGHBOUR4) == "ok"
        seen = []
        while select.select([wire], [], [], 0.3)[0]:
            packet, (_, _, kind, *_) = wire.recvfrom(65536)
            if kind != socket.PACKET_OUTGOING and packet[9] == socket.IPPROTO_UDP:
                seen.append(ends(packet))
    assert seen == [(HOST4, NEIGHBOUR4)]
    assert dropped() == {Verdict("out", "elsewhere"): 5}


def reset_of(device, packet):
    """What comes back for a packet that is put into the tun."""
    os.write(device, packet)
    return [ends(one) for one in packets(device)]


def test_what_the_kernel_itself_sends_obeys(here):
    """An RST and an ICMP error have the address that was asked for as their source; to a foreign route they do not go."""
    with attached() as device:
        assert reset_of(device, syn(THERE, vpn(0), 9)) == [(vpn(0), THERE)]
        assert reset_of(device, datagram(THERE, NODE4, 9)) == [(NODE4, THERE)]
        # the kernel would answer there if it were let: its own rule refuses what it would send
        here.ipr.route("add", dst=THERE + "/32", gateway=NEIGHBOUR4)
        assert reset_of(device, syn(THERE, vpn(0), 9)) == []
    assert dropped() == {Verdict("out", "elsewhere"): 1}


@contextmanager
def hearing(address, uid=0, port=7000) -> Iterator[socket.socket]:
    with opened_by(uid), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind((address, port))
        one.setblocking(False)
        yield one


def heard(one, patience=0.2):
    return [one.recvfrom(64)[1][0] for _ in iter(lambda: select.select([one], [], [], patience)[0], [])]


def test_what_comes_is_of_the_rest_of_the_mesh_and_for_the_nodes_own(here):
    with attached() as device, hearing(vpn(0), UID, 7001) as one, hearing("0.0.0.0") as any_:
        os.write(device, datagram(THERE, vpn(0), 7001))
        assert heard(one) == [THERE]
        os.write(device, datagram(THERE, NODE4, 7000))
        assert heard(any_) == [THERE]
        for source, target in (
            (str(OWN[400]), vpn(0)),
            (STRANGER, vpn(0)),
            (NEIGHBOUR4, NODE4),
            (THERE, HOST4),
        ):
            for port in (7000, 7001):
                os.write(device, datagram(source, target, port))
        assert (heard(one), heard(any_)) == ([], [])
    assert dropped() == {Verdict("in", "source"): 6, Verdict("in", "destination"): 2}


def test_the_mesh_is_not_carried_by_the_mesh(here):
    """What tincd sends to an address of the network would come out of the tun again; nobody speaks to it from there either."""
    tincd = 655
    with (
        attached() as device,
        hearing("0.0.0.0", 0, tincd) as one,
        socket.create_server(("", tincd)) as server,
    ):
        server.setblocking(False)
        with pytest.raises(PermissionError):
            one.sendto(b"x", (THERE, tincd))
        assert packets(device) == []
        for target in (NODE4, vpn(0)):
            os.write(device, datagram(THERE, target, tincd))
            os.write(device, syn(THERE, target, tincd))
        assert (heard(one), packets(device)) == ([], [])
        # that port of another's, and answers of its own TCP, are others' affair
        assert sent(device, lambda: send(None, THERE, tincd)) == ("ok", [(NODE4, THERE)])
        os.write(device, datagram(THERE, NODE4, tincd + 1))
        assert packets(device) != []
    assert dropped() == {Verdict("out", "port"): 1, Verdict("in", "port"): 4}


def test_a_source_that_is_here_and_a_destination_that_is_not_do_not_come_either(here):
    """The kernel itself drops these, with iptables before any rule of ours could count them."""
    with attached() as device, hearing("0.0.0.0") as any_:
        os.write(device, datagram(vpn(1), NODE4, 7000))
        os.write(device, datagram(NODE4, vpn(0), 7000))
        os.write(device, datagram(THERE, str(OTHER[7]), 7000))
        assert heard(any_) == []
        assert packets(device) == []
    if netplan_scene.backend == "nftables":
        assert dropped() == {Verdict("in", "source"): 2, Verdict("in", "destination"): 1}


def test_ipv6_is_dropped_both_ways(here):
    """Although the interface has none: somebody may have switched it on."""
    switch = f"/proc/sys/net/ipv6/conf/{INTERFACE}/disable_ipv6"
    with open(switch, "w") as file:
        file.write("0")
    with attached() as device:
        answered = ipv6_echo("fe80::1", "ff02::1")
        os.write(device, answered)
        # what the kernel itself says when it gets IPv6 (reports, solicitations) stays here as well
        assert packets(device) == []
    found = dropped()
    assert found[Verdict("in", "ipv6")] == 1
    assert found[Verdict("out", "ipv6")] >= 1
    assert found.keys() == {Verdict("in", "ipv6"), Verdict("out", "ipv6")}


def ipv6_echo(source, target):
    ends6 = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    body = struct.pack("!BBHHH", 128, 0, 0, 1, 1)
    return struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_ICMPV6, 255) + ends6 + body


def test_nobody_on_the_lan_speaks_for_the_mesh(here):
    """With a source of the network, or to an address of this node's part, which the weak host model would take."""
    with here.at_neighbour(), IPRoute() as other:
        wire = other.link_lookup(ifname="wire")[0]
        other.addr("add", index=wire, address=THERE, prefixlen=32)
        other.route("add", dst=vpn(0) + "/32", gateway=HOST4)
    with hearing("0.0.0.0") as any_:
        with here.at_neighbour():
            send(THERE, HOST4, 7000)
            send(NEIGHBOUR4, vpn(0), 7000)
            send(NEIGHBOUR4, HOST4, 7000)
        assert heard(any_) == [NEIGHBOUR4]
    assert dropped() == {Verdict("in", "elsewhere"): 2}


def test_nothing_is_forwarded(here):
    """Neither from the LAN (or a guest) into the mesh nor out of it, by a host that forwards."""
    with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
        file.write("1")
    with here.at_neighbour(), IPRoute() as other:
        for target in (str(NETWORK), STRANGER + "/32"):
            other.route("add", dst=target, gateway=HOST4)
    here.ipr.route("add", dst=STRANGER + "/32", oif=here.link(INTERFACE))
    with attached() as device:
        with here.at_neighbour():
            assert send(NEIGHBOUR4, THERE) == "ok"
            assert send(NEIGHBOUR4, STRANGER) == "ok"
        os.write(device, datagram(THERE, NEIGHBOUR4, 9))
        os.write(device, datagram(THERE, str(OTHER[7]), 9))
        # with iptables, a redirect of the kernel's own is sent before the packet is dropped
        assert [one for one in packets(device) if one[9] != socket.IPPROTO_ICMP] == []
    found = dropped()
    assert sum(found.values()) == 4
    assert found.keys() <= {
        Verdict("in", "elsewhere"),
        Verdict("in", "destination"),
        Verdict("forward", "any"),
    }


@dataclass(frozen=True)
class Pair:
    """Two nodes, and the ends of their tuns."""

    node: Node
    other: int
    here: int
    there: int


@pytest.fixture
def pair(node) -> Iterator[Pair]:
    """This node and, in a namespace of its own, another one of the same mesh; nobody carries anything yet."""
    home, desired = node.own, meshed(2, OTHER, tap=False, local_source_table=True)
    desired = replace(
        desired,
        host_ipv6=None,
        interface="lo",
        partitions=tuple(replace(one, ipv6=None, ipv4=None) for one in desired.partitions),
    )
    other = netplan_scene.leave_for_a_new_one()
    try:
        with IPRoute() as ipr:
            ipr.link("set", index=1, state="up")
            node.converge(desired)
            with attached() as there:
                netplan_scene.enter(home)
                node.converge(meshed(2, tap=False, local_source_table=True))
                with attached() as here:
                    yield Pair(node, other, here, there)
    finally:
        netplan_scene.enter(home)
        os.close(other)


@contextmanager
def over_there(pair, manager):
    """Make something at the other node, and stay at this one."""
    with ExitStack() as stack:
        with inside(pair.other):
            made = stack.enter_context(manager)
        yield made


def test_partitions_of_two_nodes_reach_each_other_and_are_metered(pair):
    with Pump(pair.here, pair.there):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with over_there(pair, echoing(UID, THERE, kind)) as port:
                asked = partial(ask, THERE, port, kind)
                assert as_user(UID + 1, partial(asked, bound=vpn(1))) == vpn(1)
                assert as_user(0, asked) == NODE4
        with inside(pair.other):
            theirs = read_counters()
        ours = read_counters()
    mine = {one.partition: one for one in ours.traffic if (one.family, one.scope) == ("vpn4", "remote")}
    assert mine["slappart1"].address == vpn(1)
    assert mine["slappart1"].packets_in > 3
    assert mine["slappart1"].packets_out > 3
    assert mine["slappart0"].packets_in == 0
    other = {one.partition: one for one in theirs.traffic if (one.family, one.scope) == ("vpn4", "remote")}
    # what one sent the other got, byte for byte; the node's own share is in the other's alone
    assert other["slappart0"].bytes_in > mine["slappart1"].bytes_out > 0
    assert (ours.mesh, theirs.mesh) == ({}, {})


def test_of_anothers_part_nothing_arrives_from_an_honest_node(pair):
    third = IPv4Network("10.64.6.0/23")
    with Pump(pair.here, pair.there) as pump, over_there(pair, hearing("0.0.0.0")) as one:
        for source in (str(third[2]), THERE, STRANGER):
            assert refused_by(partial(raw, datagram(source, THERE, 7000))) == "EPERM"
        assert heard(one) == []
        assert as_user(UID, lambda: send(vpn(0), THERE, 7000)) == "ok"
        assert heard(one) == [vpn(0)]
    assert [ends(packet) for packet in pump.carried] == [(vpn(0), THERE)]


def test_what_a_malicious_node_still_can(pair):
    """It speaks for any other node but the one that it speaks to: no end of tinc knows whose a packet was.  Only that other
    node gets the answer.
    """
    third = str(IPv4Network("10.64.6.0/23")[2])
    with over_there(pair, hearing("0.0.0.0")) as one:
        # a node without our rules, or with a tincd of its own: what it puts into the VPN comes out there
        os.write(pair.there, datagram(third, THERE, 7000))
        assert heard(one) == [third]
        for source in (str(OTHER[3]), STRANGER):
            os.write(pair.there, datagram(source, THERE, 7000))
        assert heard(one) == []


def test_the_mesh_is_guarded_also_where_addresses_are_not(here):
    here.converge(replace(meshed(2, tap=False), ownership=False))
    with attached() as device:
        assert sent(device, lambda: as_user(UID, lambda: send(vpn(1), THERE))) == ("ok", [(vpn(1), THERE)])
        assert sent(device, lambda: as_user(UID, lambda: send(HOST4, THERE))) == ("EPERM", [])
        os.write(device, datagram(STRANGER, NODE4, 7000))
        assert as_user(UID, lambda: send(vpn(1), NEIGHBOUR4)) == "EPERM"
    assert dropped() == {
        Verdict("out", "source"): 1,
        Verdict("out", "elsewhere"): 1,
        Verdict("in", "source"): 1,
    }


def test_a_foreign_link_of_the_name_is_not_filtered(node):
    """And what is of the mesh passes it no more than any other."""
    node.ipr.link("add", ifname=INTERFACE, kind="bridge")
    node.ipr.link("set", index=node.link(INTERFACE), state="up")
    node.ipr.addr("add", index=node.link(INTERFACE), address="203.0.113.1", prefixlen=24)
    from netplan.apply import apply

    node.plan(meshed(1, tap=False))
    apply(node.last)
    node.ipr.neigh(
        "add", dst="203.0.113.9", lladdr="02:00:00:00:00:09", ifindex=node.link(INTERFACE), state="permanent"
    )
    assert as_user(UID, lambda: send(None, "203.0.113.9")) == "ok"
    node.ipr.route("add", dst=str(NETWORK), gateway="203.0.113.9")
    assert as_user(UID, lambda: send(None, THERE)) == "EPERM"


def test_counters_stay_when_partitions_come_and_go(here):
    with attached():
        assert as_user(UID, lambda: send(HOST4, THERE)) == "EPERM"
        here.converge(meshed(3, tap=False, local_source_table=True))
        assert dropped() == {Verdict("out", "source"): 1}
        here.converge(NOTHING)


def test_a_rule_that_is_taken_away_comes_back(here):
    if netplan_scene.backend == "iptables":
        iptables_v4 = "-D PARTITIOND-OUT 1"
        iptables(iptables_v4)
    else:
        nftables.run("flush chain inet partitiond mesh_out\n")
    assert here.converge(meshed(2, tap=False, local_source_table=True))
    with attached():
        assert as_user(UID, lambda: send(HOST4, THERE)) == "EPERM"


def test_without_a_mesh_there_is_nothing_of_it(node):
    from netplan.legacy_rules import render_legacy
    from netplan.packet_filter import render

    text = render(netplan_scene.wanted(1)).rules + render(netplan_scene.wanted(1)).declarations
    assert "mesh" not in text
    assert not [
        name
        for chains in render_legacy(netplan_scene.wanted(1)).chains.values()
        for name in chains
        if "MESH" in name
    ]


@pytest.mark.parametrize(
    "name", ["mesh/in", "mesh/in/other", "mesh/in/source/x", "traffic/in/source", "mesh/any/any"]
)
def test_other_names_are_no_verdicts(name):
    assert mesh_guard.parse(name) is None


def test_every_verdict_has_a_name():
    assert [mesh_guard.parse(mesh_guard.counter(*one)) for one in mesh_guard.VERDICTS] == list(
        mesh_guard.VERDICTS
    )


def test_ipv4_is_made_as_the_kernel_wants_it():
    assert len(ipv4(THERE, NODE4, 17, b"x" * 9)) == 29
