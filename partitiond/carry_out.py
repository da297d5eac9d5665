"""A plan, carried out: part by part, in the order of the plan.  It decides nothing.

Promises: what all stands on (users, the node's own directories) is there, or nothing else is begun; any other failure is noted,
keeps nobody else from getting what is planned for him, and nothing is started where something it needs could not be made.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from netplan import apply as netplan_apply
from netplan.legacy_filter import LegacyOperation
from netplan.packet_filter import FilterOperation
from partitiond import (
    device_access,
    directories,
    execute,
    identities,
    mesh_process,
    port_reservation,
    privacy,
    resource_file,
    services,
    tun_device,
    tunnel_process,
    users,
)
from partitiond.errors import FAMILY, sentence

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from netplan.operations import Operation
    from partitiond.context import Context
    from partitiond.node import Partition
    from partitiond.node_plan import Observation, Plan
    from partitiond.users import UserOperation

logger = logging.getLogger(__name__)

# what is made in, or run from, a partition's directory
IN_DIRECTORIES = ("storage", "grants", "identities", "resources", "privacy", "services", "tunnels")


def run(context: Context, seen: Observation, planned: Plan) -> tuple[list[tuple[str, Exception]], int]:
    """Run a plan part by part; a part that others stand on must succeed, the rest fail alone.

    Return the failures, and how many operations were left out because of them.
    """
    failures: list[tuple[str, Exception]] = []
    # before any user is made: it might get the number of one that still had a device
    kept = frozenset(
        one.uid
        for one in planned.withdrawals
        if not attempt(failures, one.id, partial(device_access.withdraw, one))
    )
    users.apply(planned.users)
    numbers = users.observe().numbers() if planned.users else seen.users.numbers()
    todo = _without(planned, _make_directories(planned, numbers, failures))
    if any(_forgets(one) for one in todo.network):
        context.meters.settle(context, seen.node)  # while what they counted can still be read
    for failed, error in netplan_apply.apply(todo.network):
        failures.append((failed.id, error))
    homeless = _make_namespaces(context, todo, failures)
    config, supervisord = context.config, services.Start(context)
    # one that has nothing to run yet starts beside what comes before the services
    early = [] if context.supervisor.group_names() else [one for one in todo.services if one.group is None]
    calls: list[tuple[str, Callable[[], None]]] = [
        *((one.id, partial(directories.apply, (one,), numbers)) for one in todo.storage),
        *((one.id, tun_device.apply) for one in todo.devices),
        # what could not be taken from one is given to no other
        *((one.id, partial(device_access.grant, one)) for one in todo.grants if not kept),
        *((one.id, supervisord.begin) for one in early),
        *(
            (
                one.id,
                partial(identities.close if one.closes else identities.make, config, one.owner, one.slot),
            )
            for one in todo.identities
        ),
        *((one.id, partial(_write_resource, seen, one.owner)) for one in todo.resources),
        *((one.id, supervisord.wait) for one in early),
        *((one.id, partial(privacy.apply, context, one)) for one in todo.privacy if one.action != "create"),
        *(
            (one.id, partial(services.apply, context, one))
            for one in todo.services
            if one not in early and one.partition not in homeless
        ),
        *((one.id, partial(mesh_process.apply, context, one)) for one in todo.mesh),
        *((one.id, partial(port_reservation.apply, config, one.wanted)) for one in todo.ports),
    ]
    try:
        for name, call in calls:
            attempt(failures, name, call)
    finally:
        attempt(failures, "supervisord", supervisord.wait)  # also where something of ours broke off
    bridges = [one for one in todo.tunnels if one.action == "remove" or one.partition not in homeless]
    if bridges:
        carrier = tunnel_process.Carrier(context)
        attempt(failures, "tunnels", partial(carrier.run, bridges))
        failures += carrier.failures
    if todo.leavers:
        attempt(failures, "users", partial(_remove_users, context, seen, todo.leavers, kept))
    return failures, len(planned) - len(todo)


def _forgets(operation: Operation) -> bool:
    """Whether counters go with it: those of the packet filter, or those of a tap."""
    if isinstance(operation, FilterOperation | LegacyOperation):
        return operation.forgets
    return operation.resource in ("tap", "tun") and operation.action == "remove"


def _make_directories(
    todo: Plan, numbers: Mapping[str, tuple[int, int]], failures: list[tuple[str, Exception]]
) -> frozenset[str]:
    """Make the node's own directories, which must succeed, and those of partitions; return the ones of which one failed.

    A tenant may mount a file system of its own there a moment after it was looked at, or its own disk may fail.
    """
    directories.apply(todo.own_directories, numbers)
    return frozenset(
        one.partition
        for one in todo.directories
        if one.partition is not None
        and not attempt(failures, one.id, partial(directories.apply, (one,), numbers))
    )


def _without(whole: Plan, names: frozenset[str]) -> Plan:
    """A plan without what is made in, or run from, the directories of some partitions.

    What the network is to be stays whole: it needs no directory, and what one owns is closed to others by it.
    """
    return whole.keeping(lambda one: one.partition not in names, IN_DIRECTORIES) if names else whole


def _make_namespaces(context: Context, todo: Plan, failures: list[tuple[str, Exception]]) -> frozenset[str]:
    """Make namespaces; return the partitions that have none now.

    Nothing is to be started there: to supervisord, and so to the next plan, it would have ended by its own doing.
    """
    homeless = set()
    for unmade, problem in privacy.make(context.config, todo.privacy):
        failures.append((unmade.id, problem))
        logger.warning("%s: %s", unmade.id, sentence(problem))
        homeless.add(unmade.name)
    return frozenset(homeless)


def _write_resource(seen: Observation, partition: Partition) -> None:
    # what was given a moment ago is already in it
    devices = tuple(device_access.given_now(seen.block_devices, partition))
    holdings = resource_file.Holdings(devices, tuple(seen.storage.paths(partition.id)))
    resource_file.write(seen.node, partition, holdings)


def _remove_users(
    context: Context, seen: Observation, leavers: tuple[UserOperation, ...], kept: frozenset[int]
) -> None:
    """Remove users; ``kept`` are those that still have a device: the next one with their number would have it."""
    going = []
    for leaver in leavers:
        user = seen.users.users[leaver.id.partition("/")[2]]
        execute.end_processes_of(user.uid, user.gid)
        if leaver.partition is not None:
            # whose the data is stays known; should there be room again, the instance is due
            context.store.make_due(leaver.partition)
        if user.uid not in kept:
            going.append(leaver)
    users.apply(going)


def attempt(failures: list[tuple[str, Exception]], name: str, call: Callable[[], None]) -> bool:
    """Do something; return whether it could be done, else note why not."""
    try:
        call()
    except (*FAMILY, OSError) as error:
        failures.append((name, error))
        logger.warning("%s: %s", name, sentence(error))
        return False
    return True
