"""Programs run as another user: nothing of ours reaches them, and nothing of theirs stays."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from partitiond import execute, procfs
from partitiond.errors import PartitiondError

PATIENCE = 20.0


@pytest.fixture
def user(tmp_path_factory):
    """A user with a supplementary group, and a directory of its own that it can reach."""
    kept = {name: Path("/etc", name).read_bytes() for name in ("passwd", "group")}
    home = Path("/srv/runner")
    home.mkdir()
    os.chown(home, 4242, 4242)
    with open("/etc/passwd", "a") as file:
        file.write("runner:x:4242:4242::/srv/runner:/bin/sh\n")
    with open("/etc/group", "a") as file:
        file.write("runner:x:4242:\nhelpers:x:4343:runner\n")
    yield home
    execute.end_processes_of(4242, 4242)
    subprocess.run(["/bin/rm", "-rf", str(home)], check=True)
    for name, content in kept.items():
        Path("/etc", name).write_bytes(content)


@pytest.fixture
def run(user, tmp_path):
    """Run a shell script as that user; gives the outcome and its output."""

    def start(script, *, timeout=None, stop=None, command=None):
        with (tmp_path / "log").open("wb") as log:
            outcome = execute.as_user(
                "runner",
                "runner",
                command or ["/bin/bash", "-c", script],
                cwd=user,
                env=execute.environment(str(user), "runner"),
                log=log.fileno(),
                stop=stop or threading.Event(),
                timeout=timeout,
            )
        return outcome, (tmp_path / "log").read_text()

    return start


def members(uid=4242):
    """Commands of the living processes of a user."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - names suffice
        try:
            status = Path("/proc", name, "status").read_text()
            command = Path("/proc", name, "cmdline").read_bytes()
        except OSError:
            continue
        if f"\nUid:\t{uid}\t" in status and "\nState:\tZ" not in status:
            found.append(command.replace(b"\0", b" ").decode().strip())
    return found


def until(condition):
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


def test_user_groups_environment_and_rights(run, monkeypatch):
    monkeypatch.setenv("SECRET", "of the daemon")
    outcome, said = run(
        "id -u; id -g; id -G; pwd; umask; env | sort; grep -E 'NoNewPrivs|CapEff' /proc/self/status"
    )
    assert outcome.ok
    lines = said.splitlines()
    assert lines[:5] == ["4242", "4242", "4242 4343", "/srv/runner", "0027"]
    assert "SECRET" not in said
    assert "HOME=/srv/runner" in lines
    assert "NoNewPrivs:\t1" in lines
    assert "CapEff:\t0000000000000000" in lines


def test_no_descriptor_of_ours_is_inherited(run, tmp_path):
    with (tmp_path / "held").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        _, said = run("ls -l /proc/$$/fd")
    assert str(tmp_path / "held") not in said


def test_status_and_signal(run):
    assert run("exit 7")[0] == execute.Outcome(7)
    assert run("kill -SEGV $$")[0] == execute.Outcome(-signal.SIGSEGV)


def test_what_cannot_be_run(user, tmp_path, run):
    outcome, said = run("", command=["/nonexistent/program"])
    assert not outcome.ok
    assert "/nonexistent/program" in said
    with pytest.raises(PartitiondError) as caught:
        execute.as_user(
            "runner", "runner", ["/bin/true"], cwd=tmp_path / "no", env={}, log=1, stop=threading.Event()
        )
    assert caught.value.code == "execute.failed"


def test_a_timeout_ends_the_whole_session(run):
    """Also what has a process group of its own, as jobs of a shell with job control have."""
    outcome, _ = run("set -m; sleep 1000 & (sleep 1001 & sleep 1002) & sleep 1003", timeout=0.3)
    assert outcome.cut_short == "took too long"
    assert not outcome.ok
    assert members() == []


def test_stop_ends_it(run):
    stop = threading.Event()
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    outcome, _ = run("sleep 1000", stop=stop)
    timer.join()
    assert outcome.cut_short == "the daemon is stopping"
    assert members() == []


def test_what_a_program_leaves_behind_in_its_session_ends_with_it(run):
    outcome, _ = run("sleep 1000 & exit 0")
    assert outcome.ok
    assert members() == []


def test_who_ignores_the_polite_signal_is_killed(run, monkeypatch):
    monkeypatch.setattr(execute, "_GRACE", 0.2)
    outcome, _ = run("trap '' TERM; while :; do sleep 0.1; done", timeout=0.3)
    assert outcome.cut_short
    assert members() == []


