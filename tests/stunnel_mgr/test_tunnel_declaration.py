"""Declarations: what is taken, what is refused, in which line and why; no text does anything else."""

import base64
import configparser
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tunnel_rendered import render

from stunnel_mgr.conflicts import refusal, resolve_conflicts
from stunnel_mgr.declaration import declare, parse_declaration
from stunnel_mgr.errors import TunnelError
from stunnel_mgr.identity import make_identity
from stunnel_mgr.model import TunnelContext, format_endpoint
from stunnel_mgr.render import CONFIG_FILE
from stunnel_mgr.syntax import Entry, read_sections

ONE = make_identity("slappart1")
TWO = make_identity("slappart2")
TRAILING = base64.b64encode(base64.b64decode(ONE.certificate_der_base64) + b"x").decode()
PIN = f"cert:{ONE.certificate_der_base64}"
FILES = {
    "etc/two.pem": ONE.certificate_pem + b"a remark\n" + TWO.certificate_pem,
    "etc/empty.pem": b"nothing here",
    "etc/cut.pem": ONE.certificate_pem[:-30],
    "etc/bad.pem": ONE.certificate_pem.replace(b"MII", b"MIX", 1),
    "etc/huge.pem": b"x" * 300_000,
}


def read_file(path):
    try:
        return FILES[path]
    except KeyError:
        raise FileNotFoundError(2, "No such file or directory", path) from None


CONTEXT = TunnelContext(
    "slappart3",
    IPv4Address("10.0.0.3"),
    ipv6=IPv6Address("2001:db8::3"),
    local_certificates={TWO.fingerprint: TWO.certificate_pem.decode(), ONE.fingerprint: "damaged"},
    read_file=read_file,
)
WITH_VPN = TunnelContext("slappart3", IPv4Address("10.0.0.3"), ipv4_public=IPv4Address("172.16.0.3"))
LONELY = TunnelContext("slappart3", IPv4Address("10.0.0.3"))

SERVER = f"[tunnel]\nmode = server\nlisten = 3306\nconnect = 3307\nallow = {PIN}\n"
CLIENT = f"[tunnel]\nmode = client\nlisten = 3306\nconnect = [2001:db8::12]:3306\npeer = {PIN}\n"


def parse(text, *, name="db.cfg", context=CONTEXT):
    return parse_declaration(text, name=name, file="etc/tunnel/db.cfg", context=context)


def test_server():
    tunnel = parse(SERVER)
    assert (tunnel.name, tunnel.short_name, tunnel.partition) == ("slappart3/db", "db", "slappart3")
    assert (tunnel.mode, tunnel.identity, tunnel.source_host) == ("server", "partition", None)
    assert format_endpoint(tunnel.listen) == "[2001:db8::3]:3306"
    assert format_endpoint(tunnel.connect) == "10.0.0.3:3307"
    assert [pin.fingerprint for pin in tunnel.pins] == [ONE.fingerprint]
    assert tunnel.pins[0].pem == ONE.certificate_pem.decode()
    assert tunnel.idle_reason is None


def test_client():
    tunnel = parse(CLIENT)
    assert tunnel.mode == "client"
    assert format_endpoint(tunnel.listen) == "10.0.0.3:3306"
    assert format_endpoint(tunnel.connect) == "[2001:db8::12]:3306"
    assert tunnel.source_host == IPv6Address("2001:db8::3")


def test_the_ipv4_address_stands_in_for_ipv6():
    server = parse(SERVER, context=WITH_VPN)
    assert format_endpoint(server.listen) == "172.16.0.3:3306"
    client = parse(CLIENT.replace("[2001:db8::12]", "172.16.0.9"), context=WITH_VPN)
    assert client.source_host == IPv4Address("172.16.0.3")
    assert parse(CLIENT.replace("[2001:db8::12]", "172.16.0.9")).source_host is None


def test_nobody_is_allowed():
    for text in (SERVER.replace(PIN, ""), SERVER.replace(f"allow = {PIN}", "")):
        tunnel = parse(text)
        assert tunnel.pins == ()
        assert tunnel.idle_reason == "no certificate is allowed"


