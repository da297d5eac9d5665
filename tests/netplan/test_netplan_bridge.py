"""The bridge and its ports: made, filled with what the node is reached by, and taken back without a trace."""

import json
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from netplan_scene import BASE, HOST4, NEIGHBOUR4, NEIGHBOUR6, UID, wanted

from netplan.addresses import bridge_mac
from netplan.apply import apply
from netplan.model import BRIDGE_ALIAS, PORT_ALIAS, BridgeSpec, DesiredNetwork
from netplan.observe import observe
from netplan.plan import plan
from netplan.sysctls import BRIDGE_FILTERS

NEW = BridgeSpec("br1", bridge_mac("COMP-1"), ("eth0",))


def ip(*arguments):
    return subprocess.run(["/usr/sbin/ip", *arguments], check=True, capture_output=True, text=True).stdout


def bridged(count=2, spec=NEW, **options):
    desired = wanted(count, **options)
    partitions = tuple(
        replace(one, tap=replace(one.tap, bridge=spec.name)) if one.tap else one for one in desired.partitions
    )
    return replace(desired, interface=spec.name, partitions=partitions, bridge=spec)


@pytest.fixture
def uplink(node):
    """A node without a bridge: its addresses and routes are on eth0, of every kind that an operator has."""
    ip("link", "set", "eth0", "nomaster")
    ip("link", "delete", "br0")
    ip("link", "set", "eth0", "up")
    ip("address", "add", f"{BASE}", "dev", "eth0", "nodad")
    ip(
        "address",
        "add",
        "2001:db8:1::5/64",
        "dev",
        "eth0",
        "nodad",
        "noprefixroute",
        "preferred_lft",
        "4000",
        "valid_lft",
        "8000",
    )
    ip("address", "add", f"{HOST4}/24", "dev", "eth0", "brd", "+")
    ip("address", "add", "192.0.2.9/24", "dev", "eth0", "label", "eth0:1")
    ip("address", "add", "198.51.100.1/32", "dev", "eth0")
    ip("route", "add", "default", "via", NEIGHBOUR4, "src", "192.0.2.9", "metric", "50", "mtu", "1400")
    ip("route", "add", "203.0.113.0/24", "via", NEIGHBOUR4, "proto", "static")
    ip("route", "add", "203.0.114.1", "dev", "eth0", "scope", "link")
    ip("route", "add", "203.0.115.0/24", "via", "203.0.114.1")
    ip("route", "add", "default", "via", NEIGHBOUR4, "table", "77")
    ip("-6", "route", "add", "default", "via", NEIGHBOUR6, "dev", "eth0", "metric", "300", "pref", "high")
    ip("-6", "route", "add", "2001:db8:9::/48", "via", NEIGHBOUR6, "src", str(BASE.ip))
    ip("-6", "route", "add", "2001:db8:a::/48", "dev", "eth0", "expires", "900")
    Path("/proc/sys/net/ipv6/conf/eth0/accept_ra").write_text("2")
    return node


def belongings(link):
    """What a person would call the configuration of an interface; times run, so they are not in it."""
    addresses = [
        {
            key: one.get(key)
            for key in ("local", "prefixlen", "broadcast", "scope", "noprefixroute", "secondary")
        }
        | {"label": one.get("label", "").replace(link, "LINK"), "timed": one["valid_life_time"] < 2**32 - 1}
        for one in json.loads(ip("-json", "address", "show", "dev", link))[0]["addr_info"]
        if one["scope"] != "link"
    ]
    routes = [
        line.replace(f"dev {link} ", "dev LINK ").split(" expires")[0]
        for family in ("-4", "-6")
        for line in ip(family, "route", "show", "table", "all").splitlines()
        if f"dev {link} " in line
        and not any(word in line for word in ("fe80::", "ff00::", "table local", "proto 112", "multicast"))
    ]
    return addresses, sorted(routes)


def marks(link):
    found = json.loads(ip("-json", "address", "show", "dev", link))[0]["addr_info"]
    return {one["local"]: one.get("protocol") for one in found}


