"""What is told of tunnels: sessions that are over, peers that were refused, sessions that we cut, certificates that end.

Of sessions and peers stunnel tells, a process of the tenant: informative, never billed. Promises: what strangers and busy
tunnels do is bounded in what it says, and goes where it can push nothing of the node's own out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stunnel_mgr.model import format_endpoint
from stunnel_mgr.session_digest import MOST, digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from partitiond.events import EventLog
    from partitiond.node import Partition
    from partitiond.tunnel_expiry import Expiry
    from stunnel_mgr.revocation import Cut
    from stunnel_mgr.session_digest import ReasonSum, SessionSum
    from stunnel_mgr.session_records import EndedSession, FailedSession, Record, RefusedPeer

_NAMED = 20  # peers in one event

_REASONS: Mapping[str | None, str] = {
    "not_allowed": "its certificate is not allowed",
    "no_certificate": "it showed no certificate",
    "expired": "its certificate is outside of its dates",
    "protocol": "it spoke an older TLS than 1.3",
    "no_tls": "it spoke no TLS",
    "timeout": "it did not finish its handshake in time",
    "too_many": "stunnel had as many sessions as it takes",
    "other": "its handshake failed",
    "backend": "the service behind the tunnel could not be reached",
    "unreachable": "the other end could not be reached",
    "refused": "the other end did not take the partition's certificate",
    None: "for several reasons",
}


def tell(events: EventLog, partition: Partition, records: Sequence[Record], *, most: int = MOST) -> None:
    """Record what stunnel's log told since the last time: ``most`` of each kind singly, the rest summed up."""
    if not records:
        return
    found = digest(records, most=min(most, MOST))
    for one in found.ended:
        _tell_session(events, partition, one)
    for total in found.ended_sums:
        _tell_sessions(events, partition, total)
    for event, some, sums in (
        ("tunnel.failed", found.failed, found.failed_sums),
        ("tunnel.rejected", found.refused, found.refused_sums),
    ):
        for other in some:
            _tell_peer(events, event, partition, other)
        for more in sums:
            _tell_peers(events, event, partition, more)


def _record(
    events: EventLog, event: str, partition: Partition, service: str, message: str, **details: Any
) -> None:
    """Record an event of one tunnel; of several, or of one that the log does not name, ``service`` is empty."""
    name = f"{partition.id}/{service or '*'}"
    events.record(event, f"{name}: {message}", partition=partition.id, resource=f"tunnel/{name}", **details)


def _tell_session(events: EventLog, partition: Partition, one: EndedSession) -> None:
    peer = format_endpoint(one.remote)
    size = (
        "stunnel itself ended"
        if one.bytes_to_socket is None
        else f"{one.bytes_to_socket} bytes in, {one.bytes_to_tls} bytes out"
    )
    _record(
        events,
        "tunnel.session",
        partition,
        one.service,
        f"{peer} ({one.subject or 'no certificate'}): {size}, {one.seconds} s",
        peer=peer,
        certificate=one.subject,
        bytes_in=one.bytes_to_socket,
        bytes_out=one.bytes_to_tls,
        seconds=one.seconds,
        clean=one.clean,
    )


def _tell_sessions(events: EventLog, partition: Partition, total: SessionSum) -> None:
    _record(
        events,
        "tunnel.session",
        partition,
        total.service,
        f"{total.count} more sessions ({total.subject or 'several'}): {total.bytes_to_socket} bytes in,"
        f" {total.bytes_to_tls} bytes out",
        certificate=total.subject,
        bytes_in=total.bytes_to_socket,
        bytes_out=total.bytes_to_tls,
        seconds=total.seconds,
        count=total.count,
    )


def _tell_peer(events: EventLog, event: str, partition: Partition, one: FailedSession | RefusedPeer) -> None:
    peer = format_endpoint(one.remote) if one.remote else None
    message = f"{peer or 'somebody'} ({one.subject or 'no certificate'}): {_REASONS[one.reason]}"
    details = {"peer": peer, "certificate": one.subject, "reason": one.reason}
    _record(events, event, partition, one.service, message, **details)


def _tell_peers(events: EventLog, event: str, partition: Partition, more: ReasonSum) -> None:
    message = f"{more.count} times: {_REASONS[more.reason]}"
    _record(events, event, partition, more.service, message, reason=more.reason, count=more.count)


def tell_cut(events: EventLog, partition: Partition, ended: Sequence[Cut]) -> None:
    """Record whose sessions were ended, one event for each tunnel: a reason may have a subject in it that a tenant forged."""
    by_service: dict[str, list[Cut]] = {}
    for one in ended:
        by_service.setdefault(one.service, []).append(one)
    for service, some in by_service.items():
        reasons = list(dict.fromkeys(one.reason for one in some))
        reason = reasons[0] if len(reasons) == 1 else f"{reasons[0]}; and {len(reasons) - 1} other reasons"
        _record(
            events,
            "tunnel.cut",
            partition,
            service,
            f"{len(some)} session{'' if len(some) == 1 else 's'} ended: {reason}",
            reason=reason,
            count=len(some),
            peers=[format_endpoint(one.remote) for one in some[:_NAMED]],
        )


def tell_expiry(events: EventLog, one: Expiry, now: datetime) -> None:
    """Record a certificate that ends soon."""
    events.record(
        "tunnel.expiring",
        f"{one.tunnel}: {one.sentence(now)}",
        partition=one.partition,
        resource=f"tunnel/{one.tunnel}",
        certificate=one.fingerprint,
        hint="get the peer's next certificate and allow it, too"
        if one.whose != "own"
        else "partitiond apply renews the node's own; the pair of an instance comes from the master",
    )
