"""What the node's own addresses say: which are its own, of which those of the partitions are derived, what is taken."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from netplan import observe as netplan_observe
from netplan.model import MOVED_MARK, PORT_ALIAS, PROTOCOL_MARK
from partitiond import choices, node
from partitiond.choices import Rules
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from netplan.model import Address
    from netplan.observe import Look
    from partitiond.choices import Choice
    from partitiond.config import Config
    from partitiond.context import Context

logger = logging.getLogger(__name__)

# include/uapi/linux/if_addr.h: temporary, dadfailed, deprecated, tentative
_UNUSABLE = 0x01 | 0x08 | 0x20 | 0x40


def own_ipv6(config: Config, look: Look) -> list[ipaddress.IPv6Interface]:
    """The node's own global IPv6 addresses on the interface of the partitions; none on an IPv4-only node.

    Before an interface is moved into the bridge, what it has counts: it will be there.
    """
    return [] if config.without_ipv6 else global_ipv6(config, look)


def global_ipv6(config: Config, look: Look) -> list[ipaddress.IPv6Interface]:
    """The same, also where partitions are to have none."""
    links = _links(config, look, config.network.interface)
    return [
        ipaddress.IPv6Interface((address.packed, address.prefixlen))
        for address in look.addresses
        if address.link in links and _usable(address)
    ]


def own_ipv4(config: Config, look: Look) -> ipaddress.IPv4Interface | None:
    """The node's own first IPv4 address there; None where no partition has an IPv4 address that others reach.

    Raises PartitiondError ``network.own_address`` when the node has one itself that a partition is to have.
    """
    keys = config.network
    _refuse_own(config, look)
    if keys.partition_network is None and not keys.routable and not keys.create_tun:
        return None
    return first_ipv4(config, look)


def first_ipv4(config: Config, look: Look) -> ipaddress.IPv4Interface | None:
    """The node's own first IPv4 address of the interface where it is reached."""
    links = _links(config, look, config.network.ipv4_interface)
    return next(
        (
            ipaddress.IPv4Interface((int(ip), address.prefixlen))
            for address, ip in _ipv4(look)
            if address.link in links and _is_own(config, address, ip)
        ),
        None,
    )


def _refuse_own(config: Config, look: Look) -> None:
    """Refuse to begin with it: a single address (/32) is taken over, one with its network is what the node is reached by.

    Where the partition has its address already, one that comes later is a failure among others.
    """
    owners = {one.interface.ip: partition for partition, one in config.network.routable.items()}
    if not owners:
        return
    links = _links(config, look, config.network.ipv4_interface)
    settled = {address.packed for address in look.addresses if address.protocol == PROTOCOL_MARK}
    for address, ip in _ipv4(look):
        if (
            ip in owners
            and address.link in links
            and address.prefixlen < 32
            and address.packed not in settled
        ):
            name = next(link.name for link in look.links.values() if link.ifindex == address.link)
            raise PartitiondError(
                "network.own_address",
                f"{address.text()} on {name} is the node's own, so it cannot be {owners[ip]}'s as well",
                resource=str(config.file),
                hint=f"take {owners[ip]} out of [routable_ipv4], or the address from the interface:"
                f" ip address del {address.text()} dev {name}",
            )


def _is_own(config: Config, address: Address, ip: ipaddress.IPv4Address) -> bool:
    routable = {one.interface.ip for one in config.network.routable.values()}
    return not (_may_be_private(config, address, ip) or ip in routable or ip.is_loopback or ip.is_link_local)


def _may_be_private(config: Config, address: Address, ip: ipaddress.IPv4Address) -> bool:
    """Whether it may be a partition's already, of slapformat's making: it marks nothing."""
    return address.prefixlen == 32 and ip in config.ipv4_network and address.protocol != MOVED_MARK


def _links(config: Config, look: Look, interface: str) -> frozenset[int]:
    """The links whose addresses the interface has, or will have: those of its ports to be, or of the bridge that it leaves."""
    keys = config.network
    names = (interface, *keys.bridge_ports) if interface == keys.bridge else (interface,)
    found = [look.links[name] for name in names if name in look.links]
    bridges = {link.master for link in found if link.alias.startswith(PORT_ALIAS)}
    return frozenset({link.ifindex for link in found} | bridges)


def _usable(address: Address) -> bool:
    if len(address.packed) != 16 or address.protocol == PROTOCOL_MARK or address.flags & _UNUSABLE:
        return False
    ip = ipaddress.IPv6Address(address.packed)
    return not (ip.is_link_local or ip.is_loopback or ip.is_multicast) and address.prefixlen < 127


