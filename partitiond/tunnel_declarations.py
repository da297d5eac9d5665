"""What tunnels a node is to have: declarations read and judged, and what each stunnel must be given for them.

Promises: a bad declaration refuses that tunnel alone; a port that somebody else has costs that tunnel alone; a tenant's text
is bounded in what it makes us read, and none of it becomes configuration.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import time
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import IPv4Interface
from typing import TYPE_CHECKING

from netplan import sock_diag
from netplan.errors import NetplanError
from partitiond import certificates, files, identities
from partitiond.errors import PartitiondError
from stunnel_mgr import conflicts, declaration, render
from stunnel_mgr.errors import TunnelError
from stunnel_mgr.model import Refused, Tunnel, TunnelContext
from stunnel_mgr.render import IdentityFiles, RenderedConfig
from stunnel_mgr.syntax import Entry, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence
    from pathlib import Path

    from partitiond.certificates import MasterPair
    from partitiond.config import Config
    from partitiond.identities import PublicIdentity
    from partitiond.node import Node, Partition
    from partitiond.tunnel_config import OperatorTunnel
    from stunnel_mgr.model import Endpoint, IdentitySource

    Owners = Mapping[Endpoint, frozenset[int]]

_DECLARATION_LIMIT = 64 * 1024
_PIN_LIMIT = 64 * 1024
_MOST_TUNNELS = 100  # of one partition
_MOST_PINS = 500  # likewise: a tenant must not make the whole node's plan slow
# likewise, of what is declared and of the files named there, read again or not: a thousand certificates, half a second's work
_MOST_BYTES = 512 * 1024

# who writes a file may just have emptied it: a tunnel that runs is not taken down for what stands there for so long
_YOUNG_SECONDS = 3.0

_NOTHING = RenderedConfig({}, ())


@dataclass(frozen=True, slots=True)
class PartitionTunnels:
    """All tunnels of a partition: the valid ones, the refused ones, and what stunnel must be given.

    ``blocked`` are valid ones that are left out for now, by public name, with the reason. ``identities`` are those that there
    are; ``master`` is the pair of the instance, where a tunnel asks for it; ``silent`` are those that nobody of the partition
    listens for, by short name; ``stuck`` says why nothing is known of that; ``unsettled`` are refused ones whose declaration
    was written a moment ago.
    """

    partition: Partition
    tunnels: tuple[Tunnel, ...] = ()
    refused: tuple[Refused, ...] = ()
    rendered: RenderedConfig = _NOTHING
    blocked: Mapping[str, str] = field(default_factory=dict)
    identities: Mapping[IdentitySource, IdentityFiles] = field(default_factory=dict)
    master: MasterPair | None = None
    silent: tuple[str, ...] = ()
    unsettled: frozenset[str] = frozenset()
    stuck: str = ""

    @property
    def files(self) -> Mapping[str, str]:
        """What stunnel loads, by name."""
        return self.rendered.files

    @property
    def active(self) -> tuple[Tunnel, ...]:
        """The tunnels that somebody may use."""
        return tuple(tunnel for tunnel in self.tunnels if not tunnel.idle_reason)

    @property
    def served(self) -> tuple[Tunnel, ...]:
        """The tunnels that stunnel is given now."""
        return tuple(tunnel for tunnel in self.active if tunnel.name not in self.blocked)

    @property
    def waits(self) -> bool:
        """Whether nothing can be said yet of what stunnel is to be given: an identity is about to be made."""
        return any(tunnel.identity not in self.identities for tunnel in self.active)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that stunnel loads: what its configuration names is named by its content."""
        return hashlib.sha256(self.rendered.text.encode()).hexdigest()

    def without(self, names: Container[str], reason: str, directory: Path) -> PartitionTunnels:
        """The same with some tunnels, by short name, left out for a reason."""
        more = {tunnel.name: reason for tunnel in self.served if tunnel.short_name in names}
        return replace(self, blocked={**self.blocked, **more}).settled(directory)

    def settled(self, directory: Path) -> PartitionTunnels:
        """The same with what stunnel is to be given for the tunnels that are not blocked. Raises TunnelError."""
        if self.waits:
            return self
        free = [tunnel for tunnel in self.tunnels if tunnel.name not in self.blocked]
        rendered = render.render(
            self.partition.id, free, directory=str(directory), identities=self.identities
        )
        return replace(self, rendered=rendered)


def _vpn(node: Node, partition: Partition) -> IPv4Interface | None:
    address, keys = partition.network.vpn_ipv4, node.config.mesh
    return IPv4Interface((int(address), keys.network.prefixlen)) if address and keys else None


def declared(node: Node, partition: Partition, local: Mapping[str, str]) -> PartitionTunnels:
    """Read a partition's declarations and the operator's for it; ``local`` are the node's certificates by fingerprint.

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
        ipv4_public=partition.network.stand_in_ipv4,
        vpn=_vpn(node, partition),
        local_certificates=local,
        read_file=lambda path: allowance.take(_read_below(partition, path)),
    )
    found: list[Tunnel] = []
    refused: list[Refused] = []
    for given in given_here:
        if (first := _first_at(node, given)) is not given:
            reason = f"listen: 127.0.0.1:{given.loopback_port} is that of [tunnel {first.name}]"
            refused.append(
                Refused(f"{partition.id}/{given.name}", partition.id, given.file, given.line, reason)
            )
            continue
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
    young = _read_declarations(partition, context, allowance, found, refused)
    master = _master_pair(node.config, partition, found, refused)
    kept, clashing = conflicts.resolve_conflicts(found)
    unsettled = frozenset(one.short_name for one in refused) & young
    return PartitionTunnels(
        partition, tuple(kept), tuple(refused) + tuple(clashing), master=master, unsettled=unsettled
    )


def _first_at(node: Node, given: OperatorTunnel) -> OperatorTunnel:
    """Of the operator's tunnels that want one port of the loopback, whosever they are, the one whose the port is."""
    if given.loopback_port is None:
        return given
    return next(one for one in node.config.tunnels if one.loopback_port == given.loopback_port)


