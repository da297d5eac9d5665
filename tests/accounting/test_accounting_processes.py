"""Real processes, charged to their partitions."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from accounting_disks import mounted
from accounting_world import a_pass

from accounting import AccountingError, GaugeReading, Ledger, ProcessMeter

UID = 54_321  # nobody's
USERS = {UID: "slappart0", UID + 1: "slappart1"}
BURN = "import time\nwhile time.process_time() < {}: pass\nprint('done', flush=True)\ntime.sleep(100)"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run processes as other users")


@pytest.fixture
def run():
    """Start programs as a user; whatever is left of them is killed afterwards."""
    children = []

    def start(*words, uid=UID, **options):
        child = subprocess.Popen(words, user=uid, stdout=subprocess.PIPE, **options)
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def burn(run, seconds, **options):
    child = run("/usr/bin/python3", "-c", BURN.format(seconds), **options)
    assert child.stdout.readline() == b"done\n"
    return child


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@needs_root
def test_time_and_memory_are_those_of_the_users_processes(run):
    children = [burn(run, 0.3), burn(run, 0.1)]
    other = burn(run, 0.05, uid=UID + 1)
    scan = ProcessMeter().scan(USERS)
    assert {p.pid for p in scan.processes} == {child.pid for child in [*children, other]}
    assert scan.counts == {"slappart0": 2, "slappart1": 1}
    for reading in scan.processes:
        truth = psutil.Process(reading.pid).cpu_times()
        assert reading.cpu_microseconds / 1e6 == pytest.approx(truth.user + truth.system, abs=0.03)
    truth = sum(psutil.Process(child.pid).memory_info().rss for child in children)
    assert scan.memory_bytes["slappart0"] == pytest.approx(truth, rel=0.05)
    assert GaugeReading("slappart0", "memory_bytes", scan.memory_bytes["slappart0"]) in scan.gauges()


def test_a_partition_without_processes_uses_no_memory():
    scan = ProcessMeter().scan({UID + 7: "slappart7"})
    assert (scan.processes, scan.memory_bytes, scan.counts) == ((), {"slappart7": 0}, {"slappart7": 0})


def test_ones_own_process_is_found():
    (mine,) = [p for p in ProcessMeter().scan({os.getuid(): "mine"}).processes if p.pid == os.getpid()]
    assert mine.cpu_microseconds > 0
    assert mine.started > 0


@needs_root
def test_a_name_can_not_forge_the_figures(run):
    """The kernel writes the name between parentheses, unescaped, before the figures."""
    text = "open('/proc/self/comm', 'w').write('a) R 1 1 (b')\nprint('done', flush=True)\ninput()"
    child = run("/usr/bin/python3", "-c", text, stdin=subprocess.PIPE)
    child.stdout.readline()
    assert psutil.Process(child.pid).name() == "a) R 1 1 (b"
    (reading,) = ProcessMeter().scan(USERS).processes
    assert (reading.pid, reading.cpu_microseconds < 10**6) == (child.pid, True)


@needs_root
def test_a_setuid_program_is_paid_by_who_started_it(run):
    text = f"import os, time\nos.setresuid({UID}, 0, 0)\nprint('done', flush=True)\ntime.sleep(100)"
    child = run("/usr/bin/python3", "-c", text, uid=0)
    child.stdout.readline()
    assert [p.pid for p in ProcessMeter().scan(USERS).processes] == [child.pid]


@needs_root
@pytest.mark.parametrize("dumpable", [False, True])
def test_who_may_be_looked_into_does_not_tell_who_pays(run, dumpable):
    """A program with file capabilities, or one that says so, is not dumpable: root owns its files in /proc."""
    text = f"import ctypes\nassert ctypes.CDLL(None).prctl(4, {int(dumpable)}, 0, 0, 0) == 0\n"
    child = run("/usr/bin/python3", "-c", text + "print('done', flush=True)\ninput()", stdin=subprocess.PIPE)
    child.stdout.readline()
    assert Path(f"/proc/{child.pid}/stat").stat().st_uid == (UID if dumpable else 0)
    assert [p.pid for p in ProcessMeter().scan(USERS).processes] == [child.pid]


@needs_root
def test_every_process_is_charged_as_psutil_would():
    """Whatever runs on this machine, of the users that there are."""
    before = {p.pid: p.info["uids"].real for p in psutil.process_iter(["uids"])}
    found = {
        p.pid: p.partition for p in ProcessMeter().scan({uid: str(uid) for uid in before.values()}).processes
    }
    after = {p.pid: p.info["uids"].real for p in psutil.process_iter(["uids"])}
    steady = {pid: str(uid) for pid, uid in before.items() if after.get(pid) == uid}
    assert len(steady) > 1
    assert {pid: found.get(pid) for pid in steady} == steady


@needs_root
def test_a_zombie_keeps_its_time_and_is_no_process_any_more(run):
    child = burn(run, 0.1)
    child.send_signal(signal.SIGKILL)
    wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    scan = ProcessMeter().scan(USERS)
    assert scan.processes[0].cpu_microseconds >= 90_000
    assert (scan.counts["slappart0"], scan.memory_bytes["slappart0"]) == (0, 0)


@needs_root
def test_processes_that_come_and_go_during_the_scan_break_nothing(run):
    run("/bin/sh", "-c", "while :; do /bin/true; done")
    meter = ProcessMeter()
    scans = [meter.scan(USERS) for _ in range(100)]
    assert set().union(*(scan.unreadable for scan in scans)) == set()
    assert all(scan.processes for scan in scans)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A directory on a disk, which the user may write; tmpfs would count nothing."""
    with mounted("ext4", tmp_path_factory.mktemp("io")) as top:
        os.chown(top, UID, UID)
        yield top


