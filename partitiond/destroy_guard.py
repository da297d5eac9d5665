"""The destroy guard: no single answer of the master empties a node.

A master restored from an old backup, or answering for another computer, looks exactly like one that wants everything
gone. So an answer that would retire more than max(2, 20 %) of the busy partitions, or any that only stops listing an
instance without an explicit destroy, is held until a second answer says the same.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from partitiond import files

if TYPE_CHECKING:
    from pathlib import Path

    from slap_client.documents import ComputerDocument


def held(
    busy: frozenset[str], explicit: frozenset[str], dropped: frozenset[str], previous: frozenset[str]
) -> frozenset[str]:
    """Return the partitions that must wait. Pure.

    ``explicit`` are to be destroyed by word, ``dropped`` are listed as free although busy, ``previous`` is what the
    answer before this one wanted gone.
    """
    gone = (explicit | dropped) & busy
    if len(gone) > max(2.0, 0.2 * len(busy)):
        return gone - previous
    return (dropped & busy) - previous


def decide(file: Path, busy: frozenset[str], document: ComputerDocument) -> frozenset[str]:
    """Apply the guard to an answer, remembering it in ``file`` for the next one."""
    explicit = frozenset(entry.partition_id for entry in document.partitions if entry.destroy_requested)
    dropped = frozenset(entry.partition_id for entry in document.partitions if entry.free)
    previous: frozenset[str] = frozenset()
    if file.is_file():
        try:
            previous = frozenset(json.loads(file.read_bytes()))
        except (ValueError, TypeError):
            previous = (
                frozenset()
            )  # unreadable: as if nothing had been asked for before, which holds more, not less
    wanted = (explicit | dropped) & busy
    if wanted != previous:
        files.write_path(file, json.dumps(sorted(wanted)).encode(), mode=0o600)
    return held(busy, explicit, dropped, previous)
