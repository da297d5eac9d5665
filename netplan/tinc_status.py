"""What tincd 1.0.36 says of itself, read: the dump that SIGUSR2 asks for, and lines of its log worth telling; pure.

The lines are those of ``dump_nodes`` (node.c), ``dump_subnets`` (subnet.c) and of the calls of ``logger`` in protocol*.c and
net*.c. They bear no time where tincd writes to its standard error, so what is over is told by what comes after it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

DUMP_BEGINS, DUMP_ENDS = "Nodes:", "End of subnet list."
READY = "Ready"
STARTING = re.compile(r"tincd \S+ starting, debug level \d+")

_REACHABLE = 1 << 4  # node_status_t in node.h: active, validkey, waitingforkey, visited, reachable
_NODE = re.compile(
    r" (\S+) at (.+) cipher -?\d+ digest -?\d+ maclength -?\d+ compression -?\d+ options [0-9a-f]+ status ([0-9a-f]+)"
    r" nexthop (\S+) via (\S+) pmtu (\d+) \(min (\d+) max \d+\)"
)
_SUBNET = re.compile(r" (\S+) owner (\S+)")
_UNKNOWN = ("MYSELF", "(null)", "unknown port unknown")


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node as tincd knows it. ``address`` is where its packets go (``192.0.2.2 port 655``), None where that is not known.

    ``nexthop`` is the node that its control connection leads by, ``via`` the one that its packets are sent to, both None for
    one that cannot be reached; ``direct``: packets go to it by UDP. ``mtu`` is what is known to pass at once.
    """

    name: str
    reachable: bool
    address: str | None
    nexthop: str | None
    via: str | None
    mtu: int
    direct: bool


def read_dump(text: str) -> tuple[dict[str, NodeState], dict[str, tuple[str, ...]]] | None:
    """Read the last whole dump in a log: nodes by name, and the ranges of each; None where there is none."""
    end = text.rfind(f"\n{DUMP_ENDS}\n")
    begin = text.rfind(f"{DUMP_BEGINS}\n", 0, max(end, 0))
    if end < 0 or begin < 0:
        return None
    nodes: dict[str, NodeState] = {}
    subnets: dict[str, tuple[str, ...]] = {}
    for line in text[begin:end].split("\n"):
        if found := _NODE.fullmatch(line):
            nodes[found[1]] = _node(found)
        elif found := _SUBNET.fullmatch(line):
            subnets[found[2]] = (*subnets.get(found[2], ()), found[1].partition("#")[0])
    return nodes, subnets


def _node(found: re.Match[str]) -> NodeState:
    name, address, status, nexthop, via, mtu, least = found.groups()
    reachable = bool(int(status, 16) & _REACHABLE)
    return NodeState(
        name=name,
        reachable=reachable,
        address=None if address in _UNKNOWN else address,
        nexthop=nexthop if reachable and nexthop != "-" else None,
        via=via if reachable and via != "-" else None,
        mtu=int(mtu),
        direct=reachable and via == name and int(least) > 0,
    )


