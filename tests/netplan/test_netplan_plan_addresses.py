"""Addresses on the interface: made, kept, changed, adopted, refused, removed."""

import socket

import pytest
from netplan_scene import BASE, HOST4, NOTHING, partition, wanted

from netplan.apply import apply
from netplan.model import DesiredNetwork

SIX, FOUR = "2001:db8:1::3", "10.0.0.3"  # of slappart1


def _addresses(node):
    return {one.get_attr("IFA_LOCAL") or one.get_attr("IFA_ADDRESS"): one for one in node.ipr.get_addr()}


def test_addresses_come_and_go(node):
    before = set(_addresses(node))
    node.converge(wanted(3, tap=False))
    found = _addresses(node)
    assert set(found) - before == {f"2001:db8:1::{i}" for i in (2, 3, 4)} | {f"10.0.0.{i}" for i in (2, 3, 4)}
    six, four = found[SIX], found[FOUR]
    assert (six["prefixlen"], six["index"]) == (64, node.bridge)
    assert (four["prefixlen"], four["index"]) == (32, node.bridge)
    assert six.get_attr("IFA_FLAGS") & 0x22 == 0x22  # nodad, deprecated
    assert not six.get_attr("IFA_FLAGS") & 0x40  # not tentative
    assert six.get_attr("IFA_PROTO") == four.get_attr("IFA_PROTO") == 112
    operations = node.converge(wanted(2, tap=False))
    assert [one.action for one in operations.values()].count("remove") == 2
    node.converge(NOTHING)
    assert set(_addresses(node)) == before


def test_no_partition_address_is_chosen_as_a_source(node):
    node.ipr.flush_routes(family=socket.AF_INET6, table=254, proto=3)
    node.converge(wanted(5, tap=False, host_ipv6=None))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one:
        one.connect(("2001:db8:1::ffff:1", 9))
        assert one.getsockname()[0] == str(BASE.ip)
    # also when the host's own IPv4 comes after the partitions', as with a renewed lease
    node.ipr.addr("del", index=node.bridge, address=HOST4, prefixlen=24)
    node.ipr.addr("add", index=node.bridge, address=HOST4, prefixlen=24)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect(("192.0.2.1", 9))
        assert one.getsockname()[0] == HOST4


def _change(node, **what):
    node.ipr.addr("replace", index=node.bridge, **what)


@pytest.mark.parametrize(
    ("damage", "resource", "reason"),
    [
        (lambda n: n.ipr.addr("del", index=n.bridge, address=SIX, prefixlen=64), SIX, "missing"),
        (lambda n: n.ipr.addr("del", index=n.bridge, address=FOUR, prefixlen=32), FOUR, "missing"),
        (
            lambda n: _change(n, address=SIX, prefixlen=64, flags=2, proto=112, preferred_lft=0xFFFFFFFF),
            SIX,
            "preferred lifetime is not 0",
        ),
        (
            lambda n: _change(n, address=SIX, prefixlen=64, flags=0, proto=112, preferred_lft=0),
            SIX,
            "duplicate address detection is on",
        ),
        (
            lambda n: _change(n, address=FOUR, prefixlen=32, proto=0, preferred_lft=0),
            FOUR,
            "is not marked as ours",
        ),
    ],
)
def test_each_drift_comes_back_in_the_plan_and_is_repaired(node, damage, resource, reason):
    desired = wanted(3, tap=False)
    node.converge(desired)
    damage(node)
    operations = node.converge(desired)
    assert list(operations) == [f"address/{resource}"]
    assert reason in operations[f"address/{resource}"].reason
    assert operations[f"address/{resource}"].partition == "slappart1"


def test_a_marked_address_of_another_prefix_length_is_made_again(node):
    desired = wanted(2, tap=False)
    node.converge(desired)
    node.ipr.addr("del", index=node.bridge, address=SIX, prefixlen=64)
    node.ipr.addr("add", index=node.bridge, address=SIX, prefixlen=128, flags=2, proto=112, preferred_lft=0)
    operation = node.converge(desired)[f"address/{SIX}"]
    assert operation.reason == "prefix length is 128, should be 64"


def test_an_address_that_waits_for_a_carrier_is_made_again(node):
    node.ipr.link("add", ifname="br1", kind="bridge")
    bridge = node.link("br1")
    node.ipr.link("set", index=bridge, state="up")
    node.ipr.addr("add", index=bridge, address=SIX, prefixlen=64)
    desired = DesiredNetwork("br1", (partition(1, tap=False),))
    operation = node.converge(desired)[f"address/{SIX}"]
    assert "is tentative" in operation.reason
    assert "is not marked as ours" in operation.reason


def test_what_slapformat_made_is_adopted_in_place(node):
    node.ipr.addr("add", index=node.bridge, address=SIX, prefixlen=64, flags=2)
    node.ipr.addr("add", index=node.bridge, address=FOUR, prefixlen=32)
    operations = node.converge(wanted(3, tap=False))
    assert operations[f"address/{SIX}"].action == operations[f"address/{FOUR}"].action == "change"
    assert operations[f"address/{SIX}"].delete == ()
    assert operations["address/2001:db8:1::2"].action == "create"
    # its on-link route is still there, and so is the host's
    onlink = node.ipr.get_routes(family=socket.AF_INET6, table=254, dst="2001:db8:1::/64")
    assert len(list(onlink)) == 1


@pytest.mark.parametrize(
    ("link", "address", "length"),
    [("eth0", SIX, 64), ("eth0", FOUR, 32), ("br0", SIX, 128), ("br0", FOUR, 24)],
)
def test_an_address_of_somebody_else_is_refused_and_left_alone(node, link, address, length):
    node.ipr.addr("add", index=node.link(link), address=address, prefixlen=length, flags=2)
    before = str(_addresses(node)[address]["attrs"])
    desired = wanted(3, tap=False)
    node.plan(desired)
    (failure,) = apply(node.last)
    assert failure.error.code == "network.address_taken"
    assert failure.operation.id == f"address/{address}"
    assert link in failure.error.message
    assert str(_addresses(node)[address]["attrs"]) == before
    assert list(node.plan(desired)) == [f"address/{address}"]


def test_a_marked_address_moves_to_another_interface(node):
    node.converge(wanted(2, tap=False))
    node.ipr.link("add", ifname="br1", kind="bridge")
    node.ipr.link("set", index=node.link("br1"), state="up")
    moved = DesiredNetwork("br1", wanted(2, tap=False).partitions)
    node.converge(moved)
    assert _addresses(node)[SIX]["index"] == node.link("br1")


def test_all_come_back_after_the_link_went_down(node):
    desired = wanted(4, tap=False)
    node.converge(desired)
    node.ipr.link("set", index=node.bridge, state="down")
    node.ipr.link("set", index=node.bridge, state="up")
    node.ipr.addr("add", index=node.bridge, address=str(BASE.ip), prefixlen=64, flags=2)
    operations = node.converge(desired)
    assert [one.reason for one in operations.values() if one.resource == "address"] == ["missing"] * 4


def test_foreign_addresses_stay(node):
    node.ipr.addr("add", index=node.bridge, address="2001:db8:1::77", prefixlen=64, flags=2, proto=7)
    node.ipr.addr("add", index=node.bridge, address="10.0.0.77", prefixlen=32)
    node.converge(wanted(2))
    node.converge(NOTHING)
    assert {"2001:db8:1::77", "10.0.0.77"} <= set(_addresses(node))
