"""Ranges, ip_nonlocal_bind, and the default route with a source hint."""

import socket
from pathlib import Path

import pytest
from netplan_scene import BASE, NEIGHBOUR6, NOTHING, partition, wanted

from netplan.apply import apply
from netplan.model import DesiredNetwork
from netplan.observe import observe
from netplan.operations import RuleOperation
from netplan.rtnetlink import TABLE_LOCAL

NONLOCAL_BIND = Path("/proc/sys/net/ipv6/ip_nonlocal_bind")
RANGE = "range/2001:db8:1:0:4002::/80"  # of slappart1


def _defaults(node):
    return {
        (one.get_attr("RTA_GATEWAY"), one.get_attr("RTA_PRIORITY"), one["proto"], one.get_attr("RTA_PREFSRC"))
        for one in node.ipr.get_routes(family=socket.AF_INET6, table=254)
        if one["dst_len"] == 0 and one["type"] == 1
    }


def _range_route(action, node, proto=4):
    node.ipr.route(
        action,
        dst="2001:db8:1:0:4002::/80",
        oif=1,
        type="local",
        table=255,
        proto=proto,
        family=socket.AF_INET6,
    )


def test_a_copy_of_the_default_route_names_the_source(node):
    before = _defaults(node)
    operation = node.converge(wanted(1, tap=False))["route/default"]
    assert operation.after == f"default via {NEIGHBOUR6} dev br0 src {BASE.ip} metric 1023"
    assert operation.reason == "missing"
    assert _defaults(node) - before == {(NEIGHBOUR6, 1023, 112, str(BASE.ip))}
    node.converge(NOTHING)
    assert _defaults(node) == before


def test_the_copy_follows_the_original(node):
    desired = wanted(1, tap=False)
    node.converge(desired)
    node.ipr.route("add", dst="default", gateway="2001:db8:1::ffff:2", family=socket.AF_INET6, priority=50)
    operations = node.converge(desired)
    assert {one.action for one in operations.values()} <= {"create", "remove"}
    assert {one for one in _defaults(node) if one[2] == 112} == {
        ("2001:db8:1::ffff:2", 49, 112, str(BASE.ip))
    }
    node.ipr.route("del", dst="default", gateway="2001:db8:1::ffff:2", family=socket.AF_INET6, priority=50)
    node.converge(desired)
    assert {one for one in _defaults(node) if one[2] == 112} == {(NEIGHBOUR6, 1023, 112, str(BASE.ip))}
    node.ipr.route("del", dst="default", gateway=NEIGHBOUR6, family=socket.AF_INET6, priority=1024)
    operation = node.converge(desired)["route/default"]
    assert (operation.action, operation.reason) == ("remove", "no longer wanted")
    assert _defaults(node) == set()


def test_a_metric_that_cannot_be_bettered_is_left_alone(node):
    node.ipr.route("add", dst="default", gateway=NEIGHBOUR6, family=socket.AF_INET6, priority=1)
    assert "route/default" not in node.converge(wanted(1, tap=False))


def test_a_removed_copy_comes_back(node):
    desired = wanted(1, tap=False)
    node.converge(desired)
    node.ipr.route("del", dst="default", gateway=NEIGHBOUR6, family=socket.AF_INET6, priority=1023)
    assert node.converge(desired)["route/default"].reason == "missing"


def test_an_on_link_gateway_without_prefix_is_copied_as_such(node):
    node.ipr.route(
        "add",
        dst="default",
        gateway="2001:db8:99::1",
        oif=node.bridge,
        flags=4,
        family=socket.AF_INET6,
        priority=9,
    )
    node.converge(wanted(1, tap=False))
    assert ("2001:db8:99::1", 8, 112, str(BASE.ip)) in _defaults(node)


def test_a_host_address_that_is_not_there_fails_by_name(node):
    from ipaddress import IPv6Address

    from netplan.apply import apply

    desired = wanted(1, tap=False, host_ipv6=IPv6Address("2001:db8:1::abcd"))
    node.plan(desired)
    (failure,) = apply(node.last)
    assert failure.operation.id == "route/default"
    assert "2001:db8:1::abcd" in failure.error.message


