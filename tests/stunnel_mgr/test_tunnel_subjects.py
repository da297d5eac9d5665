"""Subjects are written as the real stunnel logs them, however odd they are."""

import contextlib
import resource
import socket
import ssl
import time
from dataclasses import replace
from pathlib import Path

import odd_certificates as odd
import pytest
from tunnel_rendered import render

from stunnel_mgr import subjects
from stunnel_mgr.declaration import parse_declaration
from stunnel_mgr.errors import TunnelError
from stunnel_mgr.model import Pin
from stunnel_mgr.session_log import SessionReader
from stunnel_mgr.subjects import subject_of_der, subject_of_pem

ODD = {
    "plain": odd.name(odd.attribute(odd.CN, "slappart1")),
    "ours": odd.name(
        odd.attribute(odd.CN, "slappart1"), odd.attribute(odd.SERIAL, "abcdef0123", odd.PRINTABLE)
    ),
    "commas": odd.name(odd.attribute(odd.O, "a, b+c;d=e<f>#"), odd.attribute(odd.CN, "#x")),
    "quotes": odd.name(odd.attribute(odd.CN, 'say "yes" \\ no')),
    "blanks": odd.name(odd.attribute(odd.CN, "  two  "), odd.attribute(odd.O, "")),
    "utf8": odd.name(odd.attribute(odd.CN, "Zoë 中 \U0001f600, x")),
    "control": odd.name(odd.attribute(odd.CN, "a\nb\rc\x00d\x1b[0m\x7f\u0085\u2028e")),
    "line": odd.name(odd.attribute(odd.CN, "x\n2026.11.23 06:27:37 LOG5[ui]: stunnel 5.68 on y platform")),
    "latin": odd.name(odd.attribute(odd.CN, b"caf\xe9", odd.T61)),
    "bmp": odd.name(odd.attribute(odd.CN, "Zoë".encode("utf-16-be"), odd.BMP)),
    "universal": odd.name(odd.attribute(odd.CN, "Noë".encode("utf-32-be"), odd.UNIVERSAL)),
    "bits": odd.name(odd.attribute(odd.CN, b"\0\xf0", odd.BITS)),
    "email": odd.name(odd.attribute(odd.EMAIL, "a@b.c", odd.IA5)),
    "unknown oid": odd.name(odd.attribute("2b0601040182376401", "v")),
    "several": odd.name(*(odd.attribute(odd.OU, f"unit {number}") for number in range(5))),
    "multi": odd.name((odd.attribute(odd.CN, "a"), odd.attribute(odd.O, "b")), odd.attribute(odd.OU, "c")),
    "empty": odd.name(),
    "long": odd.name(*(odd.attribute(odd.OU, f"{number:0>60}") for number in range(40))),
    "long utf8": odd.name(odd.attribute(odd.CN, "x"), *(odd.attribute(odd.OU, "é" * 30) for _ in range(40))),
}


@pytest.fixture(scope="session")
def made():
    return {kind: odd.certificate(subject) for kind, subject in ODD.items()}


def record_of(stunnel, port, path):
    """What the log says of one connection with the certificate and key at ``path``."""
    before = stunnel.log.stat().st_size
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(path)
    plain = socket.create_connection(("::1", port), timeout=10)
    with plain, contextlib.suppress(OSError), context.wrap_socket(plain) as tls:
        tls.sendall(b"x")
        tls.recv(1)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if records := SessionReader().feed(stunnel.log.read_bytes()[before:]):
            return records[0]
        time.sleep(0.01)
    raise AssertionError(stunnel.log.read_text(errors="replace"))


def test_what_stunnel_logs(make_stunnel, server_context, server_identity, free_port, echo, tmp_path, made):
    """Each is pinned but those that no pin can help; these are named when they are refused."""
    port = free_port("::1")
    text = f"[tunnel]\nmode = server\nlisten = {port}\nconnect = {echo.port}\n"
    tunnel = parse_declaration(text, name="db", file="db.cfg", context=server_context)
    pins = tuple(Pin("sha256:" + "0" * 64, pem, server_identity.not_after) for _, pem, _ in made.values())
    stunnel = make_stunnel("server")
    config = render("slappart0", [replace(tunnel, pins=pins)], directory=str(stunnel.directory))
    stunnel.write(config, server_identity)
    assert stunnel.start().ok
    records = {}
    for kind, (_, pem, key) in made.items():
        (tmp_path / "peer.pem").write_text(pem + key)
        records[kind] = record_of(stunnel, port, tmp_path / "peer.pem")
    print({kind: (type(record).__name__, record.subject[:70]) for kind, record in records.items()})
    logged = {kind: record.subject for kind, record in records.items()}
    assert logged == {kind: subject_of_der(whole) for kind, (whole, _, _) in made.items()}
    assert len(set(logged.values())) == len(ODD)


def test_pem_is_read_as_der(made):
    for whole, pem, key in made.values():
        assert subject_of_pem(f"text\n{pem}{key}{made['plain'][1]}") == subject_of_der(whole)


@pytest.mark.parametrize("text", ["", "CN=x", ssl.PEM_HEADER, ssl.PEM_HEADER + "\n\xe9\n" + ssl.PEM_FOOTER])
def test_what_is_no_pem(text):
    with pytest.raises(ValueError):  # noqa: PT011 (of several modules)
        subject_of_pem(text)


def test_what_is_no_certificate(made):
    whole = made["plain"][0]
    broken = (
        odd.name(odd.attribute(odd.O, b"a\xff\xfeb")),  # OpenSSL reads no name in broken UTF-8
        odd.name(odd.attribute(odd.CN, b"\0a\0", odd.BMP)),
    )
    for bad in (
        b"", b"\0", whole[:-1], whole + b"\0", whole[1:], b"\x30" * 100, whole * 40,
        *(odd.certificate(subject)[0] for subject in broken),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="certificate"):
            subject_of_der(bad)
        with pytest.raises(ssl.SSLError, match="no start line"):  # and not what we left in OpenSSL's list
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata="x")


def test_a_library_that_is_missing(monkeypatch):
    monkeypatch.setattr(subjects, "LIBRARY", "libcrypto.so.none")
    subjects._openssl.cache_clear()
    with pytest.raises(TunnelError) as caught:
        subject_of_der(b"\x30\0")
    assert caught.value.code == "tunnel.openssl"
    monkeypatch.undo()
    assert subjects._openssl.cache_info().currsize == 0


def test_memory_is_given_back(made):
    read = subject_of_der.__wrapped__

    def work(times):
        for _ in range(times):
            assert read(made["long"][0])
            with pytest.raises(ValueError, match="certificate"):
                read(made["long"][0] + b"\0")

    work(300)
    before = resident()
    work(1000)
    assert resident() - before < 1024 * 1024  # one certificate of 3 KB left each time would be 3 MB


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
