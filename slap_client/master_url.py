"""The address of a master: read once from the configuration, so that requests and error texts agree on it."""

import base64
import ipaddress
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from slap_client.errors import SlapError


@dataclass(frozen=True, slots=True)
class MasterUrl:
    """Where a master is: ``base`` ends with a slash and carries no credentials, so it may be shown.

    ``authorization`` is the ``Basic …`` header for a user name and password that stood in the URL, else "".
    ``loopback`` says that the host is this node, which no proxy from the environment can reach.
    """

    base: str
    authorization: str
    loopback: bool

    def endpoint(self, name: str) -> str:
        """Return the URL of an endpoint; a path in the master's URL is kept."""
        return urljoin(self.base, name)

    @property
    def secure(self) -> bool:
        """Whether it is talked to by TLS."""
        return self.base.startswith("https:")

    @property
    def place(self) -> str:
        """The host and port, as they may be shown."""
        parts = urlsplit(self.base)
        host = parts.netloc.removesuffix(f":{parts.port}") if parts.port else parts.netloc
        return f"{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"

    def __repr__(self) -> str:
        return f"MasterUrl({self.base!r})"


def parse_master_url(text: str) -> MasterUrl:
    """Read ``master_url``; a bare IPv6 host is bracketed, as existing configurations have it.

    Raises SlapError ``slap.value`` for anything that is not ``http(s)://host[:port][/path]``.
    """
    stripped = text.strip()
    if not stripped.isprintable() or " " in stripped:
        raise _bad("white space or control characters in the URL of the master")
    try:
        parts = urlsplit(stripped)
        userinfo, _, location = parts.netloc.rpartition("@")
        parts = urlsplit(parts._replace(netloc=_bracketed(location)).geturl())
        return _checked(parts, userinfo)
    except ValueError:
        # From urllib, for broken brackets and ports. Its text may quote a password: not shown, not chained.
        raise _bad("the URL of the master can not be read: its host, brackets or port are wrong") from None


def _checked(parts: SplitResult, userinfo: str) -> MasterUrl:
    if parts.scheme not in {"http", "https"}:
        raise _bad("the URL of the master does not start with http:// or https://")
    if not parts.hostname or parts.port == 0:
        raise _bad("the URL of the master has no host, or port 0")
    if parts.query or parts.fragment:
        raise _bad("the URL of the master has a query or a fragment")
    base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/"
    return MasterUrl(base, _basic(userinfo), _is_loopback(parts.hostname))


def _bracketed(location: str) -> str:
    """``2001:db8::1:8080`` is ambiguous: what can be an address as a whole is one, else the end is a port."""
    if location.startswith("["):
        return location
    host, _, port = location.rpartition(":")
    if _is_ipv6(location):
        return f"[{location}]"
    return f"[{host}]:{port}" if _is_ipv6(host) else location


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _basic(userinfo: str) -> str:
    if not userinfo:
        return ""
    user, _, password = userinfo.partition(":")
    token = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode())
    return f"Basic {token.decode('ascii')}"


def _bad(message: str) -> SlapError:
    return SlapError("slap.value", message, hint="correct master_url in the [slapos] section")
