"""Human text of what the verbs found; ``--json`` prints the same objects instead."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from partitiond.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_COLOURS = {"green": "32", "red": "31", "yellow": "33", "bold": "1"}


def colour(text: str, name: str) -> str:
    """Colour a text on a terminal, unless ``NO_COLOR`` is set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{_COLOURS[name]}m{text}\033[0m"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of text; numbers to the right."""
    texts = [[_cell(value) for value in row] for row in rows]
    widths = [max([len(head), *(len(row[index]) for row in texts)]) for index, head in enumerate(heads)]
    numeric = [
        all(isinstance(row[index], int | float) or row[index] is None for row in rows) and bool(rows)
        for index in range(len(heads))
    ]
    lines = [_line(heads, widths, numeric), *(_line(row, widths, numeric) for row in texts)]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    return printable(str(value)).replace("\n", "\\n")


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    return "  ".join(
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, numeric, strict=True)
    )


def plan(value: dict[str, Any]) -> str:
    """``plan``."""
    operations = value["operations"]
    lines = [_operation(operation) for operation in operations]
    lines += _refusals(value["refused"])
    lines.append(f"{len(operations)} operations" if operations else "nothing to do")
    return "\n".join(lines)


_SIGNS = {"create": ("+", "green"), "change": ("~", "yellow"), "remove": ("-", "red")}


def _operation(operation: dict[str, Any]) -> str:
    sign, name = _SIGNS[operation["action"]]
    values = " → ".join(str(operation[key]) for key in ("before", "after") if operation[key] is not None)
    text = f"{operation['id']}: {operation['reason']}" + (f" [{values}]" if values else "")
    return f"{colour(sign, name)} {printable(text)}"


