"""What the reader makes of the log of the real stunnel: server and client, IPv4 and IPv6, and every refusal."""

import contextlib
import resource
import signal
import socket
import ssl
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import odd_certificates as odd
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tunnel_rendered import render

from stunnel_mgr.model import Pin, Tunnel
from stunnel_mgr.pins import pins_from_pem
from stunnel_mgr.revocation import sessions_to_cut
from stunnel_mgr.session_log import SessionReader
from stunnel_mgr.session_records import EndedSession, FailedSession, RefusedPeer
from stunnel_mgr.subjects import subject_of_pem

DEADLINE = 10.0
# who: days from now to the first of ten days of validity, common name
PARTIES = {
    "peer": (-1, "slappart1"),
    "stranger": (-1, "slappart1"),
    "friend": (-1, "slappart1"),
    "old": (-20, "old"),
    "future": (5, "future"),
    "server": (-1, "slappart0"),
}
V6, V4 = "::1", "127.0.0.2"


@dataclass(frozen=True)
class Party:
    """A certificate and a key; the names of the first two are those of an identity."""

    certificate_pem: bytes
    key_pem: bytes
    path: Path
    key: ec.EllipticCurvePrivateKey

    @property
    def pin(self) -> Pin:
        return pins_from_pem(self.certificate_pem)[0]

    @property
    def subject(self) -> str:
        return subject_of_pem(self.certificate_pem.decode())


