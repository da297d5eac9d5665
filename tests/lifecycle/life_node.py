"""A node for the tests of the life cycle: the real daemon, a real master, the stock clients, in a directory of its own.

Promises: everything that was started or made is gone after ``end``; every wait is bounded and fails with the daemon's log.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import warm_start
from life_front import Front

from partitiond import execute
from slap_client.documents import parse_computer
from slap_client.marshal import loads

ROOT = Path(__file__).resolve().parents[2]
COMPUTER = "COMP-LIFE"
BRIDGE = "br-life"
SLAPOS = Path(sys.prefix) / "master" / "bin" / "slapos"
ENVIRONMENT = {"PATH": execute.PATH, "LANG": "C.UTF-8", "HOME": "/root"}

CONFIGURATION = """\
[slapos]
computer_id = {computer}
master_url = {master}
software_root = {base}/software
instance_root = {base}/instance

[slapformat]
interface_name = {bridge}
partition_amount = {partitions}

[partitiond]
bridge = {bridge}
offline_builds = true
state_dir = {base}/state
log_dir = {base}/log
run_dir = {base}/run
"""


@dataclass(frozen=True)
class Said:
    """How a verb ended."""

    status: int
    value: dict
    text: str


def ip(*lines):
    for line in lines:
        subprocess.run(["/usr/sbin/ip", *line.split()], check=True, capture_output=True)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@functools.cache
def _schema(name):
    path = ROOT / "partitiond" / "schemas" / f"{name}.json"
    return jsonschema.Draft202012Validator(json.loads(path.read_text())) if path.is_file() else None


def valid(value):
    """Check an object of the command line against the schema that the package ships."""
    _, name, version = value["schema"].split("/")
    assert version == "1"
    schema = _schema(name)
    if schema is not None:
        schema.validate(value)
    return value


def pids():
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def processes_of(uid):
    """{pid: command line} of a user's processes that are alive."""
    found = {}
    for pid in pids():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            if int(status.partition("\nUid:")[2].split()[0]) == uid and "\nState:\tZ" not in status:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                found[pid] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def named(program):
    """Pids of what runs a program of that name."""
    found = []
    for pid in pids():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().startswith(program) and alive(pid):
                found.append(pid)
    return sorted(found)


