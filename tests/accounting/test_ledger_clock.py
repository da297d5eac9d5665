"""Clocks that are set, sleep, flap or say nonsense: what was used counts once, and a report of those times says so."""

import math
from itertools import pairwise

import pytest
from accounting_world import a_pass, bytes_in, count, gauge, traffic

from accounting import AccountingError, Ledger

KEY = ("slappart0", None)
DAY = 86_400
NOW = 1_790_000_000.0
YEAR = 365 * DAY


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


class Clock:
    """A node whose clock can be set; records a pass now and then."""

    def __init__(self, ledger):
        self.ledger = ledger
        self.at, self.uptime, self.boot, self.value = NOW, 1000.0, "b1", 0

    def record(self, passes=1, step=10.0, uptime=True):
        """Record passes; give the gaps that were found."""
        found = []
        for _ in range(passes):
            self.at += step
            self.uptime += step
            self.value += 1
            found += self.ledger.record(
                a_pass(
                    self.at,
                    traffic(value=self.value),
                    gauge("memory_bytes", self.value),
                    boot=self.boot,
                    uptime=self.uptime if uptime else None,
                )
            )
        return found

    def reboot(self, off):
        self.at += off
        self.boot, self.uptime = self.boot + "+", 20.0


def test_a_clock_that_is_set_is_said_in_every_report_of_those_times(ledger):
    clock = Clock(ledger)
    assert clock.record(3) == []
    clock.at += YEAR
    (gap,) = clock.record()
    assert (gap.start, gap.end) == (NOW + 30, NOW + YEAR + 40)
    assert gap.reason == (
        "the clock was set forward by 365 days, 0:00:00; what was used since 2026-09-21T14:13:50.000000Z"
        " counts at 2027-09-21T14:14:00.000000Z"
    )
    assert ledger.usage(NOW + DAY, NOW + 2 * DAY).gaps == (gap,)
    assert ledger.usage(None, NOW + 30).gaps == ()
    clock.at -= YEAR
    (back,) = clock.record()
    assert "set back by 365 days" in back.reason
    assert (back.start, back.end) == (NOW + 50, NOW + YEAR + 40)
    assert bytes_in(ledger) == {KEY: 5}
    assert bytes_in(ledger, NOW, NOW + 60) == {KEY: 4}
    assert bytes_in(ledger, NOW + YEAR, None) == {KEY: 1}


@pytest.mark.parametrize("seconds", [3500, -3500, 0])
def test_what_a_clock_is_corrected_by_is_no_news(ledger, seconds):
    clock = Clock(ledger)
    clock.record(2)
    clock.at += seconds
    assert clock.record(2) == []


def test_a_node_that_slept_and_a_daemon_that_was_down_are_no_clock_that_was_set(ledger):
    clock = Clock(ledger)
    clock.record(2)
    assert clock.record(step=9 * 3600.0) == []
    clock.reboot(off=3 * DAY)
    assert clock.record(2) == []
    clock.reboot(off=10)  # and was up for longer before
    assert clock.record(2, step=2 * 3600.0) == []


def test_a_clock_that_went_back_over_a_reboot_is_said(ledger):
    clock = Clock(ledger)
    clock.record(2)
    clock.reboot(off=-clock.at)  # no battery: 1970
    (gap,) = clock.record()
    assert "set back" in gap.reason
    clock.at = NOW + 3600
    (gap,) = clock.record()
    assert "set forward" in gap.reason
    assert bytes_in(ledger) == {KEY: 4}


def test_passes_without_an_uptime_between_others_make_no_jump(ledger):
    clock = Clock(ledger)
    clock.record(2)
    assert clock.record(1, step=2 * 3600.0, uptime=False) == []
    assert clock.record(1, step=2 * 3600.0) == []
    clock.at -= 2 * DAY
    (gap,) = clock.record(1, uptime=False)
    assert "set back by 1 day, 23:59:50" in gap.reason


def periods(ledger):
    return ledger._connection.execute("SELECT day, first_seq, until_seq FROM period ORDER BY id").fetchall()


@pytest.mark.parametrize("there", [YEAR, -YEAR, -NOW, 74 * YEAR], ids=["ahead", "back", "1970", "2100"])
def test_a_clock_that_was_wrong_for_a_while_breaks_nothing(ledger, there):
    clock = Clock(ledger)
    clock.record(20)
    clock.at += there
    clock.record(20)
    assert not ledger.thin(clock.at, 0.1)
    clock.at -= there
    clock.record(20)
    clock.record(3, step=DAY)
    found = periods(ledger)
    # each pass is in one period, and every period but the last one is closed
    assert [first for _, first, _ in found] == [1, *(until + 1 for _, _, until in found[:-1])]
    assert [until is None for _, _, until in found] == [False] * (len(found) - 1) + [True]
    assert [(first, until) for _, first, until in found[:2]] == [(1, 20), (21, 40)]
    ledger._connection.execute("UPDATE period SET documented = 1 WHERE until_seq IS NOT NULL")
    while ledger.thin(clock.at, 0):
        pass
    passes = ledger._connection.execute("SELECT count(*) FROM pass").fetchone()[0]
    assert passes < 20
    assert bytes_in(ledger) == {KEY: 63}
    assert bytes_in(ledger, NOW, clock.at) == {KEY: 43}
    assert bytes_in(ledger, NOW - DAY + there, NOW + DAY + there) == {KEY: 20}
    assert ledger.usage(None, None).partitions[0].memory_bytes == 63
    ledger.usage(None, None).as_json()


def test_seconds_around_midnight_make_no_second_day(ledger):
    clock = Clock(ledger)
    clock.at = (NOW // DAY + 1) * DAY - 25
    clock.record(2)
    for _ in range(20):
        clock.record(step=10)
        clock.record(step=-9)
    assert [day for day, _, _ in periods(ledger)] == ["2026-09-21", "2026-09-22"]
    (balanced,) = ledger._connection.execute("SELECT count(*) FROM balanced").fetchone()
    assert balanced <= 3
    midnight = (NOW // DAY + 1) * DAY
    parts = [bytes_in(ledger, *pair)[KEY] for pair in pairwise((NOW, midnight, midnight + DAY))]
    assert sum(parts) == 42
    ledger._connection.execute("UPDATE period SET documented = 1 WHERE until_seq IS NOT NULL")
    clock.record(2, step=100.0 * DAY)
    ledger._connection.execute("UPDATE period SET documented = 1 WHERE until_seq IS NOT NULL")
    while ledger.thin(clock.at, 0):
        pass
    assert parts == [bytes_in(ledger, *pair)[KEY] for pair in pairwise((NOW, midnight, midnight + DAY))]


@pytest.mark.parametrize("at", [math.nan, math.inf, -1e12, 1e12])
def test_what_no_calendar_knows_is_refused(ledger, at):
    with pytest.raises(AccountingError) as caught:
        ledger.record(a_pass(at, count("denied_packets", 1)))
    assert caught.value.code == "accounting.reading"
    with pytest.raises(AccountingError):
        ledger.record(a_pass(1, boot="b", uptime=at))