@pytest.fixture(scope="session")
def parties(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parties")

    def party(who, pem, key_pem, key):
        (directory / who).write_text(pem + key_pem)
        return Party(pem.encode(), key_pem.encode(), directory / who, key)

    made = {}
    for who, (first, name) in PARTIES.items():
        key = ec.generate_private_key(ec.SECP256R1())
        subject = odd.name(odd.attribute(odd.CN, name), odd.attribute(odd.SERIAL, who[:3] * 3, odd.PRINTABLE))
        start = datetime.now(UTC) + timedelta(days=first)
        _, pem, key_pem = odd.certificate(subject, start=start, key=key)
        made[who] = party(who, pem, key_pem, key)
    peer, stranger = made["peer"], made["stranger"]
    borrowed = odd.borrowed_key(peer.key.public_key(), stranger.key)
    made["borrower"] = party("borrower", peer.certificate_pem.decode(), borrowed, stranger.key)
    return made


def tunnel(mode, name, listen, connect, *pins):
    (host, port), (to_host, to_port) = listen, connect
    return Tunnel(
        f"slappart0/{name}", name, "slappart0", mode, ip_address(host), port, ip_address(to_host), to_port, None, pins
    )  # fmt: skip


class Watched:
    """A stunnel and the reader of its log."""

    def __init__(self, stunnel, *, busy=10):
        self.stunnel, self.reader, self.at, self.busy = stunnel, SessionReader(), 0, busy

    def load(self, party, *tunnels):
        config = render("slappart0", tunnels, directory=str(self.stunnel.directory))
        text = config.files["stunnel.conf"].replace("TIMEOUTbusy = 10", f"TIMEOUTbusy = {self.busy}")
        self.stunnel.write(replace(config, files={**config.files, "stunnel.conf": text}), party)

    def read(self):
        data = self.stunnel.log.read_bytes()[self.at :]
        self.at += len(data)
        return self.reader.feed(data)

    def wait(self, count=1):
        """The next records, at least as many as asked for."""
        records, end = [], time.monotonic() + DEADLINE
        while time.monotonic() < end:
            records += self.read()
            if len(records) >= count:
                return records
            time.sleep(0.01)
        raise AssertionError(f"{records}\n{self.stunnel.log.read_text()}")

    def wait_established(self):
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            assert self.read() == []
            if [session for session in self.reader.live() if session.established]:
                return
            time.sleep(0.01)
        raise AssertionError(self.stunnel.log.read_text())


@pytest.fixture(params=[V6, V4])
def host(request):
    return request.param


def context(party=None, **options):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    for name, value in options.items():
        setattr(made, name, value)
    if party is not None:
        made.load_cert_chain(party.path)
    return made


def reach(where, tls=None, data=b"x", *, wait=True):
    """Connect, say something, wait for an answer and leave; gives the address that was used."""
    family, source = (socket.AF_INET6, V6) if ":" in where[0] else (socket.AF_INET, V4)
    with socket.socket(family) as plain:
        plain.settimeout(DEADLINE)
        plain.bind((source, 0))
        mine = plain.getsockname()
        with contextlib.suppress(OSError):  # a reset may come at any time
            plain.connect(where)
            with tls.wrap_socket(plain) if tls else plain as stream:
                stream.sendall(data)
                if wait:
                    stream.recv(1)
    return ip_address(mine[0]), mine[1]


def kind(record):
    reason = getattr(record, "reason", None)
    return (type(record), record.service, record.subject, reason)


@pytest.fixture
def server(make_stunnel, free_port, echo, parties, host):
    """A server that allows some, one with nothing behind it, and the addresses of both."""
    watched = Watched(make_stunnel("server"), busy=1)
    pins = [parties[who].pin for who in ("peer", "old", "future")]
    db, dead = ((host, free_port(host)) for _ in range(2))
    nobody = ("127.0.0.2", free_port("127.0.0.2"))
    watched.load(
        parties["server"],
        tunnel("server", "db", db, ("127.0.0.2", echo.port), *pins),
        tunnel("server", "dead", dead, nobody, *pins),
    )
    assert watched.stunnel.start().ok
    return watched, db, dead


def test_a_server(server, parties, echo):
    watched, db, dead = server
    peer, stranger, old, future = (parties[who] for who in ("peer", "stranger", "old", "future"))
    remote = reach(db, context(peer))
    (record,) = watched.wait()
    assert kind(record) == (EndedSession, "db", peer.subject, None)
    assert (record.remote, record.bytes_to_tls, record.bytes_to_socket, record.clean) == (remote, 1, 1, True)
    assert peer.subject == "CN=slappart1, serialNumber=peepeepee"
    for where, tls, data, expected in (
        (db, context(stranger), b"x", (RefusedPeer, "db", stranger.subject, "not_allowed")),
        (db, context(parties["server"]), b"x", (RefusedPeer, "db", parties["server"].subject, "not_allowed")),
        (db, context(parties["borrower"]), b"x", (RefusedPeer, "db", peer.subject, "not_allowed")),
        (db, context(old), b"x", (RefusedPeer, "db", old.subject, "expired")),
        (db, context(future), b"x", (RefusedPeer, "db", future.subject, "expired")),
        (db, context(), b"x", (RefusedPeer, "db", None, "no_certificate")),
        (db, context(peer, maximum_version=ssl.TLSVersion.TLSv1_2), b"x", (RefusedPeer, "db", None, "protocol")),
        (db, None, b"GET / HTTP/1.0\r\n\r\n", (RefusedPeer, "db", None, "no_tls")),
        (db, None, b"SSH-2.0-OpenSSH_9\r\n", (RefusedPeer, "db", None, "no_tls")),
        (db, None, b"\x16\x03", (RefusedPeer, "db", None, "timeout")),
        (db, None, b"", (RefusedPeer, "db", None, "timeout")),
        (db, context(peer, verify_mode=ssl.CERT_REQUIRED), b"x", (FailedSession, "db", None, "refused")),
        (dead, context(peer), b"x", (FailedSession, "dead", peer.subject, "backend")),
        (dead, context(stranger), b"x", (RefusedPeer, "dead", stranger.subject, "not_allowed")),
    ):  # fmt: skip
        remote = reach(where, tls, data)
        (record,) = watched.wait()
        assert kind(record) == expected
        assert record.remote == remote
    reach(db, None, b"\x16\x03", wait=False)
    (record,) = watched.wait()
    assert kind(record) == (RefusedPeer, "db", None, "other")
    assert list(watched.reader.live()) == []
    assert echo.connections == 1


def test_a_client(make_stunnel, free_port, parties, server, host, echo):
    serving, db, dead = server
    peer, stranger, own = (parties[who] for who in ("peer", "stranger", "server"))
    local = {
        name: ("127.0.0.3", free_port("127.0.0.3"))
        for name in ("go", "wrong", "dead", "none", "mute", "echo")
    }
    nobody = (host, free_port(host))
    watched = Watched(make_stunnel("client"), busy=1)
    with socket.create_server(
        (host, free_port(host)), family=socket.AF_INET6 if ":" in host else socket.AF_INET
    ) as mute:
        watched.load(
            peer,
            tunnel("client", "go", local["go"], db, own.pin),
            tunnel("client", "wrong", local["wrong"], db, stranger.pin),
            tunnel("client", "dead", local["dead"], dead, own.pin),
            tunnel("client", "none", local["none"], nobody, own.pin),
            tunnel("client", "mute", local["mute"], mute.getsockname()[:2], own.pin),
            tunnel("client", "echo", local["echo"], ("127.0.0.2", echo.port), own.pin),
        )
        assert watched.stunnel.start().ok
        for name, expected, received in (
            ("go", (EndedSession, "go", own.subject, None), 1),
            ("go", (EndedSession, "go", own.subject, None), 1),  # not resumed: it names the certificate again
            ("wrong", (RefusedPeer, "wrong", own.subject, "not_allowed"), None),
            ("dead", (EndedSession, "dead", own.subject, None), 0),  # it cannot know
            ("none", (FailedSession, "none", None, "unreachable"), None),
            ("mute", (RefusedPeer, "mute", None, "timeout"), None),
            ("echo", (FailedSession, "echo", None, "unreachable"), None),
        ):
            remote = reach(local[name])
            (record,) = watched.wait()
            assert (kind(record), record.remote) == (expected, remote)
            assert getattr(record, "bytes_to_socket", None) == received
    seen = [kind(record) for record in serving.wait(4)]
    assert sorted(seen, key=str) == sorted(
        [
            (EndedSession, "db", peer.subject, None),
            (EndedSession, "db", peer.subject, None),
            (FailedSession, "db", None, "refused"),
            (FailedSession, "dead", peer.subject, "backend"),
        ],
        key=str,
    )


@pytest.mark.parametrize(("mine", "reason"), [("stranger", "not_allowed"), ("old", "expired")])
def test_a_client_that_the_server_does_not_take(make_stunnel, free_port, parties, server, mine, reason):
    serving, db, _ = server
    local = ("127.0.0.3", free_port("127.0.0.3"))
    watched = Watched(make_stunnel("client"))
    watched.load(parties[mine], tunnel("client", "go", local, db, parties["server"].pin))
    assert watched.stunnel.start().ok
    with socket.create_connection(local, timeout=DEADLINE) as plain, contextlib.suppress(OSError):
        plain.recv(1)  # nothing is sent, or a reset may outrun the server's alert
    (record,) = watched.wait()
    assert kind(record) == (FailedSession, "go", parties["server"].subject, "refused")
    (record,) = serving.wait()
    assert kind(record) == (RefusedPeer, "db", parties[mine].subject, reason)


def test_a_server_whose_certificate_ran_out(make_stunnel, free_port, echo, parties, host):
    """Both ends: the client refuses it, the server is told."""
    db, local = (host, free_port(host)), ("127.0.0.3", free_port("127.0.0.3"))
    serving, going = Watched(make_stunnel("server")), Watched(make_stunnel("client"))
    serving.load(parties["old"], tunnel("server", "db", db, ("127.0.0.2", echo.port), parties["peer"].pin))
    going.load(parties["peer"], tunnel("client", "go", local, db, parties["old"].pin))
    assert serving.stunnel.start().ok
    assert going.stunnel.start().ok
    remote = reach(local)
    (record,) = going.wait()
    assert (kind(record), record.remote) == ((RefusedPeer, "go", parties["old"].subject, "expired"), remote)
    (record,) = serving.wait()
    assert kind(record) == (FailedSession, "db", None, "refused")


def test_sessions_live_through_a_reload_and_end_with_their_process(server, parties):
    watched, db, _ = server
    subject = parties["peer"].subject
    plain = socket.create_connection(db, timeout=DEADLINE)
    with plain, context(parties["peer"]).wrap_socket(plain) as live:
        remote = (ip_address(live.getsockname()[0]), live.getsockname()[1])
        live.sendall(b"1")
        assert live.recv(1) == b"1"
        watched.wait_established()
        assert watched.stunnel.reload().ok
        assert watched.read() == []
        session = watched.reader.by_remote()["db", remote]
        assert (session.subject, session.established) == (subject, True)
        watched.stunnel.process.send_signal(signal.SIGKILL)
        watched.stunnel.process.wait()
        assert watched.stunnel.start().ok
        (record,) = watched.wait()
        assert kind(record) == (EndedSession, "db", subject, None)
        assert (record.remote, record.bytes_to_tls, record.clean) == (remote, None, False)
    with context(parties["peer"]).wrap_socket(socket.create_connection(db, timeout=DEADLINE)) as live:
        live.sendall(b"1")
        assert live.recv(1) == b"1"
        watched.wait_established()
        watched.stunnel.stop()
        (record,) = watched.wait()
        assert (kind(record), record.bytes_to_tls) == ((EndedSession, "db", subject, None), None)
    assert list(watched.reader.live()) == []


def test_a_session_in_its_handshake_is_not_established(server):
    watched, db, _ = server
    with socket.create_connection(db, timeout=DEADLINE) as plain:
        end = time.monotonic() + DEADLINE
        while not list(watched.reader.live()) and time.monotonic() < end:
            assert watched.read() == []
        (session,) = watched.reader.live()
        assert (session.subject, session.established) == (None, False)
        assert session.remote[1] == plain.getsockname()[1]
    assert kind(watched.wait()[0]) == (RefusedPeer, "db", None, "other")


def test_only_the_sessions_of_the_revoked_are_chosen(make_stunnel, free_port, echo, parties):
    db, web = ((V6, free_port(V6)) for _ in range(2))
    behind = ("127.0.0.2", echo.port)
    own, peer, friend = (parties[who] for who in ("server", "peer", "friend"))
    watched = Watched(make_stunnel("server"))
    both = (peer.pin, friend.pin)
    watched.load(own, tunnel("server", "db", db, behind, *both), tunnel("server", "web", web, behind, *both))
    assert watched.stunnel.start().ok
    allowed = {pin.fingerprint: subject_of_pem(pin.pem) for pin in both}
    with contextlib.ExitStack() as stack:
        alive = {}
        for service, where, who in (
            ("db", db, peer), ("db", db, friend), ("web", web, peer), ("db", db, None)
        ):  # fmt: skip
            stream = stack.enter_context(socket.create_connection(where, timeout=DEADLINE))
            remote = ip_address(stream.getsockname()[0]), stream.getsockname()[1]
            if who is not None:
                stream = stack.enter_context(context(who).wrap_socket(stream))
                stream.sendall(b"x")
                assert stream.recv(1) == b"x"
            alive[service, remote] = who
        watched.load(
            own, tunnel("server", "db", db, behind, friend.pin), tunnel("server", "web", web, behind, *both)
        )
        assert watched.stunnel.reload().ok
        assert watched.read() == []
        now = {"db": {friend.pin.fingerprint: friend.subject}, "web": allowed}
        found = sessions_to_cut(
            allowed_before={"db": allowed, "web": allowed},
            allowed_now=now,
            sessions=watched.reader.by_remote(),
            alive=alive,
        )
        assert [(alive[cut.service, cut.remote], cut.doubtful) for cut in found] == [
            (peer, False),
            (None, True),
        ]
        assert {cut.service for cut in found} == {"db"}


def test_too_many_clients(make_stunnel, free_port, echo, parties):
    db = (V6, free_port(V6))
    watched = Watched(make_stunnel("server"))
    watched.load(parties["server"], tunnel("server", "db", db, ("127.0.0.2", echo.port), parties["peer"].pin))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))  # 48 clients
    try:
        assert watched.stunnel.start().ok
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with contextlib.ExitStack() as stack:
        records, end = [], time.monotonic() + DEADLINE
        while not records and time.monotonic() < end:
            stack.enter_context(socket.create_connection(db, timeout=DEADLINE))
            time.sleep(0.005)
            records = watched.read()
        assert {kind(record) for record in records} == {(RefusedPeer, "", None, "too_many")}
        assert 40 < len(list(watched.reader.live())) <= 48  # the last one's line may be late
