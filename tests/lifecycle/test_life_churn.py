"""Daemon, supervisord and buildouts killed at random while instances come and go: in the end all is as the master wishes.

The seed is printed; the same one makes the same wishes, although not the same moments.
"""

import contextlib
import os
import random
import signal
import time
import urllib.parse
from collections import Counter

import pytest
from life_node import COMPUTER, alive, parent, pids, processes_of

from partitiond import procfs
from slap_client.marshal import dumps

TITLES = tuple(f"churn{number}" for number in range(5))
STATES = ("started", "started", "started", "stopped", "destroyed")
PROGRAMS = 2  # of each instance: see release/instance.py


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(
        partitions=6, software_interval=1, instances_interval=1, report_interval=1, meter_interval=5
    )
    node.start()
    node.offer()
    return node


@pytest.fixture(scope="module")
def url(node):
    found = node.release()
    node.supply(found)
    node.wait((node.software(found) / ".completed").exists, "the release to be available")
    return found


def ask(node, title, url, state, text):
    """Request an instance as slapos.core's client does, without its half second."""
    fields = {
        "computer_id": COMPUTER,
        "software_release": url,
        "software_type": "default",
        "partition_reference": title,
        "partition_parameter_xml": dumps({"text": text}),
        "filter_xml": dumps({}),
        "state": dumps(state),
        "shared_xml": dumps(False),
    }
    body = urllib.parse.urlencode(fields).encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    return node.front.ask("POST", "requestComputerPartition", body, headers)


class Reaper:
    """Kills, and counts what it killed."""

    def __init__(self, node, rng):
        self.node, self.rng, self.killed = node, rng, Counter()

    def strike(self):
        kind = self.rng.choice(("daemon", "buildout", "buildout", "supervisord"))
        getattr(self, f"_{kind}")()

    def _daemon(self):
        self.node.kill()
        self.killed["daemon"] += 1
        time.sleep(self.rng.uniform(0, 0.5))
        self.node.start()

    def _supervisord(self):
        for pid in supervisors(self.node):
            os.kill(pid, signal.SIGKILL)
            self.killed["supervisord"] += 1

    def _buildout(self):
        """One that runs now, or the next one within a second."""
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            found = builds(self.node)
            if found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.rng.choice(found), signal.SIGKILL)
                    self.killed["buildout"] += 1
                return
            time.sleep(0.02)


def supervisors(node):
    mark = str(node.base / "instance" / "etc" / "supervisord.conf").encode()
    return [pid for pid in pids() if alive(pid) and mark in procfs.words(pid, "cmdline")]


def tenants(node):
    """The uids of partitions, and of the software user."""
    return {item["user"]["uid"] for item in node.partitions().values() if item["user"]["uid"]}


def builds(node):
    """What runs as a partition's user and is no child of supervisord: a buildout with what it started."""
    above = set(supervisors(node))
    found = []
    for uid in node.uids:
        for pid in processes_of(uid):
            with contextlib.suppress(OSError):
                if parent(pid) not in above:
                    found.append(pid)
    return found


def churn(node, url, seconds, seed):
    rng = random.Random(seed)  # noqa: S311 - no secret
    reaper = Reaper(node, rng)
    wishes, going = {}, set()
    deadline = time.monotonic() + seconds
    turn = 0
    while time.monotonic() < deadline:
        turn += 1
        # slapproxy forgets a wish for one whose end it is told of at that moment, whoever the node is
        going &= {item.instance_title for item in node.wishes().values() if not item.free}
        left = [one for one in TITLES if one not in going]
        if not left:
            time.sleep(0.2)
            continue
        title = rng.choice(left)
        state = rng.choice(STATES) if title in wishes else "started"
        text = f"{title} of turn {turn}"
        # no free partition is the master's word, and nothing of ours
        if ask(node, title, url, state, text)[0] == 200:
            wishes[title] = (state, text)
        if state == "destroyed":
            wishes.pop(title, None)
            going.add(title)
        time.sleep(rng.uniform(0.1, 0.8))
        reaper.strike()
    return wishes, reaper.killed


def run(node, url, seconds, seed):
    print("seed", seed)
    node.uids = tenants(node)
    wishes, killed = churn(node, url, seconds, seed)
    print("killed", dict(killed), "wishes", wishes)
    if node.daemon is None:
        node.start()
    as_wished(node, wishes)
    nothing_else(node, wishes)
    assert all(killed[kind] for kind in ("daemon", "buildout", "supervisord")), killed


def as_wished(node, wishes):
    """Every instance is where it is wanted, and does what was asked of it last."""

    def there():
        wanted = {item.partition_id: item for item in node.wishes().values() if not item.free}
        if any(item.requested_state == "destroyed" for item in wanted.values()):
            return False
        states = node.states()
        return all(
            state == (wanted[name].requested_state if name in wanted else "free")
            for name, state in states.items()
        )

    node.wait(there, "everything to be as the master wishes", 180, pause=0.5)
    found = {item.instance_title for item in node.wishes().values() if not item.free}
    assert found == set(wishes)
    for title, (state, text) in wishes.items():
        if state == "started":
            item = node.partition(node.holder(title))
            assert node.wait(lambda item=item: node.page(item), f"{title} to answer", 30) == text
    node.wait(lambda: not node.plan(), "the plan to be empty", 60)


def nothing_else(node, wishes):
    """Each program runs once, under the one supervisord; nothing of a user runs besides."""
    (supervisor,) = supervisors(node)
    holders = {node.holder(title): state for title, (state, _) in wishes.items()}
    for name, item in node.partitions().items():
        expected = PROGRAMS if holders.get(name) == "started" else 0
        found = processes_of(item["user"]["uid"])
        assert len(found) == expected, (name, holders.get(name), found)
        assert {parent(pid) for pid in found} <= {supervisor}, found
        assert {process["pid"] for process in item["processes"]} - {0} == set(found), (name, found)


def test_a_minute_of_churn(node, url):
    run(node, url, 60, int(os.environ.get("CHURN_SEED", "0")) or random.SystemRandom().randrange(10**6))


@pytest.mark.full
def test_ten_minutes_of_churn(node, url):
    for title in TITLES:
        ask(node, title, url, "destroyed", "")
    as_wished(node, {})
    run(node, url, 600, random.SystemRandom().randrange(10**6))
