"""A TCP port of the node that the users of partitions cannot reach: a part of the packet filter.  Pure.

The match is by who opened the socket, on output, which is where packets over ``lo`` pass, too.  Who is kept out is refused
at once, and counted like other refusals.  The rule stands before those of ownership, at the head of the first chain, and
works without them.
"""

from collections.abc import Sequence

from netplan.model import ClosedPort, PartitionNetwork
from netplan.ruleset import Part, refused

RULE = "metrics"
"""What refusals are counted as."""

_MOST = 65536


def closed_port(partitions: Sequence[PartitionNetwork]) -> Part:
    """Return the set of users who are kept out, and the chain that refuses them."""
    return Part(
        sets={"kept_out": "type uid", refused(RULE): f"type uid; size {_MOST}; flags dynamic"},
        maps={},
        elements={"kept_out": [str(one.uid) for one in partitions]},
        counters=(),
        chains={
            f"deny_{RULE}": (
                f"add @{refused(RULE)} {{ meta skuid counter }}",
                "meta l4proto tcp reject with tcp reset",  # else connect(2) would wait
                "drop",
            )
        },
        hooks={},
    )


def way(closed: ClosedPort) -> str:
    """Return the rule that leads there; the cheapest match first, since all packets meet it."""
    end = f"tcp dport {closed.port} meta skuid @kept_out goto deny_{RULE}"
    version = "ip" if closed.address.version == 4 else "ip6"
    if closed.address.is_unspecified:
        return f"meta nfproto ipv{closed.address.version} fib daddr type local {end}"
    return f"{version} daddr {closed.address} {end}"
