"""The check of a tunnel, against real stunnels: each outcome comes from what it is meant for."""

import errno
import os
import signal
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address

import pytest
from tunnel_rendered import render

from netplan import sock_diag
from stunnel_mgr import dialled, tls_probe
from stunnel_mgr.check import OwnSide, check_client, check_server, check_way_in, with_way_in
from stunnel_mgr.declaration import parse_declaration
from stunnel_mgr.errors import TunnelError
from stunnel_mgr.identity import make_identity
from stunnel_mgr.pins import pins_from_pem
from stunnel_mgr.tls_probe import Pair

UID = os.getuid()
LATER = datetime.now(UTC) + timedelta(days=4000)
SHORT = 0.5


@pytest.fixture
def pair(tmp_path):
    def write(identity):
        digest = identity.fingerprint[7:17]
        certificate, key = tmp_path / f"{digest}.crt", tmp_path / f"{digest}.key"
        certificate.write_bytes(identity.certificate_pem)
        key.write_bytes(identity.key_pem)
        return Pair(certificate, key)

    return write


@pytest.fixture
def own(pair):
    """What a node knows of its side of a tunnel."""

    def look(tunnel, identity):
        listeners = sock_diag.listeners([tunnel.listen]).get(tunnel.listen, frozenset())
        return OwnSide(UID, pair(identity), identity.fingerprint, identity.not_after, listeners)

    return look


class Bridge:
    """A server and a client tunnel between two stunnels and the echo server."""

    def __init__(self, make_stunnel, free_port, contexts, identities, echo):
        self.make_stunnel, self.free_port, self.contexts = make_stunnel, free_port, contexts
        self.server_identity, self.client_identity = identities
        self.echo, self.stunnels = echo, {}

    def server(self, *allowed, identity=None):
        text = f"[tunnel]\nmode = server\nlisten = {self.free_port('::1')}\nconnect = {self.echo.port}\nallow =\n"
        text += "".join(
            f"  cert:{one.certificate_der_base64}\n" for one in allowed or (self.client_identity,)
        )
        return self._run(text, "server", identity or self.server_identity)

    def client(self, server, *peers, identity=None):
        text = f"[tunnel]\nmode = client\nlisten = {self.free_port('127.0.0.3')}\n"
        text += f"connect = [::1]:{server.listen_port}\npeer =\n"
        text += "".join(f"  cert:{one.certificate_der_base64}\n" for one in peers or (self.server_identity,))
        return self._run(text, "client", identity or self.client_identity)

    def _run(self, text, side, identity):
        tunnel = parse_declaration(text, name="db", file="db", context=self.contexts[side])
        stunnel = self.stunnels[side] = self.make_stunnel(side)
        stunnel.write(render(tunnel.partition, [tunnel], directory=str(stunnel.directory)), identity)
        assert stunnel.start().ok
        return tunnel

    def redeclare(self, side, tunnel):
        """Let the stunnel of a side run with another declaration than the one that is checked."""
        stunnel = self.stunnels[side]
        for name, text in render(tunnel.partition, [tunnel], directory=str(stunnel.directory)).files.items():
            (stunnel.directory / name).write_text(text, encoding="utf-8")
        assert stunnel.reload().ok

    @contextmanager
    def frozen(self, side):
        process = self.stunnels[side].process
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)


@pytest.fixture
def scene(make_stunnel, free_port, server_context, client_context, server_identity, client_identity, echo):
    contexts = {"server": server_context, "client": client_context}
    return Bridge(make_stunnel, free_port, contexts, (server_identity, client_identity), echo)


@pytest.fixture
def serving(scene):
    return scene.server()


@pytest.fixture
def going(scene, serving):
    return scene.client(serving)


@contextmanager
def far_end(behave):
    """Somebody on ``::1`` who does with each connection what ``behave`` does; gives the port."""
    stopping = threading.Event()
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        listener.settimeout(0.05)

        def serve():
            while not stopping.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    try:
                        behave(connection, stopping)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stopping.set()
            thread.join(20)


def reached(echo, times):
    """The service was connected to that often; it accepts when it comes to it."""
    end = time.monotonic() + 20
    while echo.connections < times and time.monotonic() < end:
        time.sleep(0.01)
    assert echo.connections == times


def silence(connection, stopping):
    stopping.wait(20)


def noise(connection, stopping):
    connection.settimeout(5)
    while not stopping.is_set():
        connection.sendall(b"\x16\x03\x03\x40\x00" + bytes(65536))


def drops(connection, stopping):
    """A handshake that never ends, a byte at a time: records of a legal type that make no message."""
    connection.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xff")
    while not stopping.wait(0.05):
        connection.sendall(b"\0")


# --- servers ----------------------------------------------------------------------------------------------------------


def test_a_good_server(serving, own, server_identity):
    result = check_server(serving, own(serving, server_identity))
    assert (result.outcome, result.peer) == ("ok", server_identity.fingerprint)


