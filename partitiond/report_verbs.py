"""``report list``, ``show``, ``resend`` and ``drop``: the documents for the master, and what the operator decides of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accounting import outbox
from accounting.errors import AccountingError
from accounting.ledger import Ledger
from accounting.model import iso_utc
from partitiond.metering import ledger_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accounting.outbox import Entry
    from partitiond.config import Config
    from partitiond.context import Context

_ACCEPTED_SHOWN = 10
_CHANGES = {"resend": outbox.resend, "drop": outbox.drop}
ACTIONS = tuple(_CHANGES)


def listing(config: Config, *, everything: bool) -> dict[str, Any]:
    """The documents in the order in which they are sent; of those that the master took the last few, or ``everything``."""
    with Ledger.open_readonly(ledger_path(config.state_dir)) as ledger, ledger.transaction() as connection:
        counts = outbox.count(connection)
        others = tuple(state for state in outbox.STATES if state != "accepted")
        newest = None if everything else _ACCEPTED_SHOWN
        found = [*outbox.entries(connection, *others), *outbox.entries(connection, "accepted", newest=newest)]
    return {
        "counts": {state: counts.get(state, 0) for state in outbox.STATES},
        "documents": [_as_json(entry) for entry in sorted(found, key=lambda entry: entry.id)],
    }


def show(config: Config, reference: str) -> dict[str, Any]:
    """One document with its text, which is empty where it is no longer kept. Raises AccountingError."""
    with Ledger.open_readonly(ledger_path(config.state_dir)) as ledger, ledger.transaction() as connection:
        entry = next(
            (one for one in outbox.entries(connection, *outbox.STATES) if one.reference == reference), None
        )
        content = outbox.content(connection, reference)
    if entry is None or content is None:
        raise AccountingError(
            "accounting.document",
            "there is no such document",
            resource=reference,
            hint="partitiond report list names them",
        )
    return {**_as_json(entry), "content": content}


def change(context: Context, action: str, references: Sequence[str]) -> dict[str, Any]:
    """``resend`` or ``drop`` documents, all of them or none. Raises AccountingError, KeyError for another action."""
    with context.meters.ledger().transaction("IMMEDIATE") as connection:
        for reference in references:
            _CHANGES[action](connection, reference, context.clock())
    context.wake_report()
    return {"action": action, "documents": list(references)}


def open_cases(config: Config) -> list[str]:
    """What stays open of what was used: nothing is reported, or the operator has to decide."""
    found = []
    tariff = config.accounting.tariff
    if not tariff.resources:
        found.append("usage is metered and not reported: [accounting] names no resource of the master's")
    try:
        with (
            Ledger.open_readonly(ledger_path(config.state_dir)) as ledger,
            ledger.transaction() as connection,
        ):
            counts = outbox.count(connection)
    except AccountingError as error:
        return [*found, f"{error} ({error.hint})"]
    for state, why in (
        ("ambiguous", "wait for a decision: nobody knows whether the master has them"),
        ("refused", "were refused"),
    ):
        if counts.get(state):
            found.append(f"{counts[state]} usage documents {why} (partitiond report list)")
    return found


def _as_json(entry: Entry) -> dict[str, Any]:
    return {
        "reference": entry.reference,
        "day": entry.day,
        "kind": entry.kind,
        "partition": entry.partition or None,
        "instance_guid": entry.guid or None,
        "state": entry.state,
        "made": iso_utc(entry.made),
        "changed": iso_utc(entry.changed),
        "tries": entry.tries,
        "reason": entry.reason or None,
    }
