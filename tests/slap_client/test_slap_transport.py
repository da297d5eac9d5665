"""What a call makes of each way in which a master, or the network before it, can fail. All servers are real."""

import datetime
import ipaddress
import socket
import ssl
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from slap_samples import PROXY_COMPUTER
from slap_server import raw, reply, running

from slap_client.client import SlapClient
from slap_client.errors import SlapError


def failure(call) -> SlapError:
    with pytest.raises(SlapError) as caught:
        call()
    error = caught.value
    assert error.hint
    assert error.message.isprintable()
    return error


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (400, "slap.refused", False),
        (401, "slap.refused", False),
        (403, "slap.refused", False),
        (404, "slap.not_found", False),
        (405, "slap.refused", False),
        (408, "slap.not_ready", True),
        (429, "slap.unavailable", True),
        (500, "slap.unavailable", True),
        (502, "slap.unavailable", True),
        (503, "slap.unavailable", True),
        (524, "slap.unavailable", True),
    ],
)
def test_each_status_has_its_code(client, master, status, code, retryable):
    master.answer = reply("<!doctype html>\n<title>No</title>\n<p>The  reason.</p>", status)
    for call in (client.computer, lambda: client.instance_started("slappart0")):
        error = failure(call)
        assert (error.code, error.retryable) == (code, retryable)
        assert (error.status, error.unsent) == (status, False)
        assert error.message == f"the master answered {status}: No The reason."
    assert error.resource == f"{master.url}startedComputerPartition"
    assert str(error) == error.message
    # No retries in here: the daemon's lanes do that.
    assert len(master.seen) == 2


def test_a_refusal_without_a_reason(client, master):
    master.answer = reply("", 400)
    assert failure(lambda: client.use_computer("<x/>")).message == "the master answered 400"


def test_a_refusal_counts_even_if_its_reason_can_not_be_read(client, master):
    master.answer = raw(b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\nhalf a rea")
    assert failure(client.computer).code == "slap.unavailable"
    master.answer = reply("x" * 100_000, 503)
    assert failure(client.computer).code == "slap.unavailable"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(client, master, status):
    location = f"{master.url}elsewhere?token=secret"
    master.answer = reply("", status, Location=location)
    error = failure(client.computer)
    assert error.code == "slap.refused"
    assert not error.retryable
    assert f"{master.url}elsewhere" in error.hint
    assert "secret" not in error.hint
    assert len(master.seen) == 1


def test_a_not_modified_that_nobody_asked_for(client, master):
    master.answer = reply("", 304)
    assert failure(client.computer).code == "slap.refused"


@pytest.mark.parametrize(
    "body",
    [
        "",
        "OK",
        "<html><body>Welcome</body></html>",
        PROXY_COMPUTER[:-20],
        "<marshal><none/></marshal>",
        b"\xff\xfe\xfd",
    ],
)
def test_unreadable_answers_are_garbage(client, master, body):
    master.answer = reply(body)
    error = failure(client.computer)
    assert error.code == "slap.garbage"
    assert not error.retryable
    assert error.resource == f"{master.url}getFullComputerInformation"


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n<marshal>",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n<marshal>",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n<marshal>",
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
)
def test_a_connection_that_ends_early_is_unreachable(client, master, wire):
    master.answer = raw(wire)
    error = failure(client.computer)
    assert error.code == "slap.unreachable"
    assert error.retryable
    assert not error.unsent


def drip(master, head):
    """A header or body that never ends: a byte each 20 ms, so that no single wait is long."""

    def answer(handler):
        handler.close_connection = True
        handler.wfile.write(head)
        while not master.closing.wait(0.02):
            handler.wfile.write(b"x")

    return answer


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nX-Long: ", id="headers"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", id="body"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n", id="body without length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFF\r\n", id="chunk"),
    ],
)
def test_a_dripping_answer_ends_at_the_time_limit(master, head):
    master.answer = drip(master, head)
    with SlapClient(master.url, "COMP-7", timeout=5, time_limit=0.5) as client:
        start = time.monotonic()
        error = failure(client.computer)
        assert 0.4 < time.monotonic() - start < 3
    assert error.code == "slap.timeout"
    assert error.retryable


def test_the_time_limit_of_a_call_does_not_touch_the_next(master):
    master.answer = reply(PROXY_COMPUTER)
    with SlapClient(master.url, "COMP-7", timeout=5, time_limit=0.5) as client:
        client.computer()
        time.sleep(0.6)
        client.computer()
    assert len({seen.peer for seen in master.seen}) == 1


def test_no_answer_at_all_ends_at_the_timeout(master):
    master.answer = lambda _handler: master.closing.wait(5)
    with SlapClient(master.url, "COMP-7", timeout=0.3) as client:
        start = time.monotonic()
        error = failure(client.computer)
        assert time.monotonic() - start < 3
    assert (error.code, error.retryable) == ("slap.timeout", True)
    assert not error.unsent


