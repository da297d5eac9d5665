"""Mounts and namespaces, called directly: the few system calls that Python 3.11 has no name for.

Each raises OSError with what was tried. They change the calling thread, or its mount namespace, and nothing else.
"""

from __future__ import annotations

import ctypes
import os

# include/uapi/linux/sched.h, include/uapi/linux/mount.h, include/linux/fs.h
CLONE_FS, CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00000200, 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWCGROUP = 0x20000000, 0x40000000, 0x02000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MS_SLAVE, MS_SHARED = 16384, 1 << 18, 1 << 19, 1 << 20
_MNT_DETACH = 2
# the same numbers on every architecture (include/uapi/asm-generic/unistd.h)
_SYS_FSOPEN, _SYS_FSCONFIG = 430, 431
_FSOPEN_CLOEXEC, _FSCONFIG_SET_STRING = 1, 1

_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError when a call of the C library failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    check(_libc.mount(*arguments), f"mount {kind or source} on {target}")


def detach(target: str) -> None:
    """Take a mount and all below it out of the tree; what is in use lives on until it is not (umount2(2), MNT_DETACH)."""
    check(_libc.umount2(target.encode(), _MNT_DETACH), f"unmount {target}")


def unmount(target: str) -> None:
    """umount(2)."""
    check(_libc.umount2(target.encode(), 0), f"unmount {target}")


def unshare(flags: int) -> None:
    """unshare(2): new namespaces for the calling thread, or a root and working directory of its own (``CLONE_FS``)."""
    check(_libc.unshare(flags), "unshare")


def enter(descriptor: int, kind: int) -> None:
    """setns(2): the calling thread enters a namespace."""
    check(_libc.setns(descriptor, kind), "setns")


def knows_option(kind: str, key: str, value: str) -> bool:
    """Whether the kernel knows an option of a kind of file system; nothing is mounted (fsopen(2), Linux 5.2)."""
    descriptor = _libc.syscall(_SYS_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
    if descriptor < 0:
        return False
    try:
        words = (_FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)
        return bool(_libc.syscall(_SYS_FSCONFIG, descriptor, *words) == 0)
    finally:
        os.close(descriptor)
