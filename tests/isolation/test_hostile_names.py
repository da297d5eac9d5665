"""Names and texts of tenants and of the master never become configuration: each file is read back by what reads it for real.

Whatever the text, either it is refused, or the file that it went into has just the sections, keys and values that it should.
"""

import io
import ipaddress
import json
import shlex
import string
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from hostile_scene import strange_names
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from supervisor.options import ServerOptions, UnhosedConfigParser

from partitiond import config, instance_build, present, software_build, verbs
from partitiond.config_grid import GridKeys
from partitiond.config_software import SoftwareKeys
from partitiond.errors import PartitiondError, printable, sentence
from partitiond.state import software_name
from partitiond.supervision import Group, Program
from slap_client.documents import SoftwareDocument, parse_computer, parse_software
from slap_client.errors import SlapError
from slap_client.values import Instance
from stunnel_mgr import declaration, render
from stunnel_mgr.errors import TunnelError
from stunnel_mgr.identity import make_identity
from stunnel_mgr.model import Refused, TunnelContext
from stunnel_mgr.syntax import plain

with warnings.catch_warnings():
    # published zc.buildout still comes by pkg_resources
    warnings.simplefilter("ignore")
    from zc.buildout import configparser as buildout_parser

COMMON = {"max_examples": 200, "deadline": None, "suppress_health_check": list(HealthCheck)}
PIECES = (
    "\n", "\r", "\r\n", "\x85", "\u2028", "\x0b", "\x0c", "\x1c", "\0", "\t", " ", "  ", " ;", ";", "#", " #", "=", ":",
    "[", "]", "[program:evil]", "\n[program:evil]\ncommand=id\n", "%", "%%", "%(here)s", "%(ENV_HOME)s", "${", "$${", "$",
    "${buildout:directory}", "}", '"', "'", "\\", "\\\n", "`id`", "$(id)", "..", "/", "../", "-", "--help", "\x1b]0;x\x07",
    "\x7f", "\udcff", "é", "\u202e", "\xa0", "<=", "+=", "extends", "exec = /bin/sh", "include = /etc", "a", "b1", "x.cfg",
    "http://h/", "_", "@", "*", "{",
)  # fmt: skip
USUAL = st.text(alphabet=string.ascii_letters + string.digits, min_size=1, max_size=20)
HOSTILE = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.text(max_size=40),
    st.sampled_from([name.decode("utf-8", "surrogateescape") for name in strange_names()]),
    USUAL,
)


def tried(family, call):
    """What it gives, or the error of its family."""
    try:
        return call(), None
    except family as error:
        return None, error


# --- supervisord ------------------------------------------------------------------------------------------------------


def read_by_supervisord(text):
    parser = UnhosedConfigParser()
    parser.read_string(text)
    options = ServerOptions()
    parser.expansions = options.environ_expansions
    return parser.sections(), options.process_groups_from_parser(parser)


@settings(**COMMON)
@given(
    names=st.one_of(st.lists(USUAL, min_size=1, max_size=3), st.lists(HOSTILE, max_size=4)),
    directory=HOSTILE,
    group=st.one_of(st.just("slappart1"), HOSTILE),
)
def test_supervisord(names, directory, group):
    home = Path("/srv") / directory.lstrip("/") if "\0" not in directory else Path("/srv")
    programs = tuple(Program(name, name, f"{home}/etc/run/{name}") for name in dict.fromkeys(names))
    wanted = Group(group, "root", 0, 0, home, Path("/var/log"), programs)
    text, error = tried(PartitiondError, wanted.render)
    if error:
        assert error.code == "supervisor.name"
        assert sentence(error).isprintable()
        return
    text.encode("utf-8")
    sections, groups = read_by_supervisord(text) if programs else ([f"group:{group}"], ())
    assert sorted(sections) == sorted(
        [f"group:{group}", *(f"program:{group}_{name}" for name in dict.fromkeys(names))]
    )
    for found in groups:
        assert (found.name, len(found.process_configs)) == (group, len(programs))
        for process, program in zip(
            sorted(found.process_configs, key=lambda one: one.name),
            sorted(programs, key=lambda one: one.process_name),
            strict=True,
        ):
            assert process.name == program.process_name
            assert process.command == program.command
            assert (process.uid, process.directory) == (0, str(home))
            assert process.environment["HOME"] == str(home)
            assert set(process.environment) == {"HOME", "USER", "LOGNAME", "PATH", "LANG"}
            assert process.stdout_logfile == f"/var/log/{program.name}.log"


def test_supervisord_takes_a_usual_group():
    """Else the test above could be one of refusals alone."""
    program = Program("web-1.0+b_2", "web-1.0+b_2-on-watch", "/srv/p/etc/run/web-1.0+b_2")
    text = Group("slappart1", "root", 0, 0, Path("/srv/p"), Path("/var/log"), (program,)).render()
    _, (group,) = read_by_supervisord(text)
    assert shlex.split(group.process_configs[0].command) == [program.command]


# --- stunnel ----------------------------------------------------------------------------------------------------------

