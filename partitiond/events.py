"""The log of what happened to the node: JSON lines in ``log_dir/events.jsonl``, written by whichever partitiond is at work.

What peers and strangers do at tunnels goes into ``sessions.jsonl``, of the same form and bounds: however often they knock, they
push nothing of the node's own out of its log. Readers are given both as one.

Promises: one line is one write, so that two programs cannot mix theirs and a crash leaves at most a torn last line, which
readers skip; the log is bounded (rotated by size, three old files); a log that cannot be written, on a full disk say, holds up
nothing and is complained of once.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import itertools
import json
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

FILE = "events.jsonl"
SESSIONS = "sessions.jsonl"
OLD_FILES = 3
LIMIT = 10 << 20

NAMES = frozenset(
    (
        "apply.done apply.failed block-device.refused config.refused config.reloaded directory.refused drift.failed"
        " drift.fight drift.found drift.repaired instance.destroyed instance.destroying instance.failed instance.refused"
        " instance.started instance.stopped node.removed node.started node.stopped software.available software.failed"
        " software.kept software.removed incident.begun incident.ended promise.failed promise.ok usage.damaged usage.failed"
        " usage.full usage.refused usage.resumed usage.unrecorded"
        " quota.exceeded quota.near quota.renewed report.held report.refused report.sent storage.refused"
        " certificate.expiring certificate.renewed destroy.held master.back master.lost node.rebooted node.registered"
        " instance.prerm_failed instance.wanted_back watchdog.banged watchdog.started"
        " mesh.peer_down mesh.peer_up mesh.refused mesh.trouble"
        " trial.begun trial.confirmed trial.rolled_back"
        " tunnel.cut tunnel.expiring tunnel.failed tunnel.refused tunnel.rejected tunnel.session"
    ).split()
)
"""Every event that there is; names are stable, more may come."""

_MODE = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


def now() -> str:
    """The time as RFC 3339 in UTC, with milliseconds."""
    moment = datetime.datetime.now(datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def files(log_dir: Path, name: str = FILE) -> list[Path]:
    """The files of a log, the oldest first; not all of them need be there."""
    return [*(log_dir / f"{name}.{number}" for number in range(OLD_FILES, 0, -1)), log_dir / name]


class EventLog:
    """Writes to a log of a ``log_dir``, from whatever thread; ``limit`` is the size in bytes at which it is rotated."""

    def __init__(self, log_dir: Path, limit: int = LIMIT, *, name: str = FILE) -> None:
        self._log_dir, self._limit, self._name = log_dir, limit, name
        self._turn = threading.Lock()
        self._failed = False

    def record(
        self,
        event: str,
        message: str,
        *,
        partition: str | None = None,
        resource: str | None = None,
        **details: Any,
    ) -> None:
        """Write one event; ``details`` are further fields, those that are None are left out.  Never raises."""
        value = {
            "time": now(),
            "event": event,
            "partition": partition,
            "resource": resource,
            "message": message,
            **{name: detail for name, detail in details.items() if detail is not None},
        }
        # ASCII: a lone surrogate in a name, or a line separator of Unicode, must not harm the line
        line = json.dumps(value).encode("ascii") + b"\n"
        try:
            with self._turn:
                self._append(line)
        except OSError as error:
            if not self._failed:
                logger.warning("%s: events are not recorded: %s", self._log_dir / self._name, error.strerror)
            self._failed = True
        else:
            self._failed = False

    def _append(self, line: bytes) -> None:
        path = self._log_dir / self._name
        descriptor = os.open(path, _MODE, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # what a crash or a full disk tore must not take this line with it
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, "no space left, a line was cut off")
            if size + len(line) >= self._limit:
                self._rotate(descriptor, path)
        finally:
            os.close(descriptor)

    def _rotate(self, descriptor: int, path: Path) -> None:
        """Move each file one on; one program does it, the others go on writing where they are."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return
        names = files(self._log_dir, self._name)
        for older, newer in itertools.pairwise(names):
            if newer.exists():
                newer.rename(older)
