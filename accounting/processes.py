"""Meters processor time, memory, input and output of all partitions in one scan of /proc.

/proc is read directly and not by psutil, for two reasons. A process must be known again in the next pass,
or its whole time is charged twice: psutil names it by pid and a start in wall-clock time, which changes
when the clock is set, while the kernel's own start is in ticks since boot and never does. And it takes a
quarter of the time (1000 processes, most of them idle, on a shared core: 17 ms, against 66 ms with psutil 7.2).

What is not seen: a process that started and ended between two passes, and what a process used after the
last pass that saw it, but for the input and output of those that a process of the partition waited for.
Exact sums need a control group per partition.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from accounting.errors import AccountingError
from accounting.model import GaugeReading, ProcessReading

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_READ = 8192  # bytes; stat is one line, and in status Uid stands before what may be long (Groups)
_ZOMBIES = (b"Z", b"X")
_OPEN = os.O_RDONLY | os.O_CLOEXEC
_IO = [b"read_bytes:", b"write_bytes:"]  # the fifth and the sixth line
# What a process that seems idle has read and written is read every so many scans. Seems idle: less than a tick of
# processor time (10 ms), no page fault, no child that it waited for. Most are, and io costs a third of the scan.
_IDLE_SCANS = 6
_ALWAYS_DUMPABLE = b"1"


@dataclass(frozen=True, slots=True)
class ProcessScan:
    """What one scan saw.

    ``memory_bytes`` and ``counts`` (living processes, zombies left out) have every partition that was asked
    for, with 0 where nothing runs. ``unreadable`` has the pids of processes that were there but could not be read.
    """

    processes: tuple[ProcessReading, ...]
    memory_bytes: Mapping[str, int]
    counts: Mapping[str, int]
    unreadable: frozenset[int] = frozenset()

    def gauges(self) -> tuple[GaugeReading, ...]:
        """Give memory and number of processes of each partition as readings for a pass."""
        return (
            *(GaugeReading(one, "memory_bytes", value) for one, value in self.memory_bytes.items()),
            *(GaugeReading(one, "processes", value) for one, value in self.counts.items()),
        )


class _Io(NamedTuple):
    """Bytes read and written, and the ``activity`` that its stat told then."""

    activity: tuple[bytes, ...]
    read: int | None
    written: int | None


_NO_IO = _Io((), None, None)


class _Stat(NamedTuple):
    state: bytes
    activity: tuple[bytes, ...]
    parent: int
    ticks: int
    started: int
    resident_pages: int


class ProcessMeter:
    """Reads all processes and charges each to the partition of its real user.

    The real user and not the effective one: a tenant who runs a setuid program (``sudo``, ``ping``) pays
    for it. ``proc`` is where procfs is mounted. Raises AccountingError ``accounting.reading`` if that is
    not so.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = os.fspath(proc)
        self._microseconds_per_tick = 1_000_000 // os.sysconf("SC_CLK_TCK")
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._scans = 0
        self._last_io: dict[tuple[int, int], _Io] = {}
        try:
            self._boot = (proc / "sys/kernel/random/boot_id").read_text("ascii").strip()
        except OSError as error:
            raise _no_procfs(self._proc, error) from error

    def scan(self, users: Mapping[int, str]) -> ProcessScan:
        """Read every process whose real uid is in ``users`` (uid → partition).

        Memory is the sum of resident set sizes, so pages that processes share count in each of them. The
        fair share (PSS) needs ``smaps_rollup``, for which the kernel walks the page tables of each process
        with its memory map locked: 80 µs for a shell, milliseconds for a database, taken from the tenant in
        each pass.

        Processes that end meanwhile are left out. Raises AccountingError ``accounting.reading`` without
        procfs.
        """
        readings: list[ProcessReading] = []
        memory = dict.fromkeys(users.values(), 0)
        counts: Counter[str] = Counter(memory)
        unreadable = set()
        self._scans += 1
        last_io, self._last_io = self._last_io, {}
        for pid, partition, stat, io in self._found(users, last_io):
            if stat is None:
                unreadable.add(pid)
                continue
            cpu = stat.ticks * self._microseconds_per_tick
            readings.append(
                ProcessReading(
                    partition, self._boot, pid, stat.started, cpu, io.read, io.written, stat.parent
                )
            )
            self._last_io[pid, stat.started] = io
            memory[partition] += stat.resident_pages * self._page
            counts[partition] += stat.state not in _ZOMBIES
        return ProcessScan(tuple(readings), memory, dict(counts), frozenset(unreadable))

    def _found(
        self, users: Mapping[int, str], last_io: Mapping[tuple[int, int], _Io]
    ) -> Iterator[tuple[int, str, _Stat | None, _Io]]:
        """Yield pid, partition, stat and io; no stat where a process could not be read."""
        try:
            proc = os.open(self._proc, _OPEN | os.O_DIRECTORY)
        except OSError as error:
            raise _no_procfs(self._proc, error) from error
        try:
            owners = users if _owner_tells(proc) else {}
            for pid in [name for name in os.listdir(proc) if name.isdigit()]:  # noqa: PTH208 (of a descriptor)
                try:
                    partition, text = _charged(proc, pid, users, owners)
                    if partition is None:
                        continue
                    stat = _stat(text)
                    io = last_io.get((int(pid), stat.started))
                    if (
                        io is None
                        or io.activity != stat.activity
                        or (int(pid) + self._scans) % _IDLE_SCANS == 0
                    ):
                        io = _Io(stat.activity, *_io(proc, pid))
                    yield int(pid), partition, stat, io
                except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                    continue
                except (OSError, ValueError, IndexError):
                    yield int(pid), "", None, _NO_IO
        finally:
            os.close(proc)


