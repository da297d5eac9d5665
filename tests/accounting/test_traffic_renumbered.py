"""What a counter says is its own address's and its own life's: addresses change, partitions go and come again."""

import contextlib
import os
import re
import shlex
import sqlite3
import subprocess
from dataclasses import replace
from importlib.util import find_spec

import pytest
from network_scene import NEIGHBOUR4, NEIGHBOUR6, ip_lines
from traffic_flows import HEADERS, bound
from traffic_scene import GATEWAY4, HOSTS, PORT

from netplan import counters, nftables, observe
from netplan.apply import apply
from netplan.counters import read_in_force
from netplan.filter_state import load_filter, observe_filter
from netplan.legacy_filter import load_legacy
from netplan.legacy_rules import render_legacy
from netplan.packet_filter import render
from netplan.plan import plan
from partitiond import converge
from partitiond.context import Context
from partitiond.metering import ledger_path


@pytest.fixture(params=["nftables", "iptables"])
def backend(request):
    if request.param == "iptables" and find_spec("iptc") is None:
        pytest.skip("python-iptables is not installed: tools/environment --with iptables")
    return request.param


@pytest.fixture
def scene(make_scene, backend):
    with make_scene(3, (0,), packet_filter=backend) as made, contextlib.ExitStack() as stack:
        made.sinks(stack)
        yield made
        made.context.meters.close()  # perhaps not the one of the beginning


def send(scene, index, kind, count, size=100):
    """Datagrams of a partition to the neighbour; the bytes of them all."""
    old = kind in ("routable", "host")
    target = NEIGHBOUR4 if old else NEIGHBOUR6
    os.seteuid(scene.partitions[index].uid)
    try:
        one = bound(HOSTS[kind] if kind in HOSTS else scene.address(index, kind))
    finally:
        os.seteuid(0)
    with one:
        for _ in range(count):
            one.sendto(bytes(size), (target, PORT))
    return count, count * (size + HEADERS[4 if old else 6])


def bring_about(wanted):
    failures = apply(plan(wanted, observe.observe(wanted)))
    assert not failures, [(one.operation.id, one.error.message) for one in failures]


def test_an_address_that_changes_takes_nothing_along(scene):
    old = scene.label(0, "routable", "remote", "out")
    sent = send(scene, 0, "routable", 50)
    scene.a_pass()
    scene.node.write(routable_ipv4={"slappart0": f"203.0.113.77/24 via {GATEWAY4}"})
    done = scene.command("apply", "-c", scene.node.path)
    assert done.returncode == 0, done.stderr
    scene.context.meters.close()
    scene.context = Context.of(scene.node.load())
    scene.found = converge.observe(scene.context).node
    scene.partitions = scene.found.partitions
    new = scene.label(0, "routable", "remote", "out")
    assert new[1] == "203.0.113.77"
    scene.a_pass()
    assert scene.counted()[0][new] == (0, 0)
    more = send(scene, 0, "routable", 7)
    scene.a_pass()
    counted, _ = scene.counted()
    assert (counted[old], counted[new]) == (sent, more)


def test_a_partition_that_went_and_came_again_begins_at_zero(scene):
    """Between two passes, and it has sent more since than before: only the counter itself says that it is another one."""
    label = scene.label(2, "ipv6", "remote", "out")
    before = send(scene, 2, "ipv6", 10)
    scene.a_pass()
    bring_about(replace(scene.network, partitions=scene.network.partitions[:2]))
    bring_about(scene.network)
    ip_lines(f"neigh replace {NEIGHBOUR6} lladdr {scene.far_mac} dev br0 nud permanent")
    after = send(scene, 2, "ipv6", 25)
    scene.a_pass()
    counted, _ = scene.counted()
    assert counted[label] == tuple(a + b for a, b in zip(before, after, strict=True))


def test_what_goes_with_an_address_is_booked_first(scene):
    """Nobody metered since it was sent, and then the counters go: the address is another, the partition is no more."""
    those = ((0, "routable", 50), (2, "ipv6", 30), (2, "host", 20))
    labels = [scene.label(index, kind, "remote", "out") for index, kind, _ in those]
    before = scene.counted()[0]
    sent = [send(scene, *one) for one in those]
    scene.context.meters.close()
    scene.node.write(
        routable_ipv4={"slappart0": f"203.0.113.78/24 via {GATEWAY4}"}, slapformat={"partition_amount": 2}
    )
    done = scene.command("apply", "--force", "-c", scene.node.path)
    assert done.returncode == 0, done.stderr
    after, gaps = scene.counted()
    for label, amount in zip(labels, sent, strict=True):
        been = before.get(label, (0, 0))
        assert tuple(a - b for a, b in zip(after[label], been, strict=True)) == amount
    assert not gaps


def test_a_teardown_books_what_was_used(scene):
    label = scene.label(1, "ipv6", "remote", "out")
    before = scene.counted()[0].get(label, (0, 0))
    sent = send(scene, 1, "ipv6", 40)
    scene.context.meters.close()
    done = scene.command("teardown", "-c", scene.node.path)
    assert done.returncode == 0, done.stderr
    after = scene.counted()[0][label]
    assert tuple(a - b for a, b in zip(after, before, strict=True)) == sent
    assert scene.command("apply", "-c", scene.node.path).returncode == 0


