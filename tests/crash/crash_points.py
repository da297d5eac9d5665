"""Fault injection: a throw-away process that dies, or whose system fails it, at a chosen one of its effects.

Each effect of the process is a point: a netlink request, an nft transaction, an ioctl, a program or supervisord called, and
every step by which a file is made or changed. Point ``k`` is the moment after effect ``k - 1`` was done to its end and before
effect ``k`` begins; the last one is the end of the work. So to die at every point is to die before and after each. What the
kernel gets in one write is cut too: a netlink write of n requests is n points, and a write to a file has one in its middle.

Points know nothing of kinds of operations: they are taken where Python leaves for the system (audit events, and the few calls
that raise none), so that new operations are covered without a word here.
"""

import errno
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from netplan import nftables
from netplan.errors import NetplanError
from netplan.netlink import NetlinkSocket, Request
from partitiond import mounts
from partitiond.supervision import Supervisor

# docs.python.org/3/library/audit_events.html: raised before the call itself; the place of what names it
_EVENTS = {
    "fcntl.ioctl": 1,
    "os.chmod": 0,
    "os.chown": 0,
    "os.kill": 1,
    "os.link": 1,
    "os.mkdir": 0,
    "os.remove": 0,
    "os.removexattr": 0,
    "os.rename": 1,
    "os.rmdir": 0,
    "os.setxattr": 0,
    "os.symlink": 1,
    "os.truncate": 0,
    "os.utime": 0,
    "subprocess.Popen": 0,
}
_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# opening it changes nothing: what is done with it is seen as ioctl
_NO_EFFECT = ("/dev/null", "/dev/net/tun")
_READING_CALLS = ("getState", "getPID", "getAllProcessInfo")
_UNKNOWN_REQUEST = Request(1000, 0, bytes(16))  # more than RTM_MAX: the kernel refuses it (rtnetlink_rcv_msg)


class Points:
    """The points of this process: counts them, and at one of them does what ``strike`` says (``kill`` or ``fail``).

    To be made in a forked child: it changes the modules of its process for good.
    """

    def __init__(self, at=None, strike="kill"):
        self.labels = []
        self._at = at
        self._strike = {"kill": self._kill, "fail": self._fail}[strike]
        self._fails = strike == "fail"
        self._counting = True
        sys.dont_write_bytecode = True
        sys.addaudithook(self._audit)
        self._watch_files()
        self._watch_network()
        self._watch_programs()
        self._watch_mounts()

    @contextmanager
    def not_counted(self):
        """For what stands for another process: its own doing is no effect of this one."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def reach(self, label, partly=None):
        """Be at a point; ``partly`` does the part of the effect that goes before. Return whether the effect must be refused."""
        if not self._counting:
            return False
        self.labels.append(label)
        if len(self.labels) - 1 != self._at:
            return False
        self._counting = False
        if partly:
            partly()
        return self._strike(label)

    def end(self):
        """The last point: everything is done, and the process is not over yet."""
        if not self._fails:
            self.reach("the end")
        self._counting = False

    def _kill(self, _label):
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()  # the signal comes before this returns

    def _fail(self, label):
        if label.startswith("rtnetlink"):
            return True
        if label.startswith("nft"):
            raise NetplanError("network.packet_filter", "nft refused the transaction: a test says so")
        number = errno.ENOSPC if label.startswith(("open", "write", "os.mkdir")) else errno.EIO
        raise OSError(number, f"{os.strerror(number)}: a test says so", label)

    def _audit(self, event, arguments):
        if not self._counting:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not isinstance(flags, int) or not flags & _CHANGING:
                return
            name = os.fsdecode(path)
            if name not in _NO_EFFECT:
                self.reach(f"open {_plain(name)}")
        elif event in _EVENTS:
            self.reach(f"{event} {_plain(arguments[_EVENTS[event]])}")

    def _watch_files(self):
        """``os.write`` and ``os.fsync`` raise no audit event."""
        write, fsync = os.write, os.fsync

        def watched_write(descriptor, data):
            target = _target(descriptor)
            if target:
                self.reach(f"write {target}")
                self.reach(
                    f"write half of {target}",
                    partly=lambda: write(descriptor, bytes(data)[: len(data) // 2]),
                )
            return write(descriptor, data)

        def watched_fsync(descriptor):
            self.reach(f"fsync {_target(descriptor)}")
            return fsync(descriptor)

        os.write, os.fsync = watched_write, watched_fsync

    def _watch_network(self):
        send, run = NetlinkSocket._send, nftables.run

        def watched_send(sock, requests, *, acknowledge):
            requests = list(requests)
            for place in range(len(requests)) if acknowledge else ():
                first = requests[:place]
                partly = (lambda first=first: send(sock, first, acknowledge=True)) if first else None
                if self._fails:
                    partly = None  # the kernel goes on after a refusal
                if self.reach(f"rtnetlink {requests[place].kind} ({place})", partly=partly):
                    requests[place] = _UNKNOWN_REQUEST
            return send(sock, requests, acknowledge=acknowledge)

        def watched_run(text):
            self.reach("nft transaction")
            return run(text)

        NetlinkSocket._send, nftables.run = watched_send, watched_run

    def _watch_programs(self):
        """A started program is one more effect than its start; a call of supervisord is none of this process's own."""
        start, call = subprocess.Popen.__init__, Supervisor._call

        def watched_start(process, arguments, *more, **options):
            start(process, arguments, *more, **options)
            self.reach(f"started {_plain(os.fsdecode(arguments[0]))}")

        def watched_call(supervisor, method, *arguments):
            if not method.endswith(_READING_CALLS):
                self.reach(f"{method} {' '.join(map(str, arguments))}".rstrip())
            return call(supervisor, method, *arguments)

        subprocess.Popen.__init__, Supervisor._call = watched_start, watched_call

    def _watch_mounts(self):
        mount, detach = mounts.mount, mounts.detach

        def watched_mount(source, target, kind, *more):
            self.reach(f"mount {kind or _plain_descriptor(source)} on {_plain_descriptor(target)}")
            mount(source, target, kind, *more)

        def watched_detach(target):
            self.reach(f"detach {target}")
            detach(target)

        mounts.mount, mounts.detach = watched_mount, watched_detach


def _plain_descriptor(name):
    return re.sub(r"(?<=/fd/)\d+", "<descriptor>", name)


def _target(descriptor):
    """What an open descriptor leads to; empty for what is no file."""
    name = Path(f"/proc/self/fd/{descriptor}").readlink()
    return _plain(name) if name.is_absolute() else ""


def _plain(name):
    """A name without what differs from one run to the next."""
    if isinstance(name, int):
        return hex(name)
    if isinstance(name, (bytes, os.PathLike)):
        name = os.fsdecode(name)
    return re.sub(r"([.-])[0-9a-f]{12,16}(?=$|\.partitiond)", r"\1<random>", str(name))


def family(label):
    """What points of the same kind have in common, whatever partition they are about."""
    return re.sub(r"\d+", "#", label)
