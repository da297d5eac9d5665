"""``make bench-life``: what instances cost, beside slapos.core, in one run on this machine, with slapproxy as master of both.

A release of one service and one promise, built from our own wheels without a network. For each number of instances:

- **first processing**: one pass over so many new instances, from asking the master to the last report (wall and CPU, each);
- **no change**: a pass over all of them, as the daemon takes it (``POST /1/sync``) and by the command ``sync instances``;
- **one changed**: a pass after one of them was asked for with another parameter.

CPU is that of the daemon or command and all that it started, supervisord not among them. Requests and bytes (both ways, TCP
payload) are counted on the way to the master. Per day: the passes that each makes by its own schedule when nothing happens.
slapos.core runs ``slapos node software|instance`` for fewer instances, of as many partitions: its passes take longer. Its
promises run in its passes, ours in a lane of their own.
On Python before 3.12 its grid can only be imported with importlib.resources.files() taught to take a module; that is said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # started with -P
import node

from partitiond import sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path("/srv/bench")
PEER = Path(__file__).resolve().parents[1] / "peer"  # what Python before 3.12 lacks for slapos.core
COMPUTER = "COMP-BENCH"
RELEASE = ROOT / "release" / "software.cfg"
MASTER = Path(sys.prefix) / "master" / "bin"
WHEELS = Path(sys.prefix) / "share" / "wheels"
NEVER = 1_000_000
DAY = 86400

SOFTWARE = """\
[buildout]
parts = instance eggs
find-links += {wheels}
index = file:///nonexistent/
allow-hosts =
versions = versions

[eggs]
recipe = zc.recipe.egg:eggs
eggs = slapos.recipe.template

[instance]
recipe = slapos.recipe.template
url = {here}/instance.cfg.in
output = ${{buildout:directory}}/instance.cfg
mode = 0644

[versions]
setuptools = 75.9.1
slapos.recipe.template = 5.1
zc.buildout = 4.2.0
zc.recipe.egg = 3.0.0
"""

INSTANCE = """\
[buildout]
parts = service promise
eggs-directory = ${buildout:eggs-directory}
develop-eggs-directory = ${buildout:develop-eggs-directory}
versions = versions

[versions]
slapos.recipe.template = 5.1

[service]
recipe = slapos.recipe.template
output = $${buildout:directory}/etc/service/sleeper
mode = 0700
inline =
  #!/bin/sh
  exec /bin/sleep 1000000

[promise]
recipe = slapos.recipe.template
output = $${buildout:directory}/etc/promise/fine
mode = 0700
inline =
  #!/bin/sh
  exit 0
"""

# by the master's interpreter: URL, action, and what that needs; far faster than a command for each
CLIENT = """\
import sys
from slapos.slap import slap
url, action, computer, release, *words = sys.argv[1:]
client = slap()
client.initializeConnection(url)
if action == "supply":
    client.registerSupply().supply(release, computer)
for word in words:
    name, _, text = word.partition("=")
    client.registerOpenOrder().request(
        software_release=release, partition_reference=name, partition_parameter_kw={"text": text})
