"""Address arithmetic: slapformat's vectors (facts/slap_protocol.md, 5.2) and what must hold for any network."""

from ipaddress import IPv4Address, IPv4Network, IPv6Interface, IPv6Network
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from netplan.addresses import (
    host_tap_mac,
    partition_ipv6,
    partition_range,
    private_ipv4,
    tap_mac,
    tap_range,
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
        lambda: tun_range(BASE, 3, 4),
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


def test_macs():
    guest, host = tap_mac("COMP-1", "slappart0"), host_tap_mac("COMP-1", "slappart0")
    assert guest == tap_mac("COMP-1", "slappart0") != tap_mac("COMP-2", "slappart0")
    assert guest.startswith("02:")
    assert host.startswith("fe:ff:")
    assert guest[3:] != host[3:]
    many = {rule("COMP-1", f"slappart{index}") for index in range(1000) for rule in (tap_mac, host_tap_mac)}
    assert len(many) == 2000
