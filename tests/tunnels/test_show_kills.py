"""kill -9 of what tunnels hang on, under load: what breaks and for how long is printed, and what has to hold is asserted.

Times are those of the machine of the test. An outage is counted from the first new connection that was not served to the next
one that was; those who call try some forty times a second.
"""

import contextlib
import os
import random
import signal
import subprocess
import time

import pytest
from tunnel_load import SERVICE, STEADY, Load, declare, stunnels
from tunnel_node import ENVIRONMENT, Daemon, Node, until

SESSIONS = 12
ENTRIES = {entry for *_, entry in STEADY}
# what goes through each partition's stunnel
THROUGH = {
    partition: {entry for server, _, client, entry in STEADY if partition in (server, client)}
    for partition in ("slappart0", "slappart1", "slappart2")
}
# longer than a process takes to be started anew, and than who calls needs to notice
A_WHILE = 2.0


class Watched:
    """The node under load; what is seen from one kill to the next."""

    def __init__(self, node):
        self.node, self.load = node, None

    def begin(self):
        """All sessions anew."""
        self.load = Load(self.node, SESSIONS, streams=True)
        until(lambda: self._running() == SESSIONS, "all sessions to be there")
        self.load.seen()

    def _running(self):
        return sum(seen["running"] for seen in self.load.seen().values())

    def again(self):
        """Wait until every tunnel serves new connections; return what was seen since the last time, by tunnel."""
        total = self.load.seen()
        end = time.monotonic() + 120
        while True:
            time.sleep(0.5)
            seen = self.load.seen()
            for entry, one in seen.items():
                for key in ("exchanged", "opened", "refused", "broken", "outages"):
                    total[entry][key] += one[key]
                total[entry]["longest"] = max(total[entry]["longest"], one["longest"])
                total[entry]["running"] = one["running"]
            if all(one["opened"] and not one["refused"] for one in seen.values()):
                return total
            assert time.monotonic() < end, f"it does not come back: {seen}"

    def tell(self, what, seen):
        """Print what broke, by tunnel."""
        print(f"{what}:")
        for entry, one in sorted(seen.items()):
            sessions = len(one["broken"]) + one["running"]
            out = ", ".join(f"{(end - begun) * 1000:.0f} ms" for begun, end, *_ in one["outages"]) or "0 ms"
            print(
                f"  tunnel {entry}: {len(one['broken'])} of {sessions} sessions broken;"
                f" {one['refused']} of {one['refused'] + one['opened']} new connections not served, for {out};"
                f" the longest exchange of a session took {one['longest'] * 1000:.0f} ms"
            )

    def same_listeners(self):
        listed = self.node.tunnels()
        assert len(listed) == 2 * len(STEADY)
        assert {row["state"] for row in listed.values()} == {"up"}
        assert {name: len(pids) for name, pids in stunnels(self.node).items()} == dict.fromkeys(THROUGH, 1)
        assert self.node("plan")["operations"] == []

    def end(self):
        self.load.close()


def harmless(seen):
    return {entry for entry, one in seen.items() if not one["broken"] and not one["refused"]}


def supervisord(node):
    return int((node.path("slappart0").parent / "var" / "run" / "supervisord.pid").read_text())


@pytest.fixture
def watched(bridge, node_config):
    node = Node(node_config(3).path)
    with contextlib.closing(node):
        node.apply()
        declare(node)
        yield Watched(node)


def test_the_daemons_death_breaks_nothing(watched):
    daemon = Daemon(watched.node)
    before = stunnels(watched.node)
    watched.begin()
    try:
        daemon.kill()
        time.sleep(A_WHILE)
        seen = watched.again()
        watched.tell("kill -9 of the daemon", seen)
        assert harmless(seen) == ENTRIES
        daemon = Daemon(watched.node)
        time.sleep(A_WHILE)
        seen = watched.again()
        watched.tell("another daemon is started", seen)
        assert harmless(seen) == ENTRIES
        assert stunnels(watched.node) == before
        watched.same_listeners()
    finally:
        daemon.close()
        watched.end()


SEED = 5


@pytest.mark.parametrize("rounds", [2, pytest.param(6, marks=pytest.mark.full)])
def test_a_daemon_that_dies_amid_a_change_breaks_nothing_and_the_next_one_finishes_it(watched, rounds):
    node, dice = watched.node, random.Random(SEED)  # noqa: S311 - to be repeated
    before, expected = stunnels(node), {}
    watched.begin()
    daemon = Daemon(node)
    try:
        for port in range(4100, 4100 + rounds):
            for partition in ("slappart0", "slappart2"):
                node.serve(partition, f"c{port}", port, SERVICE, [node.pin("slappart1")])
                expected[f"{partition}/c{port}"] = "up"
            asked = subprocess.Popen(
                node.line("apply"),
                cwd="/",
                env=ENVIRONMENT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(dice.uniform(0.1, 0.7))
            daemon.kill()
            asked.wait(60)
            daemon = Daemon(node)
            node.apply()
            listed = node.tunnels()
            assert {name: listed[name]["state"] for name in expected} == expected
        seen = watched.again()
        watched.tell(f"kill -9 of the daemon amid each of {rounds} changes", seen)
        assert not [one["broken"] for one in seen.values() if one["broken"]]
        assert stunnels(node) == before
    finally:
        daemon.close()
        watched.end()


@pytest.mark.parametrize("partition", ["slappart0", "slappart1"], ids=["server", "client"])
def test_a_killed_stunnel_is_back_by_supervisord_alone(watched, partition):
    before = stunnels(watched.node)
    time.sleep(
        A_WHILE
    )  # one that ends in its first second is started again a second later (startsecs of supervisord)
    watched.begin()
    try:
        os.kill(before[partition][0], signal.SIGKILL)
        time.sleep(0.5)
        seen = watched.again()
        watched.tell(f"kill -9 of the stunnel of {partition}", seen)
        assert harmless(seen) == ENTRIES - THROUGH[partition]
        after = stunnels(watched.node)
        assert after.pop(partition) != before.pop(partition)
        assert after == before
        watched.same_listeners()
    finally:
        watched.end()


def supervisord_dies(watched, start):
    """It is killed, nothing else ends by that, and ``start`` has it started again."""
    before, first = stunnels(watched.node), supervisord(watched.node)
    watched.begin()
    try:
        os.kill(first, signal.SIGKILL)
        time.sleep(A_WHILE)
        seen = watched.load.seen()
        if supervisord(watched.node) == first:
            watched.tell(f"kill -9 of supervisord, {A_WHILE:.0f} s later", seen)
            assert harmless(seen) == ENTRIES
            assert stunnels(watched.node) == before
        began = time.monotonic()
        start()
        until(lambda: supervisord(watched.node) != first, "supervisord to be back", 120)
        took = time.monotonic() - began
        time.sleep(0.5)
        seen = watched.again()
        watched.tell(f"supervisord is back {took:.1f} s after that, which ends what the other one left", seen)
        watched.same_listeners()
    finally:
        watched.end()


def test_a_killed_supervisord_breaks_nothing_until_apply_starts_it_again(watched):
    supervisord_dies(watched, watched.node.apply)


@pytest.mark.full
def test_the_daemon_starts_a_killed_supervisord_again(watched):
    daemon = Daemon(watched.node)
    try:
        supervisord_dies(watched, lambda: None)
    finally:
        daemon.close()
