"""Reading the log of events: what is there, the last of it, and what comes, over rotations and torn lines.

What is in two files is given as one, by time.
"""

from __future__ import annotations

import contextlib
import datetime
import heapq
import json
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from partitiond import events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_PAUSE = 0.2
_PIECE = 1 << 16
_NAMES = (events.FILE, events.SESSIONS)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("time"), str) else None


def concerns(event: dict[str, Any], partition: str | None) -> bool:
    """Whether an event is about that partition, alone or among others; about anything when it is None."""
    return (
        partition is None or event.get("partition") == partition or partition in event.get("partitions", ())
    )


def at(event: dict[str, Any]) -> float:
    """When it happened, in Unix seconds; 0 when the line does not say it in a form that can be read."""
    try:
        return datetime.datetime.fromisoformat(event["time"]).timestamp()
    except ValueError:
        return 0.0


def _of(path: Path) -> Iterator[dict[str, Any]]:
    """The events of one file; of one that is not there none."""
    try:
        with path.open("rb") as stream:
            for line in stream:
                event = _parsed(line)
                if event is not None:
                    yield event
    except FileNotFoundError:
        return


def _when(event: dict[str, Any]) -> str:
    """What to order by: times are all in UTC and of one form."""
    time_text: str = event["time"]
    return time_text


def last(log_dir: Path, count: int, partition: str | None = None) -> list[dict[str, Any]]:
    """The last so many events, the newest at the end."""
    both = (_last(log_dir, name, count, partition) for name in _NAMES)
    return list(heapq.merge(*both, key=_when))[-count:]


def _last(log_dir: Path, name: str, count: int, partition: str | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in reversed(events.files(log_dir, name)):
        if len(found) >= count:
            break
        room = count - len(found)
        found[:0] = deque((event for event in _of(path) if concerns(event, partition)), maxlen=room)
    return found


class Follower:
    """Yields what is recorded, from the beginning on; the logs need not exist yet.  Close it."""

    def __init__(self, log_dir: Path) -> None:
        self._files = [_FileFollower(log_dir, name) for name in _NAMES]

    def past(self) -> Iterator[dict[str, Any]]:
        """Yield all that is recorded until now, the oldest first; to be called once, before :meth:`new`."""
        yield from heapq.merge(*(one.past() for one in self._files), key=_when)

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield what came since the last call; never waits."""
        yield from heapq.merge(*(list(one.new()) for one in self._files), key=_when)

    def close(self) -> None:
        """Close the files."""
        for one in self._files:
            one.close()


class _FileFollower:
    """The same for the files of one name."""

    def __init__(self, log_dir: Path, name: str) -> None:
        self._log_dir, self._name, self._path = log_dir, name, log_dir / name
        self._descriptor = -1
        self._rest = b""
        self._open()

    def past(self) -> Iterator[dict[str, Any]]:
        """Yield all that is recorded until now, the oldest first; to be called once, before :meth:`new`."""
        for path in events.files(self._log_dir, self._name)[:-1]:
            if not self._is_at(path):  # rotated since we opened it: then it is read as the last one
                yield from _of(path)
        yield from self.new()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        """Open the file that follows the one read so far; at first the current one, later none but the next."""
        paths = events.files(self._log_dir, self._name)
        place = next((number for number, path in enumerate(paths) if self._is_at(path)), None)
        if self._descriptor < 0:
            following = paths[-1:]
        elif place is None:  # so much came at once that ours is gone already: go on with the oldest
            following = paths
        else:
            following = paths[place + 1 :]
        self.close()
        self._rest = b""
        for path in following:
            with contextlib.suppress(FileNotFoundError):
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                return

    def _is_at(self, path: Path) -> bool:
        """Whether that is the file that is being read."""
        try:
            return self._descriptor >= 0 and os.path.samestat(os.fstat(self._descriptor), path.lstat())
        except FileNotFoundError:
            return False

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield what came since the last call; never waits."""
        if self._descriptor < 0:
            self._open()
        while self._descriptor >= 0:
            # asked before the file is read to its end: what its writers add until they see the new one is read, too
            rotated = self._path.exists() and not self._is_at(self._path)
            yield from self._lines()
            if not rotated:
                return
            self._open()

    def _lines(self) -> Iterator[dict[str, Any]]:
        while piece := os.read(self._descriptor, _PIECE):
            *whole, self._rest = (self._rest + piece).split(b"\n")
            for line in whole:
                event = _parsed(line)
                if event is not None:
                    yield event


def follow(follower: Follower, pause: Callable[[float], object] = time.sleep) -> Iterator[dict[str, Any]]:
    """Yield what is recorded, for ever."""
    while True:
        yield from follower.new()
        pause(_PAUSE)
