"""The files that slapgrid leaves in a partition, kept for what reads them: monitors, promises, the recipes of a release.

``.timestamp`` is the master's text of the last deployment that succeeded, ``.slapgrid-<partition>-error.log`` why the last one
failed, ``.slapos-retention-lock-delay`` and ``-date`` how long the instance is kept after its end. Nothing of ours hangs on
them: the tenant can put anything in their place, so what counts is in our own state, and what cannot be written is a warning.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING

from partitiond import files
from partitiond.errors import FAMILY, sentence

if TYPE_CHECKING:
    from collections.abc import Iterable

    from partitiond.context import Context
    from partitiond.node import Partition

logger = logging.getLogger(__name__)

TIMESTAMP = ".timestamp"
RETENTION_DELAY = ".slapos-retention-lock-delay"
RETENTION_DATE = ".slapos-retention-lock-date"
_RESOURCE = ".slapos-resource"
_SMALL = 64
_SHOWN = 5
_OUT_OF_REACH = -1  # no time that a directory was changed at
_MESSAGE_LIMIT = 64 * 1024


def error_log(partition: Partition) -> str:
    """The name of the file that says why the last deployment failed."""
    return f".slapgrid-{partition.id}-error.log"


def begin(partition: Partition) -> None:
    """Take away what the last deployment left: whoever looks meanwhile sees that this one has not succeeded yet.

    Also the list of what the instance asks for, which the client library in it only ever adds to.
    """
    names = (TIMESTAMP, error_log(partition), f".slapos-request-transaction-{partition.id}")
    try:
        with files.directory(partition.path) as descriptor:
            for name in names:
                _remove(partition, name, descriptor)
    except OSError as error:
        _warn(partition, names[0], error)


def _remove(partition: Partition, name: str, descriptor: int) -> None:
    try:
        os.unlink(name, dir_fd=descriptor)
    except FileNotFoundError:
        return
    except OSError as error:
        _warn(partition, name, error)


def succeeded(partition: Partition, timestamp: str) -> None:
    """Write the master's timestamp, as it came; nothing where it gave none."""
    if timestamp:
        _write(partition, TIMESTAMP, timestamp)


def failed(partition: Partition, message: str) -> None:
    """Write why a deployment failed."""
    _write(partition, error_log(partition), message[-_MESSAGE_LIMIT:])


def retention(partition: Partition, days: float) -> None:
    """Write the delay that was fixed."""
    _write(partition, RETENTION_DELAY, str(days))


def kept(partition: Partition, until: float) -> None:
    """Write the date before which nothing is removed."""
    _write(partition, RETENTION_DATE, str(until))


def _write(partition: Partition, name: str, text: str) -> None:
    try:
        with files.directory(partition.path) as descriptor:
            files.write(name, text.encode("utf-8", "replace"), dir_fd=descriptor, mode=0o644)
    except OSError as error:
        _warn(partition, name, error)


def _warn(partition: Partition, name: str, error: OSError) -> None:
    logger.warning("%s: %s is not as it should be: %s", partition.id, name, error.strerror)


def of_slapgrid(partition: Partition, name: str, owners: frozenset[int]) -> str | None:
    """What slapgrid wrote into one of its small files; ``owners`` are root and the software user, whose it is.

    None without one, and for one of the tenant's own making.
    """
    try:
        with files.directory(partition.path) as descriptor:
            return files.read(name, dir_fd=descriptor, limit=_SMALL, owners=owners).decode("ascii", "replace")
    except FileNotFoundError:
        return None
    except (*FAMILY, OSError) as error:
        logger.warning("%s: %s is not heeded: %s", partition.id, name, sentence(error))
        return None


def tidy(context: Context, partition: Partition) -> None:
    """Take slapgrid's leftovers out of a free partition, and warn once of other files in it, or of what keeps us from looking.

    A directory that nobody has changed since is not looked at again.
    """
    try:
        _tidy(context, partition)
    except OSError as error:
        if context.free_seen.get(partition.id) != _OUT_OF_REACH:
            logger.warning("%s is free and cannot be looked at: %s", partition.id, error.strerror)
        context.free_seen[partition.id] = _OUT_OF_REACH


def _tidy(context: Context, partition: Partition) -> None:
    try:
        stamp = partition.path.lstat().st_mtime_ns
    except FileNotFoundError:
        return
    if context.free_seen.get(partition.id) == stamp:
        return
    with files.directory(partition.path) as descriptor:
        left = files.names(descriptor)
        _remove_leftovers(partition, left, descriptor)
        left = [name for name in files.names(descriptor) if name != _RESOURCE]
        context.free_seen[partition.id] = os.fstat(descriptor).st_mtime_ns
    if left:
        shown = ", ".join(map(ascii, left[:_SHOWN]))
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        logger.warning("%s is free and has files all the same: %s%s", partition.id, shown, more)


def _remove_leftovers(partition: Partition, found: Iterable[str], descriptor: int) -> None:
    for name in {TIMESTAMP, ".slapgrid"}.intersection(found):
        try:
            files.remove(name, dir_fd=descriptor)
        except (*FAMILY, OSError) as error:
            if getattr(error, "errno", 0) != errno.ENOENT:
                logger.warning("%s: %s stays: %s", partition.id, name, sentence(error))
