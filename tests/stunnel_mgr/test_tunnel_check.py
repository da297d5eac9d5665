"""The check of a tunnel, against real stunnels: each outcome for its cause."""

import socket
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address

import pytest
from tunnel_identities import render

from stunnel_mgr.check import check_client, check_server
from stunnel_mgr.declaration import parse_declaration
from stunnel_mgr.errors import TunnelError
from stunnel_mgr.pins import pins_from_pem


@pytest.fixture
def serving(make_stunnel, free_port, server_context, server_identity, client_identity, echo):
    text = f"[tunnel]\nmode = server\nlisten = {free_port('::1')}\nconnect = {echo.port}\n"
    text += f"allow = cert:{client_identity.certificate_der_base64}\n"
    tunnel = parse_declaration(text, name="db", file="db", context=server_context)
    stunnel = make_stunnel("server")
    stunnel.write(render("slappart0", [tunnel], directory=str(stunnel.directory)), server_identity)
    assert stunnel.start().ok
    return tunnel


@pytest.fixture
def going(serving, client_context, server_identity):
    text = f"[tunnel]\nmode = client\nlisten = 3306\nconnect = [::1]:{serving.listen_port}\n"
    text += f"peer = cert:{server_identity.certificate_der_base64}\n"
    return parse_declaration(text, name="db", file="db", context=client_context)


@pytest.fixture
def files(tmp_path):
    def write(identity):
        certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
        certificate.write_bytes(identity.certificate_pem)
        key.write_bytes(identity.key_pem)
        return {"certificate": certificate, "key": key}

    return write


def test_a_good_server(serving, server_identity):
    result = check_server(serving, fingerprint=server_identity.fingerprint)
    assert (result.outcome, result.peer) == ("ok", server_identity.fingerprint)


def test_a_server_without_its_service(serving, server_identity, echo):
    echo.stop()
    assert check_server(serving, fingerprint=server_identity.fingerprint).outcome == "backend"


def test_a_server_with_another_identity(serving, client_identity):
    assert check_server(serving, fingerprint=client_identity.fingerprint).outcome == "wrong_certificate"


def test_no_server(serving, free_port, echo):
    nobody = replace(serving, listen_port=free_port("::1"))
    assert check_server(nobody, fingerprint="").outcome == "unreachable"
    no_tls = replace(serving, listen_host=IPv4Address("127.0.0.2"), listen_port=echo.port)
    assert check_server(no_tls, fingerprint="").outcome == "no_tls"


def test_a_good_client(going, files, client_identity):
    assert check_client(going, **files(client_identity)).outcome == "ok"


def test_a_client_that_is_not_allowed(going, files, stranger):
    result = check_client(going, **files(stranger))
    # The alert may be lost in the reset that follows it (facts/stunnel.md 3), then no reason is seen.
    assert result.outcome in ("refused", "closed")


def test_a_client_whose_service_is_down(going, files, client_identity, echo):
    echo.stop()
    assert check_client(going, **files(client_identity)).outcome == "closed"


def test_a_client_with_other_pins(going, files, client_identity):
    pins = pins_from_pem(client_identity.certificate_pem)
    result = check_client(replace(going, pins=pins), **files(client_identity))
    assert result.outcome == "wrong_certificate"
    later = datetime.now(UTC) + timedelta(days=4000)
    result = check_client(going, **files(client_identity), now=later)
    assert result.outcome == "wrong_certificate"
    assert "ran out" in result.message


def test_a_client_with_a_damaged_identity(going, files, client_identity):
    paths = files(client_identity)
    paths["key"].write_text("damaged")
    with pytest.raises(TunnelError, match="cannot be used") as caught:
        check_client(going, **paths)
    assert caught.value.code == "tunnel.identity"


def test_silence_ends(serving, free_port):
    port = free_port("::1")
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        result = check_server(replace(serving, listen_port=port), fingerprint="", timeout=0.2)
    assert result.outcome == "no_tls"
