"""``[quota]``: how much each partition may exchange with other nodes in a month, and what is done to who used it up."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING

from accounting.allowance import Quota

if TYPE_CHECKING:
    from collections.abc import Mapping

    from partitiond.config_reader import Reader

SECTION = "quota"
_DEFAULT = "default"
_BYTES = {
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "k", "M", "G", "T", "P"))},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T", "P"), 1)},
}
_RATES = {f"{prefix}bit/s": 1000**power for power, prefix in enumerate(("", "k", "M", "G"))}
_VALUE = re.compile(
    r"(?P<number>[0-9]{1,15}(?:\.[0-9]{1,6})?) *(?P<unit>[A-Za-z]+)"
    r"(?: +(?:warn|limit +(?P<rate>[0-9]{1,12}(?:\.[0-9]{1,6})?) *(?P<per>[A-Za-z]+/s)))?"
)
_MOST_BYTES = 2**62
# below that a full packet would take seconds, above it there is nothing to limit
_RATES_ALLOWED = (8000, 10**11)
_WORDS = (
    f"none, or a number of {', '.join(_BYTES)} a month (above 0), and perhaps what is done then:"
    f" warn, or limit and a rate from 8 kbit/s to 100 Gbit/s ({', '.join(_RATES)}), such as 100 GB limit 1 Mbit/s"
)


def quotas(reader: Reader, base: str, amount: int) -> Mapping[str, Quota]:
    """The quota of each partition that has one; ``base`` and ``amount`` tell which partitions there are.

    Mistakes are collected by the reader.
    """
    if not reader.parser.has_section(SECTION):
        return {}
    usual = _quota(reader, _DEFAULT) if _DEFAULT in reader.parser[SECTION] else None
    names = [f"{base}{index}" for index in range(amount)]
    found: dict[str, Quota | None] = dict.fromkeys(names, usual)
    for name in reader.parser[SECTION]:
        if name == _DEFAULT:
            continue
        place = reader.place(SECTION, name)
        if not re.fullmatch(re.escape(base) + r"(0|[1-9][0-9]{0,8})", name):
            reader.problems.append(
                f"{place}: {name!r} is no partition; allowed: {_DEFAULT}, {base}0 to {base}{amount - 1}"
            )
            continue
        own = _quota(reader, name)
        if name in found:
            found[name] = own
        else:
            reader.warnings.append(f"{place}: {name}: partition_amount = {amount} ends before it")
    return {name: one for name, one in found.items() if one is not None}


def _quota(reader: Reader, key: str) -> Quota | None:
    value = reader.raw(SECTION, key)
    if value == "none":
        return None
    match = _VALUE.fullmatch(value)
    octets = _whole(match["number"], _BYTES.get(match["unit"], 0)) if match else 0
    rate = _whole(match["rate"], _RATES.get(match["per"], 0)) if match and match["rate"] else None
    lowest, highest = _RATES_ALLOWED
    if not 0 < octets <= _MOST_BYTES or (rate is not None and not lowest <= rate <= highest):
        reader.bad(SECTION, key, value, _WORDS)
        return None
    return Quota(octets, rate)


def _whole(number: str, unit: int) -> int:
    return int(Decimal(number) * unit)
