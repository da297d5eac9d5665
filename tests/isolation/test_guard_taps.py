"""What the guard holds to a tap, and for how long: its MAC, its addresses, its port of the bridge."""

import socket
import subprocess

import pytest
from guard_frames import ARP, BROADCAST, arp, ether
from guard_scene import standing

from netplan.model import GUARDED_PORT
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
