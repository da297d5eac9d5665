"""The same with nothing stood in for: a real supervisord and stunnel, and real commands at the same time."""

import json
import subprocess

import pytest
from crash_chosen import at_processes
from crash_matrix import KILLED, REFUSED, TAKEN_BACK
from crash_scene import Round, Step, bridge, configuration, tunnel

from partitiond import cli, lock, verbs
from partitiond.context import Context
from partitiond.supervision import Supervisor


def test_processes_outlive_a_killed_apply_and_are_found_again(matrix):
    """A supervisord that was just started, a stunnel that was told to read anew: there is one of each, and none in the end."""
    first, second = (configuration(1, **{"tunnel db": tunnel("slappart0", port)}) for port in (3306, 3307))
    made = Round(
        bridge,
        (
            Step("real create", first),
            Step("real change", second),
            Step("real remove", second, remove=True),
        ),
    )
    matrix(
        made,
        1,
        {KILLED: at_processes, TAKEN_BACK: at_processes, REFUSED: at_processes},
        lanes=3,
        supervisor=lambda settings, _points: Supervisor(settings),
    )


# --- two at once --------------------------------------------------------------------------------------------------------


def plan(node):
    return verbs.plan(Context.of(node.load()))["operations"]


def finished(started):
    out, err = started.communicate(timeout=60)
    assert started.returncode == 0, (started.returncode, out, err)
    return json.loads(out)


def test_two_that_grow_a_node_at_once(bridge, node_config, command):
    node = node_config(2)
    assert command("apply", "-q", "-c", node.path).returncode == 0
    node.write(slapformat={"partition_amount": 5})
    answers = [finished(one) for one in [command.start("apply", "--json", "-c", node.path) for _ in range(2)]]
    assert sorted(bool(one["done"]) for one in answers) == [
        False,
        True,
    ]  # the second waited, and had nothing to do
    assert plan(node) == []


def test_one_that_waits_for_one_that_is_killed(bridge, node_config, command):
    node = node_config(4)
    killed = command.start("apply", "--json", "-c", node.path)
    while not (node.state / "lock").exists():
        assert killed.poll() is None
    waiting = command.start("apply", "--json", "-c", node.path)
    try:
        killed.wait(0.3)
    except subprocess.TimeoutExpired:
        killed.kill()
    killed.communicate()
    answer = finished(waiting)
    assert (answer["failures"], answer["left"]) == ([], [])
    assert plan(node) == []


@pytest.mark.parametrize(("first", "second"), [("teardown", "apply"), ("apply", "teardown")])
def test_one_that_builds_beside_one_that_removes(bridge, node_config, command, first, second):
    """The second waits, and does its work on what the first left: of what one makes and the other removes, all or nothing."""
    node = node_config(2)
    assert command("apply", "-q", "-c", node.path).returncode == 0
    node.write(slapformat={"partition_amount": 4})
    at_work = command.start(first, "--json", "-c", node.path)
    while not (node.state / "lock").read_text().startswith(f"partitiond {first}"):
        assert at_work.poll() is None
    waiting = command.start(second, "--json", "-c", node.path)
    finished(at_work)
    finished(waiting)
    created = {one["id"] for one in plan(node) if one["action"] == "create"}
    if second == "apply":
        assert plan(node) == []
    else:
        made = {"slapsoft", "slapuser0", "slapuser3"}
        assert {f"user/{name}" for name in made} | {
            "tap/slaptap3",
            "filter/partitiond",
            "supervisord",
        } <= created
    assert command("apply", "-q", "-c", node.path).returncode == 0
    assert plan(node) == []


def test_one_that_has_waited_long_enough_says_who_is_at_work(bridge, node_config, monkeypatch, capsys):
    node = node_config(1)
    monkeypatch.setattr(cli, "_WAIT_FOR_OTHERS", 0.0)
    with lock.exclusive(node.state, "a long apply"):
        assert cli.main(["apply", "--json", "-c", str(node.path)]) == cli.ERROR
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "node.busy"
    assert "a long apply" in error["message"]
    assert not node.instance.exists()
