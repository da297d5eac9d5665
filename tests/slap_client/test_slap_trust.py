"""Whom the client trusts over TLS, and what it says when it does not; with a master that wants client certificates."""

import contextlib
import re
import socket
import ssl
import threading
import urllib.parse
from pathlib import Path

import production_master
import pytest
from master_authority import Authority, server_context
from slap_server import reply, running
from urllib3.util import ssl_

from slap_client.client import SlapClient
from slap_client.errors import SlapError

WRONG_PIN = f"sha256:{'0' * 64}"


@pytest.fixture(scope="module")
def master():
    with production_master.running("COMP-7") as made:
        made.offer("slappart0")
        yield made


@pytest.fixture
def files(master):
    return {"cert_file": master.cert_file, "key_file": master.key_file}


def client(master, url=None, **settings):
    return SlapClient(url or master.url, "COMP-7", timeout=5, **settings)


def failure(slap, call=None):
    with slap, pytest.raises(SlapError) as caught:
        (call or slap.computer)()
    error = caught.value
    assert (error.code, error.retryable) == ("slap.tls", False), error.message
    assert error.message.isprintable()
    assert error.hint.isprintable()
    return error


def test_the_pin_is_enough(master, files):
    with client(master, fingerprint=master.fingerprint, **files) as slap:
        assert [one.partition_id for one in slap.computer().partitions] == ["slappart0"]
        slap.computer()
        assert master.asked[-1].connection == master.asked[-2].connection
    # neither the name nor an authority counts
    url = master.url.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(SlapError), client(master, url, ca_file=master.ca_file, **files) as slap:
        slap.computer()


def test_the_pin_is_all_that_counts(master, files):
    count = len(master.asked)
    error = failure(client(master, fingerprint=WRONG_PIN, ca_file=master.ca_file, **files))
    assert error.unsent
    assert WRONG_PIN in error.message
    assert f"master_fingerprint = {master.fingerprint}" in error.hint
    assert "between" in error.hint
    # also for what is posted
    slap = client(master, fingerprint=WRONG_PIN, **files)
    assert failure(slap, lambda: slap.instance_started("slappart0")).unsent
    assert len(master.asked) == count


@pytest.mark.parametrize(
    ("url", "pin"), [("http://127.0.0.1:1/", WRONG_PIN), ("https://127.0.0.1:1/", "sha256:abc")]
)
def test_a_pin_that_can_not_be(url, pin):
    with pytest.raises(SlapError) as caught:
        SlapClient(url, "COMP-7", fingerprint=pin)
    assert caught.value.code == "slap.value"


def test_an_authority_that_an_operator_made(master, files, monkeypatch):
    """Its certificates do not say which key signed them: the default from Python 3.13 on is to refuse such."""
    plain = ssl_.create_urllib3_context

    def strict(*args, **kwargs):
        context = plain(*args, **kwargs)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    for place in ("urllib3.connection", "slap_client.deadline"):
        monkeypatch.setattr(f"{place}.create_urllib3_context", strict)
    url = urllib.parse.urlsplit(master.url)
    with socket.create_connection((url.hostname, url.port), 5) as plug:
        context = strict(cert_reqs=ssl.CERT_REQUIRED)
        context.load_verify_locations(master.ca_file)
        with pytest.raises(ssl.SSLCertVerificationError, match="Key Identifier"):
            context.wrap_socket(plug, server_hostname=url.hostname)
    with client(master, ca_file=master.ca_file, **files) as slap:
        assert [one.partition_id for one in slap.computer().partitions] == ["slappart0"]


def test_an_authority_that_nobody_knows(master, files):
    """What each operator with an authority of its own sees first."""
    count = len(master.asked)
    error = failure(client(master, **files))
    place = master.url.removeprefix("https://").rstrip("/")
    assert place in error.message
    assert "CN=localhost" in error.message
    assert "issued by CN=Authority of the test master,O=Example Operator" in error.message
    assert "127.0.0.1" in error.message
    assert master.fingerprint in error.message
    assert re.search(r"valid until 20\d\d-", error.message)
    assert f"into [partitiond]: master_fingerprint = {master.fingerprint}" in error.hint
    assert "into [slapos]: master_ca_file = " in error.hint
    assert error.unsent
    assert len(master.asked) == count
    # and the line is the right one
    (pin,) = re.findall(r"master_fingerprint = (sha256:[0-9a-f]{64})", error.hint)
    with client(master, fingerprint=pin, **files) as slap:
        slap.computer()


