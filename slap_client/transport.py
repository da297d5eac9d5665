"""One HTTP exchange with a master: bounded in time and size, authenticated, never redirected.

Whoever calls decides about trying again; a second try here would only hide how the master is doing. The one exception is no
second try to the master: a kept connection that turns out to have been closed is replaced, for a GET.
"""

import logging
import os
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from importlib import metadata
from typing import Any
from urllib.parse import quote_plus

import requests
import urllib3

from slap_client import failures, trust
from slap_client.deadline import DeadlineAdapter, deadline, stayed_silent, went_stale
from slap_client.errors import SlapError
from slap_client.marshal import MAX_BYTES
from slap_client.master_url import MasterUrl
from slap_client.peer import shown_by

CONNECT_TIMEOUT = 10.0
_CHUNK = 64 * 1024
_ERROR_BODY = 64 * 1024
_TAG_LENGTH = 256
# It warns of headers that it can not read and of connections that it does not keep: a stranger would write our log.
logging.getLogger("urllib3").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of a success and its ETag ("" without one); ``unchanged``: what has the tag that was asked with holds still."""

    body: bytes = b""
    etag: str = ""
    unchanged: bool = False


class Transport:
    """A kept-alive session with one master; threads may share it.

    ``cert`` is our own pair (certificate file, key file); ``ca_file`` the authorities to trust in place of
    the system's; ``pin`` (``sha256:…``) the one certificate that the master has, in place of all authorities, names and
    dates. Seconds: ``timeout`` bounds one wait for bytes, ``time_limit`` headers and body of an
    answer. ``max_body`` bounds an answer in bytes. Close it after use; it is a context manager. Closing harms no call
    that is under way, and later calls, if there are any, keep no connection.
    """

    def __init__(
        self,
        url: MasterUrl,
        *,
        cert: tuple[str, str] | None = None,
        ca_file: str | None = None,
        pin: str = "",
        timeout: float = 60.0,
        time_limit: float = 120.0,
        max_body: int = MAX_BYTES,
    ) -> None:
        if pin and not (trust.FINGERPRINT.fullmatch(pin) and url.secure):
            hint = "write sha256: and 64 lower-case hex digits, and https:// in master_url"
            raise SlapError("slap.value", "the master can not be pinned so", resource=url.base, hint=hint)
        self._url = url
        self._cert = cert
        self._ca_file = ca_file
        self._pin = pin
        # The pin is looked at where the connection is made.
        self._verify = not pin and (ca_file or _system_authorities())
        self._timeout = (min(CONNECT_TIMEOUT, timeout), timeout)
        self._time_limit = time_limit
        self._max_body = max_body
        self._session = _session(url, pin)
        self._lock = threading.Lock()
        self._calls = 0
        self._closed = False
        self._pair_seen: tuple[object, ...] = ()
        self.posted = 0

    def close(self) -> None:
        """Close the connections, as soon as no call uses them."""
        with self._lock:
            self._closed = True
            if self._calls == 0:
                self._session.close()

    def __enter__(self) -> "Transport":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def get(self, endpoint: str, fields: Mapping[str, str], etag: str = "") -> Answer:
        """GET an endpoint with a query; return its success, raise SlapError for all else.

        With ``etag`` the master may say instead that what had it is unchanged.
        """
        headers = {"If-None-Match": etag} if etag else {}
        return self._exchange("GET", endpoint, fields, self._url.authorization, headers)

    def post(
        self,
        endpoint: str,
        fields: Mapping[str, str],
        authorization: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """POST a form to an endpoint; return the body of its success, raise SlapError for all else."""
        try:
            said = authorization or self._url.authorization
            return self._exchange("POST", endpoint, fields, said, headers or {}).body
        finally:
            with self._lock:
                self.posted += 1  # also what failed: it may have arrived

    def _exchange(
        self,
        method: str,
        endpoint: str,
        fields: Mapping[str, str],
        authorization: str,
        headers: Mapping[str, str],
    ) -> Answer:
        resource = self._url.endpoint(endpoint)
        # A log may hold bytes that were no UTF-8 (surrogates); they must not keep it from being sent.
        clean = {name: text.encode("utf-8", "replace").decode("utf-8") for name, text in fields.items()}
        asked = {
            "url": resource,
            "params": clean if method == "GET" else None,
            "data": _form(clean) if method == "POST" else None,
            "headers": {**_headers(method, authorization), **headers},
        }
        with self._call():
            self._look_at_pair(resource)
            try:
                return self._once(method, asked)
            # Three families: requests leaks the errors of the libraries below it, and of files it opens.
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                failed = self._failed(error, resource)
                # An answer that began and broke off is no sign of an old connection.
                if method != "GET" or failed.code != "slap.unreachable" or not went_stale():
                    raise failed from error
            try:
                return self._once(method, asked)
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                raise self._failed(error, resource) from error

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._lock:
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if self._closed and self._calls == 0:
                    self._session.close()

    def _once(self, method: str, asked: Mapping[str, Any]) -> Answer:
        with (
            deadline(self._time_limit),
            self._session.request(
                method,
                **asked,
                # Without an auth of ours requests would look for one in root's ~/.netrc.
                auth=_as_it_is,
                timeout=self._timeout,
                # Given here, not on the session: there REQUESTS_CA_BUNDLE would win over it.
                verify=self._verify,
                cert=self._cert,
                allow_redirects=False,
                stream=True,
            ) as response,
        ):
            return self._success(response, asked)

    def _success(self, response: requests.Response, asked: Mapping[str, Any]) -> Answer:
        status, resource = response.status_code, asked["url"]
        if 200 <= status < 300:
            body = _read(response, self._max_body)
            if body is None:
                raise failures.too_large(self._max_body, resource, status)
            return Answer(body, _tag(response))
        if status == 304 and "If-None-Match" in asked["headers"]:
            _read(
                response, 0
            )  # it has no body, and its connection is free for the next call once that is seen
            return Answer(etag=asked["headers"]["If-None-Match"], unchanged=True)
        if 300 <= status < 400:
            raise failures.from_redirect(status, response.headers.get("Location", ""), resource)
        wait = response.headers.get("Retry-After", "")
        error = failures.from_status(status, _reason(response), resource, wait)
        if status in {401, 403} and self._cert is not None:
            error.hint += f" ({trust.own_certificate(self._cert[0])})"
        raise error

    def _look_at_pair(self, resource: str) -> None:
        """Check our own files when they are others than before; a connection goes by the pair that it was made with."""
        if self._cert is None or not self._url.secure:
            return
        seen = tuple(map(_signature, self._cert))
        if None not in seen and seen == self._pair_seen:
            return
        trust.check_pair(self._cert, resource)
        if self._pair_seen:
            self._session.close()
        self._pair_seen = seen

    def _failed(self, error: Exception, resource: str) -> SlapError:
        """Say what went wrong; where it is trust, with what the server showed."""
        causes = list(failures.chain(error))
        for cause in causes:
            if isinstance(cause, trust.UnpinnedError):
                return trust.unpinned(cause, self._pin, self._url.place, resource)
            if isinstance(cause, ssl.SSLCertVerificationError):
                settings = self._session.merge_environment_settings(resource, {}, None, None, None)
                der = shown_by(self._url, settings["proxies"], self._cert)
                ca_file = self._ca_file
                return trust.distrusted(cause, der, self._url.place, ca_file=ca_file, resource=resource)
        reason = failures.refused_certificate(causes)
        if reason:
            return trust.refused_pair(reason, self._cert, resource)
        failed = failures.from_exception(error, resource)
        if failed.code == "slap.unreachable" and not failed.unsent and stayed_silent() and self._url.secure:
            # In TLS 1.3 we write before the server has seen our certificate; if it then closes, its alert may be lost.
            own = "this node shows none" if self._cert is None else trust.own_certificate(self._cert[0])
            failed.hint += f"; a master that does not take a node's certificate may end like this: {own}"
        return failed


def _session(url: MasterUrl, pin: str) -> requests.Session:
    session = requests.Session()
    session.mount("http://", DeadlineAdapter())
    session.mount("https://", DeadlineAdapter(pin))
    # Compressed answers could be small here and huge in memory.
    session.headers.update({"User-Agent": f"partitiond/{_version()}", "Accept-Encoding": "identity"})
    # Each call stands for itself, as for the reference client.
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
    # The environment names proxies, which can not reach what listens on this node's loopback.
    session.trust_env = not url.loopback
    return session


def _signature(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - a string, as it was configured
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def _tag(response: requests.Response) -> str:
    """The answer's ETag, if it is one (RFC 9110, 8.8.3) of a sensible length."""
    tag = response.headers.get("ETag", "").strip()
    body = tag.removeprefix("W/")
    good = len(body) >= 2 and body[0] == body[-1] == '"' and body.isascii() and body.isprintable()
    return tag if good and len(tag) <= _TAG_LENGTH else ""


