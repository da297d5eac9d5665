"""The watchdog decides by what it did, and when: nobody is told too often, nobody stays down."""

import dataclasses
import json
import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest

from partitiond import watchdog
from partitiond.errors import PartitiondError
from partitiond.state import InstanceState
from partitiond.supervision import Process
from partitiond.watchdog import Trouble, Watchdog, decide
from slap_client.errors import SlapError


def test_one_that_ends_is_told_at_once_and_once_for_its_deployment():
    first = decide(None, down=True, deployment="A 1", now=1000.0)
    assert (first.bang, first.start) == (True, False)
    told = dataclasses.replace(first.trouble, told="A 1", bangs=1, banged_at=1000.0)
    for now in (1001.0, 1014.0):
        waits = decide(told, down=True, deployment="A 1", now=now)
        assert (waits.bang, waits.start) == (False, False)
        assert waits.again == pytest.approx(1015.0 - now)
    # the master said nothing new: it is started as it is, and not told of again
    assert decide(told, down=True, deployment="A 1", now=1015.0).start
    assert not decide(told, down=True, deployment="A 1", now=9e9).bang


def test_one_that_is_calm_is_forgotten():
    told = Trouble(told="A 1", bangs=3, banged_at=1000.0, seen_at=1000.0)
    assert decide(told, down=False, deployment="A 2", now=1000.0 + watchdog.CALM - 1).trouble == told
    assert decide(told, down=False, deployment="A 2", now=1000.0 + watchdog.CALM).trouble is None
    assert decide(None, down=False, deployment="A 2", now=1000.0).trouble is None


@pytest.mark.parametrize("master", ["answers", "is away"])
def test_one_that_never_stays_up_is_told_and_started_ever_more_seldom(master):
    """For a day, with a master that issues another timestamp at each bang, or does not hear any."""
    trouble, stamp, now, bangs, starts = None, 0, 0.0, [], []
    while now < 86400:
        found = decide(trouble, down=True, deployment=f"A {stamp}", now=now)
        trouble = found.trouble
        start = found.start
        if found.bang and master == "answers":
            trouble = dataclasses.replace(trouble, told=f"A {stamp}", bangs=trouble.bangs + 1, banged_at=now)
            stamp += 1
            bangs.append(now)
        elif found.bang:
            start = not watchdog._to_start(trouble, now)
        if start:
            trouble = dataclasses.replace(trouble, starts=trouble.starts + 1, started_at=now)
            starts.append(now)
        now += max(1.0, found.again)
    assert 24 < len(starts) < 40
    assert starts[0] < 20
    if master == "answers":
        assert 24 <= len(bangs) < 35
        assert bangs[0] == 0
        assert all(later - before >= watchdog.FIRST_BANG for before, later in pairwise(bangs))


def test_a_clock_that_is_set_back_keeps_nobody_down():
    before = Trouble(told="A 1", bangs=9, banged_at=1e9, starts=9, started_at=1e9, seen_at=1e9)
    for one in (before, dataclasses.replace(before, banged_at=0.0)):
        assert decide(one, down=True, deployment="A 1", now=1000.0).start
    assert decide(before, down=True, deployment="A 2", now=1000.0).bang


def test_only_what_is_meant_to_run_and_watched_counts():
    states = {
        "slappart0": InstanceState("slappart0", "started", "started"),
        "slappart1": InstanceState("slappart1", "stopped", "stopped"),
        "slappart2": InstanceState("slappart2", "failed", "started"),
        "slappart3": InstanceState("slappart3", "destroying", "started"),
    }
    rows = [
        ("slappart0", "one-on-watch", "EXITED"),
        ("slappart0", "two-on-watch", "FATAL"),
        ("slappart0", "run", "EXITED"),
        ("slappart0", "three-on-watch", "STOPPED"),
        ("slappart1", "one-on-watch", "EXITED"),
        ("slappart2", "one-on-watch", "EXITED"),
        ("slappart3", "one-on-watch", "EXITED"),
        ("slappart9", "one-on-watch", "EXITED"),
    ]
    processes = [Process(group, name, state, 0, started=True) for group, name, state in rows]
    assert watchdog.down(processes, states) == {
        "slappart0": ["one-on-watch", "two-on-watch"],
        "slappart2": ["one-on-watch"],
    }


