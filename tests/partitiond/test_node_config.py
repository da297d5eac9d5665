"""``slapos.cfg``: every mistake is named with its place; what slapos.core reads, we read with the same meaning."""

import ast
import dataclasses
import ipaddress
from pathlib import Path

import pytest

from partitiond import config, config_unread
from partitiond.errors import PartitiondError

GOOD = """\
[slapos]
computer_id = COMP-1
master_url = https://master.example/
software_root = /srv/t/software
instance_root = /srv/t/instance

[slapformat]
interface_name = br0
partition_amount = 3
"""


@pytest.fixture
def load(tmp_path):
    """Read a text as a configuration, with drop-ins by name."""

    def read(text, **drop_ins):
        path = tmp_path / "slapos.cfg"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        if drop_ins:
            (tmp_path / "slapos.cfg.d").mkdir()
        for name, content in drop_ins.items():
            (tmp_path / "slapos.cfg.d" / f"{name}.cfg").write_text(content)
        return config.load(path)

    return read


def with_setting(section, key, value):
    """The good text with one setting changed or added; the line where it stands."""
    lines = [line for line in GOOD.splitlines() if not line.startswith(f"{key} =")]
    if f"[{section}]" not in lines:
        lines.append(f"[{section}]")
    place = lines.index(f"[{section}]") + 1
    lines.insert(place, f"{key} = {value}")
    return "\n".join(lines) + "\n", place + 1


def complaint(load, text, **drop_ins):
    with pytest.raises(PartitiondError) as caught:
        load(text, **drop_ins)
    return caught.value


def test_the_defaults_are_those_of_slapos_core_and_of_the_contract(load):
    found = load(GOOD)
    assert found.warnings == ()
    assert (found.partition_base, found.user_base, found.tap_base) == ("slappart", "slapuser", "slaptap")
    assert (found.software_user, found.uid_base, found.ipv6_prefixshift) == ("slapsoft", 5000, 16)
    assert found.ipv4_network == ipaddress.IPv4Network("10.0.0.0/16")
    assert (found.interface, found.ipv6_interface, found.network.bridge) == ("br0", "br0", None)
    assert (found.computer_xml, found.computer_json) == (None, None)
    assert found.packet_filter == "nftables"
    assert (found.create_tap, found.ipv6_range, found.address_ownership, found.destroy_guard) == (True,) * 4
    assert (found.state_dir, found.log_dir, found.run_dir) == (
        Path("/var/lib/partitiond"),
        Path("/var/log/partitiond"),
        Path("/run/partitiond"),
    )
    assert dataclasses.astuple(found.intervals) == (86400, 300, 300, 86400, 10, 120)


