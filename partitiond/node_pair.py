"""The node's own X509 pair, by which the master knows it: why it is of no use, and what to do.

Promises: nothing that happens to the files stops anything, nor a start: what ran before the machine was booted anew runs
without the master. A pair that is missing, damaged or has ended is an error with its next step at the start and in each pass,
and an open case for as long.
"""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from partitiond.errors import PartitiondError
from slap_client.errors import SlapError
from stunnel_mgr.errors import TunnelError
from stunnel_mgr.validity import read_validity

if TYPE_CHECKING:
    from pathlib import Path

    from partitiond.config import Config

NEXT = "get a new pair: partitiond register --force"

_LIMIT = 64 * 1024
_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----")
_OURS = ("slap.tls", "slap.refused")


def check(config: Config) -> None:
    """Raise PartitiondError ``node.certificate`` when the pair of the configuration is missing, unreadable or no pair."""
    key, certificate = config.key_file, config.cert_file
    if key is None or certificate is None:
        return
    for path in (key, certificate):
        try:
            path.read_bytes()
        except OSError as error:
            raise _unusable(config, path, f"cannot be read: {error.strerror}") from error
    problem = mismatch(certificate, key)
    if problem:
        raise _unusable(config, certificate, problem)


def open_cases(config: Config) -> list[str]:
    """What ``partitiond status`` says of a pair that can never work. One that has ended is said with the other certificates."""
    try:
        check(config)
    except PartitiondError as error:
        return [f"the master cannot be asked: {error.resource} {error}; next: {error.hint}"]
    return []


def mismatch(certificate: Path, key: Path) -> str:
    """Why TLS cannot work with two files; empty when it can. Raises OSError."""
    try:
        # without a password it would ask on the terminal for that of an encrypted key
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            return f"is not the certificate of the key {key}"
        return f"is no certificate in PEM, or the key {key} is none or encrypted"
    return ""


def ends(config: Config) -> datetime | None:
    """When the node's certificate ends; None without one, or while it cannot be read."""
    path = config.cert_file
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return ending(file.read(_LIMIT))
    except OSError:
        return None


def ending(pem: bytes) -> datetime | None:
    """When the first certificate of a PEM file ends; None where there is none."""
    found = _BLOCK.search(pem)
    if found is None:
        return None
    try:
        return read_validity(ssl.PEM_cert_to_DER_cert(found[0].decode("ascii"))).not_after
    except (ValueError, TunnelError):
        return None


def explain(config: Config, error: SlapError) -> SlapError:
    """Give a refusal of the master its reason where it is our own: a pair that is damaged or has ended."""
    # with TLS 1.3 our certificate is refused after the request was sent: that may look like a connection that was lost
    lost = error.code == "slap.unreachable" and not error.unsent
    if config.cert_file is None or not (lost or error.code in _OURS):
        return error
    end = ends(config)
    try:
        check(config)
    except PartitiondError as problem:
        reason = f"{problem.resource} {problem}"
    else:
        if end is None or end > datetime.now(UTC):
            return error
        reason = f"the node's certificate has ended on {end:%Y-%m-%d %H:%M} UTC"
    return SlapError(
        error.code,
        f"{reason}; next: {NEXT} ({error.message})",
        resource=error.resource,
        hint=NEXT,
        retryable=error.retryable,
        status=error.status,
        unsent=error.unsent,
        retry_after=error.retry_after,
    )


def _unusable(config: Config, path: Path, reason: str) -> PartitiondError:
    hint = f"correct key_file and cert_file in {config.file}, or {NEXT}"
    return PartitiondError("node.certificate", reason, resource=str(path), hint=hint)
