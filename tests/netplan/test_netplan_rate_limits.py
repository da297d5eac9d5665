"""Limits by rate: who is limited gets about its rate, neighbours all of theirs; nothing else of the filter is touched."""

import fcntl
import json
import os
import socket
import struct
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address

import pytest
from mesh_scene import OTHER as THEIRS
from mesh_scene import attached, datagram, ends, meshed, vpn
from mesh_scene import packets as mesh_packets
from netplan_scene import (
    BASE,
    HOST4,
    NEIGHBOUR4,
    NEIGHBOUR6,
    NOTHING,
    UID,
    as_user,
    endpoint,
    know_each_other,
    opened_by,
    serving,
    sink,
    wanted,
)

from netplan import nftables
from netplan.addresses import tap_ipv6
from netplan.apply import apply
from netplan.counters import read_counters
from netplan.errors import NetplanError
from netplan.model import RateLimit
from netplan.observe import observe
from netplan.packet_filter import render
from netplan.plan import plan
from netplan.rate_limits import BURST
from netplan.rtnetlink import ROUTE_LOCAL

A, B = UID, UID + 1
A6, B6 = "2001:db8:1::2", "2001:db8:1::3"
A4, B4 = "10.0.0.2", "10.0.0.3"
A_RANGE, B_RANGE = "2001:db8:1:0:4001::5", "2001:db8:1:0:4002::5"
HOST6 = str(BASE.ip)
RATE = 20_000
COUNT, SIZE = 1000, 1000
MOST = 600  # packets of them, in whatever time a machine takes: 22 s for what is above the burst
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x2, 0x1000


def limited(*names, count=3, rate=RATE, **more):
    """A node whose first two partitions may become limited, and those of ``names`` are."""
    limits = {f"slappart{index}": RateLimit(rate, f"slappart{index}" in names) for index in range(2)}
    return wanted(count, limits=limits, **{"ranges": True, **more})


@pytest.fixture
def known(node):
    know_each_other(node)
    return node


def blast(source, target, port, count=COUNT):
    """Send datagrams whatever becomes of them: what is dropped on output is EPERM."""
    with endpoint(socket.SOCK_DGRAM, source, target) as one:
        for _ in range(count):
            with suppress(PermissionError):
                one.sendto(bytes(SIZE), (target, port))
    return "ok"


def packets(direction, scope="remote"):
    """Packets by partition, of all addresses together."""
    found = {}
    reading = read_counters()
    for one in reading.traffic:
        if one.scope == scope:
            count = one.packets_out if direction == "out" else one.packets_in
            found[one.partition] = found.get(one.partition, 0) + count
    for one in reading.shared:
        name = f"slappart{one.uid - UID}"
        found[name] = found.get(name, 0) + (one.packets_out if direction == "out" else one.packets_in)
    return found


def refused():
    return {one.tap or one.uid: one.packets for one in read_counters().refused if one.rule == "quota"}


@contextmanager
def received(node, target, port=0):
    """Count what gets to the neighbour."""
    with node.at_neighbour():
        one = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM)
    with one:
        one.bind((target, port))
        yield one


@pytest.mark.parametrize("ownership", [True, False])
@pytest.mark.parametrize(
    ("of_a", "of_b", "target"),
    [
        (A6, B6, NEIGHBOUR6),
        (A_RANGE, B_RANGE, NEIGHBOUR6),
        (A4, B4, NEIGHBOUR4),
        (None, None, NEIGHBOUR6),
        (None, None, NEIGHBOUR4),
    ],
)
def test_out(known, of_a, of_b, target, ownership):
    known.converge(limited("slappart0", ownership=ownership))
    with sink(known, target) as port:
        assert as_user(A, lambda: blast(of_a, target, port)) == "ok"
        assert as_user(B, lambda: blast(of_b, target, port)) == "ok"
    sent = packets("out")
    assert BURST // (SIZE + 48) <= sent["slappart0"] <= MOST
    assert sent["slappart1"] == COUNT
    # what is dropped is no traffic, and the other way round
    assert refused() == {A: COUNT - sent["slappart0"]}


