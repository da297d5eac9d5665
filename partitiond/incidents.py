"""Outages of services and promises that fail, with how long they last: what the daemon sees anyhow becomes rows of the ledger.

A service is out while a partition's instance is meant to run and one of its watched programs (``etc/service``, by its suffix
``-on-watch``) does not, or any of its programs cannot be started. A program of ``etc/run`` that came to its end is no outage,
as in slapos.core. supervisord is asked nothing for it: each look at the node has its answer.

What stopped may be on its way up again by our own doing: that counts only if the next look finds it, too, from the first on.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accounting.incidents import PROMISE, SERVICE, UNSEEN, Incident, Look
from accounting.model import iso_utc
from partitiond.pacing import Allowance

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from accounting.incidents import Changes
    from accounting.ledger import Ledger, LedgerReader
    from partitiond.context import Context
    from partitiond.node import Node
    from partitiond.node_plan import Looked
    from partitiond.state import InstanceState
    from partitiond.supervision import Process

logger = logging.getLogger(__name__)

WATCHED = "-on-watch"
_WORKS = frozenset(("RUNNING", "STARTING"))
_CANNOT_START = frozenset(("FATAL", "BACKOFF"))
_ENDED = frozenset(("EXITED", "UNKNOWN", *_CANNOT_START))  # by itself: nobody of ours is at it
_JUMP = 3600.0
_MOST_TOLD, _HOUR = 20, 3600.0  # of a partition: a tenant may break its services as often as it likes


@dataclass(frozen=True, slots=True)
class Suspects:
    """What may be wrong, by partition and name, and when it was seen first."""

    since: Mapping[tuple[str, str], float] = field(default_factory=dict)


@dataclass(slots=True)
class IncidentWatch:
    """What the last observation leaves to the next one; one at a time, in the lane of the meters."""

    last: Looked | None = None
    suspects: Suspects = field(default_factory=Suspects)
    ahead: float | None = None  # how far the clock is ahead of the time since the machine began
    ending: dict[int, Incident] = field(default_factory=dict)
    allowance: Allowance = field(default_factory=lambda: Allowance(_MOST_TOLD, _HOUR))


def watched_troubles(processes: Iterable[Process]) -> dict[str, dict[str, str]]:
    """What of supervisord's processes is wrong: the state of each program by partition and name. Pure."""
    found: dict[str, dict[str, str]] = {}
    for process in processes:
        watched = process.name.endswith(WATCHED)
        if (watched and process.state not in _WORKS) or process.state in _CANNOT_START:
            found.setdefault(process.group, {})[process.name.removesuffix(WATCHED)] = process.state
    return found


def looks(
    partitions: Iterable[str],
    states: Mapping[str, InstanceState],
    processes: Iterable[Process],
    before: Suspects,
    now: float,
) -> tuple[dict[str, Look], Suspects]:
    """What one look at the processes says of each partition, and what only the next one will. Pure."""
    wrong = watched_troubles(processes)
    found: dict[str, Look] = {}
    suspects: dict[tuple[str, str], float] = {}
    for partition in partitions:
        state = states.get(partition)
        # one that could not be configured anew is still meant to run as it did
        alive = state is not None and state.wanted == "started" and state.life in ("started", "failed")
        troubles: dict[str, str] = {}
        since: dict[str, float] = {}
        for name, what in wrong.get(partition, {}).items() if alive else ():
            first = before.since.get((partition, name))
            if what not in _ENDED:
                suspects[partition, name] = now if first is None else first
                if first is None:
                    continue
                since[name] = first
            troubles[name] = what
        guid = (state.instance_guid if state else None) or ""
        found[partition] = Look(guid, alive, troubles, since)
    return found, Suspects(suspects)


def observe(context: Context, node: Node, ledger: Ledger) -> None:
    """Post what the last look at the node saw of services, once for each look. Raises AccountingError: then the next does."""
    watch, looked = context.incidents, context.looked
    # no process at all: supervisord did not answer, which says nothing of services
    if looked is None or looked is watch.last or not looked.processes:
        return
    now = context.clock()
    ahead = now - time.clock_gettime(time.CLOCK_BOOTTIME)
    jumped = watch.ahead is not None and abs(ahead - watch.ahead) > _JUMP
    states, damaged = context.store.readable()
    names = [item.id for item in node.partitions if item.id not in damaged]
    found, suspects = looks(names, states, looked.processes, watch.suspects, now)
    unseen = max(UNSEEN, 3 * context.config.intervals.meter)
    changes = ledger.observe_incidents(SERVICE, now, found, whole=not damaged, jumped=jumped, unseen=unseen)
    watch.last, watch.suspects, watch.ahead = looked, suspects, ahead
    tell(context, changes)


def record_promises(
    context: Context, ledger: Ledger, failing: Mapping[str, tuple[str, Mapping[str, str]]]
) -> None:
    """Post which promises of partitions fail: of each its instance, and all that fail by name and reason.

    Raises AccountingError.
    """
    looked = {name: Look(guid, alive=True, troubles=found) for name, (guid, found) in failing.items()}
    intervals = context.config.intervals
    unseen = max(UNSEEN, 3 * intervals.meter)
    changes = ledger.observe_incidents(PROMISE, context.clock(), looked, whole=False, unseen=unseen)
    tell(context, changes)


def tell(context: Context, changes: Changes) -> None:
    """Record what began, and what ended and did not come again."""
    watch = context.incidents
    for row in changes.begun:
        _record(context, "incident.begun", row, f"{row.partition}: {row.kind} {row.name}: {row.reason}")
    waiting = {row.id: row for row in (*changes.ended, *changes.resting)}
    again = {row.id for row in changes.kept}
    for number, row in sorted(watch.ending.items(), key=lambda one: (one[1].ended or 0, one[0])):
        if number not in waiting and number not in again:
            seconds = row.microseconds / 1e6
            message = f"{row.partition}: {row.kind} {row.name}: over after {seconds:.0f} s"
            _record(context, "incident.ended", row, message, seconds)
    watch.ending = waiting


def _record(context: Context, event: str, row: Incident, message: str, seconds: float | None = None) -> None:
    allowance = context.incidents.allowance
    if allowance.left(row.partition) <= 0:
        return
    allowance.take(row.partition, 1)
    logger.warning("%s", message)
    context.events.record(
        event,
        message,
        partition=row.partition,
        resource=f"{row.kind}/{row.partition}/{row.name}",
        reason=row.reason,
        seconds=seconds,
        instance_guid=row.guid or None,
    )


def as_json(ledger: LedgerReader, now: float) -> dict[str, list[dict[str, object]]]:
    """The incidents that are not over, by partition. Raises AccountingError."""
    found: dict[str, list[dict[str, object]]] = {}
    for row in ledger.incidents():
        found.setdefault(row.partition, []).append(
            {
                "kind": row.kind,
                "name": row.name,
                "begun": iso_utc(row.begun / 1e6),
                "seconds": max(0.0, round(now - row.begun / 1e6, 3)),
                "reason": row.reason,
            }
        )
    return found
