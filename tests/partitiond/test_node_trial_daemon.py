"""A try beside a running daemon: it is handed over, and whatever is killed, the operator gets the node back."""

import contextlib
import os
import signal

import pytest
from json_schemas import parsed
from trial_scene import (
    NODE4,
    RIGHT,
    WRONG,
    Daemon,
    assert_as_before,
    guardians,
    hurry,
    links,
    machine,
    reached_again,
    said,
    taken_back,
    wait,
)

from partitiond import last_good, trial

WRONGLY = {"partitiond": WRONG}


@pytest.fixture
def daemon(uplink, node_config, command):
    """A daemon on a node with two partitions on the uplink."""
    node = node_config(2, interface="eth0")
    found = Daemon(command, node)
    try:
        found.start()
        yield found
    finally:
        found.end()
        trial.abandon(node.state)
        wait(lambda: not guardians(), "the guardian to end")


def tried(daemon, *arguments):
    done = daemon.command("try", "--json", "-c", daemon.node.path, *arguments)
    assert done.returncode == 0, done.stderr
    return parsed(done)


def status(daemon):
    return parsed(daemon.command("status", "--json", "-c", daemon.node.path))["node"]


def error(done):
    assert done.returncode == 1, done.stdout
    return parsed(done)["error"]


def over(daemon):
    return not trial.is_open(daemon.node.state)


def events(daemon):
    done = daemon.command("events", "--json", "-c", daemon.node.path)
    return [line for line in done.stdout.splitlines() if '"trial.' in line]


def test_a_try_is_handed_over_and_taken_back(uplink, daemon):
    before = machine()
    node, command = daemon.node, daemon.command
    node.write(**WRONGLY)
    assert tried(daemon, "--timeout", "600")["trial"]["state"] == "pending"
    assert not uplink.reached(NODE4)
    assert status(daemon)["trial"]["seconds_left"] > 0
    assert error(command("try", "--json", "-c", node.path))["code"] == "trial.pending"
    taken_back(node)
    reached_again(uplink, NODE4)
    assert_as_before(before)
    found = status(daemon)
    assert (found["trial"], found["drift"]) == (None, [])
    assert "it was not confirmed within 600 s" in found["open_cases"][0]
    assert ["trial.begun" in events(daemon)[0], "trial.rolled_back" in events(daemon)[1]] == [True, True]
    # neither a reload nor a restart puts it into force
    daemon.process.send_signal(signal.SIGHUP)
    wait(lambda: "reload: [trial.rejected]" in daemon.log, "the reload")
    daemon.end()
    daemon.start()
    assert "the last good configuration is in force" in daemon.log
    assert_as_before(before)
    # but who says so by word
    node.write(partitiond=RIGHT)
    assert command("apply", "-c", node.path).returncode == 0
    assert "br1" in {one["ifname"] for one in links()}
    assert last_good.rejected(node.state) is None
    reached_again(uplink, NODE4)


def test_a_daemon_that_is_killed_in_a_trial(uplink, daemon):
    """The guardian takes the node and the trial back; a daemon that starts again meanwhile goes on with what is on trial."""
    before = machine()
    daemon.node.write(**WRONGLY)
    tried(daemon, "--timeout", "600")
    daemon.end(signal.SIGKILL)
    daemon.start()
    assert status(daemon)["trial"]["state"] == "pending"
    assert {"br0"} == {one["master"] for one in links() if one["ifname"] == "eth0"}
    daemon.end(signal.SIGKILL)
    assert not over(daemon)
    taken_back(daemon.node)
    reached_again(uplink, NODE4)
    assert_as_before(before)


def test_a_daemon_that_is_killed_while_it_applies(uplink, daemon):
    before = machine()
    daemon.node.write(slapformat={"partition_amount": 40}, **WRONGLY)
    started = daemon.command.start("try", "--timeout", "600", "-c", daemon.node.path)
    wait(lambda: "10.0.0.41/32" in said("/usr/sbin/ip", "-brief", "address"), "the last address", pause=0.001)
    assert trial.read(daemon.node.state).state == "applying"
    daemon.end(signal.SIGKILL)
    started.communicate(timeout=30)
    assert started.returncode == 1
    wait(lambda: over(daemon), "the end of the trial")
    assert_as_before(before)


def test_without_a_guardian_the_daemon_takes_it_back(uplink, daemon):
    before = machine()
    daemon.node.write(**WRONGLY)
    tried(daemon, "--timeout", "3")
    for pid in guardians():
        os.kill(pid, signal.SIGKILL)
    assert not uplink.reached(NODE4)
    wait(lambda: over(daemon), "the end of the trial")
    reached_again(uplink, NODE4)
    assert_as_before(before)


def test_a_daemon_that_hangs_is_asked_until_it_answers(uplink, daemon):
    before = machine()
    daemon.node.write(**WRONGLY)
    tried(daemon, "--timeout", "600")
    daemon.process.send_signal(signal.SIGSTOP)
    hurry(daemon.node)
    log = trial.log_path(daemon.node.state)
    wait(lambda: "taking it back" in log.read_text(), "the guardian to ask")
    assert not over(daemon)
    daemon.process.send_signal(signal.SIGCONT)
    wait(lambda: over(daemon), "the end of the trial")
    assert_as_before(before)


def test_what_is_confirmed_stays_with_a_daemon(uplink, daemon):
    node, command = daemon.node, daemon.command
    node.write(slapformat={"partition_amount": 3}, partitiond=RIGHT)
    tried(daemon, "--timeout", "600")
    done = command("sync", "capacity", "--json", "-c", node.path)
    assert parsed(done)["done"] == ["not posted while a configuration is on trial"]
    count = daemon.log.count("capacity:")
    assert parsed(command("confirm", "--json", "-c", node.path))["config"] == str(node.path)
    reached_again(uplink, NODE4)
    # the master is told once it is certain
    wait(lambda: daemon.log.count("capacity:") > count, "the capacity to be posted")
    assert "br1" in {one["ifname"] for one in links()}
    assert status(daemon)["drift"] == []
    assert last_good.load(node.state, node.path) == node.load()


def test_a_first_node_that_is_rejected_ends_the_daemon(uplink, node_config, command):
    """A daemon that began in the first trial of all has nothing to go back to; and nothing is built up by itself."""
    before = machine()
    node = node_config(1, interface="eth0", **WRONGLY)
    daemon = Daemon(command, node)
    tried(daemon, "--timeout", "600")
    with contextlib.ExitStack() as stack:
        stack.callback(daemon.end)
        daemon.start()
        hurry(node)
        assert daemon.process.wait(30) == 0
        assert over(daemon)
        assert_as_before(before)
    done = command("run", "--json", "-c", node.path)
    assert error(done)["code"] == "trial.rejected"
    wait(lambda: not guardians(), "the guardian to end")
    assert_as_before(before)
