"""The whole life cycle without a daemon: ``partitiond sync`` does each pass, the same code as in the daemon."""

from pathlib import Path

import pytest
from life_front import WISHES, all_free, always
from life_node import COMPUTER, processes_of


@pytest.fixture(scope="module")
def node(make_node):
    return make_node(partitions=2)


@pytest.fixture(scope="module")
def url(node):
    return node.release()


def quiet(node, lane):
    """A pass with nothing to do: exit 0, nothing done, and the master is asked exactly once."""
    since = len(node.front.seen)
    said = node.cli("sync", lane).value
    assert (said["done"], said["failures"]) == ([], [])
    assert [(one.method, one.endpoint) for one in node.front.seen[since:]] == [("GET", WISHES)]


def test_up(node):
    assert node.plan()
    assert node.cli("apply").value["done"]
    assert node.cli("apply").value["done"] == 0
    node.settled()
    (said,) = node.cli("sync", "capacity").value["done"]
    assert "2 partitions" in said
    assert len(node.wishes()) == 2


def test_software(node, url):
    quiet(node, "software")
    node.supply(url)
    (said,) = node.cli("sync", "software").value["done"]
    assert said == f"{url}: available"
    assert (node.software(url) / ".completed").is_file()
    quiet(node, "software")


def test_instances(node, url):
    quiet(node, "instances")
    node.request("one", url, text="one")
    node.request("two", url, text="two")
    names = [node.holder("one"), node.holder("two")]
    assert node.cli("sync", "instances").value["done"] == [f"{name}: started" for name in sorted(names)]
    for title, name in zip(("one", "two"), names, strict=True):
        item = node.partition(name)
        assert item["state"] == "started"
        assert node.wait(lambda item=item: node.page(item), f"{title} to answer") == title
    before = node.tenants()
    quiet(node, "instances")
    said = node.cli("sync", "instances", "--force").value["done"]
    assert len(said) == 2, "--force configures what is not due"
    assert node.tenants() == before
    node.request("two", url, text="fails", fail="on purpose")
    (failure,) = node.cli("sync", "instances", expect=3).value["failures"]
    assert (failure["resource"], failure["code"]) == (names[1], "instance.build")
    assert "on purpose" in failure["message"]
    assert node.partition(names[1])["state"] == "failed"
    node.request("two", url, text="two")
    assert node.cli("sync", "instances").value["done"] == [f"{names[1]}: started"]
    node.request("two", url, state="stopped", text="two")
    assert node.cli("sync", "instances").value["done"] == [f"{names[1]}: stopped"]
    assert not processes_of(node.partition(names[1])["user"]["uid"])
    node.request("two", url, state="started", text="two")
    node.cli("sync", "instances")
    assert node.states() == dict.fromkeys(names, "started")


def test_force_stop_parks_what_the_master_wants_started(node, url):
    """As with slapgrid: configured, stopped, and the master is told nothing; and it comes back when the key goes."""
    names = sorted((node.holder("one"), node.holder("two")))
    node.request("two", url, text="fails", fail="on purpose")
    node.cli("sync", "instances", expect=3)
    two = node.partition(node.holder("two"))
    assert processes_of(two["user"]["uid"]), "what ran goes on"
    text, since = node.configuration.read_text(), len(node.front.seen)
    node.configuration.write_text(text.replace("[slapos]", "[slapos]\nforce_stop = true"))
    done = node.cli("sync", "instances", expect=3).value
    assert done["done"] == [f"{node.holder('one')}: stopped"]
    assert [one["resource"] for one in done["failures"]] == [two["id"]], "although its pause is not over"
    assert not node.tenants()
    assert not [name for name in names if Path(node.partition(name)["path"], ".timestamp").exists()]
    node.cli("apply")
    node.request("two", url, state="started", text="changed")
    assert node.cli("sync", "instances").value["done"] == [f"{node.holder('two')}: stopped"]
    assert not node.tenants()
    quiet(node, "instances")
    told = [one.endpoint for one in node.front.seen[since:]]
    assert not {"startedComputerPartition", "stoppedComputerPartition"}.intersection(told)
    assert any("force_stop" in one for one in node.cli("status").value["node"]["open_cases"])
    node.request("two", url, state="started", text="two")
    node.configuration.write_text(text)
    assert node.cli("sync", "instances").value["done"] == [f"{name}: started" for name in names]
    quiet(node, "instances")
    assert node.states() == dict.fromkeys(names, "started")


