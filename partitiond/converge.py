"""Observe the node, plan, apply, verify: the loop of the house, composed of all parts that make up a node."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netplan import apply as netplan_apply
from netplan import model as netmodel
from netplan import observe as netplan_observe
from netplan import plan as netplan_plan
from netplan.model import DesiredNetwork
from partitiond import (
    directories,
    execute,
    identities,
    node,
    resource_file,
    services,
    tun_device,
    tunnels,
    users,
)
from partitiond.directories import DirectorySpec
from partitiond.errors import FAMILY, PartitiondError, sentence
from partitiond.users import UserOperation, UserSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from netplan.model import Address, ObservedNetwork
    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.identities import PublicIdentity
    from partitiond.node import Node, Partition
    from partitiond.operation import AnyOperation
    from partitiond.supervision import Process
    from partitiond.tunnels import PartitionTunnels
    from stunnel_mgr.model import Refused

logger = logging.getLogger(__name__)

_ROUNDS = 3
PARTS = (
    "users",
    "directories",
    "network",
    "devices",
    "identities",
    "resources",
    "services",
    "tunnels",
    "leavers",
)
# include/uapi/linux/if_addr.h: temporary, dadfailed, deprecated, tentative
_UNUSABLE = 0x01 | 0x08 | 0x20 | 0x40


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen in one look at the node, and the node as it should be in view of it."""

    users: users.UserDatabase
    network: ObservedNetwork
    processes: tuple[Process, ...]
    node: Node


@dataclass(frozen=True, slots=True)
class Plan:
    """The operations by part, in the order in which they are applied; ``declared`` are the tunnels they come from."""

    users: tuple[UserOperation, ...] = ()
    directories: tuple[directories.DirectoryOperation, ...] = ()
    network: tuple[netmodel.Operation, ...] = ()
    devices: tuple[tun_device.DeviceOperation, ...] = ()
    identities: tuple[identities.IdentityOperation, ...] = ()
    resources: tuple[resource_file.ResourceOperation, ...] = ()
    services: tuple[services.ServiceOperation, ...] = ()
    tunnels: tuple[tunnels.TunnelOperation, ...] = ()
    leavers: tuple[UserOperation, ...] = ()
    refused: tuple[Refused, ...] = ()
    declared: Mapping[str, PartitionTunnels] = field(default_factory=dict)

    def __iter__(self) -> Iterator[AnyOperation]:
        """All operations in order."""
        for part in PARTS:
            yield from getattr(self, part)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(slots=True)
class Outcome:
    """What an apply did and what is left."""

    done: int = 0
    failures: list[tuple[str, Exception]] = field(default_factory=list)
    left: tuple[AnyOperation, ...] = ()
    refused: tuple[Refused, ...] = ()


def observe(context: Context) -> Observation:
    """Look at the node. Raises a family error when the interface is missing or the user database cannot be read."""
    config = context.config
    database = users.observe()
    # what is wanted hangs on the node's own address, and how much must be looked at on what is wanted
    first = netplan_observe.observe(DesiredNetwork(interface=config.ipv6_interface))
    _check_bridge(config, first)
    here = own_addresses(config, first)
    base = choose_base(here, context.store.base())
    found = node.build(config, base, base in here, database.numbers(), _taken_ipv4(config, first))
    network = netplan_observe.observe(found.network())
    context.node = found
    return Observation(database, network, context.supervisor.processes(), found)


def refuse_other_node(context: Context, database: users.UserDatabase) -> None:
    """Refuse to touch a machine that carries a node of another configuration: its marks are the same as ours.

    Told by the homes of our users, which lie below the roots of the configuration that made them: ``<root>/slappart3``. A
    home of another name is nobody's: it was changed by hand, and is put right.
    """
    roots = (context.config.instance_root, context.config.software_root)
    strangers = [
        user
        for user in database.users.values()
        if user.ours
        and not any(Path(user.home).is_relative_to(root) for root in roots)
        and user.partition in (None, Path(user.home).name)
    ]
    if strangers:
        raise PartitiondError(
            "node.other",
            f"this machine carries a node of partitiond with other roots: {strangers[0].name} lives in {strangers[0].home}",
            resource=str(context.config.file),
            hint="tear that node down with its own configuration first, or set instance_root and software_root back",
        )


def _refuse_busy(context: Context, target: Node) -> None:
    """Refuse to take partitions away that still have an instance: nobody destroyed it."""
    known = {item.id for item in target.partitions}
    busy = sorted(name for name in context.store.instances() if name not in known)
    if busy:
        raise PartitiondError(
            "node.shrinks_busy",
            f"partition_amount leaves no place for {', '.join(busy)}, which still has an instance",
            resource=str(context.config.file),
            hint="destroy the instance at the master and run partitiond sync report, or set partition_amount back",
        )


