"""Which address is whose: what was kept stays, what is new steps aside, and nothing hangs on those that come later."""

import dataclasses
import json
import os
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netplan import addresses
from partitiond.choices import NATURAL, Kept, Rules, choose
from partitiond.errors import PartitiondError
from partitiond.state import Store

BASE = IPv6Interface("2001:db8:1::10/64")
PRIVATE = IPv4Network("10.0.0.0/16")


def rules(count, **changes):
    names = tuple(f"slappart{index}" for index in range(count))
    return dataclasses.replace(Rules(names, BASE, 16, PRIVATE, tap_ipv6=True), **changes)


def all_rules(count, **changes):
    everything = {"tap_gateway": IPv4Interface("10.8.0.1/16"), "tun_ipv6": True, "tun_ipv4": True}
    return rules(count, **everything | changes)


def test_a_new_node_gets_what_follows_from_the_index():
    choice = choose(all_rules(3), {})
    for index, name in enumerate(choice.rules.partitions):
        found = choice.chosen[name]
        assert found.ipv4 == addresses.private_ipv4(PRIVATE, index)
        assert found.ipv6 == addresses.partition_ipv6(BASE, index)
        assert found.ipv6_range == addresses.partition_range(BASE, index, 16)
        assert found.tap_ipv6 == addresses.tap_ipv6(BASE, index, 16)
        assert found.tap_ipv4 == IPv4Address(f"10.8.0.{index + 2}")
        assert found.tun_ipv6 == addresses.tun_ipv6(BASE, index, 16)
        assert found.tun_ipv4 == addresses.tun_ipv4(index, 3)
    assert choice.warnings == ()
    # what hangs on the gateway and on the number of partitions is remembered, the rest follows again
    assert set(choice.kept) == set(choice.rules.partitions)
    for name, kept in choice.kept.items():
        found = choice.chosen[name]
        assert kept == Kept(tap_ipv4=found.tap_ipv4, tun_ipv4=found.tun_ipv4)
    assert set(choose(rules(3), {}).kept.values()) == {NATURAL}


def test_what_does_not_apply_is_none_and_is_not_forgotten():
    before = choose(all_rules(2, base=IPv6Interface("2001:db8:1::2/64")), {})
    assert before.kept["slappart0"].ipv6 == IPv6Address("2001:db8:1::1:2")
    bare = choose(rules(2, base=None, tap_ipv6=False), before.kept)
    for index, name in enumerate(bare.rules.partitions):
        assert dataclasses.astuple(bare.chosen[name]) == (
            addresses.private_ipv4(PRIVATE, index),
            *[None] * 8,
        )
    assert bare.kept == before.kept
    assert choose(before.rules, bare.kept).chosen == before.chosen


def test_what_slapos_core_drew_by_lot_is_kept():
    found = {
        "slappart0": Kept(ipv4=IPv4Address("10.0.234.80"), ipv6=IPv6Address("2001:db8:1::2")),
        "slappart1": Kept(
            ipv4=IPv4Address("10.0.0.3"),
            ipv6=IPv6Address("2001:db8:1::6531"),
            ipv6_range=IPv6Network("2001:db8:1:0:4002::/80"),
            tap_ipv6=IPv6Interface("2001:db8:1:0:17aa:ffff:ffff:ffff/80"),
        ),
    }
    choice = choose(rules(3), {}, found)
    assert choice.chosen["slappart1"].ipv6 == IPv6Interface("2001:db8:1::6531/64")
    assert choice.chosen["slappart1"].tap_ipv6 == found["slappart1"].tap_ipv6
    assert choice.chosen["slappart0"].ipv4 == IPv4Address("10.0.234.80")
    assert choice.chosen["slappart2"].ipv4 == IPv4Address("10.0.0.4")
    assert choice.kept == {
        "slappart0": Kept(ipv4=IPv4Address("10.0.234.80")),
        "slappart1": Kept(
            ipv6=IPv6Address("2001:db8:1::6531"),
            tap_ipv6=IPv6Interface("2001:db8:1:0:17aa:ffff:ffff:ffff/80"),
        ),
        "slappart2": NATURAL,
    }
    # the file may go: everything is the same without it
    assert choose(rules(3), choice.kept).chosen == choice.chosen


def test_what_was_remembered_goes_before_the_file():
    found = {"slappart0": Kept(ipv4=IPv4Address("10.0.234.80"))}
    assert choose(rules(1), {"slappart0": NATURAL}, found).chosen["slappart0"].ipv4 == IPv4Address("10.0.0.2")


