"""One HTTP exchange with a master: bounded in time and size, authenticated, never redirected, never retried.

Whoever calls decides about trying again; a second try here would only hide how the master is doing.
"""

import ssl
from collections.abc import Mapping
from http.cookiejar import DefaultCookiePolicy
from importlib import metadata
from urllib.parse import quote_plus

import requests
import urllib3

from slap_client import failures
from slap_client.deadline import DeadlineAdapter, deadline
from slap_client.errors import SlapError
from slap_client.marshal import MAX_BYTES
from slap_client.master_url import MasterUrl

CONNECT_TIMEOUT = 10.0
_CHUNK = 64 * 1024
_ERROR_BODY = 64 * 1024


class Transport:
    """A kept-alive session with one master; threads may share it.

    ``cert`` is our own pair (certificate file, key file); ``ca_file`` the authorities to trust in place of
    the system's. Seconds: ``timeout`` bounds one wait for bytes, ``time_limit`` headers and body of an
    answer. ``max_body`` bounds an answer in bytes. Close it after use; it is a context manager.
    """

    def __init__(
        self,
        url: MasterUrl,
        *,
        cert: tuple[str, str] | None = None,
        ca_file: str | None = None,
        timeout: float = 60.0,
        time_limit: float = 120.0,
        max_body: int = MAX_BYTES,
    ) -> None:
        self._url = url
        self._cert = cert
        self._verify = ca_file or _system_authorities()
        self._timeout = (min(CONNECT_TIMEOUT, timeout), timeout)
        self._time_limit = time_limit
        self._max_body = max_body
        self._session = _session(url)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def __enter__(self) -> "Transport":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def get(self, endpoint: str, fields: Mapping[str, str]) -> bytes:
        """GET an endpoint with a query; return the body of its success, raise SlapError for all else."""
        return self._exchange("GET", endpoint, fields, self._url.authorization)

    def post(self, endpoint: str, fields: Mapping[str, str], authorization: str = "") -> bytes:
        """POST a form to an endpoint; return the body of its success, raise SlapError for all else."""
        return self._exchange("POST", endpoint, fields, authorization or self._url.authorization)

    def _exchange(self, method: str, endpoint: str, fields: Mapping[str, str], authorization: str) -> bytes:
        resource = self._url.endpoint(endpoint)
        # A log may hold bytes that were no UTF-8 (surrogates); they must not keep it from being sent.
        clean = {name: text.encode("utf-8", "replace").decode("utf-8") for name, text in fields.items()}
        try:
            with (
                deadline(self._time_limit),
                self._session.request(
                    method,
                    resource,
                    params=clean if method == "GET" else None,
                    data=_form(clean) if method == "POST" else None,
                    headers=_headers(method, authorization),
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
                return self._success(response, resource)
        # Three families: requests leaks the errors of the libraries below it, and of files it opens.
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise failures.from_exception(error, resource) from error

    def _success(self, response: requests.Response, resource: str) -> bytes:
        status = response.status_code
        if 200 <= status < 300:
            body = _read(response, self._max_body)
            if body is None:
                raise failures.too_large(self._max_body, resource, status)
            return body
        if 300 <= status < 400:
            raise failures.from_redirect(status, response.headers.get("Location", ""), resource)
        raise failures.from_status(status, _reason(response), resource)


def _session(url: MasterUrl) -> requests.Session:
    session = requests.Session()
    session.mount("http://", DeadlineAdapter())
    session.mount("https://", DeadlineAdapter())
    # Compressed answers could be small here and huge in memory.
    session.headers.update({"User-Agent": f"partitiond/{_version()}", "Accept-Encoding": "identity"})
    # Each call stands for itself, as for the reference client.
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
    # The environment names proxies, which can not reach what listens on this node's loopback.
    session.trust_env = not url.loopback
    return session


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
