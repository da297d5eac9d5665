"""What an instance's buildout says, on its way into a log of root's: the tenant says how much that is, and for how long.

Promises: the log stays below a bound, and keeps the end of what was said, where errors are; who says more is slowed down, and
nobody else; what a build leaves running is listened to no longer, as with slapgrid.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from typing import TYPE_CHECKING

from partitiond import buildout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

LIMIT = 5 * 1024 * 1024
_PIECE = 64 * 1024
_AT_LAST = 1024 * 1024  # a pipe holds no more, /proc/sys/fs/pipe-max-size
_SLOWER = 0.05
_LOOK = 100  # milliseconds


@contextlib.contextmanager
def bounded(path: Path, title: str, limit: int = LIMIT) -> Iterator[int]:
    """A descriptor to write to, for a block; what comes is copied into the log at ``path``. Raises OSError."""
    with buildout.Log(path, title) as log:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        over = threading.Event()
        thread = threading.Thread(
            target=_Copy(path, log, limit).run, args=(reading, over), name="build output", daemon=True
        )
        thread.start()
        try:
            yield writing
        finally:
            os.close(writing)
            over.set()
            thread.join()
            os.close(reading)


class _Copy:
    """What comes through one pipe."""

    def __init__(self, path: Path, log: int, limit: int) -> None:
        self._path, self._log, self._limit = path, log, limit
        self._written, self._slow, self._full = 0, False, False

    def run(self, reading: int, over: threading.Event) -> None:
        """Copy until nobody writes, or what was in the pipe at the end is copied."""
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        while not over.is_set():
            if poll.poll(_LOOK):
                piece = os.read(reading, _PIECE)
                if not piece:
                    return
                self._keep(piece)
                if self._slow:
                    over.wait(_SLOWER)
        left = _AT_LAST
        while left > 0 and poll.poll(0) and (piece := os.read(reading, _PIECE)):
            left -= len(piece)
            self._keep(piece)

    def _keep(self, piece: bytes) -> None:
        """Write it down; on a full disk it is lost, but read, so that the build goes on."""
        if self._full:
            return
        try:
            if self._written + len(piece) > self._limit:
                buildout.bound(self._path, 0)
                self._written, self._slow = 0, True
            self._written += len(piece)
            while piece:
                piece = piece[os.write(self._log, piece) :]
        except OSError as error:
            self._full = True
            logger.warning("%s: what the build says is not kept: %s", self._path, error)
