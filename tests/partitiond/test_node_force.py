"""Shrinking: a partition with an instance stays unless it is told to go; then what runs in it ends, and its data is kept."""

import json
import os
import pwd
import subprocess
from pathlib import Path

import pytest
from json_schemas import parsed
from trial_scene import Daemon, guardians, instance_runs, links, pid_of, taken_back, wait

from partitiond import trial
from partitiond.context import Context


@pytest.fixture
def node(bridge, node_config, command):
    """Three partitions; the first and the last have an instance that runs, the last has a tunnel, too."""
    found = node_config(3)
    assert command("apply", "-c", found.path).returncode == 0
    directory = found.instance / "slappart2" / "etc" / "tunnel"
    directory.mkdir(parents=True)
    pin = json.loads((found.instance / "slappart0" / ".slapos-resource").read_bytes())[
        "certificate_fingerprint"
    ]
    text = f"[tunnel]\nmode = server\nlisten = 6000\nconnect = 5000\nallow = {pin}\n"
    (directory / "db.cfg").write_text(text)
    user = pwd.getpwnam("slapuser2")
    for path in (directory.parent, directory, directory / "db.cfg"):
        os.chown(path, user.pw_uid, user.pw_gid)
    for index in (0, 2):
        instance_runs(found, index)
    assert command("apply", "-c", found.path).returncode == 0
    (found.instance / "slappart2" / "data").write_text("the tenant's own")
    yield found
    trial.abandon(found.state)
    wait(lambda: not guardians(), "the guardian to end")


@pytest.fixture
def stray(node):
    """A process that the last instance started beside supervisord, in a session of its own."""
    user = pwd.getpwnam("slapuser2")
    switch = ["/usr/bin/setpriv", "--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]
    started = subprocess.Popen([*switch, "--", "/bin/sleep", "1000"], start_new_session=True)
    yield started
    started.kill()
    started.wait()


def shrink(node):
    node.write(slapformat={"partition_amount": 2})


def groups(node):
    return {process.group for process in Context.of(node.load()).supervisor.processes()}


def users():
    return {user.pw_name for user in pwd.getpwall()}


def assert_gone(node, stray):
    assert "slapuser2" not in users()
    assert "slaptap2" not in {one["ifname"] for one in links()}
    assert groups(node) == {"slappart0"}
    assert stray.wait(10) == -9
    assert (node.instance / "slappart2" / "data").read_text() == "the tenant's own"


def state(node, name):
    return Context.of(node.load()).store.instance(name)


def test_a_busy_partition_stays(node, stray, command):
    before, pid = groups(node), pid_of(node, 2)
    assert before == {"slappart0", "slappart2", "slappart2-tunnel"}
    shrink(node)
    for verb in (("plan",), ("apply",), ("try",)):
        done = command(*verb, "--json", "-c", node.path)
        told = parsed(done)["error"]
        assert (done.returncode, told["code"]) == (1, "node.shrinks_busy")
        assert "slappart2" in told["message"]
        assert "--force" in told["hint"]
    assert (groups(node), pid_of(node, 2), stray.poll()) == (before, pid, None)


def test_with_force_it_goes_and_its_data_stays(node, stray, command):
    pid = pid_of(node, 0)
    shrink(node)
    done = command("apply", "--force", "--json", "-c", node.path)
    assert (done.returncode, parsed(done)["left"]) == (0, []), done.stdout
    assert_gone(node, stray)
    assert pid_of(node, 0) == pid
    # once it is gone nothing has to be forced any more
    assert command("plan", "-c", node.path).returncode == 0
    # whose the data is stays known; when there is room again, the next pass configures and starts it
    assert (state(node, "slappart2").instance_guid, state(node, "slappart2").timestamp) == (
        "INSTANCE-1",
        None,
    )
    node.write(slapformat={"partition_amount": 3})
    assert command("apply", "-c", node.path).returncode == 0
    assert (node.instance / "slappart2" / "data").read_text() == "the tenant's own"
    assert command("plan", "-c", node.path).returncode == 0
    shrink(node)
    assert command("apply", "-c", node.path).returncode == 1


def test_a_forced_trial_that_is_taken_back(node, stray, command):
    """What was ended is not started again by a rollback, but its place is back, and the next pass starts it."""
    pid = pid_of(node, 0)
    shrink(node)
    done = command("try", "--force", "--timeout", "600", "--json", "-c", node.path)
    assert done.returncode == 0, done.stdout
    assert_gone(node, stray)
    taken_back(node)
    assert "slapuser2" in users()
    assert "slaptap2" in {one["ifname"] for one in links()}
    assert (pid_of(node, 0), state(node, "slappart2").timestamp) == (pid, None)
    assert (node.instance / "slappart2" / "data").read_text() == "the tenant's own"


def test_what_came_into_a_partition_on_trial_goes_with_it(node, stray, command):
    node.write(slapformat={"partition_amount": 4})
    assert command("try", "--timeout", "600", "-c", node.path).returncode == 0
    newcomer = instance_runs(node, 3)
    taken_back(node)
    assert not Path(f"/proc/{newcomer}").exists()
    assert groups(node) == {"slappart0", "slappart2", "slappart2-tunnel"}
    assert "slapuser3" not in users()


def test_the_daemon_is_told_to_force(node, stray, command):
    daemon = Daemon(command, node)
    try:
        daemon.start()
        shrink(node)
        assert parsed(command("apply", "--json", "-c", node.path))["error"]["code"] == "node.shrinks_busy"
        done = command("apply", "--force", "--json", "-c", node.path)
        assert (done.returncode, parsed(done)["left"]) == (0, []), done.stdout
        assert_gone(node, stray)
        assert parsed(command("status", "--json", "-c", node.path))["node"]["drift"] == []
    finally:
        daemon.end()
