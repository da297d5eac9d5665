"""The report lane: partitions report, days that have ended become documents, documents go to the master, and instances go.

Promises: what was metered is told once. Nothing of an instance is removed before its last usage is in documents, and the master
is not told of its end before it has them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from accounting import documents, outbox, tioxml
from accounting.errors import AccountingError
from partitiond import destruction, dropped, report_sending, usage_intake
from partitiond.errors import sentence
from partitiond.passes import Result
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from collections.abc import Callable

    from partitiond.context import Context
    from partitiond.node import Node
    from partitiond.state import InstanceState

logger = logging.getLogger(__name__)

_SOONER = 0.8  # the lane's pauses are jittered


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
        report_sending.send(context, ask, result, force=force)
    except AccountingError as error:
        # what was metered is in the ledger
        result.failures.append(("usage", error))
        logger.warning("report: %s", sentence(error))
    except SlapError as error:
        away = error
    waiting = _waiting(context, node, force=force)
    finished = destruction.finish(context, node, **waiting, force=force)
    result.done += finished.done
    result.failures += finished.failures
    if away is not None:
        raise away
    return result


def _take_in(context: Context, node: Node, result: Result, *, asked: bool) -> None:
    """Have partitions report, where it is time for that."""
    now, turns = context.clock(), context.turns
    if context.taken_in_at is None:
        context.taken_in_at = now  # a daemon that is restarted does not have all of them report each time
    late = not 0 <= now - context.taken_in_at < _SOONER * context.config.intervals.report
    due = context.meters.newest_due()
    if asked or late or due not in (None, turns.period):
        context.taken_in_at = now
        turns.period = due or turns.period
        turns.begin()
    if turns.open:
        resources = context.config.accounting.tariff.partition_resources
        taken = usage_intake.run(context, node, context.meters.ledger(), resources, since=turns.begun)
        turns.open = False
        result.done += taken.done
        result.failures += taken.failures


def _make(context: Context, result: Result) -> None:
    """Make the documents of all days that have ended."""
    tariff, computer = context.config.accounting.tariff, context.config.computer_id
    ledger = context.meters.ledger()
    with ledger.transaction() as connection:
        periods = documents.due(connection)
    apart = dropped.noted(context.store.readable()[0].values())
    for period in periods:
        if context.stop.is_set():
            return
        with ledger.reader() as reader, reader.transaction() as connection:
            drafts = documents.gather(
                connection, period, tariff, computer, last=period == periods[-1], apart=apart
            )
        with ledger.transaction("IMMEDIATE") as connection:
            made = documents.store(connection, drafts, tariff, computer, context.clock())
            outbox.forget_old(connection, context.clock())
        report_sending.tell_refused_by_us(context, made, result)
        if made:
            result.done.append(f"{period.day}: {len(made)} documents made")


def _make_last(context: Context, node: Node, result: Result) -> None:
    """Make the last documents of those that are about to be destroyed: later the master would not know them any more."""
    tariff, computer = context.config.accounting.tariff, context.config.computer_id
    ledger = context.meters.ledger()
    states, damaged = context.store.readable()
    result.failures += damaged.items()
    going = [item for item in node.partitions if _is_unsettled(states.get(item.id))]
    if not going or context.stop.is_set():
        return
    taken = usage_intake.final(context, going, ledger, tariff.partition_resources)
    result.done += taken.done
    result.failures += taken.failures
    destruction.take_leave(context, going)
    context.meters.settle(context, node)
    for partition in going:
        with context.applying:  # the master may want it back, until here
            state = context.store.instance(partition.id)
            if context.stop.is_set() or not state.instance_guid or not _is_unsettled(state):
                continue
            if not state.prerm_ran:
                continue  # it had no turn: what it does is still to be told
            now = context.clock()
            with ledger.reader() as reader, reader.transaction() as connection:
                drafts = documents.gather_last(connection, partition.id, state.instance_guid, tariff, now)
            with ledger.transaction("IMMEDIATE") as connection:
                made = documents.store(connection, drafts, tariff, computer, now) if drafts else []
            context.store.save_instance(replace(state, settled=True))
        report_sending.tell_refused_by_us(context, made, result)
        result.done += [f"{partition.id}: its last usage is in document {reference}" for reference in made]


def _is_unsettled(state: InstanceState | None) -> bool:
    """Whether its last usage is to be told now; of one that is kept it is not the last yet."""
    return (
        state is not None
        and state.life == "destroying"
        and not state.settled
        and bool(state.instance_guid)
        and not destruction.kept(state, time.time())
    )


def _waiting(context: Context, node: Node, *, force: bool) -> dict[str, frozenset[str]]:
    """Give the partitions whose destruction waits: ``unsettled`` are those whose last usage is in no document yet, so that
    nothing of them may go; ``untold`` those that a document names which is not sent yet: the master, once told, would reject
    all of it. Where nothing is reported, nobody waits; with ``force`` nobody either.
    """
    states, _ = context.store.readable()
    going = [one for item in node.partitions if (one := states.get(item.id)) and one.life == "destroying"]
    if force or not going or not context.config.accounting.tariff.resources:
        return {"unsettled": frozenset(), "untold": frozenset()}
    unsettled = frozenset(state.partition for state in going if state.instance_guid and not state.settled)
    try:
        with context.meters.ledger().transaction() as connection:
            unsent = outbox.entries(connection, "waiting", "sending")
            texts = [outbox.content(connection, entry.reference) or "" for entry in unsent]
    except AccountingError as error:
        logger.warning("report: %s", sentence(error))
        return {"unsettled": unsettled, "untold": frozenset(state.partition for state in going)}
    named = {movement.reference for text in texts for movement in tioxml.read(text).movements}
    untold = frozenset(state.partition for state in going if state.instance_guid in named)
    return {"unsettled": unsettled, "untold": untold}
