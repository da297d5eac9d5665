"""The rules by which absolute readings become amounts."""

import pytest
from accounting_world import a_pass, count, gauge, process, traffic

from accounting.errors import AccountingError
from accounting.settle import Books, Level, Meter, ProcessKey, ProcessLevel, restart_reasons, settle

METER = Meter("slappart0", "traffic", "2001:db8::1", "ipv6", "remote")
CPU = Meter("slappart0", "cpu_seconds")


def books(value, epoch="e1"):
    return Books({METER: Level(epoch, (value, 2 * value, value // 10, value // 5, 0))}, {})


def test_a_counter_never_seen_counts_wholly():
    settled = settle(a_pass(1, traffic(value=100)), Books({}, {}))
    assert settled.amounts == {METER: (100, 200, 10, 20, 0)}
    assert settled.restarted == []


def test_the_same_epoch_counts_the_difference():
    settled = settle(a_pass(1, traffic(value=130)), books(100))
    assert settled.amounts == {METER: (30, 60, 3, 6, 0)}
    assert settled.levels == {METER: Level("e1", (130, 260, 13, 26, 0))}


def test_an_unchanged_counter_changes_nothing_but_has_an_amount():
    settled = settle(a_pass(1, traffic(value=100)), books(100))
    assert settled.amounts == {METER: (0, 0, 0, 0, 0)}
    assert settled.levels == {}


@pytest.mark.parametrize(("value", "epoch"), [(500, "e2"), (40, "e1"), (0, "e1")])
def test_a_new_epoch_or_a_smaller_value_counts_wholly_and_is_a_restart(value, epoch):
    settled = settle(a_pass(1, traffic(value=value, epoch=epoch)), books(100))
    assert settled.amounts[METER][0] == value
    assert settled.restarted == [METER]
    assert restart_reasons(settled.restarted) == {"slappart0": "counters restarted (ipv6)"}


def test_if_one_of_four_went_back_all_restarted():
    """Packets that have already passed their old value do not hide that the bytes began again."""
    last = Books({METER: Level("e1", (1000, 1000, 1, 1, 0))}, {})
    assert settle(a_pass(1, traffic(value=50)), last).amounts == {METER: (50, 100, 5, 10, 0)}


def test_a_new_process_counts_wholly_a_known_one_the_difference():
    known = {ProcessKey(7, 1, "b1"): ProcessLevel("slappart0", 400)}
    settled = settle(a_pass(1, processes=[process(7, 450), process(8, 30)]), Books({}, known))
    assert settled.amounts == {CPU: (0, 0, 0, 0, 80)}
    assert settled.ended == []


@pytest.mark.parametrize("other", [{"started": 2}, {"boot": "b2"}])
def test_a_pid_used_again_is_another_process(other):
    known = {ProcessKey(7, 1, "b1"): ProcessLevel("slappart0", 400)}
    settled = settle(a_pass(1, processes=[process(7, 450, **other)]), Books({}, known))
    assert settled.amounts == {CPU: (0, 0, 0, 0, 450)}
    assert settled.ended == [ProcessKey(7, 1, "b1")]


def test_a_process_that_changed_its_user_is_not_charged_twice():
    known = {ProcessKey(7, 1, "b1"): ProcessLevel("slappart1", 400)}
    settled = settle(a_pass(1, processes=[process(7, 450)]), Books({}, known))
    assert settled.amounts == {CPU: (0, 0, 0, 0, 50)}


def test_processor_time_that_went_back_is_not_counted_again_later():
    known = {ProcessKey(7, 1, "b1"): ProcessLevel("slappart0", 400)}
    settled = settle(a_pass(1, processes=[process(7, 390)]), Books({}, known))
    assert settled.amounts == {CPU: (0, 0, 0, 0, 0)}
    assert settled.processes == {}


def test_no_scan_ends_no_process_an_empty_scan_ends_all():
    known = {ProcessKey(7, 1, "b1"): ProcessLevel("slappart0", 400)}
    assert settle(a_pass(1), Books({}, known)).ended == []
    assert settle(a_pass(1, processes=[]), Books({}, known)).ended == [ProcessKey(7, 1, "b1")]


def test_seconds_are_kept_in_whole_microseconds():
    assert settle(a_pass(1, count("cpu_seconds", 0.1234567)), Books({}, {})).amounts[CPU][4] == 123457


@pytest.mark.parametrize(
    "reading",
    [
        a_pass(1, traffic(value=-1)),
        a_pass(1, traffic(value=2**63)),
        a_pass(1, traffic(value=1), traffic(value=2)),
        a_pass(1, count("denied_packets", 1), count("denied_packets", 1)),
        a_pass(1, count("cpu_seconds", float("nan"))),
        a_pass(1, count("denied_packets", float("inf"))),
        a_pass(1, count("denied_packets", -1)),
        a_pass(1, gauge("disk_bytes", -1)),
        a_pass(1, gauge("disk_bytes", 2**63)),
        a_pass(1, gauge("disk_bytes", 1), gauge("disk_bytes", 1)),
        a_pass(1, processes=[process(7, 1), process(7, 1)]),
        a_pass(1, processes=[process(7, -1)]),
        a_pass(1, count("cpu_seconds", 1), processes=[]),
        a_pass(float("nan")),
    ],
)
def test_what_can_not_be_true_is_refused(reading):
    with pytest.raises(AccountingError) as caught:
        settle(reading, Books({}, {}))
    assert caught.value.code == "accounting.reading"
    assert not caught.value.retryable
    assert caught.value.hint
