"""Promises: what an instance says of itself whether it works, asked at the end of its processing and in between.

As under slapgrid (slapos.core 1.26): plugins ``etc/plugin/*.py`` and programs ``etc/promise/*`` are run as the partition's
user; at processing all of them are *tested*, and one that fails fails the instance; in between each is looked at for an
*anomaly* in its own rhythm, and the master is told of the change from good to bad and back. No master and no buildout is needed
for it.

Promises: those of a partition that hang hold up no other partition; what a tenant says is bounded, and decoded strictly.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from partitiond import buildout, certificates, execute, files, incidents, namespaces, privacy
from partitiond.errors import FAMILY, PartitiondError, printable, sentence
from partitiond.passes import Result, pause_after, report
from partitiond.promise_book import ALL, Standing, stand
from partitiond.promise_process import Place, PromiseServer
from partitiond.promise_results import shown
from partitiond.promise_runner import MOST

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from accounting.ledger import Ledger
    from partitiond.context import Context
    from partitiond.node import Node, Partition
    from partitiond.promise_book import Page
    from partitiond.promise_results import Ran
    from partitiond.state import InstanceState

logger = logging.getLogger(__name__)

_AT_PROCESSING = 5  # times the limit of one promise, for all of a partition
_IN_BETWEEN = 2
_MOST_REPORTED = 4000
_MOST_LOGGED = 300
_PLACE = (".slapgrid", "promise")
_SCRIPT_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class PromiseOutcome:
    """What fails of a partition's promises, by name, with what each said."""

    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """The words for the master, as slapgrid has them: of the first one; empty where none fails."""
        for name, said in self.failed.items():
            return f"Promise {name!r} failed with output: {said}"[-_MOST_REPORTED:]
        return ""


@dataclass(frozen=True, slots=True)
class _Turn:
    """One run that is to be made."""

    partition: Partition
    state: InstanceState
    page: Page
    anomaly: bool
    force: bool = False


def check(context: Context, partition: Partition, release: str) -> PromiseOutcome:
    """Test all promises of a partition now, at the end of its processing with a release, and remember what came of it.

    Raises PartitiondError ``promises.server``, ``privacy.not_made``, or OSError.
    """
    return check_all(context, {partition.id: release}, (partition,))[partition.id]


def check_all(
    context: Context, releases: Mapping[str, str], partitions: Iterable[Partition]
) -> dict[str, PromiseOutcome]:
    """Test all promises of some partitions now, one partition after the other; ``releases`` are those they run.

    Raises as :func:`check` does.
    """
    found: dict[str, PromiseOutcome] = {}
    server: PromiseServer | None = None
    try:
        for partition in partitions:
            with context.promises.turn(partition.id, wait=True):
                state = context.store.instance(partition.id)
                page = context.promises.page(partition.id, state.instance_guid or "")
                if not _may_have(partition):
                    _take_in(context, partition.id, page, None)
                else:
                    server = server or PromiseServer()
                    turn = _Turn(partition, state, page, anomaly=False, force=True)
                    ran = _run(context, server, turn, releases[partition.id])
                    if context.stop.is_set():
                        raise _stopping(partition)
                    _take_in(context, partition.id, page, ran, force=True)
                page.broken = bool(page.failing())
                page.told = page.told and page.broken
                context.promises.mended.discard(partition.id)
                _save(context, partition.id, page)
                found[partition.id] = PromiseOutcome(page.failing())
    finally:
        if server is not None:
            server.close()
    return found


def _stopping(partition: Partition) -> PartitiondError:
    return PartitiondError(
        "promises.stopped", "the daemon is stopping", resource=partition.id, hint="", retryable=True
    )


