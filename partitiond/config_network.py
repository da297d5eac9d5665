"""The keys of the configuration about bridges, routed interfaces and IPv4 addresses that the world reaches."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netplan.model import RoutableIPv4

if TYPE_CHECKING:
    from collections.abc import Mapping

    from partitiond.config_reader import Reader

_PORTS = re.compile(r"[A-Za-z0-9_.-]{1,15}(?:[\s,]+[A-Za-z0-9_.-]{1,15})*")
_ROUTABLE = re.compile(r"(\S+)\s+via\s+(\S+)")
_LINK_WORDS = "a name of a network interface, at most 15 characters"
_ROUTABLE_WORDS = "an address with its prefix length and its gateway, such as 203.0.113.7/24 via 203.0.113.1"


@dataclass(frozen=True, slots=True)
class NetworkKeys:
    """What the operator decides about interfaces.

    ``interface`` gets the partitions' IPv6 addresses, ``ipv4_interface`` their IPv4 addresses: the bridge, where
    ``bridge_ports`` moves the named ones into it. ``routable`` has the routable IPv4 by partition.
    """

    interface: str
    ipv4_interface: str
    bridge: str | None
    bridge_ports: tuple[str, ...]
    tap_ipv6: bool
    tap_gateway_interface: str | None
    create_tun: bool
    tun_ipv6: bool
    partition_network: ipaddress.IPv4Network | None
    routable: Mapping[str, RoutableIPv4]


def read(
    reader: Reader, *, interface: str, ipv6_interface: str, bridge: str | None, partitions: frozenset[str]
) -> NetworkKeys:
    """Read them; what is bad is among the reader's problems afterwards."""
    ports = _ports(reader, bridge)
    ipv4_interface = bridge if bridge and ports else interface
    if bridge and ports and ipv6_interface in (*ports, interface):
        ipv6_interface = bridge
    gateway = reader.raw("slapformat", "tap_gateway_interface")
    if gateway and not re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", gateway):
        reader.bad("slapformat", "tap_gateway_interface", gateway, _LINK_WORDS)
    return NetworkKeys(
        interface=ipv6_interface,
        ipv4_interface=ipv4_interface,
        bridge=bridge,
        bridge_ports=ports,
        tap_ipv6=reader.truth("slapformat", "tap_ipv6", True),
        tap_gateway_interface=gateway or None,
        create_tun=reader.truth("slapformat", "create_tun", False),
        tun_ipv6=reader.truth("slapformat", "tun_ipv6", True),
        partition_network=_partition_network(reader, len(partitions)),
        routable=_routable(reader, partitions),
    )


def _ports(reader: Reader, bridge: str | None) -> tuple[str, ...]:
    value = reader.raw("partitiond", "bridge_ports")
    if not value:
        return ()
    if not _PORTS.fullmatch(value):
        reader.bad(
            "partitiond", "bridge_ports", value, "names of network interfaces, such as eth0 or eth0 eth1"
        )
        return ()
    ports = tuple(re.split(r"[\s,]+", value))
    if bridge is None:
        reader.bad("partitiond", "bridge_ports", value, "nothing, as long as bridge is empty")
    if bridge in ports:
        reader.bad("partitiond", "bridge_ports", value, f"other interfaces than the bridge {bridge} itself")
    if len(set(ports)) < len(ports):
        reader.bad("partitiond", "bridge_ports", value, "each interface once")
    return ports


def _partition_network(reader: Reader, amount: int) -> ipaddress.IPv4Network | None:
    value = reader.raw("partitiond", "ipv4_partition_network")
    if not value:
        return None
    words = f"an IPv4 network with room for {amount} partitions, such as 10.64.0.0/16"
    try:
        network = ipaddress.IPv4Network(value, strict=False)
    except ValueError:
        reader.bad("partitiond", "ipv4_partition_network", value, words)
        return None
    if str(network.network_address) != value.partition("/")[0]:
        words = f"the first address of the network: {network}"
        reader.bad("partitiond", "ipv4_partition_network", value, words)
    elif _is_special(network.network_address) or network.prefixlen < 8 or network.num_addresses < amount + 3:
        reader.bad("partitiond", "ipv4_partition_network", value, words)
    return network


def _is_special(one: ipaddress.IPv4Address) -> bool:
    """Whether nobody can be given it: 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4, 240.0.0.0/4."""
    return one.packed[0] == 0 or one.is_loopback or one.is_link_local or one.is_multicast or one.is_reserved


def _routable(reader: Reader, partitions: frozenset[str]) -> dict[str, RoutableIPv4]:
    section = "routable_ipv4"
    found: dict[str, RoutableIPv4] = {}
    if not reader.parser.has_section(section):
        return found
    taken: dict[ipaddress.IPv4Address, str] = {}
    for partition in reader.parser[section]:
        value = reader.raw(section, partition)
        if partition not in partitions:
            reader.warnings.append(
                f"{reader.place(section, partition)}: there is no partition {partition} (partition_amount), so"
                " its address is nobody's"
            )
        try:
            routable = _parse_routable(value)
        except ValueError:
            reader.bad(section, partition, value, _ROUTABLE_WORDS)
            continue
        if routable.interface.ip in taken:
            words = f"another address: this one is that of {taken[routable.interface.ip]}"
            reader.bad(section, partition, value, words)
        taken[routable.interface.ip] = partition
        if partition in partitions:
            found[partition] = routable
    return found


def _parse_routable(value: str) -> RoutableIPv4:
    """Raises ValueError."""
    match = _ROUTABLE.fullmatch(value)
    if match is None or "/" not in match[1]:
        raise ValueError
    interface, gateway = ipaddress.IPv4Interface(match[1]), ipaddress.IPv4Address(match[2])
    address, network = interface.ip, interface.network
    reserved = network.prefixlen < 31 and address in (network.network_address, network.broadcast_address)
    if reserved or gateway == address or _is_special(address) or _is_special(gateway):
        raise ValueError
    return RoutableIPv4(interface, gateway)
