"""Our plug-in in a real supervisord: one group of many, what outlives it, what is ended, what it tells.

Without partitions: the programs are small ones of ``nobody``'s.
"""

import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from partitiond import files, procfs, services, supervision, survivors
from partitiond.context import Context
from partitiond.state import InstanceState
from partitiond.supervision import Group, Program, Supervisor

NOBODY = 65534
PATIENCE = 20.0


def until(condition, what="it"):
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.01)
    return found


class Node:
    """A supervisord of its own and what it is to run."""

    def __init__(self, base, keep=""):
        self.base = base
        base.write(partitiond={"keep_running": keep or None})
        self.supervisor = Supervisor(base.load())
        for path in (
            self.supervisor.groups_directory,
            self.supervisor.log.parent,
            self.supervisor.pidfile.parent,
            base.state,
        ):
            path.mkdir(parents=True, exist_ok=True)
        self.tenant = base.root / "tenant"
        self.tenant.mkdir(mode=0o755, exist_ok=True)
        os.chown(self.tenant, NOBODY, NOBODY)

    def keep(self, names):
        """Another configuration; what runs is not asked."""
        self.base.write(partitiond={"keep_running": names})
        self.supervisor = Supervisor(self.base.load())
        files.write_path(self.supervisor.configuration, self.supervisor.render().encode())

    def start(self):
        files.write_path(self.supervisor.configuration, self.supervisor.render().encode())
        self.supervisor.start()()

    def group(self, name, *commands, restart=True):
        logs = self.base.log / name
        logs.mkdir(parents=True, exist_ok=True)
        programs = tuple(
            Program(name=f"p{number}", process_name=f"p{number}", command=command, restart=restart)
            for number, command in enumerate(commands)
        )
        return Group(name, "nobody", NOBODY, NOBODY, self.tenant, logs, programs)

    def write(self, name, *commands, restart=True):
        return self.supervisor.write_group(self.group(name, *commands, restart=restart))

    def script(self, name, text):
        path = self.tenant / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    def log(self, name, program="p0"):
        return (self.base.log / name / f"{program}.log").read_text()

    def states(self):
        return {(one.group, one.name): one.state for one in self.supervisor.processes()}

    def pids(self):
        return {(one.group, one.name): one.pid for one in self.supervisor.processes()}

    def all_run(self):
        return until(lambda: set(self.states().values()) == {"RUNNING"} and self.pids(), "the start of all")

    def kill(self, number=signal.SIGKILL):
        pid = self.supervisor.pid()
        os.kill(pid, number)
        until(lambda: not procfs.is_alive(pid), "the end of supervisord")

    def has_plugin(self):
        self.supervisor.processes()
        return not self.supervisor.is_outdated()

    def running(self, *words):
        """Living processes that were started by this command line."""
        wanted = [word.encode() for word in words]
        return {pid for pid in procfs.pids() if procfs.words(pid, "cmdline")[:-1] == wanted}


@pytest.fixture
def made(node_config):
    """Make a node that is there until the test ends."""
    return lambda keep="": Node(node_config(5), keep)


def sleeps(seconds):
    return f"/bin/sleep {seconds}"


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 40])
def test_one_group_more_is_one_file_read_however_many_there_are(made, count):
    node = made()
    for number in range(count):
        node.write(f"g{number}", sleeps(1000), restart=False)
        # as on a node that is not just being set up: supervisord has read these files itself
        os.utime(node.supervisor.group_file(f"g{number}"), (1, 1))
    time.sleep(1.2)
    node.start()
    assert node.supervisor._ask("reload") == {"done": [], "waiting": [], "refused": {}, "read": 0}
    node.write("more", sleeps(1001), restart=False)
    assert node.supervisor._ask("reload") == {"done": ["more"], "waiting": [], "refused": {}, "read": 1}
    assert node.supervisor.update() == frozenset()
    node.supervisor.start_group("more")
    assert [name for name, pid in node.pids().items() if pid] == [("more", "p0")]
    # supervisord's own way to read its configuration finds the same
    assert node.supervisor._call("supervisor.reloadConfig") == [[[], [], []]]
    node.supervisor.remove_group("g1")
    assert node.supervisor.update() == frozenset()
    assert ("g1", "p0") not in node.states()
    assert node.supervisor._call("supervisor.reloadConfig") == [[[], [], []]]


