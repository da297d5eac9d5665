"""The fork server of instance buildouts: a program of its own, started by ``build_server.py``, that imports nothing of ours.

It has loaded our own zc.buildout and setuptools and nothing else, has one thread, and forks a child for each request. The
child takes the place of ``<release>/bin/buildout -U``: it becomes the partition's user before it reads anything of a tenant's
or of a release's, builds, and exits. The server itself reads no request and nothing that a child has written: all that its
children inherit is the same for every tenant, and how one ended is told by the kernel.

``control`` (a Unix socket, its descriptor is the first argument) brings one channel for each request; a channel brings the
request and the log, takes the child's number (``began N``) and its exit status (``ended N``), and is closed by the daemon when
all that the child had started is gone: only then is the child reaped, so that its number stays its own as long as somebody
may send it a signal. When ``control`` is closed, or nothing came for some minutes, the server ends, and its children with it.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import sysconfig
import types
from typing import Any, NoReturn

# include/uapi/linux/prctl.h, include/uapi/linux/sched.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 1, 4, 15, 38
_CLONE_NEWNS, _CLONE_NEWIPC = 0x00020000, 0x08000000
_EVERY_DESCRIPTOR = 2**31 - 1
_LONGEST = 64 * 1024
_COULD_NOT_START = 126  # as a shell has it

_libc = ctypes.CDLL(None, use_errno=True)


class Child:
    """A build under way, or one that has ended and waits to be reaped."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid, self.channel = pid, channel
        self.end = os.pidfd_open(pid)

    def told(self, poll: select.poll) -> None:
        """Say how it ended, and leave it where it is."""
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert found is not None  # noqa: S101 - only with WNOHANG
        status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        poll.unregister(self.end)
        with contextlib.suppress(OSError):  # nobody listens any more: the channel says so, too
            self.channel.send(f"ended {status}".encode())

    def reap(self, poll: select.poll) -> None:
        """Take it away."""
        with contextlib.suppress(KeyError):
            poll.unregister(self.end)
        poll.unregister(self.channel)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # whoever asked for it is gone
        os.waitpid(self.pid, 0)
        os.close(self.end)
        self.channel.close()


def serve(control: socket.socket, idle: float) -> socket.socket | None:
    """Serve until the end, which is None; in a child return its channel."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    children: dict[int, Child] = {}
    while ready := poll.poll(None if children else idle * 1000):
        for descriptor, _ in ready:
            if descriptor == control.fileno():
                channel = _accept(control)
                if channel is None:
                    return None
                pid = _fork()
                if pid == 0:
                    # these numbers will be others' soon
                    for one in (control, *(child.channel for child in children.values())):
                        one.detach()
                    return channel
                if pid is None:
                    channel.close()
                    continue
                child = Child(pid, channel)
                # of the channel only that it was closed (POLLHUP is always told): what comes through it is the child's
                for number, event in ((child.end, select.POLLIN), (channel.fileno(), 0)):
                    children[number] = child
                    poll.register(number, event)
            elif (found := children.get(descriptor)) is None:
                continue  # reaped a moment ago
            elif descriptor == found.end:
                found.told(poll)
            else:
                del children[found.end], children[descriptor]
                found.reap(poll)
    return None


def _accept(control: socket.socket) -> socket.socket | None:
    try:
        _, descriptors = _receive(control, 1)
    except ConnectionError:  # the daemon was killed, with something unread
        return None
    return socket.socket(fileno=descriptors[0]) if descriptors else None


def _receive(channel: socket.socket, size: int) -> tuple[bytes, list[int]]:
    found = array.array("i")
    message, rest, _, _ = channel.recvmsg(size, socket.CMSG_LEN(found.itemsize))
    for level, kind, content in rest:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(content)
    return message, list(found)


def _fork() -> int | None:
    """fork(2); None where there is no room for another process."""
    try:
        return os.fork()
    except OSError:
        return None


# --- the child --------------------------------------------------------------------------------------------------------


def become(channel: socket.socket, server: int) -> dict[str, Any]:
    """Take the request, and become what it says: from here on nothing of root's is left. Ends the process when that fails."""
    try:
        message, descriptors = _receive(channel, _LONGEST)
        if not message:
            os._exit(0)  # nothing is wanted any more
        (log,) = descriptors
        request: dict[str, Any] = json.loads(message)
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        channel.send(f"began {os.getpid()}".encode())
        channel.detach()
        os.closerange(3, _EVERY_DESCRIPTOR)
        _enter(request["namespaces"])
        os.chdir(request["directory"])
        os.umask(0o027)
        os.setgroups(request["groups"])
        os.setresgid(*(request["gid"],) * 3)
        os.setresuid(*(request["uid"],) * 3)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        # not before: the kernel forgets it where the user changes (prctl(2))
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(_COULD_NOT_START)  # it has ended before that
        _prctl(_PR_SET_NAME, b"buildout")
        # As after an exec, which this stands for: what a tenant's debugger could find here is what every tenant has.
        _prctl(_PR_SET_DUMPABLE, 1)
    except BaseException as error:  # noqa: BLE001 - whatever it is: nothing may go on as root
        with contextlib.suppress(OSError):
            os.write(2, f"buildout could not be started: {type(error).__name__}: {error}\n".encode())
        os._exit(_COULD_NOT_START)
    return request


