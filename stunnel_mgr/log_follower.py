"""Follows a log that supervisord rotates, from a place that can be kept: what was added, and whether some is lost.

supervisord closes ``NAME`` when it is full, removes ``NAME.1``, renames ``NAME`` to it and begins ``NAME``
anew (supervisor/loggers.py, ``doRollover`` with one old file), perhaps in the middle of a line. So what is not
found in ``NAME`` goes on in ``NAME.1``, and is lost when the log was rotated twice. Nothing is kept open in
between. The files are root's own, in a directory that no tenant can write.
"""

import os
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Self

from .errors import TunnelError

MOST = 1024 * 1024
"""Bytes that one reading gives at most, unless it is told otherwise."""
_MARK = 64  # bytes before the place


@dataclass(frozen=True, slots=True)
class Place:
    """How far a log was read.

    ``mark`` is a digest of the bytes before it, since a file system gives the number of a removed file to the
    next one at once. ``older`` is the time of the last change of ``NAME.1``, in nanoseconds, where that was
    read before: after a loss it is not read again.
    """

    device: int
    inode: int
    offset: int
    mark: str
    older: int

    def to_json(self) -> list[object]:
        """Give what :meth:`from_json` takes."""
        return list(astuple(self))

    @classmethod
    def from_json(cls, state: object) -> Self | None:
        """Make a place as it was; None of what is none."""
        match state:
            case [int(device), int(inode), int(offset), str(mark), int(older)] if 0 <= offset < 1 << 63:
                return cls(device, inode, offset, mark, older)
        return None


class LogFollower:
    """Gives what a log at ``path`` has from ``place`` on; without one, from the oldest line that is kept.

    ``place`` is where the last reading ended. ``lost`` says whether something is missing before what it gave.
    """

    def __init__(self, path: Path, place: Place | None = None) -> None:
        self._path = path
        self.place = place
        self.lost = False

    @classmethod
    def at_end(cls, path: Path) -> Self:
        """Follow what is added from now on; the log need not be there yet. Raises as :meth:`read`."""
        follower = cls(path)
        with ExitStack() as stack:
            try:
                current, older = follower._open(stack)
                if last := current or older:
                    end = os.fstat(last.fileno()).st_size
                    follower.place = _place(last, end, older if last is current else None)
            except OSError as error:
                raise follower._unreadable(error) from error
        return follower

    def read(self, limit: int = MOST) -> bytes:
        """Read what was added, up to ``limit`` bytes; less means that there is no more now.

        Raises TunnelError ``tunnel.observe`` when the log cannot be read; the place stays then.
        """
        with ExitStack() as stack:
            try:
                current, older = self._open(stack)
                place, lost, parts = self._parts(current, older)
                data = b""
                for file, offset in parts:
                    file.seek(offset)
                    data += (part := file.read(limit - len(data)))
                    place = _place(file, offset + len(part), older if file is current else None)
                    if len(data) >= limit:
                        break
            except OSError as error:
                raise self._unreadable(error) from error
        self.place, self.lost = place, lost
        return data

    def _parts(
        self, current: BinaryIO | None, older: BinaryIO | None
    ) -> tuple[Place | None, bool, list[tuple[BinaryIO, int]]]:
        """Find what is to be read, in order, from which offset."""
        place = self.place
        if place and current and _is_in(place, current):
            return place, False, [(current, place.offset)]
        next_one = [(current, 0)] if current else []
        if place and older and _is_in(place, older):
            return place, False, [(older, place.offset), *next_one]
        if older and not (place and place.older == os.fstat(older.fileno()).st_mtime_ns):
            return None, place is not None, [(older, 0), *next_one]
        return None, place is not None, next_one

    def _open(self, stack: ExitStack) -> tuple[BinaryIO | None, BinaryIO | None]:
        """Open the log and the one before it, in this order: else a rotation in between could hide a file."""
        found: list[BinaryIO | None] = []
        for path in (self._path, self._path.with_name(f"{self._path.name}.1")):
            try:
                found.append(stack.enter_context(path.open("rb", buffering=0)))
            except FileNotFoundError:
                found.append(None)
        return found[0], found[1]

    def _unreadable(self, error: OSError) -> TunnelError:
        message = f"the log {self._path} cannot be read: {error.strerror}"
        return TunnelError("tunnel.observe", message, resource=str(self._path), retryable=True)


def _place(file: BinaryIO, offset: int, older: BinaryIO | None) -> Place:
    there = os.fstat(file.fileno())
    before = 0 if older is None else os.fstat(older.fileno()).st_mtime_ns
    return Place(there.st_dev, there.st_ino, offset, _mark(file, offset), before)


def _is_in(place: Place, file: BinaryIO) -> bool:
    there = os.fstat(file.fileno())
    same = (there.st_dev, there.st_ino) == (place.device, place.inode)
    return same and there.st_size >= place.offset and _mark(file, place.offset) == place.mark


def _mark(file: BinaryIO, offset: int) -> str:
    start = max(0, offset - _MARK)
    return blake2b(os.pread(file.fileno(), offset - start, start), digest_size=16).hexdigest()
