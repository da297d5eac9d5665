"""Documents on their way to the master: sent one by one, the oldest first, and what becomes of each is judged and kept.

Promises: a document goes out knowingly once. None goes to a master that does not answer a harmless question right before; one
of which nobody can know whether it arrived is held and shown, and the next one waits a while; one that the master never takes
holds up no other for ever.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from accounting import outbox
from accounting.accepted import Accepted
from partitiond.errors import PartitiondError, sentence
from partitiond.passes import Result, pause_after
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from accounting.ledger import Ledger
    from accounting.outbox import Entry, State
    from partitiond.context import Context

logger = logging.getLogger(__name__)

_DAY = 86400.0
_PATIENCE = 5  # tries of one document, until it holds up no other
_HINT = "partitiond report list shows it; then report resend or report drop"
# what a master says of a document, and not of who sends it: RFC 9110, sections 15.5.1, 15.5.14 to 15.5.16 and 15.5.21
_OF_THE_DOCUMENT = frozenset({400, 413, 414, 415, 422})


def send(context: Context, ask: Callable[[], object], result: Result, *, force: bool) -> None:
    """Send what waits, the oldest first, until the master does not take one; see :func:`partitiond.reports.run_pass`."""
    ledger = context.meters.ledger()
    _catch_up(context, ledger)
    if _pausing(context, ledger, result, force=force):
        return
    waiting = _waiting(context, ledger)
    if not waiting:
        return
    ask()
    accepted = 0
    stuck: SlapError | None = None
    try:
        for entry in waiting:
            try:
                if context.stop.is_set() or not _deliver(context, ledger, entry, result):
                    break
            except SlapError as error:
                if entry.tries < _PATIENCE:
                    raise
                stuck = error  # perhaps that is about this one alone
                continue
            accepted += 1
    finally:
        _tell_accepted(context, result, accepted)
    if stuck is not None:
        raise stuck


def _catch_up(context: Context, ledger: Ledger) -> None:
    """Write down what became of documents when the ledger could not be told, and find those whose sender is no more."""
    now = context.clock()
    with ledger.transaction("IMMEDIATE") as connection:
        for entry, state, reason in context.judged:
            outbox.end(connection, entry, state, now, reason)
        cut_off = outbox.find_cut_off(connection, now)
    context.judged.clear()
    for entry in cut_off:
        _tell_held(context, entry, "partitiond ended while it was being sent")


def _waiting(context: Context, ledger: Ledger) -> list[Entry]:
    """Give what is to be sent; where the operator wants it so, also what may have arrived, but not for ever."""
    with ledger.transaction("IMMEDIATE") as connection:
        if context.config.accounting.resend:
            for entry in outbox.entries(connection, "ambiguous"):
                if entry.tries < _PATIENCE:
                    reason = "sent again: report_ambiguous = resend"
                    outbox.end(connection, entry, "waiting", context.clock(), reason)
        return outbox.entries(connection, "waiting")


def _tell_accepted(context: Context, result: Result, accepted: int) -> None:
    if accepted:
        message = f"the master took {accepted} usage documents"
        result.done.append(message)
        context.events.record("report.sent", message, documents=accepted)


def _deliver(context: Context, ledger: Ledger, entry: Entry, result: Result) -> bool:
    """Send one document; whether it was taken. Raises SlapError when it certainly did not arrive."""
    with ledger.transaction() as connection:
        text = outbox.content(connection, entry.reference) or ""
    with ledger.transaction("IMMEDIATE") as connection:
        outbox.begin(connection, entry, context.clock())
    try:
        context.client.use_computer(text)
    except SlapError as error:
        state = judge(error)
        _note(context, ledger, entry, state, sentence(error))
        if state == "waiting":
            context.master.note(False)
            raise
        if state == "accepted":
            return True
        result.failures.append((f"report/{entry.reference}", _problem(entry, state, error)))
        if state == "ambiguous":
            _tell_held(context, entry, str(error))
            return False
        _tell_refused(context, entry, f"the master refused {entry.reference}: {error}")
        return True
    _note(context, ledger, entry, "accepted")
    context.master.note(True)
    return True


def _note(context: Context, ledger: Ledger, entry: Entry, state: State, reason: str = "") -> None:
    """Write down what became of a document; a ledger that fails right now is told with the next pass."""
    context.judged.append((entry, state, reason))
    if state == "accepted":
        ledger.note_accepted(Accepted(entry.reference, entry.day, entry.kind, entry.partition, entry.guid))
    with ledger.transaction("IMMEDIATE") as connection:
        outbox.end(connection, entry, state, context.clock(), reason)
    context.judged.pop()


def judge(error: SlapError) -> State:
    """Say what became of a document whose sending ended in an error."""
    if error.status is not None and 200 <= error.status < 300:
        return "accepted"  # with more words than we read
    if error.unsent or error.code == "slap.not_ready" or error.status == 503:
        return "waiting"
    if error.status in _OF_THE_DOCUMENT:
        return "refused"
    if error.status is not None and error.status < 500:
        return "waiting"  # about us, or the address: nothing was taken
    return "ambiguous"


def _problem(entry: Entry, state: State, error: SlapError) -> PartitiondError:
    if state == "refused":
        return PartitiondError(
            "report.refused",
            f"the master refused the document: {error}",
            resource=entry.reference,
            hint="partitiond report show prints it; what it tells is kept; other documents go on",
        )
    return PartitiondError(
        "report.held",
        f"nobody knows whether the master has the document: {error}",
        resource=entry.reference,
        hint=_HINT,
        retryable=True,
    )


def tell_refused_by_us(context: Context, made: Collection[str], result: Result) -> None:
    """Tell of documents that were made and, by a mistake of ours, are such that a master would reject them."""
    with context.meters.ledger().transaction() as connection:
        refused = [one for one in outbox.entries(connection, "refused") if one.reference in made]
    for entry in refused:
        message = f"{entry.reference} was not sent, the master would reject it: {entry.reason}"
        hint = "report it as a mistake of partitiond; partitiond report show prints it; other documents go on"
        error = PartitiondError("report.refused", message, resource=entry.reference, hint=hint)
        result.failures.append((f"report/{entry.reference}", error))
        _tell_refused(context, entry, message)


def _tell_refused(context: Context, entry: Entry, message: str) -> None:
    logger.warning("report: %s", message)
    context.events.record(
        "report.refused",
        message,
        resource=f"report/{entry.reference}",
        partition=entry.partition or None,
    )


def _tell_held(context: Context, entry: Entry, why: str) -> None:
    message = f"nobody knows whether the master has {entry.reference}: {why}"
    again = context.config.accounting.resend
    logger.warning("report: %s; %s", message, "it is sent again" if again else "it is held")
    context.events.record(
        "report.held",
        message,
        resource=f"report/{entry.reference}",
        partition=entry.partition or None,
    )


def _pausing(context: Context, ledger: Ledger, result: Result, *, force: bool) -> bool:
    """Whether an answer got lost so recently that the next one would, too: one document is lost track of, not all of them."""
    now = context.clock()
    with ledger.transaction() as connection:
        lost = [one for one in outbox.entries(connection, "ambiguous") if 0 <= now - one.changed < _DAY]
        waiting = outbox.entries(connection, "waiting")
    if force or not lost or not (waiting or context.config.accounting.resend):
        return False
    left = max(one.changed for one in lost) + pause_after(len(lost)) - now
    if left <= 0:
        return False
    error = PartitiondError(
        "report.paused",
        f"{len(waiting)} documents wait: the answer to {lost[-1].reference} got lost a moment ago; on in {left:.0f} s",
        hint="partitiond sync report --force sends them now",
        retryable=True,
    )
    result.failures.append(("report", error))
    return True
