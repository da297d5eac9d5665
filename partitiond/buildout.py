"""What builds of releases and of instances have in common: where things lie, logs, how a failure is told.

The contract is that of slapgrid (slapos.core 1.26). Releases: ``software_build.py``; instances: ``instance_build.py``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import stat
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import files, log_digest
from partitiond.errors import PartitiondError
from partitiond.state import software_name

if TYPE_CHECKING:
    from partitiond import execute
    from partitiond.config import Config

logger = logging.getLogger(__name__)

COMPLETED = ".completed"
_TAIL = 4000
_DIGESTED = 64 * 1024
_LOG_LIMIT = 5 * 1024 * 1024
# while a build writes; what is older is in the file put aside, which has as much
_BUILD_LIMIT = 64 * 1024 * 1024
_PIECE = 64 * 1024
_PIPE = 1024 * 1024  # the most that users may make a pipe hold, pipe(7)
_LISTEN_MS = 100
# between pieces, for one that has written as much as is kept: about 1 MB/s
_SLOW = 0.05
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
    """A log file of ours, filled through a pipe, that begins with a line of what follows; a long one is put aside.

    What builds never have the file itself: it stays below ``limit``, the file put aside too, however fast they write, and
    who has left its session hears that nobody listens (EPIPE) once the build is over. Who has written that much is made slow.
    """

    def __init__(self, path: Path, title: str, limit: int = _BUILD_LIMIT) -> None:
        self._path, self._limit, self._written = path, limit, 0
        self._title = f"--- {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {title}\n".encode()
        self._over = threading.Event()
        self._failed = False

    def __enter__(self) -> int:
        if self._path.exists() and self._path.stat().st_size > min(_LOG_LIMIT, self._limit):
            self._put_aside()
        self._file = self._open()
        try:
            self._size = os.fstat(self._file).st_size + os.write(self._file, self._title)
            self._reading, self._writing = os.pipe2(os.O_CLOEXEC)
        except OSError:
            os.close(self._file)
            raise
        self._thread = threading.Thread(target=self._listen, name="build log", daemon=True)
        self._thread.start()
        return self._writing

    def __exit__(self, *_: object) -> None:
        os.close(self._writing)
        self._over.set()
        self._thread.join()
        os.close(self._reading)
        os.close(self._file)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self._path, flags, 0o644)

    def _put_aside(self) -> None:
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._reading, select.POLLIN)
        left = _PIPE  # of what is in the pipe when the build is over; who still writes is not waited for
        while left > 0:
            over = self._over.is_set()
            if poll.poll(0 if over else _LISTEN_MS):
                piece = os.read(self._reading, _PIECE)
                if not piece:
                    return
                self._write(piece)
                left -= len(piece) if over else 0
            elif over:
                return

    def _write(self, piece: bytes) -> None:
        """Keep a piece. A disk that is full costs the log, not the build."""
        if self._written > self._limit and not self._over.is_set():
            self._over.wait(_SLOW)
        self._written += len(piece)
        try:
            if self._size + len(piece) > self._limit:
                self._put_aside()
                following = self._open()
                os.close(self._file)
                self._file = following
                self._size = os.write(following, self._title)
            while piece:
                written = os.write(self._file, piece)
                self._size += written
                piece = piece[written:]
            self._failed = False
        except OSError as error:
            if not self._failed:
                logger.warning("%s: what a build says is lost: %s", self._path, error)
            self._failed = True


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
    """Write a line of our own into a log. Raises OSError."""
    # anew: who builds has the same opening, and could make a writer of it that does not wait (fcntl(2), O_NONBLOCK)
    descriptor = os.open(f"/proc/self/fd/{log}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(descriptor, f"--- {text}\n".encode("utf-8", "backslashreplace"))
    finally:
        os.close(descriptor)


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
