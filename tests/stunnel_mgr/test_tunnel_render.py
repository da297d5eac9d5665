"""The configuration of stunnel: the whole text, and what is never written."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import pytest
from tunnel_rendered import render

from stunnel_mgr.errors import TunnelError
from stunnel_mgr.identity import make_identity
from stunnel_mgr.model import Tunnel
from stunnel_mgr.pins import pins_from_pem
from stunnel_mgr.render import pins_file

PINS = pins_from_pem(make_identity("a").certificate_pem + make_identity("b").certificate_pem)
V4, V6 = IPv4Address("10.0.0.3"), IPv6Address("2001:db8::3")
SERVER = Tunnel("slappart3/db", "db", "slappart3", "server", V6, 3306, V4, 3307, None, PINS[:1])
AWAY = IPv6Address("2001:db8::12")
CLIENT = Tunnel("slappart3/away", "away", "slappart3", "client", V4, 3306, AWAY, 3306, V6, PINS, "master")

BOTH, FIRST = pins_file(PINS), pins_file(PINS[:1])
EXPECTED = f"""\
; Made by partitiond for slappart3; changes are overwritten.
; identity master: sha256:1111111111111111111111111111111111111111111111111111111111111111
; identity partition: sha256:0000000000000000000000000000000000000000000000000000000000000000
foreground = yes
pid =
syslog = no
debug = info
socket = a:IP_FREEBIND=yes

[away]
client = yes
accept = 10.0.0.3:3306
connect = 2001:db8::12:3306
local = 2001:db8::3
cert = /srv/t/slappart3/master-1.crt
key = /srv/t/slappart3/master-1.key
CAfile = /srv/t/slappart3/{BOTH}
debug = notice
verifyPeer = yes
sslVersionMin = TLSv1.3
options = NO_RENEGOTIATION
sessionResume = no
TIMEOUTbusy = 10
TIMEOUTconnect = 5

[db]
client = no
accept = 2001:db8::3:3306
connect = 10.0.0.3:3307
cert = /srv/t/slappart3/certificate.pem
key = /srv/t/slappart3/key.pem
CAfile = /srv/t/slappart3/{FIRST}
debug = notice
verifyPeer = yes
sslVersionMin = TLSv1.3
options = NO_RENEGOTIATION
sessionResume = no
TIMEOUTbusy = 10
TIMEOUTconnect = 5
"""


def test_all_of_it():
    config = render("slappart3", [SERVER, CLIENT], directory="/srv/t/slappart3/")
    assert config.files["stunnel.conf"] == EXPECTED
    assert config.files[FIRST] == PINS[0].pem
    assert config.files[BOTH] == PINS[0].pem + PINS[1].pem
    assert config.services == ("away", "db")
    assert len(config.files) == 3
    assert config == render("slappart3", [CLIENT, SERVER], directory="/srv/t/slappart3")


def test_nobody_allowed_means_no_service():
    idle = replace(SERVER, pins=())
    assert render("slappart3", [CLIENT, idle], directory="/t").services == ("away",)
    for nothing in ([], [idle]):
        config = render("slappart3", nothing, directory="/t")
        assert (dict(config.files), config.services) == ({}, ())


@pytest.mark.parametrize("directory", ["", "t", "/a\nb", "/a ", "/ a/b", "/a\x00", "/a /b"])
def test_directories_that_cannot_be_written(directory):
    with pytest.raises(TunnelError, match="not absolute and plain"):
        render("slappart3", [SERVER], directory=directory)


@pytest.mark.parametrize(
    ("partition", "tunnels", "reason"),
    [
        ("slappart4", [SERVER], "no tunnel of slappart4"),
        ("slappart3", [SERVER, SERVER], "two tunnels are named slappart3/db"),
        ("slappart3", [replace(SERVER, short_name="a]\nexec = /bin/sh")], "no tunnel of"),
        ("a\nb", [], "no name of a partition"),
    ],
)
def test_mistakes_of_the_caller(partition, tunnels, reason):
    with pytest.raises(TunnelError, match=reason) as caught:
        render(partition, tunnels, directory="/t")
    assert caught.value.code == "tunnel.render"
