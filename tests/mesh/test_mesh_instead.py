"""``replaces_ipv6``: whether partitions are reached by the mesh in place of IPv6, on nodes with IPv6 and without."""

import pytest
from mesh_world import standing, until

PORT = 7000

ADDRESSES = {"A": "10.64.2.2", "B": "10.64.4.2"}


@pytest.fixture(scope="module")
def world():
    """Two nodes that have IPv6, and know each other by that."""
    with standing(names="AB", ipv6=True) as made:
        made.apply().join()
        until(made.whole, "everybody to reach everybody")
        yield made


def reached_by(node):
    """Where others reach its first partition, as software is told."""
    private, *found = [one["addr"] for one in node.resource("slappart0")["address_list"]]
    assert private.startswith("10.0.")
    assert node.vpn("slappart0") == ADDRESSES[node.name]
    (item,) = (one for one in node.verb("status")["partitions"] if one["id"] == "slappart0")
    assert item["vpn_ipv4"] == ADDRESSES[node.name]
    assert item["ipv6"] == next((one for one in found if ":" in one), None)
    return found


def say(node, word):
    node.configure({"tinc": {"replaces_ipv6": word}})
    node.verb("apply")
    assert node.verb("plan")["operations"] == []


def test_a_node_with_ipv6_has_both(world):
    for node in world.nodes.values():
        assert f"Address = {node.site.address}\n" in node.export()
        (ipv6,) = reached_by(node)
        assert ":" in ipv6


def test_a_node_with_ipv6_that_is_not_to_use_it(world):
    """Its partitions have the mesh alone; where the node itself is reached stays as it was, and so does what it exports."""
    a, b = world["A"], world["B"]
    before, block = reached_by(a), a.export()
    say(a, "yes")
    assert reached_by(a) == [ADDRESSES["A"]]
    assert before[0] not in a.run("ip", "-6", "address").stdout
    assert a.site.address in a.run("ip", "-6", "address").stdout
    assert a.export() == block
    assert b.take_in(a.export())["unchanged"] == ["A"]
    with (
        a.agent("serve", f"{ADDRESSES['A']}:{PORT}", partition="slappart0"),
        b.agent("ask", partition="slappart0") as one,
    ):
        assert one.ask([["", ADDRESSES["A"], PORT]]) == [ADDRESSES["B"]]
    for word in ("no", None):
        say(a, word)
        assert reached_by(a) == before


def test_a_node_without_ipv6_that_waits_for_it():
    with standing(names="A") as made:
        a = made["A"]
        a.configure({"tinc": {"replaces_ipv6": "no"}})
        a.verb("apply")
        assert reached_by(a) == []
        say(a, "auto")
        assert reached_by(a) == [ADDRESSES["A"]]
        # a mesh of one: nobody is missing
        value = a.verb("mesh", "status")
        assert (value["peers"], value["relays"], value["tincd"]["state"]) == ([], False, "running")
        assert "no peers" in a.say("mesh", "status")


def test_a_node_that_never_used_its_ipv6_is_reached_by_it():
    with standing(names="A", ipv6=True, sections={"tinc": {"replaces_ipv6": "yes"}}) as made:
        a = made["A"]
        a.verb("apply")
        assert f"Address = {a.site.address}\n" in a.export()
        assert reached_by(a) == [ADDRESSES["A"]]
