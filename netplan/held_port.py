"""A TCP port of the loopback at which one user alone may answer: a part of the packet filter.  Pure.

Whoever binds first has a port of 127.0.0.1, and a service that the whole node asks there may be away for a moment: whoever
took its place would be believed.  So what another user's socket sends from that port is dropped, the SYN-ACK first, and
nobody gets a connection.  Likewise at ::1, where whoever asks for ``localhost`` looks first.  The match is by who opened the
socket, which the kernel also knows of a SYN-ACK, by its listener (``skb_to_full_sk``, include/net/inet_sock.h).
Root may answer: tests and operators look for themselves.
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address

from netplan.model import HeldPort
from netplan.ruleset import Part

ADDRESSES = (IPv4Address("127.0.0.1"), IPv6Address("::1"))
_DENY = "deny_held"


def held_ports() -> Part:
    """Return the chain that refuses who answers in another's place."""
    return Part(
        sets={},
        maps={},
        elements={},
        counters=(),
        chains={_DENY: ("meta l4proto tcp reject with tcp reset", "drop")},
        hooks={},
    )


def ways(held: Sequence[HeldPort]) -> tuple[str, ...]:
    """Return the rules that lead there, for each port one of each family."""
    return tuple(
        f"{family} saddr {address} tcp sport {one.port} meta skuid != {{ {users} }} goto {_DENY}"
        for one in held
        for users in [", ".join(map(str, sorted({0, one.uid})))]
        for family, address in zip(("ip", "ip6"), ADDRESSES, strict=True)
    )
