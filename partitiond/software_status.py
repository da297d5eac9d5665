"""Software releases as ``status`` shows them: every one that is known, also those that the master does not list any more."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from partitiond import build_keeper, buildout, log_digest
from partitiond.errors import PartitiondError
from partitiond.state import software_name

if TYPE_CHECKING:
    from partitiond.context import Context
    from partitiond.state import SoftwareState

_LONG_UPLOAD = 600.0


def releases(context: Context) -> list[dict[str, Any]]:
    """The releases by URL; what builds now is among them from its first moment on."""
    config = context.config
    try:
        found = build_keeper.running(config)
    except PartitiondError as error:
        return [_unknown(error)]
    known, damaged = context.store.readable_softwares()
    states = {state.url: state for state in known}
    building = found.url if found else None
    rows = [_release(context, state, building) for _, state in sorted(states.items())]
    rows += [_unknown(error) for error in damaged.values()]
    if found is not None and found.uploading:
        for row in rows:
            if row["url"] == found.url:
                row["uploading"] = True
    elif building is not None and building not in states:
        rows.append(
            {
                "url": building,
                "directory": software_name(building),
                "state": "building",
                "listed": True,
                "error": None,
            }
        )
    return rows


def open_cases(context: Context) -> list[str]:
    """An upload that takes long, for which the next build waits."""
    try:
        found = build_keeper.running(context.config)
    except PartitiondError:
        return []  # the list of releases says it
    seconds = time.time() - found.uploading if found is not None and found.uploading else 0.0
    if found is None or seconds < _LONG_UPLOAD:
        return []
    return [
        f"{found.url} is being uploaded to the binary cache for {seconds / 60:.0f} min; the next build waits for it"
    ]


def _unknown(error: PartitiondError) -> dict[str, Any]:
    return {"url": error.resource, "state": "unknown", "listed": True, "error": str(error)}


def _release(context: Context, state: SoftwareState, building: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "url": state.url,
        "directory": software_name(state.url),
        "state": _state(context, state, building),
        "listed": state.listed,
        "error": _first(state.error) if state.error else None,
    }
    if state.failures:
        row["failures"] = state.failures
        row["next_try_seconds"] = max(0, round(state.next_try - time.time()))
    if state.kept_for:
        row["kept_for"] = state.kept_for.split(", ")
    return row


def _state(context: Context, state: SoftwareState, building: str | None) -> str:
    if state.url == building and not (state.available and buildout.completed(context.config, state.url)):
        return "building"
    if state.available and buildout.completed(context.config, state.url):
        return "available"
    return "failed" if state.failures else "wanted"


def _first(text: str) -> str:
    return log_digest.plain(text).strip().partition("\n")[0]