GOOD = {
    "comments": SERVER.replace("server", "server   ; listens").replace("3306", "3306 # port"),
    "comment lines": "; one\n# two\n\n" + SERVER + "  ; indented\n",
    "comment at once": SERVER + "identity = ; none\n partition\n",
    "upper-case keys": SERVER.replace("mode", "Mode"),
    "blanks around": SERVER.replace("mode = server", "mode=server  "),
    "two pins": SERVER + f"  cert:{TWO.certificate_der_base64} ; the new one\n",
    "pins on their own lines": SERVER.replace(PIN, f"\n  {PIN}\n\n  ; a remark\n\tfile:etc/two.pem"),
    "a pin twice": SERVER + f"  {PIN}\n",
    "file": SERVER.replace(PIN, "file:etc/two.pem"),
    "of this node": SERVER.replace(PIN, TWO.fingerprint),
    "master": SERVER + "identity = master\n",
    "low port of the service": SERVER.replace("3307", "80"),
    "low port of another node": CLIENT.replace("]:3306", "]:443"),
    "last port": SERVER.replace("3306", "65535"),
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_taken(text):
    tunnel = parse(text)
    assert len({pin.fingerprint for pin in tunnel.pins}) == len(tunnel.pins) >= 1


BAD = {
    "empty": ("", None, "section [tunnel] is missing"),
    "no section": ("mode = server\n", 1, "before any section"),
    "another section": (SERVER + "[other]\n", 6, "[tunnel] alone"),
    "section twice": (SERVER + "[tunnel]\n", 6, "stands twice, first in line 1"),
    "open section": ("[tunnel\n", 1, "is no section"),
    "junk": (SERVER + "junk\n", 6, "'junk'; allowed: key = value"),
    "value first": ("[tunnel]\n  3306\n", 2, "no value comes before"),
    "key twice": (SERVER + "mode = server\n", 6, "mode: stands twice, first in line 2"),
    "NUL": (SERVER + "# \0\n", 6, "U+0000"),
    "CR": (SERVER.replace("\n", "\r\n"), 1, "U+000D"),
    "escape": (SERVER.replace("3307", "3307\x1b[2J"), 4, "U+001B"),
    "not UTF-8": (SERVER + b"; \xff\n".decode("utf-8", "surrogateescape"), 6, "U+DCFF"),
    "long": (SERVER + "#" * 70_000, None, "at most 65536"),
    "no mode": ("[tunnel]\nlisten = 1\n", 1, "mode: missing; allowed: server or client"),
    "bad mode": (SERVER.replace("server", "both"), 2, "mode: 'both'; allowed: server or client"),
    "two modes": (SERVER.replace("server", "server\n client"), 3, "mode: goes on with 'client'"),
    "unknown key": (SERVER + "alow = x\n", 6, "alow: unknown in a server; allowed: mode, listen"),
    "interpolation": (SERVER.replace("3307", "%(listen)s"), 4, "connect: '%(listen)s'"),
    "peer of a server": (SERVER + f"peer = {PIN}\n", 6, "peer: unknown in a server"),
    "allow of a client": (CLIENT + f"allow = {PIN}\n", 6, "allow: unknown in a client"),
    "no listen": (SERVER.replace("listen = 3306\n", ""), 1, "listen: missing"),
    "listen empty": (SERVER.replace("3306", ""), 3, "listen: missing"),
    "listen 80": (SERVER.replace("3306", "80"), 3, "an ordinary user"),
    "listen 0": (SERVER.replace("3306", "0"), 3, "listen: '0'"),
    "listen high": (SERVER.replace("3306", "65536"), 3, "listen: '65536'"),
    "listen long": (SERVER.replace("3306", "9" * 5000), 3, "listen: '9999"),
    "listen with an address": (SERVER.replace("3306", "[::]:3306"), 3, "address is the partition's own"),
    "listen in other digits": (SERVER.replace("3306", "٣٣٠٦"), 3, "allowed: a port"),
    "connect with an address": (SERVER.replace("3307", "127.0.0.1:3307"), 4, "partition's own"),
    "no connect": (CLIENT.replace("connect", "; connect"), 1, "connect: missing"),
    "host name": (CLIENT.replace("[2001:db8::12]", "db.example.com"), 4, "host names are not looked up"),
    "no brackets": (CLIENT.replace("[2001:db8::12]", "2001:db8::12"), 4, "goes in brackets"),
    "port alone": (CLIENT.replace("[2001:db8::12]:", ""), 4, "no address and port"),
    "no port": (CLIENT.replace("]:3306", "]"), 4, "allowed: [IPv6 address]:port"),
    "bad port": (CLIENT.replace("]:3306", "]:99999"), 4, "port '99999'"),
    "scope": (CLIENT.replace("::12", "::12%eth0"), 4, "no address and port"),
    "link-local": (CLIENT.replace("2001:db8::12", "fe80::1"), 4, "link-local"),
    "any address": (CLIENT.replace("2001:db8::12", "::"), 4, "not the address of one host"),
    "multicast": (CLIENT.replace("[2001:db8::12]", "224.0.0.1"), 4, "not the address of one host"),
    "broadcast": (CLIENT.replace("[2001:db8::12]", "255.255.255.255"), 4, "not the address of one"),
    "mapped": (CLIENT.replace("2001:db8::12", "::ffff:10.0.0.1"), 4, "write it as IPv4"),
    "old octal": (CLIENT.replace("[2001:db8::12]", "010.0.0.1"), 4, "no address and port"),
    "loop of a client": (CLIENT.replace("[2001:db8::12]", "10.0.0.3"), 4, "itself listens"),
    "no peer": (CLIENT.replace(f"peer = {PIN}\n", ""), 1, "peer: no certificate of the server"),
    "empty peer": (CLIENT.replace(PIN, ""), 5, "peer: no certificate of the server"),
    "bad form": (SERVER.replace(PIN, "anybody"), 5, "allowed, one a line: cert:"),
    "bad base64": (SERVER.replace(PIN, "cert:MI!I"), 5, "not base64"),
    "no DER": (SERVER.replace(PIN, "cert:AAAA"), 5, "not a readable X.509"),
    "trailing DER": (SERVER.replace(PIN, "cert:" + TRAILING), 5, "not a readable X.509"),
    "huge DER": (SERVER.replace(PIN, "cert:" + "A" * 40_000), 5, "allowed: 16384 bytes"),
    "second pin bad": (SERVER + "\n  ; remark\n  cert:AAAA\n", 8, "allow: 'cert:AAAA'"),
    "two on a line": (SERVER.replace(PIN, f"{PIN} {PIN}"), 5, "not base64"),
    "no file": (SERVER.replace(PIN, "file:etc/none.pem"), 5, "No such file"),
    "absolute file": (SERVER.replace(PIN, "file:/etc/passwd"), 5, "below the partition's directory"),
    "file above": (SERVER.replace(PIN, "file:etc/../../x"), 5, "without .."),
    "file without a certificate": (SERVER.replace(PIN, "file:etc/empty.pem"), 5, "no PEM certificate"),
    "cut file": (SERVER.replace(PIN, "file:etc/cut.pem"), 5, "damaged PEM"),
    "damaged file": (SERVER.replace(PIN, "file:etc/bad.pem"), 5, "not a readable X.509"),
    "huge file": (SERVER.replace(PIN, "file:etc/huge.pem"), 5, "more than 262144 bytes"),
    "unknown fingerprint": (SERVER.replace(PIN, "sha256:" + "0" * 64), 5, "no partition of this node"),
    "upper-case fingerprint": (SERVER.replace(PIN, TWO.fingerprint.upper()), 5, "one a line"),
    "short fingerprint": (SERVER.replace(PIN, "sha256:00"), 5, "64 lower-case hex digits"),
    "damaged on this node": (SERVER.replace(PIN, ONE.fingerprint), 5, "no PEM certificate"),
    "bad identity": (SERVER + "identity = mine\n", 6, "identity: 'mine'; allowed: partition or master"),
}


@pytest.mark.parametrize(("text", "line", "reason"), BAD.values(), ids=BAD)
def test_refused(text, line, reason):
    with pytest.raises(TunnelError) as caught:
        parse(text)
    error = caught.value
    assert (error.code, error.resource, error.line) == ("tunnel.declaration", "slappart3/db", line)
    place = "etc/tunnel/db.cfg: " if line is None else f"etc/tunnel/db.cfg:{line}: "
    assert str(error).startswith(place)
    assert reason in str(error)
    assert len(str(error)) < 400
    assert str(error).isprintable()
    refused = refusal(error, name="db.cfg", partition="slappart3", file="etc/tunnel/db.cfg")
    assert (refused.name, refused.line) == ("slappart3/db", line)
    assert place + refused.reason == str(error)


def test_a_suggestion():
    with pytest.raises(TunnelError) as caught:
        parse(SERVER + "lisen = 1\n")
    assert caught.value.hint == "did you mean listen?"


@pytest.mark.parametrize(
    ("text", "context", "reason"),
    [
        (SERVER, LONELY, "no address that other nodes reach"),
        (CLIENT, LONELY, "no IPv6 address to come from"),
        (SERVER.replace("3307", "3306"), TunnelContext("slappart3", IPv4Address("10.0.0.3"),
         ipv4_public=IPv4Address("10.0.0.3")), "itself listens"),
        (SERVER.replace(PIN, "file:x"), TunnelContext("slappart3", IPv4Address("10.0.0.3"),
         ipv6=IPv6Address("::1")), "no files can be read here"),
    ],
)  # fmt: skip
def test_refused_by_the_partition(text, context, reason):
    with pytest.raises(TunnelError, match=reason):
        parse(text, context=context)


@pytest.mark.parametrize(
    "name", ["", ".cfg", "..", ".db", "a/b", "a b", "a\nb", "ä", "x" * 64, "a.cfg.cfg", "db]"]
)
def test_bad_names(name):
    with pytest.raises(TunnelError, match="the name"):
        parse(SERVER, name=name)


@pytest.mark.parametrize("name", ["a", "0", "a.b-c_d", "x" * 63])
def test_good_names(name):
    assert parse(SERVER, name=f"{name}.cfg") == parse(SERVER, name=name)
    assert parse(SERVER, name=name).short_name == name


def test_names_of_files_are_escaped():
    with pytest.raises(TunnelError) as caught:
        parse_declaration("", name="a\nb\udcff.cfg", file="etc/tunnel/a\nb\udcff.cfg", context=CONTEXT)
    refused = refusal(caught.value, name="a\nb.cfg", partition="slappart3", file="etc/tunnel/a\nb\udcff.cfg")
    for text in (str(caught.value), caught.value.resource, refused.name, refused.file, refused.reason):
        assert text.isascii()
        assert text.isprintable()


def test_too_many_pins(monkeypatch):
    monkeypatch.setattr("stunnel_mgr.declaration.MAX_PINS", 1)
    with pytest.raises(TunnelError, match="more than 1 certificates") as caught:
        parse(SERVER + f"  {PIN}\n  {TWO.fingerprint}\n")
    assert caught.value.line == 6  # a repeated one counts: it costs as much to read


def test_of_the_operator():
    values = {"mode": "server", "listen": "3306", "connect": "3307", "allow": f"\n{PIN}\nsha256:00"}
    entries = {key: Entry.of(value, line) for line, (key, value) in enumerate(values.items(), 11)}
    with pytest.raises(TunnelError) as caught:
        declare(entries, name="db", file="slapos.cfg", line=10, context=CONTEXT)
    assert caught.value.line == 16
    entries["allow"] = Entry.of(PIN, 14)
    tunnel = declare(entries, name="db", file="etc/tunnel/db.cfg", line=10, context=CONTEXT)
    assert tunnel == parse(SERVER)


def of_the_operator(listen, mode="client"):
    values = {
        "client": {"mode": "client", "listen": listen, "connect": "[2001:db8::12]:3306", "peer": PIN},
        "server": {"mode": "server", "listen": listen, "connect": "3307", "allow": PIN},
    }[mode]
    entries = {key: Entry.of(value, line) for line, (key, value) in enumerate(values.items(), 11)}
    return declare(entries, name="db", file="slapos.cfg", line=10, context=CONTEXT)


def test_a_client_for_the_whole_node():
    assert format_endpoint(of_the_operator("127.0.0.1:3306").listen) == "127.0.0.1:3306"
    assert format_endpoint(of_the_operator("3306").listen) == "10.0.0.3:3306"
    for wrong in (
        "127.0.0.2:3306",
        "0.0.0.0:3306",
        "[::1]:3306",
        "10.0.0.4:3306",
        "127.0.0.1:80",
        "127.0.0.1:",
    ):
        with pytest.raises(TunnelError, match="listen") as caught:
            of_the_operator(wrong)
        assert caught.value.line == 12
    with pytest.raises(TunnelError, match=r"listen: '127.0.0.1:3306'"):
        of_the_operator("127.0.0.1:3306", "server")
    with pytest.raises(TunnelError, match="the address is the partition's own"):
        parse(CLIENT.replace("listen = 3306", "listen = 127.0.0.1:3306"))


def test_conflicts():
    a, b = parse(SERVER, name="a"), parse(SERVER, name="b")
    c = parse(CLIENT, name="c")
    operators = parse(SERVER.replace("3306", "4000"), name="a")
    kept, refused = resolve_conflicts([c, b, operators, a])
    assert [(tunnel.name, tunnel.listen_port) for tunnel in kept] == [
        ("slappart3/a", 4000),
        ("slappart3/b", 3306),
        ("slappart3/c", 3306),
    ]
    assert [(item.name, item.reason) for item in refused] == [
        ("slappart3/a", "etc/tunnel/db.cfg declares a tunnel of this name already"),
    ]
    kept, refused = resolve_conflicts([b, a])
    assert kept == (a,)
    assert refused[0].name == "slappart3/b"
    assert refused[0].reason == "slappart3/a listens on [2001:db8::3]:3306 already"


LINES = st.one_of(
    st.sampled_from(
        [
            "[tunnel]",
            "mode = server",
            "mode = client",
            "listen = 3306",
            "connect = 3307",
            "connect = [::1]:4",
            f"allow = {PIN}",
            f"peer = {PIN}",
            f"  {PIN}",
            "allow = ",
            " ; x",
            "",
            "identity = master",
            "[x]",
            "peer = file:etc/two.pem",
            f"allow = {TWO.fingerprint}",
            "connect = 10.0.0.9:1 # x",
        ]
    ),
    st.text(max_size=40),
    st.from_regex(r"(listen|connect|peer|allow) = [ -~]{0,30}", fullmatch=True),
)
PLAUSIBLE = st.tuples(
    st.permutations(["mode = server", "listen = 3306", "connect = 3307", f"allow = {PIN}"]),
    st.lists(LINES, max_size=3),
).map(lambda parts: ["[tunnel]", *parts[0], *parts[1]])
TEXTS = st.one_of(st.text(), st.one_of(st.lists(LINES, max_size=12), PLAUSIBLE).map("\n".join))
NAMES = st.one_of(st.just("db"), st.text(max_size=10), st.from_regex(r"[ -~]{0,20}", fullmatch=True))
QUIET = settings(database=None, deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))


