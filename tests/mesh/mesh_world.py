"""Nodes of a mesh without any IPv6, joined by a router: machines of :mod:`partitiond.demo`, without a master.

What is tried here is the mesh, which no master has a part in; how long things take is printed, and never judged.
"""

import contextlib
import ipaddress
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import warm_machines  # noqa: F401 - what it does is done by its import
from json_schemas import validate

from netplan import tinc, tinc_keys
from partitiond.demo import internet
from partitiond.demo.internet import Internet
from partitiond.demo.node import Node

HERE = Path(__file__).resolve().parent
PATIENCE = 90.0
PYTHON = "/usr/bin/python3"
STATE, LOG = Path("/var/lib/partitiond/mesh"), Path("/var/log/partitiond/mesh/tincd.log")
TINC = Path("/etc/opt/slapos/tinc")


def until(found, words, patience=PATIENCE):
    """Wait for something to be true, and return it."""
    deadline = time.monotonic() + patience
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited in vain for {words}"
        time.sleep(0.2)  # most look by a verb
    return value


class Agent:
    """A program that is asked line by line."""

    def __init__(self, words):
        self.process = subprocess.Popen(
            words, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        try:
            assert self.heard() == "ready"
        except AssertionError:
            self.close()
            raise

    def ask(self, value=None, patience=PATIENCE):
        self.say(value)
        return self.heard(patience)

    def say(self, value):
        print(json.dumps(value), file=self.process.stdin, flush=True)

    def heard(self, patience=PATIENCE):
        # each question has one line for an answer, so nothing is left in the buffer that select(2) does not see
        assert select.select([self.process.stdout], [], [], patience)[0], (
            f"no answer: {self.process.args[-6:]}"
        )
        line = self.process.stdout.readline()
        assert line, f"it ended: {self.process.args[-6:]}"
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class MeshNode(Node):
    """A node whose verbs are checked against the schemas that ship."""

    def verb(self, *words, expect=(0,), said=None):
        done = self.run(*self.line("--json", *words), check=False, said=said)
        assert done.returncode in expect, (
            f"{self.name} {words} exited {done.returncode}: {done.stdout}{done.stderr}"
        )
        return validate(json.loads(done.stdout))

    def refuses(self, *words, said=None):
        """Run a verb that fails; the error as it is told."""
        done = self.run(*self.line("--json", *words), check=False, said=said)
        assert done.returncode == 1, f"{self.name} {words} exited {done.returncode}: {done.stdout}"
        assert "Traceback" not in done.stderr
        return validate(json.loads(done.stdout))["error"]

    def export(self):
        return self.say("mesh", "export")

    def take_in(self, *blocks, expect=(0,), words=()):
        return self.verb("mesh", "import", *words, "-", said="".join(blocks), expect=expect)

    def peers(self):
        return {one["name"]: one for one in self.verb("mesh", "status")["peers"]}

    def reaches(self, *names):
        """Whether it reaches all of these peers, by a real round trip."""
        found = self.peers()
        return all(found[name]["round_trip_ms"] is not None for name in names)

    def tincd(self):
        """The number of tincd as it is seen from here, 0 while none runs."""
        return next(
            (pid for pid, (_, line) in self.processes().items() if "/tincd " in f"{line} " and "-D" in line),
            0,
        )

    def kill_tincd(self):
        """End it as a crash would; the new one's number, and the seconds until it is there."""
        before = self.tincd()
        os.kill(before, signal.SIGKILL)
        began = time.monotonic()
        now = until(
            lambda: (pid := self.tincd()) and pid != before and pid, f"tincd of {self.name} to be back"
        )
        return now, time.monotonic() - began

    def log_of_tincd(self):
        return self.seen(LOG).read_text()

    def ids(self):
        return [f"slappart{index}" for index in range(int(self.sections["slapformat"]["partition_amount"]))]

    def vpn(self, partition):
        """The address of a partition in the mesh."""
        return self.resource(partition)["vpn_ipv4"]

    def agent(self, *arguments, partition=None):
        """Start a part of ``mesh_agent.py``, as the user of a partition or as root."""
        words = (PYTHON, "-I", "-c", (HERE / "mesh_agent.py").read_text(), *map(str, arguments))
        return Agent(self.words(*(self.as_user(partition, *words) if partition else words)))


class Stranger:
    """A member of the mesh that runs tinc by hand, on a machine without partitiond: it checks and keeps to nothing."""

    DIRECTORY, LOG = "/srv/tinc", "/srv/tincd.log"

    def __init__(self, node, name, subnet, private=None):
        self.node, self.name = node, name
        self.private = private or tinc_keys.make(2048)
        key = tinc_keys.public_of(self.private)
        where = (tinc.Endpoint(node.site.address),)
        self.block = tinc.HostBlock(name, key, (ipaddress.IPv4Network(subnet),), where)
        self._program = None

    @property
    def text(self):
        return tinc.render(self.block, named=True)

    def start(self, *peers, also=(), name=""):
        """Run tincd with the blocks of peers (texts), ``also`` announcing these ranges, or by another name."""
        self.stop()
        name = name or self.name
        found = [one for text in peers for one in tinc.parse(text.encode())]
        top = self.node.seen(self.DIRECTORY)
        shutil.rmtree(top, ignore_errors=True)
        (top / "hosts").mkdir(parents=True)
        connect = "".join(f"ConnectTo = {one.name}\n" for one in found)
        fixed = f"Name = {name}\nInterface = sltinc\nMode = router\nMaxTimeout = 2\n"
        (top / "tinc.conf").write_text(fixed + connect)
        (top / "rsa_key.priv").write_text(self.private)
        (top / "rsa_key.priv").chmod(0o600)
        more = "".join(f"Subnet = {one}\n" for one in also)
        for one in found:
            (top / "hosts" / one.name).write_text(tinc.render(one))
        (top / "hosts" / name).write_text(more + tinc.render(self.block))
        script = f"exec /usr/sbin/tincd -D -d1 -c {self.DIRECTORY} --pidfile=/srv/tincd.pid >{self.LOG} 2>&1"
        self._program = self.node.launch("/bin/sh", "-c", script)
        until(lambda: "Ready" in self.log(), "the tincd by hand to be there")
        address = self.block.node_address
        self.node.run("ip", "link", "set", "sltinc", "up")
        self.node.run("ip", "address", "add", f"{address}/16", "dev", "sltinc")

    def log(self):
        path = self.node.seen(self.LOG)
        return path.read_text() if path.exists() else ""

    def stop(self):
        if self._program is not None:
            self.node.end(self._program, signal.SIGKILL)
            self._program = None
            for name in ("/srv/tincd.pid", self.LOG):
                self.node.seen(name).unlink(missing_ok=True)


class MeshWorld:
    """``nodes`` by letter; ``sections`` go over the configuration of each."""

    def __init__(self, names="ABC", partitions=2, ipv6=False, sections=None):
        self.internet = Internet(delay=0.0, loss=0.0)
        self.directory = Path(tempfile.mkdtemp(prefix="mesh-", dir="/srv"))
        self.nodes = {}
        try:
            for number, name in enumerate(names, 1):
                where = internet.site(number, ipv6=ipv6)
                self.nodes[name] = MeshNode(
                    name, number, self.internet, where, self.directory / f"{name}.log"
                )
            for node in self.nodes.values():
                node.power_on()
            for node in self.nodes.values():
                node.connect()
                found = node.first_sections("http://127.0.0.1:1/", partitions=partitions, mesh=True)
                found["tinc"]["name"] = node.name
                node.configure(found)
                node.configure(sections or {})
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name):
        return self.nodes[name]

    def apply(self):
        for node in self.nodes.values():
            node.verb("apply")
        return self

    def join(self):
        """Give each node the blocks of all, its own among them, as an operator does who sends one file round."""
        blocks = [node.export() for node in self.nodes.values()]
        for node in self.nodes.values():
            node.take_in(*blocks)
        return self

    def whole(self):
        """Whether every node reaches all others."""
        return all(
            node.reaches(*(name for name in self.nodes if name != node.name)) for node in self.nodes.values()
        )

    def close(self):
        for node in self.nodes.values():
            node.power_off()
        self.internet.close()
        shutil.rmtree(self.directory)


@contextlib.contextmanager
def standing(**options):
    made = MeshWorld(**options)
    try:
        yield made
    finally:
        made.close()
