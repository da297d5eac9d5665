"""Block devices on a whole node: loop devices as disks, opened as the partitions' users."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from device_loops import (
    DISK_GROUP,
    UNTOUCHED,
    USER0,
    USER1,
    USER2,
    Disk,
    access,
    apply,
    disks,
    give,
    make_node,
    open_as,
    plan,
    refused,
    resource,
    shown,
)
from json_schemas import parsed

from partitiond import posix_acl

EXCLUSIVE = os.O_RDONLY | os.O_EXCL
ACL = "system.posix_acl_access"


@pytest.fixture
def disk(tmp_path):
    with disks(tmp_path) as make:
        yield make


@pytest.fixture(scope="module")
def standing(module_node_config):
    assert not apply(module_node_config)["failures"]
    return module_node_config


@pytest.fixture
def node(standing, disk):
    """The standing node; what a test gives is taken back and must be gone."""
    yield standing
    standing.write(block_devices={f"slappart{index}": None for index in range(9)})
    done = apply(standing)
    assert (done["failures"], done["left"], done["refused"]) == ([], [], [])


@contextlib.contextmanager
def mounted(device, where):
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", str(device)], check=True)
    where.mkdir()
    subprocess.run(["mount", str(device), str(where)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)
        where.rmdir()


# --- given and taken ----------------------------------------------------------------------------------------------------


def test_its_user_and_nobody_else_can_use_it(node, disk, command):
    one = disk()
    name = str(one.link("ata-ONE"))
    give(node, slappart0=name)
    (planned,) = plan(node)["operations"]
    assert planned["id"] == f"block-device{one.node}/slapuser0"
    assert (planned["action"], planned["partition"], planned["resource"]) == (
        "create",
        "slappart0",
        "block-device",
    )
    assert access(one.node) == UNTOUCHED
    assert open_as(USER0, one.node) == errno.EACCES

    done = parsed(command("apply", "--json", "-c", node.path))
    assert (done["failures"], done["left"], done["refused"]) == ([], [], [])
    assert plan(node)["operations"] == []
    assert parsed(command("apply", "--json", "-c", node.path))["done"] == 0
    assert open_as(USER0, one.node) == 0
    assert one.node.read_bytes()[:15] == b"written by 5000"
    for stranger in (USER1, USER2, 65534):
        assert open_as(stranger, one.node) == errno.EACCES
    assert access(one.node) == (0, DISK_GROUP, 0o660, {USER0: 6}, 6)
    assert shown(node, "slappart0")["block_devices"] == [name]
    assert shown(node, "slappart1")["block_devices"] == []
    assert resource(node, "slappart0")["block_devices"] == [name]
    assert resource(node, "slappart1")["block_devices"] == []
    assert name in command("show", "slappart0", "-c", node.path).stdout


def test_what_leaves_the_configuration_is_taken_back(node, disk):
    first, second = disk(), disk()
    give(node, slappart0=[first.node, second.node])
    apply(node)
    assert [open_as(USER0, one.node) for one in (first, second)] == [0, 0]
    give(node, slappart0=second.node)
    (planned,) = plan(node)["operations"][:1]
    assert (planned["action"], planned["id"]) == ("remove", f"block-device{first.node}/slapuser0")
    assert "[block_devices] does not give it to slapuser0" in planned["reason"]
    assert "has the device open keeps it until that process ends" in planned["reason"]
    assert not apply(node)["left"]
    assert [open_as(USER0, one.node) for one in (first, second)] == [errno.EACCES, 0]
    assert access(first.node) == UNTOUCHED
    with pytest.raises(OSError, match="No data"):
        os.getxattr(first.node, ACL)
    assert resource(node, "slappart0")["block_devices"] == [str(second.node)]


def test_a_name_that_leads_elsewhere_takes_the_old_and_gives_the_new(node, disk):
    first, second = disk(), disk()
    name = first.link("ata-MOVES")
    give(node, slappart0=name)
    apply(node)
    second.link("ata-MOVES")
    planned = [one for one in plan(node)["operations"] if one["resource"] == "block-device"]
    assert [(one["action"], one["id"]) for one in planned] == [
        ("remove", f"block-device{first.node}/slapuser0"),
        ("create", f"block-device{second.node}/slapuser0"),
    ]
    assert not apply(node)["left"]
    assert [open_as(USER0, one.node) for one in (first, second)] == [errno.EACCES, 0]
    assert access(first.node) == UNTOUCHED
    assert shown(node, "slappart0")["block_devices"] == [str(name)]


_HOLD = """
import os, sys
os.open(sys.argv[1], os.O_RDWR)
print("open", flush=True)
sys.stdin.read()
"""


def test_a_device_that_moves_to_another_partition(node, disk, caplog):
    one = disk()
    give(node, slappart0=one.node)
    apply(node)
    holder = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _HOLD, str(one.node)],
        user=USER0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout.readline() == b"open\n"
        give(node, slappart0=None, slappart1=one.node)
        assert not apply(node)["left"]
        assert f"stays open in its process {holder.pid} until that ends" in caplog.text
        holder.stdin.close()
    assert [open_as(uid, one.node) for uid in (USER0, USER1)] == [errno.EACCES, 0]
    assert access(one.node)[3] == {USER1: 6}


def test_one_partition_applied_alone_takes_back_too(node, disk):
    one = disk()
    give(node, slappart0=one.node)
    apply(node)
    give(node, slappart0=None, slappart1=one.node)
    apply(node, "slappart1")
    assert access(one.node)[3] == {USER1: 6}


def test_an_unplugged_disk_is_refused_until_it_is_there(node, disk):
    name = Path("/dev/disk/by-id/ata-LATER")
    give(node, slappart0=name)
    done = apply(node)
    assert refused(done) == {str(name): "device.missing"}
    assert done["refused"][0]["line"] == 1 + node.path.read_text().splitlines().index(f"slappart0 = {name}")
    assert (done["failures"], done["left"]) == ([], [])
    one = disk()
    one.link(name.name)
    assert refused(apply(node)) == {}
    assert open_as(USER0, one.node) == 0


# --- what is never given ------------------------------------------------------------------------------------------------


def test_a_mounted_disk_is_refused_and_the_rest_goes_on(node, disk, command, tmp_path):
    busy, free = disk(), disk()
    give(node, slappart0=busy.node, slappart1=free.node)
    with mounted(busy.node, tmp_path / "m"):
        done = command("apply", "--json", "-c", node.path)
        assert (done.returncode, refused(parsed(done))) == (3, {str(busy.node): "device.mounted"})
        assert parsed(done)["refused"][0]["hint"] == f"umount {tmp_path / 'm'}"
        assert open_as(USER1, free.node) == 0
        assert access(busy.node) == UNTOUCHED
        assert plan(node)["operations"] == []
        text = command("apply", "-c", node.path).stdout
        assert f"block device {busy.node} is refused: " in text
        assert "[device.mounted]" in text
        open_cases = parsed(command("status", "--json", "-c", node.path))["node"]["open_cases"]
        assert any(str(busy.node) in case for case in open_cases)
    assert refused(apply(node)) == {}
    assert open_as(USER0, busy.node) == 0


def test_a_given_disk_that_is_mounted_is_taken_back(node, disk, tmp_path):
    one = disk()
    give(node, slappart0=one.node)
    apply(node)
    with mounted(one.node, tmp_path / "m"):
        done = apply(node)
        assert refused(done) == {str(one.node): "device.mounted"}
        assert done["left"] == []
        assert access(one.node) == UNTOUCHED
        assert resource(node, "slappart0")["block_devices"] == []


def test_a_disk_with_a_mounted_partition_is_refused_but_not_the_free_partition(node, disk, tmp_path):
    one = disk()
    used, free = one.partition(1, 1), one.partition(2, 6)
    with mounted(used, tmp_path / "m"):
        give(node, slappart0=one.node)
        assert refused(apply(node)) == {str(one.node): "device.mounted"}
        give(node, slappart0=free)
        assert refused(apply(node)) == {}
        assert open_as(USER0, free) == 0
        assert access(one.node) == access(used) == UNTOUCHED


def test_a_part_of_a_mounted_disk_is_refused(node, disk, tmp_path):
    one = disk()
    with mounted(one.node, tmp_path / "m"):
        part = one.partition(1)
        give(node, slappart0=part)
        (found,) = apply(node)["refused"]
        assert (found["code"], found["reason"]) == (
            "device.mounted",
            f"the disk of which it is a part is mounted at {tmp_path / 'm'}",
        )


def test_a_loop_device_on_a_disk_counts_as_what_stands_on_it(node, disk, tmp_path):
    below = disk()
    with contextlib.closing(Disk(below.node)) as upper, mounted(upper.node, tmp_path / "m"):
        give(node, slappart0=below.node)
        assert refused(apply(node)) == {str(below.node): "device.mounted"}


def test_a_mount_in_another_namespace_is_known_to_the_kernel(node, disk, tmp_path):
    one = disk()
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", str(one.node)], check=True)
    (tmp_path / "m").mkdir()
    script = f"mount {one.node} {tmp_path / 'm'} && echo mounted && read end"
    elsewhere = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with elsewhere:
        assert elsewhere.stdout.readline() == b"mounted\n"
        assert str(tmp_path / "m") not in Path("/proc/self/mountinfo").read_text()
        give(node, slappart0=one.node)
        assert refused(apply(node)) == {str(one.node): "device.busy"}
        assert access(one.node) == UNTOUCHED
        elsewhere.stdin.close()
    assert refused(apply(node)) == {}


def test_the_machines_own_disk_is_refused(node, disk, tmp_path):
    one = disk()
    give(node, slappart0=one.node)
    with mounted(one.node, Path("/var/own")):
        assert refused(apply(node)) == {str(one.node): "device.system_disk"}
    roots = [
        row[2]
        for row in map(str.split, Path("/proc/self/mountinfo").read_text().splitlines())
        if row[4] == "/" and not row[2].startswith("0:")
    ]
    for number in roots[:1]:  # none where / is no block device, as in containers
        major, minor = map(int, number.split(":"))
        path = make_node("/dev/root-of-this-machine", os.makedev(major, minor))
        try:
            give(node, slappart0=path)
            assert refused(apply(node)) == {str(path): "device.system_disk"}
            assert access(path) == UNTOUCHED
        finally:
            path.unlink()


def test_swap_is_refused(node, disk):
    one = disk()
    subprocess.run(["/usr/sbin/mkswap", "-q", str(one.node)], check=True, capture_output=True)
    # swap is the whole machine's: of the least priority, and for a moment only
    on = subprocess.run(
        ["/usr/sbin/swapon", "-p", "0", str(one.node)], check=False, capture_output=True, text=True
    )
    if on.returncode:
        pytest.skip(f"THIS MACHINE TAKES NO SWAP, the refusal of swap is tested on text only: {on.stderr}")
    try:
        give(node, slappart0=one.node)
        assert refused(apply(node)) == {str(one.node): "device.swap"}
        assert access(one.node) == UNTOUCHED
    finally:
        subprocess.run(["/usr/sbin/swapoff", str(one.node)], check=True)


def test_what_is_no_disk_below_dev_is_refused(node, disk, tmp_path):
    one = disk()
    outside = make_node(tmp_path / "outside", one.node.stat().st_rdev)
    stale = make_node("/dev/stale", os.makedev(240, 200))
    tenants = Path("/dev/shm/tenants")
    links = {Path("/dev/to-outside"): outside, Path("/dev/to-nothing"): "/dev/nothing", tenants: one.node}
    try:
        for link, target in links.items():
            link.symlink_to(target)
        os.lchown(tenants, USER1, USER1)
        give(node, slappart0=["/dev/null", "/dev/pts", stale, *links])
        done = apply(node)
        assert refused(done) == {
            "/dev/null": "device.no_block_device",
            "/dev/pts": "device.outside",
            "/dev/stale": "device.missing",
            "/dev/to-outside": "path.untrusted",
            "/dev/to-nothing": "device.missing",
            str(tenants): "path.untrusted",
        }
        assert done["left"] == []
        assert all(one["hint"] for one in done["refused"])
        assert access(one.node) == UNTOUCHED
        Path("/dev/to-outside").unlink()
        Path("/dev/to-outside").symlink_to("/proc/version")
        give(node, slappart0="/dev/to-outside")
        assert refused(apply(node)) == {"/dev/to-outside": "device.outside"}
    finally:
        for path in (outside, stale, *links):
            path.unlink(missing_ok=True)


def test_one_disk_for_two_partitions_is_neithers(node, disk):
    one = disk()
    part = one.partition(1)
    name = one.link("ata-COPIED")
    give(node, slappart0=one.node)
    apply(node)
    for other in (name, part):
        give(node, slappart1=other)
        done = apply(node)
        assert refused(done) == {str(one.node): "device.shared", str(other): "device.shared"}
        assert done["left"] == []
        assert access(one.node) == access(part) == UNTOUCHED
    give(node, slappart0=[one.node, name, part], slappart1=None)
    assert refused(apply(node)) == {}
    assert [open_as(USER0, path) for path in (one.node, part)] == [0, 0]


# --- what others have, and what the tenant did --------------------------------------------------------------------------


def test_entries_and_owners_of_others_stay(node, disk):
    one, two = disk(), disk()
    theirs = posix_acl.with_user(posix_acl.of_mode(0o640), 1000, 4)
    posix_acl.write(str(one.node), theirs)
    os.chown(two.node, 1000, DISK_GROUP)
    before = os.getxattr(one.node, ACL)
    give(node, slappart0=[one.node, two.node])
    apply(node)
    assert [open_as(uid, one.node) for uid in (USER0, USER1, 1000)] == [0, errno.EACCES, errno.EACCES]
    assert access(one.node)[3] == {1000: 4, USER0: 6}
    assert access(two.node)[0] == 1000
    give(node, slappart0=None)
    apply(node)
    assert os.getxattr(one.node, ACL) == before
    assert access(two.node) == (1000, DISK_GROUP, 0o660, {}, 6)


def test_a_node_that_the_user_owned_becomes_the_systems(node, disk):
    """As slapos.core's devperm gives it: the owner may have handed it on."""
    one = disk()

    def as_devperm_gives():
        os.chown(one.node, USER0, DISK_GROUP)
        posix_acl.write(str(one.node), posix_acl.with_user(posix_acl.of_mode(0o666), USER1, 6))

    as_devperm_gives()
    give(node, slappart0=one.node)
    handed_on, owned = plan(node)["operations"]
    assert (handed_on["action"], handed_on["id"]) == ("remove", f"block-device{one.node}/slapuser1")
    assert (owned["action"], owned["before"]) == ("change", "slapuser0 owns the node, and could hand it on")
    assert not apply(node)["left"]
    assert access(one.node) == (0, DISK_GROUP, 0o660, {USER0: 6}, 6)
    assert [open_as(uid, one.node) for uid in (USER0, USER1)] == [0, errno.EACCES]
    as_devperm_gives()
    os.chown(one.node, USER0, USER0)
    give(node, slappart0=None)
    assert not apply(node)["left"]
    assert access(one.node) == (0, 0, 0o660, {}, 6)


def test_a_changed_mode_is_repaired_while_the_partition_has_the_disk_for_itself(node, disk):
    one = disk()
    give(node, slappart0=one.node)
    apply(node)
    own = os.open(one.node, EXCLUSIVE)  # as a program of the partition may
    try:
        assert (plan(node)["operations"], plan(node)["refused"]) == ([], [])
        one.node.chmod(0o600)  # the mask of the list, too
        assert open_as(USER0, one.node) == errno.EACCES
        assert shown(node, "slappart0")["drift"] == [
            f"block-device{one.node}/slapuser0",
            "resource-file/slappart0",
        ]
        assert shown(node, "slappart0")["block_devices"] == []
        assert not apply(node)["left"]
        assert open_as(USER0, one.node) == 0
    finally:
        os.close(own)


def test_what_a_user_had_that_is_gone_is_taken_back(node, disk):
    one = disk()
    posix_acl.write(str(one.node), posix_acl.with_user(posix_acl.of_mode(0o660), 5777, 6))
    (planned,) = plan(node)["operations"]
    assert planned["id"] == f"block-device{one.node}/uid-5777"
    assert not apply(node)["left"]
    assert access(one.node) == UNTOUCHED
