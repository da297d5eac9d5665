"""The bridges that are compared: ours, stunnel as it comes, haproxy, and none.

Each is a pair of processes: a client end on a private IPv4, TLS 1.3 with certificates on both sides over IPv6, a server
end that goes on to one service. All have P-256 keys and start with the same number of tunnels.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tunnel_load import Place, listening, wait_for

from stunnel_mgr import render
from stunnel_mgr.declaration import parse_declaration
from stunnel_mgr.identity import Identity, make_identity
from stunnel_mgr.model import TunnelContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT = Path("/srv/bridges")
FAR = IPv6Address("2001:db8:7::1")
SOURCE = IPv6Address("2001:db8:7::2")
NEAR = IPv4Address("127.0.0.2")
SERVICE: Place = ("127.0.1.1", 7000)
HAPROXY = "/usr/sbin/haproxy"
_STUNNEL = shutil.which("stunnel", path="/usr/bin:/usr/sbin") or "/usr/bin/stunnel"
# below the ephemeral ports; each kind has room for a hundred tunnels
_FIRST_PORT = 10000
_ROOM = 100
_NAMES = {"server": "server.bench", "client": "client.bench"}


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge that runs: where clients connect, and its processes, the server's end first."""

    entry: Place
    processes: tuple[subprocess.Popen[bytes], ...]

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return [process.pid for process in self.processes]


