"""The process that starts runs of promises: small, root's own, with nothing of a tenant's in it.

A run is forked off, enters its partition's namespaces, becomes its user for good (no new privileges), and only then reads what
it is to do. So a run costs a fork and no start of an interpreter, and never holds anything of the daemon's.

Promises: whatever a run leaves behind, daemons included, is killed (each run adopts its orphans, and this process those of a
run that was killed itself: PR_SET_CHILD_SUBREAPER, prctl(2)); when the daemon ends, however it ends, so do this process and all
that it started.

Started as a program of its own (``python -I -S``); it knows no other module of the node than the few that a run needs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING

from partitiond import mounts, promise_runner

if TYPE_CHECKING:
    from typing import Any

# include/uapi/linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
MESSAGE_LIMIT = 64 * 1024
_LAST_WORDS = 5.0
_AGAIN = 0.01  # orphans come up one generation after the other
_UMASK = 0o027

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    mounts.check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), "prctl")


class Server:
    """The runs that are under way, by the number that the daemon gave them."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._runs: dict[int, int] = {}
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def serve(self) -> None:
        """Do what the daemon says until it hangs up; then end all that is left."""
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the daemon ends us by hanging up
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._read, select.POLLIN)
        left = False
        while True:
            ready = dict(poll.poll(_AGAIN * 1000 if left else None))
            if self._read in ready:
                os.read(self._read, 4096)
            left = self._reap()
            if self._channel.fileno() in ready and not self._take():
                break
        deadline = time.monotonic() + _LAST_WORDS
        for pid in list(self._runs.values()):
            os.kill(pid, signal.SIGKILL)
        while (self._reap() or self._runs) and time.monotonic() < deadline:
            time.sleep(_AGAIN)

    def _take(self) -> bool:
        """Take one message; whether the daemon is still there."""
        content, descriptors, _, _ = socket.recv_fds(self._channel, MESSAGE_LIMIT, 2)
        try:
            for descriptor in descriptors:
                # MSG_CMSG_CLOEXEC would do, but Python 3.11 does not pass flags on (Lib/socket.py)
                os.set_inheritable(descriptor, False)
            if not content:
                return False
            message = json.loads(content)
            if "kill" in message:
                if message["kill"] in self._runs:
                    os.kill(self._runs[message["kill"]], signal.SIGKILL)
            else:
                self._start(message, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _start(self, message: dict[str, Any], descriptors: list[int]) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._runs[message["run"]] = pid
            return
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            for descriptor in (self._channel.detach(), self._read, self._write):
                os.close(descriptor)
            _become(message, parent)
            promise_runner.run(*descriptors)
            status = 0
        except BaseException as error:  # noqa: BLE001 - a forked child says what was wrong and ends, whatever it was
            promise_runner.complain(descriptors[1], error)
        finally:
            os._exit(status)

    def _reap(self) -> bool:
        """Reap what has ended, and kill what belongs to no run; whether there is any of that left."""
        try:
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                for number in [number for number, run in self._runs.items() if run == pid]:
                    del self._runs[number]
        except ChildProcessError:
            return False
        known = frozenset(self._runs.values())
        strange = [pid for pid in promise_runner.children() if pid not in known]
        for pid in strange:
            os.kill(pid, signal.SIGKILL)
        return bool(strange)


def _become(message: dict[str, Any], parent: int) -> None:
    """Become the user of a partition, in its namespaces and directory. Raises OSError."""
    if message["pin"]:
        for path, kind in ((message["pin"], mounts.CLONE_NEWNS), (message["ipc"], mounts.CLONE_NEWIPC)):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            mounts.enter(descriptor, kind)
            os.close(descriptor)
    os.setsid()
    os.umask(_UMASK)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    if os.geteuid() == 0:
        os.setgroups(message["groups"])
        os.setresgid(*[message["gid"]] * 3)
        os.setresuid(*[message["uid"]] * 3)
    # as the user: what it may not enter, root must not enter for it
    os.chdir(message["cwd"])
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    # after the change of user, which takes it away again (prctl(2))
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError("who started this run has ended")


def main() -> None:
    """Serve on the socket that the daemon hands over as standard input."""
    # nothing here is ever garbage, and looking for some would have each fork copy what it shares
    gc.disable()
    gc.freeze()
    Server(socket.socket(fileno=os.dup(0))).serve()
    os._exit(0)
