"""The node's network from the command line: bridged, routed, with IPv4 alone, as operator, tenant and attacker meet it.

A real kernel and real stunnels; the neighbour at the other end of the wire is a namespace of its own.
"""

import contextlib
import hashlib
import json
import socket
import ssl
import subprocess
from base64 import b64decode
from pathlib import Path

import pytest
from json_schemas import parsed
from network_scene import (
    CLIENT,
    CONNECT_REFUSED,
    GUEST,
    NEIGHBOUR4,
    NEIGHBOUR6,
    NODE4,
    NODE6,
    SERVICE,
    SYS,
    Master,
    addresses,
    as_user,
    attempts,
    ip,
    ip_lines,
    links,
    mac,
    mtu,
    ping,
    routes,
    slapformat,
    standing_wire,
    started_as,
)
from test_node_tunnels import declare

from partitiond.context import Context
from partitiond.errors import PartitiondError
from stunnel_mgr.identity import make_identity

BRIDGE_FILTERS = [f"bridge/bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables", "arptables")]


@pytest.fixture
def wire():
    with standing_wire() as made:
        yield made


class Operator:
    """The command line on one node, with ``--json`` and validated answers."""

    def __init__(self, command, node):
        self.command, self.node = command, node

    def __call__(self, *words, code=0):
        done = self.command(*words, "--json", "-c", self.node.path)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return parsed(done)

    def text(self, *words):
        done = self.command(*words, "-c", self.node.path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def plan(self):
        found = self.command("plan", "--json", "-c", self.node.path)
        operations = {one["id"]: one for one in parsed(found)["operations"]}
        assert found.returncode == (2 if operations else 0), found.stderr
        return operations

    def apply(self):
        """Apply; afterwards nothing is left to do, and a second one does nothing."""
        for again in (False, True):
            value = self("apply")
            assert (value["failures"], value["left"], value["refused"]) == ([], [], [])
            assert bool(value["done"]) != again

    def teardown(self):
        assert self("teardown")["failures"] == []

    def partitions(self):
        return {one["id"]: one for one in self("status")["partitions"]}


@pytest.fixture
def operator(wire, node_config, command):
    """Make a node on ``eth0``; it is taken down at the end."""
    return lambda partitions=2, **settings: Operator(
        command, node_config(partitions, interface="eth0", **settings)
    )


def resource(node, partition="slappart0"):
    return json.loads((node.instance / partition / ".slapos-resource").read_bytes())


def settings():
    return {name: (SYS / name).read_text() for name in (*BRIDGE_FILTERS, "ipv6/ip_nonlocal_bind")}


def network():
    """All that a node changes of the network."""
    return {
        "links": {name: (mac(name), mtu(name)) for name in links()},
        "addresses": {name: addresses(name) for name in links()},
        "routes": routes(),
        "settings": settings(),
    }


# --- bridged --------------------------------------------------------------------------------------------------------------


class Session:
    """A TCP connection of the node with its neighbour."""

    def __init__(self, wire, address):
        with wire.inside():
            listener = socket.create_server(
                (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
            )
        with listener:
            self.near = socket.create_connection(listener.getsockname()[:2], timeout=5)
            self.far = listener.accept()[0]
        self.far.settimeout(5)

    def lives(self):
        for one, other in ((self.near, self.far), (self.far, self.near)):
            one.sendall(b"still here")
            assert other.recv(100) == b"still here"

    def close(self):
        self.near.close()
        self.far.close()


@pytest.fixture
def sessions(wire):
    """Connections over eth0 in both families, made before the node is touched."""
    made = [Session(wire, NEIGHBOUR4), Session(wire, NEIGHBOUR6)]
    yield made
    for one in made:
        one.close()


def test_the_uplink_moves_into_a_bridge_and_back(operator, sessions):
    for name in BRIDGE_FILTERS:  # as the kernel has them in a new namespace, whatever tests before this left
        (SYS / name).write_text("1")
    here = operator(2, partitiond={"bridge": "br0", "bridge_ports": "eth0"})
    before = network()

    value = here("status")
    assert (value["node"]["interface"], value["node"]["bridge"]) == ("br0", "br0")
    assert value["node"]["bridge_ports"] == ["eth0"]
    assert {"bridge/br0", "port/eth0"} <= set(value["node"]["drift"])
    planned = here.plan()
    assert planned["bridge/br0"]["after"] == f"bridge, {before['links']['eth0'][0]}"
    moved = planned["port/eth0"]["after"]
    assert moved.startswith("in br0, with ")
    for what in (
        f"{NODE4}/24",
        f"{NODE6}/64",
        f"route default via {NEIGHBOUR4}",
        f"route default via {NEIGHBOUR6}",
    ):
        assert what in moved
    assert network() == before  # neither status nor plan touches anything

    here.apply()
    assert addresses("eth0") == {}
    assert mac("br0") == before["links"]["eth0"][0]
    ours = {"10.0.0.2": 32, "10.0.0.3": 32, "2001:db8:1::2": 64, "2001:db8:1::3": 64}
    assert addresses("br0") == {NODE4: 24, NODE6: 64} | ours
    assert f"default via {NEIGHBOUR4} dev br0 " in routes()
    assert any(line.startswith(f"default via {NEIGHBOUR6} dev br0 metric 1024") for line in routes())
    assert all((SYS / name).read_text() == "0\n" for name in BRIDGE_FILTERS)
    for session in sessions:
        session.lives()

    value = here("status")
    assert value["node"]["drift"] == []
    assert value["partitions"][1]["tap"]["bridge"] == "br0"
    assert value["partitions"][1]["ipv6"] == "2001:db8:1::3"
    assert here("show", "slappart1")["drift"] == []
    assert here.text("status").startswith("node COMP-1 on br0, taps in bridge br0 with eth0\n")
    assert "slaptap1, in br0, guest MAC 02:" in here.text("show", "slappart1")
    assert resource(here.node)["tap"]["bridge"] == "br0"

    (SYS / BRIDGE_FILTERS[0]).write_text("1")
    assert list(here.plan()) == ["sysctl/net.bridge.bridge-nf-call-iptables"]
    here.apply()

    here.teardown()
    assert network() == before
    for session in sessions:
        session.lives()


@pytest.mark.parametrize("size", [1400, 9000])
def test_the_node_keeps_the_size_of_its_frames(operator, size):
    """A bridge takes the smallest MTU of its ports, and a new tap has 1500."""
    ip("link", "set", "eth0", "mtu", str(size))
    here = operator(1, partitiond={"bridge": "br0", "bridge_ports": "eth0"})
    here.apply()
    assert (mtu("br0"), mtu("eth0")) == (size, size)
    here.teardown()
    assert mtu("eth0") == size


def test_what_was_switched_off_for_the_port_is_off_for_the_bridge(operator):
    (SYS / "ipv6/conf/eth0/disable_ipv6").write_text("1")
    here = operator(
        1, partitiond={"bridge": "br0", "bridge_ports": "eth0", "ipv4_partition_network": "10.64.0.0/16"}
    )
    here.apply()
    assert (SYS / "ipv6/conf/br0/disable_ipv6").read_text() == "1\n"
    assert "fe80" not in ip("-6", "address", "show", "dev", "br0")


def test_a_guest_is_a_neighbour_on_the_lan(operator, wire):
    """Also where the operator's own packet filter forwards nothing: frames of guests do not meet it."""
    here = operator(1, partitiond={"bridge": "br0", "bridge_ports": "eth0"})
    here.apply()
    tap = here.partitions()["slappart0"]["tap"]
    closed = "table inet operator { chain guests { type filter hook forward priority 0; policy drop; };}"
    subprocess.run(["/usr/sbin/nft", "-f", "-"], input=closed, text=True, check=True)
    try:
        with started_as("slapuser0", GUEST, tap["name"], tap["mac"], "192.0.2.77", "2001:db8:1::77"):
            with wire.inside():
                assert ping("192.0.2.77")
                assert ping("2001:db8:1::77")
            assert ping("192.0.2.77")
            for name in BRIDGE_FILTERS:
                (SYS / name).write_text("1")
            with wire.inside():
                assert not ping("192.0.2.77", patience=1)
            here.apply()
            with wire.inside():
                assert ping("192.0.2.77")
    finally:
        subprocess.run(["/usr/sbin/nft", "delete table inet operator"], check=True)


@pytest.mark.parametrize(
    ("before", "keys", "code", "words"),
    [
        (
            (),
            {"bridge_ports": "eth9"},
            "network.no_port",
            ("no network interface eth9", "bridge_ports", "eth0"),
        ),
        ((), {"bridge_ports": "lo"}, "network.no_port", ("lo cannot be a port",)),
        (
            ("link add br0 type veth peer name other",),
            {"bridge_ports": "eth0"},
            "network.no_bridge",
            ("br0 is there", "veth"),
        ),
        (
            ("link add other type bridge", "link set eth0 master other"),
            {"bridge_ports": "eth0"},
            "network.port_taken",
            ("eth0 is in other already", "nomaster"),
        ),
    ],
    ids=["no such port", "loopback", "another kind", "taken port"],
)
def test_what_cannot_be_bridged_stops_before_anything_is_changed(operator, before, keys, code, words):
    here = operator(1, partitiond={"bridge": "br0", **keys})
    ip_lines(*before)
    try:
        untouched = network()
        for verb in ("plan", "apply"):
            error = here(verb, code=1)["error"]
            assert error["code"] == code
            assert all(word in f"{error['message']} {error['hint']}" for word in words), error
        assert not (here.node.instance).exists()
        assert network() == untouched
    finally:
        for name in ("br0", "other"):  # a pair goes together
            if name in links():
                ip("link", "delete", name)


@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"),
    [
        ("partitiond", "bridge_ports", "eth0/1", "names of network interfaces"),
        ("partitiond", "bridge_ports", "eth0; eth1", "names of network interfaces"),
        ("partitiond", "bridge_ports", "a-name-far-too-long", "names of network interfaces"),
        ("partitiond", "bridge_ports", "eth0 eth0", "each interface once"),
        ("partitiond", "bridge_ports", "eth0, br0", "other interfaces than the bridge br0 itself"),
        ("partitiond", "bridge", "slaptap1", "taps and tuns of partitions are called so"),
        ("partitiond", "ipv4_partition_network", "10.64.0.0", "room for 3 partitions"),
        ("partitiond", "ipv4_partition_network", "10.64.0.0/30", "room for 3 partitions"),
        (
            "partitiond",
            "ipv4_partition_network",
            "10.64.0.1/16",
            "the first address of the network: 10.64.0.0/16",
        ),
        ("partitiond", "ipv4_partition_network", "2001:db8::/64", "an IPv4 network"),
        ("partitiond", "ipv4_partition_network", "127.1.0.0/16", "an IPv4 network"),
        ("partitiond", "ipv4_partition_network", "0.0.0.0/0", "an IPv4 network"),
        ("partitiond", "ipv4_partition_network", "169.254.0.0/16", "an IPv4 network"),
        ("partitiond", "ipv4_partition_network", "224.0.0.0/8", "an IPv4 network"),
        (
            "partitiond",
            "ipv4_partition_network",
            "10.0.128.0/17",
            "apart from ipv4_local_network, which is 10.0.0.0/16",
        ),
        ("routable_ipv4", "slappart1", "203.0.113.7", "203.0.113.7/24 via 203.0.113.1"),
        ("routable_ipv4", "slappart1", "203.0.113.7/24", "203.0.113.7/24 via 203.0.113.1"),
        ("routable_ipv4", "slappart1", "203.0.113.7 via 203.0.113.1", "203.0.113.7/24 via 203.0.113.1"),
        ("routable_ipv4", "slappart1", "2001:db8::7/64 via 2001:db8::1", "203.0.113.7/24 via 203.0.113.1"),
        ("routable_ipv4", "slappart1", "203.0.113.0/24 via 203.0.113.1", "203.0.113.7/24 via 203.0.113.1"),
        ("routable_ipv4", "slappart1", "203.0.113.7/24 via 203.0.113.7", "203.0.113.7/24 via 203.0.113.1"),
        ("routable_ipv4", "slappart1", "240.0.0.7/24 via 240.0.0.1", "203.0.113.7/24 via 203.0.113.1"),
        (
            "routable_ipv4",
            "slappart1",
            "203.0.113.5/24 via 203.0.113.1",
            "another address: this one is that of slappart0",
        ),
        ("routable_ipv4", "slappart1", "10.0.9.9/24 via 10.0.9.1", "outside of ipv4_local_network"),
        ("slapformat", "tap_gateway_interface", "no/link", "a name of a network interface"),
    ],
)
def test_a_bad_value_is_named_with_its_place(node_config, section, key, value, allowed):
    bridge = {"bridge": "br0"} if key == "bridge_ports" else {}
    node = node_config(
        3, interface="eth0", partitiond=bridge, routable_ipv4={"slappart0": "203.0.113.5/24 via 203.0.113.1"}
    )
    node.write(**{section: {key: value}})
    line = 1 + next(
        n for n, text in enumerate(node.path.read_text().splitlines()) if text == f"{key} = {value}"
    )
    with pytest.raises(PartitiondError) as caught:
        node.load()
    node.write(**{section: {key: None}})
    assert caught.value.code == "config.value"
    (said,) = [one for one in str(caught.value).splitlines() if allowed in one]
    assert said.startswith(f"{node.path}:{line}: {key} = {value!r}; allowed: ")


def test_bridge_ports_need_a_bridge(node_config, command):
    node = node_config(1, interface="eth0", partitiond={"bridge_ports": "eth0"})
    done = command("plan", "-c", node.path)
    assert done.returncode == 1
    assert "bridge_ports = 'eth0'; allowed: nothing, as long as bridge is empty" in done.stderr
    node.write(partitiond={"bridge_ports": None})


# --- routed ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gateway():
    """An interface of the node that guests may be given IPv4 addresses of."""
    ip_lines("link add gw0 type bridge", "link set gw0 up", "address add 198.51.100.1/24 dev gw0")
    yield "gw0"
    ip("link", "delete", "gw0")


FORMATS = {
    "as it comes": {},
    "all": {"tap_gateway_interface": "gw0", "create_tun": True},
    "no IPv6": {"tap_gateway_interface": "gw0", "create_tun": True, "tap_ipv6": False, "tun_ipv6": False},
    "no taps, no ranges": {"create_tap": False, "partition_has_ipv6_range": False},
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_software_finds_what_slapformat_tells_it(operator, gateway, options):
    here = operator(2, slapformat={key: str(value).lower() for key, value in options.items()})
    here.apply()
    theirs = slapformat(here.node, **options)
    for partition in theirs["partition_list"]:
        found = resource(here.node, partition["reference"])
        private = partition["address_list"][0]
        private["addr"] = found["address_list"][0]["addr"]  # slapformat rolls dice
        partition["tap"] |= {key: found["tap"][key] for key in ("mac", "bridge")}
        assert {key: found.get(key, "nothing") for key in partition} == partition
        assert set(found) - set(partition) == {
            "block_devices",
            "certificate",
            "certificate_fingerprint",
            "certificate_next",
            "certificate_next_fingerprint",
        }
    assert here.plan() == {}


@pytest.mark.parametrize("taps", ["true", "false"])
def test_only_its_user_opens_a_tap_or_a_tun(operator, taps):
    Path("/dev/net/tun").chmod(0o600)  # as the kernel makes it
    here = operator(2, slapformat={"create_tun": "true", "create_tap": taps})
    here.apply()
    tries = [("attach", "slaptun0", 0x1), *([("attach", "slaptap0", 0x2)] if taps == "true" else [])]
    assert set(attempts("slapuser0", *tries)) == {"open"}
    assert set(attempts("slapuser1", *tries)) == {"EPERM"}
    assert set(attempts("nobody", *tries)) == {"EPERM"}


def test_a_guest_behind_a_routed_tap(operator, wire, gateway):
    here = operator(1, slapformat={"tap_gateway_interface": gateway})
    here.apply()
    value = here("status")
    (tap,) = [one["tap"] for one in value["partitions"]]
    assert (tap["ipv4"], tap["ipv6"], tap["ipv6_prefixlen"]) == (
        "198.51.100.2",
        "2001:db8:1:0:8001:ffff:ffff:ffff",
        80,
    )
    assert "guest IPv4 198.51.100.2, IPv6 2001:db8:1:0:8001:ffff:ffff:ffff/80" in here.text(
        "show", "slappart0"
    )
    closed = {"ipv4": "net.ipv4.ip_forward", "ipv6": "net.ipv6.conf.all.forwarding"}
    for name in closed.values():
        (said,) = [text for text in value["node"]["open_cases"] if name in text]
        assert f"sysctl -w {name}=1" in said
    wire.sees(f"route add 198.51.100.0/24 via {NODE4}", f"route add 2001:db8:1:0:8000::/66 via {NODE6}")
    guest = resource(here.node)["tap"]
    own = (guest["ipv4_addr"], guest["ipv6_gateway"], "2001:db8:1:0:8001::77")
    with started_as("slapuser0", GUEST, guest["name"], guest["mac"], *own):
        for address in own:
            assert ping(address)
        with wire.inside():
            assert not ping(own[0], patience=0.5)
        for name in closed.values():
            Path("/proc/sys", *name.split(".")).write_text("1")
        with wire.inside():
            for address in own:
                assert ping(address)
    assert not any("forward" in text for text in here("status")["node"]["open_cases"])
    assert here.plan() == {}  # whether the node forwards is the operator's


def test_no_guest_gets_the_address_of_a_router(operator):
    """With the LAN's own interface as the guests' gateway: the node would lose its router to a guest."""
    here = operator(2, slapformat={"tap_gateway_interface": "eth0"})
    here.apply()
    given = {one["tap"]["ipv4"] for one in here.partitions().values()}
    assert not given & {NODE4, NEIGHBOUR4}
    assert ping(NEIGHBOUR4, patience=5)


@pytest.mark.parametrize(
    ("interface", "problem"), [("gw9", "is no network interface"), ("br9", "has no IPv4 address")]
)
def test_a_gateway_interface_that_is_none(operator, interface, problem):
    ip("link", "add", "br9", "type", "bridge")
    try:
        here = operator(1, slapformat={"tap_gateway_interface": interface})
        error = here("plan", code=1)["error"]
        assert error["code"] == "network.no_gateway"
        assert f"tap_gateway_interface = {interface}: {interface} {problem}" in error["message"]
        assert error["resource"] == str(here.node.path)
        assert error["hint"]
    finally:
        here.node.write(slapformat={"tap_gateway_interface": None})
        ip("link", "delete", "br9")


# --- IPv4 alone -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def master():
    made = Master()
    yield made
    made.close()


@pytest.fixture
def lan4():
    """A LAN without any IPv6."""
    with standing_wire(ipv6=False) as made:
        yield made


@pytest.fixture(params=["no address", pytest.param("switched off", marks=pytest.mark.full)])
def operator4(request, lan4, node_config, command, master):
    """Make an IPv4-only node; the kernel has IPv6 and gives no address, or it is switched off entirely."""
    if request.param == "switched off":
        (SYS / "ipv6/conf/all/disable_ipv6").write_text("1")
    lan4.sees(f"route add 10.64.0.0/16 via {NODE4}")
    node = node_config(
        2,
        interface="eth0",
        slapos={"master_url": master.url},
        partitiond={"ipv4_partition_network": "10.64.0.0/16"},
    )
    return Operator(command, node)


@pytest.fixture
def operator4_on_the_lan(lan4, node_config, command):
    """Partitions whose addresses are of the LAN's own network, which has a second router."""
    ip("route", "add", "203.0.113.0/24", "via", "192.0.2.254")
    node = node_config(3, interface="eth0", partitiond={"ipv4_partition_network": "192.0.2.0/24"})
    return Operator(command, node), lan4


def test_a_node_with_ipv4_alone(operator4, lan4, master):
    here, before = operator4, network()
    here.apply()
    one = here.partitions()["slappart0"]
    assert (one["ipv6"], one["ipv6_range"], one["ipv4"], one["public_ipv4"]) == (
        None,
        None,
        "10.0.0.2",
        "10.64.0.2",
    )
    assert "10.64.0.3" in here.text("status")
    assert "public IPv4    10.64.0.2" in here.text("show", "slappart0")
    assert not [text for text in here("status")["node"]["open_cases"] if "eth0" in text]
    found = resource(here.node)
    assert found["address_list"] == [
        {"addr": "10.0.0.2", "netmask": "255.255.255.255"},
        {"addr": "10.64.0.2", "netmask": "255.255.0.0"},
    ]
    assert (found["ipv6_range"], found["tap"]["ipv6_addr"]) == ({}, "")

    here("sync", "capacity")
    offered = master.capacity
    assert (offered["address"], offered["netmask"]) == (NODE4, "255.255.255.0")
    assert offered["partition_list"][0]["address_list"] == found["address_list"]
    assert offered["partition_list"][0]["ipv6_range"] == {}

    here("sync", "usage")
    with started_as("slapuser0", SERVICE, "10.64.0.2"):
        with lan4.inside(), socket.create_connection(("10.64.0.2", 5000), timeout=5) as client:
            assert digest_of(client, b"x" * 1000) == hashlib.sha256(b"x" * 1000).hexdigest()
        tries = [
            ("connect", "10.64.0.3", "10.64.0.2", 5000),
            ("connect", "10.64.0.2", "10.64.0.2", 5000),
            ("connect", "10.64.0.2", NEIGHBOUR4, 5000),
            ("send", "10.64.0.2", NEIGHBOUR4),
            ("send", "10.64.0.3", NEIGHBOUR4),
        ]
        assert attempts("slapuser1", *tries) == [
            "connected",
            CONNECT_REFUSED,
            CONNECT_REFUSED,
            "EPERM",
            "sent",
        ]
    here("sync", "usage")
    used = {item["id"]: item for item in here("usage")["partitions"]}
    rows = {(row["address"], row["scope"]): row for row in used["slappart0"]["addresses"]}
    remote, local = rows["10.64.0.2", "remote"], rows["10.64.0.2", "local"]
    assert remote["family"] == local["family"] == "ipv4"
    assert remote["bytes_in"] >= 1000
    assert local["packets_in"] > 0
    assert used["slappart0"]["denied_packets"] == 0
    assert used["slappart1"]["denied_packets"] >= 3
    here.teardown()
    assert network() == before


def test_tunnels_over_ipv4(operator4, lan4):
    """A service on a private address, for the other partition and for one certificate of the LAN."""
    here = operator4
    here.apply()
    node = here.node
    neighbour, stranger = make_identity("neighbour"), make_identity("stranger")
    one, other = (resource(node, name)["certificate"] for name in ("slappart0", "slappart1"))
    allow = f"cert:{other}\n cert:{neighbour.certificate_der_base64}"
    declare(node, "slappart0", "db", f"mode = server\nlisten = 4000\nconnect = 5000\nallow = {allow}\n")
    client = f"mode = client\nlisten = 6000\nconnect = 10.64.0.2:4000\npeer = cert:{one}\n"
    declare(node, "slappart1", "db", client)
    here.apply()
    found = {row["name"]: row for row in here("tunnel", "list")["tunnels"]}
    server, client = found["slappart0/db"], found["slappart1/db"]
    assert (server["state"], server["listen"], server["connect"]) == ("up", "10.64.0.2:4000", "10.0.0.2:5000")
    assert (client["state"], client["listen"], client["connect"]) == ("up", "10.0.0.3:6000", "10.64.0.2:4000")
    assert neighbour.fingerprint in server["allowed"]
    assert here.partitions()["slappart1"]["tunnels"] == ["slappart1/db"]

    with started_as("slapuser0", SERVICE, "10.0.0.2"):
        assert as_user("slapuser1", CLIENT, "10.0.0.3", 6000) == "same"
        content = bytes(range(256)) * 4000
        digest = hashlib.sha256(content).hexdigest()
        assert over_tls(lan4, "10.64.0.2", one, neighbour, content, node.root) == digest
        with pytest.raises((ssl.SSLError, ConnectionError)):
            over_tls(lan4, "10.64.0.2", one, stranger, content, node.root)


def digest_of(connection, content):
    """What a service says of some content."""
    connection.sendall(len(content).to_bytes(8, "big") + content)
    return connection.recv(64).decode()


def over_tls(wire, address, certificate, identity, content, directory):
    """What the service answers to a neighbour who accepts one certificate and shows another."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=b64decode(certificate))
    pair = directory / "neighbour.pem"
    pair.write_bytes(identity.certificate_pem + identity.key_pem)
    context.load_cert_chain(pair)
    with wire.inside():
        plain = socket.create_connection((address, 4000), timeout=10)
    with context.wrap_socket(plain) as connection:
        return digest_of(connection, content)


# --- routable IPv4 --------------------------------------------------------------------------------------------------------

RELEASE = "https://lab.example/software.cfg"


@pytest.fixture
def world(wire):
    """What lies behind the neighbour, who is two routers: of the node itself, and of 203.0.113.0/24."""
    wire.sees(
        "address add 203.0.113.1/24 dev wire",
        "address add 198.51.100.9/32 dev lo",
        "route add 2001:db8:1:0:4000::/66 via " + NODE6,
        "route add 2001:db8:1:0:c000::/66 via " + NODE6,
        "route add 172.16.0.0/12 via " + NODE4,
    )
    return "198.51.100.9"


def talk(wire, address, source):
    """What the service at an address says to somebody in the world."""
    with wire.inside():
        near = socket.create_connection((address, 5000), timeout=5, source_address=(source, 0))
    with near:
        return digest_of(near, b"content")


def test_a_routable_address(operator, wire, world, master):
    here = operator(
        2,
        slapos={"master_url": master.url},
        routable_ipv4={"slappart0": "203.0.113.7/24 via 203.0.113.1"},
    )
    before = network()
    here.apply()
    one, other = here.partitions().values()
    assert (one["routable_ipv4"], one["routable_ipv4_prefixlen"]) == ("203.0.113.7", 24)
    assert other["routable_ipv4"] is None
    assert "routable IPv4  203.0.113.7/24" in here.text("show", "slappart0")
    assert resource(here.node)["routable_ipv4"] == {
        "addr": "203.0.113.7",
        "netmask": "255.255.255.0",
        "network": "203.0.113.0",
        "gateway": "203.0.113.1",
    }
    assert "routable_ipv4" not in resource(here.node, "slappart1")

    # the master gives back what it was told, in the words of slapos.core
    here("sync", "capacity")
    row = (("route_slaptap0", "203.0.113.7", "203.0.113.1", "255.255.255.0", "203.0.113.0"),)
    master.as_production_does("COMP-1", RELEASE, started={"slappart0"})
    with contextlib.closing(Context.of(here.node.load()).client) as client:
        assert client.computer().partitions[0].full_ip_list == row
    assert here("sync", "instances")["failures"] == []
    assert here.plan() == {}

    # it leaves by its own gateway, whatever the node's way to the world is
    ip("route", "del", "default")
    # but for the address of that router, which guests need not be kept from any more
    assert set(here.plan()) == {"filter/partitiond"}
    with started_as("slapuser0", SERVICE, "203.0.113.7"):
        assert talk(wire, "203.0.113.7", world) == hashlib.sha256(b"content").hexdigest()
    ip("route", "add", "default", "via", NEIGHBOUR4)
    here("sync", "usage")
    used = {item["id"]: item for item in here("usage")["partitions"]}
    rows = [row for row in used["slappart0"]["addresses"] if row["address"] == "203.0.113.7"]
    assert {(row["family"], row["scope"]) for row in rows} == {("ipv4", "remote"), ("ipv4", "local")}
    assert sum(row["bytes_in"] for row in rows) > 0

    # given to another partition: the address stays where it is, its owner changes
    here.node.write(routable_ipv4={"slappart0": None, "slappart1": "203.0.113.7/24 via 203.0.113.1"})
    assert set(here.plan()) - {"bpf/cgroup"} == {
        "filter/partitiond",
        "resource-file/slappart0",
        "resource-file/slappart1",
    }
    here.apply()
    assert attempts("slapuser0", ("send", "203.0.113.7", NEIGHBOUR4)) == ["EPERM"]
    assert attempts("slapuser1", ("send", "203.0.113.7", NEIGHBOUR4)) == ["sent"]

    here.node.write(routable_ipv4={"slappart1": None})
    assert {
        name: one["action"] for name, one in here.plan().items() if one["action"] == "remove"
    } == dict.fromkeys(
        (
            *(
                "address/203.0.113.7",
                "source/203.0.113.7/32",
                "rule/from-203.0.113.7",
                "rule/local-source-ipv4",
            ),
            *("gateway/11201/default", "gateway/11201/203.0.113.0/24"),
        ),
        "remove",
    )
    here.apply()
    assert "203.0.113" not in json.dumps(network())
    here.teardown()
    assert network() == before


def test_the_nodes_own_address_is_no_partitions(operator):
    """The node would lose it: its own services run as users, too."""
    here = operator(1, routable_ipv4={"slappart0": f"{NODE4}/24 via {NEIGHBOUR4}"})
    before = network()
    error = here("apply", code=1)["error"]
    assert error["code"] == "network.own_address"
    assert f"{NODE4}/24 on eth0 is the node's own, so it cannot be slappart0's" in error["message"]
    assert "[routable_ipv4]" in error["hint"]
    assert network() == before
    here.node.write(routable_ipv4={"slappart0": None})


def test_a_taken_address_costs_that_one_alone(operator):
    """One that comes to the node later, or that another interface has: the rest of the node is kept up."""
    here = operator(2, routable_ipv4={"slappart0": "203.0.113.7/24 via 203.0.113.1"})
    here.apply()
    ip_lines("address add 203.0.113.7/24 dev eth0", "link delete slaptap1")
    value = here("apply", code=3)
    (failure,) = value["failures"]
    assert (failure["resource"], failure["code"]) == ("address/203.0.113.7", "network.address_taken")
    assert "slaptap1" in links()


def test_a_port_that_goes_costs_itself_alone(operator):
    here = operator(2, partitiond={"bridge": "br0", "bridge_ports": "eth0"})
    here.apply()
    ip_lines("link delete eth0", "link delete slaptap1")
    (failure,) = here("apply", code=3)["failures"]
    assert (failure["resource"], failure["code"]) == ("port/eth0", "network.no_port")
    assert failure["hint"] == "bring it back: this node has no other interface that could be a port"
    assert "slaptap1" in links()
    here.teardown()


def test_partitions_on_the_lan_itself(operator4_on_the_lan):
    """Of the LAN's own range nobody gets what the node or a router has; neighbours need no route."""
    here, wire = operator4_on_the_lan
    here.apply()
    given = [one["public_ipv4"] for one in here.partitions().values()]
    assert len(set(given)) == 3
    assert not set(given) & {NODE4, NEIGHBOUR4, "192.0.2.254"}
    with started_as("slapuser0", SERVICE, given[0]):
        assert talk(wire, given[0], NEIGHBOUR4) == hashlib.sha256(b"content").hexdigest()


def test_an_address_for_nobody_is_only_warned_of(operator):
    here = operator(1, routable_ipv4={"slappart9": "203.0.113.7/24 via 203.0.113.1"})
    done = here.command("apply", "-c", here.node.path)
    assert done.returncode == 0
    assert f"{here.node.path}:" in done.stderr
    assert "there is no partition slappart9 (partition_amount), so its address is nobody's" in done.stderr
    assert "203.0.113.7" not in addresses("eth0")


# --- what others may not --------------------------------------------------------------------------------------------------


def test_nobody_speaks_with_anothers_address(operator, wire, world):
    here = operator(
        2,
        slapformat={"create_tun": "true"},
        routable_ipv4={"slappart0": "203.0.113.7/24 via 203.0.113.1"},
    )
    here.apply()
    one = here.partitions()["slappart0"]
    own4 = (one["routable_ipv4"], one["tun"]["ipv4"])
    own6 = (one["ipv6"], "2001:db8:1:0:4001::77", one["tun"]["ipv6"])
    with wire.inside():
        listener4 = socket.create_server((NEIGHBOUR4, 0))
        listener6 = socket.create_server((NEIGHBOUR6, 0), family=socket.AF_INET6)
    with listener4, listener6:
        tries = []
        for addresses_, listener in ((own4, listener4), (own6, listener6)):
            target, port = listener.getsockname()[:2]
            for address in addresses_:
                tries += [("send", address, target), ("connect", address, target, port)]
        assert attempts("slapuser0", *tries) == ["sent", "connected"] * 5
        here("sync", "usage")
        before = here("usage", "--partition", "slappart0")["partitions"][0]["addresses"]
        assert attempts("slapuser1", *tries) == ["EPERM", CONNECT_REFUSED] * 5
        assert attempts("nobody", *tries) == ["EPERM", CONNECT_REFUSED] * 5
        assert attempts("slapuser1", ("send", one["ipv4"], NEIGHBOUR4)) == ["EPERM"]
    here("sync", "usage")
    victim, attacker = here("usage")["partitions"]
    assert billed(victim["addresses"]) == billed(before)
    assert (victim["denied_packets"], attacker["denied_packets"]) == (0, 11)


def billed(rows):
    """The traffic of addresses, but those of interfaces: neighbour discovery goes on by itself."""
    return {
        (row["address"], row["scope"]): (row["bytes_out"], row["packets_out"])
        for row in rows
        if row["family"] != "tap"
    }


def test_unbound_clients_reach_the_node_own_partitions(operator, wire, world):
    """Their source is the node's own address, and not that of the partition which they connect to."""
    here = operator(
        2,
        slapformat={"create_tun": "true"},
        routable_ipv4={"slappart0": "203.0.113.7/24 via 203.0.113.1"},
    )
    here.apply()
    one = here.partitions()["slappart0"]
    for address in (one["ipv6"], one["routable_ipv4"], one["tun"]["ipv4"], one["tun"]["ipv6"]):
        with started_as("slapuser0", SERVICE, address):
            assert attempts("slapuser1", ("connect", "", address, 5000)) == ["connected"]


# --- more and fewer -------------------------------------------------------------------------------------------------------


def of_the_network(index, *, routed, routable=None):
    """What a partition with everything has, by the ids of a plan."""
    wanted = {
        f"user/slapuser{index}",
        f"identity/slappart{index}",
        f"resource-file/slappart{index}",
        f"tap/slaptap{index}",
        f"address/10.0.0.{index + 2}",
        f"address/2001:db8:1::{index + 2:x}",
        f"range/2001:db8:1:0:{0x4001 + index:x}::/80",
        f"source/2001:db8:1::{index + 2:x}/128",
    }
    if routed:
        end = f"2001:db8:1:0:{0x8001 + index:x}:"
        tun6, tun4 = f"2001:db8:1:0:{0xC001 + index:x}::1", f"172.{16 + 2 * index}.0.1"
        wanted |= {
            f"tun/slaptun{index}",
            f"address/{end}ffff:ffff:ffff",
            f"route/{end}:1/128",
            f"route/{end}:/80",
            f"address/{tun6}",
            f"address/{tun4}",
            f"source/{tun6}/128",
            f"source/{tun4}/32",
            f"route/198.51.100.{index + 2}/32",
        }
    if routable:
        wanted |= {f"address/{routable}", f"source/{routable}/32"}
    return wanted


def comes_and_goes(here, before, after, parts):
    """Change the number of partitions: the plan has exactly what must come or go, and the node's own few things."""
    here.node.write(slapformat={"partition_amount": after})
    planned = {name: one for name, one in here.plan().items() if not name.startswith("directory")}
    low, high = sorted((before, after))
    wanted = set().union(*(parts[index] for index in range(low, high)))
    if after < before:
        wanted = {
            name for name in wanted if not name.startswith(("identity", "resource-file"))
        }  # these are data
    else:
        own = {f"slappart{index}" for index in range(low, high)}
        assert {planned[name]["partition"] for name in wanted if not name.startswith("rule/")} == own
    assert set(planned) - {"bpf/cgroup"} == wanted | {"filter/partitiond"}
    assert {planned[name]["action"] for name in wanted} == {"create" if after > before else "remove"}
    here.apply()


@pytest.mark.full
def test_growing_and_shrinking_with_everything_routed(operator, gateway):
    here = operator(5, slapformat={"create_tun": "true", "tap_gateway_interface": gateway})
    before = network()
    here.apply()
    parts = {index: of_the_network(index, routed=True) for index in range(7)}
    comes_and_goes(here, 5, 7, parts)
    comes_and_goes(here, 7, 6, parts)
    assert {f"slaptap{index}" for index in range(6)} == {
        name for name in links() if name.startswith("slaptap")
    }
    here.teardown()
    assert network() == before


def test_growing_and_shrinking_in_a_bridge(operator):
    routable = {f"slappart{index}": f"203.0.113.{7 + index}/24 via 203.0.113.1" for index in range(5)}
    here = operator(3, partitiond={"bridge": "br0", "bridge_ports": "eth0"}, routable_ipv4=routable)
    before = network()
    here.apply()
    parts = {
        index: of_the_network(index, routed=False, routable=f"203.0.113.{7 + index}")
        | {f"rule/from-203.0.113.{7 + index}"}
        for index in range(5)
    }
    comes_and_goes(here, 3, 5, parts)
    comes_and_goes(here, 5, 2, parts)
    here.teardown()
    assert network() == before