def test_a_port_takes_everything_along_and_back(uplink):
    before, mac = belongings("eth0"), json.loads(ip("-json", "link", "show", "eth0"))[0]["address"]
    desired = replace(bridged(2), host_ipv6=BASE.ip)
    operations = uplink.converge(desired)
    assert list(operations)[:3] == ["filter/partitiond", "bridge/br1", "port/eth0"]
    bridge = json.loads(ip("-json", "-details", "link", "show", "br1"))[0]
    assert (bridge["address"], bridge["ifalias"]) == (mac, BRIDGE_ALIAS)
    assert bridge["linkinfo"]["info_data"]["stp_state"] == 0
    assert Path("/proc/sys/net/ipv6/conf/br1/accept_ra").read_text().strip() == "2"
    assert belongings("eth0") == ([], [])
    addresses, routes = belongings("br1")
    ours = {"2001:db8:1::2", "2001:db8:1::3", "10.0.0.2", "10.0.0.3"}
    assert [one for one in addresses if one["local"] not in ours] == before[0]
    assert routes == before[1]
    assert uplink.converge(DesiredNetwork())["port/eth0"].action == "remove"
    assert belongings("eth0") == before
    assert set(marks("eth0").values()) <= {None, "kernel_ll"}
    assert uplink.link("br1") is None
    link = json.loads(ip("-json", "link", "show", "eth0"))[0]
    assert not {"ifalias", "master"} & link.keys()


def test_connections_live_through_the_move(uplink):
    with uplink.at_neighbour():
        server = socket.create_server((NEIGHBOUR6, 7000), family=socket.AF_INET6)
        server4 = socket.create_server((NEIGHBOUR4, 7000))
    clients = [
        socket.create_connection((NEIGHBOUR6, 7000), timeout=5),
        socket.create_connection((NEIGHBOUR4, 7000), timeout=5),
    ]
    accepted = [server.accept()[0], server4.accept()[0]]
    try:
        for desired in (bridged(2), DesiredNetwork(), bridged(1)):
            uplink.converge(desired)
            for client, peer in zip(clients, accepted, strict=True):
                peer.settimeout(5)
                client.sendall(b"ping")
                assert peer.recv(4) == b"ping"
                peer.sendall(b"pong")
                assert client.recv(4) == b"pong"
    finally:
        for one in (*clients, *accepted, server, server4):
            one.close()


def test_a_move_that_was_cut_off_is_finished(uplink):
    """Whatever of it the kernel has done, the rest follows: nothing is lost between the two links."""
    before = belongings("eth0")
    desired = bridged(1)
    operations = plan(desired, observe(desired))
    port = next(one for one in operations if one.id == "port/eth0")
    apply([one for one in operations if one.id == "bridge/br1"])
    apply([replace(port, moving=())])  # in the bridge, with all its addresses still on it
    again = uplink.plan(desired)
    assert "which belongs on br1" in again["port/eth0"].reason
    uplink.converge(desired)
    assert belongings("br1")[1] == before[1]
    # an address that somebody gives the port later moves, too
    ip("address", "add", "192.0.2.77/24", "dev", "eth0")
    assert list(uplink.converge(desired)) == ["port/eth0"]
    assert "192.0.2.77" in marks("br1")


def test_an_alias_that_the_port_had_comes_back(uplink):
    ip("link", "set", "eth0", "alias", "rack 4, port 2")
    uplink.converge(bridged(1))
    assert json.loads(ip("-json", "link", "show", "eth0"))[0]["ifalias"] == PORT_ALIAS + "rack 4, port 2"
    uplink.converge(DesiredNetwork())
    assert json.loads(ip("-json", "link", "show", "eth0"))[0]["ifalias"] == "rack 4, port 2"


def test_a_bridge_of_the_operators_keeps_its_own(uplink):
    """Only what was moved there goes back, and the bridge stays."""
    before = belongings("eth0")
    ip("link", "add", "br1", "type", "bridge")
    ip("address", "add", "172.31.0.1/24", "dev", "br1")
    ip("link", "set", "br1", "up")
    ip("route", "add", "172.31.5.0/24", "via", "172.31.0.9")
    uplink.converge(bridged(1))
    uplink.converge(DesiredNetwork())
    assert belongings("eth0") == before
    addresses, routes = belongings("br1")
    assert [one["local"] for one in addresses] == ["172.31.0.1"]
    assert any(route.startswith("172.31.5.0/24") for route in routes)