def _made_strange(path, kind):
    if kind == "owner":
        os.chown(path, NOBODY, NOBODY)
    elif kind == "mode":
        path.chmod(0o666)
    elif kind == "second name":
        os.link(path, path.with_name("second"))
    else:
        path.rename(path.with_name("first"))
        path.symlink_to("first")


@pytest.mark.parametrize("kind", ["owner", "mode", "second name", "link"])
def test_what_somebody_else_may_have_written_is_never_run(made, kind):
    node = made()
    node.write("own", sleeps(1000))
    node.write("strange", sleeps(1001))
    path = node.supervisor.group_file("strange")
    _made_strange(path, kind)
    node.start()  # supervisord itself would read the file
    assert {name for name, _ in node.all_run()} == {"own"}
    assert not path.is_symlink()
    assert not path.exists()
    node.write("strange", sleeps(1001))
    assert node.supervisor.update() == {"strange"}
    node.all_run()
    path.with_name("second").unlink(missing_ok=True)
    _made_strange(path, kind)
    assert node.supervisor.strange_groups() == {"strange"}
    assert node.supervisor.group_text("strange") is None
    node.supervisor.update()
    assert {name for name, _ in node.states()} == {"own"}
    assert node.write("strange", sleeps(1001))
    assert node.supervisor.strange_groups() == set()


def test_only_what_changed_is_stopped_and_what_is_wrong_is_refused_alone(made):
    node = made()
    node.start()
    for name in ("same", "changes", "goes"):
        node.write(name, sleeps(1000))
    assert node.supervisor.update() == {"same", "changes", "goes"}
    before = node.all_run()
    node.write("changes", sleeps(1001))
    node.supervisor.remove_group("goes")
    node.supervisor.group_file("broken").write_text("[group:broken]\nprograms=none\n")
    node.supervisor.group_file("other").write_text("[program:another]\ncommand=/bin/true\n")
    answer = node.supervisor._ask("reload")
    assert answer["waiting"] == ["changes", "goes"]
    assert answer["refused"].keys() == {"broken", "other"}
    assert node.pids() == before, "what has to be stopped first was touched"
    assert node.supervisor.update() == {"changes"}
    after = node.all_run()
    assert after.keys() == {("same", "p0"), ("changes", "p0")}
    assert after["same", "p0"] == before["same", "p0"]
    assert not node.running("/bin/sleep", "1000") - {after["same", "p0"]}


def test_a_group_that_is_another_is_started_while_something_else_is_on_its_way(made):
    """Within the turn in which it comes, supervisord still has the one before it on its list."""
    node = made()
    node.start()
    node.write("never", node.script("never", "exit 1"))
    node.write("one", sleeps(1000))
    node.supervisor.update()
    until(lambda: node.pids()["one", "p0"])
    for number in range(3):
        node.write("one", sleeps(1001 + number))
        node.supervisor.update()
        until(lambda: node.pids()["one", "p0"], "its start")


def services_plan(node, *, carry_out=False):
    context = Context.of(node.base.load())
    try:
        planned = services.plan(
            context, SimpleNamespace(partitions=()), context.supervisor.processes(), frozenset()
        )
        for operation in planned if carry_out else ():
            services.apply(context, operation)
        return tuple(one for one in planned if one.group is None)
    finally:
        context.meters.close()


def test_a_supervisord_without_the_plug_in_is_replaced_when_it_runs_nothing(made):
    node = made()
    text = node.supervisor.render()
    own = text[text.index("[rpcinterface:partitiond]") : text.index("[supervisorctl]")]
    files.write_path(node.supervisor.configuration, text.replace(own, "").encode())
    node.supervisor.start()()
    files.write_path(node.supervisor.configuration, text.encode())
    (operation,) = services_plan(node, carry_out=True)
    assert operation.reason == "it is of another version, and runs nothing"
    assert node.has_plugin()
    assert services_plan(node) == ()


