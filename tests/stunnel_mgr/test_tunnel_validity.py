"""From when until when a certificate is valid, read by hand and by a library; and which of two is shown."""

import base64
import random
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from stunnel_mgr.errors import TunnelError
from stunnel_mgr.identity import LIFETIME, make_identity
from stunnel_mgr.validity import CLOCK_SKEW, RENEWED_BEFORE, Validity, read_validity, shown_first

NOW = datetime(2026, 11, 23, 7, tzinfo=UTC)
MADE = make_identity("slappart0", now=NOW)
DER = base64.b64decode(MADE.certificate_der_base64)


def certificate(start, end, *, names=1, key=None):
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "u" * 60)] * names)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (datetime(1950, 1, 1, tzinfo=UTC), datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (
            datetime(1999, 12, 31, tzinfo=UTC),
            datetime(2050, 1, 1, tzinfo=UTC),
        ),  # a GeneralizedTime from here on
        (datetime(2051, 2, 28, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
@pytest.mark.parametrize("names", [0, 1, 8])  # lengths of one, two and three bytes
def test_the_library_reads_the_same(start, end, names):
    der = certificate(start, end, names=names)
    assert read_validity(der) == Validity(start, end)
    library = x509.load_der_x509_certificate(der)
    assert (library.not_valid_before_utc, library.not_valid_after_utc) == (start, end)


def test_a_large_key():
    der = certificate(NOW, NOW + LIFETIME, key=rsa.generate_private_key(65537, 2048))
    assert read_validity(der) == Validity(NOW, NOW + LIFETIME)


def test_damaged():
    """Whatever is done to it: an answer or the error of the family, and nothing else."""
    pick = random.Random(5)  # noqa: S311 (a pattern, not a secret)
    codes = set()
    for length in range(len(DER)):
        with pytest.raises(TunnelError, match="damaged"):
            read_validity(DER[:length])
    for _ in range(5000):
        damaged = bytearray(DER)
        damaged[pick.randrange(len(DER))] = pick.randrange(256)
        try:
            read_validity(bytes(damaged))
        except TunnelError as error:
            codes.add(error.code)
    assert codes == {"tunnel.identity"}


def test_a_successor_is_due():
    valid = read_validity(DER)
    assert valid == Validity(NOW - CLOCK_SKEW, NOW + LIFETIME)
    assert valid.renewal == NOW + LIFETIME - RENEWED_BEFORE
    short = Validity(NOW, NOW + timedelta(days=9))
    assert short.renewal == NOW + timedelta(days=6)


def test_the_old_one_is_shown_until_halfway():
    old = Validity(NOW - CLOCK_SKEW, NOW + LIFETIME)
    made = NOW + LIFETIME - RENEWED_BEFORE
    new = Validity(made - CLOCK_SKEW, made + LIFETIME)
    halfway = made + RENEWED_BEFORE / 2
    second = timedelta(seconds=1)
    assert [shown_first(old, new, at) for at in (made, halfway - second, halfway, old.not_after)] == [
        True,
        True,
        False,
        False,
    ]
    # made only when the old one had ended: no time is left to wait
    late = Validity(old.not_after, old.not_after + LIFETIME)
    assert not shown_first(old, late, old.not_after + second)
