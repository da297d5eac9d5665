"""A machine of its own for each crash scene: private network, mounts and processes, made in a few milliseconds.

``/etc`` has the user database alone, ``/srv`` is empty, ``/dev/net/tun`` is root's as the kernel makes it. Everything, also a
supervisord that a killed process left, ends with the process that made the machine.
"""

import ctypes
import gc
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import traceback
from pathlib import Path

from partitiond import sandbox
from partitiond.sandbox import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC

BASE = Path("/srv/node")
_ETC = ("passwd", "group", "shadow", "gshadow", "nsswitch.conf", "ld.so.cache", "localtime")
_LIBC = ctypes.CDLL(None, use_errno=True)
_PATIENCE = 120  # seconds for one child; the slowest needs 3


class ChildError(Exception):
    """What a child raised, as text."""


def enter():
    """Make the machine and be in it; the calling process must be of no use for anything else, and its children end with it."""
    # on one processor, where each namespace is younger than the one before it (namespaces.py): then how often one is tried
    # is the same each time
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[os.getpid() % len(processors)]})
    flags = sandbox.CLONE_NEWNS | sandbox.CLONE_NEWNET | sandbox.CLONE_NEWPID | sandbox.CLONE_NEWIPC
    if _LIBC.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare: run the tests as root")
    first = os.fork()
    if first:  # only a child is inside the new process namespace
        _, status = os.waitpid(first, 0)
        os._exit(os.waitstatus_to_exitcode(status) % 256)
    _LIBC.prctl(sandbox.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    sandbox._mount("none", "/", "", MS_REC | MS_PRIVATE)
    sandbox._mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    sandbox._mount("tmpfs", "/srv", "tmpfs", MS_NOSUID, "mode=0755")
    sandbox._mount("tmpfs", "/dev/net", "tmpfs", MS_NOSUID, "mode=0755")
    if os.path.ismount("/sys/fs/bpf"):  # what is pinned must end with the machine, too
        sandbox._mount("bpf", "/sys/fs/bpf", "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700")
    os.mknod("/dev/net/tun", stat.S_IFCHR | 0o600, os.makedev(10, 200))
    _private_etc()
    BASE.mkdir(mode=0o755)


def _private_etc():
    kept = Path("/srv/etc")
    kept.mkdir()
    for name in _ETC:
        source = Path("/etc", name)
        if source.exists():
            shutil.copy2(source, kept / name)
            os.chown(kept / name, source.stat().st_uid, source.stat().st_gid)
    (kept / ".pwd.lock").touch(mode=0o600)
    sandbox._mount("/srv/etc", "/etc", "", sandbox.MS_BIND)


def ip(*lines):
    """Run lines of ``ip`` as one batch."""
    text = "".join(f"{line}\n" for line in lines)
    subprocess.run(
        ["/usr/sbin/ip", "-batch", "-"], input=text, text=True, check=True, stdout=subprocess.DEVNULL
    )


def start_child(body, patience=_PATIENCE):
    """Begin ``body`` in a forked child; return what :func:`finish_child` needs."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        os.close(reading)
        gc.disable()  # a collection would touch, and so copy, every page that is shared with the parent
        signal.alarm(patience)
        try:
            answer = (True, body())
            status = 0
        except BaseException:  # noqa: BLE001 - told to the parent, whatever it was
            answer = (False, traceback.format_exc())
        with os.fdopen(writing, "wb") as stream:
            pickle.dump(answer, stream)
    finally:
        sys.stderr.flush()
        os._exit(status)


def finish_child(started):
    """Wait for a child; return (its exit status, negative: the signal; what its body returned). Raises ChildError."""
    child, reading = started
    with os.fdopen(reading, "rb") as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    reap_orphans()
    code = os.waitstatus_to_exitcode(status)
    if not text:
        return code, None
    fine, value = pickle.loads(text)  # noqa: S301 - our own child wrote it
    if not fine:
        raise ChildError(value)
    return code, value


def reap_orphans():
    """What a killed child had started becomes a child of the first process of its machine."""
    try:
        while os.getpid() == 1 and os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def in_child(body):
    """Run ``body`` in a forked child to its end."""
    return finish_child(start_child(body))