@dataclass(frozen=True, slots=True)
class Ends:
    """The commands of both ends."""

    server: list[str]
    client: list[str]


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to make a bridge; ``write`` puts the configuration of so many tunnels into a directory."""

    name: str
    write: Callable[[Path, int, int], Ends] | None
    number: int

    @contextmanager
    def up(self, tunnels: int = 1) -> Iterator[Bridge]:
        """Run it."""
        if self.write is None:
            yield Bridge(SERVICE, ())
            return
        directory = ROOT / str(self.number)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        port = _FIRST_PORT + 2 * _ROOM * self.number
        ends = self.write(directory, port, tunnels)
        with ExitStack() as stack:
            processes = tuple(
                stack.enter_context(_running(command, directory)) for command in (ends.server, ends.client)
            )
            places = {(FAR, port + one) for one in range(tunnels)} | {
                (NEAR, port + _ROOM + one) for one in range(tunnels)
            }
            wait_for(f"{self.name} listens", lambda: _ended(processes) or places <= listening())
            if _ended(processes):
                sys.exit(f"{self.name} ended:\n{(directory / 'log').read_text()[-2000:]}")
            yield Bridge((str(NEAR), port + _ROOM), processes)


def _ended(processes: Iterable[subprocess.Popen[bytes]]) -> bool:
    return any(process.poll() is not None for process in processes)


@contextmanager
def _running(command: list[str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


# --- stunnel ----------------------------------------------------------------------------------------------------------


def ours(directory: Path, port: int, tunnels: int) -> Ends:
    """As the product writes it: from declarations, with identities of two partitions that pin each other."""
    identities = {mode: make_identity(f"slappart-{mode}") for mode in ("server", "client")}
    server, client = (
        [_STUNNEL, str(_written(directory / mode, mode, port, tunnels, identities))] for mode in identities
    )
    return Ends(server, client)


def _written(directory: Path, mode: str, port: int, tunnels: int, identities: dict[str, Identity]) -> Path:
    directory.mkdir()
    ipv4, ipv6 = (IPv4Address(SERVICE[0]), FAR) if mode == "server" else (NEAR, SOURCE)
    context = TunnelContext(f"slappart-{mode}", ipv4, ipv6)
    allowed = f"cert:{identities['client'].certificate_der_base64}"
    wanted = f"cert:{identities['server'].certificate_der_base64}"
    parsed = [
        parse_declaration(
            f"[tunnel]\nmode = server\nlisten = {port + one}\nconnect = {SERVICE[1]}\nallow = {allowed}\n"
            if mode == "server"
            else f"[tunnel]\nmode = client\nlisten = {port + _ROOM + one}\nconnect = [{FAR}]:{port + one}\npeer = {wanted}\n",
            name=f"t{one}",
            file="bench",
            context=context,
        )
        for one in range(tunnels)
    ]
    own = identities[mode]
    names = render.IdentityFiles("certificate.pem", "key.pem", own.fingerprint)
    rendered = render.render(
        f"slappart-{mode}", parsed, directory=str(directory), identities={"partition": names}
    )
    for name, text in rendered.files.items():
        (directory / name).write_text(text)
    (directory / names.certificate).write_bytes(own.certificate_pem)
    (directory / names.key).touch(mode=0o600)
    (directory / names.key).write_bytes(own.key_pem)
    return directory / render.CONFIG_FILE


def usual(directory: Path, port: int, tunnels: int, *, more: str = "") -> Ends:
    """What stunnel does by itself with an authority and names: everything else is its default, but for ``more``."""
    authority(directory)
    commands = []
    for mode, peer in (("server", "client"), ("client", "server")):
        text = "foreground = yes\npid =\nsyslog = no\ndebug = notice\n"
        for one in range(tunnels):
            far, near = f"{FAR}:{port + one}", f"{NEAR}:{port + _ROOM + one}"
            service = f"{SERVICE[0]}:{SERVICE[1]}"
            accept, connect = (far, service) if mode == "server" else (near, far)
            text += (
                f"[t{one}]\nclient = {'yes' if mode == 'client' else 'no'}\naccept = {accept}\nconnect = {connect}\n"
                f"cert = {directory}/{mode}.pem\nkey = {directory}/{mode}.pem\n"
                f"CAfile = {directory}/ca.pem\nverifyChain = yes\ncheckHost = {_NAMES[peer]}\n{more}"
            )
        (directory / f"{mode}.conf").write_text(text)
        commands.append([_STUNNEL, f"{directory}/{mode}.conf"])
    return Ends(*commands)


# --- haproxy ----------------------------------------------------------------------------------------------------------

_HAPROXY_HEAD = """global
    maxconn 4000
    ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets
    ssl-default-server-options ssl-min-ver TLSv1.3 no-tls-tickets
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
"""


def haproxy(directory: Path, port: int, tunnels: int) -> Ends:
    """haproxy at both ends, with the same authority and names, full handshakes, and no log of connections."""
    authority(directory)
    ca = f"ca-file {directory}/ca.pem verify required"
    commands = []
    for mode in ("server", "client"):
        text = _HAPROXY_HEAD
        for one in range(tunnels):
            far, near = f"[{FAR}]:{port + one}", f"{NEAR}:{port + _ROOM + one}"
            text += f"listen t{one}\n" + (
                f"    bind {far} ssl crt {directory}/server.pem {ca}\n    server s {SERVICE[0]}:{SERVICE[1]}\n"
                if mode == "server"
                else f"    bind {near}\n    server s {far} ssl crt {directory}/client.pem {ca}"
                f" verifyhost {_NAMES['server']} no-ssl-reuse\n"
            )
        (directory / f"{mode}.cfg").write_text(text)
        commands.append([HAPROXY, "-db", "-f", f"{directory}/{mode}.cfg"])
    return Ends(*commands)


# --- the authority of those that need one -----------------------------------------------------------------------------


def authority(directory: Path) -> None:
    """Write ``ca.pem``, and for each end certificate and key in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = _certificate("authority.bench", key, None)
    (directory / "ca.pem").write_bytes(own.public_bytes(serialization.Encoding.PEM))
    for mode, name in _NAMES.items():
        leaf = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(name, leaf, (own, key))
        path = directory / f"{mode}.pem"
        path.touch(mode=0o600)
        path.write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + leaf.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    return builder.sign(issuer[1] if issuer else key, hashes.SHA256())


OURS, USUAL, RESUMED, HAPROXY_KIND, FLOOR = KINDS = (
    Kind("ours", ours, 0),
    Kind("stunnel's default, full", partial(usual, more="sessionResume = no\n"), 1),
    Kind("stunnel's default, resumed", usual, 2),
    Kind("haproxy", haproxy, 3),
    Kind("no bridge", None, 4),
)
