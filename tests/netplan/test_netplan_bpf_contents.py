"""What the maps of the programs at the cgroup hold, and what the programs are made of."""

import struct
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

import pytest
from mesh_scene import NETWORK, NODE4, meshed, vpn
from netplan_scene import BASE, HOST4, UID, wanted

from netplan.bpf_assembler import Assembler
from netplan.bpf_contents import contents
from netplan.bpf_programs import NODE, OWNERS, RANGES, SOURCES, version
from netplan.model import RoutableIPv4, TunSpec

PUBLIC, ROUTABLE = IPv4Address("192.0.2.50"), IPv4Address("192.0.2.60")


def mapped(address):
    return IPv6Address(f"::ffff:{address}").packed


def sources(desired, uid=UID):
    value = contents(desired).maps[SOURCES].get(struct.pack("=I", uid))
    return None if value is None else (value[:16], value[16:32])


@pytest.mark.parametrize(
    ("public", "routable", "own"),
    [(None, None, None), (PUBLIC, None, PUBLIC), (None, ROUTABLE, ROUTABLE), (PUBLIC, ROUTABLE, ROUTABLE)],
)
def test_which_of_its_ipv4_addresses_a_client_leaves_from(public, routable, own):
    (one,) = wanted(1).partitions
    gateway = RoutableIPv4(IPv4Interface(f"{routable}/24"), IPv4Address("192.0.2.1")) if routable else None
    desired = replace(wanted(1), partitions=(replace(one, public_ipv4=public, routable_ipv4=gateway),))
    assert sources(desired) == (one.ipv6.ip.packed, mapped(own) if own else bytes(16))
    without = replace(desired, partitions=(replace(desired.partitions[0], ipv6=None),))
    # who has none is there as well: what it receives is counted
    assert sources(without) == (bytes(16), mapped(own) if own else bytes(16))


def test_what_leaves_for_the_mesh_has_an_address_of_it():
    desired = meshed(2)
    maps = contents(desired).maps
    network = NETWORK.network_address.packed + NETWORK.netmask.packed
    for uid, address in ((UID, vpn(0)), (UID + 1, vpn(1)), (NODE, NODE4)):
        assert maps[SOURCES][struct.pack("=I", uid)][32:] == mapped(address) + network
        assert maps[OWNERS][mapped(address)] == struct.pack("=II", uid, 0)
    taken = replace(desired, mesh=replace(desired.mesh, taken=True))
    for nothing in (wanted(2), taken):
        assert {value[32:] for value in contents(nothing).maps[SOURCES].values()} == {bytes(24)}
    assert len({contents(one).fingerprint for one in (desired, taken, wanted(2))}) == 3


def test_everything_that_is_owned_is_there():
    (one,) = wanted(1, ranges=True).partitions
    tun = TunSpec("slaptun0", UID, IPv6Interface("2001:db8:1:0:c001::1/80"), IPv4Interface("172.16.0.1/16"))
    desired = replace(
        wanted(1), partitions=(replace(one, tun=tun, public_ipv4=PUBLIC),), host_ipv4=IPv4Address(HOST4)
    )
    maps = contents(desired).maps
    mine, private = struct.pack("=II", UID, 0), struct.pack("=II", UID, 1)
    assert maps[OWNERS] == {
        one.ipv6.ip.packed: mine,
        tun.ipv6.ip.packed: mine,
        mapped(tun.ipv4.ip): mine,
        mapped(PUBLIC): mine,
        mapped(one.ipv4): private,
        BASE.ip.packed: struct.pack("=II", NODE, 0),
        mapped(HOST4): struct.pack("=II", NODE, 0),
    }
    assert maps[RANGES] == {struct.pack("=I", 80) + one.ipv6_range.network_address.packed: mine}


def test_the_fingerprint_tells_every_difference():
    desired = wanted(2, ranges=True)
    one, other = desired.partitions
    different = [
        desired,
        wanted(2),
        wanted(3, ranges=True),
        replace(desired, host_ipv6=None),
        replace(desired, host_ipv4=IPv4Address(HOST4)),
        replace(desired, partitions=(replace(one, uid=one.uid + 7), other)),
        replace(desired, partitions=(replace(one, ipv4=None), other)),
        replace(desired, partitions=(replace(one, ipv4=None, public_ipv4=one.ipv4), other)),
    ]
    assert len({contents(each).fingerprint for each in different}) == len(different)
    assert contents(wanted(2, ranges=True)).fingerprint == contents(desired).fingerprint


def test_the_version_stays_as_long_as_the_programs_do():
    assert version(ingress_everywhere=False) == version(ingress_everywhere=False)
    assert version(ingress_everywhere=False) != version(ingress_everywhere=True)


def test_a_jump_counts_the_two_places_of_a_long_load():
    made = Assembler()
    made.jump("end")
    made.load_late(1, "a map")
    made.label("end")
    made.leave(0)
    code = made.finished().linked({"a map": 7}, {})
    assert len(code) == 8 * 5
    assert struct.unpack_from("=BBhI", code) == (0x05, 0, 2, 0)
    assert struct.unpack_from("=BBhI", code, 8) == (0x18, 0x11, 0, 7)
    made.jump("nowhere")
    with pytest.raises(KeyError):
        made.finished()
