"""Every byte stands in the account of who sent it and of who got it, with the right address and scope, and in no other.

20 × 20 partitions: each sends a datagram of a size of its own to each, over every kind of address, and to the neighbour and
from there.  After each sender the ledger is read: all that it has more than before must be what this sender's datagrams make.
"""

import contextlib
import os
import traceback
from collections import Counter
from itertools import product

import pytest
from network_scene import NEIGHBOUR4, NEIGHBOUR6, NODE4, NODE6, inside
from traffic_flows import HEADERS, bound, echo
from traffic_scene import PORT

COUNT, ROUTABLE = 20, range(10)
NAMES = {"ipv6": "IPv6", "range": "IPv6 range", "routable": "routable IPv4"}
WORLDS = tuple(NAMES)


class Ledgers:
    """What the ledger adds from one look to the next, beside what was to be expected."""

    def __init__(self, scene):
        self.scene = scene
        self.last = self._look()
        self.rows = {}

    def _look(self):
        self.scene.a_pass()
        counted, gaps = self.scene.counted()
        assert not gaps
        taps = self.scene.taps()
        return Counter(
            {
                (label, place): value
                for label, values in counted.items()
                for place, value in enumerate(values)
                if label[1] not in taps
            }
        )

    def see(self, row, packets):
        """Compare with packets [(labels, size)]; keep the sums by what they are about."""
        expected = Counter()
        for labels, size in packets:
            for label in labels:
                expected[label, 0] += 1
                expected[label, 1] += size
        now = self._look()
        wrong = Counter()
        for label, place in expected.keys() | now.keys() | self.last.keys():
            difference = now[label, place] - self.last[label, place] - expected[label, place]
            if difference:
                wrong[label, place] = difference
        self.last = now
        sums = self.rows.setdefault(row, [0, 0, 0, 0])
        sums[0] += len(packets)
        sums[1] += sum(size for _, size in packets)
        sums[2] += sum(abs(value) for (_, place), value in wrong.items() if place)
        sums[3] += sum(abs(value) for (_, place), value in wrong.items() if not place)
        return wrong

    def lines(self):
        yield f"{'kind':<44}{'packets':>9}{'bytes':>12}{'wrong bytes':>13}{'wrong packets':>15}"
        for row, sums in self.rows.items():
            yield f"{row:<44}" + "".join(
                f"{one:>{width}}" for one, width in zip(sums, (9, 12, 13, 15), strict=True)
            )


def payload(sender, receiver):
    """No two pairs have the same."""
    return 100 + COUNT * sender + receiver


