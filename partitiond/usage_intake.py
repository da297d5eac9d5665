"""Tenants' own usage files: taken from ``var/xml_report`` into the ledger, each once, whatever is put there.

Promises: what is taken is about the partition's own instance and nothing else; what cannot be taken is set aside with its
reason and harms no other file and no other partition; nothing is waited for, nothing is followed, no more is read than a bound;
who is killed at any moment has lost no file and counts none twice.

How: a file is moved to a name of ours in the same directory (nobody puts another in its place then), its row is committed, it
is removed, the row is marked. The directory is synced after the first and the third, so a power cut changes no order. A name of
ours that is found at the begin of a pass was left by one that was killed: its row says whether it counts already.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from accounting import rules, tioxml
from accounting.errors import AccountingError
from accounting.intake import Room
from partitiond import files, refused_usage, usage_scripts
from partitiond.errors import FAMILY, PartitiondError, sentence
from partitiond.passes import Result
from partitiond.refused_usage import KEPT_BYTES, MOST_KEPT, Refused, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from accounting.ledger import Ledger
    from accounting.tioxml import Movement
    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.node import Node, Partition
    from partitiond.state import InstanceState

logger = logging.getLogger(__name__)

MOST_FILES = 200
"""Of a partition and pass; the others have their turn in the next one."""
_MOST_LISTED = 1000
_QUIET_SECONDS = 2.0
_LAST = usage_scripts.Limits(whole=300.0, all_files=60.0)  # of all that go
_TOLD = 3  # events of a partition and pass
_OURS = re.compile(r"\.taking-[0-9a-f]{16}")
# what is being written, by the habits of those who write
_TEMPORARY = re.compile(r"[.#].*|.*(~|\.tmp|\.part|\.swp)", re.DOTALL)
_REPORTING = frozenset(("started", "stopped", "failed"))


@dataclass(slots=True)
class Intake:
    """What came of one partition: files that were taken, those that were refused, and whether some were too fresh."""

    taken: int = 0
    refused: list[Refused] = field(default_factory=list)
    fresh: bool = False
    more: bool = False
    until: float = math.inf


@dataclass(frozen=True, slots=True)
class _Taker:
    """Whose files are taken, and where to; ``anyhow``: also those that may still be written to."""

    config: Config
    ledger: Ledger
    partition: Partition
    guid: str
    resources: frozenset[str]
    at: float
    written: frozenset[str] = frozenset()
    anyhow: bool = False


class _RefusedError(Exception):
    """Why a file is not taken, what of it is kept, and its size."""

    def __init__(self, reason: str, content: bytes = b"", size: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.content, self.size = reason, content, size


class _ChangingError(Exception):
    """A file is being written to."""


# --- passes -----------------------------------------------------------------------------------------------------------


def run(
    context: Context,
    node: Node,
    ledger: Ledger,
    resources: frozenset[str],
    limits: usage_scripts.Limits = usage_scripts.LIMITS,
    *,
    since: float = math.inf,
) -> Result:
    """Run the scripts of all instances and take their files in; without ``resources`` nothing is touched.

    Scripts that ran ``since`` then (monotonic) are not run again. Failures are the node's own: what tenants do wrong is told as
    events. Raises AccountingError when the ledger cannot be used.
    """
    result = Result([], [])
    if not resources:
        return result
    ledger.try_out()  # else scripts would run for nothing
    states, _ = context.store.readable()
    known = {item.id: states.get(item.id) for item in node.partitions}
    there = [item for item in node.partitions if _reports(known[item.id])]
    ran = usage_scripts.run(context, _not_run(context, there, since), context.turns, limits)
    at = context.clock()
    takers = [
        _Taker(node.config, ledger, item, _guid(known[item.id]), resources, at, _written(ran.get(item.id)))
        for item in there
    ]
    takers.sort(key=lambda one: context.turns.taken.get(one.partition.id, 0.0))
    end = time.monotonic() + limits.all_files
    fresh = []
    for number, one in enumerate(takers):
        if time.monotonic() >= end:
            logger.warning("usage: the files of %d partitions had no time left", len(takers) - number)
            break
        context.turns.taken[one.partition.id] = time.monotonic()
        if _one(context, one, result, limits.files):
            fresh.append(one)
    if fresh and not context.stop.wait(_QUIET_SECONDS):
        for one in fresh:
            if (left := end - time.monotonic()) > 0:
                _one(context, one, result, min(left, limits.files))
    return result


def _not_run(context: Context, partitions: Iterable[Partition], since: float) -> list[Partition]:
    return [item for item in partitions if context.turns.ran.get(item.id, -math.inf) < since]


def final(
    context: Context,
    partitions: Iterable[Partition],
    ledger: Ledger,
    resources: frozenset[str],
    limits: usage_scripts.Limits = _LAST,
) -> Result:
    """Run the scripts of the instances that go and take in all that they say, for before anything is removed. As :func:`run`.

    However many there are, it is over in about ``limits.whole + limits.partition + limits.all_files`` seconds; whoever had no
    time is not waited for. Tried again, it runs nobody's scripts a second time.
    """
    result = Result([], [])
    states, _ = context.store.readable()
    going = [(item, guid) for item in partitions if (guid := _guid(states.get(item.id)))]
    if not resources or not going:
        return result
    ledger.try_out()
    turns = context.turns
    turns.begin_last(guid for _, guid in going)
    rest = [item for item, guid in going if _not_run(context, (item,), turns.last[guid])]
    ran = usage_scripts.run(context, rest, turns, limits)
    at, end = context.clock(), time.monotonic() + limits.all_files
    takers = [
        _Taker(context.config, ledger, item, guid, resources, at, _written(ran.get(item.id)), anyhow=True)
        for item, guid in going
    ]
    while takers:
        again = []
        for one in takers:
            if (left := end - time.monotonic()) <= 0:
                logger.warning("usage: the last files of %s had no time left", one.partition.id)
            elif _one(context, one, result, min(left, limits.files)):
                again.append(one)
        takers = again
    return result


def open_cases(context: Context, node: Node, resources: frozenset[str]) -> list[str]:
    """What of usage files is open on this node, in words."""
    if resources:
        return []
    states, _ = context.store.readable()
    waiting = [item.id for item in node.partitions if _reports(states.get(item.id)) and _says_something(item)]
    if not waiting:
        return []
    names = ", ".join(waiting[:_TOLD]) + (f" and {len(waiting) - _TOLD} more" if len(waiting) > _TOLD else "")
    return [f"usage files of {names} are left where they are: [accounting] names no partition_resources"]


def _reports(state: InstanceState | None) -> bool:
    return state is not None and state.life in _REPORTING and bool(state.instance_guid)


def _guid(state: InstanceState | None) -> str:
    return (state.instance_guid if state else None) or ""


def _written(ran: usage_scripts.Ran | None) -> frozenset[str]:
    return frozenset(ran.written) if ran else frozenset()


def _says_something(partition: Partition) -> bool:
    try:
        with files.directory(partition.path, *usage_scripts.PLACE) as here:
            return bool(files.names(here, 1))
    except (PartitiondError, OSError):
        return False


def _one(context: Context, taker: _Taker, result: Result, seconds: float) -> bool:
    """Take the files of one partition; return whether another look is worth it. Raises AccountingError."""
    if context.stop.is_set():
        return False
    name = taker.partition.id
    try:
        intake = _take(taker, seconds)
    except AccountingError:
        raise  # the next partition's would fail as well
    except (*FAMILY, OSError) as error:
        result.failures.append((name, error))
        logger.warning("%s: usage files: %s", name, sentence(error))
        return False
    _tell(context, name, intake.refused)
    if intake.taken or intake.refused:
        result.done.append(f"{name}: {intake.taken} usage files taken, {len(intake.refused)} refused")
    return intake.fresh or (intake.more and taker.anyhow)


def _tell(context: Context, partition: str, refused: Sequence[Refused]) -> None:
    for one in refused[:_TOLD]:
        message = f"{partition}: usage file {one.name}: {one.reason}"
        message += f" (one of {len(refused)} in this pass)" if len(refused) > 1 else ""
        logger.warning("%s", message)
        context.events.record(
            "usage.refused",
            message,
            partition=partition,
            resource=f"usage/{partition}",
            file=one.name,
            reason=one.reason,
            count=len(refused),
            hint=f"what it held is in {refused_usage.directory(context.config.state_dir, partition)}",
        )


# --- one partition ----------------------------------------------------------------------------------------------------


def _take(taker: _Taker, seconds: float = math.inf) -> Intake:
    """Take what is there. Raises AccountingError, PartitiondError ``usage.not_kept``: nothing is removed that did not count."""
    intake = Intake(until=time.monotonic() + seconds)
    try:
        with files.directory(taker.partition.path, *usage_scripts.PLACE) as here:
            _take_below(taker, here, intake)
    except FileNotFoundError:
        _forget_left(taker)
    except PartitiondError as error:
        if error.code != "files.not_a_directory":
            raise
        _put_aside(taker, [Refused("var/xml_report", str(error), once="not-a-directory")], intake)
    except OSError as error:  # of the tenant's directory: root's own have an error of their own
        reason = f"cannot be read: {error.strerror}"
        _put_aside(taker, [Refused("var/xml_report", reason, once=f"error-{error.errno}")], intake)
    return intake


def _take_below(taker: _Taker, here: int, intake: Intake) -> None:
    found, unseen = _look(here)
    _put_aside(taker, unseen, intake)
    left = [name for name, seen in found if _OURS.fullmatch(name) and not stat.S_ISDIR(seen.st_mode)]
    intake.more = len(left) > MOST_FILES
    _settle(taker, here, {name: name for name in left[:MOST_FILES]}, intake)
    if intake.more:
        return  # as many of our names are somebody else's doing
    _forget_left(taker)
    claimed = _claim(taker, here, found, intake)
    if claimed:
        os.fsync(here)
        _settle(taker, here, claimed, intake)


def _look(here: int) -> tuple[list[tuple[str, os.stat_result]], list[Refused]]:
    """What is in the directory, the oldest first, and what cannot even be looked at (a file system of the tenant's own).

    Of very many only some, which go, so that others follow.
    """
    found, unseen = [], []
    for name in files.names(here, _MOST_LISTED):
        try:
            found.append((name, os.stat(name, dir_fd=here, follow_symlinks=False)))
        except FileNotFoundError:
            continue
        except OSError as error:
            reason = f"cannot be looked at: {error.strerror}"
            once = f"unseen-{sha256(os.fsencode(name)).hexdigest()[:16]}"
            unseen.append(Refused(plain(name), reason, once=once))
    return sorted(found, key=lambda one: (one[1].st_mtime_ns, one[0])), unseen


def _forget_left(taker: _Taker) -> None:
    """What of ours is not there any more was removed before the mark could be set."""
    left = taker.ledger.intake_left().get(taker.partition.id)
    if left:
        taker.ledger.removed(taker.partition.id, left)


def _claim(
    taker: _Taker, here: int, found: Iterable[tuple[str, os.stat_result]], intake: Intake
) -> dict[str, str]:
    """Move files to names of ours; give the tenant's name of each."""
    claimed: dict[str, str] = {}
    stays = []
    now = time.time()
    for name, seen in found:
        if _TEMPORARY.fullmatch(name):
            continue
        if stat.S_ISDIR(seen.st_mode):
            reason = "is a directory; it is left where it is"
            stays.append(Refused(plain(name), reason, once=f"directory-{seen.st_ino}"))
            continue
        if _is_fresh(taker, name, seen, now):
            intake.fresh = True
            continue
        if len(claimed) >= MOST_FILES:
            intake.more = True
            break
        ours = f".taking-{secrets.token_hex(8)}"
        try:
            os.rename(name, ours, src_dir_fd=here, dst_dir_fd=here)
        except FileNotFoundError:
            continue
        except OSError as error:  # something is mounted there, or it is immutable
            reason = f"cannot be moved: {error.strerror}"
            stays.append(Refused(plain(name), reason, once=f"unmovable-{seen.st_ino}"))
            continue
        claimed[ours] = name
    _put_aside(taker, stays, intake)
    return claimed


def _is_fresh(taker: _Taker, name: str, seen: os.stat_result, now: float) -> bool:
    """Whether a file may still be written to; what will be refused anyhow is not waited for."""
    ours = stat.S_ISREG(seen.st_mode) and seen.st_uid == taker.partition.uid
    ready = taker.anyhow or name in taker.written
    return ours and not ready and 0 <= now - seen.st_ctime < _QUIET_SECONDS


def _settle(taker: _Taker, here: int, claimed: dict[str, str], intake: Intake) -> None:
    """Count the files of these names of ours, or set them aside; then remove them; then say that they are removed."""
    gone: list[str] = []
    sources: list[str] = []
    refused: list[Refused] = []
    room = taker.ledger.intake_room(taker.partition.id, taker.guid) if claimed else Room()
    counted = taker.ledger.intake_left().get(taker.partition.id, frozenset()) if claimed else frozenset()
    for ours, name in claimed.items():
        if time.monotonic() > intake.until:
            intake.more = True  # the next pass finds them under our names
            break
        try:
            source, movements = _read(taker, here, ours, room, counted)
        except FileNotFoundError:
            continue
        except _ChangingError:
            intake.fresh = True
            continue
        except _RefusedError as refusal:
            refused.append(Refused(plain(name), refusal.reason, refusal.content[:KEPT_BYTES], refusal.size))
            if len(refused) > MOST_KEPT:
                refused[-MOST_KEPT - 1] = replace(refused[-MOST_KEPT - 1], content=b"")
            gone.append(ours)
            continue
        if movements:
            new = taker.ledger.take_in(taker.partition.id, taker.guid, source, movements, taker.at)
            sources.append(source)
            intake.taken += new
        gone.append(ours)
    _put_aside(taker, refused, intake)
    for ours in gone:
        _remove(here, ours)
    if gone:
        os.fsync(here)
    if sources:
        taker.ledger.removed(taker.partition.id, sources)


def _remove(here: int, ours: str) -> None:
    # a directory that the tenant put in its place stays: it is told in the next pass
    with suppress(FileNotFoundError, IsADirectoryError):
        os.unlink(ours, dir_fd=here)


def _put_aside(taker: _Taker, refused: Sequence[Refused], intake: Intake) -> None:
    """Keep what is refused. Raises PartitiondError ``usage.not_kept``."""
    intake.refused += refused_usage.keep(taker.config.state_dir, taker.partition.id, taker.guid, refused)


def _read(
    taker: _Taker, here: int, ours: str, room: Room, counted: frozenset[str]
) -> tuple[str, tuple[Movement, ...]]:
    """Read a file and judge it: what tells it from every other, and what it says. Those that are ``counted`` take no room.

    Raises FileNotFoundError, _RefusedError, _ChangingError.
    """
    try:
        with files.plain(ours, dir_fd=here) as descriptor:
            found = os.fstat(descriptor)
            _judge(taker, descriptor, found)
            content = files.content_of(descriptor, tioxml.MOST_BYTES + 1)
            after = os.fstat(descriptor)
    except PartitiondError as error:
        raise _RefusedError(str(error)) from error
    if not taker.anyhow and _version(found) != _version(after):
        raise _ChangingError
    source = f"{found.st_dev}:{found.st_ino}:{sha256(content).hexdigest()}"
    try:
        claims = tioxml.read_consumption(content)
        own_names = {taker.partition.id, taker.partition.user}
        movements = rules.accept(claims, guid=taker.guid, own_names=own_names, resources=taker.resources)
        if source not in counted:
            room.take(movements)
    except AccountingError as error:
        raise _RefusedError(error.message, content, len(content)) from error
    return source, movements


def _judge(taker: _Taker, descriptor: int, found: os.stat_result) -> None:
    """Refuse what is not the tenant's own plain file, before a byte of it is read."""
    if found.st_uid != taker.partition.uid:
        raise _RefusedError(f"belongs to uid {found.st_uid}", size=found.st_size)
    if found.st_size > tioxml.MOST_BYTES:
        reason = f"has {found.st_size} bytes, and at most {tioxml.MOST_BYTES} are read"
        raise _RefusedError(reason, files.content_of(descriptor, KEPT_BYTES), found.st_size)


def _version(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
