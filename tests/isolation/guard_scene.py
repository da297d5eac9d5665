"""A node with two guests at its taps and a wire: what one guest sends, and where it comes out.

All in network namespaces of the test's own.  The guests are descriptors of the taps, opened as their owners; the sinks are
the other guest, the far end of the wire, and the host's end of the bridge, each seeing every frame that gets there.
"""

import contextlib
import fcntl
import os
import select
import socket
import struct
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Interface, ip_network
from pathlib import Path

from guard_cast import Cast, End
from guard_frames import (
    ALL_NODES,
    ARP,
    BROADCAST,
    ICMP6,
    IP6,
    arp,
    ether,
    group_mac,
    icmp6,
    ip6,
    six,
)
from pyroute2 import IPRoute

from netplan.addresses import host_tap_mac, tap_mac
from netplan.apply import apply
from netplan.model import DesiredNetwork, PartitionNetwork, Protected, TapGuard, TapSpec
from netplan.observe import look, observe
from netplan.plan import plan
from tests.netplan.netplan_scene import enter, inside, leave_for_a_new_one, namespace, wire

UID = 61000
_TUNSETIFF, _SIOCGIFHWADDR = 0x400454CA, 0x8927
_IFF_TAP, _IFF_NO_PI = 0x2, 0x1000
# include/uapi/linux/if_packet.h
_SOL_PACKET, _ADD_MEMBERSHIP, _AUXDATA, _PROMISCUOUS = 263, 1, 8, 1
_VLAN_VALID, _VLAN_TPID_VALID = 0x10, 0x40
_PATIENCE, _SOON, _TRIES = 5.0, 0.1, 100

NODE = End("", "192.0.2.2", "2001:db8:1::1")
ROUTER = End("", "192.0.2.1", "2001:db8:1::ffff:1", "fe80::ffff:1")
RESOLVER, VPN = "192.0.2.53", "10.64.0.9"
GUEST_MACS = ("52:54:00:00:00:50", "52:54:00:00:00:51")


def partition(index, *, strict, guarded=True, bridge="br0", mac=None):
    """A guest whose own are 192.0.2.5X and 2001:db8:1:aX::/64."""
    name = f"slappart{index}"
    own = (ip_network(f"192.0.2.{50 + index}"), ip_network(f"2001:db8:1:a{index}::/64"))
    guard = TapGuard(strict, own, mac, tap_mac("COMP-1", name)) if guarded else None
    # of a routed tap, the host has the last address of the guest's network, and it is no range of processes
    ends = {} if bridge else {"ipv6": IPv6Interface((own[1][-1], 64)), "ipv4": own[0].network_address}
    return PartitionNetwork(
        name,
        index,
        UID + index,
        TapSpec(f"slaptap{index}", UID + index, host_tap_mac("COMP-1", name), bridge, guard=guard, **ends),
        IPv6Interface(f"2001:db8:1::{index + 2:x}/64"),
        own[1] if bridge else None,
        IPv4Address(f"10.0.0.{index + 2}"),
    )


class Guest:
    """The guest's end of a tap, opened as its owner."""

    def __init__(self, name, uid, mac, four):
        self.mac, self.four = mac, four
        os.seteuid(uid)
        try:
            self.file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(self.file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        finally:
            os.seteuid(0)

    def send(self, frame):
        os.write(self.file, frame)

    def receive(self):
        return os.read(self.file, 65536)

    def fileno(self):
        return self.file

    def close(self):
        os.close(self.file)


class Ear(socket.socket):
    """Everything that comes in over a link, with its tags."""

    def __init__(self, link):
        super().__init__(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3))
        self.bind((link, 0))
        index = socket.if_nametoindex(link)
        self.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, struct.pack("iHH8s", index, _PROMISCUOUS, 0, b""))
        self.setsockopt(_SOL_PACKET, _AUXDATA, 1)

    def receive(self):
        data, extra, _, sender = self.recvmsg(65536, 64)
        if sender[2] == socket.PACKET_OUTGOING:
            return b""
        for _, _, aux in extra:
            status, _, _, _, _, tag, kind = struct.unpack_from("=IIIHHHH", aux)
            if status & _VLAN_VALID:  # the kernel took the tag off
                kind = kind if status & _VLAN_TPID_VALID else 0x8100
                return data[:12] + struct.pack("!HH", kind, tag) + data[12:]
        return data