def _master_pair(
    config: Config, partition: Partition, found: list[Tunnel], refused: list[Refused]
) -> MasterPair | None:
    """The pair that the master gave for the instance, where a tunnel asks for it; if there is none, that tunnel is refused."""
    asking = [tunnel for tunnel in found if tunnel.identity == "master"]
    if not asking:
        return None
    try:
        return certificates.read_pair(config, partition)
    except PartitiondError as error:
        reason = f"identity: master: {error}"
    # what runs keeps running
    directory = identities.directory_of(config, partition.id)
    copy = certificates.read_copy(directory, configuration(directory) or "", reason)
    if copy is not None:
        return copy
    for tunnel in asking:
        found.remove(tunnel)
        refused.append(Refused(tunnel.name, partition.id, tunnel.file, None, reason))
    return None


def settle(
    config: Config,
    everything: Sequence[PartitionTunnels],
    published: Mapping[str, PublicIdentity | None],
) -> tuple[PartitionTunnels, ...]:
    """Decide which tunnels can run now, and render what each stunnel must be given.

    Raises TunnelError.
    """
    try:
        owners = sock_diag.listeners([tunnel.listen for one in everything for tunnel in one.active])
    except NetplanError as error:
        # nothing can be judged, so nothing is changed; the rest of the node must not wait for it
        return tuple(replace(one, stuck=str(error)) if one.tunnels else one for one in everything)
    return tuple(
        _settled(config, one, published.get(one.partition.id), owners) if one.tunnels else one
        for one in everything
    )


def _settled(
    config: Config, one: PartitionTunnels, identity: PublicIdentity | None, owners: Owners
) -> PartitionTunnels:
    directory = identities.directory_of(config, one.partition.id)
    found: dict[IdentitySource, IdentityFiles] = {}
    if identity:
        found["partition"] = identities.files_of(identity)
    if one.master:
        found["master"] = one.master.files
    blocked = _blocked(one, directory, owners)
    silent = tuple(
        tunnel.short_name
        for tunnel in one.active
        if tunnel.name not in blocked and one.partition.uid not in owners.get(tunnel.listen, ())
    )
    return replace(one, identities=found, blocked=blocked, silent=silent).settled(directory)


def _blocked(one: PartitionTunnels, directory: Path, owners: Owners) -> dict[str, str]:
    """Tunnels whose port somebody else has: one of these closes every listener of a stunnel that is given it.

    They are left out until the port is free, which the next plan sees. A port is our own stunnel's when the partition's user
    listens there and the configuration on disk does; any other is tried, as only the kernel knows what a listener on all
    addresses excludes.
    """
    if not one.active:
        return {}
    loaded = configuration(directory) or ""
    found = {}
    for tunnel in one.active:
        users = owners.get(tunnel.listen, frozenset())
        own = one.partition.uid in users and render.listens(loaded, tunnel.listen)
        if not own and not _port_is_free(tunnel):
            who = ", ".join(f"uid {uid}" for uid in sorted(users)) or "somebody"
            found[tunnel.name] = f"port {tunnel.listen_port} is taken: {who} listens there"
    return found


def configuration(directory: Path) -> str | None:
    """What a partition's stunnel has on disk, None where it has nothing."""
    try:
        return (directory / render.CONFIG_FILE).read_text("ascii", "replace")
    except FileNotFoundError:
        return None


def held_back(wanted: PartitionTunnels) -> tuple[Refused, ...]:
    """The blocked tunnels, to be told of like the refused ones."""
    if wanted.stuck:
        return tuple(
            Refused(one.name, one.partition, one.file, None, f"left as it is: {wanted.stuck}")
            for one in wanted.tunnels
        )
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
) -> frozenset[str]:
    """Read what lies in ``etc/tunnel``; return the names of what was written a moment ago."""
    young: set[str] = set()
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
                    if _is_young(name, descriptor):
                        young.add(name.removesuffix(".cfg"))
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
        return frozenset()
    except PartitiondError as error:
        refused.append(_refusal(partition, "*", error.resource, str(error)))
    except OSError as error:
        # a tenant may mount a file system of its own there (fusermount3), which the kernel keeps even root out of
        file = str(partition.path / "etc" / "tunnel")
        refused.append(_refusal(partition, "*", file, f"cannot be read: {error.strerror}"))
    return frozenset(young)


def _is_young(name: str, dir_fd: int) -> bool:
    written = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mtime
    return 0 <= time.time() - written < _YOUNG_SECONDS


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
        found.append(parse())
    except TunnelError as error:
        refused.append(conflicts.refusal(error, name=name, partition=context.partition, file=file))


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
