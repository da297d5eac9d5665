"""The codec against pyroute2, which decodes the same kernel independently; both ways."""

import socket
import subprocess

import pytest
from netplan_scene import BASE
from pyroute2 import IPRoute

from netplan import rtnetlink
from netplan.errors import NetplanError
from netplan.model import Address, Route
from netplan.netlink import NETLINK_ROUTE, NetlinkSocket
from netplan.taps import make_taps


@pytest.fixture
def sock(node):
    with NetlinkSocket(NETLINK_ROUTE) as one:
        yield one


def _decoded_links(ipr: IPRoute):
    found = {}
    for message in ipr.get_links():
        about = message.get_attr("IFLA_LINKINFO")
        kind = (about.get_attr("IFLA_INFO_KIND") if about else None) or ""
        owner = -1
        if kind == "tun":
            owner = about.get_attr("IFLA_INFO_DATA").get_attr("IFLA_TUN_OWNER")
            owner = -1 if owner is None else owner
        found[message.get_attr("IFLA_IFNAME")] = (
            message["index"],
            kind,
            message.get_attr("IFLA_IFALIAS") or "",
            message.get_attr("IFLA_MASTER") or 0,
            bool(message["flags"] & 1),
            message.get_attr("IFLA_ADDRESS"),
            message.get_attr("IFLA_GROUP"),
            owner,
        )
    return found