def test_ranges_come_and_go(node):
    assert NONLOCAL_BIND.read_text().strip() == "0"
    operations = node.converge(wanted(2, tap=False, ranges=True))
    assert list(operations)[:2] == ["filter/partitiond", "sysctl/net.ipv6.ip_nonlocal_bind"]
    assert operations[RANGE].partition == "slappart1"
    assert NONLOCAL_BIND.read_text().strip() == "1"
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one:
        one.bind(("2001:db8:1:0:4002:1:2:3", 0))
    operations = node.converge(wanted(2, tap=False))
    assert operations[RANGE].action == "remove"
    assert operations["sysctl/net.ipv6.ip_nonlocal_bind"].action == "remove"
    assert NONLOCAL_BIND.read_text().strip() == "0"


def test_ip_nonlocal_bind_that_was_on_before_stays_on(node):
    NONLOCAL_BIND.write_text("1")
    assert "sysctl/net.ipv6.ip_nonlocal_bind" not in node.converge(wanted(1, tap=False, ranges=True))
    node.converge(NOTHING)
    assert NONLOCAL_BIND.read_text().strip() == "1"


def test_teardown_puts_ip_nonlocal_bind_back(node):
    node.converge(wanted(1, tap=False, ranges=True))
    node.converge(NOTHING)
    assert NONLOCAL_BIND.read_text().strip() == "0"


def test_ip_nonlocal_bind_switched_off_is_drift(node):
    desired = wanted(1, tap=False, ranges=True)
    node.converge(desired)
    NONLOCAL_BIND.write_text("0")
    operations = node.converge(desired)
    assert list(operations) == ["sysctl/net.ipv6.ip_nonlocal_bind"]
    assert NONLOCAL_BIND.read_text().strip() == "1"
    node.converge(NOTHING)
    assert NONLOCAL_BIND.read_text().strip() == "0"


def test_ranges_that_come_later_note_what_was_found(node):
    node.converge(wanted(1, tap=False))
    node.converge(wanted(1, tap=False, ranges=True))
    node.converge(NOTHING)
    assert NONLOCAL_BIND.read_text().strip() == "0"


@pytest.mark.parametrize(("proto", "action"), [(4, "change"), (None, "create")])
def test_a_range_route_is_adopted_or_comes_back(node, proto, action):
    desired = wanted(2, tap=False, ranges=True)
    node.converge(desired)
    _range_route("del", node, 112)
    if proto:
        _range_route("add", node, proto)
    operations = node.converge(desired)
    assert list(operations) == [RANGE]
    assert operations[RANGE].action == action


def test_foreign_routes_stay(node):
    node.ipr.route("add", dst="2001:db8:77::/64", gateway=NEIGHBOUR6, family=socket.AF_INET6)
    _range_route("add", node)
    node.converge(wanted(1, tap=False, ranges=True))
    node.converge(NOTHING)
    assert list(node.ipr.get_routes(family=socket.AF_INET6, dst="2001:db8:77::/64"))
    assert [one for one in node.ipr.get_routes(family=socket.AF_INET6, table=255) if one["proto"] == 4]


def test_only_partitions_with_a_range_get_one(node):
    mixed = DesiredNetwork("br0", (partition(0, tap=False, ranges=True), partition(1, tap=False)), BASE.ip)
    operations = node.converge(mixed)
    assert [one for one in operations if one.startswith("range/")] == ["range/2001:db8:1:0:4001::/80"]


def test_a_rule_that_is_refused_takes_no_other_away(node):
    """The only way to table local must not go while its replacement is not there."""
    there = observe(NOTHING).rules
    local = next(rule for rule in there if rule.table == TABLE_LOCAL)
    bad = local._replace(table=0)
    operation = RuleOperation(id="rule/x", action="remove", reason="a test", add=(bad,), delete=(local,))
    (failure,) = apply((operation,))
    assert failure.error.code == "network.netlink"
    assert observe(NOTHING).rules == there
