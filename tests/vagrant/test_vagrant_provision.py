"""The script that makes virtual machines nodes and a master, run here: what it writes, twice, and what it refuses.

What it installs is taken as it is; ``prove`` beside this runs the whole of it on fresh Debians.
"""

import configparser
import contextlib
import ipaddress
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
VAGRANT = ROOT / "vagrant"
SCRIPT = VAGRANT / "provision.sh"
CONFIGURATION = Path("/etc/opt/slapos")
UNITS = Path("/etc/systemd/system")
WRITTEN = (
    CONFIGURATION,
    UNITS,
    Path("/srv/releases"),
    Path("/var/lib/partitiond-provision"),
)
NODE = ("node", "--computer", "COMP-1", "--master", "http://[fd00:0:0:a::1]:18080/", "--interface", "eth0")
MASTER = ("master", "--listen", "fd00:0:0:a::1", "--interface", "eth0")
IPV6 = ("--ipv6", "fd00:0:0:1::1/64", "--on-link", "fd00::/48")
MESH = ("--mesh", "10.64.0.0/16", "--index", "1")
HERE = ("--skip-install", "--no-start")


def provision(*arguments, before=()):
    return subprocess.run(
        [*before, SCRIPT, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def machine():
    """A place for the script's files; those that were there stay, the others go."""
    before = [path for path in WRITTEN if path.exists()]
    kept = Path("/srv/kept-by-test")
    for path in before:
        shutil.copytree(path, kept / path.relative_to("/"), symlinks=True)
        shutil.rmtree(path)
    yield
    for path in WRITTEN:
        if path.exists():
            shutil.rmtree(path)
    for path in before:
        shutil.copytree(kept / path.relative_to("/"), path, symlinks=True)
    if kept.exists():
        shutil.rmtree(kept)


def run_ip(*lines):
    text = "".join(f"{line}\n" for line in lines)
    subprocess.run(["ip", "-batch", "-"], input=text, text=True, check=True)


@contextlib.contextmanager
def ethernet(*addresses):
    run_ip("link add eth0 type veth peer name far", "link set eth0 up", "link set far up")
    try:
        run_ip(*(f"address add {address} dev eth0" for address in addresses))
        yield
    finally:
        run_ip("link delete eth0")


def files():
    """What is written, with what would tell that it was written once more."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_ino)
        for top in WRITTEN
        for path in sorted(top.rglob("*"))
    }


# --- syntax -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["dash", "bash"])
@pytest.mark.parametrize(
    "script", ["vagrant/provision.sh", "vagrant/scenario.sh", "tests/vagrant/prove", "tests/vagrant/machine"]
)
def test_scripts_are_read_by_shells(shell, script):
    done = subprocess.run([shell, "-n", ROOT / script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- what is written ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [MASTER, (*MASTER, *IPV6), NODE, (*NODE, *IPV6), (*NODE, *MESH)], ids=" ".join
)
def test_second_run_changes_nothing(machine, arguments):
    first = provision(*arguments, *HERE)
    assert first.returncode == 0, first.stderr
    assert "nothing changed" not in first.stdout
    assert "nothing was started: --no-start" in first.stdout
    before = files()
    assert before
    second = provision(*arguments, *HERE)
    assert second.returncode == 0, second.stderr
    assert f"nothing changed: this machine is the {arguments[0]} already" in second.stdout
    assert files() == before


def test_what_was_changed_is_put_back_and_told(machine):
    assert provision(*NODE, *HERE).returncode == 0
    before = (CONFIGURATION / "slapos.cfg").read_text()
    (CONFIGURATION / "slapos.cfg").write_text("[slapos]\n")
    (UNITS / "multi-user.target.wants/partitiond.service").unlink()
    done = provision(*NODE, *HERE)
    assert "wrote /etc/opt/slapos/slapos.cfg" in done.stdout
    assert "partitiond.service starts at boot" in done.stdout
    assert "2 changes" in done.stdout
    assert (CONFIGURATION / "slapos.cfg").read_text() == before


def test_own_settings_stay(machine):
    own = CONFIGURATION / "slapos.cfg.d" / "own.cfg"
    own.parent.mkdir(parents=True)
    own.write_text("[partitiond]\nmeter_interval = 30\n")
    assert provision(*NODE, *HERE).returncode == 0
    assert own.read_text() == "[partitiond]\nmeter_interval = 30\n"


@pytest.mark.parametrize("arguments", [(*MASTER, *IPV6), (*NODE, *IPV6)], ids=["master", "node"])
def test_units_are_what_systemd_takes(machine, arguments):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    assert provision(*arguments, *HERE).returncode == 0
    units = sorted(UNITS.glob("*.service"))
    assert len(units) == 2
    for unit in units:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        # what it says of other units is about this machine
        assert unit.name not in done.stderr, done.stderr
        wanted = UNITS / "multi-user.target.wants" / unit.name
        assert wanted.resolve() == unit


def exec_start(unit):
    """What a unit starts, as arguments of a shell would read it."""
    line = next(
        line for line in (UNITS / unit).read_text().splitlines() if line.startswith("ExecStart=")
    ).removeprefix("ExecStart=")
    return ["/bin/sh", "-c", line]


def test_plan_takes_what_was_written(machine, command):
    with ethernet("192.168.56.11/24"):
        arguments = [one for one in NODE if one not in ("--interface", "eth0")]
        assert provision(*arguments, "--at", "192.168.56.11", *IPV6, *HERE).returncode == 0
        for _ in range(2):  # a unit that is started anew finds what it made
            done = subprocess.run(
                exec_start("partitiond-address.service"), capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stderr) == (0, "")
        routes = subprocess.run(
            ["ip", "-6", "route", "show", "dev", "eth0"], capture_output=True, text=True, check=True
        )
        assert "fd00::/48" in routes.stdout
        done = command("-c", CONFIGURATION / "slapos.cfg", "--json", "plan")
        assert done.returncode == 2, done.stderr
        assert "warning" not in done.stderr.lower()
        found = {one["after"] for one in json.loads(done.stdout)["operations"]}
        assert any("10.200." in str(after) for after in found)
        assert any("fd00:0:0:1" in str(after) for after in found)


def test_units_start_the_programs_of_the_prefix(machine):
    other = Path("/srv/other")
    try:
        (other / "bin").mkdir(parents=True)
        for name in ("partitiond", "python3"):
            (other / "bin" / name).symlink_to(Path("/opt/partitiond/bin") / name)
        # the interpreter finds its environment by where it was called
        (other / "pyvenv.cfg").symlink_to("/opt/partitiond/pyvenv.cfg")
        (other / "lib").symlink_to("/opt/partitiond/lib")
        done = provision(*NODE, "--prefix", str(other), *HERE)
        assert done.returncode == 0, done.stderr
        assert "ExecStart=/srv/other/bin/partitiond run\n" in (UNITS / "partitiond.service").read_text()
    finally:
        shutil.rmtree(other)


def test_mesh_is_in_the_configuration(machine):
    assert provision(*NODE, *MESH, *HERE).returncode == 0
    parser = configparser.ConfigParser(inline_comment_prefixes=";")
    parser.read(CONFIGURATION / "slapos.cfg")
    assert dict(parser["tinc"]) == {"network": "10.64.0.0/16", "index": "1"}


# --- what is refused ----------------------------------------------------------------------------------------------------


REFUSED = (
    ((), "a role is needed"),
    (("slave",), "unknown role 'slave'"),
    (("master", "--interface", "eth0"), "a master needs --listen"),
    (("node", "--interface", "eth0"), "a node needs --computer"),
    (("node", "--computer", "COMP-1", "--interface", "eth0"), "a node needs --master"),
    (("node", "--computer", ""), "--computer needs a value"),
    ((*NODE, "--color"), "unknown option '--color'"),
    ((*NODE[:3], "--master", "fd00::1", "--interface", "eth0"), "'fd00::1' is no URL"),
    (("node", "--computer", "a/../b", *NODE[3:]), "'a/../b' has other characters than"),
    (("node", "--computer", "a'b; reboot", *NODE[3:]), "has a character that no value here has"),
    ((*NODE, "--partitions", "none"), "'none' is no number from 1 to 500"),
    ((*NODE, "--partitions", "501"), "501 is not from 1 to 500"),
    ((*MASTER, "--port", "70000"), "--port: 70000 is not from 1 to 65535"),
    ((*MASTER, "--listen", "fd00::1::2"), "--listen: 'fd00::1::2'"),
    ((*NODE, "--mesh", "10.64.0.0/16"), "--mesh and --index belong together"),
    ((*NODE, *MESH, *IPV6), "--mesh or --ipv6"),
    ((*NODE, "--mesh", "10.64.0.1/16", "--index", "1"), "--mesh: 10.64.0.1/16 has host bits set"),
    ((*MASTER, *MESH), "--mesh is not for a master"),
    ((*NODE, "--listen", "fd00::1"), "--listen is not for a node"),
    ((*NODE, "--at", "192.168.56.11"), "--interface or --at, not both"),
    (NODE[:5], "a node needs --interface or --at"),
    ((*NODE, "--on-link", "fd00::/48"), "--on-link needs --ipv6"),
    ((*NODE, "--ipv6", "fd00::1"), "'fd00::1' is no ADDRESS/LENGTH"),
    ((*NODE, "--ipv6", "fd00::1/129"), "129 is not from 1 to 128"),
    ((*NODE, "--ipv6", "fd00::g/64"), "--ipv6: "),
    ((*NODE, "--prefix", "opt"), "--prefix and --source are absolute"),
)


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_wrong_use_is_told_and_nothing_is_written(machine, arguments, said):
    done = provision(*arguments, *HERE) if arguments else provision()
    assert done.returncode == 64, done.stdout + done.stderr
    assert "provision.sh: provision.usage: " in done.stderr
    assert said in done.stderr
    assert not files()


def test_an_address_that_nobody_has(machine):
    arguments = [one for one in NODE if one not in ("--interface", "eth0")]
    done = provision(*arguments, "--at", "192.168.56.99", *HERE)
    assert done.returncode == 1
    assert "provision.interface: no interface has the address 192.168.56.99" in done.stderr
    assert not CONFIGURATION.exists()


def test_a_prefix_without_an_environment(machine):
    done = provision(*NODE, "--prefix", "/srv/nothing", *HERE)
    assert done.returncode == 1
    assert "provision.prefix: /srv/nothing/bin/partitiond is not there" in done.stderr


def test_a_source_that_is_none(machine):
    done = provision(*NODE, "--source", "/srv", *HERE)
    assert done.returncode == 1
    assert "provision.source: /srv is no source tree" in done.stderr


def test_without_root(machine, tmp_path):
    # the tree may lie where nobody else can look
    shown = Path("/srv/shown")
    shown.mkdir()
    try:
        shutil.copy(SCRIPT, shown)
        user = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
        done = subprocess.run(
            [*user, shown / SCRIPT.name, *NODE], capture_output=True, text=True, check=False, cwd="/"
        )
        assert done.returncode == 77
        assert "provision.root: " in done.stderr
        assert "run it by sudo" in done.stderr
    finally:
        shutil.rmtree(shown)


# --- the Vagrantfile ----------------------------------------------------------------------------------------------------


RECORD = """
require "json"
$made = {}
class Recorder
  def initialize(name = nil) = @name = name
  def define(name, **_) = yield(Recorder.new(name))
  def vm = self
  def provider(name) = yield(Recorder.new)
  def network(_, **options) = ($made[@name] ||= {})["network"] = options
  def provision(_, **options) = ($made[@name] ||= {})["arguments"] = options[:args]
  def method_missing(*) = self
  def respond_to_missing?(*) = true
end
module Vagrant
  def self.configure(_) = yield(Recorder.new)
end
load ARGV[0]
puts JSON.dump($made)
"""


def recorded(**environment):
    """What the Vagrantfile says of each machine: its network, and the arguments of the script."""
    done = subprocess.run(
        ["ruby", "-e", RECORD, VAGRANT / "Vagrantfile"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_ruby = pytest.mark.skipif(shutil.which("ruby") is None, reason="ruby is not here")


@needs_ruby
def test_vagrantfile_is_ruby():
    done = subprocess.run(
        ["ruby", "-wc", VAGRANT / "Vagrantfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "Syntax OK", "")


@needs_ruby
@pytest.mark.parametrize("mesh", ["", "tinc"])
def test_vagrantfile_says_what_the_script_takes(machine, mesh):
    machines = recorded(MESH=mesh)
    assert list(machines) == ["master", "node1", "node2"]
    listens, masters, computers, own = set(), set(), set(), []
    for found in machines.values():
        with ethernet(f"{found['network']['ip']}/24"):
            done = provision(*found["arguments"], *HERE)
        assert done.returncode == 0, done.stderr
        parser = configparser.ConfigParser(inline_comment_prefixes=(";", "#"))
        options = found["arguments"]
        if options[0] == "master":
            parser.read(CONFIGURATION / "client.cfg")
            listens.add(parser["slapos"]["master_url"])
        else:
            parser.read(CONFIGURATION / "slapos.cfg")
            masters.add(parser["slapos"]["master_url"])
            computers.add(parser["slapos"]["computer_id"])
            assert parser.has_section("tinc") == bool(mesh)
        if not mesh:
            own.append(ipaddress.IPv6Interface(options[options.index("--ipv6") + 1]).network)
            link = ipaddress.IPv6Network(options[options.index("--on-link") + 1])
            assert own[-1].subnet_of(link)
    assert listens == masters
    assert computers == {"COMP-1", "COMP-2"}
    assert len(set(own)) == len(own)
    # who asks for the services knows the computers by the same names
    assert "database_node=COMP-1 application_node=COMP-2" in (VAGRANT / "scenario.sh").read_text()


@needs_ruby
@pytest.mark.parametrize(
    ("environment", "said"),
    [({"BOX": "buster"}, "BOX=buster: it is bookworm or trixie"), ({"MESH": "yes"}, "MESH=yes: it is tinc")],
)
def test_vagrantfile_refuses(environment, said):
    done = subprocess.run(
        ["ruby", "-e", RECORD, VAGRANT / "Vagrantfile"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stderr


# --- the scenario -------------------------------------------------------------------------------------------------------


def test_scenario_without_machines():
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/srv"}
    done = subprocess.run(
        [VAGRANT / "scenario.sh"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1
    assert "vagrant up comes first" in done.stderr
    done = subprocess.run([VAGRANT / "scenario.sh", "--fast"], capture_output=True, text=True, check=False)
    assert done.returncode == 64
