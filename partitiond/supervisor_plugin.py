"""What supervisord can do more under partitiond: an interface that it loads by its own point of extension.

Promises: one group of hundreds is changed by reading one file, and what ``supervisorctl`` sees stays true; nothing here
waits or stops anything that was not asked to be stopped; a supervisord that begins starts nothing before what one that was
killed has left is taken over or ended; the daemon is told of a process that ends at once, and never waited for.

Loaded by what :meth:`partitiond.supervision.Supervisor.render` writes::

    [rpcinterface:partitiond]
    supervisor.rpcinterface_factory = partitiond.supervisor_plugin:make
"""

from __future__ import annotations

import configparser
import gc
import json
import os
import resource
import socket
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supervisor import events
from supervisor.options import ProcessConfig, UnhosedConfigParser
from supervisor.states import (
    RUNNING_STATES,
    STOPPED_STATES,
    ProcessStates,
    SupervisorStates,
    getProcessStateDescription,
)
from supervisor.xmlrpc import Faults, RPCError

from partitiond import files, procfs, survivors
from partitiond.supervisor_loop import Poller, Wake
from partitiond.supervisor_process import Config, Process, Scene

if TYPE_CHECKING:
    from collections.abc import Iterator

    from partitiond.survivors import Note

VERSION = 2
NOTES, EVENTS = "processes", "events.sock"
_TOLD = (ProcessStates.EXITED, ProcessStates.BACKOFF, ProcessStates.FATAL)
_SUFFIX = ".conf"
# beside those of programs: what supervisord itself has open, who asks it, and some to spare
_FILES_BESIDES = 200
_MOST_UNTOLD = 4000
_DATAGRAMS = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
# of a file system's times
_COARSE = 1.0
# where partitiond lies in no directory of Python's own: for supervisord's eyes only
os.environ.pop("PYTHONPATH", None)


def make(supervisord: Any, directory: str, groups: str, keep: str = "") -> Interface:
    """Make the interface: notes lie below ``directory``, the files of groups in ``groups``; ``keep`` are groups, by name."""
    return Interface(supervisord, Path(directory), Path(groups), frozenset(keep.split()))


