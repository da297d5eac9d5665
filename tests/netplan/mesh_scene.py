"""A node of a mesh: what it wants, and the end of its tun in the place of tincd."""

import fcntl
import os
import select
import socket
import struct
import threading
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, ip_address

from netplan_scene import wanted

from netplan.model import MeshSpec

INTERFACE = "sltinc"
NETWORK = IPv4Network("10.64.0.0/16")
OWN = IPv4Network("10.64.2.0/23")
OTHER = IPv4Network("10.64.4.0/23")
NODE4 = str(OWN[1])
TUNSETIFF, TUNSETQUEUE = 0x400454CA, 0x400454D9
IFF_TUN, IFF_NO_PI, IFF_MULTI_QUEUE = 0x1, 0x1000, 0x100


def vpn(index, own=OWN):
    """The address of a partition."""
    return str(own[2 + index])


def mesh(own=OWN):
    return MeshSpec(INTERFACE, NETWORK, own, own[1])


def meshed(count=3, own=OWN, **more):
    """What a node of a mesh wants."""
    desired = wanted(count, **more)
    partitions = tuple(replace(one, vpn_ipv4=IPv4Address(vpn(one.index, own))) for one in desired.partitions)
    return replace(desired, partitions=partitions, mesh=mesh(own))


def attach(flags=IFF_TUN, name=INTERFACE):
    """Attach as tincd does; return the descriptor. Raises OSError."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError:
        os.close(device)
        raise
    return device


@contextmanager
def attached():
    """Be at the end of the tun: packets are read from and written to the descriptor."""
    device = attach(IFF_TUN | IFF_NO_PI)
    try:
        _wait_for_the_first(device)
        yield device
    finally:
        os.close(device)


def _wait_for_the_first(device):
    """The kernel lets packets pass some time after somebody has attached (net/core/link_watch.c)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _ in range(400):
            probe.sendto(b"probe", (str(NETWORK[-2]), 9))
            if select.select([device], [], [], 0.05)[0]:
                break
    assert packets(device, 0), "nothing leaves by the tun"


def packets(device, patience=0.3):
    """All that leaves by the tun until nothing comes any more."""
    found = []
    while select.select([device], [], [], patience)[0]:
        found.append(os.read(device, 65536))
    return found


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def datagram(source, target, port, payload=b"x", sport=4000):
    """An IPv4 packet with a UDP datagram; without a UDP checksum, which IPv4 allows."""
    udp = struct.pack("!4H", sport, port, 8 + len(payload), 0) + payload
    return ipv4(source, target, socket.IPPROTO_UDP, udp)


def syn(source, target, port, sport=4000):
    """An IPv4 packet that begins a TCP connection."""
    ends = ip_address(source).packed + ip_address(target).packed
    tcp = struct.pack("!HHIIBBHHH", sport, port, 1, 0, 5 << 4, 2, 1024, 0, 0)
    check = checksum(ends + struct.pack("!HH", socket.IPPROTO_TCP, len(tcp)) + tcp)
    return ipv4(source, target, socket.IPPROTO_TCP, tcp[:16] + struct.pack("!H", check) + tcp[18:])


def ipv4(source, target, protocol, payload):
    ends = ip_address(source).packed + ip_address(target).packed
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0)
    return head[:10] + struct.pack("!H", checksum(head + ends)) + ends + payload


def ends(packet):
    """Source and destination of an IPv4 packet."""
    return str(IPv4Address(packet[12:16])), str(IPv4Address(packet[16:20]))


class Pump:
    """What tincd does between two nodes: whatever one tun gives goes into the other, unlooked at."""

    def __init__(self, one, other):
        self._ways = {one: other, other: one}
        self._stop = os.eventfd(0)
        self.carried = []
        self._thread = threading.Thread(target=self._carry)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)

    def _carry(self):
        while True:
            ready = select.select([*self._ways, self._stop], [], [])[0]
            if self._stop in ready:
                return
            for device in ready:
                packet = os.read(device, 65536)
                self.carried.append(packet)
                os.write(self._ways[device], packet)
