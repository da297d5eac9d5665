"""Usage as people and spreadsheets read it: a table for each period, or comma-separated values."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from partitiond import present

if TYPE_CHECKING:
    from collections.abc import Iterator

_OF_ADDRESS = ("address", "family", "scope", "bytes_in", "bytes_out", "packets_in", "packets_out")
_TRAFFIC = ("partition", "instance", "address", "scope", "bytes in", "bytes out", "packets in", "packets out")
_UNITS = {"seconds": "s", "bytes": "B"}


def usage(value: dict[str, Any]) -> str:
    """``usage``: one row per address, then one per partition for the rest; once for each period."""
    return "\n\n".join(_interval(one) for one in value.get("periods", (value,)))


def _interval(value: dict[str, Any]) -> str:
    traffic = [
        (
            item["id"],
            item["instance_guid"],
            one["address"],
            one["scope"],
            *(one[key] for key in _OF_ADDRESS[3:]),
        )
        for item in value["partitions"]
        for one in item["addresses"]
        if one["packets_in"] or one["packets_out"]
    ]
    names = _figures(value["partitions"])
    rest = [
        (item["id"], item["instance_guid"], *(item[name] for name in names)) for item in value["partitions"]
    ]
    lines = [
        f"from {value['from'] or 'the beginning'} to {value['to'] or 'now'}",
        "",
        present.table(_TRAFFIC, traffic) if traffic else "no traffic",
        "",
        present.table(("partition", "instance", *map(_head, names)), rest),
    ]
    lines += [f"gap: {one['from']} to {one['to']}: {one['reason']}" for one in value["gaps"]]
    return "\n".join(lines)


def _figures(partitions: list[dict[str, Any]]) -> list[str]:
    """What is metered of a partition besides its addresses, in the order in which it is told."""
    known = partitions[0] if partitions else {}
    return [name for name in known if name not in ("id", "instance_guid", "addresses")]


def _head(name: str) -> str:
    words = name.split("_")
    words[-1] = _UNITS.get(words[-1], words[-1])
    return " ".join(words).replace("cpu", "CPU")


def table(value: dict[str, Any]) -> str:
    """Comma-separated values (RFC 4180, lines ended by LF): one line for each address, and one for the partition itself,
    so that each column can be summed up.
    """
    intervals = value.get("periods", (value,))
    names = next((found for one in intervals if (found := _figures(one["partitions"]))), [])
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("from", "to", "partition", "instance_guid", *_OF_ADDRESS, *names))
    for one in intervals:
        writer.writerows(_rows(one, names))
    return stream.getvalue().removesuffix("\n")


def _rows(value: dict[str, Any], names: list[str]) -> Iterator[tuple[Any, ...]]:
    """None is an empty field."""
    for item in value["partitions"]:
        which = (value["from"], value["to"], item["id"], item["instance_guid"])
        for one in item["addresses"]:
            yield (*which, *(one[key] for key in _OF_ADDRESS), *(None for _ in names))
        yield (*which, *(None for _ in _OF_ADDRESS), *(item[name] for name in names))
