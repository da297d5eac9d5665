"""The verbs that change the node where no daemon runs; the caller holds the node's lock.

First of all each finishes a trial that has ended and that nobody took back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from partitiond import last_good, rollback, trial, verbs

if TYPE_CHECKING:
    from partitiond.context import Context
    from partitiond.passes import Wish
    from partitiond.trial import Trial


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


def try_out(context: Context, timeout: float, *, force: bool) -> dict[str, Any]:
    """``try``."""
    trial.refuse_pending(_settled(context))
    config = context.config
    before = last_good.load(config.state_dir, config.file)
    return verbs.try_out(context, config, timeout, force=force, before=before, lasting=False)


def sync(context: Context, lane: str, wish: Wish) -> dict[str, Any]:
    """``sync``: by what is in force."""
    _settled(context)
    last_good.refuse_rejected(context.config)
    context.adopt(rollback.in_force(context.config))
    return verbs.sync(context, lane, wish)
