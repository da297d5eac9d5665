"""The node's hardware, readable by everybody: processors, memory, disks, load, temperatures, the uplink.

Promises: what a node does not have, or what cannot be read, is left out and the rest is told; one reading serves all who ask
within two seconds.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from partitiond.metrics_text import family, labels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from partitiond.config import Config
    from partitiond.metrics_text import Family

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KEEP_SECONDS = 2.0
_PLACES = ("state_dir", "log_dir", "instance_root", "software_root", "instance_storage_home")
_NO_DISKS = ("loop", "ram", "zram", "nbd")
_BLOCK = Path("/sys/block")


@dataclass(frozen=True, slots=True)
class Hardware:
    """One reading; what could not be read is empty.  Keys of ``filesystems`` are mount points."""

    at: float
    cpu_seconds: Mapping[str, float] = field(default_factory=dict)
    cpus: int = 0
    boot_time: float = 0.0
    load: tuple[float, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    filesystems: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    disks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    network: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    temperatures: tuple[tuple[str, str, float], ...] = ()


class _Kept:
    """The last reading."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._of: tuple[Config, Hardware] | None = None

    def get(self, config: Config) -> Hardware:
        with self._turn:
            now = time.monotonic()
            if self._of is None or self._of[0] is not config or now - self._of[1].at > _KEEP_SECONDS:
                self._of = (config, read(config))
            return self._of[1]


_kept = _Kept()


def read(config: Config) -> Hardware:
    """Read everything."""
    import psutil  # noqa: PLC0415 - 40 ms, only for who asks

    return Hardware(
        at=time.monotonic(),
        cpu_seconds=_try("processors", lambda: _cpu(psutil), {}),
        cpus=_try("processors", lambda: psutil.cpu_count() or 0, 0),
        boot_time=_try("boot time", psutil.boot_time, 0.0),
        load=_try("load", os.getloadavg, ()),
        memory=_try("memory", lambda: _memory(psutil), {}),
        filesystems=_filesystems(config),
        disks=_try("disks", lambda: _disks(psutil), {}),
        network=_try("network", lambda: _network(psutil, config), {}),
        temperatures=_try("temperatures", lambda: tuple(_temperatures(psutil)), ()),
    )


def _try(what: str, reader: Callable[[], T], nothing: T) -> T:
    """Return what is read, or nothing: the machine may lack it, or have it in a form that psutil does not know."""
    try:
        return reader()
    except Exception as error:  # noqa: BLE001 - psutil raises whatever the odd file in /proc or /sys leads it to
        logger.debug("the node's %s cannot be read: %r", what, error)
        return nothing


def _cpu(psutil: Any) -> dict[str, float]:
    # the kernel counts guests' time as user's, too (proc(5), /proc/stat)
    return {
        mode: seconds
        for mode, seconds in psutil.cpu_times()._asdict().items()
        if mode not in ("guest", "guest_nice")
    }


def _memory(psutil: Any) -> dict[str, int]:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {
        "memory_total": memory.total,
        "memory_available": memory.available,
        "swap_total": swap.total,
        "swap_free": swap.free,
    }


def _filesystems(config: Config) -> dict[str, dict[str, int]]:
    """The file systems that hold what is ours, and the root; each once, however many of our directories it has."""
    found: dict[int, tuple[str, dict[str, int]]] = {}
    for place in ("/", *(getattr(config, name) for name in _PLACES)):
        if place is None:
            continue
        try:
            device = Path(place).stat().st_dev
            if device not in found:
                space = os.statvfs(place)
                sizes = {"size": space.f_blocks, "free": space.f_bfree, "available": space.f_bavail}
                values = {name: blocks * space.f_frsize for name, blocks in sizes.items()}
                values |= {"files": space.f_files, "files_free": space.f_ffree}
                found[device] = (_mount_point(Path(place), device), values)
        except OSError as error:
            logger.debug("%s is not measured: %s", place, error)
    return dict(found.values())


def _mount_point(place: Path, device: int) -> str:
    """The highest directory of the same file system."""
    place = place.resolve()
    while place.parent != place and place.parent.stat().st_dev == device:
        place = place.parent
    return str(place)


def _disks(psutil: Any) -> dict[str, dict[str, float]]:
    whole = {entry.name for entry in _BLOCK.iterdir()} if _BLOCK.is_dir() else None
    return {
        name: {
            "read_bytes": one.read_bytes,
            "written_bytes": one.write_bytes,
            "reads": one.read_count,
            "writes": one.write_count,
            "io_seconds": one.busy_time / 1000,
        }
        for name, one in psutil.disk_io_counters(perdisk=True).items()
        if (whole is None or name in whole) and not name.startswith(_NO_DISKS)
    }


