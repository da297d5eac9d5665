"""Tunnels composed: declarations and identities in, files and one stunnel per partition under supervisord out.

Promises: a bad declaration refuses that tunnel alone; stunnel runs as the partition's user with a key that only this
user can read; a changed configuration is loaded with SIGHUP, which keeps live sessions, and the log's verdict is awaited.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import socket
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from partitiond import files, identities, privacy
from partitiond.errors import PartitiondError
from partitiond.operation import Operation
from partitiond.supervision import Group, Program, Supervisor
from stunnel_mgr import conflicts, declaration, render, sessions, verdict
from stunnel_mgr.errors import TunnelError
from stunnel_mgr.model import Refused, Tunnel, TunnelContext
from stunnel_mgr.syntax import Entry, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.node import Node, Partition
    from partitiond.operation import Action

_DECLARATION_LIMIT = 64 * 1024
_PIN_LIMIT = 64 * 1024
_MOST_TUNNELS = 100  # of one partition
_MOST_PINS = 500  # likewise: a tenant must not make the whole node's plan slow
# likewise, of what is declared and of the files named there, read again or not: a thousand certificates, half a second's work
_MOST_BYTES = 512 * 1024
_USUAL_PROGRAM = "/usr/bin/stunnel4"
_VERDICT_SECONDS = 10.0
# what stunnel has loaded, as a hash: a crash between writing the files and SIGHUP shows up as a difference
_LOADED = "loaded"


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


# --- declarations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartitionTunnels:
    """All tunnels of a partition: the valid ones, the refused ones, and what stunnel must be given.

    ``blocked`` are valid ones that are left out for now, by public name, with the reason.
    """

    partition: Partition
    tunnels: tuple[Tunnel, ...] = ()
    refused: tuple[Refused, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    services: tuple[str, ...] = ()
    blocked: Mapping[str, str] = field(default_factory=dict)

    @property
    def active(self) -> tuple[Tunnel, ...]:
        """The tunnels that somebody may use."""
        return tuple(tunnel for tunnel in self.tunnels if not tunnel.idle_reason)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that stunnel loads."""
        text = "".join(f"{name}\0{body}\0" for name, body in sorted(self.files.items()))
        return hashlib.sha256(text.encode()).hexdigest()


def declared(node: Node, partition: Partition, certificates: Mapping[str, str]) -> PartitionTunnels:
    """Read a partition's declarations and the operator's for it; ``certificates`` are the node's by fingerprint.

    What stunnel must be given is added by :func:`settle`, which looks at the ports of all partitions at once.
    """
    given_here = [given for given in node.config.tunnels if given.partition == partition.id]
    # most partitions declare nothing, and most of these have not even the directory
    if not given_here and not files.there(f"{partition.path}/etc"):
        return PartitionTunnels(partition)
    allowance = _Allowance(_MOST_BYTES)
    context = TunnelContext(
        partition=partition.id,
        ipv4=partition.ipv4,
        ipv6=partition.ipv6,
        ipv4_public=partition.network.public_ipv4,
        local_certificates=certificates,
        read_file=lambda path: allowance.take(_read_below(partition, path)),
    )
    found: list[Tunnel] = []
    refused: list[Refused] = []
    for given in given_here:
        entries = {key: Entry.of(value, given.line) for key, value in given.values.items()}
        _collect(
            partial(
                declaration.declare,
                entries,
                name=given.name,
                file=given.file,
                line=given.line,
                context=context,
            ),
            given.name,
            given.file,
            context,
            found,
            refused,
        )
    _read_declarations(partition, context, allowance, found, refused)
    kept, clashing = conflicts.resolve_conflicts(found)
    return PartitionTunnels(partition, tuple(kept), tuple(refused) + tuple(clashing))


