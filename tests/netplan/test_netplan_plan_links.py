"""Taps: made, kept, changed, adopted, refused, removed."""

import os

import pytest
from netplan_scene import BASE, NOTHING, UID, partition, wanted

from netplan.apply import apply
from netplan.errors import NetplanError
from netplan.model import GROUP_GOING, DesiredNetwork
from netplan.observe import observe
from netplan.taps import make_taps


def _tap(node, name="slaptap0"):
    (message,) = node.ipr.get_links(ifname=name)
    return message


def test_taps_come_and_go(node):
    operations = node.converge(wanted(3))
    assert [one for one in operations if one.startswith("tap/")] == [f"tap/slaptap{i}" for i in range(3)]
    for index in range(3):
        tap = _tap(node, f"slaptap{index}")
        assert tap.get_attr("IFLA_IFALIAS") == f"partitiond:slappart{index}"
        assert tap.get_attr("IFLA_MASTER") == node.bridge
        assert tap["flags"] & 1
        data = tap.get_attr("IFLA_LINKINFO").get_attr("IFLA_INFO_DATA")
        assert data.get_attr("IFLA_TUN_OWNER") == UID + index
        assert data.get_attr("IFLA_TUN_PERSIST") == 1
        assert data.get_attr("IFLA_TUN_PI") == 0
        assert data.get_attr("IFLA_TUN_VNET_HDR") == 1
    shrunk = node.converge(wanted(1))
    assert shrunk["tap/slaptap2"].action == "remove"
    assert shrunk["tap/slaptap2"].partition == "slappart2"
    assert node.link("slaptap1") is None
    node.converge(NOTHING)
    assert node.link("slaptap0") is None


def test_the_bridge_keeps_its_own_address(node):
    before = _tap(node, "br0").get_attr("IFLA_ADDRESS")
    node.converge(wanted(10))
    assert _tap(node, "br0").get_attr("IFLA_ADDRESS") == before


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda node, tap: node.ipr.link("set", index=tap, state="down"), "is down"),
        (lambda node, tap: node.ipr.link("set", index=tap, master=0), "is in no bridge, should be in br0"),
        (lambda node, tap: node.ipr.link("set", index=tap, ifalias="partitiond:other"), "alias is"),
        (lambda node, tap: node.ipr.link("set", index=tap, address="02:00:00:00:00:01"), "address is"),
        (lambda _node, _tap: make_taps([("slaptap1", 7)]), f"owner is 7, should be {UID + 1}"),
        (lambda node, tap: node.ipr.link("del", index=tap), "missing"),
        (lambda node, tap: node.ipr.link("set", index=tap, group=GROUP_GOING | 7), "its removal was cut off"),
    ],
)
def test_each_drift_comes_back_in_the_plan_and_is_repaired(node, damage, reason):
    node.converge(wanted(3))
    damage(node, node.link("slaptap1"))
    operations = node.converge(wanted(3))
    assert list(operations) == ["tap/slaptap1"]
    assert reason in operations["tap/slaptap1"].reason
    assert operations["tap/slaptap1"].partition == "slappart1"


def test_a_tap_moves_to_another_bridge_and_out_of_any(node):
    node.converge(wanted(1))
    node.ipr.link("add", ifname="br1", kind="bridge")
    moved = DesiredNetwork("br0", (partition(0, bridge="br1"),), BASE.ip)
    assert node.converge(moved)["tap/slaptap0"].reason == "is in br0, should be in br1"
    routed = DesiredNetwork("br0", (partition(0, bridge=None),), BASE.ip)
    assert node.converge(routed)["tap/slaptap0"].reason == "is in br1, should be in no bridge"
    assert _tap(node).get_attr("IFLA_MASTER") is None


def test_an_unmarked_tap_of_the_right_owner_is_adopted(node):
    assert not make_taps([("slaptap0", UID)])
    index = node.link("slaptap0")
    operation = node.converge(wanted(1))["tap/slaptap0"]
    assert operation.action == "change"
    assert "is not marked as ours" in operation.reason
    assert node.link("slaptap0") == index