BAD = [
    ("slapos", "computer_id", "COMP 1", "letters, digits"),
    ("slapos", "master_url", "ftp://master/", "http:// or https://"),
    ("slapos", "master_url", "https://m/ x", "http:// or https://"),
    ("slapos", "software_root", "srv/software", "absolute path"),
    ("slapformat", "computer_xml", "slapos.xml", "absolute path"),
    ("slapformat", "computer_json", "/srv/../slapos.json", "without .."),
    ("slapos", "instance_root", "/srv/my instances", "absolute path"),
    ("slapos", "instance_root", "/srv/100%", "absolute path"),
    ("slapos", "instance_root", "/srv/a/../../etc", "without .."),
    ("slapos", "instance_root", "/srv/[x]*", "absolute path"),
    ("slapos", "software_root", "/", "directory of its own"),
    ("slapos", "instance_root", "/etc/", "directory of its own"),
    ("slapos", "maximum_periodicity", "often", "whole number"),
    ("slapformat", "interface_name", "an-interface-too-long", "network interface"),
    ("slapformat", "partition_amount", "many", "whole number from 0 to 10000"),
    ("slapformat", "partition_amount", "-1", "whole number from 0 to 10000"),
    ("slapformat", "partition_amount", "1_0", "whole number from 0 to 10000"),
    ("slapformat", "partition_amount", "10001", "whole number from 0 to 10000"),
    ("slapformat", "ipv6_prefixshift", "65", "whole number from 2 to 64"),
    ("slapformat", "ipv6_prefixshift", "3", "2^s"),
    ("slapformat", "ipv4_local_network", "10.0.0.0/33", "IPv4 network"),
    ("slapformat", "ipv4_local_network", "10.0.0.0/30", "room for 3 partitions"),
    ("slapformat", "create_tap", "maybe", "true, false"),
    ("slapformat", "partition_base_name", "Part Nine", "lower-case letters"),
    ("slapformat", "user_base_name", "root:x", "lower-case letters"),
    ("slapformat", "tap_base_name", "a-tap-too-long", "1 to 11 characters"),
    ("slapformat", "software_user", "root", "user of its own"),
    ("slapformat", "software_user", "slapuser2", "no user of a partition"),
    ("partitiond", "uid_base", "0", "whole number from 100"),
    ("partitiond", "packet_filter", "nftable", "did you mean nftables?"),
    ("partitiond", "address_ownership", "on", "enforce or off"),
    ("partitiond", "destroy_guard", "sometimes", "true, false"),
    ("partitiond", "meter_interval", "0", "whole number from 1"),
    ("partitiond", "bridge", "no/bridge", "network interface"),
    ("partitiond", "state_dir", "var/lib/partitiond", "absolute path"),
    ("partitiond", "state_dir", "/var/lib", "directory of its own"),
    ("partitiond", "run_dir", "/var/log/partitiond", "another directory than log_dir"),
    ("partitiond", "state_dir", "/srv/t/instance/slappart7/state", "outside of the partitions"),
]


@pytest.mark.parametrize(("section", "key", "value", "allowed"), BAD)
def test_a_bad_value_is_named_with_place_key_value_and_what_is_allowed(load, section, key, value, allowed):
    text, line = with_setting(section, key, value)
    error = complaint(load, text)
    assert error.code == "config.value"
    assert error.resource.endswith("slapos.cfg")
    assert error.hint
    about = next(one for one in str(error).splitlines() if allowed in one)
    assert f"slapos.cfg:{line}: " in about
    assert key in about
    assert value.rstrip("/") in about


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("slapos", "computer_id"),
        ("slapos", "master_url"),
        ("slapos", "software_root"),
        ("slapos", "instance_root"),
        ("slapformat", "interface_name"),
        ("slapformat", "partition_amount"),
    ],
)
def test_what_is_missing_is_named(load, section, key):
    text = "".join(line for line in GOOD.splitlines(keepends=True) if not line.startswith(key))
    error = complaint(load, text)
    assert error.code == "config.value"
    assert f"{key} is missing" in str(error)
    assert f"slapos.cfg:{text.splitlines().index(f'[{section}]') + 1}" in str(error) or "[slapos]" in str(
        error
    )


def test_all_mistakes_are_told_at_once(load):
    text = GOOD.replace("= 3", "= three").replace("COMP-1", "a b").replace("https:", "gopher:")
    assert len(str(complaint(load, text)).splitlines()) == 3


def test_comments_also_stand_behind_a_value(load):
    text = (
        GOOD.replace("= 3", "= 4 ; four")
        .replace("COMP-1", "COMP-2 # two")
        .replace("[slapos]", "# one\n[slapos]")
    )
    found = load(text)
    assert (found.partition_amount, found.computer_id) == (4, "COMP-2")


def test_drop_ins_come_later_in_the_order_of_their_names(load):
    found = load(
        GOOD,
        b="[slapformat]\npartition_amount = 6\n",
        a="[slapformat]\npartition_amount = 5\n[partitiond]\nuid_base = 7000\n",
    )
    assert (found.partition_amount, found.uid_base) == (6, 7000)


