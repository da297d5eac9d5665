"""Address arithmetic: slapformat's vectors (facts/slap_protocol.md, 5.2) and what must hold for any network."""

from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from netplan.addresses import (
    Occupied,
    host_tap_mac,
    partition_ipv6,
    partition_range,
    private_ipv4,
    range_gateway,
    tap_ipv4,
    tap_ipv6,
    tap_mac,
    tap_range,
    tun_ipv4,
    tun_ipv6,
    tun_range,
)
from netplan.errors import NetplanError

BASE = IPv6Interface("2001:db8:1::1/64")


@pytest.mark.parametrize(
    ("index", "address", "ranged", "tap", "tun"),
    [
        (0, "2001:db8:1::2/64", "2001:db8:1:0:4001::/80", "2001:db8:1:0:8001::/80", "2001:db8:1:0:c001::/80"),
        (1, "2001:db8:1::3/64", "2001:db8:1:0:4002::/80", "2001:db8:1:0:8002::/80", "2001:db8:1:0:c002::/80"),
        (
            499,
            "2001:db8:1::1f5/64",
            "2001:db8:1:0:41f4::/80",
            "2001:db8:1:0:81f4::/80",
            "2001:db8:1:0:c1f4::/80",
        ),
    ],
)
def test_vectors_of_slapformat(index, address, ranged, tap, tun):
    assert partition_ipv6(BASE, index) == IPv6Interface(address)
    assert partition_range(BASE, index, 16) == IPv6Network(ranged)
    assert tap_range(BASE, index, 16) == IPv6Network(tap)
    assert tun_range(BASE, index, 16) == IPv6Network(tun)


def test_a_prefix_that_ends_inside_a_group():
    base = IPv6Interface("2001:db8:1:2:300::1/71")
    assert partition_ipv6(base, 3) == IPv6Interface("2001:db8:1:2:200::5/71")
    # /71 + 6 = /77: the lowest bit of the number stands for 0x8 in the fifth group
    assert partition_range(base, 0, 6) == IPv6Network("2001:db8:1:2:288::/77")


def test_the_hosts_own_place_is_stepped_over():
    base = IPv6Interface("2001:db8:1::2/64")
    assert partition_ipv6(base, 0) == IPv6Interface("2001:db8:1::1:2/64")
    assert partition_ipv6(base, 1) == IPv6Interface("2001:db8:1::3/64")


def test_a_host_inside_a_range_is_an_error_with_advice():
    with pytest.raises(NetplanError) as caught:
        partition_range(IPv6Interface("2001:db8:1:0:4003:1:2:3/64"), 2, 16)
    assert caught.value.code == "network.address_collision"
    assert "ipv6_prefixshift" in caught.value.hint


