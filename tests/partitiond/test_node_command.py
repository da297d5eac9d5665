"""The command line from outside: exit codes, errors in people's words and as JSON, no traceback, no foreign code."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from json_schemas import parsed

from partitiond import cli, cli_parser
from partitiond.log_echo import LogEcho

INSTALLED = Path("/opt/partitiond/bin/partitiond")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("plan", "--wrong"),
        ("apply", "--partition"),
        ("sync",),
        ("sync", "everything"),
        ("show",),
        ("tunnel",),
        ("tunnel", "dig"),
        ("tunnel", "check", "one", "two"),
        ("tunnel", "check", "--wrong"),
        ("plan", "surplus"),
        ("-c",),
    ],
)
def test_wrong_use_is_64_and_says_what_is_right(command, arguments):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (64, "")
    assert "Traceback" not in done.stderr
    assert "partitiond" in done.stderr


@pytest.mark.parametrize(
    "words", [("-f", "slappart0:http"), ("-100", "slappart0:http"), ("slappart0:http", "stderr")]
)
def test_options_of_supervisorctl_are_left_to_it(words):
    assert cli._parsed(["node", "tail", *words]).words == list(words)
    assert cli._parsed(["node", "tail", "--cfg", "x", *words]).words == list(words)


def test_who_has_to_wait_is_told_what_for():
    lines = ("node software", "sync software", "apply")
    assert tuple(cli_parser.named(cli._parsed(line.split())) for line in lines) == lines


@pytest.mark.parametrize("arguments", [("plan", "--wrong"), ("tunnel",), ("node", "status"), ()])
def test_wrong_use_is_one_object_where_json_is_asked_for(command, node_config, arguments):
    done = command("--json", "-c", node_config(0, interface="lo").path, *arguments)
    assert done.returncode == 64
    assert parsed(done)["error"]["code"] in ("cli.usage", "node.verb", "node.text")


@pytest.mark.parametrize(
    "arguments", [("--help",), ("plan", "-h"), ("tunnel", "list", "--help"), ("--version",)]
)
def test_help_is_fine(command, arguments):
    done = command(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "partitiond" in done.stdout


VERBS = [
    ("plan",),
    ("apply",),
    ("try",),
    ("confirm",),
    ("status",),
    ("show", "slappart0"),
    ("usage",),
    ("tunnel", "list"),
    ("tunnel", "check"),
    ("sync", "usage"),
    ("teardown",),
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_an_error_names_code_resource_cause_and_next_step(command, verb):
    done = command(*verb, "-c", "/nowhere/slapos.cfg")
    assert (done.returncode, done.stdout) == (1, "")
    first, second = done.stderr.splitlines()
    assert first.startswith("partitiond: [config.unreadable] /nowhere/slapos.cfg: ")
    assert "No such file" in first
    assert second.startswith("next: ")


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_without_root_it_says_so_at_once(command, verb):
    nobody = ["/usr/bin/setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]
    done = subprocess.run(
        [*nobody, *command.line(*verb, "--json")],
        env=command.environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    error = parsed(done)["error"]
    assert (error["code"], error["message"]) == ("cli.root", "this verb needs root")
    assert "sudo" in error["hint"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("place", ["before", "after", "both"])
def test_options_stand_before_or_after_the_verb(command, place):
    options = ("--json", "-c", "/nowhere/slapos.cfg")
    arguments = {
        "before": (*options, "plan"),
        "after": ("plan", *options),
        "both": ("--json", "plan", "-c", "/nowhere/slapos.cfg"),
    }[place]
    done = command(*arguments)
    assert parsed(done)["error"]["code"] == "config.unreadable"
    assert done.returncode == 1


def test_the_traceback_is_for_those_who_ask(command):
    assert "Traceback" not in command("plan", "-c", "/nowhere/slapos.cfg", "-v").stderr
    assert "Traceback" in command("plan", "-c", "/nowhere/slapos.cfg", "-vv").stderr


def test_an_interface_that_is_not_there(command, node_config):
    node = node_config(1, slapformat={"interface_name": "nowhere0"})
    done = command("apply", "--json", "-c", node.path)
    assert done.returncode == 1
    error = parsed(done)["error"]
    assert error["code"] == "network.no_interface"
    assert "interface_name" in error["hint"]
    assert not node.instance.exists()


def test_warnings_go_to_stderr_and_can_be_silenced(command, node_config):
    node = node_config(0, interface="lo", slapformat={"bridge_name": "br9"})
    done = command("plan", "--json", "-c", node.path)
    assert "bridge_name is not read" in done.stderr
    parsed(done)
    assert command("plan", "-q", "-c", node.path).stderr == ""


def test_a_time_that_is_none(command, node_config):
    node = node_config(0, interface="lo")
    done = command("usage", "--json", "--from", "the day before", "-c", node.path)
    assert done.returncode == 64
    assert "'the day before' is no time" in parsed(done)["error"]["message"]


def test_usage_of_an_unknown_partition(command, node_config):
    node = node_config(0, interface="lo")
    done = command("usage", "--partition", "nope", "--json", "-c", node.path)
    assert (done.returncode, parsed(done)["error"]["code"]) == (1, "usage.unknown_partition")


def test_an_unknown_partition(command, node_config):
    node = node_config(0, interface="lo")
    done = command("show", "slappart9", "--json", "-c", node.path)
    assert (done.returncode, parsed(done)["error"]["code"]) == (1, "show.unknown_partition")


def test_a_reader_that_goes_away_is_no_error_of_ours(command, node_config):
    node = node_config(300, interface="lo")
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" | head -c 1 >/dev/null', "sh", *command.line("plan", "-c", node.path)],
        env=command.environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.fixture
def foreign(tmp_path):
    """Canonical's netplan, so to speak: a package of that name that would do harm when it is imported."""
    mark = tmp_path / "imported"
    for name in ("netplan", "accounting", "partitiond", "json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            f"open({str(mark)!r}, 'w').close()\nraise SystemExit(99)\n"
        )
    return tmp_path, mark


