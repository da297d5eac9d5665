"""A configuration tried by another stunnel, before the one that runs is told of it.

stunnel has no option to check a configuration; but one that is given the same files and listens nowhere in particular says the
same of them (5.68, measured). Promises: it runs as the partition's user, where its stunnel runs, for a moment, and ends with
us; nobody's listener is touched.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitiond import execute, privacy, procfs
from partitiond.errors import PartitiondError
from stunnel_mgr import render, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.node import Partition

_SECONDS = 10.0
_AT_ONCE = 8
_PIECE = 64 * 1024
_SAID = 2000
_MOST_READ = 1 << 20  # a hundred services say some 100 KiB
_GLANCE = 0.25


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried: the partition, the directory in which the trial's configuration lies, its services."""

    partition: Partition
    directory: Path
    services: tuple[str, ...]


def run(config: Config, program: str, trials: Sequence[Trial]) -> dict[str, PartitiondError]:
    """Try some configurations; return why those that are of no use are so, by partition."""
    failed = {}
    for first in range(0, len(trials), _AT_ONCE):
        some = trials[first : first + _AT_ONCE]
        started: list[subprocess.Popen[bytes]] = []
        try:
            started += [_start(config, program, one) for one in some]
            deadline = time.monotonic() + _SECONDS
            for one, process in zip(some, started, strict=True):
                if reason := _reason(one, process, deadline):
                    failed[one.partition.id] = _useless(one.partition, reason)
                _end(process)
        finally:
            for process in started:  # once more does nothing
                _end(process)
    return failed


def _useless(partition: Partition, reason: str) -> PartitiondError:
    return PartitiondError(
        "tunnel.trial",
        f"stunnel would not take the new configuration: {reason}; it goes on with the one that it has",
        resource=partition.id,
        hint="correct what it names; of a damaged key remove certificate and key, and partitiond apply makes another pair",
        retryable=True,
    )


def _start(config: Config, program: str, trial: Trial) -> subprocess.Popen[bytes]:
    partition = trial.partition
    switch = execute.switch(str(partition.uid), str(partition.gid), "--pdeathsig", "KILL")
    return subprocess.Popen(
        [*privacy.entry(config, partition), *switch, program, str(trial.directory / render.TRIAL_FILE)],
        cwd="/",
        env=execute.environment(str(partition.path), partition.user),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _reason(trial: Trial, process: subprocess.Popen[bytes], deadline: float) -> str:
    """Why the configuration is of no use; "" when it is good."""
    assert process.stdout is not None  # noqa: S101 - it was asked for
    descriptor = process.stdout.fileno()
    reader, last, read = verdict.VerdictReader(trial.services), b"", 0
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    glance = time.monotonic() + _GLANCE
    while (now := time.monotonic()) < deadline:
        if now >= glance:
            glance = now + _GLANCE
            if procfs.is_stopped(process.pid):
                return "somebody has stopped the one that tried it"
        if not poll.poll(_GLANCE * 1000):
            continue
        piece = os.read(descriptor, _PIECE)
        found = reader.feed(piece)
        if found is not None:
            return "" if found.ok else found.reason
        last = (last + piece)[-_SAID:]
        read += len(piece)
        if not piece:
            return last.decode("utf-8", "replace").strip().rpartition("\n")[2] or "it ended without a word"
        if read > _MOST_READ:
            return "it said too much"
    return f"it said nothing within {_SECONDS:.0f} s"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
