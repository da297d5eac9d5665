"""POSIX access control lists: more users of a file than its owner, as acl(5) has them.

Read and written through the extended attribute ``system.posix_acl_access`` (layout: include/uapi/linux/posix_acl_xattr.h, tags:
include/uapi/linux/posix_acl.h), so that no program is started. What is changed here changes nobody else's effective rights.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_ATTRIBUTE = "system.posix_acl_access"
_VERSION = 2
_ENTRY = struct.Struct("<HHI")  # tag, permissions, id
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_ID = 0xFFFFFFFF

READ_WRITE = 6


@dataclass(frozen=True, slots=True)
class Acl:
    """Permissions (bits r=4, w=2, x=1) of the owner, the group, others, and of further users and groups by number.

    ``mask`` bounds those of the group and of all further ones; None where there are none of these.
    """

    owner: int
    group: int
    other: int
    users: Mapping[int, int] = field(default_factory=dict)
    groups: Mapping[int, int] = field(default_factory=dict)
    mask: int | None = None

    def of_user(self, uid: int) -> int:
        """What a further user may really do; 0 for one that is not named."""
        return self.users.get(uid, 0) & (7 if self.mask is None else self.mask)


def of_mode(mode: int) -> Acl:
    """What the mode of a file without a list says."""
    return Acl(mode >> 6 & 7, mode >> 3 & 7, mode & 7)


def with_user(acl: Acl, uid: int, permissions: int) -> Acl:
    """Add a user, or give it other permissions. Pure."""
    settled = _settled(acl)
    return _masked(replace(settled, users={**settled.users, uid: permissions}))


def without_users(acl: Acl, uids: frozenset[int]) -> Acl:
    """Take users away. Pure."""
    settled = _settled(acl)
    return _masked(
        replace(settled, users={uid: may for uid, may in settled.users.items() if uid not in uids})
    )


def _settled(acl: Acl) -> Acl:
    """The same rights without a mask: another mask would give back what the old one holds back."""
    mask = 7 if acl.mask is None else acl.mask
    return Acl(
        acl.owner,
        acl.group & mask,
        acl.other,
        {uid: may & mask for uid, may in acl.users.items()},
        {gid: may & mask for gid, may in acl.groups.items()},
    )


def _masked(acl: Acl) -> Acl:
    """Add the mask that a list with further users or groups must have: one that holds nothing back."""
    if not acl.users and not acl.groups:
        return acl
    mask = acl.group
    for may in (*acl.users.values(), *acl.groups.values()):
        mask |= may
    return replace(acl, mask=mask)


def parse(value: bytes) -> Acl:
    """Decode the attribute. Raises ValueError."""
    if len(value) < 4 or (len(value) - 4) % _ENTRY.size or value[:4] != struct.pack("<I", _VERSION):
        raise ValueError(f"no access control list of version {_VERSION}: {value[:16].hex()}")
    single: dict[int, int] = {}
    named: dict[int, dict[int, int]] = {_USER: {}, _GROUP: {}}
    for tag, permissions, number in _ENTRY.iter_unpack(value[4:]):
        if tag in named:
            named[tag][number] = permissions
        else:
            single[tag] = permissions
    try:
        return Acl(
            single[_USER_OBJ],
            single[_GROUP_OBJ],
            single[_OTHER],
            named[_USER],
            named[_GROUP],
            single.get(_MASK),
        )
    except KeyError as error:
        raise ValueError(f"an access control list without the entry {error}") from error


def render(acl: Acl) -> bytes:
    """Encode the attribute, in the order that the kernel insists on."""
    entries = [
        (_USER_OBJ, acl.owner, _NO_ID),
        *((_USER, may, uid) for uid, may in sorted(acl.users.items())),
        (_GROUP_OBJ, acl.group, _NO_ID),
        *((_GROUP, may, gid) for gid, may in sorted(acl.groups.items())),
        *(() if acl.mask is None else ((_MASK, acl.mask, _NO_ID),)),
        (_OTHER, acl.other, _NO_ID),
    ]
    return struct.pack("<I", _VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)


def read(path: str, mode: int) -> Acl | None:
    """The list of a file with that mode; None where its file system has no such lists. Raises OSError, ValueError."""
    try:
        return parse(os.getxattr(path, _ATTRIBUTE))
    except OSError as error:
        if error.errno == errno.ENODATA:
            return of_mode(mode)
        if error.errno == errno.EOPNOTSUPP:
            return None
        raise


def exists(path: str) -> bool:
    """Whether a file has a list; also one that is gone has none. Raises OSError."""
    try:
        return bool(os.getxattr(path, _ATTRIBUTE))
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOENT):
            return False
        raise


def write(path: str, acl: Acl) -> None:
    """Set the list of a file and the mode with it; one that says no more than a mode is not kept. Raises OSError."""
    os.setxattr(path, _ATTRIBUTE, render(acl))
