"""The life of an instance on a node that owns nothing of the machine, its own supervisord included, by slapos.core's clients.

Beside slapos.core's own tests: supervisord that we start, the watchdog, a master that goes away.
"""

import socket
import time
from pathlib import Path

import pytest

from slap_client.client import SlapClient

RELEASE = Path(__file__).resolve().parents[1] / "lifecycle" / "release"
_CONFIGURATION = """\
[slapos]
computer_id = local
master_url = http://127.0.0.1:{port}/
software_root = {base}/soft
instance_root = {base}/inst
root_check = False

[slapformat]
input_definition_file = {base}/definition.cfg
partition_amount = 1
alter_user = false
alter_network = false
create_tap = false

[partitiond]
offline_builds = true

[slapproxy]
host = 127.0.0.1
port = {port}
database_uri = {base}/proxy.db

[slapconsole]
"""
_DEFINITION = """\
[computer]
address = 127.0.0.1/255.255.255.255

[partition_0]
address = 127.0.0.1/255.255.255.255 ::1/128
pathname = part0
"""


def _wait(ready, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


def _listens(port):
    with socket.socket() as channel:
        return channel.connect_ex(("127.0.0.1", port)) == 0


class Scene:
    def __init__(self, standalone):
        self.standalone, self.base = standalone, Path("/srv/standalone/node")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        standalone.run("/bin/mkdir", self.base)
        standalone.run("/bin/cp", "-r", RELEASE, self.base)
        (self.base / "slapos.cfg").write_text(_CONFIGURATION.format(base=self.base, port=self.port))
        (self.base / "definition.cfg").write_text(_DEFINITION)
        self.url = str(self.base / "release" / "software.cfg")
        self.master = None

    def begin(self):
        slapos = self.standalone.bin / "slapos"
        with (self.base / "proxy.log").open("ab") as log:
            line = (slapos, "proxy", "start", "--cfg", self.base / "slapos.cfg")
            self.master = self.standalone.start(*line, stdout=log)
        _wait(lambda: _listens(self.port), "the master")

    def end(self):
        if self.master is not None:
            self.master.terminate()
            self.master.wait(30)
            self.master = None

    def node(self, *words, expect=0):
        return self.standalone.partitiond(
            "node", words[0], "--cfg", self.base / "slapos.cfg", *words[1:], expect=expect
        )

    def slapos(self, *words):
        return self.standalone.run(self.standalone.bin / "slapos", *words, "--cfg", self.base / "slapos.cfg")

    def timestamp(self):
        client = SlapClient(f"http://127.0.0.1:{self.port}/", "local")
        try:
            return client.computer().partitions[0].timestamp
        finally:
            client.close()

    def runs(self):
        """Whether the service runs, as the node shows it."""
        shown = self.standalone.partitiond(
            "show", "part0", environment={"SLAPOS_CONFIGURATION": str(self.base / "slapos.cfg")}
        )
        return "http-on-watch RUNNING" in shown


@pytest.fixture
def scene(standalone):
    made = Scene(standalone)
    try:
        made.begin()
        yield made
    finally:
        made.end()
        if (made.base / "inst" / "sv.sock").exists():
            made.node("supervisorctl", "shutdown")


@pytest.mark.full
def test_life(scene):
    scene.node("format", "--now")
    scene.slapos("supply", scene.url, "local")
    assert "building " in scene.node("software")
    scene.slapos("request", "one", scene.url, "--parameters", "text=one")
    shown = scene.slapos("proxy", "show")
    assert "part0" in shown
    assert scene.url in shown
    text = scene.node("instance")
    assert "part0: started" in text
    assert scene.runs(), text
    status = scene.node("status", "watchdog", "part0:*")
    assert status.count("RUNNING") == 3, status
    promise = scene.base / "inst" / "part0" / "etc" / "promise" / "kept"
    scene.standalone.run("/bin/mkdir", "-p", promise.parent)
    for line, code in (("echo on purpose; exit 1", 2), ("exit 0", 0)):
        promise.write_text(f"#!/bin/sh\n{line}\n")
        promise.chmod(0o755)
        assert ("on purpose" in scene.node("promise", expect=code)) is bool(code)
        assert ("on purpose" in scene.node("instance", "--force", "--only-cp", "part0", expect=code)) is bool(
            code
        )
    assert "[sync.unknown_partition] nix" in scene.node("promise", "--only-cp", "nix", expect=1)
    before = scene.timestamp()
    # the service is watched: that it ends is told, and the master asks for it to be configured again
    scene.node("supervisorctl", "signal", "KILL", "part0:http-on-watch")
    _wait(lambda: scene.timestamp() != before, "the bang")
    assert not scene.runs()
    # without a master, what ought to run runs
    scene.end()
    assert "[slap.unreachable]" in scene.node("instance", expect=3)
    assert scene.runs()
    scene.begin()
    assert "part0: started" in scene.node("instance")
    scene.slapos("request", "one", scene.url, "--state", "destroyed", "--parameters", "text=one")
    scene.node("instance")
    assert (scene.base / "inst" / "part0" / "buildout.cfg").exists(), "stopped; the report removes it"
    # what else its user has is no instance's: a file, memory that is shared, a process
    others = [Path("/tmp/of-its-user"), Path("/dev/shm/of-its-user")]
    scene.standalone.run("/usr/bin/touch", *others)
    other = scene.standalone.start("/bin/sleep", "1000")
    assert "part0: destroyed" in scene.node("report")
    assert other.poll() is None
    other.kill()
    other.communicate()
    for path in others:
        path.unlink()
    assert [path.name for path in (scene.base / "inst" / "part0").iterdir()] == [".slapos-resource"]
    scene.slapos("remove", scene.url, "local")
    scene.node("software")
    assert not [path for path in (scene.base / "soft").iterdir() if path.is_dir()]
