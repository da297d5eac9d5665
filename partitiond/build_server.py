"""Builds of instances by the fork server (``forked_build.py``), where a release builds with our own zc.buildout.

Promises: only what a release's ``bin/buildout`` would do with our own interpreter and packages is done this way; where the
server cannot be had, ``build`` says None and the release's script is to be executed. The server is started when it is worth
it, ends when it was not needed for some minutes or when its daemon ends, however that happens, and is another one when our
packages changed.
"""

from __future__ import annotations

import array
import contextlib
import json
import logging
import os
import pwd
import socket
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import execute, files, namespaces
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from partitiond.config import Config

logger = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("forked_build.py")
# Not "-I", nor the file by its name: sys.flags are to be those of a release's script, and the directory of ours is not to be
# searched. The environment has nothing of anybody's, and / is root's.
_START = "import sys; del sys.path[0]; name = sys.argv[1]; exec(compile(open(name).read(), name, 'exec'))"
_ENVIRONMENT = {"PATH": execute.PATH, "LANG": "C.UTF-8", "PYTHONNOUSERSITE": "1"}
_SCRIPT_LIMIT = 16 * 1024
_IDLE_SECONDS = 600.0
_ANSWER_SECONDS = 30.0
_END_SECONDS = 5.0
# what bin/buildout of a release is, to the letter, that zc.buildout 4.2 made for the packages in one directory
_SCRIPT = """\
#!{python}

import sys
sys.path[0:0] = [
  '{packages}',
  ]

import pkg_resources

import zc.buildout.buildout

if __name__ == '__main__':
    sys.exit(zc.buildout.buildout.main())
"""


def packages() -> Path:
    """Where our own zc.buildout and setuptools are."""
    return Path(sysconfig.get_path("purelib"))


def fits(config: Config, directory: Path) -> bool:
    """Whether the release in ``directory`` builds its instances with our own interpreter, zc.buildout and setuptools.

    Told by its script, which must be what is generated for these; with any other, or none, it does not fit.
    """
    own = packages()
    if own.is_relative_to(config.software_root):
        return False
    expected = _SCRIPT.format(python=sys.executable, packages=own).encode()
    try:
        owner = pwd.getpwnam(config.software_user).pw_uid
        with files.directory(config.software_root, directory.name, "bin") as descriptor:
            found = files.read("buildout", dir_fd=descriptor, limit=_SCRIPT_LIMIT, reader=owner)
    except (OSError, KeyError, PartitiondError):
        return False  # executing it will say what is wrong
    return found == expected


@dataclass(frozen=True, slots=True)
class Build:
    """An instance to be built: by the script of its release, as whom, where, and in which namespaces (of those pinned in a
    directory the one of that name).
    """

    directory: Path
    user: str
    cwd: Path
    env: Mapping[str, str]
    pinned: tuple[Path, str] | None

    @property
    def script(self) -> Path:
        """What is executed otherwise."""
        return self.directory / "bin" / "buildout"

    def message(self) -> bytes:
        """What the server's child is told."""
        user = pwd.getpwnam(self.user)
        where = None
        if self.pinned is not None:
            place, name = self.pinned
            where = [str(place), name, namespaces.IPC]
        return json.dumps(
            {
                "script": str(self.script),
                "packages": str(packages()),
                "uid": user.pw_uid,
                "gid": user.pw_gid,
                "groups": os.getgrouplist(self.user, user.pw_gid),
                "directory": str(self.cwd),
                "environment": dict(self.env),
                "namespaces": where,
            }
        ).encode()


class _GoneError(Exception):
    """The server has ended, or cannot do it."""


class _Child:
    """A build by the server, as ``execute`` watches over any program."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._status: int | None = None
        self.pid = self._number("began", _ANSWER_SECONDS)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative for a signal. Raises TimeoutExpired, or _GoneError with the server."""
        if self._status is None:
            self._status = self._number("ended", timeout)
        return self._status

    def _number(self, word: str, timeout: float | None) -> int:
        self._channel.settimeout(timeout)
        try:
            said = self._channel.recv(64)
        except TimeoutError:
            raise subprocess.TimeoutExpired(word, timeout or 0.0) from None
        except OSError as error:
            raise _GoneError from error
        kind, _, number = said.decode().partition(" ")
        if kind != word:
            raise _GoneError
        return int(number)


