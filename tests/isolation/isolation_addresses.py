"""The rounds of the matrix that meet the owners of addresses: bind, listen, squat, send, reach; frames; and what has to work.

Each packet carries a token of its own, and everything that arrives anywhere is kept with its source: what a user's own
system call says is not believed.  Sinks are the services of all partitions, the node's, and captures of the wire and of lo.
"""

import itertools
import socket
import struct

from isolation_cells import Job
from isolation_node import COUNT, HOST, NEIGHBOUR4, NEIGHBOUR6, VISITOR, WIRE

SERVICE, SQUATTED, HERE, LOCAL, CLOSED, RESOLVER, LISTENING = 9000, 9100, 9400, 9700, 9999, 5353, 20000
TAKEN = "a socket for all addresses takes its port from everybody who has not bound it yet (bind(2))"
LOOPBACK = "what listens on the loopback address is everybody's"
LISTED = "the network namespace lists the sockets of all (/proc/net, sock_diag(7))"
SAME = "an echo request from an address to itself, which is what an unbound ping to a partition of the host looks like"
GROUP = "224.0.0.251"
PUBLIC = ("IPv6", "range", "routable IPv4", "tun IPv6", "tun IPv4")


def _six(address):
    return ":" in address


class Rounds:
    """All rounds on one scene; ``whole`` takes every combination, else destinations and clients take turns."""

    def __init__(self, scene, *, whole=False):
        self.scene, self.whole = scene, whole
        self._numbers, self._turns = itertools.count(1), itertools.count()
        places = {VISITOR: COUNT} | {one.user: one.index for one in scene.tenants}
        self.users = {name: places[name] for name in scene.attackers}

    # --- what is there

    def open(self):
        """Open the services of everybody, and the captures."""
        questions = {}
        for one in self.scene.tenants:
            rows = []
            for kind, address in one.addresses.items():
                rows += [[f"service {kind} {what}", what, address, SERVICE] for what in ("udp", "tcp")]
                for place in range(COUNT + 1):
                    for number, variant in enumerate(("udp address", "udp shared", "tcp shared")):
                        name = f"squatted {kind} {place} {variant}"
                        rows.append([name, variant, address, SQUATTED + 4 * place + number])
            rows += [[f"local {what}", what, "127.0.0.1", LOCAL + one.index] for what in ("udp", "tcp")]
            questions[one.id] = ("listen", rows)
        near, far = ["127.0.0.1", "::1", *HOST.values()], WIRE.values()
        questions["root"] = ("listen", [[f"resolver {one}", "udp", one, RESOLVER] for one in near])
        ports = (SERVICE, *(HERE + place for place in range(COUNT + 1)))
        questions["wire"] = (
            "listen",
            [
                [f"{what} {one} {port}", what, one, port]
                for one in far
                for port in ports
                for what in ("tcp", "udp")
            ],
        )
        for name, said in self.scene.ask_all(questions).items():
            assert set(said) == {"ok"}, f"{name} cannot open its own: {said}"
        self.scene.agents["wire"]("capture", "capture", "wire")
        self.scene.agents["root"]("capture", "capture", "lo")

    def close(self):
        for agent in ("wire", "root"):
            lost = self.scene.agents[agent]("lost", "capture")
            assert lost == 0, f"the capture of {agent} lost {lost} frames"
        self.scene.ask_all(dict.fromkeys(self.scene.agents, ("close", "")))

    def token(self):
        return f"#{next(self._numbers):08x}#"

    def turn(self, *choices):
        """One of the choices, each in its turn; all of them for the whole matrix."""
        return choices if self.whole else (choices[next(self._turns) % len(choices)],)

    def pairs(self):
        for attacker in self.users:
            for victim in self.scene.tenants:
                if victim.user != attacker:
                    for kind, address in victim.addresses.items():
                        yield attacker, victim, kind, address

    def third(self, attacker, victim):
        """A tenant that is neither."""
        start = victim.index + 1
        return next(
            one
            for place in range(COUNT)
            if (one := self.scene.tenants[(start + place) % COUNT]) is not victim and one.user != attacker
        )

    def own(self, attacker):
        return next((one for one in self.scene.tenants if one.user == attacker), None)

    def clients(self, attacker, victim):
        """Who tries to reach the attacker in the victim's place."""
        return ("wire", self.third(attacker, victim).id, "root", VISITOR, victim.id)

    # --- listening at another's address

    _AT = (
        "tcp",
        "tcp free",
        "tcp device",
        "mptcp",
        "sctp",
        "smc",
        "udp",
        "udp free",
        "udp device",
        "udplite",
    )
    _AT_FOUR = ("tcp mapped", "udp mapped")
    _ANYWHERE = (
        *(("tcp dual", "::"), ("mptcp dual", "::"), ("udp dual", "::"), ("udplite dual", "::")),
        *(("tcp", "0.0.0.0"), ("udp", "0.0.0.0"), ("udplite", "0.0.0.0")),
    )

    def listening(self):
        """Bind another's address, be reached there: by a socket of its own, or by one for all addresses."""
        jobs = []
        for attacker, victim, kind, address in self.pairs():
            for number, variant in enumerate((*self._AT, *(() if _six(address) else self._AT_FOUR))):
                port = LISTENING + 32 * self.users[attacker] + number
                how = variant.replace("device", f"device={self._interface(victim, kind)}")
                words = (f"at {attacker} {victim.id} {kind} {variant}", how, address, port)
                agent = self.scene.agent_name(attacker)
                jobs.append(Job(f"bind {kind}", attacker, victim.id, variant, words, agent))
        outcomes = self.scene.listen(jobs)
        cells = [job.cell(outcome == "ok", outcome) for job, outcome in zip(jobs, outcomes, strict=True)]
        reached = [job for job, outcome in zip(jobs, outcomes, strict=True) if outcome == "ok"]
        cells += self._reach(
            (
                f"be reached at {job.kind.removeprefix('bind ')}",
                job.attacker,
                job.victim,
                job.what,
                *job.words[2:],
                job.words[0],
            )
            for job in reached
        )
        cells += [
            Job(f"be reached at {kind.removeprefix('bind ')}", attacker, victim, what, (), "").cell(
                False, outcome
            )
            for (kind, attacker, victim, what), outcome in (
                ((job.kind, job.attacker, job.victim, job.what), outcome)
                for job, outcome in zip(jobs, outcomes, strict=True)
            )
            if outcome != "ok"
        ]
        self._close_all("at ")
        return cells

    def everywhere(self):
        """A socket for all addresses is reached at one's own, and not at another's."""
        opened = []
        for attacker in self.users:
            for number, (variant, where) in enumerate(self._ANYWHERE):
                port = LISTENING + 32 * self.users[attacker] + 16 + number
                words = (f"any {attacker} {variant}", variant, where, port)
                opened.append(Job("any", attacker, "", variant, words, self.scene.agent_name(attacker)))
        assert set(self.scene.listen(opened)) == {"ok"}
        rows = []
        for attacker, victim, kind, address in self.pairs():
            for job in opened:
                if job.attacker == attacker and ("dual" in job.what or not _six(address)):
                    what = f"{job.what} socket for all"
                    rows.append(
                        (
                            f"be reached at {kind}",
                            attacker,
                            victim.id,
                            what,
                            address,
                            job.words[3],
                            job.words[0],
                        )
                    )
        cells = self._reach(rows)
        self._close_all("any ")
        return cells

    def common(self):
        """What the shared network namespace gives to all: measured, and named for what it is."""
        cells, opened = [], []
        for attacker, agent in ((one, self.scene.agent_name(one)) for one in self.users):
            for number, (variant, where) in enumerate((("tcp dual", "::"), ("udp dual", "::"))):
                port = LISTENING + 32 * self.users[attacker] + 30 + number
                opened.append(
                    Job(
                        "any",
                        attacker,
                        "",
                        variant,
                        (f"any {attacker} {variant}", variant, where, port),
                        agent,
                    )
                )
        assert set(self.scene.listen(opened)) == {"ok"}
        taken = [
            Job(
                "take a port",
                job.attacker,
                victim.id,
                f"{job.what}, {kind}",
                ("bind", job.what.split()[0], address, job.words[3]),
                victim.id,
            )
            for job in opened
            for victim in self.scene.tenants
            if victim.user != job.attacker
            for kind, address in victim.addresses.items()
        ]
        for job, outcome in zip(taken, self.scene.attempt(taken), strict=True):
            known = Job(job.kind, job.attacker, job.victim, job.what, (), "", known=TAKEN)
            cells.append(
                known.cell(
                    outcome == "EADDRINUSE", f"ok, {outcome}" if outcome != "ok" else "bound all the same"
                )
            )
        self._close_all("any ")
        local = []
        for attacker in self.users:
            for victim in self.scene.tenants:
                if victim.user != attacker:
                    agent, port = self.scene.agent_name(attacker), LOCAL + victim.index
                    words = ("tcp unbound", "", "127.0.0.1", port, self.token())
                    local.append(Job("loopback", attacker, victim.id, "tcp", words, agent, known=LOOPBACK))
                    words = ("shown", False, port)
                    cells += self.scene.cells(
                        [Job("list of sockets", attacker, victim.id, "udp", words, agent, known=LISTED)]
                    )
        cells += [
            job.cell(said.startswith("ok"), said)
            for job, said in zip(local, self.scene.connect(local), strict=True)
        ]
        return cells

    def squatting(self):
        """Share the port of the owner's own socket, and take what is sent to it."""
        jobs = []
        for attacker, victim, kind, address in self.pairs():
            for number, variant in enumerate(("udp address", "udp shared", "tcp shared")):
                # SO_REUSEPORT joins sockets of one user (net/core/sock_reuseport.c): only the owner shows that it steals
                alone = "shared" in variant and not self.scene.enforced
                agent = victim.id if alone else self.scene.agent_name(attacker)
                port = SQUATTED + 4 * self.users[attacker] + number
                words = (f"squat {attacker} {victim.id} {kind} {variant}", variant, address, port)
                jobs.append(Job(f"squat {kind}", attacker, victim.id, f"{variant} bind", words, agent))
        outcomes = self.scene.listen(jobs)
        cells = [job.cell(outcome == "ok", outcome) for job, outcome in zip(jobs, outcomes, strict=True)]
        cells += self._reach(
            (job.kind, job.attacker, job.victim, f"{job.words[1]} steal", *job.words[2:], job.words[0])
            for job in jobs
        )
        self._close_all("squat ")
        return cells

    def _close_all(self, prefix):
        self.scene.ask_all(dict.fromkeys(self.scene.agents, ("close", prefix)))

    def _reach(self, rows):
        """Let clients try (kind, attacker, victim, what, address, port, socket): that socket must see nothing of it."""
        streams, datagrams, tenants, sockets = [], [], {one.id: one for one in self.scene.tenants}, {}
        for kind, attacker, name, what, address, port, opened in rows:
            for client in self.turn(*self.clients(attacker, tenants[name])):
                title, token = f"{what}, by {self._title(client, name)}", self.token()
                sockets[token] = opened
                if "tcp" in what:
                    words = ("tcp unbound", "", address, port, token)
                    streams.append(Job(kind, attacker, name, title, words, client))
                else:
                    variant = "udplite unbound" if "udplite" in what else "udp unbound"
                    words = ("send", variant, "", address, port, token)
                    datagrams.append(Job(kind, attacker, name, title, words, client))
        told = [*self.scene.connect(streams), *self.scene.attempt(datagrams)]
        seen = self.scene.sightings()
        cells = []
        for job, outcome in zip((*streams, *datagrams), told, strict=True):
            token = job.words[4] if job.words[0] != "send" else job.words[5]
            got = any(where == sockets[token] for _, where, _ in seen.get(token, ()))
            cells.append(job.cell(got, "ok, received" if got else _unseen(outcome)))
        return cells

    def _title(self, client, victim):
        return {victim: "the owner", "wire": "the wire", "root": "root", VISITOR: "a user"}.get(
            client, "another"
        )

    # --- sending from another's address

    _SENT = ("free", "shared", "transparent", "control", "connected", "after control")
    _SENT_SIX, _SENT_FOUR = ("old", "flow"), ("mapped", "mapped control", "multicast", "options")
    _STREAMS = ("tcp free", "tcp shared", "mptcp", "sctp", "smc", "tcp fast")

    def sending(self):
        """Bind another's address, or name it in a message or an option, and send."""
        datagrams, streams = [], []
        for attacker, victim, kind, address in self.pairs():
            place = self._targets(attacker, victim, address)
            for where in place:
                datagrams.append(self._datagram(attacker, victim, kind, "udp", address, where))
                streams.append(self._stream(attacker, victim, kind, "tcp", address, where))
            words = (*self._SENT, *(self._SENT_SIX if _six(address) else self._SENT_FOUR))
            datagrams += [
                self._datagram(attacker, victim, kind, variant, address, where)
                for variant in (*(f"udp {word}" for word in words), "udplite")
                for where in self.turn(*place)
            ]
            streams += [
                self._stream(attacker, victim, kind, variant, address, where)
                for variant in (*self._STREAMS, *(() if _six(address) else ("tcp mapped",)))
                for where in self.turn(*place)
            ]
            datagrams += [
                self._ping(attacker, victim, kind, variant, address, where)
                for variant in ("plain", "control")
                for where in place[:3]
            ]
        told = [*self.scene.attempt(datagrams), *self.scene.connect(streams)]
        seen = self.scene.sightings()
        syn = self._handshakes(seen)
        addresses = {
            (one.id, kind): address for one in self.scene.tenants for kind, address in one.addresses.items()
        }
        cells = []
        for job, outcome in zip((*datagrams, *streams), told, strict=True):
            address = addresses[job.victim, job.kind.removeprefix("send from ")]
            if job.words[0] in ("send", "ping"):
                got = any(source == address for _, _, source in seen.get(_token_of(job.words), ()))
            else:
                got = outcome == f"ok {address}" or (address, job.words[3]) in syn
            cells.append(job.cell(got, "ok, seen" if got else _unseen(outcome)))
        return cells

    def _targets(self, attacker, victim, address):
        """(name, address, port) of who is sent to; the first three also get echo requests."""
        six, third = _six(address), self.third(attacker, victim)
        other = third.addresses["IPv6" if six else "routable IPv4"]
        return (
            ("the wire", WIRE[six], HERE + self.users[attacker]),
            ("another", other, SERVICE),
            ("the owner", address, SERVICE),
            ("the node", HOST[six], RESOLVER),
        )

    def _beginning(self, attacker, address):
        """An address that is the attacker's to use, which some variants are bound to."""
        own = self.own(attacker)
        return own.addresses["IPv6" if _six(address) else "routable IPv4"] if own else HOST[_six(address)]

    @staticmethod
    def _interface(victim, kind):
        return victim.network.tun.name if kind.startswith("tun") else "lo" if kind == "range" else "br0"

    def _datagram(self, attacker, victim, kind, variant, address, where):
        name, target, port = where
        if "multicast" in variant:
            name, target = "a group", GROUP
        own = self._beginning(attacker, address)
        words = ("send", variant, address, target, port, self.token(), own)
        return self._sent(attacker, victim, kind, variant, name, words)

    def _stream(self, attacker, victim, kind, variant, address, where):
        name, target, port = where
        if target in HOST.values():  # nobody listens there
            name, target, port = "itself", address, SERVICE
        words = (variant, address, target, port, self.token())
        return self._sent(attacker, victim, kind, variant, name, words)

    def _ping(self, attacker, victim, kind, variant, address, where):
        name, target, _ = where
        known = SAME if target == address else ""
        words = ("ping", variant, address, target, self.token())
        return self._sent(attacker, victim, kind, f"ping {variant}", name, words, known)

    def _sent(self, attacker, victim, kind, variant, name, words, known=""):
        hands, what = self._hands(attacker, variant), f"{variant} to {name}"
        return Job(f"send from {kind}", attacker, victim.id, what, words, hands, known=known)

    def _hands(self, attacker, variant):
        """IP_TRANSPARENT is root's: only root can show that it would be seen."""
        alone = "transparent" in variant and not self.scene.enforced
        return "root" if alone else self.scene.agent_name(attacker)

    @staticmethod
    def _handshakes(seen):
        """(source, port) of the SYNs that came to the wire or were sent on lo."""
        found = set()
        for frame, where in seen.items():
            if not any(name == "capture" for _, name, _ in where) or frame[:1] == "#":
                continue
            raw = bytes.fromhex(frame)
            for source in {source for _, _, source in where}:
                head = 54 if _six(source) else 34
                if source and raw[20 if head == 54 else 23] == socket.IPPROTO_TCP and len(raw) >= head + 14:
                    port, flags = struct.unpack_from("!H", raw, head + 2)[0], raw[head + 13]
                    if flags & 0x12 == 2:  # SYN and no ACK
                        found.add((source, port))
        return found

    # --- sources that nobody has

    def nobodys(self):
        """Addresses of the router, of the world, of no partition: binding them needs no privilege."""
        jobs, streams = [], []
        sources = {
            "the router's": (NEIGHBOUR6, NEIGHBOUR4),
            "the world's": ("2001:4860:4860::8888", "8.8.8.8"),
            "of the LAN": ("2001:db8:1::dead", "192.0.2.222"),
            "of no range": ("2001:db8:1:0:7fff::1", "203.0.113.222"),
            "of the private network": ("2001:db8:1:0:bfff::1", "10.0.200.7"),
        }
        for attacker in self.users:
            for name, pair in sources.items():
                for source in pair:
                    other = self.scene.tenants[(self.users[attacker] + 1) % COUNT]
                    six = _six(source)
                    targets = {
                        "the wire": (WIRE[six], HERE + self.users[attacker]),
                        "another": (other.addresses["IPv6" if six else "routable IPv4"], SERVICE),
                    }
                    for where, (target, port) in targets.items():
                        for variant in ("udp free", "udp transparent", "udp control", "udplite free", "udp"):
                            words = ("send", variant, source, target, port, self.token())
                            jobs.append(self._nobody(attacker, name, six, f"{variant} to {where}", words))
                        words = ("tcp free", source, target, port, self.token())
                        streams.append(self._nobody(attacker, name, six, f"tcp free to {where}", words))
                    words = ("ping", "free", source, WIRE[six], self.token())
                    jobs.append(self._nobody(attacker, name, six, "ping free to the wire", words))
        told = [*self.scene.attempt(jobs), *self.scene.connect(streams)]
        seen = self.scene.sightings()
        syn = self._handshakes(seen)
        cells = []
        for job, outcome in zip((*jobs, *streams), told, strict=True):
            if job.words[0] in ("send", "ping"):
                source = job.words[2]
                got = any(one == source for _, _, one in seen.get(_token_of(job.words), ()))
            else:
                got = outcome == f"ok {job.words[1]}" or (job.words[1], job.words[3]) in syn
            cells.append(job.cell(got, "ok, seen" if got else _unseen(outcome)))
        return cells

    def _nobody(self, attacker, name, six, what, words):
        kind = f"send from nobody's IPv{6 if six else 4}"
        return Job(kind, attacker, "node", f"{what}, {name}", words, self._hands(attacker, what))

    # --- private IPv4

    def private(self):
        """Reach a service on another's private IPv4."""
        datagrams, streams = [], []
        for attacker in (*self.users, "wire"):
            own = self.own(attacker)
            sources = {"unbound": ""}
            if attacker != "wire":
                sources |= {"from 127.0.0.1": "127.0.0.1", "from the node's": HOST[False]}
            if own:
                sources |= {f"from its {kind}": one for kind, one in own.addresses.items() if not _six(one)}
            for victim in self.scene.tenants:
                if victim is own:
                    continue
                target = victim.addresses["private IPv4"]
                agent = self.scene.agent_name(attacker)
                for name, source in sources.items():
                    for word in ("", *(() if attacker == "wire" else (" mapped",))):
                        bound = word if source else f"{word} unbound"
                        words = ("send", f"udp{bound}", source, target, SERVICE, self.token())
                        datagrams.append(
                            Job("private IPv4", attacker, victim.id, f"udp{word} {name}", words, agent)
                        )
                        words = (f"tcp{bound}", source, target, SERVICE, self.token())
                        streams.append(
                            Job("private IPv4", attacker, victim.id, f"tcp{word} {name}", words, agent)
                        )
                if attacker != "wire":
                    words = ("ping", "unbound answer", "", target, self.token())
                    datagrams.append(Job("private IPv4", attacker, victim.id, "ping", words, agent))
        return self._delivered(datagrams, streams)

    def _delivered(self, datagrams, streams):
        """Cells by whether the victim's own sockets saw it."""
        told = [*self.scene.attempt(datagrams), *self.scene.connect(streams)]
        seen = self.scene.sightings()
        cells = []
        for job, outcome in zip((*datagrams, *streams), told, strict=True):
            if job.words[0] == "send":
                got = any(who == job.victim for who, _, _ in seen.get(_token_of(job.words), ()))
            else:
                got = outcome.startswith("ok")
            cells.append(job.cell(got, outcome if got else _unseen(outcome)))
        return cells

    # --- from the wire

    def from_wire(self):
        """The LAN sends from a partition's address, to another partition and through the node."""
        jobs = []
        for victim in self.scene.tenants:
            for kind, address in victim.addresses.items():
                other = self.third(victim.user, victim)
                target = other.addresses["IPv6" if _six(address) else "routable IPv4"]
                words = ("send", "udp transparent", address, target, SERVICE, self.token())
                jobs.append(Job("sent by the wire", "wire", other.id, f"from {kind}", words, "wire"))
        return self._delivered(jobs, [])


def _unseen(outcome):
    """What a system call said that had no effect; IPv6 echo requests say nothing of being refused (net/ipv6/ping.c)."""
    return "unseen" if outcome.startswith("ok") else outcome


def _token_of(words):
    """The token of ``send`` or ``ping``."""
    return words[5] if words[0] == "send" else words[4]
