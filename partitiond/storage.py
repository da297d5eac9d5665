"""``instance_storage_home``: directories of partitions on other disks, as slapformat makes them.

Each directory ``data<digits>`` in it gets one directory per partition. Only root may be able to change what lies on the way
there: else the owner of a data directory could put another partition's directory, or a link, in the place of the one that root
makes.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitiond import directories, files, trusted_path
from partitiond.directories import DirectorySpec
from partitiond.errors import PartitiondError
from partitiond.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.directories import DirectoryOperation
    from partitiond.node import Node

_MODE = 0o750
# as slapformat chooses them: glob data*, then only digits
_DATA = re.compile(r"data([0-9]+)")

_ABSENT = "mount it, or take it out of instance_storage_home"
_MOUNTED = "is something mounted there? umount -l takes it away"


@dataclass(frozen=True, slots=True)
class Observed:
    """The data directories that may be used, and those that may not, with the reason."""

    data: tuple[Path, ...] = ()
    refused: tuple[Refusal, ...] = ()

    def paths(self, partition: str) -> list[str]:
        """The directories of a partition, as ``external_storage_list`` has them."""
        return [f"{data}/{partition}" for data in self.data]


def observe(config: Config) -> Observed:
    """Look for the data directories."""
    home = config.instance_storage_home
    if home is None:
        return Observed()
    try:
        names = [name for name in os.listdir(home) if _DATA.fullmatch(name)]  # noqa: PTH208 - names suffice
    except OSError as error:
        return Observed(refused=(_refusal(config, home, _unreadable(home, error)),))
    data, refused = [], []
    for name in sorted(names, key=lambda one: (int(one.removeprefix("data")), one)):
        try:
            trusted_path.check_directory(trusted_path.resolve(str(home / name)))
        except PartitiondError as error:
            refused.append(_refusal(config, home / name, error))
        except OSError as error:
            refused.append(_refusal(config, home / name, _unreadable(home / name, error)))
        else:
            data.append(home / name)
    return Observed(tuple(data), tuple(refused))


def _unreadable(path: Path, error: OSError, hint: str = _ABSENT) -> PartitiondError:
    return PartitiondError(
        "storage.unusable",
        f"cannot be used: {error.strerror or error}",
        resource=str(path),
        hint=hint,
        retryable=True,
    )


def _refusal(config: Config, path: Path, error: PartitiondError, partition: str = "") -> Refusal:
    return Refusal(
        resource="storage",
        name=str(path),
        partition=partition,
        file=str(config.file),
        line=None,
        code=error.code,
        reason=str(error),
        hint=error.hint,
    )


def plan(
    target: Node, observed: Observed, numbers: Mapping[str, tuple[int, int]]
) -> tuple[tuple[DirectoryOperation, ...], tuple[Refusal, ...]]:
    """What the partitions' directories need; a data directory on a failing disk is refused and holds up nothing else.

    ``numbers`` as in :func:`directories.plan`.
    """
    operations: list[DirectoryOperation] = []
    refused = list(observed.refused)
    for data in observed.data:
        wanted, unusable = _plan_data(target, data, numbers)
        operations += wanted
        refused += unusable
    return tuple(operations), tuple(refused)


def _plan_data(
    target: Node, data: Path, numbers: Mapping[str, tuple[int, int]]
) -> tuple[list[DirectoryOperation], list[Refusal]]:
    """The same for one data directory.

    One that fails for all is a disk that fails; for some, these have mounted something there that keeps even root out.
    """
    operations: list[DirectoryOperation] = []
    refused, unreadable = [], []
    for item in target.partitions:
        try:
            if not _is_right(f"{data}/{item.id}", numbers.get(item.user)):
                spec = DirectorySpec(data / item.id, item.user, item.user, _MODE, item.id)
                operations += directories.plan((spec,), numbers)
        except PartitiondError as error:
            refused.append(_refusal(target.config, data / item.id, error, item.id))
        except OSError as error:
            unreadable.append((item.id, error))
    if len(unreadable) == len(target.partitions) > 1:
        return [], [*refused, _refusal(target.config, data, _unreadable(data, unreadable[0][1]))]
    refused += [
        _refusal(target.config, data / name, _unreadable(data / name, error, _MOUNTED), name)
        for name, error in unreadable
    ]
    return operations, refused


def _is_right(path: str, owner: tuple[int, int] | None) -> bool:
    """The usual case, looked at cheaply: there may be thousands of them."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    right = found.st_mode == stat.S_IFDIR | _MODE and (found.st_uid, found.st_gid) == owner
    return right and not files.has_acl(path)


def empty(config: Config, partition: str) -> None:
    """Remove what an instance left in its partition's directories. Raises OSError, PartitiondError."""
    for data in observe(config).data:
        with suppress(FileNotFoundError):
            with files.directory(data, partition) as descriptor:
                files.seal(descriptor)
                files.empty(descriptor)
            files.remove_emptied(data / partition)


def purge(config: Config) -> None:
    """Remove the directories of all partitions, also of former ones. Raises OSError, PartitiondError."""
    for directory in _of_partitions(config):
        with files.directory(directory.parent, directory.name) as descriptor:
            files.empty(descriptor)
        with suppress(OSError):
            directory.rmdir()  # a mount point stays, empty


def _of_partitions(config: Config) -> Iterator[Path]:
    name = re.compile(re.escape(config.partition_base) + "[0-9]+")
    for data in observe(config).data:
        for found in sorted(data.iterdir()):
            if name.fullmatch(found.name) and found.is_dir() and not found.is_symlink():
                yield found
