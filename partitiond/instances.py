"""Instances: what the master wants of each partition, made true one partition at a time.

Promises: a partition is configured again only when its timestamp (opaque text), release or type changed, when its last try
failed and its pause is over, or when its period is over; a failing one harms no other; nothing is removed but on the
master's explicit word, and never twice as much as the destroy guard allows on one answer.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from netplan import learned
from partitiond import (
    buildout,
    certificates,
    converge,
    destroy_guard,
    execute,
    files,
    identities,
    instance_build,
    privacy,
    programs,
    storage,
    tunnels,
)
from partitiond.errors import FAMILY, PartitiondError, sentence
from partitiond.passes import Result, pause_after, report
from partitiond.state import InstanceState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from partitiond.context import Context
    from partitiond.node import Node, Partition
    from partitiond.state import InstanceLife
    from slap_client.documents import ComputerDocument, PartitionDocument

logger = logging.getLogger(__name__)

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
    held = _held(context, document, result)
    for partition in node.partitions:
        entry = wanted.get(partition.id)
        if (
            entry is None
            or partition.id in held
            or (only and partition.id not in only)
            or context.stop.is_set()
            or context.store.instance(partition.id).life != known.get(partition.id, _FREE).life
        ):
            continue
        try:
            done = _one(context, node, partition, entry, force)
        except FAMILY as error:
            result.failures.append((partition.id, error))
            logger.warning("%s: %s", partition.id, sentence(error))
            _record(context, context.store.instance(partition.id), "failed", sentence(error))
            continue
        if done:
            result.done.append(f"{partition.id}: {done}")
            logger.info("%s: %s", partition.id, done)
            state = context.store.instance(partition.id)
            _record(context, state, state.life, done)
    return result


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
    busy = frozenset(
        state.partition for state in context.store.instances().values() if state.life != "destroying"
    )
    held = destroy_guard.decide(context.config.state_dir / "destroy-guard.json", busy, document)
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
    context: Context, node: Node, partition: Partition, entry: PartitionDocument, force: bool
) -> str | None:
    state = context.store.instance(partition.id)
    if entry.destroy_requested or entry.free:
        return _retire(context, partition, state, entry)
    if state.life == "destroying":
        return None  # the report lane finishes first; then the partition is free for the new instance
    if not _due(context, state, entry, force):
        _tell(context, state)
        return None
    return _configure(context, node, partition, state, entry)


def _due(context: Context, state: InstanceState, entry: PartitionDocument, force: bool) -> bool:
    now = time.time()
    changed = (
        state.timestamp != (entry.timestamp or None)
        or not entry.timestamp
        or state.software_release != entry.software_release
        or state.software_type != (entry.software_type or None)
        or state.wanted != entry.requested_state
        or state.instance_guid != (entry.instance_guid or None)
    )
    if force or changed:
        return True
    if state.failures:
        return now >= state.next_try
    period = context.config.maximum_periodicity
    return 0 <= period <= now - state.processed_at


def _retire(
    context: Context, partition: Partition, state: InstanceState, entry: PartitionDocument
) -> str | None:
    """Stop an instance that is to be destroyed; the report lane removes it."""
    if state.life == "free" and not entry.destroy_requested:
        return None
    if state.life == "destroying":
        return None
    stop(context, partition)
    context.store.save_instance(
        replace(
            state,
            life="destroying",
            wanted="destroyed",
            instance_guid=state.instance_guid or entry.instance_guid or None,
            software_release=state.software_release or entry.software_release,
        )
    )
    context.wake_report()
    report(lambda: context.client.instance_stopped(partition.id), partition.id)
    return "stopped, to be destroyed"


def stop(context: Context, partition: Partition) -> None:
    """Stop a partition's processes and tunnels, and make sure that nothing starts them again."""
    names = [
        name
        for name in (partition.id, tunnels.group_name(partition.id))
        if context.supervisor.group_text(name) is not None
    ]
    if names and context.supervisor.running():
        for name in names:
            context.supervisor.stop_group(name)
    # two lanes that update supervisord at the same time get in each other's way
    with context.applying:
        changed = [name for name in names if context.supervisor.remove_group(name)]
        if changed and context.supervisor.running():
            context.supervisor.update()


def _configure(
    context: Context, node: Node, partition: Partition, state: InstanceState, entry: PartitionDocument
) -> str | None:
    url = entry.software_release or ""
    if not buildout.completed(context.config, url):
        if state.life in ("started", "stopped"):
            logger.info("%s: waits for its new software release %s", partition.id, url)
        return None  # what runs keeps running on the old release until the new one is there
    following = replace(
        state,
        wanted=entry.requested_state,
        instance_guid=entry.instance_guid or None,
        software_release=url,
        software_type=entry.software_type or None,
        timestamp=entry.timestamp or None,
        processed_at=time.time(),
    )
    if state.life == "free" or state.instance_guid != following.instance_guid:
        # from here on what is used is the new instance's, also when the first try fails or is cut short
        context.meters.settle(context, node)
        context.store.save_instance(replace(following, life="stopped", timestamp=None))
    try:
        privacy.ensure(context, partition)
        certificates.fetch(context, partition)
        instance_build.configure_instance(context, partition, entry)
        another = (state.software_release, state.software_type) != (url, following.software_type)
        _run(context, partition, entry, another=another)
    except (*FAMILY, OSError) as error:
        return _failed(context, partition, following, error)
    life: InstanceLife = "started" if entry.requested_state == "started" else "stopped"
    done = replace(following, life=life, failures=0, next_try=0.0, error=None, reported=False, cleaned=False)
    context.store.save_instance(done)
    _converge(context, partition)
    _tell(context, done)
    return life