def test_a_supervisord_of_another_version_is_seen_and_replaced_when_it_runs_nothing(made, monkeypatch):
    node = made()
    node.start()
    node.write("one", sleeps(1000))
    node.supervisor.update()
    assert services.open_cases(node.supervisor, node.supervisor.processes()) == []
    monkeypatch.setattr(supervision, "PLUGIN_VERSION", supervision.PLUGIN_VERSION + 1)
    (case,) = services.open_cases(node.supervisor, node.supervisor.processes())
    assert case.startswith("supervisord is of another version")
    assert services_plan(node) == (), "it is not replaced while something runs"
    node.supervisor.stop_group("one")
    (operation,) = services_plan(node)
    assert operation.reason == "it is of another version, and runs nothing"


def test_a_supervisord_without_the_plug_in_is_used_as_it_is(made):
    """One of an older version of ours, which holds everything that runs, or of slapos.core."""
    node = made()
    text = node.supervisor.render()
    own = text[text.index("[rpcinterface:partitiond]") : text.index("[supervisorctl]")]
    files.write_path(node.supervisor.configuration, text.replace(own, "").encode())
    node.supervisor.start()()
    assert not node.has_plugin()
    node.write("one", sleeps(1000))
    assert node.supervisor.update() == {"one"}
    before = until(lambda: any(node.pids().values()) and node.pids())
    node.write("two", sleeps(1001), restart=False)
    assert node.supervisor.update() == {"two"}
    node.supervisor.start_group("two")
    assert node.pids()["two", "p0"]
    node.supervisor.stop_groups(["two", "nobody"])
    node.supervisor.remove_group("two")
    assert node.supervisor.update() == frozenset()
    assert node.pids() == before
    assert [one.id for one in services_plan(node)] == ["supervisord"], "its configuration only"
    files.write_path(node.supervisor.configuration, node.supervisor.render().encode())
    assert services_plan(node) == (), "it is not replaced while something runs"
    # what it leaves when it is killed is found by its environment
    node.kill()
    node.start()
    assert node.has_plugin()
    after = node.all_run()
    assert node.running("/bin/sleep", "1000") == set(after.values()) != set(before.values())


def test_a_stop_that_comes_right_after_the_start_is_not_lost(made):
    node = made()
    node.start()
    node.write("late", sleeps(1000), sleeps(1000), restart=False)
    node.supervisor.update()
    for _ in range(10):
        # in one request: both within the same turn of supervisord's, before the programs can have begun
        node.supervisor._call(
            "system.multicall",
            [
                {"methodName": "partitiond.start", "params": ["late"]},
                {"methodName": "partitiond.stop", "params": [["late"]]},
            ],
        )
        until(lambda: set(node.states().values()) == {"STOPPED"})
    log = node.supervisor.log.read_text()
    assert "SIGKILL" not in log
    assert not node.running("/bin/sleep", "1000")


def test_a_child_that_ends_is_seen_at_once_and_an_idle_supervisord_sleeps(made):
    node = made()
    node.start()
    node.write("ends", node.script("ends", "sleep 1.2"), restart=False)
    node.supervisor.update()
    node.supervisor.start_group("ends")
    # nobody asks meanwhile: that would wake it
    log = node.supervisor.log
    until(lambda: "exited: p0" in log.read_text())
    pid = node.supervisor.pid()

    def switches():
        text = Path(f"/proc/{pid}/status").read_text()
        return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    time.sleep(0.2)
    before = switches()
    time.sleep(2.5)
    assert switches() == before


def test_the_daemon_is_told_of_all_that_end_together_also_when_it_is_busy(made):
    """A queue of datagrams is short; and who does not listen holds up nobody."""
    node = made()
    node.start()
    for number in range(20):
        node.write(f"g{number}", sleeps(1000), sleeps(1000), restart=False)
    node.supervisor.update()
    for number in range(20):
        node.supervisor.start_group(f"g{number}")
    before = node.all_run()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(node.supervisor.directory / "events.sock"))
        listener.settimeout(PATIENCE)
        for pid in before.values():
            os.kill(pid, 9)
        until(lambda: set(node.states().values()) == {"EXITED"})
        told = [json.loads(listener.recv(4096)) for _ in before]
    assert {(one["group"], one["name"]): one["pid"] for one in told} == before
    assert {(one["state"], one["expected"]) for one in told} == {("EXITED", False)}
    # now nobody listens
    node.supervisor.start_group("g0")
    assert node.states()["g0", "p0"] == "RUNNING"


