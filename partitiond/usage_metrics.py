"""What partitions used, as metrics: from what the last pass of the meters recorded, made into text once a pass.

Promises: totals never fall while the ledger is there (they are sums over all owners of a partition); a scrape touches no table
of the kernel.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING

from partitiond.metrics_text import Family, family, labels

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from accounting.model import PartitionUsage
    from partitiond.metering import Metering, Recorded
    from partitiond.metrics_text import Kind

_TRAFFIC = (
    (
        "receive_bytes",
        "bytes_in",
        "bytes",
        "Bytes towards the partition: IP lengths, of taps Ethernet frames.",
    ),
    ("transmit_bytes", "bytes_out", "bytes", "Bytes from the partition, likewise."),
    ("receive_packets", "packets_in", "packets", "Packets towards the partition, of taps frames."),
    ("transmit_packets", "packets_out", "packets", "Packets from the partition, of taps frames."),
)

# field of PartitionUsage, name, kind, unit, text; those that this ledger does not have are left out
_FIGURES: tuple[tuple[str, str, Kind, str, str], ...] = (
    ("cpu_seconds", "cpu_seconds", "counter", "seconds", "Processor time of its processes."),
    ("io_read_bytes", "io_read_bytes", "counter", "bytes", "Bytes that its processes read from disks."),
    ("io_write_bytes", "io_write_bytes", "counter", "bytes", "Bytes that its processes wrote to disks."),
    ("processes", "processes", "gauge", "", "Processes of its user."),
    (
        "memory_bytes",
        "memory_bytes",
        "gauge",
        "bytes",
        "Resident memory; shared pages count in each process.",
    ),
    ("disk_bytes", "disk_bytes", "gauge", "bytes", "Allocated disk space."),
)


def families(totals: Sequence[PartitionUsage], denied: Mapping[tuple[str, str], int]) -> tuple[Family, ...]:
    """Return the families of some partitions."""
    return (
        *_traffic(totals),
        *_figures(totals),
        family(
            "partitiond_partition_denied_packets",
            "counter",
            "What was refused to a partition's processes and guest, by the rule that did.",
            (
                (labels(("partition", partition), ("rule", rule)), count)
                for (partition, rule), count in sorted(denied.items())
            ),
            unit="packets",
        ),
    )


def _traffic(totals: Iterable[PartitionUsage]) -> Iterable[Family]:
    rows = [
        (
            labels(
                ("partition", entry.id),
                ("address", one.address),
                ("family", one.family),
                ("scope", one.scope),
            ),
            one,
        )
        for entry in totals
        for one in entry.addresses
    ]
    for what, field, unit, text in _TRAFFIC:
        name = f"partitiond_partition_network_{what}"
        lines = "".join(f"{name}_total{where} {getattr(one, field)}\n" for where, one in rows)
        yield Family(name, "counter", text, lines, unit)


@lru_cache(maxsize=1 << 14)
def _where(partition: str, address: str, family_: str, scope: str) -> str:
    return labels(("partition", partition), ("address", address), ("family", family_), ("scope", scope))


def _figures(totals: Sequence[PartitionUsage]) -> Iterable[Family]:
    for field, name, kind, unit, text in _FIGURES:
        values = (
            (labels(("partition", entry.id)), getattr(entry, field))
            for entry in totals
            if hasattr(entry, field)
        )
        yield family(f"partitiond_partition_{name}", kind, text, values, unit=unit)


def _documents(counts: Mapping[str, int]) -> Family:
    values = ((labels(("state", state)), count) for state, count in counts.items())
    return family("partitiond_report_documents", "gauge", "Usage documents for the master, by state.", values)


class UsageText:
    """The families of all partitions, as of the last pass.

    Reading the totals of 500 partitions and writing them down takes longer than a scrape should, so where somebody scrapes, the
    lane of the meters does it right after its pass, and who scrapes meanwhile is given those of the pass before.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._of: Recorded | None = None
        self._passes = -1
        self._families: tuple[Family, ...] = ()
        self._asked = False

    def families(self, meters: Metering) -> tuple[Family, ...]:
        """Return the families.  Raises AccountingError."""
        self._asked = True
        if self._passes != meters.passes and self._turn.acquire(blocking=self._passes < 0):
            try:
                self._refresh(meters)
            finally:
                self._turn.release()
        return self._families

    def prepare(self, meters: Metering) -> None:
        """Make them anew after a pass, if anybody asked since the one before.  Raises AccountingError."""
        if self._asked:
            self._asked = False
            with self._turn:
                self._refresh(meters)

    def _refresh(self, meters: Metering) -> None:
        passes, recorded = meters.passes, meters.recorded()
        if self._of is not recorded:
            self._families = (*families(recorded.totals, recorded.denied), _documents(recorded.documents))
            self._of = recorded
        self._passes = passes
