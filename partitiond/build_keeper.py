"""The build of a release as the node sees it: who builds now, starting it, hearing of its end, ending it, what came of it.

The build itself is a process of its own (``build_runner``), which outlives whoever started it: builds take hours, and a daemon
is restarted, upgraded or killed meanwhile.

Promises: at most one build at a time, and so never two in the same directory, whatever is killed (the runner holds a lock that
the kernel takes back with it); one that was cut off is ended with all of its session before the next begins; what came of a
build is on the disk before its runner ends, until somebody has dealt with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitiond import execute, files, procfs
from partitiond.errors import PartitiondError
from partitiond.state import software_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from partitiond.config import Config

_READY_SECONDS = 30.0
_NAMING_SECONDS = 10.0
# from SIGTERM to SIGKILL: the runner gives the step that it ends 5 s to go by itself, and as much after a SIGKILL
_GRACE = 12.0

# the code that is running now, wherever it was found, and no other
_START = """
import sys
if sys.argv[1] not in sys.path:
    sys.path.insert(0, sys.argv[1])
from partitiond.build_runner import main
main(sys.argv[2:])
"""


@dataclass(frozen=True, slots=True)
class Places:
    """The files of root's that a runner and the lane share; all but the outcomes go with a restart of the machine."""

    directory: Path
    outcomes: Path

    @classmethod
    def of(cls, config: Config) -> Places:
        """Those of a node."""
        return cls(config.run_dir / "software-build", config.state_dir / "builds")

    @property
    def lock(self) -> Path:
        """Held as long as a runner lives."""
        return self.directory / "lock"

    @property
    def job(self) -> Path:
        """What the next runner is to do."""
        return self.directory / "job.json"

    @property
    def record(self) -> Path:
        """Which process the runner is."""
        return self.directory / "runner.json"

    @property
    def session(self) -> Path:
        """The session of the step that is under way."""
        return self.directory / "session"

    def outcome(self, url: str) -> Path:
        """What came of the last build of a release."""
        return self.outcomes / f"{software_name(url)}.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a build; ``code`` empty: the release is whole."""

    url: str
    how: str = "built"
    code: str = ""
    message: str = ""
    hint: str = ""

    def error(self) -> PartitiondError:
        """The error of one that failed."""
        return PartitiondError(self.code, self.message, resource=self.url, hint=self.hint, retryable=True)


@dataclass(frozen=True, slots=True)
class Runner:
    """A process that builds ``url``, or puts it into a cache: ``uploading`` says since when, by the clock, or is 0."""

    url: str
    pid: int
    started: int
    boot: str
    uploading: float = 0.0

    def lives(self) -> bool:
        """Whether it is that process still."""
        return self.boot == procfs.boot() and procfs.started(self.pid) == self.started


# --- looking ----------------------------------------------------------------------------------------------------------


def running(config: Config) -> Runner | None:
    """Who builds now. Raises PartitiondError ``software.runner`` for somebody who holds the lock and has no name."""
    places = Places.of(config)
    deadline = time.monotonic() + _NAMING_SECONDS
    while _is_held(places.lock):
        found = _named(places.record)
        if found is not None and found.lives():
            return found
        if time.monotonic() > deadline:
            raise PartitiondError(
                "software.runner",
                "somebody holds the lock of builds and does not say who it is",
                resource=str(places.lock),
                hint=f"find the process with fuser {places.lock}, and end it",
                retryable=True,
            )
        time.sleep(0.02)  # it has just begun
    return None


