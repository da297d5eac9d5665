"""The master of a world: an unmodified ``slapos proxy`` on a machine of its own, and the stock clients."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defusedxml.ElementTree import fromstring

from partitiond.demo import scene
from partitiond.demo.machine import Machine, wait_for
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    import subprocess

PORT = 18080
_HOME = Path("/srv/master")
_CLIENT = Path("/etc/opt/slapos/client.cfg")
_BACKUP = """
import sqlite3, sys
own, copy = map(sqlite3.connect, sys.argv[1:])
own.backup(copy)
copy.close()
"""
_ROWS = """
import json, sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.row_factory = sqlite3.Row
names = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
table = next(name for name in names if name.rstrip("0123456789") == sys.argv[2])
print(json.dumps([dict(row) for row in database.execute(f"SELECT * FROM {table}")]))
"""


class Master(Machine):
    """Its database is ``/srv/master/proxy.db`` on its machine, and stays while it is stopped."""

    _running: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers on the internet."""
        return f"http://{self.site.in_url}:{PORT}/"

    def start(self, database: Path | None = None) -> None:
        """Start it and wait until it answers; ``database`` takes the place of its own, as a backup would."""
        home = self.seen(_HOME)
        home.mkdir(exist_ok=True)
        if database is not None:
            shutil.copyfile(database, home / "proxy.db")
        (home / "proxy.cfg").write_text(
            f"[slapos]\ncomputer_id = COMP-NONE\nmaster_url = {self.url}\n"
            f"software_root = {_HOME}/software\ninstance_root = {_HOME}/instance\n\n"
            f"[slapproxy]\nhost = {self.site.address}\nport = {PORT}\ndatabase_uri = {_HOME}/proxy.db\n"
        )
        self.write_client(self)
        self._running = self.launch(
            str(scene.master_program()), "proxy", "start", "--cfg", f"{_HOME}/proxy.cfg"
        )
        wait_for(self._answers, "the master to answer", log=self.tail)

    def stop(self) -> None:
        """End it; the machine stays."""
        if self._running is not None:
            self.end(self._running, signal.SIGTERM)
            self._running = None

    def backup(self, target: Path) -> Path:
        """Copy its database as it is now, also while it runs; return the copy."""
        # there, as SQLite follows links by itself, and /proc/PID/root is one that leads it astray
        self._python(_BACKUP, f"{_HOME}/proxy.db", f"{_HOME}/copy.db")
        shutil.move(self.seen(_HOME / "copy.db"), target)
        return target

    def _answers(self) -> bool:
        if self._running is None or self._running.poll() is not None:
            raise PartitiondError("demo.master", "the master ended", hint=self.tail())
        try:
            return self.within(self._run_id) == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _run_id(self) -> int:
        with urllib.request.urlopen(f"{self.url}getRunId", timeout=20) as answer:  # noqa: S310 - the world's own
            return int(answer.status)

    # --- what its users see

    def published(self, title: str) -> dict[str, str]:
        """What an instance has published, root or not; empty when there is nothing yet."""
        for row in self.rows("partition"):
            if row["partition_reference"] == title and row["connection_xml"]:
                found = fromstring(row["connection_xml"])
                return {str(one.get("id")): one.text or "" for one in found.iter("parameter")}
        return {}

    def holder(self, title: str) -> tuple[str, str]:
        """The computer and the partition that were given to an instance. Raises PartitiondError ``demo.unexpected``."""
        for row in self.rows("partition"):
            if row["partition_reference"] == title:
                return str(row["computer_reference"]), str(row["reference"])
        raise PartitiondError("demo.unexpected", "the master has no such instance", resource=title)

    def asked(self, path: str) -> list[str]:
        """Who asked something of it so far, by address: once for each answer with status 200, as its log has them."""
        pattern = re.compile(rf' INFO (\S+) - - .*"(?:GET|POST) /{re.escape(path)}\b.* 200 ')
        return pattern.findall(self.log.read_text(errors="replace"))

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All rows of a table of its database, as named in ``slapos/proxy/schema.sql`` without the schema's version."""
        found: list[dict[str, Any]] = json.loads(self._python(_ROWS, f"{_HOME}/proxy.db", table))
        return found

    def _python(self, program: str, *arguments: str) -> str:
        return self.run(sys.executable, "-I", "-c", program, *arguments).stdout

    def write_client(self, machine: Machine) -> None:
        """Let the stock clients of a machine know this master."""
        path = machine.seen(_CLIENT)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"[slapos]\nmaster_url = {self.url}\n\n[slapconsole]\n")

    def slapos(self, machine: Machine, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the stock ``slapos supply``, ``request`` or ``remove`` on a machine. Raises PartitiondError when it fails."""
        return machine.run(str(scene.master_program()), *words, "--cfg", str(_CLIENT))

    def supply(self, url: str, computer: str) -> None:
        """Let a computer have a Software Release."""
        self.slapos(self, "supply", url, computer)

    def request(
        self,
        machine: Machine,
        title: str,
        url: str,
        *,
        kind: str = "",
        computer: str = "",
        state: str = "",
        parameters: dict[str, str] | None = None,
    ) -> None:
        """Ask for an instance from a machine: the whole wish, also where it is known."""
        self.slapos(
            machine,
            *("request", title, url),
            *(("--type", kind) if kind else ()),
            *(("--node", f"computer_guid={computer}") if computer else ()),
            *(("--state", state) if state else ()),
            *(
                ("--parameters", *(f"{key}={value}" for key, value in parameters.items()))
                if parameters
                else ()
            ),
        )