def run_pass(context: Context, node: Node, only: frozenset[str] = frozenset()) -> Result:
    """Look at what is due of the promises of instances that are to run, or of ``only`` these; tell the master of changes."""
    result = Result([], [])
    turns = [turn for turn in _due(context, node) if not only or turn.partition.id in only]
    if not turns:
        return result
    began = time.monotonic()
    waiting = sorted(turns, key=lambda turn: turn.page.ran_at)
    # at once: who hangs now is not to be run again by that
    swift, hung = [[turn for turn in waiting if turn.page.slow == slow] for slow in (False, True)]
    bound = 2 * (os.cpu_count() or 1)
    with _serving() as server, ThreadPoolExecutor(bound, "promises") as pool:
        # those that had hung wait for all others, and are begun only as long as the next pass is not due
        for band, until in ((swift, None), (hung, began + context.config.intervals.promise / 2)):
            runs = {pool.submit(_one, context, server, turn, until): turn for turn in band}
            for done in as_completed(runs):
                turn = runs[done]
                try:
                    if done.result() and not context.stop.is_set():
                        _tell_master(context, turn)
                except (*FAMILY, OSError) as error:
                    result.failures.append((turn.partition.id, error))
                    logger.warning("%s: promises: %s", turn.partition.id, sentence(error))
    return result


class _serving(PromiseServer):  # noqa: N801 - reads as what it is
    """A server for the block."""

    def __enter__(self) -> PromiseServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _due(context: Context, node: Node) -> list[_Turn]:
    """The runs that are due; what is known of instances that do not run is forgotten."""
    states, damaged = context.store.readable()
    left = set(context.promises.partitions())
    turns = []
    for partition in node.partitions:
        state = states.get(partition.id)
        if partition.id in damaged:
            left.discard(partition.id)
        elif context.config.grid.force_stop:
            continue
        elif state is not None and state.wanted == "started" and state.life in ("started", "failed"):
            left.discard(partition.id)
            page = context.promises.page(partition.id, state.instance_guid or "")
            turn = _Turn(partition, state, page, anomaly=state.life == "started")
            known = page.standings and page.ran_at
            if len(_spared(context, turn)) < len(page.standings) if known else _may_have(partition):
                turns.append(turn)
    for name in left:
        with context.promises.turn(name, wait=False) as got:
            if got:
                context.promises.forget(name)
    return turns


def _spared(context: Context, turn: _Turn) -> list[str]:
    """What is not due: its own time comes after the pass that comes next, or it has nothing to say in this mode."""
    soon = time.monotonic() + context.config.intervals.promise / 2
    return [
        key
        for key, one in turn.page.standings.items()
        if not turn.force and (one.due > soon or not (one.sensed if turn.anomaly else one.tested))
    ]


def _may_have(partition: Partition) -> bool:
    """Whether there may be any: who has none costs no more than this."""
    for name in ("plugin", "promise"):
        try:
            with files.directory(partition.path, "etc", name) as here:
                if files.names(here, 1):
                    return True
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (*FAMILY, OSError):
            return True  # its user may see it otherwise
    return False


def _one(context: Context, server: PromiseServer, turn: _Turn, until: float | None) -> bool:
    """Make one run, where it is the partition's turn and there is time; whether it was made."""
    name = turn.partition.id
    if until is not None and time.monotonic() > until:
        return False
    with context.steady(), context.promises.turn(name, wait=False) as got:
        if not got or _is_off(context, name, turn.state):
            return False
        ran = _run(context, server, turn, turn.state.software_release or "")
        if _is_off(context, name, turn.state):
            return False
        _take_in(context, name, turn.page, ran)
    return True


def _is_off(context: Context, name: str, before: InstanceState) -> bool:
    """Whether a partition is not to be asked now: what is found of services that come and go says nothing."""
    if context.stop.is_set() or context.promises.rests(name):
        return True
    now = context.store.instance(name)
    return (now.life, now.wanted, now.instance_guid) != (before.life, before.wanted, before.instance_guid)


