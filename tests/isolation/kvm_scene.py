"""The guest's surroundings: a node's bridge, a router that gives addresses out, and sinks that keep every frame they see."""

import contextlib
import ctypes
import fcntl
import json
import os
import secrets
import select
import socket
import struct
import subprocess
import time
from pathlib import Path

from kvm_image import busybox

NODE4, ROUTER4 = "192.0.2.2", "192.0.2.1"
NODE6, ROUTER6 = "2001:db8:1::2", "2001:db8:1::1"  # as tests/conftest.py has them
PREFIX6, LEASES = "2001:db8:1::", ("192.0.2.100", "192.0.2.120")
GATEWAY4 = "198.51.100.1"
_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward"), Path("/proc/sys/net/ipv6/conf/all/forwarding")
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # include/uapi/linux/if_tun.h
_ETH_P_ALL, _SO_RCVBUFFORCE = 3, 33
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def ip(*lines, namespace=None):
    where = ["-n", namespace] if namespace else []
    text = "".join(f"{line}\n" for line in lines)
    subprocess.run(["/usr/sbin/ip", *where, "-batch", "-"], input=text, text=True, check=True)


def mac_of(link, namespace=None):
    where = ["-n", namespace] if namespace else []
    command = ["/usr/sbin/ip", *where, "-j", "link", "show", "dev", link]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)[0]["address"]


# --- the router ---------------------------------------------------------------------------------------------------------


class Router:
    """DHCP, router advertisements and a web page at the other end of the bridge's wire."""

    def __init__(self, bridge, directory):
        self.mac = mac_of("uplink", bridge.router)
        self.page = secrets.token_hex(16)
        (directory / "page").write_text(self.page)
        self._inside = ["/usr/bin/nsenter", f"--net=/run/netns/{bridge.router}"]
        self._log = directory / "dnsmasq.log"
        self._commands = (
            [str(busybox()), "httpd", "-f", "-p", "80", "-h", str(directory)],
            [
                *(
                    "/usr/sbin/dnsmasq",
                    "--keep-in-foreground",
                    "--conf-file=/dev/null",
                    "--port=0",
                    "--user=root",
                ),
                *("--interface=uplink", f"--dhcp-range={','.join(LEASES)},255.255.255.0,1h", "--no-ping"),
                *("--enable-ra", f"--dhcp-range={PREFIX6},ra-only", "--dhcp-authoritative", "--pid-file="),
                *(f"--dhcp-leasefile={directory}/leases", f"--log-facility={self._log}", "--log-dhcp"),
            ],
        )
        self._processes = []

    def start(self):
        self._processes += [
            subprocess.Popen([*self._inside, *map(str, line)], stdin=subprocess.DEVNULL)
            for line in self._commands
        ]
        end = time.monotonic() + 20
        while "started" not in (self._log.read_text() if self._log.exists() else ""):
            assert time.monotonic() < end, "dnsmasq does not start"
            assert all(one.poll() is None for one in self._processes)
            time.sleep(0.02)

    def stop(self):
        for one in self._processes:
            one.kill()
            one.wait()


@contextlib.contextmanager
def standing_router(bridge, directory):
    """A router with both families behind ``bridge``, and the node's IPv4 on it."""
    ip(f"address add {NODE4}/24 dev {bridge.name}", f"route add default via {ROUTER4} dev {bridge.name}")
    ip(f"address add {ROUTER4}/24 dev uplink", namespace=bridge.router)
    # the node's addresses are given by hand; one more of its own would only blur whose is whose
    Path(f"/proc/sys/net/ipv6/conf/{bridge.name}/accept_ra").write_text("0")
    router = Router(bridge, directory)
    try:
        router.start()
        yield router
    finally:
        router.stop()


@contextlib.contextmanager
def forwarding(bridge, networks):
    """Have the node forward what the router sends to it for ``networks``; guests' IPv4 are of gw0's network."""
    kept = {one: one.read_text() for one in _FORWARDING}
    ip("link add gw0 type bridge", "link set gw0 up", f"address add {GATEWAY4}/24 dev gw0")
    ways = ((one, NODE6 if ":" in one else NODE4) for one in networks)
    ip(*(f"route add {network} via {node}" for network, node in ways), namespace=bridge.router)
    try:
        for one in _FORWARDING:
            one.write_text("1")
        yield
    finally:
        for one, text in kept.items():
            one.write_text(text)
        ip("link delete gw0")


# --- sinks --------------------------------------------------------------------------------------------------------------


class Sink:
    """A place where frames arrive; ``frames`` keeps all of them."""

    def __init__(self, name, descriptor):
        self.name, self._descriptor, self.frames = name, descriptor, []

    def until(self, mark):
        """The frames that have come since this was last asked, once one with ``mark`` in it is among them."""
        start, end = len(self.frames), time.monotonic() + 20
        while True:
            left = max(0.0, end - time.monotonic())
            assert select.select([self._descriptor], [], [], left)[0], f"{self.name}: {mark} does not arrive"
            self.frames.append(os.read(self._descriptor, 65536))
            if mark in self.frames[-1]:
                return self.frames[start:]

    def close(self):
        os.close(self._descriptor)


@contextlib.contextmanager
def _inside(namespace):
    """Open sockets in a network namespace: they stay there."""
    with open("/proc/thread-self/ns/net") as home, open(namespace) as there:
        assert _LIBC.setns(there.fileno(), _CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert _LIBC.setns(home.fileno(), _CLONE_NEWNET) == 0


def _wire(link):
    """A packet socket: it sees what leaves by the link, too."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
        sock.bind((link, _ETH_P_ALL))
        return sock.detach()


def _tap(name):
    """What another guest would read."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


@contextlib.contextmanager
def standing_sinks(bridge, tap):
    """Open a sink at the node, at the router, and at the other guest's tap."""
    namespace = f"/run/netns/{bridge.router}"
    with contextlib.ExitStack() as stack:
        sinks = [Sink("node", _wire(bridge.name)), Sink("other tap", _tap(tap))]
        with _inside(namespace):
            sinks.append(Sink("router", _wire("uplink")))
        for sink in sinks:
            stack.callback(sink.close)
        yield sinks
