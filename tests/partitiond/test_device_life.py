"""Block devices and directories on other disks when users and nodes come to their end, and in the daemon."""

import errno
import re
import select
import subprocess
from pathlib import Path

import pytest
from device_loops import UNTOUCHED, USER0, USER2, access, apply, disks, give, open_as, plan
from json_schemas import parsed


@pytest.fixture
def disk(tmp_path):
    with disks(tmp_path) as make:
        yield make


def test_a_smaller_node_takes_back_before_the_user_goes(bridge, node_config, disk):
    one = disk()
    node = node_config(3)
    give(node, slappart2=one.node)
    apply(node)
    assert open_as(USER2, one.node) == 0
    node.write(slapformat={"partition_amount": 2})
    assert "slappart2 gets no block device" in "".join(node.load().warnings)
    order = [one["id"] for one in plan(node)["operations"]]
    assert order.index(f"block-device{one.node}/slapuser2") < order.index("user/slapuser2")
    assert not apply(node)["left"]
    assert access(one.node) == UNTOUCHED
    # a new user of that number has nothing of it
    assert open_as(USER2, one.node) == errno.EACCES


def test_a_device_that_cannot_be_taken_keeps_its_user(bridge, node_config, disk, command):
    one = disk()
    node = node_config(2)
    give(node, slappart1=one.node)
    apply(node)
    node.write(slapformat={"partition_amount": 1})
    subprocess.run(["mount", "-o", "remount,bind,ro", "/dev"], check=True)
    try:
        done = apply(node)
        assert [failure["code"] for failure in done["failures"]] == ["device.not_changed"]
        assert "slapuser1" in Path("/etc/passwd").read_text()
        down = command("teardown", "--json", "-c", node.path)
        assert [failure["code"] for failure in parsed(down)["failures"]] == ["device.not_changed"]
        assert down.returncode == 3
        passwd = Path("/etc/passwd").read_text()
        assert ("slapuser0" in passwd, "slapuser1" in passwd) == (False, True)
    finally:
        subprocess.run(["mount", "-o", "remount,bind,rw", "/dev"], check=True)
    assert not apply(node)["left"]
    assert "slapuser1" not in Path("/etc/passwd").read_text()
    assert access(one.node) == UNTOUCHED


def test_teardown_takes_everything_back(bridge, node_config, disk, command):
    one, two = disk(), disk()
    node = node_config(1)
    give(node, slappart0=[one.node, two.node])
    apply(node)
    give(node, slappart0=one.node)  # the other would be taken back only by the next apply
    assert [open_as(USER0, disk.node) for disk in (one, two)] == [0, 0]
    assert command("teardown", "-c", node.path).returncode == 0
    assert access(one.node) == access(two.node) == UNTOUCHED


def test_the_daemon_gives_what_is_plugged_in_and_says_once_what_is_refused(
    bridge, node_config, disk, command
):
    node = node_config(1)
    give(node, slappart0="/dev/disk/by-id/ata-HOT")
    apply(node)
    daemon = command.start("run", "-c", node.path)
    try:
        said = ""
        while "is up with" not in said:
            assert select.select([daemon.stderr], [], [], 20)[0]
            said += daemon.stderr.readline()
        one = disk()
        one.link("ata-HOT")
        assert parsed(command("apply", "--json", "-c", node.path))["refused"] == []
        assert open_as(USER0, one.node) == 0
    finally:
        daemon.terminate()
        said += daemon.communicate(timeout=20)[1]
    assert len(re.findall("ata-HOT: refused: is not there", said)) == 1


def test_teardown_keeps_the_data_on_other_disks_and_purge_does_not(bridge, node_config, command):
    node = node_config(2)
    data = node.root / "home" / "data1"
    for name in ("kept", "slappart9"):
        (data / name).mkdir(parents=True)
    (data / "slappart8").symlink_to(data / "kept")
    node.write(slapformat={"instance_storage_home": node.root / "home"})
    apply(node)
    for name in ("slappart0", "slappart9", "kept"):
        (data / name / "file").write_bytes(b"x")
    assert command("teardown", "-c", node.path).returncode == 0
    assert (data / "slappart0" / "file").exists()
    assert command("teardown", "--purge", "-c", node.path).returncode == 0
    assert sorted(path.name for path in data.iterdir()) == ["kept", "slappart8"]
    assert (data / "kept" / "file").exists()
