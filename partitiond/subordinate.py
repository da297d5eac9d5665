"""Subordinate uids: those that the administrator lets a user map into user namespaces of its own, subuid(5).

Who has the uids of somebody in there is that user outside, too, under a number that no account has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


_FILE = Path("/etc/subuid")


@dataclass(slots=True)
class SubordinateUids:
    """What the file says, read again when it was changed."""

    path: Path = _FILE
    _version: tuple[int, int, int] | None = None
    _ranges: list[tuple[str, range]] = field(default_factory=list)

    def owner(self, uid: int, users: Mapping[str, int]) -> int | None:
        """Return whose subordinate uid it is, of users by name.  Raises OSError where the file cannot be read."""
        self._look()
        numbers = {str(number): number for number in users.values()}  # the file may name either
        for name, uids in self._ranges:
            owner = users.get(name, numbers.get(name))
            if owner is not None and uid in uids:
                return owner
        return None

    def _look(self) -> None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            self._version, self._ranges = None, []
            return
        version = (found.st_ino, found.st_mtime_ns, found.st_size)
        if version != self._version:
            self._ranges = _parse(self.path.read_text(errors="replace"))
            self._version = version


def _parse(text: str) -> list[tuple[str, range]]:
    found = []
    for line in text.splitlines():
        name, *numbers = line.strip().split(":")
        if len(numbers) == 2 and all(one.isascii() and one.isdigit() and len(one) < 11 for one in numbers):
            begin, count = map(int, numbers)
            found.append((name, range(begin, begin + count)))
    return found
