"""Who passes on between peers: nobody where each pair can connect, else those that see two peers which cannot."""

import pytest
from mesh_world import STATE, standing, until


@pytest.fixture(scope="module")
def world():
    with standing() as made:
        made.apply().join()
        yield made


def relays(world):
    """The nodes whose tincd passes on, by what it reads."""
    return {
        node.name
        for node in world.nodes.values()
        if "TunnelServer = no" in (node.seen(STATE) / "tinc.conf").read_text()
    }


def without_address(block):
    return "".join(line for line in block.splitlines(True) if not line.startswith("Address"))


def test_where_each_pair_connects_nobody_passes_on(world):
    until(world.whole, "everybody to reach everybody")
    assert relays(world) == set()
    for node in world.nodes.values():
        value = node.verb("mesh", "status")
        assert value["relays"] is False
        assert {one["via"] for one in value["peers"]} == {None}


def test_two_that_cannot_connect_are_passed_on_for(world):
    """B and C say nowhere where they are: A, which sees both, passes on; to A each connects by itself. A mix of both kinds."""
    a, b, c = (world[name] for name in "ABC")
    pid = a.tincd()
    for node, other in ((b, c), (c, b)):
        assert node.take_in(without_address(other.export()))["changed"] == [other.name]
    assert a.take_in(*(without_address(node.export()) for node in (b, c)))["changed"] == ["B", "C"]
    assert a.tincd() != pid, "what is read once makes it start anew"
    assert relays(world) == {"A"}
    assert a.verb("mesh", "status")["relays"] is True
    until(lambda: world.whole() and b.peers()["C"]["via"] == "A", "everybody to reach everybody, by A")
    assert a.verb("plan")["operations"] == []


def test_what_the_operator_says_of_it_counts(world):
    a, b, c = (world[name] for name in "ABC")
    a.configure({"tinc": {"relay": "no"}})
    a.verb("apply")
    assert relays(world) == set()
    # what A told of C is purged with the last connection of tincd only (net.c), and a way that is believed in does work, as
    # packets pass still (Forwarding): another tincd of B has never heard of it
    b.kill_tincd()
    until(lambda: a.reaches("B", "C") and b.reaches("A"), "A to be reached")
    found = b.peers()["C"]
    assert (found["reachable"], found["round_trip_ms"]) == (False, None)
    # whoever chooses the peers to connect to leaves it to others to pass on, and does so for them
    a.configure({"tinc": {"relay": None, "connect_to": "B"}})
    for node in world.nodes.values():
        node.take_in(b.export(), c.export())
    a.verb("apply")
    assert relays(world) == {"A"}
    a.configure({"tinc": {"connect_to": None}})
    a.verb("apply")
    assert relays(world) == set()
    until(world.whole, "everybody to reach everybody again")
