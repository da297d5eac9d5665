"""Certificates for tunnels, right ones and ones that look right."""

import base64
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from stunnel_mgr.identity import make_identity


@dataclass(frozen=True)
class Pair:
    """A certificate and its key; ``above`` is who issued it, where somebody else did, and is shown along."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    above: tuple[x509.Certificate, ...] = ()

    @property
    def pem(self):
        """All of it as one PEM."""
        parts = [one.public_bytes(Encoding.PEM) for one in (self.certificate, *self.above)]
        plain = serialization.NoEncryption()
        parts.append(self.key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
        return b"".join(parts).decode()

    @property
    def pin(self):
        """As it is written into a declaration."""
        return f"cert:{base64.b64encode(self.certificate.public_bytes(Encoding.DER)).decode()}"


def new(name, **when):
    """An identity as partitiond makes them."""
    made = make_identity(name, **when)
    key = serialization.load_pem_private_key(made.key_pem, password=None)
    return Pair(x509.load_pem_x509_certificate(made.certificate_pem), key)


def expired(name):
    """One that ran out a week ago."""
    return new(name, now=datetime.now(UTC) - timedelta(days=8), lifetime=timedelta(days=1))


def _like(pair, key, *, signer, issuer, serial, subject=None):
    """The same as another but for some parts."""
    old = pair.certificate
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject or old.subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(old.not_valid_after_utc)
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    return builder.sign(signer, hashes.SHA256())


def same_subject(pair):
    """Another key in the name of somebody, self-signed."""
    key, name = ec.generate_private_key(ec.SECP256R1()), pair.certificate.subject
    return Pair(_like(pair, key, signer=key, issuer=name, serial=x509.random_serial_number()), key)


def look_alike(pair):
    """Another key, and everything else the same to the letter, also the serial number, the dates and the extensions."""
    key, old = ec.generate_private_key(ec.SECP256R1()), pair.certificate
    return Pair(_like(pair, key, signer=key, issuer=old.subject, serial=old.serial_number), key)


def issued_by(pair, name):
    """What the holder of a certificate issues as if it were an authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    made = _like(
        pair,
        key,
        signer=pair.key,
        issuer=pair.certificate.subject,
        serial=x509.random_serial_number(),
        subject=x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]),
    )
    return Pair(made, key, above=(pair.certificate,))