def _run(context: Context, server: PromiseServer, turn: _Turn, release: str) -> Ran:
    config, item, page = context.config, turn.partition, turn.page
    privacy.ensure(context, item)
    _hand_over(item)
    pin = str(privacy.directory(config) / item.id) if privacy.is_private(config, item) else ""
    try:
        groups = tuple(os.getgrouplist(item.user, item.gid))
    except KeyError:
        groups = (item.gid,)
    place = Place(
        uid=item.uid,
        gid=item.gid,
        groups=groups,
        cwd=str(item.path),
        pin=pin,
        ipc=str(privacy.directory(config) / namespaces.IPC) if pin else "",
    )
    limit = config.grid.promise_timeout
    timeout = int(limit) if limit.is_integer() else limit  # plugins know it as a whole number
    job: dict[str, Any] = {
        "mode": "anomaly" if turn.anomaly else "test",
        "timeout": timeout,
        "budget": timeout * (_AT_PROCESSING if turn.force else _IN_BETWEEN),
        "cwd": place.cwd,
        "env": {
            **execute.environment(place.cwd, item.user),
            "SLAPGRID_INSTANCE_ROOT": str(config.instance_root),
        },
        "python": interpreter(context, release),
        "config": _configuration(context, item),
        "spared": _spared(context, turn),
        "last": sorted(page.last),
        "rows": {key: one.row for key, one in page.standings.items() if one.row},
    }
    ran = server.run(place, job, context.stop)
    page.slow = ran.seconds > timeout / 2
    return ran


def _hand_over(partition: Partition) -> None:
    """Let what root has made on the way to the results be the user's, as slapgrid does. Raises OSError."""
    for depth in range(len(_PLACE)):
        try:
            with files.directory(partition.path, *_PLACE[: depth + 1]) as here:
                if os.fstat(here).st_uid == 0 != partition.uid:
                    os.fchown(here, partition.uid, partition.gid)
        except (FileNotFoundError, PartitiondError):
            return  # a link, say: where that leads its user may write itself, or not


def _configuration(context: Context, partition: Partition) -> dict[str, str | None]:
    """What plugins are told of the node."""
    config = context.config
    key, certificate = certificates.paths(config, partition) or (None, None)
    return {
        "master-url": config.master_url,
        "partition-cert": str(certificate) if certificate else None,
        "partition-key": str(key) if key else None,
        "partition-id": partition.id,
        "computer-id": config.computer_id,
    }


def interpreter(context: Context, release: str) -> str:
    """The Python of a release, by the first words of its ``bin/buildout``, as slapgrid finds it; else our own."""
    directory = buildout.software_directory(context.config, release)
    try:
        with files.directory(context.config.software_root, directory.name, "bin") as here:
            lines = files.read("buildout", dir_fd=here, limit=_SCRIPT_LIMIT).splitlines()
        first, second = ([os.fsdecode(line) for line in lines[:2]] + ["", ""])[:2]
        words = first[2:].split(None, 1) if first.startswith("#!") else []
        # a path too long for the kernel is put into a second line
        if words[:1] == ["/bin/sh"] and (more := shlex.split(second))[:1] == ["exec"]:
            words = more[1:2]
    except (*FAMILY, OSError, ValueError):
        words = []
    return words[0] if words and words[0].startswith("/") else sys.executable


# --- what comes of it ---------------------------------------------------------------------------------------------------


def _take_in(context: Context, partition: str, page: Page, ran: Ran | None, *, force: bool = False) -> None:
    """Remember what a run said (None: there is nothing to be run), and record what changed."""
    now = context.clock()
    before = page.standings
    results = {} if ran is None else ran.results
    after = {key: stand(result, before.get(key), now) for key, result in results.items()}
    # who was not mentioned by a whole run is there no more
    kept = (
        before if ran is not None and (not ran.whole or ran.left) else ran.spared if ran is not None else ()
    )
    after |= {key: before[key] for key in kept if key in before and key not in after and key != ALL}
    fault = "" if ran is None else _fault(ran, force=force)
    page.faults = page.faults + 1 if fault else 0
    # in between, one time is none: it may have been a bad moment of the machine
    if fault and (force or page.faults > 1):
        since = before[ALL].since if ALL in before else now
        after[ALL] = Standing(failed=True, message=fault, since=since, seconds=ran.seconds if ran else 0.0)
    page.standings, page.ran_at = after, time.monotonic()
    page.last = frozenset(results) if ran is not None and ran.left else frozenset()
    for key in sorted(before.keys() | after.keys()):
        _record(context, partition, key, after.get(key), before.get(key), now)
    if {key: one.failed for key, one in before.items()} != {key: one.failed for key, one in after.items()}:
        _save(context, partition, page)


