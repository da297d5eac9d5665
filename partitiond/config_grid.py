"""What slapgrid's own keys in ``[slapos]`` say of builds, instances and promises, with what ``[partitiond]`` adds to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partitiond.config_reader import Reader

# as slapgrid has it: 1000M, 2G, 512K, plain bytes
_SIZE = re.compile(r"([0-9]{1,12})([kmgt]?)b?", re.IGNORECASE)
_FACTORS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_DEFAULT_SPACE = 1000 * 2**20


@dataclass(frozen=True, slots=True)
class GridKeys:
    """Sizes in bytes, times in seconds; ``partition_timeout`` None: an instance's buildout may take as long as it likes.

    ``keep_running`` are partitions whose programs must survive the end of supervisord, however it ends. ``force_stop``:
    instances are configured, and kept stopped whatever the master wants.
    """

    software_min_free_space: int = _DEFAULT_SPACE
    instance_min_free_space: int = _DEFAULT_SPACE
    promise_timeout: float = 20.0
    partition_timeout: float | None = None
    prerm_timeout: float = 600.0
    keep_running: frozenset[str] = frozenset()
    master_fingerprint: str = ""
    ipv4_global_network: str = ""
    force_stop: bool = False


def read(reader: Reader, partitions: frozenset[str]) -> GridKeys:
    """Read the keys; what is wrong is the reader's to collect."""
    timeout = reader.number("slapos", "partition_timeout", 0, 0, 10**8)
    return GridKeys(
        software_min_free_space=_size(reader, "software_min_free_space"),
        instance_min_free_space=_size(reader, "instance_min_free_space"),
        promise_timeout=float(reader.number("slapos", "promise_timeout", 20, 1, 86400)),
        partition_timeout=float(timeout) if timeout else None,
        prerm_timeout=float(reader.number("partitiond", "prerm_timeout", 600, 1, 10**6)),
        keep_running=_names(reader, "keep_running", partitions),
        master_fingerprint=_fingerprint(reader),
        ipv4_global_network=_network(reader),
        force_stop=reader.truth("slapos", "force_stop", False),
    )


def _size(reader: Reader, key: str) -> int:
    value = reader.raw("slapos", key)
    if not value:
        return _DEFAULT_SPACE
    found = _SIZE.fullmatch(value)
    if found is None:
        reader.bad("slapos", key, value, "a size such as 1000M, 2G or 0")
        return _DEFAULT_SPACE
    return int(found[1]) * _FACTORS[found[2].lower()]


def _names(reader: Reader, key: str, partitions: frozenset[str]) -> frozenset[str]:
    found = frozenset(reader.raw("partitiond", key).split())
    for name in sorted(found - partitions):
        reader.bad("partitiond", key, name, "names of partitions of this node, separated by spaces")
    return found & partitions


def _network(reader: Reader) -> str:
    """What instances are told of the world's IPv4, as it stands there."""
    value = reader.raw("slapos", "ipv4_global_network")
    if value and not re.fullmatch(r"[0-9./]{7,31}", value):
        reader.bad("slapos", "ipv4_global_network", value, "an IPv4 network such as 10.0.0.0/8")
        return ""
    return value


def _fingerprint(reader: Reader) -> str:
    value = reader.raw("partitiond", "master_fingerprint")
    if value and not re.fullmatch(r"sha256:[0-9a-f]{64}", value):
        reader.bad("partitiond", "master_fingerprint", value, "sha256: and 64 lower-case hex digits")
        return ""
    return value
