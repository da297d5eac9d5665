"""Tunnels, carried out: files, trial, reload, verdict, and the end of sessions that are not allowed any more.

All partitions take each step together: a node of a hundred stunnels asks supervisord once and waits once.

Promises: what runs is not told of a configuration before another stunnel has found it good; the configuration on disk is
whole, and one that was found good where there was something to lose; no failed reload goes unseen; where a port is taken in
the last moment, the partition's other tunnels are back at once; a change counts as done only when whoever it disallows is cut
off.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from netplan import sock_diag
from netplan.errors import NetplanError
from partitiond import (
    files,
    identities,
    privacy,
    procfs,
    tunnel_declarations,
    tunnel_events,
    tunnel_memory,
    tunnel_sessions,
    tunnel_trial,
    tunnels,
)
from partitiond.errors import FAMILY, PartitiondError, sentence
from partitiond.tunnel_memory import Loaded
from stunnel_mgr import render, verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence
    from pathlib import Path

    from partitiond.context import Context
    from partitiond.node import Partition
    from partitiond.supervision import Process
    from partitiond.tunnel_declarations import PartitionTunnels
    from partitiond.tunnel_memory import Allowed
    from partitiond.tunnels import TunnelOperation
    from stunnel_mgr.revocation import Cut
    from stunnel_mgr.verdict import LogTail, ReloadVerdict, VerdictReader

logger = logging.getLogger(__name__)

_VERDICT_SECONDS = 10.0
_MOST_REMEMBERED = 2000  # certificates; a partition's tunnels name 500 at most
_FIRST_LOOK, _LOOKS_RARER, _LAST_LOOK = 0.004, 1.2, 0.05


@dataclass(slots=True)
class _Change:
    """One partition on its way from one configuration to the next; ``pid`` is that of its stunnel, 0 where none runs.

    ``begins``: it is just starting, with the configuration that is wanted. ``anew``: supervisord is to hear of its group.
    """

    id: str
    wanted: PartitionTunnels
    directory: Path
    group: str
    pid: int
    before: Loaded
    now: Mapping[str, Allowed]
    begins: bool = False
    anew: bool = False
    reader: VerdictReader = field(default_factory=lambda: verdict.VerdictReader(()))

    @property
    def partition(self) -> Partition:
        return self.wanted.partition


class Carrier:
    """Carries out what is planned for the tunnels of a node; ``failures`` are what could not be done, by operation."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._config, self._supervisor = context.config, context.supervisor
        self._limit = 0
        self.failures: list[tuple[str, Exception]] = []

    def run(self, operations: Iterable[TunnelOperation]) -> None:
        """Do all of it; what fails for one partition holds up no other."""
        operations = tuple(operations)
        coming = [one for one in operations if one.wanted.files]
        self._take_down([one for one in operations if not one.wanted.files])
        if not coming:
            return
        program = tunnels.stunnel_program()
        if program is None:
            for one in coming:
                self._fail(one.id, _no_stunnel(one.wanted.partition))
            return
        running = {item.group: item for item in self._supervisor.processes() if item.pid}
        self._limit = tunnels.open_files(self._supervisor)
        begun: list[_Change] = []
        for one in coming:
            self._try(one.id, partial(self._begin, one, running, begun))
        with ExitStack() as stack:
            self._put_into_force(self._tried_out(program, begun), stack)

    def _try(self, name: str, step: Callable[[], object]) -> bool:
        try:
            step()
        except (*FAMILY, OSError) as error:
            self._fail(name, error)
            return False
        return True

    def _fail(self, name: str, error: Exception) -> None:
        self.failures.append((name, error))
        logger.warning("%s: %s", name, sentence(error))

    def _each(self, changes: Iterable[_Change], step: Callable[[_Change], object]) -> list[_Change]:
        """Take a step with each; return those with which it could be taken."""
        return [one for one in changes if self._try(one.id, partial(step, one))]

    # --- taking down ------------------------------------------------------------------------------------------------------

    def _take_down(self, operations: Sequence[TunnelOperation]) -> None:
        if not operations:
            return
        ended: dict[str, list[Cut]] = {}
        for one in operations:
            self._try(one.id, partial(self._count, one.wanted.partition, ended))
        names = [tunnels.group_name(one.wanted.partition.id) for one in operations]
        if not self._try("tunnels", partial(self._supervisor.stop_groups, names)):
            return
        for name in names:
            self._supervisor.remove_group(name)
        if not self._try("tunnels", partial(self._supervisor.update, only=names)):
            return
        for one in operations:
            partition = one.wanted.partition
            tunnel_events.tell_cut(self._context.events, partition, ended.get(partition.id, ()))
            self._try(one.id, partial(_forget, identities.directory_of(self._config, partition.id)))

    def _count(self, partition: Partition, ended: dict[str, list[Cut]]) -> None:
        """Whose sessions end with their stunnel."""
        before = tunnel_memory.read(identities.directory_of(self._config, partition.id))
        ended[partition.id] = tunnel_sessions.all_of(before.services)

    # --- changing ---------------------------------------------------------------------------------------------------------

    def _begin(
        self, operation: TunnelOperation, running: Mapping[str, Process], begun: list[_Change]
    ) -> None:
        """Write what the new configuration names; nothing that runs reads any of it."""
        wanted = operation.wanted
        directory = identities.directory_of(self._config, wanted.partition.id)
        group = tunnels.group_name(wanted.partition.id)
        process, before = running.get(group), tunnel_memory.read(directory)
        if process and sum(len(one.subjects) for one in before.services.values()) > _MOST_REMEMBERED:
            # change after change that could not be completed: whose sessions there are is remembered no more, so they end
            logger.warning("%s: too many changes were cut short; its stunnel is started anew", operation.id)
            self._supervisor.stop_groups([group])
            process, before = None, tunnel_memory.Loaded()
        now = tunnel_memory.allowed_by(wanted.active)
        # refused is not taken back: who is connected stays so until it is said who may
        refused = {one.short_name for one in wanted.refused} - now.keys()
        now |= {name: allowed for name, allowed in before.services.items() if name in refused}
        _write_files(directory, wanted)
        begun.append(
            _Change(
                id=operation.id,
                wanted=wanted,
                directory=directory,
                group=group,
                pid=process.pid if process else 0,
                begins=process is not None
                and process.state == "STARTING"
                and _has_it(directory, wanted, before),
                before=before,
                now=now,
            )
        )

    def _tried_out(self, program: str, changes: Sequence[_Change]) -> list[_Change]:
        """Those whose configuration is good, or which have nothing to lose: there the verdict of the start is as good."""
        at_stake = [
            tunnel_trial.Trial(one.partition, one.directory, one.wanted.rendered.services)
            for one in changes
            if one.pid and not one.begins
        ]
        failed = tunnel_trial.run(self._config, program, at_stake)
        for one in changes:
            if one.partition.id in failed:
                self._fail(one.id, failed[one.partition.id])
        return [one for one in changes if one.partition.id not in failed]

    def _put_into_force(self, changes: Sequence[_Change], stack: ExitStack) -> None:
        tails: dict[str, LogTail] = {}
        for one in changes:
            log = tunnels.log_file(self._config, one.partition)
            self._try(one.id, partial(_follow, one, log, tails, stack))
        ready = self._each((one for one in changes if one.id in tails), self._write_configuration)
        started: frozenset[str] = frozenset()
        if any(one.anew for one in ready):
            try:
                started = self._supervisor.update(only=[one.group for one in ready])
            except PartitiondError as error:
                for one in ready:
                    self._fail(one.id, error)
                return
        told = self._each(ready, partial(self._tell, started=started))
        self._each(self._loaded(told, tails), self._finish)

    def _write_configuration(self, change: _Change) -> None:
        tunnel_memory.write(change.directory, change.before.opened(change.now))
        _write_configuration(change)
        stunnel = tunnels.group(self._config, change.partition, self._limit)
        # one that began outside of its namespaces keeps its sessions, and reads its configuration where it is
        late = privacy.is_late(self._supervisor, stunnel)
        changed = not late and self._supervisor.write_group(stunnel)
        # a change that was cut short, or that never began: supervisord may not know what the group's file says
        change.anew = changed or change.before.configuration is None
        change.reader = verdict.VerdictReader(change.wanted.rendered.services)

    def _tell(self, change: _Change, *, started: frozenset[str]) -> None:
        if change.group not in started and not change.begins:
            self._load_anew(change, change.pid)

    def _load_anew(self, change: _Change, pid: int) -> None:
        """Let stunnel read its configuration: the one that runs, or another one where that has ended."""
        if pid and self._supervisor.hang_up(change.group, "stunnel", pid):
            return
        # supervisord may be about to start it again, in its own time
        self._supervisor.stop_group(change.group)
        self._supervisor.start_group(change.group)

    def _loaded(self, changes: Sequence[_Change], tails: Mapping[str, LogTail]) -> list[_Change]:
        """Wait until each has said what became of it; return those that have their configuration in force."""
        deadline, pause = time.monotonic() + _VERDICT_SECONDS, _FIRST_LOOK
        waiting, loaded = list(changes), []
        while waiting and time.monotonic() < deadline:
            still = []
            for one in waiting:
                found: list[ReloadVerdict | None] = []
                if not self._try(one.id, partial(_listen, one, tails[one.id], found)):
                    continue
                said = found[0]
                if said is None and one.pid and procfs.is_stopped(one.pid):
                    # a tenant that stops it must not keep the node waiting
                    self._fail(
                        one.id, _not_taken(one.partition, "somebody has stopped it (SIGSTOP, or a debugger)")
                    )
                elif said is None or _is_of_before(one, said) or (not said.ok and self._left_out(one, said)):
                    still.append(one)
                elif said.ok:
                    loaded.append(one)
                else:
                    self._fail(one.id, _not_taken(one.partition, said.reason))
            waiting = still
            if waiting:
                time.sleep(pause)
                pause = min(pause * _LOOKS_RARER, _LAST_LOOK)
        for one in waiting:
            silence = f"stunnel said nothing within {_VERDICT_SECONDS:.0f} s"
            self._fail(one.id, _not_taken(one.partition, silence))
        return loaded

    def _left_out(self, change: _Change, said: ReloadVerdict) -> bool:
        """Whether another attempt was begun, without the tunnels whose port somebody took in the last moment."""
        names = frozenset(said.services) & frozenset(change.wanted.rendered.services)
        fewer = change.wanted.without(names, said.reason, change.directory)
        if not said.listeners_lost or not names or not fewer.files:
            return False
        logger.warning("%s: %s; the other tunnels go on without it", change.partition.id, said.reason)
        change.wanted = fewer
        change.reader = verdict.VerdictReader(fewer.rendered.services)
        return self._try(change.id, partial(self._again, change))

    def _again(self, change: _Change) -> None:
        _write_configuration(change)
        pids = {item.group: item.pid for item in self._supervisor.processes()}
        self._load_anew(change, pids.get(change.group, 0))

    def _finish(self, change: _Change) -> None:
        self._cut(change)
        # a session that began before its tunnel moved is still that tunnel's
        services = tunnel_sessions.still_used(change.before.services, change.now)
        tunnel_memory.write(change.directory, Loaded(change.wanted.fingerprint, services))
        _tidy(change.directory, tunnels.needed(change.wanted))

    def _cut(self, change: _Change) -> None:
        """End the sessions of whoever is allowed no longer; where the kernel cannot, all of that stunnel's."""
        if not change.pid:
            return  # what ran before has ended with its sessions
        context, partition = self._context, change.partition
        try:
            ended, told = tunnel_sessions.cut(
                context.sessions, self._config, partition, change.before.services, change.now
            )
        except NetplanError as error:
            if error.code != "sockets.destroy_unsupported":
                raise
            logger.warning("%s: %s; its stunnel is started anew", change.id, sentence(error))
            self._supervisor.stop_group(change.group)
            self._supervisor.start_group(change.group)
            return
        tunnel_events.tell_cut(context.events, partition, ended)
        tunnel_events.tell(context.session_events, partition, told)