def as_named_before(text):
    """The names of counters of the release before: without addresses."""
    return re.sub(r"(traffic(?:/[^/\"]+){4})/[^\"]+", r"\1", text)


def load_as_before(network, monkeypatch):
    """The same rules with counters under their old names."""
    if network.backend == "iptables":
        with monkeypatch.context() as patch:
            patch.setattr(
                "netplan.legacy_rules.counter_name", lambda *words: f"traffic/{'/'.join(words[:4])}"
            )
            load_legacy(render_legacy(replace(network)))
        return
    new = render(network)
    old = replace(
        new,
        counters=frozenset(map(as_named_before, new.counters)),
        elements={name: [as_named_before(one) for one in values] for name, values in new.elements.items()},
        fingerprint="0" * 32,
    )
    load_filter(old, observe_filter(old).contents)


def test_an_upgrade_from_counters_without_addresses_loses_nothing(scene, backend, monkeypatch):
    kinds = ("ipv6", "range", "routable")
    labels = [scene.label(0, kind, "remote", "out") for kind in kinds]
    scene.a_pass()
    before = scene.counted()[0]
    load_as_before(scene.network, monkeypatch)
    expected = []
    for kind in kinds:
        sent = [send(scene, 0, kind, 10)]
        scene.a_pass()
        sent += [send(scene, 0, kind, 40)]
        expected.append(tuple(map(sum, zip(*sent, strict=True))))
    with contextlib.closing(sqlite3.connect(ledger_path(scene.node.state))) as ledger:
        query = "SELECT DISTINCT epoch FROM level WHERE name = 'traffic' AND address = ?"
        for label in labels:
            assert ledger.execute(query, (label[1],)).fetchall() == [
                (read_in_force(backend).epoch,)
            ]  # as it was written
    scene.context.meters.close()
    done = scene.command("apply", "-c", scene.node.path)
    assert done.returncode == 0, done.stderr
    assert all(one.address for one in read_in_force(backend).traffic)
    for label, kind, amount in zip(labels, kinds, expected, strict=True):
        assert booked(scene, label, before) == amount
        more = send(scene, 0, kind, 7)
        scene.a_pass()
        assert booked(scene, label, before) == tuple(a + b for a, b in zip(amount, more, strict=True))


def test_what_one_backend_counted_is_booked_before_the_other_comes(scene, backend):
    labels = [scene.label(0, kind, "remote", "out") for kind in ("ipv6", "routable")]
    scene.a_pass()
    before = scene.counted()[0]
    sent = [send(scene, 0, kind, 50) for kind in ("ipv6", "routable")]
    other = "iptables" if backend == "nftables" else "nftables"
    scene.context.meters.close()
    scene.node.write(partitiond={"packet_filter": other})
    done = scene.command("apply", "-c", scene.node.path)
    assert done.returncode == 0, done.stderr
    assert [booked(scene, label, before) for label in labels] == sent
    assert not counters.read_counters(backend).epoch


@pytest.mark.parametrize("backend", ["nftables"], indirect=True)
def test_what_was_counted_is_booked_before_the_table_is_replaced(scene):
    """The names of the counters stay the same; the type of a map can only be changed with the whole table."""
    label = scene.label(0, "ipv6", "remote", "out")
    scene.a_pass()
    before = scene.counted()[0]
    sent = send(scene, 0, "ipv6", 50)
    nftables.run(
        "flush chain inet partitiond meter6_remote_out\n"
        "delete map inet partitiond ipv6_remote_out\n"
        "add map inet partitiond ipv6_remote_out { type ipv4_addr : counter; }\n"
    )
    epoch = counters.read_counters().epoch
    done = scene.command("apply", "-c", scene.node.path)
    assert done.returncode == 0, done.stderr
    assert counters.read_counters().epoch != epoch
    assert booked(scene, label, before) == sent
    more = send(scene, 0, "ipv6", 60)
    scene.a_pass()
    assert booked(scene, label, before) == tuple(map(sum, zip(sent, more, strict=True)))


@pytest.mark.parametrize("backend", ["iptables"], indirect=True)
def test_a_rule_that_was_taken_away_counts_nothing_twice(scene):
    """In one direction; the other one begins anew with it. Of nftables, no counter that is used can be taken away."""
    label = scene.label(0, "ipv6", "remote", "out")
    before = scene.counted()[0]
    first = send(scene, 0, "ipv6", 50)
    scene.a_pass()
    saved = subprocess.check_output(["/usr/sbin/ip6tables-legacy-save"], text=True).splitlines()
    (rule,) = [
        one for one in saved if f"{label[0]}/ipv6/remote/in/" in one and one.startswith("-A PARTITIOND-RIN")
    ]
    subprocess.run(["/usr/sbin/ip6tables-legacy", "-D", *shlex.split(rule)[1:]], check=True)
    bring_about(scene.network)
    more = send(scene, 0, "ipv6", 60)
    scene.a_pass()
    assert booked(scene, label, before) == tuple(map(sum, zip(first, more, strict=True)))


def booked(scene, label, before):
    """Packets and bytes that the ledger has more than before."""
    now, been = (had.get(label, (0, 0)) for had in (scene.counted()[0], before))
    return tuple(a - b for a, b in zip(now, been, strict=True))