@pytest.mark.parametrize("kind", ["bridge", "tun", "foreign owner", "nobody's"])
def test_a_taken_name_is_refused_and_left_alone(node, kind):
    if kind == "bridge":
        node.ipr.link("add", ifname="slaptap1", kind="bridge")
    elif kind == "tun":
        node.ipr.link("add", ifname="slaptap1", kind="tuntap", mode="tun", uid=UID + 1)
    elif kind == "nobody's":
        node.ipr.link("add", ifname="slaptap1", kind="tuntap", mode="tap")
    else:
        assert not make_taps([("slaptap1", 12)])
    before = str(_tap(node, "slaptap1").get_attr("IFLA_LINKINFO")), node.link("slaptap1")
    desired = wanted(3)
    node.plan(desired)
    (failure,) = apply(node.last)
    assert failure.operation.id == "tap/slaptap1"
    assert failure.error.code == "network.name_taken"
    assert failure.error.hint
    assert (str(_tap(node, "slaptap1").get_attr("IFLA_LINKINFO")), node.link("slaptap1")) == before
    assert node.link("slaptap2") is not None
    assert list(node.plan(desired)) == ["tap/slaptap1"]


@pytest.mark.parametrize("kind", ["bridge", "tun"])
def test_a_name_that_is_taken_after_the_plan_is_told_as_such(node, kind):
    node.plan(wanted(2))
    if kind == "tun":
        assert not make_taps([("slaptap1", UID + 1)], tun=True)
    else:
        node.ipr.link("add", ifname="slaptap1", kind=kind)
    before = node.link("slaptap1")
    (failure,) = apply(node.last)
    assert (failure.operation.id, failure.error.code) == ("tap/slaptap1", "network.name_taken")
    assert "ip link delete slaptap1" in failure.error.hint
    assert node.link("slaptap1") == before
    assert node.link("slaptap0") is not None


def test_a_missing_bridge_is_named(node):
    desired = DesiredNetwork("br0", (partition(0, bridge="br7"),), BASE.ip)
    node.plan(desired)
    (failure,) = apply(node.last)
    assert failure.error.code == "network.no_bridge"
    assert "br7 does not exist" in failure.error.message


def test_a_tap_goes_with_its_maker_as_long_as_it_has_no_mark(node):
    child = os.fork()
    if child == 0:
        make_taps([("slaptap0", UID), ("slaptap1", UID)], mark=lambda names: os._exit(len(names)))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert node.link("slaptap0") is node.link("slaptap1") is None


def test_more_taps_than_are_held_open_at_once(node):
    marked = []
    assert not make_taps(((f"tap{number}", 0) for number in range(130)), mark=marked.extend)
    assert marked == [f"tap{number}" for number in range(130)]
    assert all(node.link(name) for name in marked)


def test_foreign_taps_stay(node):
    assert not make_taps([("tap9", 1), ("slaptap7", 2)])
    node.ipr.link("set", index=node.link("tap9"), alias="somebody's partitiond:x")
    node.converge(wanted(2))
    node.converge(NOTHING)
    assert node.link("tap9")
    assert node.link("slaptap7")


def _held(name):
    import fcntl
    import struct

    holder = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(holder, 0x400454CA, struct.pack("16sH22x", name, 0x1002 | 0x4000))
    return holder


def test_a_tap_of_ours_that_was_given_to_another_is_made_again(node):
    node.converge(wanted(1))
    assert not make_taps([("slaptap0", 7)])
    before, holder = node.link("slaptap0"), _held(b"slaptap0")
    try:
        node.converge(wanted(1))
    finally:
        os.close(holder)
    assert node.link("slaptap0") != before


def test_a_missing_interface_names_those_there(node):
    with pytest.raises(NetplanError) as caught:
        observe(DesiredNetwork("eth7"))
    assert caught.value.code == "network.no_interface"
    assert "br0" in caught.value.hint
