"""The scene of routed taps: what a guest sends goes to the host, and through it to another guest and the wire.

What gets past the guard is counted by rules of the test's own behind it; what is sent on is seen at the other ends.
"""

import struct
import subprocess
from pathlib import Path

from guard_cast import Cast
from guard_frames import IP, UDP, ether, ip4, udp
from guard_scene import GUEST_MACS, ROUTER, UID, Ear, Guest

from netplan import nfnetlink
from netplan.netlink import attribute
from tests.netplan.netplan_scene import inside

_GETOBJ, _INET, _ARP = 10 << 8 | 19, 1, 3
_BEHIND = """
table inet behind {
 counter passed { }
 chain in { type filter hook prerouting priority -200; iifname "slaptap0" counter name passed; }
}
table arp behind {
 counter passed { }
 chain in { type filter hook input priority 0; iifname "slaptap0" counter name passed; }
}
"""


def run(*words, text=None):
    return subprocess.run(words, input=text, check=True, capture_output=True, text=True).stdout


class Routed:
    """Guests at routed taps of a scene; ``open`` when the taps are there."""

    def __init__(self, scene):
        self.scene = scene
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", name).write_text("1")
        run("/usr/sbin/nft", "-f", "-", text=_BEHIND)

    def open(self):
        scene = self.scene
        Path("/dev/net/tun").chmod(0o666)
        scene.guests = [
            Guest(f"slaptap{index}", UID + index, mac, f"192.0.2.{50 + index}")
            for index, mac in enumerate(GUEST_MACS)
        ]
        with inside(scene.wire):
            far = Ear("wire")
        scene.sinks = {"other tap": scene.guests[1], "wire": far}
        cast = self.cast()
        for address in (cast.other.four, cast.other.six):
            run("/usr/sbin/ip", "neigh", "replace", address, "lladdr", cast.other.mac, "dev", "slaptap1")
        for address in (ROUTER.four, ROUTER.six):
            run("/usr/sbin/ip", "neigh", "replace", address, "lladdr", scene.macs["wire"], "dev", "br0")
        self.hits_of(self._mark("wire"))

    def cast(self) -> Cast:
        found = self.scene.cast()
        return found.__class__(
            **{name: getattr(found, name) for name in found.__dataclass_fields__ if name != "host"},
            host=found.host._replace(mac=self.scene.look()["slaptap0"].mac),
        )

    def ends(self):
        """Where frames can be sent: all go to the host first."""
        cast = self.cast()
        mac = cast.host.mac
        ends = {"host": cast.host, "other tap": cast.other, "wire": cast.router}
        return {name: end._replace(mac=mac) for name, end in ends.items()}

    def _mark(self, where):
        self.scene.number += 1
        me, to = self.scene.guests[0], self.ends()[where]
        mark = b"mark" + self.scene.number.to_bytes(4, "big")
        return ether(to.mac, me.mac, IP, ip4(me.four, to.four, UDP, udp(4000, 9, mark))), mark

    def passed(self):
        """How many frames of the guest came past the guard."""
        with nfnetlink.nft_socket() as sock:
            return sum(
                # the counter comes last: bytes and packets, each an attribute (net/netfilter/nft_counter.c)
                struct.unpack_from("!4xQ4xQ", message.data, message.end - 24)[1]
                for family in (_INET, _ARP)
                for message in sock.dump(_GETOBJ, bytes((family, 0, 0, 0)) + attribute(1, b"behind\0"))
            )

    def hits(self, kind, cast, where, end):
        """Send a kind of frame to an end; return where it came: past the guard, and out again."""
        self.scene.number += 1
        token = b"~" + self.scene.number.to_bytes(4, "big") + b"~"
        before = self.passed()
        self.scene.guests[0].send(kind.make(cast, end, token))
        hits = {"host"} if self.passed() > before else set()
        for name, sink in self.scene.sinks.items():
            if name == where:
                frame, mark = self._mark(name)
                self.scene.guests[0].send(frame)
                found = self.scene._until(sink, mark, 5.0)
                assert found is not None, f"what is fine did not arrive at the {name}"
                hits |= {name} if any(token in one for one in found) else set()
        return hits

    def hits_of(self, marked):
        frame, mark = marked
        for _ in range(100):
            self.scene.guests[0].send(frame)
            if self.scene._until(self.scene.sinks["wire"], mark, 0.1) is not None:
                return
        raise AssertionError("the guest is not heard at the wire")
