"""Private namespaces of partitions, as their tenants see them: real programs under a real supervisord, and a hostile one."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from json_schemas import parsed

from partitiond import converge, execute, mounts, namespaces, privacy, running, status
from partitiond import programs as declared
from partitiond.context import Context
from partitiond.state import InstanceState

PATIENCE = 20.0
SHARED = ("/tmp", "/var/tmp", "/dev/shm")
SLEEPER = "exec /bin/sleep 1000"


def until(condition, what):
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.02)
    return found


class Scene:
    """A node whose partitions have instances with programs of the test's own."""

    def __init__(self, node):
        self.node = node
        self.context = Context.of(node.load())

    def close(self):
        self.context.meters.close()

    def reread(self, **settings):
        """Take another configuration into force."""
        self.node.write(**settings)
        self.context.adopt(self.node.load())

    def apply(self):
        outcome = converge.apply(self.context)
        assert not outcome.failures, outcome.failures
        assert not outcome.left
        return outcome

    def plan(self):
        return {
            operation.id: (operation.action, operation.reason)
            for operation in converge.plan(self.context, converge.observe(self.context))
        }

    def open_cases(self):
        return [case for case in status.node(self.context)["node"]["open_cases"] if "namespaces" in case]

    def partition(self, index):
        return converge.observe(self.context).node.partitions[index]

    def instance(self, index, **programs):
        """Let a partition have an instance that was configured with these programs, and start it."""
        partition = self.partition(index)
        self.context.store.save_instance(
            InstanceState(partition.id, "started", "started", instance_guid="INSTANCE-1", timestamp="1")
        )
        directory = partition.path / "etc" / "run"
        directory.mkdir(parents=True, exist_ok=True)
        for name, script in programs.items():
            path = directory / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        privacy.ensure(self.context, partition)
        self.start(index)

    def start(self, index):
        """Start what it has, as each pass of the instances does."""
        partition = self.partition(index)
        self.context.supervisor.write_group(declared.group(self.context, partition))
        self.context.supervisor.update()
        self.context.supervisor.start_group(partition.id)

    def pids(self, index):
        name = f"slappart{index}"
        return {
            one.name: one.pid for one in self.context.supervisor.processes() if one.group == name and one.pid
        }

    def pid(self, index, name="sleeper"):
        """The number of a program that has begun; a moment before, it is still root's, on its way into the namespaces."""
        until(lambda: self.user_of(self.pids(index).get(name)), f"{name} to run")
        return self.pids(index)[name]

    @staticmethod
    def user_of(pid):
        with contextlib.suppress(OSError):
            return int(Path(f"/proc/{pid}/status").read_text().partition("\nUid:")[2].split()[0])
        return 0

    def log(self, index, name):
        return (self.node.log / f"slappart{index}" / f"{name}.log").read_text()

    def pin(self, index):
        return self.node.root / "run" / "namespaces" / f"slappart{index}"

    def command(self, index, *words):
        """What a program of the tenant's is started by."""
        return [*privacy.launcher(self.context.config, self.partition(index)), *words]

    def run(self, index, *words, **options):
        """Run a program of a tenant's in its namespaces; what it said."""
        environment = {"PATH": execute.PATH, "LANG": "C.UTF-8"}
        options = {"stdin": subprocess.DEVNULL, "env": environment, "timeout": 60, **options}
        return subprocess.run(
            self.command(index, *words), check=False, capture_output=True, text=True, **options
        )

    def said(self, index, *words):
        done = self.run(index, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def python(self, index, code, *arguments):
        return self.said(index, "/usr/bin/python3", "-I", "-c", textwrap.dedent(code), *map(str, arguments))


@pytest.fixture(scope="module")
def standing(module_node_config):
    scene = Scene(module_node_config)
    scene.apply()
    for index in (0, 1):
        scene.instance(index, sleeper=SLEEPER)
    scene.apply()
    yield scene
    scene.close()


@pytest.fixture
def scene(standing):
    """The standing node; partitions 0 and 1 run a sleeper, partition 2 is a test's own."""
    yield standing
    standing.reread(
        partitiond={"private_namespaces": None}, private_namespaces={f"slappart{n}": None for n in range(3)}
    )
    standing.context.supervisor.stop_group("slappart2")
    standing.context.supervisor.remove_group("slappart2")
    standing.context.supervisor.update()
    standing.context.store.save_instance(InstanceState("slappart2"))
    run = standing.node.instance / "slappart2" / "etc" / "run"
    for path in run.iterdir() if run.is_dir() else ():
        path.unlink()
    standing.apply()
    assert not standing.pin(2).exists()


def namespaces_of(pid):
    return [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("mnt", "ipc")]  # noqa: PTH115 - a magic link


def given(pid):
    """What the program that is there in the end has open, and which signals it blocks, ignores and catches."""
    until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n", "the program to be replaced")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    descriptors = sorted(path.name for path in Path(f"/proc/{pid}/fd").iterdir())
    return [*descriptors, *(line for line in lines if line.startswith(("SigBlk", "SigIgn", "SigCgt")))]


# --- what a tenant sees -------------------------------------------------------------------------------------------------


_PROCESSES = """
    import os
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            print(name, os.stat(f"/proc/{name}").st_uid)
        except FileNotFoundError:
            pass  # it ended
"""


def test_a_tenant_sees_its_own_processes_and_no_other(scene):
    own, foreign = scene.pid(0), scene.pid(1)
    uid = scene.partition(0).uid
    seen = dict(line.split() for line in scene.python(0, _PROCESSES).splitlines())
    assert str(own) in seen
    assert set(seen.values()) == {str(uid)}
    script = 'for pid in "$@"; do cat /proc/$pid/cmdline /proc/$pid/status /proc/$pid/stat; done'
    done = scene.run(0, "/bin/sh", "-c", script, "sh", str(foreign), "1", str(os.getpid()))
    assert not done.stdout
    assert done.stderr.count("No such file") == 9
    # and root sees all, which meters by it
    assert Path(f"/proc/{foreign}/cmdline").read_bytes() == b"/bin/sleep\x001000\x00"


@pytest.mark.parametrize("directory", SHARED)
def test_its_files_are_seen_by_its_other_processes_only(scene, directory):
    path = Path(directory, "told-to-nobody")
    scene.said(0, "/bin/sh", "-c", f"umask 000; echo secret >{path}")
    assert scene.said(0, "/bin/cat", str(path)) == "secret\n"
    assert not path.exists()
    assert scene.run(1, "/bin/cat", str(path)).returncode != 0
    assert scene.said(1, "/bin/ls", directory) == ""
    assert scene.said(0, "/usr/bin/stat", "-c", "%a %U", directory) == "1777 root\n"
    # what runs under supervisord is in the same place
    assert Path(f"/proc/{scene.pid(0)}/root{path}").read_text() == "secret\n"
    scene.said(0, "/bin/rm", str(path))


def test_the_hosts_own_files_are_not_in_it(scene, tmp_path):
    kept = tmp_path / "host"
    kept.write_text("of the host")
    kept.chmod(0o644)
    for parent in kept.parents:
        if parent.is_relative_to("/tmp/pytest-of-root"):
            parent.chmod(0o755)
    assert kept.is_relative_to("/tmp")
    assert scene.run(0, "/bin/cat", str(kept)).returncode != 0
    uid = str(scene.partition(0).uid)
    plain = subprocess.run(["/usr/bin/setpriv", "--reuid", uid, "--clear-groups", "cat", kept], check=True)
    assert plain.returncode == 0, "without namespaces it could be read"


def test_temporary_files_are_limited_and_cannot_be_devices_or_setuid(scene):
    rows = [line.split() for line in scene.said(0, "/bin/cat", "/proc/self/mountinfo").splitlines()]
    for directory in SHARED:
        (row,) = [row for row in rows if row[4] == directory and "partitiond" in row]
        assert {"nosuid", "nodev"} <= set(row[5].split(","))
        assert "size=" in row[-1]
    limits = set(scene.said(0, "/bin/df", "--output=size", *SHARED).splitlines()[1:])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert [int(one) for one in limits] == [pytest.approx(total / 4 / 1024, rel=0.02)]


_SYSTEM_V = """
    import ctypes, sys
    libc = ctypes.CDLL(None, use_errno=True)
    flags = int(sys.argv[1], 8)
    print(*(libc.shmget(77, 4096, flags), libc.semget(77, 1, flags), libc.msgget(77, flags)))
    print(libc.mq_open(b"/told", 0o100 | 2 if flags & 0o1000 else 2, 0o666, None))
"""


def test_system_v_ipc_and_message_queues_are_its_own(scene):
    def found(text):
        return [int(number) >= 0 for number in text.split()]

    assert found(scene.python(0, _SYSTEM_V, "1666")) == [True] * 4
    assert found(scene.python(0, _SYSTEM_V, "0666")) == [True] * 4, "another process of it finds them"
    assert found(scene.python(1, _SYSTEM_V, "0666")) == [False] * 4
    host = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(_SYSTEM_V), "0666"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert found(host.stdout) == [False] * 4


def test_limits_of_ipc_that_the_operator_set_hold_inside(scene):
    setting, queues = Path("/proc/sys/kernel/sem"), Path("/proc/sys/fs/mqueue/msg_max")
    before = setting.read_text(), queues.read_text()
    try:
        setting.write_text("1000 64000 77 555\n")
        queues.write_text("33\n")
        scene.instance(2, sleeper=SLEEPER)
        assert scene.said(2, "/bin/cat", str(setting)).split() == ["1000", "64000", "77", "555"]
        assert scene.said(2, "/bin/cat", str(queues)) == "33\n"
    finally:
        setting.write_text(before[0])
        queues.write_text(before[1])


@contextlib.contextmanager
def shared_tree(path):
    """A directory whose mounts reach other mount namespaces, as all do under systemd."""
    path.mkdir()
    mounts.mount("tmpfs", str(path), "tmpfs", 0, "mode=0755")
    mounts.mount("none", str(path), "", mounts.MS_SHARED)
    try:
        yield path
    finally:
        mounts.detach(str(path))
        path.rmdir()


def test_what_the_host_mounts_later_arrives_and_leaves(scene):
    with shared_tree(Path("/srv/disks")) as tree:
        scene.instance(2, sleeper=SLEEPER)
        disk = tree / "data0"
        disk.mkdir()
        mounts.mount("tmpfs", str(disk), "tmpfs", 0, "mode=0755")
        (disk / "there").touch()
        inside = Path(f"/proc/{scene.pid(2)}/root{disk}")
        assert scene.said(2, "/bin/ls", str(disk)) == "there\n"
        assert os.path.ismount(inside)
        mounts.unmount(str(disk))
        assert scene.said(2, "/bin/ls", str(disk)) == ""
        assert not os.path.ismount(inside)


def test_another_proc_that_the_host_mounts_later_is_taken_away_again(scene):
    with shared_tree(Path("/srv/chroots")) as tree:
        scene.instance(2, sleeper=SLEEPER)
        scene.apply()
        foreign = f"/srv/chroots/a b/proc/{scene.pid(0)}/cmdline"
        window = tree / "a b" / "proc"
        window.mkdir(parents=True)
        for _ in range(2):
            mounts.mount("proc", str(window), "proc")
        try:
            assert scene.said(2, "/bin/cat", foreign) == "/bin/sleep\x001000\x00"
            reason = "all processes are seen by /srv/chroots/a b/proc"
            assert scene.plan() == {"namespaces/slappart2": ("change", reason)}
            pids = [scene.pid(index) for index in range(3)]
            scene.apply()
            assert scene.said(2, "/bin/ls", str(window)) == ""
            assert scene.plan() == {}
            assert Path(foreign).read_bytes()
            assert [scene.pid(index) for index in range(3)] == pids
        finally:
            for _ in range(2):
                mounts.detach(str(window))


# --- how it is started --------------------------------------------------------------------------------------------------


_ABOUT = """
    env | sort
    umask; pwd; ulimit -n; ulimit -Hn; ulimit -u; id; nice
    grep -E '^(Cap(Inh|Prm|Eff|Amb)|Groups|Uid|Gid)' /proc/$$/status
    cut -d' ' -f5,6 /proc/$$/stat | awk '{ print ($1 == '$$') }'
    echo told
    exec /bin/sleep 1000
"""


def test_its_programs_find_what_they_found_before(scene):
    """Environment, umask, working directory, limits, groups, descriptors, signals: all is as without namespaces."""
    scene.reread(private_namespaces={"slappart2": "off"})
    scene.instance(2, about=_ABOUT)
    plain = until(lambda: "told" in scene.log(2, "about") and scene.log(2, "about"), "the program")
    assert namespaces_of(scene.pid(2, "about")) == namespaces_of("self")
    open_and_signals = given(scene.pid(2, "about"))
    scene.context.supervisor.stop_group("slappart2")
    (scene.node.log / "slappart2" / "about.log").write_text("")
    scene.reread(private_namespaces={"slappart2": None})
    scene.instance(2, about=_ABOUT)
    private = until(lambda: scene.log(2, "about").count("told") and scene.log(2, "about"), "the program")
    assert not set(namespaces_of(scene.pid(2, "about"))) & set(namespaces_of("self"))
    assert private == plain
    assert given(scene.pid(2, "about")) == open_and_signals
    home = scene.node.instance / "slappart2"
    lines = private.splitlines()
    assert {
        f"HOME={home}",
        f"PWD={home}",
        "USER=slapuser2",
        "LOGNAME=slapuser2",
        "LANG=C.UTF-8",
        "0022",
    } <= set(lines)
    assert "CapEff:\t0000000000000000" in lines
    assert "(slapsoft)" in private


def test_it_gains_nothing_by_setuid_programs(scene):
    place = Path("/srv/setuid")
    place.mkdir()
    mounts.mount("tmpfs", str(place), "tmpfs", 0, "mode=0755")
    try:
        program = place / "id"
        program.write_bytes(Path("/usr/bin/id").read_bytes())
        program.chmod(0o4755)
        scene.instance(2, sleeper=SLEEPER)
        uid = str(scene.partition(2).uid)
        plain = ["/usr/bin/setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", program]
        without = subprocess.run(plain, check=True, capture_output=True, text=True).stdout
        assert "euid=0(root)" in without, "the test would not see it"
        assert "euid" not in scene.said(2, str(program))
        status = Path(f"/proc/{scene.pid(2)}/status").read_text()
        assert "\nNoNewPrivs:\t1\n" in status
        # what runs holds the mount in its own namespace
        scene.context.supervisor.stop_group("slappart2")
    finally:
        mounts.detach(str(place))
        place.rmdir()


def test_signals_reach_the_program_itself(scene):
    script = "trap 'echo ended $$; exit 0' TERM; echo began $$; while :; do /bin/sleep 0.05; done"
    scene.instance(2, polite=script)
    pid = scene.pid(2, "polite")
    until(lambda: f"began {pid}\n" in scene.log(2, "polite"), "the program itself to have that pid")
    scene.context.supervisor.stop_group("slappart2")
    assert f"ended {pid}\n" in scene.log(2, "polite")
    assert not scene.pids(2)


def test_supervisord_starts_nothing_outside_when_the_namespaces_are_gone(scene):
    scene.instance(2, sleeper=SLEEPER)
    first = scene.pid(2)
    mounts.unmount(str(scene.pin(2)))
    assert scene.plan() == {"namespaces/slappart2": ("create", "nothing is pinned there")}
    scene.context.supervisor.stop_group("slappart2")
    scene.context.supervisor.start_group("slappart2")
    until(lambda: not scene.pids(2) and "nsenter: " in scene.log(2, "sleeper"), "the refusal")
    scene.apply()
    second = scene.pid(2)
    assert second != first
    assert namespaces_of(second)[0] not in (namespaces_of("self")[0], namespaces_of(scene.pid(0))[0])


def test_what_could_not_start_for_want_of_namespaces_starts_when_they_are_there(scene):
    scene.instance(2, sleeper=SLEEPER)
    scene.pid(2)
    scene.context.supervisor.shutdown()
    mounts.unmount(str(scene.pin(2)))
    scene.pin(2).unlink()
    scene.pin(2).mkdir()  # a pin cannot be made there
    outcome = converge.apply(scene.context)
    assert [(name, error.code) for name, error in outcome.failures] == [
        ("namespaces/slappart2", "privacy.not_made")
    ]
    for index in (0, 1):
        assert namespaces_of(scene.pid(index))[0] == f"mnt:[{scene.pin(index).stat().st_ino}]"
    assert scene.plan().keys() == {"namespaces/slappart2", "processes/slappart2"}
    (mine,) = [one for one in scene.context.supervisor.processes() if one.group == "slappart2"]
    assert (mine.state, mine.started) == ("STOPPED", False)
    # started all the same, by whomever: it ends at once, which is no doing of its own
    scene.context.supervisor.start_group("slappart2")
    until(lambda: "nsenter: " in scene.log(2, "sleeper") and not scene.pids(2), "the refusal")
    scene.pin(2).rmdir()
    scene.apply()
    assert namespaces_of(scene.pid(2))[0] == f"mnt:[{scene.pin(2).stat().st_ino}]"


def test_a_removed_pin_touches_nothing_that_runs_and_is_made_again(scene):
    scene.instance(2, sleeper=SLEEPER)
    pids = [scene.pid(index) for index in range(3)]
    mounts.unmount(str(scene.pin(2)))
    scene.pin(2).unlink()
    assert scene.plan() == {"namespaces/slappart2": ("create", "missing")}
    scene.apply()
    assert scene.plan() == {}
    assert [scene.pid(index) for index in range(3)] == pids
    scene.context.supervisor.stop_group("slappart2")
    scene.context.supervisor.start_group("slappart2")
    assert namespaces_of(scene.pid(2))[0] == f"mnt:[{scene.pin(2).stat().st_ino}]"


# --- on and off ---------------------------------------------------------------------------------------------------------


def test_switched_off_for_one_it_alone_is_started_anew_outside(scene, command):
    scene.instance(2, sleeper=SLEEPER)
    scene.apply()
    others = [scene.pid(index) for index in (0, 1)]
    inside = scene.pid(2)
    scene.reread(private_namespaces={"slappart2": "off"})
    assert scene.plan() == {"namespaces/slappart2": ("remove", "switched off")}
    done = parsed(command("apply", "--json", "-c", scene.node.path))
    assert (done["failures"], done["left"]) == ([], [])
    assert scene.plan() == {}
    assert scene.pid(2) != inside
    assert namespaces_of(scene.pid(2)) == namespaces_of("self")
    assert [scene.pid(index) for index in (0, 1)] == others
    # and back: what runs goes on until it is started anyway
    outside = scene.pid(2)
    scene.reread(private_namespaces={"slappart2": "on"})
    assert scene.plan() == {"namespaces/slappart2": ("create", "missing")}
    scene.apply()
    assert scene.pid(2) == outside
    scene.start(2)
    assert not set(namespaces_of(scene.pid(2))) & set(namespaces_of("self"))
    assert [scene.pid(index) for index in (0, 1)] == others


def test_switched_off_it_runs_again_whatever_else_fails(scene):
    scene.instance(2, sleeper=SLEEPER)
    scene.apply()
    before = scene.pid(2)
    (scene.node.root / "run" / "namespaces" / "of-nobody" / "in-the-way").mkdir(parents=True)
    scene.reread(private_namespaces={"slappart2": "off"})
    try:
        outcome = converge.apply(scene.context)
        assert [name for name, _ in outcome.failures] == ["namespaces/of-nobody"]
        assert scene.pid(2) != before
        assert namespaces_of(scene.pid(2)) == namespaces_of("self")
    finally:
        shutil.rmtree(scene.node.root / "run" / "namespaces" / "of-nobody")


def test_switched_off_by_one_who_was_killed_before_it_told_supervisord(scene):
    scene.instance(2, sleeper=SLEEPER)
    scene.apply()
    before = scene.pid(2)
    scene.reread(private_namespaces={"slappart2": "off"})
    assert privacy.relaunch(scene.context, scene.partition(2), "slappart2")
    scene.apply()
    assert scene.pid(2) != before
    assert namespaces_of(scene.pid(2)) == namespaces_of("self")


def test_a_tenant_of_an_older_version_runs_on_and_is_private_when_supervisord_starts_anew(scene):
    scene.reread(private_namespaces={"slappart2": "off"})
    scene.instance(2, sleeper=SLEEPER)
    scene.apply()
    before = [scene.pid(index) for index in range(3)]
    assert namespaces_of(before[2]) == namespaces_of("self")
    (case,) = scene.open_cases()
    assert case.startswith("private_namespaces is off for slappart2: ")
    scene.reread(private_namespaces={"slappart2": None})
    scene.apply()
    assert [scene.pid(index) for index in range(3)] == before
    (case,) = scene.open_cases()
    assert case.startswith("slappart2 began before its namespaces were made")
    scene.context.supervisor.shutdown()
    scene.apply()
    for index in range(3):
        assert not set(namespaces_of(scene.pid(index))) & set(namespaces_of("self"))
    assert not scene.open_cases()


def configure(scene, *, another=False):
    """Start what partition 2 has, as at the end of its configuration; ``another``: it has a new release."""
    running.start(scene.context, scene.partition(2), another=another)


@pytest.mark.parametrize("reason", ["another release", "another program", "it had ended"])
def test_a_tenant_of_an_older_version_is_moved_for_a_reason_only(scene, reason):
    scene.reread(private_namespaces={"slappart2": "off"})
    scene.instance(2, sleeper=SLEEPER)
    scene.apply()
    before = scene.pid(2)
    scene.reread(private_namespaces={"slappart2": None})
    scene.apply()
    configure(scene)
    configure(scene)
    assert scene.pid(2) == before
    if reason == "another program":
        path = scene.node.instance / "slappart2" / "etc" / "run" / "more"
        path.write_text(f"#!/bin/sh\n{SLEEPER}\n")
        path.chmod(0o755)
    elif reason == "it had ended":
        os.kill(before, signal.SIGKILL)
        until(lambda: not scene.pids(2), "it to end")
    configure(scene, another=reason == "another release")
    assert namespaces_of(scene.pid(2))[0] == f"mnt:[{scene.pin(2).stat().st_ino}]"


def test_a_tunnel_is_in_its_partitions_namespaces(scene):
    declaration = scene.node.instance / "slappart2" / "etc" / "tunnel" / "db.cfg"
    declaration.parent.mkdir(parents=True)
    published = json.loads((scene.node.instance / "slappart0" / ".slapos-resource").read_text())
    declaration.write_text(
        f"[tunnel]\nmode = client\nlisten = 3307\nconnect = [{scene.partition(0).ipv6}]:3306\n"
        f"peer = cert:{published['certificate']}\n"
    )

    def stunnel():
        def there():  # supervisord starts it in its next turn, and then it is still root's
            processes = scene.context.supervisor.processes()
            (pid,) = [one.pid for one in processes if one.group == "slappart2-tunnel"]
            return pid if pid and scene.user_of(pid) else None

        return until(there, "stunnel")

    try:
        scene.apply()
        first = stunnel()
        assert namespaces_of(first)[0] == f"mnt:[{scene.pin(2).stat().st_ino}]"
        assert scene.user_of(first) == scene.partition(2).uid
        scene.reread(private_namespaces={"slappart2": "off"})
        scene.apply()
        second = stunnel()
        assert namespaces_of(second) == namespaces_of("self")
        assert not scene.pin(2).exists()
        # as after an older version: its sessions are worth more than a place of its own at once
        scene.reread(private_namespaces={"slappart2": "on"})
        scene.apply()
        assert stunnel() == second
        configure(scene)
        assert stunnel() == second
        declaration.write_text(declaration.read_text().replace("3307", "3308"))
        scene.apply()
        assert stunnel() == second, "it reads its configuration again where it is"
        configure(scene, another=True)
        assert namespaces_of(stunnel())[0] == f"mnt:[{scene.pin(2).stat().st_ino}]"
    finally:
        declaration.unlink()
        declaration.parent.rmdir()
        scene.apply()


def test_a_partition_with_nothing_to_run_has_none(scene):
    assert not scene.pin(2).exists()
    scene.instance(2, sleeper=SLEEPER)
    scene.said(2, "/usr/bin/touch", "/tmp/of-the-first")
    scene.context.supervisor.stop_group("slappart2")
    privacy.forget(scene.context.config, scene.partition(2))
    scene.instance(2, sleeper=SLEEPER)
    assert scene.said(2, "/bin/ls", "/tmp") == "", "the next instance has what the last one left"


def test_nothing_is_left_of_namespaces_whose_last_process_is_gone(scene):
    """Their files are gone with them: no mount of ours, in whatever namespace, keeps them."""
    scene.instance(2, sleeper=SLEEPER)
    # another mount namespace, as a service of systemd's has: it copies what it finds
    command = [
        "/usr/bin/unshare",
        "--mount",
        "--propagation",
        "private",
        "/bin/sh",
        "-c",
        "echo there; read end",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"there\n"
        copied = Path(f"/proc/{other.pid}/mountinfo").read_text()
        assert "namespaces/slappart" not in copied
        other.stdin.close()


# --- as the attacker ----------------------------------------------------------------------------------------------------

_ATTACKS = {
    "enter the node's namespaces": "nsenter --mount=/proc/1/ns/mnt /bin/ls /tmp",
    "enter those of who started it": "nsenter --mount=/proc/$PPID/ns/mnt /bin/ls /tmp",
    "enter by the pin": "nsenter --mount=$PINS/slappart1 /bin/ls /tmp",
    "list the pins": "ls $PINS",
    "reach beside its own /tmp": "ls $PINS/shm",
    "enter by another's process": "nsenter --mount=/proc/$FOREIGN/ns/mnt /bin/ls /tmp",
    "unmount /proc": "umount /proc",
    "show processes": "mount -o remount,hidepid=0 /proc",
    "see another's": "cat /proc/$FOREIGN/cmdline",
    "signal another's": "kill -0 $FOREIGN",
    "gain rights": "su -c true root </dev/null",
}
# the same, as the root of a user namespace of its own, which may mount
_ROOT_ATTACKS = {
    "unmount /proc": "umount /proc",
    "unmount /proc lazily": "umount -l /proc",
    "unmount /tmp": "umount /tmp || umount -l /tmp",
    "unmount /dev/shm": "umount -l /dev/shm",
    "unmount what lies over the pins": "umount -l $PINS",
    "remount /proc": "mount -o remount,hidepid=0 /proc && test -e /proc/$FOREIGN",
    "another /proc": "mount -t proc proc $HERE && test -e $HERE/$FOREIGN",
    "another /proc with an option": "mount -t proc -o hidepid=0 proc $HERE && test -e $HERE/$FOREIGN",
    "look below /tmp by its parent": "mount --bind / $HERE && test -e $HERE/tmp/of-the-host",
    "the whole tree elsewhere": "mount --rbind / $HERE && umount -l $HERE/tmp && test -e $HERE/tmp/of-the-host",
    "the whole tree, then /proc": "mount --rbind / $HERE && umount -l $HERE/proc && test -e $HERE/proc/$FOREIGN",
    "move /tmp away": "mount --move /tmp $HERE && test -e /tmp/of-the-host",
    "move /proc away": "mount --move /proc $HERE && test -e /proc/$FOREIGN",
    "enter the node's mounts": "nsenter --mount=/proc/1/ns/mnt true",
    "enter by the pin": "nsenter --mount=$PINS/slappart1 true",
    "enter another's": "nsenter --mount=/proc/$FOREIGN/ns/mnt true",
    "read as root": "cat $PINS/ipc",
}


@pytest.fixture
def attack(scene):
    """Run a line as the tenant of partition 0; ``root``: as root in a user namespace of its own."""
    foreign = scene.pid(1)
    home = scene.node.instance / "slappart0"
    here = home / "srv"
    here.mkdir(exist_ok=True)
    os.chown(here, scene.partition(0).uid, -1)
    bait = Path("/tmp/of-the-host")
    bait.touch(mode=0o666)
    environment = {
        "PATH": execute.PATH,
        "FOREIGN": str(foreign),
        "PINS": str(scene.pin(0).parent),
        "HERE": str(here),
    }

    def run(line, *, root=False, launcher=True):
        uid = str(scene.partition(0).uid)
        plain = ["/usr/bin/setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--"]
        before = scene.command(0) if launcher else plain
        around = (
            ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "unchanged"] if root else []
        )
        return subprocess.run(
            [*before, *around, "/bin/sh", "-c", line],
            check=False,
            capture_output=True,
            text=True,
            cwd=home,
            env=environment,
            timeout=30,
        )

    yield run
    bait.unlink()


@pytest.mark.parametrize("name", _ATTACKS)
def test_there_is_no_way_out(attack, name):
    done = attack(_ATTACKS[name])
    assert done.returncode != 0, done.stdout


@pytest.mark.parametrize("name", _ROOT_ATTACKS)
def test_there_is_no_way_out_for_root_of_a_user_namespace(attack, name):
    allowed = attack("true", root=True)
    if allowed.returncode:
        pytest.skip(
            f"THIS KERNEL LETS USERS MAKE NO USER NAMESPACES, attacks from there are not tested: {allowed.stderr}"
        )
    done = attack(_ROOT_ATTACKS[name], root=True)
    assert done.returncode != 0, done.stdout


def test_the_attacks_would_be_noticed(attack):
    """Without namespaces the same lines succeed where nothing else forbids them."""
    assert attack(_ATTACKS["see another's"], launcher=False).returncode == 0
    assert attack("test -e /tmp/of-the-host", launcher=False).returncode == 0
    assert (
        attack("mount --rbind / $HERE && test -e $HERE/tmp/of-the-host", root=True, launcher=False).returncode
        == 0
    )
    assert attack("mount --bind /etc $HERE", root=True).returncode == 0, (
        "it may mount, but nothing that tells it more"
    )


def test_no_descriptor_of_roots_leads_out(scene):
    listed = scene.said(0, "/bin/sh", "-c", "ls -l /proc/$$/fd/ | tail -n +2")
    targets = [line.split(" -> ")[1] for line in listed.splitlines()]
    assert all(target.startswith(("/dev/null", "pipe:")) for target in targets), listed


# --- what else is readable ----------------------------------------------------------------------------------------------


_TRIED = """
    import os, sys
    for line in sys.stdin:
        path = line.rstrip("\\n")
        for word, flags in ("read", os.O_RDONLY), ("write", os.O_WRONLY):
            try:
                os.close(os.open(path, flags | os.O_NONBLOCK))
                print(word, path)
            except OSError:
                pass
        if os.path.isdir(path) and os.access(path, os.W_OK):
            print("change", path)
"""


def opened_by(paths, *words):
    """What the program before which these words stand can open."""
    done = subprocess.run(
        [*words, "/usr/bin/python3", "-I", "-c", textwrap.dedent(_TRIED)],
        input="".join(f"{path}\n" for path in paths),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines())


def test_of_all_that_the_node_keeps_a_tenant_reads_its_own_and_software(scene, command):
    root = scene.node.root
    release = root / "software" / ("0" * 32)
    release.mkdir(mode=0o755)
    (release / "program").touch(mode=0o640)
    shutil.chown(release / "program", "slapsoft", "slapsoft")
    (root / "log" / "software" / f"{release.name}.log").write_text("built from https://token@example.com/")
    for directory in ("etc", "etc/plugin", "srv"):
        (root / "instance" / "slappart0" / directory).mkdir(exist_ok=True)
    daemon = command.start("run", "-c", scene.node.path)
    try:
        until((root / "run" / "control.sock").exists, "the daemon")
        command("sync", "usage", "-c", scene.node.path)
        paths = [Path(above, name) for above, *names in os.walk(root) for one in names for name in one]
        assert len(paths) > 60, paths
        tenant = scene.partition(1)
        switch = execute.switch(str(tenant.uid), str(tenant.gid))
        seen = opened_by(paths, *switch)
        stranger = opened_by(
            paths, "/usr/bin/setpriv", "--reuid", "4242", "--regid", "4242", "--clear-groups"
        )
        everything = opened_by(paths)
    finally:
        daemon.terminate()
        daemon.communicate()
    assert len(everything) > 100, "root could not open them either"
    own = {one for one in seen if "slappart1" in one}
    assert f"read {root}/state/tunnels/slappart1/key.pem" in own
    assert f"read {root}/log/slappart1/sleeper.log" in own
    software = {f"read {release}/program"}
    names = {
        f"read {root}/{name}" for name in ("instance", "instance/etc", "instance/var", "run", "software")
    }
    assert seen - own == software | names | {f"read {release}", f"read {scene.node.path}"}
    # the one group that tenants share opens software, and nothing else
    assert seen - own - stranger == software
    assert not any("slappart" in one for one in stranger)


# --- the port -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pins():
    directory = Path("/run/test-namespaces")
    yield directory
    namespaces.remove_all(directory)
    assert not directory.exists()


def inside(pins, name, *words):
    return subprocess.run(
        [*namespaces.entry(pins, name, Path("/")), *words], check=True, capture_output=True, text=True
    ).stdout


def test_namespaces_are_made_whatever_processor_one_is_on(pins):
    everywhere = os.sched_getaffinity(0)
    for processor in everywhere:
        os.sched_setaffinity(0, {processor})
        try:
            assert namespaces.make(pins, [f"on-{processor}"]) == ()
        finally:
            os.sched_setaffinity(0, everywhere)
    assert namespaces.pinned(pins) == {f"on-{processor}": True for processor in everywhere}
    assert inside(pins, f"on-{min(everywhere)}", "/bin/pwd") == "/\n"


def test_making_changes_nothing_of_the_process_that_makes(pins):
    before = namespaces_of("self"), Path.cwd(), os.sched_getaffinity(0)
    assert namespaces.make(pins, ["one", "two"]) == ()
    assert (namespaces_of("self"), Path.cwd(), os.sched_getaffinity(0)) == before
    assert inside(pins, "one", "/bin/readlink", "/proc/self/ns/mnt") != inside(
        pins, "two", "/bin/readlink", "/proc/self/ns/mnt"
    )


def test_what_lies_below_tmp_and_is_needed_stays(pins):
    kept = Path("/tmp/kept/instance")
    kept.mkdir(parents=True)
    (kept / "file").write_text("there")
    Path("/tmp/not-kept").touch()
    try:
        assert namespaces.make(pins, ["one"], [kept, Path("/tmp/kept"), Path("/srv")]) == ()
        assert inside(pins, "one", "/bin/cat", str(kept / "file")) == "there"
        assert inside(pins, "one", "/bin/ls", "/tmp") == "kept\n"
    finally:
        (kept / "file").unlink()
        kept.rmdir()
        kept.parent.rmdir()
        Path("/tmp/not-kept").unlink()


def test_pins_below_tmp():
    directory = Path("/tmp/run/namespaces")
    directory.parent.mkdir()
    try:
        assert namespaces.make(directory, ["one"], [directory.parent]) == ()
        assert inside(directory, "one", "/bin/ls", "/tmp") == "run\n"
    finally:
        namespaces.remove_all(directory)
        directory.parent.rmdir()


def test_another_proc_is_no_window(pins):
    chroot = Path("/srv/a chroot/proc")
    chroot.mkdir(parents=True)
    mounts.mount("proc", str(chroot), "proc")
    try:
        assert namespaces.make(pins, ["one"]) == ()
        assert inside(pins, "one", "/bin/ls", str(chroot)) == ""
        assert (chroot / "1").exists()
    finally:
        mounts.detach(str(chroot))
        chroot.rmdir()
        chroot.parent.rmdir()


def test_what_a_container_laid_over_proc_stays(pins):
    """As lxcfs and the engines of containers do; but a /proc of another process, or all of it, is not let in that way."""
    own = Path("/srv/meminfo")
    own.write_text("MemTotal: 1 kB\n")
    own.chmod(0o644)
    process = Path("/proc", str(os.getppid()))
    laid = [(str(own), "/proc/meminfo"), ("/proc/sys", "/proc/sys"), ("/dev/null", "/proc/kallsyms")]
    laid += [("/proc/meminfo", "/proc/cpuinfo"), (str(process), "/proc/irq"), (str(process), str(process))]
    done = []
    try:
        for source, target in laid:
            mounts.mount(source, target, "", mounts.MS_BIND)
            done.append(target)
        flags = mounts.MS_REMOUNT | mounts.MS_BIND | mounts.MS_RDONLY
        mounts.mount("none", "/proc/sys", "", flags)
        assert namespaces.make(pins, ["one"]) == ()
        assert inside(pins, "one", "/bin/cat", "/proc/meminfo", "/proc/cpuinfo") == "MemTotal: 1 kB\n" * 2
        assert inside(pins, "one", "/bin/cat", "/proc/kallsyms") == ""
        rows = [line.split() for line in inside(pins, "one", "/bin/cat", "/proc/self/mountinfo").splitlines()]
        places = [row[4] for row in rows if row[4].startswith("/proc/")]
        assert places[-4:] == ["/proc/meminfo", "/proc/sys", "/proc/kallsyms", "/proc/cpuinfo"]
        assert "ro" in [row for row in rows if row[4] == "/proc/sys"][-1][5].split(",")
        assert Path("/proc/irq/status").exists()
        assert "status" not in inside(pins, "one", "/bin/ls", "/proc/irq").split()
        user = ["/usr/bin/setpriv", "--reuid", "4242", "--regid", "4242", "--clear-groups"]
        seen = inside(pins, "one", *user, "/bin/ls", "/proc")
        assert process.name not in seen.split()
    finally:
        for target in reversed(done):
            mounts.detach(target)
        own.unlink()


@pytest.mark.parametrize("above", ["/tmp", "/dev/shm", "/run/lock", "/srv"])
def test_another_proc_that_is_covered_or_will_be_keeps_nothing_from_being_made(pins, above):
    chroot = Path(above, "chroot", "proc")
    chroot.mkdir(parents=True)
    mounts.mount("proc", str(chroot), "proc")
    hidden = Path("/srv/covered/proc")
    hidden.mkdir(parents=True)
    mounts.mount("proc", str(hidden), "proc")
    mounts.mount("tmpfs", str(hidden.parent), "tmpfs", 0, "mode=0755")
    try:
        assert namespaces.make(pins, ["one"], [chroot.parent]) == ()
        assert inside(pins, "one", "/bin/ls", str(chroot)) == ""
        assert inside(pins, "one", "/bin/ls", str(hidden.parent)) == ""
    finally:
        mounts.detach(str(hidden.parent))
        mounts.detach(str(hidden))
        mounts.detach(str(chroot))
        for path in (chroot, chroot.parent, hidden, hidden.parent):
            path.rmdir()


def test_one_that_cannot_be_made_harms_no_other(pins):
    ((name, error),) = namespaces.make(pins, ["one", "no/where", "three"])
    assert (name, error.errno) == ("no/where", errno.ENOENT)
    assert namespaces.pinned(pins) == {"one": True, "three": True}


def test_what_this_machine_cannot_is_said(scene, monkeypatch):
    def said(word):
        return [case for case in status.node(scene.context)["node"]["open_cases"] if word in case]

    assert not namespaces.mounts_arrive(), "nothing is shared in the sandbox"
    assert said("--make-rshared")
    assert not said("Linux 5.8")
    monkeypatch.setattr(namespaces, "hides_processes", lambda: False)
    assert said("Linux 5.8")
    mounts.mount("none", "/", "", mounts.MS_SHARED)
    try:
        assert namespaces.mounts_arrive()
        assert not said("--make-rshared")
    finally:
        mounts.mount("none", "/", "", mounts.MS_PRIVATE)
    scene.reread(partitiond={"private_namespaces": "off"})
    assert said("private_namespaces is off for every partition")
    assert not said("Linux 5.8")


def test_a_kernel_that_cannot_hide_processes_has_the_rest(pins, monkeypatch):
    assert namespaces.hides_processes()
    assert not mounts.knows_option("proc", "hidepid", "nonsense")
    assert not mounts.knows_option("nonsense", "hidepid", "invisible")
    monkeypatch.setattr(namespaces, "hides_processes", lambda: False)
    before = Path("/proc/self/mountinfo").read_text().count(" proc proc ")
    assert namespaces.make(pins, ["one"]) == ()
    assert inside(pins, "one", "/bin/cat", "/proc/self/mountinfo").count(" proc proc ") == before
    assert inside(pins, "one", "/bin/ls", "/tmp") == ""


def test_what_is_no_namespace_is_replaced(pins):
    assert namespaces.make(pins, ["one"]) == ()
    (pins / "two").touch()
    assert namespaces.pinned(pins) == {"one": True, "two": False}
    assert namespaces.make(pins, ["one", "two"]) == ()
    assert namespaces.pinned(pins) == {"one": True, "two": True}
    for name in ("one", "one", "never"):
        namespaces.remove(pins, name)
    assert namespaces.pinned(pins) == {"two": True}
