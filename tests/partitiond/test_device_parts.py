"""The parts of block devices: access control lists, what the system uses, trusted paths, the section of the configuration."""

import errno
import os
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from device_loops import DISK_GROUP, USER0, USER1, disks, make_node, open_as

from partitiond import block_devices, block_layers, config, device_access, posix_acl, trusted_path
from partitiond.block_layers import Layers, Use
from partitiond.device_config import OperatorDevice
from partitiond.errors import PartitiondError
from partitiond.posix_acl import Acl
from partitiond.users import User, UserDatabase

# --- access control lists -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o660, 0o600, 0o640, 0o000, 0o777])
def test_a_list_that_is_given_and_taken_leaves_the_mode(tmp_path, mode):
    path = str(tmp_path / "file")
    Path(path).touch()
    Path(path).chmod(mode)
    before = posix_acl.of_mode(mode)
    assert posix_acl.read(path, mode) == before
    posix_acl.write(path, posix_acl.with_user(before, 5000, 6))
    found = posix_acl.read(path, 0)
    assert (found.users, found.of_user(5000), found.group) == ({5000: 6}, 6, before.group)
    posix_acl.write(path, posix_acl.without_users(found, frozenset((5000, 5001))))
    assert stat.S_IMODE(Path(path).stat().st_mode) == mode
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, "system.posix_acl_access")


def test_nobody_gets_more_by_another_ones_entry():
    """A mask that held somebody back is not lifted for that one."""
    held_back = Acl(6, 6, 0, {1000: 6}, {50: 7}, mask=4)
    given = posix_acl.with_user(held_back, 5000, 6)
    assert (given.group, given.users, given.groups, given.mask) == (4, {1000: 4, 5000: 6}, {50: 4}, 6)
    assert given.of_user(1000) == held_back.of_user(1000) == 4
    taken = posix_acl.without_users(given, frozenset((5000,)))
    assert (taken.of_user(1000), taken.mask) == (4, 4)


def test_the_bytes_are_those_of_the_kernel():
    acl = Acl(6, 4, 0, {5001: 6, 5000: 4}, {6: 2}, 7)
    assert posix_acl.parse(posix_acl.render(acl)) == acl
    # getfattr -e hex of setfacl -m u:5000:rw on a file of mode 0660
    known = bytes.fromhex(
        "0200000001000600ffffffff020006008813000004000600ffffffff10000600ffffffff20000000ffffffff"
    )
    assert posix_acl.render(posix_acl.with_user(posix_acl.of_mode(0o660), 5000, 6)) == known


@pytest.mark.parametrize(
    "value", [b"", b"\1\0\0\0", b"\2\0\0\0", b"\2\0\0\0\1\0\6\0", b"\2\0\0\0" + bytes(8)]
)
def test_what_is_no_list_is_an_error(value):
    with pytest.raises(ValueError, match="access control list"):
        posix_acl.parse(value)


# --- what the system uses -----------------------------------------------------------------------------------------------

MOUNTINFO = r"""
21 1 8:1 / / rw - ext4 /dev/root rw
22 21 8:1 /sub /srv/bound rw - ext4 /dev/root rw
23 21 0:5 / /proc rw shared:1 - proc proc rw
24 21 253:2 / /srv/with\040blank rw shared:2 master:3 - xfs /dev/mapper/vg-lv rw
25 21 0:40 / /srv/btrfs rw - btrfs {source} rw
26 21 0:41 / /srv/nfs rw - nfs host:/dev/export rw
""".lstrip()


def files_of_proc(directory, source="/dev/nothing", swap="/dev/nothing"):
    (directory / "self").mkdir(parents=True)
    (directory / "self" / "mountinfo").write_text(MOUNTINFO.replace("{source}", source))
    (directory / "swaps").write_text(
        f"Filename\tType\tSize\tUsed\tPriority\n{swap} partition\t1024\t0\t-2\n/swap\\040file file\t1\t0\t-3\n"
    )
    return directory


