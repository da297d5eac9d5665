"""What the guard holds to a tap, and for how long: its MAC, its addresses, its port of the bridge."""

import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from guard_frames import ARP, BROADCAST, IP, UDP, arp, ether, ip4, udp
from guard_kinds import KINDS
from guard_scene import Ear, standing

from netplan import learned
from netplan.counters import read_counters
from netplan.model import GUARDED_PORT
from netplan.observe import observe
from netplan.plan import plan
from tests.netplan.netplan_scene import inside

LINK_GROUPS = [f"01:80:c2:00:00:{last:02x}" for last in (0, 2, 3, 8, 14)]


def shell(line):
    return subprocess.run(
        ["/usr/sbin/" + line.split()[0], *line.split()[1:]], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def scene():
    with standing() as made:
        yield made


@pytest.fixture
def guarded(scene):
    scene.converge(scene.desired(strict=True))
    scene.open()
    scene.introduce()
    return scene


def behind(scene, mac):
    """The port that the bridge believes a MAC to be behind."""
    rows = (row.split() for row in shell("bridge fdb show br br0").splitlines())
    return {row[2] for row in rows if row[0] == mac and "permanent" not in row}


@pytest.mark.parametrize("spanning_tree", [0, 1])
@pytest.mark.parametrize("group", LINK_GROUPS)
def test_a_guest_cannot_draw_the_routers_frames_to_its_port(guarded, group, spanning_tree):
    """Frames to the bridge itself pass no filter of the bridge, and it learns their sender by some of them."""
    shell("ip link set br0 type bridge ageing_time 30000 forward_delay 200")
    shell(f"ip link set br0 type bridge stp_state {spanning_tree}")
    router = guarded.macs["wire"]
    with inside(guarded.wire):
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        wire.bind(("wire", 0))
    with wire:
        for _ in range(100):  # a port listens for a while before it learns, with spanning tree
            wire.send(ether(BROADCAST, router, ARP, arp(1, router, "192.0.2.1", "192.0.2.9")))
            if behind(guarded, router):
                break
    guarded.guests[0].send(ether(group, router, 0x88CC, bytes(46)))
    guarded.guests[0].send(ether(group, router, 38, b"\x42\x42\x03" + bytes(35)))
    assert behind(guarded, router) == {"eth0"}


def test_without_the_guard_it_can(scene):
    scene.converge(scene.desired(strict=True, guarded=False))
    scene.open()
    shell("ip link set br0 type bridge ageing_time 30000")
    router = scene.macs["wire"]
    scene.guests[0].send(ether(LINK_GROUPS[-1], router, 0x88CC, bytes(46)))
    assert behind(scene, router) == {"slaptap0"}


def test_a_port_is_as_the_guard_needs_it_and_no_longer(scene):
    def forwards():
        return {link: scene.look()[link].forwards for link in ("slaptap0", "slaptap1")}

    wanted = scene.desired(strict=False)
    scene.converge(wanted)
    assert forwards() == {"slaptap0": GUARDED_PORT, "slaptap1": GUARDED_PORT}
    shell("ip link set slaptap0 type bridge_slave group_fwd_mask 0")
    operations = scene.converge(wanted)
    assert [one.id for one in operations] == ["tap/slaptap0"]
    scene.converge(scene.desired(strict=False, guarded=False))
    assert forwards() == {"slaptap0": 0, "slaptap1": 0}


def datagram(scene, sender, *, mac=None, four=None, to="wire"):
    """A datagram of a guest to the wire."""
    guest, end = scene.guests[sender], scene.ends()[to]
    return ether(
        end.mac, mac or guest.mac, IP, ip4(four or guest.four, end.four, UDP, udp(4000, 9, b"datagram"))
    )


def arrives(scene, frame, sender=0, where="wire"):
    return any(frame == one for one in scene.what_comes_of(frame, sender)[where])


def refused():
    return {(one.tap, one.rule): one.packets for one in read_counters().refused}


def test_the_first_mac_sticks(guarded):
    assert arrives(guarded, datagram(guarded, 0))
    assert not arrives(guarded, datagram(guarded, 0, mac="52:54:00:00:00:98"))
    # also while nothing else of the guest was heard for long, and after the rules changed
    guarded.converge(guarded.desired(strict=True, count=2))
    assert not arrives(guarded, datagram(guarded, 0, mac="52:54:00:00:00:98"))
    assert arrives(guarded, datagram(guarded, 0))


def test_a_mac_of_somebody_else_is_never_the_first(scene):
    """Each guest has sent nothing yet: what is proposed to another, heard at the wire, or the node's own is not taken."""
    scene.converge(scene.desired(strict=True))
    scene.open(silent=True)
    router = arp(1, scene.macs["wire"], "192.0.2.1", "192.0.2.2")
    scene.hear(router)
    cast = scene.cast()
    others = (cast.proposed, scene.macs["wire"], scene.macs["br0"], scene.macs["eth0"])
    hosts = {link.mac for name, link in scene.look().items() if name.startswith("slaptap")}
    for mac in (*others, *hosts):
        scene.guests[0].send(datagram(scene, 0, mac=mac))
    assert refused() == {("slaptap0", "mac"): len(others) + len(hosts)}
    scene.greet()
    assert arrives(scene, datagram(scene, 0))
    assert not arrives(scene, datagram(scene, 1, mac=scene.guests[0].mac), 1)


def test_the_proposed_mac_is_its_own(scene):
    scene.converge(scene.desired(strict=True))
    scene.open(silent=True)
    scene.guests[1].mac = scene.cast().proposed
    scene.greet()
    assert arrives(scene, datagram(scene, 1), 1)


def test_a_given_mac_is_the_only_one(scene):
    scene.converge(scene.desired(strict=True, count=2, mac="52:54:00:00:00:50", given=(0,)))
    scene.open(silent=True)
    scene.guests[0].send(datagram(scene, 0, mac="52:54:00:00:00:98"))
    scene.greet()
    assert arrives(scene, datagram(scene, 0))
    assert not arrives(scene, datagram(scene, 0, mac="52:54:00:00:00:98"))
    assert not arrives(scene, datagram(scene, 1, mac="52:54:00:00:00:50"), 1)


def test_the_next_instance_is_another_guest(guarded):
    assert arrives(guarded, datagram(guarded, 0))
    before = refused()
    learned.forget("slaptap0")
    guarded.guests[0].mac = "52:54:00:00:00:98"
    assert arrives(guarded, datagram(guarded, 0))
    assert not arrives(guarded, datagram(guarded, 0, mac="52:54:00:00:00:50"))
    # the MAC that it had is free again, and the other guest is who it was
    learned.forget("slaptap1")
    guarded.guests[1].mac = "52:54:00:00:00:50"
    assert arrives(guarded, datagram(guarded, 1), 1)
    assert refused() == {**before, ("slaptap0", "mac"): 1}


def test_forgetting_is_no_drift(guarded):
    wanted = guarded.desired(strict=True)
    learned.forget("slaptap0")
    learned.forget("slaptap0")
    assert guarded.converge(wanted) == ()


def test_an_address_that_a_guest_uses_is_no_other_guests(scene):
    scene.converge(scene.desired(strict=False))
    scene.open()
    assert arrives(scene, datagram(scene, 1, four="192.0.2.99"), 1)
    assert not arrives(scene, datagram(scene, 0, four="192.0.2.99"))
    assert arrives(scene, datagram(scene, 1, four="192.0.2.99"), 1)
    learned.forget("slaptap1")
    assert arrives(scene, datagram(scene, 0, four="192.0.2.99"))


def test_nobody_takes_all_addresses_of_the_lan(scene):
    scene.converge(scene.desired(strict=False))
    scene.open()
    taken = [last for last in range(100, 160) if arrives(scene, datagram(scene, 0, four=f"192.0.2.{last}"))]
    # of the first 16, its own is none; a slow machine may let one more pass in the time
    assert taken[:16] == list(range(100, 116))
    assert len(taken) <= 17
    assert arrives(scene, datagram(scene, 0))
    assert arrives(scene, datagram(scene, 0, four="192.0.2.100"))
    assert arrives(scene, datagram(scene, 1, four="192.0.2.150"), 1)


def test_counted_by_tap_and_rule(guarded):
    cast, end = guarded.cast(), guarded.ends()["wire"]
    wanted = {
        "MAC of the router": "mac",
        "ARP reply as the router": "arp",
        "IPv4 of the router": "ipv4",
        "IPv6 of the router": "ipv6",
        "NA of the router": "nd",
        "RA": "ra",
        "redirect": "redirect",
        "MLD query": "extension",
        "IGMP query": "query",
        "DHCP offer": "dhcp",
        "VLAN tag": "vlan",
        "BPDU": "ethertype",
        "IPv6 first fragment of nothing": "fragment",
        "RA behind a destination header": "extension",
        "IPv4 longer than its frame": "malformed",
    }
    counts = Counter()
    for kind in KINDS:
        if kind.name in wanted:
            assert guarded.hits(kind, cast, end) == []
            counts["slaptap0", wanted[kind.name]] += 1
            assert refused() == counts
    assert sum(counts.values()) == len(wanted)


def test_the_filter_is_there_before_the_tap(scene):
    """And a tap is up only when its port is as the guard needs it."""
    wanted = scene.desired(strict=True)
    order = [one.id for one in plan(wanted, observe(wanted))]
    taps = [place for place, name in enumerate(order) if name.startswith("tap/")]
    assert len(taps) == 3
    assert order.index("filter/partitiond") < min(taps)


def test_in_another_bridge_a_tap_is_as_guarded(guarded):
    shell("ip link add br1 type bridge")
    shell("ip link set br1 up")
    shell("ip link set slaptap0 master br1")
    shell("ip link set slaptap1 master br1")
    for name in ("host", "wire"):
        guarded.sinks[name].close()
    guarded.sinks = {"host": Ear("br1"), "other tap": guarded.guests[1]}
    guarded.greet()
    assert arrives(guarded, datagram(guarded, 0, to="other tap"), where="other tap")
    assert not arrives(guarded, datagram(guarded, 0, four="192.0.2.1", to="other tap"), where="other tap")


@pytest.mark.parametrize("value", ["0", "1"])
def test_whether_the_hosts_own_filters_see_bridges_does_not_matter(guarded, value):
    setting = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not setting.exists():
        pytest.skip("br_netfilter is not in this kernel")
    for one in setting.parent.glob("bridge-nf-call-*tables"):
        one.write_text(value)
    assert arrives(guarded, datagram(guarded, 0))
    assert not arrives(guarded, datagram(guarded, 0, four="192.0.2.1"))


@pytest.mark.parametrize(
    "later",
    [
        pytest.param({"taken": True}, id="somebody has it now"),
        pytest.param({"strict": True}, id="strict now"),
    ],
)
def test_what_a_guest_used_before_is_no_right_to_it(scene, later):
    from dataclasses import replace
    from ipaddress import ip_network

    wanted = scene.desired(strict=False)
    scene.converge(wanted)
    scene.open()
    frame = datagram(scene, 0, four="192.0.2.66")
    assert arrives(scene, frame)
    strict = scene.desired(strict=True)
    protected = replace(wanted.protected, networks=(*wanted.protected.networks, ip_network("192.0.2.66")))
    scene.converge(strict if "strict" in later else replace(wanted, protected=protected))
    assert not arrives(scene, frame)
    assert arrives(scene, datagram(scene, 0))
    scene.converge(wanted)
    assert arrives(scene, frame)


def test_a_mac_given_later_is_the_only_one(scene):
    scene.converge(scene.desired(strict=True))
    scene.open()
    assert arrives(scene, datagram(scene, 0))
    scene.converge(scene.desired(strict=True, mac="52:54:00:00:00:98", given=(0,)))
    scene.guests[0].send(datagram(scene, 0))
    assert refused()["slaptap0", "mac"] == 1
    scene.guests[0].mac = "52:54:00:00:00:98"
    scene.greet()
    assert arrives(scene, datagram(scene, 0))
