"""A try on a real kernel: the operator loses the node by a wrong setting, and gets it back without doing anything."""

import contextlib
import json
import os
import pty
import shlex
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_schemas import parsed
from trial_scene import (
    NODE4,
    NODE6,
    RIGHT,
    WRONG,
    as_before,
    assert_as_before,
    guardians,
    hurry,
    instance_runs,
    ip,
    link_local_on,
    links,
    machine,
    pid_of,
    reached_again,
    said,
    taken_back,
    wait,
)

from partitiond import config, last_good, trial
from partitiond.errors import PartitiondError

WRONGLY = {"partitiond": WRONG}


@pytest.fixture
def node(uplink, node_config):
    """A node that is none yet, with an uplink that the operator reaches it by; guardians are gone after the test."""
    found = node_config(2, interface="eth0")
    yield found
    trial.abandon(found.state)
    wait(lambda: not guardians(), "the guardian to end")


def error(done):
    assert done.returncode == 1, done.stdout
    return parsed(done)["error"]


def tried(command, node, *arguments):
    """Try; return the object."""
    done = command("try", "--json", "-c", node.path, *arguments)
    assert done.returncode == 0, done.stderr
    return parsed(done)


def node_status(command, node):
    done = command("status", "--json", "-c", node.path)
    assert done.returncode == 0, done.stderr
    return parsed(done)["node"]


def over(node):
    return not trial.is_open(node.state)


# --- lost, and back -----------------------------------------------------------------------------------------------------


def test_a_wrong_bridge_is_taken_back_by_itself(uplink, node, command):
    before = machine()
    node.write(**WRONGLY)
    with uplink.session(NODE4) as say4, uplink.session(NODE6) as say6:
        value = tried(command, node, "--timeout", "4")
        assert 0 < value["trial"]["seconds_left"] <= 4
        assert value["done"] > 20
        assert not uplink.reached(NODE4)
        # what the operator types meanwhile arrives when the node is back
        heard4, heard6 = say4(b"are you there?"), say6(b"and you?")
        assert node_status(command, node)["trial"]["state"] == "pending"
        wait(lambda: over(node), "the end of the trial")
        reached_again(uplink, NODE4)
        reached_again(uplink, NODE6)
        assert (heard4(), heard6()) == (b"are you there?", b"and you?")
    assert_as_before(before)
    assert wait(lambda: not guardians(), "the guardian to end")
    after = node_status(command, node)
    assert after["trial"] is None
    assert "it was not confirmed within 4 s" in after["open_cases"][0]
    # nothing puts the same into force by itself
    for verb in (("run",), ("sync", "usage")):
        told = error(command(*verb, "--json", "-c", node.path))
        assert told["code"] == "trial.rejected"
        assert "partitiond apply" in told["hint"]
    assert_as_before(before)


def test_what_runs_goes_on_and_what_was_before_is_put_back(uplink, node, command):
    """From two partitions on the uplink to three in the bridge, and back."""
    assert command("apply", "-c", node.path).returncode == 0
    good = last_good.path_of(node.state).read_bytes()
    pid = instance_runs(node, 0)
    base = (node.state / "base-address").read_bytes()
    before = machine()
    node.write(slapformat={"partition_amount": 3, "partition_has_ipv6_range": "false"}, **WRONGLY)
    tried(command, node, "--timeout", "600")
    assert {"slaptap2", "br0"} <= {one["ifname"] for one in links()}
    taken_back(node)
    assert_as_before(before)
    reached_again(uplink, NODE6)
    assert pid_of(node, 0) == pid
    assert Path(f"/proc/{pid}").exists()
    assert last_good.path_of(node.state).read_bytes() == good
    assert (node.state / "base-address").read_bytes() == base
    # what the verbs show is what is in force
    assert [one for one in node_status(command, node)["drift"] if "directory" not in one] == []
    assert error(command("confirm", "--json", "-c", node.path))["code"] == "trial.too_late"
    # and who says so by word puts it into force all the same
    node.write(partitiond=RIGHT)
    assert command("apply", "-c", node.path).returncode == 0
    reached_again(uplink, NODE4)
    assert last_good.rejected(node.state) is None


def stopped_in_the_midst(started, node):
    """Stop a try that has begun to change the network and is not through."""
    wait(lambda: "10.0.0.2/32" in said("/usr/sbin/ip", "-brief", "address"), "the first address", pause=0.001)
    started.send_signal(signal.SIGSTOP)
    assert trial.read(node.state).state == "applying"
    wait(lambda: len(guardians()) == 1, "the guardian to be alone")


