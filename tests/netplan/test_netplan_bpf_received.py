"""What users receive at the node's own addresses: counted at the socket, to the packet and the byte."""

import os
import socket
import struct
import subprocess
import threading
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from netplan_scene import (
    BASE,
    HOST4,
    NEIGHBOUR4,
    NEIGHBOUR6,
    UID,
    as_user,
    family_of,
    inside,
    know_each_other,
    opened_by,
    send,
    wanted,
)

from netplan import bpf_state, bpf_syscall, nftables
from netplan.bpf_programs import RECEIVED
from netplan.bpf_state import read_received

A, B, NOBODY = UID, UID + 1, 1234
A6, HOST6 = "2001:db8:1::2", str(BASE.ip)
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
HEADERS = {"ipv4": 28, "ipv6": 48}
WAYS = [("ipv4", HOST4, NEIGHBOUR4), ("ipv6", HOST6, NEIGHBOUR6)]

pytestmark = pytest.mark.skipif(
    not os.path.ismount("/sys/fs/bpf"), reason="the machine gives no cgroup of its own"
)


def hooked(count=2, **more):
    return wanted(
        count,
        **{"cgroup_bpf": True, "local_source_table": True, "host_ipv4": IPv4Address(HOST4), "ranges": True}
        | more,
    )


@pytest.fixture
def counting(node):
    node.converge(hooked())
    know_each_other(node)
    return node


def listening(uid, address, kind=UDP, port=0):
    with opened_by(uid):
        one = socket.socket(family_of(address), kind)
        one.settimeout(5)
        one.bind((address, port))
        if kind == TCP:
            one.listen()
    return one


def counts():
    return {key: (one.packets, one.bytes) for key, one in read_received().counts.items()}


def from_the_wire(node, target, port, count, size):
    with node.at_neighbour():
        send(None, target, port, count=count, size=size)


@pytest.mark.parametrize(("family", "own", "far"), WAYS)
def test_a_socket_that_is_not_connected(counting, family, own, far):
    """Answers to sendto(2), and a server: by the user of the socket, whoever sent it, beside those of others."""
    wildcard = "::" if family == "ipv6" else "0.0.0.0"
    with (
        listening(A, own) as server,
        listening(B, wildcard) as client,
        listening(0, own) as of_root,
        listening(NOBODY, own) as of_another,
    ):
        for number, one in enumerate((server, client, of_root, of_another)):
            from_the_wire(counting, own, one.getsockname()[1], 5 + number, 100 + number)
            assert len(one.recv(2000)) == 100 + number
    head = HEADERS[family]
    assert counts() == {(A, family): (5, 5 * (100 + head)), (B, family): (6, 6 * (101 + head))}


@pytest.mark.parametrize(("family", "own", "far"), WAYS)
def test_several_connected_sockets_of_one_port(counting, family, own, far):
    """Early demultiplexing looks at the first of a slot of the hash only (net/ipv4/udp.c)."""
    found = []
    with counting.at_neighbour():
        peers = [listening(0, far) for _ in range(8)]
    try:
        for number, peer in enumerate(peers):
            with opened_by(B):
                one = socket.socket(family_of(own), UDP)
            found.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((own, 4711))
            one.connect((far, peer.getsockname()[1]))
            for _ in range(number + 1):
                peer.sendto(bytes(10), (own, 4711))
        assert counts() == {(B, family): (36, 36 * (10 + HEADERS[family]))}
    finally:
        for one in (*found, *peers):
            one.close()


def counted_at_the_neighbour(node, match):
    """Begin to count what it sends; return a function that says how much that was."""
    lines = ("add table inet sent", "add chain inet sent out { type filter hook postrouting priority 400; }")
    with node.at_neighbour():
        nftables.run("".join(f"{line}\n" for line in (*lines, f"add rule inet sent out {match} counter")))

    def so_far():
        with node.at_neighbour():
            words = subprocess.check_output(
                ["/usr/sbin/nft", "list", "table", "inet", "sent"], text=True
            ).split()
        return int(words[words.index("packets") + 1]), int(words[words.index("bytes") + 1])

    return so_far


@pytest.mark.parametrize(("family", "own", "far"), WAYS)
def test_connections_from_the_first_packet_to_the_last(counting, family, own, far):
    """Of a server and of a client; the neighbour closes first, so that TIME_WAIT is its own."""
    sent = counted_at_the_neighbour(
        counting, f"meta l4proto tcp {'ip6' if family == 'ipv6' else 'ip'} daddr {own}"
    )
    with listening(A, own, TCP) as server:
        with counting.at_neighbour():
            client = socket.create_connection((own, server.getsockname()[1]), 5)
        with opened_by(A):  # whoever accepts has it
            accepted = server.accept()[0]
        with client, accepted:
            accepted.settimeout(5)
            client.sendall(bytes(30_000))
            client.shutdown(socket.SHUT_WR)
            while accepted.recv(65536):
                pass
            accepted.sendall(b"x")
            accepted.close()
            assert client.recv(10) == b"x"
            assert client.recv(10) == b""
    assert counts()[A, family] == sent()
    before = sent()
    with counting.at_neighbour():
        far_server = listening(0, far, TCP)
    with far_server, opened_by(B):
        client = socket.create_connection((far, far_server.getsockname()[1]), 5, (own, 0))
        with client, far_server.accept()[0] as accepted:
            client.sendall(bytes(1000))
            accepted.settimeout(5)
            assert accepted.recv(2000)
            accepted.close()
            assert client.recv(10) == b""
    after = sent()
    assert counts()[B, family] == tuple(b - a for a, b in zip(before, after, strict=True))
    assert after[0] - before[0] >= 4


