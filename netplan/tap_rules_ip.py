"""The rules of the tap guard for IPv4 and IPv6: which packets of a guest get as far as the look at their source.

Numbers of messages: iana.org/assignments/icmpv6-parameters, icmp-parameters, igmp-type-numbers.  The kernel walks
the headers of IPv6 before the first rule (nft_set_pktinfo_ipv6_validate): ``meta l4proto`` is what stands behind
all of them, and there is none where they, or the lengths, are not right.  In later fragments ``@th`` reads
nothing.  Pure; what must stay so is told in :mod:`netplan.tap_rules`.
"""

from collections.abc import Iterator

_SOURCE_OPTION, _TARGET_OPTION, _NONCE_OPTION = "0x0101", "0x0201", "0x0e01"
"""Options of neighbour discovery of 8 bytes: kind and length; those of two addresses, and RFC 7527."""


def own_mac(place: str, chain: str, condition: str = "") -> Iterator[str]:
    """Yield the rules that go to a chain where a place of the frame has the tap's own MAC.

    What was learned before a MAC was fixed is not it any more.
    """
    for macs in ("!= @fixed_mac_taps iifname . {} @learned_macs", ". {} @fixed_macs"):
        yield f"{condition} iifname {macs.format(place)} goto {chain}".lstrip()


def ipv4_chains() -> dict[str, tuple[str, ...]]:
    """Return the chains in front of ``tap_source4``."""
    return {
        "tap_unspecified4": ("iifname @silent4 goto refuse_ipv4", "accept"),
        "tap_discover4": (
            "iifname @silent4 goto refuse_ipv4",
            "udp sport 68 ip daddr 255.255.255.255 accept",
            "goto refuse_dhcp",
        ),
        "tap_dhcp_source4": ("ip saddr 0.0.0.0 goto tap_discover4", "goto tap_source4"),
        "tap_dhcp4": (
            "ip frag-off & 0x3fff != 0 goto refuse_dhcp",
            # a request for its own MAC (op, htype, hlen, chaddr): with others' it could take all addresses there are
            *own_mac("@th,288,48", "tap_dhcp_source4", "@th,64,24 0x010106"),
            "goto refuse_dhcp",
        ),
        "tap_udp4": (
            "udp sport 67 goto refuse_dhcp",
            "udp dport 68 goto refuse_dhcp",  # no client asks where it came from
            "udp dport 67 goto tap_dhcp4",
            "goto tap_source4",
        ),
        "tap_icmp4": (
            "icmp type 5 goto refuse_redirect",
            "icmp type 9 goto refuse_ra",
            "goto tap_source4",
        ),
        "tap_report4": ("ip saddr 0.0.0.0 goto tap_unspecified4", "goto tap_source4"),
        "tap_igmp4": (
            "@th,0,8 0x12 goto tap_report4",
            "@th,0,8 0x16 goto tap_report4",
            "@th,0,8 0x17 goto tap_report4",
            "@th,0,8 0x22 goto tap_report4",
            "goto refuse_query",
        ),
        # where options cannot be read, none of them exists (nft_exthdr.c): only what is known to be fine goes on
        "tap_options4": (
            "ip option lsrr exists goto refuse_extension",
            "ip option ssrr exists goto refuse_extension",
            "ip option ra exists return",
            "ip option rr exists return",
            "goto refuse_extension",
        ),
        "tap_first4": ("@th,0,64 != 0 return", "goto refuse_fragment"),
        "tap_walked4": (
            "ip hdrlength != 5 jump tap_options4",
            # of a later fragment nothing is to be read; without the first, which was refused, it is nothing
            "ip frag-off & 0x1fff != 0 goto tap_source4",
            "ip frag-off & 0x2000 != 0 jump tap_first4",
            "meta l4proto udp goto tap_udp4",
            "meta l4proto icmp goto tap_icmp4",
            "meta l4proto igmp goto tap_igmp4",
            "goto tap_source4",
        ),
        "tap_ipv4": (
            "meta l4proto tcp ip hdrlength 5 ip frag-off & 0x3fff == 0 goto tap_source4",
            "meta l4proto != 255 goto tap_walked4",
            "goto refuse_malformed",
        ),
    }