def _enter(pinned: list[str] | None) -> None:
    """Enter the partition's namespaces as ``namespaces.entry`` does: where the second is pinned is seen from the first only."""
    if pinned is None:
        return
    directory, name, ipc = pinned
    for path, kind in ((f"{directory}/{name}", _CLONE_NEWNS), (f"{directory}/{ipc}", _CLONE_NEWIPC)):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        _check(_libc.setns(descriptor, kind), f"setns {path}")
        os.close(descriptor)


def _prctl(option: int, value: int | bytes) -> None:
    word = value if isinstance(value, bytes) else ctypes.c_ulong(value)
    _check(_libc.prctl(option, word, *(ctypes.c_ulong(0),) * 3), f"prctl {option}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def build(request: dict[str, Any]) -> NoReturn:
    """Do what the release's script does, with the same surroundings: module search path, arguments, environment."""
    import pkg_resources  # noqa: PLC0415 - loaded before
    import zc.buildout.buildout  # noqa: PLC0415 - loaded before

    os.environ.clear()
    os.environ.update(request["environment"])
    script = request["script"]
    sys.argv[:] = [script, "-U"]
    main = types.ModuleType("__main__")
    main.__file__ = script
    sys.modules["__main__"] = main
    # the directory of a script comes first, and before that what generated scripts put there
    sys.path[:0] = [request["packages"], os.path.dirname(script)]
    # all but the release's is in there; it has it in the order of the path
    pkg_resources.working_set.add_entry(sys.path[1])
    pkg_resources.working_set.entries[:] = sys.path
    sys.exit(zc.buildout.buildout.main())


def run() -> None:
    """Serve, as a program; in a child: build."""
    control = socket.socket(fileno=int(sys.argv[2]))
    idle = float(sys.argv[3])
    _preload()
    server = os.getpid()
    try:
        control.send(b"ready")
    except OSError:
        return  # nobody waits any more
    channel = serve(control, idle)
    if channel is not None:
        build(become(channel, server))


def _preload() -> None:
    # not by a statement: pkg_resources would warn that it is deprecated
    for name in ("pkg_resources", "zc.buildout.buildout"):
        importlib.import_module(name)
    # A release links to our packages as to some under development, so into the signature of each part goes a hash of all of
    # them: most of the time of a build of ours (measured). They are the same as long as this server is.
    sys.modules["zc.buildout.buildout"]._dir_hash(sysconfig.get_path("purelib"))  # noqa: SLF001 - it has its own memory

    # what is there now is never looked through again, so its pages stay shared
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    run()
