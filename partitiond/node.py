"""The node as it should be: one value computed from the configuration and the addresses that were chosen."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import TYPE_CHECKING

from netplan import addresses
from netplan.model import (
    BridgeSpec,
    DesiredNetwork,
    HeldPort,
    PartitionNetwork,
    Protected,
    TapGuard,
    TapSpec,
    TunSpec,
)
from netplan.once import once

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Mapping
    from pathlib import Path

    from netplan.model import Network, RateLimit, RoutableIPv4
    from partitiond.choices import Choice, Chosen
    from partitiond.config import Config
    from partitiond.config_guard import Allowance
    from partitiond.config_mesh import MeshKeys

_NOTHING = Protected()


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
    chosen: Chosen
    allowance: Allowance | None = None

    @property
    def ipv6(self) -> ipaddress.IPv6Address | None:
        """The partition's global IPv6 address, or None on a node without one."""
        return self.network.ipv6.ip if self.network.ipv6 else None


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """The desired node; ``base_is_here`` is false while the interface has lost its own address.

    ``host_ipv4`` is the node's own IPv4, where partitions have some that others reach; ``choice`` says by what the
    addresses were chosen, ``protected`` what no guest may claim, ``limits`` who is limited by a quota or may be. As
    long as nothing of it changes, it is the same object: what follows from it need not be computed again.
    """

    config: Config
    choice: Choice
    base_is_here: bool
    partitions: tuple[Partition, ...]
    host_ipv4: ipaddress.IPv4Interface | None = None
    protected: Protected = _NOTHING
    limits: Mapping[str, RateLimit] = field(default_factory=dict)

    @property
    def base(self) -> ipaddress.IPv6Interface | None:
        """The node's own IPv6 address, of which those of the partitions are derived."""
        return self.choice.rules.base

    @property
    def tap_gateway(self) -> ipaddress.IPv4Interface | None:
        """The IPv4 address of ``tap_gateway_interface``."""
        return self.choice.rules.tap_gateway

    @property
    def stand_in(self) -> ipaddress.IPv4Network | None:
        """The IPv4 network whose addresses stand in for IPv6, where there is none."""
        if self.config.network.partition_network is not None:
            return self.config.network.partition_network
        mesh = self._mesh_instead
        return mesh.network if mesh else None

    @property
    def _mesh_instead(self) -> MeshKeys | None:
        """The mesh, where its addresses stand in for IPv6."""
        mesh = self.config.mesh
        return mesh if mesh and self.base is None and mesh.replaces_ipv6 is not False else None

    @property
    def address(self) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface | None:
        """The node's own address, of the kind that its partitions have."""
        if self.config.network.partition_network is not None:
            return self.host_ipv4
        mesh = self._mesh_instead
        return mesh.own_interface() if mesh else self.base

    def partition(self, name: str) -> Partition | None:
        """Return the partition of that id, or None."""
        return next((partition for partition in self.partitions if partition.id == name), None)

    def network(self) -> DesiredNetwork:
        """What netplan should make."""
        return _network(self)

    def _network(self) -> DesiredNetwork:
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
            protected=self.protected,
            backend=config.packet_filter,
            ownership=config.address_ownership,
            # else an unbound client of a partition on this node would have that partition's own address as its source,
            # which the ownership rules refuse
            local_source_table=bool(host or host4 or config.mesh) and config.address_ownership,
            cgroup_bpf=config.address_ownership,
            closed=config.metrics_listen,
            limits=self.limits,
            mesh=config.mesh.spec() if config.mesh else None,
            held=self._held_ports(),
        )

    def _held_ports(self) -> tuple[HeldPort, ...]:
        """The ports of the loopback that tunnels of the operator's have: of two that want one, the first.

        That of a partition that is not there (any more) is root's alone: a node that finds its master at it must find no other.
        """
        found: dict[int, HeldPort] = {}
        for given in self.config.tunnels:
            partition, port = self.partition(given.partition), given.loopback_port
            if port is not None:
                found.setdefault(port, HeldPort(port, partition.uid if partition else 0))
        return tuple(found.values())


@once
def _network(node: Node) -> DesiredNetwork:
    return node._network()  # noqa: SLF001 - its own, remembered


