"""Meters the disk space of partitions: a walk by root through trees that tenants build and change meanwhile.

What it promises, whatever the tree: no link is followed and no file opened, only directories; no other file
system is entered; an inode counts once however many names it has; one descriptor is held, no recursion
happens and the names it keeps are bounded, so that neither depth nor size exhausts the daemon; each call
ends in bounded time and the walk goes on in the next one.

Not seen: files that were removed but are still open, and what is mounted below (btrfs subvolumes are file
systems of their own in this sense). A FUSE file system that a tenant mounts with ``allow_other`` could keep
us waiting in stat(2): fuse.conf(5) must not have ``user_allow_other``; without it root is refused at once,
which is fine.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from stat import S_ISDIR
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

# O_NOFOLLOW and O_DIRECTORY: what was a directory a moment ago may be a link or a FIFO now.
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_BLOCK = 512  # the unit of st_blocks, whatever the file system's: inode(7)
_LOOK_AT_CLOCK = 256  # entries
_INODE_COST = 100  # bytes, about what Python takes to remember one inode number
_NAME_COST = 60  # bytes, about what it takes beyond the text to keep one name


_libc = ctypes.CDLL(None, use_errno=True)
_OPENAT2, _NO_XDEV = 437, 0x01  # asm-generic/unistd.h, linux/openat2.h


class _OpenHow(ctypes.Structure):
    """struct open_how, linux/openat2.h."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_HOW = _OpenHow(_OPEN, 0, _NO_XDEV)


def _open_here(directory: int, name: str) -> int:
    """Open a directory in another, unless something is mounted there (EXDEV): a bind mount of the same file system has the
    same device and shows what is somebody else's. openat2(2), Linux 5.6. Raises OSError.
    """
    path = os.fsencode(name)
    found = _libc.syscall(_OPENAT2, directory, path, ctypes.byref(_HOW), ctypes.sizeof(_HOW))
    if found >= 0:
        return int(found)
    number = ctypes.get_errno()
    if number == errno.ENOSYS:
        return os.open(name, _OPEN, dir_fd=directory)
    raise OSError(number, os.strerror(number), name)


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """What a walk has found.

    ``bytes`` is allocated space, holes not counted, the top directory included, as ``du -sx -B1`` gives it.
    ``entries`` is how many names were looked at. ``finished``: the walk is over, else the next call goes on
    with it. ``complete``: nothing was left out; else ``bytes`` is a lower bound (a directory could not be
    read, was moved while it was measured, or the tree is beyond our bounds).
    """

    bytes: int
    entries: int
    finished: bool
    complete: bool


@dataclass(slots=True)
class _Directory:
    """A directory from the top to where the walk is: how to find it again, and what is left to do."""

    name: str
    inode: int
    scanned: bool = False
    pending: list[str] = field(default_factory=list)


