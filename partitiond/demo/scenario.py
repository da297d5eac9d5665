"""Services across nodes: a database, a cache, and on another node the application that uses both through tunnels.

Each step is seen to work before the next. Everything is asked of an unmodified master with the stock clients; what is
particular to the demonstration is the world in which the nodes stand.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from partitiond import present, usage_text
from partitiond.demo import source
from partitiond.demo.machine import Machine, wait_for
from partitiond.demo.node import MESH_NETWORK, Node
from partitiond.demo.telling import Telling, check, say
from partitiond.demo.world import World
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TITLE, DATABASE, CACHE = "application", "database", "cache"
_TEXTS, _TEXT_BYTES = 5, 20_000
# Debian packages of what the tenants and the mesh are
_PROGRAMS = {
    "/usr/sbin/mariadbd": "mariadb-server-core",
    "/usr/bin/mariadb-install-db": "mariadb-server-core",
    "/usr/bin/mariadb": "mariadb-client-core",
    "/usr/bin/memcached": "memcached",
}
_MESH_PROGRAMS = {"/usr/sbin/tincd": "tinc"}
_PARTITIONS = 3
_PAUSE = 0.5  # between two looks, each of which starts a program or two
_PATIENCE = 300.0  # three builds side by side on a machine that has other things to do
_T = TypeVar("_T")
SETTINGS: Mapping[str, Mapping[str, object]] = {
    "accounting": {
        "network_in": "service_module/network_in per kB",
        "network_out": "service_module/network_out per kB",
        "cpu": "service_module/cpu per s",
    },
    "partitiond": {"report_interval": 2},
}


def check_programs(*, mesh: bool) -> None:
    """Raises PartitiondError ``demo.needs`` when a program of the tenants or of the mesh is not installed."""
    wanted = _PROGRAMS | (_MESH_PROGRAMS if mesh else {})
    missing = {path: package for path, package in wanted.items() if not Path(path).is_file()}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise PartitiondError(
            "demo.needs",
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            resource="demo",
            hint=f"apt-get install --no-install-recommends {packages}",
        )


class Scenario:
    """The demonstration of several nodes under way; ``world_class`` may watch over its nodes more closely."""

    def __init__(self, nodes: int, *, mesh: bool, world_class: type[World] = World) -> None:
        self.told = Telling()
        self.world = world_class(nodes, mesh=mesh, partitions=_PARTITIONS, settings=SETTINGS)
        self._holders: dict[str, tuple[Node, str]] = {}

    @property
    def _roles(self) -> dict[str, Node]:
        """Which node has what; of two the first has both services."""
        nodes = self.world.nodes
        second, third = (nodes[0], nodes[1]) if len(nodes) == 2 else (nodes[1], nodes[2])
        return {DATABASE: nodes[0], CACHE: second, TITLE: third}

    # --- the steps

    def play(self) -> None:
        """All steps but the last."""
        self._bring_up()
        self._request()
        self._use()
        self._usage()
        self._refusals()
        self.told.step("What the nodes say")
        for node in self.world.nodes:
            say(f"\nnode {node.name}\n{present.status(node.verb('status'))}\n")
            say(present.tunnels(node.verb("tunnel", "list")))
            if self.world.mesh:  # it exits 0 only while every peer is reachable
                say(f"\n{node.say('mesh', 'status').rstrip()}")
            node.verb("sync", "usage")
            say(f"\n{usage_text.usage(node.verb('usage'))}")

    def _bring_up(self) -> None:
        count, kind = self.world.amount, "IPv4 alone" if self.world.mesh else "IPv6"
        self.told.step(f"{count} nodes and a standard master (slapos proxy), joined by an internet of {kind}")
        self.world.up()
        for machine in (self.world.master, *self.world.nodes):
            self.told.seen(f"{machine.name} has {machine.site.address}, routed by {machine.site.gateway}")
        if self.world.mesh:
            self._no_ipv6()
            self.told.step("partitiond mesh export and import, then partitiond run on each node")
        else:
            self.told.step("partitiond run on each node")
        self.world.start()
        self.told.seen("the master knows the partitions of all nodes")

    def _no_ipv6(self) -> None:
        def addresses(machine: Machine) -> list[str]:
            found = json.loads(
                machine.run("/usr/sbin/ip", "-6", "-j", "address", "show", "scope", "global").stdout
            )
            return [
                one["local"]
                for link in found
                for one in link.get("addr_info", ())
                if one and one["local"] != "::1"
            ]

        found = {one.name: addresses(one) for one in (self.world.master, *self.world.nodes)}
        check(not any(found.values()), f"somebody has a global IPv6 address: {found}")
        self.told.seen("nobody has an IPv6 address that others reach")

    def _request(self) -> None:
        roles, master, url = self._roles, self.world.master, self.world.release()
        self.told.step("slapos supply, and slapos request on the node of the application")
        for computer in sorted({node.computer for node in roles.values()}):
            master.supply(url, computer)
        parameters = {f"{name}-computer": roles[name].computer for name in (DATABASE, CACHE)}
        own = roles[TITLE]
        master.request(own, TITLE, url, kind=TITLE, computer=own.computer, parameters=parameters)
        self.told.seen(
            f"an application for {own.computer}, its parameters: "
            + ", ".join(f"{key}={value}" for key, value in parameters.items())
        )
        for name in (DATABASE, CACHE):
            found = self._wait(partial(self._published, name), f"{name} to be published", roles[name])
            self.told.seen(
                f"the application asked for the {name}, which is on {roles[name].name} and published {found['url']}"
            )
        # each first try finds something not there yet; nobody waits for its pause in a demonstration
        self._wait(lambda: self._published(TITLE), "the application to be published", own, self._hurry)
        for name in roles:
            self._holders[name] = self._holder(name)
        self._wait(self._all_work, "all three to be started, and their tunnels up", own, self._hurry)
        self.told.seen("certificates were passed as parameters: four ends of two tunnels are up")

    def _published(self, title: str) -> dict[str, str]:
        found = self.world.master.published(title)
        return found if "certificate" in found else {}

    def _hurry(self) -> None:
        """Let what failed be tried again now."""
        for node in {node.name: node for node in self._roles.values()}.values():
            if any(item["state"] == "failed" for item in node.partitions().values()):
                node.verb("sync", "instances", "--force", expect=(0, 1, 3))

    def _holder(self, title: str) -> tuple[Node, str]:
        computer, partition = self.world.master.holder(title)
        node = next(one for one in self.world.nodes if one.computer == computer)
        check(node is self._roles[title], f"{title} is on {computer}")
        return node, partition

    def _all_work(self) -> bool:
        items = [node.partitions()[name] for node, name in self._holders.values()]
        if (
            any(item["state"] != "started" for item in items)
            or sum(len(one["tunnels"]) for one in items) != 4
        ):
            return False
        nodes = {node.name: node for node, _ in self._holders.values()}
        ends = [one for node in nodes.values() for one in node.verb("tunnel", "list")["tunnels"]]
        return all(one["state"] == "up" for one in ends)

    def _use(self) -> None:
        self.told.step("The application writes rows and reads them, sets values and gets them")
        texts = [secrets.token_hex(_TEXT_BYTES // 2) for _ in range(_TEXTS)]
        self._wait(self._page, "the application to answer", self._roles[TITLE])
        with self.world.internet.captured(self.world.directory / "wire.pcap") as capture:
            pages = [self._page(text) for text in texts]
            self.world.master.slapos(
                self._roles[TITLE], "supply", self.world.release(), self._roles[TITLE].computer
            )
        last = pages[-1]
        check(
            all(page["cached"] == text for page, text in zip(pages, texts, strict=True)), f"cached: {pages}"
        )
        check(last["rows"] == texts, f"{len(last['rows'])} rows, which are not those that were written")
        self.told.seen(
            f"{last['row_server']}: {len(texts)} rows written by mariadb(1) and read back, every byte equal"
        )
        self.told.seen(f"memcached, {last['cache_server']}: as many values set and got, every byte equal")
        self._listen_in(list(capture.packets()), texts)

    def _listen_in(self, packets: list[bytes], texts: list[str]) -> None:
        """What was on the wire meanwhile."""
        whole, pieces = (
            sum(map(len, packets)),
            [text[at : at + 16].encode() for text in texts for at in (0, 9984, 19984)],
        )
        check(whole > _TEXTS * _TEXT_BYTES * 2, f"only {whole} bytes were on the wire")
        plain = sum(any(piece in packet for piece in pieces) for packet in packets)
        check(not plain, f"{plain} packets have the texts as they are")
        # a listener that hears nothing would prove nothing
        check(any(b"/supplySupply" in packet for packet in packets), "plain HTTP was not heard either")
        self.told.seen(
            f"of {len(packets)} packets, {whole} bytes on the wire, none has a piece of them; plain HTTP is heard"
        )
        counts = self.world.internet.counts()
        self.told.seen(
            f"the wire has carried {counts['packets']} packets until now, and lost {counts['lost']}"
        )
        if self.world.mesh:
            space = ipaddress.ip_network(MESH_NETWORK)
            bare = sum(ipaddress.ip_address(one[at : at + 4]) in space for one in packets for at in (12, 16))
            check(not bare, f"{bare} packets show addresses of the flat space")
            self.told.seen(f"no packet shows an address of the flat space {space}")

    def _page(self, text: str = "") -> dict[str, Any]:
        """The page of the application, as a program of its own partition gets it; empty while it does not answer."""
        node, partition = self._holders[TITLE]
        url = f"http://{node.private(partition)}:8000/?text={quote(text)}"
        words = self._traffic(node, partition, "page", url)
        done = node.run(*words, check=bool(text))
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    @staticmethod
    def _traffic(node: Node, partition: str, *words: str) -> list[str]:
        return node.as_user(partition, *source.python("partitiond.demo.traffic"), *words)

    def _usage(self) -> None:
        self.told.step("Metered usage of each of the three partitions")
        for name, (node, partition) in self._holders.items():
            address, least = node.public(partition), _TEXTS * _TEXT_BYTES
            found = [one for one in node.usage()[partition]["addresses"] if one["address"] == address]
            # of two nodes the application is remote to both services; what stays on a node is local
            went = {key: sum(one[key] for one in found) for key in ("bytes_in", "bytes_out")}
            check(
                min(went.values()) > 0 and sum(went.values()) > least,
                f"{name}: {went}, at least {least} went",
            )
            self.told.seen(
                f"{name} on {node.name}, {address}: {went['bytes_in']} bytes in, {went['bytes_out']} out"
            )

    def _refusals(self) -> None:
        self.told.step("Who is not allowed does not get in")
        own, partition = self._holders[TITLE]
        free = next(name for name, item in own.partitions().items() if item["state"] == "free")
        for name, port in ((DATABASE, "3306"), (CACHE, "11211")):
            node, holder = self._holders[name]
            said = own.run(*self._traffic(own, free, "refused-tls", node.public(holder), port)).stdout.strip()
            self.told.seen(f"{free} of {own.name} → the {name}'s tunnel, without its certificate: {said}")
            near = own.private(partition)
            said = own.run(*self._traffic(own, free, "refused-connect", near, port)).stdout.strip()
            self.told.seen(f"{free} of {own.name} → the application's own end of it at {near}: {said}")

    # --- the end

    def clear_up(self) -> None:
        """The last step: what was used is told to the master, and the instances go."""
        self.told.step("slapos request --state destroyed: usage is told to the master, and all instances go")
        master, own = self.world.master, self._roles[TITLE]
        parameters = {f"{name}-computer": self._roles[name].computer for name in (DATABASE, CACHE)}
        master.request(
            own,
            TITLE,
            self.world.release(),
            kind=TITLE,
            computer=own.computer,
            state="destroyed",
            parameters=parameters,
        )
        self._wait(self._all_free, "all instances to be gone", own)
        for node in {node.name: node for node, _ in self._holders.values()}.values():
            counts = node.verb("report", "list", "--all")["counts"]
            told = master.asked("useComputer").count(node.site.address)
            check(counts["accepted"] and told >= counts["accepted"], f"{node.name}: {counts}, {told} heard")
            self.told.seen(f"{node.name}: {counts['accepted']} usage documents, and the master took each")
        for node in self.world.nodes:
            node.verb("teardown", "--purge")
            node.ended()
        self.told.seen("partitiond teardown --purge on each node ends its daemon, too")

    def _all_free(self) -> bool:
        for node in self.world.nodes:
            node.verb("sync", "report", expect=(0, 1, 3))
        found = [item["state"] for node in self.world.nodes for item in node.partitions().values()]
        return all(state == "free" for state in found)

    def _wait(
        self, condition: Callable[[], _T], what: str, node: Node, hurry: Callable[[], None] | None = None
    ) -> _T:
        """Wait for a condition, and after each look at it do what hurries it."""

        def look() -> _T:
            found = condition()
            if not found and hurry is not None:
                hurry()
            return found

        return wait_for(
            look,
            what,
            seconds=_PATIENCE,
            pause=_PAUSE,
            log=lambda: f"the log of {node.name} ends:\n{node.tail()}",
        )

    def ways_in(self) -> list[str]:
        """A command for each machine that enters it from inside of the demonstration's sandbox."""
        machines: list[Machine] = [*self.world.nodes, self.world.master]
        return [f"{one.name}: nsenter -a -t {one.pid} bash" for one in machines]

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"the log of {node.name} ends:\n{node.tail()}" for node in self.world.nodes)

    def close(self) -> None:
        """End the world, whatever state it is in."""
        self.world.close()
