"""A node that slapos.core formatted goes over to us: nothing is renumbered, then or later.

The real slapos.core does the formatting, in its own interpreter; only its pauses are shorter, and its questions to the
world are left out. One partition's natural IPv6 is somebody else's meanwhile, so that it draws one by lot.
"""

import json
import pwd
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from json_schemas import parsed

from partitiond.state import Store

SLAPOS = Path(sys.prefix) / "master" / "bin" / "python3"
_FORMAT = """
import sys, time
pause, end = time.sleep, time.monotonic() + 30

def tentative():
    rows = map(str.split, open("/proc/net/if_inet6"))
    return any(row[5] == "br0" and row[3] == "00" and int(row[4], 16) & 0x40 for row in rows)

def until_usable(seconds):
    # also without a check for duplicates an address is tentative for a moment, and slapformat would take another
    while tentative() and time.monotonic() < end:
        pause(0.005)

time.sleep = until_usable
sys.argv = ["slapos", "node", "format", "--now", "--cfg", sys.argv[1]]
import slapos.format
slapos.format.getPublicIPv4Address = lambda: ""
from slapos.cli.entry import main
sys.exit(main())
"""
_PREPARED_BUT_NOT_POSTED = 2
_SLAPFORMAT = {
    "partition_base_name": "slappart",
    "user_base_name": "slapuser",
    "tap_base_name": "slaptap",
    "ipv4_local_network": "10.0.0.0/16",
    "create_tap": "true",
    "tap_ipv6": "true",
}


