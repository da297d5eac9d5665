"""From what HTTP libraries raise and servers answer to SlapError, in one place so that codes keep meaning.

The codes follow the reference client where it has some (SLAP classic, slapos.core 1.26: 404 not found, 408
not ready, 5xx server error); it leaves other answers raw.
"""

import email.utils
import re
import ssl
import time
from collections.abc import Iterator
from datetime import UTC

import requests
import urllib3

from slap_client.errors import SlapError

LONGEST_WAIT = 3600.0
_SENTENCE = 200
STILL_ACTIVE = "Certificate still active."


def sentence(body: bytes) -> str:
    """Return the beginning of an answer as one printable line: a reason that a person can read."""
    text = body.decode("utf-8", "replace")
    if text.lstrip().startswith("<"):
        text = re.sub(r"<[^<>]*>", " ", text)
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    # production's pages of errors begin with a lot that says nothing
    if (found := text.find(STILL_ACTIVE)) > _SENTENCE:
        text = text[found:]
    return text if len(text) <= _SENTENCE else f"{text[: _SENTENCE - 3]}..."


def from_status(status: int, reason: str, resource: str, retry_after: str = "") -> SlapError:
    """Return the error for an HTTP status that is no success; ``reason`` is what the server said.

    ``retry_after`` is the header of that name: seconds or a date (RFC 9110, 10.2.3).
    """
    said = f"the master answered {status}" + (f": {reason}" if reason else "")
    code, retryable = "slap.refused", False
    if status == 404:
        code = "slap.not_found"
        hint = "check that the master knows it; a fault of the master looks the same, so nothing is removed"
    elif status == 408:
        code, retryable = "slap.not_ready", True
        hint = "the master is still preparing it; ask again later"
    elif status == 429:
        code, retryable = "slap.unavailable", True
        hint = "wait: the master has too many requests; what runs keeps running"
    elif status >= 500:
        code, retryable = "slap.unavailable", True
        hint = "wait: the master may be starting, filling its cache, or broken; what runs keeps running"
    elif status in {401, 403}:
        hint = "check computer_id, and that cert_file and key_file are this computer's and not revoked"
    else:
        hint = "check master_url and computer_id"
    pause = seconds_to_wait(retry_after) if retryable else None
    return SlapError(
        code, said, resource=resource, hint=hint, retryable=retryable, status=status, retry_after=pause
    )


def seconds_to_wait(header: str) -> float | None:
    """Read ``Retry-After``; None where it says nothing of use, and never more than an hour: it is a stranger's word."""
    text = header.strip()
    if re.fullmatch("[0-9]{1,12}", text):
        return min(float(text), LONGEST_WAIT)
    try:
        until = email.utils.parsedate_to_datetime(text)
        left = (until if until.tzinfo else until.replace(tzinfo=UTC)).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return max(0.0, min(left, LONGEST_WAIT))


def from_redirect(status: int, location: str, resource: str) -> SlapError:
    """Return the error for a redirect: following one would hand our identity to a host nobody configured."""
    target = sentence(location.partition("?")[0].encode("utf-8", "replace"))
    hint = f"set master_url to the final address{f', perhaps that of {target}' if target else ''}"
    said = f"the master answered with a redirect ({status})"
    return SlapError("slap.refused", said, resource=resource, hint=hint, status=status)


def too_large(limit: int, resource: str, status: int) -> SlapError:
    """Return the error for an answer of more than ``limit`` bytes."""
    hint = "check that master_url is a SLAP master"
    said = f"an answer of more than {limit} bytes"
    return SlapError("slap.garbage", said, resource=resource, hint=hint, status=status)