class Interface:
    """The methods that supervisord answers as ``partitiond.…``; each returns at once."""

    def __init__(self, supervisord: Any, directory: Path, groups: Path, kept: frozenset[str]) -> None:
        self._supervisord, self._options = supervisord, supervisord.options
        self._directory, self._groups = directory, groups
        (directory / NOTES).mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        self._seen: dict[str, tuple[int, int, int, int]] = {}
        self._anew: set[str] = set()
        self._ending_all = False
        sockets = self._options.get_socket_map()
        self._options.poller.close()
        self._options.poller = self._poller = Poller(self._options, sockets)
        self._untold: deque[bytes] = deque(maxlen=_MOST_UNTOLD)
        self._poller.finish = self._tell
        self._wake = Wake(supervisord)
        self._poller.attend(supervisord)
        self._scene = Scene(directory / NOTES, self._poller.outputs)
        self._scene.kept = kept
        for name in supervisord.process_groups:
            self._take_into_care(name)
        events.subscribe(events.SupervisorRunningEvent, self._begins)
        events.subscribe(events.SupervisorStoppingEvent, self._ends)
        events.subscribe(events.ProcessGroupAddedEvent, lambda event: self._take_into_care(event.group))
        events.subscribe(events.ProcessStateEvent, self._changed)

    # --- asked by the daemon ------------------------------------------------------------------------------------------

    def look(self) -> dict[str, Any]:
        """The version of this interface, all states, and the groups of which something runs otherwise than it is said now."""
        outdated = [name for name in self._supervisord.process_groups if self._is_outdated(name)]
        return {"version": VERSION, "states": self.states(), "outdated": outdated}

    def states(self) -> str:
        """All processes: a line each with group, name, state, pid, and 1 if it was ever started, by tabs.

        A group that was stopped to be exchanged, by somebody who was killed then, was never started as its file says.
        """
        behind = {
            name
            for name, group in self._supervisord.process_groups.items()
            if name in self._anew or self._is_behind(name, group)
        }
        return "\n".join(
            f"{name}\t{process.config.name}\t{getProcessStateDescription(process.get_state())}\t{process.pid}"
            f"\t{int(bool(process.laststart) and name not in behind)}"
            for name, group in self._supervisord.process_groups.items()
            for process in group.processes.values()
        )

    def reload(self) -> dict[str, Any]:
        """Make the groups what their files say, as far as nothing has to be stopped for it.

        ``done`` are those that came or changed, ``waiting`` those that have to be stopped first, ``refused`` what is wrong
        with a file, by name; ``read`` is how many were read: those that were not seen as they are now.
        """
        self._refuse_while_ending()
        answer: dict[str, Any] = {"done": [], "waiting": [], "refused": {}, "read": 0}
        known = {config.name: config for config in self._options.process_group_configs}
        there = self._files()
        for name in sorted(there):
            if (
                self._seen.get(name) == there[name]
                and name in self._supervisord.process_groups
                and not self._is_outdated(name)
            ):
                continue
            answer["read"] += 1
            try:
                config = self._parse(name)
            except (ValueError, OSError, configparser.Error) as error:
                answer["refused"][name] = str(error)
                continue
            if self._put(name, config, known, answer):
                self._seen[name] = there[name]
        for name in sorted(self._supervisord.process_groups.keys() - there.keys()):
            if self._remove(name):
                known.pop(name, None)
                self._seen.pop(name, None)
            else:
                answer["waiting"].append(name)
        self._options.process_group_configs = list(known.values())
        self._make_room()
        return answer

    def start(self, name: str) -> bool:
        """Start what does not run in a group; what cannot be started is FATAL then, or tried again."""
        self._refuse_while_ending()
        for process in self._group(name).processes.values():
            if process.get_state() not in (*RUNNING_STATES, ProcessStates.STOPPING, ProcessStates.UNKNOWN):
                process.spawn()
                process.transition()
        return True

    def stop(self, names: list[str]) -> list[list[Any]]:
        """Stop groups, all of them at the same time; return the name and pid of each process that is still there.

        A process is signalled once, however often it is asked for. A group that does not exist is stopped already.
        """
        left = []
        for name in names:
            group = self._supervisord.process_groups.get(name)
            for process in group.processes.values() if group is not None else ():
                if process.get_state() in RUNNING_STATES:
                    process.stop()
                if process.get_state() not in STOPPED_STATES:
                    left.append([name, process.pid])
        return left

    def shutdown(self) -> bool:
        """End with all processes, also those that go on however else supervisord ends."""
        self._ending_all = True
        self._options.mood = SupervisorStates.SHUTDOWN
        return True

    def _refuse_while_ending(self) -> None:
        if self._options.mood < SupervisorStates.RUNNING:
            raise RPCError(Faults.SHUTDOWN_STATE)

    def _group(self, name: str) -> Any:
        group = self._supervisord.process_groups.get(name)
        if group is None:
            raise RPCError(Faults.BAD_NAME, name)
        return group

    # --- groups -------------------------------------------------------------------------------------------------------

    def _files(self) -> dict[str, tuple[int, int, int, int]]:
        """What is there, with what is another after each change: files are replaced, not written to."""
        found = {}
        with os.scandir(self._groups) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX) and not entry.name.startswith("."):
                    there = entry.stat(follow_symlinks=False)
                    if not files.is_ours(there):
                        continue  # nobody else says what root runs
                    found[entry.name.removesuffix(_SUFFIX)] = _mark(there)
        return found

    def _is_behind(self, name: str, group: Any) -> bool:
        """Whether a group was stopped, with all that is in it, and its file is another than the one that was read."""
        states = {process.get_state() for process in group.processes.values()}
        if (
            ProcessStates.STOPPED not in states
            or not states.issubset(STOPPED_STATES)
            or name not in self._seen
        ):
            return False
        try:
            there = os.lstat(self._groups / f"{name}{_SUFFIX}")
        except FileNotFoundError:
            return False  # it is to go
        return files.is_ours(there) and self._seen[name] != _mark(there)

    def _parse(self, name: str) -> Any:
        """The one group that a file says, by supervisor's own parser. Raises ValueError, OSError, configparser.Error."""
        parser = UnhosedConfigParser()
        parser.expansions = self._options.environ_expansions
        path = str(self._groups / f"{name}{_SUFFIX}")
        with open(path, encoding="utf-8") as stream:
            parser.read_file(stream, path)
        found = self._options.process_groups_from_parser(parser)
        if [one.name for one in found] != [name]:
            raise ValueError(f"{path} does not hold just the group {name}")
        return found[0]

    def _put(self, name: str, config: Any, known: dict[str, Any], answer: dict[str, Any]) -> bool:
        """Let a group be what its file says; return whether it is."""
        there = self._supervisord.process_groups.get(name)
        if self._is_outdated(name):
            self._anew.add(name)  # once it has ended it looks like one that was stopped, and is to be started
        if there is None or there.config != config or name in self._anew:
            if there is not None and not self._remove(name):
                answer["waiting"].append(name)
                return False
            self._supervisord.add_process_group(config)
            self._anew.discard(name)
            answer["done"].append(name)
        known[name] = self._supervisord.process_groups[name].config
        return True

    def _is_outdated(self, name: str) -> bool:
        """Whether something runs in a group that was taken over, and whose configuration has become another before that."""
        group = self._supervisord.process_groups.get(name)
        return group is not None and any(getattr(one, "outdated", False) for one in group.processes.values())

    def _remove(self, name: str) -> bool:
        return bool(self._supervisord.remove_process_group(name))

    def _take_into_care(self, name: str) -> None:
        """Let the processes of a group be ours; none of them has been started yet."""
        group = self._supervisord.process_groups[name]
        configs = group.config.process_configs
        if all(type(one) is ProcessConfig and one.redirect_stderr for one in configs):
            group.config.process_configs = [Config.of(one, self._scene) for one in configs]
            group.processes = {one.name: one.make_process(group) for one in group.config.process_configs}
        else:
            self._poller.foreign.add(name)
        self._poller.attend_group(group)

    def _make_room(self) -> None:
        """Have descriptors for all programs; nothing else of supervisord's hangs on how many there may be."""
        programs = sum(len(one.processes) for one in self._supervisord.process_groups.values())
        need = _FILES_BESIDES + 3 * programs  # its output, its log, and its pidfd if it was taken over
        self._options.minfds = max(self._options.minfds, need)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft >= need:
            return
        above = hard if hard == resource.RLIM_INFINITY else max(need, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (need, above))
        except (OSError, ValueError):
            # in a container that may not raise it; a program that lacks one is tried again, and says so
            self._options.logger.critical(
                "%(need)d files should be open, %(hard)d may be", need=need, hard=hard
            )

    # --- what supervisord tells itself --------------------------------------------------------------------------------

    def _begins(self, _: Any) -> None:
        """Before anything is started: go on with what is kept, end the rest."""
        options = self._options
        self._wake.begin(options.get_socket_map())
        self._poller.outputs.begin(options.get_socket_map())
        self._make_room()
        self._trust_files()
        notes = survivors.read(self._scene.directory)
        taken = {note.pid for note in notes.living(self._scene.kept) if self._take_over(note)}
        count = survivors.end(notes, self._options.serverurl, taken)
        if count:
            options.logger.error("ended %(count)d processes that another supervisord has left", count=count)
        survivors.clear(self._scene.directory, taken)
        survivors.write_session(self._scene.directory, self._scene.boot)
        # what a thousand programs are described by stays: no collection has to look at it again (48 ms)
        gc.collect()
        gc.freeze()

    def _take_over(self, note: Note) -> bool:
        group = self._supervisord.process_groups.get(note.group)
        process = group.processes.get(note.name) if group is not None else None
        if not isinstance(process, Process) or not process.take_over(note):
            return False
        self._options.logger.info(
            "took over %(group)s:%(name)s with pid %(pid)d", group=note.group, name=note.name, pid=note.pid
        )
        return True

    def _trust_files(self) -> None:
        """Take the groups that supervisord has just read for what their files say, where those are older than it is."""
        family = procfs.family_of(os.getpid())
        ticks = family.start if family else 0
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        before = (time.time() - age - _COARSE) * 1e9
        there = self._files()
        self._seen = {
            name: there[name]
            for name in self._supervisord.process_groups.keys() & there.keys()
            if there[name][3] < before
        }

    def _ends(self, _: Any) -> None:
        """However supervisord ends: who is kept goes on, and all others are stopped at the same time."""
        self._scene.kept = frozenset() if self._ending_all else self._kept_now()
        for name, group in self._supervisord.process_groups.items():
            if name not in self._scene.kept:
                group.stop_all()
                continue
            for process in group.processes.values():
                if isinstance(process, Process) and process.pid:
                    self._options.logger.info(
                        "%(group)s:%(name)s goes on with pid %(pid)d",
                        group=name,
                        name=process.config.name,
                        pid=process.pid,
                    )
                    process.let_go()

    def _kept_now(self) -> frozenset[str]:
        """Who is kept by the configuration as it is now: it may be another than when supervisord began."""
        parser = configparser.RawConfigParser()
        try:
            parser.read(self._options.configfile, encoding="utf-8")
            return frozenset(parser.get("rpcinterface:partitiond", "keep", fallback="").split())
        except (OSError, ValueError, configparser.Error):
            return self._scene.kept

    def _changed(self, event: Any) -> None:
        process = event.process
        self._poller.changed(process)
        if process.state not in _TOLD or process.group is None:
            return
        told = {
            "group": process.group.config.name,
            "name": process.config.name,
            "pid": process.pid,
            "state": getProcessStateDescription(process.state),
            "expected": bool(event.expected) and process.state == ProcessStates.EXITED,
            "at": time.time(),
        }
        self._untold.append(json.dumps(told).encode())
        self._tell()

    def _tell(self) -> bool:
        """Send the daemon what it was not told yet, and wait for nothing; return whether that was all.

        A socket holds few datagrams (net.unix.max_dgram_qlen, often 10), and hundreds of programs may end together.
        """
        if not self._untold:
            return True
        try:
            with _opened(self._directory) as descriptor, socket.socket(socket.AF_UNIX, _DATAGRAMS) as sender:
                while self._untold:
                    # by the descriptor: a path may be longer than the address of a socket can be
                    sender.sendto(self._untold[0], f"/proc/self/fd/{descriptor}/{EVENTS}")
                    self._untold.popleft()
        except BlockingIOError:
            return False
        except OSError:  # no daemon at the moment: it looks at all of them when it is there again
            self._untold.clear()
        return True


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _mark(there: os.stat_result) -> tuple[int, int, int, int]:
    """What is another after each change of a file."""
    return there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns
