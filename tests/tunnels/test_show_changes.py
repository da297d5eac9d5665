"""Changes without harm: tunnels come, go, are pinned anew and spoiled beside sessions that no change is about."""

import contextlib
import random
import secrets
import time
from collections import Counter

import pytest
import tunnel_identities
from tunnel_load import SERVICE, STEADY, Load, declare, stunnels
from tunnel_node import Daemon, Node

SEED = 5
FIRST_PORT = 4100
CHANGED = ("slappart0", "slappart1", "slappart2")
SQUATTER = "slappart3"


class Changes:
    """Changes by chance, each followed by ``apply``; and what each tunnel should be after it."""

    def __init__(self, node, seed):
        self.node, self.dice = node, random.Random(seed)  # noqa: S311 - to be repeated
        self.identities = [tunnel_identities.new(f"peer{number}") for number in range(5)]
        self.ports = iter(range(FIRST_PORT, FIRST_PORT + 1000))
        self.states = {}  # what is expected, by public name
        self.pins, self.squatters, self.damaged = {}, {}, set()
        self.strangers = node.agent(SQUATTER, "probe")
        self.done, self.seconds = Counter(), 0.0

    # --- one change: each returns the port of a server's end that is up now, or None

    def add(self):
        """A tunnel more, of either mode."""
        partition, port = self.dice.choice(CHANGED), next(self.ports)
        if self.dice.random() < 0.5:
            return self.serve(partition, port, self.dice.sample(self.identities, self.dice.randint(1, 3)))
        server, listen, _, _ = STEADY[0]
        self.node.reach(
            partition, f"c{port}", port, (self.node.public(server), listen), self.node.pin(server)
        )
        self.states[f"{partition}/c{port}"] = "up"
        return None

    def serve(self, partition, port, pins, *, state="up"):
        self.node.serve(partition, f"c{port}", port, self.service(partition), [pin.pin for pin in pins])
        self.pins[partition, port] = list(pins)
        self.states[f"{partition}/c{port}"] = state
        return (partition, port) if state == "up" else None

    @staticmethod
    def service(partition):
        """The port of the service that its tunnels lead to; slappart1 has none."""
        return SERVICE if partition in {row[0] for row in STEADY} else SERVICE + 1

    def remove(self):
        """A tunnel less."""
        names = [name for name in self.states if name not in self.squatters]
        if not names:
            return self.add()
        name = self.dice.choice(names)
        partition, _, short = name.partition("/")
        self.node.withdraw(partition, short)
        del self.states[name]
        self.pins.pop((partition, int(short[1:])), None)
        self.damaged.discard(name)
        return None

    def served(self):
        """A server's end that is up and says itself whom it allows."""
        ends = [one for one in self.pins if self.states[f"{one[0]}/c{one[1]}"] == "up"]
        return self.dice.choice(ends) if ends else None

    def repin(self):
        """A certificate more or less; with none left nobody may connect, and the tunnel is down."""
        if (end := self.served()) is None:
            return self.add()
        pins = [*self.pins[end]]
        others = [one for one in self.identities if one not in pins]
        if others and self.dice.random() < 0.5:
            pins.append(self.dice.choice(others))
        else:
            pins.remove(self.dice.choice(pins))
        return self.serve(*end, pins, state="up" if pins else "down")

    def rotate(self):
        """A peer shows another certificate from now on: the old one is let in no more."""
        if (end := self.served()) is None:
            return self.add()
        old = self.dice.choice(self.pins[end])
        new = self.dice.choice([one for one in self.identities if one is not old])
        pins = dict.fromkeys(new if one is old else one for one in self.pins[end])
        return self.serve(*end, pins)

    def spoil(self):
        """A declaration that says nothing, of a new tunnel or of one that was good."""
        ports = [port for partition, port in self.pins if partition == "slappart0"]
        port = self.dice.choice([next(self.ports), *ports])
        if (taken := f"slappart0/c{port}") in self.squatters:
            return self.add()
        line = self.dice.choice(["listen = 99999", "listen = 80", "allow = cert:AAAA", "color = blue"])
        self.node.declare("slappart0", f"c{port}", f"mode = server\nconnect = 1\n{line}\n")
        self.pins.pop(("slappart0", port), None)
        self.states[taken] = "refused"
        return None

    def take_port(self):
        """Another tenant has the port that a new tunnel asks for, or gives it back."""
        if self.squatters and self.dice.random() < 0.5:
            name = self.dice.choice(list(self.squatters))
            self.squatters.pop(name).close()
            self.states[name] = "up"
            partition, _, short = name.partition("/")
            return partition, int(short[1:])
        partition, port = self.dice.choice(CHANGED), next(self.ports)
        squatter = self.node.service(SQUATTER, "::", port)
        self.squatters[f"{partition}/c{port}"] = squatter
        return self.serve(partition, port, self.identities[:1], state="down")

    def damage(self):
        """A file of pins is damaged, or mended."""
        if self.damaged and self.dice.random() < 0.5:
            name = self.dice.choice(sorted(self.damaged))
            self.damaged.discard(name)
            self.states[name] = "up"
        else:
            port = next(self.ports)
            name = f"slappart0/c{port}"
            self.node.serve("slappart0", f"c{port}", port, SERVICE, [f"file:pins/{port}.pem"])
            self.damaged.add(name)
            self.states[name] = "refused"
        port = int(name.rpartition("/c")[2])
        text = self.identities[0].pem if self.states[name] == "up" else "-----BEGIN CERTIFICATE-----\nno\n"
        self.node.write("slappart0", f"pins/{port}.pem", text)

    # --- all of them

    def one(self):
        kinds = (self.add, self.remove, self.repin, self.rotate, self.spoil, self.take_port, self.damage)
        kind = self.dice.choice(kinds)
        end = kind()
        self.done[kind.__name__] += 1
        began = time.monotonic()
        # what is down for want of a peer is no mistake of anybody's
        told = {name for name, state in self.states.items() if state == "refused" or name in self.squatters}
        self.node.apply(refused=told)
        self.seconds += time.monotonic() - began
        if end is not None:
            self.answers(*end)

    def answers(self, partition, port):
        """A server's end lets in whom it allows, and nobody else."""
        if self.service(partition) != SERVICE:
            return
        allowed = self.pins[partition, port]
        for identity in self.identities:
            question = {"to": [self.node.public(partition), port], "send": secrets.token_hex(8)}
            (answer,) = self.strangers.ask([{**question, "tls": "TLSv1_3", "certificate": identity.pem}])
            assert answer["echo"] == (identity in allowed), (partition, port, answer)

    def as_told(self):
        listed = self.node.tunnels()
        assert {name: listed[name]["state"] for name in self.states} == self.states
        steady = {name: row["state"] for name, row in listed.items() if "/steady-" in name}
        assert steady == dict.fromkeys(steady, "up")
        assert len(listed) == len(self.states) + len(steady) == len(self.states) + 2 * len(STEADY)


