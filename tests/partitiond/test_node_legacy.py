"""A node with ``packet_filter = iptables``: applied, told of, metered, over to nftables and back, taken down."""

import os
import select
import socket
import subprocess
import threading
import time
from importlib.util import find_spec

import pytest
from json_schemas import parsed

from netplan.legacy_cases import OPEN_CASES
from partitiond.watch import Watch

pytestmark = pytest.mark.skipif(
    find_spec("iptc") is None, reason="python-iptables is not installed: tools/environment --with iptables"
)
COUNT, NOISE = 500, 50  # packets sent by a test, and neighbour discovery at most


def _send(uid, source, target):
    child = os.fork()
    if child == 0:
        try:
            os.setgid(uid)
            os.setuid(uid)
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one:
                one.bind((source, 0))
                for _ in range(COUNT):
                    one.sendto(b"x", (target, 9))
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def _rules():
    tool = "/usr/sbin/ip6tables-legacy-save"
    return subprocess.run([tool], check=True, capture_output=True, text=True).stdout.count("PARTITIOND")


def _nft():
    done = subprocess.run(["/usr/sbin/nft", "list", "tables"], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_a_legacy_node_goes_over_and_back_and_nothing_is_billed_twice(bridge, node_config, command):
    node = node_config(2, partitiond={"packet_filter": "iptables", "uid_base": 6000})

    def ask(*words):
        done = command(*words, "--json", "-c", node.path)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return parsed(done)

    def sent():
        ask("sync", "usage")
        (first, _) = ask("usage")["partitions"]
        return sum(one["packets_out"] for one in first["addresses"] if one["family"] == "ipv6")

    done = ask("apply")
    assert (done["failures"], done["left"]) == ([], [])
    assert _rules()
    assert _nft() == []
    status = ask("status")
    for name in OPEN_CASES:
        assert any(text.startswith(f"{name}: ") for text in status["node"]["open_cases"]), name
    source = status["partitions"][0]["ipv6"]

    expected = 0
    for backend in ("nftables", "iptables", None):
        _send(6000, source, bridge.gateway)
        expected += COUNT
        assert expected <= sent() <= expected + NOISE
        if backend:
            node.write(partitiond={"packet_filter": backend})
            assert ask("apply")["failures"] == []
            assert bool(_rules()) == (backend == "iptables")
            assert bool(_nft()) == (backend == "nftables")
            assert ask("plan")["operations"] == []
    node.write(partitiond={"packet_filter": "nftables"})
    ask("apply")
    assert not any(name in text for name in OPEN_CASES for text in ask("status")["node"]["open_cases"])
    node.write(partitiond={"packet_filter": "iptables"})
    ask("apply")
    done = command("teardown", "--purge", "-c", node.path)
    assert (done.returncode, _rules(), _nft()) == (0, 0, [])


def test_a_flush_wakes_the_watch_of_a_legacy_node(bridge, node_config):
    """Nobody tells of it."""
    node = node_config(1, partitiond={"packet_filter": "iptables", "uid_base": 6000})
    woken = threading.Event()
    watch = Watch(node.load(), woken.set)
    watch.start()
    try:
        subprocess.run(["/usr/sbin/iptables-legacy", "-N", "theirs"], check=True)
        assert woken.wait(20)
        assert list(watch.take()) == ["filter/iptables"]
        subprocess.run(["/usr/sbin/iptables-legacy", "-X", "theirs"], check=True)
        node.write(partitiond={"packet_filter": "nftables"})
        watch.attend(node.load())
        assert watch.take() == {}
    finally:
        watch.close()


def test_the_daemon_puts_flushed_rules_back_and_follows_the_other_backend(bridge, node_config, command):
    node = node_config(1, partitiond={"packet_filter": "iptables", "uid_base": 6000})
    daemon = command.start("run", "-c", node.path)
    try:
        said = ""
        while "is up with" not in said:
            assert select.select([daemon.stderr], [], [], 20)[0]
            said += daemon.stderr.readline()
        before = _rules()
        assert before
        began = time.monotonic()
        for tool in ("iptables", "ip6tables"):
            for option in ("-F", "-X"):
                subprocess.run([f"/usr/sbin/{tool}-legacy", "-w", option], check=True)
        while _rules() != before:
            assert time.monotonic() - began < 20
            time.sleep(0.05)
        print(f"flushed rules were back after {time.monotonic() - began:.2f} s")
        node.write(partitiond={"packet_filter": "nftables"})
        assert parsed(command("apply", "--json", "-c", node.path))["failures"] == []
        assert (_rules(), bool(_nft())) == (0, True)
        node.write(partitiond={"packet_filter": "iptables"})
        assert parsed(command("apply", "--json", "-c", node.path))["failures"] == []
        assert (_rules(), _nft()) == (before, [])
    finally:
        daemon.terminate()
        said += daemon.communicate(timeout=20)[1]
    assert "Traceback" not in said
    assert "filter/iptables" in said
