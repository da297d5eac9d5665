"""A node whose partitions send known amounts over every kind of address, and what is then compared with its ledger.

``label``: (partition, address as the ledger has it, scope, ``in`` or ``out``).  A packet between two partitions has two.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from network_scene import NEIGHBOUR4, NEIGHBOUR6, NODE4, NODE6, inside, ip_lines, mac
from traffic_flows import PATIENCE, REFUSED, Agent, asking, bound, converse, echo, frames, guest, serve, udp

from accounting import Ledger
from netplan import nftables, observe
from netplan.apply import apply
from netplan.errors import NetplanError
from netplan.plan import plan
from partitiond import converge, lanes
from partitiond.context import Context
from partitiond.metering import ledger_path

STAY, CHURN = 6, 2
"""Partitions that send, and those that come and go."""
ROUTABLE = (0, 1, 2, 3)
HOSTS = {"host": "0.0.0.0", "host6": "::"}
"""The node's own addresses, in the ledger; beside them the partitions that use them, as clients and as a server of TCP."""
SERVER, DATAGRAMS, STREAMS = 3, 4, 5
PORT = 4000
GATEWAY4 = "203.0.113.1"
ORACLE = "inet traffic_oracle"
_NAMES = {"ipv6": "IPv6", "range": "IPv6 range", "ipv4": "private IPv4", "routable": "routable IPv4"}


@dataclass
class Row:
    """One line of the table: what was sent and counted over one kind of address, scope, protocol and direction."""

    sent: list = field(default_factory=lambda: [0, 0])
    counted: list = field(default_factory=lambda: [0, 0])
    lost: int = 0
    double: int = 0

    def add(self, sent, counted):
        for place in (0, 1):
            self.sent[place] += sent[place]
            self.counted[place] += counted[place]
        self.lost += max(0, sent[1] - counted[1], sent[0] - counted[0])
        self.double += max(0, counted[1] - sent[1], counted[0] - sent[0])


