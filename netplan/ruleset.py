"""A part of the packet filter, before it becomes text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Interface, IPv6Network
from socket import AF_INET, AF_INET6, inet_ntop


@dataclass(frozen=True, slots=True)
class Part:
    """Sets and maps with their grammar, their elements, counters, chains with their rules, hooks of the base
    chains, named limits.

    ``hooks`` has for a base chain what follows ``type filter hook``.  A chain stands before those that jump
    to it.  Of ``sets``, the kernel fills those that are ``dynamic`` itself.
    """

    sets: Mapping[str, str]
    maps: Mapping[str, str]
    elements: Mapping[str, Sequence[str]]
    counters: Sequence[str]
    chains: Mapping[str, Sequence[str]]
    hooks: Mapping[str, str]
    family: str = "inet"
    dynamic: frozenset[str] = frozenset()
    limits: Sequence[str] = ()


REFUSED = "refused_"
"""What the names of the sets that count refusals start with; the rule follows.  Their elements are users
(``uid``) or taps (``ifname``), each with a counter, and the kernel adds them.
"""


def refused(rule: str) -> str:
    """Return the name of the set that counts what a rule refuses."""
    return REFUSED + rule


def text(address: IPv4Address | IPv6Interface | IPv6Network) -> str:
    """Return an address (of an interface: without its prefix length) or network for nft.

    The text of ``ipaddress`` says the same, but costs ten times as much, and a filter names each address 20
    times.
    """
    if isinstance(address, IPv6Network):
        return f"{inet_ntop(AF_INET6, address.network_address.packed)}/{address.prefixlen}"
    return inet_ntop(AF_INET if isinstance(address, IPv4Address) else AF_INET6, address.packed)
