"""RSA keys as tinc 1.0 reads and writes them, made and checked without tincd.

A private key is the PEM of PKCS #1 (``PEM_read_RSAPrivateKey`` in net_setup.c of 1.0.36, which reads PKCS #8, too), a public
one lies in the host file as ``RSA PUBLIC KEY`` (PKCS #1) or ``PUBLIC KEY``; ``tincd -K`` writes the first of each.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from netplan.errors import NetplanError

BITS = 3072
"""Of a key that is made: good for 128 bits, as the session's cipher is; it is used once for each connection."""

LEAST_BITS, MOST_BITS = 2048, 8192
"""What is taken: tinc has room for the hexadecimal digits of 8192 bits in a request (``MAXBUFSIZE`` in net.h)."""

_PEM = serialization.Encoding.PEM
_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\n[A-Za-z0-9+/=\n]+-----END \1-----\n?")


def make(bits: int = BITS) -> str:
    """Make a private key, as PEM."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=bits)
    kind = serialization.PrivateFormat.TraditionalOpenSSL
    return key.private_bytes(_PEM, kind, serialization.NoEncryption()).decode("ascii")


@lru_cache(maxsize=16)
def public_of(private: str, resource: str = "mesh/key") -> str:
    """Return the public key (PEM, ``RSA PUBLIC KEY``) of a private one. Raises NetplanError ``mesh.key``."""
    try:
        key = serialization.load_pem_private_key(private.encode("ascii"), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise refused("is no private key that can be read", resource) from error
    if not isinstance(key, rsa.RSAPrivateKey):
        raise refused("is no RSA key", resource)
    _check_size(key.key_size, resource)
    return _render(key.public_key())


@lru_cache(maxsize=4096)
def read_public(pem: str, resource: str) -> str:
    """Check a public key and return it as ``RSA PUBLIC KEY``. Raises NetplanError ``mesh.key``."""
    found = _BLOCK.fullmatch(pem)
    if found is None:
        raise refused("has a public key that is cut off or damaged", resource)
    if found[1] not in ("RSA PUBLIC KEY", "PUBLIC KEY"):
        raise refused(f"has {found[1]}, but a public RSA key is wanted", resource)
    try:
        key = serialization.load_pem_public_key(pem.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise refused("has a public key that cannot be read", resource) from error
    if not isinstance(key, rsa.RSAPublicKey):
        raise refused("has a public key of another kind than RSA", resource)
    _check_size(key.key_size, resource)
    return _render(key)


def fingerprint(public: str) -> str:
    """``sha256:`` and 64 hexadecimal digits, of the key's DER (PKCS #1)."""
    key = serialization.load_pem_public_key(public.encode("ascii"))
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.PKCS1)
    return f"sha256:{hashlib.sha256(der).hexdigest()}"


def _render(key: rsa.RSAPublicKey) -> str:
    return key.public_bytes(_PEM, serialization.PublicFormat.PKCS1).decode("ascii")


def _check_size(bits: int, resource: str) -> None:
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise refused(
            f"has a key of {bits} bits, allowed are {LEAST_BITS} to {MOST_BITS}",
            resource,
            "make another one on that node, and export anew",
        )


def refused(message: str, resource: str, hint: str = "export the block anew on that node") -> NetplanError:
    """The error of a key that is not taken."""
    return NetplanError("mesh.key", message, resource=resource, hint=hint)
