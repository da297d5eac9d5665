"""A machine of a world: a sandbox inside of this one, joined to the internet by its ``eth0``.

Promises: it has files, users, processes, a cgroup and a network of its own; everything of it ends with it, and it with the
world's maker. Its files can be looked at from here, programs are entered there.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from partitiond.demo import source
from partitiond.errors import PartitiondError
from partitiond.mounts import CLONE_NEWNET, enter

if TYPE_CHECKING:
    from collections.abc import Callable

    from partitiond.demo.internet import Internet, Site

PATIENCE = 120.0
_T = TypeVar("_T")
# nsenter(1) of Debian 12 stays in its own cgroup, and what is attached to that of the machine would not see what is entered
_MOVE = 'echo $$ > "$0/cgroup.procs"; exec "$@"'
_PAYLOAD = "sleep"


class Machine:
    """``name`` stands in names of files and links; ``log`` takes what its long-running programs say."""

    def __init__(self, name: str, internet: Internet, where: Site, log: Path) -> None:
        self.name, self.site, self.log = name, where, log
        self.pid = 0  # a process in it, as it is seen from here; 0 while there is no machine
        self._internet = internet
        self._first = 0
        self._enter: tuple[str, ...] = ()
        self._sandbox: subprocess.Popen[bytes] | None = None
        self._programs: list[subprocess.Popen[bytes]] = []

    # --- up and down

    def power_on(self) -> None:
        """Begin to make it; ``connect`` waits until it is there."""
        self._sandbox = subprocess.Popen(
            [
                *source.ending_with_us(),
                *source.python("partitiond.sandbox"),
                *(f"--bind={shown}:{place}" for shown, place in source.binds()),
                *("--", "/bin/sleep", "infinity"),
            ],
            cwd="/",
            env=source.environment(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the world's maker alone, who ends it all in order
        )

    def connect(self) -> None:
        """Wait until it is there, and join it to the internet."""
        self._first, self.pid = wait_for(self._payload, f"the sandbox of {self.name}", pause=0.01)
        group = Path(f"/proc/{self.pid}/cgroup").read_text().rpartition("0::")[2].strip()
        move = ("/bin/sh", "-ec", _MOVE, f"/sys/fs/cgroup{group}") if os.path.ismount("/sys/fs/bpf") else ()
        self._enter = (*move, *("/usr/bin/nsenter", "-t", str(self.pid), "-a", "--"))
        self._internet.attach(self.name, self.pid, self.site)
        # servers ask for the name of their address: there is no DNS, and the host's would be waited for
        resolver = self.seen("/etc/resolv.conf")
        resolver.unlink(missing_ok=True)
        resolver.write_text("nameserver 127.0.0.1\n")
        with self.seen("/etc/hosts").open("a") as names:
            names.write(f"{self.site.address} {self.name}\n")

    def _payload(self) -> tuple[int, int] | None:
        """The first process of the sandbox and the one that keeps it: the last two of a line of only children."""
        if self._sandbox is None or self._sandbox.poll() is not None:
            raise PartitiondError("demo.sandbox", "it could not be made", resource=self.name)
        line = [self._sandbox.pid]
        while below := children(line[-1]):
            line.append(below[0])
        found = len(line) > 2 and Path(f"/proc/{line[-1]}/comm").read_text() == f"{_PAYLOAD}\n"
        return (line[-2], line[-1]) if found else None

    def power_off(self) -> None:
        """End it as a power cut would; its files are gone, too. A second time does nothing."""
        if self._sandbox is None:
            return
        if self._first:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._first, signal.SIGKILL)
        else:
            self._sandbox.kill()
        self._sandbox.wait(PATIENCE)
        for program in self._programs:
            program.wait(PATIENCE)
        self._programs.clear()
        self._sandbox, self._first, self.pid, self._enter = None, 0, 0, ()
        self._internet.detach(self.name)

    # --- programs

    def words(self, *command: str) -> list[str]:
        """The words that run a program there."""
        if not self._enter:
            raise PartitiondError("demo.machine", "it is not there", resource=self.name)
        return [*self._enter, *command]

    def run(
        self, *command: str, check: bool = True, said: str | None = None, patience: float = PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        """Run a program there as root; ``said`` is its standard input. Raises PartitiondError ``demo.unexpected``."""
        done = subprocess.run(
            self.words(*command),
            cwd="/",
            env=source.environment(),
            input=said,
            stdin=subprocess.DEVNULL if said is None else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=patience,
        )
        if check and done.returncode:
            raise PartitiondError(
                "demo.unexpected",
                f"{' '.join(command[:8])} exited {done.returncode}: {(done.stdout + done.stderr)[-3000:]}",
                resource=self.name,
            )
        return done

    def launch(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a program there that runs on until it is ended, at the latest with the machine."""
        with self.log.open("ab") as stream:
            program = subprocess.Popen(
                self.words(*command),
                cwd="/",
                env=source.environment(),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self._programs.append(program)
        return program

    def end(self, program: subprocess.Popen[bytes], number: int) -> int:
        """Send a signal to a program that was started; its exit status. One that has ended already is only waited for."""
        # the child of nsenter(1), which does not pass signals on
        for pid in children(program.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return self.finished(program)

    def finished(self, program: subprocess.Popen[bytes]) -> int:
        """Wait for the end of a program that was started; its exit status."""
        status = program.wait(PATIENCE)
        self._programs.remove(program)
        return status

    # --- looking

    def seen(self, path: str | Path) -> Path:
        """A file of it as it is seen from here."""
        return Path(f"/proc/{self.pid}/root") / Path(path).relative_to("/")

    def processes(self) -> dict[int, tuple[int, str]]:
        """What runs there: (uid, command line) by its number as it is seen from here."""
        own, found = _namespace(self.pid), {}
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):  # noqa: PTH208 - names suffice
            with contextlib.suppress(OSError):
                if _namespace(pid) == own:
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                    found[pid] = (Path(f"/proc/{pid}").stat().st_uid, line.decode(errors="replace").strip())
        return found

    def within(self, body: Callable[[], _T]) -> _T:
        """Run a function in its network: a thread has one of its own. What the function raises is raised here."""
        found: list[_T] = []
        failed: list[BaseException] = []

        def enter_and_run() -> None:
            try:
                descriptor = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    enter(descriptor, CLONE_NEWNET)
                finally:
                    os.close(descriptor)
                found.append(body())
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                failed.append(error)

        thread = threading.Thread(target=enter_and_run)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    def tail(self, size: int = 3000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-size:] if self.log.exists() else "(no log)"


def children(pid: int) -> list[int]:
    """The children of a process; none of one that has ended."""
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")  # noqa: PTH115 - it is no path


def wait_for(
    condition: Callable[[], _T | None],
    what: str,
    *,
    seconds: float = PATIENCE,
    pause: float = 0.1,
    log: Any = None,
) -> _T:
    """Wait until a condition holds, and return what it gave. Raises PartitiondError ``demo.waited``.

    ``log`` gives a text that helps whoever reads the error.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise PartitiondError(
                "demo.waited", f"waited {seconds:.0f} s for {what}" + (f"\n{log()}" if log else "")
            )
        select.select([], [], [], pause)
    return found
