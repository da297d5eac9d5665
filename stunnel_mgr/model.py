"""What a tunnel is: plain frozen data without any I/O, shared by every module of the package.

Addresses are ``ipaddress`` objects and never text, so that nothing a tenant wrote can reach a configuration
file as it was written. Times are aware ``datetime`` objects in UTC. Fingerprints are ``sha256:`` and 64
lower-case hex digits of the DER.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import IPv4Address, IPv4Interface, IPv6Address
from typing import Literal

MAX_PINS = 256
"""Most certificates that one tunnel names, repetitions counted: reading one costs about half a millisecond."""

IPAddress = IPv4Address | IPv6Address
Endpoint = tuple[IPAddress, int]
Mode = Literal["server", "client"]
IdentitySource = Literal["partition", "master"]


def format_endpoint(endpoint: Endpoint) -> str:
    """Write an address and a port as people and JSON have them: ``[2001:db8::1]:3306``, ``10.0.0.1:3306``."""
    host, port = endpoint
    return f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"


def no_file(path: str) -> bytes:
    """Refuse to read ``path``: stands in for ``read_file`` where no partition directory is at hand. Raises
    OSError.
    """
    raise FileNotFoundError(f"no files can be read here, so not {path!a} either")


@dataclass(frozen=True, slots=True)
class TunnelContext:
    """What a declaration is read against: the partition's own addresses, and where pins can be looked up.

    ``ipv4`` is the private address. ``ipv4_public`` is the one of ``ipv4_partition_network`` or the VPN,
    ``vpn`` the address in the VPN, with the network of that: what is there is reached from it.
    ``local_certificates`` maps the fingerprints of this node's partitions, also those of before a rotation, to
    the certificates that the partition shows now or next (PEM, one after the other).
    ``read_file`` takes a path relative to the partition's directory and gives the whole file; it must be
    bounded, must follow no link, and says by OSError (whose text ends up in the reason) why it does not.
    """

    partition: str
    ipv4: IPv4Address
    ipv6: IPv6Address | None = None
    ipv4_public: IPv4Address | None = None
    vpn: IPv4Interface | None = None
    local_certificates: Mapping[str, str] = field(default_factory=dict)
    read_file: Callable[[str], bytes] = no_file

    @property
    def public(self) -> IPAddress | None:
        """The address at which other nodes reach the partition: IPv6 before IPv4."""
        return self.ipv6 or self.ipv4_public


@dataclass(frozen=True, slots=True)
class Pin:
    """One certificate that the other side may show. ``pem`` was encoded by us, not by the tenant.

    ``subject`` is in the form of RFC 4514. ``marked``: OpenSSL can tell it from another pin of that subject, as it
    was not signed by itself or names the key that signed it (authority key identifier).
    """

    fingerprint: str
    pem: str
    not_after: datetime
    subject: str = ""
    marked: bool = True

    def expired(self, now: datetime) -> bool:
        """Whether stunnel refuses it at ``now`` (aware); the configuration loads with it all the same."""
        return self.not_after < now


@dataclass(frozen=True, slots=True)
class Tunnel:
    """One valid tunnel. ``name`` is public (``slappart3/db``), ``short_name`` its last part, unique in the
    partition.

    A server listens on the partition's public address in TLS and forwards to its private IPv4; a client
    listens on the private IPv4 (one of the operator's maybe on 127.0.0.1) and connects in TLS, from
    ``source_host`` where the partition has an address of that family of its own. ``file`` is where it was
    declared, for messages. ``missing`` are fingerprints that it names, besides ``pins``, of no partition of this
    node: whoever had them is gone, or has another one by now.
    """

    name: str
    short_name: str
    partition: str
    mode: Mode
    listen_host: IPAddress
    listen_port: int
    connect_host: IPAddress
    connect_port: int
    source_host: IPAddress | None
    pins: tuple[Pin, ...]
    identity: IdentitySource = "partition"
    file: str = ""
    missing: tuple[str, ...] = ()

    @property
    def listen(self) -> Endpoint:
        """Where stunnel listens."""
        return (self.listen_host, self.listen_port)

    @property
    def connect(self) -> Endpoint:
        """Where stunnel connects to."""
        return (self.connect_host, self.connect_port)

    @property
    def idle_reason(self) -> str | None:
        """Why the tunnel is valid and yet has no service in stunnel, or None if it has one.

        stunnel 5.68 refuses to start, with every other tunnel of the partition, on an empty set of
        certificates ("No trusted certificates found", measured), so such a tunnel is left out and reported
        down.
        """
        return None if self.pins else "no certificate is allowed"

    @property
    def shadowed_pins(self) -> tuple[Pin, ...]:
        """The pins by which maybe nobody can connect, though they are allowed.

        Of self-signed certificates of one subject OpenSSL looks at one alone (3.0, X509_STORE_CTX_get1_issuer;
        measured), unless they say which key signed them.
        """
        names = Counter(pin.subject for pin in self.pins)
        return tuple(pin for pin in self.pins if not pin.marked and names[pin.subject] > 1)

    def expired_pins(self, now: datetime) -> tuple[Pin, ...]:
        """The pins that stunnel refuses at ``now`` (aware) because they ran out."""
        return tuple(pin for pin in self.pins if pin.expired(now))


@dataclass(frozen=True, slots=True)
class Refused:
    """A declaration that makes no tunnel, and why. ``line`` is counted from 1, or None where no line is to
    blame.
    """

    name: str
    partition: str
    file: str
    line: int | None
    reason: str

    @property
    def short_name(self) -> str:
        """The last part of its public name, as of a ``Tunnel``."""
        return self.name.partition("/")[2]
