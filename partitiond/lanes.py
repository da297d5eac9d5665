"""The lanes: one pass each, the same code in the daemon and in ``partitiond sync``.

A lane of its own for each kind of work, so that a build of hours holds up no instance and no meter.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import replace
from ipaddress import IPv4Interface
from typing import TYPE_CHECKING

from netplan.once import once, same
from partitiond import (
    __version__,
    converge,
    destroy_guard,
    destruction,
    identity_guard,
    incidents,
    instances,
    master_way,
    node_pair,
    promises,
    quotas,
    reports,
    softwares,
    storage,
    trial,
)
from partitiond.errors import PartitiondError, sentence
from partitiond.passes import Result, Wish
from partitiond.state import software_name
from slap_client.capacity import (
    CapacityNode,
    CapacityPartition,
    CapacityTap,
    capacity_description,
    capacity_document,
)
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv6Interface
    from pathlib import Path

    from partitiond.context import Context
    from partitiond.node import Node, Partition
    from slap_client.documents import ComputerDocument
    from slap_client.values import Value

logger = logging.getLogger(__name__)

_NOTHING_SPECIAL = Wish()
# how slapproxy and the production master answer about a computer that they do not know, and otherwise, too
_UNKNOWN_HERE = (404, 500)


def knock(context: Context) -> ComputerDocument:
    """What the master says of this computer, whatever that is; lanes share it. Raises SlapError."""
    client, turn = context.client, context.offers.turn
    try:
        document = context.wishes.ask(client, context.lane, context.first_pause)
    except SlapError as error:
        explained = node_pair.explain(context.config, error)
        if context.is_current(client):
            _tell(context, "master.lost", context.master.note(False), explained)
            if error.status in _UNKNOWN_HERE:
                identity_guard.missed(context)
        raise explained from error
    if context.is_current(client):
        _tell(context, "master.back", context.master.note(True))
        if context.offers.judges(turn):
            identity_guard.look(context, document)
    return document


def _tell(context: Context, event: str, message: str, error: SlapError | None = None) -> None:
    """Record that the master went or came."""
    if message:
        details = {"code": error.code, "reason": sentence(error), "hint": error.hint} if error else {}
        logger.info("%s", message)
        context.events.record(event, message, resource=context.config.master_url, **details)


def ask(context: Context) -> ComputerDocument:
    """The master's wishes. Raises SlapError; an answer that lists no partition at all while some are busy is no answer."""
    document = knock(context)
    for name in document.rejected_software:
        logger.warning("the master's software entry is not understood and left alone: %s", name)
    if not document.partitions and context.store.partitions():
        identity_guard.missed(context)
        raise PartitiondError(
            "instances.empty_answer",
            "the master lists no partition at all; what runs keeps running",
            resource=context.config.master_url,
            hint="post the capacity again: partitiond sync capacity",
            retryable=True,
        )
    return document


def capacity(context: Context, *, force: bool = False) -> Result:
    """Tell the master what this node has; nothing as long as that may be taken back, nor where another one told it other
    addresses of this node, unless by ``force``.
    """
    with context.applying:  # what is being changed is not offered yet
        if trial.is_open(context.config.state_dir):
            return Result(["not posted while a configuration is on trial"], [])
        # a daemon looks at the node often enough, and at once when the kernel tells of something
        target = context.node_in_force or converge.observe(context).node
    offered = master_way.offered(target)
    if not offered:
        raise PartitiondError(
            "capacity.nothing",
            "there are no partitions to offer"
            + (": the only one keeps the tunnel to the master" if target.partitions else ""),
            hint="set partition_amount",
        )
    _address(target)  # what the master has of partitions cannot be fitted in before the node has its own
    data = same(storage.observe(target.config).data)
    client = context.client
    with context.wishes.telling(client, context.lane, context.first_pause):
        try:
            target = identity_guard.before_offer(context, target, force=force)
        except PartitiondError as error:
            if context.lane and error.retryable:
                raise  # the lane tries again soon
            return Result([], [(context.config.computer_id, error)])
        offered = master_way.offered(target)
        with context.offers.telling({item.id: _told(item) for item in offered}):
            client.post_capacity(_document(target, data, same(_distribution())))
    _tell(context, "master.back", context.master.note(True))
    suspicion = identity_guard.suspicion(context)
    return Result(
        [f"capacity of {len(offered)} partitions posted"],
        [(context.config.computer_id, suspicion)] if suspicion else [],
    )


@once
def _document(target: Node, data: tuple[Path, ...], distribution: tuple[str, str, str]) -> str:
    """What the master is told; where none is another, the same: one that is down is told it again and again."""
    return capacity_document(description(target, storage.Observed(data), distribution))


