"""The rules of the tap guard: which frames of a guest pass, whatever guests there are.  Pure.

One text for any number of taps: what differs between them are elements of sets (:mod:`netplan.tap_guard`).
Nothing here follows connections, so there is no such state to exhaust, and the bridge family has none.

What must stay so when this is changed:

- What is not known to be fine is refused.  A rule that cannot read what it asks for (a header that is cut, a
  protocol behind headers that cannot be walked) does not match, so chains end in a refusal and accept by what
  they read: ``meta l4proto != 255`` says that there is one.
- No chain of neighbour discovery accepts before the source was looked at, too.
- What gives others an address, a router or a way (DHCP server, RA, redirect, IGMP and MLD queries) is refused
  whatever its source, also where extension headers or fragments could hide it (RFC 6980, 7113).
- No verdict maps and sets without a name, which go away with the old rules while a frame is still in them.

``@nh,64,128`` is the source of IPv6 and ``@th,64,128`` the target of neighbour discovery.  nft 1.0.6 has no name
for that, and compares a raw field with sets of raw fields alone, so sets for both are declared by the first.
Likewise ``@ll,48,48``, the source of the frame, and the other places where a frame names its own MAC.
"""

from typing import NamedTuple

from netplan.ruleset import refused
from netplan.tap_rules_ip import ipv4_chains, ipv6_chains, own_mac

_MAC = "typeof iifname . @ll,48,48"
_IPV6 = "typeof iifname . @nh,64,128"
_IPV4 = "type ifname . ipv4_addr"

_MOST_TAPS = 4096
_MOST_ADDRESSES = 65536
_IN_USE = "1h"
"""How long an address stays with the tap that used it last."""

_NEW_ADDRESSES = "limit rate 16/hour burst 16 packets"
"""How many more addresses a tap may take, of each family.  A guest has a link-local one, one or two of each
prefix and a temporary one a day.  Who wants all that the LAN's DHCP server has to give gets 16 of them, then one
in 4 minutes, each as long as he uses it.
"""

STATIC = {
    "guarded_taps": "type ifname",
    "strict_taps": "type ifname",
    "silent4": "type ifname",
    "silent6": "type ifname",
    "fixed_mac_taps": "type ifname",
    "fixed_macs": _MAC,
    "proposed_macs": _MAC,
    "taken_macs": "type ether_addr",
    "own4": f"{_IPV4}; flags interval",
    "own6": f"{_IPV6}; flags interval",
    "taken4": "type ipv4_addr; flags interval",
    "taken6": "typeof @nh,64,128; flags interval",
    "gateways6": "typeof @nh,64,128",
}
"""Sets with elements of ours.  ``silent4``: strict taps without an IPv4 address of their own; ``proposed_macs``:
what one tap may take and no other; ``gateways6``: the host's ends of routed taps, inside of the guests' networks.
"""

_LEARNED = f"flags dynamic; size {_MOST_TAPS}"
_USED = f"flags dynamic,timeout; size {_MOST_ADDRESSES}; timeout {_IN_USE}"
LEARNED = {
    "learned_taps": f"type ifname; {_LEARNED}",
    "mac_claims": f"type ifname; {_LEARNED}",
    "learned_macs": f"{_MAC}; {_LEARNED}",
    "held_macs": f"type ether_addr; {_LEARNED}",
    "address_claims4": f"type ifname; {_LEARNED}",
    "address_claims6": f"type ifname; {_LEARNED}",
    "used4": f"{_IPV4}; {_USED}",
    "used6": f"{_IPV6}; {_USED}",
    "in_use4": f"type ipv4_addr; {_USED}",
    "in_use6": f"typeof @nh,64,128; {_USED}",
}
"""Sets that the kernel fills: the MAC of each tap (``held_macs``: of any), and the addresses that it uses
(``in_use4``: any).
"""

OF_ALL_TAPS = {"learned_macs": "held_macs", "used4": "in_use4", "used6": "in_use6"}
"""Which set has for all taps together what another has by tap."""

HEARD = {"heard_macs": f"type ether_addr; flags dynamic,timeout; size {_MOST_TAPS}; timeout 1d"}
"""In ``bridge``: the MACs of those who say, at other ports, that they have an address that is taken: the routers."""

REFUSALS = (
    *("mac", "vlan", "ethertype", "arp", "ipv4", "ipv6", "nd", "ra", "redirect", "query", "dhcp"),
    *("fragment", "extension", "malformed"),
)
"""Why a frame was refused; ``refused_<rule>`` counts them by tap."""

