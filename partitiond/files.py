"""Files that root writes: whole or not at all, and never through a tenant's links.

Paths below a partition are reached by directory descriptors, one component at a time, without following links; files are
opened non-blocking, must be regular, and are read up to a bound.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import secrets
import stat
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# what a killed process may leave of write(), link() and empty(); no tenant's file has such a name
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.partitiond")
_REMOVING = re.compile(r"\.removing-[0-9a-f]{16}")
_MOST_LEFTOVERS = 100_000  # names that are looked at: a tenant may make millions
_ACLS = ("system.posix_acl_access", "system.posix_acl_default")  # of access control lists, acl(5)
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def there(path: str) -> bool:
    """Whether there is anything of that name, a link that leads nowhere included; cheapest where there is nothing."""
    return os.access(path, os.F_OK, follow_symlinks=False)


@contextmanager
def directory(path: Path, *below: str) -> Iterator[int]:
    """Open a trusted directory, then untrusted components below it, as a descriptor.

    Raises FileNotFoundError when one does not exist, PartitiondError ``files.not_a_directory`` for a link or another kind.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for component in below:
            try:
                following = os.open(component, _DIRECTORY, dir_fd=descriptor)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise PartitiondError(
                        "files.not_a_directory",
                        "is a link or no directory",
                        resource=str(path.joinpath(*below)),
                        hint="the partition's software must make a plain directory of it",
                    ) from error
                raise
            os.close(descriptor)
            descriptor = following
        yield descriptor
    finally:
        os.close(descriptor)


def read(
    name: str, *, dir_fd: int, limit: int, owners: frozenset[int] | None = None, reader: int | None = None
) -> bytes:
    """Read a regular file of at most ``limit`` bytes below a directory descriptor.

    ``owners``: the uids that may own it. ``reader``: the user in whose directory it lies; it must be that user's own or for
    everybody to read, else it may be a hard link to somebody's secret (the kernel lets users make these where
    ``fs.protected_hardlinks`` is 0, proc_sys_fs(5)). Raises as :func:`plain` does.
    """
    with plain(name, dir_fd=dir_fd) as descriptor:
        found = os.fstat(descriptor)
        if owners is not None and found.st_uid not in owners:
            raise refused(name, f"belongs to uid {found.st_uid}")
        if reader is not None and found.st_uid != reader and not found.st_mode & stat.S_IROTH:
            raise refused(name, f"belongs to uid {found.st_uid} and is not for everybody")
        if found.st_size > limit:
            raise refused(name, f"has {found.st_size} bytes, more than {limit}")
        content = content_of(descriptor, limit + 1)
        if len(content) > limit:
            raise refused(name, f"has more than {limit} bytes")
        return content


