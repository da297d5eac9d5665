"""All promises of one partition, run side by side as its user; what comes of each is one line of JSON for the daemon.

It is the tenant's process: it lists ``etc/promise`` and ``etc/plugin``, and writes what slapgrid (slapos.core 1.26) writes in
``.slapgrid/promise``: results, the log and the cache of each promise. Nothing that it says is believed without a look.

Promises: each promise has its time and no more, what it says is bounded, and what it started is ended with the run, also what
has left its session.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import stat
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

LINE_LIMIT = 16 * 1024
MOST = 200
"""Promises of a partition that are run."""
MOST_NAMES = 5000  # that are looked at in a directory
MESSAGE_LIMIT = 5000  # characters, as slapgrid has it
_TOLD_LIMIT = 2000
_SIDE_BY_SIDE = 3
_PLUGINS_SIDE_BY_SIDE = 2
_GRACE = 1.0
_MARGIN = 2.0
_OUTPUT_LIMIT = 64 * 1024
_LOG_LIMIT = 5 * 1024 * 1024
_FAILURES = 3  # in a row, until a program that is no plugin is an anomaly
_PERIODICITY = 2.0  # minutes: of what says nothing else
_DATE = "%Y-%m-%dT%H:%M:%S+0000"
_STATE = ".slapgrid/promise"
# what an interpreter of Python ignores, and other programs must not
_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)
_TYPES = {"test": "Test Result", "anomaly": "Anomaly Result"}


def children() -> list[int]:
    """The children of this process, which has one thread (proc_pid_task_children(5))."""
    with open(f"/proc/self/task/{os.getpid()}/children", "rb") as stream:
        return [int(word) for word in stream.read().split()]


def complain(descriptor: int, error: BaseException) -> None:
    """Tell the daemon what kept a run from its end."""
    with contextlib.suppress(OSError):
        _send(descriptor, {"error": f"{type(error).__name__}: {error}"[:_TOLD_LIMIT]})


def run(job: int, out: int) -> None:
    """Do what the file ``job`` says; the answers go to ``out``."""
    content = b""
    while piece := os.pread(job, 1 << 20, len(content)):
        content += piece
    Run(json.loads(content), out).finish()


def _pipe() -> tuple[int, int]:
    """A pipe that is read without waiting."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(write, True)
    return read, write


def _send(descriptor: int, value: dict[str, Any]) -> None:
    line = json.dumps(value).encode("ascii") + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]


class Child:
    """A process that was started: its promise (None: the interpreter of the plugins), and what it has said.

    Plain, as is this module's list of imports: dataclasses would double what a start costs.
    """

    __slots__ = (
        *("name", "pid", "watch", "output", "results", "began", "deadline"),
        *("said", "lines", "late"),
    )

    def __init__(self, name: str | None, pid: int, output: int, results: int, seconds: float) -> None:
        self.name, self.pid, self.output, self.results = name, pid, output, results
        self.watch = os.pidfd_open(pid)
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.said, self.lines = bytearray(), bytearray()
        self.late = False


