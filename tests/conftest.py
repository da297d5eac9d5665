"""What all tests stand on: they run in a throw-away sandbox, and each leaves the machine as it found it.

Also here: a bridge with a router behind it, and a configuration file for a node of its own.
"""

import contextlib
import gc
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import warm_start

from netplan import legacy_tables, nfnetlink
from netplan.legacy_rules import PREFIX
from partitiond import procfs, sandbox

ROOT = Path(__file__).resolve().parent.parent
_HOW = (
    "the tests change users and networks, so they run in a sandbox only: make test, or\n"
    f"  {ROOT}/.build/opt/partitiond/bin/python3 -I -m partitiond.sandbox --bind {ROOT}:{ROOT} --"
    f" sh -c 'cd {ROOT} && exec /opt/partitiond/bin/python3 -m pytest'"
)


def pytest_sessionstart(session):
    if not sandbox.inside():
        pytest.exit(_HOW, returncode=4)
    # a machine that runs has it up; else whether a test passes hangs on which one came before
    subprocess.run(["/usr/sbin/ip", "link", "set", "lo", "up"], check=True)
    warm_start.begin()


def pytest_sessionfinish(session):
    warm_start.end()


# --- where the time goes -----------------------------------------------------------------------------------------------

_SHOWN_FILES = 25
_CPU_STAT = Path(
    "/sys/fs/cgroup/cpu.stat"
)  # the sandbox's own cgroup; there is none where the machine has no cgroup2
_spent = {}


def _busy():
    """Seconds of a processor so far: by all of the sandbox, or where it has no cgroup by us and children waited for."""
    try:
        first = _CPU_STAT.read_text().splitlines()[0]
    except FileNotFoundError:
        return sum(os.times()[:4])
    return int(first.removeprefix("usage_usec ")) / 1e6


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """Add up seconds, and seconds of a processor, of each file."""
    began, before = time.monotonic(), _busy()
    yield
    wall, busy = _spent.get(item.path.name, (0.0, 0.0))
    _spent[item.path.name] = (wall + time.monotonic() - began, busy + _busy() - before)


def pytest_terminal_summary(terminalreporter):
    rows = sorted(_spent.items(), key=lambda one: -sum(one[1]))[:_SHOWN_FILES]
    terminalreporter.section("files that took longest: seconds, of a processor")
    for name, (wall, busy) in rows:
        terminalreporter.line(f"{wall:7.1f} {busy:7.1f}  {name}")
    walls, busies = map(sum, zip(*_spent.values(), strict=True)) if _spent else (0, 0)
    terminalreporter.line(f"{walls:7.1f} {busies:7.1f}  all files")


# --- nothing is left behind -------------------------------------------------------------------------------------------

_GRACE = 3.0
# what libraries and pytest open once and keep: no test's doing
_STANDING_FILES = ("/dev/null", "/dev/urandom", "/dev/random")


def _processes():
    """Children of the tests and orphans, by command; zombies hold nothing but a number.

    By command and not by number: a test may kill what a file's fixture started, and see it started anew.
    """
    found = Counter()
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - names suffice
        try:
            stat = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if stat[0] != b"Z" and int(stat[1]) in (1, os.getpid()) and int(name) != os.getpid():
            text = b" ".join(procfs.command(int(name))).decode(errors="replace")
            found[text] += not warm_start.is_server(text)
    return {f"{command}({number + 1})" for command, count in found.items() for number in range(count)}


def _tables():
    """Names of the nft tables, asked from the kernel: starting ``nft`` for each test would take seconds in all."""
    request = struct.pack("=IHHII", 20, (10 << 8) | 1, 0x301, 1, 0) + bytes(
        4
    )  # NFT_MSG_GETTABLE, request and dump
    found = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netfilter:
        netfilter.send(request)
        while True:
            data = netfilter.recv(65536)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind in (2, 3):  # NLMSG_ERROR (no nf_tables in this kernel), NLMSG_DONE
                    return found
                found.append(data[16:length])
                data = data[(length + 3) & ~3 :]


