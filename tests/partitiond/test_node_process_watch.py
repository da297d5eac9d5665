"""A stunnel or a supervisord that is killed is noticed at once, by the process itself and not by a look at it."""

import os
import threading

import pytest
from test_node_tunnels import declare, pin, until

from partitiond import verbs
from partitiond.context import Context
from partitiond.process_watch import SUPERVISOR, ProcessWatch


@pytest.fixture
def context(bridge, node_config):
    node = node_config(2)
    made = Context.of(node.load())
    verbs.apply(made, [])
    own = pin(node, "slappart0", "cert", "")
    for partition in ("slappart0", "slappart1"):
        declare(node, partition, "in", f"mode = server\nlisten = 4000\nconnect = 5000\nallow = {own}\n")
    outcome = verbs.apply(made, [])
    assert (outcome["failures"], outcome["left"]) == ([], [])
    # what ends in its first second is given a pause by supervisord
    until(lambda: {one.state for one in made.supervisor.processes()} == {"RUNNING"})
    return made


@pytest.fixture
def watch(context):
    woken = threading.Event()
    made = ProcessWatch(context, woken.set)
    made.woken = woken
    made.start()
    yield made
    made.close()


def pids(context):
    return {one.group: one.pid for one in context.supervisor.processes() if one.pid}


def test_supervisord_is_hastened(context, watch):
    """Asked as rarely as once in this test, it has taken its turns nevertheless: somebody else asked it."""
    asked = []
    supervisor = type(context.supervisor)
    original = supervisor.processes

    def counted(self):
        asked.append(1)
        return original(self)

    before = pids(context)
    watch.attend(before)
    try:
        supervisor.processes = counted
        os.kill(before["slappart0-tunnel"], 9)
        until(lambda: asked)
    finally:
        supervisor.processes = original
    until(lambda: pids(context).get("slappart0-tunnel", 0) not in (0, before["slappart0-tunnel"]))
    after = pids(context)
    assert after["slappart1-tunnel"] == before["slappart1-tunnel"]
    assert not watch.woken.is_set()
    # the one that there is now is watched already, also when somebody names the one before
    watch.attend(before)
    until(lambda: {name: pid for name, (pid, _) in watch._watched.items()} == after)
    watch.attend(before)
    assert {name: pid for name, (pid, _) in watch._watched.items()} == after
    watch.attend({})
    assert watch._watched == {}


def test_the_sweep_is_woken_for_supervisord(context, watch):
    found = context.supervisor.pid()
    assert found
    watch.attend({SUPERVISOR: found, **pids(context)})
    os.kill(found, 9)
    until(watch.woken.is_set)
    assert context.supervisor.pid() == 0
    outcome = verbs.apply(context, [])
    assert (outcome["failures"], outcome["left"]) == ([], [])
    assert verbs.plan(context)["operations"] == []


def test_one_that_is_gone_already_is_passed_over(context, watch):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    watch.attend({"slappart0-tunnel": child})
    assert watch._watched == {}