def test_programs_have_what_they_had(made):
    """No descriptor but three, the limits of supervisord at its start, no signal held back, a stdin without an end."""
    node = made()
    node.start()
    look = (
        "ls /proc/self/fd | tr '\\n' ' '; ulimit -n; grep -E '^(SigBlk|SigIgn)' /proc/self/status; env | sort; "
        "read line; echo never"
    )
    node.write("looks", node.script("looks", look))
    node.supervisor.update()
    node.all_run()
    said = until(lambda: "USER=" in node.log("looks") and node.log("looks"))
    assert said.startswith("0 1 2 3 "), "ls itself has the directory open"
    assert said.split("\n")[0].split()[4:] == [str(max(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))]
    assert "SigBlk:\t0000000000000000" in said
    assert "PYTHONPATH" not in said
    assert "never" not in said
    assert node.states() == {("looks", "p0"): "RUNNING"}


# --- outliving --------------------------------------------------------------------------------------------------------

TALKS = "n=0; while true; do n=$((n+1)); echo line $n; sleep 0.02; done"


def test_after_kill_9_kept_programs_run_on_and_all_others_begin_anew(made):
    node = made("slappart3")
    node.start()
    talk, fork = (
        node.script("talk", TALKS),
        node.script("fork", "sleep 1002 & setsid sleep 1003 & exec sleep 1004"),
    )
    node.write("slappart3", talk, fork)
    node.write("slappart3-tunnel", sleeps(1005))
    node.write("slappart1", fork, sleeps(1005))
    node.supervisor.update()
    before = node.all_run()
    kept = {name: pid for name, pid in before.items() if name[0].startswith("slappart3")}
    until(lambda: len(node.running("sleep", "1003")) == 2)
    own_forks = {number: node.running("sleep", number) for number in ("1002", "1003")}
    node.kill()
    assert all(map(procfs.is_alive, before.values()))
    node.start()
    after = node.all_run()
    assert {name: after[name] for name in kept} == kept
    assert not {after[name] for name in after.keys() - kept} & set(before.values())
    # nothing runs twice, and nothing of what was ended is left, wherever it had gone
    for number in ("1002", "1003"):
        left = until(lambda number=number: len(found := node.running("sleep", number)) == 2 and found)
        assert len(left & own_forks[number]) == 1
    assert len(node.running("sleep", "1004")) == 2
    assert node.running("/bin/sleep", "1005") == {after["slappart3-tunnel", "p0"], after["slappart1", "p1"]}
    # its log goes on, with each line once
    seen = node.log("slappart3").count("\n")
    until(lambda: node.log("slappart3").count("\n") > seen + 10)
    lines = node.log("slappart3").splitlines()
    assert lines == [f"line {number + 1}" for number in range(len(lines))]
    # who has its files read again has nothing to do
    assert node.supervisor.update() == frozenset()
    # a kept program that ends is started again, as any
    os.kill(kept["slappart3", "p0"], 9)
    until(lambda: node.pids()["slappart3", "p0"] not in (0, kept["slappart3", "p0"]))
    node.all_run()
    node.supervisor.stop_group("slappart3")
    assert node.states()["slappart3", "p1"] == "STOPPED"
    assert not procfs.is_alive(kept["slappart3", "p1"])
    node.supervisor.start_group("slappart3")
    node.all_run()
    for pid in node.running("sleep", "1003"):  # as ever, who leaves its process group outlives a stop
        os.kill(pid, 9)


