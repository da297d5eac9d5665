"""Reading back what the kernel has: a handful of dumps, each filtered by the kernel as far as it can."""

import os
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from socket import AF_INET
from typing import NamedTuple

from netplan import rtnetlink, sysctls
from netplan.bpf_state import observe_hooks
from netplan.errors import NetplanError
from netplan.filter_state import observe_filter
from netplan.legacy_filter import observe_legacy
from netplan.legacy_rules import render_legacy
from netplan.model import (
    PORT_ALIAS,
    PROTOCOL_MARK,
    Address,
    DesiredNetwork,
    FilterState,
    Link,
    ObservedNetwork,
    Route,
)
from netplan.moving import observe_moving
from netplan.netlink import NETLINK_ROUTE, NetlinkSocket
from netplan.nfnetlink import generation, nft_socket
from netplan.packet_filter import render
from netplan.plan_mesh import settled

LOOPBACK = 1
"""The index of lo in every network namespace (LOOPBACK_IFINDEX, include/net/flow.h)."""


_MOST_DOWN = 16
_ADDRESS_MARKS_SINCE = (5, 18)  # commit 47f0bd503210, "net: Add new protocol attribute to IP addresses"


class Look(NamedTuple):
    """A first look at the network, before it is known what is wanted of it: links by name, and addresses."""

    links: Mapping[str, Link]
    addresses: tuple[Address, ...]


def look(links: Mapping[str, Link] | None = None) -> Look:
    """Return the links and addresses of the network namespace of this thread; raises like :func:`observe`.

    ``links`` are all of them, where somebody who listens knows them (:meth:`netplan.monitor.Monitor.links`): to list 300
    costs 5 ms, half a look.
    """
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        return Look(_checked(sock, links or {}) or rtnetlink.links(sock), rtnetlink.addresses(sock))


def _checked(sock: NetlinkSocket, links: Mapping[str, Link]) -> Mapping[str, Link] | None:
    """Look again at those that are down: of what is set on them then (owner, alias, group) the kernel does not tell
    (net/core/rtnetlink.c and dev.c, netdev_state_change).  None where they are many.
    """
    down = [one for one in links.values() if not one.up]
    if len(down) > _MOST_DOWN:
        return None
    now = {one.name: rtnetlink.link(sock, one.ifindex) for one in down}
    return {one.name: one for name, known in links.items() if (one := now.get(name, known)) is not None}


def observe(desired: DesiredNetwork, seen: Look | None = None) -> ObservedNetwork:
    """Return what the network namespace of this thread has, as far as a plan towards ``desired`` needs it.

    ``seen`` is a look that was just taken. Raises ``network.no_interface`` when the interface for the
    addresses does not exist, ``network.netlink`` when the kernel does not answer.
    """
    links, addresses = seen or look()
    desired = settled(desired, links, addresses)
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        for name in (desired.interface, desired.ipv4_interface):
            to_be_made = desired.bridge is not None and desired.bridge.name == name
            if name is not None and name not in links and not to_be_made:
                raise _no_interface(name, links)
        routes = _routes(sock, desired, links)
        rules = (*rtnetlink.rules(sock), *rtnetlink.rules(sock, AF_INET))
        sources = _leaving(desired, links)
        moving = observe_moving(sock, sources) if sources else ()
    legacy = desired.filtered and desired.backend == "iptables"
    there = observe_legacy(render_legacy(desired) if legacy else None)
    wanted = render(desired) if desired.filtered and not legacy else None
    nft = FilterState()
    notes: frozenset[str] = frozenset()
    if wanted or has_nft():
        with nft_socket() as sock:
            notes = sysctls.read_notes(sock)
        nft = observe_filter(wanted)
    return ObservedNetwork(
        links=links,
        addresses=addresses,
        routes=routes,
        rules=rules,
        moving=moving,
        sysctls=sysctls.read(),
        notes=notes,
        address_marks=_kernel() >= _ADDRESS_MARKS_SINCE,
        mesh_ipv6=_mesh_ipv6(desired, links),
        filter=nft,
        legacy=there.filter,
        legacy_notes=there.notes,
        hooks=observe_hooks(wanted=desired.hooked),
    )