def test_what_is_not_counted(counting):
    """What is the partition's own, comes over lo, or was sent to all."""
    with listening(A, "::") as own, listening(A, "0.0.0.0") as four:
        four.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        group = socket.inet_aton("239.1.2.3") + socket.inet_aton(HOST4)
        four.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        port, port4 = own.getsockname()[1], four.getsockname()[1]
        from_the_wire(counting, A6, port, 3, 10)
        from_the_wire(counting, "2001:db8:1:0:4001::5", port, 3, 10)
        for _ in range(6):
            own.recv(20)
        as_user(B, lambda: send(None, HOST6, port, count=3))
        send(HOST4, HOST4, port4, count=1)
        own.recv(100)
        four.recv(100)
        with counting.at_neighbour(), socket.socket(socket.AF_INET, UDP) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(NEIGHBOUR4))
            one.sendto(b"all", ("192.0.2.255", port4))
            one.sendto(b"some", ("239.1.2.3", port4))
        assert {four.recv(10), four.recv(10)} == {b"all", b"some"}
        assert counts() == {}


def test_answers_to_a_ping(counting):
    """ICMP is refused to nobody, and counted for whom it is."""
    setting = "/proc/sys/net/ipv4/ping_group_range"
    with open(setting, "w") as file:
        file.write("0 2147483647")

    def ping(source):
        def work():
            with socket.socket(socket.AF_INET6, UDP, socket.IPPROTO_ICMPV6) as one:
                one.settimeout(5)
                one.bind((source, 0))
                one.sendto(struct.pack("!BBHHH", 128, 0, 0, 0, 1) + bytes(56), (NEIGHBOUR6, 0))
                return len(one.recv(200))

        return as_user(A, work)

    assert ping(HOST6) == "64"
    assert counts() == {(A, "ipv6"): (1, 104)}
    assert ping(A6) == "64"
    assert counts() == {(A, "ipv6"): (1, 104)}


def test_none_is_lost_where_two_processors_count(counting):
    each, threads = 20_000, 2
    with listening(A, HOST6) as one:
        port = one.getsockname()[1]

        def work(processor):
            with inside(counting.neighbour):
                os.sched_setaffinity(0, {processor})
                send(None, HOST6, port, count=each, size=20)

        workers = [
            threading.Thread(target=work, args=(processor,))
            for processor in sorted(os.sched_getaffinity(0))[:threads]
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        count = each * len(workers)
        assert counts() == {(A, "ipv6"): (count, count * 68)}


# --- where and since when they count ----------------------------------------------------------------------------------


def in_force():
    return bpf_state._place(bpf_state._cookie()) / bpf_state.version(ingress_everywhere=False)


def test_put_in_force_anew_they_begin_anew(counting):
    with listening(A, HOST6) as one:
        from_the_wire(counting, HOST6, one.getsockname()[1], 3, 10)
        first = read_received()
        assert first.epoch
        assert first == read_received()
        counting.converge(hooked(3))
        assert read_received() == first
        with bpf_syscall.pinned(str(in_force() / "ingress")) as link:
            bpf_syscall.detach(link)
        assert read_received() == ("", {})
        counting.converge(hooked(3))
        second = read_received()
        assert second.epoch not in ("", first.epoch)
        assert second.counts == {}
        (in_force() / "ingress").unlink()
        assert read_received() == ("", {})
        counting.converge(hooked(3))
        (in_force() / RECEIVED).unlink()
        assert read_received() == ("", {})
        counting.converge(hooked(3))
        from_the_wire(counting, HOST6, one.getsockname()[1], 4, 10)
        assert counts() == {(A, "ipv6"): (4, 4 * 58)}
    counting.converge(hooked(cgroup_bpf=False))
    assert read_received() == ("", {})


def test_a_partition_without_addresses_of_its_own_counts(node):
    desired = hooked(1)
    (only,) = desired.partitions
    bare = replace(only, ipv6=None, ipv6_range=None, tap=None)
    node.converge(replace(desired, partitions=(bare,)))
    know_each_other(node)
    with listening(A, HOST4) as one:
        from_the_wire(node, HOST4, one.getsockname()[1], 2, 10)
        assert counts() == {(A, "ipv4"): (2, 76)}
