"""Identities and pins: what is made, what is read back, what is refused."""

import base64
import datetime
import hashlib
import subprocess
import sys
from datetime import UTC, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from stunnel_mgr.errors import TunnelError
from stunnel_mgr.identity import CLOCK_SKEW, LIFETIME, load_identity, make_identity
from stunnel_mgr.pins import pin_from_der, pins_from_pem

NOW = datetime.datetime(2026, 3, 1, 12, tzinfo=UTC)
GIVEN = make_identity("slappart0", now=NOW)
DER = base64.b64decode(GIVEN.certificate_der_base64)


def certificate(key, *, common_name="w", issuer="w", signer=None, kind=hashes.SHA256, now=NOW):
    def name(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    return (
        x509.CertificateBuilder()
        .subject_name(name(common_name))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=30))
        .sign(signer or key, kind and kind())
    )


def pem_of(key):
    return key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def test_made():
    loaded = x509.load_pem_x509_certificate(GIVEN.certificate_pem)
    names = {one.oid: one.value for one in loaded.subject}
    assert loaded.subject == loaded.issuer
    assert names.pop(NameOID.COMMON_NAME) == "slappart0"
    # by which alone stunnel's log tells two partitions of one name apart
    identifier = x509.SubjectKeyIdentifier.from_public_key(loaded.public_key())
    assert names == {NameOID.SERIAL_NUMBER: identifier.digest.hex()}
    assert loaded.public_bytes(Encoding.DER) == DER
    assert GIVEN.fingerprint == "sha256:" + hashlib.sha256(DER).hexdigest()
    assert GIVEN.not_before == NOW - CLOCK_SKEW
    assert GIVEN.not_after == NOW + LIFETIME
    assert isinstance(loaded.public_key(), ec.EllipticCurvePublicKey)
    assert loaded.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert make_identity("slappart0", now=NOW).fingerprint != GIVEN.fingerprint


def test_the_key_is_not_shown():
    assert "PRIVATE" in GIVEN.key_pem.decode()
    assert "PRIVATE" not in repr(GIVEN)


def test_read_back():
    assert load_identity(GIVEN.certificate_pem, GIVEN.key_pem) == GIVEN


def test_the_pair_of_a_master():
    authority, key = ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)
    leaf = certificate(key, common_name="instance", issuer="ca", signer=authority)
    chain = leaf.public_bytes(Encoding.PEM) + certificate(authority, common_name="ca").public_bytes(
        Encoding.PEM
    )
    identity = load_identity(chain, pem_of(key))
    assert identity.certificate_pem == chain
    assert identity.fingerprint == "sha256:" + leaf.fingerprint(hashes.SHA256()).hex()


OTHER = make_identity("slappart0", now=NOW)
ENCRYPTED = ec.generate_private_key(ec.SECP256R1()).private_bytes(
    Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
)


@pytest.mark.parametrize(
    ("cert", "key", "reason"),
    [
        (GIVEN.certificate_pem, OTHER.key_pem, "does not belong"),
        (GIVEN.certificate_pem, pem_of(ed25519.Ed25519PrivateKey.generate()), "does not belong"),
        (b"", GIVEN.key_pem, "certificate is damaged"),
        (GIVEN.certificate_pem[:-40], GIVEN.key_pem, "certificate is damaged"),
        (GIVEN.certificate_pem, b"", "key is damaged"),
        (GIVEN.certificate_pem, GIVEN.key_pem[:60], "key is damaged"),
        (GIVEN.certificate_pem, ENCRYPTED, "encrypted"),
        (GIVEN.certificate_pem * 200, GIVEN.key_pem, "more than"),
    ],
)
def test_not_read_back(cert, key, reason):
    with pytest.raises(TunnelError, match=reason) as caught:
        load_identity(cert, key)
    assert caught.value.code == "tunnel.identity"


@pytest.mark.parametrize("partition", ["", "x" * 65, "a\nb", "ä", "../x"])
def test_bad_partition(partition):
    with pytest.raises(TunnelError, match="cannot be named"):
        make_identity(partition)


def test_bad_lifetime():
    with pytest.raises(TunnelError, match="lifetime"):
        make_identity("slappart0", lifetime=timedelta(0))


def test_expired_pins_are_flagged():
    pin = pin_from_der(DER)
    assert not pin.expired(NOW)
    assert not pin.expired(NOW + LIFETIME)
    assert pin.expired(NOW + LIFETIME + timedelta(seconds=1))


def test_several_pins_in_a_file():
    data = b"# mine\n" + GIVEN.certificate_pem.replace(b"\n", b"\r\n") + GIVEN.key_pem + OTHER.certificate_pem
    assert [pin.fingerprint for pin in pins_from_pem(data)] == [GIVEN.fingerprint, OTHER.fingerprint]
    assert all("PRIVATE" not in pin.pem for pin in pins_from_pem(data))


WEAK = rsa.generate_private_key(65537, 1024)  # noqa: S505 (it is the weak one that must be refused)


@pytest.mark.parametrize(
    ("key", "kind", "reason"),
    [
        (WEAK, hashes.SHA256, "RSA of 1024 bits"),
        (dsa.generate_private_key(2048), hashes.SHA256, "another kind"),
        (ec.generate_private_key(ec.SECP256K1()), hashes.SHA256, "secp256k1"),
        (ec.generate_private_key(ec.SECP192R1()), hashes.SHA256, "secp192r1"),
    ],
    ids=["rsa1024", "dsa", "secp256k1", "secp192r1"],
)
def test_keys_that_tls_would_not_take(key, kind, reason):
    with pytest.raises(ValueError, match=reason):
        pin_from_der(certificate(key, kind=kind).public_bytes(Encoding.DER))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (rsa.generate_private_key(65537, 2048), hashes.SHA256),
        (ed25519.Ed25519PrivateKey.generate(), None),
        (ec.generate_private_key(ec.SECP384R1()), hashes.SHA384),
    ],
    ids=["rsa2048", "ed25519", "p384"],
)
def test_other_keys_that_it_takes(key, kind):
    assert pin_from_der(certificate(key, kind=kind).public_bytes(Encoding.DER)).expired(
        NOW + timedelta(days=31)
    )


def test_a_name_that_openssl_does_not_read():
    """BMPString of an odd length: OpenSSL (and stunnel) refuses it; cryptography 50 does, 41 need not."""
    der = bytearray(
        certificate(ec.generate_private_key(ec.SECP256R1()), common_name="abc").public_bytes(Encoding.DER)
    )
    at = der.index(b"\x0c\x03abc")
    der[at] = 0x1E
    with pytest.raises(ValueError, match=r"does not load|not a readable"):
        pin_from_der(bytes(der))


@settings(database=None, deadline=None, max_examples=400)
@given(st.integers(0, len(DER) - 1), st.integers(1, 255), st.integers(0, 3))
def test_damaged_certificates(place, change, cut):
    """Whatever bytes come, it is a pin or a ValueError."""
    damaged = bytearray(DER[: len(DER) - cut])
    damaged[min(place, len(damaged) - 1)] ^= change
    try:
        pin = pin_from_der(bytes(damaged))
    except ValueError:
        return
    assert pin.fingerprint != GIVEN.fingerprint


def test_the_package_loads_no_cryptography():
    code = (
        "import sys, stunnel_mgr, stunnel_mgr.conflicts, stunnel_mgr.render, stunnel_mgr.verdict, "
        "stunnel_mgr.validity; sys.exit('cryptography' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
