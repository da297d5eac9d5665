"""The mesh as a part of the plan: the node's key, what tincd reads, and tincd itself under supervisord.

Promises: a mesh that is in order is left alone; a peer that comes, changes or goes costs nobody else a packet (tincd is told to
read again); only what tincd reads once makes it start anew. Carried out by :mod:`partitiond.mesh_process`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from netplan import tinc_config
from partitiond import config_mesh, files, mesh_peers
from partitiond.operation import Operation
from partitiond.refusal import Refusal
from partitiond.supervision import MESH, Group, Program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.config_mesh import MeshKeys
    from partitiond.mesh_peers import Known
    from partitiond.operation import Action
    from partitiond.supervision import Process, Supervisor

USER = config_mesh.TINCD_USER

LOADED = "loaded"
"""Name of the file that says of which peers tincd was told; it is away while they change."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PATIENCE = 5
_MODES = {tinc_config.START: 0o700, tinc_config.TINC_UP: 0o755}
_MODE = 0o640
_LIMIT = 1 << 17

Step = Literal["key", "files", "daemon", "remove"]


@dataclass(frozen=True, slots=True)
class MeshOperation(Operation):
    """One step towards the mesh; what is written is made of the key as it is then."""

    step: Step


@dataclass(frozen=True, slots=True)
class Planned:
    """What is to be done, and what is refused."""

    operations: tuple[MeshOperation, ...] = ()
    refused: tuple[Refusal, ...] = ()


def directory_of(config: Config) -> Path:
    """Where what tincd reads lies."""
    return config.state_dir / "mesh"


def log_file(config: Config) -> Path:
    """Where supervisord writes what tincd says."""
    return config.log_dir / "mesh" / "tincd.log"


def tincd_program() -> str | None:
    """Absolute path of tincd, or None where it is not installed."""
    return shutil.which("tincd", path=_PATH)


def wanted(keys: MeshKeys, known: Known) -> tinc_config.Mesh:
    """The node as tincd is to run it."""
    peers = tinc_config.connect_to(keys.connect_to, known.by_name)
    relays = keys.relay
    if relays is None:
        relays = bool(keys.connect_to) or tinc_config.need_a_relay(known.peers)
    key = keys.directory / mesh_peers.KEY
    return tinc_config.Mesh(known.own, known.peers, peers, keys.interface, key, relays)


def texts(config: Config, found: tinc_config.Mesh) -> dict[str, str]:
    """All files of tincd by their paths below its directory."""
    program = tincd_program() or "/usr/sbin/tincd"
    start = tinc_config.start(program, directory_of(config), USER, found.interface)
    return {tinc_config.START: start, **found.files()}


def mode_of(name: str) -> int:
    """The mode of one of them."""
    return _MODES.get(name, _MODE)


def group(config: Config, found: tinc_config.Mesh) -> Group:
    """The supervisord group of tincd, which is root's until it gives that up."""
    directory = directory_of(config)
    start = texts(config, found)[tinc_config.START]
    # the last word is for supervisord alone: with another configuration that is read once it is another group
    digest = hashlib.sha256(f"{start}\0{found.fixed_digest()}".encode()).hexdigest()[:16]
    command = f"/bin/sh {directory / tinc_config.START} {digest}"
    program = Program("tincd", "tincd", command, restart=True, log="tincd", patience=_PATIENCE)
    return Group(
        name=MESH,
        user="root",
        uid=0,
        gid=0,
        directory=directory,
        log_directory=config.log_dir / "mesh",
        programs=(program,),
    )


def on_disk(directory: Path) -> dict[str, tuple[bytes, int, int, int] | None]:
    """What lies where tincd reads: content, mode, uid and gid by path below; None for what is no plain small file."""
    found: dict[str, tuple[bytes, int, int, int] | None] = {}
    for below in ((), (tinc_config.HOSTS,)):
        prefix = "".join(f"{one}/" for one in below)
        try:
            with files.directory(directory, *below) as descriptor:
                for name in files.names(descriptor, 2 * mesh_peers.MOST_PEERS):
                    if prefix or name != tinc_config.HOSTS:
                        found[prefix + name] = _look(name, descriptor)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return found


def _look(name: str, descriptor: int) -> tuple[bytes, int, int, int] | None:
    there = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    if not stat.S_ISREG(there.st_mode) or there.st_size > _LIMIT:
        return None
    content = files.read(name, dir_fd=descriptor, limit=_LIMIT)
    return content, stat.S_IMODE(there.st_mode), there.st_uid, there.st_gid


# what is neither rendered nor left over
_BESIDE = frozenset((LOADED, tinc_config.PID))


def differing(config: Config, found: tinc_config.Mesh, gid: int | None) -> tuple[list[str], list[str]]:
    """Names of the files that are to be written, and of those that are to go."""
    there = on_disk(directory_of(config))
    wish = {name: (text.encode(), mode_of(name), 0, gid) for name, text in texts(config, found).items()}
    write = [name for name, one in wish.items() if there.get(name) != one]
    return write, sorted(there.keys() - wish.keys() - _BESIDE)


