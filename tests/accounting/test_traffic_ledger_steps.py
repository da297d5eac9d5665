"""The ledger's file is struck at every step of opening it, recording a pass and closing it: counted stays what was sent.

A step is a system call about the file or its log.  Before each strike partitions send what was not sent before; the child that
is struck meters it, the next pass is the test's, and every account has to be as it should to the byte.
"""

import contextlib
import errno
import os
import signal
from collections import Counter

import pytest
from traced_child import CAN_FAIL, struck
from traffic_flows import HEADERS, bound

from accounting.errors import AccountingError
from partitiond import lanes
from partitiond.context import Context
from partitiond.metering import ledger_path

MOST_STEPS = 400


@pytest.fixture(scope="module")
def scene(make_scene):
    with make_scene(2, (0, 1)) as made:
        yield made


class Burst:
    """Some datagrams of two partitions, of a size of their own; ``sent`` is all of them."""

    def __init__(self, scene, stack):
        self.scene, self.sent, self.number = scene, Counter(), 0
        scene.sinks(stack)
        self.flows = []
        for sender, other in ((0, 1), (1, 0)):
            for labels, (source, target, port) in scene.flows(sender, other).items():
                os.seteuid(scene.partitions[sender].uid)
                try:
                    self.flows.append((labels, stack.enter_context(bound(source)), (target, port)))
                finally:
                    os.seteuid(0)

    def __call__(self):
        self.number += 1
        for place, (labels, one, target) in enumerate(self.flows):
            size = (self.number * 7 + place) % 1300
            one.sendto(bytes(size), target)
            for label in labels:
                self.sent[label, 0] += 1
                self.sent[label, 1] += size + HEADERS[6 if ":" in target[0] else 4]


@pytest.fixture
def burst(scene):
    with contextlib.ExitStack() as stack:
        made = Burst(scene, stack)
        stack.callback(scene.context.meters.close)
        yield made


def a_pass(scene):
    """One by a process that opens the ledger, and closes it at the end."""
    scene.a_pass()
    scene.context.meters.close()


def added(scene, before):
    """What the ledger has more than before, where it is anything."""
    after, gaps = scene.counted()
    assert not gaps
    found = Counter()
    for label, values in after.items():
        for place, value in enumerate(values):
            found[label, place] = value - before.get(label, (0, 0))[place]
    return {key: value for key, value in found.items() if value and key[0][1] not in scene.taps()}


def strike_all(scene, burst, body, how, stride=1):
    """Strike at each step in turn (or each so many), and compare after each; return how many there were."""
    a_pass(scene)
    before, _ = scene.counted()
    for step in range(0, MOST_STEPS, stride):
        earlier = dict(burst.sent)
        burst()
        reached = struck(body, str(ledger_path(scene.node.state)), step, how)
        # the pass that was struck is there, or it is not
        assert added(scene, before) in (earlier, burst.sent), f"step {step}: half a pass"
        a_pass(scene)
        assert added(scene, before) == burst.sent, f"step {step}: something was lost or counted twice"
        if not reached:
            return step
    raise AssertionError("no end of steps")


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.full)])
def test_killed_at_each_step(scene, burst, table, stride):
    def meter():
        own = Context.of(scene.context.config)
        own.node = scene.found
        lanes.usage(own)
        own.meters.close()

    steps = strike_all(scene, burst, meter, signal.SIGKILL, stride)
    assert steps > 30
    table(f"conservation: the ledger's write, each {stride}. step", [told("killed", steps, burst)])


@pytest.mark.skipif(not CAN_FAIL, reason="how a system call is made to fail is known here of x86-64 alone")
@pytest.mark.parametrize(
    "how", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.full)], ids=["ENOSPC", "EIO"]
)
def test_each_step_fails(scene, burst, table, how):
    def meter():
        own = Context.of(scene.context.config)
        own.node = scene.found
        for _ in range(2):  # the same daemon's next pass makes up for it
            with contextlib.suppress(AccountingError):
                lanes.usage(own)
        own.meters.close()

    steps = strike_all(scene, burst, meter, how)
    assert steps > 8
    table("conservation: the ledger's write", [told(f"failed ({errno.errorcode[how]})", steps, burst)])


def told(what, steps, burst):
    packets, octets = (
        sum(value for (_, place), value in burst.sent.items() if place == one) for one in (0, 1)
    )
    return f"{what} at each of {steps} system calls: {packets} packets, {octets} bytes sent and counted, 0 lost, 0 double"
