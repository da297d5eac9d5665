"""A node of a world: a machine with a configuration, ``partitiond run``, and the verbs as its operator calls them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitiond import control, execute
from partitiond.demo import source
from partitiond.demo.machine import Machine, wait_for
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

    from partitiond.demo.internet import Internet, Site

CONFIGURATION = Path("/etc/opt/slapos/slapos.cfg")
INSTANCES = Path("/srv/slapgrid/instance")
_SOCKET = Path("/run/partitiond/control.sock")
MESH_NETWORK = "10.64.0.0/16"
_FIRST_UID, _UIDS = 20_000, 10_000

Sections = dict[str, dict[str, object]]


class Node(Machine):
    """``number`` counts from 1 and gives the computer its addresses; ``computer`` is what the master knows it by."""

    def __init__(self, name: str, number: int, internet: Internet, where: Site, log: Path) -> None:
        super().__init__(name, internet, where, log)
        self.number, self.computer = number, f"COMP-{name}"
        self.sections: Sections = {}
        self.daemon: subprocess.Popen[bytes] | None = None

    # --- its configuration

    def configure(self, settings: Mapping[str, Mapping[str, object]]) -> None:
        """Write the configuration: what was there, and over it ``settings`` by section; None takes a key away."""
        for section, values in settings.items():
            self.sections.setdefault(section, {}).update(values)
        path = self.seen(CONFIGURATION)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(
                f"[{section}]\n"
                + "".join(f"{key} = {value}\n" for key, value in values.items() if value is not None)
                for section, values in self.sections.items()
            )
        )

    def first_sections(self, master_url: str, *, partitions: int, mesh: bool) -> Sections:
        """What stands in the configuration of a new node; the uids are no other node's, as the kernel is everybody's."""
        found: Sections = {
            "slapos": {
                "computer_id": self.computer,
                "master_url": master_url,
                "software_root": "/srv/slapgrid/software",
                "instance_root": INSTANCES,
            },
            "slapformat": {"interface_name": "eth0", "partition_amount": partitions},
            "partitiond": {
                "uid_base": _FIRST_UID + _UIDS * self.number,
                "offline_builds": "true",
                "software_interval": 1,
                "instances_interval": 1,
                "meter_interval": 1,
            },
        }
        if mesh:
            found["tinc"] = {"network": MESH_NETWORK, "index": self.number}
        return found

    def keep_configuration(self, target: Path) -> None:
        """Copy the directory of the configuration, as an operator does who wants to have the node again."""
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(self.seen(CONFIGURATION.parent), target)

    def give_configuration(self, kept: Path) -> None:
        """Put a kept directory back."""
        shutil.copytree(kept, self.seen(CONFIGURATION.parent), dirs_exist_ok=True)

    # --- the verbs

    def line(self, *words: str) -> list[str]:
        """The words that run a verb, on the node."""
        return [*source.python("partitiond"), *words]

    def verb(self, *words: str, expect: tuple[int, ...] = (0,)) -> dict[str, Any]:
        """Run a verb with ``--json``. Raises PartitiondError ``demo.unexpected`` when it exits otherwise than expected."""
        done = self.run(*self.line("--json", *words), check=False)
        if done.returncode not in expect:
            raise PartitiondError(
                "demo.unexpected",
                f"partitiond {' '.join(words)} exited {done.returncode}: {done.stdout}{done.stderr}",
                resource=self.name,
            )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def say(self, *words: str, said: str | None = None) -> str:
        """Run a verb as a person does, ``said`` being its standard input; what it printed."""
        return self.run(*self.line(*words), said=said).stdout

    # --- the daemon and supervisord

    def begin(self) -> None:
        """Start ``partitiond run``."""
        self.daemon = self.launch(*self.line("run"))

    def start(self) -> None:
        """Start ``partitiond run`` and wait until it answers."""
        self.begin()
        wait_for(self.answers, f"the daemon of {self.name} to answer", log=self.tail)

    def answers(self) -> bool:
        """Whether the daemon does. Raises PartitiondError ``demo.unexpected`` when it has ended."""
        return self._status() is not None

    def offered(self) -> bool:
        """Whether the master knows the partitions; before that a supply is refused."""
        found = self._status()
        return found is not None and bool(found["node"]["master"]["reachable"])

    def _status(self) -> dict[str, Any] | None:
        """What the daemon says; None while it does not answer, or went away over it."""
        if self.daemon is not None and self.daemon.poll() is not None:
            raise PartitiondError("demo.unexpected", f"the daemon ended: {self.tail()}", resource=self.name)
        try:
            return control.call(self.seen(_SOCKET), "GET", "/1/status")
        except PartitiondError as error:
            if error.code != "control.lost":
                raise
            return None

    def stop(self) -> None:
        """End the daemon as systemd does."""
        self._end_daemon(signal.SIGTERM)

    def kill(self) -> None:
        """End the daemon as a crash would."""
        self._end_daemon(signal.SIGKILL)

    def _end_daemon(self, number: int) -> None:
        if self.daemon is not None:
            self.end(self.daemon, number)
            self.daemon = None

    def ended(self) -> None:
        """Wait for the end of a daemon that was told to end. Raises PartitiondError ``demo.unexpected`` for a bad one."""
        if self.daemon is not None and (status := self.finished(self.daemon)) != 0:
            raise PartitiondError(
                "demo.unexpected", f"the daemon exited {status}: {self.tail()}", resource=self.name
            )
        self.daemon = None

    def supervisord(self) -> int | None:
        """The number of supervisord as it is seen from here; None while it does not run."""
        found = (pid for pid, (_, line) in self.processes().items() if "supervisor.supervisord" in line)
        return next(found, None)

    def kill_supervisord(self) -> None:
        """End it as a crash would. Raises PartitiondError ``demo.unexpected`` when there is none."""
        pid = self.supervisord()
        if pid is None:
            raise PartitiondError("demo.unexpected", "no supervisord runs", resource=self.name)
        os.kill(pid, signal.SIGKILL)

    def power_off(self) -> None:
        """As any machine's end; the daemon is gone with it."""
        super().power_off()
        self.daemon = None

    # --- its partitions

    def partitions(self) -> dict[str, dict[str, Any]]:
        """Its partitions by id, as ``status`` has them: asked of the daemon itself, where one runs."""
        # looked at again and again: an interpreter each time would be most of what a demonstration costs
        found = self._status() or self.verb("status")
        return {item["id"]: item for item in found["partitions"]}

    def path(self, partition: str) -> Path:
        """Where a partition's directory is, on the node."""
        return INSTANCES / partition

    def resource(self, partition: str) -> dict[str, Any]:
        """What ``.slapos-resource`` of a partition says."""
        found: dict[str, Any] = json.loads(self.seen(self.path(partition) / ".slapos-resource").read_bytes())
        return found

    def private(self, partition: str) -> str:
        """The private IPv4 address of a partition."""
        return str(self.resource(partition)["address_list"][0]["addr"])

    def public(self, partition: str) -> str:
        """The address at which other nodes reach it."""
        return str(self.resource(partition)["address_list"][1]["addr"])

    def as_user(self, partition: str, *command: str) -> list[str]:
        """The words that run a program as a partition's user, on the node."""
        uid = str(self.seen(self.path(partition)).stat().st_uid)
        return [*(execute.SETPRIV, "--reuid", uid, "--regid", uid, "--clear-groups", "--"), *command]

    def usage(self) -> dict[str, dict[str, Any]]:
        """What was metered until now, by partition."""
        self.verb("sync", "usage")
        return {item["id"]: item for item in self.verb("usage")["partitions"]}