def _table_names():
    names = set()
    for body in _tables():
        rest = body[4:]
        while len(rest) >= 4:
            length, kind = struct.unpack_from("=HH", rest)
            if kind == 1:  # NFTA_TABLE_NAME
                names.add(f"family {body[0]} " + rest[4:length].rstrip(b"\0").decode(errors="replace"))
            rest = rest[(max(length, 4) + 3) & ~3 :]
    return names


def _legacy_chains():
    """Chains of iptables that the product made; only to ask would make a table, so not without one."""
    return {
        f"{family.name} {chain}"
        for family in legacy_tables.families()
        if legacy_tables.is_there(family)
        for chain in legacy_tables.read(family)
        if chain.startswith(PREFIX)
    }


def _files():
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(path.readlink())
            if target not in _STANDING_FILES:
                found.add(f"{path.name} → {target}")
    return found


def _users():
    return set(Path("/etc/passwd").read_text(errors="surrogateescape").splitlines())


def _mounts():
    # identity, mount point and kind; counters and options may change by themselves
    rows = (line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    # ip(8) makes a mount of /run/netns at the first namespace and leaves it
    return {f"{row[0]} {row[4]}" for row in rows if row[4] != "/run/netns"}


def _pins():
    """What is pinned in the sandbox's own bpffs, and with it in force at its cgroup."""
    return {str(path) for path in Path("/sys/fs/bpf").rglob("*")}


_LOOKS = {
    "pinned BPF objects": _pins,
    "processes": _processes,
    "threads": lambda: set(threading.enumerate()),
    "open files": _files,
    "network links": lambda: {name for _, name in socket.if_nameindex()},
    "nft tables": _table_names,
    "chains of iptables": _legacy_chains,
    "lines of /etc/passwd": _users,
    "mounts": _mounts,
}


def _look():
    return {name: look() for name, look in _LOOKS.items()}


def _new(before):
    """What is there now and was not before."""
    found = {}
    for name, look in _LOOKS.items():
        now = look()
        new = [key for key in now if key not in before[name]]
        if new:
            found[name] = sorted(map(str, new))
    return found


@pytest.fixture(autouse=True)
def no_leaks(request):
    """Fail a test that leaves a process, thread, descriptor, link, user, nft table or mount behind."""
    nfnetlink.close_idle()
    before = _look()
    yield
    nfnetlink.close_idle()
    new = _new(before)
    end = time.monotonic() + _GRACE
    while new and time.monotonic() < end:
        gc.collect()
        time.sleep(0.02)
        new = _new(before)
    if new:
        pytest.fail(
            f"{request.node.name} left behind: "
            + "; ".join(f"{name}: {', '.join(items)}" for name, items in new.items())
        )


# --- a network ----------------------------------------------------------------------------------------------------------


def ip(*lines, namespace=None):
    """Run lines of ``ip`` as one batch, in a named namespace or in ours."""
    where = ["-n", namespace] if namespace else []
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(
        ["/usr/sbin/ip", *where, "-batch", "-"], input=text, text=True, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr


class Bridge:
    """A bridge ``name`` of the node with one Ethernet port, behind which a router sits in a namespace of its own."""

    def __init__(self, name="br0", port="eth0", router="router", prefix="2001:db8:1"):
        self.name, self.port, self.router, self.prefix = name, port, router, prefix
        self.address, self.gateway = f"{prefix}::2", f"{prefix}::1"

    def up(self):
        ip(
            "link set lo up",
            f"netns add {self.router}",
            f"link add {self.name} type bridge",
            f"link set {self.name} up",
            f"link add {self.port} type veth peer name uplink netns {self.router}",
            f"link set {self.port} master {self.name} up",
            f"address add {self.address}/64 dev {self.name} nodad",
            f"route add default via {self.gateway} dev {self.name}",
        )
        ip(
            "link set lo up",
            "link set uplink up",
            f"address add {self.gateway}/64 dev uplink nodad",
            namespace=self.router,
        )

    def down(self):
        links = {name for _, name in socket.if_nameindex()}
        ip(*(f"link delete {name}" for name in (self.port, self.name) if name in links))
        if Path("/run/netns", self.router).exists():
            ip(f"netns delete {self.router}")

    def in_router(self, *command, **options):
        """Run a command in the router's namespace."""
        return subprocess.run(["/usr/sbin/ip", "netns", "exec", self.router, *command], check=True, **options)


@contextlib.contextmanager
def standing_bridge(**names):
    made = Bridge(**names)
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def bridge():
    with standing_bridge() as made:
        yield made


@pytest.fixture(scope="module")
def module_bridge():
    """One for all tests of a file."""
    with standing_bridge() as made:
        yield made


# --- a node -------------------------------------------------------------------------------------------------------------


class NodeFiles:
    """The configuration of a node whose directories all lie below a directory of its own in /srv."""

    def __init__(self, partitions=3, interface="br0", **settings):
        self.root = Path("/srv", f"node-{secrets.token_hex(3)}")
        self.root.mkdir(mode=0o755)
        self.path = self.root / "slapos.cfg"
        self.sections = {
            "slapos": {
                "computer_id": "COMP-1",
                "master_url": "http://127.0.0.1:1/",
                "software_root": self.root / "software",
                "instance_root": self.root / "instance",
            },
            "slapformat": {"interface_name": interface, "partition_amount": partitions},
            "partitiond": {"state_dir": self.state, "log_dir": self.log, "run_dir": self.root / "run"},
        }
        self.write(**settings)

    @property
    def instance(self):
        return self.root / "instance"

    @property
    def state(self):
        return self.root / "state"

    @property
    def log(self):
        return self.root / "log"

    def write(self, **settings):
        """Write the file, with settings given as section={key: value}; None takes a key away."""
        for section, values in settings.items():
            self.sections.setdefault(section, {}).update(values)
        text = "".join(
            f"[{section}]\n"
            + "".join(f"{key} = {value}\n" for key, value in values.items() if value is not None)
            for section, values in self.sections.items()
        )
        self.path.write_text(text)

    def load(self):
        from partitiond import config

        return config.load(self.path)

    @contextlib.contextmanager
    def context(self):
        """The node at work, by the file as it is now; its ledger is closed at the end."""
        from partitiond.context import Context

        made = Context.of(self.load())
        try:
            yield made
        finally:
            made.meters.close()

    def remove(self):
        """End what runs of it, and remove everything; the node need not be whole."""
        from partitiond import teardown

        if self.state.exists() or self.instance.exists():
            with self.context() as context:
                outcome = teardown.run(context, purge=True)
            assert not outcome.failures, outcome.failures
        shutil.rmtree(self.root)


@contextlib.contextmanager
def standing_files(**settings):
    made = NodeFiles(**settings)
    try:
        yield made
    finally:
        made.remove()


@pytest.fixture
def node_config():
    """Make ``NodeFiles``; whatever a test builds with them is taken down at its end."""
    with contextlib.ExitStack() as stack:
        yield lambda partitions=3, **settings: stack.enter_context(
            standing_files(partitions=partitions, **settings)
        )


@pytest.fixture(scope="session")
def standing_node():
    """A context manager of ``NodeFiles``, for who ends them in an order of its own."""
    return standing_files


@pytest.fixture(scope="module")
def module_node_config(module_bridge):
    """One for all tests of a file."""
    with standing_files(interface=module_bridge.name) as made:
        yield made


class Command:
    """The command line from the source tree, as a program."""

    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}  # noqa: RUF012

    def line(self, *arguments):
        return [sys.executable, "-P", "-m", "partitiond", *map(str, arguments)]

    def __call__(self, *arguments, **options):
        """Run it to its end; the result has returncode, stdout and stderr as text."""
        options = {"env": self.environment, "cwd": "/", "timeout": 60, **options}
        if options.keys() <= {"env", "cwd", "timeout"}:
            return warm_start.run(self.line(*arguments), **options)
        return subprocess.run(self.line(*arguments), capture_output=True, text=True, check=False, **options)

    def start(self, *arguments):
        """Start it; the caller ends it."""
        return subprocess.Popen(
            self.line(*arguments),
            env=self.environment,
            cwd="/",
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


@pytest.fixture(scope="session")
def command():
    return Command()
