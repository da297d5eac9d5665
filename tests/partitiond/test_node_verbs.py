"""``partitiond node``: its words, and the configuration of a node that owns nothing of the machine."""

import json
import os
import pwd
import shlex
import subprocess
from pathlib import Path

import pytest
from json_schemas import validate
from supervisor.options import ServerOptions

from partitiond import cli, cli_node_parser, execute, lock
from partitiond.cli_parser import parser

USER = 4996
_CONFIGURATION = """\
[slapos]
computer_id = local
master_url = http://127.0.0.1:1/
software_root = {base}/soft
instance_root = {base}/inst
root_check = False
forbid_supervisord_automatic_launch = true

[slapformat]
input_definition_file = {base}/definition.cfg
partition_amount = 2
alter_user = false
alter_network = false
create_tap = false
create_tun = false
partition_has_ipv6_range = true
"""
_DEFINITION = """\
[computer]
address = 127.0.0.1/255.255.255.255

[partition_0]
address = 127.0.0.1/255.255.255.255 2001:db8::2/ffff:ffff:ffff:ffff::
ipv6_range = 2001:db8:0:0:4001::/80
pathname = part0
user = own
network_interface =

[partition_1]
address = 127.0.0.1/255.255.255.255
pathname = part1
user = own
"""


@pytest.fixture(scope="module")
def own():
    """A directory of a user's own, with the configuration of such a node."""
    base = Path("/srv/own")
    base.mkdir()
    subprocess.run(["/usr/sbin/useradd", "-M", "-u", str(USER), "-d", base, "own"], check=True)
    os.chown(base, USER, pwd.getpwnam("own").pw_gid)
    try:
        yield base
    finally:
        subprocess.run(["/usr/sbin/userdel", "own"], check=True)
        subprocess.run(["/bin/rm", "-rf", base], check=True)


@pytest.fixture(autouse=True)
def written(own):
    write(own)


def write(base, *replaced, definition=()):
    text, defined = _CONFIGURATION.format(base=base), _DEFINITION
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    for old, new in definition:
        assert old in defined
        defined = defined.replace(old, new)
    (base / "slapos.cfg").write_text(text)
    (base / "definition.cfg").write_text(defined)


def said(command, own, *words, expect=0, uid=USER, cwd="/"):
    """What a verb says that the user runs: its output and errors."""
    switch = [execute.SETPRIV, "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--"]
    done = subprocess.run(
        [*switch, *command.line(*words)],
        env={**command.environment, "SLAPOS_CONFIGURATION": str(own / "slapos.cfg")},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


# --- words


@pytest.mark.parametrize(
    "words",
    [
        "instance --nonsense",
        "instance --all --only-cp slappart0",
        "instance --maximum-periodicity",
        "software --only-cp slappart0",
        "format --console x",
        "format --forc",
        "nonsense",
        "",
        "boot",
        "bang",
        "bang -m again",
        "prune --whatever",
        "register title",
    ],
)
def test_wrong_use(words, capsys):
    try:
        status = cli.main(["node", *words.split()])
    except SystemExit as end:
        status = end.code
    assert status == 64
    assert "next: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        # the packaged crontab of slapos.core, and its StandaloneSlapOS
        "software --verbose --logfile=/opt/slapos/log/slapos-node-software.log",
        "instance --verbose --logfile=/opt/slapos/log/slapos-node-instance.log --promise-timeout 20",
        "report --maximal_delay=3600 --verbose --logfile=/opt/slapos/log/slapos-node-report.log",
        "format -v --log-file /opt/slapos/log/slapos-node-format.log --local",
        "format --now --cfg etc/slapos.cfg",
        "software --cfg etc/slapos.cfg --force -v --buildout-debug",
        "instance -q --all --now --pidfile x --buildout b --supervisord-socket s --master-url http://m/",
        "instance -c f --only slappart0,slappart1 --debug --json",
        "software --garbage-collect --only-sr https://example.com/software.cfg",
        "promise --only-cp slappart0",
        "status slappart0:*",
        "supervisorctl tail -f slappart0:x",
        "supervisord -n",
    ],
)
def test_words_that_slapos_takes(words):
    assert parser().parse_args(["node", *words.split()]).node_verb == words.split()[0]


def test_options_stand_in_for_keys():
    line = "node instance --maximum-periodicity 7 --master-url http://m/ --pidfile p --buildout-debug".split()
    options = parser().parse_args(line)
    assert cli_node_parser.overrides(options) == {
        ("slapos", "maximum_periodicity"): "7",
        ("slapos", "master_url"): "http://m/",
    }
    assert list(cli_node_parser.idle(options)) == ["--buildout-debug", "--pidfile"]


# --- the node that owns nothing


def test_root_is_refused(own, capsys):
    assert cli.main(["node", "instance", "-c", str(own / "slapos.cfg")]) == 1
    said = capsys.readouterr().err
    assert "partitiond owns the node's network" in said
    assert "partitiond owns the partitions' users" in said
    assert not (own / "inst").exists()


def test_a_pair_that_is_not_there_is_an_open_case(own, command):
    write(own, ("root_check = False", f"root_check = False\nkey_file = {own}/key\ncert_file = {own}/cert"))
    assert f"{own}/key cannot be read" in said(command, own, "status")


