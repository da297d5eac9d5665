"""Whether a tunnel works, tried with real TLS connections: stunnel itself tells nobody but its log.

The program behind a client's stunnel always sees its connection accepted and then cut, whether the other side
refused the certificate, is the wrong one, or is down (5.68, measured); so a check speaks TLS to the far end
itself, as that stunnel does, and only then goes through the local listener, as a program does.

Checks block, for a few times ``timeout`` at most, and send nothing to the service at the other end, which sees
up to two connections that say nothing. They are to be made as the partition's user: what packet filter and key
allow that one is what counts.
"""

import socket
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal, TypeVar, get_args

from . import dialled, tls_probe
from .model import Endpoint, IPAddress, Pin, Tunnel, format_endpoint
from .tls_probe import Contact, Pair

TIMEOUT = 5.0
"""Seconds for each of connecting and shaking hands."""
LONGEST = 6 * TIMEOUT
"""Seconds that no check takes longer than, but for what ``tls_probe`` cannot bound."""
_TRIES = 3
_QUICK = 1.0
_Found = TypeVar("_Found")

Outcome = Literal[
    "ok",
    "idle",
    "refused_declaration",
    "listener_down",
    "foreign_listener",
    "stunnel_fails",
    "wrong_certificate",
    "own_expired",
    "peer_expired",
    "unreachable",
    "no_tls",
    "wrong_server",
    "refused_by_pin",
    "service_down",
    "undecided",
]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What came of it; ``message`` is for people, ``peer`` the fingerprint that the other side showed.

    Of all tunnels: ``ok``; ``idle`` (it is valid, and nobody may connect: there is nothing to try);
    ``refused_declaration`` (what was written makes no tunnel); ``listener_down`` (nobody listens where its
    stunnel should); ``foreign_listener`` (somebody else does); ``own_expired`` (the partition's own certificate
    ran out); ``peer_expired`` (the certificate of the other side did, so stunnel refuses it); ``service_down``
    (the tunnel works, the service behind its server end does not); ``stunnel_fails`` (all else is well, but
    stunnel does not do what was declared: it hangs, or runs with another configuration); ``undecided`` (the
    check itself came to no end).

    Of servers: ``wrong_certificate`` (what listens shows another one than the partition's).
    Of clients: ``unreachable`` (no TCP connection to the far end); ``no_tls`` (no TLS 1.3 handshake came about);
    ``wrong_server`` (what it shows is not pinned); ``refused_by_pin`` (it does not allow our certificate).
    """

    outcome: Outcome
    message: str
    peer: str | None = None


@dataclass(frozen=True, slots=True)
class OwnSide:
    """What the node knows of the side that a partition has: its user, its identity (``not_after`` is aware), and
    the users that listen where the tunnel does.
    """

    uid: int
    identity: Pair
    fingerprint: str
    not_after: datetime
    listeners: Collection[int] = field(default=frozenset())

    def expired(self, now: datetime) -> bool:
        """Whether others refuse its certificate at ``now`` (aware)."""
        return self.not_after < now


# --- servers ----------------------------------------------------------------------------------------------------------


def check_server(
    tunnel: Tunnel, own: OwnSide, *, now: datetime | None = None, timeout: float = TIMEOUT
) -> CheckResult:
    """Check a tunnel of mode ``server`` from its own side.

    It shows no certificate, so a tunnel that works refuses it, after having shown the right one itself. Then
    the service behind is connected to and left at once. That the way between is open can only be shown with a
    certificate that is allowed: see ``check_way_in``.
    """
    now = now or datetime.now(UTC)
    where = format_endpoint(tunnel.listen)
    seen = tls_probe.speak(tunnel.listen, timeout=timeout, must_end=True)
    if seen.peer is None:
        return _not_served(where, seen, own)
    if seen.peer != own.fingerprint:
        message = f"{where} shows {seen.peer}, and the partition's certificate is {own.fingerprint}"
        return CheckResult("wrong_certificate", message, seen.peer)
    if seen.how == "stands":
        message = f"{where} lets in who shows no certificate, as no stunnel of ours does"
        return CheckResult("foreign_listener", message, seen.peer)
    if own.expired(now):
        return CheckResult(
            "own_expired", _ran_out("the partition's own certificate", own.not_after), seen.peer
        )
    alive = [pin for pin in tunnel.pins if not pin.expired(now)]
    if not alive:
        last = max(pin.not_after for pin in tunnel.pins)
        return CheckResult("peer_expired", _ran_out("the last certificate that is allowed", last), seen.peer)
    try:
        tls_probe.connect(tunnel.connect, timeout=timeout).close()
    except tls_probe.CUT:
        pass  # somebody is there; what it makes of connections that say nothing is its own affair
    except OSError as error:
        message = f"the service at {format_endpoint(tunnel.connect)} does not answer: {tls_probe.text(error)}"
        return CheckResult("service_down", message, seen.peer)
    return CheckResult("ok", f"{where} listens, and so does the service behind it", seen.peer)


def _not_served(where: str, seen: Contact, own: OwnSide) -> CheckResult:
    """Nobody spoke TLS there: say who does not."""
    others = sorted(uid for uid in own.listeners if uid != own.uid)
    if own.uid in own.listeners and (seen.silent or seen.how == "unreachable"):
        return CheckResult("stunnel_fails", f"{where} is listened on, but not served: {seen.detail}")
    if others:
        return CheckResult("foreign_listener", f"{where} belongs to {_users(others)}: {seen.detail}")
    if seen.how == "unreachable":
        return CheckResult("listener_down", f"nobody listens on {where}: {seen.detail}")
    return CheckResult("foreign_listener", f"what listens on {where} is no tunnel: {seen.detail}")


def check_way_in(
    tunnel: Tunnel,
    own: OwnSide,
    guest: Pair,
    *,
    source: IPAddress | None,
    now: datetime | None = None,
    timeout: float = TIMEOUT,
) -> CheckResult:
    """Go through a tunnel of mode ``server`` as one who is allowed: as the user of ``guest``, from its address.

    The outcomes are those of the far end of a client. Raises TunnelError as ``check_client`` does.
    """
    shown = Pin(own.fingerprint, "", own.not_after)
    return _far_end(tunnel.listen, source, guest, (shown,), now or datetime.now(UTC), timeout)[0]


def with_way_in(result: CheckResult, way_in: CheckResult, guest: str) -> CheckResult:
    """Put together what ``check_server`` and ``check_way_in`` found; ``guest`` names the partition of the latter.

    Where the guest did not even come to the server, nothing is known but what the server's own side says.
    """
    if result.outcome != "ok":
        return result
    if way_in.outcome == "ok":
        return replace(result, message=f"{guest} is let through to the service")
    if way_in.outcome == "refused_by_pin":
        message = f"it refuses the certificate of {guest}, which is allowed: {way_in.message}"
        return CheckResult("stunnel_fails", message, result.peer)
    if way_in.outcome == "service_down":
        return CheckResult("service_down", f"{guest} was let in and cut off: {way_in.message}", result.peer)
    return replace(result, message=f"{result.message}; {guest} could not try it: {way_in.message}")


# --- clients ----------------------------------------------------------------------------------------------------------


def check_client(
    tunnel: Tunnel, own: OwnSide, *, now: datetime | None = None, timeout: float = TIMEOUT
) -> CheckResult:
    """Check a tunnel of mode ``client``: connect as its stunnel does, from the same address and with the same
    identity, then as a program does, through its listener.

    Raises TunnelError ``tunnel.identity`` when the files of the identity cannot be used, and ``tunnel.observe``.
    """
    now = now or datetime.now(UTC)
    if own.uid not in own.listeners:
        return _not_listening(tunnel, own)
    if own.expired(now):
        return CheckResult("own_expired", _ran_out("the partition's own certificate", own.not_after))
    pair, source = own.identity, tunnel.source_host
    far, seen = _far_end(tunnel.connect, source, pair, tunnel.pins, now, timeout)
    if far.outcome != "ok":
        return far
    patience = tls_probe.grace(seen.seconds, timeout)
    failure = _again(lambda: _through(tunnel, own.uid, patience, timeout), lambda reason: reason is not None)
    if failure is not None:
        where = format_endpoint(tunnel.listen)
        message = f"{format_endpoint(tunnel.connect)} lets us in, but {where} {failure}"
        return CheckResult("stunnel_fails", message, far.peer)
    return far


def _not_listening(tunnel: Tunnel, own: OwnSide) -> CheckResult:
    where = format_endpoint(tunnel.listen)
    if own.listeners:
        return CheckResult("foreign_listener", f"{where} belongs to {_users(own.listeners)}")
    return CheckResult("listener_down", f"nobody listens on {where}")


def _through(tunnel: Tunnel, uid: int, patience: float, timeout: float) -> str | None:
    """Connect to the local listener as a program does; say what went wrong."""
    before = dialled.connections(tunnel.connect, uid)
    try:
        with tls_probe.connect(tunnel.listen, timeout=timeout) as program:
            program.settimeout(patience)
            return _cut(program) or _not_dialled(tunnel.connect, uid, before)
    except tls_probe.CUT as error:
        return _cuts_off(error)
    except OSError as error:
        return f"does not let a program in: {tls_probe.text(error)}"


def _cut(program: socket.socket) -> str | None:
    try:
        return None if program.recv(1) else "cuts programs off"
    except TimeoutError:
        return None
    except OSError as error:
        return _cuts_off(error)


def _cuts_off(error: OSError) -> str:
    return f"cuts programs off: {tls_probe.text(error)}"


def _not_dialled(endpoint: Endpoint, uid: int, before: frozenset[str]) -> str | None:
    return (
        None
        if dialled.connections(endpoint, uid) - before
        else "takes connections and does nothing with them"
    )


# --- the far end ------------------------------------------------------------------------------------------------------


def _far_end(
    endpoint: Endpoint,
    source: IPAddress | None,
    identity: Pair,
    pins: tuple[Pin, ...],
    now: datetime,
    timeout: float,
) -> tuple[CheckResult, Contact]:
    """Connect to a server with a certificate, and say how it went.

    One that refuses the certificate says so by an alert, which is lost if the reset behind it is faster (5.68);
    one whose service is down just hangs up. So who hangs up is asked again.
    """
    seen = _again(
        lambda: tls_probe.speak(endpoint, timeout=timeout, source=source, identity=identity),
        lambda contact: contact.how == "closed",
    )
    return _judge(format_endpoint(endpoint), seen, pins, now), seen


def _again(attempt: Callable[[], _Found], failed: Callable[[_Found], bool]) -> _Found:
    """Try anew what failed, a few times and only while that is quick."""
    for _ in range(_TRIES - 1):
        began = time.monotonic()
        found = attempt()
        if not failed(found) or time.monotonic() - began > _QUICK:
            return found
    return attempt()


def _judge(where: str, seen: Contact, pins: tuple[Pin, ...], now: datetime) -> CheckResult:
    if seen.how in ("unreachable", "no_tls"):
        return CheckResult(
            "unreachable" if seen.how == "unreachable" else "no_tls", f"{where}: {seen.detail}"
        )
    pin = next((pin for pin in pins if pin.fingerprint == seen.peer), None)
    if pin is None:
        return CheckResult("wrong_server", f"{where} shows {seen.peer}, which is not pinned", seen.peer)
    if pin.expired(now):
        return CheckResult("peer_expired", _ran_out(f"the certificate of {where}", pin.not_after), seen.peer)
    if seen.how == "refused":
        return CheckResult(
            "refused_by_pin", f"{where} does not take our certificate: {seen.detail}", seen.peer
        )
    if seen.how == "closed":
        message = f"{where} took our certificate and hung up, as it does when the service behind it is down"
        return CheckResult("service_down", message, seen.peer)
    return CheckResult("ok", f"{where} lets us through", seen.peer)


def _ran_out(what: str, when: datetime) -> str:
    return f"{what} ran out on {when:%Y-%m-%d %H:%M} UTC"


def _users(uids: Collection[int]) -> str:
    return ", ".join(f"uid {uid}" for uid in sorted(uids))
