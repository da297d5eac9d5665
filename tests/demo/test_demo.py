"""The demonstration ends well, and leaves the machine that it ran on as it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(sys.prefix) / "bin" / "partitiond"


def _machine():
    """What the demonstration must not change: links, users, packet filter, files that it would write outside its namespaces."""
    tables = subprocess.run(
        ["/usr/sbin/nft", "list", "tables"], capture_output=True, text=True, check=True
    ).stdout
    return {
        "links": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "users": Path("/etc/passwd").read_text(),
        "tables": tables,
        "files": sorted(
            str(path) for top in ("/srv", "/run", "/var/lib", "/etc/opt") for path in Path(top).glob("*")
        ),
        "mounts": Path("/proc/self/mounts").read_text(),
    }


def _left():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if b"slapos" in line or b"supervisord" in line or b"partitiond." in line:
            found.append(line)
    return [line for line in found if b"pytest" not in line]


def test_the_whole_way_through():
    before = _machine()
    done = subprocess.run(
        [PROGRAM, "demo"], cwd="/", capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every step was seen to work" in done.stdout
    assert _machine() == before
    # both tables
    assert "slappart0" in done.stdout.split("What the node says")[1]
    assert "bytes out" in done.stdout


@pytest.mark.parametrize(
    ("command", "when"),
    [
        ([PROGRAM, "demo"], "memcached runs in its partition"),
        (
            [sys.executable, "-P", "-m", "partitiond", "demo", "--nodes", "3"],
            "the master knows the partitions",
        ),
    ],
    ids=["one node", "three nodes"],
)
def test_a_killed_demonstration_takes_everything_with_it(command, when):
    before = _machine()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert any(when in line for line in process.stdout)
        process.kill()
    deadline = time.monotonic() + 10
    while _left() and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel ends the namespaces one after the other
    assert not _left()
    assert _machine() == before


@pytest.mark.parametrize(
    ("words", "when"),
    [([], "partitiond plan"), (["--nodes", "2"], "partitiond run on each node")],
    ids=["one node", "two nodes"],
)
def test_ctrl_c_ends_it_without_a_word(words, when):
    before = _machine()
    command = [sys.executable, "-P", "-m", "partitiond", "demo", *words]
    with subprocess.Popen(
        command,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    ) as process:
        assert any(when in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: all that are in front hear it
        said, _ = process.communicate(timeout=60)
    assert (process.returncode, [line for line in said.splitlines() if not _is_told(line)]) == (130, [])
    assert not _left()
    assert _machine() == before


def _is_told(line):
    """Whether it is a line of the demonstration's own."""
    return not line or line[0].isdigit() or line.startswith("   ✓")
