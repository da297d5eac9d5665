"""Taps that are routed, tuns, and IPv4 addresses that the world reaches: made, used with real packets, taken away."""

import fcntl
import json
import os
import select
import struct
import subprocess
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface, IPv6Network, ip_address
from pathlib import Path

import pytest
from netplan_scene import (
    BASE,
    HOST4,
    NEIGHBOUR4,
    UID,
    as_user,
    connect,
    inside,
    opened_by,
    read_counters,
    send,
    serving,
    wanted,
)

from netplan import rtnetlink
from netplan.addresses import tap_ipv6
from netplan.apply import apply
from netplan.model import PROTOCOL_MARK, DesiredNetwork, RoutableIPv4, TunSpec
from netplan.netlink import NETLINK_ROUTE, NetlinkSocket
from netplan.observe import observe, routed_elsewhere
from netplan.plan import plan
from netplan.plan_routes import TABLE_GATEWAYS

pytestmark = pytest.mark.usefixtures("backend")

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x1, 0x2, 0x1000, 0x4000


def ip(*arguments):
    return subprocess.run(["/usr/sbin/ip", *arguments], check=True, capture_output=True, text=True).stdout


def routed(count=2, *, ipv4=False, tun=False):
    """Partitions whose taps are in no bridge."""
    desired = wanted(count)
    partitions = tuple(
        replace(
            one,
            tap=replace(
                one.tap,
                bridge=None,
                ipv6=tap_ipv6(BASE, one.index, 16),
                ipv4=IPv4Address(f"192.0.2.{100 + one.index}") if ipv4 else None,
            ),
            tun=TunSpec(
                f"slaptun{one.index}",
                one.uid,
                IPv6Interface(f"2001:db8:1:0:c00{one.index + 1}::1/80"),
                IPv4Interface(f"172.16.{one.index}.1/24"),
            )
            if tun
            else None,
        )
        for one in desired.partitions
    )
    return replace(desired, partitions=partitions)


class Opened:
    """The guest's end of a tap or tun."""

    def __init__(self, name, kind):
        self.file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.file, TUNSETIFF, struct.pack("16sH22x", name.encode(), kind | IFF_NO_PI))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.file)

    def sees(self, part, target):
        """Whether these bytes come out within seconds, when somebody sends to ``target``.

        Not the first packet alone: the kernel lets them pass some time after the other end was opened.
        """
        for _ in range(200):
            send(None, target)
            while select.select([self.file], [], [], 0.1)[0]:
                if part in os.read(self.file, 65536):
                    return True
        return False


def test_a_guest_and_the_network_behind_it_are_reached_through_its_tap(node):
    node.converge(routed(2, ipv4=True))
    guest = IPv6Network("2001:db8:1:0:8001::/80")[1]
    with Opened("slaptap0", IFF_TAP | IFF_VNET_HDR) as tap:
        # neighbour solicitations ask for the guest itself, also for what lies behind it
        assert tap.sees(guest.packed, "2001:db8:1:0:8001::77")
        arp_request = b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01"
        assert tap.sees(arp_request, "192.0.2.100")
    node.converge(routed(1))
    assert node.link("slaptap1") is None


def test_the_host_speaks_to_a_guest_with_its_own_address(node):
    node.converge(routed(1))
    found = json.loads(ip("-json", "-6", "route", "get", "2001:db8:1:0:8001::1"))[0]
    assert (found["dev"], found["prefsrc"]) == ("slaptap0", str(BASE.ip))


def test_only_its_user_opens_a_tap_or_tun(node):
    """Prove it by ioctl: a tap without an owner would be everybody's."""
    Path("/dev/net/tun").chmod(0o666)
    node.converge(routed(2, tun=True))

    def attach(name, kind):
        def work():
            with Opened(name, kind):
                return "open"

        return work

    for name, kind in (("slaptap0", IFF_TAP | IFF_VNET_HDR), ("slaptun0", IFF_TUN)):
        assert as_user(UID, attach(name, kind)) == "open"
        assert as_user(UID + 1, attach(name, kind)) == "EPERM"
        assert as_user(65534, attach(name, kind)) == "EPERM"