# --- lines worth telling --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that went wrong, in words. ``peer`` is the name that it is about, "" for this node; ``kind`` is a stable word:

    ``identity`` (somebody of a name that has no host block here, or that is this node's), ``key`` (a key that does not match),
    ``range`` (a range that no host block allows; ``subject`` is which), ``same_name`` (of somebody with the same key, too),
    ``unreachable``, ``own`` (of this node's tincd itself).
    """

    kind: str
    peer: str
    words: str
    subject: str = ""


# what somebody may say as many of as it likes: names, without having a key, and ranges
_MOST_SAID = 20
_TURNS = 4
_PLACE = r"(?P<place>\S+ port \S+)"
_RULES = (
    (
        "range",
        re.compile(
            rf"Ignoring unauthorized ADD_SUBNET from (?P<peer>\S+) \({_PLACE}\): (?P<subject>[^#\s]+)(?:#\d+)?"
        ),
        "passes on the range {subject}, which no host block here gives to anybody: nothing is sent there",
    ),
    (
        "identity",
        re.compile(rf"Peer {_PLACE} had unknown identity \((?P<peer>\S+)\)"),
        "connects from {place}, and no host block of it is imported here",
    ),
    (
        "key",
        re.compile(rf"Possible intruder (?P<peer>\S+) \({_PLACE}\): (?P<subject>.+)"),
        "does not have the key of its host block ({subject}, at {place})",
    ),
    (
        "key",
        re.compile(
            rf"(?:Bogus data received from|Error during \w+ of meta key for) (?P<peer>\S+) \({_PLACE}\).*"
        ),
        "does not understand what was encrypted for the key of its host block, or has another key of this node (at {place})",
    ),
    ("key", re.compile(r"No public key for (?P<peer>\S+) specified!"), "has no key in its host block"),
    (
        # said by anybody who reaches the port, without a proof
        "identity",
        re.compile(rf"Got bad ID from \S+ \({_PLACE}\): invalid name"),
        "somebody at {place} says that it has the name of this node, or one that is no name",
    ),
    (
        "same_name",
        re.compile(r"Possible node with same Name as us! Sleeping \d+ seconds\."),
        "another node of the mesh has the name of this node: both lose their connections again and again",
    ),
    (
        "identity",
        re.compile(rf"Peer {_PLACE} is (?P<subject>\S+) instead of (?P<peer>\S+)"),
        "at {place} there is {subject} instead",
    ),
    (
        "unreachable",
        re.compile(rf"Timeout from (?P<peer>\S+) \({_PLACE}\) during authentication"),
        "does not answer at {place}",
    ),
    (
        "unreachable",
        re.compile(rf"Error while connecting to (?P<peer>\S+) \({_PLACE}\): (?P<subject>.+)"),
        "cannot be reached at {place}: {subject}",
    ),
    (
        "unreachable",
        re.compile(rf"(?P<peer>\S+) \({_PLACE}\) didn't respond to PING in \d+ seconds"),
        "stopped answering at {place}",
    ),
    (
        "unreachable",
        re.compile(r"Error looking up (?P<peer>)(?P<place>\S+) port \S+: (?P<subject>.+)"),
        "{place} cannot be looked up: {subject}",
    ),
    (
        "own",
        re.compile(
            r"(?P<subject>Can't bind to .+|Unable to create any listening socket!|Could not open .+|Error reading RSA .+"
            r"|Reading RSA private .+|Error while trying to configure .+|Error while reading from .+|unknown user .+"
            r"|Too many errors from .+|.+ is already running.*|Unable to reread configuration .+)"
        ),
        "{subject}",
    ),
)
_TRYING = re.compile(rf"Trying to connect to (?P<peer>\S+) \({_PLACE}\)")
_FAILED = re.compile(rf"{_PLACE}: (?P<subject>.+)")
_TALKS = re.compile(rf"Connected to \S+ \({_PLACE}\)|Connection from (?P<from>\S+ port \S+)")
_SILENT = re.compile(rf"Timeout from (?P<peer>[A-Za-z0-9_]+) \({_PLACE}\) during authentication")
_ACTIVATED = re.compile(r"Connection with (?P<peer>\S+) \((?P<host>\S+) port \S+\) activated")
_SECOND = re.compile(r"Established a second connection with (?P<peer>\S+) \(.+")
_CLOSED = re.compile(r"Closing connection with (?P<peer>\S+) \(.+\)")


def problems(lines: Iterable[str]) -> tuple[Problem, ...]:
    """What stands open at the end of a log, each once, the latest at the end.

    What is wrong with a peer is over when a connection with it is made (it then says its ranges again), a range that it says
    when that connection ends, all when tincd begins anew.
    """
    found: dict[tuple[str, str, str], Problem] = {}
    trying: dict[str, str] = {}
    talking: set[str] = set()
    turns = _Turns()
    for line in lines:
        if STARTING.fullmatch(line):
            found.clear()
        elif second := _SECOND.fullmatch(line):
            turns.taken_over.add(second["peer"])
        elif made := _ACTIVATED.fullmatch(line):
            found = {key: one for key, one in found.items() if one.peer != made["peer"]}
            if words := turns.come(made["peer"], made["host"]):
                _note(found, Problem("same_name", made["peer"], words))
        elif closed := _CLOSED.fullmatch(line):
            found = {
                key: one for key, one in found.items() if (one.kind, one.peer) != ("range", closed["peer"])
            }
        elif tried := _TRYING.fullmatch(line):
            trying[tried["place"]] = tried["peer"]
            talking.discard(tried["place"])
        elif talks := _TALKS.fullmatch(line):
            talking.add(talks["place"] or talks["from"])
        elif (silent := _SILENT.fullmatch(line)) and silent["place"] in talking:
            # by a key that is not its own it cannot even read that it is asked; at its end the data is bogus
            words = f"begins to talk at {silent['place']} and does not end it: it has another key than its host block says"
            _note(found, Problem("key", silent["peer"], f"{words}, or no right host block of this node"))
        elif (failed := _FAILED.fullmatch(line)) and failed["place"] in trying:
            words = f"cannot be reached at {failed['place']}: {failed['subject']}"
            _note(found, Problem("unreachable", trying[failed["place"]], words))
        elif (problem := _read(line)) is not None:
            _note(found, problem)
    return tuple(found.values())


class _Turns:
    """From where the connections with each peer came that took the place of one that stood.

    Once that is nothing: both ends connect, or an address changed. Two places in turn are two nodes of one name and key.
    """

    def __init__(self) -> None:
        self.taken_over: set[str] = set()
        self._hosts: dict[str, tuple[str, ...]] = {}

    def come(self, peer: str, host: str) -> str:
        """Hear of a connection that is made; what is wrong, in words."""
        before = self._hosts.get(peer, ()) if peer in self.taken_over else ()
        self.taken_over.discard(peer)
        hosts = self._hosts[peer] = (*before, host)[-_TURNS:]
        if len(hosts) < _TURNS or hosts[:2] != hosts[2:] or hosts[0] == hosts[1]:
            return ""
        return (
            f"connects from {min(hosts)} and {max(hosts)} in turn, each of which takes the other's connection away:"
            " two nodes have its name and key"
        )


def _note(found: dict[tuple[str, str, str], Problem], problem: Problem) -> None:
    key = (problem.kind, problem.peer, problem.subject if problem.kind == "range" else "")
    found.pop(key, None)
    found[key] = problem
    if problem.kind in ("identity", "range"):
        like = [
            one
            for one in found
            if one[0] == problem.kind and (problem.kind == "identity" or one[1] == problem.peer)
        ]
        if len(like) > _MOST_SAID:
            del found[like[0]]


def _read(line: str) -> Problem | None:
    for kind, pattern, words in _RULES:
        if found := pattern.fullmatch(line):
            values = found.groupdict()
            return Problem(
                kind, values.get("peer") or "", words.format(**values), values.get("subject") or ""
            )
    return None
