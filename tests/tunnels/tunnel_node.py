"""A node as its users see it: the command line, the files that tenants write, and programs that run as partitions' users.

The same for a node in the test's own namespaces and for one in a sandbox inside of this (``tunnel_world``): commands are
entered there, and its files are looked at from here. Nothing here knows how partitiond does what it promises.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import warm_start
from json_schemas import validate

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}
PATIENCE = 60.0


class Agent:
    """A program of this directory, asked line by line; it ends when it is closed."""

    def __init__(self, command):
        self.process = subprocess.Popen(
            command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._answer() == "ready"

    def ask(self, value=None, patience=PATIENCE):
        print(json.dumps(value), file=self.process.stdin, flush=True)
        return self._answer(patience)

    def _answer(self, patience=PATIENCE):
        # each question has one line for an answer, so nothing is left in the buffer that select(2) does not see
        assert select.select([self.process.stdout], [], [], patience)[0], f"no answer: {self.process.args}"
        line = self.process.stdout.readline()
        assert line, f"it ended: {self.process.args}"
        return json.loads(line)

    def close(self):
        """End it; a second time does nothing."""
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Node:
    """``view`` shows the node's files, ``enter`` are the words before a command that is to run there."""

    def __init__(self, configuration, *, view=Path("/"), enter=()):
        self.configuration, self.view, self.enter = Path(configuration), view, tuple(enter)
        self._agents = []

    def configure(self, **sections):
        """Write the configuration; everything of the node lies beside it."""
        base = self.configuration.parent
        sections = {
            "slapos": {
                "computer_id": "COMP-1",
                "master_url": "http://127.0.0.1:1/",
                "software_root": base / "software",
                "instance_root": base / "instance",
                **sections.pop("slapos", {}),
            },
            "partitiond": {
                "state_dir": base / "state",
                "log_dir": base / "log",
                "run_dir": base / "run",
                **sections.pop("partitiond", {}),
            },
            **sections,
        }
        self.seen(base).mkdir(mode=0o755)
        self.seen(self.configuration).write_text(
            "".join(
                f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())
                for name, keys in sections.items()
            )
        )

    # --- the command line

    def line(self, *words):
        own = ("--json", "-c", str(self.configuration))
        return [*self.enter, sys.executable, "-P", "-m", "partitiond", *map(str, words), *own]

    def __call__(self, *words, expect=(0,)):
        """Run a verb; its JSON is checked against the schema that ships."""
        if self.enter:  # in other namespaces
            done = subprocess.run(
                self.line(*words),
                env=ENVIRONMENT,
                cwd="/",
                capture_output=True,
                text=True,
                check=False,
                timeout=PATIENCE,
            )
        else:
            done = warm_start.run(self.line(*words), env=ENVIRONMENT, timeout=PATIENCE)
        assert done.returncode in expect, f"{words} exited {done.returncode}: {done.stdout}{done.stderr}"
        return validate(json.loads(done.stdout))

    def apply(self, *, refused=()):
        """Apply; exactly these tunnels are refused or held back, and nothing else went wrong or is left to do."""
        value = self("apply", expect=(3,) if refused else (0,))
        assert (value["failures"], value["left"]) == ([], [])
        assert {one["name"] for one in value["refused"]} == set(refused), value["refused"]
        return value

    def tunnels(self):
        return {one["name"]: one for one in self("tunnel", "list")["tunnels"]}

    # --- what tenants see and write

    def path(self, partition):
        """Where a partition's directory is, as the node itself calls it."""
        return self.configuration.parent / "instance" / partition

    def seen(self, path):
        """The same file as it is seen from here."""
        return self.view / Path(path).relative_to("/")

    def uid(self, partition):
        return self.seen(self.path(partition)).stat().st_uid

    def write(self, partition, name, content):
        """A file of the tenant's below its partition; it takes the place of another at once, as buildout does it."""
        path, uid = self.seen(self.path(partition) / name), self.uid(partition)
        for directory in reversed(path.relative_to(self.seen(self.path(partition))).parents[:-1]):
            below = self.seen(self.path(partition)) / directory
            if not below.is_dir():
                below.mkdir()
                os.chown(below, uid, uid)
        new = path.with_name(f".{path.name}.new")
        new.write_text(content)
        os.chown(new, uid, uid)
        new.rename(path)

    def declare(self, partition, name, text):
        self.write(partition, f"etc/tunnel/{name}.cfg", f"[tunnel]\n{text}")

    def serve(self, partition, name, listen, connect, allow):
        """Declare a tunnel of mode server; ``allow`` are pins as they are written."""
        pins = "".join(f"    {one}\n" for one in allow)
        self.declare(
            partition, name, f"mode = server\nlisten = {listen}\nconnect = {connect}\nallow =\n{pins}"
        )

    def reach(self, partition, name, listen, connect, peer):
        """Declare a tunnel of mode client."""
        target = "[{}]:{}" if ":" in connect[0] else "{}:{}"
        text = f"mode = client\nlisten = {listen}\nconnect = {target.format(*connect)}\npeer = {peer}\n"
        self.declare(partition, name, text)

    def withdraw(self, partition, name):
        self.seen(self.path(partition) / "etc/tunnel" / f"{name}.cfg").unlink()

    def resource(self, partition):
        return json.loads(self.seen(self.path(partition) / ".slapos-resource").read_bytes())

    def pin(self, partition):
        """The pin of a partition's identity, as a recipe publishes it."""
        return f"cert:{self.resource(partition)['certificate']}"

    def _addresses(self, partition):
        return [one["addr"] for one in self.resource(partition)["address_list"]]

    def private(self, partition):
        """The private IPv4 address."""
        return next(one for one in self._addresses(partition) if one.startswith("10.0."))

    def public(self, partition):
        """The address at which other nodes reach it: IPv6, or of a node without it IPv4."""
        return next(one for one in self._addresses(partition) if not one.startswith("10.0."))

    # --- programs

    def as_user(self, partition, *command):
        """The words that run a program there as the partition's user."""
        uid = str(self.uid(partition))
        return [
            *self.enter,
            "/usr/bin/setpriv",
            "--reuid",
            uid,
            "--regid",
            uid,
            "--clear-groups",
            "--",
            *command,
        ]

    def agent(self, partition, name, *arguments):
        """Start a program of this directory as a partition's user; it ends with the node."""
        started = Agent(self.as_user(partition, *program(name, *arguments)))
        self._agents.append(started)
        return started

    def service(self, partition, host, port, **options):
        """A service of a partition: echoes what it gets."""
        return self.agent(partition, "service", {"host": host, "port": port, **options})

    def close(self):
        while self._agents:
            self._agents.pop().close()


class Daemon:
    """``partitiond run``; without a master that answers, as tunnels need none."""

    def __init__(self, node):
        self._socket = node.configuration.parent / "run" / "control.sock"
        self._log = (node.configuration.parent / "daemon.log").open("ab")
        line = [word for word in node.line("run") if word != "--json"]
        self.process = subprocess.Popen(
            line, cwd="/", env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        until(self._answers, "the daemon to be up")

    def _answers(self):
        assert self.process.poll() is None, "the daemon ended"
        with socket.socket(socket.AF_UNIX) as channel:
            return channel.connect_ex(str(self._socket)) == 0

    def kill(self):
        self.process.kill()
        self.process.wait()
        self._log.close()

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self._log.close()


def program(name, *arguments):
    """The words that run a program of this directory: by its text, as a tenant need not reach the file."""
    text = (HERE / f"agent_{name}.py").read_text()
    # old versions of TLS are spoken on purpose
    return [
        sys.executable,
        "-I",
        "-W",
        "ignore::DeprecationWarning",
        "-c",
        text,
        *(json.dumps(one) for one in arguments),
    ]


def until(condition, what, patience=PATIENCE):
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, f"it did not happen: {what}"
        time.sleep(0.01)
    return found
