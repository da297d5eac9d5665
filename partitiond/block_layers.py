"""What the system uses of its block devices, and how they stand on each other.

Sources: proc(5) for ``/proc/self/mountinfo`` and ``/proc/swaps``; the kernel's Documentation/ABI for
``/sys/dev/block/MAJ:MIN`` with ``slaves`` and ``holders`` (device mapper, md), ``partition`` (the number within the disk, whose
directory is the one above) and ``loop/backing_file``. Mounts of other mount namespaces are not seen here; only the kernel knows
of all (O_EXCL in open(2)).
"""

# ruff: noqa: PTH110, PTH115, PTH116, PTH119, PTH208 - names of sysfs, many and short-lived: this is done at every pass

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_SYSTEM = re.compile(r"/|/(?:boot|efi|usr|var|etc)(?:/.*)?")


@dataclass(frozen=True, slots=True)
class Use:
    """One use by the system: a file system mounted at ``where``, or swap on the device ``where``."""

    kind: Literal["mount", "swap"]
    where: str

    @property
    def by_system(self) -> bool:
        """Whether the machine itself lives there."""
        return self.kind == "mount" and _SYSTEM.fullmatch(self.where) is not None


def uses(proc: Path = Path("/proc")) -> dict[int, Use]:
    """Device number → its use; of several the one that weighs most. Raises OSError."""
    found: dict[int, Use] = {}
    for rdev, use in (
        *_mounts((proc / "self" / "mountinfo").read_bytes()),
        *_swaps((proc / "swaps").read_bytes()),
    ):
        if rdev not in found or use.by_system > found[rdev].by_system:
            found[rdev] = use
    return found


def _mounts(text: bytes) -> Iterable[tuple[int, Use]]:
    for line in text.splitlines():
        row = line.split(b" ")
        major, _, minor = row[2].partition(b":")
        if major != b"0":
            yield os.makedev(int(major), int(minor)), Use("mount", _unescaped(row[4]))
            continue
        # btrfs has a number of its own, which is no device's; the source is a device all the same
        source = row[row.index(b"-", 6) + 2]
        if source.startswith(b"/dev/") and (rdev := device_number(_unescaped(source))) is not None:
            yield rdev, Use("mount", _unescaped(row[4]))


def _swaps(text: bytes) -> Iterable[tuple[int, Use]]:
    for line in text.splitlines()[1:]:
        path = _unescaped(line.split()[0])
        # a file is no device; it lies on something that is mounted
        if (rdev := device_number(path)) is not None:
            yield rdev, Use("swap", path)


def _unescaped(text: bytes) -> str:
    """A field of mountinfo or swaps: blank, tab, newline and backslash stand there in octal."""
    if b"\\" in text:
        text = re.sub(rb"\\([0-7]{3})", lambda found: bytes((int(found[1], 8),)), text)
    return os.fsdecode(text)


def device_number(path: str) -> int | None:
    """The number of a block device's node, None for anything else."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else None


class Layers:
    """The kernel's block devices; what was asked once is kept, so one of these serves for one look only."""

    def __init__(self, sysfs: Path = Path("/sys/dev/block")) -> None:
        self._root = f"{sysfs}/"
        self._under: dict[int, frozenset[int]] = {}

    def exists(self, rdev: int) -> bool:
        """Whether the kernel has such a device, whatever nodes there are."""
        return os.path.exists(self._directory(rdev))

    def under(self, rdev: int) -> frozenset[int]:
        """All devices that this one is a part of or stands on, at any depth: a volume's disks, a partition's disk."""
        known = self._under.get(rdev)
        if known is None:
            self._under[rdev] = frozenset()  # devices do not stand on themselves
            direct = set(self._directly_under(rdev))
            known = frozenset(direct.union(*map(self.under, direct)))
            self._under[rdev] = known
        return known

    def holders(self, rdev: int) -> list[str]:
        """Names of the volumes and arrays that stand on the device itself or on one of its partitions."""
        directory = self._directory(rdev)
        found = _names(f"{directory}/holders")
        disk = os.path.basename(_link(directory))
        for name in _names(directory):
            # partitions lie in the directory of their disk and begin with its name
            if name.startswith(disk):
                found += _names(f"{directory}/{name}/holders")
        return sorted(found)

    def bearers(self, used: Mapping[int, Use]) -> dict[int, Use]:
        """Every device in use and every one below it, with that use."""
        found = dict(used)
        for rdev, use in used.items():
            for below in self.under(rdev):
                if below not in found or use.by_system > found[below].by_system:
                    found[below] = use
        return found

    def _directory(self, rdev: int) -> str:
        return f"{self._root}{os.major(rdev)}:{os.minor(rdev)}"

    def _directly_under(self, rdev: int) -> Iterable[int]:
        directory = self._directory(rdev)
        if os.path.exists(f"{directory}/partition"):
            yield from _number(f"{directory}/../dev")
        for name in _names(f"{directory}/slaves"):
            yield from _number(f"{directory}/slaves/{name}/dev")
        with suppress(OSError):
            backing = device_number(_text(f"{directory}/loop/backing_file"))
            if backing is not None:
                yield backing


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return path


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []  # a partition has no slaves; a device may go away while it is looked at


def _text(path: str) -> str:
    with open(path, "rb") as stream:
        return os.fsdecode(stream.read().rstrip(b"\n"))


def _number(path: str) -> Iterable[int]:
    with suppress(OSError, ValueError):
        major, minor = _text(path).split(":")
        yield os.makedev(int(major), int(minor))
