"""Paths that nobody but root can lead elsewhere.

A path is followed as the kernel follows it, one name at a time, links too, and every directory on the way must be root's alone:
then what was looked at is what is used later, whatever other users do meanwhile.
"""

from __future__ import annotations

import os
import stat

from partitiond.errors import PartitiondError

_MOST_LINKS = 40  # path_resolution(7)


def resolve(path: str) -> str:
    """Return where an absolute path really leads; the last component may be of any kind.

    Raises FileNotFoundError or NotADirectoryError when there is nothing, PartitiondError ``path.untrusted`` when a directory on
    the way can be changed by others than root.
    """
    here, pending, links = "/", _names(path), 0
    while pending:
        name = pending.pop()
        if name == "..":
            here = os.path.dirname(here)
            continue
        step = os.path.join(here, name)
        mode = os.lstat(step).st_mode
        if stat.S_ISLNK(mode):
            links += 1
            if links > _MOST_LINKS:
                raise FileNotFoundError(f"{path}: too many links")
            target = os.readlink(step)  # noqa: PTH115 - as text: a Path would drop what the kernel looks at
            pending += _names(target)
            here = "/" if target.startswith("/") else here
            continue
        if pending:
            check_directory(step)
        here = step
    return here


def _names(path: str) -> list[str]:
    """The components of a path, the first one last."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def check_directory(path: str) -> None:
    """Check one directory. Raises NotADirectoryError, or PartitiondError ``path.untrusted``."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{path} is no directory")
    # the group of root has no members but root's own
    writers = 0o002 if found.st_gid == 0 else 0o022
    if found.st_uid != 0 or found.st_mode & writers:
        owner = f"uid {found.st_uid}, gid {found.st_gid}, mode {stat.S_IMODE(found.st_mode):04o}"
        raise PartitiondError(
            "path.untrusted",
            f"others than root can change {path} ({owner})",
            resource=path,
            hint=f"chown root {path}; chmod go-w {path}",
        )
