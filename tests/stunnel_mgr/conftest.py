"""Shared by the tests of tunnels: identities, a real stunnel, an echo server; all end. Loopback only."""

import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tunnel_rendered import IDENTITIES

from stunnel_mgr.identity import load_identity, make_identity
from stunnel_mgr.model import TunnelContext
from stunnel_mgr.verdict import LogTail, VerdictReader

STUNNEL = "/usr/bin/stunnel"
DEADLINE = 10.0


@pytest.fixture(scope="session")
def server_identity():
    return make_identity("slappart0")


@pytest.fixture(scope="session")
def client_identity():
    return make_identity("slappart1")


@pytest.fixture(scope="session")
def stranger(client_identity):
    """The subject, the serial number and the dates of the client, another key."""
    model = x509.load_pem_x509_certificate(client_identity.certificate_pem)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder().subject_name(model.subject).issuer_name(model.issuer)
    builder = builder.public_key(key.public_key()).serial_number(model.serial_number)
    builder = builder.not_valid_before(model.not_valid_before_utc).not_valid_after(model.not_valid_after_utc)
    # as every tool makes self-signed ones; without it OpenSSL looks at the first pin of a subject alone
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = builder.add_extension(identifier, critical=False).add_extension(authority, critical=False)
    forms = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return load_identity(pem, key.private_bytes(*forms))


@pytest.fixture(scope="session")
def server_context():
    return TunnelContext("slappart0", IPv4Address("127.0.0.2"), ipv6=IPv6Address("::1"))


@pytest.fixture(scope="session")
def client_context():
    return TunnelContext(
        "slappart1", IPv4Address("127.0.0.3"), ipv6=IPv6Address("::1"), ipv4_public=IPv4Address("127.0.0.4")
    )


@pytest.fixture
def free_port():
    """Give ports that were free a moment ago, each another one."""
    given = set()

    def find(host):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        while True:
            with socket.socket(family) as probe:
                probe.bind((host, 0))
                port = probe.getsockname()[1]
            if port not in given:
                given.add(port)
                return port

    return find


class Stunnel:
    """One stunnel in the foreground, its stderr in a file as supervisord would have it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "stunnel.log"
        self.process = None
        self.services = ()

    def write(self, config, identity):
        self.services = config.services
        for name, text in config.files.items():
            (self.directory / name).write_text(text, encoding="utf-8")
        certificate, key = IDENTITIES["partition"].certificate, IDENTITIES["partition"].key
        (self.directory / certificate).write_bytes(identity.certificate_pem)
        opener = lambda path, flags: os.open(path, flags, 0o600)  # noqa: E731 (a name for one argument)
        with open(self.directory / key, "wb", opener=opener) as file:
            file.write(identity.key_pem)

    def start(self):
        with LogTail(self.log) as tail, self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [STUNNEL, str(self.directory / "stunnel.conf")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
            return self.wait(tail)

    def reload(self):
        with LogTail(self.log) as tail:
            self.process.send_signal(signal.SIGHUP)
            return self.wait(tail)

    def wait(self, tail):
        reader = VerdictReader(self.services)
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            if verdict := reader.feed(tail.read()):
                return verdict
            time.sleep(0.01)
        raise AssertionError(f"no verdict: {self.log.read_text()}")

    def wait_log(self, text):
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            if text in self.log.read_text():
                return
            time.sleep(0.01)
        raise AssertionError(f"no {text!r} in {self.log.read_text()}")

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture
def make_stunnel(tmp_path):
    made = []

    def make(name):
        directory = tmp_path / name
        directory.mkdir()
        made.append(Stunnel(directory))
        return made[-1]

    yield make
    for stunnel in made:
        stunnel.stop()


class Echo:
    """Sends back what comes; every connection and thread ends with it."""

    def __init__(self, host: str, port: int) -> None:
        self.listener = socket.create_server((host, port))
        self.listener.settimeout(0.05)
        self.connections = 0
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self):
        while not self.stopping.is_set():
            try:
                connection, _ = self.listener.accept()
            except TimeoutError:
                continue
            self.connections += 1
            self.threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self.threads[-1].start()

    def _serve(self, connection):
        connection.settimeout(0.1)
        with connection:
            while not self.stopping.is_set():
                try:
                    data = connection.recv(65536)
                    if not data:
                        return
                    connection.settimeout(DEADLINE)
                    connection.sendall(data)
                    connection.settimeout(0.1)
                except TimeoutError:
                    continue
                except OSError:
                    return

    def stop(self):
        self.stopping.set()
        for thread in list(self.threads):
            thread.join(2 * DEADLINE)
        self.listener.close()


@pytest.fixture
def echo(free_port):
    server = Echo("127.0.0.2", free_port("127.0.0.2"))
    server.port = server.listener.getsockname()[1]
    yield server
    server.stop()


@pytest.fixture
def tls_client(tmp_path):
    """Give a TLS client as a peer without stunnel would be; ``ask`` sends a byte and gives the answer."""

    def make(identity=None):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if identity is not None:
            path = tmp_path / f"{identity.fingerprint[7:]}.pem"
            path.write_bytes(identity.certificate_pem + identity.key_pem)
            context.load_cert_chain(path)
        return context

    return make


@pytest.fixture
def ask():
    def exchange(context, port, session=None):
        plain = socket.create_connection(("::1", port), timeout=DEADLINE)
        with plain, context.wrap_socket(plain, session=session) as tls:
            tls.sendall(b"x")
            answer = tls.recv(1)
            return answer, tls.session, tls.session_reused

    return exchange