class Scene:
    """The node, applied; ``wire`` is a standing one."""

    def __init__(self, wire, node, command):
        self.wire, self.node, self.command = wire, node, command
        self.dice = random.Random(6)  # noqa: S311 - dice of a test
        self.agents = []
        self.reloads = 0

    def up(self):
        done = self.command("apply", "--json", "-c", self.node.path)
        assert done.returncode == 0, done.stdout + done.stderr
        self.context = Context.of(self.node.load())
        self.found = converge.observe(self.context).node
        self.partitions = self.found.partitions
        self.network = self.found.network()
        self._know_each_other()
        for link in ("lo", "br0"):
            ip_lines(f"link set {link} gso_max_segs 1")  # else an aggregate of many packets counts one header
        self.wire.sees("link set wire gso_max_segs 1")
        self._probe_for_lost_tails(off=True)
        return self

    def down(self):
        for agent in self.agents:
            agent.kill()
        ip_lines("link set lo gso_max_segs 65535")
        self._probe_for_lost_tails(off=False)
        self.context.meters.close()

    def _probe_for_lost_tails(self, *, off):
        """Where nobody gets a processor for a while, TCP sends its last FIN again after a few ms (net.ipv4.tcp_early_retrans):
        the acknowledgement of the second finds no socket, and is nobody's.
        """
        for namespace in (self.wire.name, None):
            with inside(namespace) if namespace else contextlib.nullcontext():
                Path("/proc/sys/net/ipv4/tcp_early_retrans").write_text("0" if off else "3")

    def _know_each_other(self):
        """Pin the MACs at both ends: no packet waits for one, and no neighbour solicitation is among those counted."""
        with inside(self.wire.name):
            self.far_mac = mac("wire")
        ours = mac("br0")
        far = (NEIGHBOUR4, NEIGHBOUR6, GATEWAY4)
        self.wire.sees(
            f"address replace {GATEWAY4}/24 dev wire",
            f"route replace 2001:db8:1:0:4000::/66 via {NODE6}",
            *(f"neigh replace {one} lladdr {ours} dev wire nud permanent" for one in (NODE4, NODE6)),
        )
        world = [one.network.ipv6.ip for one in self.partitions]
        world += [
            one.network.routable_ipv4.interface.ip for one in self.partitions if one.network.routable_ipv4
        ]
        self.wire.sees(*(f"neigh replace {one} lladdr {ours} dev wire nud permanent" for one in world))
        ip_lines(*(f"neigh replace {one} lladdr {self.far_mac} dev br0 nud permanent" for one in far))

    # --- who is who

    def address(self, index, kind):
        """The text of one address of a partition, of its range some address."""
        network = self.partitions[index].network
        if kind == "routable":
            return str(network.routable_ipv4.interface.ip)
        if kind == "range":
            return str(network.ipv6_range[0x77])
        return str(network.ipv6.ip if kind == "ipv6" else network.ipv4)

    def label(self, index, kind, scope, way):
        if kind in HOSTS:
            address = HOSTS[kind]
        elif kind == "tap":
            address = self.partitions[index].network.tap.name
        elif kind == "range":
            address = str(self.partitions[index].network.ipv6_range)
        else:
            address = self.address(index, kind)
        return self.partitions[index].id, address, scope, way

    def taps(self):
        return {one.network.tap.name for one in self.partitions}

    # --- who sends

    def agent(self, name, prepare, *, user=None, far=False, processor=None):
        uid = self.partitions[user].uid if user is not None else 0
        namespace = self.wire.name if far else None
        self.agents.append(Agent(name, prepare, uid=uid, namespace=namespace, processor=processor))

    def sinks(self, stack):
        """Sockets that nobody reads, so that no datagram is answered by an ICMP error: a full one is silent."""
        for index, one in enumerate(self.partitions):
            for kind in ("ipv6", "range", "ipv4", *(["routable"] if one.network.routable_ipv4 else [])):
                os.seteuid(self.partitions[index].uid)  # nft and the programs at the cgroup see who opened it
                try:
                    stack.enter_context(bound(self.address(index, kind), PORT))
                finally:
                    os.seteuid(0)
        with inside(self.wire.name):
            for address in (NEIGHBOUR4, NEIGHBOUR6):
                stack.enter_context(bound(address, PORT))

    def sinks_of_the_node(self, stack, users):
        """Likewise at the node's own addresses, of a partition each, at a port of its own."""
        for place, index in enumerate(users):
            os.seteuid(self.partitions[index].uid)
            try:
                for address in (NODE4, NODE6):
                    stack.enter_context(bound(address, PORT + place))
            finally:
                os.seteuid(0)

    def flows(self, sender, other):
        """{labels: (source, target, port)} of datagrams of one partition to the neighbour, to another and to itself."""
        found = {}
        for kind, target in (("ipv6", NEIGHBOUR6), ("range", NEIGHBOUR6), ("routable", NEIGHBOUR4)):
            source = self.address(sender, kind)
            found[(self.label(sender, kind, "remote", "out"),)] = (source, target, PORT)
            both = (self.label(sender, kind, "local", "out"), self.label(other, kind, "local", "in"))
            found[both] = (source, self.address(other, kind), PORT)
        own = self.address(sender, "ipv4")
        found[tuple(self.label(sender, "ipv4", "local", way) for way in ("out", "in"))] = (own, own, PORT)
        return found

    def start_datagrams(self):
        """Partitions 0 and 1, the neighbour to both, and 4 with the node's own addresses."""
        for sender, other in ((0, 1), (1, 0)):
            self.agent(f"datagrams {sender}", udp(self.flows(sender, other), seed=sender), user=sender)
        towards = {
            (self.label(index, kind, "remote", "in"),): (None, self.address(index, kind), PORT)
            for index in (0, 1)
            for kind in ("ipv6", "range", "routable")
        }
        self.agent("datagrams to", udp(towards, seed=7), far=True)
        self.agent("echo", echo([NEIGHBOUR4, NEIGHBOUR6], PORT + 1), far=True)
        towards = {}
        for kind, own, far in (("host", NODE4, NEIGHBOUR4), ("host6", NODE6, NEIGHBOUR6)):
            labels = [(self.label(DATAGRAMS, kind, "remote", way),) for way in ("out", "in")]
            for seed, connected in ((8, True), (9, True), (10, False)):
                asks = asking(*labels, own, far, PORT + 1, seed=seed, connected=connected)
                self.agent(f"asking {kind} {seed}", asks, user=DATAGRAMS)
            towards[labels[1]] = (None, own, PORT)
        self.agent("datagrams to the node", udp(towards, seed=11), far=True)

    def start_streams(self):
        """Partitions 2 and 3 among themselves and with the neighbour, and 5 with the node's own addresses."""
        own = [self.address(2, "ipv4")]
        worlds = ("ipv6", "range", "routable")
        self.agent("server 2", serve(own, PORT), user=2)
        self.agent("server 3", serve([self.address(3, kind) for kind in worlds], PORT), user=3)
        self.agent("server", serve([NEIGHBOUR4, NEIGHBOUR6], PORT + 2), far=True)
        flows = [
            (own[0], own[0], PORT),
            (self.address(2, "ipv6"), NEIGHBOUR6, PORT + 2),
            (self.address(2, "range"), NEIGHBOUR6, PORT + 2),
            (self.address(2, "routable"), NEIGHBOUR4, PORT + 2),
            *((self.address(2, kind), self.address(3, kind), PORT) for kind in worlds),
        ]
        self.agent("streams 2", converse(flows, seed=2), user=2)
        towards = [(None, self.address(3, kind), PORT) for kind in worlds]
        self.agent("streams to", converse(towards, seed=3), far=True)
        self._start_streams_of_the_node()

    def _start_streams_of_the_node(self):
        """The neighbour closes first: what comes for a socket in TIME_WAIT is nobody's (docs/design/accounting.md).

        Two processors let an acknowledgement be overtaken by the last FIN, or sent twice, which is answered by an RST: so all
        have the same.
        """
        one = min(os.sched_getaffinity(0))
        far, own = [NEIGHBOUR4, NEIGHBOUR6], [NODE4, NODE6]
        self.agent("server for 5", serve(far, PORT + 3), far=True, processor=one)
        self.agent("server of the node", serve(own, PORT + 4), user=SERVER, processor=one)
        flows = [(*pair, PORT + 3) for pair in zip(own, far, strict=True)]
        self.agent("streams 5", converse(flows, seed=5, hasty=False), user=STREAMS, processor=one)
        towards = [(*pair, PORT + 4) for pair in zip(far, own, strict=True)]
        self.agent("streams to the node", converse(towards, seed=6), far=True, processor=one)

    def start_guests(self):
        """The guest of partition 0 reads and writes; what it is sent comes from the wire, among others."""
        labels = [(self.label(0, "tap", "remote", way),) for way in ("out", "in")]
        self.agent("guest", guest(self.partitions[0].network.tap.name, *labels), user=0)
        self.agent("frames", frames("wire"), far=True)

    # --- the kernel's own count, in tables that nobody else touches

    def stream_labels(self):
        """Every label over which TCP goes: what was sent over them, control packets and all, is what the oracle says."""
        kinds = ("ipv6", "range", "routable")
        found = [self.label(STREAMS, kind, "remote", way) for kind in HOSTS for way in ("out", "in")]
        # what a server sends before accept(2) and after close(2) is nobody's
        found += [self.label(SERVER, kind, "remote", "in") for kind in HOSTS]
        found += [self.label(2, "ipv4", "local", way) for way in ("out", "in")]
        for index in (2, 3):
            for kind in kinds:
                found += [
                    self.label(index, kind, scope, way)
                    for scope in ("remote", "local")
                    for way in ("out", "in")
                ]
        return found

    def datagram_labels(self):
        kinds = ("ipv6", "range", "routable")
        found = [self.label(DATAGRAMS, kind, "remote", way) for kind in HOSTS for way in ("out", "in")]
        for index in (0, 1):
            found += [self.label(index, "ipv4", "local", way) for way in ("out", "in")]
            for kind in kinds:
                found += [
                    self.label(index, kind, scope, way)
                    for scope in ("remote", "local")
                    for way in ("out", "in")
                ]
        return found

    def oracle_up(self):
        self.oracle = [*self.stream_labels(), *self.datagram_labels()]
        for scope, namespace in (("remote", self.wire.name), ("local", None)):
            with inside(namespace) if namespace else contextlib.nullcontext():
                nftables.run("".join(f"{line}\n" for line in self._oracle_lines(scope)))

    def _oracle_lines(self, scope):
        yield f"add table {ORACLE}"
        # behind everything of ours: what is refused was not sent
        hooks = {
            "remote": {"out": "prerouting", "in": "postrouting"},
            "local": {"out": "output", "in": "input"},
        }[scope]
        for way, hook in hooks.items():
            yield f"add chain {ORACLE} {way} {{ type filter hook {hook} priority 400; }}"
        for place, (partition, address, which, way) in enumerate(self.oracle):
            if which != scope:
                continue
            protocol = ""
            if address in HOSTS.values():
                protocol = self._of_the_node(partition, way)
                address = NODE6 if address == HOSTS["host6"] else NODE4  # noqa: PLW2901 - as the wire has it
            family = "ip6" if ":" in address else "ip"
            match = f"{protocol}{family} {'saddr' if way == 'out' else 'daddr'} {address}"
            if scope == "local":
                match += f" {'oif' if way == 'out' else 'iif'} lo"
            yield f"add counter {ORACLE} label{place}"
            yield f'add rule {ORACLE} {way} {match} counter name "label{place}"'

    def _of_the_node(self, partition, way):
        """What tells those apart that use the node's own addresses."""
        if partition == self.partitions[DATAGRAMS].id:
            return "meta l4proto udp "
        end = "sport" if way == "out" else "dport"
        return f"tcp {end} {'' if partition == self.partitions[SERVER].id else '!= '}{PORT + 4} "

    def oracle_down(self):
        for namespace in (self.wire.name, None):
            with inside(namespace) if namespace else contextlib.nullcontext():
                nftables.run(f"delete table {ORACLE}\n")

    def seen_by_oracle(self):
        """{label: (packets, bytes)}."""
        found = {}
        for namespace in (self.wire.name, None):
            where = ["/usr/sbin/ip", "netns", "exec", namespace] if namespace else []
            said = subprocess.check_output(
                [*where, "/usr/sbin/nft", "-j", "list", "counters", "table", *ORACLE.split()]
            )
            for one in json.loads(said)["nftables"]:
                if "counter" in one:
                    value = one["counter"]
                    label = self.oracle[int(value["name"].removeprefix("label"))]
                    found[label] = value["packets"], value["bytes"]
        return found

    # --- the meter, and what is done to it

    def begin(self):
        for agent in self.agents:
            agent.wait_until_ready()
        for agent in self.agents:
            agent.begin()

    def stop(self):
        """End all that send, then all that answer; return {label: (packets, bytes)} of what they know they sent, and how often
        they were refused.
        """
        sent, refused = Counter(), 0
        answering = [one for one in self.agents if one.name.startswith(("server", "echo"))]
        for agents in ([one for one in self.agents if one not in answering], answering):
            for agent in agents:
                agent.stop()
            for agent in agents:
                answer = agent.end()
                refused += answer.pop(REFUSED, (0, 0))[0]
                for labels, (packets, octets) in answer.items():
                    for label in labels:
                        sent[label, 0] += packets
                        sent[label, 1] += octets
            time.sleep(0.3)  # delayed acknowledgements
        self.agents = []
        return {label: (sent[label, 0], sent[label, 1]) for label, _ in sent}, refused

    def counted(self):
        """{label: (packets, bytes)} of the ledger, and the gaps of those who stay."""
        stay = [one.id for one in self.partitions[:STAY]]
        with Ledger.open_readonly(ledger_path(self.node.state)) as ledger:
            report = ledger.usage(None, None)
            gaps = [gap for name in stay for gap in ledger.usage(None, None, name).gaps]
        found = Counter()
        for item in report.partitions:
            for one in item.addresses:
                for way, packets, octets in (
                    ("in", one.packets_in, one.bytes_in),
                    ("out", one.packets_out, one.bytes_out),
                ):
                    found[(item.id, one.address, one.scope, way), 0] += packets
                    found[(item.id, one.address, one.scope, way), 1] += octets
        return {label: (found[label, 0], found[label, 1]) for label, _ in found}, gaps

    def a_pass(self):
        """One pass by a process that goes on to live."""
        lanes.usage(self.context)

    def start_meter(self):
        """A child that does the usage lane of the daemon again and again, without a pause."""
        child = os.fork()
        if child == 0:
            try:
                own = Context.of(self.context.config)
                own.node = self.found
                while True:
                    lanes.usage(own)
            finally:
                os._exit(1)
        return child

    @staticmethod
    def kill(child):
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the meter ended by itself"

    def passes(self):
        """How many there are in the ledger."""
        with contextlib.closing(
            sqlite3.connect(f"file:{ledger_path(self.node.state)}?mode=ro", uri=True)
        ) as ledger:
            return ledger.execute("SELECT count(*) FROM pass").fetchone()[0]

    def start_daemon(self):
        """A real one, that answers."""
        daemon = subprocess.Popen(
            self.command.line("run", "-q", "-c", self.node.path),
            env=self.command.environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + PATIENCE
        with socket.socket(socket.AF_UNIX) as channel:
            while channel.connect_ex(str(self.node.root / "run" / "control.sock")) != 0:
                assert daemon.poll() is None, "the daemon ended"
                assert time.monotonic() < end, "the daemon does not come up"
                time.sleep(0.02)
        return daemon

    @staticmethod
    def kill_daemon(daemon):
        daemon.kill()
        assert daemon.wait() == -signal.SIGKILL, "the daemon ended by itself"

    @staticmethod
    def break_filter():
        """Where the daemon does not hold the table, rules are taken away that count nothing."""
        with contextlib.suppress(NetplanError):
            nftables.run("flush chain inet partitiond deny_foreign\n")

    def change_filter(self):
        """Load the whole packet filter anew, now and then with other partitions: counters of those who stay must go on."""
        nftables.run("flush chain inet partitiond deny_foreign\n")  # it counts nothing
        count = STAY + self.reloads // 4 % (CHURN + 1)
        wanted = replace(self.network, partitions=self.network.partitions[:count])
        operations = plan(wanted, observe.observe(wanted))
        assert any(one.id.startswith("filter") for one in operations), [one.id for one in operations]
        failures = apply(operations)
        assert not failures, [(one.operation.id, one.error.message) for one in failures]
        self.reloads += 1

    def restore(self):
        operations = plan(self.network, observe.observe(self.network))
        failures = apply(operations)
        assert not failures, [(one.operation.id, one.error.message) for one in failures]


def compare(sent, before, after, kinds):
    """{row: Row}: what was sent beside what the ledger has more than before; ``kinds`` give the row of a label."""
    rows = {}
    for label in sorted(sent, key=kinds):
        earlier, now = before.get(label, (0, 0)), after.get(label, (0, 0))
        counted = tuple(b - a for a, b in zip(earlier, now, strict=True))
        rows.setdefault(kinds(label), Row()).add(sent[label], counted)
    return rows
