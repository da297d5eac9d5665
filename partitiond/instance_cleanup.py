"""Everything that an instance leaves behind, removed: the next one in its partition has the same user.

Promises: each step may be done again, and what was killed in the midst is finished by the next try; what cannot be removed is
an error, so that nobody is told of an end that has not come.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from netplan import learned
from partitiond import certificates, execute, files, identities, privacy, remains, running, storage

if TYPE_CHECKING:
    from partitiond.context import Context
    from partitiond.node import Node, Partition


def clean(context: Context, node: Node, partition: Partition) -> None:
    """Remove all of an instance from the node. Raises a family error, OSError."""
    running.stop(context, partition)
    # the last bytes belong to the instance that goes, not to the one that comes
    context.meters.settle(context, node)
    context.meters.forget(partition.id)
    if context.config.unmanaged is None:
        # else its user is whoever runs this: jobs, processes and files that are not in the partition are not the instance's
        remains.remove_jobs(partition.user, partition.uid)  # before its processes: they are started by others
        execute.end_processes_of(partition.uid, partition.gid)
        privacy.forget(context.config, partition)
        remains.remove(partition.user, partition.uid)
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
