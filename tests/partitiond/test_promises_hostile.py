"""Promises that mean no good: they harm nobody but their own partition, and leave nothing behind."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from promise_scene import RELEASE, PromiseScene

from partitiond import promise_process, promises
from partitiond.errors import PartitiondError
from partitiond.promise_results import Ran, shown, take_line
from partitiond.promise_runner import MOST

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def standing(module_node_config):
    made = PromiseScene(module_node_config)
    yield made
    made.context.meters.close()


@pytest.fixture
def scene(standing):
    standing.clear()
    yield standing
    assert left(standing) == []


def left(scene):
    """What of the partitions' users still runs, a moment later."""
    uids = {item.uid for item in scene.node.partitions}
    deadline = time.monotonic() + 5
    while found := [pid for pid in pids() if user(pid) in uids]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found]


def pids():
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def user(pid):
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return None if "\nState:\tZ" in text else int(text.partition("\nUid:")[2].split()[0])


# --- what it starts ---------------------------------------------------------------------------------------------------

_DAEMON = "(setsid sh -c 'setsid sleep 1000 & sleep 1000 & exec sleep 1000' </dev/null >/dev/null 2>&1 &) "


def test_what_leaves_its_session_is_ended_all_the_same(scene):
    scene.promise("daemon", f"{_DAEMON}; echo started")
    scene.plugin("daemon2.py", f"import os; os.system({_DAEMON!r})")
    assert scene.check() == {}


def test_what_holds_the_output_open_is_not_waited_for(scene):
    scene.promise("daemon", "sleep 1000 & echo started")
    began = time.monotonic()
    assert scene.check() == {}
    assert time.monotonic() - began < 1000
    assert scene.result("daemon")["result"]["message"] == "started"