_BRIDGE_ONLY = frozenset(("vlan", "ethertype", "arp"))

HOOKS = {
    # before all that others do with a packet, from their raw tables (-300) on
    "bridge": {"tap_frames": "prerouting priority -310"},
    "inet": {"tap_frames": "prerouting priority -310"},
    "arp": {"tap_frames": "input priority -310"},
}
"""Base chains by family: bridged taps are guarded in ``bridge``, routed ones in ``inet`` and ``arp``."""


def learned_sets(family: str) -> dict[str, str]:
    """Return the sets that the kernel fills in a family, but for those that count."""
    if family == "arp":
        return {name: grammar for name, grammar in LEARNED.items() if not name.endswith("6")}
    return LEARNED | (HEARD if family == "bridge" else {})


def static_sets(family: str) -> dict[str, str]:
    """Return the sets with elements of ours in a family."""
    return {name: grammar for name, grammar in STATIC.items() if family != "arp" or not name.endswith("6")}


def counting_sets(family: str) -> dict[str, str]:
    """Return the sets that count refusals in a family."""
    return {refused(rule): f"type ifname; {_LEARNED}" for rule in _refusals(family)}


def chains(family: str) -> dict[str, tuple[str, ...]]:
    """Return the chains of a family; each stands before those that go to it."""
    found: dict[str, tuple[str, ...]] = {
        f"refuse_{rule}": (f"add @{refused(rule)} {{ iifname counter }}", "drop")
        for rule in _refusals(family)
    }
    if family != "arp":
        # guests behind a bridge have no network around an address of the host
        gateways = family == "inet"
        found |= _checks(_Checked("tap_source6", "6", "@nh", "ipv6", "accept"), gateways=gateways)
        found |= _checks(_Checked("tap_target6", "6", "@th", "nd", "return"), gateways=gateways)
        found |= _checks(_Checked("tap_source4", "4", "ip saddr", "ipv4", "accept"))
        found |= ipv6_chains() | ipv4_chains()
    if family != "inet":
        found |= _checks(_Checked("tap_arp_sender", "4", "arp saddr ip", "arp", "accept"))
        found |= _checks(_Checked("tap_arp_target", "4", "arp daddr ip", "arp", "accept"))
        found |= _arp()
    return found | _frames(family)


def _refusals(family: str) -> tuple[str, ...]:
    if family == "arp":
        return ("mac", "arp")
    return tuple(rule for rule in REFUSALS if family == "bridge" or rule not in _BRIDGE_ONLY)


_KINDS = {
    "bridge": (
        "ether type ip goto tap_ipv4",
        "ether type ip6 goto tap_ipv6",
        "ether type arp goto tap_arp",
        # a tag that the kernel took off is still read here (net/netfilter/nft_payload.c, nft_payload_copy_vlan)
        "ether type 8021q goto refuse_vlan",
        "ether type 8021ad goto refuse_vlan",
        "ether type 0x9100 goto refuse_vlan",
        "goto refuse_ethertype",
    ),
    "inet": ("meta nfproto ipv4 goto tap_ipv4", "meta nfproto ipv6 goto tap_ipv6", "goto refuse_malformed"),
    "arp": ("goto tap_arp",),
}


_HEARD_CHAINS = {
    "tap_heard_arp": ("arp saddr ip @taken4 update @heard_macs { arp saddr ether }",),
    "tap_heard_icmpv6": (
        "icmpv6 type 136 @th,64,128 @taken6 update @heard_macs { ether saddr }",
        "icmpv6 type 134 @nh,64,128 @taken6 update @heard_macs { ether saddr }",
    ),
}
_HEAR = ("meta l4proto icmpv6 goto tap_heard_icmpv6", "ether type arp goto tap_heard_arp")
"""What is heard at other ports; to frames that are neither ARP nor ICMPv6 it costs two comparisons."""


