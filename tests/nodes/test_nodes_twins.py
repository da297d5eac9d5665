"""Two machines with one identity: found out by what the master says itself, told, and not fought with.

And what only looks like it: a node that renumbers itself, a master with an older database, a node that is rebuilt elsewhere.
"""

import time

import pytest
from nodes_eyes import addresses, asked, at_master, cases, events, programs
from nodes_world import until

POST = "loadComputerConfigurationFromXML"
# test_nodes_published.py finds a twin out, too, with one node alone
pytestmark = pytest.mark.full
SETTINGS = {"partitiond": {"capacity_interval": 3600}}


@pytest.fixture(scope="module")
def no_leaks():
    """The tests of this file go on with what the one before them left."""


@pytest.fixture(scope="module")
def world(module_world):
    world = module_world(1, partitions=2, loss=0.0, settings=SETTINGS)
    world.start()
    world.url = world.release("release")
    node = world["A"]
    world.master.supply(world.url, node.computer)
    world.master.request(node, "cache", world.url, computer=node.computer)
    until(lambda: node.partitions()["slappart0"]["state"] == "started", "the instance to run", node)
    world.twins = []
    return world


def mine(world, node):
    """Whether the master has the addresses of a node."""
    found = at_master(world, node.computer)
    return all({item["ipv4"], item["ipv6"]} == found[name] for name, item in node.partitions().items())


def undisturbed(node, before):
    assert programs(node) == before
    node.settled()


def test_one_that_begins_beside_a_living_one_is_refused(world, capsys):
    first = world["A"]
    before, posts = programs(first), asked(world, first, POST)
    second = world.twin(first)
    world.twins.append(second)
    began = time.monotonic()
    second.start()
    until(lambda: events(second, "node.twin"), "the second one to find out", second)
    seconds = time.monotonic() - began
    (event,) = events(second, "node.twin")
    assert addresses(first)["slappart0"][1] in event["message"]
    assert "--force" in event["hint"]
    assert cases(second, "another machine", "seems to be up")
    for lane, status in (("capacity", 3), ("instances", 1), ("software", 1), ("report", 1)):
        said = second.verb("sync", lane, expect=(status,))
        error = said["failures"][0] if status == 3 else said["error"]
        assert error["code"] == "node.twin", said
    assert len(events(second, "node.twin")) == 1
    # nor is a release said to be built, or gone, that is the other one's
    told = (
        POST,
        "buildingSoftwareRelease",
        "availableSoftwareRelease",
        "destroyedSoftwareRelease",
        "useComputer",
    )
    assert [one for one in told if asked(world, second, one)] == []
    assert not programs(second), "the same data is run twice"
    assert mine(world, first)
    assert not events(first, "node.twin")
    assert asked(world, first, POST) == posts
    undisturbed(first, before)
    with capsys.disabled():
        print(f"\n  a second machine: refused after {seconds:.1f} s: {event['message']}")


def test_it_begins_by_itself_when_the_other_is_gone_and_the_other_finds_out_when_it_is_back(world, capsys):
    first, (second,) = world["A"], world.twins
    before, posts = programs(first), asked(world, first, POST)
    world.cut(first)
    until(lambda: asked(world, second, POST), "the second one to begin", second)
    until(lambda: second.partitions()["slappart0"]["state"] == "started", "its instance to run", second)
    assert mine(world, second)
    assert not cases(second, "another machine")
    second_posts = asked(world, second, POST)
    world.join(first)
    began = time.monotonic()
    until(lambda: events(first, "node.twin"), "the first one to find out", first)
    seconds = time.monotonic() - began
    (event,) = events(first, "node.twin")
    assert addresses(second)["slappart0"][1] in event["message"]
    assert cases(first, "another machine told the master")
    said = first.verb("sync", "capacity", expect=(3,))
    assert [one["code"] for one in said["failures"]] == ["node.twin"]
    # nobody fights: neither says again what the other one took back, also after a restart
    first.stop()
    first.start()
    first.verb("sync", "instances", expect=(0, 3))
    assert cases(first, "another machine told the master")
    assert len(events(first, "node.twin")) == 1
    assert (asked(world, first, POST), asked(world, second, POST)) == (posts, second_posts)
    undisturbed(first, before)
    with capsys.disabled():
        print(f"\n  the first machine, back: found out after {seconds:.1f} s: {event['message']}")


def test_the_operator_decides_which_one_stays(world):
    first, (second,) = world["A"], world.twins
    before = programs(first)
    said = first.verb("sync", "capacity", "--force")
    assert said["done"]
    assert mine(world, first)
    assert not cases(first, "another machine")
    # now it is the other one that finds somebody else's addresses
    until(lambda: len(events(second, "node.twin")) == 2, "the other one to find out", second)
    assert cases(second, "another machine told the master")
    second.power_off()
    first.verb("sync", "capacity")
    assert not cases(first, "another machine")
    undisturbed(first, before)


def test_an_older_database_is_no_twin(world):
    """Also where the node had other addresses at the time of the copy: it told them itself."""
    first = world["A"]
    told = len(events(first, "node.twin"))
    copy = world.master.backup(world.directory / "older.db")
    renumber(first, "10.77.0.0/16")
    until(lambda: mine(world, first), "the master to be told", first)
    assert mine(world, first)
    world.master.stop()
    world.master.start(copy)
    assert not mine(world, first)
    until(lambda: mine(world, first), "the master to be told again", first)
    first.verb("sync", "instances")
    assert len(events(first, "node.twin")) == told
    assert not cases(first, "another machine")


def test_a_node_that_renumbers_itself_is_no_twin(world):
    first = world["A"]
    told = len(events(first, "node.twin"))
    renumber(first, "10.78.0.0/16")
    # the master has the addresses of before until it is told, and answers meanwhile
    for _ in range(3):
        first.verb("sync", "instances")
    until(lambda: mine(world, first), "the master to be told", first)
    assert len(events(first, "node.twin")) == told


def renumber(node, network):
    """Give the partitions other private addresses, as an operator does."""
    node.configure({"slapformat": {"ipv4_local_network": network}})
    node.verb("apply")
    begins = network.rpartition(".0.0")[0]
    assert all(item["ipv4"].startswith(f"{begins}.") for item in node.partitions().values())
