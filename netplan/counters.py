"""The meters: bytes and packets of every address and tap since their counters were made.

Values only grow and are never reset.  They begin anew when the table was made again or the host was started:
compare values of one ``epoch`` only.  Bytes are IP lengths (of taps: Ethernet frames); an aggregate of
segmentation offload counts one header.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from netplan import nfnetlink, rtnetlink
from netplan.errors import NetplanError
from netplan.legacy_filter import read_legacy_counters
from netplan.model import ALIAS_MARK, Backend
from netplan.netlink import NETLINK_ROUTE, NetlinkSocket

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TRIES = 3


class Traffic(NamedTuple):
    """What one address of a partition carried; ``family`` is ``ipv6``, ``range``, ``ipv4`` (the private
    one), ``public4`` or ``routable4``, ``scope`` ``remote`` or ``local``.

    ``in`` is towards the partition.
    """

    partition: str
    family: str
    scope: str
    bytes_in: int
    bytes_out: int
    packets_in: int
    packets_out: int


@dataclass(frozen=True, slots=True)
class CounterReading:
    """One reading of all counters; ``denied`` has refused packets by the partition whose user tried.

    ``denied_total`` counts those of every user.  ``epoch`` is empty when there is no packet filter.
    """

    epoch: str
    traffic: tuple[Traffic, ...] = ()
    denied: Mapping[str, int] = field(default_factory=dict)
    denied_total: int = 0


class TapTraffic(NamedTuple):
    """What went through a tap; ``in`` is towards the guest.  Values of one ``epoch`` can be compared."""

    partition: str
    tap: str
    epoch: str
    bytes_in: int
    bytes_out: int
    packets_in: int
    packets_out: int


def read_counters(backend: Backend = "nftables") -> CounterReading:
    """Read all counters of the packet filter in one dump."""
    if backend == "iptables":
        epoch, values = read_legacy_counters()
        return _reading(f"{_boot_id()}/{epoch}", values) if epoch else CounterReading("")
    with nfnetlink.nft_socket() as sock:
        for _ in range(_TRIES):
            before = nfnetlink.table(sock)
            if before is None:
                return CounterReading("")
            values = nfnetlink.counters_of(sock)
            after = nfnetlink.table(sock)
            if after is not None and after.handle == before.handle:
                return _reading(f"{_boot_id()}/{after.handle}", values)
    raise NetplanError(
        "network.packet_filter",
        "the packet filter is made anew each time that its counters are read",
        resource="filter/partitiond",
        retryable=True,
    )


def _reading(epoch: str, values: list[nfnetlink.CounterValue]) -> CounterReading:
    bytes_of: dict[tuple[str, str, str], dict[str, tuple[int, int]]] = {}
    denied: dict[str, int] = {}
    total = 0
    for name, packets, octets in values:
        what, *rest = _words(name)
        match (what, rest):
            case ("traffic", [partition, family, scope, direction]):
                bytes_of.setdefault((partition, family, scope), {})[direction] = (octets, packets)
            case ("denied", [partition]):
                denied[partition] = packets
            case ("denied", []):
                total = packets
    traffic = []
    for key, directions in bytes_of.items():
        bytes_in, packets_in = directions.get("in", (0, 0))
        bytes_out, packets_out = directions.get("out", (0, 0))
        traffic.append(Traffic(*key, bytes_in, bytes_out, packets_in, packets_out))
    return CounterReading(epoch, tuple(traffic), denied, total)


@lru_cache(maxsize=1 << 13)
def _words(name: str) -> tuple[str, ...]:
    return tuple(name.split("/"))


def read_taps() -> tuple[TapTraffic, ...]:
    """Read the counters of all our taps and tuns in one dump.

    What the guest sends is counted before anything is filtered; what it is sent is counted when it reads it.
    """
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        links = rtnetlink.link_counters(sock)
    boot = _boot_id()
    return tuple(
        TapTraffic(
            link.alias.removeprefix(ALIAS_MARK),
            link.name,
            f"{boot}/{link.ifindex}",  # a tap that was made again has another index
            link.tx_bytes,
            link.rx_bytes,
            link.tx_packets,
            link.rx_packets,
        )
        for link in links
        if link.alias.startswith(ALIAS_MARK) and "/" not in link.alias
    )


def _boot_id() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()
