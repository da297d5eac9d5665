"""What has to go on working behind all walls: one's own addresses, everybody's public ones, the world, the node's services."""

from isolation_addresses import CLOSED, HERE, PUBLIC, RESOLVER, SERVICE, _six, _token_of
from isolation_cells import Job
from isolation_node import HOST, PATIENCE, WIRE

OWN = 9500


class Working:
    """Uses the services and captures that :class:`isolation_addresses.Rounds` has opened."""

    def __init__(self, rounds):
        self.rounds, self.scene = rounds, rounds.scene
        self.callers = {
            **{one: self.scene.agent_name(one) for one in rounds.users},
            "root": "root",
            "wire": "wire",
        }

    def cells(self):
        return [*self._clients(), *self._own(), *self._refused()]

    def _clients(self):
        """Unbound clients of everything public; nobody's source is another partition's."""
        datagrams, streams, pings = [], [], []
        for caller, agent in self.callers.items():
            for kind, victim, address, port, variants in self._public(caller):
                for variant in variants:
                    words = ("send", f"udp {variant}", "", address, port, self.rounds.token())
                    datagrams.append(Job(kind, caller, victim, f"udp {variant}", words, agent, allowed=True))
                    if port != RESOLVER and variant != "connected":
                        words = (f"tcp {variant}", "", address, port, self.rounds.token())
                        streams.append(
                            Job(kind, caller, victim, f"tcp {variant}", words, agent, allowed=True)
                        )
                if caller != "wire" or victim != "node":
                    words = ("ping", "unbound answer", "", address, self.rounds.token())
                    pings.append(Job(kind, caller, victim, "ping", words, agent, allowed=True))
        return [*self._judged(datagrams, streams), *self.scene.cells(pings)]

    def _public(self, caller):
        """(kind, victim, address, port, variants) of what this caller may reach."""
        for one in self.scene.tenants:
            kinds = one.addresses if caller in (one.user, "root") else PUBLIC
            for kind in kinds:
                address = one.addresses[kind]
                four = () if _six(address) or caller == "wire" else ("unbound mapped",)
                title = "reach one's own" if caller == one.user else "reach what is public"
                if caller == "root" and kind == "private IPv4":
                    title = "root reaches all"
                yield title, one.id, address, SERVICE, ("unbound", "unbound connected", *four)
        if caller == "wire":
            return
        place = self.rounds.users.get(caller, 0)
        for address in WIRE.values():
            yield "reach the world", "wire", address, HERE + place, ("unbound", "unbound connected")
        for address in ("127.0.0.1", "::1", *HOST.values()):
            yield "reach the node's resolver", "node", address, RESOLVER, ("unbound", "unbound connected")

    def _judged(self, datagrams, streams):
        """It arrived, and came from the caller's own addresses or the node's."""
        told = [*self.scene.attempt(datagrams), *self.scene.connect(streams, PATIENCE)]
        seen = self.scene.sightings()
        owners = {address: one.user for one in self.scene.tenants for address in one.addresses.values()}
        cells = []
        for job, outcome in zip((*datagrams, *streams), told, strict=True):
            token = _token_of(job.words) if job.words[0] == "send" else job.words[4]
            rows = [row for row in seen.get(token, ()) if row[1] != "capture"]
            who = {"node": "root"}.get(job.victim, job.victim)
            got = any(agent == who for agent, _, _ in rows)
            cells.append(job.cell(got, outcome if got or not outcome.startswith("ok") else "unseen"))
            sources = {source for _, _, source in seen.get(token, ())}
            foreign = {owners[source] for source in sources if source in owners} - {job.attacker}
            check = Job(f"source: {job.kind}", job.attacker, job.victim, job.what, (), job.agent)
            bad = bool(foreign) and job.attacker not in ("root", "wire")
            cells.append(check.cell(bad, f"ok, that of {foreign}" if bad else "its own"))
        return cells

    def _own(self):
        """Listen on one's own addresses and be reached; send from them."""
        opened, datagrams, streams = [], [], []
        for one in self.scene.tenants:
            for kind, address in one.addresses.items():
                variants = ("tcp", "udp", "tcp free", "udp free", "mptcp", "udplite")
                for number, variant in enumerate(
                    (*variants, *(() if _six(address) else ("tcp mapped", "udp mapped")))
                ):
                    words = (f"own {kind} {variant}", variant, address, OWN + number)
                    opened.append(
                        Job(
                            "bind one's own",
                            one.user,
                            one.id,
                            f"{kind} {variant}",
                            words,
                            one.id,
                            allowed=True,
                        )
                    )
                six = _six(address)
                other = self.rounds.third(one.user, one)
                for name, target, port, who in (
                    ("the wire", WIRE[six], HERE + one.index, "wire"),
                    ("another", other.addresses["IPv6" if six else "routable IPv4"], SERVICE, other.id),
                    ("itself", address, SERVICE, one.id),
                ):
                    if kind == "private IPv4" and name == "the wire":  # the world has no way back
                        continue
                    for variant in ("udp", "udp control", "udp connected", *(() if six else ("udp mapped",))):
                        words = ("send", variant, address, target, port, self.rounds.token())
                        what = f"{kind}: {variant} to {name}"
                        datagrams.append(
                            Job("send from one's own", one.user, who, what, words, one.id, allowed=True)
                        )
                    if kind == "private IPv4" and name != "itself":
                        continue
                    for variant in ("tcp", *(() if six else ("tcp mapped",))):
                        words = (variant, address, target, port, self.rounds.token())
                        what = f"{kind}: {variant} to {name}"
                        streams.append(
                            Job("send from one's own", one.user, who, what, words, one.id, allowed=True)
                        )
        outcomes = self.scene.listen(opened)
        cells = [job.cell(said == "ok", said) for job, said in zip(opened, outcomes, strict=True)]
        self.scene.ask_all({one.id: ("close", "own ") for one in self.scene.tenants})
        return [*cells, *self._judged(datagrams, streams)]

    def _refused(self):
        """A closed port says so at once: what the kernel answers by itself passes."""
        jobs = []
        for caller, agent in self.callers.items():
            for one in self.scene.tenants:
                for kind in PUBLIC:
                    words = ("tcp unbound", "", one.addresses[kind], CLOSED, "")
                    jobs.append(
                        Job("a closed port answers", caller, one.id, kind, words, agent, allowed=True)
                    )
        return [
            job.cell(outcome == "ECONNREFUSED", outcome)
            for job, outcome in zip(jobs, self.scene.connect(jobs, PATIENCE), strict=True)
        ]
