"""A port of the node that partitions' users cannot reach, by both backends, with ownership and without."""

import socket
from ipaddress import ip_address

import pytest
from netplan_scene import BASE, HOST4, NOTHING, UID, as_user, connect, opened_by, read_counters, wanted

from netplan.errors import NetplanError
from netplan.model import ClosedPort

pytestmark = pytest.mark.usefixtures("backend")

A, B, NOBODY, ROOT = UID, UID + 1, 1234, 0
LAST = UID + 2
A6, B6, HOST6 = "2001:db8:1::2", "2001:db8:1::3", str(BASE.ip)
REFUSED = "ECONNREFUSED"


def listening(address):
    """A listener of root's, at a port of the kernel's choice."""
    six = ":" in address
    return socket.create_server((address, 0), family=socket.AF_INET6 if six else socket.AF_INET)


def closed(address, port, **more):
    return wanted(3, closed=ClosedPort(ip_address(address), port), **more)


@pytest.mark.parametrize("ownership", [True, False])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1", HOST4, HOST6])
def test_partitions_users_do_not_get_there(node, address, ownership):
    with listening(address) as one:
        port = one.getsockname()[1]
        with listening(address) as other:
            open_port = other.getsockname()[1]
            node.converge(closed(address, port, ownership=ownership))
            for uid in (A, B, LAST):
                assert as_user(uid, lambda: connect(None, address, port)) == REFUSED
                assert as_user(uid, lambda: connect(None, address, open_port)) == "ok"
            for uid in (NOBODY, ROOT):
                assert as_user(uid, lambda: connect(None, address, port)) == "ok"
    found = {one.uid: (one.rule, one.packets) for one in read_counters().refused}
    assert found == {A: ("metrics", 1), B: ("metrics", 1), LAST: ("metrics", 1)}


def test_not_by_another_name(node):
    """From an address of its own, as IPv6 that means IPv4, by the address that stands for all."""
    with listening("127.0.0.1") as one:
        port = one.getsockname()[1]
        node.converge(closed("127.0.0.1", port))
        for source, target in (
            ("10.0.0.2", "127.0.0.1"),
            ("127.0.0.9", "127.0.0.1"),
            (None, "0.0.0.0"),
            (None, "::ffff:127.0.0.1"),
        ):
            assert as_user(A, lambda s=source, t=target: connect(s, t, port)) == REFUSED
            assert as_user(NOBODY, lambda t=target: connect(None, t, port)) == "ok"


@pytest.mark.parametrize(
    ("anywhere", "targets"),
    [("0.0.0.0", ("127.0.0.1", "127.0.0.2", HOST4)), ("::", ("::1", HOST6))],
)
def test_everywhere(node, anywhere, targets):
    with listening(anywhere) as one:
        port = one.getsockname()[1]
        node.converge(closed(anywhere, port))
        for target in targets:
            assert as_user(A, lambda t=target: connect(None, t, port)) == REFUSED
            assert as_user(NOBODY, lambda t=target: connect(None, t, port)) == "ok"


def test_elsewhere_the_number_is_anybodys(node):
    """A partition's own service has the same port at its own address."""
    with listening("127.0.0.1") as one:
        port = one.getsockname()[1]
        node.converge(closed("127.0.0.1", port))
        with opened_by(A):
            own = socket.socket(socket.AF_INET6)
        with own:
            own.bind((A6, port))
            own.listen()
            for uid, source in ((A, A6), (B, B6)):
                assert as_user(uid, lambda source=source: connect(source, A6, port)) == "ok"


def test_what_is_open_already_ends(node):
    """Who connected before the rule came is not served on."""
    with listening("127.0.0.1") as one:
        port = one.getsockname()[1]
        node.converge(wanted(3))
        with opened_by(A):
            channel = socket.socket()
        with channel:
            channel.connect(("127.0.0.1", port))
            channel.settimeout(5)
            served, _ = one.accept()
            with served:
                node.converge(closed("127.0.0.1", port))
                with pytest.raises(OSError, match=r"reset|Broken pipe|not permitted|timed out"):  # noqa: PT012 - the first may pass
                    channel.send(b"GET")
                    channel.recv(1)


def test_another_port_changes_the_filter_and_nothing_else(node):
    node.converge(closed("127.0.0.1", 9816))
    before = read_counters().epoch
    assert [one.split("/")[0] for one in node.converge(closed("127.0.0.1", 9817))] == ["filter"]
    assert [one.split("/")[0] for one in node.converge(closed("::1", 9817))] == ["filter"]
    assert [one.split("/")[0] for one in node.converge(wanted(3))] == ["filter"]
    assert not node.plan(wanted(3))
    assert read_counters().epoch == before, "counters go on"
    node.converge(closed("127.0.0.1", 9816))
    node.converge(NOTHING)


def test_a_partition_more_is_kept_out_too(node):
    with listening("127.0.0.1") as one:
        port = one.getsockname()[1]
        where = ClosedPort(ip_address("127.0.0.1"), port)
        node.converge(wanted(1, closed=where))
        assert as_user(B, lambda: connect(None, "127.0.0.1", port)) == "ok", "nobody's yet"
        node.converge(wanted(2, closed=where))
        assert as_user(B, lambda: connect(None, "127.0.0.1", port)) == REFUSED
        node.converge(wanted(1, closed=where))
        assert as_user(A, lambda: connect(None, "127.0.0.1", port)) == REFUSED


@pytest.mark.parametrize("port", [0, 65536])
def test_no_port(port):
    with pytest.raises(NetplanError):
        ClosedPort(ip_address("127.0.0.1"), port)