def test_a_mistake_in_a_drop_in_is_placed_there(load):
    error = complaint(load, GOOD, extra="# a comment\n[slapformat]\npartition_amount = no\n")
    assert "slapos.cfg.d/extra.cfg:3: partition_amount = 'no'" in str(error)


def test_the_address_of_a_peer_on_a_line_of_its_own_is_no_section(load):
    text = GOOD.replace("[slapformat]", "[tunnel a]\nconnect =\n  [slapformat]:3306\n[slapformat]")
    text = text.replace("= 3\n", "= three\n")
    error = complaint(load, text)
    assert f"slapos.cfg:{text.splitlines().index('partition_amount = three') + 1}: " in str(error)


def test_an_unknown_key_is_a_warning_with_a_suggestion(load):
    text, line = with_setting("slapformat", "partition_ammount", "9")
    (warning,) = load(text).warnings
    assert f"slapos.cfg:{line}: " in warning
    assert "'partition_ammount', did you mean 'partition_amount'?" in warning


def test_an_unknown_section_is_a_warning_with_a_suggestion(load):
    (warning,) = load(GOOD + "[slapformt]\nx = 1\n").warnings
    assert "unknown section, did you mean 'slapformat'?" in warning


def test_the_bridge_of_old_configurations_is_pointed_to_the_new_key(load):
    text, line = with_setting("slapformat", "bridge_name", "br9")
    found = load(text)
    assert found.network.bridge is None
    assert f"slapos.cfg:{line}: bridge_name is not read; set bridge in [partitiond]" in found.warnings[0]


def test_what_is_known_but_does_nothing_yet_is_said(load):
    text, _ = with_setting("slapformat", "input_definition_file", "/srv/node.cfg")
    assert "a definition of the node by file is for nodes with" in load(text).warnings[0]


def test_every_key_that_nothing_reads_is_known_for_it():
    """A key that is taken is read, by its name, in some module; or a warning says that it is not."""
    read = set()
    for path in Path(config.__file__).parent.glob("config*.py"):
        if path.name != "config_unread.py":
            read |= {
                node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
            }
    unread = {(section, key) for section in ("slapos", "slapformat") for key in config._KNOWN[section] - read}
    assert unread == config_unread.KEYS.keys()


@pytest.mark.parametrize(("section", "key"), sorted(config_unread.KEYS))
def test_a_key_that_nothing_reads_is_warned_of(load, section, key):
    text, line = with_setting(section, key, "false" if key == "root_check" else "yes")
    (warning,) = load(text).warnings
    assert warning.startswith(f"{warning.partition(':')[0]}:{line}: {key} is not acted on: ")
    text, _ = with_setting(section, key, "true" if key == "root_check" else "")
    assert load(text).warnings == ()


def test_supervisord_is_partitionds_to_start(load):
    text, line = with_setting("slapos", "forbid_supervisord_automatic_launch", "true")
    assert f"slapos.cfg:{line}: forbid_supervisord_automatic_launch = 'true'; allowed: false" in str(
        complaint(load, text)
    )
    text, _ = with_setting("slapos", "forbid_supervisord_automatic_launch", "false")
    assert load(text).warnings == ()


@pytest.mark.parametrize(("value", "stops"), [("", False), ("false", False), ("true", True)])
def test_force_stop(load, value, stops):
    text, _ = with_setting("slapos", "force_stop", value)
    assert load(text).grid.force_stop is stops


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", []),
        ("prerm", []),
        ("prerm, devperm", ["devperm is not run: block devices are given by [block_devices]"]),
        ("portredir whitelistfirewall", ["portredir is not run: ", "whitelistfirewall is not run: "]),
        ("cpuset", ["cpuset is not run: "]),
        ("of_somebody", ["of_somebody is not run: partitiond runs no managers"]),
    ],
)
def test_managers_of_slapgrid_are_told_what_does_their_work(load, value, said):
    text, line = with_setting("slapos", "manager_list", value)
    found = load(text).warnings
    assert [
        one.partition(f"slapos.cfg:{line}: ")[2].startswith(words)
        for one, words in zip(found, said, strict=True)
    ] == [True] * len(said)


