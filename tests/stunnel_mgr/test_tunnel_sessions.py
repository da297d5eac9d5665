"""Sockets: the kernel's own text as it is documented, and real sockets on loopback."""

import socket
import sys
from ipaddress import IPv4Address, IPv6Address

import pytest

from stunnel_mgr.errors import TunnelError
from stunnel_mgr.sessions import count_sessions, listening, observe_sockets

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
V4 = (IPv4Address("10.0.0.3"), 3306)
V6 = (IPv6Address("2001:db8::3"), 3306)


@pytest.mark.skipif(sys.byteorder != "little", reason="the text below is of a little-endian machine")
def test_tables(tmp_path):
    def row(number, local, state):
        rest = "00000000:00000000 00:00000000 00000000 0 0 1 1 0 100"
        return f"{number:4}: {local} 0100007F:0050 {state} {rest}\n"

    any6, ours6 = "0" * 32, "B80D0120000000000000000003000000"
    (tmp_path / "tcp").write_text(
        HEAD + row(0, "0300000A:0CEA", "0A") + row(1, "0300000A:0CEA", "01") + row(2, "0300000A:0CEA", "06")
        + row(3, "0300000A:0CEB", "01") + row(4, "00000000:0CEA", "0A") + "cut\n"
    )  # fmt: skip
    assert observe_sockets([V4, V6], proc_net=tmp_path).sessions == {V4: 1, V6: 0}  # no IPv6 in this kernel
    (tmp_path / "tcp6").write_text(
        HEAD + row(0, f"{ours6}:0CEA", "01") + row(1, f"{ours6}:0CEA", "01") + row(2, f"{any6}:0CEA", "0A")
    )
    seen = observe_sockets([V4, V6], proc_net=tmp_path)
    assert seen.sessions == {V4: 1, V6: 2}
    assert seen.listening == {V4}


def test_unreadable(tmp_path):
    (tmp_path / "tcp").mkdir()
    with pytest.raises(TunnelError) as caught:
        listening([V4], proc_net=tmp_path)
    assert caught.value.code == "tunnel.observe"


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_real_sockets(host, free_port):
    address = (IPv6Address if ":" in host else IPv4Address)(host)
    port = free_port(host)
    endpoint = (address, port)
    assert listening([endpoint]) == frozenset()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as server:
        assert listening([endpoint]) == {endpoint}
        assert count_sessions([endpoint]) == {endpoint: 0}
        with socket.create_connection((host, port), timeout=5) as one, server.accept()[0]:
            assert count_sessions([endpoint]) == {endpoint: 1}
            assert one.getpeername()[1] == port
