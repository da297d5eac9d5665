"""The node's memory of its master: whether it answers, and since when not."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from partitiond import files

if TYPE_CHECKING:
    from pathlib import Path


class MasterContact:
    """When the master last gave a usable answer.

    On disk only when it comes or goes, so that a pass without change writes nothing.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._reachable: bool | None = None
        self._last: float | None = None
        try:
            found = json.loads(self._file.read_bytes())
            self._reachable, self._last = found["reachable"], found["last_contact"]
        except (OSError, ValueError, KeyError):
            return

    def note(self, reachable: bool) -> None:
        """Remember how a call went."""
        changed = reachable != self._reachable
        self._reachable = reachable
        if reachable:
            self._last = time.time()
        if changed:
            value = {"reachable": reachable, "last_contact": self._last}
            files.write_path(self._file, json.dumps(value).encode(), mode=0o600)

    def as_json(self) -> dict[str, object]:
        """The contract's fields."""
        last = None if self._last is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._last))
        return {"reachable": self._reachable, "last_contact": last}