def send(scene, user, items):
    """Send datagrams [(source or None, target, payload, perhaps a port)] as the user of a partition; None: from the wire, as
    root.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with contextlib.ExitStack() as stack:
                if user is None:
                    stack.enter_context(inside(scene.wire.name))
                else:
                    uid = scene.partitions[user].uid
                    os.setgroups([])
                    os.setgid(uid)
                    os.setuid(uid)
                for source, target, size, *port in items:
                    with bound(source, target=target) as one:
                        one.sendto(bytes(size), (target, *(port or [PORT])))
        except BaseException:  # noqa: BLE001 - told to the test
            os.write(writing, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    assert not said, said


def length(address, size):
    return size + HEADERS[6 if ":" in address else 4]


def between(scene, kind, sender, *, unbound=False):
    """What one partition sends to all: (items to send, packets to expect)."""
    items, packets = [], []
    receivers = ROUTABLE if kind == "routable" else [sender] if kind == "ipv4" else range(COUNT)
    for receiver in receivers:
        target, size = scene.address(receiver, kind), payload(sender, receiver)
        items.append((None if unbound else scene.address(sender, kind), target, size))
        labels = [scene.label(sender, kind, "local", "out"), scene.label(receiver, kind, "local", "in")]
        packets.append((labels, length(target, size)))
    return items, packets


def senders(kind):
    return ROUTABLE if kind == "routable" else range(COUNT)


@pytest.fixture
def scene(make_scene, request):
    with (
        make_scene(COUNT, ROUTABLE, **getattr(request, "param", {})) as made,
        contextlib.ExitStack() as stack,
    ):
        made.sinks(stack)
        yield made


def test_each_pair_within_the_node(scene, table):
    ledgers, wrong = Ledgers(scene), {}
    for kind in (*WORLDS, "ipv4"):
        for sender in senders(kind):
            items, packets = between(scene, kind, sender)
            send(scene, sender, items)
            row = "private IPv4, to itself" if kind == "ipv4" else f"{NAMES[kind]} to each"
            wrong[kind, sender] = ledgers.see(row, packets)
    for kind in ("ipv6", "routable"):
        for sender in senders(kind):
            items, packets = between(scene, kind, sender, unbound=True)
            send(scene, sender, items)
            wrong[kind, sender, "unbound"] = ledgers.see(f"{NAMES[kind]} to each, bound to nothing", packets)
    remote(scene, ledgers, wrong)
    table(f"attribution: {COUNT} × {COUNT} partitions", ledgers.lines())
    assert not {which: one for which, one in wrong.items() if one}
    assert ledgers.rows["IPv6 to each"][0] == COUNT * COUNT


def remote(scene, ledgers, wrong):
    """Each partition with the neighbour."""
    for kind in WORLDS:
        far = NEIGHBOUR4 if kind == "routable" else NEIGHBOUR6
        for index in senders(kind):
            size, address = payload(index, 0), scene.address(index, kind)
            send(scene, index, [(address, far, size)])
            packets = [([scene.label(index, kind, "remote", "out")], length(far, size))]
            wrong[kind, index, "out"] = ledgers.see(f"{NAMES[kind]} to the neighbour", packets)
        items = [(None, scene.address(index, kind), payload(0, index)) for index in senders(kind)]
        packets = [
            ([scene.label(index, kind, "remote", "in")], length(far, payload(0, index)))
            for index in senders(kind)
        ]
        send(scene, None, items)
        wrong[kind, "in"] = ledgers.see(f"{NAMES[kind]} from the neighbour", packets)
    for index in range(COUNT):
        own4 = "routable" if index in ROUTABLE else "host"
        send(scene, index, [(None, NEIGHBOUR6, payload(index, 1)), (None, NEIGHBOUR4, payload(index, 2))])
        packets = [
            ([scene.label(index, "ipv6", "remote", "out")], length(NEIGHBOUR6, payload(index, 1))),
            ([scene.label(index, own4, "remote", "out")], length(NEIGHBOUR4, payload(index, 2))),
        ]
        wrong[index, "unbound"] = ledgers.see("to the neighbour, bound to nothing", packets)
    shared(scene, ledgers, wrong)


def shared(scene, ledgers, wrong):
    """The node's own addresses, by who used them: as a client, connected and not, and as a server."""
    scene.agent("echo", echo([NEIGHBOUR4, NEIGHBOUR6], PORT + 1), far=True)
    scene.begin()
    for (kind, own, far), (words, connected) in product(
        (("host", NODE4, NEIGHBOUR4), ("host6", NODE6, NEIGHBOUR6)),
        (("there and back", True), ("there and back, not connected", False)),
    ):
        for index in range(COUNT):
            size = payload(index, 3)
            there_and_back(scene, index, (own, far), size, connected=connected)
            ways = [[scene.label(index, kind, "remote", way)] for way in ("out", "in")]
            packets = [(label, length(far, size)) for label in ways]
            row = f"the node's IPv{6 if kind == 'host6' else 4}, {words}"
            wrong[index, kind, words] = ledgers.see(row, packets)
    scene.stop()
    with contextlib.ExitStack() as stack:
        scene.sinks_of_the_node(stack, range(COUNT))
        for kind, own in (("host", NODE4), ("host6", NODE6)):
            items = [(None, own, payload(index, 4), PORT + index) for index in range(COUNT)]
            packets = [
                ([scene.label(index, kind, "remote", "in")], length(own, payload(index, 4)))
                for index in range(COUNT)
            ]
            send(scene, None, items)
            wrong[kind, "served"] = ledgers.see("to servers at the node's own addresses", packets)


def there_and_back(scene, index, ends, size, *, connected):
    own, far = ends
    os.seteuid(scene.partitions[index].uid)
    try:
        one = bound(own)
    finally:
        os.seteuid(0)
    with one:
        one.settimeout(10)
        if connected:
            one.connect((far, PORT + 1))
        one.sendto(bytes(size), (far, PORT + 1))
        assert len(one.recv(2000)) == size


@pytest.mark.parametrize("scene", [{"address_ownership": "off"}], indirect=True)
def test_without_ownership_it_is_found_wrong(scene, table):
    """The comparison can fail: whoever binds nothing has the other's address as its source, who is charged for both ways."""
    ledgers = Ledgers(scene)
    for sender in range(3):
        items, packets = between(scene, "ipv6", sender, unbound=True)
        send(scene, sender, items)
        ledgers.see("for comparison, unbound, ownership off", packets)
    table(f"attribution: {COUNT} × {COUNT} partitions", ledgers.lines())
    (sums,) = ledgers.rows.values()
    assert sums[2] > sums[1] / 2
