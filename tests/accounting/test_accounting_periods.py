"""Calendar periods: months of all lengths, leap days, weeks over the end of a year."""

import itertools
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting import periods
from accounting.errors import AccountingError

MOMENTS = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis adds it


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def days(found):
    return [tuple(datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%d") for end in one) for one in found]


@pytest.mark.parametrize(
    ("kind", "count", "now", "expected"),
    [
        ("day", 2, "2028-03-01T12:00", [("2028-02-29", "2028-03-01"), ("2028-03-01", "2028-03-02")]),
        ("day", 2, "2027-03-01T00:00", [("2027-02-28", "2027-03-01"), ("2027-03-01", "2027-03-02")]),
        ("week", 2, "2027-01-01T01:00", [("2026-12-21", "2026-12-28"), ("2026-12-28", "2027-01-04")]),
        ("week", 1, "2026-11-23T00:00", [("2026-11-23", "2026-11-30")]),
        ("week", 1, "2026-11-22T23:59:59.999", [("2026-11-16", "2026-11-23")]),
        (
            "month",
            3,
            "2028-03-31T23:00",
            [("2028-01-01", "2028-02-01"), ("2028-02-01", "2028-03-01"), ("2028-03-01", "2028-04-01")],
        ),
        ("month", 2, "2026-01-31T00:00", [("2025-12-01", "2026-01-01"), ("2026-01-01", "2026-02-01")]),
    ],
)
def test_the_last(kind, count, now, expected):
    assert days(periods.last(kind, count, at(now))) == expected


def test_between():
    found = periods.between("month", at("2026-11-22"), at("2027-01-01"))
    assert days(found) == [("2026-11-01", "2026-12-01"), ("2026-12-01", "2027-01-01")]
    assert days(periods.between("day", at("2026-11-22"), at("2026-11-22"))) == [("2026-11-22", "2026-11-23")]


@given(MOMENTS, st.sampled_from(periods.KINDS), st.integers(1, 30))
def test_they_touch_and_the_last_is_the_present_one(now, kind, count):
    found = periods.last(kind, count, now.timestamp())
    assert len(found) == count
    assert all(one.end == following.start for one, following in itertools.pairwise(found))
    assert found[-1].start <= now.timestamp() < found[-1].end
    first = datetime.fromtimestamp(found[0].start, UTC)
    assert (first.hour, first.minute, first.second) == (0, 0, 0)
    if kind == "week":
        assert first.isoweekday() == 1
    if kind == "month":
        assert first.day == 1
    assert periods.between(kind, found[0].start, found[-1].end) == found


@pytest.mark.parametrize(
    ("kind", "start", "end"),
    [
        ("day", "2026-11-22", "2026-11-21"),
        ("day", "2000-01-01", "2026-01-01"),
        ("month", "9999-12-01", "9999-12-31"),
    ],
)
def test_what_cannot_be(kind, start, end):
    with pytest.raises(AccountingError) as caught:
        periods.between(kind, at(start), at(end))
    assert caught.value.code == "accounting.interval"
    assert caught.value.hint


def test_before_the_calendar():
    with pytest.raises(AccountingError):
        periods.last("month", 1000, at("0050-01-01"))
