"""The packet filter of legacy hosts: what is ours and what is not, what is kept, what is found, how it goes.

That it holds what that of nftables holds is shown by the suites of ownership and metering, which run on both.
"""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from ipaddress import IPv6Network

import netplan_scene
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from netplan_scene import (
    NEIGHBOUR6,
    NOTHING,
    UID,
    as_user,
    break_rules,
    iptables,
    know_each_other,
    partition,
    read_counters,
    send,
    sink,
    take_rules_away,
    wanted,
)

from netplan import counters, legacy_filter, legacy_tables
from netplan.apply import apply
from netplan.errors import NetplanError
from netplan.legacy_filter import changes, load_legacy
from netplan.legacy_rules import PREFIX, render_legacy
from netplan.observe import observe
from netplan.plan import plan
from netplan.sysctls import NONLOCAL_BIND
from netplan.xtables import AF_INET, AF_INET6, Rule, entry

A6, B6 = "2001:db8:1::2", "2001:db8:1::3"


def _saved(tool="iptables", *options):
    """The rules as another program sees them; without when it ran, and the counters of policies."""
    done = subprocess.run(
        [f"/usr/sbin/{tool}-legacy-save", *options], check=True, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    return [line.partition(" [")[0] if line.startswith(":") else line for line in lines]


def _rules(lines):
    """Without the notes, which name a new epoch."""
    return [line for line in lines if "NOTES" not in line]


def _everything():
    return [_saved(tool) for tool in ("iptables", "ip6tables")]


FOREIGN = (
    ":theirs - [0:0]",
    "-A INPUT -p tcp --dport 22 -j ACCEPT",
    "-A INPUT -m comment --comment PARTITIOND-OUT -j theirs",
    "-A theirs -m limit --limit 3/sec -j LOG --log-prefix x",
    "-A OUTPUT -m owner ! --uid-owner 7 -m statistic --mode random --probability 0.5 -j RETURN",
    "-A FORWARD -m string --string spam --algo bm -j DROP",
)


def test_foreign_rules_stay_as_they_are(legacy):
    desired = wanted(3, ranges=True)
    iptables(*FOREIGN)
    before = _theirs()
    legacy.converge(desired)
    legacy.converge(wanted(4, ranges=True))
    assert _theirs() == before
    legacy.converge(NOTHING)
    assert _theirs() == before
    assert not any(PREFIX in line and "theirs" not in line for one in _everything() for line in one)


def _theirs():
    return [[line for line in one if PREFIX not in line or "theirs" in line] for one in _everything()]


def test_counters_of_foreign_rules_go_on(legacy):
    legacy.converge(wanted(1))
    with sink(legacy) as port:
        iptables(f"-A OUTPUT -p udp --dport {port} -j RETURN")
        send(None, NEIGHBOUR6, port, count=11)
        legacy.converge(wanted(2))
        send(None, NEIGHBOUR6, port, count=11)
    (line,) = [one for one in _saved("ip6tables", "-c") if f"--dport {port}" in one]
    assert line.startswith("[22:")


def test_a_second_pass_does_nothing(legacy, monkeypatch):
    desired = wanted(3, ranges=True)
    legacy.converge(desired)
    monkeypatch.setattr(
        legacy_tables, "write", lambda *_: pytest.fail("a pass without change writes nothing")
    )
    assert not plan(desired, observe(desired))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("-F PARTITIOND-OUT", "chain PARTITIOND-OUT was changed"),
        ("-A PARTITIOND-REST -j ACCEPT", "chain PARTITIOND-REST was changed"),
        (":PARTITIOND-MINE - [0:0]", "chain PARTITIOND-MINE was added"),
        ("-D OUTPUT -j PARTITIOND-OUT", "does not lead to our chains first"),
        ("-I INPUT -j ACCEPT", "does not lead to our chains first"),
        ("-A INPUT -j PARTITIOND-IN", "does not lead to our chains first"),
    ],
)
def test_what_others_change_is_found_and_repaired(legacy, damage, words):
    desired = wanted(3, ranges=True)
    legacy.converge(desired)
    before, epoch = _everything(), read_counters().epoch
    iptables(damage)
    (operation,) = plan(desired, observe(desired))
    assert (operation.id, operation.action) == ("filter/iptables", "change")
    assert words in operation.reason
    legacy.converge(desired)
    theirs = "-A INPUT -j ACCEPT"
    assert [[line for line in one if line != theirs] for one in _everything()] == before
    assert (theirs in _saved()) == ("-I INPUT" in damage)
    assert read_counters().epoch == epoch