def test_the_whole_way_by_one_who_is_allowed(serving, own, pair, server_identity, client_identity, echo):
    side = own(serving, server_identity)
    result = check_server(serving, side)
    way_in = check_way_in(serving, side, pair(client_identity), source=None)
    assert (way_in.outcome, way_in.peer) == ("ok", server_identity.fingerprint)
    reached(echo, 2)  # once from beside, once through the tunnel
    both = with_way_in(result, way_in, "slappart1")
    assert (both.outcome, both.message) == ("ok", "slappart1 is let through to the service")


def test_a_server_whose_stunnel_does_not_know_a_pin_yet(
    scene, own, pair, server_identity, client_identity, stranger
):
    serving = scene.server(client_identity, stranger)
    scene.redeclare("server", replace(serving, pins=pins_from_pem(client_identity.certificate_pem)))
    side = own(serving, server_identity)
    way_in = check_way_in(serving, side, pair(stranger), source=IPv6Address("::1"))
    assert way_in.outcome == "refused_by_pin"
    result = with_way_in(check_server(serving, side), way_in, "slappart1")
    assert result.outcome == "stunnel_fails"
    assert "refuses the certificate of slappart1" in result.message


def test_a_server_without_its_service(serving, own, pair, server_identity, client_identity, echo):
    echo.stop()
    side = own(serving, server_identity)
    assert check_server(serving, side).outcome == "service_down"
    way_in = check_way_in(serving, side, pair(client_identity), source=None)
    assert way_in.outcome == "service_down"


def test_a_guest_that_cannot_come_is_no_fault_of_the_server(
    serving, own, pair, server_identity, client_identity
):
    side = own(serving, server_identity)
    # an address that the machine does not have
    way_in = check_way_in(serving, side, pair(client_identity), source=IPv6Address("2001:db8::1"))
    assert way_in.outcome == "unreachable"
    result = with_way_in(check_server(serving, side), way_in, "slappart1")
    assert result.outcome == "ok"
    assert "slappart1 could not try it" in result.message


def test_a_server_with_another_identity(serving, own, client_identity):
    assert check_server(serving, own(serving, client_identity)).outcome == "wrong_certificate"


def test_a_stopped_server(serving, scene, own, server_identity):
    scene.stunnels["server"].stop()
    result = check_server(serving, own(serving, server_identity))
    assert (result.outcome, result.peer) == ("listener_down", None)


def test_a_server_that_hangs(serving, scene, own, server_identity):
    side = own(serving, server_identity)
    with scene.frozen("server"):
        result = check_server(serving, side, timeout=SHORT)
    assert result.outcome == "stunnel_fails"


def test_somebody_else_where_the_server_should_be(serving, own, server_identity, echo):
    other = replace(serving, listen_host=IPv4Address("127.0.0.2"), listen_port=echo.port)
    side = own(other, server_identity)
    result = check_server(other, side, timeout=SHORT)
    assert result.outcome == "foreign_listener"
    assert "is no tunnel" in result.message
    foreign = check_server(other, replace(side, uid=UID + 1), timeout=SHORT)
    assert foreign.outcome == "foreign_listener"
    assert f"uid {UID}" in foreign.message


def test_who_lets_everybody_in_is_no_tunnel(serving, own, pair, server_identity):
    files = pair(server_identity)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)

    def open_door(connection, stopping):
        with context.wrap_socket(connection, server_side=True):
            stopping.wait(20)

    with far_end(open_door) as port:
        other = replace(serving, listen_port=port)
        result = check_server(other, own(other, server_identity), timeout=SHORT)
    assert (result.outcome, result.peer) == ("foreign_listener", server_identity.fingerprint)


def test_what_ran_out_at_a_server(serving, own, scene, server_identity, client_identity):
    side = own(serving, server_identity)
    assert check_server(serving, side, now=LATER).outcome == "own_expired"
    result = check_server(serving, replace(side, not_after=LATER + timedelta(1)), now=LATER)
    assert result.outcome == "peer_expired"
    # one that has not run out is enough
    young = make_identity("slappart1", now=datetime.now(UTC), lifetime=timedelta(days=5000))
    both = replace(serving, pins=(*serving.pins, *pins_from_pem(young.certificate_pem)))
    assert check_server(both, replace(side, not_after=LATER + timedelta(1)), now=LATER).outcome == "ok"


# --- clients ----------------------------------------------------------------------------------------------------------


def test_a_good_client(going, own, client_identity, server_identity, echo):
    result = check_client(going, own(going, client_identity))
    assert (result.outcome, result.peer) == ("ok", server_identity.fingerprint)
    reached(echo, 2)  # once as its stunnel does, once as a program does


def test_a_client_that_is_not_allowed(scene, own, client_identity, stranger):
    serving = scene.server(stranger)
    going = scene.client(serving)
    result = check_client(going, own(going, client_identity))
    assert result.outcome == "refused_by_pin"
    assert "the other side says" in result.message


def test_a_client_whose_certificate_the_far_end_takes_for_expired(scene, own, make_stunnel):
    old = make_identity("slappart1", now=datetime.now(UTC) - timedelta(days=3), lifetime=timedelta(days=1))
    going = scene.client(scene.server(old), identity=old)
    side = own(going, old)
    assert check_client(going, side).outcome == "own_expired"
    # as a node sees it whose clock is behind
    result = check_client(going, side, now=datetime.now(UTC) - timedelta(days=3))
    assert result.outcome == "refused_by_pin"
    assert "certificate expired" in result.message


