"""A node for each file of tests, with which they go through the life cycle in the order in which they stand.

So what is left behind is looked for at the end of each file, and not, as elsewhere, after each test.
"""

import contextlib
import socket
import time
from pathlib import Path

import pytest
import warm_start
from life_node import Node, pids

from netplan import counters


@pytest.fixture
def no_leaks():
    """In place of the general one: here a test may start what the next one uses."""


def _look():
    return {
        "processes": set(pids()) - warm_start.numbers(),
        "network links": {name for _, name in socket.if_nameindex()},
        "packet filter": {counters.read_counters().epoch} - {None, "", 0},
        "users": set(Path("/etc/passwd").read_text().splitlines()),
        "mounts": {line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()},
        "directories": {entry for path in ("/srv", "/run", "/var/lib") for entry in Path(path).iterdir()},
        "descriptors": {
            target for path in Path("/proc/self/fd").iterdir() if (target := _target(path)).startswith("/")
        },
    }


def _target(path):
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _command(pid):
    with contextlib.suppress(OSError):
        return f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes()}"
    return str(pid)


@pytest.fixture(scope="module")
def make_node(request):
    """Make nodes, take them down at the end of the file, and see that nothing is left of them."""
    before = _look()
    made = []

    def make(kind=Node, **settings):
        node = kind(request.module.__name__.removeprefix("test_"), **settings)
        made.append(node)
        node.begin()
        return node

    try:
        yield make
    finally:
        for node in made:
            node.end()
    Path("/srv/life").rmdir()
    deadline = time.monotonic() + 5
    while left := {kind: now - before[kind] for kind, now in _look().items() if now - before[kind]}:
        if time.monotonic() > deadline:
            left["processes"] = [_command(pid) for pid in left.get("processes", ())]
            pytest.fail(f"left behind: {left}")
        time.sleep(0.05)