def test_counters_of_links_are_those_that_pyroute2_reads_also_when_the_links_change(node, sock):
    assert not make_taps([("tap0", 1234), ("tap1", 0)])

    def read():
        return {
            one.name: (one.ifindex, one.alias, one.rx_packets, one.tx_packets, one.rx_bytes, one.tx_bytes)
            for one in rtnetlink.link_counters(sock)
        }

    def told_by_pyroute2():
        told = {}
        for message in node.ipr.get_links():
            stats = message.get_attr("IFLA_STATS64")
            numbers = (stats[name] for name in ("rx_packets", "tx_packets", "rx_bytes", "tx_bytes"))
            alias = message.get_attr("IFLA_IFALIAS") or ""
            told[message.get_attr("IFLA_IFNAME")] = (message["index"], alias, *numbers)
        return told

    def check():
        # the bridge sends packets of its own now and then: what lies between two equal readings of ours is the same
        for _ in range(50):
            before, told, found = read(), told_by_pyroute2(), read()
            if before == found:
                assert found == told
                return found
        raise AssertionError("the counters never rest")

    before = check()
    for name, *change in (("tap0", "alias", "ours"), ("tap0", "name", "tap9"), ("tap9", "alias", "x")):
        subprocess.run(["/usr/sbin/ip", "link", "set", name, *change], check=True)
        before = check()
    assert before["tap9"][1] == "x"
    node.ipr.link("set", index=node.link("lo"), state="up")
    first = check()["lo"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.sendto(b"x" * 100, ("127.0.0.1", 9))
    second = check()["lo"]
    assert second[2] > first[2]


def test_links_are_read_as_pyroute2_reads_them(node, sock):
    node.ipr.link("add", ifname="pair0", kind="veth", peer="pair1")
    assert not make_taps([("tap0", 1234), ("tap1", 0)])
    node.ipr.link("set", index=node.link("tap0"), alias="käse", state="up", master=node.bridge, group=7)
    found = {
        name: (
            one.ifindex,
            one.kind,
            one.alias,
            one.master,
            one.up,
            one.mac,
            one.group,
            one.tap_owner,
        )
        for name, one in rtnetlink.links(sock).items()
    }
    assert found == _decoded_links(node.ipr)
    links = rtnetlink.links(sock)
    assert links["tap0"].tap
    assert links["tap0"].tap_owner == 1234
    assert not links["pair0"].tap


def test_a_tun_is_no_tap(node, sock):
    node.ipr.link("add", ifname="tun0", kind="tuntap", mode="tun", uid=5)
    link = rtnetlink.links(sock)["tun0"]
    assert (link.kind, link.tap, link.tap_owner) == ("tun", False, 5)


def test_what_we_set_on_a_link_is_what_pyroute2_reads(node, sock):
    assert not make_taps([("tap0", 1234)])
    request = rtnetlink.set_link(
        "tap0", alias="partitiond:x", mac="fe:00:00:00:00:01", master=node.bridge, up=True
    )
    assert not sock.batch([request])
    (message,) = node.ipr.get_links(ifname="tap0")
    assert message.get_attr("IFLA_IFALIAS") == "partitiond:x"
    assert message.get_attr("IFLA_ADDRESS") == "fe:00:00:00:00:01"
    assert message.get_attr("IFLA_MASTER") == node.bridge
    assert message["flags"] & 1
    assert not sock.batch([rtnetlink.set_link("tap0", alias=None, mac=None, master=0, up=False)])
    (message,) = node.ipr.get_links(ifname="tap0")
    assert message.get_attr("IFLA_MASTER") is None
    assert message.get_attr("IFLA_IFALIAS") == "partitiond:x"
    assert message["flags"] & 1


def _decoded_addresses(ipr: IPRoute):
    return {
        (
            message["index"],
            message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"),
            message["prefixlen"],
            message.get_attr("IFA_PROTO") or 0,
            message.get_attr("IFA_FLAGS"),
        )
        for message in ipr.get_addr()
    }


def test_addresses_both_ways(node, sock):
    six = Address(node.bridge, bytes(BASE.ip.packed[:-1]) + b"\x09", 64, 112, rtnetlink.IFA_F_NODAD)
    four = Address(node.bridge, bytes((10, 0, 0, 9)), 32, 112, 0)
    assert not sock.batch([rtnetlink.set_address(six), rtnetlink.set_address(four)])
    seen = {
        (
            one.link,
            socket.inet_ntop(socket.AF_INET6 if len(one.packed) == 16 else socket.AF_INET, one.packed),
            *one[2:],
        )
        for one in rtnetlink.addresses(sock)
    }
    assert seen == _decoded_addresses(node.ipr)
    for address, family in (("2001:db8:1::9", socket.AF_INET6), ("10.0.0.9", socket.AF_INET)):
        (message,) = [
            one
            for one in node.ipr.get_addr(family=family)
            if address in {one.get_attr("IFA_ADDRESS"), one.get_attr("IFA_LOCAL")}
        ]
        assert message.get_attr("IFA_PROTO") == 112
        assert message.get_attr("IFA_FLAGS") & rtnetlink.IFA_F_DEPRECATED
        if (
            family == socket.AF_INET6
        ):  # the kernel answers "for ever" for any permanent IPv4 (inet_fill_ifaddr)
            assert message.get_attr("IFA_CACHEINFO")["ifa_preferred"] == 0
        assert message.get_attr("IFA_CACHEINFO")["ifa_valid"] == 0xFFFFFFFF
    assert not sock.batch([rtnetlink.delete_address(six), rtnetlink.delete_address(four)])
    assert "10.0.0.9" not in {row[1] for row in _decoded_addresses(node.ipr)}


def test_routes_both_ways(node, sock):
    ranged = Route(255, 2, 112, socket.inet_pton(socket.AF_INET6, "2001:db8:2::"), 80, b"", 1, 1024, b"", 0)
    default = Route(
        254,
        1,
        112,
        b"",
        0,
        socket.inet_pton(socket.AF_INET6, "2001:db8:1::ffff:1"),
        node.bridge,
        1023,
        BASE.ip.packed,
        0,
    )
    assert not sock.batch([rtnetlink.set_route(ranged), rtnetlink.set_route(default)])
    assert set(rtnetlink.routes(sock, protocol=112)) == {ranged, default}
    assert rtnetlink.routes(sock, table=255, link=1)[0].link == 1
    (message,) = [one for one in node.ipr.get_routes(family=10, table=254) if one["proto"] == 112]
    assert message["dst_len"] == 0
    assert message.get_attr("RTA_PRIORITY") == 1023
    assert message.get_attr("RTA_PREFSRC") == str(BASE.ip)
    assert message.get_attr("RTA_GATEWAY") == "2001:db8:1::ffff:1"
    (message,) = [one for one in node.ipr.get_routes(family=10, table=255) if one["proto"] == 112]
    assert message.get_attr("RTA_DST") == "2001:db8:2::"
    assert (message["dst_len"], message["type"]) == (80, 2)
    assert not sock.batch([rtnetlink.delete_route(ranged), rtnetlink.delete_route(default)])
    assert rtnetlink.routes(sock, protocol=112) == ()


def test_rules_are_read_as_pyroute2_reads_them(node, sock):
    node.ipr.rule("add", priority=77, table=1000, family=10)
    seen = {(one.preference, one.table) for one in rtnetlink.rules(sock)}
    assert seen == {
        (rule.get_attr("FRA_PRIORITY") or 0, rule.get_attr("FRA_TABLE"))
        for rule in node.ipr.get_rules(family=10)
    }


def test_a_long_batch_reports_exactly_the_refused_ones(node, sock):
    requests = []
    for number in range(500):
        packed = bytes((10, 0, number >> 8, number & 255))
        link = 4711 if number % 7 == 3 else node.bridge
        requests.append(rtnetlink.set_address(Address(link, packed, 32, 112, 0)))
    refused = sock.batch(requests)
    assert sorted(refused) == [number for number in range(500) if number % 7 == 3]
    assert {one.errno for one in refused.values()} == {19}
    assert len([one for one in rtnetlink.addresses(sock) if one.protocol == 112]) == 500 - len(refused)
    assert sock.batch([]) == {}
    # the socket is in step: the next answers belong to the next requests
    assert (
        sock.batch([rtnetlink.set_link("nowhere", alias=None, mac=None, master=None, up=True)])[0].errno == 19
    )


def test_the_kernels_own_words_are_passed_on(node, sock):
    refused = sock.batch([rtnetlink.set_link("br0", alias=None, mac=None, master=node.bridge, up=False)])
    assert "loop" in refused[0].text().lower() or "bridge" in refused[0].text().lower()


def test_a_link_group_goes_at_once(node, sock):
    assert not make_taps((f"tap{number}", 0) for number in range(20))
    settings = [
        rtnetlink.set_link(f"tap{number}", alias=None, mac=None, master=None, up=True, group=99)
        for number in range(15)
    ]
    assert not sock.batch(settings)
    assert not sock.batch([rtnetlink.delete_group(99)])
    assert sorted(name for name in rtnetlink.links(sock) if name.startswith("tap")) == [
        f"tap{number}" for number in range(15, 20)
    ]


def test_without_the_tun_device_the_error_says_what_to_do(monkeypatch, node):
    monkeypatch.setattr("netplan.taps._DEVICE", "/dev/net/nothing")
    with pytest.raises(NetplanError) as caught:
        make_taps([("tap0", 1)])
    assert caught.value.code == "network.no_tun"
    assert "modprobe tun" in caught.value.hint
