"""What a user leaves on the node outside of its own directories: jobs, IPC objects, files where everybody may write.

With private namespaces most of it is never there, but logins, programs that began before, and nodes that share theirs leave it;
and the next instance in the partition is the same user. Promises: only what is the user's own goes, links are not followed.

Kernel facts: ``/proc/sysvipc/*`` lists the objects of the reader's own IPC namespace, proc(5); owner and creator may both
remove one, and root may, shmctl(2); message queues of mq_overview(7) are files of the mounted ``mqueue`` file system.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import files
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Callable

# Debian's cron and at, and cron of others; crontab(1), at(1)
_CRONTABS = (Path("/var/spool/cron/crontabs"), Path("/var/spool/cron"))
_JOBS = (Path("/var/spool/cron/atjobs"), Path("/var/spool/cron/atspool"), Path("/var/spool/at"))
_MAIL = (Path("/var/mail"), Path("/var/spool/mail"))
_SHARED = tuple(map(Path, ("/tmp", "/var/tmp", "/dev/shm", "/run/lock", "/dev/mqueue")))  # noqa: S108 - theirs, not ours
_HOLDER = re.compile(r"\.removing-[0-9a-f]{16}")
_IPC_RMID = 0
_SYSVIPC = Path("/proc/sysvipc")


def remove_jobs(user: str, uid: int) -> None:
    """Remove what others would start in the user's name: its crontab, its jobs of at(1). Raises OSError, PartitiondError."""
    for directory in _CRONTABS:
        _remove_named(directory, user)
    for directory in _JOBS:
        _remove_owned(directory, uid, trees=False)


def remove(user: str, uid: int) -> None:
    """Remove the user's mail, its IPC objects and its files in directories of everybody. Raises OSError, PartitiondError."""
    for directory in _MAIL:
        _remove_named(directory, user)
    remove_ipc(uid)
    for directory in _SHARED:
        _remove_owned(directory, uid, trees=True)


def _remove_named(directory: Path, name: str) -> None:
    """Remove a plain file of that name in a directory that the system has for such."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), files.directory(directory) as descriptor:
        if stat.S_ISREG(os.lstat(name, dir_fd=descriptor).st_mode):
            os.unlink(name, dir_fd=descriptor)


def _remove_owned(directory: Path, uid: int, *, trees: bool) -> None:
    """Remove what lies in a directory and is the user's, with ``trees`` also its directories with all in them.

    What others put into a directory of the user's goes with it: whose a directory is may remove what is in it.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), files.directory(directory) as descriptor:
        # what is removed during a walk may make it miss other entries (readdir(3p))
        while _walk_over(descriptor, uid, trees=trees):
            pass


def _walk_over(descriptor: int, uid: int, *, trees: bool) -> bool:
    """Remove what is the user's in one walk to the end, however many names others have made; return whether anything was."""
    removed = False
    with os.scandir(descriptor) as entries:
        for entry in entries:
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            is_directory = stat.S_ISDIR(found.st_mode)
            left_over = found.st_uid == 0 and is_directory and _HOLDER.fullmatch(entry.name)
            if (found.st_uid != uid and not left_over) or (is_directory and not trees):
                continue
            removed = True
            if is_directory:
                files.remove(entry.name, dir_fd=descriptor)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.name, dir_fd=descriptor)
    return removed


def remove_ipc(uid: int) -> None:
    """Remove the System V objects that the user owns or made, in the namespace that we are in. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    calls: dict[str, Callable[[int], int]] = {
        "shm": lambda number: libc.shmctl(number, _IPC_RMID, None),
        "sem": lambda number: libc.semctl(number, 0, _IPC_RMID),
        "msg": lambda number: libc.msgctl(number, _IPC_RMID, None),
    }
    for kind, call in calls.items():
        for number in _objects(kind, uid):
            if call(number) != 0 and ctypes.get_errno() not in (errno.EINVAL, errno.EIDRM):  # gone meanwhile
                code = ctypes.get_errno()
                raise PartitiondError(
                    "remains.ipc",
                    f"cannot be removed: {os.strerror(code)}",
                    resource=f"{kind} {number} of uid {uid}",
                    hint="look at it with ipcs, remove it with ipcrm, then try again",
                    retryable=True,
                )


def _objects(kind: str, uid: int) -> list[int]:
    """The identifiers of a user's objects of a kind."""
    try:
        head, *rows = (_SYSVIPC / kind).read_text("ascii").splitlines()
    except FileNotFoundError:  # a kernel without
        return []
    columns = head.split()
    identifier, owner, maker = 1, columns.index("uid"), columns.index("cuid")  # the first is the key
    return [
        int(row.split()[identifier]) for row in rows if str(uid) in (row.split()[owner], row.split()[maker])
    ]
