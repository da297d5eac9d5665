"""Instances that a node makes anew, as it has lost what it had: those that use them are to hear of it.

An instance of a rebuilt node has new keys, certificates and passwords, and publishes them; the master tells those who requested
it when it has something new for them, but slapproxy only those on the same node. So the whole tree is processed anew, once,
when the instance is up: then what one publishes and the other one allows is exchanged within two passes.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from partitiond import published
from partitiond.passes import report

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from partitiond.context import Context
    from partitiond.node import Partition
    from partitiond.passes import Result
    from partitiond.state import InstanceState
    from slap_client.documents import PartitionDocument

logger = logging.getLogger(__name__)

_PATIENCE = 3  # tries of one that fails
_INSTALLED = ".installed.cfg"  # buildout's, of what it has made
_MESSAGE = "The node was rebuilt; the instance in partition {} was made anew, and so is what it publishes"


def is_lost(partition: Partition, entry: PartitionDocument) -> bool:
    """Whether an instance that nobody here knows is to be made anew on a node that had it: the master has what it published.

    What slapgrid left in the partition is there. Yet tunnels' identities are not kept with an instance: who published one
    publishes another.
    """
    if not entry.connection:
        return False
    return bool(published.certificates(entry)) or not os.path.lexists(partition.path / _INSTALLED)


def ready(tree: Iterable[InstanceState]) -> list[str]:
    """Those of a tree that have published what they do by now; none as long as others are about to. Pure."""
    up = []
    for state in tree:
        if state.life in ("started", "stopped") or (state.life == "failed" and state.by_promise):
            up.append(state.partition)
        elif state.life == "failed" and state.failures < _PATIENCE:
            return []
    return up


def tell(context: Context, wanted: Mapping[str, PartitionDocument], result: Result) -> None:
    """Bang once for each tree of which instances were made anew and are up, when none of it is still to come here.

    What the master does not take is told after the next pass. One that goes on failing is not waited for; it has a turn of its
    own when it is up.
    """
    states = [one for one in context.store.readable()[0].values() if one.rebuilt]
    trees: dict[str, list[InstanceState]] = {}
    for state in states:
        entry = wanted.get(state.partition)
        root = (entry.root_instance_title or entry.instance_guid) if entry else ""
        trees.setdefault(root or state.partition, []).append(state)
    for tree in trees.values():
        names = ready(tree)
        if not names or context.stop.is_set():
            continue
        first = min(names)
        if not report(lambda name=first: context.client.bang(name, _MESSAGE.format(name)), first):  # type: ignore[misc]
            continue
        for name in names:
            with context.applying:
                context.store.save_instance(replace(context.store.instance(name), rebuilt=False))
        whole = ", ".join(names)
        result.done.append(f"{whole}: made anew; those of the same tree are told")
        logger.info(
            "%s: made anew on a node that had lost what it had; those of the same tree are told", whole
        )
        context.events.record(
            "instance.rebuilt",
            f"{whole}: made anew, as the node had lost what it had; those of the same tree are told",
            resource="instance",
            partitions=names,
        )
        context.wake_instances()
