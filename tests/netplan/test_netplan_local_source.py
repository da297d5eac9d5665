"""Clients that bind nothing, towards partitions of the same host; and the rules that let them."""

import socket

import pytest
from netplan_scene import (
    BASE,
    HOST4,
    NEIGHBOUR6,
    NOTHING,
    UID,
    as_user,
    connect,
    know_each_other,
    send,
    serving,
    wanted,
)

A, B, NOBODY = UID, UID + 1, 1234
A6, B6 = "2001:db8:1::2", "2001:db8:1::3"


def _rules(node):
    return {
        (rule.get_attr("FRA_PRIORITY") or 0, rule.get_attr("FRA_TABLE"), rule.get_attr("FRA_PROTOCOL"))
        for rule in node.ipr.get_rules(family=socket.AF_INET6)
    }


@pytest.fixture
def node_with_table(node):
    node.converge(wanted(3, local_source_table=True))
    know_each_other(node)
    return node


@pytest.mark.parametrize("uid", [A, B, NOBODY, 0])
def test_unbound_clients_reach_partitions_with_the_hosts_source(node_with_table, uid):
    with serving(A, A6) as port, serving(A, A6, socket.SOCK_DGRAM) as datagrams:

        def source():
            with socket.create_connection((A6, port), timeout=1) as one:
                return one.getsockname()[0]

        assert as_user(uid, source) == str(BASE.ip)
        assert as_user(uid, lambda: send(None, A6, datagrams)) == "ok"


def test_without_the_table_they_are_refused(node):
    node.converge(wanted(3))
    with serving(A, A6) as port:
        assert as_user(B, lambda: connect(None, A6, port)) == "ECONNREFUSED"


def test_the_rest_goes_on(node_with_table):
    with serving(A, A6) as port, serving(0, "::1") as local, serving(0, HOST4) as four:
        assert as_user(B, lambda: connect(B6, A6, port)) == "ok"
        assert as_user(B, lambda: connect(None, "::1", local)) == "ok"
        assert as_user(B, lambda: connect(None, HOST4, four)) == "ok"
        assert as_user(NOBODY, lambda: connect(A6, A6, port)) == "ECONNREFUSED"
        with node_with_table.at_neighbour():
            assert as_user(NOBODY, lambda: connect(None, A6, port)) == "ok"
    assert as_user(B, lambda: send(None, NEIGHBOUR6)) == "ok"


def test_the_hosts_rules_come_back(node):
    before = _rules(node)
    operations = node.converge(wanted(2, local_source_table=True))
    assert list(operations)[-1] == "rule/local-source"
    assert _rules(node) - before == {(0, 11200, 112), (1, 255, 112)}
    assert (0, 255, 2) not in _rules(node)
    operations = node.converge(wanted(1, local_source_table=True))
    assert next(iter(operations)) == f"source/{B6}/128"
    assert {one.action for one in operations.values()} == {"remove", "change"}
    assert next(iter(node.converge(NOTHING))) == "rule/local-source"
    assert _rules(node) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda ipr: ipr.rule("add", family=10, priority=0, table=255),
        lambda ipr: ipr.rule("del", family=10, priority=0, table=11200),
        lambda ipr: (
            ipr.rule("add", family=10, priority=5, table=255),
            ipr.rule("del", family=10, priority=1, table=255),
        ),
    ],
)
def test_drift_of_the_rules_is_repaired(node, damage):
    desired = wanted(2, local_source_table=True)
    node.converge(desired)
    damage(node.ipr)
    assert list(node.converge(desired)) == ["rule/local-source"]
