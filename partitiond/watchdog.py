"""The watchdog: a program of ``etc/service`` that ends is told to the master, and comes back whether that answers or not.

As in slapgrid (slapos.core 1.26) supervisord does not start such a program again: the master is banged, issues another
timestamp, and the instance is processed anew, which starts it. As there, once for each deployment. Beyond it: a program that
ends again and again is told ever more seldom; where the master does not answer, or says nothing new for some seconds, the
program is started again as it is, ever more seldom as well; and however many end at once, the master hears a few a minute.

Whoever is woken looks at the processes anew: events say when to look, the processes what is so.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from partitiond import dropped, files
from partitiond.errors import PartitiondError, sentence
from partitiond.incidents import WATCHED
from partitiond.passes import Result
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from partitiond.context import Context
    from partitiond.state import InstanceState
    from partitiond.supervision import Process

logger = logging.getLogger(__name__)

_ENDED = frozenset(("EXITED", "FATAL", "UNKNOWN"))
FIRST_BANG, FIRST_START, LONGEST = 60.0, 15.0, 3600.0
CALM = 600.0  # who has run so long is in order again
MOST_BANGS, BANG_SECONDS = 10, 60.0  # of the node
_DOUBLINGS = 10
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Trouble:
    """What was done about the programs of a partition that ended: times are Unix seconds, counts those since it was calm.

    ``told`` is the deployment (its instance and the master's timestamp) that the master has been banged for.
    """

    told: str = ""
    bangs: int = 0
    banged_at: float = 0.0
    starts: int = 0
    started_at: float = 0.0
    seen_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done now, and in how many seconds to look again; ``trouble`` None: it is over."""

    trouble: Trouble | None
    bang: bool = False
    start: bool = False
    again: float | None = None


def decide(before: Trouble | None, *, down: bool, deployment: str, now: float) -> Decision:
    """What to do about one partition. Pure."""
    trouble = before or Trouble()
    if not down:
        last = max(trouble.seen_at, trouble.banged_at, trouble.started_at)
        over = before is None or not 0 <= now - last < CALM
        return Decision(None if over else trouble)
    trouble = replace(trouble, seen_at=now)
    untold = deployment != trouble.told
    to_bang = _left(trouble.banged_at, _pause(FIRST_BANG, trouble.bangs), now)
    # while the master is about to have it processed anew, our own start would come in between
    to_start = max(_left(trouble.banged_at, FIRST_START, now), _to_start(trouble, now))
    bang = untold and not to_bang
    start = not bang and not to_start
    later = [one for one in (to_start, to_bang if untold else 0.0) if one]
    return Decision(trouble, bang, start, FIRST_START if bang else min(later, default=FIRST_START))


def _to_start(trouble: Trouble, now: float) -> float:
    return _left(trouble.started_at, _pause(FIRST_START, trouble.starts), now)


def _left(at: float, pause: float, now: float) -> float:
    """Seconds that are left of a pause that began at ``at``; a clock that was set back keeps nobody waiting."""
    return at + pause - now if at <= now < at + pause else 0.0


def _pause(first: float, times: int) -> float:
    return float(min(LONGEST, first * 2 ** min(times - 1, _DOUBLINGS))) if times else 0.0


def down(processes: Iterable[Process], states: Mapping[str, InstanceState]) -> dict[str, list[str]]:
    """The watched programs that ended although they are meant to run, by partition. Pure."""
    found: dict[str, list[str]] = {}
    for process in processes:
        state = states.get(process.group)
        if (
            process.name.endswith(WATCHED)
            and process.state in _ENDED
            and state is not None
            and state.wanted == "started"
            and state.life in ("started", "failed")
        ):
            found.setdefault(process.group, []).append(process.name)
    return {partition: sorted(names) for partition, names in found.items()}


@dataclass(slots=True)
class _Turn:
    """What comes of one look: ``away``, the master does not answer; ``unknown``, it knows
    nothing of the instances there; ``waits``, in how many seconds to look again."""

    result: Result
    after: dict[str, Trouble] = field(default_factory=dict)
    waits: list[float] = field(default_factory=list)
    away: bool = False
    unknown: frozenset[str] = frozenset()


@dataclass(slots=True)
class Watchdog:
    """One look at a time; what was done is remembered below ``state_dir``, so that a daemon that begins anew repeats nothing.

    ``wake_in`` has the next look come after so many seconds.
    """

    context: Context
    wake_in: Callable[[float], None]
    _troubles: dict[str, Trouble] | None = None
    _bangs: list[float] = field(default_factory=list)
    _fresh: threading.Event = field(default_factory=threading.Event)

    def ended(self) -> None:
        """Somebody told that a process ended: look at them anew, soon."""
        self._fresh.set()
        self.wake_in(0.0)

    def run(self) -> Result:
        """Look, and do what is to be done. Raises a family error when supervisord or the states cannot be read."""
        context, result = self.context, Result([], [])
        troubles = self._read()
        states, _ = context.store.readable()
        looked = context.looked.processes if context.looked else ()
        if not (self._fresh.is_set() or troubles or down(looked, states)):
            return result
        self._fresh.clear()
        ended = down(context.supervisor.processes(), states)
        turn = _Turn(result, unknown=dropped.noted(states.values()))
        for partition in sorted(troubles.keys() | ended.keys()):
            if context.stop.is_set():
                return result
            state = states.get(partition)
            deployment = f"{state.instance_guid} {state.timestamp}" if state else ""
            self._one(turn, partition, ended.get(partition, []), troubles.get(partition), deployment)
        self._save(turn.after)
        if turn.waits:
            self.wake_in(max(1.0, min(turn.waits)))
        return result

    def _one(
        self, turn: _Turn, partition: str, names: list[str], before: Trouble | None, deployment: str
    ) -> None:
        """Do what is to be done about one partition."""
        decision = decide(before, down=bool(names), deployment=deployment, now=time.time())
        trouble, start = decision.trouble, decision.start
        if trouble is None:
            return
        if decision.bang:
            told = (
                not turn.away
                and partition not in turn.unknown
                and self._may_bang()
                and self._bang(turn, partition, names)
            )
            now = time.time()
            if told:
                trouble = replace(trouble, told=deployment, bangs=trouble.bangs + 1, banged_at=now)
            # who cannot be told of, or not yet, does not wait for it
            start = not told and not _to_start(trouble, now)
        if start:
            trouble = replace(trouble, starts=trouble.starts + 1, started_at=time.time())
            self._start(turn.result, partition, names)
        turn.after[partition] = trouble
        turn.waits += [decision.again] if decision.again else []

    def _may_bang(self) -> bool:
        """Whether the master may hear another one now."""
        now = time.monotonic()
        self._bangs = [at for at in self._bangs if now - at < BANG_SECONDS]
        return len(self._bangs) < MOST_BANGS

    def _bang(self, turn: _Turn, partition: str, names: list[str]) -> bool:
        """Bang; whether the master took it."""
        self._bangs.append(time.monotonic())
        message = f"{_words(names)} in partition {partition} encountered a problem"
        try:
            self.context.client.bang(partition, message)
        except SlapError as error:
            turn.away = error.retryable  # nobody else waits for it in this turn
            logger.warning(
                "%s: %s ended; the master is not told: %s", partition, _words(names), sentence(error)
            )
            return False
        self._tell(turn.result, "watchdog.banged", partition, f"{_words(names)} ended; the master is told")
        self.context.wake_instances()
        return True

    def _start(self, result: Result, partition: str, names: list[str]) -> None:
        """Start again what ended, as it is."""
        context = self.context
        try:
            with context.applying:
                state = context.store.instance(partition)
                if state.wanted != "started" or context.supervisor.group_text(partition) is None:
                    return
                context.supervisor.start_group(partition)
        except PartitiondError as error:
            result.failures.append((partition, error))
            logger.warning("%s: %s cannot be started again: %s", partition, _words(names), sentence(error))
            return
        self._tell(result, "watchdog.started", partition, f"{_words(names)} started again")

    def _tell(self, result: Result, event: str, partition: str, what: str) -> None:
        result.done.append(f"{partition}: {what}")
        logger.warning("%s: %s", partition, what)
        self.context.events.record(
            event, f"{partition}: {what}", partition=partition, resource=f"instance/{partition}"
        )

    # --- memory

    @property
    def _path(self) -> Path:
        return self.context.config.state_dir / "watchdog.json"

    def _read(self) -> dict[str, Trouble]:
        if self._troubles is None:
            self._troubles = read(self._path)
        return self._troubles

    def _save(self, troubles: dict[str, Trouble]) -> None:
        """Remember; what is seen again and again is written only when something was done."""
        before = {name: replace(one, seen_at=0.0) for name, one in self._read().items()}
        self._troubles = troubles
        if {name: replace(one, seen_at=0.0) for name, one in troubles.items()} == before:
            return
        try:
            if troubles:
                content = json.dumps({name: asdict(one) for name, one in troubles.items()}, sort_keys=True)
                files.write_path(self._path, content.encode(), mode=0o600)
            else:
                files.remove_path(self._path)
        except OSError as error:
            logger.warning("what the watchdog did is not kept: %s", error)


def read(path: Path) -> dict[str, Trouble]:
    """What is remembered; what cannot be read is as if nothing had been done."""
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_bytes())
        return {name: Trouble(**one) for name, one in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is not heeded: %s", path, error)
        return {}


def _words(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
