"""tincd's log, read: what it adds while somebody waits for it, and the end of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MOST_NEW = 1 << 22
_TAIL = 1 << 18


class NewLines:
    """What is added to a log from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._from = path.stat().st_size if path.exists() else 0

    def text(self) -> str:
        """The whole lines that came."""
        try:
            with self._path.open("rb") as stream:
                # one that is smaller than it was has been rotated
                there = stream.seek(0, os.SEEK_END)
                stream.seek(self._from if there >= self._from else 0)
                found = stream.read(_MOST_NEW).decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        return found[: found.rfind("\n") + 1]

    def lines(self) -> list[str]:
        """The same by line."""
        return self.text().split("\n")[:-1]


def tail(path: Path) -> list[str]:
    """The last lines of a log, of the one before too where this one has just begun; none where there is none."""
    found = b""
    for one in (path, path.with_name(f"{path.name}.1")):
        if len(found) < _TAIL:
            found = _end(one, _TAIL - len(found)) + found
    return found.decode("utf-8", "replace").split("\n")


def _end(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - most))
            return stream.read(most)
    except FileNotFoundError:
        return b""
