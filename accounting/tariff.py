"""What is reported of each meter: the master's resource for it, the unit in which it counts, a price. Pure.

Resources are the master's: a document that names one that it does not know is rejected as a whole, so a meter that
nobody gave a resource is not reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_BYTES = {
    "B": 1,
    **{name: 1000**power for power, name in enumerate(("kB", "MB", "GB", "TB"), 1)},
    **{name: 1024**power for power, name in enumerate(("KiB", "MiB", "GiB", "TiB"), 1)},
}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_NUMBER = {"": 1, "thousand": 1000, "million": 10**6}


@dataclass(frozen=True, slots=True)
class MeterKind:
    """A meter that can be reported: what it counts, and in which units; the first is the usual one."""

    title: str
    units: Mapping[str, int]


METERS: Mapping[str, MeterKind] = MappingProxyType(
    {
        "network_in": MeterKind("Bytes received from other nodes", _BYTES),
        "network_out": MeterKind("Bytes sent to other nodes", _BYTES),
        "local_in": MeterKind("Bytes received from partitions of the node", _BYTES),
        "local_out": MeterKind("Bytes sent to partitions of the node", _BYTES),
        "tap_in": MeterKind("Bytes of Ethernet frames to the guest", _BYTES),
        "tap_out": MeterKind("Bytes of Ethernet frames from the guest", _BYTES),
        "packets_in": MeterKind("Packets received from other nodes", _NUMBER),
        "packets_out": MeterKind("Packets sent to other nodes", _NUMBER),
        "cpu": MeterKind("Processor time", _SECONDS),
        "io_read": MeterKind("Bytes read from disks", _BYTES),
        "io_write": MeterKind("Bytes written to disks", _BYTES),
        # these are levels: what is reported is the level times the hours that it lasted
        "memory": MeterKind("Memory, bytes times hours", _BYTES),
        "disk": MeterKind("Disk space, bytes times hours", _BYTES),
        "outage": MeterKind("Time in which a service was out", _SECONDS),
        "promise": MeterKind("Time in which a promise failed", _SECONDS),
    }
)
"""By the key in ``[accounting]``."""


@dataclass(frozen=True, slots=True)
class Rate:
    """How a meter is told: the master's resource, how much of what is metered makes 1, and the price of that."""

    resource: str
    per: int = 1
    price: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class Tariff:
    """What the operator named: the meters that are reported, and what partitions may report by themselves."""

    rates: Mapping[str, Rate] = field(default_factory=dict)
    partition_resources: frozenset[str] = frozenset()

    @property
    def resources(self) -> frozenset[str]:
        """Every resource that a document may name."""
        return self.partition_resources | {rate.resource for rate in self.rates.values()}
