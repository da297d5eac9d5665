"""The cgroup of a sandbox: its own, and gone with it."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CGROUPS = Path("/sys/fs/cgroup")

pytestmark = pytest.mark.skipif(
    not os.path.ismount("/sys/fs/bpf"), reason="the machine gives no cgroup of its own"
)


@pytest.fixture
def sandboxed(command):
    """The arguments that start a program in a sandbox within this one."""

    def arguments(*words):
        return {
            "args": [sys.executable, "-P", "-m", "partitiond.sandbox", "--", *words],
            "env": command.environment,
            "cwd": "/",
        }

    return arguments


def made():
    return sorted(path.name for path in CGROUPS.glob("partitiond-sandbox-*"))


@contextlib.contextmanager
def held(path):
    """Hold a cgroup as a sandbox holds its own. Raises BlockingIOError where another one does."""
    group = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(group, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(group)


def is_held(name):
    try:
        with held(CGROUPS / name):
            return False
    except BlockingIOError:
        return True


def test_it_sees_no_other_and_leaves_none(sandboxed):
    look = "cat /proc/self/cgroup; ls -d /sys/fs/cgroup/*/ /sys/fs/bpf/partitiond"
    inside = f"{look}; mkdir -p /sys/fs/cgroup/a/b"
    done = subprocess.run(**sandboxed("/bin/sh", "-c", inside), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0::/\n" in done.stdout
    assert "/sys/fs" not in done.stdout
    assert made() == []


def test_what_a_killed_one_left_goes_with_the_next(sandboxed):
    started = subprocess.Popen(**sandboxed("/bin/sh", "-c", "echo; exec sleep 60"), stdout=subprocess.PIPE)
    with started:
        assert started.stdout.readline() == b"\n"
        (left,) = made()
        started.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (CGROUPS / left / "cgroup.procs").read_text() or is_held(left):  # they end one after the other
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert made() == [left]
    done = subprocess.run(**sandboxed("/bin/true"), check=False)
    assert done.returncode == 0
    assert made() == []


def test_one_that_is_held_stays_though_nobody_is_in_it(sandboxed):
    """Somebody is about to enter it, perhaps from a namespace of processes in which this one sees nobody."""
    path = CGROUPS / "partitiond-sandbox-of-somebody"
    path.mkdir()
    with held(path):
        assert subprocess.run(**sandboxed("/bin/true"), check=False).returncode == 0
        assert made() == [path.name]
    assert subprocess.run(**sandboxed("/bin/true"), check=False).returncode == 0
    assert made() == []