def settle(config: Config, everything: Sequence[PartitionTunnels]) -> tuple[PartitionTunnels, ...]:
    """Decide which tunnels can run now, and render what each stunnel must be given. Raises TunnelError."""
    sockets = sessions.observe_sockets([tunnel.listen for one in everything for tunnel in one.active])
    return tuple(_settled(config, one, sockets) if one.tunnels else one for one in everything)


def _settled(config: Config, one: PartitionTunnels, sockets: sessions.TunnelSockets) -> PartitionTunnels:
    directory = identities.directory_of(config, one.partition.id)
    blocked = _blocked(one, directory, sockets)
    free = [tunnel for tunnel in one.tunnels if tunnel.name not in blocked]
    rendered = render.render(one.partition.id, free, directory=str(directory))
    return replace(one, files=rendered.files, services=rendered.services, blocked=blocked)


def _blocked(one: PartitionTunnels, directory: Path, sockets: sessions.TunnelSockets) -> dict[str, str]:
    """Tunnels whose port somebody else has: one of these closes every listener of a stunnel that is given it.

    They are left out until the port is free, which the next plan sees. A port is our own stunnel's when the partition's user
    listens there and the tunnel is in the configuration on disk; any other is tried, as only the kernel knows what a
    listener on all addresses excludes.
    """
    if not one.active:
        return {}
    loaded = _on_disk(directory, [render.CONFIG_FILE]).get(render.CONFIG_FILE, "")
    found = {}
    for tunnel in one.active:
        owners = sockets.owners.get(tunnel.listen, frozenset())
        own = one.partition.uid in owners and f"\n[{tunnel.short_name}]\n" in loaded
        if not own and not _port_is_free(tunnel):
            users = ", ".join(f"uid {uid}" for uid in sorted(owners)) or "somebody"
            found[tunnel.name] = f"port {tunnel.listen_port} is taken: {users} listens there"
    return found


def held_back(wanted: PartitionTunnels) -> tuple[Refused, ...]:
    """The blocked tunnels, to be told of like the refused ones."""
    files_of = {tunnel.name: tunnel.file for tunnel in wanted.tunnels}
    return tuple(
        Refused(name, wanted.partition.id, files_of[name], None, reason)
        for name, reason in wanted.blocked.items()
    )


def _port_is_free(tunnel: Tunnel) -> bool:
    """Whether stunnel could listen; an address that the node does not have yet is no obstacle (IP_FREEBIND)."""
    host, port = tunnel.listen
    with socket.socket(socket.AF_INET6 if host.version == 6 else socket.AF_INET, socket.SOCK_STREAM) as probe:
        # as stunnel does: connections that are just ending do not count, listeners do
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(host), port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


@dataclass(slots=True)
class _Allowance:
    """How many bytes of a partition's are still read in this look: refused declarations cost as much as good ones."""

    left: int

    def take(self, content: bytes) -> bytes:
        """Count what was read. Raises OSError when it was too much."""
        self.left -= len(content)
        if self.left < 0:
            raise PermissionError(
                f"the partition's tunnels and the files that they name have more than {_MOST_BYTES} bytes"
            )
        return content


def _read_declarations(
    partition: Partition,
    context: TunnelContext,
    allowance: _Allowance,
    found: list[Tunnel],
    refused: list[Refused],
) -> None:
    try:
        with files.directory(partition.path, "etc", "tunnel") as descriptor:
            everything = [name for name in files.names(descriptor) if name.endswith(".cfg")]
            for name in everything:
                file = str(partition.path / "etc" / "tunnel" / name)
                if name in everything[_MOST_TUNNELS:]:
                    refused.append(_refusal(partition, name, file, f"more than {_MOST_TUNNELS} tunnels"))
                    continue
                if sum(len(tunnel.pins) for tunnel in found) > _MOST_PINS:
                    reason = f"the partition's tunnels name more than {_MOST_PINS} certificates"
                    refused.append(_refusal(partition, name, file, reason))
                    continue
                try:
                    content = files.read(
                        name, dir_fd=descriptor, limit=_DECLARATION_LIMIT, reader=partition.uid
                    )
                    text = allowance.take(content).decode("utf-8")
                except (PartitiondError, UnicodeDecodeError, OSError) as error:
                    refused.append(_refusal(partition, name, file, str(error)))
                    continue
                _collect(
                    partial(declaration.parse_declaration, text, name=name, file=file, context=context),
                    name.removesuffix(".cfg"),
                    file,
                    context,
                    found,
                    refused,
                )
    except FileNotFoundError:
        return
    except PartitiondError as error:
        refused.append(_refusal(partition, "*", error.resource, str(error)))
    except OSError as error:
        # a tenant may mount a file system of its own there (fusermount3), which the kernel keeps even root out of
        file = str(partition.path / "etc" / "tunnel")
        refused.append(_refusal(partition, "*", file, f"cannot be read: {error.strerror}"))


