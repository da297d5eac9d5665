"""What who holds a tap can do to its host's end by ioctl alone, and what becomes of it."""

import errno
import fcntl
import os
import pwd
import struct
import subprocess
import time
from dataclasses import replace
from ipaddress import IPv6Interface
from pathlib import Path

import pytest
from guard_frames import ALL_NODES, ICMP6, UDP, icmp6, ip6, udp
from guard_scene import Guest, standing
from test_guard_flushed import node, until  # noqa: F401 - a fixture

from netplan.counters import read_counters
from netplan.model import TunSpec

ROUTER_MAC = "52:54:00:de:ad:01"
_TUNSETOWNER, _SIOCSIFHWADDR = 0x400454CC, 0x8924


def give_mac(guest, name, mac):
    request = struct.pack("16sH6s8x", name.encode(), 1, bytes.fromhex(mac.replace(":", "")))  # ARPHRD_ETHER
    fcntl.ioctl(guest.file, _SIOCSIFHWADDR, request)


def mac_of(name):
    return Path(f"/sys/class/net/{name}/address").read_text().strip()


def is_up(name):
    return bool(int(Path(f"/sys/class/net/{name}/flags").read_text(), 16) & 1)


def claimed(mac):
    shown = subprocess.run(
        ["/usr/sbin/bridge", "fdb", "show", "br", "br0"], check=True, capture_output=True, text=True
    )
    return any(line.startswith(mac) and "permanent" in line for line in shown.stdout.splitlines())


def test_a_holder_that_takes_the_routers_mac_keeps_it_for_a_moment_only(node):  # noqa: F811
    own = mac_of("slaptap0")
    guest = Guest("slaptap0", pwd.getpwnam("slapuser0").pw_uid, "52:54:00:00:00:77", "192.0.2.50")
    try:
        for _ in range(6):  # it goes on, and is let wait for it
            give_mac(guest, "slaptap0", ROUTER_MAC)
            until("the MAC that was set back", lambda: mac_of("slaptap0") == own)
            assert not claimed(ROUTER_MAC)
            until(
                "a tap that is down or was set up again",
                lambda: not is_up("slaptap0") or mac_of("slaptap0") == own,
            )
            time.sleep(0.1)
        until("the tap's return", lambda: is_up("slaptap0"))
        assert mac_of("slaptap0") == own
    finally:
        guest.close()


@pytest.fixture
def scene():
    with standing() as made:
        yield made


def test_a_holder_that_gives_its_tap_away_loses_it(scene):
    wanted = scene.desired(strict=True)
    scene.converge(wanted)
    scene.open()
    guest = scene.guests[0]
    fcntl.ioctl(guest.file, _TUNSETOWNER, 4242)
    give_mac(guest, "slaptap0", ROUTER_MAC)
    assert [one.id for one in scene.converge(wanted)] == ["tap/slaptap0"]
    link = scene.look()["slaptap0"]
    (tap,) = [one.tap for one in wanted.partitions if one.tap and one.tap.name == "slaptap0"]
    assert (link.tap_owner, link.mac, link.up) == (tap.owner_uid, tap.mac, True)
    with pytest.raises(OSError, match=os.strerror(errno.EBADFD)):
        guest.send(bytes(60))
    assert not claimed(ROUTER_MAC)


def routes():
    shown = subprocess.run(["/usr/sbin/ip", "-6", "route"], check=True, capture_output=True, text=True).stdout
    return [line for line in shown.splitlines() if "slaptun0" in line and "proto ra" in line]


@pytest.mark.parametrize("guarded", [True, False])
def test_a_tun_is_no_way_to_the_world(scene, guarded):
    """By a router advertisement the host would take the tun for its router."""
    Path("/dev/net/tun").chmod(0o666)
    wanted = scene.desired(strict=True)
    first = wanted.partitions[0]
    tun = TunSpec("slaptun0", first.uid, IPv6Interface("2001:db8:9::1/64"), None, guarded=guarded)
    scene.converge(replace(wanted, partitions=(replace(first, tun=tun), *wanted.partitions[1:])))
    Path("/proc/sys/net/ipv6/conf/slaptun0/accept_ra").write_text("2")
    device = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(device, 0x400454CA, struct.pack("16sH22x", b"slaptun0", 0x1001))
        body = icmp6("fe80::bad", ALL_NODES, 134, struct.pack("!BBHII", 64, 0, 1800, 0, 0))
        until_up = time.monotonic() + 5
        while not routes() and time.monotonic() < until_up:
            os.write(device, ip6("fe80::bad", ALL_NODES, ICMP6, body, hops=255))
            time.sleep(0.02)
            if guarded and any(one.rule == "tun" and one.packets > 3 for one in read_counters().refused):
                break
        assert bool(routes()) is not guarded
        os.write(
            device,
            ip6(
                "2001:db8:9::5",
                "2001:db8:9::1",
                UDP,
                udp(1, 9, source="2001:db8:9::5", target="2001:db8:9::1"),
            ),
        )
        assert not guarded or sum(one.packets for one in read_counters().refused if one.rule == "tun") > 3
    finally:
        os.close(device)
