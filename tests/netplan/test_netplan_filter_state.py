"""Each change to the packet filter by somebody else is found, named, and undone."""

import json
import subprocess
from pathlib import Path

import pytest
from netplan_scene import NEIGHBOUR6, NOTHING, UID, as_user, know_each_other, send, sink, wanted

from netplan import nfbatch, nfnetlink, nftables
from netplan.apply import apply
from netplan.counters import read_counters
from netplan.errors import NetplanError
from netplan.observe import observe
from netplan.packet_filter import FilterOperation, render
from netplan.plan import plan

TABLE = "inet partitiond"


def _nft(*words: str) -> str:
    return subprocess.run(["/usr/sbin/nft", *words], check=True, capture_output=True, text=True).stdout


def _handle(chain: str) -> int:
    return max(
        item["rule"]["handle"]
        for item in json.loads(_nft("-j", "list", "chain", "inet", "partitiond", chain))["nftables"]
        if "rule" in item
    )


def _asleep() -> str:
    # the kernel changes no other flag of a table than this one
    return "dormant, persist" if nftables.knows_persist() else "dormant"


def _listing() -> str:
    """The table as nft itself lists it, without what may differ: values, handles, our notes, the order."""
    found = []
    for item in json.loads(_nft("-j", "list", "table", "inet", "partitiond"))["nftables"]:
        for kind, about in item.items():
            if kind in {"metainfo", "counter"} or about.get("chain") == "fingerprint":
                continue
            about.pop("handle", None)
            if "elem" in about:
                about["elem"] = sorted(map(str, about["elem"]))
            found.append(f"{kind} {json.dumps(about, sort_keys=True)}")
    return "\n".join(sorted(found))


@pytest.fixture
def loaded(node):
    node.converge(wanted(3, ranges=True))
    return node


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda: f"delete element {TABLE} owner6 {{ {UID} . 2001:db8:1::2 }}", "set owner6 was changed"),
        (lambda: f"add element {TABLE} owner6 {{ 7 . 2001:db8:1::2 }}", "set owner6 was changed"),
        (lambda: f"flush set {TABLE} private4", "set private4 was changed"),
        (lambda: f"flush set {TABLE} range6", "set range6 was changed"),
        (lambda: f"flush map {TABLE} ipv6_remote_out", "map ipv6_remote_out was changed"),
        (
            lambda: (
                f"delete element {TABLE} ipv6_remote_in {{ 2001:db8:1::2 }}\n"
                f'add element {TABLE} ipv6_remote_in {{ 2001:db8:1::2 : "traffic/slappart1/ipv6/remote/in/2001.db8.1..3" }}'
            ),
            "map ipv6_remote_in was changed",
        ),
        (lambda: f"insert rule {TABLE} out6 accept", "chain out6 was changed"),
        (lambda: f"delete rule {TABLE} out4 handle {_handle('out4')}", "chain out4 was changed"),
        (lambda: f"replace rule {TABLE} in handle {_handle('in')} accept", "chain in was changed"),
        (lambda: f"flush chain {TABLE} out", "chain out was changed"),
        (lambda: f"add chain {TABLE} out {{ policy drop; }}", "chain out was changed"),
        (lambda: f"flush chain {TABLE} fingerprint", "was added"),
        (
            lambda: f"flush chain {TABLE} forwarded\ndelete chain {TABLE} forwarded",
            "chain forwarded was removed",
        ),
        (
            lambda: f"add chain {TABLE} extra {{ type filter hook output priority -5; }}",
            "chain extra was added",
        ),
        (
            lambda: f"add set {TABLE} extra {{ type ipv4_addr; elements = {{ 1.2.3.4 }}; }}",
            "set extra was added",
        ),
        (lambda: f"add map {TABLE} more {{ type ipv4_addr : mark; }}", "map more was added"),
        (lambda: f"add table {TABLE} {{ flags {_asleep()}; }}", "table partitiond is dormant"),
        (lambda: f"delete table {TABLE}", "missing"),
        (lambda: "flush ruleset", "missing"),
    ],
)
def test_each_drift_comes_back_in_the_plan_and_is_repaired(loaded, damage, reason):
    before = _listing()
    nftables.run(damage() + "\n")
    operations = loaded.converge(wanted(3, ranges=True))
    assert list(operations) == ["filter/partitiond"]
    assert reason in operations["filter/partitiond"].reason
    assert _listing() == before


