"""The destroy guard: no single answer of the master empties a node.

A master restored from an old backup, or answering for another computer, looks exactly like one that wants everything
gone. So an answer that would retire more than max(2, 20 %) of the busy partitions, or any that only stops listing an
instance without an explicit destroy, is held until a second answer says the same; likewise one that would remove as large a
part of the releases that are built, which costs hours each. What is held is told once, as an event.

The second equal answer is believed: what it destroys by word goes. What it only lists as free is known from then on to be
nothing of this master's, which is no word about its data (``dropped.py``).

Nothing else counts as a destroy: not an answer without a partition, not a 404 (the master answers so to its own mistakes, too),
not a release that is no longer listed.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from partitiond import files
from partitiond.errors import PartitiondError, sentence
from partitiond.state import software_name

if TYPE_CHECKING:
    from pathlib import Path

    from partitiond.context import Context
    from partitiond.events import EventLog
    from slap_client.documents import ComputerDocument

logger = logging.getLogger(__name__)

_SOFTWARE = "destroy-guard-software.json"
_COLLECTED = "destroy-guard-collected.json"


def held(
    busy: frozenset[str], explicit: frozenset[str], dropped: frozenset[str], previous: frozenset[str]
) -> frozenset[str]:
    """Return what must wait, of partitions or of releases. Pure.

    ``explicit`` are to be destroyed by word, ``dropped`` are listed as free although busy, ``previous`` is what the
    answer before this one wanted gone.
    """
    gone = (explicit | dropped) & busy
    # what is gone already, of a pass that was cut short, makes no other answer of it
    if len(gone) > max(2.0, 0.2 * len(busy)) and gone != previous & busy:
        return gone
    return (dropped & busy) - previous


def decide(
    file: Path,
    busy: frozenset[str],
    document: ComputerDocument,
    events: EventLog | None = None,
    noted: frozenset[str] = frozenset(),
) -> frozenset[str]:
    """Apply the guard to an answer about partitions, remembering it in ``file`` for the next one.

    Those that are ``noted`` as dropped already are not dropped again: they must not hold up what is asked for by word.
    """
    explicit = frozenset(entry.partition_id for entry in document.partitions if entry.destroy_requested)
    dropped = frozenset(entry.partition_id for entry in document.partitions if entry.free) - noted
    return _decide(file, busy, explicit, dropped, events)


def spare_software(
    context: Context, document: ComputerDocument
) -> tuple[ComputerDocument, list[tuple[str, Exception]]]:
    """The answer without the removals of releases that are held, and these as failures of the pass."""
    if not context.config.destroy_guard:
        return document, []
    states, damaged = context.store.readable_softwares()
    gone = frozenset(entry.url for entry in document.software if entry.requested_state == "destroyed")
    # of what cannot be read the directory may well be there
    unknown = frozenset(url for url in gone if software_name(url) in damaged)
    built = unknown | frozenset(state.url for state in states if state.available)
    waiting = _decide(context.config.state_dir / _SOFTWARE, built, gone, frozenset(), context.events)
    kept = tuple(entry for entry in document.software if entry.url not in waiting)
    return (replace(document, software=kept) if waiting else document), _failures(waiting)


def spare_unlisted(
    context: Context, unlisted: frozenset[str]
) -> tuple[frozenset[str], list[tuple[str, Exception]]]:
    """Of releases that are not listed, and so to be collected, those that may go, and the others as failures of the pass."""
    if not context.config.destroy_guard:
        return unlisted, []
    known = frozenset(state.url for state in context.store.softwares())
    file = context.config.state_dir / _COLLECTED
    waiting = _decide(file, known, unlisted, frozenset(), context.events)
    return unlisted - waiting, _failures(waiting)


def _failures(waiting: frozenset[str]) -> list[tuple[str, Exception]]:
    failures: list[tuple[str, Exception]] = []
    for url in sorted(waiting):
        error = PartitiondError(
            "software.held",
            "the master's answer would remove it together with many others",
            resource=url,
            hint="kept until a second answer says the same",
            retryable=True,
        )
        failures.append((url, error))
        logger.warning("%s", sentence(error))
    return failures


def _decide(
    file: Path,
    present: frozenset[str],
    explicit: frozenset[str],
    dropped: frozenset[str],
    events: EventLog | None,
) -> frozenset[str]:
    previous = _previous(file)
    wanted = (explicit | dropped) & present
    if wanted != previous:
        files.write_path(file, json.dumps(sorted(wanted)).encode(), mode=0o600)
    waiting = held(present, explicit, dropped, previous)
    if waiting and events is not None:
        events.record(
            "destroy.held",
            f"the master wants {len(waiting)} of {len(present)} gone; they are kept until a second answer says the same",
            resource=file.stem,
            names=sorted(waiting),
            hint="if that is the master's mistake: stop partitiond until it is mended; what runs keeps running",
        )
    return waiting


def _previous(file: Path) -> frozenset[str]:
    if not file.is_file():
        return frozenset()
    try:
        return frozenset(json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        # unreadable: as if nothing had been asked for before, which holds more, not less
        return frozenset()