def from_exception(error: Exception, resource: str) -> SlapError:
    """Return the error for what requests, urllib3, ssl or the system raised during a call."""
    causes = list(chain(error))
    detail = _detail(causes)
    unsent = any(isinstance(cause, _BEFORE) for cause in causes)
    if any(isinstance(cause, _TIMEOUTS) for cause in causes):
        hint = "check the network to the master and its load; what runs keeps running"
        return SlapError(
            "slap.timeout", "no answer in time", resource=resource, hint=hint, retryable=True, unsent=unsent
        )
    if any(isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError) for cause in causes):
        hint = (
            "check master_ca_file (or the system's authorities), the host name in master_url, and the clock"
        )
        return SlapError(
            "slap.tls", f"no trusted TLS connection: {detail}", resource=resource, hint=hint, unsent=unsent
        )
    if isinstance(error, requests.exceptions.ContentDecodingError):
        hint = "ask the operator of the master"
        return SlapError("slap.garbage", "a broken compressed answer", resource=resource, hint=hint)
    if isinstance(error, ValueError):
        hint = "check master_url and the proxy variables of the environment"
        return SlapError(
            "slap.value", f"no request can be made: {detail}", resource=resource, hint=hint, unsent=unsent
        )
    if isinstance(error, _CONNECTION):
        proxy = isinstance(error, requests.exceptions.ProxyError)
        hint = "check the proxy variables of the environment" if proxy else "check master_url and the network"
        message = f"no connection, or it was lost: {detail}"
        return SlapError(
            "slap.unreachable", message, resource=resource, hint=hint, retryable=True, unsent=unsent
        )
    # What is left are files: requests looks for the certificates before it connects, and raises a plain
    # OSError.
    hint = "check cert_file, key_file and master_ca_file"
    return SlapError("slap.tls", f"our own certificates: {detail}", resource=resource, hint=hint, unsent=True)


def refused_certificate(causes: list[BaseException]) -> str:
    """Say by which alert (RFC 8446, 6.2) the server refused our certificate, or the lack of one; "" where that is not it."""
    for cause in causes:
        if isinstance(cause, ssl.SSLError) and (reason := str(cause.reason or "")) in _ALERTS:
            return _ALERTS[reason]
    return ""


# as OpenSSL names alerts that it received
_ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it shows none",
    "SSLV3_ALERT_BAD_CERTIFICATE": "bad certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "unsupported certificate",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "certificate revoked",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "certificate expired",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "certificate unknown",
    "TLSV1_ALERT_UNKNOWN_CA": "issued by an authority that the master does not know",
    "TLSV1_ALERT_ACCESS_DENIED": "access denied",
}
_TIMEOUTS = (requests.exceptions.Timeout, urllib3.exceptions.ReadTimeoutError, TimeoutError)
# What is raised before there is a connection.  A certificate is refused by us before we send; one of ours that the master
# refuses may be told of after the request (TLS 1.3, RFC 8446 section 4.4.2.4).
_BEFORE = (
    requests.exceptions.ConnectTimeout,
    requests.exceptions.InvalidURL,
    # raised for what goes wrong until the proxy has connected us (urllib3, connectionpool.py, urlopen)
    requests.exceptions.ProxyError,
    urllib3.exceptions.LocationValueError,
    urllib3.exceptions.NewConnectionError,
    urllib3.exceptions.ConnectTimeoutError,
    ssl.SSLCertVerificationError,
)
_CONNECTION = (
    requests.exceptions.RequestException,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    ssl.SSLEOFError,
)


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it wraps; requests and urllib3 keep causes in arguments and in ``reason``."""
    seen: set[int] = set()
    todo: list[object] = [error]
    while todo:
        cause = todo.pop(0)
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        todo += [*cause.args, getattr(cause, "reason", None), cause.__cause__, cause.__context__]


def _detail(causes: list[BaseException]) -> str:
    """The system's own words where there are any: the texts of the libraries are long and repeat the URL."""
    words = [str(cause.strerror) for cause in causes if isinstance(cause, OSError) and cause.strerror]
    if words:
        return sentence(words[-1].encode("utf-8", "replace"))
    first = causes[0]
    plain = type(first) is OSError or isinstance(first, ValueError)
    return sentence(str(first).encode("utf-8", "replace")) if plain else type(causes[-1]).__name__
