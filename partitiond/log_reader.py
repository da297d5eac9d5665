"""Reading the logs of a partition, or of a release's builds, as one: the last lines of each, and what comes, over rotations.

The files are root's (``log_dir``), but tenants' programs write into them, and buildouts: lines of any bytes and any length,
files that grow while they are read, are put aside or cut off. Promises: bounded memory, no line of one file mixed with
another's, no waiting for a file that nobody writes, every line that is whole given once.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitiond.errors import PartitiondError
from partitiond.state import software_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

LONGEST = 16 * 1024
"""Bytes of a line that are shown; what is longer comes in pieces."""
_PIECE = 1 << 16
_MOST_READ = 64 << 20
# what one file may give before the others have their turn
_TURN = 1 << 20
_MOST_FILES = 1000
_OLD = re.compile(r".*\.(?:[0-9]+|gz|tmp)")
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a log; ``name`` says of which."""

    name: str
    text: str


def names_of(directory: Path, wanted: Sequence[str] = ()) -> dict[str, Path]:
    """The logs in a directory by their names, without those that were put aside; only those that ``wanted`` begins.

    Raises OSError when the directory cannot be read.
    """
    found: dict[str, Path] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if len(found) >= _MOST_FILES:
                break
            if _OLD.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            name = entry.name.removesuffix(".log")
            if not wanted or any(name == one or name.startswith(f"{one}.") for one in wanted):
                found[name] = directory / entry.name
    return dict(sorted(found.items()))


def of_software(log_dir: Path, urls: Sequence[str], wanted: str | None) -> dict[str, Path]:
    """The logs of the builds of a release, by its URL or MD5; without one those of all. Raises PartitiondError, OSError."""
    directory = log_dir / "software"
    if wanted is None:
        known = {software_name(url): url for url in urls}
        return {known.get(name, name): path for name, path in names_of(directory).items()}
    name = wanted if _MD5.fullmatch(wanted) else software_name(wanted)
    path = directory / f"{name}.log"
    if not path.is_file():
        raise PartitiondError(
            "logs.unknown_software",
            "no build of that release has left a log",
            resource=wanted,
            hint="partitiond status lists the releases; give its URL as it stands there, or its directory's name",
        )
    return {wanted: path}


class LogFile:
    """One log that is read: first the last of it, then what comes."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path = name, path
        self._descriptor = -1
        self._place = 0
        self._rest = b""

    def last(self, count: int) -> list[Line]:
        """The last ``count`` lines, also of the file put aside before; to be called once, before :meth:`new`.

        Raises PermissionError for one that may not be read.
        """
        self._open()
        text = self._read_back(self._descriptor, count)
        self._place = os.fstat(self._descriptor).st_size if self._descriptor >= 0 else 0
        if text.count(b"\n") < count:
            with contextlib.suppress(OSError):
                aside = os.open(f"{self._path}.1", _OPEN)
                try:
                    text = self._read_back(aside, count) + text
                finally:
                    os.close(aside)
        *whole, self._rest = text.split(b"\n")
        if len(self._rest) > LONGEST:
            self._rest = self._rest[-LONGEST:]
        return [self._line(piece) for line in whole[-count:] for piece in _pieces(line)] if count else []

    def finish(self) -> Iterator[Line]:
        """The line that has no end yet: for who does not follow."""
        if self._rest:
            yield self._line(self._rest)
            self._rest = b""

    def new(self) -> Iterator[Line]:
        """What came since; never waits. What was put aside meanwhile is read to its end before the file that follows it."""
        if self._descriptor < 0:
            self._open()
        taken = 0
        while self._descriptor >= 0 and taken < _TURN:
            gone = self._is_put_aside()
            found = os.fstat(self._descriptor)
            if found.st_size < self._place:  # cut off: from its new beginning
                self._place, self._rest = 0, b""
            while taken < _TURN and (piece := os.pread(self._descriptor, _PIECE, self._place)):
                self._place += len(piece)
                taken += len(piece)
                *whole, self._rest = (self._rest + piece).split(b"\n")
                for line in whole:
                    yield from map(self._line, _pieces(line))
                while len(self._rest) > LONGEST:
                    yield self._line(self._rest[:LONGEST])
                    self._rest = self._rest[LONGEST:]
            if not gone or taken >= _TURN:
                return
            yield from self.finish()
            self._open()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _line(self, text: bytes) -> Line:
        return Line(self.name, text.rstrip(b"\r").decode("utf-8", "backslashreplace"))

    def _open(self) -> None:
        self.close()
        self._place, self._rest = 0, b""
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(self._path, _OPEN)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def _is_put_aside(self) -> bool:
        """Whether another file stands at the path; while there is none, the old one is read on."""
        try:
            return not os.path.samestat(os.fstat(self._descriptor), self._path.lstat())
        except FileNotFoundError:
            return False

    @staticmethod
    def _read_back(descriptor: int, count: int) -> bytes:
        """The end of a file with at least ``count`` lines, if it has as many and they are not too long."""
        if descriptor < 0 or not count:
            return b""
        end = os.fstat(descriptor).st_size
        start, text = end, b""
        while start and text.count(b"\n") <= count and len(text) < min(_MOST_READ, (count + 1) * LONGEST):
            step = min(_PIECE, start)
            start -= step
            text = os.pread(descriptor, step, start) + text
        # what comes before the first end of a line may be half a line
        return text if not start else text.partition(b"\n")[2] or text[-LONGEST:]


def _pieces(line: bytes) -> Iterator[bytes]:
    yield line[:LONGEST]
    for start in range(LONGEST, len(line), LONGEST):
        yield line[start : start + LONGEST]
