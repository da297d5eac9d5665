"""Certificates that the other side of a tunnel may show: read, checked and encoded again by us.

What passes here is loaded by stunnel without fail: one certificate that OpenSSL cannot load would keep
*every* tunnel of the partition from starting, so beside the parser of ``cryptography`` the OpenSSL of this
interpreter must take it as well. Functions raise ValueError whose text is the reason; the declaration adds
file and line.
"""

import base64
import binascii
import hashlib
import re
import ssl
from collections.abc import Mapping
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from .model import MAX_PINS, Pin

MAX_DER = 16 * 1024
"""Longest certificate, in bytes; usual ones have 0.4 to 3 KB."""
MAX_PEM_FILE = 256 * 1024
"""Longest file of pins, in bytes."""

_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_MIN_RSA_BITS = 2048
_X509_ERRORS = (x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
_CERTIFICATE_BLOCK = re.compile(
    rb"-----BEGIN CERTIFICATE-----[\r\n]+[A-Za-z0-9+/=\r\n]+-----END CERTIFICATE-----"
)


class UnknownCertificateError(ValueError):
    """A fingerprint of no partition of this node."""


def fingerprint(der: bytes) -> str:
    """Name a certificate by the SHA-256 of its DER: ``sha256:`` and 64 lower-case hex digits."""
    return "sha256:" + hashlib.sha256(der).hexdigest()


def pin_from_base64(text: str) -> Pin:
    """Read ``cert:`` pins: strict base64 of the DER, in one piece. Raises ValueError."""
    if len(text) > 4 * (MAX_DER // 3 + 1):
        raise ValueError(f"the certificate has {len(text)} characters of base64; allowed: {MAX_DER} bytes")
    try:
        der = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("this is not base64; allowed: the base64 of the DER, in one piece") from error
    return pin_from_der(der)


def pins_from_pem(data: bytes) -> tuple[Pin, ...]:
    """Read a PEM file of one or more certificates; text between them is passed over. Raises ValueError."""
    if len(data) > MAX_PEM_FILE:
        raise ValueError(f"the file has more than {MAX_PEM_FILE} bytes")
    blocks = _CERTIFICATE_BLOCK.findall(data)
    if len(blocks) != data.count(b"-----BEGIN CERTIFICATE-----"):
        raise ValueError("the file has a damaged PEM certificate")
    if not blocks:
        raise ValueError("the file has no PEM certificate")
    if len(blocks) > MAX_PINS:
        raise ValueError(f"the file has {len(blocks)} certificates; allowed: at most {MAX_PINS}")
    return tuple(pin_from_der(_pem_to_der(block)) for block in blocks)


def pins_from_fingerprint(text: str, local_certificates: Mapping[str, str]) -> tuple[Pin, ...]:
    """Look a ``sha256:`` pin up among the partitions of this node: all that its partition shows now or next.
    Raises ValueError, and UnknownCertificateError, which is one.
    """
    if not _FINGERPRINT.fullmatch(text):
        raise ValueError("allowed after sha256: are 64 lower-case hex digits")
    pem = local_certificates.get(text)
    if pem is None:
        raise UnknownCertificateError(
            "no partition of this node has that certificate; give one of another node as cert: or file:"
        )
    return pins_from_pem(pem.encode())


@lru_cache(maxsize=1024)
def pin_from_der(der: bytes) -> Pin:
    """Check one certificate and make the pin of it; what was checked before is remembered. Raises ValueError."""
    if len(der) > MAX_DER:
        raise ValueError(f"the certificate has {len(der)} bytes; allowed: {MAX_DER}")
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        not_after = certificate.not_valid_after_utc
        pem = certificate.public_bytes(Encoding.PEM).decode("ascii")
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm, Warning) as error:
        # Warning: under ``-W error``, what later versions of cryptography will refuse is refused now.
        raise ValueError("this is not a readable X.509 certificate") from error
    if reason := _unusable(key):
        raise ValueError(
            f"its key is {reason}; allowed: RSA of 2048 bits or more, P-256, P-384, P-521, Ed25519, Ed448"
        )
    _load_like_stunnel(pem)
    return Pin(fingerprint(der), pem, not_after, *_marks(certificate))


def _marks(certificate: x509.Certificate) -> tuple[str, bool]:
    """Its subject, and whether OpenSSL can tell it from others of that subject. What cannot be read tells nothing."""
    try:
        subject = certificate.subject.rfc4514_string()
        if certificate.subject != certificate.issuer:
            return subject, True
        found = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    except x509.ExtensionNotFound:
        return subject, False
    except (ValueError, *_X509_ERRORS, UnsupportedAlgorithm, Warning):
        return "", True
    return subject, found.value.key_identifier is not None


def _pem_to_der(block: bytes) -> bytes:
    try:
        return base64.b64decode(b"".join(block.split(b"-----")[2].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("the file has a damaged PEM certificate") from error


def _unusable(key: object) -> str:
    """Why no peer can show this key in TLS 1.3 at stunnel's security level 2 (measured); "" if it can."""
    if isinstance(key, rsa.RSAPublicKey):
        return "" if key.key_size >= _MIN_RSA_BITS else f"RSA of {key.key_size} bits"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return "" if key.curve.name in _CURVES else f"of the curve {key.curve.name}"
    if isinstance(key, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)):
        return ""
    return f"of another kind ({type(key).__name__})"


def _load_like_stunnel(pem: str) -> None:
    """Load the certificate as stunnel does with ``CAfile``; ``cryptography`` and OpenSSL need not agree."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError) as error:
        raise ValueError("OpenSSL does not load this certificate") from error
