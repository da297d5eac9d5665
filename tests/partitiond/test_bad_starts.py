"""A start with the machine that finds its disk full and its key gone: what ran then runs again, and all of it is said."""

import contextlib
import json
import os
import secrets
import subprocess
from pathlib import Path

import pytest
from json_schemas import parsed
from trial_scene import Daemon, instance_runs, wait

from partitiond import reboots


@pytest.fixture
def small_disk():
    path = Path("/srv", f"disk-{secrets.token_hex(3)}")
    path.mkdir(mode=0o755)
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=2m,mode=0755", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["/bin/umount", path], check=True)
        path.rmdir()


def fill(path):
    block = b"x" * 4096
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(block):
            continue
    assert os.statvfs(path).f_bavail == 0


def end_supervisor(node):
    pid_file = node.instance / "var" / "run" / "supervisord.pid"
    os.kill(int(pid_file.read_text()), 9)
    for pid in running(node):
        os.kill(pid, 9)
    wait(lambda: not running(node), "everything to be gone")


def running(node):
    """The services of instances that run."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink().is_relative_to(
                node.instance / "slappart0"
            ):
                found.append(int(entry.name))
    return found


def test_a_reboot_with_a_full_disk_and_without_a_key_starts_what_ran(small_disk, node_config, command):
    pair = {"key_file": small_disk / "key", "cert_file": small_disk / "certificate"}
    node = node_config(1, interface="lo", partitiond={"state_dir": small_disk / "state"}, slapos=pair)
    daemon = Daemon(command, node)
    try:
        daemon.start()  # also the first of all, where nothing is there to be kept up
        assert "[node.certificate]" in daemon.log
        instance_runs(node, 0)
        wait(lambda: running(node), "the service")
        daemon.end()
        end_supervisor(node)
        (small_disk / "state" / reboots.FILE).write_text(json.dumps({"boot_id": "another"}))
        fill(small_disk / "filler")
        daemon.start()
        wait(lambda: running(node), "the service to be started again")
        assert "not noted yet, and tried again: No space left" in daemon.log
        assert "partitiond register" in daemon.log
        assert "Traceback" not in daemon.log
        found = command("status", "--json", "-c", node.path)
        (case,) = [one for one in parsed(found)["node"]["open_cases"] if str(pair["key_file"]) in one]
        assert "partitiond register" in case
    finally:
        (small_disk / "filler").unlink(missing_ok=True)
        daemon.end()
