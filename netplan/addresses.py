"""Where each address of a partition comes from: pure arithmetic, for any prefix length and any shift.

IPv6 follows slapformat to the letter (facts/slap_protocol.md, 5.2), so a node can switch without renumbering.
With a base network /N, a shift s (``ipv6_prefixshift``) and a partition index i counted from 0:

    partition address   base network + (i + 2), prefix length N as the interface's own
    partition range     subnet /(N+s) number (1 << (s-2)) + i + 1      second quarter
    tap range           subnet /(N+s) number (2 << (s-2)) + i + 1      third quarter
                        host's end: its last address; the guest, which routes the rest: its first (::1)
    tun range           subnet /(N+s) number (3 << (s-2)) + i + 1      last quarter
                        host's end: its first address (::1)

The first quarter holds the partition addresses.  Where slapformat silently wraps around, or gives two ends
one address, we raise ``network.prefix_too_small``.  Where it rolls dice because a place is taken, we go to a
place that follows from the index alone, so what a partition gets never depends on the partitions after it.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Set as AbstractSet
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    collapse_addresses,
)

from netplan.errors import NetplanError

_RANGE_QUARTER, _TAP_QUARTER, _TUN_QUARTER = 1, 2, 3
TUN_NETWORK = IPv4Network("172.16.0.0/12")  # of slapformat's Tun; no option changes it

# The host itself is often ::2 or ::10 of its network and so sits on some partition's place.  slapformat rolls
# dice then; we put that partition 2^16 further, where no index that slapformat can number (65534 and below)
# arrives by itself.
_DETOUR = 1 << 16


class Occupied:
    """Stretches of IPv6 numbers that are in use and do not overlap; answers in logarithmic time."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []

    def meets(self, first: int, last: int) -> tuple[int, int] | None:
        """Return the lowest stretch that has a number from ``first`` to ``last``, by its own ends."""
        at = bisect_left(self._lasts, first)
        if at < len(self._lasts) and self._firsts[at] <= last:
            return self._firsts[at], self._lasts[at]
        return None

    def add(self, first: int, last: int) -> bool:
        """Put a stretch in use; False, and nothing is changed, where some of it is already."""
        if self.meets(first, last):
            return False
        at = bisect_left(self._lasts, first)
        self._firsts.insert(at, first)
        self._lasts.insert(at, last)
        return True


_NOTHING = Occupied()


def partition_ipv6(base: IPv6Interface, index: int, occupied: Occupied = _NOTHING) -> IPv6Interface:
    """Return the global IPv6 of partition ``index`` on the interface whose own address is ``base``, same
    prefix length; never the host's own address nor an ``occupied`` one.

    Raises ``network.prefix_too_small`` when the network has no such host.
    """
    network = base.network
    first, own = int(network.network_address), int(base.ip)
    wish = first + index + 2
    while met := (own, own) if wish == own else occupied.meets(wish, wish):
        wish += _DETOUR * (1 + (met[1] - wish) // _DETOUR)
    if index < 0 or wish - first >= network.num_addresses:
        raise _too_small(network, f"has no address for partition number {index}")
    return IPv6Interface((wish, network.prefixlen))


def partition_range(
    base: IPv6Interface, index: int, shift: int, occupied: Occupied = _NOTHING
) -> IPv6Network:
    """Return the range that partition ``index`` may bind to; it must be routed to the host.

    Where the natural one meets something ``occupied``, the search starts at the last number of the quarter
    minus index and goes down. Raises ``network.prefix_too_small`` or, when the host's own address lies in it,
    ``network.address_collision``.
    """
    return _subnet(base, _RANGE_QUARTER, index, shift, occupied)


def tap_range(base: IPv6Interface, index: int, shift: int, occupied: Occupied = _NOTHING) -> IPv6Network:
    """Return the range of the guest behind the tap of partition ``index``; raises like
    :func:`partition_range`.
    """
    return _subnet(base, _TAP_QUARTER, index, shift, occupied)


def tun_range(base: IPv6Interface, index: int, shift: int, occupied: Occupied = _NOTHING) -> IPv6Network:
    """Return the range behind the tun of partition ``index``; raises like :func:`partition_range`."""
    return _subnet(base, _TUN_QUARTER, index, shift, occupied)


def tap_ipv6(base: IPv6Interface, index: int, shift: int, occupied: Occupied = _NOTHING) -> IPv6Interface:
    """Return the host's end of the routed tap of partition ``index``, with its range as network.

    Raises like :func:`partition_range`, and ``network.prefix_too_small`` for a range of two addresses: the
    host's end and the guest must differ, and the first address of any network is the anycast of its routers.
    """
    network = tap_range(base, index, shift, occupied)
    if network.num_addresses < 4:
        raise _too_small(base.network, f"has no room for two ends of a tap in {network}")
    return IPv6Interface((int(network.broadcast_address), network.prefixlen))


def tun_ipv6(base: IPv6Interface, index: int, shift: int, occupied: Occupied = _NOTHING) -> IPv6Interface:
    """Return the host's address on the tun of partition ``index``, with its range as network; raises like
    :func:`partition_range`.
    """
    network = tun_range(base, index, shift, occupied)
    return IPv6Interface((int(range_gateway(network)), network.prefixlen))


def range_gateway(network: IPv6Network) -> IPv6Address:
    """Return the first address (::1) of a range: of a tap's, the guest, which is the next hop to the rest."""
    return network.network_address + 1


def _subnet(base: IPv6Interface, quarter: int, index: int, shift: int, occupied: Occupied) -> IPv6Network:
    network = base.network
    length = network.prefixlen + shift
    # a range of one address would have no first one
    if shift < 2 or length >= network.max_prefixlen:
        raise _too_small(network, f"cannot be divided by a shift of {shift} bits")
    quarter_size = 1 << (shift - 2)
    first, size = int(network.network_address), 1 << (128 - length)
    number = quarter * quarter_size + index + 1
    # The last number of a quarter is the unused number 0 of the next one, except after the last quarter.
    if index < 0 or index >= quarter_size or number >= 1 << shift:
        raise _too_small(network, f"has no range for partition number {index} with a shift of {shift} bits")
    if occupied.meets(first + number * size, first + (number + 1) * size - 1):
        number = (quarter + 1) * quarter_size - 1 - index
        while met := occupied.meets(first + number * size, first + (number + 1) * size - 1):
            number = (met[0] - first) // size - 1
        if number <= quarter * quarter_size:
            raise _too_small(network, f"has no free range for partition number {index}")
    subnet = IPv6Network((first + number * size, length))
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
    network: IPv4Network,
    index: int,
    taken: AbstractSet[IPv4Address] = frozenset(),
    elsewhere: tuple[IPv4Network, ...] = (),
) -> IPv4Address:
    """Return the private IPv4 of partition ``index``: host number index + 2.

    ``taken`` holds the addresses that others have: interfaces of the node, and partitions that were given
    theirs before. ``elsewhere`` are networks strictly inside ``network`` that the node uses or routes
    elsewhere; larger ones say nothing. Where the natural address is not free, the search starts at the last
    address that is not elsewhere, minus index, and goes down, so what one partition gets does not depend on
    how many others there are, and two detours do not meet. Raises ``network.prefix_too_small`` when nothing
    is free.
    """
    last = network.num_addresses - 2  # the broadcast address is nobody's
    if index < 0 or index + 2 > last:
        raise _too_small(network, f"has no address for partition number {index}")
    blocked = _blocked(network, elsewhere)
    natural = network.network_address + (index + 2)
    if natural not in taken and not any(low <= index + 2 <= high for low, high in blocked):
        return natural
    found = _from_top(network, last, index, taken, blocked)
    if found is None:
        raise _too_small(network, f"has no free address for partition number {index}")
    return found