@pytest.mark.parametrize(
    "call",
    [
        lambda: partition_ipv6(IPv6Interface("2001:db8::1/128"), 0),
        lambda: partition_ipv6(IPv6Interface("2001:db8::1/126"), 2),
        lambda: partition_ipv6(BASE, -1),
        lambda: partition_range(BASE, 4, 4),
        lambda: partition_range(BASE, 0, 1),
        lambda: partition_range(IPv6Interface("2001:db8::1/120"), 0, 16),
        lambda: partition_range(IPv6Interface("2001:db8::1/112"), 0, 16),
        lambda: tun_range(BASE, 3, 4),
        lambda: tap_ipv6(IPv6Interface("2001:db8::1/111"), 0, 16),
        lambda: tap_ipv4(IPv4Interface("10.8.0.1/24"), 253),
        lambda: tap_ipv4(IPv4Interface("10.8.0.1/24"), -1),
        lambda: tap_ipv4(IPv4Interface("10.8.0.1/31"), 0),
        lambda: tap_ipv4(IPv4Interface("10.8.0.1/32"), 0),
        lambda: tap_ipv4(IPv4Interface("10.8.0.1/30"), 0, {IPv4Address("10.8.0.2")}),
        lambda: tun_ipv4(3, 3),
        lambda: tun_ipv4(-1, 3),
        lambda: tun_ipv4(0, 0),
        lambda: tun_ipv4(0, 1 << 19),
        lambda: tun_ipv4(0, 2, {IPv4Address("172.16.0.1"), IPv4Address("172.24.0.1")}),
        lambda: private_ipv4(IPv4Network("10.0.0.0/30"), 1),
        lambda: private_ipv4(IPv4Network("10.0.0.0/32"), 0),
        lambda: private_ipv4(
            IPv4Network("10.0.0.0/30"), 0, {IPv4Address("10.0.0.1"), IPv4Address("10.0.0.2")}
        ),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(NetplanError) as caught:
        call()
    assert caught.value.code == "network.prefix_too_small"
    assert caught.value.hint


prefixes = st.builds(
    lambda number, length: IPv6Interface((number, length)),
    st.integers(0, (1 << 128) - 1),
    st.integers(1, 126),
)


@given(base=prefixes, count=st.integers(1, 40))
def test_partition_addresses_are_unique_and_inside(base, count):
    assume(base.network.num_addresses > (1 << 16) + count + 2)
    found = [partition_ipv6(base, index) for index in range(count)]
    assert len({one.ip for one in found} | {base.ip}) == count + 1
    assert all(one.network == base.network for one in found)


@given(base=prefixes, count=st.integers(1, 16), shift=st.integers(7, 20))
def test_ranges_are_disjoint_and_inside(base, count, shift):
    assume(base.network.prefixlen + shift <= 112)
    found = []
    for rule in (partition_range, tap_range, tun_range):
        for index in range(count):
            try:
                found.append(rule(base, index, shift))
            except NetplanError as error:
                assert error.code == "network.address_collision"  # noqa: PT017 - either outcome is right
    addresses = [partition_ipv6(base, index).ip for index in range(count)]
    found.sort()
    assert all(one.subnet_of(base.network) for one in found)
    assert all(one.broadcast_address < two.network_address for one, two in pairwise(found))
    assert not any(address in one for address in (*addresses, base.ip) for one in found)


@given(
    length=st.integers(8, 28), index=st.integers(0, 12), taken=st.sets(st.integers(0, 1 << 24), max_size=6)
)
def test_private_ipv4_is_free_and_inside(length, index, taken):
    network = IPv4Network((0x0A000000, length))
    others = {network[number % network.num_addresses] for number in taken}
    assume(len(others) < network.num_addresses - 3)
    address = private_ipv4(network, index, others)
    assert address in network
    assert address not in others
    assert address not in {network.network_address, network.broadcast_address}
    if network[index + 2] not in others:
        assert address == network[index + 2]


def test_private_ipv4_does_not_move_when_others_come():
    network = IPv4Network("10.0.0.0/16")
    taken = {IPv4Address("10.0.0.5")}
    assert private_ipv4(network, 3, taken) == IPv4Address("10.0.255.251")
    assert private_ipv4(network, 4, taken) == IPv4Address("10.0.0.6")


def test_private_ipv4_goes_round_networks_that_are_elsewhere():
    network = IPv4Network("10.0.0.0/16")
    natural, top = IPv4Network("10.0.0.0/30"), IPv4Network("10.0.255.128/25")
    assert private_ipv4(network, 0, elsewhere=(natural,)) == IPv4Address("10.0.255.254")
    # counted down from the last address that is free, so two that go aside do not meet
    assert private_ipv4(network, 0, elsewhere=(natural, top)) == IPv4Address("10.0.255.127")
    assert private_ipv4(network, 1, elsewhere=(natural, top)) == IPv4Address("10.0.255.126")
    assert private_ipv4(network, 2, elsewhere=(natural, top)) == IPv4Address("10.0.0.4")
    # a route to all of it, or to more, is not about its addresses
    assert private_ipv4(network, 0, elsewhere=(network, IPv4Network("10.0.0.0/8"))) == IPv4Address("10.0.0.2")
    assert private_ipv4(network, 0, elsewhere=(IPv4Network("10.1.0.0/24"),)) == IPv4Address("10.0.0.2")
    halves = tuple(network.subnets())
    with pytest.raises(NetplanError):
        private_ipv4(network, 0, elsewhere=halves)


@given(
    length=st.integers(20, 28),
    others=st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 8)), max_size=5),
    taken=st.sets(st.integers(0, 4095), max_size=6),
    count=st.integers(1, 12),
)
def test_private_ipv4_is_neither_taken_nor_elsewhere(length, others, taken, count):
    network = IPv4Network((0x0A000000, length))
    elsewhere = tuple(
        IPv4Network((0x0A000000 + number % network.num_addresses, min(length + longer, 32)), strict=False)
        for number, longer in others
    )
    inside = [one for one in elsewhere if one != network]
    used = {network[number % network.num_addresses] for number in taken}
    here = [one for one in network.hosts() if not any(one in other for other in inside)]
    free = set(here) - used
    found = []
    for index in range(min(count, network.num_addresses - 3)):
        try:
            found.append(private_ipv4(network, index, used | set(found), elsewhere))
        except NetplanError:
            # the last ones are left to those before it
            assert not (free - set(found)) & set(here[: len(here) - index])
            break
    assert set(found) <= free
    assert len(set(found)) == len(found)
    for index, address in enumerate(found):
        if network[index + 2] in free and network[index + 2] not in found[:index]:
            assert address == network[index + 2]


