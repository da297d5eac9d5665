"""supervisord: its configuration, its start, and what its processes do.

Promises: supervisord is no child of the daemon and outlives it; names and paths that come from a tenant are validated
before they become configuration; logs are opened by root outside the tenant's directory; a group is touched only when its
configuration changed. Layout and programme settings are those of slapos.core 1.26.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import resource
import signal
import site
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import execute, files, keyring, procfs, survivors
from partitiond.errors import PartitiondError
from partitiond.namespaces import NSENTER
from partitiond.supervisor_link import PLUGIN_VERSION, Link

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from partitiond.config import Config

logger = logging.getLogger(__name__)

# of one partition; each takes two descriptors of supervisord, which all partitions share
MOST_PROGRAMS = 100
_DESCRIPTORS = 1024
_NO_LIMIT = 60000
_ANSWER_SECONDS = 90
_REACHABLE_SECONDS = 5
# it ends first what another has left, see survivors.py; to kill it meanwhile would begin that anew
_ANSWERS_WITHIN = 20.0
_STARTS_WITHIN = 5.0
_ROUNDS, _MOMENT = 5, 0.002
_NOTES = "processes"
_TUNNEL_SUFFIX = "-tunnel"
MESH = "mesh"
"""The group of tincd; ids of partitions end in a number."""
_MODULE = "supervisor.supervisord"
PROGRAM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
_GROUP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
# of a command or a path: supervisord splits commands as a shell does, and quotes stand around the values of the environment
_WORD = re.compile(r"[^\s\"'\\;,]+")
_SOCKET_LIMIT = 104  # struct sockaddr_un holds 108 bytes; supervisord makes a longer temporary name beside it


@dataclass(frozen=True, slots=True)
class Process:
    """A process as supervisord knows it; ``pid`` 0 when it does not run. ``outdated``: its group is not what its file says."""

    group: str
    name: str
    state: str
    pid: int
    started: bool
    outdated: bool = False


@dataclass(frozen=True, slots=True)
class Program:
    """One program of a group: name, command, whether supervisord starts it again when it ends, and the name of its log.

    ``log`` is the program's name unless it is given, without suffix; one of ours begins as no tenant's program may.
    ``patience`` is how many seconds it has to end before it is killed.
    """

    name: str
    process_name: str
    command: str
    restart: bool = False
    log: str = ""
    patience: int = 60


@dataclass(frozen=True, slots=True)
class Group:
    """The programs of a partition (``slappart3``) or its tunnels (``slappart3-tunnel``)."""

    name: str
    user: str
    uid: int
    gid: int
    directory: Path
    log_directory: Path
    programs: tuple[Program, ...]
    # words before each command: what they start runs as root until they switch to the user themselves
    launcher: tuple[str, ...] = ()

    def render(self) -> str:
        """Return the text of the group's configuration file. Raises PartitiondError ``supervisor.name``.

        A name or a command that could end its line would be configuration of root's written by a tenant.
        """
        texts = (text for item in self.programs for text in (item.name, item.process_name))
        words = [str(self.directory), str(self.log_directory), self.user, *self.launcher]
        words += [word for item in self.programs for word in item.command.split(" ")]
        if not _GROUP_NAME.fullmatch(self.name):
            raise _unusable(self.name)
        for text in texts:
            if not PROGRAM_NAME.fullmatch(text):
                raise _unusable(text)
        for text in words:
            if not text.isprintable() or not _WORD.fullmatch(text):
                raise _unusable(text)
        heads = ",".join(f"{self.name}_{program.name}" for program in self.programs)
        return f"[group:{self.name}]\nprograms={heads}\n" + "".join(
            self._program(item) for item in self.programs
        )

    def _program(self, program: Program) -> str:
        home = f'HOME="{self.directory}",USER="{self.user}",LOGNAME="{self.user}",PATH="{execute.PATH}",LANG="C.UTF-8"'
        log = self.log_directory / f"{program.log or program.name}.log"
        lines = {
            "command": " ".join((*self.launcher, program.command)),
            "process_name": program.process_name,
            "directory": str(self.directory),
            "user": "0" if self.launcher else str(self.uid),
            "environment": home,
            "autostart": "true" if program.restart else "false",
            "autorestart": "true" if program.restart else "false",
            "startsecs": "1" if program.restart else "0",
            "startretries": "1000" if program.restart else "0",
            "exitcodes": "0",
            "stopsignal": "TERM",
            "stopwaitsecs": str(program.patience),
            "stopasgroup": "true",
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": str(log),
            "stdout_logfile_maxbytes": "5MB",
            "stdout_logfile_backups": "1",
        }
        body = "".join(f"{key}={value.replace('%', '%%')}\n" for key, value in lines.items())
        return f"\n[program:{self.name}_{program.name}]\n{body}"


# both as written by Group; no text of a tenant can begin a line
_COMMAND = re.compile(rf"^command=(?:{re.escape(NSENTER)} .*? --no-new-privs -- )?", re.MULTILINE)
_USER = re.compile(r"^user=\d+$", re.MULTILINE)


def relaunched(text: str, uid: int, launcher: Sequence[str]) -> str:
    """The text of a group with another launcher before the same programs."""
    words = "".join(f"{word} " for word in launcher).replace("%", "%%")
    text = _COMMAND.sub(lambda _: f"command={words}", text)
    return _USER.sub(f"user={0 if launcher else uid}", text)


def _unusable(text: str) -> PartitiondError:
    return PartitiondError(
        "supervisor.name",
        "cannot be written into the configuration of supervisord",
        resource=ascii(text)[1:-1],
        hint="allowed in names are letters, digits and _.+-",
    )


class Supervisor(Link):
    """The node's supervisord.

    Methods raise PartitiondError ``supervisor.down`` when it does not answer and ``supervisor.fault`` when it refuses.
    """

    def __init__(self, config: Config) -> None:
        root = config.instance_root
        self.configuration = root / "etc" / "supervisord.conf"
        self.groups_directory = root / "etc" / "supervisord.conf.d"
        super().__init__(root / "sv.sock", root / "var" / "log" / "supervisord.log")
        self.pidfile = root / "var" / "run" / "supervisord.pid"
        self._outdated = False
        self.directory = config.run_dir / "supervisor"
        kept = (name for one in config.grid.keep_running for name in (one, f"{one}{_TUNNEL_SUFFIX}"))
        self._kept = sorted((*kept, *((MESH,) if config.mesh else ())))

    def render(self) -> str:
        """Return the text of supervisord.conf."""
        return (
            f"[unix_http_server]\nfile={self.socket}\nchmod=0700\n\n"
            # the plug-in has more where they are needed; what programs may open without asking is what it is with slapos.core
            f"[supervisord]\nlogfile={self.log}\npidfile={self.pidfile}\nminfds={_DESCRIPTORS}\numask=022\n"
            f"nocleanup=true\n\n"
            "[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n\n"
            "[rpcinterface:partitiond]\nsupervisor.rpcinterface_factory=partitiond.supervisor_plugin:make\n"
            f"directory={self.directory}\ngroups={self.groups_directory}\n"
            f"keep={' '.join(self._kept)}\n\n"
            f"[supervisorctl]\nserverurl=unix://{self.socket}\n\n"
            f"[include]\nfiles={self.groups_directory}/*.conf\n"
        )

    def running(self) -> bool:
        """Whether a supervisord answers on the socket."""
        try:
            self._call("supervisor.getState")
        except PartitiondError:
            return False
        return True

    def start(self) -> Callable[[], None]:
        """Start it, detached; what is returned waits until it answers, and must be called.

        Both raise PartitiondError ``supervisor.start``, the second with the end of its output.
        """
        if len(str(self.socket)) > _SOCKET_LIMIT:
            raise PartitiondError(
                "supervisor.start",
                "the path of its socket is too long",
                resource=str(self.socket),
                hint="shorten instance_root",
            )
        if self._wait_for_another():
            return lambda: None
        for name in self.strange_groups():
            logger.warning("%s: its file of supervisord is not root's alone; it is removed", name)
            self.remove_group(name)
        keyring.leave()
        environment = {"PATH": execute.PATH, "LANG": "C.UTF-8", "HOME": "/root"}
        package = str(Path(__file__).parent.parent)
        if package not in site.getsitepackages():  # its plug-in is ours: it must be of the same version
            environment["PYTHONPATH"] = package
        options = ("-P", "-s", "-W", "ignore", "-m", _MODULE)
        command = [sys.executable, *options, "-c", str(self.configuration)]
        started = subprocess.Popen(
            command,
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        return partial(self._answers, started)

    def _answers(self, started: subprocess.Popen[bytes]) -> None:
        _, said = started.communicate()
        deadline = time.monotonic() + _ANSWERS_WITHIN
        while started.returncode == 0 and time.monotonic() < deadline:
            if self.running():
                return
            time.sleep(0.01)
        raise PartitiondError(
            "supervisor.start",
            f"did not start: {said.decode(errors='replace').strip()[-500:] or 'no answer on its socket'}",
            resource=str(self.configuration),
            hint=f"read {self.log}",
        )

    def _wait_for_another(self) -> bool:
        """Return whether one that is there already answers: a partitiond that was killed may just have started it.

        One that cannot be reached for some seconds is ended, unless it has just begun: it would start everything a second time
        beside ours.
        """
        deadline = time.monotonic() + _REACHABLE_SECONDS
        while there := self._servers():
            if self.running():
                return True
            if time.monotonic() > deadline:
                for pid in there:
                    with contextlib.suppress(ProcessLookupError):
                        if procfs.age(pid) > _ANSWERS_WITHIN:
                            os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        return False

    def _servers(self) -> list[int]:
        """All of ours, also one that is starting.

        It goes on as a child of its own then. Where that happens between a list of all processes and the look at those in it,
        the parent has ended and the child is not listed; it is in the next list.
        """
        return self._listed() or self._listed()

    def _listed(self) -> list[int]:
        return [pid for pid in procfs.pids() if self._is_server(pid)]

    def _is_server(self, pid: int) -> bool:
        if procfs.user_of(pid) != os.getuid():
            return False  # a tenant could keep us waiting for its arguments, which lie in memory of its own
        words = procfs.command(pid)
        ours = _MODULE.encode() in words and str(self.configuration).encode() in words
        return ours and procfs.is_alive(pid)

    def pid(self) -> int:
        """Its process id, 0 where it does not run; asks nobody."""
        try:
            found = int(self.pidfile.read_text("ascii"))
        except (OSError, ValueError):
            return 0
        return found if self._is_server(found) else 0

    def hard_limit(self) -> int:
        """How many open files it may allow to what it starts: its own hard limit, or the one to come."""
        try:
            text = Path(f"/proc/{self.pid() or 'self'}/limits").read_text("ascii")
            found = text.partition("\nMax open files")[2].split()[1]
        except (OSError, IndexError):  # it ends at this moment
            return _own_limit()
        return _NO_LIMIT if found == "unlimited" else int(found)

    def shutdown(self) -> None:
        """End it with all its processes and wait until it is gone."""
        if not self.running() and not self._wait_for_another():
            survivors.end(survivors.read(self.directory / _NOTES), f"unix://{self.socket}")
            return
        pid = int(self._call("supervisor.getPID"))
        if self._ask("shutdown") is None:
            self._call("supervisor.shutdown")
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if not procfs.is_alive(pid):
                return
            time.sleep(0.05)
        raise PartitiondError(
            "supervisor.fault", "does not end", resource=f"process {pid}", hint=f"read {self.log}"
        )

    def processes(self) -> tuple[Process, ...]:
        """All processes; empty when supervisord does not run."""
        try:
            found = self._ask("look") or {}
            self._outdated = found.get("version") != PLUGIN_VERSION
            lines = found["states"] if "states" in found else self._ask("states")
            if lines is not None:
                outdated = frozenset(found.get("outdated", ()))
                return tuple(_process(line, outdated) for line in str(lines).splitlines())
            rows = self._call("supervisor.getAllProcessInfo")
        except PartitiondError as error:
            if error.code == "supervisor.down":
                return ()
            raise
        return tuple(
            Process(row["group"], row["name"], row["statename"], int(row["pid"]), bool(row["start"]))
            for row in rows
        )

    def is_outdated(self) -> bool:
        """Whether the one that :meth:`processes` last asked lacks our plug-in of this version; it may go when nothing runs."""
        return self._outdated

    def group_file(self, name: str) -> Path:
        """Where a group's configuration lies."""
        return self.groups_directory / f"{name}.conf"

    def group_text(self, name: str) -> str | None:
        """The configuration of a group on disk, or None: also where somebody else may have written it."""
        if not self.has_group(name) or not files.is_own(f"{self.groups_directory}/{name}.conf"):
            return None
        try:
            with open(f"{self.groups_directory}/{name}.conf", encoding="utf-8") as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def has_group(self, name: str) -> bool:
        """Whether a group has a file at all: most have none, and an exception costs ten times as much as this."""
        return files.there(f"{self.groups_directory}/{name}.conf")

    def group_names(self) -> list[str]:
        """Names of the groups on disk."""
        try:
            found = os.listdir(self.groups_directory)  # noqa: PTH208 - names suffice
        except FileNotFoundError:
            return []
        return sorted(name.removesuffix(".conf") for name in found if name.endswith(".conf"))

    def strange_groups(self) -> frozenset[str]:
        """Names of the groups on disk of which somebody else may have written the file, or still could."""
        return frozenset(
            name for name in self.group_names() if not files.is_own(f"{self.groups_directory}/{name}.conf")
        )

    def write_group(self, group: Group) -> bool:
        """Write a group's file; return whether it changed."""
        text = group.render()
        if self.group_text(group.name) == text:
            return False
        files.write_path(self.group_file(group.name), text.encode(), mode=0o600)
        return True

    def remove_group(self, name: str) -> bool:
        """Remove a group's file; return whether it was there."""
        try:
            self.group_file(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def update(self, only: Collection[str] | None = None) -> frozenset[str]:
        """Make supervisord run what the files say; only groups whose file changed are stopped. Return those started (anew).

        One file more is one file read, however many there are. ``only``: no others are stopped, whatever their files say.
        """
        return self._update(only)[0]

    def take_in(self) -> frozenset[str]:
        """Make supervisord run what the files say as far as nothing has to be stopped for it; return what is to be stopped."""
        return self._update(frozenset())[1]

    def _update(self, only: Collection[str] | None) -> tuple[frozenset[str], frozenset[str]]:
        """As :meth:`update`; return also the groups that were not to be stopped."""
        started: set[str] = set()
        for _ in range(_ROUNDS):
            answer = self._ask("reload")
            if answer is None:
                return self._update_by_name(only)
            started.update(answer["done"])
            if not (waiting := [name for name in answer["waiting"] if only is None or name in only]):
                for name, why in answer["refused"].items():
                    logger.warning("%s: supervisord refuses: %s; read %s", name, why, self.log)
                return frozenset(started), frozenset(answer["waiting"])
            self.stop_groups(waiting)
        raise PartitiondError(
            "supervisor.fault",
            "is started again and again while it is to be changed",
            resource=min(waiting),
            hint=f"read {self.log}",
            retryable=True,
        )

    def _update_by_name(self, only: Collection[str] | None) -> tuple[frozenset[str], frozenset[str]]:
        """The same for a supervisord without our plug-in: it reads all files, and is told of each group that is another."""
        added, changed, removed = self._call("supervisor.reloadConfig")[0]
        others = frozenset() if only is None else frozenset((*changed, *removed)) - {*only}
        left = others and others & running_groups(self.processes())
        for name in (*changed, *removed):
            if name not in left:
                self.stop_group(name)
                self._call("supervisor.removeProcessGroup", name)
        coming = [name for name in (*changed, *added) if name not in left]
        refused = self._call_all([("supervisor.addProcessGroup", name) for name in coming])
        return frozenset(coming) - refused.keys(), left

    def start_group(self, name: str) -> None:
        """Start what is not running in a group."""
        if self._ask("start", name) is None:
            self._call("supervisor.startProcessGroup", name, False)

    def stop_groups(self, names: Sequence[str], *, within: float = _ANSWER_SECONDS) -> None:
        """Stop several groups side by side, and wait; those that do not exist are stopped already."""
        deadline = time.monotonic() + within
        while left := self._ask("stop", list(names)):
            if time.monotonic() > deadline:
                raise PartitiondError(
                    "supervisor.fault", "does not end", resource=min(left)[0], hint=f"read {self.log}"
                )
            procfs.await_end([pid for _, pid in left], deadline)
            time.sleep(_MOMENT)  # for supervisord to take note of it
        if left is None:
            self._stop_by_name(names)

    def _stop_by_name(self, names: Sequence[str]) -> None:
        """The same for a supervisord without our plug-in."""
        # in one call that waited, each would be stopped when the one before is gone
        self._call_all([("supervisor.stopProcessGroup", name, False) for name in names], but="BAD_NAME")
        deadline = time.monotonic() + _ANSWER_SECONDS
        while left := running_groups(self.processes()) & frozenset(names):
            if time.monotonic() > deadline:
                raise PartitiondError(
                    "supervisor.fault", "does not end", resource=min(left), hint=f"read {self.log}"
                )
            time.sleep(0.02)

    def stop_group(self, name: str) -> None:
        """Stop a group and wait; a group that does not exist is stopped already."""
        self.stop_groups([name])

    def signal(self, group: str, process: str, name: str) -> None:
        """Send a signal by its name (``USR2``) to a process, which has a handler for it."""
        self._call("supervisor.signalProcess", f"{group}:{process}", name)

    def hang_up(self, group: str, process: str, pid: int) -> bool:
        """Send SIGHUP to a process when it handles it, as one that is starting does not yet; return whether it was there."""
        deadline = time.monotonic() + _STARTS_WITHIN
        while (handles := self.handles_hang_up(pid)) is False and time.monotonic() < deadline:
            time.sleep(0.005)
        if handles:
            self.signal(group, process, "HUP")
        return bool(handles)

    @staticmethod
    def handles_hang_up(pid: int) -> bool | None:
        """Whether a process has a handler for SIGHUP; None when it is gone."""
        return procfs.handles(pid, signal.SIGHUP)


def _process(line: str, outdated: frozenset[str]) -> Process:
    group, name, state, pid, started = line.split("\t")
    return Process(group, name, state, int(pid), started == "1", group in outdated)


def running_groups(processes: Iterable[Process]) -> frozenset[str]:
    """The groups of which a process runs."""
    return frozenset(process.group for process in processes if process.pid)


def _own_limit() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return _NO_LIMIT if hard == resource.RLIM_INFINITY else hard
