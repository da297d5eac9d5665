"""The keys of the configuration about what may leave a tap: ``tap_guard`` and the section ``[tap_allow]``."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from netplan.model import Network
    from partitiond.config_reader import Reader

SECTION = "tap_allow"
_WORDS = (
    "a MAC, or addresses or networks, or both, such as 52:54:00:12:34:56 192.0.2.7 2001:db8:0:7::/64 (networks by their"
    " first address)"
)
_MAC = re.compile(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")
# a whole world of addresses would have those of the node and its routers in it
_SHORTEST = {4: 8, 6: 16}


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the operator gives to the guest of a partition; ``mac`` None: the first that is seen."""

    mac: str | None
    networks: tuple[Network, ...]


@dataclass(frozen=True, slots=True)
class GuardKeys:
    """``mode`` is ``lan``, ``strict`` or ``off``; ``allowed`` what is said of single partitions."""

    mode: str
    allowed: Mapping[str, Allowance]


def read(reader: Reader, *, bridge: str | None, partitions: frozenset[str]) -> GuardKeys:
    """Read them; what is bad is among the reader's problems afterwards."""
    usual = "lan" if bridge else "strict"
    mode = reader.choice("partitiond", "tap_guard", usual, ("lan", "strict", "off"))
    return GuardKeys(mode, _allowed(reader, partitions))


def _allowed(reader: Reader, partitions: frozenset[str]) -> dict[str, Allowance]:
    found: dict[str, Allowance] = {}
    if not reader.parser.has_section(SECTION):
        return found
    for partition in reader.parser[SECTION]:
        value = reader.raw(SECTION, partition)
        if partition not in partitions:
            reader.warnings.append(
                f"{reader.place(SECTION, partition)}: there is no partition {partition} (partition_amount), so what is"
                " allowed to it is nobody's"
            )
        try:
            allowance = _parse(value)
        except ValueError as error:
            reader.bad(SECTION, partition, str(error) or value, _WORDS)
            continue
        _refuse_shared(reader, partition, allowance, found)
        found[partition] = allowance
    return {partition: one for partition, one in found.items() if partition in partitions}


def _refuse_shared(
    reader: Reader, partition: str, allowance: Allowance, others: Mapping[str, Allowance]
) -> None:
    """Refuse what another partition has already: two that may both use it could take it from each other."""
    for other, had in others.items():
        if allowance.mac and allowance.mac == had.mac:
            reader.bad(SECTION, partition, allowance.mac, f"another MAC: this one is {other}'s")
        for one in allowance.networks:
            if any(one.overlaps(before) for before in had.networks if before.version == one.version):
                text = str(one if one.num_addresses > 1 else one.network_address)
                reader.bad(SECTION, partition, text, f"other addresses: some of these are {other}'s")


def _parse(value: str) -> Allowance:
    """Raises ValueError with the word that is wrong."""
    words = re.split(r"[\s,]+", value) if value else []
    mac = None
    if words and _MAC.fullmatch(words[0]):
        mac = words.pop(0).lower()
        # the lowest bit of the first byte makes a group of it
        if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
            raise ValueError(mac)
    elif not words:
        raise ValueError
    return Allowance(mac, tuple(_network(word) for word in words))


def _network(word: str) -> Network:
    """Raises ValueError with the word."""
    try:
        network = ipaddress.ip_network(word)
    except ValueError:
        raise ValueError(word) from None
    first = network.network_address
    nobodys = first.is_multicast or first.is_loopback or first.is_unspecified or network.prefixlen == 0
    if nobodys or (first.version == 4 and first.packed[0] in {0, 255}):
        raise ValueError(word)
    if network.prefixlen < _SHORTEST[network.version]:
        raise ValueError(word)
    return network
