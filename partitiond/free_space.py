"""Free space before something big begins: builds of releases and of instances fill disks, and a full disk stops everybody.

What counts is what users other than root may fill (statvfs(3), ``f_bavail``), as slapgrid counts it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from pathlib import Path

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def available(path: Path) -> int:
    """Bytes that can be written at a path, or where its nearest parent lies. Raises OSError."""
    while True:
        try:
            found = os.statvfs(path)
        except FileNotFoundError:
            if path == path.parent:
                raise
            path = path.parent
            continue
        return found.f_frsize * found.f_bavail


def require(path: Path, needed: int, *, code: str, key: str, resource: str) -> None:
    """Refuse to begin where less than ``needed`` bytes are free; ``key`` is the one in ``[slapos]`` that asks for them.

    Raises PartitiondError ``code``, which says what is free and what is needed, or OSError.
    """
    free = available(path) if needed else 0
    if free < needed:
        raise PartitiondError(
            code,
            f"{human(free)} free at {path}, {human(needed)} needed",
            resource=resource,
            hint=f"make room there, or lower {key} in [slapos]",
            retryable=True,
        )


def human(size: int) -> str:
    """A size as people say it."""
    value, number = float(size), 0
    while value >= 1024 and number < len(_UNITS) - 1:
        value, number = value / 1024, number + 1
    return f"{value:.0f} {_UNITS[number]}" if number < 2 else f"{value:.1f} {_UNITS[number]}"
