"""Observe the node, plan, apply, verify: the loop of the house, composed of all parts that make up a node."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from netplan import filter_state as netplan_filter
from netplan import observe as netplan_observe
from netplan import plan as netplan_plan
from netplan import tinc_config
from netplan.model import BRIDGE_ALIAS
from netplan.once import once, once_each
from netplan.operations import RefusedOperation
from partitiond import (
    addressing,
    block_devices,
    carry_out,
    directories,
    identities,
    last_good,
    mesh,
    node,
    port_reservation,
    privacy,
    protection,
    quotas,
    remembered,
    resource_file,
    services,
    storage,
    supervision,
    trial,
    tun_device,
    tunnel_declarations,
    tunnels,
    unmanaged,
    users,
)
from partitiond.directories import DirectoryOperation, DirectorySpec
from partitiond.errors import PartitiondError
from partitiond.node_plan import PARTS, Looked, Observation, Outcome, Plan
from partitiond.refusal import Refusal
from partitiond.tunnel_declarations import PartitionTunnels
from partitiond.users import UserSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from netplan.model import ObservedNetwork
    from netplan.operations import Operation as NetworkOperation
    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.identities import PublicIdentity
    from partitiond.node import Node, Partition
    from partitiond.users import User

logger = logging.getLogger(__name__)

_ROUNDS = 3
_RECENT_SECONDS = 120.0  # two sweeps


def observe(context: Context, *, again: bool = False) -> Observation:
    """Look at the node; ``again``: links need not be listed that somebody listens to.

    Raises a family error when the interface is missing or the user database cannot be read.
    """
    config = context.config
    database = users.observe()
    look = netplan_observe.look(context.links() if again else None)
    choice, base_is_here = addressing.choose(context, look)
    host_ipv4 = addressing.own_ipv4(config, look)
    protected = protection.look(config, look)
    limits = quotas.rate_limits(config, context.quotas.standings())
    numbers = database.numbers()
    found = node.build(config, base_is_here, numbers, choice, host_ipv4, context.node, protected, limits)
    network = netplan_observe.observe(found.network(), look)
    # and not that of a pass that began before another one came into force
    if config is context.current.config:
        context.node = found
    return Observation(
        database,
        network,
        context.supervisor.processes(),
        found,
        block_devices.observe(config, found.partitions, database),
        storage.observe(config),
        choice,
        port_reservation.observe(config),
    )


@once
def _strangers(database: users.UserDatabase, config: Config) -> list[User]:
    roots = tuple(f"{one}/" for one in (config.instance_root, config.software_root, config.state_dir))
    return [
        user
        for user in database.users.values()
        if user.ours
        and not f"{user.home}/".startswith(roots)
        and user.partition in (None, Path(user.home).name)
    ]


def refuse_other_node(context: Context, database: users.UserDatabase) -> None:
    """Refuse to touch a machine that carries a node of another configuration: its marks are the same as ours.

    Told by the homes of our users, which lie below the roots of the configuration that made them: ``<root>/slappart3``. A
    home of another name is nobody's: it was changed by hand, and is put right.
    """
    strangers = _strangers(database, context.config)
    if strangers:
        raise PartitiondError(
            "node.other",
            f"this machine carries a node of partitiond with other roots: {strangers[0].name} lives in {strangers[0].home}",
            resource=str(context.config.file),
            hint="tear that node down with its own configuration first, or set instance_root and software_root back",
        )


def _busy(context: Context, target: Node, database: users.UserDatabase) -> list[str]:
    """Partitions that are to go and still have an instance; what has no user any more is gone already."""
    known = {item.id for item in target.partitions}
    here = {user.partition for user in database.users.values() if user.ours}
    return sorted(name for name in context.store.partitions() if name not in known and name in here)


def _refuse_busy(context: Context, target: Node, database: users.UserDatabase) -> None:
    """Refuse to take partitions away that still have an instance: nobody destroyed it."""
    busy = _busy(context, target, database)
    if busy:
        raise PartitiondError(
            "node.shrinks_busy",
            f"partition_amount leaves no place for {', '.join(busy)}, which still has an instance",
            resource=str(context.config.file),
            hint="destroy the instance at the master and run partitiond sync report, or set partition_amount back;"
            " --force ends it and keeps its data",
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


@once
def desired_users(target: Node) -> tuple[UserSpec, ...]:
    """The software user, tincd's where there is a mesh, and one user per partition.

    Those of partitions are in the software user's group, to read the software.
    """
    config = target.config
    software = UserSpec(config.software_user, None, str(config.software_root), (), None)
    tincd = UserSpec(mesh.USER, None, str(mesh.directory_of(config)), (), None, role="mesh")
    own = (software, tincd) if config.mesh else (software,)
    return (*own, *(_user_of(item, config.software_user) for item in target.partitions))


@once_each
def _user_of(item: Partition, software_user: str) -> UserSpec:
    return UserSpec(item.user, item.uid, str(item.path), (software_user,), item.id)


@once
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
        # what one tenant has built is no other's concern, although all may use it
        DirectorySpec(config.log_dir / "software", root, root, 0o700),
        DirectorySpec(config.run_dir, root, root, 0o755),
        *_directories_of_mesh(config),
    ]
    for item in target.partitions:
        own += _directories_of(item, config.log_dir, config.state_dir)
    return tuple(own)


def _directories_of_mesh(config: Config) -> tuple[DirectorySpec, ...]:
    if config.mesh is None:
        return ()
    directory = mesh.directory_of(config)
    return (
        DirectorySpec(directory, "root", mesh.USER, 0o750),
        DirectorySpec(directory / tinc_config.HOSTS, "root", mesh.USER, 0o750),
        DirectorySpec(mesh.log_file(config).parent, "root", "root", 0o700),
    )


@once_each
def _directories_of(item: Partition, log_dir: Path, state_dir: Path) -> tuple[DirectorySpec, ...]:
    return (
        DirectorySpec(item.path, item.user, item.user, 0o750, item.id),
        DirectorySpec(log_dir / item.id, "root", item.user, 0o750, item.id),
        DirectorySpec(state_dir / "tunnels" / item.id, "root", item.user, 0o750, item.id),
    )


def plan(
    context: Context, seen: Observation, *, force: bool = False, done: Plan | None = None, anew: bool = False
) -> Plan:
    """Compare everything; with ``force`` also busy partitions go.

    ``done``: the plan that was carried out a moment ago. Of a partition that it did nothing for, and that declares no tunnel,
    the files are not looked at again; ``anew``: its directories are, which all else stands on.

    Raises a family error when the desired state cannot be (a taken uid, a name in the way).
    """
    target = seen.node
    refuse_other_node(context, seen.users)
    # a user that is missing gets the number that it is planned with: its directories are no drift of their own
    numbers = {item.user: (item.uid, item.gid) for item in target.partitions} | seen.users.numbers()
    if not force:
        _refuse_busy(context, target, seen.users)
    network = netplan_plan.plan(target.network(), seen.network)
    _refuse_first_bridge(network, seen.network)
    looked_at = _to_look_at(target, done)
    ids = frozenset((None, *(item.id for item in looked_at)))
    published = identities.observe(target.config, looked_at)
    if done is not None:
        published |= {item.id: done.published[item.id] for item in target.partitions if item.id not in ids}
    wanted_tunnels = declared_tunnels(context, target, published, looked_at)
    strange = context.supervisor.strange_groups()
    set_up = frozenset(context.supervisor.group_names()) - strange
    people = _plan_users(desired_users(target), seen.users)
    secluded = privacy.plan(
        target.config,
        target.partitions,
        _used(context, target, set_up, wanted_tunnels),
        privacy.observe(target.config),
    )
    disks = block_devices.plan(seen.block_devices)
    data, unusable = storage.plan(target, seen.storage, numbers)
    places, unreachable = _plan_directories(
        target.config, [one for one in desired_directories(target) if anew or one.partition in ids], numbers
    )
    tincd = mesh.plan(target.config, context.supervisor, seen.processes, numbers)
    return Plan(
        withdrawals=disks.withdrawals,
        grants=disks.grants,
        storage=data,
        users=tuple(operation for operation in people if operation.spec),
        # a user goes last, when nothing of it runs and nothing is its own any more
        leavers=tuple(operation for operation in people if not operation.spec),
        directories=places,
        network=network,
        devices=tun_device.plan(taps=any(item.network.tap or item.network.tun for item in target.partitions)),
        identities=identities.plan(looked_at, published),
        resources=resource_file.plan(target, looked_at, published, _holdings(seen)),
        privacy=secluded,
        services=services.plan(context, target, seen.processes, set_up, strange, privacy.missing(secluded)),
        mesh=tincd.operations,
        ports=port_reservation.plan(seen.ports, port_reservation.deal(seen.ports, wanted_tunnels.values())),
        tunnels=_plan_tunnels(
            context, seen, [one for name, one in wanted_tunnels.items() if name in ids], set_up
        ),
        refused=(
            *disks.refused,
            *unusable,
            *unreachable,
            *tincd.refused,
            *remembered.refused(context),
            *tunnel_declarations.homeless(target),
            *(
                refusal
                for wanted in wanted_tunnels.values()
                for refusal in (*wanted.refused, *tunnel_declarations.held_back(wanted))
            ),
        ),
        published=published,
        declared=wanted_tunnels,
    )


def _plan_tunnels(
    context: Context, seen: Observation, wanted: Sequence[PartitionTunnels], set_up: frozenset[str]
) -> tuple[tunnels.TunnelOperation, ...]:
    running = supervision.running_groups(seen.processes)
    # asked only where some stunnel is to run
    limit = tunnels.open_files(context.supervisor) if any(one.files for one in wanted) else 0
    return tuple(
        operation
        for one in wanted
        for operation in tunnels.plan(
            one, context.config, context.supervisor, set_up=set_up, running=running, limit=limit
        )
    )


def _used(
    context: Context, target: Node, set_up: frozenset[str], wanted: Mapping[str, PartitionTunnels]
) -> frozenset[str]:
    """The partitions that have something to run: an instance, whatever its state, or a tunnel."""
    known = frozenset(context.store.partitions())
    return frozenset(
        item.id
        for item in target.partitions
        if item.id in known
        or wanted[item.id].files
        or not set_up.isdisjoint((item.id, tunnels.group_name(item.id)))
    )


def _plan_directories(
    config: Config, specs: Sequence[DirectorySpec], numbers: Mapping[str, tuple[int, int]]
) -> tuple[tuple[DirectoryOperation, ...], tuple[Refusal, ...]]:
    """What directories need; one of a partition that cannot be looked at is refused and holds up nothing else.

    A tenant may mount a file system of its own over its directory (fusermount3(1)), which the kernel keeps even root out of.
    """
    try:
        return directories.plan(specs, numbers), ()
    except OSError:
        pass  # which one it was is found out below
    operations: list[DirectoryOperation] = []
    refused = []
    for spec in specs:
        try:
            operations += directories.plan((spec,), numbers)
        except OSError as error:
            if spec.partition is None:
                raise
            refused.append(
                Refusal(
                    resource="directory",
                    name=str(spec.path),
                    partition=spec.partition,
                    file=str(config.file),
                    line=None,
                    code="directory.unreachable",
                    reason=f"cannot be looked at: {error.strerror}",
                    hint="is something mounted there? umount -l takes it away",
                )
            )
    return tuple(operations), tuple(refused)


def _to_look_at(target: Node, done: Plan | None) -> tuple[Partition, ...]:
    """The partitions of whose files another look may say something new, now that a plan is carried out."""
    if done is None:
        return target.partitions
    # what it did for the whole node may be about anybody's files, but for network, mesh, ports and supervisord
    parts = (part for part in PARTS if part not in ("network", "mesh", "ports", "services"))
    others = [operation for part in parts for operation in getattr(done, part)]
    if any(operation.partition is None for operation in others):
        return target.partitions
    touched = {operation.partition for operation in done}
    quiet = {
        one.partition.id: one.partition
        for one in done.declared.values()
        if not (one.tunnels or one.refused or one.partition.id in touched)
    }
    return tuple(item for item in target.partitions if quiet.get(item.id) is not item)


def _holdings(seen: Observation) -> dict[str, resource_file.Holdings]:
    devices = seen.block_devices.given_names()
    return {
        item.id: resource_file.Holdings(tuple(devices.get(item.id, ())), tuple(seen.storage.paths(item.id)))
        for item in seen.node.partitions
    }


_plan_users = once(users.plan)


def declared_tunnels(
    context: Context,
    target: Node,
    published: Mapping[str, PublicIdentity | None],
    looked_at: Iterable[Partition],
) -> dict[str, PartitionTunnels]:
    """The tunnels of each partition by its id: of those not ``looked_at`` none."""
    certificates = identities.certificates(published.values())
    halted = remembered.halted(context)
    found = {item.id: PartitionTunnels(item) for item in target.partitions}
    found |= {
        item.id: tunnel_declarations.declared(target, item, certificates)
        for item in looked_at
        if item.id not in halted
    }
    settled = tunnel_declarations.settle(context.config, tuple(found.values()), published)
    return {one.partition.id: one for one in settled}


def _only(whole: Plan, names: frozenset[str]) -> Plan:
    """The part of a plan that concerns some partitions; what belongs to the whole node stays, as they stand on it.

    With supervisord start the programs of all partitions that lack nothing else: they ended when it did, and once it is there
    nobody would miss them before the next sweep.
    """
    if not names:
        return whole
    wanted = (None, *names)
    following: set[str | None] = set()
    if any(one.resource == "supervisord" for one in whole.services):
        others = [part for part in PARTS if part not in ("services", "tunnels")]
        lacking = {operation.partition for part in others for operation in getattr(whole, part)}
        following = {one.partition for one in whole.services if one.action == "change"} - lacking
    return replace(
        whole.keeping(lambda one: one.partition in wanted),
        services=tuple(
            one for one in whole.services if one.partition in wanted or one.partition in following
        ),
        refused=tuple(refusal for refusal in whole.refused if refusal.partition in names),
    )


def _but(whole: Plan, ids: set[str]) -> Plan:
    """A plan without some of its operations."""
    return whole.keeping(lambda one: one.id not in ids) if ids else whole


def _hangs_alone(failure: tuple[str, Exception]) -> bool:
    return failure[0].startswith(("tinc/", "tunnels/", "ports/"))


def look(context: Context, *, force: bool = False, done: Plan | None = None) -> tuple[Observation, Plan]:
    """Look at the whole node; what the kernel told of it until now is answered by that.

    ``done`` and what is raised: see :func:`plan`.
    """
    context.looking()
    before, began = context.looked, time.monotonic()
    seen = observe(context, again=done is not None)
    found = plan(context, seen, force=force, done=done)
    at = before.at if before and done else began
    context.looked = Looked(context.config, at, found, seen.processes)
    return seen, found


def recently(context: Context, config: Config) -> Plan | None:
    """What the last look at the whole node led to, if that was by this configuration and not long ago."""
    found = context.looked
    if found is None or found.config is not config or time.monotonic() - found.at > _RECENT_SECONDS:
        return None
    return found.plan


def apply(
    context: Context,
    *,
    only: frozenset[str] = frozenset(),
    force: bool = False,
    first: tuple[Observation, Plan] | None = None,
) -> Outcome:
    """Bring the node where it should be and verify by looking again; with ``force`` also busy partitions go.

    More than one round is taken while a round makes progress: a tunnel may need the identity that the round before made.
    ``first``: what a look gave that was taken since ``applying`` is held. Raises a family error when nothing can be done
    at all.
    """
    if context.config.unmanaged is not None:
        return unmanaged.apply(context)
    outcome = Outcome()
    # the settings in force now, also in a pass that began with others: it would take back what came since
    with context.applying, context.steady():
        seen, whole = first or _look(context, only, force=force)
        for again in range(_ROUNDS + 1):
            todo = _only(whole, only)
            _remember_addresses(context, seen, whole)
            # what hangs on nobody else keeps nobody else from the round after it, and is not tried again
            pending = _but(todo, {name for name, _ in outcome.failures})
            if not pending or again == _ROUNDS or not all(map(_hangs_alone, outcome.failures)):
                break
            failures, left_out = carry_out.run(context, seen, pending)
            outcome.failures += failures
            outcome.done += len(pending) - len(failures) - left_out
            seen, whole = _look(context, only, force=force, done=whole)
        carry_out.attempt(
            outcome.failures, "filter/partitiond", partial(netplan_filter.keep, seen.network.filter)
        )
        outcome.left, outcome.refused = tuple(todo), todo.refused
        if not todo:
            context.store.save_base(seen.node.base)
        outcome.stands = todo.stands
        if not only and outcome.stands and not trial.is_open(context.config.state_dir):
            last_good.save(context.config)
    return outcome


def _look(
    context: Context, only: frozenset[str], *, force: bool, done: Plan | None = None
) -> tuple[Observation, Plan]:
    if not only:
        return look(context, force=force, done=done)
    seen = observe(context)  # what is not repaired is not answered either
    return seen, plan(context, seen, force=force, done=done)


def _remember_addresses(context: Context, seen: Observation, whole: Plan) -> None:
    """Remember the addresses that are in place, at once, whatever else may fail for long."""
    if not whole.own_directories:
        pending = frozenset(operation.partition for operation in whole.network)
        context.store.save_addresses(seen.choice.in_place(pending))
