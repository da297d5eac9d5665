"""Several at once: what fails, and what takes long, holds up nobody else."""

import os

import pytest
from life_front import WISHES, always
from life_node import alive, processes_of

DESTROYED = "destroyedComputerPartition"


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(partitions=4, software_interval=1, instances_interval=1, meter_interval=5)
    node.start()
    node.offer()
    return node


@pytest.fixture(scope="module")
def url(node):
    return node.release()


def test_failing_release_beside_a_good_one(node, url):
    bad = node.release("bad", build="fail no such compiler: pcc")
    # the bad one is asked for first, so that it is tried first
    node.supply(bad)
    node.supply(url)
    node.wait(lambda: node.front.count("availableSoftwareRelease"), "the good release to be available")
    node.wait(lambda: node.front.count("softwareReleaseError"), "the bad release to be reported")
    (report,) = [one for one in node.front.seen if one.endpoint == "softwareReleaseError"]
    assert report.fields["url"] == bad
    assert "no such compiler: pcc" in report.fields["error_log"]
    assert not (node.software(bad) / ".completed").exists()
    # it has its pause: passes that follow do not build it, unless they are told to
    said = node.cli("sync", "software").value
    assert (said["done"], said["failures"]) == ([], [])
    assert node.front.count("softwareReleaseError") == 1
    (failure,) = node.cli("sync", "software", "--force", expect=3).value["failures"]
    assert (failure["resource"], failure["code"]) == (bad, "software.build")
    assert "no such compiler: pcc" in failure["message"]
    assert node.front.count("softwareReleaseError") == 2
    node.build_says(bad, "")
    node.cli("sync", "software", "--force")
    assert (node.software(bad) / "instance.cfg").is_file()


def test_two_requests_at_once(node, url):
    # the node sees both in one answer; asked at the same moment, slapproxy may give both the same partition
    node.front.answers[WISHES] = always(b"", 503)
    for title in ("one", "two"):
        node.request(title, url, text=title)
    del node.front.answers[WISHES]
    names = [node.holder(title) for title in ("one", "two")]
    assert len(set(names)) == 2
    for title, name in zip(("one", "two"), names, strict=True):
        item = node.wait_for_state(name, "started")
        assert node.wait(lambda item=item: node.page(item), f"{title} to answer") == title
        assert len(processes_of(item["user"]["uid"])) == 2
        assert node.buildouts(name) == 1
    node.settled()


def test_failing_instance_beside_good_ones(node, url):
    before = node.tenants()
    node.request("broken", url, text="never", fail="the disk is made of cheese")
    name = node.holder("broken")
    item = node.wait_for_state(name, "failed")
    assert "the disk is made of cheese" in item["error"]
    assert not item["processes"]
    (report,) = [one for one in node.front.seen if one.endpoint == "softwareInstanceError"]
    assert report.fields["computer_partition_id"] == name
    assert "the disk is made of cheese" in report.fields["error_log"]
    said = node.cli("sync", "instances").value
    assert (said["done"], said["failures"], node.buildouts(name)) == ([], [], 1), "it has no pause"
    assert node.tenants() == before
    node.settled()
    # new parameters are a reason to try at once
    node.request("broken", url, text="mended")
    item = node.wait_for_state(name, "started")
    assert item["error"] is None
    assert node.wait(lambda: node.page(item), "the mended instance to answer") == "mended"


def test_instance_stops_although_its_buildout_fails(node, url):
    name = node.holder("broken")
    uid = node.partition(name)["user"]["uid"]
    assert processes_of(uid)
    node.request("broken", url, state="stopped", text="mended", fail="no more")
    item = node.wait_for_state(name, "failed")
    assert "no more" in item["error"]
    assert "cheese" not in item["error"], "the error of an earlier try"
    node.wait(lambda: not processes_of(uid), "its processes to be stopped", 10)
    node.settled()
    node.cli("apply")
    assert not processes_of(uid)
    node.request("broken", url, state="destroyed")
    node.wait(lambda: node.wishes()[name].free, "the partition to be free")


def test_long_build_holds_up_no_instance(node, url):
    slow = node.release("slow", build="sleep 600")
    before = node.tenants()
    node.supply(slow)
    user = node.software(url).stat().st_uid

    def sleepers():
        return [pid for pid, line in processes_of(user).items() if "sleep 600" in line]

    (sleeper,) = node.wait(sleepers, "the build to be busy")
    node.request("three", url, text="meanwhile")
    name = node.holder("three")
    item = node.wait_for_state(name, "started")
    assert node.wait(lambda: node.page(item), "the instance to answer") == "meanwhile"
    node.request("two", url, text="changed")
    other = node.partition(node.holder("two"))
    node.wait(lambda: node.page(other) == "changed", "another one to be configured again")
    assert alive(sleeper), "the build ended too early to prove anything"
    assert before.items() <= node.tenants().items()
    # the build ends as builds may: by failing
    node.build_says(slow, "fail enough")
    since = len(node.front.seen)
    os.kill(sleeper, 15)
    node.wait(lambda: node.front.count("softwareReleaseError", since), "the build to have failed")


def test_destroyed_and_given_again_during_a_pass(node, url):
    """An answer of the master from before a destroy must not be the reason for a second one, of the next tenant."""
    # partitions are gone through in order: the slow one must come before the one that is destroyed
    first, late = sorted((node.holder("one"), node.holder("two")))
    slow, victim = sorted(("one", "two"), key=node.holder)
    node.front.answers[DESTROYED] = always(b"not now", 503)
    since = len(node.front.seen)
    try:
        node.request(victim, url, state="destroyed")
        node.wait(lambda: node.front.count(DESTROYED, since), "the daemon to report the destroyed instance")
        uid = node.partition(first)["user"]["uid"]
        node.request(slow, url, text="slow", sleep="8")
        node.wait(
            lambda: any("sleep 8" in line for line in processes_of(uid).values()), "a pass that takes long"
        )
    finally:
        del node.front.answers[DESTROYED]
    node.cli("sync", "report")
    assert node.wishes()[late].free
    node.request("heir", url, text="inherited")
    assert node.holder("heir") == late
    item = node.wait_for_state(late, "started")
    assert node.wait(lambda: node.page(item), "the heir to answer") == "inherited"
    assert node.holder("heir") == late
    node.wait_for_state(first, "started")


@pytest.mark.full
def test_daemon_ends_while_a_destroy_is_refused(node, url):
    """What the report lane tries again later is nothing that the end waits for; the next daemon goes on with it."""
    name = node.holder("three")
    node.front.answers[DESTROYED] = always(b"Not destroying yet because this partition has child partitions")
    since = len(node.front.seen)
    node.request("three", url, state="destroyed")
    node.wait(lambda: node.front.count(DESTROYED, since), "the daemon to be refused")
    node.wait(lambda: "slap.destroy_refused" in node.log_tail(20_000), "the daemon to say so")
    assert node.terminate() < 15
    assert node.partition(name)["state"] == "destroying"
    node.front.answers.clear()
    node.start()
    node.wait(lambda: node.wishes()[name].free, "the next daemon to finish it")
    node.wait_for_state(name, "free")