def chunks_without_end(master):
    def answer(handler):
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not master.closing.is_set():
            handler.wfile.write(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")

    return answer


def test_an_answer_that_is_too_large_is_garbage(master):
    with SlapClient(master.url, "COMP-7", timeout=5, max_body=100_000) as client:
        for answer in (reply("x" * 100_001), chunks_without_end(master)):
            master.answer = answer
            error = failure(client.computer)
            assert (error.code, error.retryable) == ("slap.garbage", False)
            assert "100000 bytes" in error.message
        master.answer = reply("x" * 100_000)
        assert "bytes" not in failure(client.computer).message


def test_compressed_answers_are_not_asked_for_and_broken_ones_are_garbage(client, master):
    master.answer = reply("no gzip", **{"Content-Encoding": "gzip"})
    assert failure(client.computer).code == "slap.garbage"
    assert master.seen[0].headers["accept-encoding"] == "identity"


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_nobody_listens():
    url = f"http://127.0.0.1:{closed_port()}/"
    with SlapClient(url, "COMP-7", timeout=5) as client:
        error = failure(client.computer)
    assert (error.code, error.retryable) == ("slap.unreachable", True)
    assert "Connection refused" in error.message
    assert error.resource == f"{url}getFullComputerInformation"
    assert error.unsent


def test_a_name_that_does_not_resolve():
    with SlapClient("http://master.invalid/", "COMP-7", timeout=5) as client:
        error = failure(client.computer)
    assert (error.code, error.retryable) == ("slap.unreachable", True)
    assert error.unsent


# --- proxies and credentials


def test_a_proxy_of_the_environment_is_used_for_other_hosts(master, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine slap.example login root password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", master.url)
    master.answer = reply(PROXY_COMPUTER)
    with SlapClient("http://slap.example/", "COMP-7", timeout=5) as client:
        client.computer()
    (seen,) = master.seen
    assert seen.headers["host"] == "slap.example"
    # What root keeps in ~/.netrc is not for the master.
    assert "authorization" not in seen.headers


def test_answers_by_way_of_a_proxy_have_the_same_time_limit(master, monkeypatch):
    master.answer = drip(master, b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    monkeypatch.setenv("http_proxy", master.url)
    with SlapClient("http://slap.example/", "COMP-7", timeout=5, time_limit=0.3) as client:
        assert failure(client.computer).code == "slap.timeout"


def test_a_proxy_that_is_down_is_named(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}/")
    with SlapClient("http://slap.example/", "COMP-7", timeout=5) as client:
        error = failure(client.computer)
    assert error.code == "slap.unreachable"
    assert "proxy" in error.hint
    assert error.unsent


def test_the_loopback_is_never_asked_of_a_proxy(client, master, monkeypatch):
    for name in ("http_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}/")
    client.instance_started("slappart0")
    assert len(master.seen) == 1


def test_credentials_in_the_url_are_used_and_never_shown(master):
    master.answer = reply("", 403)
    with SlapClient(master.url.replace("//", "//me:s%40cret@"), "COMP-7", timeout=5) as client:
        error = failure(client.computer)
        shown = repr((error.args, error.__dict__, client.master_url, client._url))
        assert "cret" not in shown
        failure(lambda: client.instance_started("slappart0"))
    get, post = master.seen
    assert get.headers["authorization"] == "Basic bWU6c0BjcmV0"
    assert post.headers["authorization"].startswith("X-SlapPartition ")


# --- TLS


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1: (certificate file, key file)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "master")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    directory = tmp_path_factory.mktemp("pair")
    cert_file, key_file = directory / "certificate", directory / "key"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return str(cert_file), str(key_file)


@pytest.fixture
def tls_master(pair):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    with running(context) as server:
        server.answer = reply(PROXY_COMPUTER)
        yield server


def test_a_master_of_the_given_authority_is_trusted(tls_master, pair):
    with SlapClient(tls_master.url, "COMP-7", ca_file=pair[0], timeout=5) as client:
        client.computer()
        client.computer()
    assert len({seen.peer for seen in tls_master.seen}) == 1


def test_a_dripping_answer_ends_at_the_time_limit_with_tls(tls_master, pair):
    tls_master.answer = drip(tls_master, b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    with SlapClient(tls_master.url, "COMP-7", ca_file=pair[0], timeout=5, time_limit=0.4) as client:
        assert failure(client.computer).code == "slap.timeout"


def test_an_unknown_master_is_not_trusted_and_gets_nothing(tls_master):
    with SlapClient(tls_master.url, "COMP-7", timeout=5) as client:
        error = failure(client.computer)
    assert (error.code, error.retryable) == ("slap.tls", False)
    assert "is not trusted: self-signed certificate" in error.message
    assert error.unsent
    assert tls_master.seen == []


def test_another_host_of_the_same_authority_is_not_trusted(tls_master, pair):
    url = tls_master.url.replace("127.0.0.1", "localhost")
    with SlapClient(url, "COMP-7", ca_file=pair[0], timeout=5) as client:
        assert failure(client.computer).code == "slap.tls"
    assert tls_master.seen == []


def test_the_pair_of_the_computer_is_shown_to_the_master(pair):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    context.load_verify_locations(pair[0])
    context.verify_mode = ssl.CERT_REQUIRED
    with running(context) as server:
        server.answer = reply(PROXY_COMPUTER)
        with SlapClient(
            server.url, "COMP-7", cert_file=pair[0], key_file=pair[1], ca_file=pair[0], timeout=5
        ) as client:
            client.computer()
        with SlapClient(server.url, "COMP-7", ca_file=pair[0], timeout=5) as client:
            error = failure(client.computer)
        assert error.code in {"slap.tls", "slap.unreachable"}
        assert len(server.seen) == 1


@pytest.mark.parametrize("broken", ["cert_file", "key_file", "ca_file"])
@pytest.mark.parametrize("content", [None, "no PEM"])
def test_files_of_ours_that_are_missing_or_broken(tls_master, pair, tmp_path, broken, content):
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    files = {"cert_file": pair[0], "key_file": pair[1], "ca_file": pair[0], broken: str(path)}
    with SlapClient(tls_master.url, "COMP-7", timeout=5, **files) as client:
        error = failure(client.computer)
    assert (error.code, error.retryable) == ("slap.tls", False)
    assert tls_master.seen == []


def test_a_master_that_does_not_speak_tls(master):
    with SlapClient(master.url.replace("http:", "https:"), "COMP-7", timeout=5) as client:
        assert failure(client.computer).code == "slap.tls"
