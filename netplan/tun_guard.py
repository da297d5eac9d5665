"""What may leave a tun: packets of the network that is the partition's own behind it.  Pure.

The host has one address of that network, and what is behind the tun the others.  From anywhere else, the router's
address included, nothing comes in: a tun has no other neighbours, so unlike a tap it knows no ``lan``.  Link-local
IPv6 is for the host alone, and neighbour discovery is not for tuns: by a router advertisement the host would take
the tun for its way to the world.
"""

from collections.abc import Sequence

from netplan.model import PartitionNetwork, TunSpec
from netplan.ruleset import Part, refused

RULE = "tun"
_MOST_TUNS = 4096
_COUNTED = refused(RULE)

_CHAINS = {
    "refuse_tun": (f"add @{_COUNTED} {{ iifname counter }}", "drop"),
    "tun_packet": (
        # a tun has no neighbours: what would make the host take it for a router, whoever sends it
        "icmpv6 type 130-137 goto refuse_tun",
        # the kernel itself drops such an IPv4 source (rp_filter aside, fib_validate_source), not such an IPv6 one
        "fib saddr type local goto refuse_tun",
        "iifname . ip saddr @tun_own4 accept",
        "iifname . ip6 saddr @tun_own6 accept",
        "ip6 saddr fe80::/10 ip6 daddr fe80::/10 accept",
        "goto refuse_tun",
    ),
    "tun_packets": ("iifname @guarded_tuns goto tun_packet",),
}


def tun_guard(partitions: Sequence[PartitionNetwork]) -> tuple[Part, ...]:
    """Return the sets and chains that hold each guarded tun to its own network; none where there is no such tun."""
    tuns = [one.tun for one in partitions if one.tun and one.tun.guarded]
    if not tuns:
        return ()
    part = Part(
        sets={
            "guarded_tuns": "type ifname",
            "tun_own4": "type ifname . ipv4_addr; flags interval",
            "tun_own6": "type ifname . ipv6_addr; flags interval",
            _COUNTED: f"type ifname; size {_MOST_TUNS}; flags dynamic",
        },
        maps={},
        elements={
            "guarded_tuns": [f'"{one.name}"' for one in tuns],
            "tun_own4": [_own(one, 4) for one in tuns if one.ipv4],
            "tun_own6": [_own(one, 6) for one in tuns if one.ipv6],
        },
        counters=(),
        chains=_CHAINS,
        hooks={"tun_packets": "prerouting priority -310"},
        dynamic=frozenset((_COUNTED,)),
    )
    return (part,)


def _own(tun: TunSpec, version: int) -> str:
    network = tun.ipv4.network if version == 4 and tun.ipv4 else tun.ipv6.network if tun.ipv6 else ""
    # of concatenations, a single address is no range (netplan.elements)
    return f'"{tun.name}" . {str(network).removesuffix("/32").removesuffix("/128")}'