def description(target: Node, data: storage.Observed, distribution: tuple[str, str, str]) -> dict[str, Value]:
    """The document that slapformat posts (slapos.core 1.26); ``distribution`` are its id, version and name.

    Raises PartitiondError for a node without an address.
    """
    config, keys = target.config, target.config.network
    address = _address(target)
    return capacity_description(
        CapacityNode(
            reference=config.computer_id,
            address=address,
            instance_root=str(config.instance_root),
            software_root=str(config.software_root),
            software_user=config.software_user,
            interface_name=config.interface,
            ipv6_interface=config.ipv6_interface,
            ipv4_local_network=str(config.ipv4_network),
            os_type=(platform.platform(), *distribution),
            python_version=platform.python_version(),
            version=f"partitiond/{__version__}",
            ipv6_prefixshift=config.ipv6_prefixshift,
            partition_has_ipv6_range=config.ipv6_range,
            tap_gateway_interface=keys.tap_gateway_interface or "",
            tap_ipv6=keys.tap_ipv6,
            instance_storage_home=str(config.instance_storage_home) if config.instance_storage_home else None,
        ),
        [_offer(item, target, data) for item in master_way.offered(target)],
    )


def _address(target: Node) -> IPv4Interface | IPv6Interface:
    """The node's own. Raises PartitiondError where it has none, or not yet."""
    config, keys = target.config, target.config.network
    address = target.address if config.unmanaged is None else config.unmanaged.address
    if address is not None:
        return address
    family = "IPv4" if keys.partition_network else "IPv6"
    interface = keys.ipv4_interface if keys.partition_network else keys.interface
    raise PartitiondError(
        f"capacity.no_{family.lower()}",
        f"{interface} has no global {family} address to offer",
        resource=interface,
        hint=f"give the interface a global {family} address"
        + ("" if keys.partition_network else ", or set ipv4_partition_network on a node without IPv6")
        + (", or replaces_ipv6 = auto in [tinc]" if config.mesh else ""),
        retryable=True,
    )


def _distribution() -> tuple[str, str, str]:
    try:
        found = platform.freedesktop_os_release()
    except OSError:
        return ("", "", "")
    return (found.get("ID", ""), found.get("VERSION_ID", ""), found.get("NAME", ""))


def _told(partition: Partition) -> list[str]:
    """The addresses that the master gives back."""
    stand_in = partition.network.stand_in_ipv4
    return [str(one) for one in (partition.ipv4, partition.ipv6 or stand_in) if one is not None]


def _offer(partition: Partition, target: Node, data: storage.Observed) -> CapacityPartition:
    network = partition.network
    world = target.stand_in
    return CapacityPartition(
        reference=partition.id,
        path=str(partition.path),
        user=partition.user,
        ipv4=partition.ipv4,
        ipv6=partition.ipv6,
        ipv6_prefixlen=network.ipv6.network.prefixlen if network.ipv6 else 128,
        ipv6_range=network.ipv6_range,
        public_ipv4=IPv4Interface((int(network.stand_in_ipv4), world.prefixlen))
        if network.stand_in_ipv4 and world
        else None,
        external_storage=tuple(data.paths(partition.id)),
        tap=_tap(partition, target),
    )


def _tap(partition: Partition, target: Node) -> CapacityTap:
    """The tap; its IPv4 is what the master gives back as ``full_ip_list``: the routable one, else the guest's own."""
    network = partition.network
    # the production master wants a tap name for each partition, whether there is a tap or not, as slapformat gives it
    name = f"{target.config.tap_base}{partition.index}"
    guest = network.tap.ipv6.network.network_address + 1 if network.tap and network.tap.ipv6 else None
    ipv6 = network.tap.ipv6 if network.tap else None
    if network.routable_ipv4:
        routable = network.routable_ipv4
        return CapacityTap(name, routable.interface, routable.gateway, ipv6, guest)
    if network.tap and network.tap.ipv4 and target.tap_gateway:
        gateway = target.tap_gateway
        own = IPv4Interface((int(network.tap.ipv4), gateway.network.prefixlen))
        return CapacityTap(name, own, gateway.ip, ipv6, guest)
    return CapacityTap(name, ipv6=ipv6, ipv6_gateway=guest)


def software(context: Context, wish: Wish = _NOTHING_SPECIAL) -> Result:
    """Build and remove software releases."""
    answer = ask(context)
    identity_guard.begin(context, answer)
    if not answer.rejected_software:  # one of those may be what seems to be missing
        softwares.note_listed(context, answer.software)
    document, held = destroy_guard.spare_software(context, answer)

    def again() -> ComputerDocument:
        # a build takes hours: the master is that of the configuration in force by then
        with context.steady():
            return destroy_guard.spare_software(context, ask(context))[0]

    result = softwares.run_pass(context, document, force=wish.force, ask=again, only=wish.only)
    result.failures += held
    if not answer.rejected_software:
        result.failures += _unknown(context, wish.only, answer)
    if wish.collect:
        _collect(context, result)
    return result