def test_the_firewall_of_slapgrid_is_said_to_be_left_alone(load):
    (warning,) = load(GOOD + "[firewall]\nfirewall_cmd = /bin/true\n").warnings
    assert "fw_restricted_access of an instance limits nobody" in warning
    assert load(GOOD + "[disabled-firewall]\nx = 1\n").warnings == ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", None),
        ("127.0.0.1:9816", "127.0.0.1 9816"),
        ("[::1]:80", "::1 80"),
        ("0.0.0.0:65535", "0.0.0.0 65535"),
    ],
)
def test_where_metrics_are_served(load, value, expected):
    text, _ = with_setting("partitiond", "metrics_listen", value)
    found = load(text).metrics_listen
    assert expected == (found and f"{found.address} {found.port}")
    assert load(text).warnings == ()


def test_where_metrics_are_served_unless_told(load):
    found = load(GOOD).metrics_listen
    assert f"{found.address}:{found.port}" == "127.0.0.1:9816"


def test_sections_of_other_programs_are_no_ones_business(load):
    assert load(GOOD + "[networkcache]\nupload-cert-file = x\n[slapproxy]\nport = 1\n").warnings == ()


def test_a_missing_file(tmp_path):
    with pytest.raises(PartitiondError) as caught:
        config.load(tmp_path / "nothing.cfg")
    assert caught.value.code == "config.unreadable"
    assert caught.value.resource == str(tmp_path / "nothing.cfg")
    assert "-c FILE" in caught.value.hint


def test_a_directory_is_no_configuration(tmp_path):
    with pytest.raises(PartitiondError) as caught:
        config.load(tmp_path)
    assert caught.value.code == "config.unreadable"


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        (GOOD + "partition_amount = 4\n", 10, "partition_amount is set a second time in [slapformat]"),
        (GOOD + "[slapos]\n", 10, "section [slapos] begins a second time"),
        ("x = 1\n" + GOOD, 1, "stands before the first section"),
        (GOOD + "no setting at all\n", 10, "no setting at all"),
    ],
)
def test_bad_syntax_is_placed(load, text, line, word):
    error = complaint(load, text)
    assert error.code == "config.syntax"
    assert error.resource.endswith(f"slapos.cfg:{line}")
    assert word in str(error)


def test_text_that_is_not_utf8_is_placed(load):
    error = complaint(load, GOOD.encode() + b"# caf\xe9\n")
    assert error.code == "config.unreadable"
    assert error.resource.endswith("slapos.cfg:10")
    assert "0xe9" in str(error)


def test_a_byte_order_mark_is_no_mistake(load):
    assert load(b"\xef\xbb\xbf" + GOOD.encode()).computer_id == "COMP-1"


def test_key_and_certificate_go_together(load):
    text, _ = with_setting("slapos", "key_file", "/etc/opt/slapos/ssl/key")
    assert "key_file and cert_file go together" in str(complaint(load, text))


def test_tunnels_of_the_operator_know_where_they_stand(load):
    text = GOOD + "[tunnel db]\npartition = slappart1\nmode = server\nlisten = 3306\nconnect = 3306\n"
    (tunnel,) = load(text).tunnels
    assert (tunnel.name, tunnel.partition, tunnel.line) == ("db", "slappart1", 10)
    assert tunnel.file.endswith("slapos.cfg")
    assert dict(tunnel.values) == {"mode": "server", "listen": "3306", "connect": "3306"}