class Run:
    """One run; ``job`` is made by ``promise_process.py``."""

    def __init__(self, job: dict[str, Any], out: int) -> None:
        self._job, self._out = job, out
        self._end = time.monotonic() + job["budget"]
        self._children: dict[int, Child] = {}  # by the descriptor of the process
        self._poll = select.poll()
        self._plugins: list[str] = []
        self._left = 0

    def finish(self) -> None:
        """Run all that is due, and end what is left of it."""
        for name in ("result", "log", "cache"):
            with contextlib.suppress(OSError):
                os.makedirs(f"{_STATE}/{name}", exist_ok=True)
        due, more = self._due()
        self._plugins = [name for kind, name in due if kind == "plugin"]
        waiting = [name for kind, name in due if kind == "promise"]
        if self._plugins:
            self._begin_plugins()
        while waiting or self._children:
            while waiting and len(self._children) < _SIDE_BY_SIDE + bool(self._plugins):
                if time.monotonic() < self._end:
                    self._begin(waiting.pop(0))
                else:
                    self._left += len(waiting)
                    waiting.clear()
            self._round()
        end_all_children()
        _send(self._out, {"done": True, "left": self._left, "more": more})

    # --- what there is

    def _due(self) -> tuple[list[tuple[str, str]], int]:
        """What is to be run now, and how many are too many."""
        found = [("plugin", name) for name in _listed("etc/plugin") if _is_plugin(name)]
        found += [("promise", name) for name in _listed("etc/promise") if _is_program(f"etc/promise/{name}")]
        more = len(found) - MOST
        spared, last = frozenset(self._job["spared"]), frozenset(self._job["last"])
        due = []
        for kind, name in found[:MOST]:
            if f"{kind}/{name}" in spared:
                _send(self._out, {"kind": kind, "name": name, "there": True})
            else:
                due.append((kind, name))
        return sorted(due, key=lambda one: f"{one[0]}/{one[1]}" in last), max(0, more)

    # --- starting

    def _spawn(self, name: str | None, command: list[str], seconds: float, stdin: int = -1) -> None:
        """Start a program in a session of its own; one that reads ``stdin`` writes results to the last word's descriptor."""
        read, write = _pipe()
        actions = [(os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_DUP2, write, 2)]
        results = theirs = -1
        if stdin >= 0:
            results, theirs = _pipe()
            # to a number that is not its own: that one would be closed at the start of the program
            target = 3 if theirs != 3 else 4
            # what is read first: the number of the other may be its own
            actions += [(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, theirs, target)]
            command = [*command, str(target)]
        try:
            pid = os.posix_spawn(
                command[0],
                command,
                self._job["env"],
                file_actions=actions,
                setsid=True,
                setsigdef=_IGNORED,
            )
        except OSError as error:
            os.close(read)
            if results >= 0:
                os.close(results)
            self._not_started(name, error)
            return
        finally:
            os.close(write)
            if theirs >= 0:
                os.close(theirs)
        child = Child(name, pid, read, results, seconds)
        self._children[child.watch] = child
        for descriptor in (child.watch, child.output, *([results] if results >= 0 else [])):
            self._poll.register(descriptor, select.POLLIN)

    def _not_started(self, name: str | None, error: OSError) -> None:
        if name is not None:
            self._program_ended(name, 0.0, failed=True, message=str(error))
            return
        for plugin in self._plugins:
            self._silent("plugin", plugin, 0.0, f"{self._job['python']}: {error.strerror}")
        self._plugins = []

    def _begin(self, name: str) -> None:
        path = os.path.join(self._job["cwd"], "etc", "promise", name)
        self._spawn(name, [path], self._job["timeout"])

    def _begin_plugins(self) -> None:
        job = {key: self._job[key] for key in ("timeout", "mode", "config", "cwd")}
        seconds = self._end - time.monotonic()
        job |= {"plugins": self._plugins, "side_by_side": _PLUGINS_SIDE_BY_SIDE, "seconds": seconds}
        memory = os.memfd_create("plugins")
        content = json.dumps(job).encode("ascii")
        while content:
            content = content[os.write(memory, content) :]
        os.lseek(memory, 0, os.SEEK_SET)
        # it keeps to its time itself; this is for one that was kept from it, or hangs before the first plugin
        seconds += self._job["timeout"] + _GRACE + _MARGIN
        self._spawn(None, [self._job["python"], "-c", self._job["program"]], seconds, stdin=memory)
        os.close(memory)

    # --- while they run

    def _round(self) -> None:
        now = time.monotonic()
        soonest = min((child.deadline for child in self._children.values()), default=now)
        ready = {descriptor for descriptor, _ in self._poll.poll(max(0, soonest - now) * 1000 + 1)}
        for child in list(self._children.values()):
            if child.output in ready:
                self._hear(child, child.output, child.said, _OUTPUT_LIMIT)
            if child.results >= 0 and child.results in ready:
                self._hear(child, child.results, child.lines, MOST * LINE_LIMIT)
                self._pass_on(child)
            if child.watch in ready:
                self._collect(child)
            elif time.monotonic() >= child.deadline:
                self._interrupt(child)

    def _hear(self, child: Child, descriptor: int, buffer: bytearray, limit: int) -> None:
        """Read what is there; of too much the end is kept, as it is the end that says what was wrong."""
        try:
            piece = os.read(descriptor, _OUTPUT_LIMIT)
        except BlockingIOError:
            return
        if not piece:
            self._poll.unregister(descriptor)
            os.close(descriptor)
            if descriptor == child.output:
                child.output = -1
            else:
                child.results = -1
        buffer += piece
        del buffer[: max(0, len(buffer) - limit)]

    def _interrupt(self, child: Child) -> None:
        """End what took too long: politely, and a second later not so."""
        _kill_session(child.pid, signal.SIGKILL if child.late else signal.SIGTERM)
        child.late = True
        child.deadline = time.monotonic() + _GRACE

    def _collect(self, child: Child) -> None:
        for descriptor, buffer, limit in (
            (child.output, child.said, _OUTPUT_LIMIT),
            (child.results, child.lines, MOST * LINE_LIMIT),
        ):
            if descriptor >= 0:
                self._hear(child, descriptor, buffer, limit)
        # what it has left in its session; while it is not reaped its number is nobody else's
        _kill_session(child.pid, signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        del self._children[child.watch]
        for descriptor in (child.watch, child.output, child.results):
            if descriptor >= 0:
                self._poll.unregister(descriptor)
                os.close(descriptor)
        seconds = time.monotonic() - child.began
        said = child.said.decode("utf-8", "replace").strip()
        if child.name is None:
            self._pass_on(child)
            for plugin in self._plugins:
                self._silent("plugin", plugin, seconds, said[-_TOLD_LIMIT:])
            self._plugins = []
        elif child.late:
            self._timed_out("promise", child.name)
        else:
            self._program_ended(child.name, seconds, failed=status != 0, message=said[-MESSAGE_LIMIT:])

    # --- what comes of it

    def _pass_on(self, child: Child) -> None:
        """Tell what the interpreter of the plugins says of each, as far as it makes sense."""
        *lines, rest = child.lines.split(b"\n")
        child.lines = bytearray(rest)
        for line in lines:
            try:
                found = json.loads(line)
                name, end = found["name"], found["end"]
                if name not in self._plugins:
                    continue
                if end == "left":
                    self._left += 1
                elif end == "late":
                    self._timed_out("plugin", name)
                elif end == "silent":
                    self._silent("plugin", name, float(found["seconds"]), str(found["message"]))
                else:
                    self._plugin_ended(name, found)
            except (ValueError, KeyError, TypeError):
                continue  # not from us; who said nothing of use is told as silent
            self._plugins.remove(name)

    def _plugin_ended(self, name: str, found: dict[str, Any]) -> None:
        if found["type"] in _TYPES:
            self._write(
                "plugin", name, found["type"], bool(found["failed"]), found["message"], found["seconds"]
            )
        self._tell("plugin", name, found)

    def _program_ended(self, name: str, seconds: float, *, failed: bool, message: str) -> None:
        """A program failed when it said so; as an anomaly, when it did so three times in a row."""
        row = self._job["rows"].get(f"promise/{name}", 0) + 1 if failed else 0
        _log(name, message, failed=failed)
        _cache(name, os.path.join(self._job["cwd"], "etc", "promise", name))
        wrong = failed and (self._job["mode"] == "test" or row >= _FAILURES)
        # slapgrid's wrapper of programs gives a test result in either mode
        self._write("promise", name, "test", wrong, message, seconds)
        self._tell(
            "promise",
            name,
            {"type": "test", "failed": wrong, "message": message, "seconds": seconds, "row": row},
        )

    def _timed_out(self, kind: str, name: str) -> None:
        timeout = self._job["timeout"]
        shown = int(timeout) if timeout == int(timeout) else timeout
        self._unanswered(kind, name, timeout, f"Error: Promise timed out after {shown} seconds")

    def _silent(self, kind: str, name: str, seconds: float, why: str) -> None:
        text = "Error: No output returned by the promise"
        self._unanswered(kind, name, seconds, f"{text}: {why}" if why else text)

    def _unanswered(self, kind: str, name: str, seconds: float, message: str) -> None:
        """As an anomaly only when the time before was no good either: one slow moment is none."""
        mode, row = self._job["mode"], self._job["rows"].get(f"{kind}/{name}", 0) + 1
        failed = mode == "test" or _was_bad(name)
        self._write(kind, name, mode, failed, message, seconds)
        self._tell(
            kind, name, {"type": mode, "failed": failed, "message": message, "seconds": seconds, "row": row}
        )

    def _tell(self, kind: str, name: str, found: dict[str, Any]) -> None:
        _send(
            self._out,
            {
                "kind": kind,
                "name": name,
                "type": found["type"],
                "failed": bool(found["failed"]),
                "message": str(found["message"] or "")[-_TOLD_LIMIT:],
                "seconds": float(found["seconds"]),
                "row": int(found.get("row", 0)),
                "periodicity": float(found.get("periodicity", _PERIODICITY)),
                "tested": bool(found.get("tested", True)),
                "sensed": bool(found.get("sensed", True)),
                "bang": bool(found.get("bang", False)),
            },
        )

    def _write(self, kind: str, name: str, form: str, failed: bool, message: str, seconds: float) -> None:
        title = os.path.splitext(name)[0]
        value = {
            "title": title,
            "name": name,
            "path": os.path.join(self._job["cwd"], "etc", kind, name),
            "execution-time": round(seconds, 3),
            "result": {
                "type": _TYPES[form],
                "failed": failed,
                "date": time.strftime(_DATE, time.gmtime()),
                "message": message,
            },
        }
        _replace(f"{_STATE}/result/{title}.status.json", value)


# --- files of the tenant's, which may be whatever the tenant likes ------------------------------------------------------


def _listed(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in itertools.islice(entries, MOST_NAMES))
    except OSError:
        return []


def _is_plugin(name: str) -> bool:
    return name.endswith(".py") and not name.startswith("__init__")


def _is_program(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)


def _was_bad(name: str) -> bool:
    """Whether the last result of a promise was a failure, or one in the making."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(f"{_STATE}/result/{os.path.splitext(name)[0]}.status.json", flags)
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return False
        result = json.loads(os.read(descriptor, _OUTPUT_LIMIT))["result"]
        return bool(result["failed"]) or "error:" in result["message"].lower()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    finally:
        os.close(descriptor)


def _replace(path: str, value: dict[str, Any]) -> None:
    """Replace a file, whatever lies there; one that cannot be written is left out: the daemon is told all the same."""
    temporary = f"{path}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(OSError, UnicodeEncodeError):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        descriptor = os.open(temporary, flags, 0o644)
        try:
            os.write(descriptor, json.dumps(value).encode("ascii"))
        finally:
            os.close(descriptor)
        os.rename(temporary, path)


def _log(name: str, message: str, *, failed: bool) -> None:
    """Append to the log of a promise in the form of slapgrid's, which others read."""
    now = time.time()
    level, number = "ERROR" if failed else "INFO", f"{int(now)}-{int(now * 1000) % 900 + 100}"
    head = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    path = f"{_STATE}/log/{os.path.splitext(name)[0]}.log"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        descriptor = os.open(path, flags, 0o644)
        try:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                os.write(descriptor, f"{head} - {level} - {number} - {message}\n".encode("utf-8", "replace"))
                if found.st_size > _LOG_LIMIT:
                    os.rename(path, f"{path}.1")
        finally:
            os.close(descriptor)


def _cache(name: str, path: str) -> None:
    """Write what slapgrid keeps of each promise."""
    with contextlib.suppress(OSError):
        now = time.time()
        value = {
            "is_tested": True,
            "is_anomaly_detected": True,
            "periodicity": _PERIODICITY,
            "next_run_after": now + _PERIODICITY * 60,
            "timestamp": now,
            "module_file": path,
            "module_file_mtime": os.stat(path).st_mtime,
        }
        _replace(f"{_STATE}/cache/{os.path.splitext(name)[0]}", value)


# --- ending what was started --------------------------------------------------------------------------------------------


def _kill_session(pid: int, number: int) -> None:
    """Send a signal to what a promise began with; what has gone elsewhere is found at the end of the run."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def end_all_children(seconds: float = 3.0) -> None:
    """Kill every process that this one has started or adopted; each that goes hands over its own children."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for pid in children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)