def _refusal(partition: Partition, name: str, file: str, reason: str) -> Refused:
    short = ascii(name.removesuffix(".cfg"))[1:-1]
    return Refused(
        name=f"{partition.id}/{short}", partition=partition.id, file=plain(file), line=None, reason=reason
    )


def _collect(
    parse: Callable[[], Tunnel],
    name: str,
    file: str,
    context: TunnelContext,
    found: list[Tunnel],
    refused: list[Refused],
) -> None:
    try:
        tunnel = parse()
    except TunnelError as error:
        refused.append(conflicts.refusal(error, name=name, partition=context.partition, file=file))
        return
    if tunnel.identity == "master":
        reason = "identity = master is not there yet; allowed: partition"
        refused.append(Refused(tunnel.name, context.partition, file, None, reason))
    else:
        found.append(tunnel)


def homeless(node: Node) -> tuple[Refused, ...]:
    """The operator's tunnels that name no partition of this node."""
    known = {partition.id for partition in node.partitions}
    return tuple(
        Refused(
            f"{given.partition or '?'}/{given.name}",
            given.partition,
            given.file,
            given.line,
            f"partition = {given.partition!r} is no partition of this node"
            if given.partition
            else "partition is missing",
        )
        for given in node.config.tunnels
        if given.partition not in known
    )


def _read_below(partition: Partition, path: str) -> bytes:
    """Read a file of pins below the partition, as ``file:`` names it. Raises OSError with the reason."""
    parts = path.split("/")
    if path.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise PermissionError(f"{path!a} is not a plain path below the partition")
    try:
        with files.directory(partition.path, *parts[:-1]) as descriptor:
            return files.read(parts[-1], dir_fd=descriptor, limit=_PIN_LIMIT, reader=partition.uid)
    except PartitiondError as error:
        raise PermissionError(f"{path!a} {error}") from error


# --- plan and apply ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TunnelOperation(Operation):
    """Bring one partition's stunnel where its declarations want it."""

    wanted: PartitionTunnels


def group(config: Config, partition: Partition) -> Group:
    """The supervisord group of a partition's stunnel."""
    configuration = identities.directory_of(config, partition.id) / render.CONFIG_FILE
    program = Program(
        "stunnel", "stunnel", f"{stunnel_program() or _USUAL_PROGRAM} {configuration}", restart=True
    )
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
) -> tuple[TunnelOperation, ...]:
    """Compare one partition's tunnels with the disk and supervisord: groups that have a file, and those that run."""
    partition = wanted.partition
    name = group_name(partition.id)
    if not wanted.files:
        file = f"{config.state_dir}/tunnels/{partition.id}/{render.CONFIG_FILE}"
        if name not in set_up and not files.there(file):
            return ()
        return (_operation(wanted, "remove", "no tunnel is declared any more"),)
    directory = identities.directory_of(config, partition.id)
    if not _is_set_up(supervisor.group_text(name), group(config, partition), running):
        return (_operation(wanted, "create", "stunnel is not set up"),)
    if name not in running:
        return (_operation(wanted, "change", "stunnel does not run"),)
    if _loaded(directory) != wanted.fingerprint or _on_disk(directory, wanted.files) != dict(wanted.files):
        return (_operation(wanted, "change", "stunnel runs with another configuration"),)
    return ()


