"""Configurations that are remembered: the last good one, which a trial goes back to, and one that a trial has rejected.

Promises: what is read back is equal to what was in force; each file is written whole or not at all, and only when it changes.
"""

from __future__ import annotations

import configparser
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitiond import config as configuration
from partitiond import files
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from pathlib import Path

    from partitiond.config import Config


def fingerprint(config: Config) -> str:
    """Tell configurations apart by what they set; the order of settings and comments make no difference."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(config.text)
    settings = {section: dict(parser[section]) for section in parser.sections()}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write(path: Path, config: Config) -> None:
    """Remember a configuration; nothing is written when it is there already. Raises OSError."""
    content = f"# {config.file}, with its drop-ins\n{config.text}".encode()
    try:
        if path.read_bytes() == content:
            return
    except FileNotFoundError:
        pass
    files.write_path(path, content, mode=0o600)


def read(path: Path, file: Path) -> Config:
    """Read it back; ``file`` is where it once stood. Raises PartitiondError ``config.*``."""
    return configuration.load(path, stood_at=file)


# --- the last good one ------------------------------------------------------------------------------------------------


def path_of(state_dir: Path) -> Path:
    """Where the last good configuration lies."""
    return state_dir / "last-good.cfg"


def save(config: Config) -> None:
    """Remember what is in force as good: people, directories and network stand as it wants them."""
    write(path_of(config.state_dir), config)


def load(state_dir: Path, file: Path) -> Config | None:
    """The last good configuration, or None. Raises PartitiondError ``config.*`` for one that cannot be used."""
    path = path_of(state_dir)
    return read(path, file) if path.exists() else None


def forget(state_dir: Path) -> None:
    """There is no node any more to go back to."""
    path_of(state_dir).unlink(missing_ok=True)
    accept(state_dir)


# --- one that was rejected ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rejected:
    """A configuration that was tried and taken back.

    ``at`` is RFC 3339, ``why`` a clause, ``left`` what could not be taken back. ``before``: there is a last good one.
    """

    fingerprint: str
    config: str
    at: str
    why: str
    before: bool
    left: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Say it to the operator."""
        instead = "the last good configuration is in force" if self.before else "no configuration is in force"
        text = f"what {self.config} says was tried and taken back at {self.at}, because {self.why}; {instead}"
        return text + (f"; not taken back: {', '.join(self.left)}" if self.left else "")


_HINT = "correct the configuration, or put it into force as it is: partitiond apply"


def _rejected_path(state_dir: Path) -> Path:
    return state_dir / "rejected.json"


def reject(state_dir: Path, rejected: Rejected) -> None:
    """Remember it, so that nothing puts it into force by itself."""
    content = json.dumps(dataclasses.asdict(rejected), sort_keys=True).encode()
    files.write_path(_rejected_path(state_dir), content, mode=0o600)


def accept(state_dir: Path) -> None:
    """Forget what was rejected: somebody has put a configuration into force by word."""
    _rejected_path(state_dir).unlink(missing_ok=True)


def rejected(state_dir: Path) -> Rejected | None:
    """What was rejected last, or None. Raises PartitiondError ``state.damaged``."""
    path = _rejected_path(state_dir)
    try:
        found = json.loads(path.read_bytes())
        return Rejected(**{**found, "left": tuple(found["left"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise PartitiondError(
            "state.damaged",
            f"cannot be read: {error}",
            resource=str(path),
            hint="remove it; then partitiond apply puts the configuration into force",
        ) from error


def is_rejected(config: Config) -> Rejected | None:
    """Say whether exactly this configuration was rejected."""
    found = rejected(config.state_dir)
    return found if found and found.fingerprint == fingerprint(config) else None


def rejected_file(config: Config) -> Rejected | None:
    """What was rejected, as long as the file of the configuration in force still says it."""
    found = rejected(config.state_dir)
    if found is None:
        return None
    try:
        return found if fingerprint(configuration.load(config.file)) == found.fingerprint else None
    except PartitiondError:
        return None  # it says nothing that could be in force


def refuse_rejected(config: Config) -> None:
    """Raises PartitiondError ``trial.rejected`` for a configuration that was rejected and has no good one in its place."""
    found = is_rejected(config)
    if found is not None and not path_of(config.state_dir).exists():
        raise PartitiondError("trial.rejected", found.sentence(), resource=str(config.file), hint=_HINT)
