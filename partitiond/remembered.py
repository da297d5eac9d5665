"""What the state of an instance says to those who plan for the whole node, also where it cannot be read.

Promises: a state that is damaged stops nobody else, and nothing of its own: what its partition has stays, what ran goes on and
comes back after a boot, nothing new is begun; it is told of until somebody mends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partitiond.errors import PartitiondError
from partitiond.refusal import Refusal
from partitiond.state import InstanceState
from partitiond.tunnels import group_name

if TYPE_CHECKING:
    from partitiond.context import Context


def halted(context: Context) -> dict[str, str]:
    """Why partitions have no tunnels for now, by partition; one of which nothing can be read keeps those that it has."""
    states, damaged = context.store.readable()
    found = {name: why for name, state in states.items() if (why := _halted(state))}
    for name in damaged:
        # who was stopped has no group any more
        if not context.supervisor.has_group(group_name(name)):
            found[name] = "what is remembered of its instance cannot be read"
    return found


def _halted(state: InstanceState) -> str:
    if state.life == "destroying":
        return "its partition is being destroyed"
    if state.life == "stopped" or (state.life == "failed" and state.wanted == "stopped"):
        return "its partition is stopped"
    return ""


def shown(context: Context, partition: str) -> InstanceState:
    """The state as it is shown: one that cannot be read has failed for that."""
    try:
        return context.store.instance(partition)
    except PartitiondError as error:
        return InstanceState(partition, "failed", error=f"{error.resource} {error}; {error.hint}")


def refused(context: Context) -> tuple[Refusal, ...]:
    """The states that cannot be read, each with what to do."""
    return tuple(_refusal(name, error) for name, error in context.store.readable()[1].items())


def open_cases(context: Context) -> list[str]:
    """The same in words."""
    return [f"{one.name}: {one.file}: {one.reason}; {one.hint}" for one in refused(context)]


def _refusal(partition: str, error: PartitiondError) -> Refusal:
    return Refusal(
        resource="instance",
        name=partition,
        partition=partition,
        file=error.resource,
        line=None,
        code=error.code,
        reason=f"{error}; its instance is left as it is",
        hint=error.hint,
    )
