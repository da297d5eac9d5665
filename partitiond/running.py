"""An instance's programs, started and stopped by supervisord.

Promises: what is stopped is not started again by anybody of ours; what runs and stays the same is not touched; for a tenant's
program that does not end nobody else waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partitiond import privacy, programs, tunnels
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from partitiond.context import Context
    from partitiond.node import Partition
    from partitiond.supervision import Group

_ROUNDS = 5


def start(context: Context, partition: Partition, *, another: bool) -> None:
    """Start what the buildout made; ``another``: of another release or type than what may still run.

    What runs and began before its partition was private is left to run as it does as long as it stays the same.
    Raises PartitiondError, among them ``instance.start``, and OSError.
    """
    group = programs.group(context, partition)
    for again in range(_ROUNDS):
        with context.applying:
            if again and group.programs and not context.supervisor.has_group(group.name):
                break  # the partition, or the whole node, was taken down meanwhile
            _write(context, partition, group, another=another)
            if group.name not in context.supervisor.take_in():
                if group.programs:
                    context.supervisor.start_group(group.name)
                    _look(context, partition)
                return
        # a tenant's program has a minute to end, and nobody else shall wait for it
        context.supervisor.stop_group(group.name)
    raise _interfered(partition)


def _write(context: Context, partition: Partition, group: Group, *, another: bool) -> None:
    """Let the files say what is to run; the tunnels follow at once: they are ours, and end when they are told to."""
    if not group.programs:
        context.supervisor.remove_group(group.name)
    elif another or not privacy.is_late(context.supervisor, group):
        context.supervisor.write_group(group)
    if another:
        # its stunnel has run on outside until now, too
        tunnel = tunnels.group_name(partition.id)
        privacy.relaunch(context, partition, tunnel)
        # also when the file is as it was: one who was killed after writing it has told supervisord nothing
        context.supervisor.update(only=(tunnel,))


def _interfered(partition: Partition) -> PartitiondError:
    return PartitiondError(
        "instance.start",
        "its programs were changed by somebody else at the same time",
        resource=partition.id,
        hint="it is tried again",
        retryable=True,
    )


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


def stop(context: Context, partition: Partition) -> None:
    """Stop a partition's processes and tunnels, and make sure that nothing starts them again. Raises PartitiondError."""
    supervisor = context.supervisor
    names = frozenset(
        name for name in (partition.id, tunnels.group_name(partition.id)) if supervisor.has_group(name)
    )
    left = names
    for _ in range(_ROUNDS):
        if left and supervisor.running():
            supervisor.stop_groups(sorted(left))
        # two lanes that update supervisord at the same time get in each other's way
        with context.applying:
            for name in names:
                supervisor.remove_group(name)
            if not names or not supervisor.running():
                return
            left = names & supervisor.take_in()
            if not left:
                return
    raise _interfered(partition)