def _write_files(directory: Path, wanted: PartitionTunnels) -> None:
    """Write what the configuration names, and the configuration of the trial.

    That one first: while it is there, the plan sees that a change is not complete.
    """
    partition = wanted.partition
    group = (0, partition.gid)
    with files.directory(directory) as descriptor:
        text = tunnel_declarations.configuration(directory) or ""
        for name in _droppable(directory):  # of changes that could not be completed
            if name not in text and name not in tunnels.needed(wanted):
                (directory / name).unlink(missing_ok=True)
        trial = wanted.rendered.trial.encode()
        files.write(render.TRIAL_FILE, trial, dir_fd=descriptor, mode=0o640, owner=group)
        for name, text in wanted.files.items():
            if name != render.CONFIG_FILE:
                files.write(name, text.encode(), dir_fd=descriptor, mode=0o640, owner=group)
        if wanted.master:
            names, user = wanted.master.files, (partition.uid, partition.gid)
            files.write(names.key, wanted.master.key, dir_fd=descriptor, mode=0o400, owner=user)
            files.write(
                names.certificate, wanted.master.certificate, dir_fd=descriptor, mode=0o640, owner=group
            )


def _write_configuration(change: _Change) -> None:
    with files.directory(change.directory) as descriptor:
        text = change.wanted.rendered.text.encode()
        owner = (0, change.partition.gid)
        files.write(render.CONFIG_FILE, text, dir_fd=descriptor, mode=0o640, owner=owner)