def test_kept_programs_outlive_each_end_of_supervisord_but_ours(made):
    node = made()
    node.start()
    node.write("slappart2", node.script("talk", TALKS))
    node.write("slappart4", sleeps(1000))
    node.supervisor.update()
    before = node.all_run()
    node.keep("slappart2")  # said after it began
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        node.kill(number)
        assert procfs.is_alive(before["slappart2", "p0"])
        assert procfs.is_alive(before["slappart4", "p0"]) == (number == signal.SIGKILL)
        node.start()
        after = node.all_run()
        assert after["slappart2", "p0"] == before["slappart2", "p0"]
        before = after
    # begun anew in place: its child is still its own, and there is no other
    pid = node.supervisor.pid()
    os.kill(pid, signal.SIGHUP)
    until(lambda: node.pids().get(("slappart4", "p0"), 0) not in (0, before["slappart4", "p0"]))
    assert node.supervisor.pid() == pid
    assert node.all_run()["slappart2", "p0"] == before["slappart2", "p0"]
    os.kill(before["slappart2", "p0"], 9)
    until(lambda: node.pids()["slappart2", "p0"] not in (0, before["slappart2", "p0"]))
    lasts = node.all_run()["slappart2", "p0"]
    node.supervisor.shutdown()
    assert not procfs.is_alive(lasts)


def test_what_a_killed_one_left_is_ended_when_there_will_be_no_other(made):
    node = made("slappart2")
    node.start()
    node.write("slappart2", sleeps(1000))
    node.supervisor.update()
    before = node.all_run()
    node.kill()
    node.supervisor.shutdown()
    assert not any(map(procfs.is_alive, before.values()))


def test_a_program_that_writes_much_waits_for_the_next_supervisord_and_loses_nothing(made):
    node = made("slappart2")
    node.start()
    text = "read_go() { until [ -e go ]; do sleep 0.01; done; }; echo begun; read_go; seq 1 300000; echo ended; exec sleep 1000"
    node.write("slappart2", node.script("floods", text))
    node.supervisor.update()
    before = node.all_run()
    until(lambda: "begun" in node.log("slappart2"))
    node.kill()
    (node.tenant / "go").touch()
    time.sleep(0.5)  # it fills its pipe, of 1 MiB
    node.start()
    assert node.all_run() == before
    until(lambda: "ended" in node.log("slappart2"))
    assert node.log("slappart2").split() == ["begun", *map(str, range(1, 300001)), "ended"]


def test_one_that_hides_is_ended_all_the_same(made):
    """Without its environment, in a session of its own, its parent alive: it descends from one that is noted."""
    node = made()
    node.start()
    hides = "env -i /usr/bin/setsid /bin/sleep 1007 & exec env -i /bin/sleep 1006"
    node.write("slappart2", node.script("hides", hides))
    node.supervisor.update()
    node.all_run()
    until(lambda: node.running("/bin/sleep", "1007") and node.running("/bin/sleep", "1006"))
    node.kill()
    node.supervisor.remove_group("slappart2")
    node.start()
    assert node.pids() == {}
    assert not node.running("/bin/sleep", "1006") | node.running("/bin/sleep", "1007")


def test_numbers_that_are_others_by_now_are_left_alone(made):
    node = made("slappart2")
    node.start()
    node.write("slappart2", sleeps(1000))
    node.write("slappart3", sleeps(1000))
    node.supervisor.update()
    before = node.all_run()
    notes = node.supervisor.directory / "processes"
    node.kill()
    stranger = subprocess.Popen(["/bin/sleep", "1008"])
    try:
        for name in ("slappart2:p0", "slappart3:p0"):
            boot, _, start, pipe, _ = (notes / name).read_text().split()
            (notes / name).write_text(f"{boot} {stranger.pid} {int(start) - 1} {pipe}\n")
        (notes / "slappart2:gone").write_text("another-boot 1 1 1\n")
        (notes / "slappart2:torn").write_text("")
        node.start()
        after = node.all_run()
        assert procfs.is_alive(stranger.pid)
        assert not any(map(procfs.is_alive, before.values())), "not noted, but marked: ended"
        assert {path.name for path in notes.iterdir()} == {"slappart2:p0", "slappart3:p0", "supervisord"}
        assert stranger.pid not in after.values()
    finally:
        stranger.kill()
        stranger.wait()


