"""The world that the scenarios stand on: what its wire does, and that machines are each other's strangers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from partitiond.demo import machine

DELAY = 0.02
_ECHO = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], 7), family=family) as listener:
    while True:
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(1 << 16):
                connection.sendall(data)
"""
_ASK = """
import hashlib, os, socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 7), float(sys.argv[3])) as connection:
    connected = time.monotonic() - began
    data, back = os.urandom(int(sys.argv[2])) + b"the end of it", b""
    for start in range(0, len(data), 50000):
        connection.sendall(data[start : start + 50000])
        while len(back) < min(start + 50000, len(data)):
            back += connection.recv(1 << 16)
assert back == data
print(connected)
"""


@pytest.fixture(params=[False, True], ids=["IPv6", "IPv4"])
def world(request, make_world):
    # as a mesh the machines have IPv4 alone; no daemon runs here, so nothing of a mesh is asked for
    made = make_world(2, mesh=request.param, delay=DELAY, loss=0.0)
    made["A"].launch("/usr/bin/python3", "-I", "-c", _ECHO, made["A"].site.address)
    asked(made, 0, patience=20)
    return made


def asked(world, size, patience=2.0, check=True):
    """Ask A's echo from B; the seconds until it was connected."""
    a, b = world["A"], world["B"]
    end = time.monotonic() + patience
    while True:
        done = b.run("/usr/bin/python3", "-I", "-c", _ASK, a.site.address, str(size), "2", check=False)
        if done.returncode == 0:
            return float(done.stdout)
        if not check or time.monotonic() > end:
            assert not check, done.stderr
            return None
        assert "ConnectionRefused" in done.stderr, done.stderr


def quiet(world):
    """The counts once nothing was carried for some time."""
    end = time.monotonic() + 20
    before, now = None, world.internet.counts()
    while before != now:
        assert time.monotonic() < end
        time.sleep(20 * DELAY)
        before, now = now, world.internet.counts()
    return now


def test_the_wire_delays_counts_and_carries_every_byte(world):
    before = quiet(world)
    with world.internet.captured(world.directory / "wire.pcap") as capture:
        assert asked(world, 3_000_000) >= 2 * DELAY
        after = quiet(world)  # the last of the connection may still be on its way
    carried = after["bytes"] - before["bytes"]
    assert carried > 6_000_000
    assert after["lost"] == before["lost"] == 0
    assert sum(map(len, capture.packets())) == carried
    # segmentation is left to who needs it
    assert max(map(len, capture.packets())) > 1500


def test_the_wire_loses_a_share_and_connections_live_with_it(world):
    world.internet.tell(loss=0.05, delay=0.001)
    asked(world, 3_000_000)
    assert world.internet.counts()["lost"] > 0


def test_a_cut_machine_is_not_reached_and_reaches_nobody(world):
    world.cut(world["B"])
    stopped = world.internet.counts()["stopped"]
    assert asked(world, 10, check=False) is None
    assert world.internet.counts()["stopped"] > stopped
    world.join(world["B"])
    asked(world, 10)


def test_what_is_said_can_be_captured(world):
    path = world.directory / "wire.pcap"
    with world.internet.captured(path) as capture:
        asked(world, 10)
    asked(world, 10)
    assert capture.count(b"the end of it") == 2  # there and back
    assert world.internet.counts()["uncaptured"] == 0


def test_machines_have_nothing_in_common(world):
    a, b = world["A"], world["B"]
    a.seen("/etc/of-a").write_text("mine")
    for path in ("/etc/of-a", "/srv/of-a", "/var/lib/of-a", "/run/of-a", "/tmp/of-a"):
        a.seen(path).write_text("mine")
        assert not b.seen(path).exists()
    assert not b.processes().keys() & a.processes().keys()
    found = json.loads(a.run("/usr/sbin/ip", "-j", "address", "show", "scope", "global").stdout)
    assert [one["local"] for link in found for one in link.get("addr_info", ()) if one] == [a.site.address]


def test_a_lost_machine_comes_back_with_its_configuration_alone(world):
    a, b = world["A"], world["B"]
    beside = a.seen("/etc/opt/slapos/tinc/hosts")
    beside.mkdir(parents=True)
    (beside / "peer").write_text("a block")
    a.seen("/srv/slapgrid").mkdir()
    pid, configuration = a.pid, a.seen("/etc/opt/slapos/slapos.cfg").read_text()
    world.lose(a)
    assert not Path(f"/proc/{pid}").exists()
    world.rebuild(a)
    assert a.seen("/etc/opt/slapos/slapos.cfg").read_text() == configuration
    assert a.seen("/etc/opt/slapos/tinc/hosts/peer").read_text() == "a block"
    assert not a.seen("/srv/slapgrid").exists()
    a.launch("/usr/bin/python3", "-I", "-c", _ECHO, a.site.address)
    asked(world, 10, patience=20)
    assert world.twin(b).site.address != b.site.address


def test_the_master_goes_back_to_an_older_database(world):
    master = world.master
    older = master.backup(world.directory / "older.db")
    master.supply("file:///nowhere/software.cfg", "COMP-A")
    assert [one["computer_reference"] for one in master.rows("software")] == ["COMP-A"]
    master.stop()
    master.start(database=older)
    assert master.rows("software") == []


def test_what_this_interpreter_is_runs_there(world):
    assert world["B"].run(sys.executable, "-c", "print('there')").stdout == "there\n"


def test_what_has_ended_runs_nothing():
    """Looked at while a sandbox is made, which starts others that end."""
    with subprocess.Popen(["/bin/true"]) as gone:
        pass
    assert (machine.children(gone.pid), machine.program(gone.pid)) == ([], "")
    assert machine.program(os.getpid()) == Path("/proc/self/comm").read_text().strip()
