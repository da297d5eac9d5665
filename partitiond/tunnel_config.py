"""``[tunnel NAME]``: tunnels that the operator declares for a partition."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from partitiond.config_reader import Reader


_ON_THE_LOOPBACK = re.compile(r"127\.0\.0\.1:([1-9][0-9]{3,4})")


@dataclass(frozen=True, slots=True)
class OperatorTunnel:
    """A ``[tunnel NAME]`` section: its settings but ``partition``, and where it stands."""

    name: str
    partition: str
    values: Mapping[str, str]
    file: str
    line: int

    @property
    def loopback_port(self) -> int | None:
        """The port of the loopback that it is to have, for all users of the node.

        Also of one that is refused for something else: its port must not be free for whoever likes to be believed there.
        """
        found = _ON_THE_LOOPBACK.fullmatch(self.values.get("listen", "").strip())
        port = int(found[1]) if found else 0
        return port if 1024 <= port < 65536 else None


def operator_tunnels(reader: Reader) -> list[OperatorTunnel]:
    """Every such section, in the order of the files; what is in them is judged when they are declared."""
    found = []
    for section in reader.parser.sections():
        if not section.startswith("tunnel "):
            continue
        name = section.removeprefix("tunnel ").strip()
        values = dict(reader.parser[section])
        place = reader.place(section, "")
        file, _, line = place.rpartition(":")
        found.append(
            OperatorTunnel(
                name=name,
                partition=values.get("partition", "").strip(),
                values={key: value for key, value in values.items() if key != "partition"},
                file=file or place,
                line=int(line) if line.isdigit() else 0,
            )
        )
    return found
