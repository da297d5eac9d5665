"""A node that is cut off from its master and from everybody, and comes back.

How an hour is simulated: the rhythm of the lanes, which is what an hour is about, with a clock of its own over the whole hour,
for many nodes; and the real thing, with intervals of a second for five minutes, cut off for some seconds.
"""

import json
import random
import statistics
import time

import pytest
from nodes_eyes import STATE, asked, buildouts, cases, events, programs
from nodes_world import until

from partitiond.polling import JITTER, LONGEST_PAUSE, Pace
from partitiond.wishes import Wishes
from slap_client.documents import ComputerDocument
from slap_client.errors import SlapError

HOUR, INTERVAL = 3600.0, 300.0
# SlapClient's: who is cut off hears no refusal, so each question waits for its end
WAIT = 60.0
# the backoff's longest pause, a fifth more for the jitter of lanes (polling.Pace.bad), and a question that was under way
PROMISED = WAIT + LONGEST_PAUSE * 1.2
_SEND = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    receiver.bind((sys.argv[1], 0))
    receiver.settimeout(10)
    sender.bind((sys.argv[1], 0))
    for _ in range(int(sys.argv[2])):
        sender.sendto(bytes(1000), receiver.getsockname())
        receiver.recv(2000)
"""


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Master:
    """A master as a node's lanes see it, away from ``lost`` to ``back``; ``heard`` are the times of its answers."""

    posted = 0

    def __init__(self, clock, lost, back):
        self.clock, self.lost, self.back = clock, lost, back
        self.heard, self.tries = [], 0

    def computer(self):
        if self.lost <= self.clock.now < self.back:
            self.clock.now += WAIT
            self.tries += 1
            raise SlapError("slap.timeout", "no answer in time", retryable=True)
        self.heard.append(self.clock.now)
        return ComputerDocument("COMP-1")


def an_hour(seed):
    """Seconds from the return to the first answer, to the last lane's first one, and how often it was asked in vain."""
    dice = random.Random(seed)  # noqa: S311 - the same each time
    clock = Clock()
    lost = 1000 + dice.uniform(0, INTERVAL)
    master, wishes = Master(clock, lost, lost + HOUR), Wishes(clock=clock)
    paces = {name: Pace(INTERVAL, random.Random(dice.random()), 0.5) for name in ("software", "instances")}  # noqa: S311
    due = dict.fromkeys(paces, 0.0)
    passed = dict.fromkeys(paces, 0.0)

    def answered(lane):
        for name, pace in paces.items():
            if name != lane and pace.joins(due[name] - clock.now):
                due[name] = clock.now

    wishes.answered = answered
    while min(passed.values()) < master.back:
        name = min(due, key=due.get)
        clock.now = max(clock.now, due[name])
        try:
            wishes.ask(master, name, INTERVAL)
        except SlapError as error:
            due[name] = clock.now + paces[name].bad(error.retry_after)
        else:
            passed[name] = clock.now
            due[name] = clock.now + paces[name].good()
    first = next(at for at in master.heard if at >= master.back)
    return first - master.back, max(passed.values()) - master.back, master.tries


def test_an_hour_of_the_lanes(capsys):
    found = [an_hour(seed) for seed in range(500)]
    firsts, lasts, tries = zip(*found, strict=True)
    assert max(firsts) <= PROMISED
    # the others go along with the first answer, or had it a moment before
    assert max(lasts) <= PROMISED + INTERVAL * (1 + JITTER)
    assert max(tries) <= 60
    mean, most = statistics.mean(firsts), max(firsts)
    with capsys.disabled():
        print(
            f"\n  500 nodes after an hour: first contact after {mean:.0f} s in the mean, {most:.0f} s at most (promised:"
            f" {PROMISED:.0f}); asked in vain {statistics.mean(tries):.0f} times"
        )


@pytest.fixture
def world(make_world):
    world = make_world(2, partitions=2, settings={"partitiond": {"meter_interval": 1}})
    world.start()
    url = world.release("release")
    for node in world.nodes:
        world.master.supply(url, node.computer)
        world.master.request(node, f"cache-{node.name}", url, computer=node.computer)
    for node in world.nodes:
        until(lambda node=node: node.partitions()["slappart0"]["state"] == "started", "the instance", node)
    return world


def local_bytes(node):
    item = next(one for one in node.usage().values() if one["id"] == "slappart0")
    return sum(row["bytes_out"] for row in item["addresses"] if row["scope"] == "local")


@pytest.mark.full  # an hour of the lanes is above
def test_cut_off_and_back(world, capsys):
    node, other = world["A"], world["B"]
    before = {one.name: programs(one) for one in world.nodes}
    runs, counted = buildouts(node, "slappart0"), local_bytes(node)
    started = asked(world, node, "startedComputerPartition")
    world.cut(node)
    began = time.monotonic()
    until(lambda: events(node, "master.lost"), "the loss to be told", node)
    # the machine's daemon is restarted meanwhile, as after a boot: what it has to tell waits
    node.stop()
    node.seen(f"{STATE}/boot.json").write_text(json.dumps({"boot_id": "another"}))
    node.start()
    assert cases(node, "1 reports wait for the master")
    private = node.private("slappart0")
    node.run(*node.as_user("slappart0", "/usr/bin/python3", "-I", "-c", _SEND, private, "200"))
    assert programs(node) == before["A"]
    assert programs(other) == before["B"]
    assert node.seen(f"{STATE}/instances/slappart0.json").exists()
    node.settled()
    seconds = time.monotonic() - began
    assert asked(world, node, "computerBang") == 0
    world.join(node)
    joined = time.monotonic()
    until(lambda: asked(world, node, "computerBang"), "what waited to be told", node)
    contact = time.monotonic() - joined
    seen = asked(world, node, "getFullComputerInformation")
    until(lambda: asked(world, node, "getFullComputerInformation") >= seen + 4, "some passes", node)
    assert programs(node) == before["A"], "something was started anew"
    assert programs(other) == before["B"]
    assert buildouts(node, "slappart0") == runs, "an instance was configured again"
    assert asked(world, node, "computerBang") == 1, "told twice"
    assert asked(world, node, "startedComputerPartition") == started
    assert len(events(node, "master.back")) == len(events(node, "master.lost")) == 1
    assert not cases(node, "reports wait")
    assert not events(node, "node.twin", "instance.dropped")
    more = local_bytes(node) - counted
    # 1000 bytes, and 28 of the headers of IPv4 and UDP
    assert more >= 200 * 1028
    assert node.verb("usage")["gaps"] == []
    with capsys.disabled():
        print(
            f"\n  cut off for {seconds:.0f} s: {len(before['A'])} programs kept, {more} local bytes metered meanwhile; first"
            f" contact {contact:.1f} s after the return"
        )