def test_a_client_whose_service_is_down(going, own, client_identity, server_identity, echo):
    echo.stop()
    result = check_client(going, own(going, client_identity))
    assert (result.outcome, result.peer) == ("service_down", server_identity.fingerprint)


def test_a_client_of_another_server(scene, own, client_identity, server_identity, stranger):
    serving = scene.server(client_identity)
    going = scene.client(serving, stranger)
    result = check_client(going, own(going, client_identity))
    assert (result.outcome, result.peer) == ("wrong_server", server_identity.fingerprint)


def test_a_client_whose_server_ran_out(scene, own, client_identity):
    old = make_identity("slappart0", now=datetime.now(UTC) - timedelta(days=3), lifetime=timedelta(days=1))
    going = scene.client(scene.server(identity=old), old)
    result = check_client(going, own(going, client_identity))
    assert (result.outcome, result.peer) == ("peer_expired", old.fingerprint)


def test_a_client_without_its_far_end(going, scene, own, client_identity):
    scene.stunnels["server"].stop()
    assert check_client(going, own(going, client_identity)).outcome == "unreachable"


def test_a_client_without_its_listener(going, scene, own, client_identity):
    side = own(going, client_identity)
    result = check_client(going, replace(side, uid=UID + 1))
    assert result.outcome == "foreign_listener"
    assert f"uid {UID}" in result.message
    scene.stunnels["client"].stop()
    assert check_client(going, own(going, client_identity)).outcome == "listener_down"
    # it went between the look and the check
    gone = check_client(going, side)
    assert gone.outcome == "stunnel_fails"
    assert "Connection refused" in gone.message


def test_a_client_whose_stunnel_hangs(going, scene, own, client_identity):
    side = own(going, client_identity)
    with scene.frozen("client"):
        result = check_client(going, side)
    assert result.outcome == "stunnel_fails"
    assert "does nothing" in result.message


def test_a_client_whose_stunnel_knows_other_pins(going, scene, own, client_identity, stranger):
    scene.redeclare("client", replace(going, pins=pins_from_pem(stranger.certificate_pem)))
    result = check_client(going, own(going, client_identity))
    assert result.outcome == "stunnel_fails"
    assert "cuts programs off" in result.message


@pytest.fixture
def cut_early(monkeypatch):
    """Let connections to a place be reset before ``connect`` returns: nothing can time that."""

    def cut(place):
        real = tls_probe.connect

        def connect(endpoint, **how):
            real(endpoint, **how).close()
            if endpoint == place:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            return real(endpoint, **how)

        monkeypatch.setattr(tls_probe, "connect", connect)

    return cut


def test_a_client_whose_stunnel_cuts_before_connect_returns(going, own, client_identity, cut_early):
    cut_early(going.listen)
    result = check_client(going, own(going, client_identity))
    assert result.outcome == "stunnel_fails"
    assert "cuts programs off: Connection reset by peer" in result.message


def test_a_service_that_cuts_early_is_there(serving, own, server_identity, cut_early):
    cut_early(serving.connect)
    assert check_server(serving, own(serving, server_identity)).outcome == "ok"


def test_a_far_end_that_cuts_early_speaks_no_tls(going, own, client_identity, cut_early):
    cut_early(going.connect)
    assert check_client(going, own(going, client_identity)).outcome == "no_tls"


def test_a_client_with_a_damaged_identity(going, own, client_identity):
    side = own(going, client_identity)
    side.identity.key.write_text("damaged")
    with pytest.raises(TunnelError, match="cannot be used") as caught:
        check_client(going, side)
    assert caught.value.code == "tunnel.identity"


@pytest.mark.parametrize("behave", [silence, noise, drops])
def test_a_hostile_far_end_gives_its_outcome(going, own, client_identity, behave):
    with far_end(behave) as port:
        other = replace(going, connect_port=port)
        result = check_client(other, own(other, client_identity), timeout=SHORT)
    assert (result.outcome, result.peer) == ("no_tls", None)


def test_an_old_tls_is_none(going, own, pair, client_identity, server_identity):
    files = pair(server_identity)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def serve(connection, stopping):
        with context.wrap_socket(connection, server_side=True):
            stopping.wait(20)

    with far_end(serve) as port:
        other = replace(going, connect_port=port)
        result = check_client(other, own(other, client_identity))
    assert result.outcome == "no_tls"
    assert "protocol version" in result.message


def test_connections_of_a_user_to_a_place(echo):
    place = (IPv4Address("127.0.0.2"), echo.port)
    before = dialled.connections(place, UID)
    with socket.create_connection(("127.0.0.2", echo.port)):
        assert len(dialled.connections(place, UID) - before) == 1
        assert not dialled.connections(place, UID + 1)
    with pytest.raises(TunnelError) as caught:
        dialled.connections(place, UID, proc_net=dialled.PROC_NET / "nowhere")
    assert caught.value.code == "tunnel.observe"
