"""What ``tunnel list`` says, and what the daemon tells of tunnels: one look at declarations, identities and sockets."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from netplan import sock_diag
from partitiond import (
    converge,
    identities,
    remembered,
    supervision,
    tunnel_declarations,
    tunnel_expiry,
    tunnels,
)
from stunnel_mgr.model import format_endpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from partitiond.context import Context
    from partitiond.identities import PublicIdentity
    from partitiond.node import Node, Partition
    from partitiond.tunnel_declarations import PartitionTunnels
    from partitiond.tunnel_expiry import Expiry
    from stunnel_mgr.model import Refused, Tunnel

_SILENT = "stunnel does not listen there; partitiond apply says why"


@dataclass(frozen=True, slots=True)
class TunnelState:
    """A valid tunnel as it is: down for a reason or up, its sessions, when its own certificate ends, what ends soon."""

    tunnel: Tunnel
    reason: str | None
    sessions: int
    fingerprint: str | None
    not_after: datetime | None
    expiries: tuple[Expiry, ...]
    stale: str = ""


def states(
    partitions: Iterable[Partition],
    declared: Mapping[str, PartitionTunnels],
    published: Mapping[str, PublicIdentity | None],
    running: frozenset[str],
    now: datetime,
) -> Iterator[TunnelState]:
    """Look at every valid tunnel; ``running`` are the groups of supervisord that run. Raises NetplanError."""
    everything = [tunnel.listen for one in declared.values() for tunnel in one.tunnels]
    owners, sessions = sock_diag.listeners(everything), sock_diag.count_sessions(everything)
    following = tunnel_expiry.successors(published.values())
    for item in partitions:
        wanted, identity = declared[item.id], published[item.id]
        expiries = tunnel_expiry.near(wanted, identity, following, now)
        for tunnel in wanted.tunnels:
            listens = item.uid in owners.get(tunnel.listen, ())
            blocked = wanted.blocked.get(tunnel.name)
            up = not blocked and listens and tunnels.group_name(item.id) in running
            shown = wanted.identities.get(tunnel.identity)
            yield TunnelState(
                tunnel,
                None if up else blocked or tunnel.idle_reason or _SILENT,
                sessions[tunnel.listen] if up else 0,
                shown.fingerprint if shown else None,
                tunnel_expiry.ends(wanted, tunnel, identity),
                tuple(one for one in expiries if one.tunnel == tunnel.name),
                wanted.master.stale if wanted.master and tunnel.identity == "master" else "",
            )


def listing(context: Context) -> dict[str, Any]:
    """The contract's ``tunnel list`` object."""
    seen, now = converge.observe(context), datetime.now(UTC)
    partitions = seen.node.partitions
    published = identities.observe(seen.node.config, partitions)
    declared = converge.declared_tunnels(context, seen.node, published, partitions)
    running = supervision.running_groups(seen.processes)
    rows = [_row(one, now) for one in states(partitions, declared, published, running, now)]
    rows += [_row(one, now) for one in _halted(context, seen.node, published)]
    for item in partitions:
        identity = published[item.id]
        own = (
            _certificate(identity.shown.fingerprint, identity.shown.validity.not_after) if identity else None
        )
        rows += [_refused_row(one, own) for one in declared[item.id].refused]
    rows += [_refused_row(one, None) for one in tunnel_declarations.homeless(seen.node)]
    order = {item.id: item.index for item in partitions}
    rows.sort(key=lambda row: order.get(row["partition"], len(order)))
    return {"tunnels": rows}


def _halted(
    context: Context, node: Node, published: Mapping[str, PublicIdentity | None]
) -> Iterator[TunnelState]:
    """The tunnels of partitions that are stopped or on their way out, which have none meanwhile."""
    known, halted = identities.certificates(published.values()), remembered.halted(context)
    for item in node.partitions:
        if why := halted.get(item.id):
            for tunnel in tunnel_declarations.declared(node, item, known).tunnels:
                yield TunnelState(tunnel, why, 0, None, None, ())


def _certificate(fingerprint: str, not_after: datetime) -> dict[str, str]:
    return {"fingerprint": fingerprint, "not_after": not_after.strftime("%Y-%m-%dT%H:%M:%SZ")}


def _row(state: TunnelState, now: datetime) -> dict[str, Any]:
    tunnel = state.tunnel
    shown = (
        _certificate(state.fingerprint, state.not_after) if state.fingerprint and state.not_after else None
    )
    return {
        "name": tunnel.name,
        "partition": tunnel.partition,
        "mode": tunnel.mode,
        "listen": format_endpoint(tunnel.listen),
        "connect": format_endpoint(tunnel.connect),
        "state": "down" if state.reason else "up",
        "reason": state.reason,
        "allowed": [pin.fingerprint for pin in tunnel.pins],
        "certificate": shown,
        "identity": tunnel.identity,
        "sessions": state.sessions,
        "warnings": [
            *(one.sentence(now) for one in state.expiries),
            *([f"{state.stale}; it goes on with the pair before"] if state.stale else ()),
            *(f"{name} is of no partition of this node; the others are allowed" for name in tunnel.missing),
            *(
                f"{pin.fingerprint} may be refused: of self-signed certificates of one subject that name no authority key"
                " identifier OpenSSL looks at one alone"
                for pin in tunnel.shadowed_pins
            ),
        ],
    }


def _refused_row(refusal: Refused, certificate: dict[str, str] | None) -> dict[str, Any]:
    # what a bad declaration meant to be is not known
    place = f"{refusal.file}:{refusal.line}" if refusal.line else refusal.file
    return {
        "name": refusal.name,
        "partition": refusal.partition,
        "mode": None,
        "listen": None,
        "connect": None,
        "state": "refused",
        "reason": f"{place}: {refusal.reason}",
        "allowed": [],
        "certificate": certificate,
        "identity": None,
        "sessions": 0,
        "warnings": [],
    }