def test_what_hangs_and_does_not_heed_a_signal_is_ended(scene):
    scene.patience(1)
    scene.promise("hangs", "trap '' TERM; while :; do sleep 1000; done")
    scene.plugin("hangs2.py", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(1000)")
    message = "Error: Promise timed out after 1 seconds"
    assert scene.check() == {"hangs": message, "hangs2.py": message}
    assert scene.result("hangs")["result"]["message"] == message


def test_one_slow_moment_is_no_anomaly_but_two_are(scene):
    scene.patience(1)
    scene.promise("hangs", "sleep 1000")
    scene.run_pass()
    assert (scene.standings(), scene.result("hangs")["result"]["failed"]) == ({"promise/hangs": False}, False)
    scene.run_pass()
    assert scene.standings() == {"promise/hangs": True}
    assert scene.result("hangs")["result"]["type"] == "Anomaly Result"


def test_one_that_kills_all_of_its_user_fails_the_run_and_nobody_else(scene):
    scene.promise("kills", f"{_DAEMON}; kill -KILL -1")
    scene.promise("good", "echo fine", number=1)
    failed = scene.check()
    assert "ended from outside" in failed["(all)"]
    assert scene.check(1) == {}
    scene.run_pass()
    scene.run_pass()
    assert scene.standings(1) == {"promise/good": False}


def test_one_that_stops_all_of_its_user_is_ended_when_its_time_is_over(scene, monkeypatch):
    scene.patience(1)
    monkeypatch.setattr(promise_process, "_OVERTIME", 0.0)
    monkeypatch.setattr(promises, "_AT_PROCESSING", 1)
    scene.promise("stops", "kill -STOP $PPID; sleep 1000")
    assert "its time was over" in scene.check()["(all)"]


def test_a_fork_bomb_is_swept_up(scene):
    bomb = (
        "import os, time\nfor _ in range(6):\n os.fork()\nos.setsid() if os.getpid() else 0\ntime.sleep(1000)"
    )
    scene.promise("bomb", f"{sys.executable} -I -S -c '{bomb}' & exit 0")
    assert scene.check() == {}


def test_a_user_has_no_hold_on_what_runs_its_promises(scene):
    scene.promise(
        "looks",
        "for what in fd mem environ; do cat /proc/$PPID/$what/* /proc/$PPID/$what; done; grep Cap /proc/self/status; exit 1",
    )
    lines = scene.check()["looks"].splitlines()
    assert sum("ermission denied" in line or "No such file" in line for line in lines) >= 3
    capabilities = {line.split()[0]: int(line.split()[1], 16) for line in lines if line.startswith("Cap")}
    assert capabilities["CapEff:"] == capabilities["CapPrm:"] == capabilities["CapAmb:"] == 0


def test_what_runs_it_leaves_no_descriptor_to_it(scene):
    scene.promise("open", "ls /proc/self/fd; exit 1")
    # 3 is the directory that it lists
    assert scene.check()["open"].split() == ["0", "1", "2", "3"]


# --- what it says -----------------------------------------------------------------------------------------------------


def test_one_that_prints_for_ever_is_heard_to_its_end_only(scene):
    scene.patience(1)
    scene.promise(
        "prints", "yes 0123456789012345678901234567890123456789 | head -c 100000000; echo end; exit 1"
    )
    scene.promise("for-ever", "exec yes")
    failed = scene.check()
    assert failed["for-ever"] == "Error: Promise timed out after 1 seconds"
    # a busy machine may not get to the end of it in a second
    assert failed["prints"].endswith("end") or "timed out" in failed["prints"]
    assert len(failed["prints"]) <= 2000


def test_a_plugin_that_writes_where_its_result_belongs_has_none(scene):
    scene.plugin(
        "garbage.py",
        """
        import os
        for number in range(3, 64):
            try:
                os.write(number, b'{"kind": "promise", "name": "good", "failed": true}\\n{' * 10)
            except OSError:
                pass
        """,
    )
    scene.promise("good", "echo fine")
    assert "No output returned by the promise" in scene.check()["garbage.py"]
    assert scene.standings() == {"promise/good": False, "plugin/garbage.py": True}


def test_strange_names_are_shown_as_letters(scene):
    for name in ("new\nline", "\x1b[31mred", "ü", "-rf", os.fsdecode(b"\xff\xfe")):
        scene.promise(name, "exit 1")
    failed = scene.check()
    assert failed.keys() == {"new\\nline", "\\x1b[31mred", "ü", "-rf", "\\udcff\\udcfe"}
    assert scene.page().standings.keys() >= {"promise/new\nline"}
    again = type(scene.context.promises)(scene.context.config.state_dir / "promises")
    assert again.known("slappart0").failing().keys() == failed.keys()


def test_thousands_are_too_many(scene):
    for number in range(MOST + 2000):
        scene.promise(f"p{number:05}", "", mode=0o755)
    directory = scene.partition().path / "etc" / "promise"
    for path in directory.iterdir():
        path.unlink()
        path.symlink_to("/bin/true")
    failed = scene.check()
    assert failed == {"(all)": f"it has {MOST + 2000} promises; {MOST} are run"}
    assert len(scene.standings()) == MOST + 1


# --- its files --------------------------------------------------------------------------------------------------------


def test_links_and_pipes_in_place_of_results_hold_up_nobody_and_lead_nowhere(scene, tmp_path):
    item = scene.partition()
    secret = scene.node.config.state_dir / "secret"
    secret.write_text("of root's")
    for below in ("result", "log", "cache"):
        place = scene.place(0, ".slapgrid", "promise", below)
        for name in ("a.status.json", "b.log", "c"):
            (place / name).symlink_to(secret)
        for name in ("d.status.json", "d.status.json.tmp", "d.log", "d", "d.tmp"):
            os.mkfifo(place / name)
            os.chown(place / name, item.uid, item.gid)
        (place / "e.status.json.tmp").mkdir()
    for name in "abcd":
        scene.promise(name, "echo no; exit 1")
    scene.promise("e", "echo no; exit 1")
    assert scene.check() == dict.fromkeys("abcde", "no")
    scene.run_pass()
    assert secret.read_text() == "of root's"
    result = item.path / ".slapgrid/promise/result/a.status.json"
    assert stat.S_ISREG(result.lstat().st_mode)
    assert result.stat().st_uid == item.uid
    secret.unlink()


@pytest.mark.parametrize("place", [".slapgrid", "etc", "etc/promise"])
def test_a_directory_that_is_a_link_is_followed_by_its_user_at_most(scene, place):
    """Into the directory of somebody else, of which root could read the promises and into which it could write results."""
    other = scene.partition(1)
    scene.promise("theirs", "echo theirs; exit 1", number=1)
    scene.promise("own", "echo own; exit 1")
    path = scene.partition().path / place
    if path.is_dir():
        path.rename(path.with_name("moved"))
    path.symlink_to(other.path / place)
    failed = scene.check()
    assert failed == ({"own": "own"} if place == ".slapgrid" else {})
    assert not (other.path / ".slapgrid").exists()
    path.unlink()


# --- others have their turn -------------------------------------------------------------------------------------------


def test_those_that_hang_hold_up_nobody(scene):
    scene.patience(1)
    for number in range(8):
        scene.promise(f"hangs{number}", "sleep 1000", number=0)
    scene.promise("good", "echo fine", number=1)
    scene.promise("good", "echo fine", number=2)
    scene.run_pass()
    assert scene.page(0).slow
    for number in (1, 2):
        scene.page(number).slow = False  # on a busy machine they, too, may have been
    left_out = 8 - len(scene.page(0).standings)
    assert left_out > 0  # there was no time for all: two rounds of three
    scene.run_pass()
    # from now on they are begun after all others have ended
    assert max(scene.page(1).ran_at, scene.page(2).ran_at) < scene.page(0).ran_at - 1
    assert len(scene.page(0).standings) == 8  # those that had no turn came first


def test_at_processing_a_partition_has_so_much_time_and_no_more(scene, monkeypatch):
    scene.patience(1)
    monkeypatch.setattr(promises, "_AT_PROCESSING", 1)
    for number in range(8):
        scene.promise(f"hangs{number}", "sleep 1000")
    failed = scene.check()
    assert failed["(all)"].startswith("no time was left for ")


# --- ends of all kinds ------------------------------------------------------------------------------------------------


def test_when_the_daemon_stops_so_do_they(scene):
    scene.promise("hangs", "touch began; sleep 1000")
    timer = threading.Thread(target=_stop_when, args=(scene, scene.partition().path / "began"))
    timer.start()
    try:
        with pytest.raises(PartitiondError) as caught:
            scene.check()
        assert caught.value.code == "promises.stopped"
    finally:
        timer.join()
        scene.context.stop.clear()
    assert scene.standings() == {}


def _stop_when(scene, path):
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    scene.context.stop.set()


_CHECK = """
import sys
from partitiond import config, converge, promises
from partitiond.context import Context
context = Context.of(config.load(__import__("pathlib").Path(sys.argv[1])))
promises.check(context, converge.observe(context).node.partitions[0], sys.argv[2])
"""


@pytest.mark.parametrize("who", ["daemon", "server"])
def test_when_it_is_killed_so_are_they(scene, who):
    scene.promise("hangs", f"{_DAEMON}; touch began; trap '' TERM; sleep 1000; sleep 1000")
    program = subprocess.Popen(
        [sys.executable, "-P", "-c", _CHECK, scene.context.config.file, RELEASE],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while not (scene.partition().path / "began").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (server,) = [pid for pid in pids() if _parent(pid) == program.pid]
        os.kill(program.pid if who == "daemon" else server, signal.SIGKILL)
        program.wait(30)
    finally:
        program.kill()
        program.wait()
    if who == "server":
        _end_orphans(scene)  # what had left its session has nobody above it any more who would know


def _end_orphans(scene):
    from partitiond import execute

    execute.end_processes_of(scene.partition().uid, scene.partition().gid)


def _parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


# --- root reads what it is told ---------------------------------------------------------------------------------------

_GOOD = (
    b'{"kind": "promise", "name": "a", "type": "test", "failed": true, "message": "m", "seconds": 0.5, "row": 1,'
    b' "periodicity": 2.0, "tested": true, "sensed": true, "bang": false}'
)


def test_a_line_is_taken_in_whole_or_not_at_all():
    ran = Ran()
    take_line(ran, _GOOD)
    assert ran.results["promise/a"].periodicity == 120.0
    bad = [
        b"",
        b"[]",
        b"nonsense",
        b"{}",
        b"[" * 100_000,
        _GOOD.replace(b"promise", b"other"),
        _GOOD.replace(b'"a"', b'"../a"'),
        _GOOD.replace(b'"a"', b'""'),
        _GOOD.replace(b'"a"', b'"' + b"a" * 256 + b'"'),
        _GOOD.replace(b"true", b"1"),
        _GOOD.replace(b"0.5", b"NaN"),
        _GOOD.replace(b"0.5", b"-1"),
        _GOOD.replace(b"0.5", b"1e999"),
        _GOOD.replace(b"0.5", b"true"),
        _GOOD.replace(b'"row": 1', b'"row": 99999999'),
        _GOOD.replace(b'"m"', b'"' + b"m" * 3000 + b'"'),
        _GOOD.replace(b'"m"', b"null"),
        _GOOD.replace(b'"test"', b'"Test Result"'),
        b'{"done": true}',
        b'{"done": true, "left": -1, "more": 0}',
    ]
    for line in bad:
        with pytest.raises((ValueError, RecursionError)):
            take_line(Ran(), line)


def test_periodicities_are_kept_within_reason():
    for text, seconds in ((b"0", 3.0), (b"1e300", 366 * 86400.0)):
        ran = Ran()
        take_line(ran, _GOOD.replace(b"2.0", text))
        assert ran.results["promise/a"].periodicity == seconds


def test_names_are_shown_without_what_steers_a_terminal():
    assert shown("promise/\x1b]0;x\x07") == "\\x1b]0;x\\x07"