class Scene:
    """A node of which only supervisord and the master are there, both in memory."""

    def __init__(self, path, count):
        self.banged, self.started, self.woken, self.waits, self.events = [], [], [], [], []
        self.away = False
        names = [f"slappart{index}" for index in range(count)]
        self.down = set(names)
        self.states = {
            name: InstanceState(name, "started", "started", instance_guid=name, timestamp="1")
            for name in names
        }
        store = SimpleNamespace(readable=lambda: (self.states, {}), instance=self.states.get)
        self.context = SimpleNamespace(
            config=SimpleNamespace(state_dir=path),
            store=store,
            looked=None,
            stop=threading.Event(),
            applying=threading.RLock(),
            supervisor=SimpleNamespace(
                processes=self.processes, group_text=lambda _: "", start_group=self.start
            ),
            client=SimpleNamespace(bang=self.bang),
            wake_instances=lambda: self.woken.append(1),
            events=SimpleNamespace(record=lambda name, message, **_: self.events.append((name, message))),
        )
        self.dog = Watchdog(self.context, self.waits.append)

    def processes(self):
        return tuple(
            Process(name, "http-on-watch", "EXITED" if name in self.down else "RUNNING", 0, started=True)
            for name in self.states
        )

    def start(self, name):
        self.started.append(name)

    def bang(self, name, message):
        if self.away:
            raise SlapError("slap.unreachable", "no route", retryable=True)
        self.banged.append((name, message))


def test_a_hundred_that_end_at_once_do_not_flood_the_master(tmp_path):
    scene = Scene(tmp_path, 100)
    scene.dog.ended()
    assert scene.waits == [0.0]
    scene.dog.run()
    assert len(scene.banged) == watchdog.MOST_BANGS
    assert scene.banged[0] == ("slappart0", "http-on-watch in partition slappart0 encountered a problem")
    # all the others come back without it
    assert sorted([*scene.started, *(name for name, _ in scene.banged)]) == sorted(scene.states)
    assert scene.waits[-1] >= 1
    scene.dog.run()
    assert len(scene.banged) == watchdog.MOST_BANGS
    assert len(scene.started) == 100 - watchdog.MOST_BANGS, "nobody is started again at once"


def test_a_master_that_is_away_is_asked_once_in_a_look(tmp_path):
    scene = Scene(tmp_path, 5)
    scene.away, asked = True, []
    scene.context.client.bang = lambda *words: asked.append(words) or scene.bang(*words)
    scene.dog.ended()
    result = scene.dog.run()
    assert len(asked) == 1
    assert sorted(scene.started) == sorted(scene.states)
    assert not scene.woken
    assert len(result.done) == 5


def test_a_daemon_that_begins_anew_tells_nothing_twice(tmp_path):
    scene = Scene(tmp_path, 1)
    scene.dog.ended()
    scene.dog.run()
    assert len(scene.banged) == 1
    again = Scene(tmp_path, 1)
    again.dog.ended()
    again.dog.run()
    assert again.banged == []
    # what is remembered goes when it is over
    content = {
        name: {**one, "seen_at": 1.0, "banged_at": 1.0}
        for name, one in json.loads((tmp_path / "watchdog.json").read_text()).items()
    }
    (tmp_path / "watchdog.json").write_text(json.dumps(content))
    calm = Scene(tmp_path, 1)
    calm.down.clear()
    calm.dog.ended()
    calm.dog.run()
    assert not (tmp_path / "watchdog.json").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"slappart0": 1}', '{"slappart0": {"more": 1}}', "\0"])
def test_a_damaged_memory_is_none(tmp_path, content):
    (tmp_path / "watchdog.json").write_text(content)
    assert watchdog.read(tmp_path / "watchdog.json") == {}


def test_nothing_is_asked_where_nobody_ended(tmp_path):
    scene = Scene(tmp_path, 3)
    scene.context.supervisor.processes = lambda: pytest.fail("supervisord is asked for nothing")
    scene.dog.run()
    assert scene.waits == []


def test_a_supervisord_that_refuses_is_told(tmp_path):
    scene = Scene(tmp_path, 1)
    scene.away = True

    def refuse(name):
        raise PartitiondError("supervisor.fault", "BAD_NAME", resource=name)

    scene.context.supervisor.start_group = refuse
    scene.dog.ended()
    assert [(name, error.code) for name, error in scene.dog.run().failures] == [
        ("slappart0", "supervisor.fault")
    ]
