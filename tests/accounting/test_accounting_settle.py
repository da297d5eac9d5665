"""The rules by which absolute readings become amounts."""

import random

import pytest
from accounting_world import a_pass, count, gauge, process, traffic

from accounting import Ledger, Received, TrafficReading
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


# --- two counters of what an address receives --------------------------------------------------------------------------

SECOND = METER._replace(name="received")


def both(first, second, epoch="m1", *, later=None, first_epoch="e1"):
    """What the second one received has packets of 7 bytes."""
    later = second if later is None else later
    received = Received(epoch, 7 * second, second, 7 * later, later)
    return traffic(value=first, epoch=first_epoch)._replace(received=received)


def level_of(second, epoch="m1"):
    return Level(epoch, (7 * second, 0, second, 0, 0))


@pytest.mark.parametrize(
    ("first", "last", "reading", "came", "level", "gap"),
    [
        # nothing is known of either: the second one, wholly
        (None, None, both(100, 30), 30, 30, False),
        (None, None, both(100, 10, later=12), "first", 12, False),
        # it had come as far before the next pass, which counts the rest
        (None, None, both(100, 0, later=15), 0, 0, False),
        # it counts, whatever the first one says that came, and though that began anew
        (100, 30, both(150, 40), 10, 40, False),
        (100, 30, both(100, 40), 10, 40, False),
        (100, 30, both(150, 30), 0, 30, False),
        (100, 30, both(50, 40), 10, 40, True),
        (100, 30, both(150, 40, first_epoch="e2"), 10, 40, True),
        (None, 30, both(150, 40), 10, 40, False),
        # the second one is new, or counts now, or is another: once more the first one, and what the second had come to then
        (100, None, both(150, 40, later=45), "first", 45, False),
        (100, ("", 0), both(150, 40, later=45), "first", 45, False),
        (100, ("m0", 10), both(150, 40, later=45), "first", 45, True),
        (100, 60, both(150, 40, later=45), "first", 45, True),
        # it counts no more: the first one, from where it was all along
        (100, 30, both(150, 0, ""), "first", ("", 0), True),
        (100, ("", 0), both(150, 0, ""), "first", ("", 0), False),
        # both began since the last pass, as after a reboot: the second one; but where it may have counted before, not
        (100, ("m0", 30), both(50, 40, first_epoch="e2"), 40, 40, True),
        (100, ("", 0), both(50, 40, first_epoch="e2"), 40, 40, True),
        (100, None, both(50, 40, later=45, first_epoch="e2"), "whole first", 45, True),
    ],
)
def test_of_two_counters_one_counts(first, last, reading, came, level, gap):
    levels = {} if first is None else dict(books(first).levels)
    if last is not None:
        levels[SECOND] = level_of(last) if isinstance(last, int) else level_of(last[1], last[0])
    settled = settle(a_pass(1, reading), Books(levels, {}))
    plain = settle(a_pass(1, reading._replace(received=None)), Books(levels, {})).amounts[METER]
    found = settled.amounts[METER]
    assert (found[1], found[3]) == (plain[1], plain[3])
    expected = (7 * came, came) if isinstance(came, int) else (plain[0], plain[2])
    assert (found[0], found[2]) == expected
    now = level_of(level) if isinstance(level, int) else level_of(level[1], level[0])
    assert (levels | settled.levels)[SECOND] == now
    assert set(settled.restarted) == ({METER} if gap else set())
    assert set(settled.amounts) == {METER}


def test_whichever_counts_nothing_counts_twice_and_nothing_is_lost():
    """Both see the same; the second one comes, goes and is another at every pass, whatever the order."""
    dice = random.Random(5)  # noqa: S311 - dice of a test
    ledger, told = Books({}, {}), 0
    sent = began = 0
    epoch = ""
    for _ in range(2000):
        sent += dice.randrange(3)
        if dice.random() < 0.3:
            epoch, began = dice.choice(["", f"m{sent}"]), sent
        value = sent - began if epoch else 0
        reading = TrafficReading("slappart0", "::", "ipv6", "remote", "e", 7 * sent, 0, sent, 0)
        came = Received(epoch, 7 * value, value, 7 * value, value)
        settled = settle(a_pass(1, reading._replace(received=came)), ledger)
        (amounts,) = settled.amounts.values()
        told += amounts[2]
        assert (amounts[0], told) == (7 * amounts[2], sent)
        ledger = Books({**ledger.levels, **settled.levels}, {})


def test_after_damage_the_second_counter_is_not_counted_again_either():
    settled = settle(a_pass(1, both(100, 30)), Books({}, {}, skip_new_readings=True))
    assert settled.amounts == {METER: (0, 0, 0, 0, 0)}
    settled = settle(a_pass(2, both(110, 32)), Books(settled.levels, {}))
    assert settled.amounts == {METER: (14, 20, 2, 2, 0)}


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


