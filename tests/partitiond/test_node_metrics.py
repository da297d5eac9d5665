"""``/metrics``: OpenMetrics that the library's own parser accepts, with what was counted."""

import threading
from collections import Counter
from types import SimpleNamespace

import pytest
from network_scene import attempts
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from accounting.errors import AccountingError
from partitiond import metrics
from partitiond.context import Context
from partitiond.daemon import Lane
from partitiond.node_plan import Outcome
from partitiond.passes import Result
from partitiond.state import InstanceState
from partitiond.supervision import Process


@pytest.fixture
def context(node_config):
    node = node_config(2, interface="lo")
    node.state.mkdir()
    context = Context.of(node.load())
    yield context
    context.meters.close()


def samples(context, tally):
    return parsed(metrics.everything(context, tally))


def parsed(text):
    families = text_string_to_metric_families(text.decode())
    return {
        (one.name, *sorted(one.labels.items())): one.value for family in families for one in family.samples
    }


def test_before_anything_happened(context):
    assert [
        key for key in samples(context, metrics.Tally()) if not key[0].startswith("partitiond_node_")
    ] == []


def test_what_was_counted_is_there(context):
    tally = metrics.Tally()
    tally.drift(Counter(("tap", "tap", "address")))
    tally.drift(Counter(("tap",)))
    tally.lane("converge", 0.02, good=True)
    tally.lane("converge", 2.0, good=False)
    context.master.note(False)
    found = samples(context, tally)
    assert found["partitiond_drift_total", ("resource", "tap")] == 3
    assert found["partitiond_drift_total", ("resource", "address")] == 1
    lane = ("lane", "converge")
    assert found["partitiond_lane_duration_seconds_count", lane] == 2
    assert found["partitiond_lane_duration_seconds_sum", lane] == pytest.approx(2.02)
    assert found["partitiond_lane_duration_seconds_bucket", lane, ("le", "0.03")] == 1
    assert found["partitiond_lane_duration_seconds_bucket", lane, ("le", "+Inf")] == 2
    assert found["partitiond_lane_last_success_timestamp_seconds", lane] > 1.7e9
    assert found["partitiond_master_up",] == 0
    context.master.note(True)
    assert samples(context, tally)["partitiond_master_up",] == 1


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (Result(["a"], []), True),
        (Result([], [("usage", AccountingError("accounting.ledger_full", "full"))]), False),
        (Outcome(), True),
        (Outcome(failures=[("tap", OSError())]), False),
        ({"failures": ["tap"]}, False),
        ({"failures": []}, True),
        (None, True),
    ],
)
def test_a_pass_with_failures_is_no_success(answer, good):
    tally = metrics.Tally()
    lane = Lane("report", 60.0, lambda: answer, threading.Event(), tally)
    lane._pass()
    assert lane.once(lambda: answer) is answer
    name = "partitiond_lane_last_success_timestamp_seconds"
    (told,) = [one for one in tally.families() if one.name == name]
    assert bool(told.samples) is good


def test_a_lane_waits_for_another_s_first_pass_but_not_for_ever():
    stop, tally, entered, hangs = threading.Event(), metrics.Tally(), threading.Event(), threading.Event()
    first = Lane("instances", 60.0, hangs.wait, stop, tally)
    second = Lane("promises", 60.0, entered.set, stop, tally, after=first)
    second.patience = 0.1
    third = Lane("software", 60.0, lambda: None, stop, tally, after=first)
    lanes = (first, second, third)
    for lane in lanes:
        lane.start()
    try:
        assert entered.wait(20)
        assert not third.tried.is_set()
        hangs.set()
        assert third.tried.wait(20)
    finally:
        hangs.set()
        stop.set()
        for lane in lanes:
            lane.wake()
            lane.join(20)


def test_documents_are_told_by_state_and_not_to_tenants(context):
    ledger = context.meters.ledger()
    with ledger.transaction("IMMEDIATE") as connection:
        for number, state in enumerate(("waiting", "waiting", "refused")):
            connection.execute(
                "INSERT INTO document (reference, day, kind, partition, guid, content, state, made, changed)"
                " VALUES (?, '2026-11-22', 'node', '', '', '', ?, 0, 0)",
                (str(number), state),
            )
    context.meters._passes += 1
    found = samples(context, metrics.Tally())
    name = "partitiond_report_documents"
    assert found[name, ("state", "waiting")] == 2
    assert found[name, ("state", "refused")] == 1
    assert found[name, ("state", "ambiguous")] == 0
    assert name.encode() not in metrics.of_partition(context, "slappart0")


def test_a_partition_is_up_when_none_of_its_services_is_out(context):
    """Also when supervisord is dead, or does not have the group; a program of etc/run that came to its end is none."""
    names = [f"slappart{number}" for number in range(5)]
    context.node = SimpleNamespace(partitions=[SimpleNamespace(id=name) for name in names])
    for name in names:
        life = "failed" if name == "slappart4" else "started"
        context.store.save_instance(InstanceState(name, life, "started", instance_guid="SOFTINST-1"))
    groups = context.supervisor.groups_directory
    groups.mkdir(parents=True)
    for name in names[:3]:
        (groups / f"{name}.conf").touch()

    def up(*processes):
        context.looked = SimpleNamespace(processes=processes)
        (found,) = metrics._up(context, context.node.partitions)
        return "".join(line.rpartition(" ")[2] for line in found.samples.splitlines())

    ran = Process("slappart0", "setup", "EXITED", 0, True)
    service = Process("slappart1", "db-on-watch", "RUNNING", 1, True)
    broken = Process("slappart2", "web-on-watch", "EXITED", 0, True)
    assert up(ran, service, broken) == "11010"
    assert up(ran, broken) == "10010", "supervisord does not have the group"
    assert up() == "00010", "supervisord is dead: only who has no programs is as it shall be"


def test_refusals_are_told_by_partition_and_rule(bridge, node_config, command):
    from partitiond import converge

    node = node_config(2)
    done = command("-c", node.path, "apply")
    assert done.returncode == 0, done.stderr
    context = Context.of(node.load())
    seen = converge.observe(context)
    thief = seen.node.partitions[1]

    foreign = ("send", f"{bridge.prefix}:ffff::1", bridge.gateway)
    assert attempts(thief.user, foreign, foreign, foreign) == ["EPERM"] * 3
    context.meters.record(context, seen.node)
    found = samples(context, metrics.Tally())
    name = "partitiond_partition_denied_packets_total"
    assert {key: value for key, value in found.items() if key[0] == name} == {
        (name, ("partition", thief.id), ("rule", "foreign")): 3
    }
    context.meters.close()


def test_one_state_that_can_not_be_read_does_not_stop_the_meters(bridge, node_config, command):
    from partitiond import converge, lanes

    node = node_config(2, quota={"default": "1 GB"})
    done = command("-c", node.path, "apply")
    assert done.returncode == 0, done.stderr
    context = Context.of(node.load())
    for name in ("slappart0", "slappart1"):
        context.store.save_instance(InstanceState(name, life="stopped", instance_guid=f"SOFTINST {name}"))
    context.looked = converge.observe(context)
    context.node = target = context.looked.node
    lanes.usage(context)
    (node.state / "instances" / "slappart1.json").write_bytes(b"[]")
    lanes.usage(context)
    context.meters.settle(context, target)
    assert context.meters.passes == 3
    with context.meters.reader() as ledger:
        assert {one.id: one.instance_guid for one in ledger.totals()} == {
            "slappart0": "SOFTINST slappart0",
            "slappart1": "SOFTINST slappart1",
        }
    assert len(context.meters.open_cases()) == 1
    context.meters.close()
