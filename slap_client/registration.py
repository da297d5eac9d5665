"""How a node gets to be known to a master: a token of the master's panel against an X509 pair (Person_requestComputer).

The panel (``master_url_web``) is another address than the master's own, and takes no client certificate. What it answers can
not be had twice: a token serves once, and a computer has one active certificate. So asking and reading are two steps, for a
caller that keeps the answer before it looks at it.
"""

import json
from dataclasses import dataclass, field

from slap_client.errors import SlapError
from slap_client.failures import STILL_ACTIVE
from slap_client.master_url import parse_master_url
from slap_client.transport import Transport

ENDPOINT = "Person_requestComputer"
MAX_ANSWER = 64 * 1024

_REFUSED = (401, 403)


@dataclass(frozen=True, slots=True)
class Registration:
    """What the master gave: PEM texts, and the computer's reference where it said one (newer masters do)."""

    reference: str
    certificate: str
    key: str = field(repr=False)


def request_computer(
    web_url: str, token: str, title: str, *, ca_file: str | None = None, pin: str = "", timeout: float = 60.0
) -> bytes:
    """Ask the panel for the pair of a computer of that title; return its answer as it is.

    The panel's certificate is verified, or compared with ``pin``. Raises SlapError.
    """
    url = parse_master_url(web_url)
    if not (url.base.startswith("https:") or url.loopback):
        hint = "name an https:// address: the token must not be read on the way"
        raise SlapError("slap.value", "the panel is not asked without TLS", resource=url.base, hint=hint)
    if not token.isascii() or not token.isprintable() or not token or " " in token:
        raise SlapError("slap.value", "that is no token", hint="a token of the panel is printable ASCII")
    with Transport(url, ca_file=ca_file, pin=pin, timeout=timeout, max_body=MAX_ANSWER) as transport:
        try:
            return transport.post(ENDPOINT, {"title": title}, headers={"X-Access-Token": token})
        except SlapError as error:
            raise _explained(error, title) from error


def read_registration(answer: bytes) -> Registration:
    """Read the panel's answer. Raises SlapError ``slap.garbage``."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise _garbage("is no JSON") from error
    if not isinstance(value, dict):
        raise _garbage("is no object")
    certificate, key, reference = (value.get(name) for name in ("certificate", "key", "reference"))
    if not isinstance(certificate, str) or not isinstance(key, str) or not certificate or not key:
        raise _garbage("has no certificate and key")
    return Registration(reference if isinstance(reference, str) else "", certificate, key)


def _explained(error: SlapError, title: str) -> SlapError:
    """Say what a refusal means here."""
    message, hint, code, retryable = error.message, error.hint, error.code, error.retryable
    if STILL_ACTIVE in message:
        code, retryable = "slap.refused", False
        message = f"the title {title!r} has a certificate that is still active ({message})"
        hint = (
            "revoke that certificate in the panel if this node is to take its place, or choose another title"
        )
    elif error.status in _REFUSED:
        message = f"the panel does not take the token ({message})"
        hint = "get a new token in the panel: each serves once, and not for ever"
    elif error.code == "slap.not_found":
        hint = "check --master-url-web: it is the address of the panel, not the master's"
    elif error.code == "slap.tls":
        hint = "name the panel's authorities by --master-ca-file, or its certificate by --master-fingerprint"
    elif error.code == "slap.timeout" or (error.code == "slap.unreachable" and not error.unsent):
        # it may have been acted on
        hint = "look into the panel: where the node is registered now, revoke its certificate; then repeat with a new token"
    elif error.code == "slap.unreachable":
        hint = "check --master-url-web and the network"
    elif error.status and 300 <= error.status < 400:
        hint = "name the final address by --master-url-web"
    return SlapError(
        code,
        message,
        resource=error.resource,
        hint=hint,
        retryable=retryable,
        status=error.status,
        unsent=error.unsent,
        retry_after=error.retry_after,
    )


def _garbage(why: str) -> SlapError:
    hint = (
        "check --master-url-web; where the node is registered in the panel now, revoke its certificate there"
    )
    return SlapError("slap.garbage", f"the panel's answer {why}", resource=ENDPOINT, hint=hint)
