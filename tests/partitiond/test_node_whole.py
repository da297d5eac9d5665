"""A whole node on a real kernel: planned, applied, damaged, repaired, shrunk, taken down."""

import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
from json_schemas import parsed, validate

from partitiond import identities, verbs
from partitiond.errors import PartitiondError

PATIENCE = 20.0


def plan(node):
    """The plan of a node, by id."""
    with node.context() as context:
        value = validate({"schema": "partitiond/plan/1", **verbs.plan(context)})
    return {one["id"]: one for one in value["operations"]}


def apply(node, *partitions):
    with node.context() as context:
        return validate({"schema": "partitiond/apply/1", **verbs.apply(context, list(partitions))})


def links():
    return {name for _, name in socket.if_nameindex()}


def ip(*arguments):
    return subprocess.run(["/usr/sbin/ip", *arguments], check=True, capture_output=True, text=True).stdout


def addresses(bridge="br0"):
    return {
        one["local"]
        for link in json.loads(ip("-j", "address", "show", "dev", bridge))
        for one in link["addr_info"]
    }


def machine():
    """What a node changes of the machine, the kernel's own noise left out."""
    return {
        "links": links(),
        "addresses": {name: addresses(name) for name in ("lo", "br0")},
        "routes": sorted(
            line.partition(" pref ")[0]
            for line in (
                ip("-6", "route", "show", "table", "all") + ip("route", "show", "table", "all")
            ).splitlines()
            if "fe80" not in line and "ff00" not in line
        ),
        "rules": ip("rule") + ip("-6", "rule"),
        "users": {name: Path("/etc", name).read_bytes() for name in ("passwd", "group", "shadow", "gshadow")},
        "nft": subprocess.run(["/usr/sbin/nft", "list", "tables"], check=True, capture_output=True).stdout,
        "sysctl": {
            name: Path("/proc/sys/net", name).read_text()
            for name in ("ipv6/ip_nonlocal_bind", "ipv6/conf/all/forwarding", "ipv4/ip_forward")
        },
        "processes": sorted(processes()),
    }


def processes():
    """Commands of all processes of the sandbox but the tests' own."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - names suffice
        try:
            stat_line = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()
            command = Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if stat_line[0] != b"Z" and int(name) != os.getpid():
            found.append(command)
    return found


def contents(root):
    """Everything below a directory with its metadata, but what a running supervisord and the kernel write."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_mode, path.lstat().st_uid, path.lstat().st_ino)
        for path in sorted(root.rglob("*"))
        if path.name not in ("supervisord.log", "lock")
    }


# --- from nothing and back ----------------------------------------------------------------------------------------------


