"""The node as it should be: one value computed from the configuration and the chosen addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from netplan import addresses
from netplan.model import DesiredNetwork, PartitionNetwork, TapSpec
from partitiond.choices import Rules

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
    """The desired node; ``base_is_here`` is false while the interface has lost its own address."""

    config: Config
    base: ipaddress.IPv6Interface | None
    base_is_here: bool
    partitions: tuple[Partition, ...]

    def partition(self, name: str) -> Partition | None:
        """Return the partition of that id, or None."""
        return next((partition for partition in self.partitions if partition.id == name), None)

    def network(self) -> DesiredNetwork:
        """What netplan should make."""
        # the kernel takes no source hint that is not an address of the host
        host = self.base.ip if self.base and self.base_is_here else None
        return DesiredNetwork(
            interface=self.config.ipv6_interface,
            partitions=tuple(partition.network for partition in self.partitions),
            host_ipv6=host,
            ownership=self.config.address_ownership,
            # else an unbound client of a partition on this node would have that partition's own address as its source,
            # which the ownership rules refuse
            local_source_table=host is not None and self.config.address_ownership,
        )


def build(
    config: Config,
    base_is_here: bool,
    uids: Mapping[str, tuple[int, int]],
    choice: Choice,
) -> Node:
    """Compute the node.

    ``uids`` maps the names of existing users to their (uid, gid): a user that exists keeps its number. ``choice`` says
    which addresses are whose.
    """
    partitions = tuple(
        _partition(config, index, uids, choice.chosen[name]) for index, name in enumerate(names(config))
    )
    return Node(config=config, base=choice.rules.base, base_is_here=base_is_here, partitions=partitions)


def names(config: Config) -> tuple[str, ...]:
    """The ids of the partitions, by index."""
    return tuple(f"{config.partition_base}{index}" for index in range(config.partition_amount))


def rules(
    config: Config,
    base: ipaddress.IPv6Interface | None,
    taken: frozenset[ipaddress.IPv4Address],
    elsewhere: tuple[ipaddress.IPv4Network, ...],
) -> Rules:
    """What the configuration and the node's own addresses say about those of the partitions."""
    return Rules(
        partitions=names(config),
        base=base,
        prefixshift=config.ipv6_prefixshift,
        ipv4_network=config.ipv4_network,
        ipv6_range=config.ipv6_range,
        taken=taken,
        elsewhere=elsewhere,
    )


def _partition(config: Config, index: int, uids: Mapping[str, tuple[int, int]], chosen: Chosen) -> Partition:
    name, user = f"{config.partition_base}{index}", f"{config.user_base}{index}"
    uid, gid = uids.get(user, (config.uid_base + index, config.uid_base + index))
    tap = None
    if config.create_tap:
        tap = TapSpec(
            name=f"{config.tap_base}{index}",
            owner_uid=uid,
            mac=addresses.host_tap_mac(config.computer_id, name),
            bridge=config.bridge,
        )
    network = PartitionNetwork(
        id=name,
        index=index,
        uid=uid,
        tap=tap,
        ipv6=chosen.ipv6,
        ipv6_range=chosen.ipv6_range,
        ipv4=chosen.ipv4,
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
