"""One TLS connection to somebody who may be anybody: how far it came, what was shown, and whether it was let stand.

Promises: an end, whatever the other side does (each step has a deadline, and a byte is read at most); nothing is
sent but the handshake. What it cannot bound is a side that sends session tickets without end, as OpenSSL reads
them within one call: whoever probes strangers does so in a process that can be ended.
"""

import socket
import ssl
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from .errors import TunnelError
from .model import Endpoint, IPAddress

GRACE = 0.5
"""Seconds in which a server that refuses has said so: with TLS 1.3 the client's handshake ends before it is
judged, and refusals came after 0 to 18 ms (facts/stunnel.md 3).
"""
_GRACE_PER_HANDSHAKE = 4
"""How often the time of the handshake comes on top of that: for those far away or busy."""

CUT = (ConnectionResetError, BrokenPipeError)
"""What ``connect`` raises where somebody accepted and cut before it could return (tcp_reset() in the kernel's
net/ipv4/tcp_input.c; where nobody is there it is ECONNREFUSED).
"""

How = Literal["unreachable", "no_tls", "refused", "closed", "stands"]


@dataclass(frozen=True, slots=True)
class Pair:
    """The files of a certificate and its key, PEM."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Contact:
    """How it went.

    ``unreachable``: no TCP connection; ``nobody`` says that the port answered that nobody is there. ``no_tls``:
    no TLS 1.3 handshake came about; ``silent`` says that the time was over. ``refused``: it ended with an alert
    after the handshake, which is how certificates are refused. ``closed``: it ended without one. ``stands``: it
    was open when the grace was over, or the other side spoke. ``peer`` is the fingerprint of what was shown.
    ``seconds`` were needed to get through the handshake.
    """

    how: How
    detail: str = ""
    peer: str | None = None
    seconds: float = 0.0
    nobody: bool = False
    silent: bool = False


def grace(seconds: float, timeout: float) -> float:
    """How long to wait for a refusal where getting through the handshake took ``seconds``."""
    return min(GRACE + _GRACE_PER_HANDSHAKE * seconds, max(timeout, GRACE))


def speak(
    endpoint: Endpoint,
    *,
    timeout: float,
    source: IPAddress | None = None,
    identity: Pair | None = None,
    must_end: bool = False,
) -> Contact:
    """Connect, shake hands and see whether the connection is let stand.

    ``timeout`` is for each of connecting and shaking hands. With ``must_end`` the refusal is waited for as long,
    and not only for the grace. Raises TunnelError ``tunnel.identity`` when the files cannot be used.
    """
    context = _context(identity)
    begin = time.monotonic()
    try:
        plain = connect(endpoint, source=source, timeout=timeout)
    except CUT as error:
        return Contact("no_tls", text(error))
    except OSError as error:
        nobody = isinstance(error, ConnectionRefusedError)
        return Contact("unreachable", text(error), nobody=nobody)
    with plain:
        try:
            tls = context.wrap_socket(plain)
        except OSError as error:  # of which ssl.SSLError is one
            return Contact("no_tls", text(error), silent=isinstance(error, TimeoutError))
        with tls:
            seconds = time.monotonic() - begin
            peer = "sha256:" + sha256(tls.getpeercert(binary_form=True) or b"").hexdigest()
            tls.settimeout(timeout if must_end else grace(seconds, timeout))
            how, detail = _wait(tls)
            return Contact(how, detail, peer, seconds)


def _context(identity: Pair | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the caller compares fingerprints: pins stand in for authorities
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if identity is not None:
        try:
            context.load_cert_chain(identity.certificate, identity.key)
        except OSError as error:
            message = f"{identity.certificate} and {identity.key} cannot be used: {text(error)}"
            raise TunnelError("tunnel.identity", message, resource=str(identity.certificate)) from error
    return context


def _wait(tls: ssl.SSLSocket) -> tuple[How, str]:
    """See whether the connection is let stand; a service that greets first counts as letting it."""
    try:
        return ("stands", "") if tls.recv(1) else ("closed", "it hung up")
    except TimeoutError:
        return "stands", ""
    except ssl.SSLError as error:
        return "refused" if "ALERT" in (error.reason or "") else "closed", text(error)
    except OSError as error:
        return "closed", text(error)


def connect(endpoint: Endpoint, *, timeout: float, source: IPAddress | None = None) -> socket.socket:
    """Connect by TCP from ``source``. Raises OSError.

    Not by ``socket.create_connection``: that loads a codec for names of hosts, which the short-lived process of
    another user need not be able to.
    """
    host, port = endpoint
    made = socket.socket(socket.AF_INET6 if host.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.settimeout(timeout)
        if source is not None:
            made.bind((str(source), 0))
        made.connect((str(host), port))
    except BaseException:
        made.close()
        raise
    return made


def text(error: OSError) -> str:
    """Say in people's words what the kernel or OpenSSL said."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLError) and error.reason:
        reason: str = error.reason
        # TLSV1_ALERT_UNKNOWN_CA
        before, alert, after = reason.partition("ALERT_")
        return ("the other side says: " + after if alert else before).replace("_", " ").lower()
    return str(error.strerror or error or type(error).__name__)
