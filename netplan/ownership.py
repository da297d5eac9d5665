"""Who may use which address: the ownership part of the packet filter.  Pure.

A packet with a partition's address as its source leaves only from a socket of that partition's user, or of
root.  Private IPv4 is reached by its owner and root alone.  A user who is not root sends only from addresses
that the host has: IPV6_FREEBIND needs no privilege, and ``ip_nonlocal_bind``, which ranges need, opens every
address of the world to everybody.

The first rule that a partition's own packet meets sends it on to the meters: one look-up in a hash.  ``meta skuid`` is the
user who opened the socket (nft(8)); where a packet has no socket (RST, ICMP error, TIME_WAIT) it breaks off
the rule, so what the kernel itself sends passes.  Checked with 144 cases in facts/probes.md, section 6.
"""

from collections.abc import Sequence
from ipaddress import IPv6Network, collapse_addresses
from typing import NamedTuple

from netplan import metering
from netplan.model import PartitionNetwork
from netplan.once import once, once_each
from netplan.ruleset import Part, refused, text

RULES = ("address", "private", "foreign")
"""What a refusal is for: another's address or range as the source; another's private IPv4; a source that the
host does not have.
"""

_MOST_REFUSED = 65536
"""Users, more than a machine has numbers in use: who comes after so many is refused, and not counted."""

_HOOKS = {
    "out": f"output {metering.OUT}",
    "in": f"input {metering.IN}",
    "forwarded": "forward priority filter",
}


def ownership(partitions: Sequence[PartitionNetwork], first: Sequence[str] = ()) -> Part:
    """Return the sets and chains that hold each address to its partition's user; on output, rules ``first`` come
    before them.
    """
    texts = [_texts(one) for one in partitions]
    six = [pair for one in texts for pair in one.six]
    four = [pair for one in texts for pair in one.four]
    world4 = [pair for one in texts for pair in one.world4]
    ranges = [pair for one in texts for pair in one.ranges]
    sets = {
        "address6": "type ipv6_addr",
        "owner6": "type uid . ipv6_addr",
        "self6": "type ipv6_addr . ipv6_addr",
        "private4": "type ipv4_addr",
        "owner4": "type uid . ipv4_addr",
        **{refused(rule): f"type uid; size {_MOST_REFUSED}; flags dynamic" for rule in RULES},
    }
    elements = {
        "address6": [address for _, address in six],
        "owner6": [f"{uid} . {address}" for uid, address in six],
        "self6": [f"{address} . {address}" for _, address in six],
        "private4": [address for _, address in four],
        "owner4": [f"{uid} . {address}" for uid, address in (*four, *world4)],
    }
    if ranges:
        sets |= {
            "range6": "type ipv6_addr; flags interval",
            "range_owner6": "type uid . ipv6_addr; flags interval",
        }
        # neighbours together: to find that a source is in none of them is what most packets cost
        elements["range6"] = [text(one) for one in _together(partitions)]
        elements["range_owner6"] = [f"{uid} . {network}" for uid, network in ranges]
    if world4:
        sets |= {"address4": "type ipv4_addr", "self4": "type ipv4_addr . ipv4_addr"}
        elements["address4"] = [address for _, address in world4]
        elements["self4"] = [f"{address} . {address}" for _, address in world4]
    counters = ["spoofed_in", "private_in"]
    chains = _chains(ranges=bool(ranges), world4=bool(world4))
    chains["out"] = (*first, *chains["out"])
    return Part(sets, {}, elements, counters, chains, _HOOKS)


def _count(rule: str) -> str:
    """Return what counts a refusal by who tried: there is a counter for those who ever did, and no other."""
    return f"add @{refused(rule)} {{ meta skuid counter }}"


@once
def _together(partitions: Sequence[PartitionNetwork]) -> list[IPv6Network]:
    return list(collapse_addresses(one.ipv6_range for one in partitions if one.ipv6_range))