def test_the_two_ends_of_a_routed_tap():
    assert tap_ipv6(BASE, 0, 16) == IPv6Interface("2001:db8:1:0:8001:ffff:ffff:ffff/80")
    assert range_gateway(tap_ipv6(BASE, 0, 16).network) == IPv6Address("2001:db8:1:0:8001::1")
    assert tun_ipv6(BASE, 0, 16) == IPv6Interface("2001:db8:1:0:c001::1/80")
    # slapformat writes 2001:db8::1:4101 here: a 1 behind the text
    assert range_gateway(IPv6Network("2001:db8::1:410/124")) == IPv6Address("2001:db8::1:411")


def test_ipv4_of_taps_skips_network_gateway_and_broadcast():
    gateway = IPv4Interface("10.8.0.2/29")
    dealt = [str(tap_ipv4(gateway, index)) for index in range(5)]
    assert dealt == ["10.8.0.1", "10.8.0.3", "10.8.0.4", "10.8.0.5", "10.8.0.6"]
    assert tap_ipv4(IPv4Interface("10.8.0.0/31"), 0) == IPv4Address("10.8.0.1")
    taken = {IPv4Address("10.8.0.3"), IPv4Address("10.8.0.5")}
    assert tap_ipv4(gateway, 1, taken) == IPv4Address("10.8.0.4")
    assert tap_ipv4(gateway, 0, taken) == IPv4Address("10.8.0.1")


def test_ipv4_of_tuns():
    assert tun_ipv4(0, 1) == IPv4Interface("172.16.0.1/12")
    assert tun_ipv4(1, 2) == IPv4Interface("172.24.0.1/13")
    assert tun_ipv4(29, 30) == IPv4Interface("172.30.128.1/17")
    assert tun_ipv4(0, 1 << 18) == IPv4Interface("172.16.0.1/30")
    # of a node that had two, the third lies at the end of what the second has
    kept = {tun_ipv4(0, 2).ip, tun_ipv4(1, 2).ip}
    assert tun_ipv4(2, 3, kept) == IPv4Interface("172.28.0.1/14")


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=30),
    st.integers(0, 60),
    st.integers(0, 9),
)
def test_occupied(stretches, first, more):
    occupied, numbers = Occupied(), set()
    for low, length in stretches:
        wanted = set(range(low, low + length + 1))
        assert occupied.add(low, low + length) is not bool(wanted & numbers)
        if not wanted & numbers:
            numbers |= wanted
    met = occupied.meets(first, first + more)
    hit = numbers & set(range(first, first + more + 1))
    assert (met is not None) == bool(hit)
    if met:
        assert met[0] <= min(hit) <= met[1]


def test_what_is_occupied_is_gone_round():
    occupied = Occupied()
    place = int(IPv6Address("2001:db8:1::5"))
    assert occupied.add(place, place)
    assert partition_ipv6(BASE, 3, occupied) == IPv6Interface("2001:db8:1::1:5/64")
    assert partition_ipv6(BASE, 4, occupied) == IPv6Interface("2001:db8:1::6/64")
    held = IPv6Network("2001:db8:1:0:8003::/80")
    assert occupied.add(int(held.network_address), int(held.broadcast_address))
    assert tap_range(BASE, 2, 16, occupied) == IPv6Network("2001:db8:1:0:bffd::/80")
    assert tap_ipv6(BASE, 3, 16, occupied) == tap_ipv6(BASE, 3, 16)
    # something large costs no more than something small
    half = IPv6Network("2001:db8:1::/65")
    full = Occupied()
    assert full.add(int(half.network_address), int(half.broadcast_address))
    assert partition_ipv6(BASE, 0, full) == IPv6Interface("2001:db8:1:0:8000::2/64")
    with pytest.raises(NetplanError):
        partition_range(BASE, 0, 16, full)
    assert tap_range(BASE, 0, 16, full) == tap_range(BASE, 0, 16)


def test_macs():
    guest, host = tap_mac("COMP-1", "slappart0"), host_tap_mac("COMP-1", "slappart0")
    assert guest == tap_mac("COMP-1", "slappart0") != tap_mac("COMP-2", "slappart0")
    assert guest.startswith("02:")
    assert host.startswith("fe:ff:")
    assert guest[3:] != host[3:]
    many = {rule("COMP-1", f"slappart{index}") for index in range(1000) for rule in (tap_mac, host_tap_mac)}
    assert len(many) == 2000
