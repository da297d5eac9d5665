"""Instances: what the master wants of each partition, made true one partition at a time.

Promises: a partition is configured again only when its timestamp (opaque text), release or type changed, when its last try
failed and its pause is over, or when its period is over; a failing one harms no other; nothing is removed but on the
master's explicit word, and never twice as much as the destroy guard allows on one answer. The end of instances:
``destruction.py``; what is started and stopped: ``running.py``.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from partitiond import (
    buildout,
    certificates,
    converge,
    destroy_guard,
    destruction,
    dropped,
    free_space,
    instance_build,
    log_digest,
    marks,
    periods,
    privacy,
    promises,
    rebuilt,
    remembered,
    retention,
    running,
    slapgrid_agreement,
)
from partitiond.errors import FAMILY, PartitiondError, sentence
from partitiond.passes import Result, pause_after, report
from partitiond.state import InstanceState
from slap_client.documents import PartitionDocument

if TYPE_CHECKING:
    from collections.abc import Mapping

    from partitiond.context import Context
    from partitiond.node import Node, Partition
    from partitiond.periods import Periods
    from partitiond.state import InstanceLife
    from slap_client.documents import ComputerDocument

logger = logging.getLogger(__name__)

# what most first tries lack is an instance that they asked for a moment ago, and a buildout costs a fraction of a second
_FIRST_PAUSE = 15.0

_FREE = InstanceState("")


def run_pass(
    context: Context,
    node: Node,
    document: ComputerDocument,
    *,
    known: Mapping[str, InstanceState],
    force: bool = False,
    only: frozenset[str] = frozenset(),
) -> Result:
    """Bring every partition where the master wants it, one after the other.

    ``known`` are the states from before the master was asked: what is wanted of a partition that the report lane has freed
    since is the wish of its last tenant, and must not be done to the next one.
    """
    result = Result([], [])
    for rejected in document.rejected:
        error = PartitiondError(
            "instances.unreadable", rejected.reason, hint="the master's entry is left alone", retryable=True
        )
        result.failures.append((rejected.partition_id, error))
    wanted = {entry.partition_id: entry for entry in document.partitions}
    period_of = periods.Periods(context.config)
    held = _held(context, document, result)
    for partition in node.partitions:
        entry = wanted.get(partition.id)
        if (
            entry is None
            or partition.id in held
            or (only and partition.id not in only)
            or context.stop.is_set()
        ):
            continue
        try:
            if context.store.instance(partition.id).life != known.get(partition.id, _FREE).life:
                continue
            # what only a name can mean is not meant by who forces all of them
            done = _one(context, node, partition, entry, period_of, force=force, end=force and bool(only))
        except (*FAMILY, OSError) as error:
            result.failures.append((partition.id, error))
            _tell_failed(context, partition, error)
            continue
        if done:
            result.done.append(f"{partition.id}: {done}")
            logger.info("%s: %s", partition.id, done)
            state = context.store.instance(partition.id)
            # the report lane may have finished its end by now
            _record(context, state, "destroying" if state.life == "free" else state.life, done)
    rebuilt.tell(context, wanted, result)
    return result


def _tell_failed(context: Context, partition: Partition, error: Exception) -> None:
    """Record why an instance could not be brought where it should be; what is told once by others is left to them."""
    if getattr(error, "code", "") in ("state.damaged", dropped.CODE):
        return
    logger.warning("%s: %s", partition.id, sentence(error))
    _record(context, remembered.shown(context, partition.id), "failed", sentence(error))


def _record(context: Context, state: InstanceState, what: str, message: str) -> None:
    """Record in the log of events what became of an instance."""
    context.events.record(
        f"instance.{what}",
        f"{state.partition}: {message}",
        partition=state.partition,
        resource=f"instance/{state.partition}",
        instance_guid=state.instance_guid,
        software_release=state.software_release,
    )


def _held(context: Context, document: ComputerDocument, result: Result) -> frozenset[str]:
    """Partitions that the destroy guard keeps for this pass."""
    if not context.config.destroy_guard:
        return frozenset()
    states, damaged = context.store.readable()
    # one that cannot be read counts as one that is there: that holds more, not less
    busy = frozenset((*damaged, *(name for name, state in states.items() if state.life != "destroying")))
    held = destroy_guard.decide(
        context.config.state_dir / "destroy-guard.json",
        busy,
        document,
        context.events,
        dropped.noted(states.values()),
    )
    for name in sorted(held):
        error = PartitiondError(
            "instances.held",
            "the master's answer would remove it together with many others, or lists it as free without a destroy",
            resource=name,
            hint="kept until a second answer says the same",
            retryable=True,
        )
        result.failures.append((name, error))
        logger.warning("%s", sentence(error))
    return held


def _one(
    context: Context,
    node: Node,
    partition: Partition,
    entry: PartitionDocument,
    period_of: Periods,
    *,
    force: bool,
    end: bool,
) -> str | None:
    state = context.store.instance(partition.id)
    if entry.free and state.life == "free":
        marks.tidy(context, partition)
        return None
    if state.life not in ("free", "destroying") and (
        dropped.is_another(state, entry) or (entry.free and context.config.destroy_guard)
    ):
        if end:
            return destruction.retire(context, partition, state, PartitionDocument(partition.id, "destroyed"))
        if entry.destroy_requested:
            return dropped.end_rival(context, state)
        dropped.keep(context, state, entry)
    if entry.destroy_requested or entry.free:
        return destruction.retire(context, partition, state, entry)
    if state.life not in ("free", "destroying"):
        state = dropped.note_known(context, state, entry)
    if state.life == "destroying":
        back = destruction.revoke(context, state, entry)
        if back is None:
            return None  # the report lane finishes first; then the partition is free for the new instance
        state = back
    due = _is_misparked(context, state) or _due(state, entry, period_of(entry.software_release or ""))
    if not (force or due or (state.by_promise and partition.id in context.promises.mended)):
        page = context.promises.page(partition.id, state.instance_guid or "")
        # what the master shows as an error may be what it was told of a promise in between
        _tell(context, state, "" if page.told or page.failing() else entry.access_status)
        return None
    with context.promises.resting(partition.id):
        return _configure(context, node, partition, state, entry)


def _is_misparked(context: Context, state: InstanceState) -> bool:
    """Whether ``force_stop`` came or went since: also what has failed is not left running for its pause."""
    if context.config.grid.force_stop:
        return state.life == "started" or context.supervisor.has_group(state.partition)
    return _is_parked(state)


def _due(state: InstanceState, entry: PartitionDocument, period: int) -> bool:
    """Whether an instance is to be configured (again)."""
    now = time.time()
    if _is_other(state, entry):
        return True
    if state.failures:
        return now >= state.next_try
    # as in slapgrid: without a timestamp always, with a negative period never
    return not entry.timestamp or 0 <= period <= now - state.processed_at


def _is_other(state: InstanceState, entry: PartitionDocument) -> bool:
    """Whether something else is wanted than what was tried last."""
    return (
        state.timestamp != (entry.timestamp or None)
        or state.software_release != entry.software_release
        or state.software_type != (entry.software_type or None)
        or state.wanted != entry.requested_state
        or state.instance_guid != (entry.instance_guid or None)
    )


def _configure(
    context: Context, node: Node, partition: Partition, state: InstanceState, entry: PartitionDocument
) -> str | None:
    url = entry.software_release or ""
    if not buildout.completed(context.config, url):
        if entry.requested_state == "stopped" and state.life != "free" and state.wanted != "stopped":
            return _stop_as_it_is(context, partition, state)
        if context.config.grid.force_stop and _is_misparked(context, state):
            return _park_as_it_is(context, partition, state)
        if state.life in ("started", "stopped"):
            logger.info("%s: waits for its new software release %s", partition.id, url)
        return None  # what runs keeps running on the old release until the new one is there
    following = replace(
        state,
        wanted=entry.requested_state,
        instance_guid=entry.instance_guid or None,
        title=dropped.title_of(entry),
        software_release=url,
        software_type=entry.software_type or None,
        timestamp=entry.timestamp or None,
        processed_at=time.time(),
        # what failed before was something else
        failures=0 if _is_other(state, entry) else state.failures,
    )
    if state.life == "free" or state.instance_guid != following.instance_guid:
        taken_over = slapgrid_agreement.days(context, partition) if state.life == "free" else -1.0
        lost = state.life == "free" and rebuilt.is_lost(partition, entry)
        following = replace(following, retention_days=taken_over, rebuilt=lost)
        # from here on what is used is the new instance's, also when the first try fails or is cut short
        context.meters.settle(context, node)
        context.store.save_instance(replace(following, life="stopped", timestamp=None))
    try:
        marks.begin(partition)
        needed = context.config.grid.instance_min_free_space
        free_space.require(
            partition.path,
            needed,
            code="instance.no_space",
            key="instance_min_free_space",
            resource=partition.id,
        )
        privacy.ensure(context, partition)
        certificates.fetch(context, partition)
        instance_build.configure_instance(context, partition, entry)
        another = (state.software_release, state.software_type) != (url, following.software_type)
        following = _fix_retention(partition, following, entry)
        starts = entry.requested_state == "started" and not context.config.grid.force_stop
        if starts:
            running.start(context, partition, another=another)
            _keep_promises(context, partition, url, following)
        else:
            running.stop(context, partition)
    except (*FAMILY, OSError) as error:
        return _failed(context, partition, following, entry, error)
    life: InstanceLife = "started" if starts else "stopped"
    done = replace(
        following, life=life, failures=0, next_try=0.0, error=None, reported=False, by_promise=False
    )
    context.store.save_instance(done)
    if not _is_parked(done):  # slapgrid would take it for one that runs
        marks.succeeded(partition, entry.timestamp)
    _converge(context, partition)
    _tell(context, done)
    return life


def _stop_as_it_is(context: Context, partition: Partition, state: InstanceState) -> str:
    """Stop what runs on the old release, as nobody knows when the new one will be there; it is configured then all the same."""
    running.stop(context, partition)
    done = replace(
        state,
        life="stopped",
        wanted="stopped",
        failures=0,
        next_try=0.0,
        error=None,
        reported=False,
        by_promise=False,
    )
    context.store.save_instance(done)
    _converge(context, partition)
    _tell(context, done)
    return "stopped; configured when its new software release is there"


def _park_as_it_is(context: Context, partition: Partition, state: InstanceState) -> str:
    """The same for ``force_stop``, of which the master is told nothing."""
    running.stop(context, partition)
    context.store.save_instance(replace(state, life="stopped" if state.life == "started" else state.life))
    _converge(context, partition)
    return "stopped; configured when its new software release is there"


def _keep_promises(context: Context, partition: Partition, release: str, state: InstanceState) -> None:
    """Fail where a promise does; what runs goes on. Raises PartitiondError ``instance.promise``, and as ``promises.check``.

    One may look through a tunnel that this very processing has declared: it is asked again once that is there.
    """
    outcome = promises.check(context, partition, release)
    if outcome.failed:
        # who is cut short here has it tried again at once
        waits = replace(state, life="failed", failures=state.failures + 1, next_try=0.0)
        context.store.save_instance(replace(waits, error=outcome.message, by_promise=True))
        if _converge(context, partition):
            outcome = promises.check(context, partition, release)
    if outcome.failed:
        raise PartitiondError(
            "instance.promise",
            outcome.message,
            resource=partition.id,
            hint=f"partitiond show {partition.id} lists its promises; they are tried again",
            retryable=True,
        )


def _fix_retention(partition: Partition, state: InstanceState, entry: PartitionDocument) -> InstanceState:
    """Fix how long the instance is kept after its end, the first time that its buildout succeeds, as slapgrid does."""
    if state.retention_days >= 0:
        return state
    days = retention.days_asked(entry.filter)
    if days is None:
        value = ascii(entry.filter.get(retention.KEY))
        logger.warning("%s: %s is %s, which is no number of days: 0", partition.id, retention.KEY, value)
    marks.retention(partition, days or 0.0)
    return replace(state, retention_days=days or 0.0)


def _converge(context: Context, partition: Partition) -> bool:
    """Make what follows from the new state: tunnels first of all; say whether anything. A refused tunnel fails no instance."""
    outcome = converge.apply(context, only=frozenset((partition.id,)))
    for refusal in outcome.refused:
        logger.warning("%s: refused: %s", refusal.name, refusal.reason)
    return bool(outcome.done)


def _failed(
    context: Context, partition: Partition, state: InstanceState, entry: PartitionDocument, error: Exception
) -> str | None:
    if context.stop.is_set():
        raise error  # cut short by our own end: no failure of the instance
    if state.wanted != "started" or context.config.grid.force_stop:
        # as in slapos.core: what is to be stopped is stopped even if its buildout fails
        try:
            running.stop(context, partition)
        except (*FAMILY, OSError) as problem:
            logger.warning("%s: %s", partition.id, sentence(problem))
    failures, text = state.failures + 1, str(error)[:4000]
    # as long as it is the same that the master was told, and still shows, it is not told again
    known = state.life == "failed" and state.reported and state.error == text
    failed = replace(
        state,
        life="failed",
        failures=failures,
        next_try=time.time() + pause_after(failures, _FIRST_PAUSE),
        error=text,
        by_promise=isinstance(error, PartitiondError) and error.code == "instance.promise",
        reported=known and (not entry.access_status or _is_error(entry.access_status)),
    )
    context.store.save_instance(failed)
    marks.failed(partition, str(error))
    _tell(context, failed)
    raise error


def _is_parked(state: InstanceState) -> bool:
    """Whether ``force_stop`` keeps an instance stopped that the master wants started."""
    return state.life == "stopped" and state.wanted == "started"


def _is_error(access_status: str) -> bool:
    return access_status.startswith("#error")


def _tell(context: Context, state: InstanceState, access_status: str = "") -> None:
    """Tell the master what it has not been told yet, or has taken for something else since; kept until it was accepted.

    ``access_status`` is what it shows of the instance, "" where it says nothing of it, as slapproxy.
    """
    client, name = context.client, state.partition
    if state.life == "failed":
        told, text = state.reported, state.error or ""
        done = told or report(lambda: client.instance_error(name, log_digest.for_master(text)), name)
    elif state.life in ("started", "stopped") and not _is_parked(state):
        told = state.reported and not _is_error(access_status)
        tell = client.instance_started if state.life == "started" else client.instance_stopped
        done = told or report(lambda: tell(name), name)
    else:
        return
    if done and not state.reported:
        context.store.save_instance(replace(state, reported=True))