@dataclass(slots=True)
class _Running:
    """A server, and of which packages."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    state: tuple[int, ...]
    since: float = field(default_factory=time.monotonic)
    ready: bool = False


class BuildServer:
    """The server, as far as it is needed.

    ``patience`` builds in a row are left to be executed before one is started, which costs as much as two of them; ``idle``
    seconds without a build end it, and what comes later is no longer in a row.
    """

    def __init__(self, patience: int = 3, idle: float = _IDLE_SECONDS) -> None:
        self.patience, self._idle = patience, idle
        self._executed, self._last = 0, time.monotonic()
        self._running: _Running | None = None
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Start the server, unless there is one or it is too early; it gets ready by itself. For several builds to come."""
        with self._lock:
            if self._running is None:
                self._start()

    def build(
        self,
        wanted: Build,
        *,
        log: int,
        stop: threading.Event,
        timeout: float | None = None,
        record: Path | None = None,
    ) -> execute.Outcome | None:
        """Build, or None where it is to be executed. As :func:`execute.as_user` otherwise."""
        channel = self._channel()
        if channel is None:
            return None
        try:
            with channel:
                if record is not None:
                    execute.end_cut_off(record)
                _send(channel, wanted.message(), log)
                child = _Child(channel)
                return execute.watch(child, wanted.user, stop=stop, timeout=timeout, record=record)
        except (_GoneError, OSError, subprocess.TimeoutExpired):
            logger.warning("the server of builds has ended; builds are executed until there is another one")
            self.close()
            return None

    def close(self) -> None:
        """End the server."""
        with self._lock:
            self._end()

    def _channel(self) -> socket.socket | None:
        """A channel to the server, or None: then there is none yet."""
        with self._lock:
            if self._running is not None and self._running.state != _state():
                self._end()  # our packages are others now
            try:
                if self._running is not None:
                    return self._ask(self._running)
            except OSError:
                self._end()  # it was not needed for long, or somebody has ended it
            self._start_if_due()
            return None

    def _start_if_due(self) -> None:
        now = time.monotonic()
        if now - self._last > self._idle:
            self._executed = 0
        self._last = now
        if self._executed < self.patience:
            self._executed += 1
        else:
            self._start()

    def _ask(self, running: _Running) -> socket.socket | None:
        if not running.ready:
            running.control.setblocking(False)
            try:
                said = running.control.recv(64)
            except BlockingIOError:
                if time.monotonic() - running.since > _ANSWER_SECONDS:
                    raise TimeoutError from None
                return None
            if said != b"ready":
                raise ConnectionResetError
            running.ready = True
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                _send(running.control, b".", theirs.fileno())
        except OSError:
            ours.close()
            raise
        return ours

    def _start(self) -> None:
        state = _state()
        if not state:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-c", _START, str(_PROGRAM), str(theirs.fileno()), str(self._idle)],
                    cwd="/",
                    env=_ENVIRONMENT,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                logger.warning("the server of builds cannot be started: %s", error)
                return
        # it ends by itself, and shall not stay as a zombie until somebody looks
        threading.Thread(target=process.wait, name="build-server", daemon=True).start()
        self._running = _Running(process, ours, state)

    def _end(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        running.control.close()  # which tells it
        try:
            running.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()


def _send(channel: socket.socket, message: bytes, descriptor: int) -> None:
    rights = array.array("i", [descriptor])
    channel.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def _state() -> tuple[int, ...]:
    """What becomes another when our packages do; empty where somebody but root may change them, or they are not there."""
    own = packages()
    found = []
    with contextlib.suppress(OSError):
        for place in (own, own / "zc" / "buildout", own / "setuptools", own / "pkg_resources"):
            here = place.stat()
            if here.st_uid or here.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return ()
            found += [here.st_ino, here.st_mtime_ns]
        return tuple(found)
    return ()