def test_the_wrong_authority_is_named(master, files, tmp_path):
    other = tmp_path / "other.crt"
    other.write_text(Authority("another").certificate)
    error = failure(client(master, ca_file=str(other), **files))
    assert f"by master_ca_file {other}" in error.message


@contextlib.contextmanager
def tls_server(tmp_path, pair, client_authority=None, version=None):
    context = server_context(*pair.write(tmp_path, "server"), client_authority)
    if version is not None:
        context.maximum_version = version
    with running(context) as server:
        server.answer = reply("")
        yield server


def ca_file(tmp_path, authority):
    path = tmp_path / "ca.crt"
    path.write_text(authority.certificate)
    return str(path)


def test_another_host(tmp_path):
    authority = Authority()
    pair = authority.server("slap.example", "198.51.100.7")
    with tls_server(tmp_path, pair) as server:
        error = failure(client(None, server.url, ca_file=ca_file(tmp_path, authority)))
        assert "127.0.0.1" in error.message
        assert "(slap.example, 198.51.100.7)" in error.hint
        assert f"master_fingerprint = {pair.fingerprint}" in error.hint
        assert not server.seen


def test_a_certificate_that_has_ended(tmp_path):
    authority = Authority()
    with tls_server(tmp_path, authority.server("127.0.0.1", days=-1)) as server:
        error = failure(client(None, server.url, ca_file=ca_file(tmp_path, authority)))
    assert "certificate has expired" in error.message
    assert "clock" in error.hint


def test_what_a_server_of_an_older_tls_shows_is_told_too(tmp_path):
    """Before TLS 1.3 a server that wants our certificate ends a handshake without one."""
    authority = Authority()
    pair, own = authority.server("127.0.0.1"), authority.login("COMP-7").write(tmp_path, "own")
    with tls_server(tmp_path, pair, authority.certificate, ssl.TLSVersion.TLSv1_2) as server:
        error = failure(client(None, server.url, cert_file=own[0], key_file=own[1]))
    assert pair.fingerprint in error.message