def _network(psutil: Any, config: Config) -> dict[str, dict[str, int]]:
    """The uplink alone: what single partitions exchange is theirs to know."""
    keys = config.network
    wanted = {keys.interface, keys.ipv4_interface, *keys.bridge_ports}
    return {
        name: {
            "receive_bytes": one.bytes_recv,
            "transmit_bytes": one.bytes_sent,
            "receive_packets": one.packets_recv,
            "transmit_packets": one.packets_sent,
            "receive_errors": one.errin,
            "transmit_errors": one.errout,
            "receive_drops": one.dropin,
            "transmit_drops": one.dropout,
        }
        for name, one in psutil.net_io_counters(pernic=True).items()
        if name in wanted
    }


def _temperatures(psutil: Any) -> Iterator[tuple[str, str, float]]:
    """Chip, sensor and degrees; sensors without a label are numbered, those that say nonsense left out."""
    if not hasattr(psutil, "sensors_temperatures"):
        return
    for chip, sensors in psutil.sensors_temperatures().items():
        seen: set[str] = set()
        for place, one in enumerate(sensors):
            name = one.label or str(place)
            name = f"{name} {place}" if name in seen else name
            seen.add(name)
            if one.current is not None and -100 < one.current < 1000:
                yield chip, name, float(one.current)


def families(config: Config) -> Iterator[Family]:
    """Return the families ``partitiond_node_…``."""
    found = _kept.get(config)
    yield from _general(found)
    for group, label, of in (
        ("filesystem", "mountpoint", found.filesystems),
        ("disk", "device", found.disks),
        ("network", "interface", found.network),
    ):
        yield from _grouped(group, label, of)
    yield family(
        "partitiond_node_temperature_celsius",
        "gauge",
        "Temperatures, of sensors that there are.",
        ((labels(("chip", chip), ("sensor", sensor)), value) for chip, sensor, value in found.temperatures),
        unit="celsius",
    )


def _general(found: Hardware) -> Iterator[Family]:
    yield family(
        "partitiond_node_cpu_seconds",
        "counter",
        "Seconds that all processors together spent, by what for.",
        ((labels(("mode", mode)), seconds) for mode, seconds in found.cpu_seconds.items()),
        unit="seconds",
    )
    for name, value, text in (
        ("cpus", found.cpus, "Logical processors."),
        ("boot_time_seconds", found.boot_time, "When the node was started, as Unix time."),
        *((f"{name}_bytes", value, f"{_words(name)}.") for name, value in found.memory.items()),
        *(
            (f"load{minutes}", load, f"Load average of {minutes} minutes.")
            for minutes, load in zip((1, 5, 15), found.load, strict=False)
        ),
    ):
        unit = next((one for one in ("bytes", "seconds") if name.endswith(f"_{one}")), "")
        yield family(
            f"partitiond_node_{name}",
            "gauge",
            text,
            [("", value)] if value or name.startswith(("load", "swap", "memory")) else [],
            unit=unit,
        )


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _grouped(group: str, label: str, of: Mapping[str, Mapping[str, float]]) -> Iterator[Family]:
    gauges = group == "filesystem"
    for name in next(iter(of.values()), {}):
        full = f"{name}_bytes" if gauges and not name.startswith("files") else name
        unit = next((one for one in ("bytes", "seconds") if full.endswith(f"_{one}")), "")
        yield family(
            f"partitiond_node_{group}_{full}",
            "gauge" if gauges else "counter",
            f"{_words(full)} of a {group.replace('filesystem', 'file system')}.",
            ((labels((label, which)), values[name]) for which, values in of.items()),
            unit=unit,
        )


def as_json(config: Config) -> dict[str, Any]:
    """Return what ``/1/node`` answers."""
    found = _kept.get(config)
    return {
        "computer_id": config.computer_id,
        "boot_time": found.boot_time or None,
        "load": list(found.load),
        "cpus": found.cpus,
        "cpu_seconds": dict(found.cpu_seconds),
        **{f"{name}_bytes": value for name, value in found.memory.items()},
        "filesystems": [
            {"mountpoint": name, **{_key(key): value for key, value in values.items()}}
            for name, values in found.filesystems.items()
        ],
        "disks": [{"device": name, **values} for name, values in found.disks.items()],
        "network": [{"interface": name, **values} for name, values in found.network.items()],
        "temperatures": [
            {"chip": chip, "sensor": sensor, "celsius": value} for chip, sensor, value in found.temperatures
        ],
    }


def _key(name: str) -> str:
    return name if name.startswith("files") else f"{name}_bytes"
