"""Nodes of a mesh without any IPv6, joined by a router: machines of :mod:`partitiond.demo`, without a master.

What is tried here is the mesh, which no master has a part in; how long things take is printed, and never judged.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from json_schemas import validate

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
        time.sleep(0.05)
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