def test_all_rules_gone_are_made_anew(legacy):
    desired = wanted(3, ranges=True)
    legacy.converge(desired)
    before = _everything()
    take_rules_away()
    (operation,) = legacy.converge(desired).values()
    assert (operation.action, operation.reason) == ("create", "missing")
    assert [_rules(one) for one in _everything()] == [_rules(one) for one in before]


def test_one_family_flushed_begins_both_anew(legacy):
    """Else what the other has counted until now would be taken for new."""
    desired = wanted(1)
    legacy.converge(desired)
    know_each_other(legacy)
    with sink(legacy) as port:
        as_user(UID, lambda: send(A6, NEIGHBOUR6, port, count=5))
        subprocess.run(["/usr/sbin/iptables-legacy", "-F"], check=True)
        assert read_counters().epoch == ""
        legacy.converge(desired)
        as_user(UID, lambda: send(A6, NEIGHBOUR6, port, count=2))
    (found,) = [one for one in read_counters().traffic if one[:3] == ("slappart0", "ipv6", "remote")]
    assert found.packets_out == 2


def test_a_kernel_without_nf_tables_is_not_asked_about_it(legacy, monkeypatch):
    def no_answer(*_):
        raise NetplanError("network.packet_filter", "the kernel does not answer about nft: Invalid argument")

    monkeypatch.setattr("netplan.observe.generation", no_answer)
    for name in ("observe_filter", "sysctls.read_notes"):
        monkeypatch.setattr(f"netplan.observe.{name}", lambda *_: pytest.fail("there is no nf_tables"))
    legacy.converge(wanted(2, ranges=True))
    legacy.converge(NOTHING)


def test_comments_of_others_in_our_chains_are_no_counters(legacy):
    legacy.converge(wanted(1))
    know_each_other(legacy)
    before = read_counters()
    for name in ("anything", "refused/x", "refused/x/y", "shared/ipv6/-1", "traffic/a", "a/b/c/d/e"):
        iptables(f"-I PARTITIOND-OUT -m comment --comment {name}")
    with sink(legacy) as port:
        send(None, NEIGHBOUR6, port)
    assert read_counters() == before


def test_lost_notes_are_drift_and_begin_all_anew(legacy):
    desired = wanted(1)
    legacy.converge(desired)
    epoch = read_counters().epoch
    subprocess.run(["/usr/sbin/ip6tables-legacy", "-D", "PARTITIOND-NOTES", "2"], check=True)
    assert read_counters().epoch == ""
    (operation,) = legacy.converge(desired).values()
    assert operation.reason == "chain PARTITIOND-NOTES was changed"
    assert read_counters().epoch not in {"", epoch}


def test_teardown_leaves_no_rule(legacy):
    iptables()  # the tables themselves stay once they are there
    before = _everything()
    legacy.converge(wanted(7, ranges=True))
    assert _everything() != before
    legacy.converge(NOTHING)
    assert _everything() == before


def test_who_only_looks_makes_no_table(legacy):
    names = ("ip_tables_names", "ip6_tables_names")
    observe(NOTHING)
    observe(wanted(1))
    for name in names:
        with open(f"/proc/thread-self/net/{name}") as file:
            assert file.read() == ""


def test_half_done_work_is_finished(legacy):
    iptables()
    desired, before = wanted(3, ranges=True), _everything()
    length = len(plan(desired, observe(desired)))
    for cut in range(0, length, 3):
        assert not apply(plan(desired, observe(desired))[:cut])
        legacy.converge(desired)
        assert not apply(plan(NOTHING, observe(NOTHING))[:cut])
        legacy.converge(NOTHING)
        assert _everything() == before


def test_a_kernel_setting_is_given_back(legacy):
    NONLOCAL_BIND.path.write_text("0")
    legacy.converge(wanted(2, ranges=True))
    assert NONLOCAL_BIND.path.read_text() == "1\n"
    break_rules()
    legacy.converge(wanted(3, ranges=True))
    legacy.converge(wanted(3))
    assert NONLOCAL_BIND.path.read_text() == "0\n"
    assert not observe(NOTHING).legacy_notes
    legacy.converge(NOTHING)


