"""``.slapos-resource``: what a partition's software may know of its own resources, as JSON.

Every key of slapos.core 1.26 (releases read them by name: ``tap``, ``tun``, ``address_list``, ``ipv6_range``, …), and ours:
the certificate of the partition's tunnel identity, the MAC proposed for a guest on its tap, the routable IPv4, and the
block devices that it may use.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from netplan import addresses as netaddresses
from partitiond import files, identities
from partitiond.errors import PartitiondError
from partitiond.operation import Operation
from partitiond.settled import Settled
from partitiond.users import SHELL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from partitiond.identities import PublicIdentity
    from partitiond.node import Node, Partition

NAME = ".slapos-resource"
_LIMIT = 64 * 1024
_IPV4_MASK = "255.255.255.255"
# the link of a tenant in its place is looked at itself (lstat), never what it leads to
_is_right: Settled[bool] = Settled()


@dataclass(frozen=True, slots=True)
class ResourceOperation(Operation):
    """Write a partition's resource file."""

    owner: Partition


def netmask6(prefixlen: int) -> str:
    """An IPv6 prefix length in the form of an address, as slapformat writes it."""
    return str(ipaddress.IPv6Network(("::", prefixlen)).netmask)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a partition has besides its network: stable names of its block devices, directories on other disks."""

    block_devices: tuple[str, ...] = ()
    external_storage: tuple[str, ...] = ()


def content(node: Node, partition: Partition, identity: PublicIdentity | None, holdings: Holdings) -> bytes:
    """What the file should hold now."""
    network = partition.network
    value: dict[str, Any] = {
        "reference": partition.id,
        "path": str(partition.path),
        "user": {
            "name": partition.user,
            "path": str(partition.path),
            "shell": SHELL,
            "additional_group_list": [node.config.software_user],
        },
        "address_list": addresses(node, partition),
        "tap": _tap(node, partition),
        "tun": _tun(partition),
        "ipv6_range": {
            "addr": str(network.ipv6_range.network_address),
            "netmask": netmask6(network.ipv6_range.prefixlen),
            "network": str(network.ipv6_range),
            "prefixlen": network.ipv6_range.prefixlen,
        }
        if network.ipv6_range
        else {},
        "external_storage_list": list(holdings.external_storage),
        "block_devices": list(holdings.block_devices),
        "certificate": identity.shown.base64 if identity else "",
        "certificate_fingerprint": identity.shown.fingerprint if identity else "",
        # before a rotation; peers should accept both
        "certificate_next": identity.coming.base64 if identity and identity.coming else "",
        "certificate_next_fingerprint": identity.coming.fingerprint if identity and identity.coming else "",
    }
    if network.routable_ipv4:
        routable = network.routable_ipv4
        value["routable_ipv4"] = {
            "addr": str(routable.interface.ip),
            "netmask": str(routable.interface.netmask),
            "network": str(routable.interface.network.network_address),
            "gateway": str(routable.gateway),
        }
    if network.vpn_ipv4:
        value["vpn_ipv4"] = str(network.vpn_ipv4)
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def _tap(node: Node, partition: Partition) -> dict[str, str]:
    """The tap as slapformat writes it: of a routed one the guest's IPv4, the host's IPv6, and the guest's as gateway.

    Releases name these keys whether they have a value or not; also where no tap is made.
    """
    tap = partition.network.tap
    value = _interface(f"{node.config.tap_base}{partition.index}") | {"bridge": "", "mac": ""}
    if tap is None:
        return value
    value |= {"bridge": tap.bridge or "", "mac": partition.guest_mac or ""}
    if tap.ipv4 and node.tap_gateway:
        value |= {
            "ipv4_addr": str(tap.ipv4),
            "ipv4_netmask": str(node.tap_gateway.netmask),
            "ipv4_gateway": str(node.tap_gateway.ip),
            "ipv4_network": str(node.tap_gateway.network.network_address),
        }
    if tap.ipv6:
        guest = str(netaddresses.range_gateway(tap.ipv6.network))
        value |= {
            "ipv6_addr": str(tap.ipv6.ip),
            "ipv6_netmask": netmask6(tap.ipv6.network.prefixlen),
            "ipv6_gateway": guest,
            "ipv6_network": f"{guest}/{tap.ipv6.network.prefixlen}",
        }
    return value


def _interface(name: str) -> dict[str, str]:
    kinds = ("addr", "netmask", "gateway", "network")
    return {"name": name} | {f"{family}_{kind}": "" for family in ("ipv4", "ipv6") for kind in kinds}


def _tun(partition: Partition) -> dict[str, str] | None:
    """The tun as slapformat writes it: a network is the address with its mask."""
    tun = partition.network.tun
    if tun is None:
        return None
    value = _interface(tun.name)
    if tun.ipv4:
        value |= {
            "ipv4_addr": str(tun.ipv4.ip),
            "ipv4_netmask": str(tun.ipv4.netmask),
            "ipv4_network": f"{tun.ipv4.ip}/{tun.ipv4.netmask}",
        }
    if tun.ipv6:
        value |= {
            "ipv6_addr": str(tun.ipv6.ip),
            "ipv6_netmask": netmask6(tun.ipv6.network.prefixlen),
            "ipv6_network": f"{tun.ipv6.ip}/{tun.ipv6.network.prefixlen}",
        }
    return value


def addresses(node: Node, partition: Partition) -> list[dict[str, str]]:
    """The partition's addresses with their netmasks, as slapformat lists them: the private one, then the public one."""
    found = [{"addr": str(partition.ipv4), "netmask": _IPV4_MASK}]
    network, world = partition.network, node.stand_in
    if network.ipv6:
        base = network.ipv6
        found.append({"addr": str(base.ip), "netmask": netmask6(base.network.prefixlen)})
    elif network.stand_in_ipv4 and world:
        found.append({"addr": str(network.stand_in_ipv4), "netmask": str(world.netmask)})
    return found


