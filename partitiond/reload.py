"""Taking an edited configuration into force while the daemon runs.

Promises: a file that cannot be used changes nothing, and the configuration in force stays; passes that are under way end with
the one they began with.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from partitiond import config as configuration
from partitiond import converge
from partitiond.errors import FAMILY, PartitiondError, sentence

if TYPE_CHECKING:
    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.node_plan import Observation, Plan

logger = logging.getLogger(__name__)

# the daemon holds locks, sockets and databases below the directories; the identity is that of what it remembers
_FIXED = (
    ("slapos", "computer_id"),
    ("slapos", "software_root"),
    ("slapos", "instance_root"),
    ("partitiond", "state_dir"),
    ("partitiond", "run_dir"),
)


def reload(context: Context, *, force: bool = False) -> tuple[Observation, Plan] | None:
    """Read the configuration again; None when it says what is in force already. With ``force`` also one without busy
    partitions.

    What is returned is the look at the node by which the new configuration was found possible: good for
    :func:`partitiond.converge.apply` while the caller holds ``applying``, who sees to it that a look at everything follows.

    Raises a family error: ``config.*`` for a file that is bad, ``config.needs_restart`` for a key that cannot change while
    the daemon runs, or what stands in the way of a node such as the file wants it. The old configuration stays then.
    """
    before = context.current
    try:
        new = configuration.load(before.config.file)
        if new == before.config:
            return None
        refuse_fixed(before.config, new)
        look = _take(context, new, force=force)
    except FAMILY as error:
        message = f"{sentence(error)}; the configuration of before stays in force"
        logger.warning("%s", message)
        context.events.record(
            "config.refused", message, resource=error.resource, code=error.code, hint=error.hint
        )
        raise
    for warning in new.warnings:
        logger.warning("%s", warning)
    message = f"{new.file} is in force, with {new.partition_amount} partitions"
    logger.info("%s", message)
    context.events.record("config.reloaded", message, resource=str(new.file))
    return look


def refuse_fixed(old: Config, new: Config) -> None:
    """Raises PartitiondError ``config.needs_restart``."""
    for section, key in _FIXED:
        if getattr(old, key) != getattr(new, key):
            raise PartitiondError(
                "config.needs_restart",
                f"[{section}] {key} cannot change from {getattr(old, key)} to {getattr(new, key)} while the daemon runs",
                resource=str(new.file),
                hint=f"restart the daemon, or set {key} back",
            )


def _take(context: Context, new: Config, *, force: bool) -> tuple[Observation, Plan]:
    """Put it into force if a plan can be made with it: whoever asked is told now what stands in the way, not the log later."""
    with context.applying:
        before, node = context.current, context.node
        # where there are but more or fewer of them, what those that stay have on disk was right in the last sweep
        same = replace(new, partition_amount=before.config.partition_amount)
        done = converge.recently(context, before.config) if same == before.config else None
        context.adopt(new)
        try:
            seen = converge.observe(context, again=done is not None)
            return seen, converge.plan(context, seen, force=force, done=done, anew=True)
        except FAMILY:
            context.current, context.node = before, node
            raise
