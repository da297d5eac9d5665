"""The plan for routes: ranges, routed taps, gateways of routable addresses, a default route that says which
source to use, the mesh, and the local source table.

Why the default route: without a source hint, choosing one costs the kernel 143 µs per unconnected packet at
500 addresses (facts/packets.md, B7).  The host's own route is not touched: ours is a copy of the best one
with a better metric and the hint, made anew when the original changes and removed when it is gone.
"""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from socket import AF_INET, AF_INET6
from typing import NamedTuple

from netplan.model import (
    PROTOCOL_MARK,
    DesiredNetwork,
    ObservedNetwork,
    PartitionNetwork,
    Route,
    address_text,
)
from netplan.once import once_each
from netplan.operations import Operation, RouteOperation
from netplan.plan_addresses import interfaces
from netplan.plan_mesh import mesh_link
from netplan.rtnetlink import (
    ROUTE_LOCAL,
    ROUTE_UNICAST,
    ROUTE_UNREACHABLE,
    TABLE_LOCAL,
    TABLE_LOCAL_SOURCE,
    TABLE_MAIN,
)

TABLE_GATEWAYS = TABLE_LOCAL_SOURCE + 1
"""The first of our tables for gateways of routable addresses: one for each gateway, in their order."""

_LOOPBACK = 1
_METRIC = 1024  # what the kernel gives an IPv6 route that names none (IP6_RT_PRIO_USER)
_MESH_METRIC, _NO_MESH_METRIC = 112, 11200
"""Ours alone: setting an IPv4 route replaces one of the same destination and metric, whoever's it is."""
_ONLINK = 4  # RTNH_F_ONLINK: the gateway is a neighbour although no prefix covers it


class _Wanted(NamedTuple):
    """A route that shall be; ``on`` is its link when that may still have to be made."""

    partition: str | None
    identity: str
    route: Route
    on: str | None = None


def route_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[Operation]:
    """Yield what the wanted routes need, then the removal of those with our mark that nobody wants."""
    there = set(observed.routes)
    wanted = set()
    missing = []
    for one in _wanted(desired, observed):
        wanted.add(one.route)
        if one.route not in there:
            missing.append(one)
    names = {link.ifindex: link.name for link in observed.links.values()}
    unmarked = {route._replace(protocol=0): route for route in observed.routes} if missing else {}
    for partition, identity, route, on in missing:
        here = unmarked.get(route._replace(protocol=0))
        yield RouteOperation(
            id=identity,
            action="change" if here else "create",
            partition=partition,
            before=_describe(here, names) if here else None,
            after=_describe(route, names, on),
            reason="is not marked as ours" if here else "missing",
            add=route,
            on=None if route.link else on,
        )
    for route in observed.routes:
        if route.protocol == PROTOCOL_MARK and route not in wanted:
            yield RouteOperation(
                id=_identity(route),
                action="remove",
                before=_describe(route, names),
                reason="no longer wanted",
                delete=route,
            )


