"""Instances that the master knows nothing of, although it never asked for their end.

A master that was restored from an older database lists a partition as free whose instance was requested since, or gives it
to another instance. Neither is a word about the one that is there, whose data nobody else has. Promises: it runs on, is started
again after a boot and metered, until the master knows it again, asks for its end by word, or the operator ends it by name;
nobody else is let into its partition meanwhile; each turn of it is told once.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from partitiond.errors import PartitiondError
from partitiond.passes import report

if TYPE_CHECKING:
    from collections.abc import Iterable

    from partitiond.context import Context
    from partitiond.state import InstanceState
    from slap_client.documents import PartitionDocument

logger = logging.getLogger(__name__)

CODE = "instances.dropped"


def title_of(entry: PartitionDocument) -> str:
    """An instance's title with that of the root of its tree: slapproxy's guids name partitions, and these what is in them."""
    return f"{entry.root_instance_title}/{entry.instance_title}" if entry.instance_title else ""


def is_another(state: InstanceState, entry: PartitionDocument) -> bool:
    """Whether another instance is wanted than the one that is there. Pure.

    By the guid. Where that names but the partition, as slapproxy's do, by the title: with another timestamp, or of one that
    the master had let go of; else that is a new name of the same one.
    """
    if entry.free or state.life == "free":
        return False
    guids = {state.instance_guid or "", entry.instance_guid} - {""}
    if len(guids) > 1:
        return True
    if any(not guid.endswith(f"-{state.partition}") for guid in guids):
        return False
    title = title_of(entry)
    other = bool(state.title and title) and state.title != title
    return other and (state.dropped or state.timestamp != (entry.timestamp or None))


def keep(context: Context, state: InstanceState, entry: PartitionDocument) -> None:
    """Leave an instance as it is that the master does not know. Raises PartitiondError ``instances.dropped``, always."""
    rival = "" if entry.free else f"{entry.instance_guid} {title_of(entry)}".strip()
    error = _error(replace(state, dropped=True, rival=rival))
    if not state.dropped or state.rival != rival:
        with context.applying:
            now = context.store.instance(state.partition)
            context.store.save_instance(replace(now, dropped=True, rival=rival))
        logger.warning("%s: %s (%s)", state.partition, error, error.hint)
        _record(context, state, "dropped", str(error), error.hint)
        if rival:  # whoever asked for the other one is told why it does not come
            text = "its partition has the instance of before, which is not to be lost; the node's operator has to end that"
            report(lambda: context.client.instance_error(state.partition, text), state.partition)
    raise error


def end_rival(context: Context, state: InstanceState) -> str:
    """Tell the master of the end of an instance that was never let in: there is nothing of it. Raises SlapError."""
    context.ends.tell(context, state.partition, lambda client: client.instance_destroyed(state.partition))
    return "the end of the instance that was not let in is told; what is there stays"


def note_known(context: Context, state: InstanceState, entry: PartitionDocument) -> InstanceState:
    """Remember that the master knows an instance, by its present title; told where it did not."""
    title = title_of(entry)
    if not state.dropped and state.title == title:
        return state
    with context.applying:
        now = replace(context.store.instance(state.partition), dropped=False, rival="", title=title)
        if now.life != "free":
            context.store.save_instance(now)
    if state.dropped:
        message = "the master knows its instance again"
        logger.info("%s: %s", state.partition, message)
        _record(context, state, "wanted_back", message)
    return now


def noted(states: Iterable[InstanceState]) -> frozenset[str]:
    """The partitions of which it is known that the master knows nothing of their instance. Pure."""
    return frozenset(one.partition for one in states if one.dropped and one.life != "destroying")


def open_cases(states: Iterable[InstanceState]) -> list[str]:
    """What ``partitiond status`` says of them. Pure."""
    return [
        f"{one.partition}: {error}; {error.hint}"
        for one in states
        if one.dropped and one.life != "destroying" and (error := _error(one))
    ]


def _error(state: InstanceState) -> PartitiondError:
    name = state.title.rpartition("/")[2] or state.instance_guid or "its instance"
    if state.rival:
        message = f"the master gives it to another instance ({state.rival}), but never asked for the end of {name}, which stays"
        hint = "give the other one another partition, or end what is there"
    else:
        message = (
            f"the master lists it as free, but never asked for the end of {name}, which goes on as it was"
        )
        hint = "restore the master, or request the instance anew, or end it"
    return PartitiondError(
        CODE,
        message,
        resource=state.partition,
        hint=f"{hint}: partitiond sync instances --force --partition {state.partition}",
        retryable=True,
    )


def _record(context: Context, state: InstanceState, what: str, message: str, hint: str = "") -> None:
    context.events.record(
        f"instance.{what}",
        f"{state.partition}: {message}",
        partition=state.partition,
        resource=f"instance/{state.partition}",
        instance_guid=state.instance_guid,
        software_release=state.software_release,
        **({"hint": hint} if hint else {}),
    )