@contextmanager
def plain(name: str, *, dir_fd: int) -> Iterator[int]:
    """Open a regular file below a directory descriptor, whatever it may be, without waiting for anybody.

    Raises FileNotFoundError, or PartitiondError ``files.refused`` with the reason: also for a file on which a tenant holds a
    lease, which would keep an opening that waits for 45 s, fcntl(2).
    """
    try:
        descriptor = os.open(name, _READ, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise
        raise refused(name, f"cannot be opened as a plain file: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise refused(name, "is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def content_of(descriptor: int, most: int) -> bytes:
    """Read an open file to its end, or as many bytes. Raises OSError."""
    content = b""
    while len(content) < most and (piece := os.read(descriptor, most - len(content))):
        content += piece
    return content


def refused(name: str, reason: str) -> PartitiondError:
    """The error for a file that is not read."""
    return PartitiondError(
        "files.refused",
        reason,
        resource=ascii(name)[1:-1],
        hint="make it a plain, small file of the partition's user",
    )


def write(
    name: str,
    content: bytes,
    *,
    dir_fd: int,
    mode: int,
    owner: tuple[int, int] = (0, 0),
    durable: bool = False,
) -> None:
    """Replace a file below a directory descriptor, whole or not at all. Raises OSError.

    ``durable``: also when the machine loses its power. What every plan compares by its content can do without: it is
    written again.
    """
    temporary = _temporary(name)
    descriptor = os.open(temporary, _NEW, 0o600, dir_fd=dir_fd)
    try:
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            _give(descriptor, owner)
            os.fchmod(descriptor, mode)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        with _ignoring_missing():
            os.unlink(temporary, dir_fd=dir_fd)
        raise
    if durable:
        os.fsync(dir_fd)


def _give(descriptor: int, owner: tuple[int, int]) -> None:
    """Make it the owner's; an ordinary user, who can give nothing away, has all that is written for itself. Raises OSError."""
    if os.geteuid() == 0:
        os.fchown(descriptor, *owner)


def flush(dir_fd: int) -> None:
    """Have everything that was written to a directory's file system on the disk (syncfs(2)). Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).syncfs(dir_fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def link(name: str, target: Path | str, *, dir_fd: int) -> None:
    """Replace a symbolic link below a directory descriptor, in one step. Raises OSError."""
    temporary = _temporary(name)
    os.symlink(target, temporary, dir_fd=dir_fd)
    os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)


def _temporary(name: str) -> str:
    """A name that nobody can have taken before us, a tenant in its own directory included."""
    return f".{name[:80]}.{secrets.token_hex(6)}.partitiond"


def remove_leftovers(dir_fd: int, *, trees: bool = False) -> None:
    """Remove the temporary files and links that a killed process left in a directory, for when nobody else writes there.

    ``trees``: also directories whose removal had begun (:func:`empty`), in a directory of root's. Raises OSError,
    PartitiondError ``files.mounted``.
    """
    for name in _names_like(dir_fd, _TEMPORARY):
        with _ignoring_missing():
            os.unlink(name, dir_fd=dir_fd)
    # those below come up while one is removed
    while trees and (names := _names_like(dir_fd, _REMOVING)):
        for name in names:
            _remove_tree(dir_fd, name, _mount_of(dir_fd))


def _names_like(dir_fd: int, shape: re.Pattern[str]) -> list[str]:
    with os.scandir(dir_fd) as entries:
        return [entry.name for entry in islice(entries, _MOST_LEFTOVERS) if shape.fullmatch(entry.name)]


@contextmanager
def _ignoring_missing() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        return


def write_path(path: Path, content: bytes, *, mode: int = 0o644, owner: tuple[int, int] = (0, 0)) -> None:
    """Replace a file in a directory of root's, durably. Raises OSError."""
    with directory(path.parent) as descriptor:
        write(path.name, content, dir_fd=descriptor, mode=mode, owner=owner, durable=True)


def is_own(path: Path | str) -> bool:
    """Whether a file is a plain one that only who runs this can change: nobody else's, under no second name, no link."""
    try:
        return is_ours(os.lstat(path))
    except FileNotFoundError:
        return False


def is_ours(found: os.stat_result) -> bool:
    """The same of what stat(2) says."""
    # the group of root has no members but root's own; so it is, by custom, with that of a user's name
    writers = 0o002 if found.st_gid == os.getegid() else 0o022
    plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
    return plain and found.st_uid == os.geteuid() and not found.st_mode & writers


def remove_path(path: Path) -> None:
    """Remove a file from a directory of root's, durably; one that is not there is fine. Raises OSError."""
    with _ignoring_missing(), directory(path.parent) as descriptor:
        os.unlink(path.name, dir_fd=descriptor)
        os.fsync(descriptor)


def make_directory(path: Path, mode: int) -> None:
    """Make a directory in one of root's, durably; one that is there is fine. Raises OSError."""
    with directory(path.parent) as descriptor:
        try:
            os.mkdir(path.name, mode, dir_fd=descriptor)
        except FileExistsError:
            return
        os.fsync(descriptor)


def names(dir_fd: int, limit: int = 1000) -> list[str]:
    """The sorted names in a directory, at most ``limit`` (a tenant may make millions)."""
    found = []
    with os.scandir(dir_fd) as entries:
        for entry in entries:
            found.append(entry.name)
            if len(found) >= limit:
                break
    return sorted(found)


def seal(dir_fd: int) -> None:
    """Make a directory root's alone. Raises OSError.

    Who still has it open can neither make nor rename anything in it any more: that is asked at each name, not at the opening
    (path_resolution(7)).
    """
    _give(dir_fd, (0, 0))
    remove_acl(dir_fd)
    os.fchmod(dir_fd, 0o700)


def has_acl(path: str) -> bool:
    """Whether a directory opens more than its mode says, itself or what is made in it. Raises OSError.

    Asked by name: a tenant can attach so much that names are not listed any more (E2BIG above 64 KiB, listxattr(2)).
    """
    for name in _ACLS:
        try:
            os.getxattr(path, name, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
        else:
            return True
    return False


def remove_acl(dir_fd: int) -> None:
    """Take the access control lists off a directory, by name as in :func:`has_acl`. Raises OSError."""
    for name in _ACLS:
        try:
            os.removexattr(dir_fd, name)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise


def _strip(dir_fd: int) -> None:
    """Take off what users attached to a directory that cannot be made anew, which is sealed. Raises OSError.

    More names than the kernel lists stay: no call tells them, and to fail would let a tenant keep its own end from coming.
    """
    try:
        names = os.listxattr(dir_fd)
    except OSError as error:
        if error.errno == errno.E2BIG:
            logger.warning("%s: extended attributes stay: too many to be listed", _path_of(dir_fd))
        elif error.errno != errno.EOPNOTSUPP:
            raise
        return
    for name in names:
        if name.startswith("user."):
            os.removexattr(dir_fd, name)


def _path_of(descriptor: int) -> str:
    return ascii(os.readlink(f"/proc/self/fd/{descriptor}"))[1:-1]  # noqa: PTH115 - of a descriptor


def empty(dir_fd: int, *, keep: frozenset[str] = frozenset()) -> None:
    """Remove everything below a directory descriptor, never following links nor crossing into another mount.

    ``keep`` are names of files in the directory itself that stay.

    Iterative, and no list of names is kept, so that neither the depth nor the number of files exhausts stack, descriptors or
    memory. Directories are sealed before they are emptied, so that nobody refills them. Raises OSError, or PartitiondError
    ``files.mounted``, ``files.not_removed``.
    """
    mount = _mount_of(dir_fd)
    while _remove_entries(dir_fd, keep, mount):
        pass


def remove(name: str, *, dir_fd: int) -> None:
    """Remove what has that name in a directory that others may write to, with all below; what is not there is fine.

    It is taken into a directory of root's first, where nobody else is at it. Raises as :func:`empty` does.
    """
    holder = f".removing-{secrets.token_hex(8)}"
    os.mkdir(holder, 0o700, dir_fd=dir_fd)
    descriptor = os.open(holder, _DIRECTORY, dir_fd=dir_fd)
    try:
        with _explaining(name), _ignoring_missing():
            os.rename(name, name, src_dir_fd=dir_fd, dst_dir_fd=descriptor)
        empty(descriptor)
    finally:
        os.close(descriptor)
        # empty, unless something in it could not be removed
        with contextlib.suppress(OSError):
            os.rmdir(holder, dir_fd=dir_fd)


def remove_emptied(path: Path) -> None:
    """Remove an empty, sealed directory from one of root's; a mount point stays, stripped. Raises OSError.

    Whoever still has it open, perhaps from a time when it was open to all, holds nothing of what comes after it.
    """
    try:
        path.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        with directory(path.parent, path.name) as descriptor:
            _strip(descriptor)


def _mount_of(descriptor: int) -> bytes:
    """The mount in which an open directory lies.

    Not ``st_dev``: a bind mount of the same file system has the same one, and what it shows lies elsewhere.
    """
    with open(f"/proc/self/fdinfo/{descriptor}", "rb") as stream:
        return stream.read().partition(b"mnt_id:")[2].split()[0]


def _remove_entries(dir_fd: int, keep: frozenset[str], mount: bytes) -> bool:
    """Walk over a directory once and remove what is there; return whether there was anything.

    What is removed during the walk may make it miss other entries (readdir(3p)): it is taken until nothing is found.
    """
    found = False
    with os.scandir(dir_fd) as entries:
        for entry in entries:
            if entry.name in keep:
                continue
            found = True
            if entry.is_dir(follow_symlinks=False):
                _remove_tree(dir_fd, entry.name, mount)
            else:
                _unlink(dir_fd, entry.name)
    return found


def _unlink(dir_fd: int, name: str) -> None:
    with _explaining(name), _ignoring_missing():
        os.unlink(name, dir_fd=dir_fd)


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    """Turn the kernel's refusal to remove or move something into an error that says what is in the way."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _mounted(name) from error
        raise PartitiondError(
            "files.not_removed",
            f"cannot be removed: {error.strerror}",
            resource=ascii(name)[1:-1],
            hint="is it immutable (lsattr), or the file system read-only or broken?",
            retryable=True,
        ) from error


def _mounted(name: str) -> PartitiondError:
    return PartitiondError(
        "files.mounted",
        "something is mounted there",
        resource=ascii(name)[1:-1],
        hint="unmount it, then try again",
    )


def _remove_tree(dir_fd: int, name: str, mount: bytes) -> None:
    """Remove one directory with all files in it; directories in it are moved up first, which bounds the depth."""
    with _explaining(name):
        if os.geteuid() != 0:
            # root opens whatever it likes; what an ordinary user has closed to itself it may open again
            os.chmod(name, 0o700, dir_fd=dir_fd)
        descriptor = os.open(name, _DIRECTORY, dir_fd=dir_fd)
        try:
            if _mount_of(descriptor) != mount:
                raise _mounted(name)
            seal(descriptor)
            while _lift_entries(descriptor, dir_fd):
                pass
        finally:
            os.close(descriptor)
        os.rmdir(name, dir_fd=dir_fd)


def _lift_entries(dir_fd: int, top: int) -> bool:
    """Unlink the files of a directory and move its directories to the top: no tree is too deep for a walk of two levels."""
    found = False
    with os.scandir(dir_fd) as entries:
        for entry in entries:
            found = True
            if entry.is_dir(follow_symlinks=False):
                with _explaining(entry.name):
                    following = f".removing-{secrets.token_hex(8)}"
                    os.rename(entry.name, following, src_dir_fd=dir_fd, dst_dir_fd=top)
            else:
                _unlink(dir_fd, entry.name)
    return found