def _converge(context: Context, partition: Partition) -> None:
    """Make what follows from the new state: tunnels first of all. A refused tunnel fails no instance."""
    outcome = converge.apply(context, only=frozenset((partition.id,)))
    for refusal in outcome.refused:
        logger.warning("%s: refused: %s", refusal.name, refusal.reason)


def _failed(context: Context, partition: Partition, state: InstanceState, error: Exception) -> str | None:
    if context.stop.is_set():
        raise error  # cut short by our own end: no failure of the instance
    if state.wanted != "started":
        # as in slapos.core: what is to be stopped is stopped even if its buildout fails
        try:
            stop(context, partition)
        except PartitiondError as problem:
            logger.warning("%s: %s", partition.id, sentence(problem))
    failures = state.failures + 1
    context.store.save_instance(
        replace(
            state,
            life="failed",
            failures=failures,
            next_try=time.time() + pause_after(failures),
            error=str(error)[-4000:],
            reported=True,
        )
    )
    report(lambda: context.client.instance_error(state.partition, str(error)), state.partition)
    raise error


def _tell(context: Context, state: InstanceState) -> None:
    """Tell the master what it has not been told yet; kept until it was accepted."""
    if state.reported or state.life not in ("started", "stopped"):
        return
    tell = context.client.instance_started if state.life == "started" else context.client.instance_stopped
    if report(lambda: tell(state.partition), state.partition):
        context.store.save_instance(replace(state, reported=True))


def _run(context: Context, partition: Partition, entry: PartitionDocument, *, another: bool) -> None:
    """Start or stop what the buildout made; ``another``: of another release or type than what may still run.

    What runs and began before its partition was private is left to run as it does as long as it stays the same.
    """
    if entry.requested_state != "started":
        stop(context, partition)
        return
    group = programs.group(context, partition)
    with context.applying:
        if not group.programs:
            context.supervisor.remove_group(group.name)
        elif another or not privacy.is_late(context.supervisor, group):
            context.supervisor.write_group(group)
        if another:
            # its stunnel has run on outside until now, too
            privacy.relaunch(context, partition, tunnels.group_name(partition.id))
        # also when the file is as it was: one who was killed after writing it has told supervisord nothing
        context.supervisor.update()
        if group.programs:
            context.supervisor.start_group(group.name)
            _look(context, partition)


def _look(context: Context, partition: Partition) -> None:
    """Fail when supervisord could not even start a program (it has no descriptors left, or the file cannot be run)."""
    dead = [
        process.name
        for process in context.supervisor.processes()
        if process.group == partition.id and process.state in ("FATAL", "BACKOFF")
    ]
    if dead:
        raise PartitiondError(
            "instance.start",
            f"could not be started: {', '.join(sorted(dead))}",
            resource=partition.id,
            hint=f"read {context.supervisor.log}",
            retryable=True,
        )


def finish_destroyed(
    context: Context,
    node: Node,
    *,
    unsettled: frozenset[str] = frozenset(),
    untold: frozenset[str] = frozenset(),
) -> Result:
    """Remove the instances that are to be destroyed, and tell the master so: nothing yet of those that are ``unsettled``, and
    those that are ``untold`` are removed and the master is told later.
    """
    result = Result([], [])
    _, damaged = context.store.readable()
    for partition in node.partitions:
        if partition.id in damaged:
            continue
        state = context.store.instance(partition.id)
        if state.life != "destroying" or context.stop.is_set():
            continue
        if partition.id in unsettled:
            result.failures.append((partition.id, _unsettled(partition)))
            continue
        try:
            if not state.cleaned:
                _clean(context, node, partition)
                context.store.save_instance(replace(state, cleaned=True))
            if partition.id in untold:
                continue
            context.client.instance_destroyed(partition.id)
        except (*FAMILY, OSError) as error:
            result.failures.append((partition.id, error))
            logger.warning("%s: not destroyed yet: %s", partition.id, sentence(error))
            continue
        context.store.save_instance(replace(state, life="free"))
        # what every free partition has (its resource file, a new identity) is made again at once
        _converge(context, partition)
        result.done.append(f"{partition.id}: destroyed")
        logger.info("%s: destroyed", partition.id)
        _record(context, state, "destroyed", "destroyed")
    return result


def _unsettled(partition: Partition) -> PartitiondError:
    return PartitiondError(
        "instances.unsettled",
        "not destroyed yet: its last usage is in no document yet",
        resource=partition.id,
        hint="mend what keeps usage from being reported; partitiond sync report --force destroys it all the same",
        retryable=True,
    )


def _clean(context: Context, node: Node, partition: Partition) -> None:
    stop(context, partition)
    # the last bytes belong to the instance that goes, not to the one that comes
    context.meters.settle(context, node)
    context.meters.forget(partition.id)
    execute.end_processes_of(partition.uid, partition.gid)
    privacy.forget(context.config, partition)
    if partition.network.tap:
        with (
            context.applying
        ):  # between its release and the load that follows, nobody else may take the filter
            learned.forget(partition.network.tap.name)
    certificates.remove(context, partition)
    identities.remove(context.config, partition)
    context.sessions.forget(partition.id)
    _remove_directory(partition)
    storage.empty(context.config, partition.id)
    logs = context.config.log_dir / partition.id
    if logs.is_dir():
        with files.directory(logs) as descriptor:
            files.empty(descriptor)


def _remove_directory(partition: Partition) -> None:
    """Remove the partition's directory with all below; the plan makes another one for whoever comes.

    Another one, because what the last tenant did to the directory itself (an access control list, an opening from a time when
    its mode was another) would open it to others.
    """
    with contextlib.suppress(FileNotFoundError):
        with files.directory(partition.path) as descriptor:
            files.seal(descriptor)
            files.empty(descriptor)
        files.remove_emptied(partition.path)
