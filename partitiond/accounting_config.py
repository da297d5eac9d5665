"""``[accounting]``: what the master is told of each meter, what partitions may tell by themselves, and the textfile."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING

from accounting.tariff import METERS, Rate, Tariff

if TYPE_CHECKING:
    from pathlib import Path

    from partitiond.config_reader import Reader

SECTION = "accounting"
_PRICE = "price_"
_OTHERS = ("partition_resources", "textfile")
_RESOURCE = re.compile(r"[!-~](?:[ -~]{0,198}[!-~])?")
_AMOUNT = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,9})?")
_RESOURCE_WORDS = "the reference of a service at the master, at most 200 printable ASCII characters"


@dataclass(frozen=True, slots=True)
class AccountingKeys:
    """The section as values; ``textfile`` is where metrics are written for node_exporter.

    ``resend``: a document of which nobody knows whether the master has it is sent again, and not held.
    """

    tariff: Tariff = field(default_factory=Tariff)
    resend: bool = False
    textfile: Path | None = None


def accounting_keys(reader: Reader) -> AccountingKeys:
    """Read the section; mistakes are collected by the reader."""
    resend = reader.choice("partitiond", "report_ambiguous", "hold", ("hold", "resend")) == "resend"
    if not reader.parser.has_section(SECTION):
        return AccountingKeys(resend=resend)
    rates = {name: rate for name in METERS if (rate := _rate(reader, name)) is not None}
    known = (*METERS, *(_PRICE + name for name in METERS), *_OTHERS)
    for key in reader.parser[SECTION]:
        place = reader.place(SECTION, key)
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f", did you mean {near[0]!r}?" if near else f"; meters are {', '.join(METERS)}"
            reader.warnings.append(f"{place}: unknown key {key!r}{hint}")
        elif key.startswith(_PRICE) and key.removeprefix(_PRICE) not in rates:
            reader.warnings.append(f"{place}: {key} has no effect without {key.removeprefix(_PRICE)}")
    tariff = Tariff(rates, _partition_resources(reader))
    return AccountingKeys(tariff, resend, _textfile(reader))


def _textfile(reader: Reader) -> Path | None:
    path = reader.optional_path(SECTION, "textfile")
    for key in ("instance_root", "software_root"):
        root = reader.raw("slapos", key).rstrip("/")
        if path and root and path.is_relative_to(root):
            reader.bad(
                SECTION, "textfile", str(path), f"a file outside of {key}, whose directory is root's own"
            )
    return path


def _rate(reader: Reader, name: str) -> Rate | None:
    value = reader.raw(SECTION, name)
    if not value:
        return None
    units = METERS[name].units
    resource, separator, unit = f" {value}".rpartition(" per ")
    if not separator:
        resource, unit = value, ""
    resource, unit = resource.strip(), unit.strip()
    if not _RESOURCE.fullmatch(resource) or (unit and unit not in units):
        words = f"{_RESOURCE_WORDS}, and perhaps: per {' or '.join(filter(None, units))}"
        reader.bad(SECTION, name, value, words)
    price = reader.text(SECTION, _PRICE + name, "0", _AMOUNT, "a number such as 0.05")
    return Rate(resource, units.get(unit, 1), Decimal(price) if _AMOUNT.fullmatch(price) else Decimal(0))


def _partition_resources(reader: Reader) -> frozenset[str]:
    """One a line, or between commas: names have spaces."""
    value = reader.raw(SECTION, "partition_resources")
    found = [text for one in re.split(r"[,\n]", value) if (text := one.strip())]
    for one in found:
        if not _RESOURCE.fullmatch(one):
            reader.bad(SECTION, "partition_resources", one, _RESOURCE_WORDS)
    return frozenset(found)