CERTIFICATE = make_identity("slappart1").certificate_der_base64
CONTEXT = TunnelContext(
    partition="slappart1",
    ipv4=ipaddress.IPv4Address("10.0.0.1"),
    ipv6=ipaddress.IPv6Address("2001:db8::1"),
)
IDENTITIES = {
    kind: render.IdentityFiles(f"{kind}.crt", f"{kind}.key", "sha256:" + "0" * 64)
    for kind in ("partition", "master")
}
OPTIONS = frozenset(
    "foreground pid syslog debug socket client accept connect local cert key CAfile verifyPeer sslVersionMin options"
    " TIMEOUTbusy TIMEOUTconnect sessionResume".split()
)


def mostly(value):
    return st.one_of(st.just(value), HOSTILE.map(lambda more: value + more), HOSTILE)


@settings(**COMMON)
@given(
    name=mostly("db"),
    mode=st.sampled_from(["server", "client"]),
    listen=mostly("3306"),
    connect=mostly("3306"),
    far=mostly("[2001:db8::2]:3306"),
    pin=mostly(f"cert:{CERTIFICATE}"),
    more=st.one_of(st.just(""), HOSTILE),
)
def test_stunnel(name, mode, listen, connect, far, pin, more):
    lines = [
        "[tunnel]",
        f"mode = {mode}",
        f"listen = {listen}",
        f"connect = {connect if mode == 'server' else far}",
        f"{'allow' if mode == 'server' else 'peer'} = {pin}",
        more,
    ]
    file = f"/srv/p/etc/tunnel/{name}.cfg"
    text = "\n".join(lines)
    tunnel, error = tried(
        TunnelError, lambda: declaration.parse_declaration(text, name=name, file=file, context=CONTEXT)
    )
    if error:
        assert error.code == "tunnel.declaration"
        assert str(error).isprintable()
        assert sentence(error).isprintable()
        return
    files = render.render(
        "slappart1", [tunnel], directory="/srv/state/slappart1", identities=IDENTITIES
    ).files
    if not tunnel.pins:
        assert files == {}
        return
    read = [line for line in files["stunnel.conf"].split("\n") if line and not line.startswith(";")]
    assert [line for line in read if line.startswith("[")] == [f"[{tunnel.short_name}]"]
    options = [line.partition(" =") for line in read if not line.startswith("[")]
    assert {key for key, _, _ in options} <= OPTIONS
    assert len(options) == len({(key, place) for place, (key, _, _) in enumerate(options)})
    assert (
        sum(key == "accept" for key, _, _ in options) == sum(key == "connect" for key, _, _ in options) == 1
    )
    assert all(one.isascii() and one.isprintable() for one in read)
    assert set(files) == {"stunnel.conf", render.pins_file(tunnel.pins)}
    assert all("/" not in one for one in files)


# --- buildout ---------------------------------------------------------------------------------------------------------


def url_of(text):
    """The URL as the master's document gives it, or None where it is refused."""
    value = Instance("SoftwareRelease", (), {"_software_release": text, "_requested_state": "available"})
    found, error = tried(SlapError, lambda: parse_software(value))
    if error:
        assert error.code == "slap.garbage"
        assert printable(str(error)) == str(error)
        return None
    assert isinstance(found, SoftwareDocument)
    return found.url


def read_by_buildout(text):
    return buildout_parser.parse(io.StringIO(text, newline=None), "buildout.cfg")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """What an instance's profile is made of; the template is the release's own."""
    import pwd

    base = tmp_path_factory.mktemp("release")
    soft = pwd.getpwuid(0).pw_name
    return SimpleNamespace(
        software_root=base,
        software_user=soft,
        computer_id="COMP-1",
        master_url="http://[2001:db8::1]:5000/",
        shared_part_list="",
        certificate_repository=None,
        instance_storage_home=None,
        grid=GridKeys(),
        offline_builds=True,
        software=SoftwareKeys(),
    )


def instance_profile(release, url):
    directory = release.software_root / software_name(url)
    directory.mkdir(exist_ok=True)
    (directory / "instance.cfg").write_text("[buildout]\nparts =\n")
    entry = SimpleNamespace(software_release=url, requested_state="started")
    context, partition = SimpleNamespace(config=release), SimpleNamespace(id="slappart1")
    return instance_build.instance_profile(context, partition, entry).decode("utf-8")


@settings(**COMMON)
@given(text=st.one_of(HOSTILE, HOSTILE.map(lambda more: f"http://h/{more}")))
def test_buildout(release, text):
    url = url_of(text)
    if url is None:
        return
    read = read_by_buildout(software_build.software_profile(release, url))
    assert set(read) == {"buildout"}
    assert read["buildout"]["extends"].split() == [url]
    usual, read = (read_by_buildout(instance_profile(release, one)) for one in ("http://usual/", url))
    assert {name: set(section) for name, section in read.items()} == {
        name: set(section) for name, section in usual.items()
    }
    assert read["slap-connection"]["software-release-url"] == url
    assert read["slap_connection"]["software_release_url"] == url
    assert "${" not in url