def test_nothing_comes_up_without_the_rules(legacy, monkeypatch):
    def broken(*_):
        raise NetplanError("network.packet_filter", "no")

    with monkeypatch.context() as patch:
        patch.setattr(legacy_filter, "write", broken)
        desired = wanted(2)
        failures = apply(plan(desired, observe(desired)))
    assert {one.error.code for one in failures} == {"network.packet_filter", "network.blocked"}
    assert legacy.link("slaptap0") is None
    legacy.converge(desired)


# --- from one backend to the other ----------------------------------------------------------------------------------


def _tables():
    return subprocess.run(
        ["/usr/sbin/nft", "list", "tables"], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize(("old", "new"), [("nftables", "iptables"), ("iptables", "nftables")])
def test_the_new_backend_is_in_force_before_the_old_one_goes(legacy, monkeypatch, old, new):
    NONLOCAL_BIND.path.write_text("0")
    before = _tables(), NONLOCAL_BIND.path.read_text()
    legacy.converge(wanted(3, ranges=True, backend=old))
    know_each_other(legacy)
    with sink(legacy) as port:
        as_user(UID, lambda: send(A6, NEIGHBOUR6, port, count=5))
        assert as_user(UID + 1, lambda: send(A6, NEIGHBOUR6, port)) == "EPERM"
        desired = wanted(3, ranges=True, backend=new)
        first, last = plan(desired, observe(desired))
        assert (first.action, last.action) == ("create", "remove")
        assert not apply((first,))  # both are in force
        assert as_user(UID + 1, lambda: send(A6, NEIGHBOUR6, port)) == "EPERM"
        assert counters.read_counters(old).epoch != counters.read_counters(new).epoch
        legacy.converge(desired)
        assert as_user(UID + 1, lambda: send(A6, NEIGHBOUR6, port)) == "EPERM"
        as_user(UID, lambda: send(A6, NEIGHBOUR6, port, count=2))
    assert counters.read_counters(old).epoch == ""
    (found,) = [
        one for one in counters.read_counters(new).traffic if one[:3] == ("slappart0", "ipv6", "remote")
    ]
    assert found.packets_out == 2  # what the old one counted is not counted again
    legacy.converge(NOTHING)
    assert (_tables(), NONLOCAL_BIND.path.read_text()) == before


# --- the optional package ---------------------------------------------------------------------------------------------


def test_nothing_of_python_iptables_is_imported_with_nftables(node):
    """Also where tables of legacy iptables exist, as some container engines leave them."""
    subprocess.run(["/usr/sbin/iptables-legacy", "-N", "theirs"], check=True)
    program = (
        "import sys; sys.path[:0] = ['.', 'tests/netplan']; sys.modules['iptc'] = None\n"
        "from netplan_scene import wanted, NOTHING, partition\n"
        "from netplan.apply import apply; from netplan.observe import observe; from netplan.plan import plan\n"
        "from netplan.counters import read_counters\n"
        "import partitiond.cli, partitiond.daemon\n"
        "for desired in (wanted(2, ranges=True), NOTHING):\n"
        "    assert not apply(plan(desired, observe(desired)))\n"
        "    read_counters()\n"
        "assert not [one for one in sys.modules if one.startswith(('iptc.', 'libxtwrapper'))]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_missing_package_says_how_to_install_it(node, monkeypatch):
    monkeypatch.setitem(sys.modules, "iptc", None)
    desired = wanted(1, backend="iptables")
    first, *others = apply(plan(desired, observe(desired)))
    assert (first.operation.id, first.error.code) == ("filter/iptables", "network.no_library")
    assert "pip install python-iptables" in first.error.hint
    assert {one.error.code for one in others} == {"network.blocked"}


# --- what is written ----------------------------------------------------------------------------------------------


def test_somebody_who_keeps_the_lock_is_told_of(legacy, monkeypatch):
    monkeypatch.setattr(legacy_tables, "_PATIENCE", 0.05)
    with legacy_tables.locked(), pytest.raises(NetplanError) as caught:
        load_legacy(render_legacy(wanted(1)))
    assert caught.value.retryable
    assert "xtables.lock" in caught.value.message


def test_a_commit_that_somebody_disturbs_is_made_again(legacy, monkeypatch):
    """Between reading and writing, by a program that does not know the lock."""
    edit, disturbed = legacy_tables._edit, []

    def disturb(iptc, table, family, one):
        if not disturbed:
            disturbed.append(family)
            other = {**os.environ, "XTABLES_LOCKFILE": "/run/another.lock"}
            rule = "-A FORWARD -s 2001:db8:9::1 -j DROP"
            subprocess.run(["/usr/sbin/ip6tables-legacy", *rule.split()], check=True, env=other)
        edit(iptc, table, family, one)

    monkeypatch.setattr(legacy_tables, "_edit", disturb)
    legacy.converge(wanted(2))
    assert disturbed == [AF_INET6]
    assert "-A FORWARD -s 2001:db8:9::1/128 -j DROP" in _saved("ip6tables")


def test_names_are_short_enough_and_every_chain_is_reached():
    many = tuple(
        replace(partition(index), uid=2**31 - 1000 + index, id=f"{index:x}" + "x" * 60)
        for index in range(300)
    )
    rules = render_legacy(replace(wanted(0), partitions=many))
    for family in (AF_INET, AF_INET6):
        chains = rules.chains[family]
        assert max(map(len, chains)) <= 28
        led_to = {one.target for entries in chains.values() for one in entries}
        led_to |= {one.target for one in rules.jumps[family].values()}
        assert chains.keys() <= led_to
        assert {name for name in led_to if name.startswith(PREFIX)} <= chains.keys()


_RULE = st.builds(lambda number: entry(Rule("RETURN", comment=str(number)), AF_INET), st.integers(0, 9))
_CHAINS = st.dictionaries(
    st.sampled_from([f"{PREFIX}{one}" for one in "ABC"]), st.lists(_RULE, max_size=8).map(tuple)
)
_BUILT_IN = st.lists(
    st.sampled_from(
        [
            entry(Rule("DROP", comment="theirs"), AF_INET),
            entry(Rule("ACCEPT"), AF_INET),
            entry(Rule(f"{PREFIX}A"), AF_INET),
            entry(Rule(f"{PREFIX}B"), AF_INET),
        ]
    ),
    max_size=5,
).map(tuple)


@settings(max_examples=300, deadline=None)
@given(found=_CHAINS, want=_CHAINS, built_in=_BUILT_IN, jumps=st.booleans(), anew=st.booleans())
def test_changes_lead_from_anything_to_what_is_wanted(found, want, built_in, jumps, anew):
    jump = {"INPUT": entry(Rule(f"{PREFIX}A"), AF_INET)} if jumps else {}
    tables = {"INPUT": list(built_in), **{name: list(rules) for name, rules in found.items()}}
    touched = Counter()
    for one in changes({**found, "INPUT": built_in}, want, jump, anew=anew):
        rules = tables.get(one.chain)
        match one.kind:
            case "create":
                assert rules is None
                tables[one.chain] = []
            case "flush":
                rules.clear()
            case "remove":
                assert tables.pop(one.chain) == []
            case "delete":
                touched[rules.pop(one.place)] += 1
            case "insert":
                place = len(rules) if one.place < 0 else one.place
                assert place <= len(rules)
                rules.insert(place, one.entry)
    theirs = [one for one in built_in if not one.target.startswith(PREFIX)]
    assert tables.pop("INPUT") == [*jump.values(), *theirs]
    assert {name: tuple(rules) for name, rules in tables.items()} == want


def test_an_address_inside_a_foreign_range_is_its_owners(legacy):
    """Whoever is sent to the neighbours of an address is sent on to the ranges."""
    inside = IPv6Network("2001:db8:1::/112")  # has the addresses of both
    one, two = wanted(2, tap=False).partitions
    other = replace(one, ipv6_range=inside)
    legacy.converge(replace(wanted(0), partitions=(other, two)))
    know_each_other(legacy)
    with sink(legacy) as port:
        assert as_user(UID, lambda: send("2001:db8:1::7", NEIGHBOUR6, port)) == "ok"
        assert as_user(UID + 1, lambda: send("2001:db8:1::7", NEIGHBOUR6, port)) == "EPERM"
        assert as_user(UID + 1, lambda: send(B6, NEIGHBOUR6, port)) == "ok"
        assert as_user(1234, lambda: send(B6, NEIGHBOUR6, port)) == "EPERM"
    found = {found[:3]: found.packets_out for found in read_counters().traffic}
    assert found["slappart0", "range", "remote"] == 1
    assert found["slappart1", "ipv6", "remote"] == 1
    assert netplan_scene.backend == "iptables"