def test_mounts_and_swap_are_found_by_device(tmp_path):
    btrfs, swap = "/dev/a\\134b", "/dev/swap"
    make_node("/dev/a\\b", os.makedev(7, 201))
    make_node(swap, os.makedev(7, 202))
    try:
        found = block_layers.uses(files_of_proc(tmp_path / "proc", btrfs, swap))
    finally:
        Path("/dev/a\\b").unlink()
        Path(swap).unlink()
    assert found == {
        os.makedev(8, 1): Use("mount", "/"),  # and not the less telling /srv/bound
        os.makedev(253, 2): Use("mount", "/srv/with blank"),
        os.makedev(7, 201): Use("mount", "/srv/btrfs"),
        os.makedev(7, 202): Use("swap", "/dev/swap"),
    }


@pytest.mark.parametrize(
    ("where", "own"),
    [("/", True), ("/boot", True), ("/boot/efi", True), ("/usr", True), ("/srv/a", False), ("/bootx", False)],
)
def test_what_is_the_machines_own(where, own):
    assert Use("mount", where).by_system == own


def sysfs(root, **devices):
    """A tree as /sys/dev/block: names with their number, what they stand on, and their disk."""
    (root / "dev").mkdir(parents=True)
    for name, (number, disk, slaves) in devices.items():
        directory = root / "devices" / disk / name if disk else root / "devices" / name
        (directory / "holders").mkdir(parents=True)
        (directory / "dev").write_text(f"{number}\n")
        if disk:
            (directory / "partition").write_text("1\n")
        (root / "dev" / number).symlink_to(directory)
        for slave in slaves:
            (directory / "slaves").mkdir(exist_ok=True)
            below = next((root / "devices").glob(f"**/{slave}"))
            (directory / "slaves" / slave).symlink_to(below)
            (below / "holders" / name).symlink_to(directory)
    return Layers(root / "dev")


def test_volumes_stand_on_partitions_and_these_on_disks(tmp_path):
    """On a tree made by hand: device mapper and md are not in every kernel that tests run on."""
    layers = sysfs(
        tmp_path,
        sda=("8:0", None, ()),
        sda1=("8:1", "sda", ()),
        sdb=("8:16", None, ()),
        md0=("9:0", None, ("sda1", "sdb")),
        lv=("253:0", None, ("md0",)),
        sdc=("8:32", None, ()),
    )
    sda, sda1, sdb, md0, lv, sdc = (
        os.makedev(*number) for number in ((8, 0), (8, 1), (8, 16), (9, 0), (253, 0), (8, 32))
    )
    assert layers.under(lv) == {md0, sda1, sda, sdb}
    assert layers.under(sda1) == {sda}
    assert layers.under(sdc) == frozenset()
    assert [layers.holders(rdev) for rdev in (sda, sda1, sdb, md0, lv, sdc)] == [
        ["md0"],
        ["md0"],
        ["md0"],
        ["lv"],
        [],
        [],
    ]
    own = Use("mount", "/")
    assert layers.bearers({lv: own, sda1: Use("swap", "x")}) == {
        lv: own,
        md0: own,
        sda: own,
        sdb: own,
        sda1: own,
    } | {sda1: own}
    assert layers.exists(sdc)
    assert not layers.exists(os.makedev(8, 48))


# --- paths --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place():
    """A directory that is root's all the way down."""
    path = Path("/srv/trusted")
    (path / "a" / "b").mkdir(parents=True)
    (path / "a" / "b" / "file").touch()
    (path / "others").mkdir()
    yield path
    subprocess.run(["rm", "-r", str(path)], check=True)


def test_paths_are_followed_as_the_kernel_does(place):
    (place / "relative").symlink_to("a/../a//b/./")
    (place / "absolute").symlink_to(place / "relative")
    (place / "a" / "up").symlink_to("../absolute/file")
    for name in ("a/b/file", "relative/file", "absolute/file", "a/up", "a/b/../up"):
        assert trusted_path.resolve(str(place / name)) == str((place / name).resolve())


