"""The node as it should be: one value computed from the configuration and the addresses that were chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from netplan import addresses
from netplan.model import BridgeSpec, DesiredNetwork, PartitionNetwork, TapSpec, TunSpec

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Mapping
    from pathlib import Path

    from partitiond.choices import Choice, Chosen
    from partitiond.config import Config


@dataclass(frozen=True, slots=True)
class Partition:
    """One computer partition: its names, its user, its directory and what it owns of the network."""

    id: str
    index: int
    user: str
    uid: int
    gid: int
    path: Path
    ipv4: ipaddress.IPv4Address
    network: PartitionNetwork
    guest_mac: str | None

    @property
    def ipv6(self) -> ipaddress.IPv6Address | None:
        """The partition's global IPv6 address, or None on a node without one."""
        return self.network.ipv6.ip if self.network.ipv6 else None


@dataclass(frozen=True, slots=True)
class Node:
    """The desired node; ``base_is_here`` is false while the interface has lost its own address.

    ``host_ipv4`` is the node's own IPv4, where partitions have some that others reach; ``tap_gateway`` that of
    ``tap_gateway_interface``.
    """

    config: Config
    base: ipaddress.IPv6Interface | None
    base_is_here: bool
    partitions: tuple[Partition, ...]
    host_ipv4: ipaddress.IPv4Interface | None = None
    tap_gateway: ipaddress.IPv4Interface | None = None

    def partition(self, name: str) -> Partition | None:
        """Return the partition of that id, or None."""
        return next((partition for partition in self.partitions if partition.id == name), None)

    def network(self) -> DesiredNetwork:
        """What netplan should make."""
        # the kernel takes no source hint that is not an address of the host
        host = self.base.ip if self.base and self.base_is_here else None
        host4 = self.host_ipv4.ip if self.host_ipv4 else None
        config, keys = self.config, self.config.network
        bridge = None
        # a bridge that bears the node's own address is made by whoever gives that address
        bears = keys.bridge in (keys.interface, keys.ipv4_interface)
        if keys.bridge and (keys.bridge_ports or not bears):
            mac = addresses.bridge_mac(config.computer_id)
            bridge = BridgeSpec(keys.bridge, mac, keys.bridge_ports)
        return DesiredNetwork(
            interface=keys.interface,
            ipv4_interface=keys.ipv4_interface,
            partitions=tuple(partition.network for partition in self.partitions),
            host_ipv6=host,
            host_ipv4=host4,
            bridge=bridge,
            ownership=config.address_ownership,
            # else an unbound client of a partition on this node would have that partition's own address as its source,
            # which the ownership rules refuse
            local_source_table=bool(host or host4) and config.address_ownership,
        )


def build(
    config: Config,
    base_is_here: bool,
    uids: Mapping[str, tuple[int, int]],
    choice: Choice,
    host_ipv4: ipaddress.IPv4Interface | None = None,
) -> Node:
    """Compute the node.

    ``uids`` maps the names of existing users to their (uid, gid): a user that exists keeps its number. ``choice`` says
    which addresses are whose.
    """
    partitions = tuple(
        _partition(config, index, uids, choice.chosen[name]) for index, name in enumerate(names(config))
    )
    return Node(config, choice.rules.base, base_is_here, partitions, host_ipv4, choice.rules.tap_gateway)


def names(config: Config) -> tuple[str, ...]:
    """The ids of the partitions, by index."""
    return tuple(f"{config.partition_base}{index}" for index in range(config.partition_amount))


def _partition(config: Config, index: int, uids: Mapping[str, tuple[int, int]], chosen: Chosen) -> Partition:
    name, user = f"{config.partition_base}{index}", f"{config.user_base}{index}"
    uid, gid = uids.get(user, (config.uid_base + index, config.uid_base + index))
    tap = tun = None
    if config.create_tap:
        tap = TapSpec(
            name=f"{config.tap_base}{index}",
            owner_uid=uid,
            mac=addresses.host_tap_mac(config.computer_id, name),
            bridge=config.network.bridge,
            ipv6=chosen.tap_ipv6,
            ipv4=chosen.tap_ipv4,
        )
    if config.network.create_tun:
        tun = TunSpec(f"slaptun{index}", uid, chosen.tun_ipv6, chosen.tun_ipv4)
    network = PartitionNetwork(
        id=name,
        index=index,
        uid=uid,
        tap=tap,
        tun=tun,
        ipv6=chosen.ipv6,
        ipv6_range=chosen.ipv6_range,
        ipv4=chosen.ipv4,
        public_ipv4=chosen.public_ipv4,
        routable_ipv4=config.network.routable.get(name),
    )
    return Partition(
        id=name,
        index=index,
        user=user,
        uid=uid,
        gid=gid,
        path=config.instance_root / name,
        ipv4=chosen.ipv4,
        network=network,
        guest_mac=addresses.tap_mac(config.computer_id, name) if tap else None,
    )
