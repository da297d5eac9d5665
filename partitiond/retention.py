"""The retention delay of an instance: how long what it left is kept after the master wants it destroyed.

As in slapgrid (slapos.core 1.26): days, asked for with the instance (``retention_delay`` in its filter), fixed when it is first
deployed, counted from the first word that it is to go. What counts is in our own state; the files that slapgrid keeps in the
partition are written too, for software that reads them there, and read when a node is taken over.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

NOT_FIXED = -1.0
KEY = "retention_delay"
MOST_DAYS = 36_500.0
_DAY = 86_400.0


def days_asked(sla: Mapping[str, object]) -> float | None:
    """The days that the filter of an instance asks for, 0 where it asks for none; None where it says nothing of use."""
    value = sla.get(KEY, 0)
    return days(value if isinstance(value, str | int | float) else "")


def days(value: str | float) -> float | None:
    """A number of days; None for what is none. A negative number is none to wait, as in slapgrid."""
    try:
        number = float(value)
    except ValueError:
        return None
    if math.isnan(number):
        return None
    return min(max(number, 0.0), MOST_DAYS)


def keep_until(fixed: float, now: float) -> float:
    """Until when (Unix seconds) an instance is kept that is to be destroyed as of ``now``; 0: not at all."""
    return now + fixed * _DAY if fixed > 0 else 0.0


def date(text: str, now: float) -> float | None:
    """The date in slapgrid's file; None for what is none, or further away than any delay may be."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number <= now + MOST_DAYS * _DAY else None
