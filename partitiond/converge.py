"""Observe the node, plan, apply, verify: the loop of the house, composed of all parts that make up a node."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netplan import apply as netplan_apply
from netplan import observe as netplan_observe
from netplan import plan as netplan_plan
from netplan.model import BRIDGE_ALIAS
from netplan.operations import RefusedOperation
from partitiond import (
    addressing,
    block_devices,
    choices,
    device_access,
    directories,
    execute,
    identities,
    node,
    resource_file,
    services,
    storage,
    tun_device,
    tunnels,
    users,
)
from partitiond.directories import DirectoryOperation, DirectorySpec
from partitiond.errors import FAMILY, PartitiondError, sentence
from partitiond.users import UserOperation, UserSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from netplan.model import ObservedNetwork
    from netplan.operations import Operation as NetworkOperation
    from partitiond.context import Context
    from partitiond.identities import PublicIdentity
    from partitiond.node import Node, Partition
    from partitiond.operation import AnyOperation
    from partitiond.refusal import Refusal
    from partitiond.supervision import Process
    from partitiond.tunnels import PartitionTunnels
    from stunnel_mgr.model import Refused

logger = logging.getLogger(__name__)

_ROUNDS = 3
PARTS = (
    "withdrawals",
    "users",
    "directories",
    "storage",
    "network",
    "devices",
    "grants",
    "identities",
    "resources",
    "services",
    "tunnels",
    "leavers",
)


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen in one look at the node, and the node as it should be in view of it."""

    users: users.UserDatabase
    network: ObservedNetwork
    processes: tuple[Process, ...]
    node: Node
    block_devices: block_devices.Observed
    storage: storage.Observed


@dataclass(frozen=True, slots=True)
class Plan:
    """The operations by part, in the order in which they are applied; ``declared`` are the tunnels they come from."""

    withdrawals: tuple[block_devices.WithdrawOperation, ...] = ()
    users: tuple[UserOperation, ...] = ()
    directories: tuple[DirectoryOperation, ...] = ()
    storage: tuple[DirectoryOperation, ...] = ()
    network: tuple[NetworkOperation, ...] = ()
    devices: tuple[tun_device.DeviceOperation, ...] = ()
    grants: tuple[block_devices.GrantOperation, ...] = ()
    identities: tuple[identities.IdentityOperation, ...] = ()
    resources: tuple[resource_file.ResourceOperation, ...] = ()
    services: tuple[services.ServiceOperation, ...] = ()
    tunnels: tuple[tunnels.TunnelOperation, ...] = ()
    leavers: tuple[UserOperation, ...] = ()
    refused: tuple[Refused | Refusal, ...] = ()
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
    refused: tuple[Refused | Refusal, ...] = ()


def observe(context: Context) -> Observation:
    """Look at the node. Raises a family error when the interface is missing or the user database cannot be read."""
    config = context.config
    database = users.observe()
    look = netplan_observe.look()
    here = addressing.own_ipv6(config, look)
    base = addressing.choose_base(here, context.store.base())
    rules = addressing.rules(config, base, look)
    choice = choices.choose(rules, {})
    found = node.build(
        config,
        rules.base,
        base in here,
        database.numbers(),
        choice.chosen,
        addressing.own_ipv4(config, look),
        rules.tap_gateway,
    )
    network = netplan_observe.observe(found.network(), look)
    context.node = found
    return Observation(
        database,
        network,
        context.supervisor.processes(),
        found,
        block_devices.observe(config, found.partitions, database),
        storage.observe(config),
    )


