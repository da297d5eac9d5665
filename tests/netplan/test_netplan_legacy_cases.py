"""Each case that the packet filter of legacy hosts leaves open: open it is, and nftables holds it."""

import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from netplan_scene import (
    BASE,
    NEIGHBOUR4,
    NEIGHBOUR6,
    UID,
    as_user,
    connect,
    iptables,
    know_each_other,
    read_counters,
    send,
    sink,
    take_rules_away,
    wanted,
)

from netplan import legacy_tables, nftables
from netplan.apply import apply
from netplan.errors import NetplanError
from netplan.legacy_cases import OPEN_CASES
from netplan.legacy_monitor import LegacyMonitor
from netplan.legacy_rules import PREFIX, render_legacy
from netplan.model import RateLimit
from netplan.monitor import Monitor
from netplan.observe import observe
from netplan.plan import plan
from netplan.xtables import AF_INET

A, B = UID, UID + 1
A6 = "2001:db8:1::2"


@pytest.fixture
def either(backend, node):
    """The node with either backend, and which it is."""
    node.converge(wanted(3, ranges=True))
    know_each_other(node)
    return node, backend == "nftables"


def test_every_case_has_a_proof_here():
    proofs = [name.removeprefix("test_case_").replace("_", "-") for name in globals() if "test_case_" in name]
    assert set(proofs) - {"late-notice-of-what-has-the-same-size"} == OPEN_CASES.keys()


def test_the_document_names_the_same_cases():
    text = Path(__file__).parents[2].joinpath("docs/design/packet-filter.md").read_text()
    assert re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE) == list(OPEN_CASES)


def test_case_tap_guard(legacy):
    """The rules say nothing of frames, whatever guards are wanted; nftables: tests of the tap guard."""
    rules = render_legacy(wanted(3))
    assert rules.chains == render_legacy(wanted(3, tap=False)).chains
    legacy.converge(wanted(1))
    tables = ["/usr/sbin/nft", "list", "tables"]
    assert not subprocess.run(tables, check=True, capture_output=True).stdout


def test_case_late_notice(either):
    _, held = either
    glance = LegacyMonitor()
    with Monitor(frozenset()) as monitor:
        take_rules_away()
        time.sleep(0.1)
        assert any(one.cause.startswith("filter/") for one in monitor.read()) == held
        assert [one.cause for one in glance.read()] == ([] if held else ["filter/iptables"])
        assert not glance.read()
    desired = wanted(3, ranges=True)
    assert [one.id for one in plan(desired, observe(desired))] == [
        "filter/partitiond" if held else "filter/iptables"
    ]


def test_case_late_notice_of_what_has_the_same_size(legacy):
    desired = wanted(3)
    legacy.converge(desired)
    glance = LegacyMonitor()
    iptables(
        "-R PARTITIOND-REST 1 -m owner --uid-owner 7 -m addrtype --src-type LOCAL -g PARTITIOND-DENY-FOREIGN"
    )
    assert not glance.read()
    assert [one.id for one in plan(desired, observe(desired))] == ["filter/iptables"]


def _foreign(held, *, first, verdict, port):
    """Somebody's rule about datagrams to a port, before ours or behind them."""
    if held:
        priority = -300 if first else 400
        nftables.run(
            f"table inet theirs {{ chain c {{ type filter hook output priority {priority};"
            f" udp dport {port} {verdict.lower()}; }}; }}\n"
        )
    else:
        place = "-I" if first else "-A"
        rule = f"{place} OUTPUT -p udp --dport {port} -j {verdict}"
        subprocess.run(["/usr/sbin/ip6tables-legacy", *rule.split()], check=True)


def test_case_rules_before_ours(either):
    node, held = either
    with sink(node) as port:
        assert as_user(B, lambda: send(A6, NEIGHBOUR6, port)) == "EPERM"
        _foreign(held, first=True, verdict="ACCEPT", port=port)
        assert as_user(B, lambda: send(A6, NEIGHBOUR6, port)) == ("EPERM" if held else "ok")
        node.converge(wanted(3, ranges=True))
        assert as_user(B, lambda: send(A6, NEIGHBOUR6, port)) == "EPERM"


def test_case_metered_then_dropped(either):
    """With nftables it hangs on the priority of the foreign chain; what stands before the meters is not metered."""
    node, held = either
    with sink(node) as port:
        if held:
            nftables.run(
                "table inet theirs { chain c { type filter hook output priority 10;"
                f" udp dport {port} drop; }}; }}\n"
            )
        else:
            _foreign(held, first=False, verdict="DROP", port=port)
        assert as_user(A, lambda: send(A6, NEIGHBOUR6, port)) == "EPERM"
    (found,) = [one for one in read_counters().traffic if one[:3] == ("slappart0", "ipv6", "remote")]
    assert found.packets_out == (0 if held else 1)


def test_case_refusals_of_others(either):
    node, held = either
    with sink(node) as port:
        assert as_user(1234, lambda: send(A6, NEIGHBOUR6, port)) == "EPERM"
    assert [one.uid for one in read_counters().refused] == ([1234] if held else [])


