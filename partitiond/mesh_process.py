"""The mesh, carried out: the key made, what tincd reads written, tincd started, or told to read again.

Promises: files appear whole; what tincd was told is noted only afterwards, so whatever ends us in between, it is told again;
where tincd cannot start, its own words say why.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from netplan import tinc_config, tinc_keys, tinc_status
from partitiond import files, mesh, mesh_peers, users
from partitiond.errors import PartitiondError
from partitiond.mesh_log import NewLines
from partitiond.supervision import MESH

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from partitiond.config_mesh import MeshKeys
    from partitiond.context import Context
    from partitiond.mesh import MeshOperation
    from partitiond.supervision import Process

_STARTS_WITHIN = 10.0
_MOMENT = 0.01


def apply(context: Context, operation: MeshOperation) -> None:
    """Run one operation. Raises PartitiondError, NetplanError, OSError."""
    keys = context.config.mesh
    if operation.step == "remove":
        _remove(mesh.directory_of(context.config))
    elif keys is not None:
        if operation.step == "key":
            _make_key(keys)
        elif operation.step == "files":
            _write(context, keys)
        else:
            _run(context, keys)


def _remove(directory: Path) -> None:
    with files.directory(directory) as descriptor:
        files.empty(descriptor)
    directory.rmdir()


def _make_key(keys: MeshKeys) -> None:
    """Make the directory of the operator's, and the key, which is never written over."""
    keys.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.make_directory(keys.directory / mesh_peers.HOSTS, 0o700)
    if not files.there(str(keys.directory / mesh_peers.KEY)):
        files.write_path(keys.directory / mesh_peers.KEY, tinc_keys.make().encode(), mode=0o600)


def _found(keys: MeshKeys) -> tinc_config.Mesh:
    known = mesh_peers.read(keys)
    if not known.has_key:
        raise PartitiondError(
            "mesh.no_key",
            "this node has no key of use",
            resource=str(keys.directory / mesh_peers.KEY),
            hint="partitiond plan says what is wrong with it",
        )
    return mesh.wanted(keys, known)


def _write(context: Context, keys: MeshKeys) -> None:
    config = context.config
    directory, found = mesh.directory_of(config), _found(keys)
    gid = users.observe().users[mesh.USER].gid
    texts = mesh.texts(config, found)
    write, stale = mesh.differing(config, found, gid)
    _forget(directory)
    for name in write:
        path = directory / name
        replaced = files.there(str(path))
        with files.directory(path.parent) as descriptor:
            files.write(
                path.name, texts[name].encode(), dir_fd=descriptor, mode=mesh.mode_of(name), owner=(0, gid)
            )
            if replaced:
                _date_on(path.name, descriptor)
    for name in stale:
        with files.directory((directory / name).parent) as descriptor:
            files.remove(name.rpartition("/")[2], dir_fd=descriptor)


def _date_on(name: str, dir_fd: int) -> None:
    """Let a file look as if it was changed in the second to come.

    tincd ends the connection with a peer whose file is newer than the last reload (net.c of 1.0.36), in whole seconds: a peer
    that is changed in the second of the reload before, or of the start, would stay connected by the key that it has no more.
    """
    later = (int(time.time()) + 1) * 1_000_000_000
    os.utime(name, ns=(later, later), dir_fd=dir_fd, follow_symlinks=False)


def _forget(directory: Path) -> None:
    (directory / mesh.LOADED).unlink(missing_ok=True)


def _run(context: Context, keys: MeshKeys) -> None:
    """Have tincd run with what is written."""
    config, supervisor = context.config, context.supervisor
    found = _found(keys)
    log = NewLines(mesh.log_file(config))
    supervisor.write_group(mesh.group(config, found))
    # another file, or another one than it runs: it is stopped and started
    started = MESH in supervisor.update(only=(MESH,))
    process = process_of(supervisor.processes())
    if process is None or not process.pid:
        supervisor.start_group(MESH)
        started = True
    if started:
        _await_ready(context, log)
    elif process is not None:
        supervisor.hang_up(MESH, process.name, process.pid)
    path = mesh.directory_of(config) / mesh.LOADED
    files.write_path(path, f"{found.peers_digest()}\n".encode(), mode=0o600)
    if started:
        _refuse_deaf(log, mesh.log_file(config))


def _refuse_deaf(log: NewLines, said_in: Path) -> None:
    """tincd runs on as long as it listens anywhere. Raises PartitiondError ``mesh.port``: said once, then an open case."""
    own = [one.words for one in tinc_status.problems(log.lines()) if one.kind == "own"]
    if own:
        raise PartitiondError(
            "mesh.port",
            f"tincd runs, but: {own[-1]}",
            resource=str(said_in),
            hint="free that port, or set another one by port in [tinc]; then partitiond apply, and export anew",
        )


def process_of(processes: Iterable[Process]) -> Process | None:
    """tincd, as supervisord has it."""
    return next((one for one in processes if one.group == MESH), None)


def _await_ready(context: Context, log: NewLines) -> None:
    """Wait until tincd is where it listens. Raises PartitiondError ``mesh.start`` with its own words."""
    deadline = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < deadline:
        lines = log.lines()
        if tinc_status.READY in lines:
            return
        process = process_of(context.supervisor.processes())
        if process is None or process.state in ("BACKOFF", "FATAL", "EXITED", "STOPPED"):
            break
        time.sleep(_MOMENT)
    lines = log.lines()
    if tinc_status.READY in lines:
        return
    own = [one.words for one in tinc_status.problems(lines) if one.kind == "own"]
    said = own[-1] if own else lines[-1] if lines else "it says nothing; is its interface there?"
    raise PartitiondError(
        "mesh.start",
        f"tincd does not start: {said}",
        resource=str(mesh.log_file(context.config)),
        hint="mend what it says; supervisord tries again and again",
        retryable=True,
    )