def _droppable(directory: Path) -> list[str]:
    return [path.name for pattern in ("pins-*.pem", "master-*") for path in directory.glob(pattern)]


def _tidy(directory: Path, needed: Container[str], *more: str) -> None:
    """Remove what nothing names any more, and ``more``; what the plan sees a change by comes last."""
    for name in _droppable(directory):
        if name not in needed:
            (directory / name).unlink(missing_ok=True)
    for name in (*more, render.TRIAL_FILE):
        (directory / name).unlink(missing_ok=True)


def _forget(directory: Path) -> None:
    _tidy(directory, (), tunnel_sessions.FILE, tunnel_memory.FILE, render.CONFIG_FILE)


def _follow(change: _Change, log: Path, tails: dict[str, LogTail], stack: ExitStack) -> None:
    tails[change.id] = stack.enter_context(verdict.LogTail(log))


def _listen(change: _Change, tail: LogTail, found: list[ReloadVerdict | None]) -> None:
    said = change.reader.feed(tail.read())
    if said is None and change.begins:  # what it said first was said before we listened
        wanted = [tunnel.listen for tunnel in change.wanted.served]
        there = sock_diag.listeners(wanted)
        if all(change.partition.uid in there.get(one, ()) for one in wanted):
            said = verdict.ReloadVerdict(ok=True)
    found.append(said)


def _is_of_before(change: _Change, said: ReloadVerdict) -> bool:
    """Whether stunnel has read the file from before once more: where a port is taken it does by itself, also at this moment."""
    return bool(said.services) and not set(said.services) & set(change.wanted.rendered.services)


def _has_it(directory: Path, wanted: PartitionTunnels, before: Loaded) -> bool:
    """Whether what is on the disk is what is wanted, confirmed once."""
    confirmed = before.configuration == wanted.fingerprint
    return confirmed and tunnel_declarations.configuration(directory) == wanted.rendered.text


def _no_stunnel(partition: Partition) -> PartitiondError:
    return PartitiondError(
        "tunnel.no_stunnel", "stunnel is not installed", resource=partition.id, hint="apt install stunnel4"
    )


def _not_taken(partition: Partition, said: str) -> PartitiondError:
    return PartitiondError(
        "tunnel.reload",
        f"stunnel did not take its configuration: {said}",
        resource=partition.id,
        hint=f"read {tunnels.LOG}.log of the partition below log_dir",
        retryable=True,
    )