def plan(
    node: Node,
    partitions: Iterable[Partition],
    published: Mapping[str, PublicIdentity | None],
    holdings: Mapping[str, Holdings],
) -> tuple[ResourceOperation, ...]:
    """Which of the partitions' files are missing or differ; a file that cannot be read as a plain one differs."""
    operations = []
    config = node.config
    # all that the content hangs on besides the partition: a daemon may take another configuration into force
    common = (node.tap_gateway, config.software_user, config.tap_base, node.stand_in)
    for partition in partitions:
        path = f"{partition.path}/{NAME}"
        given = (partition, published[partition.id], holdings[partition.id], common)
        try:
            right = _is_right.get(path, (path,), given, partial(_compare, node, *given[:3]))
        except FileNotFoundError:
            operations.append(_operation(partition, "create", "missing"))
        except PartitiondError as error:
            operations.append(_operation(partition, "change", str(error)))
        except OSError as error:
            operations.append(_operation(partition, "change", f"cannot be read: {error.strerror}"))
        else:
            if not right:
                operations.append(_operation(partition, "change", "says something else"))
    return tuple(operations)


def _compare(node: Node, partition: Partition, identity: PublicIdentity | None, holdings: Holdings) -> bool:
    with files.directory(partition.path) as descriptor:
        found = files.read(
            NAME, dir_fd=descriptor, limit=_LIMIT, owners=frozenset((0,)), reader=partition.uid
        )
    return found == content(node, partition, identity, holdings)


def _operation(partition: Partition, action: str, reason: str) -> ResourceOperation:
    return ResourceOperation(
        id=f"resource-file/{partition.id}",
        resource="resource-file",
        action="create" if action == "create" else "change",
        partition=partition.id,
        before=None if action == "create" else NAME,
        after=NAME,
        reason=reason,
        owner=partition,
    )


def write(node: Node, partition: Partition, holdings: Holdings) -> None:
    """Write the file: root's, readable by everybody who may enter the partition. Raises OSError.

    A directory in its place, which only the tenant can have made, is moved aside: else it would hold up the node's plan.
    """
    with files.directory(partition.path) as descriptor:
        text = content(node, partition, identities.read(node.config, partition), holdings)
        try:
            files.write(NAME, text, dir_fd=descriptor, mode=0o644)
        except IsADirectoryError:
            aside = f"{NAME}.{secrets.token_hex(6)}"
            os.rename(NAME, aside, src_dir_fd=descriptor, dst_dir_fd=descriptor)
            files.write(NAME, text, dir_fd=descriptor, mode=0o644)