def test_what_leads_nowhere(place):
    (place / "loop").symlink_to("loop")
    (place / "dangling").symlink_to("nothing")
    for name in ("nothing", "nothing/file", "dangling", "loop", "a/b/file/below"):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            trusted_path.resolve(str(place / name))


@pytest.mark.parametrize(
    ("uid", "gid", "mode"), [(5000, 0, 0o755), (0, 5000, 0o775), (0, 0, 0o777), (0, 0, 0o1777)]
)
def test_a_directory_that_others_can_change_is_not_passed(place, uid, gid, mode):
    os.chown(place / "others", uid, gid)
    (place / "others").chmod(mode)
    (place / "others" / "link").symlink_to(place / "a")
    (place / "through").symlink_to(place / "others" / "link")
    for name in ("others/link/b/file", "through/b/file", "through"):
        with pytest.raises(PartitiondError) as caught:
            trusted_path.resolve(str(place / name))
        assert (caught.value.code, caught.value.resource) == ("path.untrusted", str(place / "others"))
    assert trusted_path.resolve(str(place / "others")) == str(place / "others")


def test_the_group_of_root_may_write(place):
    (place / "others").chmod(0o775)
    trusted_path.check_directory(str(place / "others"))


# --- configuration --------------------------------------------------------------------------------------------------------

GOOD = """\
[slapos]
computer_id = COMP-1
master_url = https://master.example/
software_root = /srv/t/software
instance_root = /srv/t/instance
[slapformat]
interface_name = br0
partition_amount = 3
[block_devices]
"""
LINE = GOOD.count("\n") + 1


def load(directory, section):
    path = directory / "slapos.cfg"
    path.write_text(GOOD + section)
    return config.load(path)


def test_devices_know_where_they_stand(tmp_path):
    found = load(
        tmp_path,
        "slappart0 = /dev/disk/by-id/ata-A /dev/sdb  ; two\n"
        "slappart2 =\n  /dev/disk/by-path/pci-0000:00:1f.2-ata-1\n  /dev/mapper/vg-a\\x20b\nslappart1 =\n",
    )
    file = str(tmp_path / "slapos.cfg")
    assert found.block_devices == (
        OperatorDevice("/dev/disk/by-id/ata-A", "slappart0", file, LINE),
        OperatorDevice("/dev/sdb", "slappart0", file, LINE),
        OperatorDevice("/dev/disk/by-path/pci-0000:00:1f.2-ata-1", "slappart2", file, LINE + 1),
        OperatorDevice("/dev/mapper/vg-a\\x20b", "slappart2", file, LINE + 1),
    )
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("slappart0 = sdb", "paths below /dev"),
        ("slappart0 = /dev", "paths below /dev"),
        ("slappart0 = /dev/", "paths below /dev"),
        ("slappart0 = /dev/../etc/passwd", "paths below /dev"),
        ("slappart0 = /dev//sdb", "paths below /dev"),
        ("slappart0 = /devices/sdb", "paths below /dev"),
        ("slappart0 = /dev/s\x1bdb", "paths below /dev"),
        ("slappart00 = /dev/sdb", "slappart0 to slappart2"),
        ("slappart = /dev/sdb", "slappart0 to slappart2"),
        ("partition1 = /dev/sdb", "slappart0 to slappart2"),
    ],
)
def test_a_bad_line_is_named_with_its_place(tmp_path, line, allowed):
    with pytest.raises(PartitiondError) as caught:
        load(tmp_path, f"slappart1 = /dev/sda\n{line}\n")
    assert caught.value.code == "config.value"
    assert f"slapos.cfg:{LINE + 1}: " in str(caught.value)
    assert allowed in str(caught.value)