def test_a_server_that_is_gone_when_it_is_looked_at(tmp_path):
    """It answers once; the second connection, which would have told the fingerprint, is refused."""
    context = server_context(*Authority().server("127.0.0.1").write(tmp_path, "server"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def once():
            connection, _ = listener.accept()
            listener.close()
            with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True):
                pass

        thread = threading.Thread(target=once)
        thread.start()
        error = failure(client(None, f"https://127.0.0.1:{port}/"))
        thread.join()
    assert "self-signed" in error.message or "unable to get" in error.message
    assert f"openssl s_client -connect 127.0.0.1:{port}" in error.hint


# --- our own pair


def refused(slap):
    """Give how a server said that it does not take our certificate: it closes, and its alert may be lost by that."""
    with slap, pytest.raises(SlapError) as caught:
        slap.computer()
    error = caught.value
    assert not error.unsent
    assert error.code == "slap.tls" or "does not take a node's certificate" in error.hint
    return error.code == "slap.tls", f"{error.message} {error.hint}"


def test_without_a_pair(master):
    known, text = refused(client(master, ca_file=master.ca_file))
    if known:
        assert "wants a client certificate" in text
        assert "partitiond register" in text
    else:
        assert "this node shows none" in text


def test_a_pair_of_another_authority(master, tmp_path):
    other = Authority("other").login("COMP-7").write(tmp_path, "other")
    known, text = refused(client(master, ca_file=master.ca_file, cert_file=other[0], key_file=other[1]))
    assert not known or "does not take our certificate" in text
    assert "CN=COMP-7" in text


def test_a_pair_that_has_ended(master, tmp_path):
    old = master.authority.login("COMP-7", days=-1).write(tmp_path, "old")
    known, text = refused(client(master, ca_file=master.ca_file, cert_file=old[0], key_file=old[1]))
    assert not known or "certificate expired" in text
    assert f"cert_file {old[0]} is of CN=COMP-7 and ended on 20" in text


def test_a_pair_that_is_revoked(tmp_path):
    with production_master.running("COMP-7") as master:
        master.revoke("COMP-7")
        slap = client(master, ca_file=master.ca_file, cert_file=master.cert_file, key_file=master.key_file)
        with slap, pytest.raises(SlapError) as caught:
            slap.computer()
    assert (caught.value.code, caught.value.status) == ("slap.refused", 401)
    assert "is of CN=COMP-7 and ends on 20" in caught.value.hint


@pytest.mark.parametrize("broken", ["cert_file", "key_file"])
def test_files_that_are_no_pair(master, files, tmp_path, broken):
    path = tmp_path / "file"
    settings = {**files, broken: str(path)}
    count = len(master.asked)
    ask = lambda: failure(client(master, ca_file=master.ca_file, **settings))  # noqa: E731
    error = ask()
    assert f"{broken} {path} can not be read: No such file" in error.message
    assert error.unsent
    path.mkdir()
    assert "Is a directory" in ask().message
    path.rmdir()
    path.write_text("no PEM")
    assert str(path) in ask().message
    pair = master.authority.login("COMP-7")
    path.write_text(pair.certificate if broken == "cert_file" else pair.key)
    error = ask()
    assert (
        f"key_file {settings['key_file']} is not the key of cert_file {settings['cert_file']}"
        in error.message
    )
    assert len(master.asked) == count


def test_an_encrypted_key_asks_nobody(master, files, tmp_path):
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(Path(files["key_file"]).read_bytes(), None)
    path = tmp_path / "key"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    error = failure(client(master, ca_file=master.ca_file, cert_file=files["cert_file"], key_file=str(path)))
    assert "no unencrypted key" in error.message


def test_a_renewed_pair_is_used_at_once(master, tmp_path):
    paths = master.authority.login("COMP-7").write(tmp_path, "own")
    with client(master, ca_file=master.ca_file, cert_file=paths[0], key_file=paths[1]) as slap:
        slap.computer()
        slap.computer()
        master.authority.login("COMP-7").write(tmp_path, "own")
        slap.computer()
    first, second, third = master.asked[-3:]
    assert first.connection == second.connection != third.connection


# --- proxies


class Connecting:
    """A proxy of a few lines: CONNECT alone; ``asked`` are the places and the credentials."""

    def __init__(self):
        self.asked = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = []
        self.url = f"http://me:s%40cret@127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self):
        while True:
            connection, _ = self._listener.accept()
            head = b""
            while b"\r\n\r\n" not in head and (more := connection.recv(4096)):
                head += more
            if not head:
                connection.close()
                return
            place = head.split()[1].decode()
            found = re.search(rb"(?i)proxy-authorization: (.*)\r\n", head)
            self.asked.append((place, found and found[1].decode()))
            port = int(place.rpartition(":")[2])
            other = socket.create_connection(("127.0.0.1", port))
            self._open += [connection, other]
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            for one, two in ((connection, other), (other, connection)):
                self._threads.append(threading.Thread(target=self._pump, args=(one, two)))
                self._threads[-1].start()

    @staticmethod
    def _pump(one, two):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                two.sendall(data)
        for end in (one, two):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        with socket.create_connection(self._listener.getsockname()):
            pass
        for thread in self._threads:
            thread.join(10)
        for one in (*self._open, self._listener):
            one.close()


@pytest.fixture
def proxy(monkeypatch):
    made = Connecting()
    monkeypatch.setenv("https_proxy", made.url)
    yield made
    made.close()


CREDENTIALS = "Basic bWU6c0BjcmV0"


def through(master):
    """A name that is not the loopback's, which no proxy would be asked for; the proxy goes to the loopback all the same."""
    return master.url.replace("127.0.0.1", "slap.example")


def test_a_proxy_with_a_pin(master, files, proxy):
    with client(master, through(master), fingerprint=master.fingerprint, **files) as slap:
        slap.computer()
        slap.computer()
    assert proxy.asked == [(through(master).removeprefix("https://").rstrip("/"), CREDENTIALS)]
    assert master.asked[-1].who == "COMP-7"


def test_a_proxy_in_front_of_another(master, files, proxy):
    count = len(master.asked)
    error = failure(client(master, through(master), fingerprint=WRONG_PIN, **files))
    assert master.fingerprint in error.hint
    # what an untrusted server shows is looked at by way of the proxy, too
    error = failure(client(master, through(master), **files))
    assert master.fingerprint in error.message
    assert "cret" not in error.message + error.hint
    assert len(proxy.asked) == 3
    assert len(master.asked) == count


def test_no_proxy(master, files, proxy, monkeypatch):
    monkeypatch.setenv("no_proxy", "slap.example")
    slap = client(master, through(master), fingerprint=master.fingerprint, **files)
    with slap, pytest.raises(SlapError) as caught:
        slap.computer()
    assert caught.value.code == "slap.unreachable"
    assert not proxy.asked
