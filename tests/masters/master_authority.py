"""The certificate authority of the strict master: who a certificate is, and whether its login is still active.

Keys are P-256, as they cost nothing to make. The subject is ``CN=<reference>`` (COMP-123, SOFTINST-42), and
like production's it is judged by what the authority issued, never by the subject alone.
"""

import datetime
import hashlib
import ipaddress
import ssl
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """PEM texts of a certificate and its key."""

    certificate: str
    key: str
    serial: int
    fingerprint: str

    def write(self, directory, name):
        """Write both; return the paths (certificate, key) as text."""
        paths = directory / f"{name}.crt", directory / f"{name}.key"
        for path, text in zip(paths, (self.certificate, self.key), strict=True):
            path.write_text(text)
            path.chmod(0o600)
        return tuple(map(str, paths))


class Authority:
    """Issues pairs and knows whose they are; ``revoke`` ends all logins of a reference."""

    def __init__(self, name="Authority of the test master"):
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example Operator"),
                x509.NameAttribute(NameOID.COMMON_NAME, name),
            ]
        )
        self._active = {}
        authority = x509.BasicConstraints(ca=True, path_length=0)
        made = self._builder(self._name, self._key, (-_DAY, 3650 * _DAY)).add_extension(
            authority, critical=True
        )
        self.certificate = _pem(made.sign(self._key, hashes.SHA256()))

    def _builder(self, name, key, validity):
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + validity[0])
            .not_valid_after(now + validity[1])
        )

    def server(self, *hosts, days=30.0):
        """Make a pair for a server at hosts, names or addresses."""
        names = [_general_name(host) for host in hosts]
        return self._make(hosts[0], x509.SubjectAlternativeName(names), days)

    def login(self, reference, days=30.0):
        """Make a pair with which ``reference`` may log in; ones of before stay active."""
        usage = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH])
        pair = self._make(reference, usage, days)
        self._active[pair.serial] = reference
        return pair

    def _make(self, common_name, extension, days):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        # one that has ended began some days before
        began = min(-_DAY, (days - 2) * _DAY)
        builder = self._builder(name, key, (began, days * _DAY)).add_extension(extension, critical=False)
        made = builder.sign(self._key, hashes.SHA256())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        der = made.public_bytes(serialization.Encoding.DER)
        fingerprint = f"sha256:{hashlib.sha256(der).hexdigest()}"
        return Pair(_pem(made), private.decode(), made.serial_number, fingerprint)

    def who(self, der):
        """Say whose active login a certificate is; None where it is nobody's."""
        return self._active.get(x509.load_der_x509_certificate(der).serial_number)

    def active(self, reference):
        """Whether ``reference`` has a login."""
        return reference in self._active.values()

    def revoke(self, reference):
        """End all logins of ``reference``."""
        self._active = {serial: who for serial, who in self._active.items() if who != reference}


def server_context(cert_file, key_file, client_authority=None):
    """TLS of a server; with an authority (PEM text) it takes nobody without a certificate of that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert_file, key_file)
    if client_authority is not None:
        context.load_verify_locations(cadata=client_authority)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _general_name(host):
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
