"""A world: nodes, each a machine, a master on another, and the internet between them.

Promises: made only inside a sandbox; everything ends with ``close``, and with the process that made it; each wait is bounded.
Two kinds: with IPv6 each node has a /64 and no IPv4 but the private ones; as a mesh nobody has an IPv6 address that others
reach, and partitions reach each other by tinc.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import sandbox
from partitiond.demo import internet
from partitiond.demo.internet import Internet
from partitiond.demo.machine import Machine, wait_for
from partitiond.demo.master import Master
from partitiond.demo.node import Node
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Mapping

NAMES = "ABCDEFGHI"
_RELEASES = Path("/srv/releases")  # on the master's machine
_RELEASE_PORT = 8081
_TWINS = 30  # sites of second machines with one identity are counted from here


class World:
    """``settings`` go over the configuration of each node, by section.

    ``delay`` is in seconds one way, ``loss`` a share. ``up`` makes the machines, starts the master and writes the
    configurations; ``start`` runs the daemons.
    """

    node_class: type[Node] = Node

    def __init__(
        self,
        nodes: int = 3,
        *,
        mesh: bool = False,
        partitions: int = 3,
        delay: float = 0.005,
        loss: float = 0.002,
        settings: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        if not sandbox.inside():
            raise PartitiondError(
                "demo.not_inside", "a world is made in a sandbox only", hint="partitiond demo"
            )
        if not 1 <= nodes <= len(NAMES):
            raise ValueError(nodes)
        self.mesh, self.amount, self._partitions = mesh, nodes, partitions
        self._delay, self._loss, self._settings = delay, loss, settings or {}
        self.nodes: list[Node] = []
        self._ends = contextlib.ExitStack()

    # --- up and down

    def up(self) -> World:
        """Make all but the daemons; whatever was made is gone again when that fails."""
        self.directory = Path(tempfile.mkdtemp(prefix="world-", dir="/srv"))
        self._ends.callback(shutil.rmtree, self.directory)
        try:
            self.internet = Internet(delay=self._delay, loss=self._loss)
            self._ends.callback(self.internet.close)
            self._make_machines()
            self.master.start()
            self._serve_releases()
            for node in self.nodes:
                self._configure(node)
        except BaseException:
            self.close()
            raise
        return self

    def _make_machines(self) -> None:
        where = internet.master_site(ipv6=not self.mesh)
        self.master = Master("master", self.internet, where, self.directory / "master.log")
        for number, name in enumerate(NAMES[: self.amount], 1):
            self.nodes.append(self._node(name, number, number))
        machines: list[Machine] = [self.master, *self.nodes]
        for machine in machines:
            self._power_on(machine)
        for machine in machines:
            machine.connect()

    def _power_on(self, machine: Machine) -> None:
        self._ends.callback(machine.power_off)
        machine.power_on()

    def _node(self, name: str, number: int, site: int) -> Node:
        where = internet.site(site, ipv6=not self.mesh)
        return self.node_class(name, number, self.internet, where, self.directory / f"{name}.log")

    def _configure(self, node: Node) -> None:
        node.configure(node.first_sections(self.master.url, partitions=self._partitions, mesh=self.mesh))
        node.configure(self._settings)
        self.master.write_client(node)

    def _serve_releases(self) -> None:
        """Let all machines fetch the releases of the demonstration by HTTP from the master's machine."""
        shown = self.master.seen(_RELEASES)
        for name in ("release", "services"):
            shutil.copytree(Path(__file__).parent / name, shown / name)
        address = ("--bind", self.master.site.address, "--directory", str(_RELEASES), str(_RELEASE_PORT))
        self.master.launch(sys.executable, "-I", "-m", "http.server", *address)

    def release(self, name: str = "services") -> str:
        """The URL of a Software Release."""
        return f"http://{self.master.site.in_url}:{_RELEASE_PORT}/{name}/software.cfg"

    def start(self) -> World:
        """Join the mesh, where there is one, run all daemons, and wait until the master knows all partitions."""
        if self.mesh:
            self.join_mesh()
        for node in self.nodes:
            node.begin()
        for node in self.nodes:
            wait_for(node.offered, f"the capacity of {node.name} to be posted", log=node.tail)
        return self

    def join_mesh(self) -> None:
        """Give each node the host blocks of all others, as operators do."""
        blocks = {}
        for node in self.nodes:
            node.verb("apply")
            blocks[node.name] = node.say("mesh", "export")
        for node in self.nodes:
            others = [block for name, block in blocks.items() if name != node.name]
            node.say("mesh", "import", "-", said="\n".join(others))

    def close(self) -> None:
        """End everything, also what is only half made. A second time does nothing."""
        self._ends.close()

    def __getitem__(self, name: str) -> Node:
        """Return a node by its letter."""
        return next(node for node in self.nodes if node.name == name)

    # --- what may happen to a node

    def lose(self, node: Node) -> None:
        """Lose a machine with everything on it. The directory of its configuration is what an operator has besides."""
        node.keep_configuration(self.directory / f"{node.name}.cfg")
        node.power_off()

    def rebuild(self, node: Node) -> None:
        """Put a new machine in the place of a lost one: same address, same configuration, nothing else. No daemon runs yet."""
        node.power_on()
        node.connect()
        node.give_configuration(self.directory / f"{node.name}.cfg")

    def twin(self, node: Node) -> Node:
        """Add a second machine with the configuration of a node, somewhere else; no daemon runs there yet."""
        kept = self.directory / f"{node.name}.twin"
        node.keep_configuration(kept)
        found = self._node(f"{node.name}2", node.number, _TWINS + node.number)
        found.computer, found.sections = node.computer, node.sections
        self._power_on(found)
        found.connect()
        found.give_configuration(kept)
        return found

    def cut(self, machine: Machine) -> None:
        """Cut a machine off: nothing comes from it, and nothing goes to it."""
        self.internet.cut(machine.name)

    def join(self, machine: Machine) -> None:
        """Let it be reached again."""
        self.internet.join(machine.name)