def _refusals(refused: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for one in refused:
        place = f"{one['file']}{':' + str(one['line']) if one['line'] else ''}"
        what = one["resource"].replace("-", " ")
        text = f"{what} {one['name']} is refused: {place}: [{one['code']}] {one['reason']}"
        lines.append(f"{colour('!', 'red')} {printable(text)}")
        if one["hint"]:
            lines.append(f"    next: {printable(one['hint'])}")
    return lines


def _failures(found: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for one in found:
        text = f"{one['resource']}: [{one['code']}] {one['message']}"
        lines.append(f"{colour('!', 'red')} {printable(text)}")
        if one["hint"]:
            lines.append(f"    next: {printable(one['hint'])}")
    return lines


def applied(value: dict[str, Any]) -> str:
    """``apply`` and ``teardown``."""
    lines = [*_failures(value["failures"]), *_refusals(value["refused"])]
    lines += [f"left: {_operation(operation)}" for operation in value["left"]]
    if not value["done"] and not lines:
        return "nothing to do"
    lines.append(f"{value['done']} done, {len(value['failures'])} failed, {len(value['left'])} left")
    return "\n".join(lines)


def tried(value: dict[str, Any]) -> str:
    """``try``."""
    found = value["trial"]
    if not found:
        return applied(value)
    left = f"on trial for {found['seconds_left']:.0f} s: all of it is taken back at {found['deadline']}, unless you run"
    return f"{applied(value)}\n{left}\n    {colour('partitiond confirm', 'bold')}"


def confirmed(value: dict[str, Any]) -> str:
    """``confirm``."""
    return f"confirmed, {value['seconds_left']:.0f} s before it would have been taken back: {value['config']}"


def synced(value: dict[str, Any]) -> str:
    """``sync``."""
    lines = [*map(printable, value["done"]), *_failures(value["failures"])]
    return "\n".join(lines) if lines else f"{value['lane']}: nothing to do"


def reports(value: dict[str, Any]) -> str:
    """``report list``."""
    rows = [
        (one["reference"], one["state"], one["changed"][:19], one["tries"], one["reason"])
        for one in value["documents"]
    ]
    counts = ", ".join(f"{count} {state}" for state, count in value["counts"].items() if count)
    shown = [table(("document", "state", "since (UTC)", "tries", "why"), rows), ""] if rows else []
    return "\n".join([*shown, counts or "no documents yet: they are made when a day (UTC) has ended"])


def reports_changed(value: dict[str, Any]) -> str:
    """``report resend`` and ``report drop``."""
    what = {"resend": "sent again with the next report", "drop": "dropped"}[value["action"]]
    return "\n".join(f"{reference}: {what}" for reference in value["documents"])


def status(value: dict[str, Any]) -> str:
    """``status``."""
    node = value["node"]
    reachable = {True: "reachable", False: colour("not reachable", "red"), None: "not asked yet"}[
        node["master"]["reachable"]
    ]
    lines = [
        f"node {node['computer_id']}"
        + (f" on {node['interface']}" if node["interface"] else "")
        + (f", taps in bridge {node['bridge']}" if node["bridge"] else "")
        + (f" with {', '.join(node['bridge_ports'])}" if node["bridge_ports"] else ""),
        f"master {node['master']['url']}: {reachable}, last answer {node['master']['last_contact'] or 'never'}",
        "",
    ]
    kinds = _public_addresses(value["partitions"])
    rows = [
        (
            item["id"],
            item["state"],
            item["user"]["name"],
            *(item[key] for key in kinds),
            item["ipv4"],
            item["tap"]["name"] if item["tap"] else None,
            _running(item["processes"]),
            len(item["tunnels"]),
            len(item["drift"]) or None,
        )
        for item in value["partitions"]
    ]
    heads = ("partition", "state", "user", *kinds.values(), "IPv4", "tap", "processes", "tunnels", "drift")
    lines.append(table(heads, rows))
    lines += _releases(value.get("software", ()))
    if node["trial"]:
        lines.append(colour(_trial(node["trial"]), "yellow"))
    lines += [f"open: {printable(text)}" for text in node["open_cases"]]
    lines += [f"drift: {printable(text)}" for text in node["drift"]]
    return "\n".join(lines)


def _releases(found: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the software releases."""
    if not found:
        return []
    rows = []
    for one in found:
        notes = [] if one["listed"] else ["not listed by the master any more, kept"]
        if one.get("kept_for"):
            notes.append(f"to be removed, but used by {', '.join(one['kept_for'])}")
        if one["error"]:
            again = f", again in {one['next_try_seconds']} s" if one.get("next_try_seconds") else ""
            notes.append(f"{one['error']}{again}")
        rows.append((one["url"], one["state"], "; ".join(notes)))
    return ["", table(("software", "state", ""), rows)]


def _trial(found: dict[str, Any]) -> str:
    words = {
        "applying": "is being applied",
        "pending": f"is taken back in {found['seconds_left']:.0f} s; partitiond confirm keeps it",
        "confirmed": "is confirmed",
        "rolling back": "is being taken back",
    }
    return f"trial: what is in force {words[found['state']]}"


def _public_addresses(partitions: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Keys and heads of the addresses that others reach, as far as there are any."""
    heads = {
        "ipv6": "IPv6",
        "public_ipv4": "public IPv4",
        "vpn_ipv4": "mesh IPv4",
        "routable_ipv4": "routable IPv4",
    }
    found = {key: head for key, head in heads.items() if any(item[key] for item in partitions)}
    return found or {"ipv6": "IPv6"}


def _running(processes: Sequence[dict[str, Any]]) -> str | None:
    if not processes:
        return None
    return f"{sum(1 for one in processes if one['state'] == 'RUNNING')}/{len(processes)}"


def _promise(one: dict[str, Any]) -> str:
    said = f": {one['message'].splitlines()[-1]}" if one["state"] == "failed" and one["message"] else ""
    return f"{one['name']} {one['state']} since {one['since'][:19]}Z{said}"


def _incident(one: dict[str, Any]) -> str:
    return f"{one['kind']} {one['name']} since {one['begun']}: {one['reason']}"


def show(item: dict[str, Any]) -> str:
    """``show PARTITION``."""
    rows = [
        ("state", item["state"]),
        ("user", f"{item['user']['name']} (uid {item['user']['uid']})"),
        ("path", item["path"]),
        ("IPv6", f"{item['ipv6']}/{item['ipv6_prefixlen']}" if item["ipv6"] else None),
        (
            "IPv6 range",
            f"{item['ipv6_range']}/{item['ipv6_range_prefixlen']}" if item["ipv6_range"] else None,
        ),
        ("IPv4", item["ipv4"]),
        *_optional(item),
        ("tap", _tap(item["tap"])),
        ("software", item["software_release"]),
        ("instance", item["instance_guid"]),
        *(("process", f"{one['name']} {one['state']} {one['pid'] or ''}") for one in item["processes"]),
        *(("promise", _promise(one)) for one in item["promises"]),
        *(("incident", _incident(one)) for one in item["incidents"]),
        *(("tunnel", name) for name in item["tunnels"]),
        *(("block device", name) for name in item["block_devices"]),
        *(("quota", _quota(one)) for one in (item["quota"],) if one),
        *(("drift", name) for name in item["drift"]),
    ]
    lines = [item["id"], *(f"  {name:<15}{_cell(value)}" for name, value in rows)]
    if item["error"]:
        lines += ["  last error:", *(f"    {line}" for line in printable(item["error"]).splitlines())]
    return "\n".join(lines)


def _tap(tap: dict[str, Any] | None) -> str | None:
    if tap is None:
        return None
    words = [f"{tap['name']}, {'in ' + tap['bridge'] if tap['bridge'] else 'routed'}, guest MAC {tap['mac']}"]
    words += [f"guest IPv4 {tap['ipv4']}"] if tap["ipv4"] else []
    words += [f"IPv6 {tap['ipv6']}/{tap['ipv6_prefixlen']}"] if tap["ipv6"] else []
    return ", ".join(words)


def _quota(one: dict[str, Any]) -> str:
    share = 100 * one["used_bytes"] // one["bytes"]
    rate = one["rate_bits_per_second"]
    done = f"limit {rate} bit/s" if rate else "warn"
    return f"{share} % of {one['bytes']} bytes used in {one['month']}, {done}"


def _optional(item: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What most partitions have not."""
    if item["public_ipv4"]:
        yield "public IPv4", item["public_ipv4"]
    if item["vpn_ipv4"]:
        yield "mesh IPv4", item["vpn_ipv4"]
    if item["routable_ipv4"]:
        yield "routable IPv4", f"{item['routable_ipv4']}/{item['routable_ipv4_prefixlen']}"
    if tun := item["tun"]:
        ends = (f"{tun[key]}/{tun[f'{key}_prefixlen']}" for key in ("ipv4", "ipv6") if tun[key])
        yield "tun", ", ".join([tun["name"], *ends])


def event(value: dict[str, Any]) -> str:
    """One line of ``events``."""
    name = value["event"]
    bad = name.endswith((".failed", ".refused", ".fight")) or name == "drift.found"
    shown = colour(name, "red" if bad else "bold")
    about = printable(value.get("partition") or "-")
    return f"{printable(value['time'])}  {shown}  {about}  {printable(value['message'])}"


def tunnels(value: dict[str, Any]) -> str:
    """``tunnel list``."""
    rows = [
        (
            one["name"],
            one["mode"],
            one["state"],
            one["listen"],
            one["connect"],
            len(one["allowed"]),
            one["sessions"],
            (one["certificate"] or {}).get("not_after", "")[:10],
            "; ".join(filter(None, (one["reason"], *one["warnings"]))),
        )
        for one in value["tunnels"]
    ]
    heads = ("tunnel", "mode", "state", "listen", "connect", "peers", "sessions", "valid until", "remarks")
    return table(heads, rows)


_OUTCOME_COLOURS = {"ok": "green", "idle": "yellow", "undecided": "yellow"}


def tunnel_checks(value: dict[str, Any]) -> str:
    """``tunnel check``."""
    checks = value["checks"]
    lines = []
    for one in checks:
        outcome = colour(one["outcome"].replace("_", " "), _OUTCOME_COLOURS.get(one["outcome"], "red"))
        lines.append(f"{_cell(one['name'])}: {outcome}: {_cell(one['message'])}")
        if one["hint"]:
            lines.append(f"    next: {printable(one['hint'])}")
    fine = sum(1 for one in checks if one["outcome"] == "ok")
    lines.append(f"{fine} of {len(checks)} tunnels work" if checks else "no tunnel is declared")
    return "\n".join(lines)