def io_of(known, *processes):
    amounts = settle(a_pass(1, processes=processes), Books({}, known)).amounts
    return tuple(
        amounts[Meter("slappart0", name)][4] if Meter("slappart0", name) in amounts else None
        for name in ("io_read_bytes", "io_write_bytes")
    )


def level(read, written, parent=1, partition="slappart0"):
    return ProcessLevel(partition, 0, read, written, parent)


def key(pid, started=1, boot="b1"):
    return ProcessKey(pid, started, boot)


def test_bytes_read_and_written_are_kept_by_process_and_missing_ones_miss_nothing_else():
    known = {key(7): level(10, 20)}
    assert io_of(known, process(7, 0, io=(15, 50)), process(8, 0, io=(1, 2))) == (6, 32)
    assert io_of(known, process(7, 5)) == (None, None)
    settled = settle(a_pass(1, processes=[process(7, 5)]), Books({}, known))
    assert settled.amounts == {CPU: (0, 0, 0, 0, 5)}
    assert settled.processes == {key(7): ProcessLevel("slappart0", 5, 10, 20, 0)}
    assert io_of(known, process(7, 0, io=(1, 2))) == (0, 0)
    # the first pass after a damaged ledger takes levels alone
    settled = settle(a_pass(1, processes=[process(7, 5, io=(1, 2))]), Books({}, {}, skip_new_processes=True))
    assert set(settled.amounts.values()) == {(0, 0, 0, 0, 0)}


@pytest.mark.parametrize(
    ("known", "present", "counted"),
    [
        # 8 was counted up to 100 and 200; its parent 7 waited for it, and did 1 and 2 of its own
        ({key(7): level(5, 5), key(8): level(100, 200, 7)}, process(7, 0, io=(106, 207)), (1, 2)),
        # what 8 did since, nobody has counted
        ({key(7): level(5, 5), key(8): level(100, 200, 7)}, process(7, 0, io=(156, 207)), (51, 2)),
        # 8 and its parent 7 ended, and 6 waited for 7
        (
            {key(6): level(0, 0), key(7): level(5, 5, 6), key(8): level(100, 200, 7)},
            process(6, 0, io=(110, 210)),
            (5, 5),
        ),
        # of another's child
        ({key(7): level(5, 5), key(8): level(100, 200, 9)}, process(7, 0, io=(10, 10)), (5, 5)),
        # 7 was a child itself when 8 had such a parent: the pid was taken anew
        ({key(8, 2): level(100, 200, 7)}, process(7, 0, started=3, io=(10, 10)), (10, 10)),
        # whoever never waits has less than would be taken off
        ({key(7): level(5, 5), key(8): level(100, 200, 7)}, process(7, 0, io=(6, 6)), (0, 0)),
        # parents of each other, which pids that were taken anew can look like
        ({key(8): level(1, 1, 9), key(9): level(1, 1, 8)}, process(7, 0, io=(6, 6)), (6, 6)),
    ],
)
def test_what_an_ended_child_was_charged_is_not_charged_to_its_parent_too(known, present, counted):
    assert io_of(known, present) == counted


def test_no_scan_ends_no_process_an_empty_scan_ends_all():
    known = {ProcessKey(7, 1, "b1"): ProcessLevel("slappart0", 400)}
    assert settle(a_pass(1), Books({}, known)).ended == []
    assert settle(a_pass(1, processes=[]), Books({}, known)).ended == [ProcessKey(7, 1, "b1")]


def test_a_process_that_can_not_be_read_for_a_while_is_not_charged_anew(tmp_path):
    parent = [process(1, 3_600_000_000, io=(10**12, 0)), process(1, 3_700_000_000, io=(10**12 + 5 + 3, 0))]
    child = process(2, 1_000_000, io=(5, 0), parent=1)
    with Ledger(tmp_path / "l") as ledger:
        ledger.record(a_pass(1, processes=[parent[0], child]))
        ledger.record(a_pass(2, processes=[child], unreadable=[1]))
        ledger.record(
            a_pass(3, processes=[], unreadable=[1, 7])
        )  # the child has ended, and nobody knows what became of it
        ledger.record(a_pass(4, processes=[parent[1]]))
        (used,) = ledger.totals()
        assert used.cpu_seconds == 3700 + 1
        assert used.io_read_bytes == 10**12 + 5 + 3
        ledger.record(a_pass(5, processes=[]))
        ledger.record(a_pass(6, processes=[process(1, 1_000_000)]))  # ended, and the pid is used again
        assert ledger.totals()[0].cpu_seconds == 3700 + 1 + 1


def test_seconds_are_kept_in_whole_microseconds():
    assert settle(a_pass(1, count("cpu_seconds", 0.1234567)), Books({}, {})).amounts[CPU][4] == 123457


@pytest.mark.parametrize(
    "reading",
    [
        a_pass(1, traffic(value=-1)),
        a_pass(1, traffic(value=2**63)),
        a_pass(1, traffic(value=1), traffic(value=2)),
        a_pass(1, both(1, -1)),
        a_pass(1, both(1, 1, later=2**63)),
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