def _fault(ran: Ran, *, force: bool) -> str:
    """What is wrong with a run as a whole, which is as bad as a promise that fails."""
    if ran.fault:
        return f"its promises could not be run to their end: {ran.fault}"
    if ran.more:
        return f"it has {MOST + ran.more} promises; {MOST} are run"
    return f"no time was left for {ran.left} of its promises" if ran.left and force else ""


def _record(
    context: Context, partition: str, key: str, one: Standing | None, before: Standing | None, now: float
) -> None:
    """Record a change between good and bad; what is gone is not bad any more."""
    was, fails = before is not None and before.failed, one is not None and one.failed
    allowance = context.promises.allowance
    if was == fails or allowance.left(partition) <= 0:
        return
    allowance.take(partition, 1)
    name = shown(key)
    what = f"fails: {one.message}" if one and fails else "is good again" if one else "is there no more"
    context.events.record(
        "promise.failed" if fails else "promise.ok",
        f"{partition}: promise {name} {what}",
        partition=partition,
        resource=f"promise/{partition}/{name}",
        seconds=round(now - before.since, 3) if before and was else None,
    )
    level = logging.WARNING if fails else logging.INFO
    logger.log(level, "%s: promise %s %s", partition, name, printable(what[:_MOST_LOGGED]))


def _save(context: Context, partition: str, page: Page) -> None:
    try:
        context.promises.save(partition, page)
    except OSError as error:
        logger.warning("%s: what its promises said is not kept: %s", partition, error)


def _tell_master(context: Context, turn: _Turn) -> None:
    """Tell the master of a change in between; an instance that is failed is told of by its next processing."""
    partition, page = turn.partition.id, turn.page
    failing = page.failing()
    if not turn.anomaly:
        if page.broken and not failing:
            page.broken = False
            context.promises.mended.add(partition)
            context.wake_instances()
        return
    if context.store.instance(partition).dropped:
        return  # the master has another one there, or none
    _bang(context, partition, page)
    if bool(failing) == page.told:
        return
    if failing:
        message = PromiseOutcome(failing).message
        told = report(lambda: context.client.instance_error(partition, message), partition)
    else:
        told = report(lambda: context.client.instance_started(partition), partition)
    if told:
        page.told = bool(failing)
        _save(context, partition, page)


def _bang(context: Context, partition: str, page: Page) -> None:
    """Have the instance processed anew where a plugin asks for it: at once, and then ever more seldom while it fails."""
    asking = [key for key, one in page.standings.items() if one.failed and one.bang]
    if not asking:
        page.bangs = 0
        return
    if page.bangs and time.monotonic() < page.bang_after:
        return
    page.bangs += 1
    page.bang_after = time.monotonic() + pause_after(page.bangs)
    name = shown(asking[0]).removesuffix(".py")
    if report(lambda: context.client.bang(partition, f"Promise {name} is failing"), partition):
        context.wake_instances()


def observe(context: Context, ledger: Ledger) -> None:
    """Post which promises fail as incidents, in the lane of the meters. Raises AccountingError: then the next pass does."""
    pages = context.promises.ran()
    failing = {name: (page.guid, page.failing()) for name, page in pages.items()}
    told = {name: found for name, found in failing.items() if found[1] or pages[name].posted}
    if not told:
        return
    incidents.record_promises(context, ledger, told)
    for name, (_, found) in told.items():
        pages[name].posted = bool(found)
