"""A node that owns nothing of the machine (:mod:`partitiond.config_unmanaged`): its directories and resource files.

Promises: nothing but the files of whoever runs it is touched; no network, no users, no namespaces, no meters. Instances and
releases go the same way as on any other node.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from netplan.model import PartitionNetwork
from partitiond import files, resource_file
from partitiond.choices import Choice, Chosen, Rules
from partitiond.context import Context
from partitiond.errors import PartitiondError
from partitiond.metering import Metering
from partitiond.node import Node, Partition
from partitiond.node_plan import Outcome
from partitiond.resource_file import Holdings
from partitiond.unmanaged_supervisor import UnmanagedSupervisor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from accounting.model import Gap
    from partitiond.config import Config
    from partitiond.config_unmanaged import DefinedPartition, Unmanaged

_LIMIT = 64 * 1024


@dataclass(slots=True)
class _Unmetered(Metering):
    """Meters of nothing: what the node's user exchanges and uses is not this node's alone."""

    def settle(self, context: Context, node: Node) -> None:
        """Settle nothing."""

    def forget(self, partition: str) -> None:
        """Forget nothing."""

    def record(self, context: Context, node: Node) -> tuple[Gap, ...]:  # noqa: ARG002 - as above
        """Record nothing."""
        return ()


def context(config: Config) -> Context:
    """The context of such a node."""
    made = Context.of(config)
    made.current = replace(made.current, supervisor=UnmanagedSupervisor(config))
    made.meters = _Unmetered(made.meters.path)
    made.node = node(config)
    return made


def node(config: Config) -> Node:
    """The node as its definition file has it."""
    own = _own(config)
    chosen = {
        item.id: Chosen(item.ipv4, ipv6=item.ipv6, ipv6_range=item.ipv6_range) for item in own.partitions
    }
    rules = Rules(
        partitions=tuple(chosen),
        base=None,
        prefixshift=config.ipv6_prefixshift,
        ipv4_network=config.ipv4_network,
    )
    partitions = tuple(
        _partition(config, own, index, item, chosen[item.id]) for index, item in enumerate(own.partitions)
    )
    return Node(config, Choice(rules, {}, chosen, {}), base_is_here=False, partitions=partitions)


def _own(config: Config) -> Unmanaged:
    if config.unmanaged is None:
        raise PartitiondError("node.managed", "this node is partitiond's own", resource=str(config.file))
    return config.unmanaged


def _partition(
    config: Config, own: Unmanaged, index: int, item: DefinedPartition, chosen: Chosen
) -> Partition:
    network = PartitionNetwork(
        id=item.id, index=index, uid=own.uid, ipv6=item.ipv6, ipv6_range=item.ipv6_range, ipv4=item.ipv4
    )
    return Partition(
        id=item.id,
        index=index,
        user=own.user,
        uid=own.uid,
        gid=own.gid,
        path=config.instance_root / item.id,
        ipv4=item.ipv4,
        network=network,
        guest_mac=None,
        chosen=chosen,
    )


@dataclass(frozen=True, slots=True)
class Change:
    """A directory (``content`` None) or a file as it should be, and why it is not so."""

    path: Path
    mode: int
    content: bytes | None
    reason: str


def plan(context: Context) -> tuple[Change, ...]:
    """What is missing or another. Raises OSError, PartitiondError."""
    target = context.node_in_force or node(context.config)
    supervisor = context.supervisor
    found = [_directory(path, mode) for path, mode in _directories(target)]
    for partition in target.partitions:
        text = resource_file.content(target, partition, None, Holdings())
        found.append(_file(partition.path / resource_file.NAME, 0o644, text))
    found.append(_file(supervisor.configuration, 0o600, supervisor.render().encode()))
    return tuple(one for one in found if one is not None)


def apply(context: Context) -> Outcome:
    """Make what is missing, and put right what is another. Raises OSError, PartitiondError."""
    changes = plan(context)
    for one in changes:
        if one.content is not None:
            files.write_path(one.path, one.content, mode=one.mode)
            continue
        one.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        one.path.chmod(one.mode)
    return Outcome(done=len(changes), stands=True)


def _directories(target: Node) -> Iterator[tuple[Path, int]]:
    """All that there are to be, with their modes, each after the one it lies in; modes as slapos.core gives them."""
    config = target.config
    root = config.instance_root
    yield from ((root, 0o755), (config.software_root, 0o755), (root / "var", 0o755))
    yield from ((root / "var" / name, 0o700) for name in ("log", "run"))
    yield from ((root / "etc", 0o700), (root / "etc" / "supervisord.conf.d", 0o700))
    for own in (config.state_dir, config.log_dir, config.run_dir):
        yield own.parent, 0o700
        yield own, 0o700
    yield config.log_dir / "software", 0o700
    for partition in target.partitions:
        yield partition.path, 0o750
        yield config.log_dir / partition.id, 0o700


def _directory(path: Path, mode: int) -> Change | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return Change(path, mode, None, "missing")
    if not stat.S_ISDIR(found.st_mode):
        raise PartitiondError(
            "directory.in_the_way", "is no directory", resource=str(path), hint="move it away, then try again"
        )
    # what is somebody else's is theirs to open and close
    if stat.S_IMODE(found.st_mode) == mode or found.st_uid != os.geteuid():
        return None
    return Change(path, mode, None, f"its mode is {stat.S_IMODE(found.st_mode):04o}")


def _file(path: Path, mode: int, content: bytes) -> Change | None:
    try:
        with files.directory(path.parent) as descriptor:
            found = files.read(path.name, dir_fd=descriptor, limit=_LIMIT)
    except FileNotFoundError:
        return Change(path, mode, content, "missing")
    return None if found == content else Change(path, mode, content, "says something else")
