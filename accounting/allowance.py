"""How much a partition may exchange with other nodes in a calendar month (UTC), and where it stands.  Pure.

Promises: an instance is told of a threshold once a month, whatever the clock does; what its predecessor in the partition used
is not its own; a month that began is a new one for everybody.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from accounting import periods

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from accounting.model import PartitionUsage

Level = Literal["within", "near", "exceeded"]
Event = Literal["near", "exceeded", "renewed"]
EVENTS: tuple[Event, ...] = get_args(Event)

_NEAR_PERCENT = 80
_MONTHS = 3
"""So many months are remembered of each instance: a clock that is set back for a while tells nothing twice."""


@dataclass(frozen=True, slots=True)
class Quota:
    """Bytes of a month, and what becomes of who used them: with a rate (bits per second, each way) it is limited to that."""

    octets: int
    bits_per_second: int | None = None

    @property
    def action(self) -> Literal["warn", "limit"]:
        """What is done when it is exceeded."""
        return "warn" if self.bits_per_second is None else "limit"

    def level(self, used: int) -> Level:
        """Say where somebody stands who used so many bytes."""
        if used >= self.octets:
            return "exceeded"
        return "near" if 100 * used >= _NEAR_PERCENT * self.octets else "within"


class Month(NamedTuple):
    """A calendar month in UTC: ``2028-02``, and its bounds in Unix seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Standing:
    """What an instance used in a month, and what was told of it in the months before and in this one."""

    instance: str
    month: str
    used: int
    told: Mapping[str, frozenset[Event]] = field(default_factory=dict)


def month_of(at: float) -> Month:
    """Return the month that a time lies in.  Raises AccountingError ``accounting.interval`` where the calendar ends."""
    (period,) = periods.last("month", 1, at)
    return Month(datetime.fromtimestamp(period.start, UTC).strftime("%Y-%m"), *period)


def used(entries: Iterable[PartitionUsage]) -> dict[tuple[str, str], int]:
    """Return the bytes that each instance exchanged with other nodes, both ways, by partition and instance."""
    found: dict[tuple[str, str], int] = {}
    for entry in entries:
        if entry.instance_guid:
            key = (entry.id, entry.instance_guid)
            octets = sum(one.bytes_in + one.bytes_out for one in entry.addresses if one.scope == "remote")
            found[key] = found.get(key, 0) + octets
    return found


def judge(
    quota: Quota, before: Standing | None, instance: str, month: str, octets: int
) -> tuple[Standing, tuple[Event, ...]]:
    """Return where an instance stands in a month, and what is to be told now."""
    if before is None or before.instance != instance:
        before = Standing(instance, month, 0)
    told = before.told.get(month, frozenset())
    level = quota.level(octets)
    now: list[Event] = []
    if _renewed(before, month) and "renewed" not in told:
        now.append("renewed")
    if level == "exceeded" and "exceeded" not in told:
        now.append("exceeded")
    if level == "near" and not told & {"near", "exceeded"}:
        now.append("near")
    months = {**before.told, month: told.union(now)}
    kept = {name: months[name] for name in sorted(months)[-_MONTHS:]}
    # where the clock was set far back, this month is older than all that are remembered
    kept.setdefault(month, months[month])
    return replace(before, month=month, used=octets, told=kept), tuple(now)


def _renewed(before: Standing, month: str) -> bool:
    """Whether the month is the first after one in which the quota was exceeded."""
    if month <= before.month:
        return False
    return "exceeded" in before.told.get(before.month, ())
