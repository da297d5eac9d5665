"""``.slapos-resource``: what a partition's software may know of its own resources, as JSON.

The keys of slapos.core 1.26 (``tap``, ``tun``, ``address_list``, ``ipv6_range``, …), and ours: the certificate of the
partition's tunnel identity, and the MAC proposed for a guest on its tap.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from partitiond import files, identities
from partitiond.errors import PartitiondError
from partitiond.operation import Operation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from partitiond.identities import PublicIdentity
    from partitiond.node import Node, Partition

NAME = ".slapos-resource"
_LIMIT = 64 * 1024
_IPV4_MASK = "255.255.255.255"


@dataclass(frozen=True, slots=True)
class ResourceOperation(Operation):
    """Write a partition's resource file."""

    owner: Partition


def netmask6(prefixlen: int) -> str:
    """An IPv6 prefix length in the form of an address, as slapformat writes it."""
    return str(ipaddress.IPv6Network(("::", prefixlen)).netmask)


@lru_cache(maxsize=4096)
def content(partition: Partition, identity: PublicIdentity | None) -> bytes:
    """What the file should hold now. Pure, and remembered: it is compared each pass, and JSON is slow to write."""
    network = partition.network
    value: dict[str, Any] = {
        "reference": partition.id,
        "address_list": addresses(partition),
        "tap": {
            "name": network.tap.name,
            "bridge": network.tap.bridge or "",
            "mac": partition.guest_mac,
            "ipv4_addr": "",
            "ipv4_netmask": "",
            "ipv4_gateway": "",
            "ipv4_network": "",
            "ipv6_addr": "",
            "ipv6_netmask": "",
            "ipv6_gateway": "",
            "ipv6_network": "",
        }
        if network.tap
        else {},
        "tun": None,
        "ipv6_range": {
            "addr": str(network.ipv6_range.network_address),
            "netmask": netmask6(network.ipv6_range.prefixlen),
            "network": str(network.ipv6_range),
            "prefixlen": network.ipv6_range.prefixlen,
        }
        if network.ipv6_range
        else {},
        "external_storage_list": [],
        "certificate": identity.certificate_base64 if identity else "",
        "certificate_fingerprint": identity.fingerprint if identity else "",
    }
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def addresses(partition: Partition) -> list[dict[str, str]]:
    """The partition's addresses with their netmasks, as slapformat lists them."""
    found = [{"addr": str(partition.ipv4), "netmask": _IPV4_MASK}]
    if partition.network.ipv6:
        base = partition.network.ipv6
        found.append({"addr": str(base.ip), "netmask": netmask6(base.network.prefixlen)})
    return found


def plan(node: Node, published: Mapping[str, PublicIdentity | None]) -> tuple[ResourceOperation, ...]:
    """Which files are missing or differ; a file that cannot be read as a plain one differs."""
    operations = []
    for partition in node.partitions:
        try:
            with files.directory(partition.path) as descriptor:
                found = files.read(NAME, dir_fd=descriptor, limit=_LIMIT, owners=frozenset((0,)))
        except FileNotFoundError:
            operations.append(_operation(partition, "create", "missing"))
            continue
        except PartitiondError as error:
            operations.append(_operation(partition, "change", str(error)))
            continue
        if found != content(partition, published[partition.id]):
            operations.append(_operation(partition, "change", "says something else"))
    return tuple(operations)


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


def write(node: Node, partition: Partition) -> None:
    """Write the file: root's, readable by everybody who may enter the partition. Raises OSError.

    A directory in its place, which only the tenant can have made, is moved aside: else it would hold up the node's plan.
    """
    with files.directory(partition.path) as descriptor:
        text = content(partition, identities.read(node.config, partition))
        try:
            files.write(NAME, text, dir_fd=descriptor, mode=0o644)
        except IsADirectoryError:
            aside = f"{NAME}.{secrets.token_hex(6)}"
            os.rename(NAME, aside, src_dir_fd=descriptor, dst_dir_fd=descriptor)
            files.write(NAME, text, dir_fd=descriptor, mode=0o644)
