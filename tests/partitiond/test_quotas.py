"""Quotas of a node: what is told, once, and where it stands in ``status``, ``show`` and the metrics."""

import contextlib
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from json_schemas import validate

from accounting.ledger import Ledger
from accounting.model import Pass, TrafficReading
from partitiond import converge, metrics, present, quotas, status
from partitiond.context import Context
from partitiond.metering import ledger_path
from partitiond.state import InstanceState

GUIDS = {"slappart0": "SOFTINST-0", "slappart1": "SOFTINST-1"}
WORLD = "2001:db8:9::1"


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


class Scene:
    """A node whose meters are what a test says, at a time that it says."""

    def __init__(self, node):
        self.node = node
        self.now = at("2028-02-10T12:00")
        self.levels = dict.fromkeys(GUIDS, 0)
        self.guids = dict(GUIDS)
        self.again()
        outcome = converge.apply(self.context)
        assert not outcome.failures
        for name, guid in GUIDS.items():
            self.context.store.save_instance(InstanceState(name, "started", "started", instance_guid=guid))
        self.record()

    def again(self):
        """As after a restart of the daemon, with the file as it is now."""
        self.context = Context.of(self.node.load())
        self.context.meters.clock = lambda: self.now
        self.applied = []
        self.context.limits_changed = lambda: self.applied.append(sorted(self.limited()))

    def limited(self):
        return quotas.limited(self.context.config, self.context.quotas.standings())

    def record(self):
        readings = tuple(
            TrafficReading(name, WORLD, "ipv6", "remote", "boot/1", octets, 0, octets, 0)
            for name, octets in self.levels.items()
        )
        with Ledger(ledger_path(self.context.config.state_dir)) as ledger:
            ledger.record(Pass(self.now, self.guids, readings))

    def use(self, octets, name="slappart0"):
        self.levels[name] += octets
        self.now += 1
        self.record()

    def judge(self, *, soon=False):
        if not soon:
            self.context.quotas._judged = (0.0, None)
        before = len(self.events())
        quotas.judge(self.context, converge.observe(self.context).node)
        return [(one["event"], one["partition"]) for one in self.events()[before:]]

    def events(self):
        path = self.node.log / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [one for one in map(json.loads, lines) if one["event"].startswith("quota.")]

    def status(self):
        value = validate({"schema": "partitiond/status/1", **status.node(self.context)})
        return value["node"]["open_cases"], [one["quota"] for one in value["partitions"]]


@pytest.fixture
def scene(node_config, bridge):
    found = Scene(node_config(2, interface=bridge.name, quota={"slappart0": "1000 B"}))
    yield found
    found.context.meters.close()


def test_what_was_used_is_told_once_and_shown(scene):
    assert scene.judge() == []
    assert scene.status()[1] == [
        {
            "bytes": 1000,
            "used_bytes": 0,
            "month": "2028-02",
            "action": "warn",
            "rate_bits_per_second": None,
            "state": "within",
        },
        None,
    ]
    scene.use(850)
    scene.use(10**6, "slappart1")
    assert scene.judge() == [("quota.near", "slappart0")]
    assert scene.judge() == []
    cases, (quota, _) = scene.status()
    assert (quota["state"], quota["used_bytes"]) == ("near", 850)
    assert not [one for one in cases if "quota" in one]
    scene.use(400)
    assert scene.judge() == [("quota.exceeded", "slappart0")]
    cases, (quota, _) = scene.status()
    assert (quota["state"], quota["used_bytes"]) == ("exceeded", 1250)
    (case,) = [one for one in cases if "quota" in one]
    assert "of slappart0 for 2028-02 is used up (1250 of 1000 bytes)" in case
    event = validate({"schema": "partitiond/event/1", **scene.events()[-1]})
    assert (event["used_bytes"], event["bytes"], event["month"], event["action"]) == (
        1250,
        1000,
        "2028-02",
        "warn",
    )
    shown = status.partition(scene.context, "slappart0")
    validate({"schema": "partitiond/show/1", **shown})
    assert "125 % of 1000 bytes used in 2028-02, warn" in present.show(shown)
    assert "quota" not in present.show(status.partition(scene.context, "slappart1"))
    assert scene.applied == [], "a warning limits nobody"


def test_metrics(scene):
    scene.use(850)
    scene.judge()
    lines = metrics.everything(scene.context, metrics.Tally()).decode().splitlines()
    found = [line for line in lines if line.startswith("partitiond_partition_quota_")]
    assert found == [
        'partitiond_partition_quota_bytes{partition="slappart0"} 1000',
        'partitiond_partition_quota_used_bytes{partition="slappart0"} 850',
    ]


