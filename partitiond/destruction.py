"""The end of an instance: stopped at once, kept as long as was agreed, its leave taken, its usage told, then removed.

Promises: nothing is removed before the retention delay is over and its last usage is in documents, and until then the master
may want it back; what was begun is finished, however often it is cut short; its end is told to the master last of all, and
counts only when the master has taken it, or by its answers knows nothing of the instance any more.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from accounting.model import iso_utc
from partitiond import (
    buildout,
    converge,
    dropped,
    execute,
    files,
    instance_cleanup,
    marks,
    privacy,
    programs,
    retention,
    running,
    slapgrid_agreement,
    usage_scripts,
)
from partitiond.errors import FAMILY, PartitiondError, sentence
from partitiond.passes import Result, pause_after, report
from partitiond.supervision import MOST_PROGRAMS

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable, Sequence

    from partitiond.context import Context
    from partitiond.node import Node, Partition
    from partitiond.state import InstanceState
    from slap_client.documents import PartitionDocument

logger = logging.getLogger(__name__)

KEPT = "instances.kept"
LOG = "_prerm.log"  # no tenant's program has a name that begins so
_SIDE_BY_SIDE = 4
_WHOLE_SECONDS = 900.0  # of a pass: whoever has no turn in it has it in the next
_PRERM, _DESTROY = ("etc", "prerm"), ("sbin", "destroy")


# --- wanted destroyed, and wanted back --------------------------------------------------------------------------------


def retire(
    context: Context, partition: Partition, state: InstanceState, entry: PartitionDocument
) -> str | None:
    """Stop an instance that is to be destroyed; the report lane removes it. Return what was done. Raises PartitiondError."""
    if state.life == "destroying":
        _note_dropped(context, state, dropped=entry.free)
        if state.keep_until and not state.removing and not kept(state, time.time()):
            context.wake_report()
        return None
    if state.life == "free" and not entry.destroy_requested:
        return None
    running.stop(context, partition)
    now = time.time()
    until = retention.keep_until(state.retention_days, now)
    if state.life == "free":
        until = slapgrid_agreement.keep_until(context, partition, now)
    context.store.save_instance(
        replace(
            state,
            life="destroying",
            wanted="destroyed",
            instance_guid=state.instance_guid or entry.instance_guid or None,
            software_release=state.software_release or entry.software_release,
            keep_until=until,
            dropped=entry.free,
            failures=0,
            next_try=0.0,
            error=None,
        )
    )
    if until:
        marks.kept(partition, until)
        try:
            # for days nobody else would end what has left its supervisor
            execute.end_processes_of(partition.uid, partition.gid)
        except PartitiondError as error:
            logger.warning("%s: %s", partition.id, sentence(error))
    context.wake_report()
    if not entry.free:
        report(lambda: context.client.instance_stopped(partition.id), partition.id)
    return f"stopped, kept until {iso_utc(until)}" if until else "stopped, to be destroyed"


def _note_dropped(context: Context, state: InstanceState, *, dropped: bool) -> None:
    """Remember whether the master still knows an instance that goes.

    It does not when it lists the partition as free: it has dropped the instance, or has taken our word of its end although its
    answer got lost. And it does not when it wants another one there. Told of the end it would answer 404 then, for ever, or
    take it for the end of the other.
    """
    with context.applying:
        now = context.store.instance(state.partition)
        if now.life == "destroying" and now.dropped != dropped:
            context.store.save_instance(replace(now, dropped=dropped))
            if dropped and now.cleaned:
                context.wake_report()


def revoke(context: Context, state: InstanceState, entry: PartitionDocument) -> InstanceState | None:
    """Give an instance back that was to be destroyed and is wanted again, as one to be configured; None when it is too late:
    then the partition is free for what is wanted as soon as the report lane has finished.

    Raises PartitiondError ``instances.kept`` for another instance than the one that is kept.
    """
    name = state.partition
    if dropped.is_another(state, entry):
        _note_dropped(context, state, dropped=True)
    while True:
        if not _is_over(state) and not _is_another(state, entry):
            record = buildout.session_record(context.config, f"{name}.prerm")
            context.farewells.cut_short(name, record)
        with context.applying:
            state = context.store.instance(name)
            if _is_over(state):
                return None
            if _is_another(state, entry):
                _refuse_another(state)
                return None
            if context.farewells.is_going(name):
                continue  # it has begun meanwhile
            back = replace(
                state,
                life="stopped",
                timestamp=None,
                keep_until=0.0,
                prerm_ran=False,
                leaving=False,
                dropped=False,
                rival="",
            )
            context.store.save_instance(back)
        _tell_back(context, state)
        return back


def _is_another(state: InstanceState, entry: PartitionDocument) -> bool:
    """Whether it is not surely the same: only that is given its data back. Pure."""
    return (state.instance_guid or "") != entry.instance_guid or dropped.is_another(state, entry)


def _is_over(state: InstanceState) -> bool:
    """Whether there is no way back. Pure."""
    return state.life != "destroying" or state.settled or state.removing or state.cleaned


def _refuse_another(state: InstanceState) -> None:
    """Raise where an instance is kept, and another one is wanted in its place."""
    if state.keep_until > time.time():
        raise PartitiondError(
            KEPT,
            f"another instance is wanted where {state.instance_guid or 'one'} is kept until"
            f" {iso_utc(state.keep_until)}",
            resource=state.partition,
            hint="the master was never told that it is destroyed; give the new one another partition",
            retryable=True,
        )


def _tell_back(context: Context, state: InstanceState) -> None:
    message = "not to be destroyed any more"
    if state.leaving or state.prerm_ran:
        message += "; its etc/prerm had begun, and what that has done stays done"
    logger.info("%s: %s", state.partition, message)
    context.events.record(
        "instance.wanted_back",
        f"{state.partition}: {message}",
        partition=state.partition,
        resource=f"instance/{state.partition}",
        instance_guid=state.instance_guid,
    )


def kept(state: InstanceState | None, now: float) -> bool:
    """Whether an instance that is to be destroyed is still kept. Pure."""
    return state is not None and state.life == "destroying" and not state.removing and now < state.keep_until


def open_cases(states: Iterable[InstanceState], now: float) -> list[str]:
    """What is kept, in words. Pure."""
    return [
        f"{state.partition} is to be destroyed and kept until {iso_utc(state.keep_until)}, as was agreed when it was deployed"
        f" (retention_delay of {state.retention_days:g} days)"
        if state.retention_days > 0
        else f"{state.partition} is to be destroyed and kept until {iso_utc(state.keep_until)}, as slapgrid has it"
        for state in states
        if kept(state, now)
    ]


# --- its leave --------------------------------------------------------------------------------------------------------


def take_leave(context: Context, partitions: Sequence[Partition]) -> None:
    """Have the instances that go run their ``etc/prerm``, each once, some side by side, within bounds.

    For before the last usage is told: what these programs use is the instance's, too.
    """
    end = time.monotonic() + _WHOLE_SECONDS

    def one(partition: Partition) -> None:
        if time.monotonic() >= end or context.stop.is_set():
            return
        with context.applying:
            state = context.store.instance(partition.id)
            if state.life != "destroying":
                return  # it is wanted back
            if not state.leaving and _says_farewell(partition):
                context.store.save_instance(replace(state, leaving=True))
            cut_short = context.farewells.begin(partition.id)
        try:
            with context.steady():
                _run_prerm(context, partition, cut_short)
        finally:
            context.farewells.ended(partition.id)
        if context.stop.is_set() or cut_short.is_set():
            return  # it has its turn again, unless it is wanted back
        with context.applying:
            state = context.store.instance(partition.id)
            if state.life == "destroying":
                context.store.save_instance(replace(state, prerm_ran=True))

    going = [item for item in partitions if not context.store.instance(item.id).prerm_ran]
    if len(going) == 1:
        one(going[0])
    elif going:
        with ThreadPoolExecutor(_SIDE_BY_SIDE, "prerm") as pool:
            for _ in pool.map(one, going):
                pass


def _says_farewell(partition: Partition) -> bool:
    try:
        return _has(partition, *_PRERM)
    except OSError:
        return True  # it is said of it when it is tried


def _run_prerm(context: Context, partition: Partition, cut_short: threading.Event) -> None:
    end = time.monotonic() + context.config.grid.prerm_timeout
    faults = []
    try:
        for name in programs.executables(context, partition, *_PRERM)[:MOST_PROGRAMS]:
            left = end - time.monotonic()
            if left <= 0:
                faults.append(f"etc/prerm/{name}: no time was left")
                break
            if cut_short.is_set():
                return
            outcome = _run(context, partition, (*_PRERM, name), left)
            if context.stop.is_set() or cut_short.is_set():
                return
            if not outcome.ok:
                faults.append(f"etc/prerm/{name}: {buildout.ended(outcome)}")
    except (*FAMILY, OSError) as error:
        faults.append(sentence(error))
    for fault in faults[:3]:
        logger.warning("%s: before it is destroyed: %s", partition.id, fault)
        context.events.record(
            "instance.prerm_failed",
            f"{partition.id}: {fault}",
            partition=partition.id,
            resource=f"instance/{partition.id}",
        )


def _run(context: Context, partition: Partition, below: tuple[str, ...], seconds: float) -> execute.Outcome:
    """Run a program of the instance as its user, and keep the first of what it says. Raises PartitiondError, OSError."""
    privacy.ensure(context, partition)
    with usage_scripts.heard() as (descriptor, said):
        outcome = execute.as_user(
            partition.user,
            partition.user,
            [str(partition.path.joinpath(*below))],
            cwd=partition.path,
            env=execute.environment(str(partition.path), partition.user),
            log=descriptor,
            stop=context.stop,
            timeout=seconds,
            record=buildout.session_record(context.config, f"{partition.id}.prerm"),
            enter=privacy.entry(context.config, partition),
        )
    with buildout.Log(context.config.log_dir / partition.id / LOG, "/".join(below)) as log:
        os.write(log, said)
    return outcome


def _has(partition: Partition, directory: str, name: str) -> bool:
    """Whether there is something of that name. Raises OSError."""
    try:
        with files.directory(partition.path, directory) as descriptor:
            os.lstat(name, dir_fd=descriptor)
    except (FileNotFoundError, PartitiondError):
        return False
    return True


def _run_destroy(context: Context, partition: Partition) -> bool:
    """Run ``sbin/destroy``; return whether there is one. Raises PartitiondError ``instance.destroy_program``, OSError."""
    if not _has(partition, *_DESTROY):
        return False
    outcome = _run(context, partition, _DESTROY, context.config.grid.prerm_timeout)
    if not outcome.ok:
        raise PartitiondError(
            "instance.destroy_program",
            f"its own sbin/destroy failed ({buildout.ended(outcome)}); nothing is removed yet",
            resource=partition.id,
            hint=f"read {context.config.log_dir / partition.id / LOG}; partitiond sync report --force goes on without it",
            retryable=True,
        )
    return True


# --- its end ----------------------------------------------------------------------------------------------------------


def finish(
    context: Context,
    node: Node,
    *,
    unsettled: frozenset[str] = frozenset(),
    untold: frozenset[str] = frozenset(),
    force: bool = False,
) -> Result:
    """Remove the instances that are to be destroyed, and tell the master so: nothing yet of those that are ``unsettled``, and
    those that are ``untold`` are removed and the master is told later. ``force``: also those whose own ``sbin/destroy`` fails.
    """
    result = Result([], [])
    states, _ = context.store.readable()
    now = time.time()
    going = [
        item
        for item in node.partitions
        if (state := states.get(item.id)) and state.life == "destroying" and not kept(state, now)
    ]
    take_leave(context, [item for item in going if item.id not in unsettled and not states[item.id].removing])
    for partition in going:
        if context.stop.is_set():
            break
        if partition.id in unsettled:
            result.failures.append((partition.id, _unsettled(partition)))
            continue
        if not force and (waits := _waits(context.store.instance(partition.id))):
            result.failures.append((partition.id, waits))
            continue
        try:
            done = _finish_one(context, node, partition, tell=partition.id not in untold, force=force)
        except (*FAMILY, OSError) as error:
            result.failures.append((partition.id, error))
            # what was not even sent has been said before, or is the master's being away
            level = logging.DEBUG if getattr(error, "unsent", False) else logging.WARNING
            logger.log(level, "%s: not destroyed yet: %s", partition.id, sentence(error))
            continue
        if done:
            result.done.append(f"{partition.id}: destroyed")
    return result


def _finish_one(context: Context, node: Node, partition: Partition, *, tell: bool, force: bool) -> bool:
    state = _begin_removal(context, partition)
    if state is None:
        return False
    if not state.cleaned:
        state = _said_goodbye(context, partition, state, force=force)
        try:
            instance_cleanup.clean(context, node, partition)
        except (*FAMILY, OSError) as error:
            _note_failure(context, state, error)
            raise
        with context.applying:  # what the master said meanwhile stays
            state = replace(context.store.instance(partition.id), cleaned=True, error=None)
            context.store.save_instance(state)
    if state.dropped:
        # nor may what waits to be told be taken for the next one's
        context.outbox.forget(("instance", partition.id))
    elif not tell:
        return False
    else:
        context.ends.tell(context, partition.id, lambda client: client.instance_destroyed(partition.id))
    with context.applying:
        context.store.save_instance(replace(state, life="free"))
    # what every free partition has (its resource file, a new identity) is made again at once
    outcome = converge.apply(context, only=frozenset((partition.id,)))
    for refusal in outcome.refused:
        logger.warning("%s: refused: %s", refusal.name, refusal.reason)
    logger.info("%s: destroyed", partition.id)
    context.events.record(
        "instance.destroyed",
        f"{partition.id}: destroyed",
        partition=partition.id,
        resource=f"instance/{partition.id}",
        instance_guid=state.instance_guid,
        software_release=state.software_release,
    )
    return True


def _said_goodbye(
    context: Context, partition: Partition, state: InstanceState, *, force: bool
) -> InstanceState:
    """Have its own ``sbin/destroy`` run, once to a good end, however often cleaning is tried. Raises as that does."""
    if state.destroy_ran:
        return state
    try:
        if not _run_destroy(context, partition):
            return state
    except (*FAMILY, OSError) as error:
        if context.stop.is_set() or not force:
            _note_failure(context, state, error)
            raise
        logger.warning("%s: removed all the same: %s", partition.id, sentence(error))
    with context.applying:
        state = replace(context.store.instance(partition.id), destroy_ran=True)
        context.store.save_instance(state)
    return state


def _waits(state: InstanceState) -> PartitiondError | None:
    """What keeps one from being removed whose last try failed not long ago."""
    if not state.error or state.cleaned or time.time() >= state.next_try:
        return None
    return PartitiondError(
        "instances.not_destroyed",
        state.error,
        resource=state.partition,
        hint=f"tried again at {iso_utc(state.next_try)}; partitiond sync report --force tries now",
        retryable=True,
    )


def _begin_removal(context: Context, partition: Partition) -> InstanceState | None:
    """Close the way back; None when it was taken, or has not taken its leave."""
    with context.applying:
        state = context.store.instance(partition.id)
        if state.life != "destroying" or not (state.prerm_ran or state.removing):
            return None
        if not state.removing:
            state = replace(state, removing=True)
            context.store.save_instance(state)
        return state


def _note_failure(context: Context, state: InstanceState, error: Exception) -> None:
    """Try again later and later; the master is told once."""
    if context.stop.is_set():
        return
    failures = state.failures + 1
    text = str(error)
    if state.error != text and not state.dropped:
        report(lambda: context.client.instance_error(state.partition, text), state.partition)
    with context.applying:
        now = context.store.instance(state.partition)
        context.store.save_instance(
            replace(now, failures=failures, next_try=time.time() + pause_after(failures), error=text)
        )


def _unsettled(partition: Partition) -> PartitiondError:
    return PartitiondError(
        "instances.unsettled",
        "not destroyed yet: its last usage is in no document yet",
        resource=partition.id,
        hint="mend what keeps usage from being reported; partitiond sync report --force destroys it all the same",
        retryable=True,
    )
