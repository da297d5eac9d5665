"""What a supervisord that was killed has left running: found for certain, taken over or ended, never started a second time.

Each process that supervisord starts notes itself, before it becomes the tenant's program, in a directory of root's: nothing
that a tenant says of itself (its environment, its name) is needed to find it again. A note holds as long as the process
with that number began when the note says so, since the machine began. What the noted ones have started is found by descent
and by the session, which is that of the supervisord before; what has left both, by the mark in its environment.

Promises: a process of a group that is to go on is never ended; a number that is another process's by now is never ended; what
is ended gets SIGTERM once, and SIGKILL when it is still there after some seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from partitiond import procfs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

_GRACE = 5.0
_PAUSE = 0.05
# of all environments together; supervisord answers nobody meanwhile
_LOOK, _SECOND_LOOK = 0.5, 1.5
_SIDE_BY_SIDE = 4  # of a user's
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_SERVER = "supervisord"  # no process's: theirs have a colon


@dataclass(frozen=True, slots=True)
class Note:
    """A process that supervisord has started: its pid, its start in ticks, and the pipe that its output goes into.

    ``digest`` is that of what it was started by, 0 where an older version has not noted it.
    """

    group: str
    name: str
    pid: int
    start: int
    pipe: int
    at: float
    digest: int = 0

    @property
    def lives(self) -> bool:
        """Whether that very process is still there, and no zombie."""
        family = procfs.family_of(self.pid)
        return family is not None and family.start == self.start


@dataclass(frozen=True, slots=True)
class Notes:
    """What was noted since the machine began; ``session`` is that of the supervisord before, 0 if none is known."""

    processes: tuple[Note, ...] = ()
    session: int = 0

    def living(self, groups: Collection[str]) -> tuple[Note, ...]:
        """The processes of these groups that are still there."""
        return tuple(one for one in self.processes if one.group in groups and one.lives)


def boot() -> str:
    """The name that the kernel gives to the time since the machine began."""
    with open(_BOOT_ID, encoding="ascii") as stream:
        return stream.read().strip()


def write(directory: Path, group: str, name: str, pipe: int, boot_id: str, digest: int) -> None:
    """Note this process, whose output goes into the pipe with that inode. Raises OSError."""
    family = procfs.family_of(os.getpid())
    start = family.start if family else 0
    _write(directory / f"{group}:{name}", f"{boot_id} {os.getpid()} {start} {pipe} {digest}\n")


def write_session(directory: Path, boot_id: str) -> None:
    """Note the session of this supervisord. Raises OSError."""
    _write(directory / _SERVER, f"{boot_id} {os.getsid(0)}\n")


def _write(path: Path, text: str) -> None:
    # one short write; where we are killed before it the note is empty, and the mark in the environment has to do
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)


def forget(directory: Path, group: str, name: str) -> None:
    """Remove the note of a process that has ended."""
    (directory / f"{group}:{name}").unlink(missing_ok=True)


def clear(directory: Path, but: Collection[int]) -> None:
    """Remove the notes of all processes but those with these pids, whatever is in them. Raises OSError."""
    keep = {f"{one.group}:{one.name}" for one in read(directory).processes if one.pid in but}
    for path in directory.iterdir():
        if ":" in path.name and path.name not in keep:
            path.unlink()


def read(directory: Path) -> Notes:
    """Read what was noted since the machine began; what is torn or older is left out. Raises OSError."""
    boot_id, found, session = boot(), [], 0
    try:
        names = os.listdir(directory)  # noqa: PTH208 - names suffice
    except FileNotFoundError:
        return Notes()
    for name in names:
        group, colon, process = name.partition(":")
        if name != _SERVER and not colon:
            continue
        path = directory / name
        words = path.read_text("ascii", errors="replace").split()
        if not words or words[0] != boot_id or not all(word.isdigit() for word in words[1:]):
            continue
        numbers = [int(word) for word in words[1:]]
        if name == _SERVER:
            session = numbers[0] if numbers else 0
        elif len(numbers) in (3, 4):
            pid, start, pipe, *digest = numbers
            found.append(Note(group, process, pid, start, pipe, path.stat().st_mtime, *digest))
    return Notes(tuple(found), session)


def output_of(note: Note) -> int | None:
    """Another end to read from the pipe that a process writes to; None where it has closed that.

    The process may exchange its descriptors while we look: what is opened is first held without opening it, and is opened
    only as the pipe that supervisord once made, which no tenant can give a file of its own the number of.
    """
    for number in (1, 2):
        try:
            held = os.open(f"/proc/{note.pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            there = os.fstat(held)
            if not stat.S_ISFIFO(there.st_mode) or there.st_ino != note.pipe or there.st_dev != _pipes():
                continue
            return os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        finally:
            os.close(held)
    return None


def _pipes() -> int:
    """The device of the kernel's own file system of pipes: one in a directory has another."""
    ends = os.pipe()
    try:
        return os.fstat(ends[0]).st_dev
    finally:
        for end in ends:
            os.close(end)


