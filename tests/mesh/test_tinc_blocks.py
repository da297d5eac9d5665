"""Host blocks and keys, against the real tincd where that says what is right."""

import ipaddress
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from netplan import tinc, tinc_config, tinc_keys
from netplan.errors import NetplanError

NETWORK = ipaddress.IPv4Network("10.64.0.0/16")
TINCD = "/usr/sbin/tincd"


@pytest.fixture(scope="module")
def public():
    return tinc_keys.public_of(tinc_keys.make(2048))


@pytest.fixture(scope="module")
def other():
    return tinc_keys.public_of(tinc_keys.make(2048))


def block(key, name="B", subnet="10.64.4.0/23", **more):
    return tinc.HostBlock(name, key, (ipaddress.IPv4Network(subnet),), **more)


def text(key, name="B", lines=("Subnet = 10.64.4.0/23",)):
    return "\n".join((f"Name = {name}", *lines)) + f"\n{key}"


def refusal(content, **more):
    with pytest.raises(NetplanError) as caught:
        tinc.parse(content.encode() if isinstance(content, str) else content, **more)
    assert caught.value.hint
    return caught.value.code, str(caught.value)


# --- what is understood -----------------------------------------------------------------------------------------------


def test_what_is_rendered_reads_back(public):
    whole = block(
        public,
        addresses=(tinc.Endpoint("2001:db8::2"), tinc.Endpoint("node.example", 1655)),
        port=1655,
        cipher="aes-256-cbc",
        digest="sha256",
    )
    assert tinc.parse(tinc.render(whole, named=True).encode()) == (whole,)
    # a host file of tinc 1.0 bears its node's name
    assert tinc.parse(tinc.render(whole).encode(), file_name="B") == (whole,)


def test_several_blocks_as_tinc_1_1_exports_them(public, other):
    line = "#---------------------------------------------------------------#\n"
    both = text(public) + line + text(other, "C", ("subnet 10.64.6.0/23#5", "ADDRESS=192.0.2.7"))
    found = tinc.parse(both.replace("\n", "\r\n").encode())
    assert [one.name for one in found] == ["B", "C"]
    assert found[1].addresses == (tinc.Endpoint("192.0.2.7"),)
    assert found[1].subnets == (ipaddress.IPv4Network("10.64.6.0/23"),)


def test_nothing_that_would_change_how_tincd_runs_is_taken_over(public):
    lines = (
        "Subnet = 10.64.4.0/23",
        "IndirectData = yes",
        "TCPOnly = yes",
        "Interface = eth0",
        "Ed25519PublicKey = x",
    )
    (found,) = tinc.parse(text(public, lines=lines).encode())
    assert found.passed_over == ("IndirectData", "TCPOnly", "Interface")
    assert "eth0" not in tinc.render(found)


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/b", ".", "..", "a b", "a-b", "$HOME", "x" * 61, "naïve"[:2] + "-"]
)
def test_a_name_that_is_none(public, name):
    code, words = refusal(text(public, name))
    assert code == "mesh.name"
    assert "name of a node" in words


def test_a_block_without_a_name(public):
    assert refusal(text(public).partition("\n")[2])[0] == "mesh.name"
    assert refusal("Name = B\n" + text(public, "C"))[0] == "mesh.name"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no host block"),
        (b"# nothing\n", "no host block"),
        (b"Name = B\nSubnet\n", "line 2: is no variable with a value"),
        (b"Name = B\nAddress = \x1b[2J\n", "line 2: has a control character"),
        (b"Name = B\nAddress = caf\xc3\xa9\n", "line 2: is no plain text"),
        (b"\x7fELF\x02\x01\x01\0\0", "line 1: has a control character"),
        (b"Name = B\n-----BEGIN RSA PUBLIC KEY-----\nMII\n", "a key begins there and does not end"),
        (b"x" * (tinc.MOST_INPUT + 1), "MiB"),
    ],
)
def test_what_is_no_block(content, words):
    code, said = refusal(content)
    assert code == "mesh.block"
    assert words in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Address = 192.0.2.999", "line 3: 192.0.2.999 is neither"),
        ("Address = fe80::1%eth0", "is neither"),
        ("Address = |/bin/sh", "is neither"),
        ("Address = 192.0.2.1 70000", "is no port"),
        ("Port = 0", "is no port"),
        ("Port = /etc/services", "is no port"),
        ("Cipher = none", "in the clear"),
        ("Digest = none", "in the clear"),
        ("Port = 655\nPort = 656", "more than one port"),
        ("\n".join(f"Address = 192.0.2.{number}" for number in range(40)), "more than 32"),
        ("X = " + "y" * tinc.MOST_BLOCK, "more than 16 KiB"),
    ],
)
def test_a_value_that_is_none(public, line, words):
    code, said = refusal(text(public, lines=("Subnet = 10.64.4.0/23", line)))
    assert code == "mesh.block"
    assert words in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "names no range"),
        ("Subnet = 10.64.4.1/23", "has host bits set"),
        ("Subnet = fd00::/64", "IPv4 only"),
        ("Subnet = 02:00:00:00:00:01", "is no IPv4 network"),
        ("Subnet = 10.64.4.0/23\nSubnet = 10.64.5.0/24", "twice"),
    ],
)
def test_a_range_that_is_none(public, line, words):
    code, said = refusal(text(public, lines=(line,)))
    assert code == "mesh.range"
    assert words in said


