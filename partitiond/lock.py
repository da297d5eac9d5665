"""One program at a time changes the node: a lock on the state directory, gone with its holder however it ends."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

NAME = "lock"  # in state_dir


@contextmanager
def exclusive(state_dir: Path, what: str, *, wait: float = 0.0) -> Iterator[bool]:
    """Hold the lock, waiting up to ``wait`` seconds. Raises PartitiondError ``node.busy`` naming the holder.

    Yields whether the holder before was cut off: who comes to the end of its work takes its name out of the file.
    """
    descriptor = _open(state_dir)
    try:
        deadline = time.monotonic() + wait
        while True:
            if _take(descriptor):
                if not _stale(descriptor, state_dir):
                    break
                # teardown --purge removed the file that we waited for: who comes next would lock another one
                following = _open(state_dir)
                os.close(descriptor)
                descriptor = following
                continue
            if time.monotonic() >= deadline:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another partitiond"
                raise PartitiondError(
                    "node.busy",
                    f"{holder} is at work on this state",
                    resource=str(state_dir),
                    hint="wait until it ends, or stop it",
                    retryable=True,
                )
            time.sleep(0.05)
        cut_off = os.fstat(descriptor).st_size > 0
        # over the old name, not after taking it out: the file must not be empty before the work is done
        try:
            os.pwrite(descriptor, name := f"partitiond {what} (process {os.getpid()})\n".encode(), 0)
            os.ftruncate(descriptor, len(name))
        except OSError as error:
            # a full disk must not keep a node from starting: the lock is held, and only what others read in it is missing
            logger.warning("%s: who holds it is not written there: %s", state_dir / NAME, error.strerror)
        yield cut_off
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _open(state_dir: Path) -> int:
    state_dir.mkdir(parents=True, exist_ok=True)
    return os.open(state_dir / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _stale(descriptor: int, state_dir: Path) -> bool:
    """Whether the open file is not the one at the path any more."""
    try:
        there = os.lstat(state_dir / NAME)
    except FileNotFoundError:
        return True
    return not os.path.samestat(there, os.fstat(descriptor))


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