def _unknown(context: Context, only: frozenset[str], answer: ComputerDocument) -> list[tuple[str, Exception]]:
    """Releases that were named, and that neither the master nor the node knows."""
    if not only:
        return []
    urls = {one.url for one in answer.software} | {one.url for one in context.store.softwares()}
    error = PartitiondError(
        "sync.unknown_release",
        "neither the master nor this node knows such a release",
        hint="name its URL, or the MD5 of that; partitiond status lists them",
    )
    return [(name, error) for name in sorted(only - urls - {software_name(url) for url in urls})]


def _collect(context: Context, result: Result) -> None:
    """Remove the releases that the master does not list and that nobody uses, nor is about to, by what it says now."""
    states, damaged = context.store.readable()
    result.failures += damaged.items()
    try:
        with context.steady():
            answer = ask(context)
    except (PartitiondError, SlapError) as error:
        result.failures.append((context.config.master_url, error))
        return
    if damaged or answer.rejected or answer.rejected_software:
        # what is not understood may name, or use, any of them
        refusal = PartitiondError(
            "software.not_collected",
            "no release is collected: not all that is listed or used can be read",
            resource=str(context.config.software_root),
            hint="look at the log for what is damaged here, or not understood of the master's answer",
            retryable=True,
        )
        result.failures.append((refusal.resource, refusal))
        return
    used = {state.software_release for state in states.values()}
    used |= {entry.software_release for entry in answer.partitions}
    listed = {one.url for one in answer.software}
    unlisted = frozenset({state.url for state in context.store.softwares()} - listed - used)
    going, held = destroy_guard.spare_unlisted(context, unlisted)
    result.failures += held
    for url in sorted(going):
        try:
            softwares.discard(context, url)
        except (PartitiondError, OSError) as error:
            result.failures.append((url, error))
            continue
        result.done.append(f"{url}: removed, as the master does not list it")


def instance(context: Context, *, force: bool = False, only: frozenset[str] = frozenset()) -> Result:
    """Configure, start and stop instances."""
    known, wishes = context.store.readable()[0], ask(context)
    identity_guard.begin(context, wishes)
    target = _target(context)
    return instances.run_pass(context, target, wishes, known=known, force=force, only=only)


def _target(context: Context) -> Node:
    """The node as it is now; an unmanaged one is as its definition says."""
    given = context.node_in_force if context.config.unmanaged is not None else None
    return given or converge.observe(context).node


def report(context: Context, *, asked: bool = False, force: bool = False) -> Result:
    """Tell the master what was used, and finish the destroyed partitions."""
    if context.config.unmanaged is not None:
        knock(
            context
        )  # nothing is metered; and nothing of an instance goes that the master cannot be told of
        return destruction.finish(context, _target(context))
    identity_guard.refuse(context)
    node = context.node_in_force or converge.observe(context).node
    return reports.run_pass(context, node, ask=lambda: knock(context), asked=asked, force=force)


def promise(context: Context, only: frozenset[str] = frozenset()) -> Result:
    """Look at the promises of instances that run, or ``only`` of these."""
    return promises.run_pass(context, context.node_in_force or converge.observe(context).node, only)


def usage(context: Context) -> Result:
    """Take one pass of all meters."""
    # every few seconds: the sweep looks at the whole node often enough
    target = context.node_in_force or converge.observe(context).node
    gaps = context.meters.record(context, target)
    for gap in gaps:
        logger.warning("usage: gap: %s", gap.reason)
    quotas.judge(context, target)
    if context.meters.has_due():
        context.day_ended()
    incidents.observe(context, target, context.meters.ledger())
    promises.observe(context, context.meters.ledger())
    return Result([f"usage of {len(target.partitions)} partitions recorded"], [])


def run(context: Context, lane: str, wish: Wish) -> Result:
    """Take one pass of a lane by its name in ``sync``."""
    if wish.again:
        _forgive(context)
    passes: dict[str, Callable[[], Result]] = {
        "capacity": lambda: capacity(context, force=wish.force),
        "software": lambda: software(context, wish),
        "instances": lambda: instance(context, force=wish.force, only=wish.only),
        "report": lambda: report(context, asked=True, force=wish.force),
        "usage": lambda: usage(context),
    }
    return passes[lane]()


def _forgive(context: Context) -> None:
    """Let what failed be tried in the next pass."""
    states, _ = context.store.readable()
    for state in states.values():
        if state.failures and state.next_try:
            context.store.save_instance(replace(state, next_try=0.0))
    for release in context.store.softwares():
        if release.failures and release.next_try:
            context.store.save_software(replace(release, next_try=0.0))


LANES = ("capacity", "software", "instances", "usage", "report")
