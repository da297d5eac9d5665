"""The refusal matrix: who may not use a tunnel tries it, from another partition, from the wire and from another node.

Judged by the service behind, which tells how many connections and bytes it ever saw; rightful ones go through in between. Each
kind of attempt is also made where it has to succeed, so that one that fails for another reason is no refusal.
"""

import secrets
from collections import Counter

import pytest
import tunnel_identities
from network_scene import ip_lines
from tunnel_world import ROUTER, standing

SERVICE, LISTEN, ENTRY = 5000, 4000, 6000
OPEN = 4001  # and after it: where each stranger may come in
LENIENT, PLAIN = 4500, 4501
NOISE = 16
ROUNDS = 5
# an address of the node's own that is nobody's, and how private addresses are looked for from outside
UNOWNED, NODE4, ROUTER4 = "10.99.0.1", "192.0.2.2", "192.0.2.1"


class Tally:
    """Attempts and what came of them, by cell."""

    def __init__(self):
        self.tried, self.accepted = Counter(), Counter()
        self.rightful = self.passed = 0

    def __str__(self):
        rows = (f"  {self.accepted[name]:4} of {count:4}  {name}" for name, count in self.tried.items())
        total = f"{sum(self.accepted.values())} of {sum(self.tried.values())} attempts accepted"
        return "\n".join((*rows, f"  {total}, {self.passed} of {self.rightful} rightful ones"))


def question(to, certificate=None, version="TLSv1_3", **more):
    """A connection by TLS; without a version in plain."""
    return {
        "to": list(to),
        "send": secrets.token_hex(NOISE),
        "tls": version,
        "certificate": certificate,
        **more,
    }