def build(
    config: Config,
    base_is_here: bool,
    uids: Mapping[str, tuple[int, int]],
    choice: Choice,
    host_ipv4: ipaddress.IPv4Interface | None = None,
    last: Node | None = None,
    protected: Protected = _NOTHING,
    limits: Mapping[str, RateLimit] | None = None,
) -> Node:
    """Compute the node; what is as in the ``last`` one is taken over from it.

    ``uids`` maps the names of existing users to their (uid, gid): a user that exists keeps its number. ``choice`` says
    which addresses are whose.
    """
    old = _reusable(last, config)
    partitions = tuple(
        _partition(config, index, uids, choice.chosen[name], old.get(name))
        for index, name in enumerate(names(config))
    )
    same = last is not None and all(map(operator.is_, partitions, last.partitions))
    if last is not None and same and len(partitions) == len(last.partitions):
        parts = (last.config is config, last.choice is choice, last.base_is_here == base_is_here)
        as_before = last.host_ipv4 == host_ipv4 and last.protected is protected
        if all(parts) and as_before and last.limits == (limits or {}):
            return last
    return Node(config, choice, base_is_here, partitions, host_ipv4, protected, limits or {})


def _reusable(last: Node | None, config: Config) -> dict[str, Partition]:
    """The partitions of the last node, if nothing of the configuration changed that goes into each of them."""
    if last is None or _shape(last.config) != _shape(config):
        return {}
    return {item.id: item for item in last.partitions}


def _shape(config: Config) -> tuple[object, ...]:
    return (
        *(config.computer_id, config.instance_root, config.partition_base, config.user_base, config.tap_base),
        *(config.create_tap, config.network.bridge, config.network.create_tun, config.guard.mode),
    )


def names(config: Config) -> tuple[str, ...]:
    """The ids of the partitions, by index."""
    return tuple(f"{config.partition_base}{index}" for index in range(config.partition_amount))


def _partition(
    config: Config,
    index: int,
    uids: Mapping[str, tuple[int, int]],
    chosen: Chosen,
    old: Partition | None,
) -> Partition:
    name, user = f"{config.partition_base}{index}", f"{config.user_base}{index}"
    uid, gid = uids.get(user, (config.uid_base + index, config.uid_base + index))
    routable = config.network.routable.get(name)
    allowance = config.guard.allowed.get(name)
    now = (chosen, uid, gid, routable, allowance)
    if old is not None and (old.chosen, old.uid, old.gid, old.network.routable_ipv4, old.allowance) == now:
        return old
    guest_mac = addresses.tap_mac(config.computer_id, name) if config.create_tap else None
    tap = tun = None
    if config.create_tap:
        tap = TapSpec(
            name=f"{config.tap_base}{index}",
            owner_uid=uid,
            mac=addresses.host_tap_mac(config.computer_id, name),
            bridge=config.network.bridge,
            ipv6=chosen.tap_ipv6,
            ipv4=chosen.tap_ipv4,
            guard=_guard(config, chosen, routable, allowance, guest_mac),
        )
    if config.network.create_tun:
        tun = TunSpec(
            f"slaptun{index}", uid, chosen.tun_ipv6, chosen.tun_ipv4, guarded=config.guard.mode != "off"
        )
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
        vpn_ipv4=chosen.vpn_ipv4,
        routable_ipv4=routable,
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
        guest_mac=guest_mac,
        chosen=chosen,
        allowance=allowance,
    )


def _guard(
    config: Config,
    chosen: Chosen,
    routable: RoutableIPv4 | None,
    allowance: Allowance | None,
    guest_mac: str | None,
) -> TapGuard | None:
    """What may leave a partition's tap; what is the guest's own is the partition's, but for what its processes have."""
    mode = config.guard.mode
    if mode == "off" or config.packet_filter != "nftables":
        return None
    own: list[Network] = [] if allowance is None else list(allowance.networks)
    if chosen.ipv6_range:
        own.append(chosen.ipv6_range)
    if chosen.tap_ipv6:
        own.append(chosen.tap_ipv6.network)
    own += (ip_network(one) for one in (chosen.tap_ipv4, routable.interface.ip if routable else None) if one)
    return TapGuard(mode == "strict", tuple(own), allowance.mac if allowance else None, guest_mac)