def test_of_the_mesh(node):
    """Both ways through its interface, which belongs to nobody in particular."""
    limits = {"slappart0": RateLimit(RATE, in_force=True)}
    node.converge(meshed(2, tap=False, limits=limits))
    few, size = 400, 20 + 8 + SIZE  # fewer than the queue of a tun takes
    allowed, most = BURST // size, (BURST + 6 * RATE) // size
    target = str(THEIRS[2])
    left = []
    with attached() as device:
        for uid, one in ((A, 0), (B, 1)):
            sent = partial(blast, vpn(one), target, 9, few)
            assert as_user(uid, sent) == "ok"
            left += [ends(packet)[0] for packet in mesh_packets(device)]
        for one in (0, 1):
            for _ in range(few):
                os.write(device, datagram(target, vpn(one), 9, bytes(SIZE)))
        assert mesh_packets(device)  # unreachable: nobody listens
    assert allowed <= left.count(vpn(0)) <= most
    assert left.count(vpn(1)) == few
    came = {
        one.partition: one.packets_in for one in read_counters().traffic if one[1:3] == ("vpn4", "remote")
    }
    assert came["slappart1"] == few
    assert allowed <= came["slappart0"] <= most
    # on input there is nobody but the partition, on output its user
    assert sum(refused().values()) >= 2 * few - left.count(vpn(0)) - came["slappart0"]


def is_local(node, address):
    (route,) = node.ipr.route("get", dst=address)
    return route["type"] == ROUTE_LOCAL


@pytest.mark.parametrize(("of_a", "of_b"), [(A6, B6), (A_RANGE, B_RANGE)])
def test_in(known, of_a, of_b):
    known.converge(limited("slappart0"))
    with ExitStack() as stack:
        ports = {
            address: stack.enter_context(serving(uid, address, socket.SOCK_DGRAM))
            for uid, address in ((A, of_a), (B, of_b))
        }
        # the kernel makes a new IPv6 address its own in a work queue (net/ipv6/addrconf.c, addrconf_dad_work); what is for it
        # before that is dropped in front of our rules, as Ip6InAddrErrors
        until(lambda: all(is_local(known, address) for address in ports))
        with known.at_neighbour():
            for address, port in ports.items():
                blast(None, address, port)
    came = packets("in")
    assert BURST // (SIZE + 48) <= came["slappart0"] <= MOST
    assert came["slappart1"] == COUNT
    assert refused() == {A: COUNT - came["slappart0"]}


@pytest.mark.parametrize(("host", "target"), [(HOST6, NEIGHBOUR6), (HOST4, NEIGHBOUR4)])
def test_in_at_the_nodes_own_address(known, host, target):
    """As far as it is metered: of sockets that are connected."""
    known.converge(limited("slappart0"))
    with known.at_neighbour():
        far = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM)
    with far, ExitStack() as stack:
        far.bind((target, 0))
        for uid in (A, B):
            with opened_by(uid):
                one = stack.enter_context(endpoint(socket.SOCK_DGRAM, host, target))
            one.connect(far.getsockname()[:2])
            for _ in range(COUNT):
                far.sendto(bytes(SIZE), one.getsockname()[:2])
    came = packets("in")
    assert BURST // (SIZE + 48) <= came["slappart0"] <= MOST
    assert came["slappart1"] == COUNT


def test_ipv4_that_the_world_reaches(known):
    desired = limited("slappart0", ranges=False)
    partitions = tuple(
        replace(one, ipv6=None, public_ipv4=IPv4Address(f"192.0.2.{60 + one.index}"))
        for one in desired.partitions
    )
    known.converge(replace(desired, partitions=partitions, host_ipv4=IPv4Address(HOST4)))
    with ExitStack() as stack:
        far = stack.enter_context(sink(known, NEIGHBOUR4))
        for uid, address in ((A, "192.0.2.60"), (B, "192.0.2.61")):
            as_user(uid, lambda own=address: blast(own, NEIGHBOUR4, far))
            port = stack.enter_context(serving(uid, address, socket.SOCK_DGRAM))
            with known.at_neighbour():
                blast(None, address, port, 1)
                blast(None, address, port)
    for direction in ("out", "in"):
        found = packets(direction)
        assert BURST // (SIZE + 48) <= found["slappart0"] <= MOST
        assert found["slappart1"] >= COUNT


def test_both_families_share_one_bucket(known):
    known.converge(limited("slappart0"))
    with sink(known, NEIGHBOUR6) as six, sink(known, NEIGHBOUR4) as four:
        as_user(A, lambda: blast(A6, NEIGHBOUR6, six, 300))
        before = packets("out")["slappart0"]
        as_user(A, lambda: blast(A4, NEIGHBOUR4, four, 300))
    assert BURST // (SIZE + 48) <= before < 250
    assert packets("out")["slappart0"] - before < 100