@needs_root
def test_what_a_process_writes_and_reads_counts_beside_psutil(run, disk):
    text = (
        "import os\nf = open('x', 'wb', 0)\nf.write(bytes(3 << 20))\nos.fsync(f)\n"
        "os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "assert len(open('x', 'rb').read()) == 3 << 20\nprint('done', flush=True)\ninput()"
    )
    child = run("/usr/bin/python3", "-c", text, stdin=subprocess.PIPE, cwd=disk)
    child.stdout.readline()
    (reading,) = ProcessMeter().scan(USERS).processes
    truth = psutil.Process(child.pid).io_counters()
    assert (reading.io_read_bytes, reading.io_write_bytes) == (truth.read_bytes, truth.write_bytes)
    assert 3 << 20 <= reading.io_write_bytes < 4 << 20  # and a little of metadata
    assert reading.io_read_bytes >= 3 << 20
    assert reading.parent == os.getpid()


@needs_root
def test_what_an_idle_process_has_written_is_read_now_and_then_and_that_of_a_busy_one_always(run, disk):
    text = (
        "import os, time\nf = os.open('idle', os.O_WRONLY | os.O_CREAT)\ndata = bytes(4096)\n"
        "print('done', flush=True)\n"
        "while how := os.read(0, 1):\n os.write(f, data)\n end = time.process_time() + 0.03 * (how == b'b')\n"
        " while time.process_time() < end: pass\n print('done', flush=True)\n"
    )
    child = run("/usr/bin/python3", "-c", text, stdin=subprocess.PIPE, bufsize=0, cwd=disk)
    assert child.stdout.readline() == b"done\n"
    meter = ProcessMeter()

    def written(how=b""):
        if how:
            child.stdin.write(how)
            assert child.stdout.readline() == b"done\n"
        return meter.scan(USERS).processes[0].io_write_bytes

    def truth():
        return psutil.Process(child.pid).io_counters().write_bytes

    assert written() == truth() == 0
    assert written(b"b") == truth() > 0
    assert written(b"b") == truth()
    late = [written(b"i" if number == 0 else b"") for number in range(7)]
    assert late[-1] == truth()
    assert late == sorted(late)
    assert len(set(late)) <= 2


