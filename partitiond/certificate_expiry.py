"""Which X509 pairs of the master end soon, or have ended: the node's own, and those of its instances.

Promises: said in time and with the next step; each of the stages of a certificate is an event once, also when the daemon is
restarted; ``partitiond status`` says it as long as it is so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from partitiond import certificates, files, node_pair
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.node import Partition

RENEWED_BEFORE = timedelta(days=30)
"""From then on the master is asked for the successor of an instance's pair once a day."""

NODE = "node"
_NODE_DAYS = (30, 7, 1, 0)
_INSTANCE_DAYS = (7, 1, 0)  # before that, it is asked for every day, and no news


@dataclass(frozen=True, slots=True)
class Ending:
    """A certificate that ends within ``days``, the least of the stages; 0: it has ended.

    ``subject`` is ``node`` or a partition.
    """

    subject: str
    not_after: datetime
    days: int

    @property
    def hint(self) -> str:
        """What to do."""
        if self.subject == NODE:
            return node_pair.NEXT
        return "the master is asked for its successor every day; if there is none, ask the master's operator"

    def sentence(self) -> str:
        """Say it, for people."""
        whose = (
            "the node's certificate"
            if self.subject == NODE
            else f"{self.subject}: its instance's certificate"
        )
        when = "ends" if self.days else "has ended"
        return f"{whose} {when} on {self.not_after:%Y-%m-%d %H:%M} UTC; next: {self.hint}"


def dates(config: Config, partitions: Iterable[Partition]) -> dict[str, datetime]:
    """When the certificates end that are known to: of the node and of instances, by subject."""
    own = node_pair.ends(config)
    found = {} if own is None else {NODE: own}
    if config.certificate_repository is None:
        return found
    for partition in partitions:
        try:
            known = certificates.note(config, partition)
        except (PartitiondError, OSError):
            continue  # what is wrong with it, its next processing says
        if known is not None and known.fingerprint:
            found[partition.id] = known.not_after
    return found


def near(found: Mapping[str, datetime], now: datetime) -> list[Ending]:
    """What ends soon, seen from ``now`` (aware). Pure."""
    endings = []
    for subject, end in found.items():
        stages = _NODE_DAYS if subject == NODE else _INSTANCE_DAYS
        reached = [days for days in stages if end - now <= timedelta(days=days)]
        if reached:
            endings.append(Ending(subject, end, min(reached)))
    return endings


def open_cases(config: Config, partitions: Iterable[Partition]) -> list[str]:
    """What ``partitiond status`` says of it."""
    return [one.sentence() for one in near(dates(config, partitions), datetime.now(UTC))]


class Told:
    """Which stage of which certificate was told; on disk only when one is."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def news(self, endings: Iterable[Ending]) -> list[Ending]:
        """What was not told yet; from now on it was."""
        before = self._read()
        now = {one.subject: [one.not_after.isoformat(), one.days] for one in endings}
        if now == before:
            return []
        if now or before:
            files.write_path(self._file, json.dumps(now, sort_keys=True).encode(), mode=0o600)
        return [one for one in endings if now[one.subject] != before.get(one.subject)]

    def _read(self) -> dict[str, object]:
        try:
            found = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}  # told once more rather than never
        return found if isinstance(found, dict) else {}