def test_foreign_packages_are_never_seen_by_the_installed_program(foreign, bridge, node_config):
    directory, mark = foreign
    node = node_config(1)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(directory), "PYTHONHOME": str(directory)}
    done = subprocess.run(
        [str(INSTALLED), "plan", "--json", "-c", str(node.path)],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not mark.exists()
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["operations"]
    assert INSTALLED.read_bytes().split(b"\n")[0].split()[1:] == [b"-I"]


def test_the_foreign_packages_do_harm_where_nothing_is_isolated(foreign):
    """So that the test above proves something."""
    directory, mark = foreign
    interpreter = INSTALLED.with_name("python3")
    done = subprocess.run([str(interpreter), "-c", "import netplan"], cwd=directory, check=False)
    assert done.returncode == 99
    assert mark.exists()


_UNMANAGED = """\
[slapos]
computer_id = local
master_url = http://127.0.0.1:1/
software_root = {base}/soft
instance_root = {base}/inst

[slapformat]
input_definition_file = {base}/definition.cfg
alter_user = false
alter_network = false
create_tap = false
"""


@pytest.fixture
def of_others():
    """A directory that everybody may read, with a configuration of a node that owns nothing."""
    with tempfile.TemporaryDirectory(dir="/srv") as name:
        base = Path(name)
        base.chmod(0o755)
        (base / "slapos.cfg").write_text(_UNMANAGED.format(base=base))
        (base / "definition.cfg").write_text("[computer]\naddress = 127.0.0.1/255.0.0.0\n")
        yield base


def test_a_user_is_told_of_root_only_where_root_would_help(command, of_others):
    def code(*arguments, uid=65534, expect=1):
        line = ["/usr/bin/setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
        line += command.line("--json", *arguments)
        done = subprocess.run(
            line, env=command.environment, cwd="/", capture_output=True, text=True, check=False
        )
        assert done.returncode == expect, done.stderr
        return parsed(done)["error"]

    file = str(of_others / "slapos.cfg")
    found = code("status", "-c", file, uid=54321)
    assert (found["code"], found["resource"]) == ("node.nameless", "uid 54321")
    found = code("node", "instance", "-c", file, "--promise-timeout", "abc", expect=64)
    assert found["message"].startswith("--promise-timeout = 'abc'; allowed: ")
    (of_others / "definition.cfg").unlink()
    found = code("status", "-c", file)
    assert (found["code"], found["resource"]) == ("config.unreadable", str(of_others / "definition.cfg"))
    assert code("status", "-c", f"{file}x")["code"] == "config.unreadable"
    (of_others / "slapos.cfg").chmod(0o600)
    assert code("status", "-c", file)["code"] == "cli.root"


def test_a_status_outlives_the_reader(command, node_config):
    reading, writing = os.pipe()
    os.close(reading)
    line = command.line("plan", "-c", node_config(3, interface="lo").path)
    done = subprocess.run(
        line, env=command.environment, cwd="/", stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr


def test_what_builds_say_ends_quietly_when_nobody_reads_it(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    problems = []
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(threading, "excepthook", problems.append)
    with LogEcho(tmp_path, "*.log"):
        (tmp_path / "a.log").write_text("said\n")
    with contextlib.suppress(BrokenPipeError):
        stream.close()
    assert problems == []