@needs_root
def test_what_children_write_counts_once_whether_a_pass_saw_them_or_not(run, disk, tmp_path):
    """The kernel adds a child's bytes to the parent that waits for it."""
    text = (
        "import os\n"
        "def write(name):\n open(name, 'wb').write(bytes(2 << 20))\n print('done', flush=True)\n"
        "def child(name):\n pid = os.fork()\n"
        " if not pid:\n  write(name)\n  os.read(0, 1)\n  os._exit(0)\n return pid\n"
        "print('done', flush=True)\n"
        "os.read(0, 1)\nseen = child('seen')\nos.waitpid(seen, 0)\nprint('done', flush=True)\n"
        "os.read(0, 1)\nunseen = child('unseen')\nos.waitpid(unseen, 0)\nprint('done', flush=True)\n"
        "os.read(0, 1)"
    )
    parent = run("/usr/bin/python3", "-c", text, stdin=subprocess.PIPE, bufsize=0, cwd=disk)

    def go_on(times=1):
        for _ in range(times):
            parent.stdin.write(b"x")
            assert parent.stdout.readline() == b"done\n"

    with Ledger(tmp_path / "ledger.sqlite") as ledger:

        def written(at):
            scan = ProcessMeter().scan(USERS)
            ledger.record(a_pass(at, *scan.gauges(), processes=scan.processes))
            (entry,) = (one for one in ledger.usage(None, None).partitions if one.id == "slappart0")
            own = [one.io_write_bytes >> 20 for one in scan.processes if one.pid == parent.pid]
            return entry.io_write_bytes >> 20, own, entry.processes

        assert parent.stdout.readline() == b"done\n"
        assert written(1) == (0, [0], 1)
        go_on()
        assert written(2) == (2, [0], 2)
        go_on()
        assert written(3) == (2, [2], 1)
        go_on(2)
        assert written(4) == (4, [4], 1)


@needs_root
def test_the_ledger_adds_up_across_restarts_of_the_daemon(run, tmp_path):
    child = burn(run, 0.2)
    path = tmp_path / "ledger.sqlite"
    for at in range(4):
        with Ledger(path) as ledger:
            ledger.record(a_pass(at, processes=ProcessMeter().scan(USERS).processes))
    child.kill()
    child.wait()
    second = burn(run, 0.1)
    with Ledger(path) as ledger:
        ledger.record(a_pass(5, processes=ProcessMeter().scan(USERS).processes))
        used = ledger.usage(None, None).partitions[0].cpu_seconds
    assert used == pytest.approx(0.3 + psutil.Process(second.pid).cpu_times().system, abs=0.15)
    assert used < 0.5


def test_half_a_procfs_is_counted_as_unreadable_and_none_is_an_error(tmp_path):
    with pytest.raises(AccountingError) as caught:
        ProcessMeter(tmp_path)
    assert caught.value.code == "accounting.reading"
    boot = tmp_path / "sys/kernel/random"
    boot.mkdir(parents=True)
    (boot / "boot_id").write_text("b1\n")
    for pid, status, stat in (
        ("1", f"Name:\tx\nUid:\t{UID}\t0\t0\t0\n", "1 (x) S 0"),
        ("2", "nothing to see\n", ""),
        ("3", "", ""),
        ("4", f"Name:\tx\nUid:\t{UID}\t0\t0\t0\n", "4 (x) S " + " ".join(str(n) for n in range(4, 53))),
    ):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "status").write_text(status)
        (tmp_path / pid / "stat").write_text(stat)
    scan = ProcessMeter(tmp_path).scan(USERS)
    assert scan.unreadable == {1, 2}
    (reading,) = scan.processes
    ticks = os.sysconf("SC_CLK_TCK")
    assert (reading.boot, reading.pid, reading.started) == ("b1", 4, 22)
    assert (reading.io_read_bytes, reading.io_write_bytes) == (None, None)
    assert reading.cpu_microseconds == (14 + 15) * 1_000_000 // ticks
    assert scan.memory_bytes["slappart0"] == 24 * os.sysconf("SC_PAGE_SIZE")


def test_a_scan_leaves_no_descriptor_open():
    meter = ProcessMeter()
    before = len(list(Path("/proc/self/fd").iterdir()))
    meter.scan({os.getuid(): "mine"})
    assert len(list(Path("/proc/self/fd").iterdir())) == before
