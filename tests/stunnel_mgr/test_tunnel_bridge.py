"""Real bridges with stunnel 5.68 on loopback: what passes, who is refused, what a reload does."""

import hashlib
import random
import socket
import ssl
from dataclasses import replace
from ipaddress import IPv6Address

import odd_certificates as odd
import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from tunnel_rendered import render

from netplan.sock_diag import count_sessions, listeners
from stunnel_mgr.declaration import parse_declaration
from stunnel_mgr.identity import load_identity
from stunnel_mgr.render import CONFIG_FILE

MEGABYTE = random.Random(1).randbytes(1 << 20)  # noqa: S311 (a pattern, not a secret)


@pytest.fixture
def declare_server(server_context, echo):
    def make(name, port, *identities):
        pins = "\n  ".join(f"cert:{identity.certificate_der_base64}" for identity in identities)
        text = f"[tunnel]\nmode = server\nlisten = {port}\nconnect = {echo.port}\nallow = {pins}\n"
        return parse_declaration(text, name=name, file=f"{name}.cfg", context=server_context)

    return make


@pytest.fixture
def declare_client(client_context, free_port):
    def make(name, connect, identity):
        port = free_port("127.0.0.3")
        text = f"[tunnel]\nmode = client\nlisten = {port}\nconnect = {connect}\n"
        text += f"peer = cert:{identity.certificate_der_base64}\n"
        return parse_declaration(text, name=name, file=f"{name}.cfg", context=client_context)

    return make


@pytest.fixture
def server(make_stunnel, server_identity):
    """Configure the stunnel of the serving partition."""
    stunnel = make_stunnel("server")

    def write(*tunnels):
        stunnel.write(render("slappart0", tunnels, directory=str(stunnel.directory)), server_identity)
        return stunnel

    return write


@pytest.fixture
def client(make_stunnel):
    stunnel = make_stunnel("client")

    def write(identity, *tunnels):
        stunnel.write(render("slappart1", tunnels, directory=str(stunnel.directory)), identity)
        return stunnel

    return write


def connect(tunnel):
    return socket.create_connection((str(tunnel.listen_host), tunnel.listen_port), timeout=10)


def refused(ask, context, port, session=None):
    """In TLS 1.3 the client's handshake may end well first; refusal then is an alert, a reset or an end."""
    try:
        return ask(context, port, session)[0] == b""
    except (ssl.SSLError, ConnectionError):
        return True


def nothing_comes_back(tunnel):
    """A client's stunnel takes each connection; refused by the other side, it ends it without a byte."""
    with connect(tunnel) as plain:
        try:
            plain.sendall(b"x")
            return plain.recv(1) == b""
        except ConnectionError:
            return True


def test_a_megabyte_passes_byte_for_byte(
    server, client, declare_server, declare_client, free_port, server_identity, client_identity
):
    serving = declare_server("db", free_port("::1"), client_identity)
    going = declare_client("db", f"[::1]:{serving.listen_port}", server_identity)
    assert server(serving).start().ok
    assert client(client_identity, going).start().ok
    assert listeners([serving.listen]).keys() == {serving.listen}
    received = bytearray()
    with connect(going) as plain:
        for at in range(0, len(MEGABYTE), 32768):
            plain.sendall(MEGABYTE[at : at + 32768])
            while len(received) < min(at + 32768, len(MEGABYTE)):
                received += plain.recv(65536)
        assert count_sessions([serving.listen, going.listen]) == {
            serving.listen: 1,
            going.listen: 1,
        }
    assert hashlib.sha256(received).digest() == hashlib.sha256(MEGABYTE).digest()
    stunnel = server(serving)
    stunnel.wait_log("byte(s) sent to TLS")
    assert "Certificate accepted at depth=0: CN=slappart1" in stunnel.log.read_text()