def test_a_try_that_is_killed_is_taken_back_at_once(uplink, node, command):
    before = machine()
    node.write(**WRONGLY)
    started = command.start("try", "--timeout", "600", "-c", node.path)
    stopped_in_the_midst(started, node)
    assert not as_before(before)
    started.kill()
    started.communicate(timeout=30)
    wait(lambda: over(node), "the end of the trial")
    assert_as_before(before)
    assert "its apply was cut off" in node_status(command, node)["open_cases"][0]


def test_an_apply_that_hangs_is_ended_and_taken_back(uplink, node, command):
    before = machine()
    node.write(**WRONGLY)
    started = command.start("try", "--timeout", "600", "-c", node.path)
    stopped_in_the_midst(started, node)
    hurry(node)
    started.communicate(timeout=30)
    assert started.returncode == -signal.SIGKILL
    wait(lambda: over(node), "the end of the trial")
    assert_as_before(before)


def test_a_session_that_is_cut_off(uplink, node, command):
    """The shell of the operator loses its terminal, and with it everything that was started in it is hung up."""
    before = machine()
    node.write(**WRONGLY)
    words = shlex.join(command.line("try", "--timeout", "600", "-c", node.path))
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(
            signal.SIGHUP, signal.SIG_DFL
        )  # whoever runs the tests by nohup hands on that it is ignored
        shell = ["sh", "-c", f"cd / && {words}; sleep 600"]
        os.execve("/bin/sh", shell, command.environment)  # noqa: S606 - it is the shell that is hung up
    try:
        wait(lambda: (one := trial.read(node.state)) and one.state == "pending", "the trial")
        assert not uplink.reached(NODE4)
    finally:
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGHUP
    wait(lambda: len(guardians()) == 1, "the guardian to be alone")
    taken_back(node)
    reached_again(uplink, NODE4)
    assert_as_before(before)


def test_what_cannot_be_applied_is_taken_back_at_once(uplink, node, command):
    """The kernel takes no interface into a bridge that carries a macvlan, which no plan knows."""
    ip("link add mac0 link eth0 type macvlan")
    try:
        before = machine()
        node.write(partitiond=RIGHT)
        told = error(command("try", "--json", "--timeout", "600", "-c", node.path))
        assert told["code"] == "trial.failed"
        assert "port/eth0" in told["message"]
        assert "everything is as it was before" in told["message"]
        assert over(node)
        assert_as_before(before)
    finally:
        ip("link delete mac0")


# --- kept -----------------------------------------------------------------------------------------------------------------


def test_what_is_confirmed_stays(uplink, node, command):
    node.write(partitiond=RIGHT)
    assert tried(command, node, "--timeout", "600")["trial"]["state"] == "pending"
    reached_again(uplink, NODE4)
    value = parsed(command("confirm", "--json", "-c", node.path))
    assert value["config"] == str(node.path)
    assert over(node)
    assert last_good.load(node.state, node.path) == node.load()
    wait(lambda: not guardians(), "the guardian to end")
    assert command("plan", "-c", node.path).returncode == 0
    assert error(command("confirm", "--json", "-c", node.path))["code"] == "trial.none"
    # and from then on it is what the next trial goes back to
    link_local_on("br1")
    before = machine()
    node.write(slapformat={"partition_amount": 1})
    tried(command, node, "--timeout", "600")
    assert not as_before(before)
    taken_back(node)
    assert_as_before(before)


def test_nothing_to_do_is_no_trial(uplink, node, command):
    assert command("apply", "-c", node.path).returncode == 0
    done = command("try", "-c", node.path)
    assert (done.returncode, done.stdout) == (0, "nothing to do\n")
    assert (over(node), guardians()) == (True, [])
    ip("link delete slaptap1")
    done = command("try", "--timeout", "60", "-c", node.path)
    assert done.stdout.splitlines()[-1].strip() == "partitiond confirm"
    assert command("confirm", "-c", node.path).stdout.startswith("confirmed, ")


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "1e9", "nan"])
def test_a_time_that_is_none(command, timeout):
    assert command("try", "--timeout", timeout).returncode == 64