def test_a_zombie_is_no_survivor(made):
    """Under a process 1 that does not reap, one that ended has its number and its start for ever."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        assert fields[0] == "Z"
        assert not survivors.Note("g", "p", child, int(fields[19]), 0, 0.0).lives
    finally:
        os.waitpid(child, 0)


def test_a_process_that_keeps_us_waiting_for_its_environment_is_left_to_itself(made, monkeypatch):
    """As one can whose memory is a file of a FUSE of its own: the others are ended all the same."""
    node = made()
    node.start()
    node.write(
        "slappart2", node.script("away", "(setsid sleep 1009 &); (setsid sleep 1010 &); exec sleep 1011")
    )
    node.supervisor.update()
    node.all_run()
    until(lambda: node.running("sleep", "1009") and node.running("sleep", "1010"))
    (silent,) = node.running("sleep", "1009")
    others = [subprocess.Popen(["/bin/sleep", "1012"], user=12345) for _ in range(20)]
    notes = node.supervisor.directory / "processes"
    node.kill()
    shutil.rmtree(notes)
    answered, words = threading.Event(), procfs.words
    waiting = {silent, *(one.pid for one in others)}
    monkeypatch.setattr(
        procfs,
        "words",
        lambda pid, name: (
            answered.wait() and [] if pid in waiting and name == "environ" else words(pid, name)
        ),
    )
    before, looks = threading.active_count(), []
    look = survivors._look
    monkeypatch.setattr(survivors, "_look", lambda *words: looks.append(words) or look(*words))
    try:
        survivors.end(survivors.read(notes), f"unix://{node.supervisor.socket}")
        assert procfs.is_alive(silent)
        assert not node.running("sleep", "1010") | node.running("sleep", "1011")
        assert len(looks) == 2, "each that waits is waited for"
        assert threading.active_count() - before <= 6
    finally:
        answered.set()
        os.kill(silent, 9)
        for one in others:
            one.kill()
            one.wait()


def test_a_supervisord_that_has_just_begun_is_not_killed_for_not_answering(made, monkeypatch):
    node = made()
    monkeypatch.setattr(supervision, "_REACHABLE_SECONDS", 0.0)
    monkeypatch.setattr(supervision, "_ANSWERS_WITHIN", 1.0)
    busy = [sys.executable, "-c", "import time; time.sleep(1000)", "supervisor.supervisord"]
    began = time.monotonic()
    with subprocess.Popen([*busy, str(node.supervisor.configuration)]) as other:
        reaped = threading.Thread(target=other.wait)
        reaped.start()
        until(lambda: node.supervisor._is_server(other.pid))
        assert not node.supervisor._wait_for_another()
        assert time.monotonic() - began > 0.9
        reaped.join()
        assert other.returncode == -9


def test_a_supervisord_that_goes_on_as_its_child_at_this_moment_is_seen(made, monkeypatch):
    """As each does once while it starts; overlooked, it would be started a second time, or left behind."""
    supervisor = made().supervisor
    source = "import os, sys, time; sys.stdin.read(1); os.fork() and os._exit(0); time.sleep(1000)"
    parent = subprocess.Popen(
        [sys.executable, "-c", source, "supervisor.supervisord", str(supervisor.configuration)],
        stdin=subprocess.PIPE,
    )
    until(lambda: supervisor._servers() == [parent.pid])
    listed = procfs.pids

    def between():
        found = listed()
        if parent.poll() is None:
            parent.communicate(b"x", timeout=20)
        return found

    monkeypatch.setattr(procfs, "pids", between)
    (child,) = supervisor._servers()
    assert child != parent.pid
    end = os.pidfd_open(child)
    os.kill(child, signal.SIGKILL)
    assert select.select([end], [], [], 20)[0]
    os.close(end)


def test_output_is_read_from_supervisords_own_pipe_only(tmp_path):
    """A tenant may put anything in its place."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDWR)
    ends = os.pipe()
    child = subprocess.Popen(["/bin/sleep", "1000"], stdout=held, stderr=ends[1])
    try:
        family, pipe = procfs.family_of(child.pid), os.fstat(ends[0]).st_ino

        def output_of(inode):
            return survivors.output_of(survivors.Note("g", "p", child.pid, family.start, inode, 0.0))

        assert output_of(fifo.stat().st_ino) is None
        assert output_of(pipe + 1) is None
        found = output_of(pipe)
        os.write(ends[1], b"line\n")
        assert os.read(found, 100) == b"line\n"
        os.close(found)
    finally:
        child.kill()
        child.wait()
        for descriptor in (held, *ends):
            os.close(descriptor)