def test_usage(node):
    item = node.partition(node.holder("one"))
    node.cli("sync", "usage")
    for _ in range(3):
        assert node.page(item) == "one"
    node.cli("sync", "usage")
    rows = {one["id"]: one for one in node.cli("usage").value["partitions"]}
    local = [one for one in rows[item["id"]]["addresses"] if one["address"] == item["ipv4"]]
    assert sum(one["bytes_in"] + one["bytes_out"] for one in local) > 1000, rows
    assert rows[item["id"]]["instance_guid"] == item["instance_guid"]


def test_bad_answers(node):
    before, front = node.tenants(), node.front
    front.answers["*"] = always(b"", 503)
    for lane in ("software", "instances", "capacity"):
        assert node.cli("sync", lane, expect=1).value["error"]["code"] == "slap.unavailable"
    front.answers.clear()
    assert node.tenants() == before
    node.settled()


def test_destroyed(node, url):
    """By word; what an answer lists as free that comes twice is the operator's to end."""
    name = node.holder("one")
    node.request("one", url, state="destroyed")
    assert node.cli("sync", "instances").value["done"] == [f"{name}: stopped, to be destroyed"]
    item = node.partition(name)
    assert item["state"] == "destroying"
    assert not processes_of(item["user"]["uid"])
    quiet(node, "instances")
    node.front.answers["destroyedComputerPartition"] = always(b"still has children")
    (failure,) = node.cli("sync", "report", expect=3).value["failures"]
    assert (failure["resource"], failure["code"]) == (name, "slap.destroy_refused")
    node.front.answers.clear()
    assert node.cli("sync", "report").value["done"] == [f"{name}: destroyed"]
    assert node.cli("sync", "report").value["done"] == []
    assert node.wishes()[name].free

    other = node.holder("two")
    before = node.tenants()
    assert before
    node.front.answers[WISHES] = always(all_free(node.front.wishes(COMPUTER)))
    (failure,) = node.cli("sync", "instances", expect=3).value["failures"]
    assert (failure["resource"], failure["code"]) == (other, "instances.held")
    assert node.tenants() == before
    node.front.answers.clear()
    quiet(node, "instances")
    node.front.answers[WISHES] = always(all_free(node.front.wishes(COMPUTER)))
    (failure,) = node.cli("sync", "instances", expect=3).value["failures"]
    assert failure["code"] == "instances.held", "an answer in between said otherwise"
    assert node.tenants() == before
    for words in ((), ("--force",), ("--force", "--partition", name)):
        said = node.cli("sync", "instances", *words, expect=None).value
        assert said["done"] == []
        assert [one["code"] for one in said["failures"]] == ([] if name in words else ["instances.dropped"])
        assert node.tenants() == before
    assert any(case.startswith(f"{other}: ") for case in node.cli("status").value["node"]["open_cases"])
    ended = node.cli("sync", "instances", "--force", "--partition", other).value["done"]
    assert ended == [f"{other}: stopped, to be destroyed"]
    node.cli("sync", "report")
    node.front.answers.clear()
    assert set(node.states().values()) == {"free"}
    node.settled()


def test_software_removed(node, url):
    node.slapos("remove", url, COMPUTER)
    assert node.cli("sync", "software").value["done"] == [f"{url}: removed"]
    assert not node.software(url).exists()
    assert node.front.count("destroyedSoftwareRelease") == 1
    quiet(node, "software")