class Node:
    """One node and its master; ``settings`` go to the section [partitiond]."""

    def __init__(self, name, partitions=3, **settings):
        self.base = Path("/srv/life", name)
        self.configuration = self.base / "slapos.cfg"
        self.daemon_log = self.base / "daemon.log"
        self.socket = self.base / "run" / "control.sock"
        self._partitions, self._settings = partitions, settings
        self._master = self.front = self.daemon = None

    # --- up and down

    def begin(self):
        self.base.mkdir(parents=True)
        self.bring_up_links()
        port = free_port()
        master = f"http://127.0.0.1:{port}/"
        self._write_master(master, port)
        self._start_master()
        self.front = Front(master, free_port())
        text = CONFIGURATION.format(
            computer=COMPUTER,
            master=self.front.url,
            base=self.base,
            bridge=BRIDGE,
            partitions=self._partitions,
        )
        text += "".join(f"{key} = {value}\n" for key, value in self._settings.items())
        self.configuration.write_text(text)
        self.wait(self._master_answers, "the master to answer")

    @staticmethod
    def bring_up_links():
        ip(
            "link set lo up",
            f"link add {BRIDGE} type bridge",
            "link add life0 type veth peer name life1",
            f"link set life0 master {BRIDGE} up",
            "link set life1 up",
            f"link set {BRIDGE} up",
            f"address add 2001:db8:11fe::1/64 dev {BRIDGE} nodad",
        )

    def _start_master(self):
        with (self.base / "master.log").open("ab") as log:
            self._master = subprocess.Popen(
                [SLAPOS, "proxy", "start", "--cfg", self.base / "proxy.cfg"],
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def renew_master(self):
        """Let a master take its place that knows nothing yet."""
        self._master.terminate()
        self._master.wait(20)
        (self.base / "proxy.db").unlink()
        self._start_master()
        self.wait(self._master_answers, "the master to answer")

    def _write_master(self, master, port):
        roots = f"software_root = {self.base}/software\ninstance_root = {self.base}/instance\n"
        (self.base / "client.cfg").write_text(f"[slapos]\nmaster_url = {master}\n\n[slapconsole]\n")
        (self.base / "proxy.cfg").write_text(
            f"[slapos]\ncomputer_id = {COMPUTER}\nmaster_url = {master}\n{roots}\n"
            f"[slapproxy]\nhost = 127.0.0.1\nport = {port}\ndatabase_uri = {self.base}/proxy.db\n"
        )

    def _master_answers(self):
        assert self._master.poll() is None, (self.base / "master.log").read_text()
        with contextlib.suppress(OSError):
            return self.front.ask("GET", "getRunId")[0] == 200
        return False

    def start(self, **environment):
        """Start the daemon and wait until it is up."""
        with self.daemon_log.open("ab") as log:
            self.daemon = subprocess.Popen(
                self.line("run"),
                cwd="/",
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait(self._listens, "the daemon to be up", 30)

    def _listens(self):
        assert self.daemon.poll() is None, f"the daemon ended:\n{self.log_tail()}"
        with socket.socket(socket.AF_UNIX) as channel:
            return channel.connect_ex(str(self.socket)) == 0

    def offer(self):
        """Wait until the master knows the partitions."""
        self.wait(lambda: self.front.count("loadComputerConfigurationFromXML"), "the capacity to be posted")

    def kill(self):
        """End the daemon as a crash would."""
        self.daemon.kill()
        self.daemon.wait(10)
        self.daemon = None

    def terminate(self):
        """Ask the daemon to end; return the seconds that it took."""
        began = time.monotonic()
        self.daemon.send_signal(signal.SIGTERM)
        try:
            status = self.daemon.wait(60)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the daemon does not end\n{self.log_tail()}")
        self.daemon = None
        assert status == 0, self.log_tail()
        return time.monotonic() - began

    def end(self):
        """Take everything down, whatever state it is in."""
        problems = []
        for step in (self._end_node, self._end_master, self._end_links, lambda: shutil.rmtree(self.base)):
            try:
                step()
            except (OSError, subprocess.SubprocessError, AssertionError) as error:
                problems.append(f"{type(error).__name__}: {error}")
        assert not problems, "\n".join(problems)

    def _end_node(self):
        if not self.configuration.exists():
            return
        if self.daemon is not None and self.daemon.poll() is not None:
            self.daemon = None
        try:
            self.forget_answers()
            self.cli("teardown", "--purge", timeout=120)
            if self.daemon is not None:
                self.daemon.wait(30)
        finally:
            if self.daemon is not None and self.daemon.poll() is None:
                self.kill()

    def forget_answers(self):
        """Let the master answer as it should."""
        self.front.answers.clear()

    def _end_master(self):
        if self.front is not None:
            self.front.close()
        if self._master is not None:
            self._master.terminate()
            self._master.wait(20)

    @staticmethod
    def _end_links():
        links = {name for _, name in socket.if_nameindex()}
        ip(*(f"link delete {name}" for name in ("life0", BRIDGE) if name in links))

    # --- the command line

    @property
    def environment(self):
        return {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}

    def line(self, *arguments, configuration=None):
        own = ["-c", str(configuration or self.configuration)]
        return [sys.executable, "-P", "-m", "partitiond", *own, *arguments]

    def begin_cli(self, *arguments, configuration=None):
        """Start a verb; ``end_cli`` gives what it said."""
        return subprocess.Popen(
            self.line("--json", *arguments, configuration=configuration),
            cwd="/",
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end_cli(self, process, expect, timeout=60):
        try:
            out, text = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            pytest.fail(f"{process.args} does not end\n{self.log_tail()}")
        return self._said(process, out, text, expect)

    def _said(self, done, out, text, expect):
        told = f"{done.args[5:]} exited {done.returncode}\n{out}\n{text}\n{self.log_tail()}"
        assert expect is None or done.returncode == expect, told
        assert "Traceback" not in text, told
        return Said(done.returncode, valid(json.loads(out)), text)

    def cli(self, *arguments, expect=0, timeout=60, configuration=None):
        """Run a verb; its exit status, its JSON and the absence of a traceback are checked."""
        words = self.line("--json", *arguments, configuration=configuration)
        try:
            done = warm_start.run(words, env=self.environment, timeout=timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{words} does not end\n{self.log_tail()}")
        return self._said(done, done.stdout, done.stderr, expect)

    def plan(self):
        """What apply would do; a plan with operations exits 2."""
        done = warm_start.run(self.line("--json", "plan"), env=self.environment)
        value = valid(json.loads(done.stdout))
        assert done.returncode == (2 if value["operations"] else 0), done.stderr
        return value["operations"]

    def settled(self):
        """Fail unless the plan is empty."""
        left = [f"{one['id']}: {one['reason']} ({one['before']} → {one['after']})" for one in self.plan()]
        assert not left, f"the plan is not empty: {left}\n{self.log_tail()}"

    def partition(self, name):
        value = self.cli("show", name).value
        return value.get("partition", value)

    def partitions(self):
        return {item["id"]: item for item in self.cli("status").value["partitions"]}

    def states(self):
        return {name: item["state"] for name, item in self.partitions().items()}

    # --- the master, as its users see it

    def slapos(self, *arguments):
        words = [SLAPOS, *arguments, "--cfg", self.base / "client.cfg"]
        done = warm_start.run(words, env=ENVIRONMENT)
        assert done.returncode == 0, f"slapos {arguments}: {done.stderr[-2000:]}"

    def supply(self, url):
        self.slapos("supply", url, COMPUTER)

    def request(self, title, url, state=None, kind=None, **parameters):
        words = [f"{key.replace('_', '-')}={value}" for key, value in parameters.items()]
        self.slapos(
            *("request", title, url),
            *(("--type", kind) if kind else ()),
            *(("--state", state) if state else ()),
            *(("--parameters", *words) if words else ()),
        )

    def wishes(self):
        """What the master wants of the node: {partition: document}."""
        document = parse_computer(loads(self.front.wishes(COMPUTER)))
        return {item.partition_id: item for item in document.partitions}

    def tree(self, title):
        """An instance as the master's own interface shows it."""
        request = urllib.request.Request(  # noqa: S310 - the loopback
            f"{self.front.master}slapos.get.v0.instance_tree",
            json.dumps({"title": title}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - the loopback
            return json.load(answer)

    def holder(self, title):
        """The partition that the master gave to an instance."""
        names = [
            name for name, item in self.wishes().items() if item.instance_title == title and not item.free
        ]
        assert len(names) == 1, f"{title} is in {names}"
        return names[0]

    def release(self, name="release", profile="software.cfg", build=""):
        """A Software Release of its own; ``build`` says how its build behaves (see release/software.py)."""
        target = self.base / name
        shutil.copytree(ROOT / "tests" / "lifecycle" / "release", target)
        self.build_says(target / profile, build)
        return str(target / profile)

    @staticmethod
    def build_says(url, words):
        Path(url).with_name("build").write_text(words)

    # --- looking

    def software(self, url):
        return self.base / "software" / hashlib.md5(url.encode(), usedforsecurity=False).hexdigest()

    def buildouts(self, partition):
        """How often the instance's buildout was run."""
        log = self.base / "log" / partition / "buildout.log"
        return log.read_text().count(f"configuring {partition}") if log.exists() else 0

    def as_user(self, item, *command):
        """Start a program as a partition's user; its output and errors are one text."""
        uid = str(item["user"]["uid"])
        return subprocess.Popen(
            [*(execute.SETPRIV, "--reuid", uid, "--regid", uid, "--clear-groups", "--"), *command],
            cwd="/",
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def page(self, item):
        """What the instance serves, as its own user sees it; None while it does not answer."""
        program = "import sys, urllib.request as r; sys.stdout.write(r.urlopen(sys.argv[1], timeout=5).read().decode())"
        started = self.as_user(item, "/usr/bin/python3", "-I", "-c", program, f"http://{item['ipv4']}:8000/")
        said, _ = started.communicate(timeout=30)
        return said if started.returncode == 0 else None

    def tenants(self):
        """Everything that supervisord runs: {(partition, process): pid}."""
        return {
            (name, process["name"]): process["pid"]
            for name, item in self.partitions().items()
            for process in item["processes"]
            if process["pid"]
        }

    def log_tail(self, size=4000):
        text = self.daemon_log.read_text(errors="replace") if self.daemon_log.exists() else "(no daemon ran)"
        return f"--- the daemon's log ends:\n{text[-size:]}"

    def wait(self, condition, what, seconds=60.0, pause=0.1):
        """Wait until a condition holds and return what it gave."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"waited {seconds:.0f} s for {what}\n{self.log_tail()}")
            time.sleep(pause)
        return found

    def wait_for_state(self, partition, *states):
        """Wait until a partition is in one of these states and return it."""

        def there():
            item = self.partition(partition)
            return item if item["state"] in states else None

        return self.wait(there, f"{partition} to be {' or '.join(states)}")
