"""A stunnel or a supervisord that is killed is noticed at once, by the process itself and not by a look at it."""

import os
import socket
import threading
from types import SimpleNamespace

import pytest
from test_node_tunnels import declare, pin, until
from trial_scene import instance_runs

from partitiond import process_watch, procfs, verbs
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


def gone():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


@pytest.mark.parametrize("pid", [gone, lambda: 0])
def test_for_one_that_ended_before_it_was_watched_the_sweep_is_woken(context, watch, monkeypatch, pid):
    """Ever more seldom while it stays away, and at once again after one was there."""
    times, now = [], 0.0
    monkeypatch.setattr(process_watch.time, "monotonic", lambda: now)
    for now in (*range(0, 200, 5), 200):
        watch.attend({SUPERVISOR: context.supervisor.pid() if now == 195 else pid()})
        assert (watch._watched is None) == (now != 195)
        if watch.woken.is_set():
            times.append(now)
            watch.woken.clear()
    assert times == [0, 5, 15, 35, 75, 135, 200]


def test_with_supervisord_start_the_programs_of_all(context):
    """Whoever finds it gone, also one who is about a single partition: nobody would miss the others' programs before long."""
    node = SimpleNamespace(load=lambda: context.config, instance=context.config.instance_root)
    for index in (0, 1):
        assert instance_runs(node, index)
    found = context.supervisor.pid()
    os.kill(found, 9)
    until(lambda: not context.supervisor.pid())
    outcome = verbs.apply(context, ["slappart0"])
    assert (outcome["failures"], outcome["left"]) == ([], [])
    assert {"slappart0", "slappart1"} <= pids(context).keys()
    assert verbs.plan(context)["operations"] == []
