"""What builds of releases and of instances have in common: where things lie, logs, how a failure is told.

The contract is that of slapgrid (slapos.core 1.26). Releases: ``software_build.py``; instances: ``instance_build.py``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import files, log_digest
from partitiond.errors import PartitiondError
from partitiond.state import software_name

if TYPE_CHECKING:
    from partitiond import execute
    from partitiond.config import Config

COMPLETED = ".completed"
_TAIL = 4000
_DIGESTED = 64 * 1024
_LOG_LIMIT = 5 * 1024 * 1024
# of one build alone; what is older is in the file put aside, which has as much
_BUILD_LIMIT = 64 * 1024 * 1024
PROFILE_LIMIT = 4 * 1024 * 1024
# the line that begins each build in a log
_HEAD = re.compile(r"^--- \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (?:building|configuring) .*\n", re.MULTILINE)
NO_INDEX = "file:///nonexistent/"


def wheels() -> Path:
    """The directory of wheels that our environment ships, for builds without a network."""
    return Path(sys.prefix) / "share" / "wheels"


def software_directory(config: Config, url: str) -> Path:
    """Where a release is built."""
    return config.software_root / software_name(url)


def software_log(config: Config, url: str) -> Path:
    """The log of the builds of a release."""
    return config.log_dir / "software" / f"{software_name(url)}.log"


def session_record(config: Config, what: str) -> Path:
    """Where the session of a build under way is written down: of the one of ``software``, or of a partition's."""
    return config.run_dir / f"{what}.session"


def completed(config: Config, url: str) -> bool:
    """Whether a release was built to its end (also by slapos.core before us)."""
    try:
        return stat.S_ISREG(os.lstat(software_directory(config, url) / COMPLETED).st_mode)
    except OSError:
        return False


class Log:
    """A log file of ours, opened for appending, with a line that says what follows; a long one is put aside first."""

    def __init__(self, path: Path, title: str) -> None:
        self._path, self._title = path, title

    def __enter__(self) -> int:
        if self._path.exists() and self._path.stat().st_size > _LOG_LIMIT:
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o644)
        os.write(
            self._descriptor,
            f"--- {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {self._title}\n".encode(),
        )
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def remove_tree(root: Path, name: str) -> None:
    """Remove what stands below a directory of the software user's, whatever it is; nothing there is fine. Raises OSError."""
    path = root / name
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink()
            return
        with files.directory(root, name) as descriptor:
            # the mark goes first: half a release must not look whole
            with contextlib.suppress(FileNotFoundError):
                os.unlink(COMPLETED, dir_fd=descriptor)
            files.empty(descriptor)
    except FileNotFoundError:
        return
    path.rmdir()


def note(log: int, text: str) -> None:
    """Write a line of our own into a log."""
    os.write(log, f"--- {text}\n".encode("utf-8", "backslashreplace"))


def bound(path: Path, limit: int = _BUILD_LIMIT) -> None:
    """Put aside what a build has written so far, when that is much. Raises OSError.

    Copied and cut off: those who write have the file itself open, and append (open(2), O_APPEND). A line that comes in between
    is lost.
    """
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as stream:
        if os.fstat(stream.fileno()).st_size > limit:
            with path.with_name(f"{path.name}.1").open("wb") as aside:
                shutil.copyfileobj(stream, aside)
            stream.truncate(0)


def build_error(code: str, what: str, outcome: execute.Outcome, log: Path) -> PartitiondError:
    """The error of a buildout that failed: its cause, how it ended, and the end of its log."""
    # a compiler's complaint may stand far above what came of it
    cause = log_digest.cause(tail(log, _DIGESTED)) or "it said nothing"
    return PartitiondError(
        code,
        f"{cause}\nbuildout failed ({ended(outcome)}):\n{log_digest.plain(tail(log))}",
        resource=what,
        hint=f"read {log}",
        retryable=True,
    )


def ended(outcome: execute.Outcome) -> str:
    """How a program ended, in words."""
    return outcome.cut_short or (
        f"exit status {outcome.status}" if outcome.status >= 0 else f"signal {-outcome.status}"
    )


def tail(log: Path, size: int = _TAIL) -> str:
    """The last lines of the last build in a log, at most ``size`` bytes."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - size))
            # what a build left running may write on: to its end would be for ever
            text = stream.read(size).decode("utf-8", "replace")
    except OSError:
        return ""
    return _HEAD.split(text)[-1]