@QUIET
@given(TEXTS, NAMES)
def test_any_text(text, name):
    try:
        tunnel = parse(text, name=name)
    except TunnelError as caught:
        error = caught
    else:
        error = None
    if error:
        assert error.code == "tunnel.declaration"
        assert f"{error} {error.resource}".isprintable()
        return
    config = render("slappart3", [tunnel], directory="/srv/tunnels")
    for line in config.files.get(CONFIG_FILE, "").split("\n"):
        if line and not line.startswith("; "):
            assert line.isascii()
            assert line.isprintable()
            assert line == f"[{tunnel.short_name}]" or " = " in f"{line} "
            assert line.split(" =")[0].isalnum() or line.startswith("[")


@QUIET
@given(PLAUSIBLE.map("\n".join))
def test_what_is_read_is_what_configparser_reads(text):
    try:
        ours = read_sections(text)
    except Exception:  # noqa: BLE001 (stricter than configparser is right; whatever is taken must read the same)
        return
    theirs = configparser.ConfigParser(
        interpolation=None, delimiters=("=",), inline_comment_prefixes=(";", "#"), comment_prefixes=(";", "#")
    )
    theirs.read_string(text)
    assert theirs.sections() == list(ours)
    for name, section in ours.items():
        read = {key: [part for _, part in entry.parts] for key, entry in section.entries.items()}
        expected = {key: [part for part in value.split("\n") if part] for key, value in theirs[name].items()}
        assert read == expected
