"""Builds forked from the server come to the same as the release's own script, and give a hostile release nothing more."""

import hashlib
import json
import os
import pwd
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from partitiond import build_server, execute, namespaces, procfs
from partitiond.build_server import Build, BuildServer

PATIENCE = 30.0
ROOT = Path("/srv/builds")
UID, HELPERS = 4242, 4343
PINS = Path("/run/build-pins")

RECIPE = """
import os

class Recipe:
    def __init__(self, buildout, name, options):
        self.buildout, self.options = buildout, options

    def install(self):
        exec(compile(open("code.py").read(), "code.py", "exec"), {"self": self})
        return ["made"] if os.path.exists("made") else []

    update = install
"""

PROFILE = """
[buildout]
parts = part
offline = true
index = file:///nonexistent/
bin-directory = ${buildout:directory}/sbin
eggs-directory = /srv/builds/software/release/eggs
develop-eggs-directory = /srv/builds/software/release/develop-eggs

[part]
recipe = probe
"""


@pytest.fixture(scope="module")
def release():
    """A release of one recipe, which runs ``code.py`` of the instance, and a user for the instance."""
    kept = {name: Path("/etc", name).read_bytes() for name in ("passwd", "group")}
    with open("/etc/passwd", "a") as file:
        file.write(f"builder:x:{UID}:{UID}::{ROOT}/instance:/bin/sh\n")
    with open("/etc/group", "a") as file:
        file.write(f"builder:x:{UID}:\nhelpers:x:{HELPERS}:builder\n")
    directory = ROOT / "software" / "release"
    egg = directory / "eggs" / f"probe-1.0-py3.{sys.version_info.minor}.egg"
    for path in (directory / "bin", directory / "develop-eggs", egg / "EGG-INFO"):
        path.mkdir(parents=True)
    (egg / "probe.py").write_text(RECIPE)
    (egg / "EGG-INFO" / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: probe\nVersion: 1.0\n")
    (egg / "EGG-INFO" / "entry_points.txt").write_text("[zc.buildout]\ndefault = probe:Recipe\n")
    # what bootstrap leaves where zc.buildout is not installed into the release
    (directory / "develop-eggs" / "zc-buildout.egg-link").write_text(f"{build_server.packages()}\n.")
    script = directory / "bin" / "buildout"
    script.write_text(build_server._SCRIPT.format(python=sys.executable, packages=build_server.packages()))
    script.chmod(0o755)
    yield directory
    execute.end_processes_of(UID, UID)
    subprocess.run(["/bin/rm", "-rf", str(ROOT)], check=True)
    for name, content in kept.items():
        Path("/etc", name).write_bytes(content)


@pytest.fixture
def instance(release):
    """A new instance."""
    path = ROOT / "instance"
    path.mkdir()
    os.chown(path, UID, UID)
    path.chmod(0o750)
    (path / "buildout.cfg").write_text(PROFILE)
    yield path
    execute.end_processes_of(UID, UID)
    subprocess.run(["/bin/rm", "-rf", str(path)], check=True)


@pytest.fixture(scope="module")
def kept_server():
    server = BuildServer(patience=0)
    yield server
    server.close()


@pytest.fixture
def server(kept_server, no_leaks):
    """A server that is ready, and the same for all that follows."""
    return ready(kept_server)


@pytest.fixture
def no_leaks():
    """In place of the general one: the server stays for the next test; what a build leaves is looked for by :func:`members`."""


def ready(server):
    server.begin()
    deadline = time.monotonic() + PATIENCE
    while (channel := server._channel()) is None:
        assert time.monotonic() < deadline, "the server does not get ready"
        time.sleep(0.02)
    channel.close()
    return server


def members():
    return [pid for pid in procfs.pids() if procfs.user_of(pid) == UID]


class Builder:
    def __init__(self, release, instance, **env):
        self.release, self.instance = release, instance
        self.env = {
            **execute.environment(str(instance), "builder"),
            "SLAPGRID_INSTANCE_ROOT": str(ROOT),
            **env,
        }
        self.stop = threading.Event()
        self.log = ROOT / "log"

    def says(self, code):
        (self.instance / "code.py").write_text(textwrap.dedent(code))

    def forked(self, server, code=None, *, pinned=None, **options):
        if code is not None:
            self.says(code)
        wanted = Build(self.release, "builder", self.instance, self.env, pinned)
        with self.log.open("wb") as log:
            return server.build(wanted, log=log.fileno(), stop=self.stop, **options)

    def executed(self, *, pinned=None):
        with self.log.open("wb") as log:
            return execute.as_user(
                "builder",
                "builder",
                [str(self.release / "bin" / "buildout"), "-U"],
                cwd=self.instance,
                env=self.env,
                log=log.fileno(),
                stop=self.stop,
                enter=namespaces.entry(*pinned, self.instance) if pinned else (),
            )

    def begin(self, server, code, **options):
        """Build in a thread; wait until the build has made a file called ``made``."""
        found = []
        thread = threading.Thread(target=lambda: found.append(self.forked(server, code, **options)))
        thread.start()
        wait(lambda: (self.instance / "made").exists() or not thread.is_alive(), "the build to begin")
        assert thread.is_alive(), self.log.read_text()

        def end():
            thread.join(PATIENCE)
            assert found, "the build does not end"
            return found[0]

        return end


def wait(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)


@pytest.fixture
def builder(release, instance):
    return Builder(release, instance)


# --- the same ---------------------------------------------------------------------------------------------------------

LOOK = """
    import ctypes, gc, json, locale, logging, os, resource, signal, socket, stat, sys, threading, time
    import pkg_resources, zc.buildout, zc.buildout.easy_install as easy

    def told(name):
        lines = open(f"/proc/self/{name}").read().splitlines()
        # what counts is who it is, not how much it has taken
        words = ("Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Sig", "Shd", "Umask", "Seccomp", "Threads", "Name")
        return lines if name == "limits" else [one for one in lines if one.startswith(words)]

    libc, number = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    logger = logging.getLogger()
    pid = os.getpid()
    found = {
        "argv": sys.argv, "path": sys.path, "flags": list(sys.flags), "executable": sys.executable,
        "main": [vars(sys.modules["__main__"])[name] for name in ("__name__", "__file__")],
        "environment": dict(os.environ),
        "locale": [locale.setlocale(locale.LC_ALL), sys.getfilesystemencoding()],
        "streams": [(one.fileno(), one.encoding, one.errors, one.line_buffering)
                    for one in (sys.stdin, sys.stdout, sys.stderr)],
        "descriptors": {name: os.readlink(f"/proc/self/fd/{name}") for name in ("0", "1", "2")},
        "more descriptors": len(os.listdir("/proc/self/fd")) - 4,
        "positions": [os.open("/dev/null", 0)],
        "status": told("status"), "limits": told("limits"),
        "handlers": [str(signal.getsignal(one)) for one in signal.valid_signals()],
        "session": [os.getsid(0) == pid, os.getpgid(0) == pid],
        "priority": os.getpriority(os.PRIO_PROCESS, 0), "affinity": sorted(os.sched_getaffinity(0)),
        "cgroup": open("/proc/self/cgroup").read(), "oom": open("/proc/self/oom_score_adj").read(),
        "timeslack": libc.prctl(30), "keep": libc.prctl(7), "securebits": libc.prctl(27), "dumpable": libc.prctl(3),
        "death": number.value,
        "cwd": os.getcwd(), "root": os.stat("/").st_ino,
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "ipc", "net", "pid", "user", "uts")},
        "tmp": os.stat("/tmp").st_dev,
        "logging": [logger.level, [str(type(one)) for one in logger.handlers], logger.disabled],
        "gc": [gc.isenabled(), gc.get_threshold()],
        "threads": threading.active_count(), "main thread": threading.current_thread().name,
        "timeout": socket.getdefaulttimeout(), "timezone": time.tzname,
        "working set": pkg_resources.working_set.entries,
        "distributions": sorted(map(str, pkg_resources.working_set)),
        "keys": {k: sorted(v) for k, v in pkg_resources.working_set.entry_keys.items()},
        "buildout": zc.buildout.__file__, "setuptools": [easy.setuptools_path, easy.buildout_and_setuptools_path],
        "easy": [easy.default_index_url, sorted(map(str, easy._indexes)), easy.Installer._prefer_final],
        "options": {k: v for k, v in sorted(self.buildout["buildout"].items())},
        "hash seed": os.environ.get("PYTHONHASHSEED"), "recursion": sys.getrecursionlimit(),
        "switch": sys.getswitchinterval(), "digits": sys.get_int_max_str_digits(),
        "warnings": sorted({str(one[:2]) for one in __import__("warnings").filters}),
    }
    made = os.path.join(os.getcwd(), "made")
    os.makedirs(made, exist_ok=True)
    with open("found", "w") as stream:
        json.dump(found, stream, default=str)
    with open(made + "/file", "w") as stream:
        stream.write("text")
    os.symlink("nowhere", made + "/link")
    print("a line of the recipe's")
"""


def tree(path):
    """{name: (mode, owner, group, content)} of all below."""
    found = {}
    for place in sorted(path.rglob("*")):
        status = place.lstat()
        content = str(place.readlink()) if place.is_symlink() else place.is_file() and place.read_text()
        found[str(place.relative_to(path))] = (oct(status.st_mode), status.st_uid, status.st_gid, content)
    return found


@pytest.fixture
def pinned(instance):
    failed = namespaces.make(PINS, ["builder"], [ROOT])
    assert not failed
    yield PINS, "builder"
    namespaces.remove_all(PINS)


@pytest.mark.parametrize("private", [False, True])
def test_surroundings_and_files_are_those_of_the_script(server, builder, instance, pinned, private):
    pinned = pinned if private else None
    found, trees = {}, {}
    for how, build in (
        ("forked", lambda: builder.forked(server, LOOK, pinned=pinned)),
        ("executed", lambda: builder.executed(pinned=pinned)),
    ):
        outcome = build()
        assert outcome is not None, "the server does not build"
        assert outcome.ok, builder.log.read_text()
        found[how] = json.loads((instance / "found").read_text())
        (instance / "found").unlink()
        trees[how] = tree(instance)
        assert "a line of the recipe's" in builder.log.read_text()
        if how == "forked":
            for name in (".installed.cfg", "made", "parts", "sbin"):
                subprocess.run(["/bin/rm", "-rf", str(instance / name)], check=True)
    assert found["forked"] == found["executed"]
    assert trees["forked"] == trees["executed"]
    assert ".installed.cfg" in trees["forked"]
    own = Path("/proc/self/ns/mnt").readlink()
    assert (found["forked"]["namespaces"]["mnt"] != str(own)) == private
    assert not members()


def test_each_build_begins_anew(server, builder, instance):
    left = """
        import os, sys, logging, zc.buildout, socket
        zc.buildout.left = sys.left = os.environ["LEFT"] = "left"
        sys.path.append("/left")
        os.umask(0)
        socket.setdefaulttimeout(7)
        logging.getLogger().setLevel(99)
        os.makedirs("made", exist_ok=True)
    """
    assert builder.forked(server, left).ok
    look = """
        import os, sys, logging, zc.buildout, socket
        assert not hasattr(zc.buildout, "left") and not hasattr(sys, "left") and "LEFT" not in os.environ
        assert "/left" not in sys.path and socket.getdefaulttimeout() is None and logging.getLogger().level != 99
        assert os.umask(0o27) == 0o27
    """
    assert builder.forked(server, look).ok, builder.log.read_text()


def test_failures_have_their_status(server, builder):
    code = "import zc.buildout; raise zc.buildout.UserError('this is why')"
    outcome = builder.forked(server, code)
    assert (outcome.status, outcome.cut_short) == (1, None)
    assert "this is why" in builder.log.read_text()
    outcome = builder.forked(server, "import os; os.kill(os.getpid(), 9)")
    assert (outcome.status, outcome.cut_short) == (-signal.SIGKILL, None)
    assert builder.forked(server, "import os; os._exit(77)").status == 77
    outcome = builder.forked(server, "pass", pinned=(PINS, "nobody"))
    assert not outcome.ok
    assert "nobody" in builder.log.read_text(), "what could not be entered is not named"


# --- ends -------------------------------------------------------------------------------------------------------------

BUSY = """
    import os, subprocess, time
    # a job in a group of its own, as a shell with job control has it
    subprocess.Popen(["/bin/sleep", "1000"], process_group=0)
    open("made", "w").close()
    time.sleep(1000)
"""


def test_ended_with_all_that_it_started(server, builder):
    outcome = builder.forked(server, BUSY, timeout=1.0)
    assert outcome.cut_short == "took too long"
    assert not members()
    (builder.instance / "made").unlink()
    end = builder.begin(server, BUSY)
    builder.stop.set()
    assert end().cut_short == "the daemon is stopping"
    assert not members()


def test_what_it_leaves_behind_is_ended(server, builder):
    assert builder.forked(server, "import subprocess; subprocess.Popen(['/bin/sleep', '1000'])").ok
    assert not members()


def test_the_session_is_written_down_for_who_comes_after_a_crash(server, builder):
    record = ROOT / "record"
    end = builder.begin(server, BUSY, record=record)
    session, uid = map(int, record.read_text().split())
    assert uid == UID
    assert {procfs.session_of(pid) for pid in members()} == {session}
    builder.stop.set()
    end()
    assert not record.exists()


def test_killed_server_takes_its_build_along_and_another_one_comes(builder):
    server = ready(BuildServer(patience=0))
    try:
        end = builder.begin(server, BUSY)
        os.kill(server._running.process.pid, signal.SIGKILL)
        assert end() is None, "nobody is told to execute it"
        assert not members()
        ready(server)
        assert builder.forked(server, "pass").ok
    finally:
        server.close()


def test_it_ends_when_it_is_not_needed(builder):
    server = ready(BuildServer(patience=0, idle=0.2))
    first = server._running.process
    first.wait(PATIENCE)
    wait(lambda: not Path(f"/proc/{first.pid}").exists(), "it to be reaped")
    assert builder.forked(server, "pass") is None
    server.close()
    assert server._running is None


def test_it_ends_with_its_daemon_and_so_does_a_build(release, instance):
    builder = Builder(release, instance)
    builder.says(BUSY)
    code = f"""
import sys, threading, time
from pathlib import Path
sys.path.insert(0, {str(Path(build_server.__file__).parents[1])!r})
from partitiond.build_server import Build, BuildServer
server = BuildServer(patience=0)
wanted = Build(Path({str(release)!r}), "builder", Path({str(instance)!r}), {builder.env!r}, None)
while server.build(wanted, log=2, stop=threading.Event()) is None:
    time.sleep(0.05)
"""
    daemon = subprocess.Popen([sys.executable, "-I", "-c", code], stderr=subprocess.DEVNULL)
    wait((instance / "made").exists, "the build to begin")
    server = [
        pid
        for pid in procfs.pids()
        if b"forked_build" in b" ".join(procfs.words(pid, "cmdline"))
        and f"\nPPid:\t{daemon.pid}\n" in Path(f"/proc/{pid}/status").read_text()
    ]
    assert len(server) == 1
    daemon.kill()
    daemon.wait()
    wait(lambda: not procfs.is_alive(server[0]), "the server to end")
    # its job in the background is for who starts next to end
    wait(lambda: len(members()) <= 1, "the build to end")


def test_few_builds_are_executed(builder):
    server = BuildServer(patience=2)
    for _ in range(2):
        assert builder.forked(server, "pass") is None
        assert server._running is None
    assert builder.forked(server, "pass") is None
    assert server._running is not None
    server.close()


def test_builds_far_apart_are_executed(builder):
    server = BuildServer(patience=1, idle=0.1)
    for _ in range(3):
        assert builder.forked(server, "pass") is None
        assert server._running is None
        time.sleep(0.2)


def test_other_packages_need_another_server(server, builder, monkeypatch):
    before = server._running.process.pid
    monkeypatch.setattr(build_server, "_state", lambda: (1, 2, 3))
    assert builder.forked(server, "pass") is None
    assert server._running.process.pid != before
    server.close()
    monkeypatch.undo()
    ready(server)


def test_packages_that_others_may_change_are_not_loaded(builder, monkeypatch, tmp_path):
    for below in ("zc/buildout", "setuptools", "pkg_resources"):
        (tmp_path / below).mkdir(parents=True)
    (tmp_path / "setuptools").chmod(0o775)
    monkeypatch.setattr(build_server, "packages", lambda: tmp_path)
    server = BuildServer(patience=0)
    assert builder.forked(server, "pass") is None
    assert server._running is None


# --- hostile ----------------------------------------------------------------------------------------------------------

HOSTILE = """
    import ctypes, errno, hashlib, os, signal
    libc = ctypes.CDLL(None, use_errno=True)
    server = os.getppid()
    worked = []

    def attempt(name, action):
        try:
            action()
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOENT, errno.EINVAL, errno.ESRCH, errno.EBADF):
                worked.append(f"{name}: {error}")
        else:
            worked.append(name)

    def call(result):
        if result == -1:
            raise OSError(ctypes.get_errno(), "refused")

    for number in [number for number in map(int, os.listdir("/proc/self/fd")) if number > 2]:
        attempt(f"use descriptor {number}", lambda number=number: os.fstat(number))
    attempt("kill the server", lambda: os.kill(server, signal.SIGKILL))
    attempt("stop the server", lambda: os.kill(server, signal.SIGSTOP))
    attempt("become root", lambda: os.setuid(0))
    attempt("become root by all", lambda: os.setresuid(0, 0, 0))
    attempt("become its group", lambda: os.setgid(0))
    attempt("take groups", lambda: os.setgroups([0]))
    attempt("attach to the server", lambda: call(libc.ptrace(16, server, None, None)))
    attempt("seize the server", lambda: call(libc.ptrace(0x4206, server, None, None)))
    attempt("read its memory", lambda: open(f"/proc/{server}/mem", "rb").close())
    attempt("write its memory", lambda: open(f"/proc/{server}/mem", "r+b").close())
    attempt("list its descriptors", lambda: os.listdir(f"/proc/{server}/fd"))
    attempt("reach its root", lambda: os.listdir(f"/proc/{server}/root/"))
    attempt("read its environment", lambda: open(f"/proc/{server}/environ").close())
    attempt("take a descriptor of it", lambda: call(libc.syscall(438, os.pidfd_open(server), 0, 0)))
    attempt("write its priority", lambda: os.setpriority(os.PRIO_PROCESS, server, 19))
    attempt("limit it", lambda: __import__("resource").prlimit(server, 7, (0, 0)))
    attempt("mount", lambda: call(libc.mount(b"none", b"/mnt", b"tmpfs", 0, None)))
    attempt("leave the namespaces", lambda: call(libc.setns(os.open(f"/proc/{server}/ns/mnt", os.O_RDONLY), 0)))
    attempt("read the password file", lambda: open("/etc/shadow").close())
    half, digest = os.environ["HALF"].encode(), os.environ["DIGEST"]
    with open("/proc/self/maps") as maps:
        places = [line.split()[:2] for line in maps if "[v" not in line]
    with open("/proc/self/mem", "rb", 0) as memory:
        for begin, end in [place.split("-") for place, rights in places if rights.startswith("rw")]:
            memory.seek(int(begin, 16))
            found = memory.read(int(end, 16) - int(begin, 16))
            at = found.find(half)
            while at >= 0:
                after = found[at + len(half) : at + 2 * len(half)]
                if hashlib.sha256(after).hexdigest() == digest:
                    worked.append(f"another instance's secret is in memory")
                at = found.find(half, at + 1)
    open("made", "w").write("\\n".join(worked) or "nothing")
"""


def test_hostile_release_gets_nothing(server, release, instance):
    # the secret of the instance before; what is looked for is half of it, so that the search does not find itself
    half, other = os.urandom(16).hex(), os.urandom(16).hex()
    assert Builder(release, instance, SECRET=half + other).forked(server, "pass").ok
    pid = server._running.process.pid
    digest = hashlib.sha256(other.encode()).hexdigest()
    hostile = Builder(release, instance, HALF=half, DIGEST=digest)
    outcome = hostile.forked(server, HOSTILE)
    assert outcome.ok, hostile.log.read_text()
    assert (instance / "made").read_text() == "nothing"
    assert server._running.process.pid == pid
    assert Builder(release, instance).forked(server, "pass").ok


def test_build_that_makes_the_server_its_debugger_ends_in_time(server, builder, monkeypatch):
    monkeypatch.setattr(execute, "_GRACE", 0.2)
    code = """
        import ctypes, os, signal
        assert ctypes.CDLL(None).ptrace(0, 0, None, None) == 0  # PTRACE_TRACEME
        os.kill(os.getpid(), signal.SIGSTOP)
    """
    outcome = builder.forked(server, code, timeout=1.0)
    assert outcome.cut_short == "took too long"
    assert not members()
    assert builder.forked(server, "pass").ok


def test_server_has_one_thread_and_little_open(server):
    pid = server._running.process.pid
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    wait(
        lambda: len(list(Path(f"/proc/{pid}/fd").iterdir())) == 4,
        "the standard streams and control to be all that is open",
    )
    environment = set(procfs.words(pid, "environ")) - {b""}
    assert {word.partition(b"=")[0] for word in environment} == {b"PATH", b"LANG", b"PYTHONNOUSERSITE"}


# --- which releases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        (f"#!{sys.executable}", "#!/usr/bin/python3"),
        (str(build_server.packages()), "/srv/builds/software/release/eggs/zc.buildout-6.0.1-py3.11.egg"),
        ("  ]", "  '/srv/builds/software/release/eggs/extension-1.0.egg',\n  ]"),
        ("import pkg_resources", "import pkg_resources, os"),
        ("main())", "main())\n"),
        ("main()", "main(['-o'])"),
    ],
)
def test_only_our_own_script_fits(release, old, new):
    script = release / "bin" / "buildout"
    text = script.read_text()
    config = SimpleNamespace(software_root=release.parent, software_user=pwd.getpwuid(0).pw_name)
    try:
        script.write_text(text.replace(old, new) if old else text)
        assert build_server.fits(config, release) is (not old)
    finally:
        script.write_text(text)


def test_script_that_is_a_link_does_not_fit(release):
    config = SimpleNamespace(software_root=release.parent, software_user="root")
    script, kept = release / "bin" / "buildout", release / "bin" / "kept"
    script.rename(kept)
    try:
        assert not build_server.fits(config, release)
        script.symlink_to("kept")
        assert not build_server.fits(config, release)
        script.unlink()
        os.mkfifo(script)
        assert not build_server.fits(config, release)
        script.unlink()
    finally:
        kept.rename(script)
    assert build_server.fits(config, release)


def test_packages_below_the_releases_are_nobodys_to_load(release):
    config = SimpleNamespace(software_root=build_server.packages().parent, software_user="root")
    assert not build_server.fits(config, release)