def test_what_stays_on_the_node_is_not_limited(known):
    known.converge(limited("slappart0", "slappart1"))
    with serving(B, B6, socket.SOCK_DGRAM) as port:
        as_user(A, lambda: blast(A6, B6, port))
    assert packets("out", "local")["slappart0"] == packets("in", "local")["slappart1"] == COUNT
    assert refused() == {}


def _swallow(one, stop):
    found = 0
    with one:
        one.settimeout(0.1)
        while not stop.is_set():
            try:
                piece = one.recv(1 << 18)
            except TimeoutError:
                continue
            if not piece:
                break
            found += len(piece)
    return found


@pytest.mark.parametrize("towards", ["neighbour", "partition"])
@pytest.mark.parametrize(("of_a", "of_b", "far"), [(A6, B6, NEIGHBOUR6), (None, None, NEIGHBOUR4)])
def test_streams(known, of_a, of_b, far, towards):
    """A stream of who is limited gets about its rate, and that of the neighbour is through long before."""
    if towards == "partition" and not of_a:
        of_a = of_b = HOST4
    rate, octets, seconds = 100_000, 4_000_000, 3.0
    known.converge(limited("slappart0", rate=rate))
    got = {}

    def flow(uid, own):
        stop = threading.Event()
        with ExitStack() as stack:
            as_them, away = opened_by(uid), known.at_neighbour()
            here, there = (as_them, away) if towards == "partition" else (away, as_them)
            target = own if towards == "partition" else far
            with here:
                listener = stack.enter_context(socket.create_server((target, 0), family=_family(target)))
            with there:
                sender = stack.enter_context(
                    endpoint(socket.SOCK_STREAM, None if towards == "partition" else own, target)
                )
            sender.settimeout(10)
            sender.connect(listener.getsockname()[:2])
            # who accepts is the user of the connection
            with opened_by(uid) if towards == "partition" else nullcontext():
                one = stack.enter_context(listener.accept()[0])
            reader = threading.Thread(target=lambda: got.update({uid: _swallow(one, stop)}))
            reader.start()
            sender.settimeout(0.1)
            began, sent = time.monotonic(), 0
            while sent < octets and time.monotonic() - began < seconds:
                with suppress(TimeoutError, PermissionError):
                    sent += sender.send(bytes(min(65536, octets - sent)))
            took = time.monotonic() - began
            if sent == octets:
                sender.shutdown(socket.SHUT_WR)
                reader.join(20)
            stop.set()
            reader.join()
        return took

    slow, fast = flow(A, of_a), flow(B, of_b)
    assert got[B] == octets
    assert fast < slow
    assert got[A] <= BURST + rate * (slow + 1.5)
    assert got[A] >= BURST // 2 + rate * slow * 0.3, "it gets something like its rate, too"


def _family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Guest:
    """Who is behind a tap or tun."""

    def __init__(self, name, kind=_IFF_TAP):
        self.file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), kind | _IFF_NO_PI))

    def drain(self, marker):
        found = 0
        with suppress(BlockingIOError):
            while True:
                found += marker in os.read(self.file, 2048)
        return found

    def send(self, frame, count=COUNT):
        for _ in range(count):
            os.write(self.file, frame)


@pytest.fixture
def guests():
    opened = []

    def open_them(*names, kind=_IFF_TAP):
        opened.extend(Guest(name, kind) for name in names)
        return opened

    yield open_them
    for one in opened:
        os.close(one.file)


def _frame(target, source, marker):
    """A frame of an experimental protocol (IEEE 802 local), which no guard and no stack knows."""
    return target + source + b"\x88\xb5" + marker.ljust(SIZE, b"\0")


A_MAC, B_MAC, FAR_MAC = (bytes.fromhex(f"0254000000{number}") for number in ("0a", "0b", "0f"))


@contextmanager
def raw_wire(node):
    with node.at_neighbour():
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
        wire.bind(("wire", 0x88B5))
    with wire:
        wire.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        wire.setblocking(False)
        yield wire


