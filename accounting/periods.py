"""Calendar periods in UTC: days, weeks that begin on Monday (ISO 8601), months.  Pure.

UTC has no hour that is there twice, so a day has 86400 seconds and a month as many days as the calendar says.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from accounting.errors import AccountingError

if TYPE_CHECKING:
    from collections.abc import Callable

Kind = Literal["day", "week", "month"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MOST = 1000
"""Periods of one question: almost three years of days."""


class Period(NamedTuple):
    """A time from ``start`` to ``end``, which is the start of the next one (Unix seconds)."""

    start: float
    end: float


def begin(moment: datetime, kind: Kind) -> datetime:
    """Return when the period began that a moment lies in."""
    day = moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if kind == "week":
        return day - timedelta(days=day.weekday())
    return day.replace(day=1) if kind == "month" else day


def step(first: datetime, kind: Kind, count: int) -> datetime:
    """Return the begin of the period ``count`` after (or before) the one that begins at ``first``.

    Raises OverflowError, ValueError where the calendar ends (the years 1 and 9999).
    """
    if kind == "month":
        months = first.year * 12 + first.month - 1 + count
        return first.replace(year=months // 12, month=months % 12 + 1)
    return first + timedelta(days=count * (7 if kind == "week" else 1))


def last(kind: Kind, count: int, now: float) -> tuple[Period, ...]:
    """Return the last so many periods; the last one is that in which ``now`` lies.  Raises as :func:`between`."""
    return _periods(kind, now, 1 - count, lambda found, _: len(found) < count)


def between(kind: Kind, start: float, end: float) -> tuple[Period, ...]:
    """Return the periods from the one that ``start`` lies in to the one that ends at or after ``end``.

    Raises AccountingError ``accounting.interval``: it ends before it starts, is too long, or leaves the calendar.
    """
    if start > end:
        raise _wrong("the interval ends before it starts", "give the earlier time first")
    return _periods(kind, start, 0, lambda found, at: at < end or not found)


def _periods(
    kind: Kind, start: float, back: int, more: Callable[[list[Period], float], bool]
) -> tuple[Period, ...]:
    found: list[Period] = []
    try:
        one = step(begin(datetime.fromtimestamp(start, UTC), kind), kind, back)
        while more(found, at := one.timestamp()):
            if len(found) == MOST:
                raise _wrong(f"these are more than {MOST} periods", "ask for fewer, or for longer ones")
            one = step(one, kind, 1)
            found.append(Period(at, one.timestamp()))
    except (OverflowError, ValueError) as error:
        raise _wrong("the calendar ends before that", "give times between the years 2 and 9998") from error
    return tuple(found)


def _wrong(message: str, hint: str) -> AccountingError:
    return AccountingError("accounting.interval", message, hint=hint)