def test_the_amount_may_stand_in_slapos(load):
    text = GOOD.replace("partition_amount = 3\n", "").replace(
        "[slapformat]", "partition_amount = 2\n[slapformat]"
    )
    assert load(text).partition_amount == 2


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("slapformat", "alter_network = false"),
        ("slapformat", "alter_user = no"),
        ("slapformat", "dry_run = true"),
        ("slapformat", "ipv4_local_network = 127.0.0.0/8"),
        ("slapformat", "ipv4_local_network = 0.0.0.0/0"),
        ("slapos", "master_url = http://["),
        ("slapos", "master_url = http://master:99999/"),
        ("partitiond", "tap_guard = bogus"),
        ("partitiond", "metrics_listen = 127.0.0.1:99999"),
        ("partitiond", "metrics_listen = 127.0.0.1:0"),
        ("partitiond", "metrics_listen = 127.0.0.1"),
        ("partitiond", "metrics_listen = 127.1:9816"),
        ("partitiond", "metrics_listen = ::1:9816"),
        ("partitiond", "metrics_listen = localhost:9816"),
        ("partitiond", "metrics_listen = [::ffff:127.0.0.1]:9816"),
        ("partitiond", "metrics_listen = off"),
        ("partitiond", "master_fingerprint = bogus"),
        ("partitiond", "report_ambiguous = bogus"),
        ("partitiond", "buildout_version = newest"),
        ("partitiond", "ipv4_partition_network = foo"),
        ("partitiond", "run_dir = /run/" + "x" * 120),
        ("partitiond", "state_dir = /srv/t/software/state"),
        ("slapos", "instance_root = /srv/t/software/instance"),
    ],
)
def test_what_nothing_may_act_on_is_refused(load, section, line):
    key = line.split(" ")[0]
    text = "\n".join(one for one in GOOD.splitlines() if not one.startswith(f"{key} "))
    text = (
        text.replace(f"[{section}]", f"[{section}]\n{line}")
        if f"[{section}]" in text
        else f"{text}\n[{section}]\n{line}\n"
    )
    with pytest.raises(PartitiondError, match=key) as caught:
        load(text + "\n")
    assert caught.value.code == "config.value"
    assert f"slapos.cfg:{text.splitlines().index(line) + 1}: {key}" in str(caught.value)


# --- private namespaces -------------------------------------------------------------------------------------------------


def test_private_namespaces_are_on_unless_switched_off(load):
    assert load(GOOD).shared_namespaces == frozenset()
    off = "[partitiond]\nprivate_namespaces = off\n"
    everybody = frozenset(f"slappart{index}" for index in range(3))
    assert load(GOOD + off).shared_namespaces == everybody
    one = "[private_namespaces]\nslappart1 = off ; a release that needs the host's /tmp\n"
    assert load(GOOD + one).shared_namespaces == {"slappart1"}
    but_one = off + "[private_namespaces]\nslappart1 = on\n"
    found = load(GOOD + but_one)
    assert found.shared_namespaces == everybody - {"slappart1"}
    assert load(found.text) == dataclasses.replace(found)
    assert not found.warnings


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("slappart1", "maybe", "on or off"),
        ("slappart1", "", "on or off"),
        ("slappart1", "true", "on or off"),
        ("slappart", "off", "slappart0 to slappart2"),
        ("slappart01", "off", "slappart0 to slappart2"),
        ("slapuser1", "off", "slappart0 to slappart2"),
    ],
)
def test_bad_private_namespaces(load, key, value, allowed):
    text, line = with_setting("private_namespaces", key, value)
    with pytest.raises(PartitiondError) as caught:
        load(text)
    assert f"slapos.cfg:{line}: " in str(caught.value)
    assert allowed in str(caught.value)


def test_private_namespaces_of_a_partition_that_is_not_there_are_warned_of(load):
    text, line = with_setting("private_namespaces", "slappart3", "off")
    found = load(text)
    assert found.shared_namespaces == {"slappart3"}
    assert any(f"slapos.cfg:{line}: slappart3" in warning for warning in found.warnings)


def test_private_namespaces_are_on_or_off(load):
    text, line = with_setting("partitiond", "private_namespaces", "yes")
    with pytest.raises(PartitiondError) as caught:
        load(text)
    assert f"slapos.cfg:{line}: private_namespaces = 'yes'; allowed: on or off" in str(caught.value)