def test_what_cannot_be_changed_in_place_is_replaced_whole(loaded):
    before, epoch = _listing(), read_counters().epoch
    nftables.run(
        f"flush chain {TABLE} ranged6\nflush chain {TABLE} out6\nflush chain {TABLE} in6\n"
        f"flush chain {TABLE} forwarded\ndelete set {TABLE} range6\n"
        f"add set {TABLE} range6 {{ type ipv4_addr; }}\n"
    )
    loaded.converge(wanted(3, ranges=True))
    assert _listing() == before
    assert read_counters().epoch != epoch
    # the note of what was found before us lives on
    loaded.converge(NOTHING)
    assert Path("/proc/sys/net/ipv6/ip_nonlocal_bind").read_text().strip() == "0"


def test_other_peoples_rules_are_no_drift_of_ours(loaded):
    nftables.run("add table inet other\nadd chain inet other c { type filter hook input priority 0; }\n")
    assert not loaded.plan(wanted(3, ranges=True))
    loaded.converge(wanted(2))
    loaded.converge(NOTHING)
    assert "inet other" in _nft("list", "tables")


def test_counters_survive_the_repair(loaded):
    with sink(loaded) as port:
        as_user(UID, lambda: send("2001:db8:1::2", NEIGHBOUR6, port, count=9))
    before = read_counters()
    nftables.run(f"flush chain {TABLE} out6\nflush map {TABLE} ipv6_remote_out\n")
    loaded.converge(wanted(3, ranges=True))
    assert read_counters() == before


def test_the_filter_comes_before_what_it_guards(node):
    node.plan(wanted(3, ranges=True))
    kinds = [type(one) for one in node.last]
    assert kinds.index(FilterOperation) == 0
    node.converge(wanted(3, ranges=True))
    node.plan(wanted(1))
    assert [type(one) for one in node.last].index(FilterOperation) == len(node.last) - 1
    node.converge(wanted(1))
    node.plan(NOTHING)
    assert isinstance(node.last[-1], FilterOperation)
    assert node.last[-1].action == "remove"


def test_without_the_filter_nothing_new_comes_up(node, monkeypatch):
    def broken(text):
        raise NetplanError("network.packet_filter", "no")

    desired = wanted(2)
    node.plan(desired)
    with monkeypatch.context() as patch:
        patch.setattr("netplan.nftables.run", broken)
        failures = apply(node.last)
    assert len(failures) == len(node.last)
    assert {one.error.code for one in failures} == {"network.packet_filter", "network.blocked"}
    assert node.link("slaptap0") is None
    node.converge(desired)


def test_a_failed_load_leaves_the_old_rules(loaded):
    before = _listing()
    with pytest.raises(NetplanError) as caught:
        nftables.run(f"flush table {TABLE}\nadd rule {TABLE} nochain accept\n")
    assert caught.value.code == "network.packet_filter"
    assert "No such file" in caught.value.message
    assert _listing() == before


def test_no_library_says_what_to_install(monkeypatch):
    nftables._library.cache_clear()
    monkeypatch.setattr(nftables, "_LIBRARY", "libnothing.so.1")
    with pytest.raises(NetplanError) as caught:
        nftables.run("")
    nftables._library.cache_clear()
    assert caught.value.code == "network.no_library"
    assert "apt install" in caught.value.hint


def test_changes_of_others_while_loading_are_not_taken_for_ours(node, monkeypatch):
    """Somebody opens our filter between our load and our note: the note must not cover it."""
    desired = wanted(2)
    run, calls = nftables.run, []

    def disturbed(text):
        run(text)
        calls.append(text)
        if len(calls) == 1:
            run(f"insert rule {TABLE} out6 accept\n")

    monkeypatch.setattr("netplan.nftables.run", disturbed)
    node.converge(desired)
    assert "accept" not in _nft("list", "chain", "inet", "partitiond", "out6").split("\n")[2].split()[:1]
    assert len(calls) == 2


