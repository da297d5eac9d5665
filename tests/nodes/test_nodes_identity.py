"""Whose an address, an instance, or an answer is: what decides, without a node."""

import contextlib
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address, ip_network
from types import SimpleNamespace

import pytest
from nodes_world import until

from partitiond import alive, dropped, identity_guard, rebuilt
from partitiond.errors import PartitiondError
from partitiond.offers import OfferBook, Offered, compare, digest
from partitiond.state import InstanceState
from slap_client.documents import ComputerDocument, PartitionDocument
from slap_client.errors import SlapError

OLD, NEW, THEIRS = ["10.0.0.2", "2001:db8::2"], ["10.0.0.2", "2001:db8::9"], ["10.0.0.2", "2001:db8::77"]


def answer(*rows, name="slappart0"):
    return ComputerDocument(
        "COMP-1",
        partitions=(PartitionDocument(name, "started", ip_list=tuple(("tap", one) for one in rows)),),
    )


@pytest.fixture
def guarded(tmp_path):
    """A node's memory of what it told, and what is done about an answer."""
    rules = SimpleNamespace(
        ipv4_network=ip_network("10.0.0.0/16"), partition_network=None, mesh_range=None, base=None
    )
    rules.base = SimpleNamespace(network=ip_network("2001:db8::/64"))
    made = SimpleNamespace(
        offers=OfferBook(tmp_path / "offered.json"),
        woken=0,
        told=[],
        lane="capacity",
        config=SimpleNamespace(computer_id="COMP-1", unmanaged=None),
        store=SimpleNamespace(partitions=list, addresses=dict),
        node_in_force=SimpleNamespace(
            choice=SimpleNamespace(rules=rules), partition=lambda _: None, address=ip_address("2001:db8::1")
        ),
        events=SimpleNamespace(record=lambda what, message, **_: made.told.append((what, message))),
    )

    def wake():
        made.woken += 1

    made.wake_capacity = wake
    return made


def test_this_machine_is_no_other_one():
    """Addresses of before may well be on it still: its kernel answers itself."""
    subprocess.run(["/usr/sbin/ip", "link", "set", "lo", "up"], check=True)
    for line in (
        "192.0.2.77/32",
        "2001:db8:77::2/128",
    ):  # also on lo an address may be tentative for a moment
        subprocess.run(["/usr/sbin/ip", "address", "add", line, "dev", "lo", "nodad"], check=True)
    own = [ip_address(one) for one in ("192.0.2.77", "2001:db8:77::2", "127.0.0.1", "::1")]
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("2001:db8:77::2", 0))
        assert alive.answering(own, 0.3) == []
    finally:
        for line in ("192.0.2.77/32", "2001:db8:77::2/128"):
            subprocess.run(["/usr/sbin/ip", "address", "del", line, "dev", "lo"], check=True)


def test_an_address_that_becomes_this_machines_meanwhile_is_no_other_ones(monkeypatch):
    """As at boot, while addresses are looked for in the neighbourhood before they are in use."""
    address = ip_address("2001:db8:77::3")
    ask = alive._ask

    def slowly(version, wanted, seconds):
        assert wanted == {address}, "it is tentative"
        until(lambda: alive._is_here(address), "the address to be in use", seconds=20)
        found = ask(version, wanted, seconds)
        assert found == wanted
        return found

    ip = "/usr/sbin/ip"
    subprocess.run([ip, "link", "set", "lo", "up"], check=True)
    subprocess.run([ip, "link", "add", "near", "type", "veth", "peer", "name", "far"], check=True)
    try:
        for name in ("near", "far"):
            subprocess.run([ip, "link", "set", name, "up"], check=True)
        subprocess.run([ip, "address", "add", f"{address}/64", "dev", "near"], check=True)
        monkeypatch.setattr(alive, "_ask", slowly)
        assert alive.answering([address], 1) == []
    finally:
        subprocess.run([ip, "link", "delete", "near"], check=True)


@pytest.mark.parametrize("rows", [["10.9.0.2", "2001:db8:5::2"], ["2001:db8:5::2", "10.9.0.2"]])
def test_private_addresses_are_nobodys_whatever_their_order(rows, monkeypatch, guarded):
    """The master says them in no order; those of its own network another host of this site may have."""
    asked = []
    monkeypatch.setattr(alive, "answering", lambda found: asked.extend(found) or [])
    identity_guard._answering(guarded.node_in_force, {"slappart0": rows})
    assert asked == [ip_address("2001:db8:5::2")]


def test_two_lanes_that_share_an_answer_tell_of_a_twin_once(guarded):
    """Each would find the book as the other found it, and write over what the other wrote."""
    guarded.offers.save(Offered(({"slappart0": digest(NEW)},)))
    save, together = guarded.offers.save, threading.Barrier(2)

    def slow(offered):
        # what one has read, both have, where nothing keeps the other away
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.5)
        save(offered)

    guarded.offers.save = slow
    with ThreadPoolExecutor(2) as lanes:
        list(lanes.map(lambda _: identity_guard.look(guarded, answer(*THEIRS)), range(2)))
    assert [what for what, _ in guarded.told] == ["node.twin"]
    assert guarded.offers.read().foreign == {"slappart0": THEIRS}


def test_an_answer_without_those_that_were_told_says_nothing():
    offered = Offered(({"slappart0": digest(NEW)},))
    for found in ({}, {"slappart7": THEIRS}):
        assert compare(offered, found) == ("unknown", {})
    assert compare(offered, {"slappart0": NEW}) == ("ours", {})