def _frames(family: str) -> dict[str, tuple[str, ...]]:
    """Return what each frame meets first: who sends it, by its MAC, then what it is."""
    learn = (
        # one frame alone gets through: of two at the same moment on two processors, both would be the first
        "add @mac_claims { iifname limit rate 1/week burst 1 packets }",
        "add @learned_macs { iifname . @ll,48,48 }",
        "add @held_macs { ether saddr }",
        "add @learned_taps { iifname }",
        "goto tap_kinds",
    )
    heard: dict[str, tuple[str, ...]] = _HEARD_CHAINS if family == "bridge" else {}
    return heard | {
        "tap_kinds": _KINDS[family],
        "tap_learn": (" ".join(learn), "goto refuse_mac"),
        "tap_unknown_mac": (
            "iifname @learned_taps goto refuse_mac",
            "iifname @fixed_mac_taps goto refuse_mac",
            "ether saddr & 01:00:00:00:00:00 != 00:00:00:00:00:00 goto refuse_mac",
            "ether saddr 00:00:00:00:00:00 goto refuse_mac",
            "ether saddr @held_macs goto refuse_mac",
            *(["ether saddr @heard_macs goto refuse_mac"] if family == "bridge" else []),
            "iifname . @ll,48,48 @proposed_macs goto tap_learn",
            "ether saddr @taken_macs goto refuse_mac",
            "goto tap_learn",
        ),
        "tap_mac": (*own_mac("@ll,48,48", "tap_kinds"), "goto tap_unknown_mac"),
        "tap_frames": ("iifname @guarded_taps goto tap_mac", *(_HEAR if family == "bridge" else ())),
    }


class _Checked(NamedTuple):
    """An address that a guest sends from, or says that it has.

    ``chain`` is gone (jumped) to and ends in ``verdict`` or in the refusal of ``rule``. ``place`` is where the
    frame has it: of IPv6 the header whose bits from 64 on it is.
    """

    chain: str
    family: str
    place: str
    rule: str
    verdict: str

    @property
    def key(self) -> str:
        """How rules name it."""
        return f"{self.place},64,128" if self.family == "6" else self.place


_NOBODYS = {
    # unspecified, loopback, IPv4 in IPv6; multicast
    "6": ("{},64,64 0", "{},64,8 0xff"),
    "4": ("{} 0.0.0.0/8", "{} 127.0.0.0/8", "{} 224.0.0.0/3"),
}


def _checks(one: _Checked, *, gateways: bool = False) -> dict[str, tuple[str, ...]]:
    """Return the chains that look at an address.

    What is the tap's own is found first: one look-up.  What it used before costs one more, and says so to others
    now and then; what announces it (ARP, neighbour discovery) each time.
    """
    chain, family, key, verdict = one.chain, one.family, one.key, one.verdict
    refuse = f"goto refuse_{one.rule}"
    use = f"update @used{family} {{ iifname . {key} }} update @in_use{family} {{ {key} }}"
    often = one.rule in {"ipv4", "ipv6"}
    stays = f"{one.place},64,16 & 0xffc0 != 0xfe80 " if family == "6" else ""
    return {
        f"{chain}_claim": (
            *(f"{nobodys.format(one.place)} {refuse}" for nobodys in _NOBODYS[family]),
            f"{key} @taken{family} {refuse}",
            f"{key} @in_use{family} {refuse}",
            f"add @address_claims{family} {{ iifname {_NEW_ADDRESSES} }} {use} {verdict}",
            refuse,
        ),
        f"{chain}_new": (
            f"iifname @silent{family} {refuse}",
            # everybody needs a link-local one, and chooses it himself
            *([f"{one.place},64,16 & 0xffc0 == 0xfe80 goto {chain}_claim"] if family == "6" else []),
            f"iifname @strict_taps {refuse}",
            f"goto {chain}_claim",
        ),
        f"{chain}_used": (
            # what it has used may have become somebody's since, or the tap strict
            f"{key} @taken{family} {refuse}",
            f"iifname @strict_taps {stays}{refuse}",
            *([f"numgen random mod 16 != 0 {verdict}"] if often else []),
            use,
            verdict,
        ),
        chain: (
            *([f"{key} @gateways6 {refuse}"] if gateways else []),
            f"iifname . {key} @own{family} {verdict}",
            f"iifname . {key} @used{family} goto {chain}_used",
            f"goto {chain}_new",
        ),
    }


def _arp() -> dict[str, tuple[str, ...]]:
    return {
        # RFC 5227: who asks so is about to use the address, and whoever else is about to gives it up
        "tap_arp_probe": ("arp operation 1 goto tap_arp_target", "goto refuse_arp"),
        "tap_arp_addresses": (
            "arp saddr ip 0.0.0.0 goto tap_arp_probe",
            # no such target, but one that can be read
            "arp daddr ip != 255.255.255.255 goto tap_arp_sender",
            "goto refuse_arp",
        ),
        "tap_arp_mac": (*own_mac("@nh,64,48", "tap_arp_addresses"), "goto refuse_arp"),
        "tap_arp": (
            "arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp operation 1-2 goto tap_arp_mac",
            "goto refuse_arp",
        ),
    }
