"""A pass of the converge lane: what is other than it should be is found, told, repaired, and told again.

Promises: each drift is told once, however long it takes to mend; what fights with us is answered ever more seldom, and told.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from netplan import filter_state
from partitiond import converge
from partitiond.errors import FAMILY, sentence
from partitiond.refusal import as_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from partitiond.context import Context
    from partitiond.metrics import Tally
    from partitiond.node_plan import Observation, Outcome, Plan
    from partitiond.operation import AnyOperation
    from partitiond.refusal import Refusal
    from partitiond.watch import Watch
    from stunnel_mgr.model import Refused

logger = logging.getLogger(__name__)

_MOST_REFUSED = 20  # of a partition and pass
_NAMED = 3  # so many of a kind are named in a message


class Healer:
    """Repairs drift, and remembers what it told already."""

    def __init__(self, context: Context, watch: Watch, tally: Tally) -> None:
        self._context, self.watch, self._tally = context, watch, tally
        self._told: frozenset[tuple[str, str]] = frozenset()
        self._refused: frozenset[tuple[str, str]] = frozenset()
        self._failed = ""
        # what each look of a pass answers; from the second on mostly notices of the pass's own work
        self._looks: list[dict[str, float]] = []
        context.looking, context.links = self._look, watch.links

    def _look(self) -> None:
        self._looks.append(self.watch.take())

    def run(self) -> None:
        """Look at the node, and repair what is to be repaired. Raises a family error when nothing can be done at all."""
        context = self._context
        # what somebody else is in the midst of changing is no drift
        with context.applying, context.steady():
            self._looks.clear()
            found: tuple[AnyOperation, ...] = ()
            try:
                seen, todo = converge.look(context)
                found = tuple(todo)
                self.tell_refused(todo.refused)
                outcome = self._repair(seen, todo, found, self._answered()) if found else None
                if outcome is None:
                    filter_state.keep(seen.network.filter)
            except FAMILY as error:
                self._tell_failed(error)
                raise
            finally:
                self._strike(self._answered(), found)
            self._failed = ""
            self._told = frozenset((one.id, one.reason) for one in outcome.left) if outcome else frozenset()

    def _answered(self) -> dict[str, float]:
        return self._looks[0] if self._looks else {}

    def _repair(
        self,
        seen: Observation,
        todo: Plan,
        found: Sequence[AnyOperation],
        causes: Mapping[str, float],
    ) -> Outcome:
        context = self._context
        new = [one for one in found if (one.id, one.reason) not in self._told]
        self._tally.drift(Counter(one.resource for one in new))
        self._tell("drift.found", new)
        outcome = converge.apply(context, first=(seen, todo))
        bad = {name for name, _ in outcome.failures} | {one.id for one in outcome.left}
        noticed = min(causes.values(), default=None)
        seconds = None if noticed is None else round(time.monotonic() - noticed, 3)
        self._tell("drift.repaired", [one for one in found if one.id not in bad], seconds)
        self._tell("drift.failed", [one for one in new if one.id in bad], seconds, dict(outcome.failures))
        return outcome

    def _tell(
        self,
        event: str,
        operations: Iterable[AnyOperation],
        seconds: float | None = None,
        errors: Mapping[str, Exception] | None = None,
    ) -> None:
        """Record one event for each kind of resource, with all partitions that are affected."""
        kinds: dict[str, list[AnyOperation]] = {}
        for operation in operations:
            kinds.setdefault(operation.resource, []).append(operation)
        for kind, ones in kinds.items():
            partitions = self._affected(ones)
            reason = _together([one.reason for one in ones])
            why = _together([sentence(errors[one.id]) for one in ones if one.id in errors]) if errors else ""
            message = f"{_together([one.id for one in ones])}: {reason}"
            message += f"; {why}" if why else ""
            message += f"; {seconds:.3f} s after the kernel told of it" if seconds is not None else ""
            log = logger.info if event == "drift.repaired" else logger.warning
            log("%s: %s", event.replace(".", " "), message)
            self._context.events.record(
                event,
                message,
                partition=partitions[0] if len(partitions) == 1 else None,
                resource=ones[0].id if len(ones) == 1 else kind,
                operations=[one.id for one in ones],
                partitions=partitions,
                reason=reason,
                seconds=seconds,
            )

    def _affected(self, operations: Sequence[AnyOperation]) -> list[str]:
        """The partitions of some operations; what belongs to the whole node affects all of them."""
        node = self._context.node
        if node is not None and any(one.partition is None for one in operations):
            return [partition.id for partition in node.partitions]
        return list(dict.fromkeys(one.partition for one in operations if one.partition))

    def tell_refused(self, refused: Iterable[Refused | Refusal]) -> None:
        """Record what is newly refused; it may come and go while the node runs, as disks do."""
        now = {(one.name, one.reason): one for one in refused}
        count: Counter[str] = Counter()
        for key, one in now.items():
            if key in self._refused:
                continue
            count[one.partition] += 1
            if count[one.partition] > _MOST_REFUSED:  # a tenant may have a thousand, and others each minute
                continue
            logger.warning("%s: refused: %s", one.name, one.reason)
            wish = as_json(one)
            kind = wish["resource"]
            self._context.events.record(
                f"{kind}.refused",
                f"{one.name}: {one.reason}",
                partition=one.partition or None,
                resource=f"{kind}/{one.name}",
                reason=one.reason,
                code=wish["code"],
                hint=wish["hint"],
            )
        for partition, all_of_it in count.items():
            if all_of_it > _MOST_REFUSED:
                logger.warning("%s: refused: %d more", partition, all_of_it - _MOST_REFUSED)
        self._refused = frozenset(now)

    def _tell_failed(self, error: Exception) -> None:
        """Record that nothing could be done; once, while it is the same."""
        text = sentence(error)
        if text != self._failed:
            self._failed = text
            details: dict[str, Any] = (
                {"code": error.code, "hint": error.hint} if isinstance(error, FAMILY) else {}
            )
            self._context.events.record("drift.failed", text, **details)

    def _strike(self, causes: Mapping[str, float], found: Sequence[AnyOperation]) -> None:
        """Count this pass for what led to it, and tell what is held back from now on."""
        fights = sorted(self.watch.strike(causes))
        if not fights:
            return
        partitions = self._affected([one for one in found if one.id in fights])
        message = f"{_together(fights)} changes again and again; it is repaired ever more seldom, up to once a minute"
        hint = "find out who else manages it (ip monitor, nft monitor) and make them leave it alone"
        logger.warning("drift fight: %s; %s", message, hint)
        self._context.events.record(
            "drift.fight",
            message,
            partition=partitions[0] if len(partitions) == 1 else None,
            resource=fights[0] if len(fights) == 1 else fights[0].partition("/")[0],
            operations=fights,
            partitions=partitions,
            hint=hint,
        )


def _together(texts: Sequence[str]) -> str:
    """The first few of some texts, and how many more there are."""
    different = list(dict.fromkeys(texts))
    more = len(different) - _NAMED
    return ", ".join(different[:_NAMED]) + (f" and {more} more" if more > 0 else "")
