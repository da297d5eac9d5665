"""Counted is what was sent, to the packet and the byte, whatever befalls the packet filter, the daemon and the ledger.

Real sockets of partition users, real frames of a guest, a real neighbour; the senders' own sums are the truth, for TCP those of
nft tables of the tests' own, in the neighbour's network and in the node's, which nobody else touches.
"""

import contextlib
import time

import pytest
from accounting_world import back_to_version_1
from traffic_scene import CHURN, DATAGRAMS, HOSTS, ROUTABLE, STAY, compare

from netplan import counters, nftables
from partitiond.metering import ledger_path

DAEMON_KILLS = 8
NAIVE_PASSES = 60


@pytest.fixture(scope="module")
def scene(make_scene):
    with make_scene(STAY + CHURN, ROUTABLE) as made:
        yield made


@pytest.fixture
def traffic(scene):
    """Everybody is ready to send; gives the scene."""
    with contextlib.ExitStack() as stack:
        scene.oracle_up()
        stack.callback(scene.oracle_down)
        scene.sinks(stack)
        scene.sinks_of_the_node(stack, [DATAGRAMS])
        scene.start_datagrams()
        scene.start_streams()
        scene.start_guests()
        try:
            scene.a_pass()
            scene.before, _ = scene.counted()
            yield scene
        finally:
            for agent in scene.agents:
                agent.kill()
            scene.agents = []
            scene.restore()
            scene.context.meters.close()


def told(scene, *, refusals=0):
    """Stop all, and return {label: (packets, bytes)} that were sent; the oracle must agree with the senders."""
    said, refused = scene.stop()
    assert refused <= refusals
    seen = scene.seen_by_oracle()
    own = {label: said[label] for label in scene.datagram_labels()}
    assert own == {label: seen[label] for label in own}, (
        "the senders and the oracle differ: the test is wrong"
    )
    streams = {label: seen[label] for label in scene.stream_labels()}
    idle = [label for label, sent in (said | streams).items() if not all(sent)]
    assert not idle, f"nothing went over {idle}"
    return said | streams


def _quiet(scene):
    """Addresses over which nothing goes: those of partitions that stay and send by others."""
    return {scene.label(index, kind, "", "")[1] for index in (4, 5) for kind in ("ipv6", "range", "ipv4")}


def row_of(scene):
    """What a label is called in the table."""
    streams = set(scene.stream_labels())
    names = {}
    for index, one in enumerate(scene.partitions):
        network = one.network
        names[str(network.ipv6.ip)] = "IPv6"
        names[str(network.ipv6_range)] = "IPv6 range"
        names[str(network.ipv4)] = "IPv4, private"
        names[network.tap.name] = "tap"
        if index in ROUTABLE:
            names[str(network.routable_ipv4.interface.ip)] = "IPv4, routable"
    names |= {HOSTS["host"]: "IPv4, the node's", HOSTS["host6"]: "IPv6, the node's"}

    def row(label):
        _, address, scope, way = label
        protocol = "frames" if names[address] == "tap" else "TCP" if label in streams else "UDP"
        return names[address], scope, protocol, way

    return row


def lines(rows):
    """The table; sums at its end."""
    yield (
        f"{'family':<18}{'scope':<8}{'protocol':<10}{'way':<5}{'packets sent':>13}{'bytes sent':>14}"
        f"{'packets counted':>17}{'bytes counted':>15}{'lost':>9}{'double':>9}"
    )
    whole = [0] * 6
    for (family, scope, protocol, way), row in sorted(rows.items()):
        values = (*row.sent, *row.counted, row.lost, row.double)
        whole = [a + b for a, b in zip(whole, values, strict=True)]
        yield f"{family:<18}{scope:<8}{protocol:<10}{way:<5}" + _numbers(values)
    yield f"{'all':<41}" + _numbers(whole)


def _numbers(values):
    return "".join(f"{value:>{width}}" for value, width in zip(values, (13, 14, 17, 15, 9, 9), strict=True))


