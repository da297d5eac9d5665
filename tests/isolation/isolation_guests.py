"""What leaves a partition's tap and tun: frames and packets made by hand, with addresses of others.

A few of each kind for every pair; all kinds of frames are the business of the tap guard's own matrix.
"""

import fcntl
import socket
import struct

from isolation_addresses import HERE, SERVICE, _six
from isolation_cells import Job
from isolation_node import HOST, NEIGHBOUR4, NEIGHBOUR6, WIRE
from network_scene import checksum, mac

FLOODED = "a bridge hands frames for a MAC that it has not heard of to every tap"


def _packed(address):
    return socket.inet_pton(socket.AF_INET6 if _six(address) else socket.AF_INET, address)


def _bytes(text):
    return bytes.fromhex(text.replace(":", ""))


def packet(source, target, port, token):
    """An IP packet with a UDP datagram."""
    body = struct.pack("!HHHH", port, port, 8 + len(token), 0) + token.encode()
    near, far = _packed(source), _packed(target)
    if _six(source):
        total = checksum(near + far + struct.pack("!II", len(body), 17) + body)
        body = body[:6] + struct.pack("!H", total or 0xFFFF) + body[8:]
        return struct.pack("!IHBB", 6 << 28, len(body), 17, 64) + near + far + body
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 17, 0) + near + far
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def frame(source_mac, target_mac, content):
    kind = 0x86DD if content[0] >> 4 == 6 else 0x0800
    return target_mac + source_mac + struct.pack("!H", kind) + content


def announcement(guest, address, token):
    """Gratuitous ARP, or an unsolicited neighbour advertisement; the token is behind, where nobody looks."""
    own = _packed(address)
    if not _six(address):
        body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + guest + own + bytes(6) + own
        return b"\xff" * 6 + guest + b"\x08\x06" + body + token.encode()
    body = struct.pack("!BBHI", 136, 0, 0, 0x20000000) + own + b"\2\1" + guest
    group = socket.inet_pton(socket.AF_INET6, "ff02::1")
    total = checksum(own + group + struct.pack("!II", len(body), 58) + body)
    body = body[:2] + struct.pack("!H", total) + body[4:]
    head = struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + own + group
    return b"\x33\x33\0\0\0\1" + guest + b"\x86\xdd" + head + body + token.encode()


