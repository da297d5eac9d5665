"""What fills the sets of the guard: every element is read back from the kernel as it was written."""

from ipaddress import IPv4Network, IPv6Network, ip_network

import pytest
from guard_scene import standing

from netplan import filter_state, nfnetlink
from netplan.elements import texts
from netplan.model import Protected
from netplan.packet_filter import render
from netplan.tap_guard import tap_guard


@pytest.fixture
def scene():
    with standing() as made:
        yield made


@pytest.mark.parametrize("bridge", ["br0", None])
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_in_the_kernel_is_what_was_wanted(scene, strict, bridge):
    wanted = scene.desired(strict=strict, bridge=bridge, mac="52:54:00:00:00:50", given=(0,))
    scene.converge(wanted)
    found = render(wanted)
    with nfnetlink.nft_socket() as sock:
        for name, elements in found.elements.items():
            family, bare = nfnetlink.split_name(name)
            there = map(nfnetlink.parsed, nfnetlink.set_elements(sock, family, bare))
            assert texts({**found.maps, **found.sets}[name], there) == frozenset(elements), name
    assert any("own6" in name and elements for name, elements in found.elements.items())


def test_one_element_more_is_drift_and_is_put_right(scene):
    wanted = scene.desired(strict=True)
    scene.converge(wanted)
    filter_state.nftables.run('add element bridge partitiond strict_taps { "other0" }\n')
    assert [one.id for one in scene.converge(wanted)] == ["filter/partitiond"]
    filter_state.nftables.run('delete element bridge partitiond own4 { "slaptap0" . 192.0.2.50 }\n')
    (one,) = scene.converge(wanted)
    assert "own4" in one.reason


def test_networks_that_lie_in_each_other_are_one(scene):
    wanted = scene.desired(strict=True)
    nested = (
        "10.0.0.0/8",
        "10.0.0.0/16",
        "10.255.255.255",
        "192.0.2.0/24",
        "2001:db8::/32",
        "2001:db8:1::/48",
    )
    (part,) = tap_guard(wanted.partitions, Protected(tuple(map(ip_network, nested))))
    four = [IPv4Network(text) for text in part.elements["taken4"]]
    assert four == [IPv4Network("10.0.0.0/8"), IPv4Network("192.0.2.0/24")]
    first, last = IPv6Network("2001:db8::/32")[0], IPv6Network("2001:db8::/32")[-1]
    assert part.elements["taken6"] == [f"0x{first.packed.hex()}-0x{last.packed.hex()}"]


def test_nothing_is_made_where_nothing_is_guarded(scene):
    wanted = scene.desired(strict=True, guarded=False)
    assert tap_guard(wanted.partitions, wanted.protected) == ()
    scene.converge(scene.desired(strict=True))
    with nfnetlink.nft_socket() as sock:
        assert nfnetlink.families(sock) == {"inet", "bridge"}
    scene.converge(wanted)
    with nfnetlink.nft_socket() as sock:
        assert nfnetlink.families(sock) == {"inet"}


def test_the_rules_do_not_grow_with_the_taps(scene):
    few, many = (
        tap_guard(scene.desired(strict=True, count=count).partitions, Protected()) for count in (1, 9)
    )
    assert [one.chains for one in few] == [one.chains for one in many]
    assert [one.sets for one in few] == [one.sets for one in many]
