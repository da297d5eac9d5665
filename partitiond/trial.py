"""The record of a trial: a configuration that is in force until it is confirmed, or else taken back.

    (none) ──begin──▶ applying ──applied──▶ pending ──confirm──▶ confirmed ──▶ (none), and it is the last good one
                         │                     │
                         └───────claim─────────┴──▶ rolling back ──close──▶ (none), and it is rejected

Promises: each step is taken by exactly one program, so that a confirmation and a rollback cannot both win; a program that is
killed at any moment leaves one of these states and never half of one; the time runs on while the machine is suspended
(CLOCK_BOOTTIME), and a restart of the machine ends it.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import json
import os
import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partitiond import files, last_good
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from partitiond.config import Config

State = Literal["applying", "pending", "confirmed", "rolling back"]

LONGEST_APPLY = 120.0
"""Seconds after which an apply that is on trial counts as one that hangs."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial. ``deadline`` is in seconds of CLOCK_BOOTTIME of the boot ``boot_id``; ``timeout`` in seconds.

    ``before``: there is a last good configuration to go back to. ``memory`` is what the store remembered of addresses before.
    """

    id: str
    state: State
    boot_id: str
    deadline: float
    timeout: float
    config: str
    fingerprint: str
    before: bool
    memory: Mapping[str, str | None] = field(default_factory=dict)
    why: str = ""

    def seconds_left(self) -> float:
        """Seconds until it is taken back; 0 when they are over, or the machine was restarted meanwhile."""
        if self.boot_id != _boot_id():
            return 0.0
        return max(0.0, self.deadline - now())

    def ended(self) -> str:
        """Why it has to be taken back by whoever is allowed to change the node now; empty as long as it goes on."""
        if self.state in ("rolling back", "confirmed"):
            return self.why
        if self.boot_id != _boot_id():
            return "the machine was restarted before it was confirmed"
        if self.state == "pending" and not self.seconds_left():
            return f"it was not confirmed within {self.timeout:g} s"
        return ""

    def cut_off(self) -> str:
        """Why it has to be taken back when nobody is applying it; empty when it was applied."""
        return "its apply was cut off" if self.state == "applying" else self.ended()


def now() -> float:
    """Seconds since the machine was started, those of its sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _boot_id() -> str:
    return _BOOT_ID.read_text("ascii").strip()


def _path(state_dir: Path) -> Path:
    return state_dir / "trial.json"


def tried_path(state_dir: Path) -> Path:
    """Where the configuration that is on trial lies."""
    return state_dir / "tried.cfg"


def is_open(state_dir: Path) -> bool:
    """Whether there is a trial. Cheap."""
    return _path(state_dir).exists()


def read(state_dir: Path) -> Trial | None:
    """The trial, or None. Raises PartitiondError ``state.damaged``."""
    try:
        found = json.loads(_path(state_dir).read_bytes())
        # keys of a later version are left out, so that one can go back
        return Trial(**{one.name: found[one.name] for one in dataclasses.fields(Trial) if one.name in found})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise PartitiondError(
            "state.damaged",
            f"cannot be read: {error}",
            resource=str(_path(state_dir)),
            hint="remove it; then partitiond apply puts the configuration into force",
        ) from error


@contextmanager
def _turn(state_dir: Path) -> Iterator[int]:
    """Take a step alone; yields the directory. No work is done meanwhile, so nobody waits for long."""
    descriptor = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _write(state_dir: Path, trial: Trial) -> Trial:
    content = json.dumps(dataclasses.asdict(trial), sort_keys=True).encode()
    try:
        files.write_path(_path(state_dir), content, mode=0o600)
    except FileNotFoundError:
        # who has just taken the node over from somebody killed removes temporary files; a confirmation does not wait for it
        files.write_path(_path(state_dir), content, mode=0o600)
    return trial


def _remove(state_dir: Path) -> None:
    """The record goes first: a configuration without it means nothing."""
    _path(state_dir).unlink(missing_ok=True)
    tried_path(state_dir).unlink(missing_ok=True)


# --- the steps --------------------------------------------------------------------------------------------------------


def begin(config: Config, timeout: float, *, before: bool, memory: Mapping[str, str | None]) -> Trial:
    """Begin, before anything is changed. Raises PartitiondError ``trial.pending``."""
    state_dir = config.state_dir
    with _turn(state_dir):
        refuse_pending(read(state_dir))
        last_good.write(tried_path(state_dir), config)
        trial = Trial(
            id=secrets.token_hex(8),
            state="applying",
            boot_id=_boot_id(),
            deadline=now() + max(timeout, LONGEST_APPLY),
            timeout=timeout,
            config=str(config.file),
            fingerprint=last_good.fingerprint(config),
            before=before,
            memory=memory,
        )
        return _write(state_dir, trial)