class Guests:
    """Frames and packets of every partition, in one writing of each tap and tun."""

    def __init__(self, rounds):
        self.rounds, self.scene = rounds, rounds.scene
        with self.scene.wire.inside():
            self.far_mac = _bytes(mac_of("wire"))
        self.host_mac = _bytes(mac("br0"))

    def cells(self):
        """What arrived at the wire or at a service, of all that was written."""
        tenants = self.scene.tenants
        frames = {one.id: [*self._legitimate(one), *self._hostile(one)] for one in tenants}
        # afterwards: where nothing stops it, a bridge believes it, and sends what is for the other to this tap
        others = {one.id: list(self._other_macs(one)) for one in tenants}
        packets = {one.id: list(self._packets(one)) for one in tenants}
        return [
            *self._written((True, frames), (False, packets)),
            *self._written((True, others)),
            *self._overheard(),
        ]

    def _overheard(self):
        """Frames from the wire for one guest: nobody else's tap gets them."""
        tenants, here = self.scene.tenants, self.scene.ask_all
        questions = {}
        for one in tenants:
            source = one.addresses["range"]
            hello = frame(
                _bytes(one.guest_mac), self.far_mac, packet(source, NEIGHBOUR6, HERE, self.rounds.token())
            )
            questions[one.id] = ("guest", one.network.tap.name, hello.hex())
        here(questions)
        self.scene.sightings()
        sent, frames = {}, []
        for victim in tenants:
            for what, last, known in (("its guest", 0, ""), ("a guest that never spoke", 1, FLOODED)):
                token, target = self.rounds.token(), bytearray(_bytes(victim.guest_mac))
                target[3] ^= last
                frames.append(
                    frame(
                        self.far_mac,
                        bytes(target),
                        packet(NEIGHBOUR6, victim.addresses["range"], HERE, token),
                    ).hex()
                )
                sent[victim.id, what] = (token, known)
        self.scene.agents["wire"]("wire", "wire", frames)
        seen = self.scene.sightings()
        here({one.id: ("close", "guest") for one in tenants})
        cells = []
        for (name, what), (token, known) in sent.items():
            readers = {agent for agent, where, _ in seen.get(token, ()) if where == "guest"}
            for one in tenants:
                job = Job("frames for another", one.user, name, f"for {what}", (), one.id, known=known)
                if one.id == name:
                    job = Job("frames for oneself", one.user, name, f"for {what}", (), one.id, allowed=True)
                cells.append(job.cell(one.id in readers, "ok, read" if one.id in readers else "unseen"))
        return cells

    def _written(self, *writings):
        """Let each be written by the partition's own process, all at once: (tap or tun, {partition: packets})."""
        told = self.scene.ask_all(
            {
                one.id: ("attempt", [self._writing(one, tap, rows[one.id]) for tap, rows in writings])
                for one in self.scene.tenants
            }
        )
        seen = self.scene.sightings()
        cells = []
        for place, (_, rows) in enumerate(writings):
            for name, own in rows.items():
                for job, token, _ in own:
                    # the capture of lo is no place where somebody is reached
                    got = any(row[:2] != ("root", "capture") for row in seen.get(token, ()))
                    cells.append(
                        job.cell(got, "ok, seen" if got else told[name][place].replace("ok", "unseen"))
                    )
        return cells

    @staticmethod
    def _writing(one, tap, rows):
        link = one.network.tap.name if tap else one.network.tun.name
        return ["frames", link, tap, [content.hex() for _, _, content in rows]]

    def _legitimate(self, one):
        """First of all, so that the guest's own MAC is the one that is known."""
        guest = _bytes(one.guest_mac)
        for kind, source in {
            "its range": one.addresses["range"],
            "its routable IPv4": one.addresses["routable IPv4"],
            "a LAN address": f"192.0.2.{100 + one.index}",
            "a LAN IPv6": f"2001:db8:1::a:{100 + one.index}",
        }.items():
            token = self.rounds.token()
            content = frame(guest, self.far_mac, packet(source, WIRE[_six(source)], HERE, token))
            yield self._job("own frames", one, "node", f"from {kind}", allowed=True), token, content

    def _hostile(self, one):
        for other in self.scene.tenants:
            if other is one:
                continue
            for kind, address in other.addresses.items():
                yield from self._as_another(one, other, f"its {kind}", address)
            token = self.rounds.token()
            content = packet(f"192.0.2.{100 + one.index}", other.addresses["private IPv4"], SERVICE, token)
            content = frame(_bytes(one.guest_mac), self.host_mac, content)
            yield (
                self._job("frames from the tap", one, other.id, "a LAN address to its private IPv4"),
                token,
                content,
            )
        for kind, address in {
            "the router's": (NEIGHBOUR6, NEIGHBOUR4),
            "the node's": tuple(HOST.values()),
        }.items():
            for source in address:
                yield from self._as_another(one, None, f"{kind} {'IPv6' if _six(source) else 'IPv4'}", source)

    def _other_macs(self, one):
        source = one.addresses["range"]
        macs = {
            other.id: ("its MAC", _bytes(other.guest_mac)) for other in self.scene.tenants if other is not one
        }
        macs |= {"node": ("the node's MAC", self.host_mac), "wire": ("the router's MAC", self.far_mac)}
        for victim, (what, claimed) in macs.items():
            token = self.rounds.token()
            content = frame(claimed, b"\xff" * 6, packet(source, NEIGHBOUR6, HERE, token))
            yield self._job("frames from the tap", one, victim, what), token, content

    def _as_another(self, one, other, kind, address):
        guest, victim = _bytes(one.guest_mac), other.id if other else "node"
        six = _six(address)
        third = self.rounds.third(one.user, other or one)
        for what, target, there in (
            ("to the wire", WIRE[six], self.far_mac),
            ("to the node", third.addresses["IPv6" if six else "routable IPv4"], self.host_mac),
        ):
            token = self.rounds.token()
            content = frame(guest, there, packet(address, target, SERVICE, token))
            yield self._job("frames from the tap", one, victim, f"{kind} {what}"), token, content
        token = self.rounds.token()
        content = announcement(guest, address, token)
        yield self._job("frames from the tap", one, victim, f"{kind} announced"), token, content

    def _packets(self, one):
        """Through the node's own routing, which a tun leads into."""
        for end in (one.network.tun.ipv6, one.network.tun.ipv4):
            source, token = str(end.ip + 1), self.rounds.token()
            kind = f"from its tun's IPv{end.version}"
            job = self._job("own packets", one, "node", kind, allowed=True)
            yield job, token, packet(source, WIRE[_six(source)], SERVICE, token)
        sources = [
            (other.id, kind, address)
            for other in self.scene.tenants
            if other is not one
            for kind, address in other.addresses.items()
        ]
        sources += [("node", "its own", str(one.network.tun.ipv4.ip + 1))]
        sources += [("node", "the router's", one) for one in (NEIGHBOUR6, NEIGHBOUR4)]
        sources += [("node", "the node's", one) for one in HOST.values()]
        sources += [("node", "the world's", one) for one in ("2001:4860:4860::8888", "8.8.8.8")]
        for victim, kind, address in sources:
            six = _six(address)
            third = self.rounds.third(one.user, one)
            for what, target in (
                ("to the wire", WIRE[six]),
                ("to another", third.addresses["IPv6" if six else "routable IPv4"]),
                ("to a private IPv4", "" if six else third.addresses["private IPv4"]),
            ):
                if kind == "its own" and what != "to a private IPv4":
                    continue
                if target and target != address:
                    token = self.rounds.token()
                    yield (
                        self._job("packets from the tun", one, victim, f"{kind} {what}"),
                        token,
                        packet(address, target, SERVICE, token),
                    )

    def _job(self, kind, one, victim, what, *, allowed=False):
        return Job(kind, one.user, victim, what, (), one.id, allowed=allowed)


def mac_of(link):
    """The MAC of a link of the thread's own network, which sysfs does not show."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return fcntl.ioctl(sock, 0x8927, struct.pack("16s24x", link.encode()))[18:24].hex()  # SIOCGIFHWADDR