def test_plan_apply_plan_teardown(bridge, node_config, command):
    before = machine()
    node = node_config(3, partitiond={"uid_base": 6000})
    files = contents(node.root)

    found = command("plan", "-c", node.path, "--json")
    listed = {one["id"]: one for one in parsed(found)["operations"]}
    assert found.returncode == 2
    changed = {one["id"] for one in listed.values() if one["action"] != "create"}
    assert changed <= {"device/dev/net/tun"}  # which is there, but for root alone
    for wanted in (
        "user/slapsoft",
        "user/slapuser2",
        "tap/slaptap2",
        "identity/slappart2",
        "filter/partitiond",
    ):
        assert wanted in listed
    assert listed["tap/slaptap2"]["partition"] == "slappart2"
    assert listed["user/slapsoft"]["partition"] is None
    assert (contents(node.root), machine()) == (files, before)  # plan touches nothing

    done = command("apply", "--json", "-c", node.path)
    value = parsed(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert (value["failures"], value["left"], value["refused"]) == ([], [], [])
    assert value["done"] == len(listed)

    again = command("--json", "-c", node.path, "plan")
    assert (again.returncode, parsed(again)["operations"]) == (0, [])
    user = pwd.getpwnam("slapuser1")
    assert (user.pw_uid, user.pw_dir) == (6001, str(node.instance / "slappart1"))
    assert {f"slaptap{index}" for index in range(3)} <= links()

    written = (
        contents(node.root),
        {name: Path("/etc", name).stat().st_mtime_ns for name in ("passwd", "shadow")},
    )
    second = command("apply", "-c", node.path)
    assert (second.returncode, second.stdout) == (0, "nothing to do\n")
    assert (
        contents(node.root),
        {name: Path("/etc", name).stat().st_mtime_ns for name in ("passwd", "shadow")},
    ) == written

    down = command("teardown", "-c", node.path, "--json")
    assert (down.returncode, parsed(down)["failures"]) == (0, [])
    after = machine()
    for what in before:
        assert after[what] == before[what], what
    assert (node.instance / "slappart1" / ".slapos-resource").exists()  # data only with --purge

    assert command("teardown", "-c", node.path, "--purge").returncode == 0
    assert not any((node.root / name).exists() for name in ("instance", "software", "log", "state"))


def test_an_empty_node_is_quickly_taken_down(bridge, node_config, command):
    before = machine()
    node = node_config(1)
    assert command("teardown", "-c", node.path).returncode == 0
    assert machine() == before


def test_two_at_once_wait_for_each_other(bridge, node_config, command):
    node = node_config(3)
    started = [command.start("apply", "--json", "-c", node.path) for _ in range(2)]
    answers = []
    for one in started:
        out, err = one.communicate(timeout=60)
        assert (one.returncode, err) == (0, "")
        answers.append(validate(json.loads(out)))
    assert sorted(bool(one["done"]) for one in answers) == [False, True]
    assert plan(node) == {}


def test_a_taken_uid_is_refused_and_nothing_is_changed(bridge, node_config, command):
    node = node_config(3)
    with open("/etc/passwd", "a") as file:
        file.write("squatter:x:5001:5001::/:/bin/false\n")
    try:
        before = machine()
        found = command("apply", "--json", "-c", node.path)
        assert found.returncode == 1
        error = parsed(found)["error"]
        assert error["code"] == "users.uid_taken"
        assert "squatter" in error["message"]
        assert "uid_base" in error["hint"]
        assert "Traceback" not in found.stderr
        assert machine() == before
        node.write(partitiond={"uid_base": 5100})
        assert command("apply", "-q", "-c", node.path).returncode == 0
        assert pwd.getpwnam("slapuser1").pw_uid == 5101
    finally:
        text = Path("/etc/passwd").read_text()
        Path("/etc/passwd").write_text(text.replace("squatter:x:5001:5001::/:/bin/false\n", ""))


def test_an_existing_user_of_that_name_keeps_its_uid(bridge, node_config):
    node = node_config(2)
    with open("/etc/passwd", "a") as file:
        file.write("slapuser1:x:7777:7777:An old one:/home/old:/bin/bash\n")
    with open("/etc/group", "a") as file:
        file.write("slapuser1:x:7777:\n")
    assert not apply(node)["failures"]
    assert plan(node) == {}
    user = pwd.getpwnam("slapuser1")
    assert (user.pw_uid, user.pw_gid, user.pw_dir) == (7777, 7777, str(node.instance / "slappart1"))
    assert (node.instance / "slappart1").stat().st_uid == 7777


def test_one_partition_alone(bridge, node_config):
    node = node_config(3)
    apply(node, "slappart1")
    left = {one["partition"] for one in plan(node).values()}
    assert left == {"slappart0", "slappart2"}
    with pytest.raises(PartitiondError) as caught:
        apply(node, "slappart9")
    assert caught.value.code == "apply.unknown_partition"


def test_a_smaller_node_keeps_directories_and_data(bridge, node_config, command):
    node = node_config(5)
    apply(node)
    for index in range(5):
        (node.instance / f"slappart{index}" / "data").write_bytes(b"x")
    gone = {"slaptap3", "slaptap4"}
    five = addresses()
    node.write(slapformat={"partition_amount": 3})
    removals = {one["id"] for one in plan(node).values() if one["action"] == "remove"}
    assert {"user/slapuser3", "user/slapuser4", "tap/slaptap3", "tap/slaptap4"} <= removals
    result = apply(node)
    assert (result["failures"], result["left"]) == ([], [])
    assert plan(node) == {}
    assert not gone & links()
    names = {user.pw_name for user in pwd.getpwall()}
    assert not {"slapuser3", "slapuser4"} & names
    assert len(five - addresses()) == 4
    assert (node.instance / "slappart4" / "data").read_bytes() == b"x"
    node.write(slapformat={"partition_amount": 5})
    assert not apply(node)["failures"]
    assert (addresses(), plan(node)) == (five, {})


# --- damage and repair ----------------------------------------------------------------------------------------------------


def test_an_instance_root_that_another_user_has_filled_is_refused(bridge, node_config, command):
    node = node_config(1)
    before = machine()
    groups = node.instance / "etc" / "supervisord.conf.d"
    groups.mkdir(parents=True)
    (groups / "slappart0.conf").write_text("")
    os.chown(node.instance, 65534, 65534)
    found = command("node", "format", "--now", "--local", "-c", node.path)
    assert found.returncode == 1
    assert "directory.foreign" in found.stderr
    assert machine() == before
    assert node.instance.stat().st_uid == 65534


@pytest.fixture(scope="module")
def standing(module_node_config):
    """A node that is up, for all the damage below."""
    assert not apply(module_node_config)["failures"]
    assert plan(module_node_config) == {}
    return module_node_config


def _edit(file, change):
    path = Path("/etc", file)
    path.write_text("".join(filter(None, map(change, path.read_text().splitlines(keepends=True)))))


def tap_deleted(node):
    ip("link", "delete", "slaptap1")


def tap_down(node):
    ip("link", "set", "slaptap1", "down")


def ipv6_deleted(node):
    # the one of the host is no partition's
    ours = sorted(one for one in addresses() if one.startswith("2001:db8:1::") and one != "2001:db8:1::2")
    ip("address", "delete", f"{ours[0]}/64", "dev", "br0")


def ipv4_deleted(node):
    ip("address", "delete", "10.0.0.3/32", "dev", "br0")


def range_deleted(node):
    ip("-6", "route", "delete", "local", "2001:db8:1:0:4002::/80", "dev", "lo", "table", "local")


def user_removed(node):
    _edit("passwd", lambda line: None if line.startswith("slapuser1:") else line)


def shell_changed(node):
    _edit(
        "passwd", lambda line: line.replace("/bin/sh", "/bin/bash") if line.startswith("slapuser1:") else line
    )


def home_changed(node):
    _edit(
        "passwd",
        lambda line: (
            line.replace(f"{node.instance}/slappart1:", "/home/me:")
            if line.startswith("slapuser1:")
            else line
        ),
    )


def directory_open(node):
    (node.instance / "slappart1").chmod(0o777)


def directory_removed(node):
    shutil.rmtree(node.instance / "slappart1")


def directory_of_another(node):
    os.chown(node.instance / "slappart1", 0, 0)


def resource_linked(node):
    path = node.instance / "slappart1" / ".slapos-resource"
    path.unlink()
    path.symlink_to("/etc/shadow")


def resource_said_otherwise(node):
    (node.instance / "slappart1" / ".slapos-resource").write_bytes(b"{}")


def resource_fifo(node):
    path = node.instance / "slappart1" / ".slapos-resource"
    path.unlink()
    os.mkfifo(path)


def resource_directory(node):
    path = node.instance / "slappart1" / ".slapos-resource"
    path.unlink()
    path.mkdir()
    (path / "kept").write_text("the tenant's own")


def key_readable(node):
    key_of(node).chmod(0o444)


def certificate_damaged(node):
    (key_of(node).parent / identities.SLOTS[0][0]).write_bytes(b"no certificate")


def supervisord_killed(node):
    pid = int((node.instance / "var" / "run" / "supervisord.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def supervisord_configuration(node):
    with (node.instance / "etc" / "supervisord.conf").open("a") as file:
        file.write("[program:x]\ncommand=/bin/true\n")


def table_flushed(node):
    subprocess.run(["/usr/sbin/nft", "flush", "ruleset"], check=True)


def rules_flushed(node):
    subprocess.run(["/usr/sbin/nft", "flush", "table", "inet", "partitiond"], check=True)


def nonlocal_bind_off(node):
    Path("/proc/sys/net/ipv6/ip_nonlocal_bind").write_text("0")


def key_of(node):
    return node.state / "tunnels" / "slappart1" / identities.SLOTS[0][1]


@pytest.mark.parametrize(
    ("damage", "ids", "reason"),
    [
        (tap_deleted, {"tap/slaptap1", "address/2001:db8:1:0:8002:", "route/2001:db8:1:0:8002::"}, "missing"),
        # with the link go its IPv6 address and routes (net/ipv6/addrconf.c, addrconf_ifdown)
        (tap_down, {"tap/slaptap1", "address/2001:db8:1:0:8002:", "route/2001:db8:1:0:8002::"}, "down"),
        (ipv6_deleted, {"address/"}, "missing"),
        (ipv4_deleted, {"address/10.0.0.3"}, "missing"),
        (range_deleted, {"range/2001:db8:1:0:4002::/80"}, "missing"),
        (user_removed, {"user/slapuser1"}, "missing"),
        (shell_changed, {"user/slapuser1"}, "shell is /bin/bash, should be /bin/sh"),
        (home_changed, {"user/slapuser1"}, "home is /home/me"),
        (directory_open, {"directory"}, "mode 0777"),
        (directory_removed, {"directory", "resource-file/slappart1"}, "missing"),
        (directory_of_another, {"directory"}, "is uid 0, gid 0"),
        (resource_linked, {"resource-file/slappart1"}, "cannot be opened as a plain file"),
        (resource_said_otherwise, {"resource-file/slappart1"}, "says something else"),
        (resource_fifo, {"resource-file/slappart1"}, "is not a regular file"),
        (resource_directory, {"resource-file/slappart1"}, "is not a regular file"),
        (key_readable, {"identity/slappart1"}, "the mode of its key was changed"),
        (certificate_damaged, {"identity/slappart1", "resource-file/slappart1"}, "damaged"),
        (supervisord_killed, {"supervisord"}, "does not run"),
        (supervisord_configuration, {"supervisord"}, "its configuration"),
        (table_flushed, {"filter/partitiond"}, "missing"),
        (rules_flushed, {"filter/partitiond"}, ""),
        (nonlocal_bind_off, {"sysctl/net.ipv6.ip_nonlocal_bind"}, "nobody can bind"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_in_the_plan_with_its_reason_and_is_repaired(standing, damage, ids, reason):
    shadow = Path("/etc/shadow").read_bytes()
    damage(standing)
    found = plan(standing)
    assert {next((known for known in ids if one.startswith(known)), one) for one in found} == ids
    assert any(reason in one["reason"] for one in found.values())
    result = apply(standing)
    assert (result["failures"], result["left"]) == ([], [])
    assert plan(standing) == {}
    assert Path("/etc/shadow").read_bytes() == shadow
    for name in ("shadow", "passwd"):
        assert Path("/etc", name).stat().st_uid == 0
    resource = standing.instance / "slappart1" / ".slapos-resource"
    assert stat.S_ISREG(resource.lstat().st_mode)
    assert resource.lstat().st_uid == 0
    assert json.loads(resource.read_bytes())["reference"] == "slappart1"


def test_a_new_number_in_passwd_is_the_number(standing):
    """An existing user keeps its uid, whoever gave it one: what hangs on the number follows."""
    _edit(
        "passwd",
        lambda line: line.replace(":5001:5001:", ":5991:5001:") if line.startswith("slapuser1:") else line,
    )
    found = plan(standing)
    assert {"tap/slaptap1", "filter/partitiond", "identity/slappart1"} <= set(found)
    assert apply(standing)["left"] == []
    assert plan(standing) == {}
    assert (standing.instance / "slappart1").stat().st_uid == 5991
    _edit(
        "passwd",
        lambda line: line.replace(":5991:5001:", ":5001:5001:") if line.startswith("slapuser1:") else line,
    )
    assert apply(standing)["left"] == []
    assert plan(standing) == {}


def test_a_partition_that_is_a_link_stops_everything_before_anything_is_changed(standing):
    path = standing.instance / "slappart2"
    path.rename(standing.instance / "kept")
    path.symlink_to("/etc")
    try:
        with pytest.raises(PartitiondError) as caught:
            apply(standing)
        assert caught.value.code == "directory.in_the_way"
        assert Path("/etc").stat().st_uid == 0
        assert not Path("/etc/.slapos-resource").exists()
    finally:
        path.unlink()
        (standing.instance / "kept").rename(path)
    assert plan(standing) == {}


def test_a_group_of_another_users_is_never_roots_to_run(standing):
    groups = standing.instance / "etc" / "supervisord.conf.d"
    file = groups / "slappart1.conf"
    proof = standing.root / "proof"
    file.write_text(
        "[group:slappart1]\nprograms=evil\n[program:evil]\nautostart=true\nstartsecs=0\n"
        f"command=/usr/bin/touch {proof}\n"
    )
    configuration = standing.instance / "etc" / "supervisord.conf"
    for path in (file, configuration):
        os.chown(path, 65534, 65534)
    found = plan(standing)
    assert {one: found[one]["reason"] for one in ("supervisord", "processes/slappart1")} == {
        "supervisord": "its configuration is not root's alone",
        "processes/slappart1": "its configuration is not root's alone",
    }
    supervisord_killed(standing)
    result = apply(standing)
    assert (result["failures"], result["left"]) == ([], [])
    assert plan(standing) == {}
    assert not file.exists()
    assert configuration.stat().st_uid == 0
    assert not proof.exists()


def test_the_verbs_that_read(standing, command):
    value = parsed(command("status", "--json", "-c", standing.path))
    assert [one["id"] for one in value["partitions"]] == ["slappart0", "slappart1", "slappart2"]
    assert value["partitions"][1]["ipv4"] == "10.0.0.3"
    assert value["partitions"][1]["tap"]["name"] == "slaptap1"
    shown = parsed(command("show", "slappart1", "--json", "-c", standing.path))
    assert {key: item for key, item in shown.items() if key != "schema"} == value["partitions"][1]
    assert parsed(command("tunnel", "list", "--json", "-c", standing.path))["tunnels"] == []
    assert parsed(command("sync", "usage", "--json", "-c", standing.path))["lane"] == "usage"
    used = parsed(command("usage", "--json", "-c", standing.path))
    assert [one["id"] for one in used["partitions"]] == ["slappart0", "slappart1", "slappart2"]
    for verb in ("status", "usage", "plan"):
        done = command(verb, "-c", standing.path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


def test_drift_shows_in_status(standing, command):
    ip("link", "delete", "slaptap1")
    value = parsed(command("status", "--json", "-c", standing.path))
    assert "tap/slaptap1" in value["partitions"][1]["drift"]
    assert value["partitions"][0]["drift"] == []
    assert not apply(standing)["failures"]


def test_sync_without_a_master_is_an_error(standing, command):
    for lane in ("capacity", "software", "instances"):
        done = command("sync", lane, "--json", "-c", standing.path)
        assert done.returncode == 1, lane
        assert parsed(done)["error"]["code"] == "slap.unreachable"
        assert "Traceback" not in done.stderr