def _heard(wire, marker):
    found = 0
    with suppress(BlockingIOError):
        while True:
            found += marker in wire.recv(2048)
    return found


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_bridged_taps(known, guests):
    known.converge(limited("slappart0"))
    a, b = guests("slaptap0", "slaptap1")
    with raw_wire(known) as wire:
        # what the kernel needs until the ports forward
        until(lambda: (os.write(b.file, _frame(FAR_MAC, B_MAC, b"hello")), _heard(wire, b"hello"))[1])
        wire.send(_frame(B_MAC, FAR_MAC, b"here"))  # else what is sent there would be flooded to all
        heard = {}
        for marker, guest, mac in ((b"of a", a, A_MAC), (b"of b", b, B_MAC)):
            heard[marker] = 0
            for _ in range(COUNT // 100):
                guest.send(_frame(FAR_MAC, mac, marker), 100)
                heard[marker] += _heard(wire, marker)
        assert BURST // (SIZE + 14) - 2 <= heard[b"of a"] <= MOST
        assert heard[b"of b"] == COUNT
        assert refused() == {"slaptap0": COUNT - heard[b"of a"]}
        read = {}
        for marker, guest, mac in ((b"to a", a, A_MAC), (b"to b", b, B_MAC)):
            read[marker] = 0
            for _ in range(COUNT // 100):
                for _ in range(100):
                    wire.send(_frame(mac, FAR_MAC, marker))
                read[marker] += guest.drain(marker)
    assert BURST // (SIZE + 14) - 2 <= read[b"to a"] <= MOST
    assert read[b"to b"] == COUNT
    assert refused() == {"slaptap0": 2 * COUNT - heard[b"of a"] - read[b"to a"]}


def test_routed_taps_and_tuns(known, guests):
    """To the guest and from it, by the same limits as everything else of the partition."""
    desired = limited("slappart0", ranges=False)
    partitions = tuple(
        replace(
            one,
            tap=replace(
                one.tap,
                bridge=None,
                ipv6=tap_ipv6(BASE, one.index, 16),
                ipv4=IPv4Address(f"192.0.2.{100 + one.index}"),
            ),
        )
        for one in desired.partitions
    )
    known.converge(replace(desired, partitions=partitions))
    a, b = guests("slaptap0", "slaptap1")
    for guest, one in ((a, partitions[0]), (b, partitions[1])):
        mac = bytes.fromhex(one.tap.mac.replace(":", ""))
        source, target = one.tap.ipv4.packed, socket.inet_aton(HOST4)
        header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + SIZE, 0, 0, 64, 17, 0, source, target)
        words = struct.unpack("!10H", header)
        total = sum(words)
        total = (total & 0xFFFF) + (total >> 16)
        header = header[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + header[12:]
        udp = struct.pack("!HHHH", 9, 9, 8 + SIZE, 0)
        guest.send(mac + A_MAC + b"\x08\0" + header + udp + bytes(SIZE))
    found = refused()
    assert COUNT - MOST <= found.pop("slaptap0") <= COUNT
    assert found == {}
    read = {}
    for marker, guest, one in ((b"to a", a, partitions[0]), (b"to b", b, partitions[1])):
        address = str(one.tap.ipv4)
        index = known.link(one.tap.name)
        known.ipr.neigh("replace", dst=address, lladdr="02:54:00:00:00:0a", ifindex=index, state="permanent")
        read[marker] = 0
        with endpoint(socket.SOCK_DGRAM, None, address) as sender:
            for _ in range(COUNT // 100):
                for _ in range(100):
                    with suppress(PermissionError):
                        sender.sendto(marker.ljust(SIZE, b"\0"), (address, 9))
                read[marker] += guest.drain(marker)
    assert BURST // (SIZE + 28) - 2 <= read[b"to a"] <= MOST
    assert read[b"to b"] == COUNT


def _nft(*words):
    return subprocess.run(["/usr/sbin/nft", *words], check=True, capture_output=True, text=True).stdout


def objects(kind):
    """Names and handles of what there is, in both tables."""
    found = {}
    for family in ("inet", "bridge"):
        for item in json.loads(_nft("-j", "list", "table", family, "partitiond"))["nftables"]:
            if kind in item and item[kind].get("chain") != "fingerprint":  # our notes
                found[family, item[kind].get("name") or item[kind]["handle"]] = item[kind]["handle"]
    return found


def test_who_becomes_limited_touches_nobody_else(known):
    known.converge(limited())
    before = {kind: objects(kind) for kind in ("rule", "counter", "chain", "map", "set")}
    with sink(known) as port:
        as_user(A, lambda: blast(A6, NEIGHBOUR6, port, 10))
        operations = known.converge(limited("slappart0"))
        (only,) = operations.values()
        assert only.reason.endswith("; slappart0 is to be limited to 160000 bit/s each way")
        as_user(A, lambda: blast(A6, NEIGHBOUR6, port, 10))
    assert packets("out")["slappart0"] == 20
    now = {kind: objects(kind) for kind in before}
    assert now == before, "nothing was made again"
    assert set(objects("limit")) == {
        (family, f"rate/slappart0/{way}/{RATE}") for family in ("inet", "bridge") for way in ("in", "out")
    }
    (other,) = known.converge(limited("slappart0", "slappart1", rate=3000)).values()
    assert "slappart0 is to be limited to 24000 bit/s" in other.reason
    assert "slappart1 is to be limited to 24000 bit/s" in other.reason
    (last,) = known.converge(limited("slappart1", rate=3000)).values()
    assert last.reason.endswith("; slappart0 is not to be limited any more")
    assert {name for _, name in objects("limit")} == {f"rate/slappart1/{way}/3000" for way in ("in", "out")}
    known.converge(limited(rate=3000))
    assert objects("limit") == {}
    assert objects("counter") == before["counter"]
    known.converge(wanted(3, ranges=True))
    assert "quota" not in _nft("list", "table", "inet", "partitiond")
    assert packets("out")["slappart0"] == 20
    known.converge(NOTHING)


def test_a_change_of_elements_alone(known, monkeypatch):
    """No text of nft, which would read the whole table."""
    known.converge(limited())
    monkeypatch.setattr(nftables, "run", pytest.fail)
    for names in (("slappart0",), ("slappart0", "slappart1"), ("slappart1",), ()):
        known.converge(limited(*names))
        assert len(objects("limit")) == 4 * len(names)


def test_both_ways_of_writing_are_the_same(known):
    """Raw elements, and the text of nft that repairs what others have damaged."""
    desired = limited("slappart0", "slappart1")
    known.converge(desired)
    before = {kind: _listing(kind) for kind in ("limits", "maps")}
    nftables.run("flush chain inet partitiond in\n")
    known.converge(desired)
    assert {kind: _listing(kind) for kind in before} == before
    nftables.run("delete table inet partitiond\ndelete table bridge partitiond\n")
    known.converge(desired)
    assert {kind: _listing(kind) for kind in before} == before


def _listing(kind):
    found = []
    for item in json.loads(_nft("-j", "list", kind))["nftables"]:
        for about in item.values():
            about.pop("handle", None)
            about["elem"] = sorted(map(str, about.get("elem", ())))
            found.append(json.dumps(about, sort_keys=True))
    return sorted(found)


OTHER = "{ rate over 5 mbytes/second burst 131072 bytes; }"
OF_A = f"bridge partitiond rate/slappart0/out/{RATE}"
SWAPPED = f"""\
flush map bridge partitiond limited_link_out
delete limit {OF_A}
add limit {OF_A} {OTHER}
add element bridge partitiond limited_link_out {{ "slaptap0" : "rate/slappart0/out/{RATE}" }}
"""


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (f"delete element inet partitiond limited_6_out {{ {A6} }}\n", "map limited_6_out was changed"),
        ("flush map bridge partitiond limited_link_in\n", "map bridge/limited_link_in was changed"),
        (f"delete element inet partitiond over_6 {{ {A6} }}\n", "map over_6 was changed"),
        (SWAPPED, f"limit bridge/rate/slappart0/out/{RATE} was changed"),
        (f"add limit inet partitiond mine {OTHER}\n", "limit mine was changed"),
        ("flush chain bridge partitiond limit_link_out\n", "chain bridge/limit_link_out was changed"),
    ],
)
def test_drift_is_found_and_repaired(known, damage, reason):
    desired = limited("slappart0")
    known.converge(desired)
    before = {kind: _listing(kind) for kind in ("limits", "maps")}
    epoch = read_counters().epoch
    nftables.run(damage)
    operations = known.converge(desired)
    assert read_counters().epoch == epoch, "not at the expense of what is counted"
    assert reason in operations["filter/partitiond"].reason
    assert {kind: _listing(kind) for kind in before} == before
    assert not plan_again(desired)


def plan_again(desired):
    return plan(desired, observe(desired))


def test_nobody_who_may_be_limited_means_no_rules():
    assert render(wanted(3)) == render(wanted(3, limits={}))
    assert render(limited("slappart0")).structure == render(limited()).structure
    assert render(limited("slappart0")).fingerprint != render(limited()).fingerprint


@pytest.mark.parametrize("rate", [0, -1, 12_500_000_001])
def test_rates_that_cannot_be(rate):
    with pytest.raises(NetplanError):
        RateLimit(rate)


def test_the_highest_and_the_lowest_rate_load(known):
    for rate in (1000, 12_500_000_000):
        known.converge(limited("slappart0", rate=rate))
        assert not apply(plan_again(limited("slappart0", rate=rate)))
