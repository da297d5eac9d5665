"""``partitiond register`` against a panel with real TLS: files, modes, what is refused, and a death at any moment."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import production_master
import pytest
from cryptography import x509
from json_schemas import validate
from killed_calls import Killed, cut_short

from partitiond import config, config_edit, node_pair, registration, registration_config
from partitiond.errors import PartitiondError, WrongUseError
from partitiond.registration_config import Wish
from slap_client.errors import SlapError
from stunnel_mgr.identity import load_identity, make_identity

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "good-token"
EXISTING = """\
; the node of the operator
[slapos]
computer_id = COMP-123   ; as in the panel
master_url = https://slap.example.com/
software_root = /srv/r/software
instance_root = /srv/r/instance
key_file =
    /nowhere/key
# kept
[slapformat]
interface_name = lo
partition_amount = 3
create_tap = false
"""


@pytest.fixture
def master():
    with production_master.running() as found:
        found.tokens.add("good-token")
        yield found
        assert found.violations == []


class Node:
    def __init__(self, directory, master):
        self.directory, self.master = directory, master
        self.cfg = directory / "etc" / "slapos.cfg"
        self.ssl = directory / "etc" / "ssl"
        self.tokens = []

    def register(self, token=TOKEN, title="my node", **more):
        def give():
            self.tokens.append(token)
            return token

        given = {
            "web_url": self.master.web_url,
            "master_url": self.master.url,
            "ca_file": self.master.ca_file,
            **more,
        }
        return registration.run(Wish(cfg=self.cfg, title=title, **given), give)

    def pair(self):
        return load_identity((self.ssl / "certificate").read_bytes(), (self.ssl / "key").read_bytes())

    def tree(self):
        return {
            str(path.relative_to(self.directory)): path.read_bytes() if path.is_file() else None
            for path in self.directory.rglob("*")
        }


@pytest.fixture
def node(tmp_path, master):
    (tmp_path / "node").mkdir()
    return Node(tmp_path / "node", master)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_node_from_nothing(node, master):
    value = node.register(interface="lo", partitions=2, create_tap=True)
    assert (value["computer_id"], value["config_action"], value["kept"]) == ("COMP-123", "created", [])
    assert [mode(node.ssl / name) for name in ("key", "certificate", "partition_pki", ".")] == [
        0o600,
        0o644,
        0o711,
        0o711,
    ]
    found = config.load(node.cfg)
    assert (found.computer_id, found.master_url) == ("COMP-123", master.url)
    assert (found.key_file, found.cert_file) == (node.ssl / "key", node.ssl / "certificate")
    assert found.certificate_repository == node.ssl / "partition_pki"
    assert (found.partition_amount, found.interface, found.create_tap) == (2, "lo", True)
    assert str(found.master_ca_file) == master.ca_file
    assert found.warnings == ()
    node_pair.check(found)
    assert (
        "CN=COMP-123" in x509.load_pem_x509_certificate(node.pair().certificate_pem).subject.rfc4514_string()
    )
    ((asked),) = master.asked
    assert (asked.fields, asked.headers["x-access-token"]) == ({"title": "my node"}, "good-token")
    assert not (node.ssl / "registration.json").exists()
    assert not [name for name in node.tree() if "good-token" in str(node.tree()[name])]


def test_an_existing_configuration_keeps_all_other_lines(node, master):
    node.cfg.parent.mkdir()
    node.cfg.write_text(EXISTING)
    node.cfg.chmod(0o640)
    value = node.register(master_url=None)
    assert value["config_action"] == "changed"
    expected = EXISTING.replace("key_file =\n    /nowhere/key\n", f"key_file = {node.ssl}/key\n").replace(
        "# kept\n",
        f"# kept\ncert_file = {node.ssl}/certificate\nmaster_ca_file = {master.ca_file}\n"
        f"certificate_repository_path = {node.ssl}/partition_pki\n",
    )
    assert node.cfg.read_text() == expected
    (aside,) = [Path(one) for one in value["kept"]]
    assert (aside.read_text(), mode(aside), mode(node.cfg)) == (EXISTING, 0o640, 0o640)


def test_an_older_master_that_gives_no_reference(node, master):
    master.old_register = True
    assert node.register()["computer_id"] == "COMP-123"


def test_a_dry_run_asks_nobody_and_writes_nothing(node, master):
    before = node.tree()
    value = node.register(dry_run=True)
    assert (value["dry_run"], value["computer_id"]) == (True, None)
    assert all(step.startswith("would ") for step in value["steps"])
    assert (master.asked, node.tokens, node.tree()) == ([], [], before)


# --- once more


def test_a_pair_that_is_valid_is_kept(node, master):
    node.register()
    before = node.tree()
    master.tokens.add("second")
    with pytest.raises(PartitiondError) as caught:
        node.register("second")
    assert caught.value.code == "register.exists"
    assert "--force" in caught.value.hint
    assert (len(master.asked), node.tree(), node.tokens) == (1, before, ["good-token"])


def test_once_more_with_force(node, master):
    node.register()
    first, text = node.pair(), node.cfg.read_text()
    master.tokens.add("second")
    with pytest.raises(SlapError) as caught:
        node.register("second", force=True)
    assert "Certificate still active." in str(caught.value)
    assert "revoke" in caught.value.hint
    assert node.pair() == first
    master.revoke("COMP-123")
    value = node.register("second", force=True)
    assert value["config_action"] == "unchanged"
    assert node.pair() != first
    (aside,) = [Path(one) for one in value["kept"]]
    assert re.fullmatch(r"old-\d{8}T\d{6}Z", aside.name)
    assert load_identity((aside / "certificate").read_bytes(), (aside / "key").read_bytes()) == first
    assert (mode(aside), mode(aside / "key")) == (0o700, 0o600)
    assert node.cfg.read_text() == text


def test_a_pair_that_has_ended_or_is_damaged_is_replaced(node, master):
    node.register()
    (node.ssl / "certificate").write_bytes(b"damaged")
    master.revoke("COMP-123")
    master.tokens.add("second")
    node.register("second")
    node.pair()


def test_plain_files_of_slapos_core_are_taken_over(node, master):
    old = make_identity("COMP-123")
    node.ssl.mkdir(parents=True)
    (node.ssl / "key").write_bytes(old.key_pem)
    (node.ssl / "certificate").write_bytes(old.certificate_pem)
    with pytest.raises(PartitiondError, match="valid until"):
        node.register()
    value = node.register(force=True)
    assert node.pair() != old
    assert (Path(value["kept"][0]) / "key").read_bytes() == old.key_pem


def test_another_computer_needs_force_and_no_second_token(node, master):
    node.cfg.parent.mkdir()
    node.cfg.write_text(EXISTING.replace("COMP-123", "COMP-7"))
    with pytest.raises(PartitiondError) as caught:
        node.register()
    assert caught.value.code == "register.another_computer"
    assert "COMP-7" in node.cfg.read_text()
    assert not (node.ssl / "key").exists()
    assert mode(node.ssl / "registration.json") == 0o600
    value = node.register("none", force=True)
    assert (value["computer_id"], len(master.asked)) == ("COMP-123", 1)
    assert (
        "computer_id = COMP-123   ; as in the panel".split()
        == next(line for line in node.cfg.read_text().splitlines() if line.startswith("computer_id")).split()
    )


# --- what goes wrong


@pytest.mark.parametrize(
    ("how", "code", "words", "hint"),
    [
        ("token", "slap.refused", "does not take the token", "new token"),
        ("404", "slap.not_found", "404", "--master-url-web"),
        ("500", "slap.unavailable", "500", "wait"),
        ("redirect", "slap.refused", "redirect", "--master-url-web"),
        ("down", "slap.unreachable", "no connection", "check --master-url-web"),
        ("authority", "slap.tls", "sha256:", "--master-fingerprint"),
        ("plain", "slap.value", "without TLS", "https://"),
        ("huge", "slap.garbage", "bytes", ""),
    ],
)
def test_who_is_refused_loses_nothing(node, master, how, code, words, hint):
    node.cfg.parent.mkdir()
    node.cfg.write_text(EXISTING)
    more, token = {}, "good-token"
    if how == "token":
        token = "spent"
    elif how == "down":
        master._web.close()
    elif how == "authority":
        more["ca_file"] = None
    elif how == "plain":
        more["web_url"] = "http://panel.example.com/"
    else:
        status = {"404": 404, "500": 500, "redirect": 302, "huge": 200}[how]
        body = b"x" * 10**6 if how == "huge" else b""
        master.override("Person_requestComputer", status, body)
    with pytest.raises(SlapError) as caught:
        node.register(token, **more)
    assert caught.value.code == code
    assert words in str(caught.value)
    assert hint in caught.value.hint
    assert "good-token" not in str(caught.value)
    assert node.cfg.read_text() == EXISTING
    assert list(node.ssl.iterdir()) == []


def answer(**changes):
    pair = make_identity("COMP-123")
    value = {
        "certificate": pair.certificate_pem.decode(),
        "key": pair.key_pem.decode(),
        "reference": "COMP-123",
        **changes,
    }
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b"{}",
        b"\xff" * 10,
        b"[" * 50_000,
        answer(key=make_identity("other").key_pem.decode()),
        answer(certificate="none"),
        answer(certificate=None),
        answer(reference="../../etc"),
        answer(reference="", certificate=make_identity("nobody").certificate_pem.decode()),
    ],
)
def test_an_answer_of_no_use_is_kept_aside(node, master, body):
    master.override("Person_requestComputer", 200, body)
    with pytest.raises(PartitiondError) as caught:
        node.register()
    assert caught.value.code == "register.answer"
    (kept,) = node.ssl.iterdir()
    assert str(kept) in str(caught.value)
    assert json.loads(kept.read_text())["answer"] == body.decode("utf-8", "replace")
    assert not node.cfg.exists()
    # and it does not stand in the way
    master.clear()
    assert node.register()["computer_id"] == "COMP-123"


def test_bad_options_spend_no_token(node, master):
    for more in (
        {"partitions": -1},
        {"ipv4_network": "nonsense"},
        {"interface": "much-too-long-a-name"},
        {"title": "\n"},
    ):
        with pytest.raises(PartitiondError):
            node.register(**more)
    assert (master.asked, node.tokens) == ([], [])
    assert not node.cfg.parent.exists()


@pytest.mark.parametrize(
    "more",
    [
        {"interface": "eth7"},
        {"partitions": 5},
        {"ipv4_network": "10.9.0.0/16"},
        {"ipv6_interface": "eth7"},
        {"create_tap": True},
    ],
)
def test_options_that_an_existing_configuration_contradicts(node, master, more):
    node.cfg.parent.mkdir()
    node.cfg.write_text(EXISTING)
    with pytest.raises(WrongUseError) as caught:
        node.register(**more)
    assert caught.value.code == "register.option"
    assert (master.asked, node.tokens, node.cfg.read_text()) == ([], [], EXISTING)
    # what it says already contradicts nobody
    value = node.register(interface="lo", partitions=3, dry_run=True, fingerprint="sha256:" + "0" * 64)
    assert "master_fingerprint in [partitiond]" in value["steps"][0]


def test_a_drop_in_that_goes_before_is_named(node, master):
    Path(f"{node.cfg}.d").mkdir(parents=True)
    Path(f"{node.cfg}.d", "tls.cfg").write_text(
        "[slapos]\nkey_file = /elsewhere\ncert_file = /elsewhere.crt\n"
    )
    with pytest.raises(PartitiondError) as caught:
        node.register()
    assert caught.value.code == "register.overridden"
    assert master.asked == []


def test_a_full_disk_spends_no_token(node, master, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        node.register()
    assert master.asked == []


@pytest.mark.parametrize("start", ["nothing", "pair"])
def test_killed_anywhere_after_the_answer(node, master, monkeypatch, start, tmp_path):
    """The next call goes on with the answer that was saved; at no moment is there a pair that does not match."""
    if start == "pair":
        node.register(interface="lo")
        master.revoke("COMP-123")
        master.tokens.add("good-token")
    first = node.pair() if start == "pair" else None

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(registration, "_take_over", killed)
        with pytest.raises(Killed):
            node.register(interface="lo", force=True)
    shutil.copytree(node.directory, tmp_path / "saved", symlinks=True)
    asked, after, done = len(master.asked), 0, False
    while not done:
        shutil.rmtree(node.directory)
        shutil.copytree(tmp_path / "saved", node.directory, symlinks=True)
        done = cut_short(monkeypatch, after, lambda: node.register(interface="lo", force=True))
        if first or all((node.ssl / name).exists() for name in ("key", "certificate")):
            node.pair()
        if (node.ssl / "registration.json").exists():
            assert not done
            node.register(interface="lo", force=True)
        assert node.pair() != first
        assert config.load(node.cfg).computer_id == "COMP-123"
        assert not (node.ssl / "registration.json").exists()
        after += 1
    assert len(master.asked) == asked
    assert after > 20


# --- the command


def run(node, *arguments, given=""):
    return subprocess.run(
        [sys.executable, "-P", "-m", "partitiond", "-c", str(node.cfg), *arguments],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_command(node, master, tmp_path):
    panel = ("--master-url", master.url, "--master-url-web", master.web_url, "--interface-name", "lo")
    dry = run(node, "--json", "register", "-n", *panel, "title", given="no token")
    assert dry.returncode == 0, dry.stderr
    validate(json.loads(dry.stdout))
    unknown = run(node, "--json", "register", *panel, "title", given="good-token\n")
    assert unknown.returncode == 1
    assert json.loads(unknown.stdout)["error"]["code"] == "slap.tls"
    assert "next: name the panel's authorities by --master-ca-file" in unknown.stderr
    none = run(node, "register", *panel, "--master-ca-file", master.ca_file, given="\n")
    assert (none.returncode, "[register.token]" in none.stderr) == (64, True)
    done = run(
        node, "--json", "register", *panel, "--master-ca-file", master.ca_file, "title", given="good-token\n"
    )
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    validate(value)
    assert value["computer_id"] == "COMP-123"
    again = run(node, "register", *panel, "--token", "x", "title")
    assert (again.returncode, "[register.exists]" in again.stderr) == (1, True)
    assert "next: " in again.stderr
    master.revoke("COMP-123")
    master.tokens.add("third")
    (tmp_path / "token").write_text("third\n")
    forced = run(node, "register", "--force", *panel, "--token-file", str(tmp_path / "token"), "title")
    assert forced.returncode == 0, forced.stderr
    assert "this node is COMP-123" in forced.stdout


# --- lines of a configuration


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "[s]\nk = v\n"),
        ("[t]\nk = 1", "[t]\nk = 1\n\n[s]\nk = v\n"),
        ("[s]\nk=1 ; why\nj = 2\n", "[s]\nk = v ; why\nj = 2\n"),
        ("[s]\nK: 1\n   2\n  # about\n   3\nj = 2\n", "[s]\nk = v\n  # about\nj = 2\n"),
        ("[s]\nj = 2\n\n\n[t]\nk = 1\n", "[s]\nj = 2\nk = v\n\n\n[t]\nk = 1\n"),
        ("[s]\r\nk = 1\r\n", "[s]\r\nk = v\r\n"),
        ("\ufeff[s]\n# k = 1\n", "\ufeff[s]\n# k = 1\nk = v\n"),
        ("[s]\nkk = 1\n k = 5\n", "[s]\nkk = 1\n k = 5\nk = v\n"),
    ],
)
def test_lines_are_set_in_their_place(text, expected):
    assert config_edit.set_keys(text, "s", {"k": "v"}) == expected
    assert config_edit.set_keys(expected, "s", {"k": "v"}) == expected


def test_the_default_interface(tmp_path):
    assert registration_config.default_interface(tmp_path) == "lo"
    (tmp_path / "route").write_text(
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n"
        "eth1\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\neth0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\n"
    )
    assert registration_config.default_interface(tmp_path) == "eth0"
    zero = "0" * 32
    (tmp_path / "ipv6_route").write_text(
        f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo\n"
        f"{zero} 00 {zero} 00 fe80{'0' * 28} 00000400 00000001 00000000 00000003     eth2\n"
    )
    assert registration_config.default_interface(tmp_path) == "eth2"