def test_a_network_that_comes_moves_nobody_and_one_that_goes_neither():
    lan = IPv4Network("10.0.0.0/24")
    calm = choose(rules(2), {})
    crowded = choose(rules(3, elsewhere=(lan,), taken=frozenset((IPv4Address("10.0.0.2"),))), calm.kept)
    assert [str(one.ipv4) for one in crowded.chosen.values()] == ["10.0.0.2", "10.0.0.3", "10.0.255.252"]
    assert crowded.kept["slappart2"] == Kept(ipv4=IPv4Address("10.0.255.252"))
    after = choose(rules(3), crowded.kept)
    assert (after.chosen, after.kept) == (crowded.chosen, crowded.kept)


def test_a_host_that_moves_to_a_partitions_place_and_back():
    moved = choose(rules(2, base=IPv6Interface("2001:db8:1::2/64")), {})
    assert moved.chosen["slappart0"].ipv6 == IPv6Interface("2001:db8:1::1:2/64")
    back = choose(rules(2), moved.kept)
    assert back.chosen == moved.chosen
    pushed = choose(rules(2, base=IPv6Interface("2001:db8:1::3/64")), back.kept)
    assert pushed.chosen["slappart1"].ipv6 == IPv6Interface("2001:db8:1::1:3/64")


def test_another_network_gives_other_addresses_and_says_so():
    found = {
        f"slappart{index}": Kept(
            ipv4=IPv4Address(f"10.1.0.{index}"), ipv6=IPv6Address(f"2001:db8:9::{index:x}aa")
        )
        for index in range(7)
    }
    choice = choose(rules(7), {}, found)
    assert choice.chosen == choose(rules(7), {}).chosen
    assert set(choice.kept.values()) == {NATURAL}
    whose = "slappart0, slappart1, slappart2, slappart3, slappart4 and 2 more"
    assert choice.warnings == (
        f"private IPv4 of {whose}: outside of ipv4_local_network = 10.0.0.0/16, derived anew",
        f"IPv6 of {whose}: outside of 2001:db8:1::/64, the node's network, derived anew",
    )


def test_a_file_that_gives_one_address_twice():
    twice = Kept(ipv4=IPv4Address("10.0.9.9"), ipv6=IPv6Address("2001:db8:1::9999"))
    choice = choose(rules(2), {}, {"slappart0": twice, "slappart1": twice})
    assert choice.chosen["slappart0"].ipv4 == twice.ipv4
    assert choice.chosen["slappart1"].ipv4 == IPv4Address("10.0.0.3")
    assert choice.chosen["slappart1"].ipv6 == IPv6Interface("2001:db8:1::3/64")
    assert [one.partition(":")[2] for one in choice.warnings] == [" in use twice, derived anew"] * 2


def test_another_prefix_shift_leaves_what_slapos_core_gave():
    found = {"slappart0": Kept(ipv6_range=IPv6Network("2001:db8:1:0:4001::/80"))}
    choice = choose(rules(2, prefixshift=20), {}, found)
    assert choice.chosen["slappart0"].ipv6_range == IPv6Network("2001:db8:1:0:4001::/80")
    # number 0x40002 of 2^20 lies in 0x4000
    assert choice.chosen["slappart1"].ipv6_range == IPv6Network("2001:db8:1:0:4000:2000::/84")
    assert choice.kept["slappart0"].ipv6_range == IPv6Network("2001:db8:1:0:4001::/80")


def test_tuns_keep_their_slices_when_the_node_grows():
    two = choose(all_rules(2), {})
    five = choose(all_rules(5), two.kept)
    for name, value in two.chosen.items():
        assert five.chosen[name] == value
    assert len({one.tun_ipv4.ip for one in five.chosen.values()}) == 5
    assert choose(all_rules(5), five.kept).chosen == five.chosen


def test_who_leaves_is_forgotten():
    found = {"slappart1": Kept(ipv4=IPv4Address("10.0.9.9"))}
    two = choose(rules(2), {}, found)
    assert set(choose(rules(1), two.kept).kept) == {"slappart0"}


def test_what_is_not_in_place_is_remembered_as_before():
    before = {"slappart0": Kept(ipv4=IPv4Address("10.1.0.9")), "slappart9": NATURAL}
    choice = choose(rules(3), before)
    assert choice.in_place(frozenset(("slappart0", "slappart1", None))) == {
        "slappart0": before["slappart0"],
        "slappart2": NATURAL,
    }
    assert choice.in_place(frozenset()) == choice.kept


lots = st.builds(
    lambda v4, v6, tap: Kept(
        ipv4=IPv4Address(0x0A000000 + v4),
        ipv6=None if v6 is None else IPv6Address(f"2001:db8:1::{v6:x}"),
        tap_ipv6=None if tap is None else IPv6Interface(f"2001:db8:1:0:{tap:x}:ffff:ffff:ffff/80"),
    ),
    st.integers(0, 600),
    # mostly where they are in each other's way
    st.none() | st.integers(1, 30),
    st.none() | st.sampled_from((1, 0x4001, 0x4002, 0x4007, 0x8001, 0x8003, 0xC001)) | st.integers(1, 65000),
)


