"""What the programs at the cgroup close and give, with real sockets of real users."""

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import pytest
from netplan_scene import (
    BASE,
    HOST4,
    LIBC,
    NEIGHBOUR4,
    NEIGHBOUR6,
    UID,
    as_user,
    ask,
    connect,
    echoing,
    family_of,
    know_each_other,
    opened_by,
    send,
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
    options = {
        "ranges": True,
        "cgroup_bpf": True,
        "local_source_table": True,
        "host_ipv4": IPv4Address(HOST4),
    }
    desired = wanted(count, **(options | more))
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
    assert read_refusals().counts == {(B, "bind"): 4, (NOBODY, "bind"): 1}


def test_without_the_programs_the_same_binds_succeed(node):
    node.converge(hooked(cgroup_bpf=False))
    for address in (A6, A_RANGE, A4, A_WORLD4):
        assert as_user(B, lambda address=address: bind(address)) == "ok"
    assert read_refusals().counts == {}


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


# --- what comes in ----------------------------------------------------------------------------------------------------

REUSE = (socket.SOL_SOCKET, socket.SO_REUSEADDR)
NOTHING_COMES = {"timeout", "ECONNREFUSED", "ECONNRESET"}


@contextlib.contextmanager
def listening(uid, address, kind=UDP, port=0, options=()):
    """A socket as one that was bound before we came, or by who may: opened in a user's name, bound by root."""
    with opened_by(uid):
        one = socket.socket(family_of(address), kind)
    with one:
        for level, option in options:
            one.setsockopt(level, option, 1)
        one.bind((address, port))
        if kind == TCP:
            one.listen()
        one.setblocking(False)
        yield one


def heard(one):
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            one.recv(64)
            count += 1
    return count


@pytest.mark.parametrize("target", [A6, A_RANGE, A4, A_WORLD4])
@pytest.mark.parametrize("sender", ["wire", "A", "root", "nobody"])
def test_a_foreign_wildcard_socket_hears_nothing(guarded, target, sender):
    with listening(B, "::") as thief:
        port = thief.getsockname()[1]
        if sender == "wire":
            with guarded.at_neighbour():
                send(None, target, port, count=3)
        else:
            as_user(
                {"A": A, "root": ROOT, "nobody": NOBODY}[sender], lambda: send(None, target, port, count=3)
            )
        assert heard(thief) == 0
        # of private IPv4 the packet filter sees to the wire and to nobody
        reaches = target != A4 or sender in {"A", "root"}
        assert read_refusals().counts == ({(B, "receive"): 3} if reaches else {})
        own = B6 if ":" in target else B_WORLD4
        with guarded.at_neighbour():
            send(None, own, port)
        assert heard(thief) == 1


@pytest.mark.parametrize("target", [A6, A_RANGE])
@pytest.mark.parametrize("first", ["thief", "owner"])
def test_a_shared_port_is_not_stolen(guarded, target, first):
    """The kernel gives a datagram to the socket that was bound last."""
    users = (B, A) if first == "thief" else (A, B)
    with (
        listening(users[0], target, options=[REUSE]) as one,
        listening(users[1], target, port=one.getsockname()[1], options=[REUSE]) as other,
    ):
        thief, owner = (one, other) if first == "thief" else (other, one)
        with guarded.at_neighbour():
            send(None, target, one.getsockname()[1], count=3)
        assert heard(thief) == 0
        # who sits on a port that is not his keeps others out at most; what he was not given, is counted
        assert heard(owner) + read_refusals().counts.get((B, "receive"), 0) == 3


@pytest.mark.parametrize("target", [A6, A_RANGE])
def test_no_user_can_sit_on_a_port_of_another(guarded, target):
    with listening(A, target, options=[REUSE]) as owner:
        port = owner.getsockname()[1]

        def steal():
            with socket.socket(socket.AF_INET6, UDP) as one:
                one.setsockopt(*REUSE, 1)
                one.bind((target, port))
                return "ok"

        assert as_user(B, steal) == "EPERM"
        with guarded.at_neighbour():
            send(None, target, port, count=3)
        assert heard(owner) == 3


def test_without_the_programs_it_is_stolen(node):
    """The others can fail."""
    node.converge(hooked(cgroup_bpf=False))
    know_each_other(node)
    with listening(A, A6, options=[REUSE]) as owner:
        port = owner.getsockname()[1]
        with listening(B, A6, port=port, options=[REUSE]) as thief, listening(B, "::") as wildcard:
            with node.at_neighbour():
                send(None, A6, port, count=3)
                send(None, A6, wildcard.getsockname()[1], count=3)
            assert (heard(owner), heard(thief), heard(wildcard)) == (0, 3, 3)
    with echoing(B, B6, UDP) as port:
        assert as_user(A, lambda: ask(B6, port, UDP)) != A6


@pytest.mark.parametrize("cookies", ["0", "2"])
@pytest.mark.parametrize("address", [A6, A_RANGE, "::"])
@pytest.mark.parametrize("client", ["wire", "A", "C", "nobody", "root"])
def test_a_squatter_serves_nobody(guarded, address, client, cookies):
    """Not even where every handshake goes by SYN cookies, whose SYN-ACK the packet filter cannot tell whose it is."""
    setting = Path("/proc/sys/net/ipv4/tcp_syncookies")
    setting.write_text(cookies)
    target = A6 if address == "::" else address
    with listening(B, address, TCP) as squatter:
        port = squatter.getsockname()[1]

        def attempt():
            return connect(None, target, port, patience=0.3)

        if client == "wire":
            with guarded.at_neighbour():
                assert as_user(NOBODY, attempt) in NOTHING_COMES
        else:
            uid = {"A": A, "C": C, "nobody": NOBODY, "root": ROOT}[client]
            assert as_user(uid, attempt) in NOTHING_COMES
        with pytest.raises(BlockingIOError):
            squatter.accept()


@pytest.mark.parametrize("cookies", ["0", "2"])
def test_the_owner_serves_everybody(guarded, cookies):
    Path("/proc/sys/net/ipv4/tcp_syncookies").write_text(cookies)
    with echoing(A, "::", TCP) as port:
        for uid, seen in ((A, A6), (C, C6), (NOBODY, HOST6), (ROOT, HOST6)):
            assert as_user(uid, lambda: ask(A6, port, TCP)) == seen
        with guarded.at_neighbour():
            assert ask(A6, port, TCP) == NEIGHBOUR6


# --- what must go on --------------------------------------------------------------------------------------------------

PING = """
import socket, struct, sys
bound, target = sys.argv[1:]
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6) as one:
    one.settimeout(2)
    if bound:
        one.bind((bound, 0))
    one.sendto(struct.pack("!BBHHH", 128, 0, 0, 0, 1), (target, 0))
    print(one.recv(64)[0])
"""


def ping(uid, target, bound=""):
    def work():
        done = subprocess.run(
            [sys.executable, "-c", PING, bound, target], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]

    return as_user(uid, work)


def test_pings(guarded):
    everybody = Path("/proc/sys/net/ipv4/ping_group_range")
    everybody.write_text("0 65535")
    for uid in (A, B, NOBODY, ROOT):
        for target in (A6, NEIGHBOUR6, HOST6, "::1"):
            assert (uid, target, ping(uid, target)) == (uid, target, "129")
    assert ping(A, NEIGHBOUR6, A6) == "129"
    assert "timed out" in ping(
        B, NEIGHBOUR6, A6
    )  # refused by the packet filter, which ping sockets do not tell
    with guarded.at_neighbour():
        everybody.write_text("0 65535")
        assert ping(ROOT, A6) == "129"


def test_what_the_kernel_itself_sends_arrives(guarded):
    for uid in (B, NOBODY):
        assert as_user(uid, lambda: connect(None, A6, 9)) == "ECONNREFUSED"
        assert as_user(uid, lambda: ask(A6, 9, UDP)) == "ECONNREFUSED"  # by an ICMP error


@pytest.mark.parametrize("kind", [TCP, UDP])
def test_a_client_with_a_port_and_no_address_reaches_the_node(guarded, kind):
    """No program can give it an address any more, so the routing table does."""
    with echoing(B, B6, kind) as port, echoing(B, B_WORLD4, kind) as port4:
        assert as_user(A, lambda: ask(B6, port, kind, bound="::")) == HOST6
        assert as_user(A, lambda: ask(B_WORLD4, port4, kind, bound="0.0.0.0")) == HOST4


def test_a_datagram_socket_is_used_for_several_destinations(guarded):
    """As getaddrinfo(3) does to sort what it found."""

    def work():
        with socket.socket(socket.AF_INET6, UDP) as one:
            found = []
            for target in (NEIGHBOUR6, "::1", B6, HOST6):
                one.connect((target, 9))
                found.append(one.getsockname()[0])
            return found

    assert as_user(A, work) == str([A6] * 4)


def test_what_has_no_partition_in_it_is_left_to_the_kernel(guarded):
    def work():
        found = []
        for target in ("fe80::1%br0", "ff02::1%br0", "::", "127.0.0.1", "224.0.0.1"):
            info = socket.getaddrinfo(target, 9, type=UDP)[0]
            with socket.socket(info[0], UDP) as one:
                one.connect(info[4])
                found.append(one.getsockname()[0].partition("%")[0])
        return " ".join(found)

    assert as_user(C, work) == as_user(ROOT, work)
    assert as_user(C, work).endswith(f"::1 127.0.0.1 {HOST4}")


@pytest.mark.parametrize("protocol", [socket.IPPROTO_MPTCP, 136], ids=["mptcp", "udplite"])
def test_other_protocols(guarded, protocol):
    kind = TCP if protocol == socket.IPPROTO_MPTCP else UDP

    def work(address):
        with socket.socket(socket.AF_INET6, kind, protocol) as one:
            one.bind((address, 0))
            return "ok"

    if as_user(B, lambda: work(B6)) == "EPROTONOSUPPORT":
        pytest.skip("this kernel does not have it")
    assert [as_user(B, lambda one=one: work(one)) for one in (A6, A_RANGE, B6)] == ["EPERM", "EPERM", "ok"]


def test_root_of_a_user_namespace_is_still_the_user(guarded):
    """It is in the node's network namespace, where its number in the first user namespace counts."""

    def work():
        LIBC.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else what is in its /proc is root's
        if LIBC.unshare(0x10000000):  # CLONE_NEWUSER
            return "no user namespaces"
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {B} 1")
        assert os.getuid() == 0
        return bind(A6)

    found = as_user(B, work)
    if found == "no user namespaces":
        pytest.skip("users may not make them here")
    assert found == "EPERM"


def test_a_program_that_is_roots_for_its_user_is_still_the_users(guarded):
    """What runs with the rights of root for a user, as a setuid program does, binds for that user."""

    def work():
        os.setresuid(B, 0, 0)
        return bind(A6)

    child = as_user(0, work)
    assert child == "EPERM"


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0", None])
@pytest.mark.parametrize("uid", [B, C, NOBODY])
def test_private_ipv4_refuses_at_once(guarded, uid, bound):
    """Though the kernel takes that address itself as the client's, and with it as where the refusal goes to."""
    with echoing(A, A4, TCP) as port, echoing(A, A4, UDP) as datagrams:
        assert as_user(uid, lambda: ask(A4, port, TCP, bound=bound)) == "ECONNREFUSED"
        assert as_user(uid, lambda: ask(A4, datagrams, UDP, bound=bound)) == "EPERM"
