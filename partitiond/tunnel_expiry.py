"""Which certificates of tunnels end soon, or have ended: told before somebody finds out by a bridge that is down."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Container
    from datetime import datetime

    from partitiond.identities import PublicIdentity
    from partitiond.tunnel_declarations import PartitionTunnels
    from stunnel_mgr.model import Tunnel

WARNED_BEFORE = timedelta(days=30)
"""An identity of our own has its successor long before that."""


@dataclass(frozen=True, slots=True)
class Expiry:
    """A certificate that ends soon or has ended: the tunnel's own, or one that it allows."""

    tunnel: str
    partition: str
    whose: Literal["own", "allowed"]
    fingerprint: str
    not_after: datetime

    def sentence(self, now: datetime) -> str:
        """Say it, for people."""
        whose = "its own certificate" if self.whose == "own" else "a certificate that it allows"
        when = "ended" if self.not_after <= now else "ends"
        return f"{whose}, {self.fingerprint}, {when} on {self.not_after:%Y-%m-%d %H:%M} UTC"


def ends(wanted: PartitionTunnels, tunnel: Tunnel, identity: PublicIdentity | None) -> datetime | None:
    """When the certificate that a tunnel shows ends; None where there is none."""
    if tunnel.identity == "master":
        return wanted.master.not_after if wanted.master else None
    return identity.shown.validity.not_after if identity else None


def near(
    wanted: PartitionTunnels, identity: PublicIdentity | None, replaced: Container[str], now: datetime
) -> tuple[Expiry, ...]:
    """What ends within ``WARNED_BEFORE`` of ``now`` (aware); ``replaced`` are certificates whose successor is known here."""
    found = []
    for tunnel in wanted.tunnels:
        shown = wanted.identities.get(tunnel.identity)
        end = ends(wanted, tunnel, identity)
        if shown and end and end - now <= WARNED_BEFORE:
            found.append(Expiry(tunnel.name, tunnel.partition, "own", shown.fingerprint, end))
        found += [
            Expiry(tunnel.name, tunnel.partition, "allowed", pin.fingerprint, pin.not_after)
            for pin in tunnel.pins
            if pin.not_after - now <= WARNED_BEFORE and pin.fingerprint not in replaced
        ]
    return tuple(found)
