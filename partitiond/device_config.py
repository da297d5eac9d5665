"""The section ``[block_devices]``: which devices the operator gives to which partition."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partitiond.config_reader import Reader

SECTION = "block_devices"

_WORDS = "paths below /dev, such as /dev/disk/by-id/…, separated by blanks"
# what whoever writes to the device can write into it: a label that is another device's, for one
_FROM_CONTENT = re.compile(
    r"/dev/disk/by-(?:uuid|label|partuuid|partlabel)/|/dev/disk/by-id/(?:md-uuid|lvm-pv)-"
)


@dataclass(frozen=True, slots=True)
class OperatorDevice:
    """A device that the operator gives to a partition: its stable name, and the line that says so (0: not known)."""

    name: str
    partition: str
    file: str
    line: int


def block_devices(reader: Reader, base: str, amount: int) -> tuple[OperatorDevice, ...]:
    """Read the section; ``base`` and ``amount`` tell which partitions there are. Mistakes are collected by the reader."""
    if not reader.parser.has_section(SECTION):
        return ()
    found: list[OperatorDevice] = []
    taken: dict[str, str] = {}
    for key in reader.parser[SECTION]:
        place = reader.place(SECTION, key)
        index = re.fullmatch(re.escape(base) + r"(0|[1-9][0-9]{0,8})", key)
        if index is None:
            reader.problems.append(
                f"{place}: {key!r} is no partition; allowed: {base}0 to {base}{amount - 1}"
            )
            continue
        if int(index[1]) >= amount:
            reader.warnings.append(
                f"{place}: {key} gets no block device: partition_amount = {amount} ends before it"
            )
        for name in dict.fromkeys(reader.raw(SECTION, key).split()):
            if not _is_path(name):
                reader.bad(SECTION, key, name, _WORDS)
            elif name in taken:
                reader.bad(SECTION, key, name, f"a device of its own: this one is {taken[name]}'s already")
            else:
                _warn(reader, place, name)
                taken[name] = key
                file, _, line = place.rpartition(":")
                found.append(OperatorDevice(name, key, file or place, int(line) if line.isdigit() else 0))
    return tuple(one for one in found if int(one.partition.removeprefix(base)) < amount)


def _is_path(name: str) -> bool:
    parts = name.split("/")
    return (
        parts[:2] == ["", "dev"]
        and len(parts) > 2
        and name.isprintable()
        and not {"", ".", ".."} & {*parts[2:]}
    )


def _warn(reader: Reader, place: str, name: str) -> None:
    if _FROM_CONTENT.match(name):
        reader.warnings.append(
            f"{place}: {name} is named by what is written on it, which a partition that writes to a device can copy;"
            " prefer the names by serial number (/dev/disk/by-id/) or by slot (/dev/disk/by-path/)"
        )
