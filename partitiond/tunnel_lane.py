"""What the daemon does about tunnels every few seconds: it tells of sessions, and in time of certificates that end."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from partitiond import tunnel_events, tunnel_expiry, tunnel_status, tunnels
from partitiond.errors import FAMILY, sentence
from partitiond.process_watch import SUPERVISOR

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from partitiond.context import Context
    from partitiond.converge import Looked
    from partitiond.tunnel_expiry import Expiry

logger = logging.getLogger(__name__)

SECONDS = 5.0


class TunnelLane:
    """One pass after the other; what was told is not told again."""

    def __init__(self, attend: Callable[[Mapping[str, int]], None]) -> None:
        self._attend = attend
        self._told: frozenset[Expiry] = frozenset()
        self._unreadable: frozenset[str] = frozenset()

    def run(self, context: Context) -> None:
        """Look at the logs and the certificates of what the last look at the node found declared."""
        looked = context.looked
        if looked is None:
            return
        self._attend(_to_watch(context, looked))
        plan, now = looked.plan, datetime.now(UTC)
        replaced = tunnel_status.replaced_certificates(plan.published)
        near: set[Expiry] = set()
        unreadable = set()
        for one in plan.declared.values():
            if not one.tunnels:
                continue
            near.update(tunnel_expiry.near(one, plan.published.get(one.partition.id), replaced, now))
            try:
                records = context.sessions.news(context.config, one.partition)
            except (*FAMILY, OSError) as error:
                unreadable.add(one.partition.id)
                if one.partition.id not in self._unreadable:
                    logger.warning("%s: sessions are not told: %s", one.partition.id, sentence(error))
                continue
            tunnel_events.tell(context.session_events, one.partition, records)
        for expiry in sorted(near - self._told, key=lambda one: (one.tunnel, one.fingerprint)):
            logger.warning("%s: %s", expiry.tunnel, expiry.sentence(now))
            tunnel_events.tell_expiry(context.events, expiry, now)
        self._told, self._unreadable = frozenset(near), frozenset(unreadable)


def _to_watch(context: Context, looked: Looked) -> dict[str, int]:
    """supervisord and the stunnels that run, by process id."""
    groups = {tunnels.group_name(name) for name, one in looked.plan.declared.items() if one.files}
    found = {item.group: item.pid for item in looked.processes if item.group in groups and item.pid}
    supervisord = context.supervisor.pid()
    return {SUPERVISOR: supervisord, **found} if supervisord else found
