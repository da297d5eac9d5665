"""Who a partition is to its tunnels: a self-signed certificate, made on the node without any authority.

The other side pins exactly this certificate (stunnel with ``verifyPeer`` takes a self-signed one only when it is
itself among the pins, 5.68, measured), so nothing in it has to be believed: neither issuer nor names. The subject
has a serial number made of the key: stunnel's log tells whose a session is by nothing but the subject, and there
is a ``slappart3`` on every node. P-256 because it is
the fastest in stunnel of what is supported everywhere (facts/stunnel.md 1.3).
"""

import base64
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .errors import TunnelError
from .pins import fingerprint
from .validity import CLOCK_SKEW

LIFETIME = timedelta(days=1095)
"""Three years: a pin is taken back by removing it from the allow list, not by waiting, and each renewal asks all
peers to follow. The partition's end replaces the identity anyway.
"""

MAX_FILE = 64 * 1024
"""Longest certificate or key file that is looked at, in bytes."""

_PARTITION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate (with its chain, where a master gave one) and its key, as PEM; the rest describes the
    certificate.

    ``fingerprint`` is ``sha256:`` and 64 lower-case hex digits of the DER, ``certificate_der_base64`` what
    goes behind ``cert:`` in a declaration of the other side. Times are aware, in UTC. The key is kept out of
    ``repr``.
    """

    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    fingerprint: str
    certificate_der_base64: str
    not_before: datetime
    not_after: datetime


def make_identity(partition: str, *, now: datetime | None = None, lifetime: timedelta = LIFETIME) -> Identity:
    """Make a new identity: P-256, subject ``CN=<partition>`` and a serial number of the key's, random serial
    number, valid for ``lifetime`` from ``now``.

    ``now`` is aware; the clock is asked by default. Raises TunnelError ``tunnel.identity`` for a name that
    cannot be a common name (X.520 allows 64 characters) or a lifetime that is not positive.
    """
    if not _PARTITION.fullmatch(partition):
        raise TunnelError(
            "tunnel.identity", f"{partition!a} cannot be named in a certificate", resource=partition
        )
    if lifetime <= timedelta(0):
        raise TunnelError("tunnel.identity", f"a lifetime of {lifetime} is none", resource=partition)
    start = now or datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _template(partition, key.public_key(), start, lifetime).sign(key, hashes.SHA256())
    key_pem = key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return _describe((certificate,), key_pem)


def load_identity(cert_pem: bytes, key_pem: bytes) -> Identity:
    """Read an identity back, or the pair that the master gave (a chain is kept, its first certificate is the
    identity).

    Raises TunnelError ``tunnel.identity`` when one of the two is damaged, too long, encrypted, or when they
    do not belong together. An identity that has run out is loaded: see ``not_after``.
    """
    if len(cert_pem) > MAX_FILE or len(key_pem) > MAX_FILE:
        raise TunnelError("tunnel.identity", f"the certificate or the key has more than {MAX_FILE} bytes")
    # Warning: under ``-W error`` cryptography raises what it only warns of otherwise. TypeError: the key is
    # encrypted.
    unreadable = (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm, Warning)
    try:
        chain = tuple(x509.load_pem_x509_certificates(cert_pem))
        public = chain[0].public_key()
    except unreadable as error:
        raise TunnelError("tunnel.identity", "the certificate is damaged") from error
    try:
        # What comes from a tenant may be an RSA key whose primes take hours to prove, with the interpreter's lock
        # held: that the two belong together is all that is asked here, and stunnel tries them.
        key = serialization.load_pem_private_key(key_pem, password=None, unsafe_skip_rsa_key_validation=True)
    except unreadable as error:
        raise TunnelError("tunnel.identity", "the key is damaged or encrypted") from error
    # Public keys of different kinds compare unequal; comparing beats a test signature, which not every kind
    # can make.
    if key.public_key() != public:
        raise TunnelError("tunnel.identity", "the key does not belong to the certificate")
    return _describe(chain, key_pem)


def _template(
    partition: str, public_key: ec.EllipticCurvePublicKey, start: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    identifier = x509.SubjectKeyIdentifier.from_public_key(public_key)
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, partition),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, identifier.digest.hex()),
        ]
    )
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    both_sides = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    # By the authority key identifier OpenSSL tells apart pins of one subject (partitions of one name on two nodes).
    # Without it only the first of them is looked at, and the others are of an unknown authority (3.0, measured).
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key)
    # No subjectAltName: stunnel compares no host name under verifyPeer, and an address in it would outlive
    # renumbering.
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCK_SKEW)
        .not_valid_after(start + lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage(both_sides), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(authority, critical=False)
    )


def _describe(chain: tuple[x509.Certificate, ...], key_pem: bytes) -> Identity:
    der = chain[0].public_bytes(Encoding.DER)
    return Identity(
        certificate_pem=b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain),
        key_pem=key_pem,
        fingerprint=fingerprint(der),
        certificate_der_base64=base64.b64encode(der).decode("ascii"),
        not_before=chain[0].not_valid_before_utc,
        not_after=chain[0].not_valid_after_utc,
    )
