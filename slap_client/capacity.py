"""What a node has to offer, as the dictionary that loadComputerConfigurationFromXML takes.

Protocol facts: SLAP classic; the keys and the forms of values are those that slapos.core 1.26 posts. Of all
this the production master stores the references, the partitions' addresses, the tap's name and IPv4, and a
few texts about the node; the rest is sent because the format has it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, IPv6Network

from slap_client.marshal import dumps
from slap_client.values import Value


@dataclass(frozen=True, slots=True)
class CapacityTap:
    """The tap of a partition. The master insists on a name, also where no tap is made.

    ``ipv4`` is the routable IPv4 behind the tap with the prefix of the network of ``ipv4_gateway``; ``ipv6``
    the address on the tap with the prefix of its range, ``ipv6_gateway`` the first address of that range.
    """

    name: str
    ipv4: IPv4Interface | None = None
    ipv4_gateway: IPv4Address | None = None
    ipv6: IPv6Interface | None = None
    ipv6_gateway: IPv6Address | None = None


@dataclass(frozen=True, slots=True)
class CapacityPartition:
    """One partition: ``reference`` is its name, ``path`` its directory, ``user`` its Unix user.

    ``ipv4`` is the private address (posted as a /32), ``ipv6`` with ``ipv6_prefixlen`` the public one. A node
    without IPv6 gives ``public_ipv4`` in its place. ``capabilities`` are the master's typed partitions.
    """

    reference: str
    path: str
    user: str
    ipv4: IPv4Address
    ipv6: IPv6Address | None
    ipv6_prefixlen: int
    tap: CapacityTap
    ipv6_range: IPv6Network | None = None
    public_ipv4: IPv4Interface | None = None
    external_storage: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    shell: str = "/bin/sh"


@dataclass(frozen=True, slots=True)
class CapacityNode:
    """The node itself: ``reference`` is the computer's id, ``address`` its own, IPv6 where it has one.

    ``interface_name`` holds the private addresses, ``ipv6_interface`` the public ones. ``os_type`` are the
    texts platform, distribution, its version and its name; ``version`` names the program:
    ``partitiond/0.1.0``.
    """

    reference: str
    address: IPv6Interface | IPv4Interface
    instance_root: str
    software_root: str
    software_user: str
    interface_name: str
    ipv6_interface: str
    ipv4_local_network: str
    os_type: tuple[str, ...]
    python_version: str
    version: str
    ipv6_prefixshift: int = 16
    partition_has_ipv6_range: bool = True
    tap_gateway_interface: str = ""
    tap_ipv6: bool = True
    public_ipv4_address: str | None = None
    instance_storage_home: str | None = None


def capacity_description(node: CapacityNode, partitions: Sequence[CapacityPartition]) -> dict[str, Value]:
    """Return what this node has to offer, as slapformat says it.

    List *all* partitions each time: masters drop (slapproxy) or invalidate (production) those not listed.
    """
    return {
        "address": str(node.address.ip),
        "instance_root": node.instance_root,
        "instance_storage_home": node.instance_storage_home,
        "interface": {
            "ipv4_local_network": node.ipv4_local_network,
            "ipv6_interface": node.ipv6_interface,
            "ipv6_prefixshift": node.ipv6_prefixshift,
            "name": node.interface_name,
        },
        # As slapformat has it: only where it was chosen apart from the interface.
        "ipv6_interface": None if node.ipv6_interface == node.interface_name else node.ipv6_interface,
        "netmask": str(node.address.netmask),
        "os_type": json.dumps(list(node.os_type)),
        "partition_has_ipv6_range": node.partition_has_ipv6_range,
        "partition_list": [_partition(partition, node.software_user) for partition in partitions],
        "public_ipv4_address": node.public_ipv4_address,
        "python_version": node.python_version,
        "reference": node.reference,
        "slapos_version": node.version,
        "software_root": node.software_root,
        "software_user": node.software_user,
        "tap_gateway_interface": node.tap_gateway_interface,
        "tap_ipv6": node.tap_ipv6,
    }


def capacity_document(description: Mapping[str, Value]) -> str:
    """Return the XML to give to ``SlapClient.post_capacity``. Raises SlapError ``slap.value``."""
    return dumps(dict(description)).decode("ascii")


def _partition(partition: CapacityPartition, software_user: str) -> dict[str, Value]:
    result: dict[str, Value] = {
        "address_list": _addresses(partition),
        "external_storage_list": list(partition.external_storage),
        "ipv6_range": _range(partition.ipv6_range),
        "path": partition.path,
        "reference": partition.reference,
        "tap": _tap(partition.tap),
        "tun": None,
        "user": {
            "additional_group_list": [software_user],
            "name": partition.user,
            "path": partition.path,
            "shell": partition.shell,
        },
    }
    if partition.capabilities:
        result["capability_list"] = list(partition.capabilities)
    return result


def _addresses(partition: CapacityPartition) -> list[Value]:
    addresses: list[IPv4Interface | IPv6Interface] = [IPv4Interface(partition.ipv4)]
    if partition.ipv6 is not None:
        addresses.append(IPv6Interface((partition.ipv6, partition.ipv6_prefixlen)))
    elif partition.public_ipv4 is not None:
        addresses.append(partition.public_ipv4)
    return [{"addr": str(address.ip), "netmask": str(address.netmask)} for address in addresses]


def _range(network: IPv6Network | None) -> dict[str, Value]:
    if network is None:
        return {}
    return {
        "addr": str(network.network_address),
        "netmask": str(network.netmask),
        "network": str(network),
        "prefixlen": network.prefixlen,
    }


def _tap(tap: CapacityTap) -> dict[str, Value]:
    """slapformat writes the IPv4 network as a bare address, but the IPv6 one as gateway and prefix length."""
    gateway = "" if tap.ipv6_gateway is None else str(tap.ipv6_gateway)
    return {
        "ipv4_addr": "" if tap.ipv4 is None else str(tap.ipv4.ip),
        "ipv4_gateway": "" if tap.ipv4_gateway is None else str(tap.ipv4_gateway),
        "ipv4_netmask": "" if tap.ipv4 is None else str(tap.ipv4.netmask),
        "ipv4_network": "" if tap.ipv4 is None else str(tap.ipv4.network.network_address),
        "ipv6_addr": "" if tap.ipv6 is None else str(tap.ipv6.ip),
        "ipv6_gateway": gateway,
        "ipv6_netmask": "" if tap.ipv6 is None else str(tap.ipv6.netmask),
        "ipv6_network": f"{gateway}/{tap.ipv6.network.prefixlen}" if tap.ipv6 and gateway else "",
        "name": tap.name,
    }
