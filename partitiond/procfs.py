"""What ``/proc`` says of single processes (proc(5)): which there are, whether they live and how long, whose they are, what they
handle.

A process may end at any moment, also between two readings: each of these says so in its own way and raises for no such
reason.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Family(NamedTuple):
    """Where a process belongs: its parent, process group and session, and when it started, in ticks since the machine did."""

    parent: int
    group: int
    session: int
    start: int


def pids() -> list[int]:
    """All processes that can be seen."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - names suffice


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return _stat(pid)[0] != b"Z"
    except OSError:
        return False


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by a signal or a debugger of its user's: nothing will come from it meanwhile."""
    try:
        return _stat(pid)[:1] in ([b"T"], [b"t"])
    except (FileNotFoundError, ProcessLookupError):
        return False


def family_of(pid: int) -> Family | None:
    """The family of a process that is not a zombie."""
    try:
        fields = _stat(pid)
    except OSError:
        return None
    if fields[0] in (b"Z", b"X"):
        return None
    return Family(int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def session_of(pid: int) -> int | None:
    """The session of a process that is not a zombie."""
    try:
        fields = _stat(pid)
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[3])


def started(pid: int) -> int | None:
    """When a process that is no zombie started, in clock ticks since boot: with its number that is one process and no other."""
    try:
        fields = _stat(pid)
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def age(pid: int) -> float:
    """For how many seconds a process is there; 0 when it is gone."""
    ticks = started(pid)
    if ticks is None:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def await_end(numbers: Iterable[int], deadline: float) -> None:
    """Wait until all of these processes have ended, by the monotonic clock until a deadline."""
    with ExitStack() as stack:
        for pid in filter(None, numbers):
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                stack.callback(os.close, descriptor)
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                poll.poll(max(0.0, deadline - time.monotonic()) * 1000)


def boot() -> str:
    """The boot that the machine is in."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
        return stream.read().strip()


def user_of(pid: int) -> int | None:
    """The real user of a process that is not a zombie."""
    try:
        text = _read(pid, "status")
    except OSError:
        return None
    return None if b"\nState:\tZ" in text else int(text.partition(b"\nUid:")[2].split(maxsplit=1)[0])


def handles(pid: int, number: int) -> bool | None:
    """Whether a process has a handler for a signal (SigCgt in proc_pid_status(5)); None when it is gone."""
    try:
        text = _read(pid, "status")
        return bool(int(text.partition(b"\nSigCgt:")[2].split()[0], 16) & 1 << (number - 1))
    except (OSError, IndexError):
        return None


def words(pid: int, name: str) -> list[bytes]:
    """What a process was started with: its ``cmdline`` or ``environ``; empty where that cannot be read."""
    try:
        return _read(pid, name).split(b"\0")
    except OSError:
        return []


def command(pid: int) -> list[bytes]:
    """The arguments of a process. One that is amid its execve(2) has none yet (begin_new_exec() to create_elf_tables() in the
    kernel), and whoever started it goes on meanwhile: it is waited for, a second at most.
    """
    deadline = time.monotonic() + 1.0
    while (found := words(pid, "cmdline")) == [b""] and _has_program(pid) and time.monotonic() < deadline:
        time.sleep(0.002)
    return found


def _has_program(pid: int) -> bool:
    """Whether it executes a file: threads of the kernel and zombies do not."""
    try:
        os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 - it may lead nowhere
    except OSError:
        return False
    return True


def _stat(pid: int) -> list[bytes]:
    """State, ppid, pgrp, session and so on (proc_pid_stat(5)); the name before may hold anything, parentheses too."""
    return _read(pid, "stat").rpartition(b")")[2].split()


def _read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as stream:
        return stream.read()