def test_a_trial_is_alone(uplink, node, command):
    """Until it is over nothing else is put into force; a teardown ends it."""
    before = machine()
    node.write(partitiond=RIGHT)
    tried(command, node, "--timeout", "600")
    ip("link delete slaptap0")
    assert (
        command("apply", "-c", node.path).returncode == 0
    )  # the same again: that is no change of what is in force
    assert trial.read(node.state).state == "pending"
    done = command("sync", "capacity", "--json", "-c", node.path)
    assert parsed(done)["done"] == ["not posted while a configuration is on trial"]
    assert error(command("try", "--json", "-c", node.path))["code"] == "trial.pending"
    node.write(slapformat={"partition_amount": 1})
    told = error(command("apply", "--json", "-c", node.path))
    assert (told["code"], "confirm" in told["hint"]) == ("trial.pending", True)
    assert len(parsed(command("status", "--json", "-c", node.path))["partitions"]) == 2
    assert command("teardown", "-c", node.path).returncode == 0
    wait(lambda: not guardians(), "the guardian to end")
    assert_as_before(before)


# --- without a guardian -----------------------------------------------------------------------------------------------


def without_guardian():
    # the process that starts it bears its name for a moment
    wait(lambda: len(guardians()) == 1, "the guardian to be alone")
    (pid,) = guardians()
    os.kill(pid, signal.SIGKILL)
    wait(lambda: not guardians(), "the guardian to end")


@pytest.mark.parametrize("end", ["deadline", "reboot"])
def test_the_next_verb_takes_back_what_has_ended(uplink, node, command, end):
    assert command("apply", "-c", node.path).returncode == 0
    before = machine()
    node.write(**WRONGLY)
    tried(command, node, "--timeout", "600")
    without_guardian()
    path = node.state / "trial.json"
    change = {"deadline": {"deadline": 1.0}, "reboot": {"boot_id": "another"}}[end]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    told = error(command("confirm", "--json", "-c", node.path))
    assert told["code"] == "trial.too_late"
    done = command("sync", "usage", "-c", node.path)
    assert done.returncode == 0, done.stderr
    assert "on trial" in done.stderr
    assert "taken back" in done.stderr
    assert_as_before(before)
    assert over(node)


def test_the_guardian_does_not_give_up_but_an_explicit_apply_goes_on(uplink, node, command):
    assert command("apply", "-c", node.path).returncode == 0
    before, good = machine(), last_good.path_of(node.state)
    kept = good.read_bytes()
    node.write(**WRONGLY)
    tried(command, node, "--timeout", "600")
    good.unlink()
    hurry(node)
    log = trial.log_path(node.state)
    wait(lambda: "the last good configuration is gone" in log.read_text(), "the guardian to fail")
    good.write_bytes(kept)
    wait(lambda: over(node), "the end of the trial")
    assert_as_before(before)
    tried(command, node, "--timeout", "600")
    without_guardian()
    hurry(node)
    good.unlink()
    node.write(partitiond=RIGHT)
    wait(lambda: trial.read(node.state).ended(), "the end of the time")
    done = command("apply", "-c", node.path)
    assert done.returncode == 0, done.stderr
    assert "cannot take it back" in done.stderr
    assert over(node)
    reached_again(uplink, NODE4)


def test_a_node_of_unknown_origin_is_not_tried_on(uplink, node, command):
    """Where it is not known what to go back to, a try would have to tear the node down."""
    assert command("apply", "-c", node.path).returncode == 0
    last_good.path_of(node.state).unlink()
    before = machine()
    node.write(partitiond=RIGHT)
    told = error(command("try", "--json", "-c", node.path))
    assert told["code"] == "trial.no_way_back"
    assert "partitiond apply" in told["hint"]
    last_good.path_of(node.state).write_text("[slapos]\nnonsense\n")
    assert error(command("try", "--json", "-c", node.path))["code"] == "config.syntax"
    assert_as_before(before)
    assert over(node)


@pytest.mark.parametrize("what", ["user", "address"])
def test_what_others_made_is_not_taken_over_on_trial(uplink, node, command, what):
    """A node that slapos.core formatted, say: when it is taken back, what became ours would be gone."""
    users = {name: Path("/etc", name).read_bytes() for name in ("passwd", "group")}
    try:
        if what == "user":
            with open("/etc/passwd", "a") as file:
                file.write("slapuser1:x:5001:5001:An old one:/home/old:/bin/bash\n")
            with open("/etc/group", "a") as file:
                file.write("slapuser1:x:5001:\n")
        else:
            ip("address add 10.0.0.3/32 dev eth0")
        before = machine()
        told = error(command("try", "--json", "-c", node.path))
        assert told["code"] == "trial.no_way_back"
        assert {"user": "user/slapuser1", "address": "address/10.0.0.3"}[what] in told["message"]
        assert_as_before(before)
        assert (over(node), guardians()) == (True, [])
    finally:
        for name, content in users.items():
            Path("/etc", name).write_bytes(content)


