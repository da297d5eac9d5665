"""The verb ``try``: apply under guard, and take it back by itself unless it is confirmed in time.

Promises: nothing is changed before the new state and the way back are both known to be possible and the guardian is there; an
apply that fails is taken back at once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from partitiond import converge, guardian, last_good, rollback, trial, users
from partitiond.errors import FAMILY, PartitiondError, sentence
from partitiond.node_plan import Outcome

if TYPE_CHECKING:
    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.node_plan import Observation, Plan
    from partitiond.trial import Trial

logger = logging.getLogger(__name__)


def run(
    context: Context,
    new: Config,
    timeout: float,
    *,
    force: bool = False,
    before: Config | None,
    lasting: bool,
) -> tuple[Trial | None, Outcome]:
    """Put ``new`` into force on trial for ``timeout`` seconds; no trial when there is nothing to do.

    ``before`` is what to go back to, None for a node that is none yet. ``lasting``: this process goes on afterwards, as the
    daemon does, and must not be ended. Raises a family error when nothing was done, or ``trial.failed`` when it was taken back
    at once; the context has the configuration of before then.
    """
    with context.applying:
        refused = _prepare(context, new, before, force=force)
        if refused is not None:
            return None, refused
        begun = trial.begin(new, timeout, before=before is not None, memory=context.store.memory())
        try:
            with guardian.guarded(
                new.state_dir, begun.id, trial.log_path(new.state_dir), may_be_killed=not lasting
            ):
                outcome = _apply(context, begun, force=force, lasting=lasting)
                pending = trial.applied(new.state_dir, begun)
                message = f"{begun.config} is on trial for {timeout:g} s"
                context.events.record("trial.begun", message, resource=begun.config)
                return pending, outcome
        except PartitiondError as error:
            if error.code == "trial.no_guardian":
                trial.abandon(new.state_dir)
                _put_back(context, before)
            raise


def _put_back(context: Context, before: Config | None) -> None:
    if before is not None:
        context.adopt(before)


def _prepare(context: Context, new: Config, before: Config | None, *, force: bool) -> Outcome | None:
    """Take ``new`` into force if a plan can be made with it, and one for the way back; an outcome when nothing is to do."""
    node = context.node
    try:
        _check_way_back(context, new, before)
        context.adopt(new)
        seen = converge.observe(context)
        todo = converge.plan(context, seen, force=force)
        if todo:
            _refuse_adopting(new, seen, todo)
            if before is not None:
                last_good.save(before)
            return None
        _put_back(context, before)
        return Outcome(refused=todo.refused, stands=True)
    except FAMILY:
        _put_back(context, before)
        context.node = node
        raise


def _refuse_adopting(new: Config, seen: Observation, todo: Plan) -> None:
    """Refuse to make others' users, taps and addresses our own on trial: taken back, they would be gone.

    Raises PartitiondError ``trial.no_way_back``.
    """
    people = [one.id for one in todo.users if one.spec and not _is_ours(seen, one.spec.name)]
    network = [one.id for one in todo.network if "not marked as ours" in one.reason]
    found = [*people, *network]
    if found:
        more = f" and {len(found) - 1} more" if found[1:] else ""
        raise PartitiondError(
            "trial.no_way_back",
            f"{found[0]}{more} was made by somebody else and would become a part of this node, but no more what it was",
            resource=str(new.file),
            hint="put it into force once without a trial: partitiond apply",
        )


def _is_ours(seen: Observation, name: str) -> bool:
    user = seen.users.users.get(name)
    return user is None or user.ours


def _check_way_back(context: Context, new: Config, before: Config | None) -> None:
    """Raises PartitiondError ``trial.no_way_back``."""
    if before is None:
        ours = sorted(user.name for user in users.observe().users.values() if user.ours)
        if ours:
            raise PartitiondError(
                "trial.no_way_back",
                f"this is a node already ({ours[0]} is a user of it), and it is not known by what configuration",
                resource=str(new.file),
                hint="put the configuration of before into force once: partitiond apply",
            )
        return
    context.adopt(before)
    try:
        converge.plan(context, converge.observe(context))
    except FAMILY as error:
        raise PartitiondError(
            "trial.no_way_back",
            f"what is in force now could not be put back: {sentence(error)}",
            resource=str(new.file),
            hint="make that possible, or go on without a trial: partitiond apply",
        ) from error


def _apply(context: Context, begun: Trial, *, force: bool, lasting: bool) -> Outcome:
    """Apply; what single tenants run may be in trouble, as it may have been before.

    Raises PartitiondError ``trial.failed`` after taking it back.
    """
    cause: Exception | None = None
    try:
        outcome = converge.apply(context, force=force)
        if outcome.stands:
            return outcome
        found = [f"{name}: {sentence(error)}" for name, error in outcome.failures]
        found = found or [f"{one.id}: {one.reason}" for one in outcome.left]
        why = f"it could not be applied: {found[0]}" + (f"; {len(found) - 1} more" if found[1:] else "")
    except (*FAMILY, OSError) as error:
        cause, why = error, f"it could not be applied: {sentence(error)}"
    whole = _taken_back(context, begun, why, lasting=lasting)
    raise PartitiondError(
        "trial.failed",
        why + ("; everything is as it was before" if whole else "; it is still being taken back"),
        resource=begun.config,
        hint="correct the configuration, then try again"
        if whole
        else "partitiond status says how it goes on",
    ) from cause


def _taken_back(context: Context, begun: Trial, why: str, *, lasting: bool) -> bool:
    """Take it back; whether that is done. What is left is the daemon's, or the guardian's."""
    try:
        outcome = rollback.roll_back(context, begun.id, why, last=lasting)
    except (*FAMILY, OSError) as error:
        logger.warning("cannot take it back yet: %s", sentence(error))
        return False
    return outcome is None or outcome.stands
