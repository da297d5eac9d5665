"""Directories of the node and of its partitions: kind, owner, mode."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitiond import files
from partitiond.errors import PartitiondError
from partitiond.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_NOBODY = (None, None)


@dataclass(frozen=True, slots=True)
class DirectorySpec:
    """A directory as it should be; owner and group are names, resolved when the plan is run."""

    path: Path
    owner: str
    group: str
    mode: int
    partition: str | None = None


@dataclass(frozen=True, slots=True)
class DirectoryOperation(Operation):
    """Make one directory as it should be."""

    spec: DirectorySpec


def plan(
    desired: Sequence[DirectorySpec], numbers: Mapping[str, tuple[int, int]]
) -> tuple[DirectoryOperation, ...]:
    """Compare with the file system.

    ``numbers`` maps users that exist to (uid, gid); one that is still to be made counts as different. Raises
    PartitiondError ``directory.in_the_way`` for a link or a file in its place, ``directory.foreign`` where a directory that is
    to be root's holds what another user may have put there: root runs and trusts what lies in its own.
    """
    operations = []
    for spec in desired:
        try:
            found = os.lstat(spec.path)
        except (FileNotFoundError, NotADirectoryError):
            operations.append(_operation(spec, None, "missing"))
            continue
        wanted = (
            numbers.get(spec.owner, _NOBODY)[0],
            numbers.get(spec.group, _NOBODY)[1],
            stat.S_IFDIR | spec.mode,
        )
        right = (found.st_uid, found.st_gid, found.st_mode) == wanted
        # only who owns it can give it a list: a tenant. The mode then says what the list gives at most, not to whom
        listed = found.st_uid != 0 and files.has_acl(str(spec.path))
        if right and not listed:
            continue
        if not stat.S_ISDIR(found.st_mode):
            raise PartitiondError(
                "directory.in_the_way",
                "is not a directory; it is not replaced",
                resource=str(spec.path),
                hint="move it away",
            )
        if _is_foreign(spec, found.st_uid) and not _is_empty(spec.path):
            raise _foreign(spec.path, found.st_uid)
        before = f"uid {found.st_uid}, gid {found.st_gid}, mode {stat.S_IMODE(found.st_mode):04o}"
        before += ", with an access control list" if listed else ""
        operations.append(_operation(spec, before, f"is {before}"))
    return tuple(operations)


def _is_foreign(spec: DirectorySpec, uid: int) -> bool:
    """Whether a directory of the node, which is to be root's, is somebody else's."""
    return spec.partition is None and spec.owner == "root" and uid != 0


def _is_empty(directory: Path | int) -> bool:
    with os.scandir(directory) as entries:
        return next(entries, None) is None


def _foreign(path: Path, uid: int) -> PartitiondError:
    return PartitiondError(
        "directory.foreign",
        f"belongs to uid {uid} and is not empty; root would run and trust what that user has put there",
        resource=str(path),
        hint="name another directory in the configuration, or move it away; if only its owner was changed: chown root:root",
    )


def _operation(spec: DirectorySpec, before: str | None, reason: str) -> DirectoryOperation:
    return DirectoryOperation(
        id=f"directory{spec.path}",
        resource="directory",
        action="change" if before else "create",
        partition=spec.partition,
        before=before,
        after=f"{spec.owner}:{spec.group} {spec.mode:04o}",
        reason=reason,
        spec=spec,
    )


def apply(operations: Iterable[DirectoryOperation], numbers: Mapping[str, tuple[int, int]]) -> None:
    """Make them. Raises OSError, and PartitiondError as :func:`plan` does; parents that are not in the plan are made 0755."""
    for operation in operations:
        spec = operation.spec
        spec.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            spec.path.mkdir(mode=0o700)
        # by descriptor: what is changed is what was just checked to be a directory
        descriptor = os.open(spec.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            before = os.fstat(descriptor)
            os.fchown(descriptor, numbers[spec.owner][0], numbers[spec.group][1])
            # from here on nobody else makes anything in it; what came since it was looked at is as little root's as before
            if _is_foreign(spec, before.st_uid) and not _is_empty(descriptor):
                os.fchown(descriptor, before.st_uid, before.st_gid)
                raise _foreign(spec.path, before.st_uid)
            files.remove_acl(descriptor)
            os.fchmod(descriptor, spec.mode)
        finally:
            os.close(descriptor)