def test_a_usual_url_is_taken():
    for url in (
        "https://lab.nexedi.com/nexedi/slapos/raw/1.0/software/x/software.cfg",
        "/opt/a;b#c%20d$e/software.cfg",
    ):
        assert url_of(url) == url


@settings(**COMMON)
@given(name=HOSTILE, url=HOSTILE, more=HOSTILE)
def test_a_partition_of_the_masters_is_one_of_ours_or_none(name, url, more):
    software = Instance("SoftwareRelease", (), {"_software_release": url})
    attributes = {
        "_partition_id": name,
        "_requested_state": "started",
        "_software_release_document": software,
        "_instance_guid": more,
        "_parameter_dict": {"slap_software_type": more, "timestamp": more, "instance_title": more},
    }
    partition = Instance("ComputerPartition", (), attributes)
    computer = Instance(
        "Computer",
        (),
        {"_computer_id": "COMP-1", "_computer_partition_list": [partition], "_software_release_list": []},
    )
    found = parse_computer(computer)
    for entry in found.partitions:
        assert set(entry.partition_id) <= set(string.ascii_letters + string.digits + "_.-")
        assert entry.partition_id[0] not in ".-"
        for text in (
            entry.software_release,
            entry.instance_guid,
            entry.software_type,
            entry.timestamp,
            entry.instance_title,
        ):
            assert text.isprintable()
    for entry in found.rejected:
        assert printable(entry.reason) == entry.reason


# --- the operator's names, from which all others are made --------------------------------------------------------------

NAMES = (
    ("slapformat", "partition_base_name"),
    ("slapformat", "user_base_name"),
    ("slapformat", "tap_base_name"),
    ("slapformat", "interface_name"),
    ("slapformat", "software_user"),
    ("slapos", "computer_id"),
    ("slapos", "instance_root"),
    ("partitiond", "bridge"),
    ("partitiond", "log_dir"),
)


@settings(**COMMON)
@given(where=st.sampled_from(NAMES), text=HOSTILE)
def test_names_that_go_into_rules_files_and_commands(tmp_path_factory, where, text):
    """What nft, supervisord, buildout and the user database are given is made of these and of numbers."""
    section, key = where
    base = tmp_path_factory.getbasetemp()
    values = {
        "slapos": {
            "computer_id": "C",
            "master_url": "http://h/",
            "software_root": "/srv/s",
            "instance_root": "/srv/i",
        },
        "slapformat": {"interface_name": "br0", "partition_amount": "1"},
        "partitiond": {},
    }
    one_line = text.replace("\n", "\n ")
    values[section][key] = one_line
    file = base / "names.cfg"
    lines = [
        f"[{name}]\n" + "".join(f"{one} = {value}\n" for one, value in found.items())
        for name, found in values.items()
    ]
    file.write_bytes("".join(lines).encode("utf-8", "surrogateescape" if text.isascii() else "replace"))
    found, error = tried(PartitiondError, lambda: config.load(file))
    if error:
        assert error.code.startswith("config.")
        return
    for value in (
        found.partition_base,
        found.tap_base,
        found.interface,
        found.software_user,
        found.computer_id,
    ):
        assert set(value) <= set(string.ascii_letters + string.digits + "_.-"), value
    for value in (found.instance_root, found.log_dir, found.state_dir):
        assert not set(str(value)) & set(" %\"'\\$*?[],;#\n\t\r"), value


# --- people's eyes ----------------------------------------------------------------------------------------------------


@settings(**COMMON)
@given(name=HOSTILE, reason=HOSTILE, file=HOSTILE)
def test_what_people_are_shown(name, reason, file):
    refused = Refused(f"slappart1/{name}", "slappart1", file, 3, reason)
    value = {
        "operations": [],
        "refused": verbs._refused([refused]),
        "failures": [{"resource": name, "code": "system", "message": reason, "hint": file}],
        "left": [
            {
                "id": name,
                "action": "change",
                "before": reason,
                "after": file,
                "reason": reason,
                "resource": "x",
            }
        ],
        "done": 1,
    }
    tunnel = {
        "name": name, "mode": None, "state": "refused", "listen": reason, "connect": file, "allowed": [], "sessions": 0,
        "reason": reason, "certificate": None, "warnings": [reason],
    }  # fmt: skip
    event = {"time": "2026-11-23T00:00:00Z", "event": "tunnel.refused", "partition": name, "message": reason}
    for text in (
        present.plan(value),
        present.applied(value),
        present.tunnels({"tunnels": [tunnel]}),
        present.event(event),
        present.synced({"lane": "instances", "done": [name], "failures": value["failures"]}),
    ):
        text.encode("utf-8")
        assert all(one.isprintable() or one in "\n\t" for one in text)
    assert len(present.tunnels({"tunnels": [tunnel]}).split("\n")) == 2, "a name made a row of its own"
    assert plain(name).isascii()
    json.dumps(value).encode("ascii")
