"""Tells a clock that was set from time that went by. Runs inside the caller's transaction.

Passes count by what the clock said then, whatever it is set to later: that neither loses nor doubles anything, but a report of
those times should say so. A daemon that was down, a node that slept or was off, is no clock that was set.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from accounting.model import Gap, Pass, iso_utc

if TYPE_CHECKING:
    import sqlite3

SLACK = 3600 * 10**6  # microseconds; NTP steps a clock by less, an operator who mends one by more

_UPSERT = (
    "INSERT INTO clock VALUES (1, ?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET"
    " boot = ?1, uptime = ?2, at = ?3, jumped = coalesce(?4, jumped)"
)


def keep_clock(
    connection: sqlite3.Connection, reading: Pass, previous: int | None, at: int
) -> tuple[Gap, ...]:
    """Keep what the clock says for the next pass; where it was set by over an hour, write that down and give it."""
    row = connection.execute("SELECT boot, uptime, at FROM clock").fetchone()
    uptime = None if reading.uptime is None else round(reading.uptime * 1e6)
    jump, before = 0, previous
    if row is not None and uptime is not None and reading.boot and row[0] == reading.boot:
        # against what it said with that uptime: in between there may have been passes without one
        before = int(row[2])
        jump = (at - before) - (uptime - int(row[1]))
    elif previous is not None:
        # over a reboot, only what went back is known to be none that went by
        jump = min(0, at - previous)
    jumped = abs(jump) > SLACK
    if uptime is not None or jumped:
        connection.execute(_UPSERT, (reading.boot, uptime or 0, at, at if jumped else None))
    if not jumped or before is None:
        return ()
    gap = Gap(min(before, at) / 1e6, max(before, at) / 1e6, _reason(jump, before, at))
    connection.execute(
        "INSERT INTO gap (start, until, reason) VALUES (?, ?, ?)",
        (min(before, at), max(before, at), gap.reason),
    )
    return (gap,)


def _reason(jump: int, before: int, at: int) -> str:
    way = "forward" if jump > 0 else "back"
    return (
        f"the clock was set {way} by {timedelta(seconds=abs(jump) // 10**6)};"
        f" what was used since {iso_utc(before / 1e6)} counts at {iso_utc(at / 1e6)}"
    )
