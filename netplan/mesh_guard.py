"""What may leave a node by the mesh, and enter by it: a part of the packet filter.  Pure.

tinc hands on whatever a node sends: it looks where a packet goes, not where it comes from.  So each node holds
itself to its own part of the network:

- out: by the interface of the mesh go sources of the node's own part to the rest of the network, and nothing else;
- in: by it come sources of the rest of the network to the node's own part, and nothing else;
- elsewhere: by any other interface but ``lo`` nothing goes to or comes from an address of the network.  When the
  tun is gone, nothing leaves in the clear, and nobody on the LAN speaks for another node;
- tincd's own port: the mesh is not carried by the mesh.  Any member can announce an address of the network as that of a
  node (``ADD_EDGE``), or connect to it there; what is sent to it would come back out of the tun, to be sent once more;
- no IPv6, and nothing is forwarded to the mesh or from it.

These rules do not ask who sends, so what the kernel itself sends (RST, ICMP errors) meets them as well; whose socket
may have which source is the affair of :mod:`netplan.ownership`, which comes behind.  What one end cannot see is which
node a packet came from: a source of the rest of the network may be any other node's.

What comes is looked at in prerouting: a packet for an address that is not here never meets input, and one with a source that is
here is dropped by the kernel before that (net/ipv4/fib_frontend.c, fib_validate_source), uncounted.
"""

from collections.abc import Sequence
from typing import NamedTuple

from netplan.model import MeshSpec
from netplan.ruleset import Part, refused

RULE = "mesh"
"""What is refused to a user is counted as."""

COUNTED = "mesh"
"""What the names of the counters of all that is dropped start with; direction and reason follow, ``mesh/in/source``."""

_REASONS = {
    "out": ("source", "destination", "port", "elsewhere", "ipv6"),
    "in": ("source", "destination", "port", "elsewhere", "ipv6"),
    "forward": ("any",),
}
_MOST_USERS = 65536
_HOOKS = {
    # behind the guards of taps and the limits, before connection tracking
    "mesh_entering": "prerouting priority -308",
    "mesh_forwarded": "forward priority filter",
}


class Verdict(NamedTuple):
    """Why the mesh's rules drop something: the direction (``out``, ``in``, ``forward``), and what was wrong: the
    ``source``, the ``destination``, the ``port``, which is tincd's, an interface that is not the mesh's (``elsewhere``),
    ``ipv6``; of forwarding ``any``.
    """

    direction: str
    reason: str


VERDICTS = tuple(Verdict(direction, reason) for direction, reasons in _REASONS.items() for reason in reasons)


def counter(direction: str, reason: str) -> str:
    """Return the name of a counter."""
    return f"{COUNTED}/{direction}/{reason}"


def parse(name: str) -> Verdict | None:
    """Read such a name; None where it is none of ours."""
    head, _, rest = name.partition("/")
    found = Verdict(*rest.split("/")) if head == COUNTED and rest.count("/") == 1 else None
    return found if found in VERDICTS else None


def ways_out(mesh: MeshSpec) -> tuple[str, ...]:
    """Return the rules that stand on output before those of ownership: all packets meet them."""
    elsewhere = "oif != 1 goto mesh_elsewhere"  # lo is interface 1 of every network namespace
    return (
        *(() if mesh.taken else (f'oifname "{mesh.interface}" goto mesh_out',)),
        f"ip saddr {mesh.network} {elsewhere}",
        f"ip daddr {mesh.network} {elsewhere}",
    )


def mesh_guard(mesh: MeshSpec, behind: str) -> Part:
    """Return the chains that hold the node to its own part of the network; what may leave goes on to the chain
    ``behind``.
    """
    return Part(
        sets={refused(RULE): f"type uid; size {_MOST_USERS}; flags dynamic"},
        maps={},
        elements={},
        counters=[counter(*one) for one in VERDICTS],
        chains=_chains(mesh, behind),
        hooks=_HOOKS,
        dynamic=frozenset((refused(RULE),)),
    )


def _chains(mesh: MeshSpec, behind: str) -> dict[str, Sequence[str]]:
    link, network, own = f'"{mesh.interface}"', mesh.network, mesh.own

    def drop(direction: str, reason: str) -> str:
        return f"counter name {counter(direction, reason)} drop"

    def deny(reason: str) -> str:
        return f"counter name {counter('out', reason)} goto mesh_deny"

    deny_tcp = "meta l4proto tcp fib saddr type local reject with tcp reset"  # else connect(2) would wait
    chains: dict[str, Sequence[str]] = {
        "mesh_deny": (f"add @{refused(RULE)} {{ meta skuid counter }}", deny_tcp, "drop"),
        "mesh_elsewhere": (deny("elsewhere"),),
    }
    if not mesh.taken:
        chains["mesh_out"] = (
            f"meta nfproto ipv6 {drop('out', 'ipv6')}",
            f"ip saddr != {own} {deny('source')}",
            f"ip daddr {own} {deny('destination')}",
            f"ip daddr != {network} {deny('destination')}",
            f"udp sport {mesh.port} {deny('port')}",
            f"goto {behind}",
        )
        chains["mesh_in"] = (
            f"meta nfproto ipv6 {drop('in', 'ipv6')}",
            f"ip saddr {own} {drop('in', 'source')}",
            f"ip saddr != {network} {drop('in', 'source')}",
            f"ip daddr != {own} {drop('in', 'destination')}",
            f"udp dport {mesh.port} {drop('in', 'port')}",
            f"tcp dport {mesh.port} tcp flags & (fin | syn | rst | ack) == syn {drop('in', 'port')}",
        )
    chains["mesh_entering"] = (
        *(() if mesh.taken else (f"iifname {link} goto mesh_in",)),
        f"ip saddr {network} iif != 1 {drop('in', 'elsewhere')}",
        f"ip daddr {network} iif != 1 {drop('in', 'elsewhere')}",
    )
    chains["mesh_forwarded"] = (
        *(() if mesh.taken else (f"{end} {link} {drop('forward', 'any')}" for end in ("iifname", "oifname"))),
        # a DNAT may have given it such a destination since it came
        f"ip daddr {network} {drop('forward', 'any')}",
    )
    return chains
