"""What no guest may claim, as the node is: its addresses, routers, resolvers, VPNs, and how soon a change is known."""

import subprocess
from ipaddress import ip_network

import pytest
from guard_scene import NODE, standing

from netplan import observe
from netplan.routers import routers
from partitiond import config, protection

TEXT = """\
[slapos]
computer_id = COMP-1
master_url = https://master.example/
software_root = /srv/t/software
instance_root = /srv/t/instance
[slapformat]
interface_name = br0
partition_amount = 3
[partitiond]
bridge = br0
"""


def ip(line):
    subprocess.run(["/usr/sbin/ip", *line.split()], check=True, capture_output=True)


@pytest.fixture
def scene():
    with standing() as made:
        yield made


@pytest.fixture
def look(tmp_path, scene, monkeypatch):
    """Look at what is protected now; ``resolvers`` is the resolvers' file."""
    path = tmp_path / "slapos.cfg"
    resolvers = tmp_path / "resolv.conf"
    monkeypatch.setattr(protection, "_RESOLVERS", (tmp_path / "none", resolvers))

    def now(text=TEXT, names=""):
        path.write_text(text)
        resolvers.write_text(names)
        return protection.look(config.load(path), observe.look())

    return now


def networks(*texts):
    return {ip_network(text) for text in texts}


def test_the_node_its_routers_and_its_resolvers(look, scene):
    ip("address add 10.9.0.1/24 dev lo")
    ip("tuntap add vpn0 mode tun")
    ip("link set vpn0 up")
    ip("address add 10.64.3.1/16 dev vpn0")
    ip("route add 198.51.100.0/24 nexthop via 192.0.2.31 nexthop via 192.0.2.32")
    ip("-6 route add 2001:db8:77::/64 via fe80::77 dev br0")
    ip("-6 route add 2001:db8:78::/64 nexthop via 2001:db8:1::78 nexthop via 2001:db8:1::79")
    ip("route add 203.0.113.0/24 via inet6 fe80::99 dev br0")
    ip("route add default via 192.0.2.33 table 11200 proto 112")
    found = look(
        names="# x\nnameserver 192.0.2.53\nnameserver 127.0.0.53\n nameserver fe80::53%eth0\nsearch a\n"
    )
    assert networks(NODE.four, NODE.six, scene.local, "10.9.0.1") <= {*found.networks}
    assert networks("192.0.2.0", "192.0.2.255", "10.64.0.0/16") <= {*found.networks}
    gateways = ("192.0.2.1", "192.0.2.31", "192.0.2.32", "192.0.2.33", "2001:db8:1::ffff:1")
    assert networks(*gateways, "fe80::77", "fe80::99", "2001:db8:1::78", "2001:db8:1::79") <= {
        *found.networks
    }
    assert networks("192.0.2.53", "fe80::53") <= {*found.networks}
    assert not any(one.network_address.is_loopback for one in found.networks)
    assert set(found.macs) == {scene.macs["br0"], scene.macs["eth0"]}


def test_the_same_as_long_as_nothing_changed(look):
    first = look()
    assert look() is first
    ip("address add 192.0.2.88/24 dev br0")
    assert {*look().networks} - {*first.networks} == networks("192.0.2.88")
    ip("address delete 192.0.2.88/24 dev br0")
    assert look() is first
    ip("route replace default via 192.0.2.3")
    assert {*first.networks} ^ {*look().networks} == networks("192.0.2.1", "192.0.2.3")


def test_the_network_of_the_mesh_is_other_nodes(look):
    """Whether its interface is there or not."""
    first = look()
    mesh = TEXT + "[tinc]\nnetwork = 10.64.0.0/16\nindex = 1\n"
    assert {*look(mesh).networks} - {*first.networks} == networks("10.64.0.0/16")
    assert look() is first


def test_a_tap_is_no_address_of_the_node(look, scene):
    scene.converge(scene.desired(strict=True))
    first = look()
    ip("address add fe80::1234/64 dev slaptap0 nodad")
    assert look() is first


@pytest.mark.parametrize(
    "line", ["[partitiond]\ntap_guard = off\n", "[partitiond]\npacket_filter = iptables\n"]
)
def test_without_a_guard_nobody_looks(look, line):
    assert look(TEXT.replace("[partitiond]\n", line)) == protection.NOTHING


def test_what_the_kernel_routes_itself_has_no_router(scene):
    before = routers(())
    ip("link add many type veth peer name few")
    ip("link set many up")
    ip("address add 10.1.0.1/16 dev many")
    assert routers(()) == before


def test_what_is_link_local_elsewhere_is_nobodys(look, scene):
    """Containers and VPNs come and go: neither their link-local addresses nor their routers there are a guest's business."""
    first = look()
    ip("link add many type veth peer name few")
    ip("link set many up")
    ip("link set few up")
    ip("address add fe80::7/64 dev many nodad")
    ip("route add 198.51.100.0/24 via inet6 fe80::8 dev many")
    assert look() is first
    ip("tuntap add vpn1 mode tun")
    ip("link set vpn1 up")
    ip("address add fe80::9/64 dev vpn1 nodad")
    assert look() is first
    ip("address add 198.18.0.1/24 dev many")
    assert {*look().networks} - {*first.networks} >= networks("198.18.0.1")


def test_the_last_address_of_all_does_no_harm(look, scene):
    from dataclasses import replace

    wanted = scene.desired(strict=False)
    found = look(names="nameserver 255.255.255.255\n")
    scene.converge(replace(wanted, protected=found))
    scene.converge(replace(wanted, protected=look()))
    scene.converge(replace(wanted, protected=found))