"""


# --- between a node and its master ------------------------------------------------------------------------------------


class Count(NamedTuple):
    """Requests and bytes, both ways."""

    requests: int
    size: int

    def __sub__(self, other: Count) -> Count:
        return Count(self.requests - other.requests, self.size - other.size)


class Counter:
    """Passes a master's bytes on, and counts them."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._lock = threading.Lock()
        self.count = Count(0, 0)
        self.capacity = b""  # the request by which a node has said what it has
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            ours, _ = self._listener.accept()
            theirs = socket.create_connection(("127.0.0.1", self._target))
            for one, other, asking in ((ours, theirs, True), (theirs, ours, False)):
                threading.Thread(target=self._copy, args=(one, other, asking), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket, asking: bool) -> None:
        keeping = False
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                heads = data.count(b" HTTP/1.1\r\n") if asking else 0
                with self._lock:
                    self.count = Count(self.count.requests + heads, self.count.size + len(data))
                if heads:
                    keeping = b"loadComputerConfigurationFromXML" in data
                    self.capacity = b"" if keeping else self.capacity
                self.capacity += data if keeping else b""
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Master:
    """A slapproxy of its own, reached through a counter."""

    def __init__(self, name: str) -> None:
        self.base = ROOT / name
        self.base.mkdir()
        port = free_port()
        self.direct = f"http://127.0.0.1:{port}/"
        self.counter = Counter(port)
        self.url = f"http://127.0.0.1:{self.counter.port}/"
        configuration = self.base / "proxy.cfg"
        configuration.write_text(
            f"[slapos]\ncomputer_id = {COMPUTER}\nmaster_url = {self.direct}\n"
            f"software_root = {self.base}/software\ninstance_root = {self.base}/instance\n"
            f"[slapproxy]\nhost = 127.0.0.1\nport = {port}\ndatabase_uri = {self.base}/proxy.db\n"
        )
        with (self.base / "proxy.log").open("wb") as log:
            self._process = subprocess.Popen(
                [MASTER / "slapos", "proxy", "start", "--cfg", configuration],
                env=node.ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + 60
        while True:
            with socket.socket() as channel:
                if channel.connect_ex(("127.0.0.1", port)) == 0:
                    return
            if time.monotonic() > end:
                sys.exit(f"slapproxy does not start: {(self.base / 'proxy.log').read_text()}")
            time.sleep(0.1)

    def ask(self, action: str, *words: str) -> None:
        """What its users ask for; not counted."""
        command = [
            MASTER / "python3",
            "-I",
            "-W",
            "ignore",
            "-c",
            CLIENT,
            self.direct,
            action,
            COMPUTER,
            str(RELEASE),
        ]
        done = subprocess.run(
            [*command, *words], env=node.ENVIRONMENT, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"the master refuses: {done.stderr[-2000:]}")

    def post(self, request: bytes) -> None:
        """Send a whole request as it was sent to another master."""
        head, _, body = request.partition(b"\r\n\r\n")
        lines = [
            line for line in head.split(b"\r\n") if not line.lower().startswith((b"connection:", b"host:"))
        ]
        host, port = self.direct.split("/")[2].split(":")
        with socket.create_connection((host, int(port))) as channel:
            channel.sendall(
                b"\r\n".join([*lines, b"Host: master", b"Connection: close"]) + b"\r\n\r\n" + body
            )
            answer = channel.makefile("rb").read()
        if b" 200 " not in answer.split(b"\r\n")[0]:
            sys.exit(f"the master refuses the capacity: {answer[:500]!r}")

    def end(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


# --- figures ----------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """One measured pass."""

    wall: float
    cpu: float
    asked: Count


@dataclass
class Table:
    """The rows so far; ``idle`` is what one pass without change asks of the master, by whose."""

    idle: dict[str, Count] = field(default_factory=dict)

    def __post_init__(self) -> None:
        print(
            f"{'':<52}{'wall s':>9}{'each':>8}{'CPU s':>8}{'each':>8}{'requests':>10}{'KiB':>9}", flush=True
        )

    @staticmethod
    def row(what: str, costs: list[Cost], each: int = 1) -> None:
        """Print medians; ``each`` of so many."""
        wall = statistics.median(cost.wall for cost in costs)
        cpu = statistics.median(cost.cpu for cost in costs)
        asked = costs[-1].asked
        per = f"{wall / each:>8.3f}" if each > 1 else f"{'':>8}"
        per_cpu = f"{cpu / each:>8.3f}" if each > 1 else f"{'':>8}"
        print(
            f"{what:<52}{wall:>9.3f}{per}{cpu:>8.2f}{per_cpu}{asked.requests:>10}{asked.size / 1024:>9.1f}",
            flush=True,
        )


def children() -> float:
    """Processor seconds of all that was started here and has ended."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def children_cpu(pid: int) -> float:
    """Processor seconds of a process and of its children that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def tree_cpu(pid: int) -> float:
    """The same of a process and its living children: the server of builds has children of its own."""
    found = children_cpu(pid)
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # threads and children end
            found += sum(map(children_cpu, map(int, (task / "children").read_text().split())))
    return found


# --- ours -------------------------------------------------------------------------------------------------------------


class Ours:
    """partitiond, as a daemon that takes its passes when it is asked."""

    def __init__(self, partitions: int, source: str) -> None:
        self.master = Master("ours")
        self.configuration = ROOT / "slapos.cfg"
        self.configuration.write_text(
            f"[slapos]\ncomputer_id = {COMPUTER}\nmaster_url = {self.master.url}\n"
            f"software_root = {ROOT}/software\ninstance_root = {ROOT}/instance\n"
            f"[slapformat]\ninterface_name = {node.BRIDGE}\npartition_amount = {partitions}\n"
            f"[partitiond]\nbridge = {node.BRIDGE}\noffline_builds = true\nmeter_interval = 100000\n"
            "software_interval = 100000\ninstances_interval = 100000\n"
        )
        self._line = [sys.executable, "-P", "-m", "partitiond"] if source else [node.program()]
        self._env = {**node.ENVIRONMENT, **({"PYTHONPATH": source} if source else {})}
        self._process: subprocess.Popen[bytes] | None = None

    def command(self, *words: str) -> list[str]:
        """A quiet command."""
        return [*self._line, "-q", "-c", str(self.configuration), *words]

    def begin(self) -> bytes:
        """Start the daemon; return the request by which it has told the master what it has."""
        with (ROOT / "daemon.log").open("wb") as log:
            self._process = subprocess.Popen(self.command("run"), env=self._env, stdout=log, stderr=log)
        end = time.monotonic() + 120
        while not self.master.counter.capacity:
            if self._process.poll() is not None or time.monotonic() > end:
                sys.exit(f"the daemon does not start: {(ROOT / 'daemon.log').read_text()[-3000:]}")
            time.sleep(0.05)
        time.sleep(node.SETTLED)
        return self.master.counter.capacity

    def sync(self, lane: str, done: int = 0) -> Cost:
        """One pass, in the daemon, which has to do so much."""
        assert self._process is not None
        cpu, before, start = tree_cpu(self._process.pid), self.master.counter.count, time.perf_counter()
        answer = node.control.call(Path("/run/partitiond/control.sock"), "POST", "/1/sync", {"lane": lane})
        wall = time.perf_counter() - start
        if not answer or answer["failures"] or len(answer["done"]) != done:
            sys.exit(f"sync {lane} failed: {json.dumps(answer)[:3000]}")
        return Cost(wall, tree_cpu(self._process.pid) - cpu, self.master.counter.count - before)

    def by_command(self, *words: str) -> Cost:
        """One pass by a command."""
        assert self._process is not None
        cpu, before = tree_cpu(self._process.pid), self.master.counter.count
        own, start = children(), time.perf_counter()
        done = subprocess.run(
            self.command(*words), env=self._env, capture_output=True, text=True, check=False
        )
        wall = time.perf_counter() - start
        if done.returncode != 0:
            sys.exit(f"{words} exited {done.returncode}: {done.stderr[-2000:]}")
        cpu = tree_cpu(self._process.pid) - cpu + children() - own
        return Cost(wall, cpu, self.master.counter.count - before)

    def end(self) -> None:
        """Take everything down."""
        if self._process is not None:
            subprocess.run(
                self.command("teardown", "--purge"), env=self._env, check=False, capture_output=True
            )
            self._process.wait(60)
        self.master.end()


def ours(table: Table, counts: list[int], repetitions: int, source: str) -> Iterator[bytes]:
    """Measure partitiond; between yields the node stands, with what it has told its master."""
    it = Ours(max(counts), source)
    try:
        yield it.begin()
        it.master.ask("supply")
        table.row("partitiond, build of the software", [it.sync("software", 1)])
        there = 0
        for count in sorted(counts):
            it.master.ask("request", *(f"i{number}=first" for number in range(there, count)))
            title = f"partitiond, first processing of {count - there}{' more' if there else ''}"
            table.row(title, [it.sync("instances", count - there)], count - there)
            there = count
            same = [it.sync("instances") for _ in range(repetitions)]
            table.row(f"partitiond, no change, {count}, in the daemon", same)
            table.row(
                f"partitiond, no change, {count}, sync instances",
                [it.by_command("sync", "instances") for _ in range(repetitions)],
            )
            changed = []
            for one in range(repetitions):
                it.master.ask("request", f"i{one}=changed of {count}")
                changed.append(it.sync("instances", 1))
            table.row(f"partitiond, one changed of {count}, in the daemon", changed)
        table.idle["partitiond"] = same[-1].asked
        table.idle["partitiond, software"] = it.sync("software").asked
        yield b""
    finally:
        it.end()


# --- slapos.core ------------------------------------------------------------------------------------------------------


class Peer:
    """``slapos node``, on the users that our node has; its directories are made as ours are."""

    def __init__(self, partitions: int, capacity: bytes) -> None:
        self.master = Master("theirs")
        self.master.post(capacity)
        base = self.master.base
        for name in ("software", "instance"):
            (base / name).mkdir()
        shutil.chown(base / "software", "slapsoft", "slapsoft")
        for index in range(partitions):
            place = base / "instance" / f"slappart{index}"
            place.mkdir()
            user = pwd.getpwnam(f"slapuser{index}")
            os.chown(place, user.pw_uid, user.pw_gid)
            place.chmod(0o750)
        self._configuration = base / "slapos.cfg"
        self._configuration.write_text(
            f"[slapos]\ncomputer_id = {COMPUTER}\nmaster_url = {self.master.url}\n"
            f"software_root = {base}/software\ninstance_root = {base}/instance\n"
            f"pidfile_software = {base}/sr.pid\npidfile_instance = {base}/cp.pid\npidfile_report = {base}/ur.pid\n"
            "software_min_free_space = 1M\ninstance_min_free_space = 1M\n"
        )
        old = subprocess.run(
            [MASTER / "python3", "-c", "import sys; sys.exit(sys.version_info < (3, 12))"], check=False
        ).returncode
        if old:
            print(
                "slapos.core: on a Python before 3.12, with importlib.resources.files() taught to take a module"
            )
        self._env = {**node.ENVIRONMENT, "PYTHONPATH": str(PEER)}

    def run(self, what: str) -> Cost:
        """One pass."""
        command = [str(MASTER / "slapos"), "node", what, "--cfg", str(self._configuration)]
        cpu, before, start = children(), self.master.counter.count, time.perf_counter()
        with (self.master.base / "node.log").open("ab") as log:
            status = subprocess.run(command, env=self._env, stdout=log, stderr=log, check=False).returncode
        wall = time.perf_counter() - start
        if status != 0:
            sys.exit(
                f"slapos node {what} exited {status}: {(self.master.base / 'node.log').read_text()[-3000:]}"
            )
        return Cost(wall, children() - cpu, self.master.counter.count - before)

    def end(self) -> None:
        """End its supervisord and the master."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.master.base / "instance" / "var" / "run" / "supervisord.pid").read_text())
            os.kill(pid, signal.SIGTERM)
            end = time.monotonic() + 60
            while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
                time.sleep(0.1)
        self.master.end()


def peer(table: Table, count: int, repetitions: int, capacity: bytes) -> None:
    """Measure slapos.core."""
    it = Peer(count, capacity)
    try:
        it.master.ask("supply")
        table.row("slapos.core, build of the software", [it.run("software")])
        it.master.ask("request", *(f"i{number}=first" for number in range(count)))
        table.row(f"slapos.core, first processing of {count}", [it.run("instance")], count)
        same = [it.run("instance") for _ in range(repetitions)]
        table.row(f"slapos.core, no change, {count}", same)
        changed = []
        for one in range(min(2, repetitions)):
            it.master.ask("request", f"i{one}=changed {one}")
            changed.append(it.run("instance"))
        table.row(f"slapos.core, one changed of {count}", changed)
        table.idle["slapos.core"] = same[-1].asked
        table.idle["slapos.core, software"] = it.run("software").asked
    finally:
        it.end()


def per_day(table: Table, most: int, peers: int) -> None:
    """What nodes at rest ask in a day: ours by its default intervals, slapos.core by the packaged crontab, each minute."""
    print("\nat rest, a day, by what one pass without change has asked above:")
    for who, count, instances, software in (
        ("partitiond", most, DAY / 300, DAY / 300),
        ("slapos.core", peers, DAY / 60, DAY / 60),
    ):
        if who not in table.idle:
            continue
        one, other = table.idle[who], table.idle[f"{who}, software"]
        requests = one.requests * instances + other.requests * software
        size = one.size * instances + other.size * software
        line = f"{who}, {count} instances on {most} partitions"
        print(f"  {line:<48}{requests:>10.0f} requests{size / 2**20:>10.1f} MiB", flush=True)


def release() -> None:
    """Write the release."""
    RELEASE.parent.mkdir(parents=True)
    RELEASE.write_text(SOFTWARE.format(wheels=WHEELS, here=RELEASE.parent))
    RELEASE.with_name("instance.cfg.in").write_text(INSTANCE)


def bench(counts: list[int], peers: int, repetitions: int, source: str) -> None:
    """Measure and print."""
    ROOT.mkdir(parents=True)
    release()
    table = Table()
    steps = ours(table, counts, repetitions, source)
    capacity = next(steps)
    next(steps)
    if peers:
        peer(table, peers, max(2, repetitions // 2), capacity)
    steps.close()  # type: ignore[attr-defined]
    per_day(table, max(counts), peers)


if __name__ == "__main__":
    if os.geteuid() != 0 or not sandbox.inside():
        sys.exit("make bench-life runs this in private namespaces")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "counts", nargs="*", type=int, default=[20, 100], help="instances, altogether, rising"
    )
    parser.add_argument("--peer", type=int, default=20, help="instances for slapos.core; 0: without it")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--source", default="", help="run the sources there, not what is installed")
    options = parser.parse_args()
    node.scene()
    bench(options.counts, options.peer, options.repetitions, options.source)
