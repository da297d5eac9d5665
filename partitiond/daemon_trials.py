"""What the daemon does about trials: it takes them, takes them back, and watches their end beside the guardian.

The lock on the node is the daemon's for as long as it lives, so the guardian asks it (``POST /1/rollback``). Should the
guardian be killed, the converge lane takes the trial back.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from partitiond import config as configuration
from partitiond import last_good, reload, request_body, rollback, trial, verbs
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from partitiond.context import Context

logger = logging.getLogger(__name__)

_AFTER_GUARDIAN = 1.0  # seconds after the end of a trial in which the guardian comes first


class Trials:
    """``reloaded`` is called when another configuration is in force; ``give_up`` is the end of the daemon around a block."""

    def __init__(
        self,
        context: Context,
        wake: Callable[[], None],
        reloaded: Callable[[], None],
        give_up: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._context, self._wake, self._reloaded, self._give_up = context, wake, reloaded, give_up
        self._open = False

    def begin(self) -> None:
        """Put into force what has to be: not always what the file says.

        Raises PartitiondError ``trial.rejected`` when there is nothing that could be.
        """
        context, file_says = self._context, self._context.config
        with context.applying:
            self._arm(rollback.settle(context))
            last_good.refuse_rejected(file_says)
            context.adopt(rollback.in_force(file_says))
            if context.config != file_says:
                found = last_good.is_rejected(file_says)
                other = f"the configuration on trial is in force, not what {file_says.file} says"
                logger.warning("%s", found.sentence() if found else other)
                self._reloaded()

    def _arm(self, found: trial.Trial | None) -> None:
        """Have the converge lane look when a trial ends."""
        self._open = found is not None
        if found is not None:
            timer = threading.Timer(found.seconds_left() + _AFTER_GUARDIAN, self._wake)
            timer.daemon = True  # the process does not wait for it when it ends
            timer.start()

    def look(self) -> None:
        """Take back a trial that has ended. Raises a family error when nothing can be done."""
        context = self._context
        if not trial.is_open(context.config.state_dir):
            if self._open:  # it was confirmed
                self._open = False
                self._reloaded()
            return
        with context.applying:
            found = trial.read(context.config.state_dir)
            if found is None:
                return
            if found.state == "confirmed":
                trial.finish_confirmed(context.config.state_dir)
                return
            why = found.cut_off()
            if why and found.before:
                self._take_back(found.id, why)
        if why and not found.before:
            # by another thread: it waits for the end of every lane, and this may be one
            threading.Thread(target=self._take_down, args=(found.id, why), daemon=True).start()

    def confirmed(self) -> dict[str, Any]:
        """What ``confirm`` tells, so that the master is told, too."""
        self.look()
        return {}

    def refuse_other(self) -> None:
        """Refuse another configuration than the one on trial. Raises ``trial.pending``; first ends what has ended."""
        if trial.is_open(self._context.config.state_dir):
            self.look()
            rollback.refuse_other(configuration.load(self._context.config.file))

    def refuse_reload(self) -> None:
        """As :meth:`refuse_other`, and what was rejected needs to be put into force by word. Raises ``trial.rejected``."""
        self.refuse_other()
        state_dir = self._context.config.state_dir
        found = last_good.rejected(state_dir)
        if found and found.fingerprint == last_good.fingerprint(
            configuration.load(self._context.config.file)
        ):
            raise PartitiondError(
                "trial.rejected",
                found.sentence(),
                resource=found.config,
                hint="partitiond apply puts it into force all the same",
            )

    def try_out(self, body: dict[str, Any]) -> dict[str, Any]:
        """``try``, by the file as it is now."""
        context = self._context
        request_body.check({key: body[key] for key in body if key != "timeout"}, force=bool)
        timeout = body.get("timeout")
        if not isinstance(timeout, int | float) or timeout <= 0:
            raise PartitiondError("control.body", "timeout is no number of seconds", resource="try")
        with context.applying:
            self.look()
            before = context.config
            new = configuration.load(before.file)
            trial.refuse_pending(trial.read(before.state_dir))
            reload.refuse_fixed(before, new)
            try:
                return verbs.try_out(
                    context, new, timeout, force=bool(body.get("force")), before=before, lasting=True
                )
            finally:
                self._reloaded()
                self._arm(trial.read(before.state_dir))

    def roll_back(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the guardian asks for."""
        found, why = trial.read(self._context.config.state_dir), str(body.get("why"))
        if found is not None and found.id == body.get("id"):
            (self._take_back if found.before else self._take_down)(found.id, why)
        return {}

    def _take_back(self, identity: str, why: str) -> None:
        with self._context.applying:
            # what is left the sweep goes on with
            rollback.roll_back(self._context, identity, why, last=True)
            self._reloaded()

    def _take_down(self, identity: str, why: str) -> None:
        """Without a configuration to go back to there is nothing left for a daemon to do."""
        with self._give_up():
            rollback.roll_back(self._context, identity, why, last=True)