def refuse_pending(found: Trial | None) -> None:
    """Raises PartitiondError ``trial.pending`` when there is a trial."""
    if found is None:
        return
    left = f"{found.seconds_left():.0f} s are left to confirm it"
    what = {"applying": "is being applied", "rolling back": "is being taken back"}.get(found.state, left)
    raise PartitiondError(
        "trial.pending",
        f"a configuration is on trial; {what}",
        resource=found.config,
        hint="partitiond confirm keeps it; else wait until it is taken back",
        retryable=True,
    )


def applied(state_dir: Path, trial: Trial) -> Trial:
    """The time to confirm begins. Raises PartitiondError ``trial.too_late`` when it was taken back meanwhile."""
    with _turn(state_dir):
        found = read(state_dir)
        if found is None or found.id != trial.id or found.state != "applying":
            raise PartitiondError(
                "trial.too_late",
                "it was taken back while it was being applied",
                resource=trial.config,
                hint=f"read {log_path(state_dir)}",
            )
        return _write(state_dir, replace(found, state="pending", deadline=now() + found.timeout))


def confirm(state_dir: Path) -> Trial:
    """Keep what is on trial.

    Raises PartitiondError ``trial.none``, ``trial.applying``, ``trial.too_late``.
    """
    with _turn(state_dir) as directory:
        found = read(state_dir)
        if found is None:
            raise _nothing_to_confirm(state_dir)
        if found.state == "applying" and not found.ended():
            raise PartitiondError(
                "trial.applying",
                "is still being applied",
                resource=found.config,
                hint="try it first whether the node is reached, then confirm",
                retryable=True,
            )
        if found.state not in ("pending", "confirmed") or found.ended():
            raise _too_late(found.config, found.why or found.ended() or "it is being taken back")
        _write(state_dir, replace(found, state="confirmed"))
        _finish(state_dir, directory)
        return found


def _nothing_to_confirm(state_dir: Path) -> PartitiondError:
    rejected = last_good.rejected(state_dir)
    if rejected is not None:
        return _too_late(rejected.config, rejected.why)
    return PartitiondError(
        "trial.none", "there is nothing to confirm", hint="partitiond try puts a configuration on trial"
    )


def _too_late(config: str, why: str) -> PartitiondError:
    return PartitiondError(
        "trial.too_late",
        f"too late: {why}",
        resource=config,
        hint="partitiond try once more, perhaps with a longer --timeout",
    )


def finish_confirmed(state_dir: Path) -> None:
    """Do the rest of a confirmation whose program was killed."""
    with _turn(state_dir) as directory:
        found = read(state_dir)
        if found is not None and found.state == "confirmed":
            _finish(state_dir, directory)


def _finish(state_dir: Path, directory: int) -> None:
    tried = tried_path(state_dir)
    if tried.exists():
        tried.rename(last_good.path_of(state_dir))
        os.fsync(directory)
    last_good.accept(state_dir)
    _remove(state_dir)


def claim(state_dir: Path, identity: str, why: str) -> Trial | None:
    """Take the turn to roll back; None when it was confirmed, or is no more. From here on nobody can confirm it."""
    with _turn(state_dir):
        found = read(state_dir)
        if found is None or found.id != identity or found.state == "confirmed":
            return None
        if found.state == "rolling back":
            return found
        return _write(state_dir, replace(found, state="rolling back", why=why))


def close(state_dir: Path, trial: Trial, left: Iterable[str] = ()) -> last_good.Rejected:
    """It is taken back; what was tried is remembered as rejected."""
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    rejected = last_good.Rejected(trial.fingerprint, trial.config, at, trial.why, trial.before, tuple(left))
    with _turn(state_dir):
        found = read(state_dir)
        if found is not None and found.id == trial.id:
            last_good.reject(state_dir, rejected)
            _remove(state_dir)
    return rejected


def abandon(state_dir: Path) -> None:
    """End it without taking it back: nothing was changed yet, or everything goes."""
    if state_dir.is_dir():
        with _turn(state_dir):
            _remove(state_dir)


# --- looking ------------------------------------------------------------------------------------------------------------


def log_path(state_dir: Path) -> Path:
    """What the guardian of the last trial said."""
    return state_dir / "trial.log"


def as_json(state_dir: Path) -> dict[str, Any] | None:
    """The contract's object of ``status``."""
    found = read(state_dir)
    if found is None:
        return None
    left = found.seconds_left()
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=left)
    return {
        "state": found.state,
        "deadline": end.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "seconds_left": round(left, 1),
    }
