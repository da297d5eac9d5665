"""The report lane: days that have ended become documents, and documents go to the master.

Promises: what was metered is told once. A document is kept until the master said 200; one that it refused is set aside and
holds up no other; one of which nobody can know whether it arrived is held and shown. The oldest go first, and none goes to a
master that does not answer a harmless question right before.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from accounting import documents, outbox
from accounting.errors import AccountingError
from partitiond import instances, usage_intake
from partitiond.errors import PartitiondError, sentence
from partitiond.passes import Result, pause_after
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from collections.abc import Callable

    from accounting.ledger import Ledger
    from accounting.outbox import Entry, State
    from partitiond.context import Context
    from partitiond.node import Node

logger = logging.getLogger(__name__)

_DAY = 86400.0
_SOONER = 0.8  # the lane's pauses are jittered
_HINT = "partitiond report list shows it; then report resend or report drop"
# what a master says of a document, and not of who sends it: RFC 9110, sections 15.5.1, 15.5.14 to 15.5.16 and 15.5.21
_OF_THE_DOCUMENT = frozenset({400, 413, 414, 415, 422})


def run_pass(
    context: Context, node: Node, *, ask: Callable[[], object], asked: bool = True, force: bool = False
) -> Result:
    """Take in what partitions say of themselves, make the documents that are due, send what waits, and finish the instances
    that are to be destroyed.

    ``ask`` puts a harmless question to the master. ``asked``: somebody wants the pass now; else partitions are asked once in a
    ``report_interval``, and when a day has ended. ``force``: also what would wait because an answer got lost a moment ago.
    Raises SlapError when the master does not take anything now, after all that can be done without it.
    """
    result = Result([], [])
    away: SlapError | None = None
    try:
        _take_in(context, node, result, asked=asked)
        _make(context, result)
        _make_last(context, node, result)
        _send(context, ask, result, force=force)
    except AccountingError as error:
        # what was metered is in the ledger, and no instance waits for it
        result.failures.append(("usage", error))
        logger.warning("report: %s", sentence(error))
    except SlapError as error:
        away = error
    finished = instances.finish_destroyed(context, node, untold=_untold(context))
    result.done += finished.done
    result.failures += finished.failures
    if away is not None:
        raise away
    return result


def _take_in(context: Context, node: Node, result: Result, *, asked: bool) -> None:
    """Have partitions report, where it is time for that."""
    now = context.clock()
    if context.taken_in_at is None:
        context.taken_in_at = now  # a daemon that is restarted does not have all of them report each time
    late = not 0 <= now - context.taken_in_at < _SOONER * context.config.intervals.report
    if asked or late or context.meters.has_due():
        context.taken_in_at = now
        resources = context.config.accounting.tariff.partition_resources
        taken = usage_intake.run(context, node, context.meters.ledger(), resources)
        result.done += taken.done
        result.failures += taken.failures


def _make(context: Context, result: Result) -> None:
    """Make the documents of all days that have ended."""
    tariff, computer = context.config.accounting.tariff, context.config.computer_id
    ledger = context.meters.ledger()
    with ledger.transaction() as connection:
        periods = documents.due(connection)
    for period in periods:
        if context.stop.is_set():
            return
        with ledger.reader() as reader, reader.transaction() as connection:
            drafts = documents.gather(connection, period, tariff, computer, last=period == periods[-1])
        with ledger.transaction("IMMEDIATE") as connection:
            made = documents.store(connection, drafts, tariff, computer, context.clock())
            outbox.forget_old(connection, context.clock())
        if made:
            result.done.append(f"{period.day}: {len(made)} documents made")


def _make_last(context: Context, node: Node, result: Result) -> None:
    """Make the last documents of those that are about to be destroyed: later the master would not know them any more."""
    for partition in node.partitions:
        state = context.store.instance(partition.id)
        if state.life != "destroying" or state.cleaned or not state.instance_guid or context.stop.is_set():
            continue
        context.meters.settle(context, node)
        tariff, computer, now = context.config.accounting.tariff, context.config.computer_id, context.clock()
        ledger = context.meters.ledger()
        taken = usage_intake.final(context, partition, ledger, tariff.partition_resources)
        result.done += taken.done
        result.failures += taken.failures
        with ledger.transaction("IMMEDIATE") as connection:
            drafts = documents.gather_last(
                connection, partition.id, state.instance_guid, tariff, computer, now
            )
            made = documents.store(connection, drafts, tariff, computer, now) if drafts else []
        result.done += [f"{partition.id}: its last usage is in document {reference}" for reference in made]


def _untold(context: Context) -> frozenset[str]:
    """Partitions whose last documents wait to be sent."""
    try:
        with context.meters.ledger().transaction() as connection:
            waiting = outbox.entries(connection, "waiting", "sending")
    except AccountingError as error:
        logger.warning("report: %s", sentence(error))
        return frozenset()
    return frozenset(entry.partition for entry in waiting if entry.kind != "node")


# --- sending


def _send(context: Context, ask: Callable[[], object], result: Result, *, force: bool) -> None:
    """Send what waits, the oldest first, until the master does not take one."""
    ledger, now = context.meters.ledger(), context.clock()
    with ledger.transaction("IMMEDIATE") as connection:
        for entry, state, reason in context.judged:
            outbox.end(connection, entry, state, now, reason)
        cut_off = outbox.find_cut_off(connection, now)
    context.judged.clear()
    for entry in cut_off:
        _tell_held(context, entry, "partitiond ended while it was being sent")
    if _pausing(context, ledger, result, force=force):
        return
    with ledger.transaction("IMMEDIATE") as connection:
        if context.config.accounting.resend:
            for entry in outbox.entries(connection, "ambiguous"):
                outbox.end(connection, entry, "waiting", now, "sent again: report_ambiguous = resend")
        waiting = outbox.entries(connection, "waiting")
    if not waiting:
        return
    ask()
    accepted = 0
    try:
        for entry in waiting:
            if context.stop.is_set() or not _deliver(context, ledger, entry, result):
                break
            accepted += 1
    finally:
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
        result.failures.append((f"report/{entry.reference}", _problem(entry, state, error)))
        if state == "ambiguous":
            _tell_held(context, entry, str(error))
            return False
        context.events.record(
            "report.refused",
            f"the master refused {entry.reference}: {error}",
            resource=f"report/{entry.reference}",
            partition=entry.partition or None,
        )
        logger.warning("report: the master refused %s: %s", entry.reference, sentence(error))
        return True
    _note(context, ledger, entry, "accepted")
    context.master.note(True)
    return True


def _note(context: Context, ledger: Ledger, entry: Entry, state: State, reason: str = "") -> None:
    """Write down what became of a document; a ledger that fails right now is told with the next pass."""
    context.judged.append((entry, state, reason))
    with ledger.transaction("IMMEDIATE") as connection:
        outbox.end(connection, entry, state, context.clock(), reason)
    context.judged.pop()


def judge(error: SlapError) -> State:
    """Say what became of a document whose sending ended in an error."""
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