def _pem(key):
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, kind).decode()


def test_a_key_that_is_none(public):
    cases = {
        "no public key": "",
        "is not taken over": "PublicKeyFile = /etc/shadow",
        "more than one key": public + public,
        "cannot be read": public.replace(public.split("\n")[2] + "\n", ""),
        "of another kind": _pem(ed25519.Ed25519PrivateKey.generate()),
        "1024 bits": _pem(rsa.generate_private_key(65537, 1024)),  # noqa: S505 - that it is weak is the point
        "holds a private key": tinc_keys.make(2048),
        "cut off or damaged": "-----BEGIN RSA PUBLIC KEY-----\n?\n-----END RSA PUBLIC KEY-----\n",
    }
    for words, key in cases.items():
        code, said = refusal(text(key))
        assert code == "mesh.key"
        assert words in said, said
    code, said = refusal(text(public, lines=("PublicKey = AB",)))
    assert (code, "has to stand in the block" in said) == ("mesh.key", True)


@pytest.mark.parametrize(
    ("found", "code", "words"),
    [
        ({"name": "A"}, "mesh.name", "the name of this node"),
        ({"subnet": "10.65.0.0/23"}, "mesh.range", "no part of the mesh"),
        ({"subnet": "10.64.0.0/16"}, "mesh.clash", "that of this node"),
        ({"subnet": "10.64.2.128/25"}, "mesh.clash", "that of this node"),
        ({"subnet": "10.64.6.0/24"}, "mesh.clash", "overlaps 10.64.6.0/23, which is that of C"),
    ],
)
def test_who_may_not_join(public, other, found, code, words):
    own, peer = block("own key", "A", "10.64.2.0/23"), block(other, "C", "10.64.6.0/23")
    with pytest.raises(NetplanError) as caught:
        tinc.judge(block(public, **found), own=own, network=NETWORK, others=(peer,))
    assert (caught.value.code, words in str(caught.value)) == (code, True), caught.value


def test_a_key_of_somebody_else_joins_under_no_name(public, other):
    own, peer = block(public, "A", "10.64.2.0/23"), block(other, "C", "10.64.6.0/23")
    for key, words in ((public, "the key of this node"), (other, "the key of C")):
        with pytest.raises(NetplanError, match=words):
            tinc.judge(block(key), own=own, network=NETWORK, others=(peer,))
    tinc.judge(block(other, "C", "10.64.8.0/23"), own=own, network=NETWORK, others=(peer,))


# --- who passes on ------------------------------------------------------------------------------------------------------

V4, OTHER_V4, V6, PRIVATE = "192.0.2.1", "198.51.100.1", "2001:db8::1", "192.168.1.1"


@pytest.mark.parametrize(
    ("hosts", "needed"),
    [
        ((), False),
        (((),), False),
        (((V4,), (OTHER_V4,), ()), False),
        (((V4,), (), ()), True),
        (((V4,), (V6,)), True),
        (((V4,), (V6, OTHER_V4)), False),
        (((V6,), ("2001:db8::2",), ("fd00::3",)), False),
        (((V6,), ("2001:db8::2",), (PRIVATE,)), True),
        (((V4,), (OTHER_V4,), (PRIVATE,)), False),
        (((V4,), (PRIVATE,), ("10.1.1.1",)), True),
        ((("a.example",), ("b.example",), (V4,)), False),
    ],
)
def test_whose_peers_need_somebody_between_them(hosts, needed):
    peers = [
        block("key", f"N{number}", addresses=tuple(map(tinc.Endpoint, one)))
        for number, one in enumerate(hosts)
    ]
    assert tinc_config.need_a_relay(peers) is needed


# --- the real tincd -----------------------------------------------------------------------------------------------------


def test_keys_that_tincd_makes_are_read(tmp_path):
    (tmp_path / "hosts").mkdir()
    (tmp_path / "tinc.conf").write_text("Name = A\n")
    command = (TINCD, "-c", str(tmp_path), "-K2048")
    subprocess.run(command, check=True, input="", capture_output=True, text=True)
    private = (tmp_path / "rsa_key.priv").read_text()
    hosts = (tmp_path / "hosts" / "A").read_bytes()
    (found,) = tinc.parse(hosts + b"Subnet = 10.64.2.0/23\n", file_name="A")
    assert found.key == tinc_keys.public_of(private) == tinc_keys.read_public(found.key, "A")


def test_keys_that_we_make_are_read_by_tincd(tmp_path):
    """A tincd starts with the key, as far as its device, which is missing on purpose."""
    private = tinc_keys.make(2048)
    own = block(tinc_keys.public_of(private), "A", "10.64.2.0/23")
    mesh = tinc_config.Mesh(own, (), (), "sltinc", tmp_path / "key")
    (tmp_path / "hosts").mkdir()
    for name, content in mesh.files().items():
        (tmp_path / name).write_text(content + ("Device = /nowhere\n" if name == "tinc.conf" else ""))
    for content, words in ((private, "Could not open /nowhere"), ("none", "Reading RSA private key file")):
        (tmp_path / "key").write_text(content)
        (tmp_path / "key").chmod(0o600)
        line = (TINCD, "-D", "-c", str(tmp_path), f"--pidfile={tmp_path}/pid")
        done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=60)
        assert words in done.stderr
        assert "Warning" not in done.stderr
