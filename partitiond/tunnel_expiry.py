"""Which certificates of tunnels end soon, or have ended: told before somebody finds out by a bridge that is down."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from stunnel_mgr.validity import RENEWED_BEFORE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from partitiond.identities import PublicIdentity
    from partitiond.tunnel_declarations import PartitionTunnels
    from stunnel_mgr.model import Tunnel

OWN_WARNED_BEFORE = timedelta(days=30)
"""Of what a tunnel shows: an identity of our own has its successor long before that, a master's pair may not."""

ALLOWED_WARNED_BEFORE = RENEWED_BEFORE
"""Of what a tunnel allows: a peer like us publishes its next certificate then, and shows it when half of that is over."""


@dataclass(frozen=True, slots=True)
class Expiry:
    """A certificate that ends soon or has ended: the tunnel's own, or one that it allows; or one of another partition of
    this node that has a successor which is not allowed.
    """

    tunnel: str
    partition: str
    whose: Literal["own", "allowed", "replaced"]
    fingerprint: str
    not_after: datetime

    def sentence(self, now: datetime) -> str:
        """Say it, for people."""
        when = "ended" if self.not_after <= now else "ends"
        at = f"{when} on {self.not_after:%Y-%m-%d %H:%M} UTC"
        if self.whose == "replaced":
            return f"a certificate that it allows, {self.fingerprint}, {at}; its partition has another, which is not allowed"
        whose = "its own certificate" if self.whose == "own" else "a certificate that it allows"
        return f"{whose}, {self.fingerprint}, {at}"


def successors(published: Iterable[PublicIdentity | None]) -> dict[str, str]:
    """Of certificates of this node's partitions the ones that take their place, by fingerprint."""
    found = {}
    for one in published:
        if one and one.coming:
            found[one.shown.fingerprint] = one.coming.fingerprint
        if one and one.gone:
            found[one.gone.fingerprint] = one.shown.fingerprint
    return found


def ends(wanted: PartitionTunnels, tunnel: Tunnel, identity: PublicIdentity | None) -> datetime | None:
    """When the certificate that a tunnel shows ends; None where there is none."""
    if tunnel.identity == "master":
        return wanted.master.not_after if wanted.master else None
    return identity.shown.validity.not_after if identity else None


def near(
    wanted: PartitionTunnels, identity: PublicIdentity | None, following: Mapping[str, str], now: datetime
) -> tuple[Expiry, ...]:
    """What ends soon, seen from ``now`` (aware); ``following`` is what :func:`successors` says."""
    found = []
    for tunnel in wanted.tunnels:
        shown = wanted.identities.get(tunnel.identity)
        end = ends(wanted, tunnel, identity)
        if shown and end and end - now <= OWN_WARNED_BEFORE:
            found.append(Expiry(tunnel.name, tunnel.partition, "own", shown.fingerprint, end))
        allowed = {pin.fingerprint for pin in tunnel.pins}
        for pin in tunnel.pins:
            successor = following.get(pin.fingerprint)
            if successor in allowed:
                continue
            if successor or pin.not_after - now <= ALLOWED_WARNED_BEFORE:
                whose: Literal["replaced", "allowed"] = "replaced" if successor else "allowed"
                found.append(Expiry(tunnel.name, tunnel.partition, whose, pin.fingerprint, pin.not_after))
    return tuple(found)
