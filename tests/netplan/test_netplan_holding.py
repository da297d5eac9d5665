"""Tables that nobody else can change while we hold them: what a reload of the distribution's firewall meets."""

import subprocess
import threading

import pytest
from netplan_scene import NEIGHBOUR6, NOTHING, UID, as_user, know_each_other, send, sink, wanted

from netplan import holding, nfbatch, nftables
from netplan.counters import read_counters
from netplan.errors import NetplanError
from netplan.filter_state import _digests, keep
from netplan.model import FilterState
from netplan.netlink import NETLINK_NETFILTER, NetlinkSocket
from netplan.nfnetlink import generation, nft_socket, table
from netplan.observe import observe

A6, B = "2001:db8:1::2", UID + 1


def _nft(*words):
    return subprocess.run(["/usr/sbin/nft", *words], check=False, capture_output=True, text=True)


def _flags():
    with NetlinkSocket(NETLINK_NETFILTER) as sock:
        found = table(sock)
    return found.flags if found else None


@pytest.fixture
def held(node, monkeypatch):
    """A node whose filter this process holds, whatever nft is installed; the kernel must know how."""
    monkeypatch.setattr("netplan.nftables.knows_persist", lambda: True)
    holding.begin()
    try:
        node.converge(wanted(3, ranges=True))
        if _flags() == 0:
            pytest.skip("this kernel has no NFT_TABLE_F_PERSIST (Linux 6.9)")
        know_each_other(node)
        yield node
        node.converge(NOTHING)
    finally:
        holding.end()


def test_others_cannot_flush_what_we_hold(held):
    with sink(held) as port:
        for words in (("flush", "ruleset"), ("delete", "table", "inet", "partitiond")):
            _nft(*words)
            assert as_user(B, lambda: send(A6, NEIGHBOUR6, port)) == "EPERM"
        assert as_user(UID, lambda: send(A6, NEIGHBOUR6, port, count=3)) == "ok"
    (found,) = [one for one in read_counters().traffic if one[:3] == ("slappart0", "ipv6", "remote")]
    assert found.packets_out == 3
    with pytest.raises(NetplanError, match="not permitted"):
        nftables.run("flush table inet partitiond\n")
    assert not held.plan(wanted(3, ranges=True))


@pytest.mark.parametrize("raw", [True, False])
def test_our_own_changes_keep_it_held(held, raw, monkeypatch):
    if not raw:
        monkeypatch.setattr("netplan.filter_state._load_elements", lambda *_: False)
    for desired in (wanted(5, ranges=True), wanted(5), wanted(2, ranges=True)):
        held.converge(desired)
        assert holding.held()
        assert _nft("flush", "table", "inet", "partitiond").returncode != 0
    epoch = read_counters().epoch
    held.converge(wanted(3, ranges=True))
    assert read_counters().epoch == epoch


def test_it_stays_when_its_owner_ends_and_the_next_one_takes_it_over(held):
    desired = wanted(3, ranges=True)
    holding.end()
    assert not held.plan(desired)
    assert not holding.held()
    nftables.run("add counter inet partitiond anybody { }\ndelete counter inet partitiond anybody\n")
    held.converge(desired)
    keep(observe(desired).filter)
    assert not holding.held()
    holding.begin()
    keep(FilterState(loaded=True))
    assert not holding.held()
    keep(observe(desired).filter)
    assert holding.held()
    assert not held.plan(desired)
    assert _nft("flush", "table", "inet", "partitiond").returncode != 0


def test_what_cannot_be_held_works_as_before(node, monkeypatch):
    monkeypatch.setattr("netplan.nftables.knows_persist", lambda: False)
    holding.begin()
    try:
        node.converge(wanted(2))
        keep(observe(wanted(2)).filter)
        assert not holding.held()
        assert _flags() == 0
        _nft("flush", "ruleset")
        node.converge(wanted(3))
        node.converge(NOTHING)
    finally:
        holding.end()


def test_a_kernel_that_does_not_know_it_gets_a_plain_table(node, monkeypatch):
    """Flags that the kernel refuses stand in for a kernel before 6.9."""
    monkeypatch.setattr("netplan.nftables.knows_persist", lambda: True)
    monkeypatch.setattr("netplan.holding._PERSIST", 0x40)
    node.converge(wanted(2))
    assert _flags() == 0
    node.converge(NOTHING)


def test_what_others_commit_costs_one_comparison(node, monkeypatch):
    """Found as it was, that is noted: the next look need not compare every object again."""
    desired, compared = wanted(2), []
    monkeypatch.setattr("netplan.filter_state._digests", lambda found: compared.append(1) or _digests(found))
    holding.begin()
    try:
        node.converge(desired)
        nftables.run("add table inet theirs\n")
        compared.clear()
        keep(observe(desired).filter)
        assert compared
        compared.clear()
        assert not node.plan(desired)
        assert not compared
    finally:
        holding.end()
        nftables.run("delete table inet theirs\n")


def test_two_threads_commit_beside_each_other(held):
    """On one socket, each would take the other's answer and wait for its own for ever."""

    def commits(name):
        done = 0
        while done < 50:
            with nft_socket() as sock:
                try:
                    done += holding.commit(sock, generation(sock), list(nfbatch.counters([name], add=True)))
                except NetplanError:  # the other one was faster
                    continue

    threads = [threading.Thread(target=commits, args=(name,), daemon=True) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
