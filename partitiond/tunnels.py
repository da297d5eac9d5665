"""Tunnels as a resource of the plan: one stunnel per partition, under supervisord, as the partition's user.

Promises: what is planned compares the configuration on disk, what stunnel confirmed to have loaded, and supervisord's group;
a tunnel that is in order is left alone. What is declared is told by ``tunnel_declarations``, carried out by
``tunnel_process``.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitiond import files, identities, privacy, tunnel_declarations, tunnel_memory
from partitiond.operation import Operation
from partitiond.supervision import Group, Program, Supervisor
from stunnel_mgr import render

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.node import Partition
    from partitiond.operation import Action
    from partitiond.tunnel_declarations import PartitionTunnels
    from partitiond.tunnel_memory import Loaded

LOG = "_stunnel"
"""Name of its log below ``log_dir/<partition>``, without suffix; no program of a tenant may have one of this name."""

OPEN_FILES = 20544
"""For 10 000 sessions: stunnel takes 125/256 of its limit for clients (src/fd.c; measured, facts/stunnel.md 1.4)."""

_USUAL_PROGRAM = "/usr/bin/stunnel4"
# it ends within milliseconds, unless its user has stopped it, which must not keep the node waiting
_PATIENCE = 2
_PRLIMIT = "/usr/bin/prlimit"


def group_name(partition: str) -> str:
    """The supervisord group of a partition's stunnel."""
    return f"{partition}-tunnel"


def stunnel_program() -> str | None:
    """Absolute path of stunnel, or None where it is not installed."""
    for name in ("stunnel4", "stunnel"):
        found = shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        if found:
            return found
    return None


def open_files(supervisor: Supervisor) -> int:
    """How many files a stunnel may have open: what its sessions need, or as many as the host lets supervisord have."""
    return min(OPEN_FILES, supervisor.hard_limit())


def most_sessions(files_allowed: int) -> int:
    """How many sessions a stunnel takes with so many open files (src/fd.c of stunnel)."""
    return files_allowed * 125 // 256


def log_file(config: Config, partition: Partition) -> Path:
    """Where supervisord writes what a partition's stunnel says."""
    return config.log_dir / partition.id / f"{LOG}.log"


@dataclass(frozen=True, slots=True)
class TunnelOperation(Operation):
    """Bring one partition's stunnel where its declarations want it."""

    wanted: PartitionTunnels


def group(config: Config, partition: Partition, limit: int) -> Group:
    """The supervisord group of a partition's stunnel, which may have ``limit`` files open."""
    configuration = identities.directory_of(config, partition.id) / render.CONFIG_FILE
    # the limits of supervisord's other children are not ours to change
    command = f"{_PRLIMIT} --nofile={limit}:{limit} {stunnel_program() or _USUAL_PROGRAM} {configuration}"
    program = Program("stunnel", "stunnel", command, restart=True, log=LOG, patience=_PATIENCE)
    return Group(
        name=group_name(partition.id),
        user=partition.user,
        uid=partition.uid,
        gid=partition.gid,
        directory=partition.path,
        log_directory=config.log_dir / partition.id,
        programs=(program,),
        launcher=privacy.launcher(config, partition),
    )


def plan(
    wanted: PartitionTunnels,
    config: Config,
    supervisor: Supervisor,
    *,
    set_up: Container[str],
    running: Container[str],
    limit: int,
) -> tuple[TunnelOperation, ...]:
    """Compare one partition's tunnels with the disk and supervisord: groups that have a file, and those that run.

    ``limit`` is what :func:`open_files` said.
    """
    partition = wanted.partition
    name = group_name(partition.id)
    directory = identities.directory_of(config, partition.id)
    if wanted.stuck or wanted.waits:
        return ()
    loaded = tunnel_memory.read(directory) if wanted.tunnels or wanted.unsettled else tunnel_memory.Loaded()
    if wanted.unsettled & loaded.services.keys():
        return ()
    if not wanted.files:
        state = f"{config.state_dir}/tunnels/{partition.id}"
        left = (f"{state}/{render.CONFIG_FILE}", f"{state}/{render.TRIAL_FILE}")
        if name not in set_up and not any(map(files.there, left)):
            return ()
        return (_operation(wanted, "remove", "no tunnel is declared any more"),)
    if not _is_set_up(supervisor.group_text(name), group(config, partition, limit), running):
        return (_operation(wanted, "create", "stunnel is not set up"),)
    reason = _trouble(wanted, directory, loaded, runs=name in running)
    return (_operation(wanted, "change", reason),) if reason else ()


def _trouble(wanted: PartitionTunnels, directory: Path, loaded: Loaded, *, runs: bool) -> str:
    """What is wrong with a stunnel that is set up; "" when nothing is."""
    if not runs:
        return "stunnel does not run"
    if loaded.configuration != wanted.fingerprint or not _is_written(directory, wanted):
        return "stunnel runs with another configuration"
    if files.there(f"{directory}/{render.TRIAL_FILE}"):
        return "a change was cut short"
    if not loaded.agrees_with(wanted.active, wanted.refused):
        return "sessions may go on of somebody who is not allowed any more"
    if wanted.silent:
        return f"stunnel does not listen for {', '.join(wanted.silent)}"
    return ""


def _is_written(directory: Path, wanted: PartitionTunnels) -> bool:
    if tunnel_declarations.configuration(directory) != wanted.rendered.text:
        return False
    return all(files.there(f"{directory}/{name}") for name in needed(wanted))


def needed(wanted: PartitionTunnels) -> frozenset[str]:
    """Names of the files, besides identities of the partition's own, that stunnel loads."""
    pair = wanted.master.files if wanted.master else None
    return frozenset((*wanted.files, *((pair.certificate, pair.key) if pair else ())))


def _is_set_up(text: str | None, wanted: Group, running: Container[str]) -> bool:
    if text == wanted.render():
        return True
    # as in apply: one that runs is not ended for that alone
    return wanted.name in running and privacy.differs_by_launcher(text, wanted)


def _operation(wanted: PartitionTunnels, action: Action, reason: str) -> TunnelOperation:
    names = ", ".join(tunnel.short_name for tunnel in wanted.served)
    return TunnelOperation(
        id=f"tunnels/{wanted.partition.id}",
        resource="tunnels",
        action=action,
        partition=wanted.partition.id,
        before=None if action == "create" else "stunnel",
        after=names or None,
        reason=reason,
        wanted=wanted,
    )
