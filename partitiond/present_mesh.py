"""Human text of the verbs of the mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from partitiond.errors import printable
from partitiond.present import applied, colour, table

if TYPE_CHECKING:
    from collections.abc import Iterator

_WORDS = {
    "added": "taken in",
    "changed": "replaced",
    "unchanged": "was there already",
    "own": "is this node, passed over",
    "removed": "taken away",
}


def changed(value: dict[str, Any]) -> str:
    """``mesh import`` and ``mesh remove``."""
    lines = [f"{name}: {words}" for key, words in _WORDS.items() for name in value.get(key, ())]
    lines += [f"{colour('!', 'yellow')} {printable(text)}" for text in value.get("warnings", ())]
    return "\n".join([*lines, applied(value["applied"])])


def status(value: dict[str, Any]) -> str:
    """``mesh status``."""
    tincd = value["tincd"]
    state = tincd["state"] if tincd["state"] == "running" else colour(tincd["state"], "red")
    place = f"{value['address']} of {value['range']} in {value['network']}"
    lines = [
        f"node {value['name']}: {place}, interface {value['interface']}, port {value['port']}",
        f"key {value['fingerprint'] or 'none yet'}",
        f"tincd {state}" + (f", pid {tincd['pid']}" if tincd["pid"] else ""),
    ]
    if value["relays"]:
        lines.append("passes on between peers that have no connection of their own")
    rows = [
        (
            one["name"],
            ", ".join(one["ranges"]),
            _reachable(one),
            one["via"] or one["address"] or ", ".join(one["addresses"]) or None,
            one["round_trip_ms"],
            one["problem"] or "",
        )
        for one in value["peers"]
    ]
    if rows:
        lines += ["", table(("peer", "range", "reachable", "by", "ms", "last problem"), rows)]
    else:
        lines.append("no peers: partitiond mesh import takes in what partitiond mesh export prints elsewhere")
    return "\n".join([*lines, *_open(value), *_dropped(value)])


def _reachable(one: dict[str, Any]) -> str:
    if one["reachable"] is None:
        return "?"
    if not one["reachable"]:
        return colour("no", "red")
    if one["round_trip_ms"] is None:
        return colour("no answer", "yellow")
    return "yes" if one["direct"] else "by TCP"


# why the source checks drop something, by direction and reason (netplan.mesh_guard)
_DROPPED = {
    ("in", "source"): "came over the mesh with this node's own source, or one outside of the mesh",
    ("in", "destination"): "came over the mesh for somebody else",
    ("in", "elsewhere"): "came with an address of the mesh by another interface",
    ("in", "ipv6"): "came over the mesh by IPv6",
    ("out", "source"): "were to leave by the mesh with a source that is not this node's",
    ("out", "destination"): "were to leave by the mesh for an address outside of it",
    ("out", "elsewhere"): "were to leave with an address of the mesh by another interface",
    ("out", "ipv6"): "were to leave by the mesh by IPv6",
    ("forward", "any"): "were to be forwarded to the mesh or from it",
}


def _dropped(value: dict[str, Any]) -> Iterator[str]:
    if value["dropped"] is None:
        yield "dropped packets: the packet filter cannot be read"
        return
    for one in value["dropped"]:
        yield f"dropped: {one['packets']} packets that {_DROPPED[one['direction'], one['reason']]}"


def _open(value: dict[str, Any]) -> Iterator[str]:
    for one in value["strangers"]:
        yield f"open: {printable(one)} is in the mesh, and no host block of it is here: nothing is sent to it"
    for text in value["problems"]:
        yield f"open: {printable(text)}"
    for one in value["refused"]:
        text = f"{one['name']} is refused: {one['file']}: [{one['code']}] {one['reason']}"
        yield f"{colour('!', 'red')} {printable(text)}"
        yield f"    next: {printable(one['hint'])}"