def test_each_device_is_of_one_partition(tmp_path):
    with pytest.raises(PartitiondError, match="this one is slappart0's already") as caught:
        load(tmp_path, "slappart0 = /dev/sda /dev/sda\nslappart1 = /dev/sda\n")
    assert f"slapos.cfg:{LINE + 1}: slappart1 = '/dev/sda'" in str(caught.value)


def test_a_partition_beyond_the_amount_is_a_warning(tmp_path):
    found = load(tmp_path, "slappart2 = /dev/sdb\nslappart3 = /dev/sdc\n")
    assert [one.name for one in found.block_devices] == ["/dev/sdb"]
    (warning,) = found.warnings
    assert f"slapos.cfg:{LINE + 1}: slappart3 gets no block device" in warning


@pytest.mark.parametrize(
    "name",
    [
        "/dev/disk/by-uuid/1",
        "/dev/disk/by-label/a",
        "/dev/disk/by-partlabel/a",
        "/dev/disk/by-id/lvm-pv-uuid-x",
    ],
)
def test_a_name_that_is_written_on_the_disk_is_a_warning(tmp_path, name):
    (warning,) = load(tmp_path, f"slappart0 = {name}\n").warnings
    assert f"slapos.cfg:{LINE}: {name} is named by what is written on it" in warning


# --- a file system without access control lists -------------------------------------------------------------------------


def partition(index):
    uid = USER0 + index
    return SimpleNamespace(id=f"slappart{index}", user=f"slapuser{index}", uid=uid, gid=uid)


DATABASE = UserDatabase(
    {
        f"slapuser{index}": User(
            f"slapuser{index}",
            USER0 + index,
            USER0 + index,
            f"partitiond slappart{index}",
            "/",
            "/bin/sh",
            True,
        )
        for index in range(2)
    },
    {},
    {},
)


@pytest.fixture
def plain():
    """A file system for nodes that knows no lists."""
    path = Path("/dev/plain")
    path.mkdir()
    try:
        subprocess.run(["mount", "-t", "ramfs", "-o", "mode=0755", "none", str(path)], check=True)
        yield path
        subprocess.run(["umount", str(path)], check=True)
    finally:
        path.rmdir()


def test_without_lists_the_user_becomes_the_owner(plain, tmp_path):
    with disks(tmp_path) as make:
        node = make_node(plain / "disk", make().node.stat().st_rdev, mode=0o600)
        wanted = OperatorDevice(str(node), "slappart1", "slapos.cfg", 1)

        def look(*devices):
            seen = block_devices.observe(
                SimpleNamespace(block_devices=devices, uid_base=USER0),
                [partition(0), partition(1)],
                DATABASE,
                dev=plain,
            )
            return block_devices.plan(seen)

        planned = look(wanted)
        assert (planned.withdrawals, planned.refused) == ((), ())
        device_access.grant(planned.grants[0])
        assert look(wanted) == block_devices.DevicePlan()
        assert [open_as(uid, node) for uid in (USER0, USER1)] == [errno.EACCES, 0]
        found = node.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (USER1, DISK_GROUP, 0o600)
        os.chown(node, USER1, USER1)  # as the owner could
        node.chmod(0o666)
        (back,) = look().withdrawals
        device_access.withdraw(back)
        found = node.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o660)
        assert look() == block_devices.DevicePlan()


def test_a_node_that_became_another_device_is_left_alone(tmp_path):
    with disks(tmp_path) as make:
        first, second = make(), make()
        wanted = OperatorDevice(str(first.node), "slappart1", "slapos.cfg", 1)
        configuration = SimpleNamespace(block_devices=(wanted,), uid_base=USER0)
        seen = block_devices.observe(configuration, [partition(1)], DATABASE)
        (planned,) = block_devices.plan(seen).grants
        first.node.unlink()
        make_node(first.node, second.node.stat().st_rdev)
        with pytest.raises(PartitiondError) as caught:
            device_access.grant(planned)
        assert (caught.value.code, caught.value.retryable) == ("device.changed", True)
        assert open_as(USER1, first.node) == errno.EACCES
