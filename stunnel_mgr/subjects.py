"""The subject of a certificate, in the very text that stunnel's log has for it.

It is the only thing by which the log tells whose session is whose, and OpenSSL's way of escaping, quoting and
converting is its own; so OpenSSL itself prints it, with the flags that stunnel gives it (``X509_NAME2text``
in verify.c, the same in 5.68 and 5.75). There is no second way: a text that is only nearly the same would
leave a revoked peer its session. Different subjects may have one text (of different string types, or alike in
what the log does not cut off).
"""

import ctypes
import ssl
from ctypes import POINTER, byref, c_char_p, c_int, c_long, c_ulong, c_void_p
from functools import cache, lru_cache

from .errors import TunnelError
from .pins import MAX_DER
from .session_log import logged_subject

LIBRARY = "libcrypto.so.3"

# XN_FLAG_ONELINE & ~ASN1_STRFLGS_ESC_MSB & ~XN_FLAG_SPC_EQ of openssl/x509.h and asn1.h: ESC_2253 | ESC_CTRL |
# ESC_QUOTE | UTF8_CONVERT | DUMP_UNKNOWN | DUMP_DER | SEP_CPLUS_SPC.
_FLAGS = 0x1 | 0x2 | 0x8 | 0x10 | 0x100 | 0x200 | 2 << 16
_BIO_CTRL_PENDING = 10
_BEGIN, _END = ssl.PEM_HEADER, ssl.PEM_FOOTER


@lru_cache(maxsize=4096)
def subject_of_der(der: bytes) -> str:
    """Give the subject as it is logged, what the log cuts off included (``session_log.logged_subject``).

    Raises ValueError for what is no certificate, TunnelError ``tunnel.openssl`` where OpenSSL 3 is missing or
    out of memory.
    """
    if len(der) > MAX_DER:
        raise ValueError(f"the certificate has {len(der)} bytes; allowed: {MAX_DER}")
    openssl = _openssl()
    start = c_char_p(der)
    rest = ctypes.cast(start, c_void_p)
    certificate = openssl.d2i_X509(None, byref(rest), len(der))
    try:
        used = (rest.value or 0) - (ctypes.cast(start, c_void_p).value or 0)
        if not certificate or used != len(der):
            raise ValueError("this is not a readable X.509 certificate")
        return logged_subject(_print(openssl, openssl.X509_get_subject_name(certificate)))
    finally:
        openssl.X509_free(certificate)  # takes NULL as well
        openssl.ERR_clear_error()  # Python's own ssl reads the same list, of this thread


def subject_of_pem(pem: str) -> str:
    """Give the subject of the first certificate of ``pem``. Raises as :func:`subject_of_der`."""
    _before, _begin, rest = pem.partition(_BEGIN)
    body, end, _after = rest.partition(_END)
    if not end:
        raise ValueError("this is no PEM certificate")
    return subject_of_der(ssl.PEM_cert_to_DER_cert(f"{_BEGIN}{body}{_END}"))


def _print(openssl: ctypes.CDLL, name: int) -> bytes:
    memory = openssl.BIO_new(openssl.BIO_s_mem())
    if not memory:
        raise TunnelError("tunnel.openssl", "OpenSSL is out of memory", retryable=True)
    try:
        openssl.X509_NAME_print_ex(memory, name, 0, _FLAGS)  # stunnel does not ask how it went either
        length = openssl.BIO_ctrl(memory, _BIO_CTRL_PENDING, 0, None)
        buffer = ctypes.create_string_buffer(length + 1)
        if openssl.BIO_read(memory, buffer, length) < 0:
            return b"BIO_read() failed"  # what stunnel logs of an empty subject (5.68, measured)
        return buffer.value  # up to the first NUL, as C has it
    finally:
        openssl.BIO_free(memory)


@cache
def _openssl() -> ctypes.CDLL:
    """Load the library that Debian's stunnel uses, and Python's ssl with it."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        message = f"{LIBRARY} cannot be loaded: {error}"
        raise TunnelError("tunnel.openssl", message, hint="apt install libssl3") from error
    for name, result, arguments in (
        ("d2i_X509", c_void_p, (c_void_p, POINTER(c_void_p), c_long)),
        ("X509_get_subject_name", c_void_p, (c_void_p,)),
        ("X509_free", None, (c_void_p,)),
        ("X509_NAME_print_ex", c_int, (c_void_p, c_void_p, c_int, c_ulong)),
        ("BIO_s_mem", c_void_p, ()),
        ("BIO_new", c_void_p, (c_void_p,)),
        ("BIO_ctrl", c_long, (c_void_p, c_int, c_long, c_void_p)),
        ("BIO_read", c_int, (c_void_p, c_char_p, c_int)),
        ("BIO_free", c_int, (c_void_p,)),
        ("ERR_clear_error", None, ()),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