def _wanted(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[_Wanted]:
    mesh = desired.mesh
    sources: tuple[IPv6Address | None, IPv4Address | None, IPv4Address | None] = (None, None, None)
    if desired.local_source_table:
        reachable = mesh_link(desired, observed) is not None
        sources = (desired.host_ipv6, desired.host_ipv4, mesh.address if mesh and reachable else None)
    for one in desired.partitions:
        yield from _of_partition(one, *sources)
        if one.tap and (one.tap.ipv6 or one.tap.ipv4):
            here = observed.links.get(one.tap.name)
            yield from _tap_routes(one, here.ifindex if here else 0)
    yield from _gateway_routes(desired, interfaces(desired, observed)[1])
    if mesh is not None:
        yield from _mesh_routes(mesh.network, mesh.address, mesh.interface, mesh_link(desired, observed))
    if desired.host_ipv6 is not None:
        route_with_hint = _default(desired.host_ipv6, observed)
        if route_with_hint:
            yield _Wanted(None, _identity(route_with_hint), route_with_hint)


def _gateway_routes(desired: DesiredNetwork, link: int) -> Iterator[_Wanted]:
    """Yield for each gateway of routable addresses the way to it, and to the networks that need none."""
    tables = gateway_tables(desired)
    wanted: dict[Route, None] = {}
    for one in desired.partitions:
        if one.routable_ipv4:
            gateway, network = one.routable_ipv4.gateway, one.routable_ipv4.interface.network
            default = _in_table(tables[gateway], link, b"", 0, gateway.packed, _ONLINK)
            wanted[default] = None
            if network.prefixlen < network.max_prefixlen:
                near = _in_table(
                    tables[gateway], link, network.network_address.packed, network.prefixlen, b"", 0
                )
                wanted[near] = None
    for route in wanted:
        yield _Wanted(None, _identity(route), route)


def _mesh_routes(
    network: IPv4Network, source: IPv4Address, interface: str, link: int | None
) -> Iterator[_Wanted]:
    """Yield the way to the mesh, and behind it the one that is left without an interface: nothing goes by the default
    route.
    """
    destination = network.network_address.packed
    if link is not None:
        way = _over(link, destination, network.prefixlen, b"")
        way = way._replace(metric=_MESH_METRIC, source=source.packed)
        yield _Wanted(None, _identity(way), way, interface)
    none = _over(0, destination, network.prefixlen, b"")
    none = none._replace(kind=ROUTE_UNREACHABLE, metric=_NO_MESH_METRIC)
    yield _Wanted(None, _identity(none), none)


def _in_table(table: int, link: int, destination: bytes, length: int, gateway: bytes, flags: int) -> Route:
    return Route(
        table, ROUTE_UNICAST, PROTOCOL_MARK, destination, length, gateway, link, 0, b"", flags, AF_INET
    )


def gateway_tables(desired: DesiredNetwork) -> dict[IPv4Address, int]:
    """Return the number of our routing table for each gateway of a routable address."""
    gateways = sorted({one.routable_ipv4.gateway for one in desired.partitions if one.routable_ipv4})
    return {gateway: TABLE_GATEWAYS + place for place, gateway in enumerate(gateways)}


def _local_sources(
    one: PartitionNetwork,
    host_ipv6: IPv6Address | None,
    host_ipv4: IPv4Address | None,
    mesh: IPv4Address | None,
) -> Iterator[tuple[bytes, bytes]]:
    """Yield each address of a partition that others on this host connect to, and the source they shall have."""
    if host_ipv6:
        yield from ((ipv6.packed, host_ipv6.packed) for ipv6 in one.reached_ipv6)
    for ipv4 in one.reached_ipv4:
        source = mesh if ipv4 == one.vpn_ipv4 else host_ipv4
        if source:
            yield ipv4.packed, source.packed


@once_each
def _of_partition(
    one: PartitionNetwork,
    host_ipv6: IPv6Address | None,
    host_ipv4: IPv4Address | None,
    mesh: IPv4Address | None,
) -> tuple[_Wanted, ...]:
    """Return the routes to the partition's range, and those of the local source table."""
    routes = []
    if one.ipv6_range:
        network = one.ipv6_range
        routes.append(_local(TABLE_LOCAL, network.network_address.packed, network.prefixlen))
    routes += (
        _local(TABLE_LOCAL_SOURCE, address, 8 * len(address), source)
        for address, source in _local_sources(one, host_ipv6, host_ipv4, mesh)
    )
    return tuple(_Wanted(one.id, _identity(route), route) for route in routes)


@once_each
def _tap_routes(one: PartitionNetwork, link: int) -> tuple[_Wanted, ...]:
    """Return the routes to what lies behind a routed tap: the guest, and its network by way of the guest."""
    routes = []
    tap = one.tap
    if tap and tap.ipv4:
        routes.append(_over(link, tap.ipv4.packed, 32, b""))
    if tap and tap.ipv6:
        network = tap.ipv6.network
        guest = (network.network_address + 1).packed
        routes += (
            _over(link, guest, 128, b""),
            _over(link, network.network_address.packed, network.prefixlen, guest),
        )
    return tuple(_Wanted(one.id, _identity(route), route, tap.name if tap else None) for route in routes)


def _over(link: int, destination: bytes, length: int, gateway: bytes) -> Route:
    family, metric = (AF_INET6, _METRIC) if len(destination) == 16 else (AF_INET, 0)
    return Route(
        TABLE_MAIN, ROUTE_UNICAST, PROTOCOL_MARK, destination, length, gateway, link, metric, b"", 0, family
    )


def _local(table: int, destination: bytes, length: int, source: bytes = b"") -> Route:
    family, metric = (AF_INET6, _METRIC) if len(destination) == 16 else (AF_INET, 0)
    return Route(
        table, ROUTE_LOCAL, PROTOCOL_MARK, destination, length, b"", _LOOPBACK, metric, source, 0, family
    )


def _default(source: IPv6Address, observed: ObservedNetwork) -> Route | None:
    """Return the copy of the best default route; None without one, or where no metric is better than its own.

    Routes over several gateways at once (RTA_MULTIPATH) and nexthop groups name no link here and are left
    alone.
    """
    originals = [
        route
        for route in observed.routes
        if route.table == TABLE_MAIN
        and route.family == AF_INET6
        and route.kind == ROUTE_UNICAST
        and route.prefixlen == 0
        and route.protocol != PROTOCOL_MARK
        and route.link
    ]
    best = min(originals, key=lambda route: route.metric, default=None)
    if best is None or best.metric <= 1:  # metric 0 reads as 1024 (net/ipv6/route.c, ip6_route_info_create)
        return None
    return best._replace(protocol=PROTOCOL_MARK, metric=best.metric - 1, source=source.packed)


def _identity(route: Route) -> str:
    if route.table >= TABLE_GATEWAYS:
        return f"gateway/{route.table}/{route.text()}"
    kind = {TABLE_LOCAL: "range", TABLE_LOCAL_SOURCE: "source"}.get(route.table, "route")
    kind = "unreachable" if route.kind == ROUTE_UNREACHABLE else kind
    return f"{kind}/{route.text()}"


_KINDS = {ROUTE_LOCAL: "local", ROUTE_UNREACHABLE: "unreachable"}


def _describe(route: Route, names: dict[int, str], on: str | None = None) -> str:
    words = [f"{_KINDS[route.kind]} {route.text()}" if route.kind in _KINDS else route.text()]
    if route.gateway:
        words.append(f"via {address_text(route.gateway)}")
    if on or route.link:
        words.append(f"dev {on or names.get(route.link, route.link)}")
    if route.source:
        words.append(f"src {address_text(route.source)}")
    if route.kind != ROUTE_LOCAL and route.metric:
        words.append(f"metric {route.metric}")
    return " ".join(words)
