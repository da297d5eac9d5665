"""Giving block device nodes and taking them back: the effects of ``block_devices.py``, one node at a time."""

# ruff: noqa: PTH101, PTH116, PTH208 - what is changed is named by descriptor, below /proc

from __future__ import annotations

import logging
import os
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from partitiond import posix_acl
from partitiond.block_devices import DEV, EXCLUSIVE, OWNER_RW, not_opened, observe, plan, seen_as
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from partitiond.block_devices import GrantOperation, Observed, WithdrawOperation
    from partitiond.config import Config
    from partitiond.node import Partition
    from partitiond.users import UserDatabase

logger = logging.getLogger(__name__)

# what udev gives to disks; the one who owned the node may have left it in any mode
_MODE = 0o660


def grant(operation: GrantOperation) -> None:
    """Give a node. Raises PartitiondError ``device.busy``, ``device.missing``, ``device.changed``, ``device.not_changed``."""
    with _held(operation.path, operation.rdev, exclusive=operation.first) as path:
        if operation.owner:
            _reset(path, operation.owner)
        found = os.stat(path)
        acl = posix_acl.read(path, found.st_mode)
        if acl is None:
            os.chown(path, operation.uid, -1)
            os.chmod(path, found.st_mode & 0o7777 | OWNER_RW)
        else:
            posix_acl.write(path, posix_acl.with_user(acl, operation.uid, posix_acl.READ_WRITE))


def withdraw(operation: WithdrawOperation) -> None:
    """Take a node back; one that is gone took its rights with it. Raises PartitiondError ``device.not_changed``."""
    try:
        with _held(operation.path, operation.rdev, exclusive=False) as path:
            if operation.owner:
                _reset(path, operation.owner)
            else:
                acl = posix_acl.read(path, os.stat(path).st_mode)
                if acl is not None:
                    posix_acl.write(path, posix_acl.without_users(acl, frozenset((operation.uid,))))
    except PartitiondError as error:
        if error.code not in ("device.missing", "device.changed"):
            raise
    if pids := _still_open(operation.rdev, operation.uid):
        logger.warning(
            "%s was taken from uid %d, but stays open in its process %s until that ends",
            operation.path,
            operation.uid,
            ", ".join(map(str, pids)),
        )


def _reset(path: str, owner: tuple[int, int]) -> None:
    """Undo all that the owner of a node could have done with it: mode and list were in its hands.

    Closed before the owner changes, as a node of root's that is open to everybody would not be found again if we end here; and
    after it, as the owner could have opened it meanwhile.
    """
    _close(path)
    os.chown(path, *owner)
    _close(path)


def _close(path: str) -> None:
    if posix_acl.read(path, _MODE) is None:
        os.chmod(path, _MODE)
    else:
        posix_acl.write(path, posix_acl.of_mode(_MODE))


@contextmanager
def _held(path: str, rdev: int, *, exclusive: bool) -> Iterator[str]:
    """Hold a node by a descriptor, so that what is changed is what was looked at; yields a path to just that.

    ``exclusive``: the device itself, too, so that nobody can begin to use it meanwhile.
    """
    flags = EXCLUSIVE if exclusive else os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise not_opened(path, error) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISBLK(found.st_mode) or found.st_rdev != rdev:
            raise PartitiondError(
                "device.changed",
                "is another device than a moment ago",
                resource=path,
                hint="apply again",
                retryable=True,
            )
        yield f"/proc/self/fd/{descriptor}"
    except OSError as error:
        raise PartitiondError(
            "device.not_changed",
            f"cannot change who may use it: {error.strerror}",
            resource=path,
            hint="is /dev read-only?",
        ) from error
    finally:
        os.close(descriptor)


def _still_open(rdev: int, uid: int) -> list[int]:
    """Processes of a user that have a device open."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        # any of it may end while it is looked at
        with suppress(OSError):
            if os.stat(f"/proc/{process}").st_uid == uid and any(
                _opens(f"/proc/{process}/fd/{name}", rdev) for name in os.listdir(f"/proc/{process}/fd")
            ):
                found.append(int(process))
    return found


def _opens(descriptor: str, rdev: int) -> bool:
    try:
        found = os.stat(descriptor)
    except OSError:
        return False
    return stat.S_ISBLK(found.st_mode) and found.st_rdev == rdev


def withdraw_all(config: Config, database: UserDatabase, *, dev: Path = DEV) -> list[tuple[str, Exception]]:
    """Take everything back that users of ours hold; what failed, by operation. Raises OSError when nothing can be seen."""
    failures: list[tuple[str, Exception]] = []
    nothing = observe(config, (), database, dev=dev)
    for operation in plan(nothing).withdrawals:
        try:
            withdraw(operation)
        except (PartitiondError, OSError) as error:
            failures.append((operation.id, error))
    return failures


def given_now(observed: Observed, partition: Partition) -> list[str]:
    """The stable names of what a partition has at this moment, looked at again behind the names of the observation."""
    found = []
    for one in observed.candidates:
        if one.partition.id == partition.id and one.node is not None:
            with suppress(OSError, ValueError):
                status = os.lstat(one.node.path)
                if status.st_rdev == one.node.rdev and seen_as(one.node.path, status).given(partition.uid):
                    found.append(one.device.name)
    return found
