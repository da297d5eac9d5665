"""Small files that are looked at in every pass, read again only when they are not the ones that were read before.

Promises: what is returned is what reading would return. A file counts as the same while its inode is, and the time of that
inode's last change: whatever is done to content, owner or mode sets it, and nobody can set it back but by the system's
clock, see inode(7). And only when that time lies back far enough that another change would show: the kernel stamps with
the resolution of its tick.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

_TICK_SECONDS = 0.1

Value = TypeVar("Value")


class Settled(Generic[Value]):
    """What was made of files, by name, with what these files looked like."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Hashable, Value]] = {}

    def get(self, name: str, paths: Sequence[str], given: Hashable, read: Callable[[], Value]) -> Value:
        """Return what ``read`` makes of the files at ``paths``, none of which may be a tenant's to point elsewhere.

        ``given`` is what the result depends on besides. What ``read`` raises is not remembered.
        """
        looks = tuple(_look(path) for path in paths)
        known = self._known.get(name)
        if known is not None and known[0] == (looks, given):
            return known[1]
        value = read()
        newest = max((look[-1] for look in looks if look), default=0)
        if newest < time.time_ns() - _TICK_SECONDS * 1e9:
            self._known[name] = ((looks, given), value)
        else:
            self._known.pop(name, None)
        return value


def _look(path: str) -> tuple[int, ...]:
    """What a file looks like, the time of its last change at the end; nothing for one that is not there."""
    try:
        found = os.lstat(path)
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_ctime_ns)
