"""``metrics_listen``: who is served there, with the packet filter and without, and what happens where it cannot listen."""

import ipaddress
import pwd
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from metrics_scene import free_port, get, listens, until

from netplan import counters
from netplan.model import ClosedPort
from partitiond import converge, metrics_listener
from partitiond.context import Context
from partitiond.subordinate import SubordinateUids

LOOPBACK = ipaddress.ip_address("127.0.0.1")


@pytest.fixture(scope="module")
def scene(module_node_config):
    node = module_node_config
    port = free_port()
    node.write(partitiond={"metrics_listen": f"127.0.0.1:{port}"})
    context = Context.of(node.load())
    outcome = converge.apply(context)
    assert not outcome.failures
    yield SimpleNamespace(node=node, context=context, port=port, partitions=context.node.partitions)
    context.meters.close()


@pytest.fixture
def listener(scene, tmp_path):
    name = scene.context.config.software_user
    software = (name, pwd.getpwnam(name).pw_uid)
    first, second = scene.partitions[:2]
    subuid = tmp_path / "subuid"
    subuid.write_text(
        f"{first.user}:700000:65536\n{second.uid}:800000:10\nsomebody:900000:10\n:x:\n\n{name}:5:x\n"
    )
    known = SubordinateUids(subuid)
    judge = metrics_listener.Judge(lambda: scene.context.node, lambda: software, known)
    made = metrics_listener.MetricsListener(lambda: b"# EOF\n", judge)
    made.start()
    yield made
    made.close()


def serve(listener, where):
    listener.attend(where)
    until(lambda: listens(str(where.address), where.port), "the port to be open")


def test_who_is_served(scene, listener):
    serve(listener, ClosedPort(LOOPBACK, scene.port))
    for uid in (0, 4999):
        assert get(uid, "127.0.0.1", scene.port) == 200
    assert get(0, "127.0.0.1", scene.port, "/1/status") == 404
    for item in scene.partitions:
        assert get(item.uid, "127.0.0.1", scene.port) == "ConnectionRefusedError"
    reading = counters.read_counters()
    assert {one.uid for one in reading.refused if one.rule == "metrics"} >= {
        item.uid for item in scene.partitions
    }


def test_the_second_wall(scene, listener):
    """Where the rule is not there, the listener itself asks who connects."""
    port = free_port()  # for which there is no rule
    serve(listener, ClosedPort(LOOPBACK, port))
    software = pwd.getpwnam(scene.context.config.software_user).pw_uid
    for uid in (*(item.uid for item in scene.partitions), software):
        assert get(uid, "127.0.0.1", port) == 403
    for uid in (4999, 900000, 800010, 699999):
        assert get(uid, "127.0.0.1", port) == 200
    for uid in (700000, 765535, 800009):  # of whoever is in a user namespace of a partition's user
        assert get(uid, "127.0.0.1", port) == 403


def test_addresses_of_partitions_are_refused_whoever_has_them(scene, listener):
    """What comes from a partition's address comes from its user or its guest; root can be neither here, so it tries."""
    item = scene.partitions[0]
    port = free_port("::1")
    serve(listener, ClosedPort(ipaddress.ip_address("::1"), port))
    assert get(0, "::1", port) == 200
    endpoint = (item.ipv6, 4711)
    judge = metrics_listener._is_a_partitions
    node = scene.context.node
    assert judge(node, item.ipv6)
    assert judge(node, item.network.ipv6_range[7])
    assert judge(node, item.ipv4)
    assert not judge(node, ipaddress.ip_address("2001:db8:ffff::1"))
    assert not judge(node, LOOPBACK)
    assert not judge(None, endpoint[0])


def test_a_port_that_is_taken(scene, listener, monkeypatch, caplog):
    monkeypatch.setattr(metrics_listener, "_AGAIN", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listener.attend(ClosedPort(LOOPBACK, port))
        until(lambda: listener.trouble, "it to be noticed")
        assert (
            listener.trouble == f"metrics_listen: nothing listens at 127.0.0.1:{port}: Address already in use"
        )
        time.sleep(0.3)
    until(lambda: not listener.trouble, "the port to be taken over")
    assert get(0, "127.0.0.1", port) == 200
    assert sum("[metrics.listen]" in one.message for one in caplog.records) == 1, "said once"
    listener.attend(ClosedPort(ipaddress.ip_address("192.0.2.77"), port))
    until(lambda: "Cannot assign" in listener.trouble, "the address to be missed")
    assert not listens("127.0.0.1", port)
    listener.attend(None)
    until(lambda: not listener.trouble, "it to be given up")


def test_it_goes_elsewhere(scene, listener):
    first, second = free_port(), free_port()
    serve(listener, ClosedPort(LOOPBACK, first))
    serve(listener, ClosedPort(LOOPBACK, second))
    assert not listens("127.0.0.1", first)
    for _ in range(30):
        listener.attend(ClosedPort(LOOPBACK, first))
        listener.attend(ClosedPort(LOOPBACK, second))
    until(lambda: listens("127.0.0.1", second), "the last to be served")
    assert not listens("127.0.0.1", first)


def test_many_connections_are_bounded(scene, listener):
    port = free_port()
    serve(listener, ClosedPort(LOOPBACK, port))
    before = threading.active_count()
    found = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    try:
        time.sleep(0.2)
        assert threading.active_count() - before <= 8
        assert found[-1].recv(100).split()[1] == b"503"
        assert get(4999, "127.0.0.1", port) == 200, "places are of each user"
    finally:
        for one in found:
            one.close()
    until(lambda: get(0, "127.0.0.1", port) == 200, "room")