def _is_set_up(text: str | None, wanted: Group, running: Container[str]) -> bool:
    if text == wanted.render():
        return True
    # as in apply: one that runs is not ended for that alone
    return wanted.name in running and privacy.differs_by_launcher(text, wanted)


def _operation(wanted: PartitionTunnels, action: Action, reason: str) -> TunnelOperation:
    names = ", ".join(tunnel.short_name for tunnel in wanted.active)
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


def _loaded(directory: Path) -> str | None:
    try:
        return (directory / _LOADED).read_text()
    except OSError:
        return None


def _on_disk(directory: Path, names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = (directory / name).read_text("ascii", "replace")
        except OSError:
            continue
    return found


def apply(operation: TunnelOperation, config: Config, supervisor: Supervisor) -> None:
    """Run one operation. Raises PartitiondError ``tunnel.reload`` with what stunnel said."""
    wanted = operation.wanted
    partition = wanted.partition
    directory = identities.directory_of(config, partition.id)
    if not wanted.files:
        _take_down(supervisor, partition, directory)
        return
    if stunnel_program() is None:
        raise PartitiondError(
            "tunnel.no_stunnel",
            "stunnel is not installed",
            resource=partition.id,
            hint="apt install stunnel4",
        )
    try:
        (directory / _LOADED).unlink()
        cut_off = False
    except FileNotFoundError:
        cut_off = True  # or never begun; supervisord may not know what the group's file says
    _write_files(directory, wanted)
    name = group_name(partition.id)
    with verdict.LogTail(config.log_dir / partition.id / "stunnel.log") as tail:
        stunnel = group(config, partition)
        # one that began outside of its namespaces keeps its sessions, and reads its configuration where it is
        changed = not privacy.is_late(supervisor, stunnel) and supervisor.write_group(stunnel)
        started = supervisor.update() if changed or cut_off else frozenset()
        if name in started:
            pass
        elif any(item.group == name and item.pid for item in supervisor.processes()):
            supervisor.signal(name, "stunnel", "HUP")
        else:
            supervisor.start_group(name)
        _await(partition, tail, verdict.VerdictReader(wanted.services))
    files.write_path(directory / _LOADED, wanted.fingerprint.encode(), mode=0o600)


def _take_down(supervisor: Supervisor, partition: Partition, directory: Path) -> None:
    name = group_name(partition.id)
    supervisor.stop_group(name)
    if supervisor.remove_group(name):
        supervisor.update()
    # the configuration last: while it is there, the plan sees that something is left
    for path in (*directory.glob("pins-*.pem"), directory / _LOADED, directory / render.CONFIG_FILE):
        path.unlink(missing_ok=True)


def _write_files(directory: Path, wanted: PartitionTunnels) -> None:
    with files.directory(directory) as descriptor:
        for name, text in wanted.files.items():
            files.write(name, text.encode(), dir_fd=descriptor, mode=0o640, owner=(0, wanted.partition.gid))
    for path in directory.glob("pins-*.pem"):
        if path.name not in wanted.files:
            path.unlink()


def _await(partition: Partition, tail: verdict.LogTail, reader: verdict.VerdictReader) -> None:
    deadline = time.monotonic() + _VERDICT_SECONDS
    found = None
    while found is None and time.monotonic() < deadline:
        found = reader.feed(tail.read())
        if found is None:
            time.sleep(0.01)
    if found is None or not found.ok:
        said = found.reason if found else f"stunnel said nothing within {_VERDICT_SECONDS:.0f} s"
        raise PartitiondError(
            "tunnel.reload",
            f"stunnel did not take its configuration: {said}",
            resource=partition.id,
            hint="read stunnel.log of the partition below log_dir",
            retryable=True,
        )