def choose(context: Context, look: Look) -> tuple[Choice, bool]:
    """Choose the addresses of the partitions; and whether the node's own, of which they are derived, is on the interface.

    What slapos.core left is read only as long as there is a partition that was never in place. Raises a family error.
    """
    config, remembered, last = context.config, context.store.addresses(), context.choice
    settled = remembered.keys() >= set(node.names(config))
    formatted = None if settled else context.formatted.read()
    partitions = {kept.ipv6 for kept in remembered.values()}
    if formatted:
        partitions |= {one.ipv6 for one in formatted.partitions}
    here = _without(own_ipv6(config, look), partitions)
    base = choose_base(here, context.store.base(), formatted.base if formatted else None)
    wanted = rules(config, base, look)
    known = last and last.remembered is remembered and last.formatted is formatted
    if last is None or not known or last.rules != wanted:
        found = choices.imported(formatted) if formatted else {}
        choice = choices.choose(wanted, remembered, found, last)
        warnings = (*(formatted.warnings if formatted else ()), *choice.warnings)
        for warning in warnings if last is None or last.warnings != warnings else ():
            logger.warning("%s", warning)
        last = context.choice = replace(choice, warnings=warnings, formatted=formatted)
    return last, base in here


def _without(
    here: list[ipaddress.IPv6Interface], partitions: set[ipaddress.IPv6Address | None]
) -> list[ipaddress.IPv6Interface]:
    """Leave out what slapos.core gave to partitions: it marks nothing, so they look like the node's own. In a network where
    nothing would be left, one of them is both.
    """
    others = [one for one in here if one.ip not in partitions]
    networks = {one.network for one in others}
    return others + [one for one in here if one.network not in networks]


def choose_base(
    here: list[ipaddress.IPv6Interface],
    remembered: ipaddress.IPv6Interface | None,
    imported: ipaddress.IPv6Interface | None = None,
) -> ipaddress.IPv6Interface | None:
    """The address of which those of the partitions are derived; None on a node that never had one. Pure.

    The one chosen before, by us or by slapos.core (``imported``), stays as long as its network is there, and also while
    the interface has no address at all: a router that is silent for a while must not take the partitions' addresses away.
    Else that of the largest subnet, then the lowest, as slapformat chooses.
    """
    for before in (remembered, imported):
        if before is None:
            continue
        if before in here or not here:
            return before
        same = [one for one in here if before.ip in one.network]
        if same:
            return min(same, key=lambda one: (one.network != before.network, int(one.ip)))
    return min(here, key=lambda one: (one.network.prefixlen, int(one.ip)), default=None)


def rules(config: Config, base: ipaddress.IPv6Interface | None, look: Look) -> Rules:
    """What the addresses of the partitions are chosen by. Raises NetplanError, PartitiondError."""
    keys = config.network
    routed = config.create_tap and keys.bridge is None
    return Rules(
        partitions=node.names(config),
        base=None if config.without_ipv6 else base,
        prefixshift=config.ipv6_prefixshift,
        ipv4_network=config.ipv4_network,
        partition_network=keys.partition_network,
        mesh_range=config.mesh.own if config.mesh else None,
        ipv6_range=config.ipv6_range,
        tap_ipv6=routed and keys.tap_ipv6,
        tap_gateway=_tap_gateway(config, look) if routed else None,
        tun_ipv6=keys.create_tun and keys.tun_ipv6,
        tun_ipv4=keys.create_tun,
        taken=_taken(config, look),
        elsewhere=_elsewhere(config),
    )


def _tap_gateway(config: Config, look: Look) -> ipaddress.IPv4Interface | None:
    name = config.network.tap_gateway_interface
    if name is None:
        return None
    link, links = look.links.get(name), _links(config, look, name)
    found = [(address, ip) for address, ip in _ipv4(look) if address.link in links]
    if not found:
        problem = "has no IPv4 address" if link else "is no network interface of this node"
        raise PartitiondError(
            "network.no_gateway",
            f"tap_gateway_interface = {name}: {name} {problem}",
            resource=str(config.file),
            hint="give it the address that guests shall use as their gateway, or empty tap_gateway_interface",
        )
    address, ip = found[0]
    return ipaddress.IPv4Interface((int(ip), address.prefixlen))


def _ipv4(look: Look) -> Iterator[tuple[Address, ipaddress.IPv4Address]]:
    """Every IPv4 address that is not ours."""
    for address in look.addresses:
        if len(address.packed) == 4 and address.protocol != PROTOCOL_MARK:
            yield address, ipaddress.IPv4Address(address.packed)


def _taken(config: Config, look: Look) -> frozenset[ipaddress.IPv4Address]:
    """IPv4 addresses of the node itself, and of the routers that it reaches others by."""
    links = _links(config, look, config.network.ipv4_interface)
    own = {
        ip
        for address, ip in _ipv4(look)
        if not (address.link in links and _may_be_private(config, address, ip))
    }
    routable = config.network.routable.values()
    routers = netplan_observe.gateways() | {one.gateway for one in routable}
    return frozenset(own | routers | {one.interface.ip for one in routable})


def _elsewhere(config: Config) -> tuple[ipaddress.IPv4Network, ...]:
    mesh = config.mesh.own if config.mesh else None
    networks = (config.ipv4_network, config.network.partition_network, mesh)
    return tuple(
        found for network in networks if network for found in netplan_observe.routed_elsewhere(network)
    )
