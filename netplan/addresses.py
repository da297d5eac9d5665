"""Where each address of a partition comes from: pure arithmetic, for any prefix length and any shift.

IPv6 follows slapformat to the letter (facts/slap_protocol.md, 5.2), so a node can switch without renumbering.
With a base network /N, a shift s (``ipv6_prefixshift``) and a partition index i counted from 0:

    partition address   base network + (i + 2), prefix length N as the interface's own
    partition range     subnet /(N+s) number (1 << (s-2)) + i + 1      second quarter
    tap range           subnet /(N+s) number (2 << (s-2)) + i + 1      third quarter
    tun range           subnet /(N+s) number (3 << (s-2)) + i + 1      last quarter

The first quarter holds the partition addresses.  Where slapformat silently wraps around, we raise
``network.prefix_too_small``.
"""

import hashlib
from collections.abc import Set as AbstractSet
from ipaddress import IPv4Address, IPv4Network, IPv6Interface, IPv6Network

from netplan.errors import NetplanError

_RANGE_QUARTER, _TAP_QUARTER, _TUN_QUARTER = 1, 2, 3

# The host itself is often ::2 or ::10 of its network and so sits on some partition's place.  slapformat rolls
# dice then; we put that partition 2^16 further, where no index that slapformat can number (65534 and below)
# arrives by itself.
_DETOUR = 1 << 16


def partition_ipv6(base: IPv6Interface, index: int) -> IPv6Interface:
    """Return the global IPv6 of partition ``index`` on the interface whose own address is ``base``, same
    prefix length.

    Raises ``network.prefix_too_small`` when the network has no such host.
    """
    network = base.network
    number = index + 2
    if int(network.network_address) + number == int(base.ip):
        number += _DETOUR
    if index < 0 or number >= network.num_addresses:
        raise _too_small(network, f"has no address for partition number {index}")
    return IPv6Interface((int(network.network_address) + number, network.prefixlen))


def partition_range(base: IPv6Interface, index: int, shift: int) -> IPv6Network:
    """Return the range that partition ``index`` may bind to; it must be routed to the host.

    Raises ``network.prefix_too_small`` or, when the host's own address lies in it,
    ``network.address_collision``.
    """
    return _subnet(base, _RANGE_QUARTER, index, shift)


def tap_range(base: IPv6Interface, index: int, shift: int) -> IPv6Network:
    """Return the range of the guest behind the tap of partition ``index``; raises like
    :func:`partition_range`.
    """
    return _subnet(base, _TAP_QUARTER, index, shift)


def tun_range(base: IPv6Interface, index: int, shift: int) -> IPv6Network:
    """Return the range behind the tun of partition ``index``; raises like :func:`partition_range`."""
    return _subnet(base, _TUN_QUARTER, index, shift)


def _subnet(base: IPv6Interface, quarter: int, index: int, shift: int) -> IPv6Network:
    network = base.network
    length = network.prefixlen + shift
    if shift < 2 or length > network.max_prefixlen:
        raise _too_small(network, f"cannot be divided by a shift of {shift} bits")
    number = (quarter << (shift - 2)) + index + 1
    # The last number of a quarter is the unused number 0 of the next one, except after the last quarter.
    if index < 0 or index >= 1 << (shift - 2) or number >= 1 << shift:
        raise _too_small(network, f"has no range for partition number {index} with a shift of {shift} bits")
    subnet = IPv6Network((int(network.network_address) + (number << (128 - length)), length))
    if base.ip in subnet:
        raise NetplanError(
            "network.address_collision",
            f"the host's own address {base.ip} lies in {subnet}, the range of partition number {index}",
            resource=f"range/{subnet}",
            hint="give the host an address below the partition ranges (such as ::1), or change ipv6_prefixshift",
        )
    return subnet


def _too_small(network: IPv6Network | IPv4Network, why: str) -> NetplanError:
    return NetplanError(
        "network.prefix_too_small",
        f"{network} {why}",
        resource=str(network),
        hint="use a larger network, fewer partitions or another ipv6_prefixshift",
    )


def private_ipv4(
    network: IPv4Network, index: int, taken: AbstractSet[IPv4Address] = frozenset()
) -> IPv4Address:
    """Return the private IPv4 of partition ``index``: host number index + 2.

    ``taken`` holds the addresses that others have: interfaces of the node, and partitions that were given
    theirs before. Where the natural one is taken, the search starts at the last host number minus index and
    goes down, so what one partition gets does not depend on how many others there are, and two detours do not
    meet. Raises ``network.prefix_too_small`` when nothing is free.
    """
    first = int(network.network_address)
    last = network.num_addresses - 2  # the broadcast address is nobody's
    if index < 0 or index + 2 > last:
        raise _too_small(network, f"has no address for partition number {index}")
    natural = IPv4Address(first + index + 2)
    if natural not in taken:
        return natural
    for number in range(last - index, 0, -1):
        address = IPv4Address(first + number)
        if address not in taken:
            return address
    raise _too_small(network, f"has no free address for partition number {index}")


def tap_mac(computer_id: str, partition: str) -> str:
    """Return the MAC proposed to the guest: locally administered, unicast, the same for ever."""
    return _mac(b"\x02", "guest", computer_id, partition)


def host_tap_mac(computer_id: str, partition: str) -> str:
    """Return the MAC of the host's end of the tap.

    A Linux bridge without a fixed address takes the lowest of its ports' (net/bridge/br_stp_if.c,
    br_stp_recalculate_bridge_id), so a tap could change the address of the whole node.  Nothing usual lies
    above ``fe:ff``: vendors' MACs do not, and of the kernel's own random ones 1 in 16384 does.
    """
    return _mac(b"\xfe\xff", "host", computer_id, partition)


def _mac(prefix: bytes, end: str, computer_id: str, partition: str) -> str:
    digest = hashlib.sha256(f"{end}\0{computer_id}\0{partition}".encode()).digest()
    return (prefix + digest)[:6].hex(":")
