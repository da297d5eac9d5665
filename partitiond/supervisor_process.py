"""Processes of supervisord as they are under partitiond: noted before they begin, able to outlive it, heard of at once.

Subclasses by supervisor's own points of extension (ProcessConfig's ``make_process`` and ``make_dispatchers``; 4.2 and 4.3).
What differs from its own:

- stdout is a pipe that the program holds at both ends, so that it lives on when supervisord is killed: it gets no SIGPIPE, and
  waits when the pipe is full, until the next supervisord opens it again and reads on. stdin is one that nobody else holds at
  all. That leaves two descriptors of supervisord's per program, of three;
- each child closes what it must not have by one system call instead of one for each possible number;
- a signal that is sent before the program has begun ends it: supervisord's own handler of it would swallow it in the child.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import resource
import select
import signal
import time
from typing import TYPE_CHECKING, Any

from supervisor.dispatchers import POutputDispatcher
from supervisor.events import ProcessCommunicationStdoutEvent
from supervisor.options import ProcessConfig
from supervisor.process import Subprocess
from supervisor.states import ProcessStates

from partitiond import survivors

if TYPE_CHECKING:
    from pathlib import Path

    from partitiond.supervisor_loop import Outputs
    from partitiond.survivors import Note

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR2)
# who ended is the child of another by then, and its status is that one's to read
_UNKNOWN_STATUS = 255 << 8
_KEPT_PIPE = 2**20  # what a program may write while no supervisord reads


class Scene:
    """What the processes of one supervisord share: where they are noted, who is kept, what they may have open."""

    def __init__(self, directory: Path, outputs: Outputs) -> None:
        self.directory = directory
        self.boot = survivors.boot()
        self.kept: frozenset[str] = frozenset()
        self.outputs = outputs
        self.files = resource.getrlimit(resource.RLIMIT_NOFILE)


class Config(ProcessConfig):  # type: ignore[misc]
    """A program's configuration, equal to supervisor's own of the same text."""

    scene: Scene

    @classmethod
    def of(cls, config: Any, scene: Scene) -> Config:
        """Take over a configuration that supervisor has read."""
        names = (*cls.req_param_names, *cls.optional_param_names)
        made = cls(config.options, **{name: getattr(config, name) for name in names})
        made.scene = scene
        return made

    @property
    def digest(self) -> int:
        """What tells a program from another one that had its name; never 0."""
        said = (self.command, self.uid, self.directory, sorted((self.environment or {}).items()))
        return int.from_bytes(hashlib.blake2b(repr(said).encode(), digest_size=7).digest(), "big") + 1

    def make_process(self, group: Any = None) -> Process:
        """Make the process, which is not started by that."""
        made = Process(self)
        made.group = group
        return made

    def make_dispatchers(self, proc: Process) -> tuple[dict[int, Any], dict[str, int | None]]:
        """Make the pipes; only one end of one of them is supervisord's. Raises OSError."""
        output, child_output = _pipe()
        try:
            if proc.is_kept:
                with contextlib.suppress(OSError):  # what is usual has to do
                    fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, _KEPT_PIPE)
            end, child_input = _pipe()
        except OSError:
            os.close(output)
            os.close(child_output)
            raise
        os.close(end)
        pipes = dict.fromkeys(("stdin", "stderr", "child_stderr"))
        found = {**pipes, "stdout": output, "child_stdin": child_input, "child_stdout": child_output}
        return {output: _reader(proc, output)}, found


