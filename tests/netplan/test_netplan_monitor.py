"""What the kernel tells of, on a real kernel: what concerns us is a notice, and nothing else is."""

import contextlib
import os
import socket
import struct
import subprocess
import time
from fcntl import ioctl

import pytest
from mesh_scene import INTERFACE, meshed
from netplan_scene import wanted

from netplan.apply import apply
from netplan.errors import NetplanError
from netplan.monitor import Monitor
from netplan.observe import look, observe
from netplan.plan import plan
from netplan.relevance import LOST, Notice

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 2, 0x1000
NAMES = frozenset(("br0", "slaptap0", "slaptap1"))


def ip(words):
    subprocess.run(["/usr/sbin/ip", *words.split()], check=True, capture_output=True)


def nft(words):
    subprocess.run(["/usr/sbin/nft", words], check=True, capture_output=True)


@pytest.fixture
def listening(node):
    """A node of two partitions, and who listens to it since it is up."""
    desired = wanted(2, ranges=True, local_source_table=True)
    node.converge(desired)
    with Monitor(NAMES) as monitor:
        yield lambda: settled(monitor)


def settled(monitor):
    """Everything that is told until nothing comes any more."""
    found = set()
    quiet = time.monotonic() + 0.1
    while time.monotonic() < quiet:
        new = set(monitor.read())
        if new - found:
            quiet = time.monotonic() + 0.1
        found |= new
        time.sleep(0.005)
    return found


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("link delete slaptap0", Notice("tap/slaptap0", "gone", ours=True)),
        ("link set slaptap0 down", Notice("tap/slaptap0", "changed", ours=True)),
        ("link set slaptap0 nomaster", Notice("tap/slaptap0", "changed", ours=True)),
        ("link set slaptap0 alias mine", Notice("tap/slaptap0", "changed", ours=True)),
        ("link set slaptap0 name renamed", Notice("tap/renamed", "changed", ours=True)),
        ("link set br0 down", Notice("link/br0", "changed", ours=False)),
        ("link set br0 down", Notice("address/2001:db8:1::2", "gone", ours=True)),
        ("link set br0 down", Notice("address/2001:db8:1::1", "gone", ours=False)),
        ("link set eth0 nomaster", Notice("link/eth0", "changed", ours=False)),
        ("address delete 10.0.0.2/32 dev br0", Notice("address/10.0.0.2", "gone", ours=True)),
        ("address delete 2001:db8:1::1/64 dev br0", Notice("address/2001:db8:1::1", "gone", ours=False)),
        (
            "address add 2001:db8:9::1/64 dev br0 nodad",
            Notice("address/2001:db8:9::1", "appeared", ours=False),
        ),
        (
            "address change 2001:db8:1::2/64 dev br0 preferred_lft forever nodad",
            Notice("address/2001:db8:1::2", "changed", ours=True),
        ),
        (
            "-6 route delete local 2001:db8:1:0:4001::/80 dev lo table local",
            Notice("range/2001:db8:1:0:4001::/80", "gone", ours=True),
        ),
        (
            "-6 route replace local 2001:db8:1:0:4001::/80 dev lo table local",
            Notice("range/2001:db8:1:0:4001::/80", "changed", ours=True),
        ),
        ("-6 route flush table 11200", Notice("source/2001:db8:1::2/128", "gone", ours=True)),
        (
            "-6 route delete default via 2001:db8:1::ffff:1 metric 1024",
            Notice("route/default", "gone", ours=False),
        ),
        ("-6 route add default dev br0 metric 5", Notice("route/default", "appeared", ours=False)),
        ("route add default dev br0 metric 77", Notice("route/default", "appeared", ours=False)),
        ("-6 rule delete pref 0", Notice("rule/local-source", "gone", ours=True)),
        ("-6 rule add pref 0 table local", Notice("rule/local-source", "changed", ours=False)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.cause,
)
def test_damage_is_told_with_what_it_damaged(listening, damage, expected):
    assert listening() == set()
    ip(damage)
    assert expected in listening()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("link delete sltinc", Notice("mesh/sltinc", "gone", ours=True)),
        ("link set sltinc down", Notice("mesh/sltinc", "changed", ours=True)),
        ("link set sltinc alias mine", Notice("mesh/sltinc", "changed", ours=True)),
        ("address delete 10.64.2.3/32 dev sltinc", Notice("address/10.64.2.3", "gone", ours=True)),
        ("address add 10.64.2.77/32 dev sltinc", Notice("address/10.64.2.77", "appeared", ours=False)),
        ("route delete 10.64.0.0/16 metric 112", Notice("route/10.64.0.0/16", "gone", ours=True)),
        (
            "route delete unreachable 10.64.0.0/16 metric 11200",
            Notice("unreachable/10.64.0.0/16", "gone", ours=True),
        ),
        (
            "route replace 10.64.0.0/16 dev br0 metric 112",
            Notice("route/10.64.0.0/16", "changed", ours=True),
        ),
        ("route flush table 11200", Notice("source/10.64.2.2/32", "gone", ours=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.cause,
)
def test_damage_to_the_mesh_is_told(node, damage, expected):
    desired = meshed(2, tap=False, local_source_table=True)
    node.converge(desired)
    with Monitor(NAMES | {INTERFACE}) as monitor:
        assert settled(monitor) == set()
        ip(damage)
        assert expected in settled(monitor)
    apply(plan(desired, observe(desired)))
    left = {one.id for one in plan(desired, observe(desired))}
    assert left <= {"address/10.64.2.77"}, left


@pytest.mark.parametrize(
    ("damage", "change"),
    [
        ("flush ruleset", "gone"),
        ("delete table inet partitiond", "gone"),
        ("flush table inet partitiond", "changed"),
        ("add chain inet partitiond another", "changed"),
        ("flush map inet partitiond ipv4_remote_in", "changed"),
    ],
)
def test_whatever_happens_to_our_rules_is_told(listening, damage, change):
    nft(damage)
    assert Notice("filter/partitiond", change, ours=True) in listening()


@pytest.mark.parametrize(
    "harmless",
    [
        "link add other0 type veth peer name other1",
        "link set lo mtu 60000",
        "route add 198.51.100.9/32 dev br0",
        "address add 192.0.2.77/24 dev lo",
        "address add fe80::77/64 dev br0 nodad",
        "route add 198.51.100.0/24 dev br0",
        "-6 route add 2001:db8:77::/64 dev br0",
        "-6 rule add pref 100 from 2001:db8:77::/64 table 77",
        "rule add pref 100 table 77",
        "neighbour add 192.0.2.99 lladdr 52:54:00:00:00:99 dev br0",
    ],
)
def test_what_others_do_is_no_notice(listening, harmless):
    ip(harmless)
    assert listening() == set()


def test_what_others_do_to_their_own_rules_is_no_notice(listening):
    nft("add table inet theirs")
    nft("add chain inet theirs input { type filter hook input priority 0; }")
    nft("add table ip partitiond")  # of another family: not ours
    nft("delete table inet theirs")
    assert listening() == set()


@contextlib.contextmanager
def machine_on(tap):
    """What a virtual machine does when it begins: open its tap."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    try:
        ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", tap.encode(), IFF_TAP | IFF_NO_PI))
        yield
    finally:
        os.close(descriptor)


def test_a_machine_that_comes_and_goes_is_no_notice(listening):
    def carrier():
        shown = ["/usr/sbin/ip", "link", "show", "slaptap0"]
        return subprocess.run(shown, check=True, capture_output=True, text=True).stdout

    assert "NO-CARRIER" in carrier()
    for _ in range(3):
        with machine_on("slaptap0"):
            assert "LOWER_UP" in carrier()
            assert listening() == set()
        assert "NO-CARRIER" in carrier()
        assert listening() == set()


def test_marked_routes_and_rules_of_every_family_are_ours(listening):
    """As routed taps and routable IPv4 have them."""
    ip("route add 198.51.100.7/32 dev br0 proto 112")
    assert listening() == {Notice("route/198.51.100.7/32", "appeared", ours=True)}
    ip("route replace 198.51.100.7/32 dev br0 proto static")
    assert listening() == {Notice("route/198.51.100.7/32", "changed", ours=True)}
    ip("route replace 198.51.100.7/32 dev br0 proto 112")
    ip("route delete 198.51.100.7/32 dev br0")
    assert Notice("route/198.51.100.7/32", "gone", ours=True) in listening()
    ip("route add default dev br0 table 11201 proto 112")
    assert listening() == {Notice("gateway/11201/default", "appeared", ours=True)}
    ip("rule add from 198.51.100.7 table 11201 proto 112")
    assert listening() == {Notice("rule/from-198.51.100.7", "changed", ours=True)}
    ip("rule delete from 198.51.100.7 table 11201")
    assert listening() == {Notice("rule/from-198.51.100.7", "gone", ours=True)}


def test_an_address_that_is_said_once_more_is_no_notice(listening):
    """As each router advertisement does."""
    ip("address add 2001:db8:9::1/64 dev br0 nodad")
    assert listening()
    ip("address replace 2001:db8:9::1/64 dev br0 nodad")
    assert listening() == set()


def test_an_interface_made_anew_is_known_by_its_name(listening):
    ip("link delete br0")
    assert Notice("link/br0", "gone", ours=False) in listening()
    ip("link add br0 type bridge")
    assert Notice("link/br0", "appeared", ours=False) in listening()
    ip("address add 2001:db8:1::1/64 dev br0 nodad")
    assert Notice("address/2001:db8:1::1", "appeared", ours=False) in listening()


def test_what_was_changed_before_the_call_is_in_its_answer(node):
    """The promise on which a look that answers notices stands."""
    node.converge(wanted(2))
    with Monitor(NAMES) as monitor:
        for _ in range(20):
            ip("link set slaptap0 down")
            assert "tap/slaptap0" in {notice.cause for notice in monitor.read()}
            ip("link set slaptap0 up")
            assert "tap/slaptap0" in {notice.cause for notice in monitor.read()}


def test_lost_notices_are_told_as_such_and_listening_goes_on(node):
    node.converge(wanted(2))
    with Monitor(NAMES) as monitor:

        def queue(size):
            for descriptor in monitor.filenos():
                with socket.socket(fileno=os.dup(descriptor)) as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

        queue(1)
        for _ in range(10):
            ip("link set slaptap0 down")
            ip("link set slaptap0 up")
        queue(1 << 20)
        assert LOST in monitor.read()
        assert settled(monitor) == set()
        ip("link set slaptap0 down")
        assert settled(monitor) == {Notice("tap/slaptap0", "changed", ours=True)}


def test_what_was_lost_stays_so_until_all_was_read_anew(node, monkeypatch):
    node.converge(wanted(1))
    with Monitor(NAMES) as monitor:
        for descriptor in monitor.filenos():
            with socket.socket(fileno=os.dup(descriptor)) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for _ in range(10):
            ip("link set slaptap0 down")
            ip("link set slaptap0 up")
        with monkeypatch.context() as patch:

            def changing(_):
                raise NetplanError("network.netlink", "the network keeps changing")

            patch.setattr("netplan.rtnetlink.links", changing)
            for _ in range(2):
                with pytest.raises(NetplanError):
                    monitor.read()
        assert monitor.read()[-1] == LOST
        assert LOST not in monitor.read()


def test_other_names_can_be_listened_for(node):
    node.converge(wanted(1))
    with Monitor(NAMES) as monitor:
        monitor.attend(NAMES | {"eth0"})
        ip("link set eth0 down")
        assert Notice("link/eth0", "changed", ours=False) in settled(monitor)


def test_of_a_link_that_begins_to_matter_its_addresses_do_too(node):
    node.converge(wanted(1))
    ip("link add other type bridge")
    ip("link set other up")
    ip("address add 192.0.2.77/32 dev other")
    with Monitor(NAMES) as monitor:
        monitor.attend(NAMES | {"other"})
        ip("address del 192.0.2.77/32 dev other")
        assert settled(monitor) == {Notice("address/192.0.2.77", "gone", ours=False)}
        monitor.attend(NAMES)
        ip("address add 192.0.2.78/32 dev other")
        assert settled(monitor) == set()


def test_the_links_that_were_told_of_are_those_that_a_dump_lists(node):
    node.converge(wanted(2))
    with Monitor(NAMES) as monitor:
        node.converge(wanted(4))
        ip("link add other type bridge")
        ip("link set slaptap1 down")
        ip("link delete slaptap0")
        ip("link set other name another")
        monitor.read()
        assert look(monitor.links()) == look()
        # of what is set on a link that is down the kernel does not tell
        ip("link set another alias something")
        ip("tuntap add slaptap9 mode tap user 4711")
        ip("link delete slaptap1")
        monitor.read()
        assert look(monitor.links()) == look()