def tap_ipv4(
    gateway: IPv4Interface, index: int, taken: AbstractSet[IPv4Address] = frozenset()
) -> IPv4Address:
    """Return the IPv4 of the guest behind the tap of partition ``index``, where ``gateway`` is the address of
    ``tap_gateway_interface``.

    The hosts of the gateway's network are dealt out by index, the gateway left out, as slapformat does. It
    also gives the broadcast address to the last partition, which then hears nobody; we do not. Where that
    address is ``taken``, the search goes down from the end, as for :func:`private_ipv4`. Raises
    ``network.prefix_too_small`` when there is no room.
    """
    network = gateway.network
    own = int(gateway.ip) - int(network.network_address)
    last = network.num_addresses - (1 if network.prefixlen >= 31 else 2)
    number = index + 1 + (0 < own <= index + 1)
    if index < 0 or number > last:
        raise _too_small(network, f"has no address for the tap of partition number {index}")
    natural = network.network_address + number
    if natural not in taken:
        return natural
    found = _from_top(network, last, index, taken, ((own, own),))
    if found is None:
        raise _too_small(network, f"has no free address for the tap of partition number {index}")
    return found


def tun_ipv4(index: int, amount: int, taken: AbstractSet[IPv4Address] = frozenset()) -> IPv4Interface:
    """Return the host's address on the tun of partition ``index`` of ``amount``: the first of its slice.

    172.16.0.0/12 is cut into as many slices as the next power of two; a single partition has it all. So the
    slices of a node that has grown are smaller than they were. One that keeps what it had before is in
    ``taken`` with its address: then the last slice without such an address is given, and where that lies
    inside a larger one the kernel prefers the smaller. Raises ``network.prefix_too_small`` when there is none.
    """
    bits = max(amount - 1, 0).bit_length()
    length = TUN_NETWORK.prefixlen + bits
    if not 0 <= index < amount or length > 30:
        raise _too_small(TUN_NETWORK, f"has no slice for partition number {index} of {amount}")
    first, size = int(TUN_NETWORK.network_address), 1 << (32 - length)
    if taken:
        used = {(int(address) - first) // size for address in taken}
        if index in used:
            index = next((number for number in range((1 << bits) - 1, -1, -1) if number not in used), -1)
    if index < 0:
        raise _too_small(TUN_NETWORK, "has no free slice for another tun")
    return IPv4Interface((first + index * size + 1, length))


@lru_cache(maxsize=16)
def _blocked(network: IPv4Network, elsewhere: tuple[IPv4Network, ...]) -> tuple[tuple[int, int], ...]:
    """Return the host numbers of ``network`` that are elsewhere, as disjoint stretches from the last to the
    first.
    """
    first = int(network.network_address)
    inside = [one for one in elsewhere if one.prefixlen > network.prefixlen and one.subnet_of(network)]
    return tuple(
        (int(one.network_address) - first, int(one.broadcast_address) - first)
        for one in sorted(collapse_addresses(inside), reverse=True)
    )


def _from_top(
    network: IPv4Network,
    last: int,
    index: int,
    taken: AbstractSet[IPv4Address],
    blocked: tuple[tuple[int, int], ...],
) -> IPv4Address | None:
    """Return the address that is number ``index``, counted down from ``last`` over what is not ``blocked``; of
    those that are taken, the next one down that is free.
    """
    number = last - index
    for low, high in blocked:
        if number <= high:
            number -= min(high, last) - low + 1
    while number > 0:
        inside = next((low for low, high in blocked if low <= number <= high), None)
        if inside is not None:
            number = inside - 1
        elif (address := network.network_address + number) in taken:
            number -= 1
        else:
            return address
    return None


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
