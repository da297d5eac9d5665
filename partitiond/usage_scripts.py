"""``etc/report/*`` of partitions, run as their users: what makes the usage files that are taken in afterwards.

As in slapos.core 1.26 each is given one argument, the path of a file to write in ``var/xml_report``, and begins in
``etc/report``; other than there, each gets a file of its own. Promises: a script, a partition and a whole pass are bounded in
time, and so is what a script says; those for whom no time was left come first in the next pass, those who took too long last.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from partitiond import buildout, execute, files, privacy, programs
from partitiond.errors import FAMILY, sentence
from partitiond.supervision import MOST_PROGRAMS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from partitiond.context import Context
    from partitiond.node import Partition

logger = logging.getLogger(__name__)

LOG = "_report.log"  # no tenant's program has a name that begins so
PLACE = ("var", "xml_report")
_SAID_LIMIT = 64 * 1024  # bytes of what one script says
_LOG_LIMIT = 256 * 1024
_TOLD = 3  # events of a partition and pass
# the user changes into the directory: root would carry it to wherever a link there leads
_BEGIN = 'cd "$1" && exec "$2" "$3"'


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds for a script, for all of a partition, until no other partition is begun; partitions at the same time.

    Likewise for the files: seconds for those of a partition, and until no other partition's are begun.
    """

    script: float = 60.0
    partition: float = 120.0
    whole: float = 900.0
    side_by_side: int = 4
    files: float = 10.0
    all_files: float = 600.0


LIMITS = Limits()


@dataclass(slots=True)
class Turns:
    """Whose turn it is: when the scripts of each partition ran last, and who took too long then; likewise the files.

    What a script says is billed, so in a round each runs once, however often the round is tried. ``begun`` is when the round
    began, ``open`` whether its files are still to be taken, ``period`` the ended day that it was for, ``last`` when the last
    rounds of instances that go began, by guid.
    """

    ran: dict[str, float] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    taken: dict[str, float] = field(default_factory=dict)
    begun: float = 0.0
    open: bool = False
    period: int | None = None
    last: dict[str, float] = field(default_factory=dict)

    def begin(self) -> None:
        """Begin a round."""
        self.begun, self.open = time.monotonic(), True

    def begin_last(self, guids: Iterable[str]) -> None:
        """Begin the last rounds of instances, where they have not begun; those of others are over."""
        now = time.monotonic()
        self.last = {guid: self.last.get(guid, now) for guid in guids}

    def order(self, partitions: Iterable[Partition]) -> list[Partition]:
        """Those who waited the longest first, those who took too long after all others."""
        return sorted(partitions, key=lambda item: (item.id in self.late, self.ran.get(item.id, 0.0)))


@dataclass(slots=True)
class Ran:
    """What came of a partition's scripts: the files that those wrote that ended by themselves, and what went wrong."""

    written: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    late: bool = False
    said: bytearray = field(default_factory=bytearray)


def run(
    context: Context, partitions: Sequence[Partition], turns: Turns, limits: Limits = LIMITS
) -> dict[str, Ran]:
    """Run the scripts of partitions; what is not there had no turn, or no scripts."""
    end = time.monotonic() + limits.whole
    found: dict[str, Ran] = {}

    def one(item: Partition) -> None:
        if time.monotonic() >= end or context.stop.is_set():
            return
        with context.steady():
            found[item.id] = _of_partition(context, item, limits)
        turns.ran[item.id] = time.monotonic()
        (turns.late.add if found[item.id].late else turns.late.discard)(item.id)

    there = [item for item in turns.order(partitions) if _has_scripts(item)]
    with ThreadPoolExecutor(limits.side_by_side, "reports") as pool:
        for _ in pool.map(one, there):
            pass
    if len(found) < len(there) and not context.stop.is_set():
        logger.warning("usage: the scripts of %d partitions had no time left", len(there) - len(found))
    return found


def _has_scripts(partition: Partition) -> bool:
    """Whether there may be any: most partitions have none, and cost no more than this."""
    try:
        with files.directory(partition.path, "etc", "report") as here:
            return bool(files.names(here, 1))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (*FAMILY, OSError):
        return True  # what is wrong is said where it is run


def _of_partition(context: Context, partition: Partition, limits: Limits) -> Ran:
    ran = Ran()
    end = time.monotonic() + limits.partition
    try:
        privacy.ensure(context, partition)
        names = programs.executables(context, partition, "etc", "report")
        for name in names[:MOST_PROGRAMS]:
            left = end - time.monotonic()
            if left <= 0 or context.stop.is_set():
                ran.late = left <= 0
                ran.faults.append(f"etc/report/{name}: no time was left")
                break
            _run(context, partition, name, ran, min(left, limits.script))
        if names:
            _keep(context, partition, ran)
    except (*FAMILY, OSError) as error:
        ran.faults.append(sentence(error))
    if not context.stop.is_set():
        _tell(context, partition, ran)
    return ran


def _run(context: Context, partition: Partition, name: str, ran: Ran, seconds: float) -> None:
    directory = partition.path / "etc" / "report"
    file = f"slapreport.{secrets.token_hex(4)}"
    target = str(partition.path.joinpath(*PLACE, file))
    title = f"--- {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} etc/report/{name}\n"
    with heard() as (descriptor, said):
        outcome = execute.as_user(
            partition.user,
            partition.user,
            ["/bin/sh", "-c", _BEGIN, "sh", str(directory), str(directory / name), target],
            cwd=partition.path,
            env=execute.environment(str(partition.path), partition.user),
            log=descriptor,
            stop=context.stop,
            timeout=seconds,
            record=buildout.session_record(context.config, f"{partition.id}.report"),
            enter=privacy.entry(context.config, partition),
        )
    ran.said += title.encode() + said
    if outcome.cut_short is None:
        ran.written.add(file)
    ran.late |= outcome.cut_short is not None
    if not outcome.ok:
        ran.faults.append(f"etc/report/{name}: {buildout.ended(outcome)}")


@contextmanager
def heard() -> Iterator[tuple[int, bytearray]]:
    """A descriptor to write to, and the first of what is written; the rest is read too, so that nobody waits.

    Who still has it open afterwards, because it left the session of its script, is not listened to.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    said, over = bytearray(), threading.Event()

    def listen() -> None:
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        last = False
        while not last:
            last = over.is_set()
            if poll.poll(0 if last else 100):
                piece = os.read(reading, _SAID_LIMIT)  # a pipe holds no more
                said.extend(piece[: _SAID_LIMIT - len(said)])
                last = last or not piece

    thread = threading.Thread(target=listen, name="report output", daemon=True)
    thread.start()
    try:
        yield writing, said
    finally:
        os.close(writing)
        over.set()
        thread.join()
        os.close(reading)


def _keep(context: Context, partition: Partition, ran: Ran) -> None:
    """Keep what the scripts said in this pass, in place of the pass before. Raises OSError."""
    path = context.config.log_dir / partition.id / LOG
    files.write_path(path, bytes(ran.said[:_LOG_LIMIT]), mode=0o644)


def _tell(context: Context, partition: Partition, ran: Ran) -> None:
    """Record what went wrong: a few at most, and how many more."""
    for fault in ran.faults[:_TOLD]:
        logger.warning("%s: %s", partition.id, fault)
        context.events.record(
            "usage.failed",
            f"{partition.id}: {fault}",
            partition=partition.id,
            resource=f"usage/{partition.id}",
            reason=fault,
            hint=f"read {context.config.log_dir / partition.id / LOG}",
            count=len(ran.faults),
        )
