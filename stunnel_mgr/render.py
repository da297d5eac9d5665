"""From valid tunnels to the text that stunnel reads: pure, and the same text for the same tunnels.

What a configuration loads is named by its content, so nothing that a running stunnel may read again is ever
written over, and one rename puts the whole of another configuration into force.

Facts about options were measured with stunnel 5.68 of Debian 12, or come from its manual where that is said.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .declaration import TUNNEL_NAME
from .errors import TunnelError
from .model import Endpoint, IdentitySource, Pin, Tunnel

CONFIG_FILE = "stunnel.conf"
TRIAL_FILE = "trial.conf"

# stunnel cuts blanks at both ends of a value and takes the rest as it is (5.68): `;` and `#` are harmless.
_DIRECTORY = re.compile(r"/(?:[^\x00-\x20\x7f-\xa0]|(?<=[^/ ]) (?=[^/ ]))*")

_GLOBAL = (
    ("foreground", "yes"),  # with `yes`, and not with `quiet`, it logs to stderr (manual)
    ("pid", ""),  # empty: no file; supervisord knows the process
    ("syslog", "no"),
    # Only at `info` does it say "bound to" for each service, by which alone a good reload is told from one
    # that lost all its listeners. Each service goes back to `notice`: `info` there costs 11 % CPU per
    # connection (facts 1.3).
    ("debug", "info"),
    # An address that is not there yet, or still tentative (IPv6), would otherwise end the whole process.
    ("socket", "a:IP_FREEBIND=yes"),
)
_EACH_SERVICE = (
    ("debug", "notice"),
    # The subject and public key shown must be those of a pin; a CA is not asked. Implies requireCert.
    ("verifyPeer", "yes"),
    ("sslVersionMin", "TLSv1.3"),
    ("options", "NO_RENEGOTIATION"),
    # The log names no certificate for a resumed session (5.68, measured), so nobody could tell whose it is;
    # and a peer that is not allowed any more must hold no ticket. Costs 0.3 ms of CPU a connection (facts 1.2).
    ("sessionResume", "no"),
    # With the default of 300 s, idle strangers can take all of max_clients, so every service (facts 2).
    ("TIMEOUTbusy", "10"),
    ("TIMEOUTconnect", "5"),
)
# A trial is reachable on 127.0.0.1 for whoever finds it, so it must lead to nobody: an ordinary user cannot have
# port 1, and where root has it, what comes is no tunnel.
_PLACES = re.compile(r"^(accept|connect|local) = .*\n", re.MULTILINE)
_NOWHERE = {"accept": "accept = 127.0.0.1:0\n", "connect": "connect = 127.0.0.1:1\n", "local": ""}


@dataclass(frozen=True, slots=True)
class IdentityFiles:
    """Names, relative to the directory, of a certificate and its key, and the certificate's fingerprint.

    Files of one name must not come to hold something else while a configuration that names them is loaded.
    """

    certificate: str
    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class RenderedConfig:
    """The files to write, by name in the directory, and the services that stunnel then has, in their order.

    Both are empty when there is nothing to run (stunnel refuses to start without a service).
    """

    files: Mapping[str, str]
    services: tuple[str, ...]

    @property
    def text(self) -> str:
        """The configuration itself."""
        return self.files.get(CONFIG_FILE, "")

    @property
    def trial(self) -> str:
        """The same, for a stunnel that is to find out whether it can be loaded: it leads from nowhere to nowhere."""
        return _PLACES.sub(lambda found: _NOWHERE[found[1]], self.text)


def listens(text: str, endpoint: Endpoint) -> bool:
    """Whether a configuration lets stunnel listen at an address and port."""
    host, port = endpoint
    return f"\naccept = {host}:{port}\n" in text


def pins_file(pins: Iterable[Pin]) -> str:
    """Name the file of some pins, relative to the directory: by what is in it."""
    digest = hashlib.sha256("".join(pin.fingerprint for pin in pins).encode()).hexdigest()
    return f"pins-{digest[:32]}.pem"


def render(
    partition: str,
    tunnels: Iterable[Tunnel],
    *,
    directory: str,
    identities: Mapping[IdentitySource, IdentityFiles],
) -> RenderedConfig:
    """Write the configuration of the one stunnel of ``partition``, whose files lie in ``directory``
    (absolute).

    Tunnels without a pin are left out (``Tunnel.idle_reason``). Raises TunnelError ``tunnel.render`` for what
    would be a mistake of the caller: a tunnel of another partition, two of one name, one whose identity is not
    among ``identities``, a directory that cannot be written in the file.
    """
    if not _DIRECTORY.fullmatch(directory):
        raise TunnelError(
            "tunnel.render", f"directory {directory!a} is not absolute and plain", resource=partition
        )
    active = sorted((tunnel for tunnel in tunnels if tunnel.pins), key=lambda tunnel: tunnel.short_name)
    _check(partition, active, identities)
    if not active:
        return RenderedConfig({}, ())
    head = [f"; Made by partitiond for {partition}; changes are overwritten."]
    # a pair that was made anew under the name of a damaged one is another configuration
    used = sorted({tunnel.identity for tunnel in active})
    head += [f"; identity {source}: {identities[source].fingerprint}" for source in used]
    sections = ["\n".join(head) + f"\n{_lines(_GLOBAL)}"]
    sections += (_service(tunnel, directory.rstrip("/"), identities[tunnel.identity]) for tunnel in active)
    files = {CONFIG_FILE: "\n".join(sections)}
    files |= {pins_file(tunnel.pins): "".join(pin.pem for pin in tunnel.pins) for tunnel in active}
    return RenderedConfig(files, tuple(tunnel.short_name for tunnel in active))


def _check(partition: str, tunnels: list[Tunnel], identities: Mapping[IdentitySource, IdentityFiles]) -> None:
    if not TUNNEL_NAME.fullmatch(partition):
        raise TunnelError("tunnel.render", f"{partition!a} is no name of a partition", resource=partition)
    seen: set[str] = set()
    for tunnel in tunnels:
        if tunnel.partition != partition or not TUNNEL_NAME.fullmatch(tunnel.short_name):
            message = f"{tunnel.name!a} is no tunnel of {partition}"
            raise TunnelError("tunnel.render", message, resource=tunnel.name)
        if tunnel.short_name in seen:
            raise TunnelError("tunnel.render", f"two tunnels are named {tunnel.name}", resource=tunnel.name)
        if tunnel.identity not in identities:
            message = f"there is no identity of the kind {tunnel.identity}"
            raise TunnelError("tunnel.render", message, resource=tunnel.name)
        seen.add(tunnel.short_name)


def _service(tunnel: Tunnel, directory: str, identity: IdentityFiles) -> str:
    options = [
        ("client", "yes" if tunnel.mode == "client" else "no"),
        # The last colon parts address from port, so IPv6 goes without brackets ("2001:db8::1:3306"; 5.68
        # takes it so).
        ("accept", f"{tunnel.listen_host}:{tunnel.listen_port}"),
        ("connect", f"{tunnel.connect_host}:{tunnel.connect_port}"),
    ]
    if tunnel.source_host is not None:
        options.append(("local", str(tunnel.source_host)))
    options += [
        ("cert", f"{directory}/{identity.certificate}"),
        ("key", f"{directory}/{identity.key}"),
        ("CAfile", f"{directory}/{pins_file(tunnel.pins)}"),
    ]
    return f"[{tunnel.short_name}]\n{_lines(options)}{_lines(_EACH_SERVICE)}"


def _lines(options: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{name} = {value}".rstrip() + "\n" for name, value in options)