def ip(*lines):
    """Run lines of ``ip`` as one batch."""
    done = subprocess.run(
        ["/usr/sbin/ip", "-batch", "-"],
        input="".join(f"{line}\n" for line in lines),
        text=True,
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def shown(*arguments):
    """What ``ip`` shows, as JSON."""
    done = subprocess.run(["/usr/sbin/ip", "-j", *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout or "[]")


@pytest.fixture
def machine():
    """What slapos.core changes of the machine is put back."""
    users = {
        path: path.read_bytes()
        for path in map(Path, ("/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow"))
    }
    setting = Path("/proc/sys/net/ipv6/ip_nonlocal_bind")
    nonlocal_bind = setting.read_text()
    yield
    for path, content in users.items():
        path.write_bytes(content)
    setting.write_text(nonlocal_bind)
    for _, name in socket.if_nameindex():
        if name.startswith("slaptap"):
            ip(f"link delete {name}")
    for route in shown("-6", "route", "show", "table", "local", "dev", "lo"):
        if route["dst"].startswith("2001:db8:1:"):
            ip(f"route delete local {route['dst']} dev lo table local")


@pytest.fixture
def uplink(machine, bridge):
    """A bridge on which addresses can be used at once; the node is ::10 there."""
    Path("/proc/sys/net/ipv6/conf/br0/accept_dad").write_text("0")
    ip("address delete 2001:db8:1::2/64 dev br0", "address add 2001:db8:1::10/64 dev br0 nodad")
    return bridge


def slapos_format(node):
    """``slapos node format``, all but the posting: there is no master."""
    done = subprocess.run(
        [SLAPOS, "-I", "-c", _FORMAT, str(node.path)],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == _PREPARED_BUT_NOT_POSTED, done.stderr


@pytest.fixture
def formatted(uplink, node_config):
    """Have slapos.core format a node; ``taken`` are addresses that somebody else has meanwhile."""

    def make(partitions, *taken):
        node = node_config(partitions)
        paths = {"computer_xml": node.root / "slapos.xml", "computer_json": node.root / "slapos.json"}
        node.write(slapformat=_SLAPFORMAT | paths)
        ip(
            "link add other type veth peer name behind",
            *(f"address add {one}/128 dev other nodad" for one in taken),
        )
        try:
            slapos_format(node)
        finally:
            ip("link delete other")
        return node

    return make


def truth():
    """What must not change: addresses, routes, who owns which tap, the numbers of the users."""
    links = shown("-d", "address")
    return {
        "addresses": {
            (link["ifname"], one["local"], one["prefixlen"])
            for link in links
            for one in link["addr_info"]
            if one["scope"] != "link" and link["ifname"] != "lo"
        },
        "taps": {
            link["ifname"]: link["linkinfo"]["info_data"]["user"]
            for link in links
            if link.get("linkinfo", {}).get("info_kind") == "tun"
        },
        "users": {
            (user.pw_name, user.pw_uid, user.pw_gid, user.pw_dir)
            for user in pwd.getpwall()
            if user.pw_name.startswith("slap")
        },
    }


def routes():
    """The IPv6 routes to partitions and taps: destination, gateway, link."""
    return {
        (route["dst"], route.get("gateway"), route.get("dev"))
        for table in ("main", "local")
        for route in shown("-6", "route", "show", "table", table)
        if route["dst"].startswith("2001:db8:1:")
    }


def planned(command, node):
    """The operations of ``partitiond plan`` by id, and what it warns of."""
    done = command("plan", "--json", "-c", node.path)
    assert done.returncode in (0, 2), done.stderr
    return {one["id"]: one for one in parsed(done)["operations"]}, done.stderr


def tap_as_told(node, index):
    """What a partition's software reads of its tap."""
    return json.loads((node.instance / f"slappart{index}" / ".slapos-resource").read_text())["tap"]


def ipv6_of(node, index):
    computer = json.loads((node.root / "slapos.json").read_text())
    return next(
        one["addr"] for one in computer["partition_list"][index]["address_list"] if ":" in one["addr"]
    )


# what may be done to things that slapos.core made: marks, and what only we do to them
_MARKS = {
    "user": "not marked as ours",
    "tap": "is not marked as ours",
    # on a tap that nobody has opened slapos.core's address waits for a carrier
    "address": "(is tentative, )?(preferred lifetime is not 0, so others' traffic may leave with it, )"
    "(duplicate address detection is on, )?is not marked as ours",
    "range": "is not marked as ours",
    "route": "is not marked as ours",
    "device": "the users of partitions cannot open their taps",
    "resource-file": "says something else",
}
# what slapos.core does not have at all
_NEW = {"directory", "filter", "bpf", "source", "rule", "route", "identity", "supervisord"}


def owner(text):
    """The uid in the description of a tap."""
    return re.search("uid ([0-9]+)", text)[1]


def assert_only_what_slapos_core_does_not_do(operations, node):
    for name, one in operations.items():
        kind, _, what = name.partition("/")
        if one["action"] == "create":
            assert kind in _NEW, one
            assert kind != "route" or what == "default", one
            if kind == "directory":
                assert not Path("/", what).exists(), one
                assert Path("/", what).parent != node.instance or what.endswith(("/etc", "/var")), one
        else:
            assert one["action"] == "change", one
            assert re.fullmatch(_MARKS.get(kind, ""), one["reason"]), one
            if kind == "tap":
                assert owner(one["before"]) == owner(one["after"])
            else:
                assert one["before"] == one["after"] or kind == "device", one


def test_switching_renumbers_nothing(formatted, command):
    node = formatted(3, "2001:db8:1::3")
    drawn = ipv6_of(node, 1)
    assert (ipv6_of(node, 0), ipv6_of(node, 2)) == ("2001:db8:1::2", "2001:db8:1::4")
    assert drawn != "2001:db8:1::3"
    # from its second run on, what it stores as the node's own is the lowest address there: a partition's
    slapos_format(node)
    assert json.loads((node.root / "slapos.json").read_text())["address"] == "2001:db8:1::2"
    assert ipv6_of(node, 1) == drawn
    before, ways = truth(), routes()
    assert (len(before["addresses"]), len(before["taps"])) == (1 + 3 * 3, 3)
    told = tap_as_told(node, 1)

    operations, warnings = planned(command, node)
    assert warnings == ""
    assert_only_what_slapos_core_does_not_do(operations, node)
    assert f"address/{drawn}" in operations
    assert {f"user/slapuser{index}" for index in range(3)} <= operations.keys()
    assert (truth(), routes()) == (before, ways), "plan touches nothing"

    done = command("apply", "--json", "-c", node.path)
    assert done.returncode == 0, done.stderr
    assert (truth(), routes() >= ways) == (before, True)
    assert told.items() <= tap_as_told(node, 1).items()
    assert planned(command, node)[0] == {}
    store = Store(node.state)
    assert (str(store.addresses()["slappart1"].ipv6), str(store.base())) == (drawn, "2001:db8:1::10/64")
    shown_now = parsed(command("status", "--json", "-c", node.path))["partitions"]
    assert [one["ipv6"] for one in shown_now] == ["2001:db8:1::2", drawn, "2001:db8:1::4"]

    # slapos.core and its files may go
    (node.root / "slapos.xml").unlink()
    (node.root / "slapos.json").unlink()
    assert planned(command, node)[0] == {}

    # and after a reboot all is as it was
    ip(*(f"link delete slaptap{index}" for index in range(3)))
    on_bridge = [(address, length) for link, address, length in before["addresses"] if link == "br0"]
    ip(
        *(
            f"address delete {address}/{length} dev br0"
            for address, length in on_bridge
            if address != "2001:db8:1::10"
        )
    )
    assert command("apply", "-q", "-c", node.path).returncode == 0
    after = truth()
    assert (after, routes() >= ways) == (before, True)

    # who comes later steps aside
    node.write(slapformat={"partition_amount": 5})
    assert command("apply", "-q", "-c", node.path).returncode == 0
    grown = truth()
    assert grown["addresses"] > after["addresses"]
    assert len(grown["addresses"]) == len(after["addresses"]) + 2 * 3


def test_a_file_that_cannot_be_read_stops_the_switch(formatted, command):
    node = formatted(1)
    xml, spare = node.root / "slapos.xml", node.root / "slapos.json"
    whole = xml.read_bytes()
    before, ways = truth(), routes()
    xml.write_bytes(whole[: len(whole) // 2])
    spare.unlink()
    for verb in ("plan", "apply", "status"):
        done = command(verb, "--json", "-c", node.path)
        assert done.returncode == 1
        error = parsed(done)["error"]
        assert (error["code"], error["resource"]) == ("slapformat.unreadable", str(xml))
        assert "zip" in error["hint"]
    assert (truth(), routes()) == (before, ways)
    shutil.rmtree(node.state)  # of the lock that apply took
    xml.write_bytes(whole)
    operations, warnings = planned(command, node)
    assert_only_what_slapos_core_does_not_do(operations, node)
    assert "unreadable" not in warnings


def test_a_partition_that_was_given_the_nodes_own_address(formatted, uplink, command):
    """slapformat does so where the node's own is on a partition's place; the node keeps it, and the partition moves."""
    ip("address delete 2001:db8:1::10/64 dev br0", "address add 2001:db8:1::2/64 dev br0 nodad")
    node = formatted(2)
    assert [ipv6_of(node, index) for index in range(2)] == ["2001:db8:1::2", "2001:db8:1::3"]
    operations, warnings = planned(command, node)
    assert operations["address/2001:db8:1::1:2"]["action"] == "create"
    assert "address/2001:db8:1::2" not in operations
    assert "address/2001:db8:1::3" in operations
    assert "IPv6 of slappart0: in use twice" in warnings
    assert command("apply", "-q", "-c", node.path).returncode == 0
    assert ("br0", "2001:db8:1::2", 64) in truth()["addresses"]
    assert planned(command, node) == ({}, "")
    assert Store(node.state).base().ip.compressed == "2001:db8:1::2"


# --- what a node remembers by itself --------------------------------------------------------------------------------------


def private(command, node):
    return [one["ipv4"] for one in parsed(command("status", "--json", "-c", node.path))["partitions"]]


def test_a_foreign_network_that_comes_and_goes_moves_nobody(bridge, node_config, command):
    node = node_config(2)
    ip("link add lan type veth peer name behind", "address add 10.0.0.1/29 dev lan", "link set lan up")
    try:
        assert command("apply", "-q", "-c", node.path).returncode == 0
        assert private(command, node) == ["10.0.255.254", "10.0.255.253"]
    finally:
        ip("link delete lan")
    # but for what guests may claim, which follows the node's own addresses
    assert planned(command, node)[0].keys() <= {"filter/partitiond"}
    written = (node.state / "addresses.json").stat()
    node.write(slapformat={"partition_amount": 3})
    ip("link add lan type veth peer name behind", "address add 10.0.255.1/24 dev lan", "link set lan up")
    try:
        assert command("apply", "-q", "-c", node.path).returncode == 0
        assert private(command, node) == ["10.0.255.254", "10.0.255.253", "10.0.0.4"]
        assert planned(command, node)[0] == {}
    finally:
        ip("link delete lan")
    assert (node.state / "addresses.json").stat() != written
    written = (node.state / "addresses.json").stat()
    assert command("apply", "-q", "-c", node.path).returncode == 0
    assert (node.state / "addresses.json").stat() == written, "nothing is written when nothing changed"


def test_what_is_in_place_is_remembered_although_something_else_is_not(bridge, node_config, command):
    node = node_config(3)
    ip("link add slaptap1 type bridge")
    try:
        assert command("apply", "-q", "-c", node.path).returncode == 3
        assert set(Store(node.state).addresses()) == {"slappart0", "slappart2"}
    finally:
        ip("link delete slaptap1")
    assert command("apply", "-q", "-c", node.path).returncode == 0
    assert set(Store(node.state).addresses()) == {"slappart0", "slappart1", "slappart2"}
    node.write(slapformat={"partition_amount": 1})
    assert command("apply", "-q", "-c", node.path).returncode == 0
    assert set(Store(node.state).addresses()) == {"slappart0"}
