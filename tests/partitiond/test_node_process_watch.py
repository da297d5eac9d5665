"""A stunnel or a supervisord that is killed is noticed at once, by the process itself and not by a look at it."""

import os
import socket
import threading

import pytest
from test_node_tunnels import declare, pin, until

from partitiond import procfs, verbs
from partitiond.context import Context
from partitiond.process_watch import EVENTS, SUPERVISOR, ProcessWatch


@pytest.fixture
def context(bridge, node_config):
    node = node_config(2)
    node.write(partitiond={"keep_running": "slappart0"})
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
    until((context.supervisor.directory / EVENTS).exists)
    yield made
    made.close()


def pids(context):
    return {one.group: one.pid for one in context.supervisor.processes() if one.pid}


def test_the_end_of_a_process_is_told_by_supervisord_which_nobody_asks(context, watch):
    told = []
    before = pids(context)

    context.process_ended = told.append
    original, context.supervisor._call = context.supervisor._call, None  # whoever asks supervisord fails
    try:
        os.kill(before["slappart0-tunnel"], 9)
        until(lambda: told)
    finally:
        context.supervisor._call = original
    (ended,) = told
    assert (ended.group, ended.name, ended.state) == ("slappart0-tunnel", "stunnel", "EXITED")
    assert (ended.pid, ended.expected) == (before["slappart0-tunnel"], False)
    until(lambda: pids(context).get("slappart0-tunnel", 0) not in (0, ended.pid))
    assert pids(context)["slappart1-tunnel"] == before["slappart1-tunnel"]
    assert not watch.woken.is_set()


def test_what_is_no_event_is_passed_over(context, watch):
    told = []
    context.process_ended = told.append
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        for text in (b"", b"{", b"[]", b'{"group": "x"}', b"\xff"):
            sender.sendto(text, str(context.supervisor.directory / EVENTS))
    # a group that is stopped has not ended by itself, which nobody is told of
    context.supervisor.stop_group("slappart1-tunnel")
    os.kill(pids(context)["slappart0-tunnel"], 9)
    until(lambda: told)
    assert [one.group for one in told] == ["slappart0-tunnel"]
    assert (context.supervisor.directory.stat().st_mode & 0o777, watch.is_alive()) == (0o700, True)


def test_the_sweep_is_woken_for_supervisord(context, watch):
    """And what it does then leaves the stunnel of a kept partition as it is."""
    before, found = pids(context), context.supervisor.pid()
    assert found
    watch.attend({SUPERVISOR: found})
    watch.attend({SUPERVISOR: found})
    os.kill(found, 9)
    until(watch.woken.is_set)
    assert watch._watched is None
    assert context.supervisor.pid() == 0
    outcome = verbs.apply(context, [])
    assert (outcome["failures"], outcome["left"]) == ([], [])
    assert verbs.plan(context)["operations"] == []
    after = pids(context)
    assert after["slappart0-tunnel"] == before["slappart0-tunnel"]
    assert after["slappart1-tunnel"] != before["slappart1-tunnel"]
    # the one that was taken over reads its configuration when it is told to, and ends when it is stopped
    assert context.supervisor.hang_up("slappart0-tunnel", "stunnel", after["slappart0-tunnel"])
    context.supervisor.stop_group("slappart0-tunnel")
    assert not procfs.is_alive(before["slappart0-tunnel"])


def test_one_that_is_gone_already_is_passed_over(context, watch):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    watch.attend({SUPERVISOR: child})
    assert watch._watched is None
    watch.attend({SUPERVISOR: 0})
    assert watch._watched is None