def _is_held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def idle(config: Config) -> Iterator[bool]:
    """Whether nobody builds; then nobody begins to before the end of the block. Raises OSError."""
    try:
        # made where it is not: a runner whose daemon was killed may be about to do so
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(Places.of(config).lock, flags, 0o600)
    except FileNotFoundError:
        yield True  # nor has anybody been told to
        return
    try:
        try:
            # shared, as who looks whether it is held takes it: no runner gets it beside us
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _named(record: Path) -> Runner | None:
    try:
        return Runner(**json.loads(record.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def outcomes(config: Config) -> Iterator[Outcome]:
    """What builds came to that nobody has dealt with yet; a file that cannot be read is removed: it is built again."""
    directory = Places.of(config).outcomes
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        try:
            found = Outcome(**json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            files.remove_path(path)
            continue
        yield found


def forget_outcome(config: Config, url: str) -> None:
    """It is dealt with."""
    path = Places.of(config).outcome(url)
    if path.exists():
        files.remove_path(path)


def save_outcome(places: Places, outcome: Outcome) -> None:
    """Remember, durably, what came of a build; called by its runner."""
    files.make_directory(places.outcomes, 0o700)
    files.write_path(places.outcome(outcome.url), json.dumps(asdict(outcome)).encode(), mode=0o600)


# --- changing ---------------------------------------------------------------------------------------------------------


def end_cut_off(config: Config) -> bool:
    """End what a runner that was killed left running; whether there was such a one. Of one that runs nothing is touched."""
    return _end_cut_off(config, None)


def _end_cut_off(config: Config, killed: Runner | None) -> bool:
    """The same, also of a runner to which SIGKILL was sent and that takes long to be gone."""
    places = Places.of(config)
    deadline = time.monotonic() + _NAMING_SECONDS
    while True:
        with idle(config) as nobody:
            if nobody or (killed is not None and killed.lives()):
                found = places.record.exists()
                end_session(places)
                places.record.unlink(missing_ok=True)
                return found
        holder = _named(places.record)
        if (holder is not None and holder.lives()) or time.monotonic() > deadline:
            return False
        # one that has just begun, or a thread of one that was killed
        time.sleep(0.02)


def end_session(places: Places) -> None:
    """End what is left of the step of a runner that was killed; in another boot its number is somebody else's."""
    found = _named(places.record)
    if found is not None and found.boot != procfs.boot():
        places.session.unlink(missing_ok=True)
    execute.end_cut_off(places.session)


def start(config: Config, url: str, *, force: bool) -> None:
    """Begin a build, for which :func:`running` tells from then on, unless it is over already.

    Raises PartitiondError ``software.runner`` when the process does not start.
    """
    places = Places.of(config)
    places.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    job: dict[str, Any] = {"url": url, "force": force, "file": str(config.file), "config": config.text}
    files.write_path(places.job, json.dumps(job).encode(), mode=0o600)
    ready, tell = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            _spawn(places, tell)
        finally:
            os.close(tell)
        began = select.select([ready], [], [], _READY_SECONDS)[0] and os.read(ready, 16) == b"ready"
        # of two that begin at once, the one that was started by a daemon that is gone now may be the one that builds
        if not began and running(config) is None:
            raise PartitiondError(
                "software.runner",
                "the process that builds does not start",
                resource=url,
                hint=f"read {places.directory / 'runner.log'}",
                retryable=True,
            )
    finally:
        os.close(ready)


def _spawn(places: Places, tell: int) -> None:
    root = Path(__file__).resolve().parent.parent
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    log = os.open(places.directory / "runner.log", flags, 0o600)
    try:
        started = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-c",
                _START,
                str(root),
                str(places.directory),
                str(places.outcomes),
                str(tell),
            ],
            cwd="/",
            env={"PATH": execute.PATH, "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(tell,),
        )
    finally:
        os.close(log)
    started.wait()  # it leaves a child behind, which is nobody's


def wait(runner: Runner, seconds: float) -> bool:
    """Wait for the end of a runner, at most so long; whether it has ended."""
    try:
        descriptor = os.pidfd_open(runner.pid)
    except ProcessLookupError:
        return True
    try:
        if not runner.lives():  # the number may be another's by now
            return True
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(descriptor)


def end(config: Config, url: str | None = None) -> bool:
    """End the build that is under way, of ``url`` only when given; whether there was one. What it has built so far stays."""
    found = running(config)
    if found is None:
        end_cut_off(config)
        return False
    if url not in (None, found.url):
        return False
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(found.pid)
            try:
                if found.lives():
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)
        if wait(found, _GRACE):
            break
    _end_cut_off(config, found)
    return True