def _check_bridge(config: Config, network: ObservedNetwork) -> None:
    """Refuse a bridge that is not there before anything is changed."""
    if config.bridge is None:
        return
    link = network.links.get(config.bridge)
    if link is None or link.kind != "bridge":
        there = ", ".join(sorted(one.name for one in network.links.values() if one.kind == "bridge"))
        raise PartitiondError(
            "network.no_bridge",
            f"{config.bridge} is {'no bridge' if link else 'not there'}",
            resource=str(config.file),
            hint=f"make the bridge, or set bridge in [partitiond] to {there or 'nothing: taps are not bridged then'}",
        )


def own_addresses(config: Config, network: ObservedNetwork) -> list[ipaddress.IPv6Interface]:
    """The node's own global IPv6 addresses on its interface."""
    link = network.links[config.ipv6_interface].ifindex
    return [
        ipaddress.IPv6Interface((address.packed, address.prefixlen))
        for address in network.addresses
        if address.link == link and _usable(address)
    ]


def choose_base(
    here: list[ipaddress.IPv6Interface], remembered: ipaddress.IPv6Interface | None
) -> ipaddress.IPv6Interface | None:
    """The address of which those of the partitions are derived; None on a node that never had one. Pure.

    The one chosen before stays as long as its network is there, and also while the interface has no address at all: a
    router that is silent for a while must not take the partitions' addresses away. Else that of the largest subnet, then the
    lowest, as slapformat chooses.
    """
    if remembered is not None:
        same = [one for one in here if one.network == remembered.network]
        if remembered in here or not here:
            return remembered
        if same:
            return min(same, key=lambda one: int(one.ip))
    return min(here, key=lambda one: (one.network.prefixlen, int(one.ip)), default=None)


def _usable(address: Address) -> bool:
    if len(address.packed) != 16 or address.protocol == netmodel.PROTOCOL_MARK or address.flags & _UNUSABLE:
        return False
    ip = ipaddress.IPv6Address(address.packed)
    return not (ip.is_link_local or ip.is_loopback or ip.is_multicast) and address.prefixlen < 127


def _taken_ipv4(config: Config, network: ObservedNetwork) -> frozenset[ipaddress.IPv4Address]:
    """The node's own IPv4 addresses in the private network; a /32 of the interface may be a partition's already."""
    link = network.links[config.ipv6_interface].ifindex
    return frozenset(
        ip
        for address in network.addresses
        if len(address.packed) == 4
        and not (address.link == link and address.prefixlen == 32)
        and (ip := ipaddress.IPv4Address(address.packed)) in config.ipv4_network
    )


def desired_users(target: Node) -> tuple[UserSpec, ...]:
    """The software user and one user per partition, which is in the software user's group to read the software."""
    config = target.config
    software = UserSpec(config.software_user, None, str(config.software_root), (), None)
    partitions = tuple(
        UserSpec(item.user, item.uid, str(item.path), (config.software_user,), item.id)
        for item in target.partitions
    )
    return (software, *partitions)


def desired_directories(target: Node) -> tuple[DirectorySpec, ...]:
    """Every directory that must be there; parents first."""
    config = target.config
    root = "root"
    own = [
        DirectorySpec(config.instance_root, root, root, 0o755),
        *(DirectorySpec(config.instance_root / below, root, root, 0o755) for below in ("etc", "var")),
        *(
            DirectorySpec(config.instance_root / below, root, root, 0o700)
            for below in ("etc/supervisord.conf.d", "var/log", "var/run")
        ),
        DirectorySpec(config.software_root, config.software_user, config.software_user, 0o755),
        # partition users pass through to what is theirs below; they can list nothing
        DirectorySpec(config.state_dir, root, root, 0o711),
        DirectorySpec(config.state_dir / "tunnels", root, root, 0o711),
        DirectorySpec(config.log_dir, root, root, 0o711),
        DirectorySpec(config.log_dir / "software", root, root, 0o755),
        DirectorySpec(config.run_dir, root, root, 0o755),
    ]
    for item in target.partitions:
        own += (
            DirectorySpec(item.path, item.user, item.user, 0o750, item.id),
            DirectorySpec(config.log_dir / item.id, root, item.user, 0o750, item.id),
            DirectorySpec(identities.directory_of(config, item.id), root, item.user, 0o750, item.id),
        )
    return tuple(own)