@pytest.mark.parametrize("ranges", [False, True])
def test_elements_are_read_back_as_they_were_written(node, ranges):
    """What is compared with what is wanted, when partitions come and go, is the kernel's word and not our memory."""
    desired = wanted(20, ranges=ranges)
    node.converge(desired)
    contents = observe(wanted(21, ranges=ranges)).filter.contents
    rendered = render(desired)
    assert contents.intact
    assert contents.elements == {name: frozenset(values) for name, values in rendered.elements.items()}
    assert contents.counters - {"found/net.ipv6.ip_nonlocal_bind/0"} == rendered.counters
    assert (contents.sets, contents.maps) == (rendered.sets.keys(), rendered.maps.keys())
    assert contents.chains == rendered.chains


@pytest.fixture(params=["raw", "nft"])
def way(request, monkeypatch):
    """Both ways of changing elements: the second is there for what the first does not know, or the kernel refuses."""
    if request.param == "nft":
        monkeypatch.setattr("netplan.filter_state._load_elements", lambda *_: False)
    return request.param


def test_both_ways_leave_the_same_table(node, way):
    """Whatever way partitions come and go, the table is the one that is loaded in one go."""
    for count in (5, 6, 9, 2, 3):
        node.converge(wanted(count, ranges=True, local_source_table=True))
    by_steps, notes = _listing(), _nft("list", "chain", "inet", "partitiond", "fingerprint").count("comment")
    nftables.run(f"delete table {TABLE}\n")
    node.converge(wanted(3, ranges=True, local_source_table=True))
    assert by_steps == _listing()
    assert notes == _nft("list", "chain", "inet", "partitiond", "fingerprint").count("comment")


def test_a_change_touches_what_differs_and_nothing_else(node, way, monkeypatch):
    ran, sent = [], []
    run, commit = nftables.run, nfbatch.commit
    monkeypatch.setattr("netplan.nftables.run", lambda text: (ran.append(text), run(text)))
    monkeypatch.setattr("netplan.nfbatch.commit", lambda *args: (sent.append(args), commit(*args))[1])
    node.converge(wanted(5, ranges=True))
    for count, other in ((6, "slappart4"), (4, "slappart3")):
        ran.clear()
        sent.clear()
        node.converge(wanted(count, ranges=True))
        if way == "raw":
            (*_, requests) = sent.pop()
            assert not sent
            everything = b"".join(one.payload for one in requests)
            assert not ran
            assert b"slappart5" in everything
            assert other.encode() not in everything
        else:
            (text,) = ran
            assert "flush chain inet partitiond fingerprint" in text
            assert text.count("flush") == 1
            assert other not in text
    ran.clear()
    run(f"flush set {TABLE} private4\n")
    node.converge(wanted(4, ranges=True))
    if way == "nft":
        (text,) = ran
        assert text.count("flush") == 2
        assert text.count("add element") == 1


def test_what_we_know_by_heart_is_what_a_new_process_reads(node, monkeypatch):
    """The contents that a daemon does not read again are those that the kernel would give it."""
    for count in (5, 9, 3):
        node.converge(wanted(count, ranges=True))
        next_one = wanted(count + 1, ranges=True)
        heart = observe(next_one).filter.contents
        with monkeypatch.context() as patch:
            patch.setattr("netplan.filter_state._last", None)
            read = observe(next_one).filter.contents
        assert heart == read


def test_a_foreign_change_right_before_a_load_is_undone(node, way, monkeypatch):
    """Somebody opens our filter between our look and our load, which is meant for another partition."""
    node.converge(wanted(3, ranges=True))
    before = _listing()
    node.plan(wanted(4, ranges=True))
    nftables.run(f"insert rule {TABLE} out6 accept\n")
    assert not apply(node.last)
    node.converge(wanted(3, ranges=True))
    assert _listing() == before


def test_endless_disturbance_is_an_error_and_leaves_no_note(node, monkeypatch):
    desired = wanted(1)
    run = nftables.run

    def disturbed(text):
        run(text)
        if "fingerprint" not in text.partition("\n")[0]:
            run("add table inet other\ndelete table inet other\n")

    node.plan(desired)
    with monkeypatch.context() as patch:
        patch.setattr("netplan.nftables.run", disturbed)
        failures = apply(node.last)
    assert failures[0].error.retryable
    assert "keeps changing" in failures[0].error.message
    node.converge(desired)