def test_half_of_it_is_a_node_of_roots(own, command):
    write(own, ("alter_user = false", "alter_user = true"))
    assert "partitiond owns the node's network" in said(command, own, "node", "format", expect=1)
    assert not (own / "inst").exists()


def test_what_is_not_there_says_so_at_once(own, command):
    for verb in ("apply", "run"):
        assert "[node.unmanaged]" in said(command, own, verb, expect=1)
    for words in (("sync", "usage"), ("node", "collect")):
        assert "next: " in said(command, own, *words, expect=64)
    assert not (own / "inst" / "part0").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("pathname = part1", "pathname = part7", "the same letters for all partitions"),
        ("pathname = part1", "pathname = other1", "the same letters for all partitions"),
        ("pathname = part1", "pathname = ../part1", "the same letters for all partitions"),
        ("[partition_1]", "[partition_2]", "the number of the section"),
        ("127.0.0.1/255.255.255.255 2001:db8::2/ffff:ffff:ffff:ffff::", "2001:db8::2/64", "one IPv4 address"),
        ("2001:db8::2/ffff:ffff:ffff:ffff::", "2001:db8::2/ffff:0:ffff::", "addresses with their netmasks"),
        ("ipv6_range = 2001:db8:0:0:4001::/80", "ipv6_range = everything", "an IPv6 network"),
        ("user = own", "user = root", "own, who runs this"),
    ],
)
def test_bad_definitions(own, command, old, new, words):
    write(own, definition=[(old, new)])
    text = said(command, own, "node", "format", "--now", expect=1)
    assert f"{own}/definition.cfg: [partition_" in text
    assert words in text
    assert not (own / "inst" / "part0").exists()


def test_without_a_definition(own, command):
    write(own, (f"input_definition_file = {own}/definition.cfg\n", ""))
    assert "input_definition_file = ''" in said(command, own, "node", "format", expect=1)
    write(own, ("create_tap = false", "create_tap = true"))
    assert "a tap is root's to make" in said(command, own, "node", "format", expect=1)


def test_it_is_made_also_where_the_master_is_down(own, command):
    shown = said(command, own, "node", "format", "--now", "--dry-run")
    assert "part0" in shown
    assert not (own / "inst").exists()
    assert "[slap.unreachable]" in said(command, own, "node", "format", "--now", expect=2)
    found = json.loads((own / "inst" / "part0" / ".slapos-resource").read_text())
    assert [one["addr"] for one in found["address_list"]] == ["127.0.0.1", "2001:db8::2"]
    assert found["ipv6_range"]["network"] == "2001:db8:0:0:4001::/80"
    assert (own / "inst" / "part1").stat().st_mode & 0o777 == 0o750
    marks = {path: path.stat().st_mtime_ns for path in (own / "inst").glob("**/*") if path.is_file()}
    said(command, own, "node", "format", "--now", "--local")
    assert {path: path.stat().st_mtime_ns for path in marks} == marks | {
        path: path.stat().st_mtime_ns for path in marks if path.name == "lock"
    }
    status = json.loads(said(command, own, "status", "--json"))
    validate(status)
    assert [item["id"] for item in status["partitions"]] == ["part0", "part1"]
    shown = said(command, own, "show", "part0")
    assert "2001:db8::2/64" in shown
    assert "[show.unknown_partition]" in said(command, own, "show", "part7", expect=1)
    # nobody may start it but its owner, and nobody has
    assert "[supervisor.down]" in said(command, own, "node", "instance", expect=1)
    assert "[slap.unreachable]" in said(command, own, "node", "software", expect=1)


@pytest.mark.parametrize(("directory", "fine"), [("it's a %(x)s", True), ("a ;b", False), ("a\nb", False)])
def test_the_watchdog_finds_its_configuration_from_anywhere(own, command, directory, fine):
    place = own / directory
    place.mkdir(exist_ok=True)
    (own / "slapos.cfg").rename(place / "own.cfg")
    words = ("node", "format", "--now", "--local", "-c", "own.cfg")
    shown = said(command, own, *words, expect=0 if fine else 1, cwd=place)
    if not fine:
        assert "the file must lie at a path without" in shown
        return
    found = ServerOptions().read_config(str(own / "inst" / "etc" / "supervisord.conf"))
    (watchdog,) = [one for one in found.process_group_configs if one.name == "watchdog"]
    assert shlex.split(watchdog.process_configs[0].command)[-1] == str(place / "own.cfg")


def test_one_pass_of_a_kind_at_a_time(own, command):
    said(command, own, "node", "software", expect=1)
    with lock.exclusive(own / "inst" / "var" / "partitiond" / "state" / "pass-software", "a test"):
        assert "[node.busy]" in said(command, own, "node", "software", expect=10)
        assert "[supervisor.down]" in said(command, own, "node", "instance", expect=1)


def test_somebody_elses_directories_stay_as_they_are(own, command):
    subprocess.run(["/bin/rm", "-rf", own / "inst"], check=True)
    (own / "inst").mkdir(mode=0o755)
    text = said(command, own, "node", "format", "--local", expect=1)
    assert "Permission denied" in text
    (own / "inst").rmdir()