def refuse_other_node(context: Context, database: users.UserDatabase) -> None:
    """Refuse to touch a machine that carries a node of another configuration: its marks are the same as ours.

    Told by the homes of our users, which lie below the roots of the configuration that made them.
    """
    roots = (context.config.instance_root, context.config.software_root)
    strangers = [
        user
        for user in database.users.values()
        if user.ours and not any(Path(user.home).is_relative_to(root) for root in roots)
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


def _refuse_first_bridge(operations: tuple[NetworkOperation, ...], network: ObservedNetwork) -> None:
    """Refuse to start with a bridge that cannot be made or filled, before anything is changed.

    On a node whose bridge stands, a port that is gone is a failure among others: the rest is kept up.
    """
    stands = any(link.alias == BRIDGE_ALIAS for link in network.links.values())
    for one in operations:
        if not isinstance(one, RefusedOperation):
            continue
        if one.resource == "bridge" or (one.resource == "port" and not stands):
            raise one.error


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
    network = netplan_plan.plan(target.network(), seen.network)
    _refuse_first_bridge(network, seen.network)
    published = identities.observe(target)
    wanted_tunnels = declared_tunnels(context, target, published)
    running = frozenset(process.group for process in seen.processes if process.pid)
    people = users.plan(desired_users(target), seen.users)
    disks = block_devices.plan(seen.block_devices)
    data, unusable = storage.plan(target, seen.storage, numbers)
    return Plan(
        withdrawals=disks.withdrawals,
        grants=disks.grants,
        storage=data,
        users=tuple(operation for operation in people if operation.spec),
        # a user goes last, when nothing of it runs and nothing is its own any more
        leavers=tuple(operation for operation in people if not operation.spec),
        directories=directories.plan(desired_directories(target), numbers),
        network=network,
        devices=tun_device.plan(taps=any(item.network.tap or item.network.tun for item in target.partitions)),
        identities=identities.plan(target, published),
        resources=resource_file.plan(target, published, _holdings(seen)),
        services=services.plan(context, target, seen.processes),
        tunnels=tuple(
            operation
            for wanted in wanted_tunnels.values()
            for operation in tunnels.plan(wanted, context.config, context.supervisor, running)
        ),
        refused=(
            *disks.refused,
            *unusable,
            *tunnels.homeless(target),
            *(
                refusal
                for wanted in wanted_tunnels.values()
                for refusal in (*wanted.refused, *tunnels.held_back(wanted))
            ),
        ),
        declared=wanted_tunnels,
    )


def _holdings(seen: Observation) -> dict[str, resource_file.Holdings]:
    devices = seen.block_devices.given_names()
    return {
        item.id: resource_file.Holdings(tuple(devices.get(item.id, ())), tuple(seen.storage.paths(item.id)))
        for item in seen.node.partitions
    }


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
    # before any user is made: it might get the number of one that still had a device
    kept = frozenset(
        one.uid
        for one in todo.withdrawals
        if not _try(failures, one.id, partial(device_access.withdraw, one))
    )
    users.apply(todo.users)
    numbers = users.observe().numbers() if todo.users else seen.users.numbers()
    directories.apply(todo.directories, numbers)
    for failed, error in netplan_apply.apply(todo.network):
        failures.append((failed.id, error))
    config = context.config
    calls: list[tuple[str, Callable[[], None]]] = [
        *((one.id, partial(directories.apply, (one,), numbers)) for one in todo.storage),
        *((one.id, tun_device.apply) for one in todo.devices),
        # what could not be taken from one is given to no other
        *((one.id, partial(device_access.grant, one)) for one in todo.grants if not kept),
        *((one.id, partial(identities.make, config, one.owner)) for one in todo.identities),
        *((one.id, partial(_write_resource, seen, one.owner)) for one in todo.resources),
        *((one.id, partial(services.apply, context, one)) for one in todo.services),
        *((one.id, partial(tunnels.apply, one, config, context.supervisor)) for one in todo.tunnels),
    ]
    if todo.leavers:
        calls.append(("users", partial(_remove_users, seen, todo.leavers, kept)))
    for name, call in calls:
        _try(failures, name, call)
    return failures


def _write_resource(seen: Observation, partition: Partition) -> None:
    # what was given a moment ago is already in it
    devices = tuple(device_access.given_now(seen.block_devices, partition))
    holdings = resource_file.Holdings(devices, tuple(seen.storage.paths(partition.id)))
    resource_file.write(seen.node, partition, holdings)


def _remove_users(seen: Observation, leavers: tuple[UserOperation, ...], kept: frozenset[int]) -> None:
    """Remove users; ``kept`` are those that still have a device: the next one with their number would have it."""
    going = []
    for leaver in leavers:
        user = seen.users.users[leaver.id.partition("/")[2]]
        execute.end_processes_of(user.uid, user.gid)
        if user.uid not in kept:
            going.append(leaver)
    users.apply(going)


def _try(failures: list[tuple[str, Exception]], name: str, call: Callable[[], None]) -> bool:
    try:
        call()
    except (*FAMILY, OSError) as error:
        failures.append((name, error))
        logger.warning("%s: %s", name, sentence(error))
        return False
    return True