def _pipe() -> tuple[int, int]:
    """An end to read from, which does not block, and one that is open for both."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # pipe(7) has no such end; opening it by its name gives another description, of the same pipe
        return reading, os.open(f"/proc/self/fd/{writing}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        os.close(reading)
        raise
    finally:
        os.close(writing)


def _reader(process: Process, descriptor: int) -> Any:
    return POutputDispatcher(process, ProcessCommunicationStdoutEvent, descriptor)


class Process(Subprocess):  # type: ignore[misc]
    """A process of one of our groups; ``pidfd`` is there while it is one that another supervisord has started, ``outdated``
    says of such a one that its configuration has become another meanwhile.
    """

    pidfd: int | None = None
    outdated = False
    pipes: dict[str, Any]

    @property
    def is_kept(self) -> bool:
        """Whether it is to go on when supervisord ends."""
        return self.group is not None and self.group.config.name in self.config.scene.kept

    # --- starting -----------------------------------------------------------------------------------------------------

    def spawn(self) -> Any:
        """Start it; until the program has begun, signals wait for it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            return super().spawn()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _spawn_as_parent(self, pid: int) -> Any:
        # the child does it, too: whoever is first; a signal to the group must find it from now on (setpgid(2): EACCES after
        # its execve(2), when it has done so itself)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)
        self.config.scene.outputs.add(self.dispatchers)
        return super()._spawn_as_parent(pid)

    def _prepare_child_fds(self) -> None:
        options, scene = self.config.options, self.config.scene
        os.dup2(self.pipes["child_stdin"], 0)
        os.dup2(self.pipes["child_stdout"], 1)
        os.dup2(1, 2)
        self._note()
        os.closerange(3, options.minfds)
        resource.setrlimit(resource.RLIMIT_NOFILE, scene.files)
        for number in _HANDLED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)

    def _note(self) -> None:
        scene, group = self.config.scene, self.group.config.name
        try:
            pipe = os.fstat(1).st_ino
            survivors.write(scene.directory, group, self.config.name, pipe, scene.boot, self.config.digest)
        except OSError as error:
            # it would only be ended where it could have been kept
            os.write(2, f"partitiond: not noted in {scene.directory}: {error.strerror}\n".encode())

    # --- taking over --------------------------------------------------------------------------------------------------

    def take_over(self, note: Note) -> bool:
        """Go on with what another supervisord has started; return whether it is still there."""
        try:
            pidfd = os.pidfd_open(note.pid)
        except ProcessLookupError:
            return False
        # a zombie of a process 1 that does not reap began at the same time, but its pidfd says that it has ended
        if _has_ended(pidfd) or not note.lives:
            os.close(pidfd)
            return False
        self.pidfd, self.pid, self.state = pidfd, note.pid, ProcessStates.RUNNING
        self.outdated = note.digest not in (0, self.config.digest)
        # one that has just begun must not seem to have ended in its first second when it does
        self.laststart = min(note.at, time.time() - self.config.startsecs - 1)
        self.dispatchers = {pidfd: Ended(self, pidfd, note.pid)}
        output = survivors.output_of(note)
        self.pipes = {"stdin": None, "stdout": output, "stderr": None}
        if output is not None:
            self.dispatchers[output] = _reader(self, output)
        self.config.scene.outputs.add(self.dispatchers)
        # it may be a child of ours, when supervisord has begun anew in place (SIGHUP)
        self.config.options.pidhistory[note.pid] = self
        return True

    def let_go(self) -> None:
        """Forget it and let it run on: the supervisord to come takes it over."""
        self.config.options.pidhistory.pop(self.pid, None)
        self.config.scene.outputs.discard(self.dispatchers)
        self._close_pidfd()
        self.config.options.close_parent_pipes(self.pipes)
        self.pid, self.pipes, self.dispatchers = 0, {}, {}
        self.state = ProcessStates.STOPPED

    def finish(self, pid: int, sts: int) -> None:
        """Take note of its end."""
        survivors.forget(self.config.scene.directory, self.group.config.name, self.config.name)
        self.config.scene.outputs.discard(self.dispatchers)
        super().finish(pid, sts)
        self.outdated = False
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


class Ended:
    """Hears of the end of a process that is not our child, by its pidfd; one of the dispatchers of supervisord's loop."""

    def __init__(self, process: Process, pidfd: int, pid: int) -> None:
        self._process, self._pidfd, self._pid = process, pidfd, pid
        self.closed = False

    def readable(self) -> bool:
        """Whether its end is still waited for."""
        return not self.closed

    def writable(self) -> bool:
        """Nothing is ever written."""
        return False

    def handle_read_event(self) -> None:
        """Its end. Also asked for when supervisord drains what is left of the process, which is no end."""
        process = self._process
        if self.closed or process.pidfd != self._pidfd or not _has_ended(self._pidfd):
            return
        self.closed = True
        process.config.options.pidhistory.pop(self._pid, None)
        process.finish(self._pid, _UNKNOWN_STATUS)

    def handle_error(self) -> None:
        """A mistake of ours: said, and not met again."""
        self._process.config.options.logger.critical("pid %(pid)d: its end could not be told", pid=self._pid)
        self.closed = True


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