def test_a_restart_tells_nothing_again(scene):
    scene.use(1200)
    assert scene.judge() == [("quota.exceeded", "slappart0")]
    scene.again()
    assert scene.status()[1][0]["state"] == "exceeded", "before the meters had a pass"
    assert scene.judge() == []
    before = scene.context.quotas.path.stat()
    assert scene.judge() == []
    assert scene.context.quotas.path.stat().st_ino == before.st_ino, "what is the same is not written"


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"form": 2}', '{"form": 1, "partitions": {"slappart0": {"used": "x"}}}']
)
def test_a_damaged_memory_is_begun_anew(scene, damage):
    scene.use(1200)
    scene.judge()
    scene.context.quotas.path.write_text(damage)
    assert scene.status()[1][0]["used_bytes"] == 0
    assert scene.judge() == [("quota.exceeded", "slappart0")]
    assert scene.status()[1][0]["used_bytes"] == 1200
    scene.context.quotas.path.unlink()
    assert scene.judge() == [("quota.exceeded", "slappart0")]


def test_a_new_month_is_told_to_who_had_used_it_up(scene):
    scene.node.write(quota={"slappart1": "10 kB"})
    scene.again()
    scene.use(1200)
    scene.judge()
    scene.now = at("2028-03-01T00:00:05")
    scene.use(7)
    assert scene.judge(soon=True) == [("quota.renewed", "slappart0")], (
        "a month that began is asked for at once"
    )
    assert scene.status()[1][0] | {"month": ""} == scene.status()[1][0] | {
        "month": "",
        "used_bytes": 7,
        "state": "within",
    }
    assert scene.judge() == []


def test_the_next_instance_begins_anew(scene):
    scene.use(1200)
    scene.judge()
    scene.guids["slappart0"] = "SOFTINST-9"
    state = scene.context.store.instance("slappart0")
    scene.context.store.save_instance(replace(state, instance_guid="SOFTINST-9"))
    scene.record()
    scene.use(30)
    assert scene.status()[1][0]["used_bytes"] == 0
    assert scene.judge(soon=True) == []
    assert scene.status()[1][0]["used_bytes"] == 30
    scene.context.store.save_instance(InstanceState("slappart0"))
    assert scene.judge(soon=True) == []
    assert scene.context.quotas.standings() == {}


def test_the_ledger_is_asked_once_a_minute(scene, monkeypatch):
    asked = []
    usage = Ledger.usage

    def counted(*arguments, **words):
        asked.append(arguments)
        return usage(*arguments, **words)

    monkeypatch.setattr("accounting.ledger.LedgerReader.usage", counted)
    for _ in range(5):
        scene.use(1200)
        scene.judge(soon=True)
    assert len(asked) == 1
    scene.node.write(quota={"slappart0": None})
    scene.again()
    scene.judge()
    assert len(asked) == 1, "without a quota, never"


def test_a_ledger_that_cannot_be_read_changes_nothing(scene, caplog):
    scene.node.write(quota={"slappart0": "1000 B limit 1 Mbit/s"})
    scene.again()
    scene.use(1200)
    scene.judge()
    assert scene.applied == [["slappart0"]]
    before = scene.context.quotas.path.read_bytes()
    for name in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            (scene.node.state / f"ledger.sqlite{name}").unlink()
    (scene.node.state / "ledger.sqlite").write_bytes(b"nothing of use" * 1000)
    for _ in range(3):
        assert scene.judge() == []
    assert scene.context.quotas.path.read_bytes() == before
    assert scene.limited() == {"slappart0"}
    assert [one for one in caplog.messages if "what is limited stays so" in one] == caplog.messages[-1:]
    (scene.node.state / "ledger.sqlite").unlink()


def test_what_is_limited_follows_the_configuration_at_once(scene):
    scene.use(1200)
    scene.judge()
    assert scene.limited() == frozenset()
    for value, limited in (
        ("1000 B limit 1 Mbit/s", {"slappart0"}),
        ("1 kB", set()),
        ("2 kB limit 1 Mbit/s", set()),
    ):
        scene.node.write(quota={"slappart0": value})
        scene.again()
        assert scene.limited() == limited


def test_limits_are_applied_where_they_begin_and_end(scene):
    scene.node.write(quota={"slappart0": "1000 B limit 1 Mbit/s"})
    scene.again()
    scene.use(1200)
    assert scene.judge() == [("quota.exceeded", "slappart0")]
    scene.use(1200)
    scene.judge()
    scene.now = at("2028-03-01T00:00:05")
    scene.use(1)
    assert scene.judge() == [("quota.renewed", "slappart0")]
    assert scene.applied == [["slappart0"], []]
    assert "limited to 1000000 bit/s" in scene.events()[0]["message"]