@dataclass
class Scene:
    """The node, running in its namespace; ``local`` is its own link-local address."""

    wire: int
    macs: dict
    local: str
    guests: list = field(default_factory=list)
    sinks: dict = field(default_factory=dict)
    number: int = 0

    def desired(self, count=3, mac=None, given=(), **more):
        """Two guests, and a partition that has addresses to be taken."""
        addresses = (NODE.four, ROUTER.four, RESOLVER, "10.64.0.0/16", NODE.six, ROUTER.six, ROUTER.local)
        return DesiredNetwork(
            "br0",
            tuple(partition(index, mac=mac if index in given else None, **more) for index in range(count)),
            protected=Protected(
                tuple(map(ip_network, (*addresses, self.local))), (self.macs["br0"], self.macs["eth0"])
            ),
        )

    def converge(self, wanted):
        """Apply, and check that nothing failed and that nothing is left to do."""
        operations = plan(wanted, observe(wanted))
        failures = apply(operations)
        assert not failures, [(one.operation.id, one.error.message) for one in failures]
        assert not plan(wanted, observe(wanted))
        return operations

    @staticmethod
    def look():
        """The links by name."""
        return look().links

    def open(self, *, silent=False):
        """Let the guests come, and listen everywhere; ``silent``: they have not sent anything yet."""
        Path("/dev/net/tun").chmod(0o666)
        for index, mac in enumerate(GUEST_MACS):
            self.guests.append(Guest(f"slaptap{index}", UID + index, mac, f"192.0.2.{50 + index}"))
        with inside(self.wire):
            far = Ear("wire")
        self.sinks = {"host": Ear("br0"), "other tap": self.guests[1], "wire": far}
        if silent:
            self._until_ports_forward()
        else:
            self.greet()

    def greet(self):
        """Let each guest be heard everywhere."""
        for sender in (1, 0):
            self._until_heard(sender)

    def _until_ports_forward(self):
        """Wait until what the wire sends is heard by both: only then a bridge takes what they send."""
        waiting = set(self.guests)
        for _ in range(_TRIES):
            self.shout(arp(1, self.macs["wire"], "192.0.2.250", "192.0.2.251"))
            for one in select.select(list(waiting), [], [], _SOON)[0]:
                one.receive()
                waiting.discard(one)
            if not waiting:
                return
        raise AssertionError("the guests hear nothing")

    def close(self):
        for one in {*self.sinks.values(), *self.guests}:
            one.close()

    def cast(self):
        me, other = self.guests
        return Cast(
            me=End(me.mac, me.four, "2001:db8:1:a0::5", "fe80::5:5"),
            other=End(other.mac, other.four, "2001:db8:1:a1::5", "fe80::6:6"),
            host=End(self.macs["br0"], NODE.four, NODE.six, self.local),
            router=ROUTER._replace(mac=self.macs["wire"]),
            free=End("", "192.0.2.77", "2001:db8:1::7777", "fe80::7777"),
            partition=End("", "10.0.0.4", "2001:db8:1::4"),
            proposed=tap_mac("COMP-1", "slappart1"),
            second="52:54:00:00:00:99",
            resolver=RESOLVER,
            vpn=VPN,
            private="10.0.0.4",
        )

    def ends(self):
        """Where frames can be sent: by name, the end that is there."""
        cast = self.cast()
        return {"host": cast.host, "other tap": cast.other, "wire": cast.router}

    def introduce(self):
        """Let the router be heard, and the other guest say what its link-local address is."""
        self.hear(arp(1, self.macs["wire"], ROUTER.four, NODE.four))
        other = self.cast().other
        said = icmp6(other.local, ALL_NODES, 136, bytes(4) + six(other.local))
        packet = ip6(other.local, ALL_NODES, ICMP6, said, hops=255)
        self.what_comes_of(ether(group_mac(ALL_NODES), other.mac, IP6, packet), 1)

    def shout(self, packet):
        """Let the router send ARP to everybody."""
        with inside(self.wire), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as far:
            far.bind(("wire", 0))
            far.send(ether(BROADCAST, self.macs["wire"], ARP, packet))

    def hear(self, packet):
        """Let the router send ARP to everybody, and wait until it is there."""
        self.shout(packet)
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            if select.select([self.guests[0]], [], [], _SOON)[0] and self.guests[0].receive().endswith(
                packet
            ):
                return
        raise AssertionError("the router is not heard")

    def hits(self, kind, cast, end):
        """Send a kind of frame to an end; return the names of the sinks that it reached."""
        self.number += 1
        token = b"~" + self.number.to_bytes(4, "big") + b"~"
        frame = kind.make(cast, end, token)
        seen = self.what_comes_of(frame)
        return [name for name, found in seen.items() if any(token in one or one == frame for one in found)]

    def what_comes_of(self, frame, sender=0):
        """Send a frame, and after it one that everybody gets; return by sink what arrived before that one."""
        guest = self.guests[sender]
        guest.send(frame)
        mark = self._mark(sender)
        found = {}
        for name, sink in self.sinks.items():
            if sink is not guest:
                found[name] = self._until(sink, mark, _PATIENCE)
                assert found[name] is not None, f"what everybody gets did not arrive at the {name}"
        return found

    def _until_heard(self, sender):
        """Send until everybody hears it: a link that was just opened is not a forwarding port at once."""
        for _ in range(_TRIES):
            mark = self._mark(sender)
            sinks = [sink for sink in self.sinks.values() if sink is not self.guests[sender]]
            if all(self._until(sink, mark, _SOON) is not None for sink in sinks):
                return
        raise AssertionError(f"guest {sender} is not heard")

    def _mark(self, sender):
        """Let a guest send a frame that is always fine; return its end."""
        self.number += 1
        guest = self.guests[sender]
        mark = b"mark" + self.number.to_bytes(4, "big")
        guest.send(ether(BROADCAST, guest.mac, ARP, arp(1, guest.mac, guest.four, guest.four) + mark))
        return mark

    @staticmethod
    def _until(sink, mark, patience):
        found = []
        while select.select([sink], [], [], patience)[0]:
            data = sink.receive()
            if data.endswith(mark):
                return found
            found.append(data)
        return None


