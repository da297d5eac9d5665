"""What a marshalled SLAP document is made of, for those who read and those who write it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

MAX_DEPTH = 64
MODULE = "slapos.slap.slap"
CLASSES = frozenset({"Computer", "ComputerPartition", "SoftwareRelease", "SoftwareInstance"})


@dataclass(frozen=True, slots=True)
class Instance:
    """An ``<object>``: the name of one of SLAP's four classes, its positional arguments, its attributes."""

    class_name: str
    init: tuple["Value", ...] = ()
    attributes: Mapping[str, "Value"] = field(default_factory=dict)


Value: TypeAlias = (
    "bool | int | float | str | list[Value] | tuple[Value, ...] | dict[str, Value] | Instance | None"
)