def test_bad_states_are_refused_before_anything_is_changed(uplink, node, command):
    before = machine()
    node.write(partitiond={"bridge": "br1", "bridge_ports": "eth7"})
    assert error(command("try", "--json", "-c", node.path))["code"] == "network.no_port"
    assert_as_before(before)
    assert (over(node), guardians()) == (True, [])


# --- the record -------------------------------------------------------------------------------------------------------


@pytest.fixture
def record(node_config):
    node = node_config(0, interface="lo")
    node.state.mkdir()
    return node.load()


def test_a_confirmation_and_a_rollback_cannot_both_win(record):
    def confirm():
        with contextlib.suppress(PartitiondError):
            return "confirmed" if trial.confirm(record.state_dir) else ""
        return ""

    def claim(identity):
        return "claimed" if trial.claim(record.state_dir, identity, "test") else ""

    results = set()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(100):
            begun = trial.begin(record, 60, before=False, memory={})
            trial.applied(record.state_dir, begun)
            calls = [pool.submit(confirm), pool.submit(claim, begun.id), pool.submit(confirm)]
            won = {call.result() for call in calls} - {""}
            assert len(won) == 1
            results |= won
            trial.abandon(record.state_dir)
            last_good.forget(record.state_dir)


def test_a_confirmation_that_was_cut_off_counts(record):
    begun = trial.begin(record, 60, before=False, memory={})
    trial.applied(record.state_dir, begun)
    path = record.state_dir / "trial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "confirmed", "deadline": 1.0}))
    assert trial.claim(record.state_dir, begun.id, "test") is None
    trial.finish_confirmed(record.state_dir)
    assert last_good.load(record.state_dir, record.file) == record
    assert not trial.is_open(record.state_dir)


def test_only_what_is_applied_can_be_confirmed(record):
    begun = trial.begin(record, 60, before=False, memory={})
    for expected in ("trial.applying", "trial.pending"):
        with pytest.raises(PartitiondError) as caught:
            trial.confirm(record.state_dir) if expected == "trial.applying" else trial.begin(
                record, 60, before=False, memory={}
            )
        assert caught.value.code == expected
    trial.claim(record.state_dir, begun.id, "test")
    with pytest.raises(PartitiondError) as caught:
        trial.applied(record.state_dir, begun)
    assert caught.value.code == "trial.too_late"


VALUES = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)


@given(values=st.lists(VALUES, min_size=1, max_size=4), more=st.integers(0, 3))
def test_a_remembered_configuration_is_the_same(values, more):
    """Whatever the parser made of the file, it makes again of what was remembered of it."""
    import configparser

    from partitiond import config_reader

    def parser(text):
        made = configparser.ConfigParser(interpolation=None, strict=True, inline_comment_prefixes=(";", "#"))
        made.read_string(text)
        return made

    text = "[DEFAULT]\nshared = 1\n[tunnel a/b]\nallow =\n" + "".join(f"    {value}\n" for value in values)
    text += "[slapos]\n" + "".join(f"key{index} = {value}\n" for index, value in enumerate(values))
    first = parser(text + "[empty]\n" * (more > 1))
    again = config_reader.merged(first)
    second = parser(again)
    assert second.sections() == first.sections()
    assert [dict(second[one]) for one in second.sections()] == [dict(first[one]) for one in first.sections()]
    assert config_reader.merged(second) == again


def test_a_whole_configuration_is_remembered(node_config):
    node = node_config(
        3,
        interface="lo",
        routable_ipv4={"slappart1": "203.0.113.7/24 via 203.0.113.1"},
        partitiond={"destroy_guard": "false ; a comment"},
    )
    drop_in = Path(f"{node.path}.d")
    drop_in.mkdir()
    (drop_in / "more.cfg").write_text("[slapformat]\ntun_ipv6 = no\n")
    node.state.mkdir()
    found = node.load()
    last_good.save(found)
    again = last_good.load(node.state, node.path)
    assert again == found
    assert last_good.fingerprint(again) == last_good.fingerprint(found)
    written = last_good.path_of(node.state).stat().st_mtime_ns
    last_good.save(again)
    assert last_good.path_of(node.state).stat().st_mtime_ns == written
    node.write(slapformat={"partition_amount": 2})
    assert last_good.fingerprint(config.load(node.path)) != last_good.fingerprint(found)
