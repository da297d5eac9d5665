"""The X509 pair that the master gives for an instance, as files that only the partition's user can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from partitiond import files
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from pathlib import Path

    from partitiond.context import Context
    from partitiond.node import Partition


def paths(context: Context, partition: Partition) -> tuple[Path, Path] | None:
    """Where (key, certificate) lie, or None where the node has no certificate repository."""
    repository = context.config.certificate_repository
    if repository is None:
        return None
    return repository / f"{partition.id}.key", repository / f"{partition.id}.crt"


def fetch(context: Context, partition: Partition) -> None:
    """Ask the master for the pair and write it where it changed. Raises SlapError, OSError."""
    where = paths(context, partition)
    if where is None:
        return
    pair = context.client.partition_certificate(partition.id)
    where[0].parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    for path, text in zip(where, (pair.key, pair.certificate), strict=True):
        content = text.encode()
        if not _holds(path, content):
            files.write_path(path, content, mode=0o400, owner=(partition.uid, partition.gid))


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file has that content. It is the tenant's, who may have changed it, made it endless or taken a lease on it."""
    try:
        with files.directory(path.parent) as descriptor:
            return files.read(path.name, dir_fd=descriptor, limit=len(content)) == content
    except (FileNotFoundError, PartitiondError):
        return False


def remove(context: Context, partition: Partition) -> None:
    """Remove the pair of an instance that is destroyed."""
    for path in paths(context, partition) or ():
        path.unlink(missing_ok=True)
