"""An ordinary user in whose hands a StandaloneSlapOS of slapos.core is, with our command for the verbs of the node."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from partitiond import execute

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MASTER = Path(sys.prefix) / "master" / "bin"
HOME = Path("/srv/standalone")
USER = "own"

_SLAPOS = f"""\
#!/bin/sh
# the verbs of the node are ours, everything else is slapos.core's: proxy, supply, request
if [ "$1" = node ]; then
    PYTHONPATH={ROOT} exec {sys.executable} -P -m partitiond "$@"
fi
exec {MASTER}/slapos "$@"
"""


class Standalone:
    """Programs run as the user; ``bin`` comes first on its PATH."""

    def __init__(self):
        self.bin = HOME / "bin"
        self.environment = {
            "HOME": str(HOME),
            "PATH": f"{self.bin}:{MASTER}:{execute.PATH}",
            "LANG": "C.UTF-8",
            "SLAPOS_TEST_IPV4": "127.0.0.1",
            "SLAPOS_TEST_IPV6": "::1",
            # slapos.core 1.26 on Python 3.11, and what its tests import
            "PYTHONPATH": f"{HERE / 'shim'}:{ROOT / 'tests' / 'peer'}",
        }

    def begin(self):
        subprocess.run(["/usr/sbin/useradd", "-r", "-M", "-d", HOME, "-s", "/bin/sh", USER], check=True)
        self.bin.mkdir(parents=True)
        (self.bin / "slapos").write_text(_SLAPOS)
        (self.bin / "slapos").chmod(0o755)
        (HOME / "tmp").mkdir()
        subprocess.run(["/bin/chown", "-R", f"{USER}:", HOME], check=True)

    def end(self):
        problem = ""
        left = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_own(pid)]  # noqa: PTH208
        for pid in left:
            problem += f"left running: {pid} {_command(pid)}\n"
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["/bin/rm", "-rf", HOME], check=True)
        subprocess.run(["/usr/sbin/userdel", USER], check=True)
        assert not problem, problem

    @staticmethod
    def _is_own(pid):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            return (
                HOME.stat().st_uid == int(status.partition("\nUid:")[2].split()[0])
                and "\nState:\tZ" not in status
            )
        return False

    def start(self, *command, **options):
        """Start a program as the user; its output and errors are one text."""
        own = [execute.SETPRIV, "--reuid", USER, "--regid", USER, "--init-groups", "--"]
        given = {"env": self.environment, "cwd": HOME, "stdin": subprocess.DEVNULL, "text": True}
        given |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
        return subprocess.Popen([*own, *map(str, command)], **given)

    def run(self, *command, expect=0, timeout=60, **options):
        """Run a program as the user to its end; return what it said."""
        process = self.start(*command, **options)
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            pytest.fail(f"{command} does not end:\n{said[-3000:]}")
        assert process.returncode == expect, f"{command} exited {process.returncode}:\n{said[-3000:]}"
        return said

    def partitiond(self, *words, **options):
        """Run our command as the user."""
        environment = {**self.environment, "PYTHONPATH": str(ROOT), **options.pop("environment", {})}
        return self.run(sys.executable, "-P", "-m", "partitiond", *words, env=environment, **options)

    def theirs(self, *names, timeout=900):
        """Run tests of slapos.core; return {name: [outcome, seconds, text]}."""
        said = self.run(MASTER / "python", HERE / "runner.py", *names, timeout=timeout)
        rows = [json.loads(line) for line in said.splitlines() if line.startswith("[")]
        return {name: rest for name, *rest in rows}


def _command(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


@pytest.fixture(scope="module")
def standalone():
    made = Standalone()
    made.begin()
    try:
        yield made
    finally:
        deadline = time.monotonic() + 10
        while any(made._is_own(int(name)) for name in os.listdir("/proc") if name.isdigit()):  # noqa: PTH208
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        made.end()


@pytest.fixture
def no_leaks():
    """In place of the general one: the user and its directory are there for all tests of a file, and looked at in its end."""