def test_the_client_comes_from_its_own_ipv4(
    make_stunnel, client, declare_client, server_context, client_context, free_port, echo,
    server_identity, client_identity,
):  # fmt: skip
    context = replace(server_context, ipv6=None, ipv4_public=server_context.ipv4)
    port = free_port("127.0.0.2")
    text = f"[tunnel]\nmode = server\nlisten = {port}\nconnect = {echo.port}\n"
    text += f"allow = cert:{client_identity.certificate_der_base64}\n"
    serving = parse_declaration(text, name="db", file="db", context=context)
    stunnel = make_stunnel("server")
    stunnel.write(render("slappart0", [serving], directory=str(stunnel.directory)), server_identity)
    assert stunnel.start().ok
    going = declare_client("db", f"127.0.0.2:{port}", server_identity)
    assert client(client_identity, going).start().ok
    with connect(going) as plain:
        plain.sendall(b"x")
        assert plain.recv(1) == b"x"
    stunnel.wait_log(f"accepted connection from {client_context.ipv4_public}:")


def test_a_server_with_the_wrong_certificate_is_refused(
    server,
    client,
    declare_server,
    declare_client,
    free_port,
    echo,
    server_identity,
    client_identity,
    stranger,
):
    serving = declare_server("db", free_port("::1"), client_identity)
    going = declare_client("db", f"[::1]:{serving.listen_port}", stranger)
    server(serving).start()
    stunnel = client(client_identity, going)
    stunnel.start()
    assert nothing_comes_back(going)
    stunnel.wait_log("Rejected by CERT at depth=0: CN=slappart0")
    assert echo.connections == 0


def test_who_may_connect(
    server, declare_server, free_port, tls_client, ask, echo, server_identity, client_identity, stranger
):
    tunnel = declare_server("db", free_port("::1"), client_identity)
    stunnel = server(tunnel)
    assert stunnel.start().ok
    assert ask(tls_client(client_identity), tunnel.listen_port)[0] == b"x"
    for identity, reason in (
        (stranger, "Rejected by CERT at depth=0: CN=slappart1"),  # the same subject, another key
        (server_identity, "Rejected by CERT at depth=0: CN=slappart0"),
        (None, "peer did not return a certificate"),
    ):
        assert refused(ask, tls_client(identity), tunnel.listen_port)
        stunnel.wait_log(reason)
    assert echo.connections == 1


def test_pins_of_one_subject_are_told_apart(
    server, declare_server, free_port, tls_client, ask, client_identity, stranger
):
    """As those of partitions of one name on two nodes are."""
    tunnel = declare_server("db", free_port("::1"), client_identity, stranger)
    assert server(tunnel).start().ok
    for identity in (client_identity, stranger):
        assert ask(tls_client(identity), tunnel.listen_port)[0] == b"x"


def test_of_unmarked_pins_of_one_subject_some_are_told_to_be_shadowed(
    server, declare_server, free_port, tls_client, ask, server_identity
):
    """Such as hand-made ones; that stunnel takes one of them alone is what the warning is about."""
    subject = odd.name(odd.attribute(odd.CN, "db"))
    made = [load_identity(pem.encode(), key.encode()) for _, pem, key in map(odd.certificate, [subject] * 2)]
    tunnel = declare_server("db", free_port("::1"), *made, server_identity)
    assert [pin.fingerprint for pin in tunnel.shadowed_pins] == [one.fingerprint for one in made]
    assert server(tunnel).start().ok
    let_in = [not refused(ask, tls_client(one), tunnel.listen_port) for one in (*made, server_identity)]
    assert sorted(let_in) == [False, True, True]
    assert declare_server("db", 4000, made[0], server_identity).shadowed_pins == ()


def test_tls_1_2_is_refused(server, declare_server, free_port, tls_client, ask, client_identity):
    tunnel = declare_server("db", free_port("::1"), client_identity)
    assert server(tunnel).start().ok
    context = tls_client(client_identity)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert refused(ask, context, tunnel.listen_port)


