"""Space that file systems count: btrfs for real, the answers of ext4 and XFS as the kernel's headers lay them out."""

import os
import struct
import subprocess

import pytest
from accounting_disks import mounted

from accounting import quota
from accounting.quota import counted_space, found_items, users_space

USER = 5000


def btrfs(*words):
    subprocess.run(["/usr/bin/btrfs", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """A btrfs with a directory and two subvolumes; no quotas yet."""
    with mounted("btrfs", tmp_path_factory.mktemp("btrfs"), 128) as found:
        for name in ("one", "two"):
            btrfs("subvolume", "create", found / name)
        (found / "directory").mkdir()
        yield found


def write(path, megabytes):
    path.write_bytes(os.urandom(megabytes << 20))
    os.sync()


def shown(top):
    """What btrfs-progs say, by the number of the subvolume."""
    said = subprocess.run(
        ["/usr/bin/btrfs", "qgroup", "show", "--raw", "--sync", str(top)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    rows = (line.split() for line in said.splitlines() if line.startswith("0/"))
    return {int(row[0].removeprefix("0/")): int(row[1]) for row in rows}


def test_btrfs_counts_subvolumes_once_quotas_are_on_and_until_they_are_off(top):
    trees = [top / name for name in ("one", "two", "directory")]
    assert [counted_space(tree, USER) for tree in trees] == [None] * 3
    btrfs("quota", "enable", top)
    btrfs("quota", "rescan", "-w", top)
    for megabytes in (3, 5):
        write(top / "one/file", megabytes)
        one, two, directory = (counted_space(tree, USER) for tree in trees)
        assert megabytes << 20 <= one.bytes < (megabytes + 1) << 20
        assert two.bytes < 1 << 20
        assert directory is None
        truth = shown(top)
        assert {one.account[2]: one.bytes, two.account[2]: two.bytes}.items() <= truth.items()
    # an extent of two files counts once; a walk would count both
    subprocess.run(["/bin/cp", "--reflink=always", top / "one/file", top / "one/same"], check=True)
    os.sync()
    assert counted_space(top / "one", USER).bytes < 6 << 20
    # what a snapshot shares, each refers to
    btrfs("subvolume", "snapshot", top / "one", top / "two/snapshot")
    os.sync()
    assert counted_space(top / "one", USER).bytes >= 5 << 20
    assert counted_space(top / "two", USER).bytes < 1 << 20
    btrfs("quota", "disable", top)
    assert [counted_space(tree, USER) for tree in trees] == [None] * 3


def test_figures_that_are_not_right_yet_are_not_given(top):
    """A scan that goes over it all anew makes the state say so; so does what makes the figures inconsistent."""
    btrfs("quota", "enable", top)
    btrfs("quota", "rescan", "-w", top)
    assert counted_space(top / "two", USER) is not None
    (state,) = _states(top)
    version, generation, flags = quota._STATUS_ITEM.unpack_from(state)
    assert flags & 1
    for wrong in (0, flags | 2, flags | 4):
        assert not quota._is_right(quota._STATUS_ITEM.pack(version, generation, wrong))
    # one that is assigned to a group above, whose sum is now wrong: the kernel says that it is inconsistent
    btrfs("qgroup", "create", "1/1", top)
    subprocess.run(
        ["/usr/bin/btrfs", "qgroup", "assign", "--no-rescan", f"0/{_number(top / 'one')}", "1/1", str(top)],
        check=True,
        capture_output=True,
    )
    os.sync()
    write(top / "one/more", 1)
    assert not quota._is_right(_states(top)[0])
    assert counted_space(top / "two", USER) is None
    btrfs("quota", "disable", top)


def _states(top):
    descriptor = os.open(top, os.O_RDONLY)
    try:
        return quota._search(descriptor, quota._STATUS_KEY, 0)
    finally:
        os.close(descriptor)


def _number(path):
    shows = subprocess.run(
        ["/usr/bin/btrfs", "inspect-internal", "rootid", str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(shows.stdout)


def test_where_nobody_counts_there_is_no_answer_and_no_error(tmp_path):
    assert counted_space(tmp_path, USER) is None
    with mounted("ext4", tmp_path) as found:
        assert counted_space(found, USER) is None


def test_a_tree_that_is_not_there_or_a_link_is_an_error(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("nothing", "link"):
        with pytest.raises(OSError, match=r"No such|Not a directory|Too many"):
            counted_space(tmp_path / name, USER)


def dqblk(space, valid, *, inodes=7):
    """struct if_dqblk of include/uapi/linux/quota.h, field by field."""
    fields = {
        "dqb_bhardlimit": 0,
        "dqb_bsoftlimit": 0,
        "dqb_curspace": space,
        "dqb_ihardlimit": 0,
        "dqb_isoftlimit": 0,
        "dqb_curinodes": inodes,
        "dqb_btime": 0,
        "dqb_itime": 0,
    }
    return b"".join(struct.pack("=Q", value) for value in fields.values()) + struct.pack("=I4x", valid)


@pytest.mark.parametrize(
    ("answer", "space"),
    [
        (dqblk(4096, 0x3F), 4096),  # QIF_ALL, as quota_getquota gives it for ext4 and f2fs
        (dqblk(2**40 + 512, 0x3F), 2**40 + 512),
        (dqblk(0, 0x2), 0),
        (dqblk(4096, 0x3F & ~0x2), None),
    ],
)
def test_the_answer_about_a_users_quota(answer, space):
    assert len(answer) == 72
    assert users_space(answer) == space


def test_the_answer_of_a_search_in_a_tree():
    """struct btrfs_ioctl_search_args: the key with the number of items, then headers and items."""
    key = struct.pack("=7Q4I4Q", 8, 0, 0, 0, 2**64 - 1, 0, 2**64 - 1, 240, 242, 2, 0, 0, 0, 0, 0)
    items = [struct.pack("<5Q", 9, 16384, 16384, 1, 1), struct.pack("<3Q", 1, 9, 1)]
    body = b"".join(struct.pack("=3Q2I", 9, 0, 256, 242, len(item)) + item for item in items)
    assert found_items((key + body).ljust(4096, b"\0")) == items