def _mesh_ipv6(desired: DesiredNetwork, links: Mapping[str, Link]) -> bool:
    if desired.mesh is None or desired.mesh.interface not in links:
        return False
    try:
        return sysctls.ipv6_switch(desired.mesh.interface).read_text(encoding="ascii").strip() == "0"
    except FileNotFoundError:  # no IPv6 in this kernel, or the link has just gone
        return False


def has_nft() -> bool:
    """Whether this kernel has nf_tables at all, which legacy hosts may lack."""
    try:
        with nft_socket() as sock:
            generation(sock)
    except NetplanError:
        return False
    return True


def _kernel() -> tuple[int, ...]:
    return tuple(int(one) for one in os.uname().release.split("-")[0].split(".")[:2])


def _no_interface(name: str, links: Mapping[str, Link]) -> NetplanError:
    there = ", ".join(sorted(link.name for link in links.values() if link.kind != "tun"))
    return NetplanError(
        "network.no_interface",
        f"there is no network interface {name}",
        resource=f"link/{name}",
        hint=f"set interface_name to one of: {there}",
    )


def _routes(sock: NetlinkSocket, desired: DesiredNetwork, links: Mapping[str, Link]) -> tuple[Route, ...]:
    """Return our marked routes; where something of the kind is wanted, also the local ones of lo, the default
    routes and those over our taps.
    """
    found = list(rtnetlink.routes(sock, protocol=PROTOCOL_MARK))
    found += rtnetlink.routes(sock, family=AF_INET, protocol=PROTOCOL_MARK)
    ours = {(route.destination, route.prefixlen) for route in found if route.table == rtnetlink.TABLE_LOCAL}
    ranges = (one.ipv6_range for one in desired.partitions if one.ipv6_range)
    if any((one.network_address.packed, one.prefixlen) not in ours for one in ranges):
        # one that slapformat made may stand in for it
        found += rtnetlink.routes(sock, table=rtnetlink.TABLE_LOCAL, link=LOOPBACK)
    taps = {
        links[one.tap.name].ifindex
        for one in desired.partitions
        if one.tap and (one.tap.ipv6 or one.tap.ipv4) and one.tap.name in links
    }
    if desired.host_ipv6 is not None or taps:
        main = rtnetlink.routes(sock, table=rtnetlink.TABLE_MAIN, kind=rtnetlink.ROUTE_UNICAST)
        found += (route for route in main if route.prefixlen == 0 or route.link in taps)
    if taps and any(one.tap and one.tap.ipv4 for one in desired.partitions):
        table, kind = rtnetlink.TABLE_MAIN, rtnetlink.ROUTE_UNICAST
        main = rtnetlink.routes(sock, family=AF_INET, table=table, kind=kind)
        found += (route for route in main if route.link in taps)
    return tuple(dict.fromkeys(found))


def _leaving(desired: DesiredNetwork, links: Mapping[str, Link]) -> frozenset[int]:
    """Return the links that may have to give addresses and routes away: ports to be, and bridges of ports
    that are no longer wanted.
    """
    ports = desired.bridge.ports if desired.bridge else ()
    sources = {links[name].ifindex for name in ports if name in links}
    bridge = links.get(desired.bridge.name) if desired.bridge else None
    for link in links.values():
        stays = link.name in ports and bridge is not None and link.master == bridge.ifindex
        if link.alias.startswith(PORT_ALIAS) and link.master and not stays:
            sources.add(link.master)
    return frozenset(sources)


def gateways() -> frozenset[IPv4Address]:
    """Return the IPv4 gateways of the node's own routes: neighbours whose addresses nobody here may take."""
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        routes = rtnetlink.routes(sock, family=AF_INET, kind=rtnetlink.ROUTE_UNICAST)
    return frozenset(
        IPv4Address(route.gateway) for route in routes if route.gateway and route.protocol != PROTOCOL_MARK
    )


def routed_elsewhere(network: IPv4Network) -> tuple[IPv4Network, ...]:
    """Return the networks inside ``network``, smaller than it, that this node uses or routes somewhere; none of
    ours, no single addresses of its own.
    """
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        routes = rtnetlink.routes(
            sock, family=AF_INET, table=rtnetlink.TABLE_MAIN, kind=rtnetlink.ROUTE_UNICAST
        )
    found = {
        IPv4Network((route.destination, route.prefixlen))
        for route in routes
        if route.protocol != PROTOCOL_MARK and route.prefixlen > network.prefixlen
    }
    return tuple(sorted(one for one in found if one.subnet_of(network)))
