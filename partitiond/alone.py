"""The verbs that change the node where no daemon runs; the caller holds the node's lock.

First of all each finishes a trial that has ended and that nobody took back.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from partitiond import lanes, last_good, mesh_verbs, rollback, trial, verbs
from partitiond.errors import FAMILY, sentence
from partitiond.passes import Result
from partitiond.watchdog import Watchdog

if TYPE_CHECKING:
    from partitiond.context import Context
    from partitiond.passes import Wish
    from partitiond.trial import Trial

logger = logging.getLogger(__name__)


def _settled(context: Context) -> Trial | None:
    """The trial that goes on, or None; the context is as it was."""
    config = context.config
    going_on = rollback.settle(context)
    context.adopt(config)
    return going_on


def apply(context: Context, partitions: list[str], *, force: bool) -> dict[str, Any]:
    """``apply``: by the file as it is, also one that was rejected."""
    _settled(context)
    return verbs.apply(context, partitions, force=force)


def change_mesh(context: Context, body: dict[str, Any]) -> dict[str, Any]:
    """``mesh import`` and ``mesh remove``."""
    _settled(context)
    found = mesh_verbs.change(context, body)
    return {**found, "applied": verbs.apply(context, [])}


def try_out(context: Context, timeout: float, *, force: bool) -> dict[str, Any]:
    """``try``."""
    trial.refuse_pending(_settled(context))
    config = context.config
    before = last_good.load(config.state_dir, config.file)
    return verbs.try_out(context, config, timeout, force=force, before=before, lasting=False)


def sync(context: Context, lane: str, wish: Wish) -> dict[str, Any]:
    """``sync``: by what is in force. A pass over instances is also one of what a daemon does in between."""
    _settled(context)
    last_good.refuse_rejected(context.config)
    context.adopt(rollback.in_force(context.config))
    if lane != "instances":
        return verbs.sync(context, lane, wish)
    try:
        value = verbs.sync(context, lane, wish)
    except FAMILY as error:
        if error.retryable:  # what runs is looked after while the master is away, too
            in_between(context, wish.only, watchdog=True)
        raise
    add(value, in_between(context, wish.only, watchdog=True))
    return value


def in_between(context: Context, only: frozenset[str], *, watchdog: bool) -> Result:
    """Look at what promises that are due say of instances that run, then for programs that ended, once.

    Where no daemon runs nobody else does. As with slapgrid, a promise that fails in between is told, and fails no pass.
    """
    result = Result([], [])
    if not context.store.to_run():
        return result
    # one that fails must not keep the other from its turn
    for name, body in (
        ("promises", lambda: lanes.promise(context, only)),
        *([("watchdog", lambda: _watch(context))] if watchdog else ()),
    ):
        try:
            found = body()
            result.done += found.done
            result.failures += found.failures
        except FAMILY as error:
            logger.warning("%s: %s", name, sentence(error))
            result.failures.append((name, error))
    try:
        context.promises.keep()
    except OSError as error:
        logger.warning("what promises said is not kept: %s", error)
    return result


def _watch(context: Context) -> Result:
    watchdog = Watchdog(context, lambda _: None)  # the next program looks again
    watchdog.ended()
    return watchdog.run()


def add(value: dict[str, Any], result: Result) -> None:
    """Add what another pass did to what ``sync`` shows."""
    value["done"] += result.done
    value["failures"] += verbs.failures_as_json(result.failures)