def _mac_of(link):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as one:
        return fcntl.ioctl(one, _SIOCGIFHWADDR, struct.pack("16s24x", link.encode()))[18:24].hex(":")


def _link_local(mac):
    """The address that the kernel makes of a MAC (RFC 4291, appendix A)."""
    first, *rest = bytes.fromhex(mac.replace(":", ""))
    return str(IPv6Address(b"\xfe\x80" + bytes(6) + bytes((first ^ 2, *rest[:2], 0xFF, 0xFE, *rest[2:]))))


@contextlib.contextmanager
def standing():
    """Yield the scene with its bridge and wire, and no taps yet."""
    home, cpus = namespace(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})  # what one processor took in comes out in order
    opened, scene = [home], None
    try:
        opened.append(leave_for_a_new_one())
        opened.append(leave_for_a_new_one())
        with IPRoute() as ipr:
            bridge = wire(ipr, opened[1])
            # what one frame made the bridge believe must not change where the next one goes; reports of groups would
            # go to multicast routers alone
            ipr.link("set", index=bridge, kind="bridge", br_ageing_time=0, br_mcast_snooping=0)
        macs = {name: _mac_of(name) for name in ("br0", "eth0")}
        with inside(opened[1]):
            macs["wire"] = _mac_of("wire")
        scene = Scene(opened[1], macs, _link_local(macs["br0"]))
        yield scene
    finally:
        if scene:
            scene.close()
        enter(home)
        for one in opened:
            os.close(one)
        os.sched_setaffinity(0, cpus)
