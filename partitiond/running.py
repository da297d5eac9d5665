"""An instance's programs, started and stopped by supervisord.

Promises: what is stopped is not started again by anybody of ours; what runs and stays the same is not touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partitiond import privacy, programs, tunnels
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from partitiond.context import Context
    from partitiond.node import Partition


def start(context: Context, partition: Partition, *, another: bool) -> None:
    """Start what the buildout made; ``another``: of another release or type than what may still run.

    What runs and began before its partition was private is left to run as it does as long as it stays the same.
    Raises PartitiondError, among them ``instance.start``, and OSError.
    """
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


def stop(context: Context, partition: Partition) -> None:
    """Stop a partition's processes and tunnels, and make sure that nothing starts them again. Raises PartitiondError."""
    names = [
        name
        for name in (partition.id, tunnels.group_name(partition.id))
        if context.supervisor.has_group(name)
    ]
    if names and context.supervisor.running():
        for name in names:
            context.supervisor.stop_group(name)
    # two lanes that update supervisord at the same time get in each other's way
    with context.applying:
        changed = [name for name in names if context.supervisor.remove_group(name)]
        if changed and context.supervisor.running():
            context.supervisor.update()
