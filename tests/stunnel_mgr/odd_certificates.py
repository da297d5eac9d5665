"""Certificates with any subject at all, such as ``cryptography`` does not make: DER put together by hand."""

import base64
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

_ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
CN, O, OU, SERIAL = "550403", "55040a", "55040b", "550405"  # noqa: E741 (the names of X.520)
EMAIL = "2a864886f70d010901"
UTF8, PRINTABLE, T61, IA5, BMP, UNIVERSAL, BITS = 0x0C, 0x13, 0x14, 0x16, 0x1E, 0x1C, 0x03


def der(tag, *parts):
    body = b"".join(parts)
    size = len(body)
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    length = bytes([size]) if size < 128 else bytes([0x80 + len(digits)]) + digits
    return bytes([tag]) + length + body


def attribute(oid, value, tag=UTF8):
    value = value.encode() if isinstance(value, str) else value
    return der(0x30, der(0x06, bytes.fromhex(oid)), der(tag, value))


def name(*rdns):
    """A subject of RDNs, each an attribute or a tuple of them."""
    sets = (rdn if isinstance(rdn, tuple) else (rdn,) for rdn in rdns)
    return der(0x30, *(der(0x31, *attributes) for attributes in sets))


def certificate(subject, *, start=None, days=10, key=None):
    """A self-signed certificate of ``subject`` (DER): its DER, and PEM with the key for OpenSSL."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    start = start or datetime.now(UTC) - timedelta(days=1)
    validity = (
        der(0x17, f"{moment:%y%m%d%H%M%S}Z".encode()) for moment in (start, start + timedelta(days=days))
    )
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    version, serial = b"\xa0\x03\x02\x01\x02", b"\x02\x01\x05"
    tbs = der(0x30, version, serial, _ECDSA_SHA256, subject, der(0x30, *validity), subject, public)
    whole = der(0x30, tbs, _ECDSA_SHA256, der(0x03, b"\0", key.sign(tbs, ec.ECDSA(hashes.SHA256()))))
    return whole, pem(whole), key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def pem(whole, kind="CERTIFICATE"):
    return f"-----BEGIN {kind}-----\n{base64.encodebytes(whole).decode()}-----END {kind}-----\n"


def borrowed_key(owner_public, key):
    """The key of somebody else in a file that claims ``owner_public``, as OpenSSL believes it."""
    point = owner_public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    secret = key.private_numbers().private_value.to_bytes(32, "big")
    curve = der(0xA0, bytes.fromhex("06082a8648ce3d030107"))
    whole = der(0x30, b"\x02\x01\x01", der(0x04, secret), curve, der(0xA1, der(0x03, b"\0" + point)))
    return pem(whole, "EC PRIVATE KEY")
