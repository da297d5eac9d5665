"""A master that is away is normal: partitions start without it after a reboot, nothing changes, and reports wait for it."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from life_front import always
from life_node import alive


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(software_interval=1, instances_interval=1, meter_interval=5)
    node.start()
    node.offer()
    url = node.release()
    node.supply(url)
    for title in ("one", "two"):
        node.request(title, url, text=title)
    for title in ("one", "two"):
        node.wait_for_state(node.holder(title), "started")
    node.url = url
    return node


def events(node, name):
    lines = (node.base / "log" / "events.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["event"] == name]


def cases(node):
    return node.cli("status").value["node"]["open_cases"]


def reboot(node):
    """What a boot leaves: no process of ours, nothing in /run, another boot id; data and configuration stay."""
    node.kill()
    root = int((node.base / "instance" / "var" / "run" / "supervisord.pid").read_text())
    below = [root, *children(root)]
    assert len(below) >= 3
    for pid in below:
        os.kill(pid, signal.SIGKILL)
    node.wait(lambda: not any(map(alive, below)), "everything to be gone")
    for name in ("sv.sock", "supervisord.socket"):
        (node.base / "instance" / name).unlink(missing_ok=True)
    record = node.base / "state" / "boot.json"
    assert (
        json.loads(record.read_text())["boot_id"]
        == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    )
    record.write_text(json.dumps({"boot_id": "another"}))


def children(pid):
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread or process of a moment
            found += map(int, path.read_text().split())
    return [*found, *(below for one in found for below in children(one))]


def state_files(node):
    return {
        path: path.read_bytes()
        for kind in ("instances", "software", "outbox")
        for path in (node.base / "state" / kind).glob("*")
    }


def test_days_without_the_master_change_nothing(node):
    first = node.holder("one")
    before, files, runs = node.tenants(), state_files(node), node.buildouts(first)
    node.front.close()
    try:
        node.wait(lambda: events(node, "master.lost"), "the loss to be told")
        node.cli("sync", "instances", expect=1)
        node.cli("sync", "software", expect=1)
        assert node.tenants() == before
        assert state_files(node) == files
        node.settled()
    finally:
        node.front.open()
    node.cli("sync", "instances")
    assert len(events(node, "master.lost")) == len(events(node, "master.back")) == 1
    assert "after" in events(node, "master.back")[0]["message"]
    assert node.buildouts(first) == runs


def test_a_reboot_without_the_master(node):
    before = len(node.front.seen)
    node.front.close()
    try:
        reboot(node)
        assert not node.tenants()
        node.start()
        started = {name for name, state in node.states().items() if state == "started"}
        assert len(started) == 2
        node.wait(lambda: all(node.page(node.partition(name)) for name in started), "the services to answer")
        assert any("1 reports wait for the master" in case for case in cases(node))
        # a daemon that is restarted meanwhile does not make it two
        node.terminate()
        node.start()
        assert any("1 reports wait for the master" in case for case in cases(node))
    finally:
        node.front.open()
    node.cli("sync", "instances")
    assert node.front.count("computerBang", before) == 1
    node.terminate()
    node.start()
    seen = len(node.front.seen)
    node.wait(lambda: node.front.count("getFullComputerInformation", seen) >= 2, "a few passes", 30)
    assert node.front.count("computerBang", before) == 1
    ((told,)) = [one for one in node.front.seen[before:] if one.endpoint == "computerBang"]
    assert told.fields["message"].startswith("Reboot at ")
    assert len(events(node, "node.rebooted")) == 1
    assert not any("reports wait" in case for case in cases(node))


def test_reports_wait_for_a_master_that_takes_none(node):
    """It gives its wishes, and is down for every report about them."""
    name = node.holder("one")
    before = len(node.front.seen)
    for endpoint in ("startedComputerPartition", "stoppedComputerPartition", "softwareInstanceError"):
        node.front.answers[endpoint] = always(b"", 503)
    try:
        node.request("one", node.url, state="stopped", text="one")
        node.wait_for_state(name, "stopped")
        node.request("two", node.url, text="again")
        node.wait(lambda: any("2 reports wait" in case for case in cases(node)), "both reports to wait")
        node.kill()
        node.start()
        node.request("one", node.url, state="started", text="one")
        node.wait_for_state(name, "started")
        node.wait(lambda: any("2 reports wait" in case for case in cases(node)), "the newer to be kept")
    finally:
        node.front.answers.clear()
    taken = len(node.front.seen)
    node.wait(lambda: not any("reports wait" in case for case in cases(node)), "them to be told", 30)
    told = [
        (one.endpoint, one.fields["computer_partition_id"])
        for one in node.front.seen[taken:]
        if one.endpoint.endswith("ComputerPartition") and one.method == "POST"
    ]
    other = node.holder("two")
    assert told[:2] == [("startedComputerPartition", other), ("startedComputerPartition", name)]
    assert not node.front.count("softwareInstanceError", before)
