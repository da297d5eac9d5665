"""One instance through all that can become of it, asked for by the stock clients of a standard master.

The tests follow each other: each goes on from where the one before has left the node.
"""

import json
from pathlib import Path

import pytest
from life_front import WISHES
from life_node import COMPUTER, alive, parent, processes_of

REPORTS = "startedComputerPartition", "stoppedComputerPartition"


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(software_interval=1, instances_interval=1, meter_interval=2)
    assert node.plan(), "a node that does not exist yet needs something"
    node.start()
    node.offer()
    node.settled()
    return node


@pytest.fixture(scope="module")
def url(node):
    return node.release()


def test_supplied_software_is_built_and_reported(node, url):
    node.supply(url)
    node.wait(lambda: node.front.count("availableSoftwareRelease"), "the software to be reported available")
    reports = [one for one in node.front.seen if one.endpoint.endswith("SoftwareRelease")]
    assert [one.endpoint for one in reports] == ["buildingSoftwareRelease", "availableSoftwareRelease"]
    assert {(one.fields["url"], one.fields["computer_id"]) for one in reports} == {(url, COMPUTER)}
    software = node.software(url)
    assert (software / "instance.cfg").is_file()
    assert software.owner() == "slapsoft"
    assert not processes_of(software.stat().st_uid)


def test_requested_instance_is_started(node, url):
    node.request("web", url, text="first")
    name = node.holder("web")
    item = node.wait_for_state(name, "started")
    assert item["software_release"] == url
    assert {process["name"]: process["state"] for process in item["processes"]} == {
        "http-on-watch": "RUNNING",
        "sleeper": "RUNNING",
    }
    running = processes_of(item["user"]["uid"])
    assert {process["pid"] for process in item["processes"]} == set(running), running
    supervisord = {parent(pid) for pid in running}
    assert len(supervisord) == 1
    assert supervisord != {node.daemon.pid}
    assert parent(*supervisord) == 1, "supervisord is a child of somebody who may end"
    assert node.wait(lambda: node.page(item), "the instance to answer") == "first"
    node.wait(lambda: node.front.count("startedComputerPartition"), "the master to be told")
    assert node.wishes()[name].instance_guid == item["instance_guid"]
    assert node.tree("web")["compute_partition_id"] == name
    node.settled()
    stat = Path(item["path"]).stat()
    assert (stat.st_uid, stat.st_mode & 0o777) == (item["user"]["uid"], 0o750)
    place = node.base / "run" / "namespaces" / name
    assert {Path(f"/proc/{pid}/ns/mnt").stat().st_ino for pid in running} == {place.stat().st_ino}
    # where its buildout has run, too: what that leaves there is no other's
    buildout = Path(f"/proc/{next(iter(running))}/root/tmp/of-the-buildout")
    assert buildout.read_text() == name
    assert not Path("/tmp/of-the-buildout").exists()


def test_stopped_and_started_again(node, url):
    name = node.holder("web")
    before = node.partition(name)
    node.request("web", url, state="stopped", text="first")
    item = node.wait_for_state(name, "stopped")
    assert not processes_of(item["user"]["uid"])
    node.wait(lambda: node.front.count("stoppedComputerPartition"), "the master to be told")
    node.settled()
    node.cli("apply")
    assert not processes_of(item["user"]["uid"])
    # without --state the stock client asks for what was asked before
    node.request("web", url, state="started", text="first")
    item = node.wait_for_state(name, "started")
    assert not {one["pid"] for one in before["processes"]} & {one["pid"] for one in item["processes"]}
    assert node.wait(lambda: node.page(item), "the instance to answer") == "first"


def test_other_parameters_reconfigure(node, url):
    name = node.holder("web")
    item, runs, stamp = node.partition(name), node.buildouts(name), node.wishes()[name].timestamp
    node.request("web", url, text="second & <last>")
    node.wait(lambda: node.page(item) == "second & <last>", "the new parameter to take effect")
    node.wait_for_state(name, "started")
    assert node.wishes()[name].timestamp != stamp
    assert node.buildouts(name) == runs + 1
    assert node.partition(name)["processes"] == item["processes"], "what did not change was started again"


def test_nothing_happens_when_nothing_changed(node):
    name = node.holder("web")
    told = lambda: sum(node.front.count(one) for one in REPORTS)  # noqa: E731 - a word for it
    node.wait(lambda: told() == node.buildouts(name), "every state to be told")
    item, runs, since = node.partition(name), node.buildouts(name), len(node.front.seen)
    node.wait(lambda: node.front.count(WISHES, since) >= 6, "a few passes of both lanes")
    seen = node.front.seen[since:]
    assert {(one.method, one.endpoint) for one in seen} == {("GET", WISHES)}, seen
    assert node.buildouts(name) == runs
    assert node.partition(name) == item
    node.settled()


def test_destroyed_partition_is_emptied_and_free_again(node, url):
    name = node.holder("web")
    item = node.partition(name)
    home, identity = Path(item["path"]), node.base / "state" / "tunnels" / name
    (home / "srv" / "left by the tenant").mkdir()
    old = {path.name: path.read_bytes() for path in identity.iterdir() if path.is_file()}
    assert old, "there is an identity for the tunnels"
    node.request("web", url, state="destroyed")
    node.wait(lambda: node.wishes()[name].free, "the master's partition to be free")
    node.wait_for_state(name, "free")
    assert not processes_of(item["user"]["uid"])
    node.wait(lambda: not node.plan(), "the node to be whole again")
    assert {path.name for path in home.iterdir()} == {".slapos-resource"}
    assert list((node.base / "log" / name).iterdir()) == []
    new = {path.name: path.read_bytes() for path in identity.iterdir() if path.is_file()}
    assert set(new) == set(old)
    assert not set(new.values()) & set(old.values()), "the next tenant has the identity of the last one"
    assert node.partition(name)["instance_guid"] is None
    assert not (node.base / "run" / "namespaces" / name).exists()


def test_free_partition_is_given_again(node, url):
    item = next(iter(node.partitions().values()))
    node.request("next", url, text="third")
    name = node.holder("next")
    assert name == item["id"]
    assert node.wait(lambda: node.page(item), "the next instance to answer") == "third"
    node.wait_for_state(name, "started")


def test_software_in_use_stays_until_its_last_instance_is_gone(node, url):
    name, software = node.holder("next"), node.software(url)
    node.slapos("remove", url, COMPUTER)
    since = len(node.front.seen)
    node.wait(lambda: node.front.count(WISHES, since) >= 6, "a few passes of both lanes")
    pids = [one["pid"] for one in node.partition(name)["processes"]]
    assert software.is_dir()
    assert all(alive(pid) for pid in pids)
    events = [json.loads(line) for line in (node.base / "log" / "events.jsonl").read_text().splitlines()]
    (kept,) = [one for one in events if one["event"] == "software.kept"]
    assert kept["partitions"] == [name], "it is told once, with why"
    (shown,) = node.cli("status").value["software"]
    assert (shown["state"], shown["kept_for"]) == ("available", [name])
    node.request("next", url, state="destroyed")
    node.wait(lambda: not software.exists(), "the software to be removed")
    node.wait(lambda: node.front.count("destroyedSoftwareRelease"), "the master to be told")
    assert set(node.states().values()) == {"free"}
    node.settled()
