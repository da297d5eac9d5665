"""A real daemon: what it metered yesterday, and what a partition says itself, are with the master some seconds later."""

import contextlib
import json
import os
import signal
import sqlite3
import time

import pytest
import strict_master
from accounting_world import a_pass, traffic

from accounting import Ledger
from partitiond.state import InstanceState, Store

GUID = "SOFTINST-7"
SECONDS = 15.0
FILE = b"""<?xml version='1.0'?><consumption><movement><resource>users</resource><title>of yesterday</title>
<reference>slappart0</reference><quantity>12.5</quantity><price>0.0</price><VAT></VAT><category></category></movement></consumption>"""
FOREIGN = FILE.replace(b"slappart0", b"SOFTINST-8")


@pytest.fixture
def node(bridge, node_config, command):
    with strict_master.running(guids=[GUID], resources=["in", "users"]) as master:
        found = node_config(
            1,
            interface=bridge.name,
            slapos={"master_url": master.url},
            partitiond={"report_interval": 2, "meter_interval": 1, "instances_interval": 3600},
            accounting={"network_in": "in per kB", "partition_resources": "users"},
        )
        found.master = master
        done = command("apply", "-c", found.path)
        assert done.returncode == 0, done.stderr
        yield found


def wait(condition, what):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.1)


@contextlib.contextmanager
def running(command, node):
    daemon = command.start("run", "-c", node.path)
    try:
        yield daemon
    finally:
        daemon.send_signal(signal.SIGTERM)
        errors = daemon.communicate(timeout=SECONDS)[1]
        print(errors)
        assert "Traceback" not in errors, errors


def yesterday(node):
    """Let the ledger have a pass of yesterday, by another counter of the same partition."""
    with Ledger(node.state / "ledger.sqlite") as ledger:
        at = time.time() - 86400
        reading = traffic(value=5000, address="192.0.2.77", family="ipv4")
        ledger.record(a_pass(at, reading, owners={"slappart0": GUID}))


def lay(node, name, content):
    """Let the partition's user write a usage file."""
    top = node.instance / "slappart0"
    folder = top / "var" / "xml_report"
    owner = top.stat().st_uid
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    for path in (folder.parent, folder, folder / name):
        os.chown(path, owner, owner)


def test_yesterday_is_with_the_master(node, command):
    state = InstanceState("slappart0", life="stopped", wanted="stopped", instance_guid=GUID, reported=True)
    Store(node.state).save_instance(state)
    yesterday(node)
    lay(node, "good.xml", FILE)
    lay(node, "foreign.xml", FOREIGN)
    master = node.master
    master.script("503")
    with running(command, node):
        wait(lambda: len(master.accepted) >= 2, "two documents")
        done = command("report", "list", "--json", "-c", node.path)
        states = {one["kind"]: one["state"] for one in json.loads(done.stdout)["documents"]}
        said = command("events", "--json", "-c", node.path).stdout
    # a copy of the file alone is a whole backup of a node that is stopped
    assert not (node.state / "ledger.sqlite-wal").exists()
    with contextlib.closing(
        sqlite3.connect(f"file:{node.state}/ledger.sqlite?immutable=1", uri=True)
    ) as copy:
        assert copy.execute("SELECT DISTINCT state FROM document").fetchall() == [("accepted",)]
    assert master.violations == []
    assert master.duplicates == {}
    assert master.total("in", GUID) == 5.0
    assert master.total("users", GUID) == 12.5
    assert states == {"node": "accepted", "partition": "accepted"}
    assert "SOFTINST-8" in next(line for line in said.splitlines() if "usage.refused" in line)
    assert not list((node.instance / "slappart0" / "var" / "xml_report").iterdir())