# --- ending -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Search:
    """Who of all processes is to be ended; ``kept`` are the pids of noted ones that go on."""

    notes: Notes
    kept: Collection[int]
    mark: bytes
    table: dict[int, procfs.Family] = field(default_factory=dict)
    marked: set[int] = field(default_factory=set)
    kept_waiting: bool = False  # by some process for its environment: then none is read any more

    def run(self) -> set[int]:
        self.table = {pid: family for pid in procfs.pids() if (family := procfs.family_of(pid)) is not None}
        living = [one for one in self.notes.processes if self._is(one.pid, one.start)]
        going_on = {one.pid for one in living if one.pid in self.kept}
        ending = {one.pid for one in living} - going_on
        # what a process of theirs leaves behind that ended together with supervisord: it is about to be started again
        gone = {one.pid for one in self.notes.processes if one.pid not in self.table}
        users = {procfs.user_of(pid) for pid in going_on} - {0, None}
        self._mark(going_on | ending)
        found = set()
        for pid, family in self.table.items():
            line = tuple(self._line(pid))
            nearest = next((one for one in line if one in going_on or one in ending), 0)
            if nearest:
                if nearest in ending:
                    found.add(pid)
            elif family.group in going_on:
                continue
            elif (family.group in ending or not self.marked.isdisjoint(line)) and (
                family.group in gone or procfs.user_of(pid) not in users
            ):
                found.add(pid)
        return found - {os.getpid()}

    def _is(self, pid: int, start: int) -> bool:
        family = self.table.get(pid)
        return family is not None and family.start == start

    def _session(self) -> int:
        """The session of the supervisord before, 0 where that number may be somebody else's by now, or is our own."""
        session = self.notes.session
        return 0 if session in self.table or session == os.getsid(0) else session

    def _line(self, pid: int) -> Iterator[int]:
        """A process and those from which it descends; the table is no one moment's, so it may even lead round."""
        seen: set[int] = set()
        while pid in self.table and pid > 1 and pid not in seen:
            seen.add(pid)
            yield pid
            pid = self.table[pid].parent

    def _mark(self, decided: Collection[int]) -> None:
        """Find who is of that supervisord by its session or environment."""
        session = self._session()
        self.marked = {pid for pid, family in self.table.items() if session and family.session == session}
        if not self.kept_waiting:
            left = self.table.keys() - self.marked - {os.getpid(), *decided}
            found, self.kept_waiting = _marked(sorted(left), self.mark)
            self.marked |= found


def _marked(pids: Sequence[int], mark: bytes) -> tuple[set[int], bool]:
    """Which processes have this in their environment, and whether one keeps whoever reads it waiting.

    It is read from the process's own memory, and a tenant may have mapped that from a file system of its own that never answers
    (FUSE in a user namespace), for any number of processes: then those of each user are read beside those of all others, so
    that it keeps nobody but itself, and what has not answered by the end is left to itself, with the threads that wait for it.
    """
    found: set[int] = set()
    left = _look([pids], mark, 1, _LOOK, found)
    if not left:
        return found, False
    by_user: dict[int | None, list[int]] = {}
    for pid in left:
        by_user.setdefault(procfs.user_of(pid), []).append(pid)
    _look(by_user.values(), mark, _SIDE_BY_SIDE, _SECOND_LOOK, found)
    return found, True


def _look(
    queues: Iterable[Sequence[int]], mark: bytes, side_by_side: int, seconds: float, found: set[int]
) -> list[int]:
    """Look for the mark for so many seconds at most, in each queue at so many at once; return who has not answered."""
    answers: SimpleQueue[tuple[int, bool]] = SimpleQueue()
    enough = threading.Event()
    left: set[int] = set()
    for queue in queues:
        left.update(queue)
        todo = deque(queue)
        with contextlib.suppress(RuntimeError):  # no more threads may be: some are there
            for _ in range(min(side_by_side, len(queue))):
                threading.Thread(target=_read, args=(todo, mark, answers, enough), daemon=True).start()
    deadline = time.monotonic() + seconds
    with contextlib.suppress(Empty):
        while left:
            pid, is_marked = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            left.discard(pid)
            if is_marked:
                found.add(pid)
    enough.set()
    return sorted(left)


def _read(
    todo: deque[int], mark: bytes, answers: SimpleQueue[tuple[int, bool]], enough: threading.Event
) -> None:
    with contextlib.suppress(IndexError):
        while not enough.is_set():
            pid = todo.popleft()
            answers.put((pid, mark in procfs.words(pid, "environ")))


def mark_of(server_url: str) -> bytes:
    """What supervisord puts into the environment of each process that it starts."""
    return f"SUPERVISOR_SERVER_URL={server_url}".encode()


def end(notes: Notes, server_url: str, kept: Collection[int] = ()) -> int:
    """End what a supervisord that was killed has left, but what goes on with the pids ``kept``; return how many processes."""
    search = _Search(notes, kept, mark_of(server_url))
    told: set[int] = set()
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE
        while found := search.run():
            for pid in found if number == signal.SIGKILL else found - told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            told |= found
            if time.monotonic() > deadline:
                break
            time.sleep(_PAUSE)
    return len(told)