def full(*values):
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("count", "sessions", "daemon"), [(30, 20, False), full(100, 50, False), full(100, 50, True)]
)
def test_changes_break_no_session_that_they_are_not_about(bridge, node_config, count, sessions, daemon):
    node = Node(node_config(4).path)
    with contextlib.closing(node):
        node.apply()
        declare(node)
        with contextlib.closing(Daemon(node)) if daemon else contextlib.nullcontext():
            go_through(node, count, sessions)


def go_through(node, count, sessions):
    changes, before = Changes(node, SEED), stunnels(node)
    assert {name: len(pids) for name, pids in before.items()} == dict.fromkeys(CHANGED, 1)
    load = Load(node, sessions)
    longest = exchanged = 0
    for number in range(1, count + 1):
        changes.one()
        if number % 5 == 0:
            changes.as_told()
        for seen in load.seen().values():
            assert not seen["broken"], (changes.done, seen)
            longest, exchanged = max(longest, seen["longest"]), exchanged + seen["exchanged"]
    changes.as_told()
    last = load.for_a_while()
    assert sum(seen["running"] for seen in last.values()) == sessions
    assert not any(seen["broken"] for seen in last.values())
    assert stunnels(node) == before
    print(
        f"{count} changes (seed {SEED}: {dict(changes.done)}), {changes.seconds / count:.2f} s each; {sessions} sessions:"
        f" 0 broken, {exchanged} exchanges of 4 KiB verified, the longest took {longest * 1000:.0f} ms"
    )
