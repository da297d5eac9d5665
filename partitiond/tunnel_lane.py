"""What the daemon does about tunnels every few seconds: it tells of sessions, and in time of certificates that end."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from partitiond import tunnel_events, tunnel_expiry
from partitiond.errors import FAMILY, sentence
from partitiond.pacing import Allowance
from partitiond.process_watch import SUPERVISOR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from partitiond.context import Context
    from partitiond.node import Partition
    from partitiond.tunnel_expiry import Expiry

logger = logging.getLogger(__name__)

SECONDS = 5.0


_DAY = 86400.0
_HOUR = 3600.0
_MOST_EXPIRIES = 10  # of a partition and day
_MOST_SESSIONS = 600  # of a partition and hour; what is above that is summed up


class TunnelLane:
    """One pass after the other; what was told is not told again."""

    def __init__(self, attend: Callable[[Mapping[str, int]], None]) -> None:
        self._attend = attend
        self._told: dict[Expiry, float] = {}
        self._unreadable: frozenset[str] = frozenset()
        self._expiries, self._sessions = Allowance(_MOST_EXPIRIES, _DAY), Allowance(_MOST_SESSIONS, _HOUR)

    def run(self, context: Context) -> None:
        """Look at the logs and the certificates of what the last look at the node found declared."""
        looked = context.looked
        if looked is None:
            return
        self._attend({SUPERVISOR: context.supervisor.pid()})
        plan, now = looked.plan, datetime.now(UTC)
        following = tunnel_expiry.successors(plan.published.values())
        unreadable = set()
        for one in plan.declared.values():
            if not one.tunnels:
                continue
            near = tunnel_expiry.near(one, plan.published.get(one.partition.id), following, now)
            self._warn(context, one.partition.id, near, now)
            if not self._read(context, one.partition):
                unreadable.add(one.partition.id)
        self._unreadable = frozenset(unreadable)

    def _read(self, context: Context, partition: Partition) -> bool:
        try:
            records = context.sessions.news(context.config, partition)
        except (*FAMILY, OSError) as error:
            if partition.id not in self._unreadable:
                logger.warning("%s: sessions are not told: %s", partition.id, sentence(error))
            return False
        most = max(0, self._sessions.left(partition.id))
        tunnel_events.tell(context.session_events, partition, records, most=most)
        self._sessions.take(partition.id, len(records))
        return True

    def _warn(self, context: Context, partition: str, near: Iterable[Expiry], now: datetime) -> None:
        moment = time.monotonic()
        for one in near:
            if moment - self._told.get(one, -_DAY) < _DAY or self._expiries.left(partition) <= 0:
                continue
            self._told = {key: at for key, at in self._told.items() if moment - at < _DAY} | {one: moment}
            self._expiries.take(partition, 1)
            logger.warning("%s: %s", one.tunnel, one.sentence(now))
            tunnel_events.tell_expiry(context.events, one, now)