def test_nothing_in_use_ends_no_suspicion(guarded):
    guarded.offers.save(Offered(({"slappart0": digest(NEW)},)))
    identity_guard.look(guarded, answer(*THEIRS))
    assert guarded.offers.read().foreign
    identity_guard.look(
        guarded, ComputerDocument("COMP-1", partitions=(PartitionDocument("slappart0", "destroyed"),))
    )
    assert guarded.offers.read().foreign
    assert len(guarded.told) == 1
    identity_guard.look(guarded, answer(*NEW))
    assert not guarded.offers.read().foreign


def test_a_master_that_goes_on_with_older_addresses_is_told_again_once(guarded):
    """One behind a cache, say, that is not told more often by that."""
    guarded.offers.save(Offered(({"slappart0": digest(OLD)}, {"slappart0": digest(NEW)})))
    for _ in range(9):
        before = guarded.woken
        identity_guard.look(guarded, answer(*OLD))
        if guarded.woken > before:
            with guarded.offers.telling({"slappart0": NEW}):
                pass
    assert guarded.woken == 1
    identity_guard.look(guarded, answer(*NEW))
    for _ in range(3):
        identity_guard.look(guarded, answer(*OLD))
    assert guarded.woken == 2


def test_nobody_begins_on_an_answer_that_is_not_understood(guarded):
    """Who has the addresses by now is not known then; the operator may say that it does not matter."""

    def computer():
        raise SlapError("slap.bad_answer", "no document")

    guarded.client = SimpleNamespace(computer=computer)
    with pytest.raises(SlapError):
        identity_guard.before_offer(guarded, guarded.node_in_force, force=False)
    assert identity_guard.before_offer(guarded, guarded.node_in_force, force=True) is guarded.node_in_force


def test_whichever_lane_is_first_finds_the_other_machine(monkeypatch, guarded):
    """The master may be away when it is to be told of the node, and back when it is asked for instances."""
    answers = [ip_address("2001:db8:5::2")]
    monkeypatch.setattr(alive, "answering", lambda _: answers)
    for _ in range(2):
        with pytest.raises(PartitiondError) as caught:
            identity_guard.begin(guarded, answer("10.0.0.2", "2001:db8:5::2"))
        assert caught.value.code == "node.twin"
        guarded.offers.see(["somebody's"])  # as the answers in between show
    assert len(guarded.told) == 1, "told at each try"
    answers.clear()
    identity_guard.begin(guarded, answer("10.0.0.2", "2001:db8:5::2"))
    identity_guard.refuse(guarded)
    assert guarded.offers.read().told
    # from now on it is there itself
    answers.append(ip_address("2001:db8:5::2"))
    identity_guard.begin(guarded, answer("10.0.0.2", "2001:db8:5::2"))


def test_nobody_begins_before_it_has_an_address(guarded):
    """What the master has would fit into no network yet, and be given up for what follows from the index."""
    guarded.node_in_force.address = None
    identity_guard.begin(guarded, answer(*OLD))
    assert guarded.offers.read() == Offered()


def here(**more):
    fixed = {"instance_guid": "COMP-1-slappart0", "title": "one/one", "timestamp": "1"}
    return InstanceState("slappart0", **{"life": "started", **fixed, **more})


def wanted(title, guid="COMP-1-slappart0", timestamp="1"):
    return PartitionDocument(
        "slappart0",
        "started",
        "url",
        instance_guid=guid,
        timestamp=timestamp,
        instance_title=title,
        root_instance_title=title,
    )


@pytest.mark.parametrize(
    ("state", "entry", "another"),
    [
        (here(), wanted("one"), False),
        (here(), wanted("one", timestamp="2"), False),
        # the master was begun anew while the node was down, and gave the place to somebody else
        (here(), wanted("two", timestamp="2"), True),
        # a new name alone
        (here(), wanted("two"), False),
        (here(dropped=True), wanted("two"), True),
        # production's guids are of instances: whatever it is called, it is the same
        (here(instance_guid="SOFTINST-1", dropped=True), wanted("two", "SOFTINST-1", "2"), False),
        (here(instance_guid="SOFTINST-1"), wanted("one", "SOFTINST-2"), True),
    ],
)
def test_whether_it_is_another_instance(state, entry, another):
    assert dropped.is_another(state, entry) is another


@pytest.mark.parametrize(
    ("tree", "ready"),
    [
        ([("started", 0, False), ("stopped", 0, False)], ["p0", "p1"]),
        # its try comes soon
        ([("started", 0, False), ("failed", 1, False)], []),
        # one that never comes up must not keep the others from being heard of
        ([("started", 0, False), ("failed", 3, False)], ["p0"]),
        # its buildout ended well, and has published
        ([("started", 0, False), ("failed", 1, True)], ["p0", "p1"]),
        ([("started", 0, False), ("destroying", 0, False)], ["p0"]),
        ([("failed", 9, False)], []),
    ],
)
def test_whose_tree_is_told(tree, ready):
    states = [
        InstanceState(f"p{number}", life=life, failures=failures, by_promise=by_promise, rebuilt=True)
        for number, (life, failures, by_promise) in enumerate(tree)
    ]
    assert rebuilt.ready(states) == ready


def test_what_slapgrid_left_is_not_lost(tmp_path):
    partition = SimpleNamespace(path=tmp_path)
    entry = PartitionDocument("slappart0", "started", connection={"url": "http://[2001:db8::1]/"})
    assert rebuilt.is_lost(partition, entry)
    (tmp_path / ".installed.cfg").touch()
    assert not rebuilt.is_lost(partition, entry)
    assert not rebuilt.is_lost(partition, PartitionDocument("slappart0", "started"))