def test_tuns_have_both_ends_networks(node):
    operations = node.converge(routed(2, tun=True))
    assert {"tun/slaptun0", "address/172.16.0.1", "address/2001:db8:1:0:c001::1"} <= operations.keys()
    with Opened("slaptun1", IFF_TUN) as tun:
        for address in ("172.16.1.9", "2001:db8:1:0:c002::9"):
            assert tun.sees(ip_address(address).packed, address)
    ip("link", "set", "slaptun0", "down")
    again = node.converge(routed(2, tun=True))
    assert again["tun/slaptun0"].reason == "is down"
    assert "tun/slaptun0" in node.converge(routed(2))
    assert node.link("slaptun0") is None


def test_a_foreign_interface_called_like_a_tun_stays(node):
    ip("link", "add", "slaptun0", "type", "veth", "peer", "name", "other")
    desired = routed(1, tun=True)
    failures = apply(plan(desired, observe(desired)))
    assert "network.name_taken" in {one.error.code for one in failures}
    assert "other" in ip("link", "show", "slaptun0")


def test_what_slapformat_made_is_taken_over(node):
    """The same tap, addresses and routes, without a mark: nothing of it is made anew."""
    ip("tuntap", "add", "dev", "slaptap0", "mode", "tap", "user", str(UID))
    ip("link", "set", "slaptap0", "up")
    ip("address", "add", "2001:db8:1:0:8001:ffff:ffff:ffff/80", "dev", "slaptap0", "noprefixroute", "nodad")
    ip("-6", "route", "add", "2001:db8:1:0:8001::1", "dev", "slaptap0")
    ip("-6", "route", "add", "2001:db8:1:0:8001::/80", "dev", "slaptap0", "via", "2001:db8:1:0:8001::1")
    index, mac = node.link("slaptap0"), json.loads(ip("-json", "link", "show", "slaptap0"))[0]["address"]
    operations = node.converge(routed(1))
    actions = {one.action for name, one in operations.items() if "8001" in name or "slaptap0" in name}
    assert actions == {"change"}
    link = json.loads(ip("-json", "link", "show", "slaptap0"))[0]
    assert (node.link("slaptap0"), link["address"]) == (index, mac)


def test_from_routed_to_bridged_and_back(node):
    node.converge(routed(2))
    node.converge(wanted(2))
    assert json.loads(ip("-json", "link", "show", "slaptap0"))[0]["master"] == "br0"
    assert "8001" not in ip("-6", "route", "show")
    node.converge(routed(2))
    assert "via 2001:db8:1:0:8001::1 dev slaptap0" in ip("-6", "route", "show")


# --- IPv4 that the world reaches --------------------------------------------------------------------------------------


def with_world(count=2, *, public=False, routable=(), ipv6=True):
    desired = wanted(count, tap=False, local_source_table=True, host_ipv4=IPv4Address(HOST4))
    partitions = tuple(
        replace(
            one,
            ipv6=one.ipv6 if ipv6 else None,
            public_ipv4=IPv4Address(f"10.64.0.{one.index + 2}") if public else None,
            routable_ipv4=RoutableIPv4(IPv4Interface(routable[one.index]), IPv4Address(NEIGHBOUR4))
            if one.index < len(routable)
            else None,
        )
        for one in desired.partitions
    )
    return replace(desired, partitions=partitions, host_ipv6=BASE.ip if ipv6 else None)


@pytest.fixture
def without_ipv6(node):
    ip("-6", "address", "flush", "dev", "br0", "scope", "global")
    with node.at_neighbour():
        ip("route", "add", "10.64.0.0/16", "via", HOST4)
    return node


def test_an_ipv4_only_node(without_ipv6):
    """Each address is its user's: to be reached at, to send from; on the same host the source is the node's."""
    node, desired = without_ipv6, with_world(2, public=True, ipv6=False)
    node.converge(desired)
    with serving(UID, "10.64.0.2") as port:
        assert as_user(UID + 1, lambda: connect("10.64.0.3", "10.64.0.2", port)) == "ok"
        assert as_user(UID + 1, lambda: connect(None, "10.64.0.2", port)) == "ok"
        assert as_user(UID + 1, lambda: connect("10.64.0.2", "10.64.0.2", port)) == "ECONNREFUSED"
        with node.at_neighbour():
            assert connect(None, "10.64.0.2", port) == "ok"
    with inside(node.neighbour), serving(0, NEIGHBOUR4) as port, inside(node.own):
        assert as_user(UID, lambda: connect("10.64.0.2", NEIGHBOUR4, port)) == "ok"
        assert as_user(UID + 1, lambda: connect("10.64.0.2", NEIGHBOUR4, port, patience=1)) in {
            "ECONNREFUSED",
            "EPERM",
            "timeout",
        }
    found = {(one.partition, one.family, one.scope): one for one in read_counters().traffic}
    assert found["slappart0", "public4", "remote"].packets_in > 0
    assert found["slappart0", "public4", "local"].packets_in > 0
    assert found["slappart1", "public4", "remote"].packets_out == 0
    node.converge(DesiredNetwork())
    assert "10.64.0.2" not in ip("address", "show")
    assert json.loads(ip("-json", "rule", "show")) == [
        {"priority": 0, "src": "all", "table": "local"},
        {"priority": 32766, "src": "all", "table": "main"},
        {"priority": 32767, "src": "all", "table": "default"},
    ]


