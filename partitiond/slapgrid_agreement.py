"""How long slapgrid has agreed to keep what it deployed: of a node that is taken over, this is kept to.

Promises: only what is root's or the software user's is believed, as the files lie in the hands of tenants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partitiond import marks, retention, users

if TYPE_CHECKING:
    from partitiond.context import Context
    from partitiond.node import Partition


def keep_until(context: Context, partition: Partition, now: float) -> float:
    """Until when slapgrid would have kept an instance that nobody here has ever known."""
    date = marks.of_slapgrid(partition, marks.RETENTION_DATE, _owners(context))
    if date is not None and (until := retention.date(date, now)) is not None:
        return until
    return retention.keep_until(days(context, partition), now)


def days(context: Context, partition: Partition) -> float:
    """The delay that slapgrid has fixed for what is in a partition; negative where it has fixed none."""
    text = marks.of_slapgrid(partition, marks.RETENTION_DELAY, _owners(context))
    found = None if text is None else retention.days(text)
    return retention.NOT_FIXED if found is None else found


def _owners(context: Context) -> frozenset[int]:
    # slapgrid gives these files to the owner of the software
    if context.config.unmanaged is not None:
        return frozenset((0, context.config.unmanaged.uid))
    found = users.observe().numbers().get(context.config.software_user)
    return frozenset((0,) if found is None else (0, found[0]))