def test_it_dies_with_us(user, tmp_path):
    """The kernel ends the program when the process that started it is killed."""
    code = f"""
        import sys, threading
        from pathlib import Path
        sys.path.insert(0, {str(Path(execute.__file__).parent.parent)!r})
        from partitiond import execute, procfs
        execute.as_user("runner", "runner", ["/bin/sleep", "1000"], cwd=Path({str(user)!r}),
                        env=execute.environment({str(user)!r}, "runner"), log=1, stop=threading.Event())
    """
    daemon = subprocess.Popen([sys.executable, "-I", "-c", textwrap.dedent(code)])
    try:
        until(lambda: members() == ["/bin/sleep 1000"])
    finally:
        daemon.kill()
        daemon.wait()
    until(lambda: members() == [])


BOMB = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.setsid()
# every process is replaced by two until fifty live, then each by one, for ever: a scan of /proc never sees them all
end = time.monotonic() + 30
while time.monotonic() < end:
    try:
        child = os.fork()
    except OSError:
        time.sleep(0.001)
        continue
    if child and len(os.listdir("/proc")) > 120:
        os._exit(0)
"""


# a child's child for each byte
HOPS = """
import os
while os.read(0, 1):
    if os.fork():
        os._exit(0)
"""


def test_all_processes_of_a_user_end_even_while_they_fork(user):
    import resource

    def limited():
        resource.setrlimit(resource.RLIMIT_NPROC, (50, 50))
        os.setgid(4242)
        os.setuid(4242)

    bomb = subprocess.Popen([sys.executable, "-I", "-c", BOMB], preexec_fn=limited)  # noqa: PLW1509 - no threads here
    try:
        until(lambda: len(members()) > 20)
        execute.end_processes_of(4242, 4242)
        assert members() == []
    finally:
        execute.end_processes_of(4242, 4242)
        bomb.wait()


def test_a_process_that_is_another_one_at_each_look_ends(user, monkeypatch):
    """It forks and ends, right when all processes were listed: nobody who looks at those finds it."""
    command = ["/usr/bin/setpriv", "--reuid=4242", "--regid=4242", "--clear-groups"]
    hopping = subprocess.Popen([*command, sys.executable, "-I", "-S", "-c", HOPS], stdin=subprocess.PIPE)
    listed = procfs.pids

    def owned():
        return [pid for pid in listed() if procfs.user_of(pid) == 4242]

    def between():
        found, before = listed(), owned()
        if before:
            os.write(hopping.stdin.fileno(), b"x")
            until(lambda: (now := owned()) and not set(now) & set(before))
        return found

    until(owned)
    monkeypatch.setattr(procfs, "pids", between)
    execute.end_processes_of(4242, 4242)
    monkeypatch.undo()
    assert members() == []
    hopping.communicate()


def test_a_process_amid_its_execve_is_waited_for_and_no_other_without_arguments(monkeypatch):
    """Until the kernel has laid out the arguments of its program it seems to have none."""
    said = [[b""], [b""], [b"sleep", b"1000", b""]]
    with subprocess.Popen(["/bin/sleep", "1000"]) as sleeper:
        until(lambda: b"1000" in procfs.words(sleeper.pid, "cmdline"))
        monkeypatch.setattr(procfs, "words", lambda *_: said.pop(0))
        assert procfs.command(sleeper.pid) == [b"sleep", b"1000", b""]
        monkeypatch.undo()
        sleeper.kill()
        until(lambda: not procfs.is_alive(sleeper.pid))
        began = time.monotonic()
        assert procfs.command(sleeper.pid) == [b""], "a zombie"
        assert time.monotonic() - began < 0.9


def test_processes_of_others_are_let_alone_and_roots_never_touched(user):
    other = subprocess.Popen(["/usr/bin/setpriv", "--reuid", "4243", "--clear-groups", "sleep", "1000"])
    try:
        execute.end_processes_of(4242, 4242)
        assert other.poll() is None
        with pytest.raises(PartitiondError) as caught:
            execute.end_processes_of(0, 0)
        assert caught.value.code == "execute.root"
    finally:
        other.kill()
        other.wait()


def test_program_that_makes_us_its_debugger_leaves_nothing(user, run):
    code = "import ctypes, os; ctypes.CDLL(None).ptrace(0, 0, None, None); os.kill(os.getpid(), 19)"  # PTRACE_TRACEME
    outcome, _ = run("", command=["/usr/bin/python3", "-I", "-c", code], timeout=0.5)
    assert outcome.cut_short == "took too long"
    states = [path.read_text() for path in Path("/proc").glob("[0-9]*/status")]
    assert not [text for text in states if f"\nPPid:\t{os.getpid()}\n" in text and "\nUid:\t4242" in text]
