"""Outages of services: what supervisord's states mean, what is told of them, and a real one from its begin to its end."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from accounting import Ledger
from partitiond import converge, event_reader, incidents, lanes, privacy, programs, status, verbs
from partitiond.context import Context
from partitiond.events import EventLog
from partitiond.incidents import IncidentWatch, Suspects, looks
from partitiond.state import InstanceState
from partitiond.supervision import Process

GUID = "SOFTINST-1"


def process(name, state, group="slappart0"):
    return Process(group, name, state, 1 if state == "RUNNING" else 0, True)


def started(partition="slappart0", **other):
    state = {"life": "started", "wanted": "started", "instance_guid": GUID, **other}
    return {partition: InstanceState(partition, **state)}


def troubles(*processes, states=None, before=None):
    found, suspects = looks(
        ["slappart0"], started() if states is None else states, processes, before or Suspects(), 100.0
    )
    return dict(found["slappart0"].troubles), suspects


# --- what states mean -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "state", "wrong"),
    [
        ("db-on-watch", "RUNNING", False),
        ("db-on-watch", "STARTING", False),
        ("db-on-watch", "EXITED", True),
        ("db-on-watch", "FATAL", True),
        ("db-on-watch", "BACKOFF", True),
        ("db-on-watch", "UNKNOWN", True),
        ("db", "EXITED", False),
        ("db", "STOPPED", False),
        ("db", "RUNNING", False),
        ("db", "FATAL", True),
        ("db", "BACKOFF", True),
    ],
)
def test_a_service_that_does_not_run_and_a_program_that_cannot_start(name, state, wrong):
    assert troubles(process(name, state))[0] == ({"db": state} if wrong else {})


@pytest.mark.parametrize("state", ["STOPPED", "STOPPING"])
def test_what_was_stopped_counts_when_the_next_look_finds_it_too_from_the_first_on(state):
    found, suspects = troubles(process("db-on-watch", state))
    assert found == {}
    looked, again = looks(["slappart0"], started(), [process("db-on-watch", state)], suspects, 160.0)
    assert looked["slappart0"].troubles == {"db": state}
    assert looked["slappart0"].since == {"db": 100.0}
    assert again.since == suspects.since
    assert (
        looks(["slappart0"], started(), [process("db-on-watch", "RUNNING")], suspects, 160.0)[1].since == {}
    )


@pytest.mark.parametrize(
    ("state", "alive"),
    [
        ({}, True),
        ({"life": "failed"}, True),
        ({"life": "stopped", "wanted": "stopped"}, False),
        ({"life": "failed", "wanted": "stopped"}, False),
        ({"life": "stopped"}, False),
        ({"life": "destroying", "wanted": "destroyed"}, False),
    ],
)
def test_only_what_is_meant_to_run_can_be_out(state, alive):
    states = started(**state)
    found, _ = looks(["slappart0", "slappart1"], states, [process("db-on-watch", "EXITED")], Suspects(), 1.0)
    assert (found["slappart0"].alive, bool(found["slappart0"].troubles)) == (alive, alive)
    assert not found["slappart1"].alive


# --- what is told -----------------------------------------------------------------------------------------------------


class Scene:
    """A node of data: the clock and what supervisord says are the test's."""

    def __init__(self, root):
        self.ledger = Ledger(root / "ledger.sqlite")
        self.root, self.now = root, 1000.0
        self.node = SimpleNamespace(
            partitions=[SimpleNamespace(id="slappart0"), SimpleNamespace(id="slappart1")]
        )
        self.states = started()
        self.begin()

    def begin(self):
        self.context = SimpleNamespace(
            incidents=IncidentWatch(),
            looked=None,
            clock=lambda: self.now,
            store=SimpleNamespace(readable=lambda: (self.states, {})),
            config=SimpleNamespace(intervals=SimpleNamespace(meter=10)),
            events=EventLog(self.root),
        )

    def look(self, *processes, after=60.0):
        self.now += after
        # another object each time, as each look of the converge lane gives one
        self.context.looked = SimpleNamespace(processes=(process("other", "RUNNING", "x"), *processes))
        incidents.observe(self.context, self.node, self.ledger)

    def told(self):
        return [(one["event"], one.get("seconds")) for one in event_reader.last(self.root, 1000)]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    made = Scene(tmp_path)
    # the clock of the machine goes with that of the test, but for jumps
    made.booted = 0.0
    monkeypatch.setattr(incidents.time, "clock_gettime", lambda _: made.now - made.booted)
    with made.ledger:
        yield made


DOWN, UP = process("db-on-watch", "EXITED"), process("db-on-watch", "RUNNING")


def test_begin_and_end_are_told_once_with_the_duration(scene):
    for one in (DOWN, DOWN, DOWN, UP):
        scene.look(one)
    assert scene.told() == [("incident.begun", None)]
    scene.look(UP, after=61.0)
    scene.look(UP)
    assert scene.told() == [("incident.begun", None), ("incident.ended", 180.0)]


