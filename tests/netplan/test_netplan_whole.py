"""The whole: many partitions, growth and shrinking, teardown, and what is refused before anything is done."""

import subprocess
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from mesh_scene import meshed
from netplan_scene import BASE, NOTHING, UID, know_each_other, partition, send, sink, wanted

from netplan.apply import apply
from netplan.counters import read_counters
from netplan.errors import NetplanError
from netplan.model import DesiredNetwork, PartitionNetwork, TapSpec
from netplan.observe import observe
from netplan.plan import plan


def _everything():
    """What other programs say of the namespace, without what ticks."""
    listings = (
        ["/usr/sbin/ip", "-o", "link"],
        ["/usr/sbin/ip", "-o", "-4", "address"],
        ["/usr/sbin/ip", "-o", "-6", "address", "show", "scope", "global"],
        ["/usr/sbin/ip", "-4", "route", "show", "table", "all"],
        ["/usr/sbin/ip", "-6", "route", "show", "table", "main", "default"],
        ["/usr/sbin/ip", "-6", "rule"],
        ["/usr/sbin/nft", "list", "ruleset"],
        ["/bin/cat", "/proc/sys/net/ipv6/ip_nonlocal_bind"],
    )
    return [subprocess.run(one, check=True, capture_output=True, text=True).stdout for one in listings]


@pytest.mark.parametrize("ranges", [False, True])
def test_teardown_leaves_the_system_as_it_was(node, ranges):
    know_each_other(node)
    before = _everything()
    node.converge(wanted(7, ranges=ranges, local_source_table=ranges))
    assert _everything() != before
    node.converge(NOTHING)
    assert _everything() == before


def test_teardown_does_not_need_the_interface(node):
    node.converge(wanted(2))
    node.ipr.link("del", index=node.bridge)
    node.converge(DesiredNetwork())
    assert node.link("slaptap0") is None


def test_five_hundred_come_change_and_go(node):
    desired = wanted(500, ranges=True)
    assert len(node.converge(desired)) == 1 + 1 + 500 * 4 + 1
    assert len(node.converge(wanted(499, ranges=True))) == 5
    assert len(node.converge(desired)) == 5
    reading = read_counters()
    assert len(reading.traffic) == 500 * 3 * 2
    assert reading.refused == ()
    assert len(node.converge(NOTHING)) == 1 + 1 + 500 * 4 + 1


def test_five_hundred_of_a_mesh_come_and_go(node):
    """A node's part of /23, in which they and the node fit."""
    desired = meshed(500, local_source_table=True)
    # filter, interface, the node's own address, its two routes, the default route, the rules of both families
    common = 1 + 1 + 1 + 2 + 1 + 2
    # tap, three addresses, two sources
    assert len(node.converge(desired)) == common + 500 * 6
    reading = read_counters()
    assert sum(one.family == "vpn4" for one in reading.traffic) == 500 * 2
    assert len(node.converge(meshed(499, local_source_table=True))) == 1 + 6
    assert len(node.converge(wanted(499, local_source_table=True))) == 1 + 1 + 1 + 2 + 1 + 499 * 2
    assert len(node.converge(NOTHING)) == 1 + 1 + 1 + 499 * 4


def test_half_done_work_is_finished(node):
    """Cut the plan at every fifth operation: one more apply converges, and nothing is left behind after a teardown."""
    know_each_other(node)
    before = _everything()
    desired = meshed(4, ranges=True, local_source_table=True)
    length = len(plan(desired, observe(desired)))
    for cut in range(0, length, 5):
        assert not apply(plan(desired, observe(desired))[:cut])
        node.converge(desired)
        assert not apply(plan(NOTHING, observe(NOTHING))[:cut])
        node.converge(NOTHING)
        assert _everything() == before


def test_no_change_sends_nothing_to_nft(node, monkeypatch):
    node.converge(wanted(3))
    monkeypatch.setattr(
        "netplan.nftables.run", lambda _text: pytest.fail("a pass without change writes nothing")
    )
    assert not plan(wanted(3), observe(wanted(3)))


def test_a_partition_keeps_its_counters_when_another_takes_the_place_of_its_neighbour(node):
    node.converge(wanted(2))
    know_each_other(node)
    with sink(node) as port:
        send("2001:db8:1::2", "2001:db8:1::ffff:1", port, count=4)
    other = replace(partition(1), id="other")
    operations = node.converge(replace(wanted(1), partitions=(partition(0), other)))
    assert (
        operations["tap/slaptap1"].reason == "alias is 'partitiond:slappart1', should be 'partitiond:other'"
    )
    found = {one[:3]: one.packets_out for one in read_counters().traffic}
    assert found["slappart0", "ipv6", "remote"] == 4
    assert found["other", "ipv6", "remote"] == 0


def test_addresses_can_change_hands(node):
    """An element of a map that leads to another counter is deleted and added in one transaction."""
    node.converge(wanted(2))
    one, two = wanted(2).partitions
    swapped = (replace(one, ipv6=two.ipv6, ipv4=two.ipv4), replace(two, ipv6=one.ipv6, ipv4=one.ipv4))
    epoch = read_counters().epoch
    assert list(node.converge(replace(wanted(2), partitions=swapped))) == ["filter/partitiond"]
    know_each_other(node)
    with sink(node) as port:
        send("2001:db8:1::2", "2001:db8:1::ffff:1", port, count=4)
    found = {found[:3]: found.packets_out for found in read_counters().traffic}
    assert found["slappart1", "ipv6", "remote"] == 4
    assert found["slappart0", "ipv6", "remote"] == 0
    assert read_counters().epoch == epoch


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: PartitionNetwork("a b", 0, UID), "network.invalid"),
        (lambda: PartitionNetwork('a"; flush ruleset; "', 0, UID), "network.invalid"),
        (lambda: PartitionNetwork("a\nb", 0, UID), "network.invalid"),
        (lambda: PartitionNetwork("a\n", 0, UID), "network.invalid"),
        (lambda: PartitionNetwork("", 0, UID), "network.invalid"),
        (lambda: PartitionNetwork("a/b", 0, UID), "network.invalid"),
        (lambda: PartitionNetwork("a", 0, 0), "network.invalid"),
        (lambda: TapSpec("sixteen-letters-", 5000, "fe:00:00:00:00:01"), "network.invalid"),
        (lambda: TapSpec("tap/0", 5000, "fe:00:00:00:00:01"), "network.invalid"),
        (lambda: TapSpec("tap0", 5000, "fe:00:00:00:00"), "network.invalid"),
        (lambda: DesiredNetwork(None, (partition(0),)), "network.invalid"),
        (lambda: DesiredNetwork("br0", (partition(0),), local_source_table=True), "network.invalid"),
        (lambda: DesiredNetwork("br0", (partition(0), partition(0))), "network.duplicate"),
        (
            lambda: DesiredNetwork("br0", (partition(0), replace(partition(1), uid=UID))),
            "network.duplicate",
        ),
        (
            lambda: DesiredNetwork(
                "br0", (partition(0), replace(partition(1), ipv4=IPv4Address("10.0.0.2")))
            ),
            "network.duplicate",
        ),
        (
            lambda: DesiredNetwork("br0", (replace(partition(0), ipv6=BASE),), BASE.ip),
            "network.duplicate",
        ),
    ],
)
def test_nonsense_is_refused_when_it_is_said(make, code):
    with pytest.raises(NetplanError) as caught:
        make()
    assert caught.value.code == code
    assert caught.value.resource
