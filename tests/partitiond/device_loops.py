"""Loop devices as disks: attached to files of the test's own, detached one by one, gone by themselves if a test is killed."""

import contextlib
import ctypes
import fcntl
import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from json_schemas import validate

from partitiond import posix_acl, status, verbs

# include/uapi/linux/loop.h
LOOP_CLR_FD, LOOP_CONFIGURE, LOOP_CTL_GET_FREE = 0x4C01, 0x4C0A, 0x4C82
LO_FLAGS_AUTOCLEAR, LO_FLAGS_PARTSCAN = 4, 8
# include/uapi/linux/blkpg.h
BLKPG, BLKPG_ADD_PARTITION = 0x1269, 1
DISK_GROUP = 6  # Debian's static number of disk, whose mode udev gives: root:disk 0660

_libc = ctypes.CDLL(None, use_errno=True)


class _Partition(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_longlong),
        ("length", ctypes.c_longlong),
        ("number", ctypes.c_int),
        ("names", ctypes.c_char * 128),
    )


class _Argument(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("length", ctypes.c_int),
        ("data", ctypes.c_void_p),
    )


def make_node(path, rdev, mode=0o660, gid=DISK_GROUP):
    """A node as udev leaves it."""
    os.mknod(path, stat.S_IFBLK | 0o600, rdev)
    os.chown(path, 0, gid)
    Path(path).chmod(mode)
    return Path(path)


class Disk:
    """A loop device over a file or another device; ``node`` is its path."""

    def __init__(self, backing):
        self.nodes = []
        self.links = []
        self._descriptor, number = _attach(backing)
        self.name = f"loop{number}"
        self.node = self._add(f"/dev/{self.name}", os.makedev(7, number))

    @classmethod
    def made(cls, directory):
        """One of 16 MiB over a new file."""
        backing = directory / f"disk-{os.urandom(4).hex()}"
        backing.touch()
        os.truncate(backing, 16 * 2**20)
        return cls(backing)

    def _add(self, path, rdev):
        made = make_node(path, rdev)
        self.nodes.append(made)
        return made

    def partition(self, number, start=1, length=4):
        """Cut a partition (MiB) and return its node."""
        cut = _Partition(start * 2**20, length * 2**20, number)
        argument = _Argument(BLKPG_ADD_PARTITION, 0, ctypes.sizeof(cut), ctypes.addressof(cut))
        if _libc.ioctl(self._descriptor, BLKPG, ctypes.byref(argument)) != 0:
            raise OSError(ctypes.get_errno(), "BLKPG_ADD_PARTITION")
        name = f"{self.name}p{number}"
        major, minor = Path("/sys/block", self.name, name, "dev").read_text().split(":")
        return self._add(f"/dev/{name}", os.makedev(int(major), int(minor)))

    def link(self, name):
        """Let a stable name lead to it, as udev does: a link that is replaced whole."""
        path = Path("/dev/disk/by-id", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".#{name}")
        temporary.symlink_to(f"../../{self.name}")
        temporary.rename(path)
        self.links.append(path)
        return path

    def close(self):
        for path in (*self.links, *self.nodes):
            path.unlink(missing_ok=True)
        try:
            fcntl.ioctl(self._descriptor, LOOP_CLR_FD)
        finally:
            os.close(self._descriptor)


def _attach(backing):
    """Attach a file to a free loop device; return a descriptor that keeps it, and its number."""
    control = Path("/dev/loop-control")
    if not control.exists():
        os.mknod(control, stat.S_IFCHR | 0o600, os.makedev(10, 237))
    file = os.open(backing, os.O_RDWR)
    try:
        for _ in range(20):
            try:
                with control.open("rb+", buffering=0) as asked:
                    number = fcntl.ioctl(asked, LOOP_CTL_GET_FREE)
            except OSError as error:
                pytest.skip(f"THIS KERNEL HAS NO LOOP DEVICES, block devices are not tested: {error}")
            found = _configure(number, file)
            if found is not None:
                return found, number
    finally:
        os.close(file)
        control.unlink()
    pytest.fail("no loop device was free for long enough")


def _configure(number, file):
    path = Path(f"/dev/attaching-{number}")
    os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, number))
    descriptor = os.open(path, os.O_RDWR)
    path.unlink()
    information = bytearray(232)  # struct loop_info64, lo_flags at 52
    struct.pack_into("<I", information, 52, LO_FLAGS_AUTOCLEAR | LO_FLAGS_PARTSCAN)
    try:
        fcntl.ioctl(descriptor, LOOP_CONFIGURE, struct.pack("<II", file, 0) + bytes(information) + bytes(64))
    except OSError:  # somebody else on this machine was faster
        os.close(descriptor)
        return None
    return descriptor


_OPEN = """
import os, sys
try:
    descriptor = os.open(sys.argv[1], os.O_RDWR)
except OSError as error:
    sys.exit(error.errno)
os.pwrite(descriptor, b"written by " + str(os.getuid()).encode().ljust(501), 0)
os.fsync(descriptor)
"""


def open_as(uid, path):
    """Open a device for reading and writing as a user, and write; the errno, or 0."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _OPEN, str(path)],
        user=uid,
        group=uid,
        extra_groups=[],
        check=False,
        stderr=subprocess.PIPE,
    )
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode


@contextlib.contextmanager
def disks(directory):
    """Make disks; each is detached at the end, whatever happened."""
    with contextlib.ExitStack() as stack:

        def make():
            made = Disk.made(directory)
            stack.callback(made.close)
            return made

        yield make


# --- a node with disks --------------------------------------------------------------------------------------------------

USER0, USER1, USER2 = 5000, 5001, 5002


def give(node, **devices):
    """Write the section; names of several devices are lists."""
    node.write(
        block_devices={
            partition: None
            if names is None
            else " ".join(map(str, names if isinstance(names, list) else [names]))
            for partition, names in devices.items()
        }
    )


def plan(node):
    with node.context() as context:
        return validate({"schema": "partitiond/plan/1", **verbs.plan(context)})


def apply(node, *partitions):
    with node.context() as context:
        return validate({"schema": "partitiond/apply/1", **verbs.apply(context, list(partitions))})


def refused(value):
    return {one["name"]: one["code"] for one in value["refused"]}


def shown(node, name):
    with node.context() as context:
        return status.partition(context, name)


def resource(node, partition):
    return json.loads((node.instance / partition / ".slapos-resource").read_text())


def access(path):
    """Owner, group, mode and the access control list of a node."""
    found = Path(path).stat()
    acl = posix_acl.read(str(path), found.st_mode)
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), acl.users, acl.group


UNTOUCHED = (0, DISK_GROUP, 0o660, {}, 6)
