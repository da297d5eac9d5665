"""Whom we trust at the other end of TLS, and what an operator is told when we do not.

slapos.core never looked at its master's certificate, so the first thing that every operator with an authority
of its own sees of this package is the error made here: it says what the server showed and gives the line that
would accept it. What a certificate says of itself is a stranger's text: shown bounded and printable, never used.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from slap_client.errors import SlapError

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography import x509

FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_NAME_LENGTH = 120
_NAMES_SHOWN = 4
_PEM_LIMIT = 64 * 1024
# X509_V_ERR_* of openssl/x509_vfy.h
_OUT_OF_DATE = (9, 10)
_OTHER_HOST = (62, 64)


class UnpinnedError(ssl.SSLError):
    """The server has another certificate than the one that is pinned; ``der`` is what it showed."""

    def __init__(self, der: bytes) -> None:
        super().__init__("not the pinned certificate")
        self.der = der


@dataclass(frozen=True, slots=True)
class Shown:
    """What a server's certificate says, as it may be shown."""

    fingerprint: str
    subject: str = ""
    issuer: str = ""
    names: tuple[str, ...] = ()
    not_before: datetime | None = None
    not_after: datetime | None = None

    def __str__(self) -> str:
        parts = [f"a certificate of {self.subject or 'nobody by name'}"]
        if self.names:
            more = ", …" if len(self.names) > _NAMES_SHOWN else ""
            parts.append(f"for {', '.join(self.names[:_NAMES_SHOWN])}{more}")
        parts.append(
            "signed by itself" if self.issuer == self.subject else f"issued by {self.issuer or 'nobody'}"
        )
        if self.not_after is not None:
            parts.append(f"valid until {self.not_after:%Y-%m-%d}")
        return f"{', '.join(parts)}, fingerprint {self.fingerprint}"


def fingerprint(der: bytes) -> str:
    """Return the fingerprint of a certificate as configurations have it."""
    return f"sha256:{hashlib.sha256(der).hexdigest()}"


def read_shown(der: bytes) -> Shown:
    """Read what a certificate says; of one that can not be read, its fingerprint is left."""
    from cryptography import x509  # noqa: PLC0415 - slow to import, and for errors only

    mark = fingerprint(der)
    try:
        found = x509.load_der_x509_certificate(der)
        subject, issuer = _name(found.subject), _name(found.issuer)
        return Shown(
            mark, subject, issuer, _names(found), found.not_valid_before_utc, found.not_valid_after_utc
        )
    except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return Shown(mark, "an unreadable name", "an unreadable name")


def _name(name: x509.Name) -> str:
    return _shown(name.rfc4514_string())


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    from cryptography import x509  # noqa: PLC0415

    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    texts = [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]
    return tuple(_shown(text) for text in texts[: _NAMES_SHOWN + 1])


def _shown(text: str) -> str:
    clean = "".join(char if char.isprintable() else "\ufffd" for char in text[:_NAME_LENGTH])
    return f"{clean}…" if len(text) > _NAME_LENGTH else clean


def distrusted(
    error: ssl.SSLCertVerificationError, der: bytes | None, place: str, *, ca_file: str | None, resource: str
) -> SlapError:
    """Return the error for a server that no authority vouches for; ``der`` is what it showed, None where that is not known."""
    reason = error.verify_message or "it can not be verified"
    by = f" by master_ca_file {ca_file}" if ca_file else ""
    if der is None:
        return _tls(
            f"the master's certificate is not trusted{by}: {reason}",
            f"see what it shows: openssl s_client -connect {place}; then set master_ca_file in [slapos], or"
            " master_fingerprint in [partitiond]",
            resource,
        )
    shown = read_shown(der)
    pin = f"master_fingerprint = {shown.fingerprint}"
    if error.verify_code in _OUT_OF_DATE:
        hint = (
            f"check this node's clock, which says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, and have the certificate renewed;"
            f" to accept this very one meanwhile, put into [partitiond]: {pin}"
        )
    elif error.verify_code in _OTHER_HOST:
        named = f" ({', '.join(shown.names[:_NAMES_SHOWN])})" if shown.names else ""
        hint = (
            f"set master_url to a name that the certificate has{named}; or, if its operator confirms the fingerprint,"
            f" put into [partitiond]: {pin}"
        )
    else:
        hint = (
            "ask the master's operator for its fingerprint, by another way than this connection; if it is this one, put into"
            f" [partitiond]: {pin} — or, for an authority of your own, into [slapos]: master_ca_file = FILE.pem"
            " (slapos.core never verified its master, so neither was needed there)"
        )
    return _tls(
        f"the master's certificate is not trusted{by}: {reason}; {place} showed {shown}", hint, resource
    )


def unpinned(error: UnpinnedError, pin: str, place: str, resource: str) -> SlapError:
    """Return the error for a server that is not the pinned one."""
    shown = read_shown(error.der)
    return _tls(
        f"the master has another certificate than master_fingerprint = {pin}; {place} showed {shown}",
        "ask the master's operator whether it was renewed; if it was and the fingerprint is right, put into [partitiond]:"
        f" master_fingerprint = {shown.fingerprint} — else somebody stands between this node and the master",
        resource,
    )


def refused_pair(detail: str, cert: tuple[str, str] | None, resource: str) -> SlapError:
    """Return the error for a server that ended TLS because of our own certificate, or for want of one."""
    if cert is None:
        return _tls(
            f"the master wants a client certificate: {detail}",
            "set cert_file and key_file in [slapos]; partitiond register gets a pair",
            resource,
            unsent=False,
        )
    return _tls(
        f"the master does not take our certificate: {detail}; {own_certificate(cert[0])}",
        "get a pair that is valid and this computer's: partitiond register",
        resource,
        unsent=False,
    )


def check_pair(cert: tuple[str, str], resource: str) -> None:
    """Raise SlapError ``slap.tls`` when our own files are missing, unreadable, no PEM, or no pair."""
    for key, path in zip(("cert_file", "key_file"), cert, strict=True):
        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError as error:
            raise _own(f"{key} {path} can not be read: {error.strerror}", resource) from error
    try:
        # without a password OpenSSL would ask for that of an encrypted key on the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(*cert, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise _own(f"key_file {cert[1]} is not the key of cert_file {cert[0]}", resource) from error
        said = f"cert_file {cert[0]} is no certificate in PEM, or key_file {cert[1]} no unencrypted key"
        raise _own(said, resource) from error


def own_certificate(path: str | Path) -> str:
    """Say whose our certificate is and when it ends or ended."""
    from cryptography import x509  # noqa: PLC0415

    try:
        with open(path, "rb") as file:
            found = x509.load_pem_x509_certificate(file.read(_PEM_LIMIT))
    except (OSError, ValueError):
        return f"cert_file {path} can not be read"
    end = found.not_valid_after_utc
    ended = "ended" if end < datetime.now(UTC) else "ends"
    return f"cert_file {path} is of {_name(found.subject)} and {ended} on {end:%Y-%m-%d %H:%M} UTC"


def _no_password() -> bytes:
    raise ValueError("the key is encrypted")


def _own(message: str, resource: str) -> SlapError:
    hint = "correct cert_file and key_file in [slapos]; partitiond register gets a new pair"
    return _tls(message, hint, resource)


def _tls(message: str, hint: str, resource: str, *, unsent: bool = True) -> SlapError:
    return SlapError("slap.tls", message, resource=resource, hint=hint, unsent=unsent)
