"""Reading back what the kernel has: a handful of dumps, each filtered by the kernel as far as it can."""

from collections.abc import Mapping
from pathlib import Path

from netplan import rtnetlink
from netplan.errors import NetplanError
from netplan.filter_state import observe_filter
from netplan.model import PROTOCOL_MARK, DesiredNetwork, Link, ObservedNetwork, Route
from netplan.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, NetlinkSocket
from netplan.nfnetlink import has_counter
from netplan.packet_filter import NONLOCAL_BIND_NOTE, render

NONLOCAL_BIND = Path("/proc/sys/net/ipv6/ip_nonlocal_bind")
"""Of the network namespace of the thread that reads it (net/sysctl_net.c)."""

LOOPBACK = 1
"""The index of lo in every network namespace (LOOPBACK_IFINDEX, include/net/flow.h)."""


def observe_links(interface: str | None) -> ObservedNetwork:
    """Return the links and addresses alone: what can be wanted may hang on them.  Raises as :func:`observe` does."""
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        links = rtnetlink.links(sock)
        if interface is not None and interface not in links:
            raise _no_interface(interface, links)
        return ObservedNetwork(links=links, addresses=rtnetlink.addresses(sock))


def observe(desired: DesiredNetwork, first: ObservedNetwork | None = None) -> ObservedNetwork:
    """Return what the network namespace of this thread has, as far as a plan towards ``desired`` needs it.

    ``first``: what :func:`observe_links` gave just now; it is half of the work.  Raises ``network.no_interface``
    when the interface for the addresses does not exist, ``network.netlink`` when the kernel does not answer.
    """
    first = first or observe_links(desired.interface)
    links, addresses = first.links, first.addresses
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        routes = _routes(sock, desired)
        rules = rtnetlink.rules(sock)
    return ObservedNetwork(
        links=links,
        addresses=addresses,
        routes=routes,
        rules=rules,
        nonlocal_bind=_read_nonlocal_bind(),
        nonlocal_bind_note=_nonlocal_bind_noted(),
        filter=observe_filter(render(desired) if desired.filtered else None),
    )


def _no_interface(name: str, links: Mapping[str, Link]) -> NetplanError:
    there = ", ".join(sorted(link.name for link in links.values() if not link.tap))
    return NetplanError(
        "network.no_interface",
        f"there is no network interface {name}",
        resource=f"link/{name}",
        hint=f"set interface_name to one of: {there}",
    )


def _routes(sock: NetlinkSocket, desired: DesiredNetwork) -> tuple[Route, ...]:
    """Return our marked routes; where something of the kind is wanted, also the local ones of lo and the
    default routes.
    """
    found = list(rtnetlink.routes(sock, protocol=PROTOCOL_MARK))
    if any(one.ipv6_range for one in desired.partitions):
        found += rtnetlink.routes(sock, table=rtnetlink.TABLE_LOCAL, link=LOOPBACK)
    if desired.host_ipv6 is not None:
        main = rtnetlink.routes(sock, table=rtnetlink.TABLE_MAIN, kind=rtnetlink.ROUTE_UNICAST)
        found += (route for route in main if route.prefixlen == 0)
    return tuple(dict.fromkeys(found))


def _read_nonlocal_bind() -> bool:
    try:
        return NONLOCAL_BIND.read_text(encoding="ascii").strip() != "0"
    except FileNotFoundError:  # no IPv6 in this kernel
        return False


def _nonlocal_bind_noted() -> bool:
    with NetlinkSocket(NETLINK_NETFILTER) as sock:
        return has_counter(sock, NONLOCAL_BIND_NOTE)