def test_the_plan_sees_no_drift_in_what_was_taken_over(made):
    node = made("slappart2")
    node.start()
    node.write("slappart2", sleeps(1000))
    node.supervisor.update()
    node.all_run()
    node.kill()
    node.start()
    context = Context.of(node.base.load())
    try:
        context.store.save_instance(InstanceState(partition="slappart2", life="started", wanted="started"))
        found = context.supervisor.processes()
        assert [(one.group, one.state, one.started) for one in found] == [("slappart2", "RUNNING", True)]
        partitions = SimpleNamespace(partitions=(SimpleNamespace(id="slappart2"),))
        assert services.plan(context, partitions, found, frozenset({"slappart2"})) == ()
    finally:
        context.meters.close()


@pytest.mark.parametrize("restart", [True, False])
def test_a_kept_program_whose_configuration_changed_while_no_supervisord_ran_is_started_anew(
    made, restart, monkeypatch
):
    monkeypatch.setattr(services, "_A_WHILE", 0.1)
    node = made("slappart2 slappart3")
    node.start()
    for name in ("slappart2", "slappart3"):
        node.write(name, sleeps(1000), restart=restart)
        node.supervisor.update()
        node.supervisor.start_group(name)
    before = node.all_run()
    node.kill()
    node.write("slappart2", sleeps(1001), restart=restart)
    older = node.supervisor.directory / "processes" / "slappart3:p0"
    older.write_text(" ".join(older.read_text().split()[:4]))  # by a version that noted less
    node.start()
    assert node.pids() == before
    os.kill(before["slappart2", "p0"], signal.SIGSTOP)  # it takes longer to end than anybody waits
    context = Context.of(node.base.load())
    partitions = [SimpleNamespace(id=name) for name in ("slappart2", "slappart3")]

    def plan():
        found = context.supervisor.processes()
        groups = frozenset(("slappart2", "slappart3"))
        return services.plan(context, SimpleNamespace(partitions=partitions), found, groups)

    try:
        for one in partitions:
            context.store.save_instance(InstanceState(one.id, life="started", wanted="started"))
        (operation,) = plan()
        assert (operation.group, operation.action) == ("slappart2", "change")
        services.apply(context, replace(operation, owner=None))
        assert node.states()["slappart2", "p0"] == "STOPPING"
        os.kill(before["slappart2", "p0"], signal.SIGCONT)
        until(lambda: not procfs.is_alive(before["slappart2", "p0"]))
        until(lambda: node.states()["slappart2", "p0"] == "STOPPED")
        (operation,) = plan()
        services.apply(context, replace(operation, owner=None))
        after = node.all_run()
        until(lambda: node.running("/bin/sleep", "1001"))
        assert node.running("/bin/sleep", "1001") == {after["slappart2", "p0"]}
        assert node.running("/bin/sleep", "1000") == {before["slappart3", "p0"]}
        assert plan() == ()
        assert node.supervisor.update() == frozenset()
    finally:
        context.meters.close()


# --- hundreds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.full)])
def test_hundreds_of_groups_and_kill_9(made, count):
    node = made("slappart0 slappart1 slappart2")
    for number in range(count):
        node.write(f"slappart{number}", sleeps(2000), sleeps(2000))
    node.start()
    before = node.all_run()
    kept = {name: pid for name, pid in before.items() if name[0] in ("slappart0", "slappart1", "slappart2")}
    assert len(before) == 2 * count
    node.kill()
    node.start()
    after = node.all_run()
    assert node.running("/bin/sleep", "2000") == set(after.values())
    assert len(set(after.values())) == 2 * count
    assert {name: after[name] for name in kept} == kept
    assert not set(after.values()) & set(before.values()) - set(kept.values())
    node.supervisor.shutdown()
    assert not node.running("/bin/sleep", "2000")