class _Texts(NamedTuple):
    """What a partition has, as nft writes it, each with its user's number."""

    six: list[tuple[int, str]]
    four: list[tuple[int, str]]
    world4: list[tuple[int, str]]
    ranges: list[tuple[int, str]]


@once_each
def _texts(one: PartitionNetwork) -> _Texts:
    return _Texts(
        six=[(one.uid, text(address)) for address in one.reached_ipv6],
        four=[(one.uid, text(one.ipv4))] if one.ipv4 else [],
        world4=[(one.uid, text(address)) for address in one.reached_ipv4],
        ranges=[(one.uid, text(one.ipv6_range))] if one.ipv6_range else [],
    )


def _chains(*, ranges: bool, world4: bool) -> dict[str, tuple[str, ...]]:
    """Return the chains; without ranges, or IPv4 addresses that the world reaches, they do without the look-ups
    for them.

    What passes goes on to the meters: a base chain of their own would cost each packet as much as two look-ups.
    """
    spoofed6 = ["ip6 saddr @address6 counter name spoofed_in drop"]
    if ranges:
        spoofed6.append("ip6 saddr @range6 counter name spoofed_in drop")
    spoofed4 = ["ip saddr @address4 counter name spoofed_in drop"] if world4 else []
    # a drop on output is EPERM for send(2) by itself; only connect(2) of TCP would wait, without an RST
    reset = ("meta l4proto tcp reject with tcp reset", "drop")
    another = "meta skuid != 0 goto deny_address"
    pass6, pass4 = "goto meter6_out", "goto meter4_out"
    chains: dict[str, tuple[str, ...]] = {
        "deny_address": (_count("address"), *reset),
        "deny_private": (_count("private"), *reset),
        # the answer to a source that is not on this host would leave it, towards somebody who asked for
        # nothing
        "deny_foreign": (_count("foreign"), "drop"),
        # an unbound ping to a partition of this host leaves with that partition's address as its source
        "same6": (f"icmpv6 type echo-request {pass6}", another, pass6),
        "foreign6": ("ip6 saddr . ip6 daddr @self6 goto same6", another, pass6),
    }
    if ranges:
        chains["ranged6"] = (f"meta skuid . ip6 saddr @range_owner6 {pass6}", another, pass6)
    if world4:
        chains["same4"] = (f"icmp type echo-request {pass4}", another, pass4)
        chains["foreign4"] = ("ip saddr . ip daddr @self4 goto same4", another, pass4)
    chains |= {
        "out6": (
            f"meta skuid . ip6 saddr @owner6 {pass6}",
            "ip6 saddr @address6 goto foreign6",
            *(["ip6 saddr @range6 goto ranged6"] if ranges else []),
            "meta skuid != 0 fib saddr type != local goto deny_foreign",
            pass6,
        ),
        "out4": (
            "ip daddr @private4 meta skuid != 0 meta skuid . ip daddr != @owner4 goto deny_private",
            f"meta skuid . ip saddr @owner4 {pass4}",
            *(["ip saddr @address4 goto foreign4"] if world4 else []),
            "ip saddr @private4 meta skuid != 0 goto deny_private",
            "meta skuid != 0 fib saddr type != local goto deny_foreign",
            pass4,
        ),
        "out": ("meta nfproto ipv6 goto out6", "meta nfproto ipv4 goto out4"),
        # The weak host model would let the LAN reach private addresses, and nobody else sends from ours.
        "in6": (*spoofed6, "goto meter6_remote_in"),
        "in4": ("ip daddr @private4 counter name private_in drop", *spoofed4, "goto meter4_remote_in"),
        "in_local": ("meta nfproto ipv6 goto meter6_local_in", "meta nfproto ipv4 goto meter4_local_in"),
        # lo is interface 1 of every network namespace (LOOPBACK_IFINDEX, include/net/flow.h)
        "in": ("iif 1 goto in_local", "meta nfproto ipv6 goto in6", "meta nfproto ipv4 goto in4"),
        "forwarded": (*spoofed6, *spoofed4),
    }
    return chains