@given(
    found=st.dictionaries(st.integers(0, 11).map("slappart{}".format), lots, max_size=8),
    taken=st.sets(st.integers(0, 300).map(lambda number: IPv4Address(0x0A000000 + number)), max_size=5),
    elsewhere=st.lists(st.sampled_from(list(PRIVATE.subnets(new_prefix=27))[:8]), max_size=2, unique=True),
    count=st.integers(1, 12),
    more=st.integers(0, 4),
)
def test_whatever_was_drawn(found, taken, elsewhere, count, more):
    crowd = {"taken": frozenset(taken), "elsewhere": tuple(elsewhere)}
    choice = choose(all_rules(count, **crowd), {}, found)
    four = [one.ipv4 for one in choice.chosen.values()]
    assert len(set(four)) == count
    # nobody overlaps anybody
    stretches = sorted(
        (int(one.network_address), int(one.broadcast_address))
        for each in choice.chosen.values()
        for one in (IPv6Network(each.ipv6.ip), each.ipv6_range, each.tap_ipv6.network, each.tun_ipv6.network)
    )
    assert all(one[1] < two[0] for one, two in pairwise(stretches))
    assert BASE.ip not in {one.ipv6.ip for one in choice.chosen.values()}
    for name, value in choice.chosen.items():
        if name not in found:
            assert value.ipv4 not in taken
            assert not any(value.ipv4 in one for one in elsewhere)
    # what was first to have an address has it still
    seen = set()
    for name in choice.rules.partitions:
        had = found.get(name)
        if had and had.ipv4 not in seen:
            assert choice.chosen[name].ipv4 == had.ipv4
            seen.add(had.ipv4)
    # with what is remembered nothing moves: not without the file, not without the crowd, not when others come
    for again in (choose(all_rules(count), choice.kept), choose(all_rules(count + more), choice.kept, found)):
        assert {name: again.chosen[name] for name in choice.chosen} == choice.chosen
        assert {name: again.kept[name] for name in choice.kept} == choice.kept
        assert again.warnings == () or more


@given(count=st.integers(1, 40), more=st.integers(1, 20))
def test_growth_without_a_memory_is_growth(count, more):
    """Who is there does not hang on who comes, even where nothing was written down (tuns apart)."""
    crowd = {"elsewhere": (IPv4Network("10.0.0.0/28"),), "taken": frozenset((IPv4Address("10.0.255.254"),))}
    few, many = choose(rules(count, **crowd), {}), choose(rules(count + more, **crowd), {})
    assert {name: many.chosen[name] for name in few.chosen} == few.chosen


# --- the memory ---------------------------------------------------------------------------------------------------------


def test_the_memory_is_written_once_and_read_once(tmp_path):
    store = Store(tmp_path)
    assert store.addresses() == {}
    assert store.addresses() is store.addresses()
    kept = choose(all_rules(2), {}, {"slappart0": Kept(ipv6=IPv6Address("2001:db8:1::6531"))}).kept
    store.save_addresses(kept)
    path = tmp_path / "addresses.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert store.addresses() == kept == Store(tmp_path).addresses()
    assert store.addresses() is store.addresses()
    first = path.stat()
    store.save_addresses(dict(kept))
    assert path.stat() == first
    store.save_addresses({"slappart0": NATURAL})
    assert Store(tmp_path).addresses() == {"slappart0": NATURAL}
    assert json.loads(path.read_bytes()) == {"partitions": {"slappart0": {}}}
    assert os.listdir(tmp_path) == ["addresses.json"]  # noqa: PTH208 - names suffice


def test_the_memory_of_a_later_version(tmp_path):
    row = {"ipv4": "10.0.0.9", "moon_ipv4": "10.9.0.1"}
    (tmp_path / "addresses.json").write_text(json.dumps({"partitions": {"slappart0": row}, "more": 1}))
    assert Store(tmp_path).addresses() == {"slappart0": Kept(ipv4=IPv4Address("10.0.0.9"))}


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"partitions": []}', '{"partitions": {"slappart0": {"ipv4": "10.0.0"}}}']
    + [
        f'{{"partitions": {{"slappart0": {row}}}}}'
        for row in ("[1]", '"x"', "null", '{"ipv4": 5}', '{"ipv6": 1.5}', '{"ipv6": null}')
    ],
)
def test_a_damaged_memory_is_an_error(tmp_path, text):
    (tmp_path / "addresses.json").write_text(text)
    with pytest.raises(PartitiondError) as caught:
        Store(tmp_path).addresses()
    assert caught.value.code == "state.damaged"
    assert caught.value.resource.endswith("addresses.json")
    assert caught.value.hint
