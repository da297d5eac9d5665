"""The daemon killed, ended, doubled: what it started runs on, and the next one finds everything as it should be."""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from life_node import ROOT, alive, named, parent, processes_of

from netplan import counters

PORT = "11211"
ITEMS = 8


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(partitions=4, software_interval=1, instances_interval=1, meter_interval=1)
    node.start()
    node.offer()
    shutil.copytree(ROOT / "partitiond" / "demo" / "release", node.base / "demo")
    node.url = str(node.base / "demo" / "software.cfg")
    node.supply(node.url)
    node.request("server", node.url, kind="server")
    server = published(node, "server")
    node.request(
        "client",
        node.url,
        kind="client",
        server_host=server["host"],
        server_port=server["port"],
        server_certificate=server["certificate"],
    )
    client = published(node, "client")
    node.request("server", node.url, kind="server", allow=client["certificate"])
    node.wait(lambda: tunnels(node) == {"up"}, "both tunnels to be up")
    return node


def published(node, title):
    def parameters():
        found = node.tree(title).get("connection_parameters") or {}
        return found if found.get("certificate") else None

    return node.wait(parameters, f"{title} to publish its certificate", 90)


def tunnels(node):
    found = node.cli("tunnel", "list").value["tunnels"]
    return (
        {one["state"] if one["allowed"] else "nobody allowed" for one in found} if len(found) == 2 else set()
    )


def converged(node):
    """Nothing to do, also for a second look; what is metered has every byte that the kernel counted."""
    node.wait(lambda: not node.plan(), "the plan to be empty", 20)
    node.cli("sync", "usage")
    kernel = {
        (one.partition, one.scope): one.bytes_in + one.bytes_out
        for one in counters.read_counters().traffic
        if one.family == "ipv6"
    }
    node.cli("sync", "usage")
    ledger = {}
    for item in node.cli("usage").value["partitions"]:
        for one in item["addresses"]:
            if one["family"] == "ipv6" and "/" not in one["address"]:
                key = (item["id"], one["scope"])
                ledger[key] = ledger.get(key, 0) + one["bytes_in"] + one["bytes_out"]
    missing = {
        key: (value, ledger.get(key, 0)) for key, value in kernel.items() if ledger.get(key, 0) < value
    }
    assert not missing, missing
    return sum(kernel.values())


def test_killed_during_traffic(node):
    client = node.partition(node.holder("client"))
    tenants = node.tenants()
    assert len(tenants) >= 1
    stunnels = named("stunnel")
    assert len(stunnels) == 2
    verb = ("memcached", client["ipv4"], PORT, str(ITEMS), "0.25")
    traffic = node.as_user(client, sys.executable, "-I", "-m", "partitiond.demo.traffic", *verb)
    node.wait(lambda: _established(PORT) or traffic.poll() is not None, "the traffic to begin")
    time.sleep(0.5)
    assert traffic.poll() is None
    node.kill()
    assert traffic.poll() is None, "the traffic ended before the daemon did"
    said, _ = traffic.communicate(timeout=60)
    assert traffic.returncode == 0, said
    assert f"{ITEMS} values set and read back" in said
    assert named("stunnel") == stunnels
    node.settled()
    node.start()
    node.settled()
    assert node.tenants() == tenants
    assert named("stunnel") == stunnels
    # each value went there and back, through the addresses of both partitions
    assert converged(node) > 2 * 2 * ITEMS * 900_000


def _established(port):
    wanted = f":{int(port):04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(row[2].endswith(wanted) and row[3] == "01" for row in rows)


def test_killed_during_a_software_build(node):
    fifo = node.base / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o644)
    url = node.release("tiny", build=f"cat {fifo}")
    tenants = node.tenants()
    node.supply(url)
    user = Path(node.base, "software").stat().st_uid
    waiting = lambda: [pid for pid, line in processes_of(user).items() if line.endswith(f"cat {fifo}")]  # noqa: E731
    (pid,) = node.wait(waiting, "the build to be busy")
    node.kill()
    node.start()
    node.settled()
    assert waiting() == [pid], "the build does not go on, or a second one was begun"
    os.close(os.open(fifo, os.O_WRONLY))
    node.wait((node.software(url) / ".completed").exists, "the software to be built")
    node.wait(lambda: not processes_of(user), "the build to be over")
    assert node.tenants() == tenants
    converged(node)


