"""A node that is lost with everything on it is rebuilt by ``partitiond run`` from what its master knows.

A database on A, a cache on B, and on C an application that uses both through tunnels: each is lost in turn. What the other two
run is not touched, and the application works again by itself.
"""

import json
import time

import pytest
from nodes_eyes import addresses, asked, buildouts, events, programs
from nodes_world import until

_ASK = """
import sys, urllib.request
sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode())
"""


@pytest.fixture(scope="module")
def no_leaks():
    """The tests of this file go on with what the one before them left."""


@pytest.fixture(scope="module")
def world(module_world):
    world = module_world(3, partitions=3)
    world.start()
    url = world.release()
    for node in world.nodes:
        world.master.supply(url, node.computer)
    computers = {"database-computer": world["A"].computer, "cache-computer": world["B"].computer}
    world.master.request(
        world["C"],
        "application",
        url,
        kind="application",
        computer=world["C"].computer,
        parameters=computers,
    )
    began = time.monotonic()
    until(lambda: works(world), "the application to work", world["C"], 240)
    print(f"\n  deployed for the first time: {time.monotonic() - began:.1f} s")
    return world


def works(world):
    """What the application says when database and cache give it what it gave them; None while they do not."""
    node = world["C"]
    name = next((name for name, item in node.partitions().items() if item["state"] == "started"), None)
    if name is None:
        return None
    url = f"http://{node.private(name)}:8000/"
    done = node.run(*node.as_user(name, "/usr/bin/python3", "-I", "-c", _ASK, url), check=False)
    return done.stdout if done.returncode == 0 else None


def certificates(world):
    """What everybody knows of everybody's tunnels."""
    return {
        node.name: node.resource(name)["certificate"]
        for node in world.nodes
        for name, item in node.partitions().items()
        if item["state"] == "started"
    }


@pytest.mark.full  # test_nodes_scenario.py does so with B
@pytest.mark.parametrize("name", ["B", "C", "A"])
def test_a_lost_node_comes_back_by_run_alone(world, capsys, name):
    lost_and_rebuilt(world, capsys, name)


def lost_and_rebuilt(world, capsys, name):
    """Lose a node, and see all of it come back."""
    node, others = world[name], [one for one in world.nodes if one.name != name]
    before, pins = addresses(node), certificates(world)
    pids = {one.name: programs(one) for one in others}
    guids = {one["id"]: one["instance_guid"] for one in node.partitions().values()}
    questions = asked(world, node, "getFullComputerInformation")
    world.lose(node)
    world.rebuild(node)
    for path in ("/var/lib/partitiond", "/srv/slapgrid"):
        assert not node.seen(path).exists()
    times, began = {}, time.monotonic()

    def reached(what):
        times[what] = time.monotonic() - began

    node.start()
    reached("daemon up")
    until(lambda: events(node, "software.available"), "the software", node, 240)
    reached("software")
    until(
        lambda: any(item["state"] == "started" for item in node.partitions().values()),
        "the instance",
        node,
        240,
    )
    reached("instance")
    until(lambda: works(world), "the application to work again", world["C"], 240)
    reached("application works")
    assert addresses(node) == before
    assert {one["id"]: one["instance_guid"] for one in node.partitions().values()} == guids
    assert certificates(world)[name] != pins[name], "a new machine has a new identity"
    for one in others:
        # their tunnels take up other certificates without a new process
        assert programs(one) == pids[one.name], f"something on {one.name} was started anew"
        one.settled()
    node.settled()
    assert not events(node, "node.twin")
    assert len(events(node, "instance.rebuilt")) == 1
    runs = sum(buildouts(node, one) for one in before)
    questions = asked(world, node, "getFullComputerInformation") - questions
    with capsys.disabled():
        shown = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in times.items())
        print(f"\n  {name} rebuilt: {shown}; {runs} buildouts and {questions} questions to the master")


@pytest.mark.full
def test_a_lost_node_counts_from_its_own_beginning(world):
    """What the machine before it used was told by that one, or is lost with it: never told twice."""
    node = world["B"]
    first = min(one["time"] for one in events(node, "node.started"))[:19]
    value = node.verb("usage", "--from", "2020-01-01")
    assert all(gap["from"] >= first for gap in value["gaps"])
    assert node.verb("usage", "--from", "2020-01-01", "--to", f"{first}Z")["partitions"] == []


@pytest.mark.full
def test_addresses_that_do_not_follow_from_the_index_come_from_the_master(make_world, capsys):
    world = make_world(1, partitions=3)
    (node,) = world.nodes
    # these are the node's own when its partitions choose theirs, and not on the machine that takes its place
    for line in ("address add 10.0.0.2/24 dev lo", "address add 10.0.0.3/24 dev lo"):
        node.run("/usr/sbin/ip", *line.split())
    world.start()
    url = world.release("release")
    world.master.supply(url, node.computer)
    for title in ("one", "two"):
        world.master.request(node, title, url, computer=node.computer)
    until(lambda: len(started(node)) == 2, "both instances to run", node)
    before = addresses(node)
    assert not {"10.0.0.2", "10.0.0.3"} & {row[0] for row in before.values()}
    world.lose(node)
    world.rebuild(node)
    began = time.monotonic()
    node.start()
    until(lambda: len(started(node)) == 2, "both instances to run again", node, 240)
    after = addresses(node)
    assert {name: after[name] for name in started(node)} == {name: before[name] for name in started(node)}
    kept = json.loads(node.seen("/var/lib/partitiond/addresses.json").read_text())["partitions"]
    assert {name for name, row in kept.items() if row} >= started(node)
    node.settled()
    with capsys.disabled():
        print(
            f"\n  two instances with addresses of their own: up again after {time.monotonic() - began:.1f} s"
        )


def started(node):
    return {name for name, item in node.partitions().items() if item["state"] == "started"}
