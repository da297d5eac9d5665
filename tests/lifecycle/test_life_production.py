"""One instance's whole life with a master as production's: TLS, client certificates, access status, retention.

The tests follow each other: each goes on from where the one before has left the node.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from life_node import COMPUTER, processes_of
from life_production import ProductionNode

NAME, KEPT = "slappart0", "slappart1"
DELAY = 2  # days that one is kept


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(
        ProductionNode, partitions=2, software_interval=1, instances_interval=1, report_interval=1
    )
    (node.base / "said").mkdir()
    (node.base / "said").chmod(0o777)
    node.start()
    node.offer()
    return node


@pytest.fixture(scope="module")
def url(node):
    return node.release()


@pytest.fixture(autouse=True)
def nothing_that_a_standard_node_would_not_send(node):
    yield
    assert node.master.violations == []


def parameters(node, text, **more):
    """What the instance is asked for: its farewell is told in a place that stays."""
    said = node.base / "said"
    return {
        "text": text,
        "prerm": f"echo prerm of $(id -un) >> {said}/{NAME}",
        "destroy": f"echo destroy of $(id -un) >> {said}/{NAME}",
        **more,
    }


def test_supplied_and_built(node, url):
    node.master.supply(url)
    node.told(url, "building", "available")


def test_started_with_its_own_certificate(node, url):
    instance = node.master.want(
        NAME,
        url,
        parameters=parameters(node, "first"),
        filter={"retention_delay": str(DELAY)},
    )
    node.told(NAME, "started")
    item = node.wait_for_state(NAME, "started")
    assert item["instance_guid"] == instance.guid
    assert node.wait(lambda: node.page(item), "the instance to answer") == "first"
    assert instance.access_status == "#access Instance correctly started"
    by_itself = [one for one in node.master.asked if one.endpoint == "registerComputerPartition"]
    assert {one.who for one in by_itself} == {instance.guid}
    assert {one.who for one in node.master.asked} == {instance.guid, COMPUTER}
    for kind, text in zip(("crt", "key"), node.pair(NAME), strict=True):
        path = node.base / "pairs" / f"{NAME}.{kind}"
        found = path.stat()
        assert (found.st_uid, found.st_mode & 0o777) == (item["user"]["uid"], 0o400)
        assert path.read_text() == text
    stamp = node.base / "instance" / NAME / ".timestamp"
    assert stamp.read_text() == str(instance.timestamp)
    assert (stamp.stat().st_uid, stamp.stat().st_mode & 0o777) == (0, 0o644)
    assert float(node.mark(NAME, ".slapos-retention-lock-delay")) == DELAY
    assert node.mark(NAME, ".slapos-retention-lock-date") is None
    node.settled()


def test_what_the_master_takes_for_failed_is_told_again(node):
    runs = node.buildouts(NAME)
    node.master.books.in_partition(NAME).access_status = "#error while instanciating: of old"
    before = node.words(NAME).count("started")
    node.wait(lambda: node.words(NAME).count("started") > before, "the state to be told again")
    since = len(node.master.asked)
    node.wait(lambda: len(node.master.asked) > since + 3, "a few passes")
    assert node.words(NAME).count("started") == before + 1
    assert node.buildouts(NAME) == runs


def test_a_failure_is_told_once_and_what_runs_goes_on(node):
    item = node.partition(NAME)
    node.master.want(NAME, parameters=parameters(node, "first", fail="of the test"))
    node.told(NAME, "error")
    assert "of the test" in [text for about, word, text in node.master.reports if word == "error"][-1]
    log = node.mark(NAME, f".slapgrid-{NAME}-error.log")
    assert "of the test" in log
    assert node.mark(NAME, ".timestamp") is None
    since = len(node.master.asked)
    node.wait(lambda: len(node.master.asked) > since + 3, "a few passes")
    assert node.words(NAME).count("error") == 1
    assert node.wait_for_state(NAME, "failed")["processes"] == item["processes"]
    wanted = node.master.want(NAME, parameters=parameters(node, "second"))
    node.told(NAME, "error", "started")
    assert node.mark(NAME, f".slapgrid-{NAME}-error.log") is None
    assert node.mark(NAME, ".timestamp") == str(wanted.timestamp)


def test_a_promise_that_fails_fails_the_instance_and_not_what_runs(node):
    item = node.partition(NAME)
    node.master.want(NAME, parameters=parameters(node, "second", promise="echo no luck; exit 1"))
    node.told(NAME, "error")
    assert "no luck" in node.master.reports[-1][2]
    assert node.wait_for_state(NAME, "failed")["processes"] == item["processes"]
    node.master.want(NAME, parameters=parameters(node, "second"))
    node.told(NAME, "error", "started")


def test_a_watched_program_that_ends_is_banged_for_and_comes_back(node):
    item = node.wait_for_state(NAME, "started")
    pid = next(one["pid"] for one in item["processes"] if one["name"] == "http-on-watch")
    stamp = node.master.books.in_partition(NAME).timestamp
    os.kill(pid, signal.SIGKILL)
    node.told(NAME, "bang", "started")
    message = next(text for about, word, text in node.master.reports if word == "bang")
    assert message == f"http-on-watch in partition {NAME} encountered a problem"
    assert node.master.books.in_partition(NAME).timestamp != stamp
    item = node.wait_for_state(NAME, "started")
    assert node.wait(lambda: node.page(item), "the instance to answer again") == "second"


def test_a_master_that_is_away_keeps_no_program_down(node):
    item = node.partition(NAME)
    pid = next(one["pid"] for one in item["processes"] if one["name"] == "http-on-watch")
    banged = node.words(NAME).count("bang")
    node.master.down()
    try:
        os.kill(pid, signal.SIGKILL)
        assert node.wait(lambda: node.page(item), "the instance to answer again") == "second"
    finally:
        node.master.up()
    node.wait(lambda: node.partition(NAME)["state"] == "started", "the instance to be in order")
    assert node.words(NAME).count("bang") == banged


def test_stopped(node):
    node.master.want(NAME, state="stopped")
    node.told(NAME, "stopped")
    item = node.wait_for_state(NAME, "stopped")
    assert not processes_of(item["user"]["uid"])
    assert node.master.books.in_partition(NAME).access_status == "#access Instance correctly stopped"
    node.master.want(NAME, state="started")
    node.told(NAME, "stopped", "started")


def test_destroyed_it_is_stopped_at_once_and_kept_as_agreed(node):
    guid = node.master.books.in_partition(NAME).guid
    # what it was deployed with holds, whatever is asked for now
    node.master.want(NAME, state="destroyed", filter={"retention_delay": "0"})
    node.told(NAME, "started", "stopped")
    until = float(node.mark(NAME, ".slapos-retention-lock-date"))
    assert until == pytest.approx(time.time() + DELAY * 86400, abs=600)
    item = node.wait_for_state(NAME, "destroying")
    assert not processes_of(item["user"]["uid"])
    cases = node.cli("status").value["node"]["open_cases"]
    assert [one for one in cases if one.startswith(f"{NAME} is to be destroyed and kept until")]
    # by hand nobody gets around it either
    node.cli("sync", "report", "--force")
    assert node.partition(NAME)["state"] == "destroying"
    assert (Path(item["path"]) / "srv" / "index.html").exists()
    assert guid in node.master.books.instances
    node.let_time_pass(NAME)
    node.wait(lambda: node.words(NAME)[-1] == "destroyed", "the end to be told")
    assert guid not in node.master.books.instances
    node.wait_for_state(NAME, "free")
    user = item["user"]["name"]
    assert (node.base / "said" / NAME).read_text() == f"prerm of {user}\ndestroy of {user}\n"
    assert [path.name for path in (node.base / "pairs").iterdir() if NAME in path.name] == []
    node.wait(lambda: not node.plan(), "the node to be whole again")
    assert {path.name for path in Path(item["path"]).iterdir()} == {".slapos-resource"}


def test_wanted_back_before_its_time_it_is_as_it_was(node, url):
    instance = node.master.want(
        KEPT, url, parameters={"text": "mine"}, filter={"retention_delay": 30}, software_type="default"
    )
    node.told(KEPT, "started")
    item = node.wait_for_state(KEPT, "started")
    (Path(item["path"]) / "srv" / "data").write_text("of days")
    node.master.want(KEPT, state="destroyed")
    node.told(KEPT, "started", "stopped")
    node.wait_for_state(KEPT, "destroying")
    node.master.want(KEPT, state="started")
    node.told(KEPT, "stopped", "started")
    item = node.wait_for_state(KEPT, "started")
    assert item["instance_guid"] == instance.guid
    assert (Path(item["path"]) / "srv" / "data").read_text() == "of days"
    assert node.wait(lambda: node.page(item), "the instance to answer") == "mine"