def _sleeping(user, seconds):
    return [pid for pid, line in processes_of(user).items() if line.endswith(f"sleep {seconds}")]


def only_its_programs(node, name):
    """Wait for the living daemon's buildout, which may still be at work on what is there already; nothing else is left."""

    def started():
        return {process["pid"] for process in node.partition(name)["processes"] if process["pid"]}

    uid = node.partition(name)["user"]["uid"]
    node.wait(lambda: len(started()) == 2, "its two programs")
    orphans = {}
    for pid, line in processes_of(uid).items():
        with contextlib.suppress(FileNotFoundError):  # it ended
            if parent(pid) == 1:
                orphans[pid] = line
    assert not orphans
    node.wait(lambda: set(processes_of(uid)) == started(), "its programs alone")


def test_killed_during_an_instance_buildout(node):
    url = str(node.base / "tiny" / "software.cfg")
    tenants = node.tenants()
    node.request("tiny", url, text="one", sleep="602")
    name = node.holder("tiny")
    uid = node.partition(name)["user"]["uid"]
    (pid,) = node.wait(lambda: _sleeping(uid, "602"), "the buildout to be busy")
    node.kill()
    node.request("tiny", url, text="two", sleep="1")
    node.start()
    item = node.wait_for_state(name, "started")
    assert node.wait(lambda: node.page(item), "the instance to answer") == "two"
    assert not alive(pid), "a process of the buildout that was cut off goes on beside the new one"
    only_its_programs(node, name)
    assert tenants.items() <= node.tenants().items()
    converged(node)


@pytest.mark.full  # test_life_churn.py does so for a minute
def test_killed_at_any_moment_of_a_reconfiguration(node):
    """Also the moments around the buildout: each time the next daemon brings about what is wanted, once."""
    url = str(node.base / "tiny" / "software.cfg")
    name = node.holder("tiny")
    for number, delay in enumerate((0.4, 0.9, 1.4)):
        text = f"after {number}"
        node.request("tiny", url, text=text, state=("stopped", "started", "started")[number])
        time.sleep(delay)
        node.kill()
        node.start()
        node.wait_for_state(name, ("stopped", "started", "started")[number])
    item = node.partition(name)
    assert node.wait(lambda: node.page(item), "the instance to answer") == text
    only_its_programs(node, name)
    converged(node)


def test_sigterm_ends_the_daemon_and_nothing_else(node):
    tenants = node.tenants()
    node.request("tiny", str(node.base / "tiny" / "software.cfg"), text="cut", sleep="603")
    uid = node.partition(node.holder("tiny"))["user"]["uid"]
    (pid,) = node.wait(lambda: _sleeping(uid, "603"), "the buildout to be busy")
    assert node.terminate() < 15
    assert node.tenants() == tenants
    assert not alive(pid), "a buildout goes on without anybody who waits for it"
    assert not node.socket.exists()
    node.settled()
    # cut short by our own end: no failure of the instance, which is configured by the next daemon
    assert node.partition(node.holder("tiny"))["state"] == "started"
    node.request("tiny", str(node.base / "tiny" / "software.cfg"), text="whole")
    node.start()
    item = node.partition(node.holder("tiny"))
    node.wait(lambda: node.page(item) == "whole", "the instance to be configured")


def test_supervisord_killed(node):
    item = node.partition(node.holder("tiny"))
    (supervisord,) = {parent(one["pid"]) for one in item["processes"]}
    os.kill(supervisord, 9)
    node.wait(lambda: not alive(supervisord), "supervisord to be gone")
    # the daemon's own sweep may come first
    assert node.cli("apply").value["left"] == []
    node.settled()
    item = node.partition(item["id"])
    assert {process["state"] for process in item["processes"]} == {"RUNNING"}
    assert set(processes_of(item["user"]["uid"])) == {process["pid"] for process in item["processes"]}
    node.wait(lambda: tunnels(node) == {"up"}, "both tunnels to be up again")
    assert len(named("stunnel")) == 2
    assert len(named("memcached")) == 1
