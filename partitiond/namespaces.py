"""Private namespaces of partitions: mounts and System V IPC of their own, pinned so that they outlive whoever made them.

In a partition's namespaces ``/proc`` shows its own processes only; ``/tmp``, ``/var/tmp``, ``/dev/shm`` and ``/run/lock`` are
its own, and so are System V IPC and POSIX message queues. What the host mounts later arrives, nothing goes the other way.

One pin for each: the mount namespace on a file of a small private tmpfs. The kernel copies such mounts into no other mount
namespace (fs/namespace.c, ``is_mnt_ns_file``), but it does copy pins of IPC namespaces; so that one is pinned inside the mount
namespace, where only root gets. Both go together when the last process has left and the pin is gone.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from partitiond import mounts
from partitiond.mounts import CLONE_FS, CLONE_NEWIPC, CLONE_NEWNS, MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

NSENTER = "/usr/bin/nsenter"
# of the memory, for all that a partition keeps in those directories together; the kernel's own default is half for each
_SIZE = "25%"
# all that everybody may write into: programs use these for what only they should see, too
_COVERED = (
    *(("tmp", "/tmp"), ("var-tmp", "/var/tmp")),  # noqa: S108 - the private ones
    *(("shm", "/dev/shm"), ("lock", "/run/lock")),  # noqa: S108 - likewise
)
IPC = "ipc"
_QUEUES = "/dev/mqueue"
# a new IPC namespace begins with the kernel's defaults (ipc_namespaces(7)); what the operator has set is meant for tenants too
_IPC_SETTINGS = (
    *("kernel/shmmax", "kernel/shmall", "kernel/shmmni", "kernel/shm_rmid_forced", "kernel/sem"),
    *("kernel/msgmax", "kernel/msgmnb", "kernel/msgmni"),
    *("fs/mqueue/msg_max", "fs/mqueue/msgsize_max", "fs/mqueue/queues_max"),
    *("fs/mqueue/msg_default", "fs/mqueue/msgsize_default"),
)
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def hides_processes() -> bool:
    """Whether this kernel hides processes in one mount of ``/proc`` alone: Linux 5.8, which brought the word for it, too.

    Before, the option would change every ``/proc`` of the machine.
    """
    return mounts.knows_option("proc", "hidepid", "invisible")


def pinned(directory: Path) -> dict[str, bool]:
    """The names below ``directory``, and whether a namespace is pinned there."""
    try:
        names = os.listdir(directory)  # noqa: PTH208 - names suffice
    except FileNotFoundError:
        return {}
    if not names:
        return {}
    # all namespaces lie in one file system of the kernel's own (fs/nsfs.c)
    device = os.stat("/proc/self/ns/mnt").st_dev  # noqa: PTH116 - likewise
    return {name: os.stat(f"{directory}/{name}").st_dev == device for name in names}  # noqa: PTH116 - for 500 of them


class Mounted(NamedTuple):
    """A mount: where, the number and the kind of its file system, and what of that it shows."""

    place: str
    device: int
    kind: str
    root: str


def windows() -> tuple[Mounted, ...]:
    """Each other ``/proc`` of this machine than the one that all use; namespaces have those that came after them, too."""
    return tuple(_other_procs())


def open_windows(
    directory: Path, names: Iterable[str], found: Sequence[Mounted]
) -> dict[str, tuple[Mounted, ...]]:
    """Which of the windows that were ``found`` the pinned namespaces have; all, where that cannot be seen."""
    if not found:
        return {}

    def look(pins: int, name: str) -> tuple[Mounted, ...]:
        try:
            _enter(pins, name)
        except OSError:
            return tuple(found)  # closing them will say why
        return tuple(one for one in found if _is_open(one))

    with _opened(directory, _DIRECTORY) as pins, _visitor() as thread:
        seen = {name: thread.submit(look, pins, name) for name in names}
        return {name: one.result() for name, one in seen.items() if one.result()}


def close(directory: Path, name: str, found: Sequence[Mounted]) -> None:
    """Take windows out of pinned namespaces; on the machine they stay. Raises OSError."""

    def detach(pins: int) -> None:
        _enter(pins, name)
        for one in found:
            while _is_open(one):  # the same may lie there more than once
                mounts.detach(one.place)

    with _opened(directory, _DIRECTORY) as pins, _visitor() as thread:
        thread.submit(detach, pins).result()


def is_outside(pin: Path, pid: int) -> bool:
    """Whether a process is in another mount namespace than the pinned one; one that has ended is not."""
    try:
        found = os.stat(f"/proc/{pid}/ns/mnt")  # noqa: PTH116 - a magic link
    except FileNotFoundError:
        return False
    return not pin.exists() or not os.path.samestat(found, pin.stat())


def mounts_arrive() -> bool:
    """Whether what is mounted on this machine later reaches the namespaces: where / is shared, as systemd makes it."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            fields = line.split(" ")
            if fields[4] == "/":
                return any(field.startswith("shared:") for field in fields[6 : fields.index("-")])
    return False


def entry(directory: Path, name: str, cwd: Path) -> tuple[str, ...]:
    """The words before a command that let it begin in the namespaces of ``name``, in the directory ``cwd``; for root.

    Twice: where the IPC namespace is pinned can only be seen from inside.
    """
    return (
        *(NSENTER, f"--mount={directory}/{name}", "--"),
        *(NSENTER, f"--ipc={directory}/{IPC}", f"--wdns={cwd}", "--"),
    )


def make(
    directory: Path, names: Iterable[str], shown: Sequence[Path] = ()
) -> tuple[tuple[str, OSError], ...]:
    """Make and pin namespaces; return those that failed.

    ``shown`` are directories that stay as they are also where they lie below one that is covered. Raises OSError when
    ``directory`` cannot be made ready.
    """
    _make_ready(directory)
    settings = _read_settings()
    hidden = hides_processes()
    # unshare(2) and setns(2) change the calling thread only, so no process is needed
    with ThreadPoolExecutor(1, "namespaces") as thread:
        lay_out = partial(_lay_out, directory, shown, settings, hidden)
        return thread.submit(_make_all, directory, names, lay_out).result()


def remove(directory: Path, name: str) -> None:
    """Remove a pin; the namespaces live on as long as a process is in them. One that is not there is fine. Raises OSError."""
    pin = f"{directory}/{name}"
    # MNT_DETACH: a process that is just entering keeps nothing busy
    _detach_if_there(pin)
    Path(pin).unlink(missing_ok=True)


def remove_all(directory: Path) -> None:
    """Remove all pins and what they stand on. Raises OSError."""
    while os.path.ismount(directory):
        mounts.detach(str(directory))
    try:
        directory.rmdir()
    except FileNotFoundError:
        return


def _make_ready(directory: Path) -> None:
    """A mount of its own, which shares nothing: the kernel lets no namespace be pinned where it could come to hold itself."""
    directory.mkdir(mode=0o700, exist_ok=True)
    if not os.path.ismount(directory):
        mounts.mount(
            "partitiond", str(directory), "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700,size=1m"
        )
    # each time: who was killed between the two has left it shared
    mounts.mount("none", str(directory), "", mounts.MS_PRIVATE)


def _read_settings() -> dict[str, bytes]:
    found = {}
    for name in _IPC_SETTINGS:
        try:
            with open(f"/proc/sys/{name}", "rb") as stream:
                found[name] = stream.read()
        except FileNotFoundError:
            continue  # a kernel without message queues
    return found


def _make_all(
    directory: Path, names: Iterable[str], lay_out: Callable[[], None]
) -> tuple[tuple[str, OSError], ...]:
    failures = []
    processors = iter(range(os.cpu_count() or 1))
    with _opened("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC) as home:
        for name in names:
            try:
                _make_one(directory, name, home, lay_out, processors)
            except OSError as error:
                failures.append((name, error))
            mounts.enter(home, CLONE_NEWNS)  # where it was not left; from elsewhere no other could be made
    return tuple(failures)


def _make_one(
    directory: Path, name: str, home: int, lay_out: Callable[[], None], processors: Iterator[int]
) -> None:
    remove(directory, name)
    while True:
        mounts.unshare(CLONE_NEWNS | CLONE_NEWIPC)
        lay_out()
        with _opened("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC) as made:
            mounts.enter(home, CLONE_NEWNS)
            try:
                _pin(f"/proc/self/fd/{made}", f"{directory}/{name}")
            except OSError as error:
                # Only a younger namespace can be pinned (mnt_ns_loop), and since Linux 6.18 the numbers that tell the age are
                # given out by each processor in lots of its own: seen where ours is not the machine's first.
                if error.errno != errno.EINVAL or not _moved(processors):
                    raise
            else:
                return


def _moved(processors: Iterator[int]) -> bool:
    """Move this thread to the next processor on which it may run; whether there was one."""
    for processor in processors:
        try:
            os.sched_setaffinity(0, {processor})
        except OSError as error:
            if error.errno != errno.EINVAL:  # offline, or not for us (cpuset(7))
                raise
        else:
            return True
    return False


def _pin(namespace: str, pin: str) -> None:
    os.close(os.open(pin, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    mounts.mount(namespace, pin, "", MS_BIND)


# --- inside -----------------------------------------------------------------------------------------------------------


def _lay_out(directory: Path, shown: Sequence[Path], settings: dict[str, bytes], hidden: bool) -> None:
    # slave: what the host mounts and unmounts later arrives, nothing goes the other way
    mounts.mount("none", "/", "", mounts.MS_REC | mounts.MS_SLAVE)
    _write_settings(settings)
    if hidden:
        _close_windows()  # before any is covered: what came to light later could not be reached now
    mounts.mount("partitiond", str(directory), "tmpfs", MS_NOSUID | MS_NODEV, f"mode=0700,size={_SIZE}")
    _cover(directory, shown)
    if os.path.ismount(_QUEUES):
        mounts.mount("mqueue", _QUEUES, "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    if hidden:
        _hide_processes()
    pin = directory / IPC
    pin.touch(mode=0o600)
    mounts.mount("/proc/thread-self/ns/ipc", str(pin), "", MS_BIND)


def _write_settings(settings: dict[str, bytes]) -> None:
    for name, content in list(settings.items()):
        path = Path("/proc/sys", name)
        if path.read_bytes() == content:
            del settings[
                name
            ]  # all new namespaces begin alike: for the others of this pass it need not be looked at
        else:
            path.write_bytes(content)


def _cover(directory: Path, shown: Sequence[Path]) -> None:
    """Put empty directories of one file system over those that everybody shares: one limit, and one to be kept in memory."""
    targets = {name: os.path.realpath(path) for name, path in _COVERED if os.path.isdir(path)}  # noqa: PTH112 - likewise
    with ExitStack() as stack:
        below = [path for path in shown if path.is_dir() and _covers(targets.values(), path)]
        kept = [(path, stack.enter_context(_opened(path, _DIRECTORY))) for path in below]
        # by descriptor: it may lie below one of them itself
        own = stack.enter_context(_opened(directory, _DIRECTORY))
        done = set()
        for name, target in targets.items():
            if target not in done:  # one may be a link to another
                done.add(target)
                os.mkdir(name, dir_fd=own)
                os.chmod(f"/proc/self/fd/{own}/{name}", 0o1777)  # noqa: PTH101, S103 - as everybody expects of them
                mounts.mount(f"/proc/self/fd/{own}/{name}", target, "", MS_BIND)
        for path, descriptor in kept:
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
            mounts.mount(f"/proc/self/fd/{descriptor}", str(path), "", MS_BIND | mounts.MS_REC)


def _covers(targets: Iterable[str], path: Path) -> bool:
    return any(path.is_relative_to(target) for target in targets)


def _hide_processes() -> None:
    """Show in ``/proc`` only whose they are, and besides what lies over it: a container's own meminfo, what it masks."""
    with ExitStack() as stack:
        kept = [
            (place, stack.enter_context(_opened(place, os.O_PATH | os.O_CLOEXEC)))
            for place in _laid_over_proc()
        ]
        mounts.mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "hidepid=invisible")
        for place, descriptor in kept:
            if os.path.lexists(place):
                mounts.mount(f"/proc/self/fd/{descriptor}", place, "", MS_BIND)


def _laid_over_proc() -> list[str]:
    """What of ``/proc`` is another mount that can be carried over, the first one first.

    Not the directories of processes, and no other part of ``/proc`` than the one of that name, which could show some.
    """
    return [
        one.place
        for one in _mounted()[::-1]
        if _is_below_proc(one.place)
        and not one.place.split("/")[2].isdigit()
        and (one.kind != "proc" or one.place == f"/proc{one.root}")
        and one.kind != "autofs"  # served for where it is, and it brings nothing of its own
        and os.path.lexists(one.place)
    ]


def _close_windows() -> None:
    """Take away any other ``/proc`` (of a chroot, for one): it would be a window beside ours.

    One that lies below another mount cannot be reached, by us as little as by tenants.
    """
    for one in _other_procs():
        _detach_if_there(one.place)


def _detach_if_there(place: str) -> None:
    try:
        mounts.detach(place)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOENT,
            errno.ENOTDIR,
        ):  # no mount there, or nothing at all
            raise


def _visitor() -> ThreadPoolExecutor:
    """A thread that may enter namespaces: setns(2) wants a root and a working directory that it shares with no other."""
    return ThreadPoolExecutor(1, "namespaces", partial(mounts.unshare, CLONE_FS))


def _enter(pins: int, name: str) -> None:
    """Enter pinned namespaces, from wherever: ``pins`` is the directory of the pins, which is seen from outside only."""
    with _opened(name, os.O_RDONLY | os.O_CLOEXEC, pins) as pin:
        mounts.enter(pin, CLONE_NEWNS)


def _is_open(window: Mounted) -> bool:
    try:
        return os.stat(window.place).st_dev == window.device  # noqa: PTH116 - for 500 of them
    except OSError:
        return False  # nothing there that could be reached


def _is_below_proc(place: str) -> bool:
    return place.startswith("/proc/")


def _other_procs() -> list[Mounted]:
    """Each other mount of ``/proc``, the last one first; what lies below it goes where it goes."""
    found = _mounted(b" - proc ")
    return [one for one in found if one.place != "/proc" and not _is_below_proc(one.place)]


def _mounted(words: bytes = b" ") -> list[Mounted]:
    """All mounts that have these words in their line (proc_pid_mountinfo(5)), the last one first."""
    found = []
    with open("/proc/thread-self/mountinfo", "rb") as stream:
        for line in stream:
            if words not in line:
                continue
            left, _, right = line.partition(b" - ")
            fields = left.split(b" ")
            major, minor = map(int, fields[2].split(b":"))
            kind = right.split(b" ", 1)[0].decode()
            found.append(Mounted(_plain(fields[4]), os.makedev(major, minor), kind, _plain(fields[3])))
    return found[::-1]


def _plain(path: bytes) -> str:
    # proc_pid_mountinfo(5): blanks and the like are written in octal
    if b"\\" not in path:
        return os.fsdecode(path)
    return os.fsdecode(path.decode("unicode_escape").encode("latin-1"))


@contextmanager
def _opened(path: Path | str, flags: int, below: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, flags, dir_fd=below)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
