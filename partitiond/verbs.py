"""The verbs that change the node, with results as plain JSON: called by the command line or by the daemon for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from partitiond import converge, lanes, refusal, teardown
from partitiond.errors import FAMILY, PartitiondError
from partitiond.operation import as_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from partitiond.context import Context
    from partitiond.converge import Outcome


def plan(context: Context) -> dict[str, Any]:
    """``plan``: the operations; ``refused`` is what is wished for and cannot be, which no operation mends."""
    found = converge.plan(context, converge.observe(context))
    return {"operations": [as_json(operation) for operation in found], "refused": _refused(found.refused)}


def apply(context: Context, partitions: list[str]) -> dict[str, Any]:
    """``apply``. Raises PartitiondError ``apply.unknown_partition``."""
    known = {f"{context.config.partition_base}{index}" for index in range(context.config.partition_amount)}
    for name in partitions:
        if name not in known:
            raise PartitiondError(
                "apply.unknown_partition",
                "there is no such partition",
                resource=name,
                hint="partitiond status lists them",
            )
    outcome = converge.apply(context, only=frozenset(partitions))
    record(context, outcome)
    return _outcome(outcome)


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
        failures=_failures(outcome.failures) or None,
    )


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "done": outcome.done,
        "failures": _failures(outcome.failures),
        "left": [as_json(operation) for operation in outcome.left],
        "refused": _refused(outcome.refused),
    }


def _refused(found: Iterable[Any]) -> list[dict[str, Any]]:
    return [refusal.as_json(one) for one in found]


def _failures(found: Iterable[tuple[str, Exception]]) -> list[dict[str, str]]:
    return [
        {
            "resource": resource,
            "code": error.code if isinstance(error, FAMILY) else "system",
            "message": str(error),
            "hint": error.hint if isinstance(error, FAMILY) else "",
        }
        for resource, error in found
    ]


def sync(context: Context, lane: str, *, force: bool) -> dict[str, Any]:
    """``sync LANE``: one pass."""
    result = lanes.run(context, lane, force=force)
    return {"lane": lane, "done": result.done, "failures": _failures(result.failures)}


def tear_down(context: Context, *, purge: bool) -> dict[str, Any]:
    """``teardown``."""
    outcome = teardown.run(context, purge=purge)
    if not purge:  # else the log is gone, too
        context.events.record("node.removed", "all that was made of the system is taken back; data is kept")
    return _outcome(outcome)
