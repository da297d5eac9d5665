"""The verbs that change the node, with results as plain JSON: called by the command line or by the daemon for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from partitiond import converge, lanes, last_good, refusal, rollback, teardown, trial
from partitiond.errors import FAMILY, PartitiondError
from partitiond.events import EventLog
from partitiond.operation import as_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.node_plan import Observation, Outcome, Plan
    from partitiond.passes import Wish


def plan(context: Context) -> dict[str, Any]:
    """``plan``: the operations; ``refused`` is what is wished for and cannot be, which no operation mends."""
    found = converge.plan(context, converge.observe(context))
    return {"operations": [as_json(operation) for operation in found], "refused": _refused(found.refused)}


def apply(
    context: Context,
    partitions: list[str],
    *,
    force: bool = False,
    first: tuple[Observation, Plan] | None = None,
) -> dict[str, Any]:
    """``apply``; ``first`` as for :func:`partitiond.converge.apply`.

    Raises PartitiondError ``apply.unknown_partition``, ``trial.pending``.
    """
    known = {f"{context.config.partition_base}{index}" for index in range(context.config.partition_amount)}
    for name in partitions:
        if name not in known:
            raise PartitiondError(
                "apply.unknown_partition",
                "there is no such partition",
                resource=name,
                hint="partitiond status lists them",
            )
    rollback.refuse_other(context.config)
    outcome = converge.apply(context, only=frozenset(partitions), force=force, first=first)
    last_good.accept(context.config.state_dir)  # put into force by word
    record(context, outcome)
    return _outcome(outcome)


def try_out(
    context: Context, new: Config, timeout: float, *, force: bool, before: Config | None, lasting: bool
) -> dict[str, Any]:
    """``try``; the arguments are those of :func:`partitiond.tryout.run`."""
    from partitiond import tryout  # noqa: PLC0415 - only for this verb

    found, outcome = tryout.run(context, new, timeout, force=force, before=before, lasting=lasting)
    return {"trial": trial.as_json(new.state_dir) if found else None, **_outcome(outcome)}


def confirm(config: Config) -> dict[str, Any]:
    """``confirm``: the same with and without a daemon."""
    found = trial.confirm(config.state_dir)
    message = f"{found.config} is confirmed, {found.seconds_left():.0f} s before the end of its trial"
    EventLog(config.log_dir).record("trial.confirmed", message, resource=found.config)
    return {"config": found.config, "seconds_left": round(found.seconds_left(), 1)}


def record(context: Context, outcome: Outcome) -> None:
    """Record in the log of events what an apply did; nothing when it did nothing."""
    failed = [name for name, _ in outcome.failures]
    if not (outcome.done or failed):
        return
    message = f"{outcome.done} done, {len(failed)} failed, {len(outcome.left)} left"
    context.events.record(
        "apply.failed" if failed else "apply.done",
        message,
        done=outcome.done,
        failures=failures_as_json(outcome.failures) or None,
    )


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "done": outcome.done,
        "failures": failures_as_json(outcome.failures),
        "left": [as_json(operation) for operation in outcome.left],
        "refused": _refused(outcome.refused),
    }


def _refused(found: Iterable[Any]) -> list[dict[str, Any]]:
    return [refusal.as_json(one) for one in found]


def failures_as_json(found: Iterable[tuple[str, Exception]]) -> list[dict[str, str]]:
    """Return the failures of a pass as verbs show them."""
    return [
        {
            "resource": resource,
            "code": error.code if isinstance(error, FAMILY) else "system",
            "message": str(error),
            "hint": error.hint if isinstance(error, FAMILY) else "",
        }
        for resource, error in found
    ]


def refuse_unknown(config: Config, only: frozenset[str]) -> None:
    """Raise PartitiondError ``sync.unknown_partition`` where one of the names is that of no partition."""
    known = {f"{config.partition_base}{index}" for index in range(config.partition_amount)}
    if unknown := sorted(only - known):
        raise PartitiondError(
            "sync.unknown_partition",
            "there is no such partition",
            resource=", ".join(unknown),
            hint="partitiond status lists them",
        )


def sync(context: Context, lane: str, wish: Wish) -> dict[str, Any]:
    """``sync LANE``: one pass. Raises PartitiondError ``sync.unknown_partition``."""
    if lane == "instances":
        refuse_unknown(context.config, wish.only)
    result = lanes.run(context, lane, wish)
    return {"lane": lane, "done": result.done, "failures": failures_as_json(result.failures)}


def tear_down(context: Context, *, purge: bool) -> dict[str, Any]:
    """``teardown``; with it a trial is over."""
    trial.abandon(context.config.state_dir)
    outcome = teardown.run(context, purge=purge)
    if not purge:  # else the log is gone, too
        context.events.record("node.removed", "all that was made of the system is taken back; data is kept")
    return _outcome(outcome)
