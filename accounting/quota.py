"""Disk space that the file system counts itself: by user, or by subvolume of btrfs. One question instead of a walk.

Nothing is switched on here; what the operator set up is used, asked anew each time, and ``None`` is the answer
where there is nothing: then the tree is walked (``accounting.disk``).

By user (ext4, XFS, f2fs and others with usage accounting of users): all files of the partition's user on that
file system, also outside of the partition's tree, and none of others' within it. By subvolume (btrfs with
quotas, the partition's directory a subvolume of its own): what it refers to, after compression, an extent that
several files share counted once; subvolumes below it count for themselves, as they do for a walk.

Project ids are not asked: the kernel lets the owner of a file give it any project (fs/file_attr.c,
fileattr_set_prepare), so a tenant could have its files counted as another's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# quotactl(2), include/uapi/linux/quota.h. The call by descriptor came with Linux 5.14; its number is the same
# on all architectures.
_QUOTACTL_FD = 443
_GET_USERS_QUOTA = 0x800007 << 8  # QCMD(Q_GETQUOTA, USRQUOTA), which XFS answers too (fs/xfs/xfs_quotaops.c)
# struct if_dqblk: limits and use of space and inodes, two times, and which of them are valid
_DQBLK = struct.Struct("=8QI4x")
_CURRENT_SPACE, _VALID = 2, 8
_QIF_SPACE = 2

# include/uapi/linux/btrfs.h and btrfs_tree.h
_TREE_SEARCH = 0xD0009411  # _IOWR(0x94, 17, 4096 bytes)
_INODE_LOOKUP = 0xD0009412
_ARGUMENT = 4096
_SEARCH_KEY = struct.Struct("=7Q4I4Q")
_SEARCH_HEADER = struct.Struct("=3Q2I")  # transid, objectid, offset, type, length
_SUBVOLUME = 256  # BTRFS_FIRST_FREE_OBJECTID, the inode of each subvolume's top
_QUOTA_TREE = 8
_STATUS_KEY, _INFO_KEY = 240, 242
_STATUS_ITEM = struct.Struct("<3Q")  # version, generation, flags
_INFO_ITEM = struct.Struct(
    "<5Q"
)  # generation, referenced, the same compressed, exclusive, the same compressed
_STATUS_ON, _STATUS_RESCAN, _STATUS_INCONSISTENT = 1, 2, 4
_LARGEST = 2**64 - 1

# What is said where there is no such thing: no quotas of users, not btrfs, no quota tree, no call.
_NOTHING = frozenset(
    (
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.ENOTTY,
        errno.EINVAL,
        errno.ESRCH,
        errno.ENOENT,
        errno.ENOTBLK,
        errno.ENODEV,
        errno.EPERM,
        errno.EACCES,
    )
)

_libc = ctypes.CDLL(None, use_errno=True)


class CountedSpace(NamedTuple):
    """Bytes that a file system counts, and by what: two trees with one ``account`` have them together."""

    bytes: int
    account: tuple[str, int, int]


def counted_space(top: Path, uid: int) -> CountedSpace | None:
    """Give the space of the tree ``top`` of the user ``uid`` as its file system counts it, or None. Raises OSError where
    the tree can not be opened.
    """
    descriptor = os.open(top, _OPEN)
    try:
        status = os.fstat(descriptor)
        # the top of a subvolume has this number, so does hardly anything else
        if status.st_ino == _SUBVOLUME:
            found = _of_subvolume(descriptor)
            if found is not None:
                subvolume, size = found
                return CountedSpace(size, ("subvolume", status.st_dev, subvolume))
        size_of_user = _of_user(descriptor, uid)
        return None if size_of_user is None else CountedSpace(size_of_user, ("user", status.st_dev, uid))
    finally:
        os.close(descriptor)


def _of_user(descriptor: int, uid: int) -> int | None:
    answer = ctypes.create_string_buffer(_DQBLK.size)
    # each argument as wide as a register: the call takes them from there
    arguments = (descriptor, _GET_USERS_QUOTA, uid, ctypes.addressof(answer))
    if _libc.syscall(ctypes.c_long(_QUOTACTL_FD), *(ctypes.c_long(one) for one in arguments)) != 0:
        _nothing_or_raise(ctypes.get_errno())
        return None
    return users_space(answer.raw)


def users_space(answer: bytes) -> int | None:
    """Read a ``struct if_dqblk``: bytes in use, None where the file system does not say."""
    fields = _DQBLK.unpack(answer)
    return int(fields[_CURRENT_SPACE]) if fields[_VALID] & _QIF_SPACE else None


def _of_subvolume(descriptor: int) -> tuple[int, int] | None:
    """Give the number of the subvolume and what it refers to; None where that is not counted, or not yet right."""
    try:
        argument = bytearray(_ARGUMENT)
        struct.pack_into("=2Q", argument, 0, 0, _SUBVOLUME)
        fcntl.ioctl(descriptor, _INODE_LOOKUP, argument)
        subvolume = int.from_bytes(argument[:8], "little")
        states = _search(descriptor, _STATUS_KEY, 0)
        if not states or not _is_right(states[0]):
            return None
        found = _search(descriptor, _INFO_KEY, subvolume)  # the group 0/<subvolume>
    except OSError as error:
        _nothing_or_raise(error.errno or 0)
        return None
    return (subvolume, _INFO_ITEM.unpack_from(found[0])[1]) if found else None


def _is_right(state: bytes) -> bool:
    flags = int(_STATUS_ITEM.unpack_from(state)[2])
    return bool(flags & _STATUS_ON) and not flags & (_STATUS_RESCAN | _STATUS_INCONSISTENT)


def _search(descriptor: int, kind: int, offset: int) -> list[bytes]:
    """Give the items of that key in the quota tree: one or none."""
    argument = bytearray(_ARGUMENT)
    _SEARCH_KEY.pack_into(
        argument, 0, _QUOTA_TREE, 0, 0, offset, offset, 0, _LARGEST, kind, kind, 1, 0, 0, 0, 0, 0
    )
    fcntl.ioctl(descriptor, _TREE_SEARCH, argument)
    return found_items(bytes(argument))


def found_items(answer: bytes) -> list[bytes]:
    """Read a ``struct btrfs_ioctl_search_args`` that the kernel has filled."""
    number = _SEARCH_KEY.unpack_from(answer)[9]
    position, found = _SEARCH_KEY.size, []
    for _ in range(number):
        length = _SEARCH_HEADER.unpack_from(answer, position)[4]
        position += _SEARCH_HEADER.size
        found.append(answer[position : position + length])
        position += length
    return found


def _nothing_or_raise(number: int) -> None:
    if number not in _NOTHING:
        raise OSError(number, os.strerror(number))
