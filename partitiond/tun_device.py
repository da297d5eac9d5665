"""``/dev/net/tun``: what a partition's user opens to use its tap.

The kernel makes the node for root alone; udev opens it to everybody (mode 0666), as a tap is guarded by its owner and not by
this file (tun(4), TUNSETOWNER). Where no udev runs, this does the same.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from partitiond.errors import PartitiondError
from partitiond.operation import Operation

DEVICE = Path("/dev/net/tun")
_OPEN = 0o666


@dataclass(frozen=True, slots=True)
class DeviceOperation(Operation):
    """Open the device to every user."""


def plan(*, taps: bool) -> tuple[DeviceOperation, ...]:
    """What the device needs where there are taps; without the device itself the taps say what is missing."""
    try:
        found = os.lstat(DEVICE)
    except FileNotFoundError:
        return ()
    mode = stat.S_IMODE(found.st_mode)
    if not taps or not stat.S_ISCHR(found.st_mode) or mode & _OPEN == _OPEN:
        return ()
    return (
        DeviceOperation(
            id=f"device{DEVICE}",
            resource="device",
            action="change",
            partition=None,
            before=f"mode {mode:04o}",
            after=f"mode {_OPEN:04o}",
            reason="the users of partitions cannot open their taps",
        ),
    )


def apply() -> None:
    """Open it. Raises PartitiondError ``device.not_opened``."""
    try:
        DEVICE.chmod(_OPEN)
    except OSError as error:
        raise PartitiondError(
            "device.not_opened",
            f"cannot change its mode: {error.strerror}",
            resource=str(DEVICE),
            hint="is /dev read-only?",
        ) from error
