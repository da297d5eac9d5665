"""What is asked of usage: the words of ``usage`` and of ``/1/usage``, which are the same, and the answer from the ledger.

Promises: a word that is not allowed is a :class:`~partitiond.errors.WrongUseError` that says what is; nothing here writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from accounting import periods
from accounting.errors import AccountingError
from partitiond.errors import WrongUseError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from accounting.ledger import LedgerReader
    from accounting.periods import Kind, Period

WORDS = ("from", "to", "partition", "period", "last")

TIMES = "2026-11-22T15:00:00Z, 2026-11-22 or 2026-11 (their beginning, UTC), today, yesterday, now"

_USUAL: Mapping[Kind, int] = {"day": 7, "week": 5, "month": 12}
"""How many periods there are without ``last``: a week, a month and a bit, a year."""


def _any(_guid: str | None) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Query:
    """One question. ``spans`` are the calendar periods of kind ``period``; without one it is about ``start`` to ``end``."""

    start: float | None = None
    end: float | None = None
    partition: str | None = None
    period: Kind | None = None
    spans: tuple[Period, ...] = ()


def parse(words: Mapping[str, str | None], now: float) -> Query:
    """Read the words; those that are None were not said.  Raises WrongUseError."""
    said = {name: word for name, word in words.items() if word is not None}
    for name in said:
        if name not in WORDS:
            raise WrongUseError("usage.query", f"{name!r} is unknown", hint=f"allowed: {', '.join(WORDS)}")
    start, end = (time(said[name], now) if name in said else None for name in ("from", "to"))
    if start is not None and end is not None and start > end:
        raise WrongUseError(
            "usage.query",
            f"the interval ends ({said['to']}) before it starts ({said['from']})",
            hint="give the earlier time first",
        )
    partition = said.get("partition")
    if "period" not in said:
        if "last" in said:
            raise WrongUseError("usage.query", "last goes with a period", hint=_periods())
        return Query(start, end, partition)
    kind = _kind(said["period"])
    return Query(start, end, partition, kind, _spans(kind, said.get("last"), start, end, now))


def _spans(
    kind: Kind, last: str | None, start: float | None, end: float | None, now: float
) -> tuple[Period, ...]:
    if last is not None and start is not None:
        raise WrongUseError("usage.query", "last and from exclude each other", hint="give one of them")
    count = _USUAL[kind] if last is None else _count(last)
    until = now if end is None else end
    try:
        if start is not None:
            return periods.between(kind, start, max(start, until))
        # what ends with a day is about that day, not about the one that begins then
        return periods.last(kind, count, until if end is None else until - 1e-6)
    except AccountingError as error:
        raise WrongUseError("usage.query", str(error), hint=error.hint) from error


def _periods() -> str:
    return f"allowed: a period of {', '.join(periods.KINDS)}, and last from 1 to {periods.MOST}"


def _kind(text: str) -> Kind:
    for kind in periods.KINDS:
        if text == kind:
            return kind
    raise WrongUseError("usage.query", f"{text!r} is no period", hint=_periods())


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) or not 1 <= int(text) <= periods.MOST:
        raise WrongUseError("usage.query", f"last is {text!r}", hint=_periods())
    return int(text)


def time(text: str, now: float) -> float:
    """Read a time, in Unix seconds.  Raises WrongUseError."""
    today = periods.begin(datetime.fromtimestamp(now, UTC), "day")
    named = {"now": now, "today": today.timestamp(), "yesterday": (today - timedelta(days=1)).timestamp()}
    if text in named:
        return named[text]
    # a month alone is no time to fromisoformat
    whole = f"{text}-01" if re.fullmatch(r"[0-9]{4}-[0-9]{2}", text, re.ASCII) else text
    try:
        found = datetime.fromisoformat(whole)
        # of years that the calendar barely has, and of offsets that lead out of it
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC).timestamp()
    except (ValueError, OverflowError) as error:
        raise WrongUseError("usage.query", f"{text!r} is no time", hint=f"allowed: {TIMES}") from error


def answer(
    ledger: LedgerReader, query: Query, *, only: Callable[[str | None], bool] = _any
) -> dict[str, Any]:
    """Return the contract's ``usage``, or one for each of the periods; ``only`` of instances (by guid) that pass a test.

    Raises AccountingError.
    """
    if query.period is None:
        return _told(ledger, query.start, query.end, query.partition, only)
    found = [_told(ledger, *span, query.partition, only) for span in query.spans]
    return {"period": query.period, "periods": found}


def _told(
    ledger: LedgerReader,
    start: float | None,
    end: float | None,
    partition: str | None,
    only: Callable[[str | None], bool],
) -> dict[str, Any]:
    value: dict[str, Any] = dict(ledger.usage(start, end, partition).as_json())
    kept = [item for item in value["partitions"] if only(item["instance_guid"])]
    return {**value, "partitions": kept}


def mentions(value: dict[str, Any]) -> bool:
    """Whether an answer is about any partition."""
    return any(one["partitions"] for one in value.get("periods", (value,)))