class Matrix:
    """The serving partition, those who try, and the certificates."""

    def __init__(self, world):
        self.world, self.tally = world, Tally()
        here, there = world.here, world.there
        self.right = tunnel_identities.new("client")
        self.revoked = tunnel_identities.new("revoked")
        self.expired = tunnel_identities.expired("expired")
        self.strangers = {
            "wrong pin": tunnel_identities.new("stranger"),
            "same subject, another key": tunnel_identities.same_subject(self.right),
            "look-alike": tunnel_identities.look_alike(self.right),
            "issued by a pinned one": tunnel_identities.issued_by(self.right, "issued"),
        }
        self.allow(self.right, self.revoked, self.expired)
        self.namesake = tunnel_identities.same_subject(self.revoked)
        for port, pair in enumerate(self.strangers.values(), OPEN):
            here.serve("slappart0", f"open-{port}", port, SERVICE, [pair.pin, self.namesake.pin])
        here.reach("slappart1", "db", ENTRY, (here.public("slappart0"), LISTEN), here.pin("slappart0"))
        here.apply()
        self.host = here.public("slappart0")
        self.service = here.service("slappart0", here.private("slappart0"), SERVICE)
        pair = tunnel_identities.new("lenient").pem
        self.lenient = here.service("slappart0", self.host, LENIENT, certificate=pair)
        self.plain = here.service("slappart0", self.host, PLAIN)
        self.tenant = here.agent("slappart1", "probe")
        self.vantages = {
            "another partition": here.agent("slappart2", "probe"),
            "the wire": world.on_the_wire("probe"),
            "another node": there.agent("slappart0", "probe"),
        }

    def allow(self, *pairs):
        here = self.world.here
        pins = [here.pin("slappart1"), *(one.pin for one in pairs)]
        here.serve("slappart0", "db", LISTEN, SERVICE, pins)

    def rightful(self):
        return question((self.host, LISTEN), self.right.pem)

    def works(self, agent, attempt):
        """The control of a cell."""
        (answer,) = agent.ask([attempt])
        assert answer["echo"], f"{attempt['to']}: {answer['why']}"
        return answer

    def refused(self, cell, agent, attempt, rounds=ROUNDS):
        """Try it again and again, a rightful one after each; count what got to the service beside those."""
        before = self.service.ask()
        answers = agent.ask([one for _ in range(rounds) for one in (attempt, self.rightful())])
        passed = sum(one["echo"] for one in answers[1::2])
        (tenants,) = self.tenant.ask([self.tenants_own()])
        passed += tenants["echo"]
        after = self.service.ask()
        connections = after["connections"] - before["connections"] - passed
        brought = after["bytes"] - before["bytes"] - passed * NOISE
        self.tally.tried[cell] += rounds
        self.tally.accepted[cell] += max(
            connections, -(-brought // NOISE), sum(one["echo"] for one in answers[::2])
        )
        self.tally.rightful += rounds + 1
        self.tally.passed += passed

    def tenants_own(self):
        """What the partition whose tunnel it is does: plain TCP to its end of it."""
        return question((self.world.here.private("slappart1"), ENTRY), version=None)

    # --- cells

    def certificates(self):
        for vantage, agent in self.vantages.items():
            for port, (kind, pair) in enumerate(self.strangers.items(), OPEN):
                self.works(agent, question((self.host, port), pair.pem))
                self.refused(f"{vantage}: {kind}", agent, question((self.host, LISTEN), pair.pem))
            self.works(agent, question((self.host, LENIENT), self.expired.pem))
            self.refused(f"{vantage}: expired", agent, question((self.host, LISTEN), self.expired.pem))

    def manners(self):
        """No certificate, old versions with the right certificate, no TLS at all."""
        kinds = {
            "no certificate": (LENIENT, {"certificate": None}),
            "TLS 1.2": (LENIENT, {"certificate": self.right.pem, "version": "TLSv1_2"}),
            "TLS 1.1": (LENIENT, {"certificate": self.right.pem, "version": "TLSv1_1"}),
            "plaintext": (PLAIN, {"version": None}),
        }
        for vantage, agent in self.vantages.items():
            for kind, (control, how) in kinds.items():
                self.works(agent, question((self.host, control), **how))
                self.refused(f"{vantage}: {kind}", agent, question((self.host, LISTEN), **how))

    def around(self):
        """Past the tunnel: the client's end and the service itself, both on private addresses of others."""
        here = self.world.here
        ends = {
            "the client's end": (here.private("slappart1"), ENTRY),
            "the service itself": (here.private("slappart0"), SERVICE),
        }
        ip_lines(f"address add {NODE4}/24 dev eth0", f"address add {UNOWNED}/32 dev lo")
        ip_lines(f"address add {ROUTER4}/24 dev near", f"route add 10.0.0.0/8 via {NODE4}", namespace=ROUTER)
        nobodys = self.world.on_the_node("service", {"host": UNOWNED, "port": SERVICE})
        try:
            for vantage in ("another partition", "the wire"):
                agent = self.vantages[vantage]
                self.works(agent, question((UNOWNED, SERVICE), version=None))
                for end, to in ends.items():
                    self.refused(f"{vantage}: {end}", agent, question(to, version=None, patience=0.5))
        finally:
            nobodys.close()
            ip_lines(f"address delete {NODE4}/24 dev eth0", f"address delete {UNOWNED}/32 dev lo")

    def revocation(self):
        """One pin less: whose it was comes in no more, by no handshake and no ticket, and what it had is cut; that alone."""
        own = question((self.host, LISTEN), self.revoked.pem, session="revoked")
        kept = {
            "another peer's": question((self.host, LISTEN), self.right.pem),
            "a namesake's, of another tunnel": question((self.host, OPEN), self.namesake.pem),
        }
        resumed = {}
        self.works(self.tenant, {**self.tenants_own(), "hold": "the tenant's"})
        for vantage, agent in self.vantages.items():
            self.works(agent, own)
            resumed[vantage] = self.works(agent, own)["resumed"]
            self.works(agent, {**own, "hold": "revoked"})
            for name, one in kept.items():
                self.works(agent, {**one, "hold": name})
        self.allow(self.right, self.expired)
        self.world.here.apply()
        self.works(self.tenant, {**self.tenants_own(), "held": "the tenant's"})
        for vantage, agent in self.vantages.items():
            for name, one in kept.items():
                self.works(agent, {**one, "held": name})
            self.refused(f"{vantage}: revoked, a session that it had", agent, {**own, "held": "revoked"}, 1)
            self.refused(f"{vantage}: revoked, by resumption", agent, own)
            self.refused(f"{vantage}: revoked", agent, {**own, "session": None})
        print(f"before it was revoked, TLS sessions were resumed: {resumed}")


def test_nobody_comes_in_who_may_not():
    with standing("IPv6") as world:
        matrix = Matrix(world)
        matrix.certificates()
        matrix.manners()
        matrix.around()
        matrix.revocation()
        print(f"refusals of a server's end, judged by the service behind it:\n{matrix.tally}")
        assert sum(matrix.tally.accepted.values()) == 0
        assert matrix.tally.passed == matrix.tally.rightful


# --- the other way round --------------------------------------------------------------------------------------------------

_FIRST_PORT = 7000
_OLD = {"TLS 1.2": ("TLSv1_2", "TLSv1_2"), "TLS 1.1": ("TLSv1_1", "TLSv1_1")}


class Impostors:
    """What a client's end meets at the address where its server should be: each a program on the wire, at a port of its own."""

    def __init__(self, world, marker):
        self.world, self.marker = world, marker
        self.ports = iter(range(_FIRST_PORT, _FIRST_PORT + 100))
        self.ends = {}

    def add(self, name, pinned, **shown):
        """Declare a tunnel that expects ``pinned``, and let what is shown there listen."""
        port, gateway = next(self.ports), self.world.sides[0].gateway
        options = {"host": gateway, "port": port, "needle": self.marker.hex(), **shown}
        self.world.here.reach("slappart1", f"to-{port}", port, (gateway, port), pinned.pin)
        self.ends[name] = port, self.world.on_the_wire("service", options)

    def heard(self, agent, name):
        """What an impostor learns of what the tenant says to its end of the tunnel."""
        port, service = self.ends[name]
        to = [self.world.here.private("slappart1"), port]
        before = service.ask()["needles"]
        answers = agent.ask([{"to": to, "send": self.marker.hex()}] * ROUNDS)
        return max(service.ask()["needles"] - before, sum(one["echo"] for one in answers))


@pytest.fixture
def impostors():
    with standing("IPv6") as world:
        yield Impostors(world, secrets.token_bytes(32))


def test_a_client_says_nothing_to_an_impostor(impostors):
    here = impostors.world.here
    server, expired = tunnel_identities.new("server"), tunnel_identities.expired("expired")
    revoked = tunnel_identities.new("revoked")
    shown = {
        "wrong pin": tunnel_identities.new("stranger"),
        "same subject, another key": tunnel_identities.same_subject(server),
        "look-alike": tunnel_identities.look_alike(server),
        "issued by the pinned one": tunnel_identities.issued_by(server, "issued"),
    }
    impostors.add("the server itself", server, certificate=server.pem)
    for name, pair in shown.items():
        impostors.add(name, server, certificate=pair.pem)
        impostors.add(f"control of {name}", pair, certificate=pair.pem)
    impostors.add("expired", expired, certificate=expired.pem)
    for name, versions in _OLD.items():
        impostors.add(name, server, certificate=server.pem, versions=versions)
    impostors.add("plaintext", server)
    impostors.add("revoked", revoked, certificate=revoked.pem)
    here.apply()
    agent = here.agent("slappart1", "probe")
    good = {"the server itself", "revoked", *(f"control of {name}" for name in shown)}
    assert {name: impostors.heard(agent, name) for name in good} == dict.fromkeys(good, ROUNDS)
    # those of old versions and without TLS do serve who asks them like that
    wire = impostors.world.on_the_wire("probe")
    for name, version in (
        ("TLS 1.2", "TLSv1_2"),
        ("TLS 1.1", "TLSv1_1"),
        ("plaintext", None),
        ("expired", "TLSv1_3"),
    ):
        to = (impostors.world.sides[0].gateway, impostors.ends[name][0])
        (answer,) = wire.ask([question(to, version=version)])
        assert answer["echo"], (name, answer)

    port = impostors.ends["revoked"][0]
    here.reach("slappart1", f"to-{port}", port, (impostors.world.sides[0].gateway, port), server.pin)
    here.apply()
    bad = [name for name in impostors.ends if name not in good or name == "revoked"]
    heard = {name: impostors.heard(agent, name) for name in bad}
    print("\n".join(f"  {count:4} of {ROUNDS:4}  impostor: {name}" for name, count in heard.items()))
    assert heard == dict.fromkeys(bad, 0)
    assert impostors.heard(agent, "the server itself") == ROUNDS