def test_no_session_is_resumed_and_each_names_its_certificate(
    server, declare_server, free_port, tls_client, ask, client_identity, stranger
):
    """Resumption goes without a certificate: the log could not tell whose it is, and a ticket might outlive its pin."""
    mine = declare_server("mine", free_port("::1"), client_identity)
    other = declare_server("other", free_port("::1"), stranger)
    stunnel = server(mine, other)
    assert stunnel.start().ok
    context = tls_client(client_identity)
    _, session, _ = ask(context, mine.listen_port)
    answer, session, resumed = ask(context, mine.listen_port, session)
    assert (answer, resumed) == (b"x", False)
    subject = x509.load_pem_x509_certificate(client_identity.certificate_pem).subject
    number = subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)[0].value
    accepted = f"Certificate accepted at depth=0: CN=slappart1, serialNumber={number}\n"
    assert stunnel.log.read_text().count(accepted) == 2
    assert refused(ask, context, other.listen_port, session)
    server(replace(mine, pins=other.pins), other)
    assert stunnel.reload().ok
    assert refused(ask, context, mine.listen_port, session)


def test_reload_adds_a_service_while_a_session_goes_on(
    server, declare_server, free_port, tls_client, ask, client_identity
):
    first = declare_server("first", free_port("::1"), client_identity)
    stunnel = server(first)
    assert stunnel.start().ok
    plain = socket.create_connection(("::1", first.listen_port), timeout=10)
    with plain, tls_client(client_identity).wrap_socket(plain) as live:
        live.sendall(b"1")
        assert live.recv(1) == b"1"
        second = declare_server("second", free_port("::1"), client_identity)
        server(first, second)
        assert stunnel.reload().ok
        assert ask(tls_client(client_identity), second.listen_port)[0] == b"x"
        live.sendall(b"2")
        assert live.recv(1) == b"2"
        assert stunnel.process.poll() is None


def test_a_failed_reload_is_seen_and_what_ran_goes_on(
    server, declare_server, free_port, tls_client, ask, client_identity
):
    tunnel = declare_server("db", free_port("::1"), client_identity)
    stunnel = server(tunnel)
    assert stunnel.start().ok
    (stunnel.directory / "key.pem").write_text("damaged")
    verdict = stunnel.reload()
    assert not verdict.ok
    assert not verdict.listeners_lost
    assert "[db]" in verdict.reason
    assert ask(tls_client(client_identity), tunnel.listen_port)[0] == b"x"
    server(tunnel)
    assert stunnel.reload().ok


def test_a_taken_port_is_seen(server, declare_server, free_port, client_identity):
    tunnel = declare_server("db", free_port("::1"), client_identity)
    port = free_port("::1")
    stunnel = server(tunnel)
    assert stunnel.start().ok
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        server(tunnel, declare_server("taken", port, client_identity))
        verdict = stunnel.reload()
        assert (verdict.ok, verdict.services, verdict.listeners_lost) == (False, ("taken",), True)
        assert f"taken cannot listen on ::1:{port}: Address already in use" in verdict.reason
    server(tunnel)
    stunnel.reload()  # may still see the end of a round that failed
    assert stunnel.reload().ok


def test_a_failed_start_is_seen(server, declare_server, free_port, client_identity):
    stunnel = server(declare_server("db", free_port("::1"), client_identity))
    conf = stunnel.directory / CONFIG_FILE
    conf.write_text(conf.read_text().replace("verifyPeer = yes", "verifyPeer = yos"))
    verdict = stunnel.start()
    assert not verdict.ok
    assert "The argument needs to be either 'yes' or 'no'" in verdict.reason
    assert stunnel.process.wait(10) == 1


def test_an_address_that_is_not_there_yet(server, declare_server, client_identity):
    """No packet is sent to these documentation addresses: stunnel only listens."""
    tunnel = replace(declare_server("db", 3306, client_identity), listen_host=IPv6Address("2001:db8::3"))
    assert server(tunnel).start().ok
    assert listeners([tunnel.listen]).keys() == {tunnel.listen}


def test_names_and_directories_as_odd_as_allowed(
    make_stunnel, declare_server, free_port, server_identity, client_identity
):
    names = ["0", "a.b-c_d", "x" * 63, "pid", "Global"]
    tunnels = [declare_server(name, free_port("::1"), client_identity) for name in names]
    stunnel = make_stunnel("a b;c #d")
    stunnel.write(render("slappart0", tunnels, directory=str(stunnel.directory)), server_identity)
    assert stunnel.start().ok
