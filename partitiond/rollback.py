"""Taking a trial back: what was in force before it is in force again, or, where there was nothing, nothing is.

Whoever calls holds the node (its lock, or in the daemon ``applying``), so what is still ``applying`` then was cut off.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import last_good, trial
from partitiond.errors import FAMILY, PartitiondError, sentence

if TYPE_CHECKING:
    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.node_plan import Outcome
    from partitiond.trial import Trial

logger = logging.getLogger(__name__)


def settle(context: Context) -> Trial | None:
    """Finish a trial that has ended but was never finished; return the one that goes on, or None.

    What cannot be taken back is logged: whoever holds the node now is about to change it anyway.
    """
    state_dir = context.config.state_dir
    found = trial.read(state_dir)
    if found is not None and found.state == "confirmed":
        trial.finish_confirmed(state_dir)
        return None
    why = found.cut_off() if found else ""
    if found is None or not why:
        return found
    logger.warning("%s was on trial: %s; first of all it is taken back", found.config, why)
    try:
        roll_back(context, found.id, why, last=True)
    except (*FAMILY, OSError) as error:
        logger.error("cannot take it back: %s", sentence(error))  # noqa: TRY400 - no traceback in people's words
        _close(context, found, why, sentence(error))
    return None


def _close(context: Context, found: Trial, why: str, problem: str) -> None:
    claimed = trial.claim(context.config.state_dir, found.id, why)
    if claimed is not None:
        _tell(context, trial.close(context.config.state_dir, claimed, [problem]))


def roll_back(context: Context, identity: str, why: str, *, last: bool) -> Outcome | None:
    """Take a trial back; None when it was confirmed, or taken back by somebody else.

    The context has the configuration of before then, where there was one. When something of people, directories or network is
    left, the trial stays open for the next attempt, unless this is the ``last``. Raises a family error when nothing can
    be done at all; then it stays open.
    """
    from partitiond import converge, teardown  # noqa: PLC0415 - a quarter of a second that verbs that only read do without

    with context.applying:
        state_dir = context.config.state_dir
        claimed = trial.claim(state_dir, identity, why)
        if claimed is None:
            return None
        context.store.restore(claimed.memory)
        if claimed.before:
            context.adopt(_before(state_dir, Path(claimed.config)))
            # an instance that the trial made room for has no room any more
            outcome = converge.apply(context, force=True)
        else:
            context.adopt(last_good.read(trial.tried_path(state_dir), Path(claimed.config)))
            outcome = teardown.run(context, purge=False)
        left = [*(operation.id for operation in outcome.left), *(name for name, _ in outcome.failures)]
        for name, error in outcome.failures:
            logger.warning("%s: %s", name, sentence(error))
        if last or outcome.stands:
            _tell(context, trial.close(state_dir, claimed, dict.fromkeys(left)))
        return outcome


def _tell(context: Context, rejected: last_good.Rejected) -> None:
    logger.warning("%s", rejected.sentence())
    context.events.record(
        "trial.rolled_back", rejected.sentence(), resource=rejected.config, reason=rejected.why
    )


def _before(state_dir: Path, file: Path) -> Config:
    found = last_good.load(state_dir, file)
    if found is None:
        raise PartitiondError(
            "trial.no_way_back",
            "the last good configuration is gone",
            resource=str(last_good.path_of(state_dir)),
            hint="put it back, or put another configuration into force: partitiond apply",
        )
    return found


# --- what is in force ---------------------------------------------------------------------------------------------------


def in_force(config: Config) -> Config:
    """The configuration in force on a node whose file says ``config``: not always that one.

    One that was rejected and has no other in its place is returned as it is: see :func:`last_good.refuse_rejected`.
    """
    state_dir = config.state_dir
    found = trial.read(state_dir)
    if found is not None and found.state in ("applying", "pending"):
        if found.fingerprint == last_good.fingerprint(config):
            return config
        return last_good.read(trial.tried_path(state_dir), config.file)
    if (found is not None and found.state == "rolling back") or last_good.is_rejected(config):
        return last_good.load(state_dir, config.file) or config
    return config


def refuse_other(config: Config) -> None:
    """Refuse to put another configuration into force than the one that is on trial. Raises ``trial.pending``."""
    found = trial.read(config.state_dir)
    if found is not None and found.fingerprint != last_good.fingerprint(config):
        trial.refuse_pending(found)