class DiskMeter:
    """Measures the trees of all partitions in turn, a bounded piece at each call.

    A call takes at most ``entries_per_pass`` steps (a step is one name, or one directory entered or left)
    and about ``seconds_per_pass``. A walk is given up (finished, not complete) beyond ``entries_per_tree``
    steps or ``memory_per_tree`` bytes of remembered names and inodes, so that a tenant who makes
    directories faster than we count them does not hold up the others. Between calls at most one walk is
    under way, with one descriptor open in that tree; ``forget`` and ``close`` end it. Not for use by
    several threads at once.
    """

    def __init__(
        self,
        *,
        entries_per_pass: int = 200_000,
        seconds_per_pass: float = 2.0,
        entries_per_tree: int = 20_000_000,
        memory_per_tree: int = 128 * 2**20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._entries_per_pass = entries_per_pass
        self._seconds_per_pass = seconds_per_pass
        self._entries_per_tree = entries_per_tree
        self._memory_per_tree = memory_per_tree
        self._clock = clock
        self._turn: dict[str, int] = {}  # when each tree was finished last, in turns
        self._turns = 0
        self._partition = ""
        self._walk: _Walk | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the walk that is under way, if any; the next call begins it anew."""
        if self._walk is not None:
            self._walk.close()
            self._walk = None

    def forget(self, partition: str) -> None:
        """Let go of a partition's tree, so that it can be unmounted or removed."""
        if self._partition == partition:
            self.close()

    def measure(self, trees: Mapping[str, Path], seconds: float | None = None) -> dict[str, DiskUsage]:
        """Walk on through ``trees`` (partition → top directory), each at most once per call.

        Gives what was worked on in this call: trees that were finished, and perhaps one that was not. Those
        missing have their turn in the next calls. A tree that does not exist uses nothing. Raises nothing
        of its own. ``seconds``: for this call, in place of ``seconds_per_pass``.
        """
        deadline = self._clock() + (self._seconds_per_pass if seconds is None else seconds)
        steps = self._entries_per_pass
        if self._walk is not None and self._walk.top != trees.get(self._partition):
            self.close()
        # The walk that is under way goes on, then come those that waited longest.
        self._turn = {partition: turn for partition, turn in self._turn.items() if partition in trees}
        under_way = self._partition if self._walk is not None else None
        order = sorted(trees, key=lambda name: (name != under_way, self._turn.get(name, 0), name))
        found: dict[str, DiskUsage] = {}
        for partition in order:
            walk = self._walk or _Walk(trees[partition], self._entries_per_tree, self._memory_per_tree)
            self._walk, self._partition = walk, partition
            steps -= walk.advance(steps, deadline, self._clock)
            found[partition] = walk.usage()
            if walk.finished:
                self.close()
                self._turns += 1
                self._turn[partition] = self._turns
            if steps <= 0 or self._clock() >= deadline:
                break
        return found


class _Walk:
    """One walk through one tree, in steps. Only the present directory is open; up is by ``..``, checked."""

    def __init__(self, top: Path, steps_limit: int, memory_limit: int) -> None:
        self.top = top
        self.finished = False
        self._bytes = 0
        self._entries = 0
        self._complete = True
        self._steps_left = steps_limit
        self._memory_left = memory_limit
        self._here = -1
        self._device = -1
        self._stack: list[_Directory] = []
        self._seen: set[int] = set()
        self._run = self._steps()

    def advance(self, steps: int, deadline: float, clock: Callable[[], float]) -> int:
        """Take up to ``steps`` steps, until ``deadline`` or the end; give how many it took, at least one."""
        taken = 0
        for _ in self._run:
            taken += 1
            self._steps_left -= 1
            if self._steps_left <= 0 or self._memory_left <= 0:
                self._complete = False
                break
            if taken >= steps or (taken % _LOOK_AT_CLOCK == 0 and clock() >= deadline):
                return taken
        self.close()
        return max(1, taken)

    def close(self) -> None:
        """Let go of the descriptor and of what was remembered."""
        self.finished = True
        self._run.close()
        self._move_to(-1)
        self._stack.clear()
        self._seen.clear()

    def usage(self) -> DiskUsage:
        """Give what was found so far."""
        return DiskUsage(self._bytes, self._entries, self.finished, self._complete and self.finished)

    def _steps(self) -> Generator[None, None, None]:
        """Walk; each yield is one step."""
        try:
            top = os.open(self.top, _OPEN)
        except FileNotFoundError:
            return
        except OSError:
            self._complete = False
            return
        self._device = os.fstat(top).st_dev
        self._enter(top, "")
        while self._stack:
            directory = self._stack[-1]
            if not directory.scanned:
                yield from self._scan(directory)
            elif directory.pending:
                self._descend(directory)
            else:
                yield from self._ascend()
            yield

    def _scan(self, directory: _Directory) -> Iterator[None]:
        directory.scanned = True
        try:
            with os.scandir(self._here) as entries:
                for entry in entries:
                    self._count(entry, directory)
                    yield
        except OSError:
            self._complete = False

    def _count(self, entry: os.DirEntry[str], directory: _Directory) -> None:
        self._entries += 1
        try:
            status = entry.stat(follow_symlinks=False)  # fstatat(2) from the open directory
        except FileNotFoundError:
            return
        except OSError:
            self._complete = False
            return
        if status.st_dev != self._device:
            return
        if S_ISDIR(status.st_mode):
            directory.pending.append(entry.name)
            self._memory_left -= _NAME_COST + len(entry.name)
        elif status.st_nlink == 1 or self._is_new(status.st_ino):
            self._bytes += status.st_blocks * _BLOCK

    def _descend(self, directory: _Directory) -> None:
        name = directory.pending.pop()
        self._memory_left += _NAME_COST + len(name)
        try:
            below = _open_here(self._here, name)
        except OSError as error:
            # It vanished, became a file or a link, or something is mounted there: it uses nothing that was not counted.
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
                self._complete = False
            return
        self._enter(below, name)

    def _enter(self, descriptor: int, name: str) -> None:
        """Go into an open directory, unless it is on another file system or was seen (bind mount, moved)."""
        status = os.fstat(descriptor)
        if status.st_dev != self._device or not self._is_new(status.st_ino):
            os.close(descriptor)
            return
        self._bytes += status.st_blocks * _BLOCK
        self._stack.append(_Directory(name, status.st_ino))
        self._move_to(descriptor)

    def _ascend(self) -> Iterator[None]:
        """Go up to the next directory in which something is left to do."""
        levels = 0
        while self._stack and not self._stack[-1].pending:
            self._stack.pop()
            levels += 1
        if not self._stack:
            return
        with suppress(OSError):  # then we are not where we wanted to be, which is seen below
            for _ in range(levels):
                self._move_to(os.open("..", _OPEN, dir_fd=self._here))
                yield
        if not self._is(self._here, self._stack[-1]):
            yield from self._find_again()

    def _find_again(self) -> Iterator[None]:
        """Come back from the top by names after something was moved; give up what is not there now."""
        for depth, directory in enumerate(self._stack):
            try:
                name, base = (directory.name, self._here) if depth else (self.top, None)
                descriptor = os.open(name, _OPEN, dir_fd=base)
            except OSError:
                descriptor = -1
            if not self._is(descriptor, directory):
                if descriptor >= 0:
                    os.close(descriptor)
                self._complete = False
                del self._stack[depth:]
                return
            self._move_to(descriptor)
            yield

    def _is(self, descriptor: int, directory: _Directory) -> bool:
        if descriptor < 0:
            return False
        status = os.fstat(descriptor)
        return (status.st_dev, status.st_ino) == (self._device, directory.inode)

    def _is_new(self, inode: int) -> bool:
        if inode in self._seen:
            return False
        self._seen.add(inode)
        self._memory_left -= _INODE_COST
        return True

    def _move_to(self, descriptor: int) -> None:
        """Make ``descriptor`` the open directory, close the one before; -1 for none."""
        before, self._here = self._here, descriptor
        if before >= 0:
            os.close(before)
