"""Where the cgroup programs are attached, and the file system that keeps them.

The root of the cgroup2 hierarchy that this mount namespace shows: every process of the machine is below it, wherever
systemd or supervisord put it; in a container, every process of that.  A bpffs is where a pinned link outlives us:
/sys/fs/bpf, which systemd mounts at boot; where nobody did, we do, as bpftool and iproute2 would.  It is gone with a
reboot, as everything that it kept.
"""

import ctypes
import os
from pathlib import Path

_CGROUP2_MAGIC, _BPF_MAGIC = 0x63677270, 0xCAFE4A11  # include/uapi/linux/magic.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_OWN_MOUNT = "partitiond"

BPFFS = Path("/sys/fs/bpf")

_libc = ctypes.CDLL(None, use_errno=True)


def root() -> Path | None:
    """Return a directory that shows the root of the cgroup2 hierarchy; None where none is mounted."""
    for line in (
        Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    ):
        head, _, tail = line.partition(" - ")
        if tail.startswith("cgroup2 "):
            _, _, _, below, place, *_ = head.split(" ")
            path = Path(place.encode().decode("unicode_escape") if "\\" in place else place)
            # a mount that another one covers is in the list as well
            if below == "/" and _magic(path) == _CGROUP2_MAGIC:
                return path
    return None


def has_bpffs() -> bool:
    """Whether there is a bpffs where it belongs."""
    return _magic(BPFFS) == _BPF_MAGIC


def mount_bpffs() -> None:
    """Mount one; raises OSError."""
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    if _libc.mount(_OWN_MOUNT.encode(), bytes(BPFFS), b"bpf", flags, b"mode=700"):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(BPFFS))


def unmount_bpffs() -> None:
    """Take away the one that we mounted, if nobody else keeps something there."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    there = [row for row in (line.split(" ") for line in lines) if row[4] == str(BPFFS)]
    ours = bool(there) and there[-1][-2] == _OWN_MOUNT
    # a name with a dot is the kernel's own (kernel/bpf/inode.c, bpf_lookup, populate_bpffs)
    used = any("." not in one.name for one in BPFFS.iterdir()) if ours else False
    if ours and not used and _libc.umount2(bytes(BPFFS), 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(BPFFS))


def _magic(path: Path) -> int:
    """Return what statfs(2) says the file system is; 0 for what is not there."""
    # struct statfs begins with f_type, a long
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(bytes(path), buffer):
        return 0
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF
