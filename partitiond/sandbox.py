"""A throw-away machine made of private namespaces, for the demo and the tests.

Promises: network, mounts, processes, System V IPC and the host name are private; ``/etc``, ``/run``, ``/var``, ``/tmp``,
``/srv`` and ``/dev`` are private copies or empty, and the host's other files can only be read; the first process reaps
orphans and takes everything down with it when the command ends or this process is killed, so nothing is left on the host.

Where the host has a cgroup2 hierarchy, the sandbox is in a cgroup of its own and sees no other, and has a bpffs of its own:
programs that are attached inside see its processes alone, and go with it. Where that cannot be, it has neither.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from netplan import cgroup
from partitiond.mounts import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    unmount,
    unshare,
)
from partitiond.mounts import check as _check
from partitiond.mounts import mount as _mount

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# include/uapi/linux/prctl.h
PR_SET_PDEATHSIG = 1

MARKER = "PARTITIOND_SANDBOX"
# the pid of the sandbox's first process as the outside sees it: what nsenter(1) needs
OUTSIDE_PID = "PARTITIOND_SANDBOX_PID"
_HOST_NAME = "sandbox"
_CGROUP_NAME = (
    "partitiond-sandbox-"  # and what makes it this one's; who takes it away again holds a lock on it
)
_CGROUP_MOUNT = Path("/sys/fs/cgroup")
_VAR_DIRECTORIES = ("lib", "log", "cache", "lock", "spool", "tmp", "empty")
_DEVICES = (
    ("null", 1, 3, 0o666),
    ("zero", 1, 5, 0o666),
    ("full", 1, 7, 0o666),
    ("random", 1, 8, 0o666),
    ("urandom", 1, 9, 0o666),
    ("tty", 5, 0, 0o666),
    # root only, as the kernel makes it where no udev runs: opening it to partition users is the product's work
    ("net/tun", 10, 200, 0o600),
)

_libc = ctypes.CDLL(None, use_errno=True)


def inside() -> bool:
    """Whether this process runs in a sandbox made by this module."""
    # the variable alone could have been exported by somebody on a real machine
    return os.environ.get(MARKER) == "1" and os.uname().nodename == _HOST_NAME


def run(command: Sequence[str], *, binds: Sequence[tuple[str, str]] = (), keep_opt: bool = True) -> int:
    """Run a command in a new sandbox and return its exit status.

    ``binds`` are (source, target) pairs of directories to show inside; with ``keep_opt`` false ``/opt`` is a private overlay.
    Raises OSError when the kernel or the caller's rights do not allow it. The caller must be single-threaded.
    """
    supervisor = os.fork()
    if supervisor == 0:
        _as_child(lambda: _outer(command, binds, keep_opt))
    return _wait(supervisor)


def _as_child(body: object) -> None:
    """Run a forked child's body; it never returns into the caller's code."""
    status = 125
    try:
        status = body()  # type: ignore[operator]
    except BaseException as error:  # noqa: BLE001 - a forked child reports and ends, whatever it was
        print(f"partitiond sandbox: {error}", file=sys.stderr)  # noqa: T201 - no logging is set up here
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int) -> int:
    while True:
        try:
            _, status = os.waitpid(pid, 0)
        except KeyboardInterrupt:
            continue  # the terminal sent it to the whole group; the command decides how to end
        return os.waitstatus_to_exitcode(status) % 256


def _die_with_parent() -> None:
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _outer(command: Sequence[str], binds: Sequence[tuple[str, str]], keep_opt: bool) -> int:
    _die_with_parent()
    with _cgroup() as group:
        flags = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
        unshare(flags)
        reading, writing = os.pipe()
        first = os.fork()
        if first == 0:
            # only from outside can be told under which number the first process is seen there
            os.environ[OUTSIDE_PID] = os.read(reading, 32).decode()
            os.close(reading)
            os.close(writing)
            _as_child(lambda: _init(command, binds, keep_opt, group))
        os.write(writing, str(first).encode())
        os.close(reading)
        os.close(writing)
        return _wait(first)


@contextlib.contextmanager
def _cgroup() -> Iterator[int | None]:
    """A cgroup below that of this process, by descriptor; None where the machine does not give one."""
    parent = _own_cgroup()
    if parent is None:
        yield None
        return
    holder = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            _remove_left(holder)
            name, group = _make_cgroup(holder)
        except OSError:  # a container may only read it: then the sandbox does without
            yield None
            return
        try:
            yield group
        finally:
            os.close(group)
            _remove_cgroup(holder, name)
    finally:
        os.close(holder)


def _make_cgroup(holder: int) -> tuple[str, int]:
    """Make one and hold it; return its name and descriptor. Raises OSError."""
    while True:
        name = f"{_CGROUP_NAME}{secrets.token_hex(4)}"
        os.mkdir(name, dir_fd=holder)
        # until it was held, somebody may have taken it for one that was left
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            group = _hold(holder, name)
            try:
                if os.path.samestat(os.fstat(group), os.stat(name, dir_fd=holder)):
                    return name, group
            except FileNotFoundError:
                os.close(group)


def _remove_left(holder: int) -> None:
    """Remove those that nobody holds; who made one in another namespace of processes has a number that says nothing here."""
    for left in os.listdir(holder):
        if left.startswith(_CGROUP_NAME):
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                group = _hold(holder, left)
                try:
                    _remove_cgroup(holder, left)
                finally:
                    os.close(group)


def _hold(holder: int, name: str) -> int:
    """Open a cgroup and lock it, until that is closed here and in all children. Raises OSError; BlockingIOError: it is held."""
    group = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=holder)
    try:
        fcntl.flock(group, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(group)
        raise
    return group


def _own_cgroup() -> Path | None:
    """Where the cgroup2 of this process is shown."""
    rows = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    own = next((row.removeprefix("0::/") for row in rows if row.startswith("0::/")), None)
    mount = cgroup.root()
    return mount / own if mount is not None and own is not None and not own.startswith("..") else None


def _remove_cgroup(holder: int, name: str) -> None:
    """Remove a cgroup and those below; one of somebody who lives, as seen from another namespace of processes, stays."""
    deadline = time.monotonic() + 3  # processes that have ended leave it a little later
    while True:
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=holder)
            try:
                for below in _directories(descriptor):
                    _remove_cgroup(descriptor, below)
            finally:
                os.close(descriptor)
            os.rmdir(name, dir_fd=holder)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        else:
            return


def _directories(descriptor: int) -> list[str]:
    with os.scandir(descriptor) as found:
        return [one.name for one in found if one.is_dir(follow_symlinks=False)]


def _init(command: Sequence[str], binds: Sequence[tuple[str, str]], keep_opt: bool, group: int | None) -> int:
    """Be process 1 of the sandbox: mount, start the command, reap until it ends, then end the rest."""
    _die_with_parent()
    if group is not None:
        _enter(group)
    _lay_out(binds, keep_opt, own_cgroup=group is not None)
    _check(_libc.sethostname(_HOST_NAME.encode(), len(_HOST_NAME)), "sethostname")
    os.environ[MARKER] = "1"
    payload = os.fork()
    if payload == 0:
        os.execvp(command[0], list(command))  # noqa: S606 - the caller's own argument list
    status = _reap_until(payload)
    _end_all()
    return status


def _enter(group: int) -> None:
    """Move into the cgroup, and see it as the root of all from now on."""
    processes = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=group)
    os.write(processes, b"0")
    os.close(processes)
    os.close(group)
    unshare(CLONE_NEWCGROUP)


def _reap_until(payload: int) -> int:
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except KeyboardInterrupt:
            continue
        if pid == payload:
            return os.waitstatus_to_exitcode(status) % 256


def _end_all(grace: float = 3.0) -> None:
    """End every other process of the sandbox, politely first."""
    deadline = time.monotonic() + grace
    number = signal.SIGTERM
    while True:
        try:
            os.kill(-1, number)
        except ProcessLookupError:
            return
        time.sleep(0.02)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > deadline:
            number = signal.SIGKILL


def _lay_out(binds: Sequence[tuple[str, str]], keep_opt: bool, *, own_cgroup: bool) -> None:
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    # sources may lie below a directory that is about to be covered: hold them by descriptor
    sources = [(os.open(source, os.O_PATH), target) for source, target in binds]
    _private_etc()
    if not keep_opt:
        _private_opt()
    for path in ("/run", "/srv", "/var"):
        _mount("tmpfs", path, "tmpfs", MS_NOSUID, "mode=0755")
    for name in _VAR_DIRECTORIES:
        Path("/var", name).mkdir(mode=0o755)
    Path("/var/run").symlink_to("/run")
    Path("/var/tmp").chmod(0o1777)  # noqa: S108 - the private one
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")  # noqa: S108 - the private one
    _private_dev()
    _mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    if own_cgroup:
        _mount("cgroup2", str(_CGROUP_MOUNT), "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        _mount("bpf", str(cgroup.BPFFS), "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700")
    for descriptor, target in sources:
        Path(target).mkdir(parents=True, exist_ok=True)
        _mount(f"/proc/self/fd/{descriptor}", target, "", MS_BIND | MS_REC)
        os.close(descriptor)
    _protect_the_rest()


def _protect_the_rest() -> None:
    """What is shown of the host's own files can be read only: root in here must not be able to change the host."""
    try:
        _mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # the root of a plain chroot is no mount of its own, so nothing can be said of it


def _private_etc() -> None:
    _mount("tmpfs", "/mnt", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    subprocess.run(["/bin/cp", "-a", "/etc/.", "/mnt/"], check=True)
    _mount("/mnt", "/etc", "", MS_BIND)
    unmount("/mnt")


def _private_opt() -> None:
    """Let directories be made below /opt without touching the host's, and without hiding what lies there."""
    _mount("tmpfs", "/mnt", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    for name in ("upper", "work"):
        Path("/mnt", name).mkdir()
    _mount("overlay", "/opt", "overlay", 0, "lowerdir=/opt,upperdir=/mnt/upper,workdir=/mnt/work")


def _private_dev() -> None:
    _mount("tmpfs", "/dev", "tmpfs", MS_NOSUID, "mode=0755")
    Path("/dev/net").mkdir()
    for name, major, minor, mode in _DEVICES:
        os.mknod(f"/dev/{name}", stat.S_IFCHR | mode, os.makedev(major, minor))
        Path("/dev", name).chmod(mode)
    for name in ("pts", "shm"):
        Path("/dev", name).mkdir()
    _mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    _mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")  # noqa: S108 - the private one
    for name, target in (
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
    ):
        Path("/dev", name).symlink_to(target)
    Path("/dev/stderr").symlink_to("fd/2")


def home_of_environment() -> Path:
    """The directory for which the scripts of this environment were made (its prefix may be shown elsewhere)."""
    script = Path(sys.prefix, "bin", "partitiond")
    if script.is_file():
        first = script.read_bytes().split(b"\n", 1)[0]
        interpreter = first.removeprefix(b"#!").split()
        if interpreter:
            return Path(os.fsdecode(interpreter[0])).parent.parent
    return Path(sys.prefix)


def environment_binds() -> list[tuple[str, str]]:
    """The bind that shows this environment where its scripts expect it, reachable for partition users."""
    home = home_of_environment()
    return [] if home == Path(sys.prefix) else [(sys.prefix, str(home))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: ``python -I -m partitiond.sandbox [--bind SRC:DST]… -- COMMAND…``."""
    parser = argparse.ArgumentParser(prog="partitiond.sandbox", description=__doc__)
    parser.add_argument("--bind", action="append", default=[], metavar="SOURCE:TARGET")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        parser.exit(77, "partitiond.sandbox: namespaces need root\n")
    binds = [tuple(item.split(":", 1)) for item in options.bind]
    own = environment_binds()
    program = shutil.which(options.command[0]) or options.command[0]
    return run([program, *options.command[1:]], binds=[*own, *binds], keep_opt=not own)


if __name__ == "__main__":
    sys.exit(main())
