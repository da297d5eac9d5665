"""The cgroup of a sandbox: its own, and gone with it."""

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
    processes = CGROUPS / left / "cgroup.procs"
    deadline = time.monotonic() + 10
    while (
        processes.read_text() or Path("/proc", left.rpartition("-")[2]).exists()
    ):  # they end one after the other
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert made() == [left]
    done = subprocess.run(**sandboxed("/bin/true"), check=False)
    assert done.returncode == 0
    assert made() == []