def _owner_tells(proc: int) -> bool:
    """Say whether the owner of a process's files tells its real user; see ``_charged``."""
    with suppress(OSError):
        return _read(proc, "sys/fs/suid_dumpable").strip() != _ALWAYS_DUMPABLE
    return False


def _charged(
    proc: int, pid: str, users: Mapping[int, str], owners: Mapping[int, str]
) -> tuple[str | None, bytes]:
    """Give the partition that pays for a process, if any does, and its stat.

    The files in /proc/PID belong to the effective user, and to root where the process is not dumpable
    (fs/proc/base.c, task_dump_owner). The kernel makes a process so that is executed while its real and
    effective users differ (fs/exec.c, begin_new_exec) or that changes its effective one (kernel/cred.c,
    commit_creds); so another owner than root is the real user too. Making it dumpable again takes a setuid
    program that says so itself, whose owner then pays. Of root's the status tells, which takes longer
    than everything else together. fs.suid_dumpable = 1 switches this off: then status is always asked.
    """
    descriptor = os.open(f"{pid}/stat", _OPEN, dir_fd=proc)
    try:
        owner = os.fstat(descriptor).st_uid
        partition = owners.get(owner) if owner and owners else users.get(_real_uid(proc, pid))
        return partition, b"" if partition is None else _whole(descriptor, pid)
    finally:
        os.close(descriptor)


def _real_uid(proc: int, pid: str) -> int:
    status = _read(proc, f"{pid}/status")
    start = status.index(b"\nUid:") + len(b"\nUid:")
    return int(status[start : status.index(b"\n", start)].split()[0])


def _stat(text: bytes) -> _Stat:
    """Parse proc_pid_stat(5): state (3), parent (4), utime and stime (14, 15), starttime (22), rss (24); and as activity
    state, page faults of its own and of the children that it waited for (10 to 13), utime and stime.

    utime and stime are of all threads, ended ones included. The name (2) is the tenant's to choose and
    may hold spaces and parentheses, so what follows is found from the last parenthesis.
    """
    fields = text[text.rindex(b")") + 2 :].split(None, 22)
    return _Stat(
        fields[0],
        (fields[0], *fields[7:13]),
        int(fields[1]),
        int(fields[11]) + int(fields[12]),
        int(fields[19]),
        int(fields[21]),
    )


def _io(proc: int, pid: str) -> tuple[int | None, int | None]:
    """Give ``read_bytes`` and ``write_bytes`` of proc_pid_io(5), where the kernel counts and shows them.

    What it had fetched from disks, and what it made dirty in the page cache or wrote past it: of all its
    threads, and of the children that it waited for. What was dirtied and removed before it was written
    counts; ``cancelled_write_bytes`` would tell, but of whoever removed it, not of whoever had written it.
    """
    try:
        words = _read(proc, f"{pid}/io").split(None, 12)
    except OSError:  # no CONFIG_TASK_IO_ACCOUNTING, or it may not be asked; the rest of the process counts
        return None, None
    if words[8::2][:2] != _IO:
        raise ValueError(f"no io: {words}")
    return int(words[9]), int(words[11])


def _read(proc: int, name: str) -> bytes:
    descriptor = os.open(name, _OPEN, dir_fd=proc)
    try:
        return _whole(descriptor, name)
    finally:
        os.close(descriptor)


def _whole(descriptor: int, name: str) -> bytes:
    text = os.read(descriptor, _READ)
    if not text:  # some files of a process that was just reaped read as empty
        raise ProcessLookupError(name)
    return text


def _no_procfs(proc: str, error: OSError) -> AccountingError:
    return AccountingError(
        "accounting.reading",
        f"can not list processes in {proc}: {error}",
        resource=proc,
        hint="mount procfs there (mount -t proc proc /proc)",
        retryable=True,
    )
