"""A look at the node and what came of it, as data: what was seen, the whole plan, what an apply did.

Promises: nothing here reads or changes anything; a plan's parts stand in the order in which they are applied.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from netplan.model import ObservedNetwork
    from netplan.operations import Operation as NetworkOperation
    from partitiond import (
        block_devices,
        identities,
        mesh,
        port_reservation,
        privacy,
        resource_file,
        services,
        storage,
        tun_device,
        tunnels,
        users,
    )
    from partitiond.choices import Choice
    from partitiond.config import Config
    from partitiond.directories import DirectoryOperation
    from partitiond.identities import PublicIdentity
    from partitiond.node import Node
    from partitiond.operation import AnyOperation
    from partitiond.refusal import Refusal
    from partitiond.supervision import Process
    from partitiond.tunnel_declarations import PartitionTunnels
    from partitiond.users import UserOperation
    from stunnel_mgr.model import Refused

PARTS = (
    "withdrawals",
    "users",
    "directories",
    "storage",
    "network",
    "devices",
    "grants",
    "identities",
    "resources",
    "privacy",
    "services",
    "mesh",
    "ports",
    "tunnels",
    "leavers",
)


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen in one look at the node, and the node as it should be in view of it."""

    users: users.UserDatabase
    network: ObservedNetwork
    processes: tuple[Process, ...]
    node: Node
    block_devices: block_devices.Observed
    storage: storage.Observed
    choice: Choice
    ports: port_reservation.Observed


@dataclass(frozen=True, slots=True)
class Plan:
    """The operations by part, in the order in which they are applied.

    What they come from, by partition: ``published`` are the identities that are there, ``declared`` the tunnels.
    """

    withdrawals: tuple[block_devices.WithdrawOperation, ...] = ()
    users: tuple[UserOperation, ...] = ()
    directories: tuple[DirectoryOperation, ...] = ()
    storage: tuple[DirectoryOperation, ...] = ()
    network: tuple[NetworkOperation, ...] = ()
    devices: tuple[tun_device.DeviceOperation, ...] = ()
    grants: tuple[block_devices.GrantOperation, ...] = ()
    identities: tuple[identities.IdentityOperation, ...] = ()
    resources: tuple[resource_file.ResourceOperation, ...] = ()
    privacy: tuple[privacy.PrivacyOperation, ...] = ()
    services: tuple[services.ServiceOperation, ...] = ()
    mesh: tuple[mesh.MeshOperation, ...] = ()
    ports: tuple[port_reservation.ReservationOperation, ...] = ()
    tunnels: tuple[tunnels.TunnelOperation, ...] = ()
    leavers: tuple[UserOperation, ...] = ()
    refused: tuple[Refused | Refusal, ...] = ()
    published: Mapping[str, PublicIdentity | None] = field(default_factory=dict)
    declared: Mapping[str, PartitionTunnels] = field(default_factory=dict)

    def __iter__(self) -> Iterator[AnyOperation]:
        """All operations in order."""
        for part in PARTS:
            yield from getattr(self, part)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keeping(self, test: Callable[[AnyOperation], bool], parts: Iterable[str] = PARTS) -> Plan:
        """The plan with only those operations of some parts that pass a test; the other parts stay whole."""
        kept: dict[str, Any] = {part: tuple(filter(test, getattr(self, part))) for part in parts}
        return replace(self, **kept)

    @property
    def stands(self) -> bool:
        """Whether what everything stands on is as it should be; what single tenants run or own may be in trouble."""
        return not (self.users or self.own_directories or self.network or self.leavers)

    @property
    def own_directories(self) -> tuple[DirectoryOperation, ...]:
        """What the node's own directories need; those of partitions are in the hands of tenants."""
        return tuple(operation for operation in self.directories if operation.partition is None)


@dataclass(frozen=True, slots=True)
class Looked:
    """The last look at the whole node: by which configuration, when (monotonic seconds), and the plan that was made of it, or
    of the look that followed when that was carried out; and what supervisord ran.
    """

    config: Config
    at: float
    plan: Plan
    processes: tuple[Process, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What an apply did and what is left; ``stands``: nothing of what everything stands on."""

    done: int = 0
    failures: list[tuple[str, Exception]] = field(default_factory=list)
    left: tuple[AnyOperation, ...] = ()
    refused: tuple[Refused | Refusal, ...] = ()
    stands: bool = False
