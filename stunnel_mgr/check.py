"""Whether a tunnel works, tried with a real TLS connection: stunnel itself tells nobody but its log.

The program behind a client's stunnel always sees its connection accepted and then cut, whether the other side
refused the certificate, is the wrong one, or is down (5.68, measured); so the check speaks TLS to the far end
itself. It is made for people who ask, one tunnel at a time: it blocks, for up to a few times ``timeout``.
"""

import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal

from .errors import TunnelError
from .model import Endpoint, IPAddress, Tunnel, format_endpoint

TIMEOUT = 5.0
"""Seconds for each of connecting and shaking hands."""
GRACE = 0.5
"""Seconds in which a server that refuses has said so: with TLS 1.3 the client's handshake ends before it is
judged, and refusals came after 0 to 18 ms (facts/stunnel.md 3), plus a round trip.
"""

Outcome = Literal["ok", "unreachable", "no_tls", "wrong_certificate", "refused", "closed", "backend"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What came of it.

    ``ok``; ``unreachable`` (no TCP connection); ``no_tls`` (what answers is no tunnel);
    ``wrong_certificate`` (not pinned, or its pin ran out); ``refused`` (it does not allow ours); ``closed``
    (it hung up without a reason: mostly its service is down); ``backend`` (the tunnel works, the service
    behind it does not answer). ``message`` is for people, ``peer`` the fingerprint that the other side
    showed.
    """

    outcome: Outcome
    message: str
    peer: str | None = None


@dataclass(frozen=True, slots=True)
class _Seen:
    """How a TLS connection went: ``ok`` (it stayed open), or how and why it ended."""

    outcome: Outcome
    detail: str = ""
    peer: str | None = None


def check_server(tunnel: Tunnel, *, fingerprint: str, timeout: float = TIMEOUT) -> CheckResult:
    """Check a tunnel of mode ``server`` from its own node; ``fingerprint`` is that of its identity.

    It shows no certificate, so a tunnel that works refuses it, after having shown the right one itself. Then
    the service behind is connected to and left at once.
    """
    where = format_endpoint(tunnel.listen)
    seen = _speak(tunnel.listen, None, None, timeout)
    if seen.outcome in ("unreachable", "no_tls"):
        return CheckResult(seen.outcome, f"{where}: {seen.detail}", seen.peer)
    if seen.peer != fingerprint:
        return CheckResult("wrong_certificate", f"{where} shows {seen.peer}, not {fingerprint}", seen.peer)
    if seen.outcome == "ok":
        return CheckResult("no_tls", f"{where} lets in who shows no certificate", seen.peer)
    try:
        _connect(tunnel.connect, None, timeout).close()
    except OSError as error:
        message = f"the service at {format_endpoint(tunnel.connect)} does not answer: {_text(error)}"
        return CheckResult("backend", message, seen.peer)
    return CheckResult("ok", f"{where} listens, and so does the service behind it", seen.peer)


def check_client(
    tunnel: Tunnel, *, certificate: Path, key: Path, now: datetime | None = None, timeout: float = TIMEOUT
) -> CheckResult:
    """Check a tunnel of mode ``client``: connect as its stunnel does, from the same address and with the same
    identity.

    ``certificate`` and ``key`` are the files of the identity (PEM), ``now`` is aware and the clock by
    default. Nothing is sent to the service at the other end. Raises TunnelError ``tunnel.identity`` when the
    files cannot be used.
    """
    where = format_endpoint(tunnel.connect)
    seen = _speak(tunnel.connect, tunnel.source_host, (certificate, key), timeout)
    if seen.outcome in ("unreachable", "no_tls"):
        return CheckResult(seen.outcome, f"{where}: {seen.detail}", seen.peer)
    pin = next((pin for pin in tunnel.pins if pin.fingerprint == seen.peer), None)
    if pin is None:
        return CheckResult("wrong_certificate", f"{where} shows {seen.peer}, which is not pinned", seen.peer)
    if pin.expired(now or datetime.now(UTC)):
        return CheckResult(
            "wrong_certificate", f"the certificate of {where} ran out on {pin.not_after}", seen.peer
        )
    if seen.outcome == "refused":
        return CheckResult("refused", f"{where} does not allow our certificate: {seen.detail}", seen.peer)
    if seen.outcome == "closed":
        return CheckResult("closed", f"{where} hung up: the service behind it may be down", seen.peer)
    return CheckResult("ok", f"{where} lets us in", seen.peer)


def _speak(
    endpoint: Endpoint, source: IPAddress | None, identity: tuple[Path, Path] | None, timeout: float
) -> _Seen:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the caller compares fingerprints: pins stand in for authorities
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if identity is not None:
        try:
            context.load_cert_chain(*identity)
        except OSError as error:  # of which ssl.SSLError is one
            message = f"{identity[0]} and {identity[1]} cannot be used: {_text(error)}"
            raise TunnelError("tunnel.identity", message, resource=str(identity[0])) from error
    try:
        plain = _connect(endpoint, source, timeout)
    except OSError as error:
        return _Seen("unreachable", _text(error))
    with plain:
        try:
            tls = context.wrap_socket(plain)
        except OSError as error:
            return _Seen("no_tls", _text(error))
        with tls:
            der = tls.getpeercert(binary_form=True) or b""
            return _wait(tls, "sha256:" + sha256(der).hexdigest())


def _wait(tls: ssl.SSLSocket, peer: str) -> _Seen:
    """See whether the server lets the connection stand; a service that greets first counts as letting it."""
    tls.settimeout(GRACE)
    try:
        return _Seen("ok" if tls.recv(1) else "closed", peer=peer)
    except TimeoutError:
        return _Seen("ok", peer=peer)
    except ssl.SSLError as error:
        return _Seen("refused" if "ALERT" in (error.reason or "") else "closed", _text(error), peer)
    except OSError as error:
        return _Seen("closed", _text(error), peer)


def _connect(endpoint: Endpoint, source: IPAddress | None, timeout: float) -> socket.socket:
    host, port = endpoint
    return socket.create_connection(
        (str(host), port), timeout=timeout, source_address=None if source is None else (str(source), 0)
    )


def _text(error: OSError) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return str(reason or error or type(error).__name__)