def ipv6_chains() -> dict[str, tuple[str, ...]]:
    """Return the chains in front of ``tap_source6``."""
    return _discovery() | {
        "tap_udp6": (
            "udp sport 547 goto refuse_dhcp",
            "udp dport 546 goto refuse_dhcp",
            "goto tap_source6",
        ),
        "tap_icmp6": (
            "icmpv6 type 135 goto tap_ns",
            "icmpv6 type 136 goto tap_na",
            "icmpv6 type 133 goto tap_rs",
            "icmpv6 type 134 goto refuse_ra",
            "icmpv6 type 138 goto refuse_ra",  # renumbering of routers
            "icmpv6 type 137 goto refuse_redirect",
            "icmpv6 type 130 goto refuse_query",
            "icmpv6 type 151-153 goto refuse_query",  # multicast routers
            "icmpv6 type 141-142 goto refuse_nd",  # inverse discovery
            "icmpv6 type 148-149 goto refuse_nd",  # certificates of routers
            "icmpv6 type != 255 goto tap_source6",
            "goto refuse_malformed",
        ),
        "tap_report6": ("ip6 saddr :: goto tap_unspecified6", "goto tap_source6"),
        "tap_icmp6_behind": (
            "icmpv6 type 131-132 goto tap_report6",
            "icmpv6 type 143 goto tap_report6",
            "icmpv6 type 1-4 goto tap_source6",
            "icmpv6 type 128-129 goto tap_source6",
            "goto refuse_extension",
        ),
        "tap_fragment6": (
            "frag frag-off != 0 goto tap_source6",
            "meta l4proto icmpv6 icmpv6 type 128-129 goto tap_source6",
            "meta l4proto icmpv6 goto refuse_fragment",
            "@th,0,64 == 0 goto refuse_fragment",
            "meta l4proto udp @th,0,64 != 0 goto tap_udp6",
            "@th,0,64 != 0 goto tap_source6",
            "goto refuse_fragment",
        ),
        "tap_walked6": (
            "exthdr rt exists goto refuse_extension",
            "exthdr frag exists goto tap_fragment6",
            "meta l4proto icmpv6 goto tap_icmp6_behind",
            # the last header may be said to be longer than the packet
            "meta l4proto udp @th,0,64 != 0 goto tap_udp6",
            "meta l4proto udp goto refuse_malformed",
            "@th,0,32 != 0 goto tap_source6",
            "goto refuse_malformed",
        ),
        "tap_ipv6": (
            "meta l4proto tcp ip6 nexthdr tcp goto tap_source6",
            "meta l4proto udp ip6 nexthdr udp goto tap_udp6",
            "meta l4proto icmpv6 ip6 nexthdr icmpv6 goto tap_icmp6",
            "meta l4proto != 255 goto tap_walked6",
            "goto refuse_malformed",
        ),
    }


def _discovery() -> dict[str, tuple[str, ...]]:
    """Return the chains of neighbour discovery.

    Options stand where they always stand and there is one at most, told by the length: others could be read by a
    neighbour and not here.
    """
    proper = ("ip6 hoplimit != 255 goto refuse_nd", "icmpv6 code != 0 goto refuse_nd")
    return {
        "tap_unspecified6": ("iifname @silent6 goto refuse_ipv6", "accept"),
        # duplicate address detection, RFC 4862: whoever else is about to use the address gives it up
        "tap_dad_target": ("jump tap_target6", "goto tap_unspecified6"),
        "tap_dad": (
            "ip6 length 24 goto tap_dad_target",
            f"ip6 length 32 @th,192,16 {_NONCE_OPTION} goto tap_dad_target",
            "goto refuse_nd",
        ),
        "tap_ns": (
            *proper,
            "ip6 saddr :: goto tap_dad",
            "ip6 length 24 goto tap_source6",
            *own_mac("@th,208,48", "tap_source6", f"ip6 length 32 @th,192,16 {_SOURCE_OPTION}"),
            f"ip6 length 32 @th,192,16 {_NONCE_OPTION} goto tap_source6",
            "goto refuse_nd",
        ),
        "tap_na_target": ("jump tap_target6", "goto tap_source6"),
        "tap_na": (
            *proper,
            "ip6 length 24 goto tap_na_target",
            *own_mac("@th,208,48", "tap_na_target", f"ip6 length 32 @th,192,16 {_TARGET_OPTION}"),
            "goto refuse_nd",
        ),
        "tap_rs_unspecified": ("ip6 length 8 goto tap_unspecified6", "goto refuse_nd"),
        "tap_rs": (
            *proper,
            "ip6 saddr :: goto tap_rs_unspecified",
            "ip6 length 8 goto tap_source6",
            *own_mac("@th,80,48", "tap_source6", f"ip6 length 16 @th,64,16 {_SOURCE_OPTION}"),
            "goto refuse_nd",
        ),
    }