def plan(
    config: Config,
    supervisor: Supervisor,
    processes: Sequence[Process],
    numbers: Mapping[str, tuple[int, int]],
) -> Planned:
    """Compare the mesh as it should be with the disk and supervisord; ``numbers`` are (uid, gid) by user."""
    keys = config.mesh
    if keys is None:
        if not files.there(str(directory_of(config))):
            return Planned()
        return Planned(
            (_operation("remove", "remove", "there is no mesh any more ([tinc] names no network)"),)
        )
    known = mesh_peers.read(keys)
    refused = list(known.refused)
    if is_lost(config, keys):
        return Planned((), (*refused, _lost(keys)))
    operations = []
    if not known.has_key:
        if known.key_refused:
            return Planned((), tuple(refused))  # what runs has the key from before
        operations.append(_operation("key", "create", "this node has no key"))
    found = wanted(keys, known)
    write, stale = differing(config, found, numbers.get(USER, (None, None))[1])
    if write or stale or operations:
        operations.append(_of_files(config, write, stale))
    if tincd_program() is None:
        refused.append(_no_tincd(config))
    elif reason := _trouble(config, supervisor, processes, found, changes=bool(operations)):
        action: Action = "change" if supervisor.has_group(MESH) else "create"
        operations.append(_operation("daemon", action, reason))
    return Planned(tuple(operations), tuple(refused))


def _trouble(
    config: Config,
    supervisor: Supervisor,
    processes: Sequence[Process],
    found: tinc_config.Mesh,
    *,
    changes: bool,
) -> str:
    """What is wrong with tincd; "" when nothing is."""
    text = supervisor.group_text(MESH)
    if text is None:
        return "tincd is not set up"
    if changes:
        return "what it reads changes"
    if text != group(config, found).render():
        return "it is to run with another configuration"
    own = [process for process in processes if process.group == MESH]
    if any(process.outdated for process in own):
        return "it runs on with the configuration from before"
    if not any(process.pid for process in own):
        return "tincd does not run"
    if loaded(config) != found.peers_digest():
        return "it was not told of its peers"
    return ""


def loaded(config: Config) -> str:
    """What tincd was told last, as :meth:`netplan.tinc_config.Mesh.peers_digest` has it; "" while that changes."""
    found = on_disk_stamp(directory_of(config))
    return found.decode("ascii", "replace").strip()


def on_disk_stamp(directory: Path) -> bytes:
    """The content of :data:`LOADED`, empty without any."""
    try:
        with files.directory(directory) as descriptor:
            return files.read(LOADED, dir_fd=descriptor, limit=100, owners=frozenset((0,)))
    except (FileNotFoundError, NotADirectoryError):
        return b""


def _of_files(config: Config, write: Sequence[str], stale: Sequence[str]) -> MeshOperation:
    words = [
        *([f"to be written: {', '.join(write)}"] if write else []),
        *([f"to go: {', '.join(stale)}"] if stale else []),
    ]
    there = files.there(str(directory_of(config) / tinc_config.TINC_CONF))
    return _operation("files", "change" if there else "create", "; ".join(words) or "the key is to be made")


def _operation(step: Step, action: Action, reason: str) -> MeshOperation:
    names = {"key": "key", "files": "configuration", "daemon": "tincd", "remove": "configuration"}
    return MeshOperation(
        id=f"tinc/{names[step]}",
        resource="tinc",
        action=action,
        partition=None,
        before=None if action == "create" else "there",
        after=None if action == "remove" else names[step],
        reason=reason,
        step=step,
    )


def is_lost(config: Config, keys: MeshKeys) -> bool:
    """Whether key and host blocks are both away on a node that had them: its disk may not be mounted, so none are made."""
    there = files.there(str(directory_of(config) / tinc_config.TINC_CONF))
    return there and not any(
        files.there(str(keys.directory / name)) for name in (mesh_peers.KEY, mesh_peers.HOSTS)
    )


LOST = "the key and the host blocks are gone, so what runs is left as it is"
LOST_HINT = "put the directory back; or, where this node shall begin anew with another key: mkdir -p {}"


def _lost(keys: MeshKeys) -> Refusal:
    return Refusal(
        resource="mesh",
        name="mesh: directory",
        partition="",
        file=str(keys.directory),
        line=None,
        code="mesh.no_directory",
        reason=LOST,
        hint=LOST_HINT.format(keys.directory / mesh_peers.HOSTS),
    )


def _no_tincd(config: Config) -> Refusal:
    return Refusal(
        resource="mesh",
        name="mesh: tincd",
        partition="",
        file=str(config.file),
        line=None,
        code="mesh.no_tincd",
        reason="tincd is not installed, so this node reaches nobody over the mesh",
        hint="apt-get install --no-install-recommends tinc, then partitiond apply",
    )