def test_a_socket_is_kept_for_the_next_one_of_the_same_namespace_alone(node):
    with nfnetlink.nft_socket() as first, nfnetlink.nft_socket() as second:
        assert first is not second
    with nfnetlink.nft_socket() as again:
        assert again in (first, second)
        home = again.namespace()
    with node.at_neighbour(), nfnetlink.nft_socket() as elsewhere:
        assert elsewhere.namespace() != home
    with nfnetlink.nft_socket() as back:
        assert back.namespace() == home


def test_a_socket_that_failed_is_not_given_to_the_next_one():
    with pytest.raises(NetplanError), nfnetlink.nft_socket() as failed:
        nfbatch.commit(failed, nfnetlink.generation(failed), [*nfbatch.counters(["x"], add=False)])
    with nfnetlink.nft_socket() as fresh:
        assert fresh is not failed
        assert nfnetlink.generation(fresh) > 0


@pytest.mark.parametrize("first", [0, 5])
def test_a_thousand_at_once_are_all_guarded(node, first, way):
    """An attribute of netlink holds 64 KiB, which is fewer; a write holds 208 KiB, unless more is asked for."""
    if first:
        node.converge(wanted(first, ranges=True))
    desired = wanted(1000, ranges=True)
    (loading,) = (one for one in node.plan(desired).values() if isinstance(one, FilterOperation))
    assert not apply([loading])
    nftables.run("add table inet other\ndelete table inet other\n")  # so that the elements are compared
    found = observe(desired).filter
    assert (found.wanted, found.drift) == (render(desired).fingerprint, ())


def test_rules_without_their_elements_are_no_filter(node, monkeypatch):
    """Whoever is killed between the two transactions leaves what the next one finishes."""
    desired = wanted(3, ranges=True)
    commit = nfbatch.commit

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("netplan.nfbatch.commit", killed)
    with pytest.raises(KeyboardInterrupt):
        node.converge(desired)
    monkeypatch.setattr("netplan.nfbatch.commit", commit)
    assert "filter/partitiond" in node.converge(desired)
    whole = _listing()
    nftables.run(f"delete table {TABLE}\n")
    node.converge(desired)
    assert _listing() == whole


def test_rules_without_their_elements_refuse_nobody(node, monkeypatch):
    """Neither what has an address nor what has a range: both are the host's, by the kernel's own table."""
    desired = wanted(3, ranges=True)
    node.converge(desired)
    know_each_other(node)
    nftables.run(f"delete table {TABLE}\n")
    monkeypatch.setattr("netplan.filter_state.holding.commit", lambda *_: pytest.fail("the rules alone"))
    with pytest.raises(pytest.fail.Exception):
        apply(plan(desired, observe(desired)))
    assert "meter6_remote_out" in _listing()
    assert not read_counters().traffic
    with sink(node) as port:
        for source in ("2001:db8:1::2", "2001:db8:1:0:4001::5"):
            assert as_user(UID, lambda source=source: send(source, NEIGHBOUR6, port, count=3)) == "ok"
    monkeypatch.undo()
    node.converge(desired)


def test_a_table_that_appears_before_the_load_is_not_taken_for_empty(node):
    """As when a saved ruleset is restored while we start: who is in its sets is not let through."""
    desired = wanted(2, ranges=True)
    node.plan(desired)
    nftables.run(
        f"add table {TABLE}\nadd set {TABLE} owner6 {{ type uid . ipv6_addr; }}\n"
        f"add element {TABLE} owner6 {{ 7 . 2001:db8:1::2 }}\nadd set {TABLE} private4 {{ type inet_service; }}\n"
    )
    assert not apply(node.last)
    appeared = _listing()
    assert "7" not in _nft("list", "set", "inet", "partitiond", "owner6").split()
    nftables.run(f"delete table {TABLE}\n")
    node.converge(desired)
    assert _listing() == appeared