def test_case_own_address_in(either):
    """By TCP, whose answers come to a socket that the kernel has found already."""
    node, held = either
    with sink(node, kind=socket.SOCK_STREAM) as port:
        assert as_user(A, lambda: connect(str(BASE.ip), NEIGHBOUR6, port)) == "ok"
    (found,) = read_counters().shared
    assert (found.uid, found.family) == (A, "ipv6")
    assert found.packets_out > 1
    assert (found.packets_in > 0) == held


def test_case_quota_limit(either):
    node, held = either
    node.converge(wanted(3, ranges=True, limits={"slappart0": RateLimit(1000, in_force=True)}))

    def blast():
        for _ in range(200):
            with suppress(PermissionError):
                send(A6, NEIGHBOUR6, port, size=1000)

    with sink(node) as port:
        as_user(A, blast)
    (sent,) = (
        one.packets_out for one in read_counters().traffic if one[:3] == ("slappart0", "ipv6", "remote")
    )
    assert (sent < 200) == held


def test_case_two_commits(either, monkeypatch):
    """A change that fails in the middle: with iptables, IPv6 is as wanted and IPv4 as before."""
    node, held = either
    desired, write = wanted(3, ranges=True, ownership=False), legacy_tables.write

    def broken(family, edits):
        if family == AF_INET:
            raise NetplanError("network.packet_filter", "no")
        write(family, edits)

    with monkeypatch.context() as patch:
        if held:
            patch.setattr("netplan.nftables.run", lambda *_: broken(AF_INET, ()))
            patch.setattr("netplan.nfbatch.commit", lambda *_: broken(AF_INET, ()))
        else:
            patch.setattr("netplan.legacy_filter.write", broken)
        assert apply(plan(desired, observe(desired)))
    with sink(node) as port, sink(node, NEIGHBOUR4) as port4:
        assert as_user(B, lambda: send(A6, NEIGHBOUR6, port)) == ("EPERM" if held else "ok")
        assert as_user(B, lambda: send("10.0.0.2", NEIGHBOUR4, port4)) == "EPERM"
    node.converge(desired)


_UNLOCKED = """
import warnings
warnings.simplefilter("ignore")
import iptc
table = iptc.Table6(iptc.Table6.FILTER, autocommit=False)
table.set_policy("FORWARD", "DROP")  # as many rules as before
input(table.name)
table.commit()
"""


def test_case_unlocked_writer(legacy):
    """It has read the table, we change it, it writes what it has read: ours is gone, and found to be."""
    legacy.converge(wanted(2))
    one, two = wanted(2).partitions
    swapped = replace(wanted(2), partitions=(replace(one, uid=two.uid), replace(two, uid=one.uid)))
    line = [sys.executable, "-c", _UNLOCKED]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as theirs:
        assert theirs.stdout.read(6) == "filter"
        legacy.converge(swapped)
        theirs.communicate("\n")
    assert theirs.returncode == 0
    assert [one.id for one in plan(swapped, observe(swapped))] == ["filter/iptables"]
    legacy.converge(swapped)
    line = ["/usr/sbin/ip6tables-legacy", "-S", "FORWARD"]
    assert b"-P FORWARD DROP" in subprocess.run(line, check=True, capture_output=True).stdout


def test_case_scattered_addresses():
    """How many rules a packet meets at most on its way through the owners: neighbours, and others."""

    def met(step):
        parts = wanted(256, tap=False).partitions
        four = (replace(one, ipv4=IPv4Address("10.0.0.0") + step * one.index, ipv6=None) for one in parts)
        chains = render_legacy(replace(wanted(0), partitions=tuple(four))).chains[AF_INET]
        ways = chains[f"{PREFIX}OWN32"]
        return len(ways) + max(
            len(rules) for name, rules in chains.items() if name.startswith(f"{PREFIX}OWN32-")
        )

    assert met(1) < 64
    assert met(16) > 256


def _ping():
    """Ping a partition's address from the neighbour; the kernel answers."""
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as ping:
        ping.settimeout(0.5)
        ping.sendto(b"\x80\0\0\0\0\1\0\1", (A6, 0))
        while ping.recv(100)[0] != 129:
            pass


def test_pings_and_resets_of_the_kernel_itself_are_no_such_case(legacy):
    """What the owner match is said to break, and does with ``!`` or ``--socket-exists``."""
    legacy.converge(wanted(2))
    know_each_other(legacy)
    with legacy.at_neighbour():
        assert as_user(1234, lambda: connect(None, A6, 9)) == "ECONNREFUSED"
        _ping()
    line = f"-I OUTPUT -s {A6} -m owner --socket-exists -m owner ! --uid-owner {A} -j DROP"
    subprocess.run(["/usr/sbin/ip6tables-legacy", *line.split()], check=True)
    with legacy.at_neighbour(), pytest.raises(TimeoutError):
        _ping()