def test_two_ports_one_after_the_other(uplink):
    ip("link", "add", "eth1", "type", "veth", "peer", "name", "wire1")
    ip("address", "add", "172.31.0.1/24", "dev", "eth1")
    ip("link", "set", "eth1", "up")
    both = replace(NEW, ports=("eth0", "eth1"))
    uplink.converge(bridged(1))
    assert list(uplink.converge(bridged(1, both))) == ["port/eth1"]
    assert {"172.31.0.1", "192.0.2.2"} <= marks("br1").keys()
    # with a port that stays, what was moved stays, too: the bridge is where the node is reached
    assert list(uplink.converge(bridged(1))) == ["port/eth1"]
    assert "172.31.0.1" in marks("br1")
    uplink.converge(DesiredNetwork())
    assert "192.0.2.2" in marks("eth0")


def test_a_bridge_without_ports_is_made(node):
    spec = replace(NEW, ports=())
    node.converge(replace(wanted(2), bridge=spec))
    found = json.loads(ip("-json", "link", "show", "br1"))[0]
    assert (found["address"], "UP" in found["flags"]) == (spec.mac, True)
    ip("link", "set", "br1", "down")
    assert node.converge(replace(wanted(2), bridge=spec))["bridge/br1"].reason == "is down"
    node.converge(DesiredNetwork())
    assert node.link("br1") is None


def test_another_name_for_the_bridge(uplink):
    """The port and the taps move over; the node keeps its addresses."""
    before = belongings("eth0")
    uplink.converge(bridged(2))
    other = replace(NEW, name="br2")
    uplink.plan(bridged(2, other))
    assert not apply(uplink.last)
    assert list(uplink.converge(bridged(2, other))) == ["bridge/br1"]
    assert uplink.link("br1") is None
    assert belongings("br2")[1] == before[1]
    assert json.loads(ip("-json", "link", "show", "slaptap1"))[0]["master"] == "br2"


@pytest.mark.parametrize(
    ("prepare", "ports", "code"),
    [
        ((), ("nowhere",), "network.no_port"),
        ((), ("lo",), "network.no_port"),
        (("link", "add", "br1", "type", "veth"), ("eth0",), "network.no_bridge"),
        (("link", "add", "br7", "type", "bridge"), ("br7",), "network.no_port"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_of_it_is_touched(node, prepare, ports, code):
    if prepare:
        ip(*prepare)
    links = {name: link._replace(up=False) for name, link in observe(DesiredNetwork()).links.items()}
    desired = bridged(1, replace(NEW, ports=ports))
    failures = apply(plan(desired, observe(desired)))
    assert code in {one.error.code for one in failures}
    after = {name: link._replace(up=False) for name, link in observe(DesiredNetwork()).links.items()}
    assert {name for name in after if name in links or not name.startswith("slaptap")} == links.keys()


def test_a_port_of_another_bridge_stays_there(node):
    desired = replace(bridged(1), interface="br0", bridge=NEW)
    failures = apply(plan(desired, observe(desired)))
    assert "network.port_taken" in {one.error.code for one in failures}
    assert json.loads(ip("-json", "link", "show", "eth0"))[0]["master"] == "br0"


def test_the_hosts_own_filters_are_kept_from_the_guests_frames(node):
    """With br_netfilter in the kernel a policy made for the host would drop what guests send to each other."""
    if not BRIDGE_FILTERS[0].path.exists():
        pytest.skip("no br_netfilter in this kernel")
    for setting in BRIDGE_FILTERS:
        setting.path.write_text("1")
    operations = node.converge(wanted(1))
    assert {f"sysctl/{one.name}" for one in BRIDGE_FILTERS} <= operations.keys()
    assert {one.path.read_text().strip() for one in BRIDGE_FILTERS} == {"0"}
    BRIDGE_FILTERS[0].path.write_text("1")
    assert list(node.converge(wanted(1))) == [f"sysctl/{BRIDGE_FILTERS[0].name}"]
    node.converge(DesiredNetwork())
    assert {one.path.read_text().strip() for one in BRIDGE_FILTERS} == {"1"}


def test_five_partitions_at_once_on_a_new_bridge(uplink):
    uplink.converge(bridged(5, ranges=True))
    found = observe(DesiredNetwork()).links
    bridge = found["br1"].ifindex
    assert {found[f"slaptap{index}"].master for index in range(5)} == {bridge}
    assert {found[f"slaptap{index}"].tap_owner for index in range(5)} == set(range(UID, UID + 5))