def test_a_service_that_flaps_is_one_outage_and_two_events(scene):
    for _ in range(200):
        scene.look(DOWN, after=1.0)
        scene.look(UP, after=1.0)
    assert scene.told() == [("incident.begun", None)]
    scene.look(UP, after=70.0)
    assert [event for event, _ in scene.told()] == ["incident.begun", "incident.ended"]
    assert scene.ledger._connection.execute("SELECT count(*) FROM incident").fetchone() == (1,)


def test_a_tenant_that_breaks_its_services_fills_no_log(scene):
    for _ in range(100):
        scene.look(*(process(f"s{number}-on-watch", "EXITED") for number in range(50)))
        scene.look(after=61.0)
    assert len(scene.told()) == incidents._MOST_TOLD


def test_the_same_look_is_posted_once_and_none_at_all_is_no_outage(scene):
    scene.look(DOWN)
    seen = scene.context.looked
    scene.now += 10.0
    changes = scene.ledger._connection.total_changes
    incidents.observe(scene.context, scene.node, scene.ledger)
    assert scene.context.looked is seen
    assert scene.ledger._connection.total_changes == changes
    scene.context.looked = SimpleNamespace(processes=())  # supervisord does not answer
    incidents.observe(scene.context, scene.node, scene.ledger)
    assert [row.name for row in scene.ledger.incidents()] == ["db"]


def test_another_daemon_goes_on_with_it_and_tells_the_end(scene):
    scene.look(DOWN)
    scene.begin()
    scene.look(DOWN)
    scene.look(UP)
    scene.begin()
    scene.look(UP, after=30.0)
    scene.look(UP, after=60.0)
    assert scene.told() == [("incident.begun", None), ("incident.ended", 120.0)]


def test_a_clock_that_was_set_counts_nothing_of_the_jump(scene):
    scene.look(DOWN)
    scene.look(DOWN)
    scene.booted = 1e8
    scene.look(DOWN, after=60.0 + 1e8)
    scene.look(DOWN)
    with scene.ledger.transaction() as connection:
        found = [one.microseconds / 1e6 for one in incidents_waiting(connection)]
    assert found == [60.0, 60.0]


def incidents_waiting(connection):
    from accounting import incidents as rows

    return rows.waiting(connection, 1e11)


def test_a_partition_that_stops_has_no_outage_any_more(scene):
    scene.look(DOWN)
    incidents.record_promises(scene.context, scene.ledger, {"slappart0": (GUID, {"http": "refused"})})
    assert sorted(row.kind for row in scene.ledger.incidents()) == ["promise", "service"]
    scene.states = started(life="stopped", wanted="stopped")
    scene.look(DOWN)
    assert scene.ledger.incidents() == ()


def test_promises_are_told_as_services_are(scene):
    for failing in ({"http": "refused", "dns": "no answer"}, {"http": "refused"}):
        incidents.record_promises(scene.context, scene.ledger, {"slappart0": (GUID, failing)})
        scene.now += 60.0
    incidents.record_promises(scene.context, scene.ledger, {"slappart0": (GUID, {})})
    scene.now += 70.0
    incidents.record_promises(scene.context, scene.ledger, {"slappart0": (GUID, {})})
    assert scene.told() == [
        ("incident.begun", None),
        ("incident.begun", None),
        ("incident.ended", 60.0),
        ("incident.ended", 120.0),
    ]


# --- a real one -------------------------------------------------------------------------------------------------------


@pytest.fixture
def node(bridge, node_config):
    files = node_config(2)
    context = Context.of(files.load())
    try:
        assert verbs.apply(context, [])["failures"] == []
        yield context
    finally:
        context.meters.close()


def test_a_real_service_that_is_killed_is_out_until_it_runs_again(node):
    partition = node.node.partitions[0]
    place = partition.path / "etc" / "service"
    place.mkdir(parents=True)
    (place / "db").write_text("#!/bin/sh\nexec sleep 1000\n")
    (place / "db").chmod(0o755)
    for path in (partition.path / "etc", place, place / "db"):
        os.chown(path, partition.uid, partition.gid)
    node.store.save_instance(started()["slappart0"])
    privacy.ensure(node, partition)
    node.supervisor.write_group(programs.group(node, partition))
    node.supervisor.update()
    node.supervisor.start_group("slappart0")
    assert shown(node) == []
    pid = next(one.pid for one in node.supervisor.processes() if one.group == "slappart0")
    os.kill(pid, signal.SIGKILL)
    wait_for(node, "EXITED")
    (one,) = shown(node)
    assert (one["kind"], one["name"], one["reason"]) == ("service", "db", "EXITED")
    node.supervisor.start_group("slappart0")
    wait_for(node, "RUNNING")
    assert shown(node) == []


def shown(node):
    """What status says after a look of the sweep and a pass of the meters."""
    converge.look(node)
    lanes.usage(node)
    (found,) = [item["incidents"] for item in status.node(node)["partitions"] if item["id"] == "slappart0"]
    return found


def wait_for(node, state):
    deadline = time.monotonic() + 20
    while [one.state for one in node.supervisor.processes() if one.group == "slappart0"] != [state]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