def plan(context: Context, seen: Observation) -> Plan:
    """Compare everything. Raises a family error when the desired state cannot be (a taken uid, a name in the way)."""
    target = seen.node
    refuse_other_node(context, seen.users)
    # a user that is missing gets the number that it is planned with: its directories are no drift of their own
    numbers = {item.user: (item.uid, item.gid) for item in target.partitions} | seen.users.numbers()
    _refuse_busy(context, target)
    published = identities.observe(target)
    wanted_tunnels = declared_tunnels(context, target, published)
    running = frozenset(process.group for process in seen.processes if process.pid)
    people = users.plan(desired_users(target), seen.users)
    return Plan(
        users=tuple(operation for operation in people if operation.spec),
        # a user goes last, when nothing of it runs and nothing is its own any more
        leavers=tuple(operation for operation in people if not operation.spec),
        directories=directories.plan(desired_directories(target), numbers),
        network=netplan_plan.plan(target.network(), seen.network),
        devices=tun_device.plan(taps=context.config.create_tap and bool(target.partitions)),
        identities=identities.plan(target, published),
        resources=resource_file.plan(target, published),
        services=services.plan(context, target, seen.processes),
        tunnels=tuple(
            operation
            for wanted in wanted_tunnels.values()
            for operation in tunnels.plan(wanted, context.config, context.supervisor, running)
        ),
        refused=(
            *tunnels.homeless(target),
            *(
                refusal
                for wanted in wanted_tunnels.values()
                for refusal in (*wanted.refused, *tunnels.held_back(wanted))
            ),
        ),
        declared=wanted_tunnels,
    )


def declared_tunnels(
    context: Context, target: Node, published: Mapping[str, PublicIdentity | None]
) -> dict[str, PartitionTunnels]:
    """The tunnels of each partition by its id; ``published`` are the identities that are there."""
    certificates = {one.fingerprint: one.certificate_pem for one in published.values() if one}
    found = [_tunnels_of(context, target, item, certificates) for item in target.partitions]
    return {one.partition.id: one for one in tunnels.settle(context.config, found)}


def _tunnels_of(
    context: Context, target: Node, partition: Partition, certificates: Mapping[str, str]
) -> PartitionTunnels:
    """The tunnels of a partition: none while it is stopped or being destroyed."""
    life = context.store.instance(partition.id)
    if life.life in ("stopped", "destroying") or (life.life == "failed" and life.wanted == "stopped"):
        return tunnels.PartitionTunnels(partition)
    return tunnels.declared(target, partition, certificates)


def _only(whole: Plan, names: frozenset[str]) -> Plan:
    """The part of a plan that concerns some partitions; what belongs to the whole node stays, as they stand on it."""
    if not names:
        return whole
    parts: dict[str, Any] = {
        part: tuple(operation for operation in getattr(whole, part) if operation.partition in (None, *names))
        for part in PARTS
    }
    return replace(
        whole, **parts, refused=tuple(refusal for refusal in whole.refused if refusal.partition in names)
    )


def apply(context: Context, *, only: frozenset[str] = frozenset()) -> Outcome:
    """Bring the node where it should be and verify by looking again.

    More than one round is taken while a round makes progress: a tunnel may need the identity that the round before made.
    Raises a family error when nothing can be done at all.
    """
    outcome = Outcome()
    with context.applying:
        for _ in range(_ROUNDS):
            seen = observe(context)
            todo = _only(plan(context, seen), only)
            outcome.left, outcome.refused = tuple(todo), todo.refused
            if not todo:
                context.store.save_base(seen.node.base)
                break
            outcome.failures = _run(context, seen, todo)
            outcome.done += len(todo) - len(outcome.failures)
            if outcome.failures:
                outcome.left = tuple(_only(plan(context, observe(context)), only))
                break
    return outcome


def _run(context: Context, seen: Observation, todo: Plan) -> list[tuple[str, Exception]]:
    """Run a plan part by part; a part that others stand on must succeed, the rest fail alone."""
    failures: list[tuple[str, Exception]] = []
    users.apply(todo.users)
    numbers = users.observe().numbers() if todo.users else seen.users.numbers()
    directories.apply(todo.directories, numbers)
    for failed, error in netplan_apply.apply(todo.network):
        failures.append((failed.id, error))
    config = context.config
    calls: list[tuple[str, Callable[[], None]]] = [
        *((one.id, tun_device.apply) for one in todo.devices),
        *((one.id, partial(identities.make, config, one.owner)) for one in todo.identities),
        *((one.id, partial(resource_file.write, seen.node, one.owner)) for one in todo.resources),
        *((one.id, partial(services.apply, context, one)) for one in todo.services),
        *((one.id, partial(tunnels.apply, one, config, context.supervisor)) for one in todo.tunnels),
    ]
    if todo.leavers:
        calls.append(("users", partial(_remove_users, seen, todo.leavers)))
    for name, call in calls:
        _try(failures, name, call)
    return failures


def _remove_users(seen: Observation, leavers: tuple[UserOperation, ...]) -> None:
    for leaver in leavers:
        user = seen.users.users[leaver.id.partition("/")[2]]
        execute.end_processes_of(user.uid, user.gid)
    users.apply(leavers)


def _try(failures: list[tuple[str, Exception]], name: str, call: Callable[[], None]) -> None:
    try:
        call()
    except (*FAMILY, OSError) as error:
        failures.append((name, error))
        logger.warning("%s: %s", name, sentence(error))