def _headers(method: str, authorization: str) -> dict[str, str]:
    headers = {"Authorization": authorization} if authorization else {}
    if method == "POST":
        headers["Content-Type"] = "application/x-www-form-urlencoded"
    return headers


def _form(fields: Mapping[str, str]) -> bytes:
    """Encode a form as :func:`urllib.parse.urlencode` does.

    That looks at each byte by itself: 30 ms for the description of 300 partitions, which is two thirds letters; 3 ms here.
    """
    return "&".join(f"{_quoted(name)}={_quoted(text)}" for name, text in fields.items()).encode("ascii")


def _quoted(text: str) -> str:
    quoted = text.replace("%", "%25")  # first: the others bring some more
    for one in set(text) - {"%", " "}:
        if (safe := quote_plus(one)) != one:
            quoted = quoted.replace(one, safe)
    return quoted.replace(" ", "+")  # last: so the signs of the text itself are told from it


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _system_authorities() -> str | bool:
    """The system's trust store; requests on its own would take the one that certifi brought along."""
    paths = ssl.get_default_verify_paths()
    return paths.cafile or paths.capath or True


def _version() -> str:
    try:
        return metadata.version("partitiond")
    except metadata.PackageNotFoundError:
        return "0"


def _read(response: requests.Response, limit: int) -> bytes | None:
    """The body, or None when it is larger than ``limit`` bytes."""
    parts = []
    size = 0
    for part in response.iter_content(_CHUNK):
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
    return b"".join(parts)


def _reason(response: requests.Response) -> str:
    """What the server says about its refusal; the status counts even if that can not be read."""
    try:
        return failures.sentence(_read(response, _ERROR_BODY) or b"")
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, SlapError):
        return ""