def test_a_routable_address_leaves_by_its_own_gateway(node):
    """Also where the node's default route goes elsewhere."""
    ip("route", "del", "default")
    with node.at_neighbour():
        ip("address", "add", "198.51.100.1/32", "dev", "lo")
        ip("route", "add", "203.0.113.7", "via", HOST4)
    desired = with_world(2, routable=("203.0.113.7/24",))
    operations = node.converge(desired)
    assert {"rule/from-203.0.113.7", f"gateway/{TABLE_GATEWAYS}/default"} <= operations.keys()
    with inside(node.neighbour), serving(0, "198.51.100.1") as port, inside(node.own):
        assert as_user(UID, lambda: connect("203.0.113.7", "198.51.100.1", port)) == "ok"
        assert as_user(UID + 1, lambda: connect("203.0.113.7", "198.51.100.1", port, patience=1)) != "ok"
    with serving(UID, "203.0.113.7") as port, node.at_neighbour(), opened_by(0):
        assert connect("198.51.100.1", "203.0.113.7", port) == "ok"
    reading = {(one.partition, one.family, one.scope): one for one in read_counters().traffic}
    assert reading["slappart0", "routable4", "remote"].bytes_out > 0
    node.converge(with_world(2))
    assert "203.0.113.7" not in ip("rule", "show") + ip("address", "show")
    assert ip("-4", "route", "show", "table", "all", "proto", "112") == ""


def test_each_drift_of_rules_and_gateways_is_repaired(node):
    desired = with_world(2, routable=("203.0.113.7/24", "203.0.113.8/24"))
    node.converge(desired)
    ip("rule", "del", "from", "203.0.113.7")
    assert list(node.converge(desired)) == ["rule/from-203.0.113.7"]
    ip("route", "flush", "table", str(TABLE_GATEWAYS))
    assert list(node.converge(desired)) == [
        f"gateway/{TABLE_GATEWAYS}/default",
        f"gateway/{TABLE_GATEWAYS}/203.0.113.0/24",
    ]


def test_networks_that_are_routed_elsewhere_are_known(node):
    ip("route", "add", "10.0.5.0/24", "via", NEIGHBOUR4)
    ip("route", "add", "10.0.0.0/8", "via", NEIGHBOUR4)
    node.converge(wanted(1))
    network = wanted(1).partitions[0].ipv4
    assert network is not None
    assert [str(one) for one in routed_elsewhere(IPv4Interface("10.0.0.0/16").network)] == ["10.0.5.0/24"]


# --- how ours are told from others' -----------------------------------------------------------------------------------


def test_an_address_is_known_as_ours_without_the_protocol_attribute(node, monkeypatch):
    """Kernels before 5.18 neither keep nor give back IFA_PROTO; the metric that stands in is read from this kernel."""
    desired = wanted(2)
    node.converge(desired)
    rtnetlink._addresses = rtnetlink._Decoder(rtnetlink._address)  # one that remembers nothing yet
    kept = rtnetlink._ADDRESS_ATTRIBUTES - {rtnetlink._IFA_PROTO}
    monkeypatch.setattr(rtnetlink, "_ADDRESS_ATTRIBUTES", kept)
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        ours = [one for one in rtnetlink.addresses(sock) if one.protocol == PROTOCOL_MARK]
    assert len(ours) == 4
    assert node.plan(desired) == {}
    node.converge(DesiredNetwork())
    assert "10.0.0.2" not in ip("address", "show")
