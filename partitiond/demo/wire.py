"""A wire in user space, for kernels without netem: what it carries comes late, and a share of it not at all.

``python -I -m partitiond.demo.wire``: makes a network namespace of its own, which is the "internet", and ends with whoever
started it. What comes in there on any link goes by policy routing into a TUN; read from it, each packet waits, may be lost, and
is written into a second TUN, from where the kernel routes it on. Asked by JSON lines on standard input, as :class:`Order` has
them; each is answered by the counts as :class:`Counts` has them.

Both TUNs carry a virtio_net_hdr, so that segmentation and checksums are left to whoever needs them (linux/if_tun.h,
``IFF_VNET_HDR``, ``TUNSETOFFLOAD``): a packet of 64 KiB passes as one.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import ipaddress
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from partitiond.mounts import CLONE_NEWNET, unshare

INTO, OUT = "wire-in", "wire-out"
_TABLE = 100
# include/uapi/linux/if_tun.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_OFFLOADS = 0x01 | 0x02 | 0x04  # TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6
_HEADER = 10  # struct virtio_net_hdr
_LARGEST = _HEADER + 65536
_AT_ONCE = 64  # packets read before the time is looked at again
_WAITING = 50_000  # packets on the way; more are lost, as at any router
_CAPTURED = 256 << 20  # bytes of a capture
_LINKTYPE_RAW = 101

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Order:
    """What the wire is told; None leaves it as it is.

    ``delay`` in seconds, one way; ``loss`` a share from 0 to 1; ``cut`` the networks that nothing comes from or goes to;
    ``capture`` the path of a file in the format of pcap(3) for all that is carried from now on, empty for none.
    """

    delay: float | None = None
    loss: float | None = None
    cut: list[str] | None = None
    capture: str | None = None


@dataclass(slots=True)
class Counts:
    """What passed since the beginning: packets (large ones count once) and bytes carried, packets lost by lot, packets that a
    cut has stopped, and packets for which the capture had no room.
    """

    packets: int = 0
    bytes: int = 0
    lost: int = 0
    stopped: int = 0
    uncaptured: int = 0


def _tun(name: str) -> int:
    """Open a TUN that ends with its descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
    fcntl.ioctl(descriptor, _TUNSETIFF, request)
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _OFFLOADS)
    return descriptor


def _route() -> None:
    """Let all that comes from outside take the wire, once."""
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path("/proc/sys/net", name).write_text("1")
    # there is nobody else, and a link-local address that is still looked at would cost the first second
    Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")
    for name in ("all", "default"):  # by way of the wire nothing comes from where its source lies
        Path("/proc/sys/net/ipv4/conf", name, "rp_filter").write_text("0")
    lines = ["link set lo up"]
    for name in (INTO, OUT):
        lines.append(f"link set {name} addrgenmode none txqueuelen 10000 up")
        Path("/proc/sys/net/ipv4/conf", name, "rp_filter").write_text("0")
    for family in ("-4", "-6"):
        batch = [
            f"rule add pref 10 iif {OUT} lookup main",
            "rule add pref 11 iif lo lookup main",
            f"rule add pref 12 lookup {_TABLE}",
            f"route add default dev {INTO} table {_TABLE}",
        ]
        _ip(family, *(lines if family == "-4" else ()), *batch)


def _ip(family: str, *lines: str) -> None:
    text = "".join(f"{line}\n" for line in lines)
    subprocess.run(["/usr/sbin/ip", family, "-batch", "-"], input=text, text=True, check=True)


class Wire:
    """Two TUNs and what is between them."""

    def __init__(self, seed: int) -> None:
        self.counts = Counts()
        self._delay = self._loss = 0.0
        self._cut: list[Network] = []
        self._chance = random.Random(seed)  # noqa: S311 - a seeded lot, so that a run can be had again
        self._into, self._out = _tun(INTO), _tun(OUT)
        self._waiting: list[tuple[float, int, bytes]] = []
        self._number = 0
        self._capture: BinaryIO | None = None
        self._captured = 0

    def run(self) -> None:
        """Carry and obey until standard input ends."""
        orders = b""
        while True:
            due = self._waiting[0][0] - time.monotonic() if self._waiting else None
            ready, _, _ = select.select([self._into, 0], [], [], due if due is None else max(0.0, due))
            if self._into in ready:
                self._take()
            self._give()
            if 0 in ready:
                said = os.read(0, 1 << 16)
                if not said:
                    return
                *whole, orders = (orders + said).split(b"\n")
                for line in whole:
                    self._obey(Order(**json.loads(line)))

    def _obey(self, order: Order) -> None:
        if order.delay is not None:
            self._delay = order.delay
        if order.loss is not None:
            self._loss = order.loss
        if order.cut is not None:
            self._cut = [ipaddress.ip_network(one) for one in order.cut]
        if order.capture is not None:
            self._begin_capture(order.capture)
        _answer(asdict(self.counts))

    def _begin_capture(self, path: str) -> None:
        if self._capture is not None:
            self._capture.close()
        self._capture, self._captured = None, 0
        if path:
            self._capture = Path(path).open("wb")  # noqa: SIM115 - kept until the next order
            # pcap-savefile(5): magic of microseconds, version 2.4, times in UTC, longest packet, kind of link
            self._capture.write(struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, _LINKTYPE_RAW))

    def _take(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                packet = os.read(self._into, _LARGEST)
            except BlockingIOError:
                return
            if self._is_cut(packet):
                self.counts.stopped += 1
            elif self._chance.random() < self._loss or len(self._waiting) >= _WAITING:
                self.counts.lost += 1
            else:
                self._number += 1
                heapq.heappush(self._waiting, (time.monotonic() + self._delay, self._number, packet))

    def _is_cut(self, packet: bytes) -> bool:
        if not self._cut:
            return False
        six = packet[_HEADER] >> 4 == 6
        places = ((8, 24), (24, 40)) if six else ((12, 16), (16, 20))
        ends = [ipaddress.ip_address(packet[_HEADER + start : _HEADER + end]) for start, end in places]
        return any(end in network for end in ends for network in self._cut)

    def _give(self) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            _, _, packet = heapq.heappop(self._waiting)
            if self._is_cut(packet):  # it was on the way when that happened
                self.counts.stopped += 1
                continue
            try:
                os.write(self._out, packet)
            except OSError as error:
                # a full queue, or a header that the kernel takes for damaged: both are what wires do
                if error.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.EINVAL):
                    raise
                self.counts.lost += 1
                continue
            self.counts.packets += 1
            self.counts.bytes += len(packet) - _HEADER
            if self._capture is not None:
                self._keep(packet[_HEADER:])

    def _keep(self, packet: bytes) -> None:
        if self._captured + len(packet) > _CAPTURED or self._capture is None:
            self.counts.uncaptured += 1
            return
        self._captured += len(packet)
        seconds, rest = divmod(time.time_ns(), 1_000_000_000)
        self._capture.write(struct.pack("=IIII", seconds, rest // 1000, len(packet), len(packet)) + packet)


def _answer(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Be the wire; the one argument is the seed of what is lost."""
    unshare(CLONE_NEWNET)
    wire = Wire(int(arguments[0]))
    _route()
    _answer("ready")
    wire.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