def judged(scene, sent, table, title):
    """Print what was counted beside what was sent, and fail where they differ by anything."""
    scene.restore()
    scene.a_pass()
    after, gaps = scene.counted()
    rows = compare(sent, scene.before, after, row_of(scene))
    table(title, lines(rows))
    for row, found in rows.items():
        assert found.sent == found.counted, (row, found)
        assert (found.lost, found.double) == (0, 0), (row, found)
    assert not gaps
    others = {
        label: count
        for label, count in after.items()
        if label not in sent and label[1] in _quiet(scene) and count != scene.before.get(label, (0, 0))
    }
    assert not others, f"counted, and nobody sent it: {others}"


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.full)])
def test_the_filter_is_loaded_anew_and_the_meter_killed(traffic, table, kills):
    """The lane of the daemon that meters, killed with SIGKILL at any moment, between loads of the whole filter."""
    scene = traffic
    before = scene.reloads
    scene.begin()
    for _ in range(kills):
        child = scene.start_meter()
        scene.change_filter()
        scene.change_filter()
        time.sleep(scene.dice.random() / 50)
        scene.kill(child)
    sent = told(scene)
    title = f"conservation: {scene.reloads - before} loads of the filter, the meter killed {kills} times"
    judged(scene, sent, table, title)


def daemons_killed(scene, table, kills):
    first = scene.passes()
    scene.begin()
    for _ in range(kills):
        daemon = scene.start_daemon()
        scene.break_filter()  # it is told so by the kernel, and loads it anew
        time.sleep(scene.dice.random() * 0.8)
        scene.kill_daemon(daemon)
    sent = told(scene)
    assert scene.passes() - first > kills / 2, "hardly a daemon lived to its first pass"
    judged(scene, sent, table, f"conservation: the daemon killed {kills} times")


def test_the_daemon_is_killed(traffic, table):
    daemons_killed(traffic, table, DAEMON_KILLS)


def test_the_ledger_is_upgraded(traffic, table):
    """From version 1, between loads of the whole filter: levels are the kernel's, whoever wrote them down."""
    scene = traffic
    scene.begin()
    for _ in range(5):
        time.sleep(scene.dice.random() / 5)
        scene.a_pass()
        scene.context.meters.close()
        back_to_version_1(ledger_path(scene.node.state))
        scene.change_filter()
    sent = told(scene)
    judged(scene, sent, table, "conservation: the ledger brought from version 1 to 2 five times")


@pytest.mark.full
def test_a_hundred_daemons_are_killed(traffic, table):
    daemons_killed(traffic, table, 100)


class NaiveMeter:
    """Read, delete the table, load it anew, add up: what the counters count in between is nobody's."""

    def __init__(self, scene):
        self.scene, self.sums = scene, {}

    def take(self, *, anew=True):
        reading = counters.read_counters()
        if anew:
            nftables.run("delete table inet partitiond\n")
            self.scene.restore()
        for one in reading.traffic:
            kind = "routable" if one.family == "routable4" else one.family
            for way, packets, octets in (
                ("in", one.packets_in, one.bytes_in),
                ("out", one.packets_out, one.bytes_out),
            ):
                label = self.scene.label(int(one.partition.removeprefix("slappart")), kind, one.scope, way)
                before = self.sums.get(label, (0, 0))
                self.sums[label] = before[0] + packets, before[1] + octets


def test_a_naive_meter_loses(traffic, table):
    """The same traffic and the same comparison: they find it out."""
    naive = NaiveMeter(traffic)
    naive.take()
    naive.sums = {}
    traffic.begin()
    for _ in range(NAIVE_PASSES):
        naive.take()
        time.sleep(traffic.dice.random() / 50)
    sent = {label: count for label, count in told(traffic).items() if label in naive.sums}
    naive.take(anew=False)
    rows = compare(sent, {}, naive.sums, row_of(traffic))
    table(f"for comparison, a naive meter: {NAIVE_PASSES} times read, deleted and made anew", lines(rows))
    assert len(rows) > 20
    assert sum(row.lost for row in rows.values()) > 100
    assert not any(row.double for row in rows.values())
