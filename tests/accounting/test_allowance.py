"""Where instances stand by their quota: thresholds, months, owners that change, clocks that jump."""

from collections import Counter
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting.allowance import Quota, Standing, judge, month_of, used
from accounting.ledger import Ledger
from accounting.model import Pass, TrafficReading

QUOTA = Quota(1000)
MOMENTS = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis adds it


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("now", "name", "end"),
    [
        ("2028-02-29T23:59:59.999", "2028-02", "2028-03-01"),
        ("2027-02-28T12:00", "2027-02", "2027-03-01"),
        ("2028-03-01T00:00", "2028-03", "2028-04-01"),
        ("2026-12-31T23:59", "2026-12", "2027-01-01"),
    ],
)
def test_months(now, name, end):
    month = month_of(at(now))
    assert (month.name, month.end) == (name, at(end))


@given(MOMENTS)
def test_a_month_holds_its_moment_and_ends_where_the_next_begins(moment):
    month = month_of(moment.timestamp())
    assert month.start <= moment.timestamp() < month.end
    following = month_of(month.end)
    assert following.start == month.end
    assert following.name > month.name
    assert 28 <= (month.end - month.start) / 86400 <= 31


@pytest.mark.parametrize(
    ("octets", "level"), [(0, "within"), (799, "within"), (800, "near"), (999, "near"), (1000, "exceeded")]
)
def test_thresholds(octets, level):
    assert QUOTA.level(octets) == level


def walk(*steps, quota=QUOTA):
    """What is told at each step: (instance, month, octets)."""
    standing, told = None, []
    for instance, month, octets in steps:
        standing, events = judge(quota, standing, instance, month, octets)
        assert (standing.instance, standing.month, standing.used) == (instance, month, octets)
        told.append(events)
    return told


def test_each_threshold_is_told_once():
    steps = [("A", "2026-11", octets) for octets in (0, 800, 900, 1000, 1200)]
    assert walk(*steps) == [(), ("near",), (), ("exceeded",), ()]


def test_who_passes_both_at_once_is_told_of_the_second():
    assert walk(("A", "2026-11", 5000), ("A", "2026-11", 5001)) == [("exceeded",), ()]


def test_a_new_month_is_news_only_to_who_had_exceeded():
    assert walk(("A", "2026-12", 900), ("A", "2027-01", 0)) == [("near",), ()]
    assert walk(("A", "2026-12", 1000), ("A", "2027-01", 0), ("A", "2027-01", 1)) == [
        ("exceeded",),
        ("renewed",),
        (),
    ]
    assert walk(("A", "2026-12", 1000), ("A", "2027-02", 1000)) == [("exceeded",), ("renewed", "exceeded")]


def test_another_instance_begins_anew():
    steps = [("A", "2026-11", 1000), ("B", "2026-11", 0), ("B", "2026-11", 1000), ("B", "2026-12", 0)]
    assert walk(*steps) == [("exceeded",), (), ("exceeded",), ("renewed",)]
    assert walk(("A", "2026-11", 1000), ("B", "2026-12", 0)) == [("exceeded",), ()]


def test_a_clock_that_was_wrong_for_a_while_tells_nothing_twice():
    steps = [("A", month, octets) for month, octets in (("2026-11", 1000), ("1970-01", 0), ("2026-11", 1000))]
    assert walk(*steps) == [("exceeded",), (), ()]
    ahead = [("A", month, octets) for month, octets in (("2026-11", 1000), ("2038-01", 0), ("2026-11", 1000))]
    assert walk(*ahead, ("A", "2026-12", 0)) == [("exceeded",), ("renewed",), (), ("renewed",)]


WALKS = st.lists(
    st.tuples(
        st.sampled_from("AB"), st.sampled_from(("2026-11", "2026-12", "2027-01")), st.integers(0, 1500)
    ),
    max_size=30,
)


@given(WALKS)
def test_nothing_is_told_twice_while_the_instance_stays(steps):
    counts, stays = Counter(), 0
    last = None
    for (instance, month, octets), events in zip(steps, walk(*steps), strict=True):
        if instance != last:
            stays += 1
            last = instance
        counts.update((stays, month, event) for event in events)
        if QUOTA.level(octets) == "exceeded":
            assert counts[stays, month, "exceeded"] == 1
        if "exceeded" in events:
            assert octets >= 1000
        if "near" in events:
            assert 800 <= octets < 1000
    assert set(counts.values()) <= {1}


@given(WALKS)
def test_it_remembers_a_few_months_and_the_present_one(steps):
    standing = None
    for instance, month, octets in steps:
        standing, _ = judge(QUOTA, standing, instance, month, octets)
        assert month in standing.told
        assert len(standing.told) <= 4


def test_only_what_went_to_other_nodes_counts_and_only_for_who_used_it(tmp_path):
    def reading(address, family, scope, octets):
        return TrafficReading("slappart0", address, family, scope, "boot/1", octets, 2 * octets, 1, 1)

    def traffic(octets):
        kinds = (("2001:db8::1", "ipv6"), ("10.0.0.2", "ipv4"), ("::", "ipv6"), ("slaptap0", "tap"))
        remote = (reading(address, family, "remote", octets) for address, family in kinds)
        return (*remote, reading("2001:db8::1", "ipv6", "local", 10**9 * octets))

    moments = [
        at(text) for text in ("2028-01-31T23:00", "2028-02-01T00:00", "2028-02-29T23:00", "2028-03-01T00:30")
    ]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for moment, octets, owner in zip(moments, (0, 1, 11, 111), "AABB", strict=True):
            ledger.record(Pass(moment, {"slappart0": owner}, traffic(octets)))
        found = {}
        for moment in moments:
            month = month_of(moment)
            found[month.name] = used(ledger.usage(month.start, month.end).partitions)
    # a pass at the very end of a month is of what went by before it
    assert found["2028-01"] == {("slappart0", "A"): 3 * 4}
    assert found["2028-02"].get(("slappart0", "B")) == 3 * 4 * 10
    assert found["2028-03"] == {("slappart0", "B"): 3 * 4 * 100}


def test_a_standing_is_worth_what_the_quota_of_now_says():
    standing, _ = judge(Quota(100), None, "A", "2026-11", 500)
    assert Quota(100).level(standing.used) == "exceeded"
    assert Quota(1000).level(standing.used) == "within"
    assert standing == Standing("A", "2026-11", 500, {"2026-11": frozenset({"exceeded"})})
