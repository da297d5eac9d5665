"""Root's hands in a tenant's directory: no link followed, nothing blocked on, nothing read without a bound."""

import os
import socket
import stat
from pathlib import Path

import pytest

from partitiond import files
from partitiond.errors import PartitiondError


@pytest.fixture
def tree(tmp_path):
    with files.directory(tmp_path) as descriptor:
        yield tmp_path, descriptor


def refused(name, descriptor, **options):
    with pytest.raises(PartitiondError) as caught:
        files.read(name, dir_fd=descriptor, limit=100, **options)
    assert caught.value.code == "files.refused"
    assert caught.value.resource == name
    return str(caught.value)


def test_a_plain_file_is_read_up_to_the_bound(tree):
    path, descriptor = tree
    (path / "a").write_bytes(b"x" * 100)
    assert files.read("a", dir_fd=descriptor, limit=100) == b"x" * 100
    (path / "a").write_bytes(b"x" * 101)
    assert "more than 100" in refused("a", descriptor)


def test_a_link_is_not_followed(tree):
    path, descriptor = tree
    (path / "a").symlink_to("/etc/passwd")
    assert "plain file" in refused("a", descriptor)


def test_a_fifo_does_not_block(tree):
    path, descriptor = tree
    os.mkfifo(path / "a")
    assert "not a regular file" in refused("a", descriptor)


def test_a_socket_a_directory_and_a_device_are_refused(tree):
    path, descriptor = tree
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path / "s"))
    (path / "d").mkdir()
    (path / "z").symlink_to("/dev/zero")
    refused("s", descriptor)
    assert "not a regular file" in refused("d", descriptor)
    refused("z", descriptor)


def test_a_giant_sparse_file_is_not_read(tree):
    path, descriptor = tree
    with (path / "a").open("wb") as file:
        file.truncate(1 << 40)
    assert "1099511627776 bytes" in refused("a", descriptor)


def test_the_owner_matters_where_it_is_asked_for(tree):
    path, descriptor = tree
    (path / "a").write_bytes(b"x")
    os.chown(path / "a", 4711, 4711)
    assert "uid 4711" in refused("a", descriptor, owners=frozenset((0,)))
    assert files.read("a", dir_fd=descriptor, limit=9, owners=frozenset((0, 4711))) == b"x"


def test_what_is_not_there_is_file_not_found(tree):
    with pytest.raises(FileNotFoundError):
        files.read("a", dir_fd=tree[1], limit=9)
    with pytest.raises(FileNotFoundError), files.directory(tree[0], "no"):
        pass


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_component_that_is_no_directory_is_refused(tmp_path, kind):
    (tmp_path / "real" / "tunnel").mkdir(parents=True)
    if kind == "link":
        (tmp_path / "etc").symlink_to("real")
    else:
        (tmp_path / "etc").write_bytes(b"")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(PartitiondError) as caught, files.directory(tmp_path, "etc", "tunnel"):
        pass
    assert caught.value.code == "files.not_a_directory"
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_is_replaced_and_not_written_through(tree):
    path, descriptor = tree
    (path / "shadow").write_bytes(b"secret")
    (path / "a").symlink_to(path / "shadow")
    files.write("a", b"new", dir_fd=descriptor, mode=0o640, owner=(4711, 4712))
    assert (path / "shadow").read_bytes() == b"secret"
    found = (path / "a").lstat()
    assert stat.S_ISREG(found.st_mode)
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, 4711, 4712)


def test_a_failed_write_leaves_nothing(tree):
    path, descriptor = tree
    (path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write("a", b"new", dir_fd=descriptor, mode=0o640)
    assert [one.name for one in path.iterdir()] == ["a"]


def test_names_are_bounded(tree):
    path, descriptor = tree
    for number in range(30):
        (path / f"{number:02}").write_bytes(b"")
    assert len(files.names(descriptor, limit=10)) == 10
    assert files.names(descriptor) == [f"{number:02}" for number in range(30)]


def test_emptying_keeps_what_links_point_to(tree):
    path, _ = tree
    (path / "in").mkdir()
    with files.directory(path / "in") as inside:
        (path / "out").mkdir()
        (path / "out" / "kept").write_bytes(b"x")
        (path / "in" / "link").symlink_to(path / "out")
        os.mkfifo(path / "in" / "fifo")
        (path / "in" / "deep" / "er").mkdir(parents=True)
        (path / "in" / "deep" / "er" / "file").write_bytes(b"x")
        (path / "in" / "deep").chmod(0)
        files.empty(inside)
    assert list((path / "in").iterdir()) == []
    assert (path / "out" / "kept").read_bytes() == b"x"


def test_a_tree_deeper_than_any_path_is_removed(tree):
    _, descriptor = tree
    current = os.dup(descriptor)
    for _ in range(5000):
        os.mkdir("d", dir_fd=current)
        following = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=current)
        os.close(current)
        current = following
    os.close(os.open("leaf", os.O_WRONLY | os.O_CREAT, dir_fd=current))
    os.close(current)
    files.empty(descriptor)
    assert files.names(descriptor) == []


@pytest.mark.parametrize("depth", [(), ("a",), ("a", "b", "c")])
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_inside_is_refused_and_what_it_shows_kept(tmp_path, mount, depth, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    inside = tmp_path.joinpath("in", *depth)
    point = inside / "mounted"
    point.mkdir(parents=True)
    if kind == "tmpfs":
        mount("-t", "tmpfs", "none", point)
    else:
        mount("--bind", outside, point)
    (point / "kept").write_bytes(b"x")
    with files.directory(tmp_path / "in") as descriptor, pytest.raises(PartitiondError) as caught:
        files.empty(descriptor)
    assert caught.value.code == "files.mounted"
    assert [path.name for path in tmp_path.rglob("kept")]


@pytest.fixture
def mount():
    import subprocess

    done = []

    def make(*arguments):
        subprocess.run(["/usr/bin/mount", *map(str, arguments)], check=True)
        done.append(arguments[-1])

    yield make
    for point in reversed(done):
        # it may have been moved with the directory that it lies in
        subprocess.run(["/usr/bin/umount", str(point)], check=False, capture_output=True)
        with open("/proc/self/mountinfo", encoding="utf-8") as table:
            left = [line.split()[4] for line in table if point.name in line.split()[4]]
        for path in left:
            subprocess.run(["/usr/bin/umount", path], check=True)
