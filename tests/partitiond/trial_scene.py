"""A node with one uplink, and the operator at its other end, who loses it with a bridge that lets nothing through.

The bridge is the operator's own and speaks the spanning tree protocol: a new port of it forwards nothing for a minute.
"""

import contextlib
import difflib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

from network_scene import inside

from partitiond import converge, privacy, programs, trial
from partitiond.context import Context
from partitiond.state import InstanceState

NODE4, NODE6, OPERATOR4, OPERATOR6 = "192.0.2.2", "2001:db8:1::2", "192.0.2.1", "2001:db8:1::1"
PATIENCE = 20.0
WRONG = {"bridge": "br0", "bridge_ports": "eth0"}
RIGHT = {"bridge": "br1", "bridge_ports": "eth0"}


def ip(*lines, namespace=None):
    where = ["-n", namespace] if namespace else []
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(
        ["/usr/sbin/ip", *where, "-batch", "-"], input=text, text=True, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def said(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wait(condition, what, seconds=PATIENCE, pause=0.02):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(pause)
    return found


def at_operator():
    """What is opened in the block is in the operator's network."""
    return inside("operator")


def link_local_on(link):
    """Wait for what the kernel does by itself and in its own time, so that it is not taken for something else."""
    table = ("/usr/sbin/ip", "-6", "route", "show", "table", "local")
    wait(lambda: f"local fe80::5054:ff:fe00:1 dev {link}" in said(*table), "the link-local address")


class Uplink:
    """The scene; ``server`` listens on the node, as sshd would."""

    def __init__(self):
        self.server = None

    def up(self):
        ip(
            "netns add operator",
            "link set lo up",
            "link add eth0 type veth peer name wire netns operator",
            "link set eth0 address 52:54:00:00:00:01 alias uplink",
            # in hundredths of a second: twice that passes before anything does
            "link add br0 address 52:54:00:00:00:02 type bridge stp_state 1 forward_delay 3000",
        )
        for name in ("eth0", "br0"):
            # link-local addresses are not tentative for a while: what is compared stands still
            Path("/proc/sys/net/ipv6/conf", name, "dad_transmits").write_text("0")
        ip(
            "link set eth0 up",
            "link set br0 up",
            "address add 2001:db8:77::1/64 dev br0 nodad",
            f"address add {NODE4}/24 brd + dev eth0",
            "address add 192.0.2.9/24 dev eth0 label eth0:1",
            f"address add {NODE6}/64 dev eth0 nodad",
            f"route add default via {OPERATOR4} metric 50",
            f"route add 203.0.113.0/24 via {OPERATOR4} proto static",
            f"route add default via {OPERATOR6} dev eth0 metric 300",
        )
        ip(
            "link set lo up",
            "link set wire up",
            f"address add {OPERATOR4}/24 dev wire",
            f"address add {OPERATOR6}/64 dev wire nodad",
            namespace="operator",
        )
        link_local_on("eth0")
        self.server = socket.create_server(("::", 2222), family=socket.AF_INET6, dualstack_ipv6=True)

    def close(self):
        if self.server is not None:
            self.server.close()
        links = {name for _, name in socket.if_nameindex()}
        ip(*(f"link delete {name}" for name in ("eth0", "br0", "br1") if name in links))
        if Path("/run/netns/operator").exists():
            ip("netns delete operator")

    def reached(self, address=NODE4, patience=0.3):
        """Whether the operator reaches the node."""
        with at_operator():
            client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        with client:
            client.settimeout(patience)
            try:
                client.connect((address, 2222))
            except TimeoutError:
                return False
            except OSError as error:
                if error.errno != errno.EHOSTUNREACH:
                    raise
                return False
            self.server.accept()[0].close()
            return True

    @contextlib.contextmanager
    def session(self, address):
        """What the operator is logged in by; gives a function that says something through it and hears it at the node."""
        with at_operator():
            client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        client.settimeout(PATIENCE)
        client.connect((address, 2222))
        peer, _ = self.server.accept()
        peer.settimeout(PATIENCE)

        def say(text):
            client.sendall(text)
            return lambda: peer.recv(100)

        with client, peer:
            yield say


def reached_again(uplink, address):
    # a try of the operator's in the meantime may still have to fail
    wait(lambda: uplink.reached(address, 1), "the operator to reach the node")


def hurry(node):
    """Let the time of a trial be over in a moment."""
    path, new = node.state / "trial.json", node.state / "hurried.json"
    new.write_text(json.dumps(json.loads(path.read_text()) | {"deadline": trial.now() + 0.05}))
    new.rename(path)


def taken_back(node):
    """Let a trial end, and wait until it is taken back."""
    hurry(node)
    wait(lambda: not trial.is_open(node.state), "the end of the trial")


def machine():
    """What a node changes of the machine, as text that a person would compare."""
    return {
        # a tap has its number and its carrier as it was made, and its carrier is noticed late
        "addresses": re.sub(
            r"\d+: (slaptap\d+: )<.*?>(.*) state \w+", r"\1\2", said("/usr/sbin/ip", "address")
        ),
        "ports": sorted((one["ifname"], one.get("master"), one.get("ifalias")) for one in links()),
        "routes": sorted(said("/usr/sbin/ip", "route", "show", "table", "all").splitlines()),
        "routes6": sorted(said("/usr/sbin/ip", "-6", "route", "show", "table", "all").splitlines()),
        "rules": said("/usr/sbin/ip", "rule"),
        "rules6": said("/usr/sbin/ip", "-6", "rule"),
        "neighbours": said("/usr/sbin/ip", "neighbour", "show", "proxy"),
        # in whatever order they were made
        "filter": "\n".join(sorted(said("/usr/sbin/nft", "list", "tables").splitlines())),
        "users": {name: Path("/etc", name).read_bytes() for name in ("passwd", "group", "shadow", "gshadow")},
        "settings": settings(),
    }


def links():
    return json.loads(said("/usr/sbin/ip", "-json", "-details", "link", "show"))


def settings():
    """All settings of the network that can be read, those of each link included."""
    found = {}
    for path in Path("/proc/sys/net").rglob("*"):
        if path.is_file() and path.name not in _BY_THEMSELVES and "slaptap" not in path.parent.name:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                found[str(path)] = path.read_text("ascii")
    return found


# counted by the kernel, or made up by it anew at each reading
_BY_THEMSELVES = frozenset(("nf_conntrack_count", "stable_secret", "flush"))


def assert_as_before(before):
    differences = []
    for what, now in machine().items():
        texts = [_lines(one) for one in (before[what], now)]
        differences += difflib.unified_diff(*texts, f"{what} before", f"{what} now", n=0, lineterm="")
    assert not differences, "\n".join(differences[:60])


def _lines(value):
    if isinstance(value, dict):
        return [f"{name}: {one!r}" for name, one in sorted(value.items())]
    return value.splitlines() if isinstance(value, str) else [str(one) for one in value]


def as_before(before):
    return machine() == before


def processes():
    """Commands of all that is alive, by pid."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - names suffice
        with contextlib.suppress(OSError):
            state = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()[0]
            if state != b"Z":
                found[int(name)] = Path("/proc", name, "cmdline").read_bytes()
    return found


def guardians():
    """Pids of the guardians that are alive."""
    return [pid for pid, command in processes().items() if b"partitiond.guardian" in command]


class Daemon:
    """The daemon of a node, as a program; ``log`` is what it said."""

    def __init__(self, command, node):
        self.command, self.node = command, node
        self.log_path = node.root / "daemon.log"
        self.process = None

    def start(self):
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command.line("run", "-c", self.node.path),
                env=self.command.environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait(lambda: "is up with" in self.log, "the daemon to be up")

    @property
    def log(self):
        return self.log_path.read_text()

    def end(self, number=signal.SIGTERM):
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None


def instance_runs(node, index):
    """Let a partition have an instance that was configured and started; return the pid of its process."""
    context = Context.of(node.load())
    context.store.save_instance(
        InstanceState(f"slappart{index}", "started", "started", instance_guid="INSTANCE-1", timestamp="1")
    )
    service = node.instance / f"slappart{index}" / "etc" / "service"
    service.mkdir(parents=True)
    script = service / "sleeper"
    script.write_text("#!/bin/sh\nexec /bin/sleep 1000\n")
    script.chmod(0o755)
    partition = converge.observe(context).node.partitions[index]
    privacy.ensure(context, partition)
    context.supervisor.write_group(programs.group(context, partition))
    context.supervisor.update()
    context.supervisor.start_group(partition.id)
    return pid_of(node, index)


def pid_of(node, index):
    context = Context.of(node.load())
    return next((one.pid for one in context.supervisor.processes() if one.group == f"slappart{index}"), None)
