"""What is received at the node's own addresses has two counters, and the better one comes and goes: nothing counts twice."""

import contextlib
import os

import pytest
from network_scene import NEIGHBOUR4, NEIGHBOUR6, NODE4, NODE6
from traffic_flows import HEADERS, bound, echo
from traffic_scene import PORT

from netplan import bpf_state, bpf_syscall
from netplan.bpf_programs import RECEIVED

ONE = 1
ENDS = {"host": (NODE4, NEIGHBOUR4, 4), "host6": (NODE6, NEIGHBOUR6, 6)}


@pytest.fixture
def scene(make_scene):
    with make_scene(2, ()) as made:
        made.agent("echo", echo([NEIGHBOUR4, NEIGHBOUR6], PORT + 1), far=True)
        made.begin()
        yield made


class Askers:
    """Sockets of a partition's user at the node's own addresses; ``exchanged`` is what went and came, each."""

    def __init__(self, scene, stack):
        self.scene, self.sockets, self.exchanged, self.number = scene, {}, {}, 0
        for kind, (own, far, _) in ENDS.items():
            os.seteuid(scene.partitions[ONE].uid)
            try:
                for connected in (True, False):
                    one = self.sockets[kind, connected] = stack.enter_context(bound(own))
                    one.settimeout(10)
                    if connected:
                        one.connect((far, PORT + 1))
            finally:
                os.seteuid(0)

    def ask(self, *, connected):
        for kind, (_, far, version) in ENDS.items():
            self.number += 1
            one, size = self.sockets[kind, connected], 100 + self.number
            one.sendto(bytes(size), (far, PORT + 1))
            assert len(one.recv(2000)) == size
            packets, octets = self.exchanged.get(kind, (0, 0))
            self.exchanged[kind] = packets + 1, octets + size + HEADERS[version]

    def right(self):
        """Every pass of the ledger must have exactly that."""
        self.scene.a_pass()
        counted, _ = self.scene.counted()
        found = {
            (kind, way): counted[self.scene.label(ONE, kind, "remote", way)]
            for kind in ENDS
            for way in ("in", "out")
        }
        return found == {(kind, way): self.exchanged[kind] for kind in ENDS for way in ("in", "out")}


def in_force():
    return bpf_state._place(bpf_state._cookie()) / bpf_state.version(ingress_everywhere=False)


def detach():
    with bpf_syscall.pinned(str(in_force() / "ingress")) as link:
        bpf_syscall.detach(link)


def another_version():
    """As if another partitiond had loaded them: they count still, and this one does not read them."""
    in_force().rename(in_force().with_name("0123456789abcdef"))


def without_map():
    (in_force() / RECEIVED).unlink()


@pytest.mark.parametrize("harm", [detach, another_version, without_map, bpf_state.remove_hooks])
@pytest.mark.parametrize("passes", [frozenset("abcd"), frozenset("bd"), frozenset("d"), frozenset("ad")])
def test_programs_that_go_and_come(scene, harm, passes):
    """With a pass in each of the times between, or not in all."""
    with contextlib.ExitStack() as stack:
        askers = Askers(scene, stack)
        askers.ask(connected=True)
        askers.ask(connected=False)
        assert askers.right()
        for _ in range(2):
            for when, change in (("a", None), ("b", harm), ("c", scene.restore), ("d", None)):
                askers.ask(connected=True)
                if change is not None:
                    change()
                    assert bool(bpf_state.read_received().epoch) == (change != harm)
                askers.ask(connected=True)
                if when in passes:
                    assert askers.right(), when
        askers.ask(connected=False)
        assert askers.right()
        assert scene.counted()[1], "nobody was told that something may be missing"


def test_a_node_that_had_no_second_counter(scene, monkeypatch):
    """As with an older partitiond, or on an older kernel: the packet filter's, and then that of the programs."""
    with contextlib.ExitStack() as stack:
        askers = Askers(scene, stack)
        with monkeypatch.context() as patch:
            patch.setattr("partitiond.metering.read_received", lambda: bpf_state.ReceivedShared("", {}))
            for _ in range(3):
                askers.ask(connected=True)
                assert askers.right()
            known = dict(askers.exchanged)
            askers.ask(connected=False)
            assert not askers.right(), "the packet filter sees as much: then nothing is shown here"
        askers.ask(connected=True)
        scene.a_pass()
        before, _ = scene.counted()
        askers.exchanged = {}
        for _ in range(3):
            askers.ask(connected=False)
            scene.a_pass()
        after, gaps = scene.counted()
        assert not gaps
        for kind in ENDS:
            label = scene.label(ONE, kind, "remote", "in")
            assert before[label][0] == known[kind][0] + 1
            came = tuple(b - a for a, b in zip(before[label], after[label], strict=True))
            assert came == askers.exchanged[kind]
