"""Which partitions have namespaces of their own: ``private_namespaces`` and the section of that name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partitiond.config_reader import Reader

SECTION = KEY = "private_namespaces"


def shared_namespaces(reader: Reader, base: str, amount: int) -> frozenset[str]:
    """The partitions whose processes share the node's own namespaces; ``base`` and ``amount`` tell which there are.

    Mistakes are collected by the reader.
    """
    usual = reader.choice("partitiond", KEY, "on", ("on", "off")) == "on"
    private = {f"{base}{index}": usual for index in range(amount)}
    for name in reader.parser[SECTION] if reader.parser.has_section(SECTION) else ():
        place = reader.place(SECTION, name)
        if not re.fullmatch(re.escape(base) + r"(0|[1-9][0-9]{0,8})", name):
            reader.problems.append(
                f"{place}: {name!r} is no partition; allowed: {base}0 to {base}{amount - 1}"
            )
        elif not reader.raw(SECTION, name):
            reader.bad(SECTION, name, "", "on or off")
        else:
            chosen = reader.choice(SECTION, name, "on", ("on", "off")) == "on"
            if name not in private:
                reader.warnings.append(f"{place}: {name}: partition_amount = {amount} ends before it")
            private[name] = chosen
    return frozenset(name for name, chosen in private.items() if not chosen)
