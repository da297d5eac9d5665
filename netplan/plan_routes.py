"""The plan for IPv6 routes: ranges, a default route that says which source to use, and the local source
table.

Why the default route: without a source hint, choosing one costs the kernel 143 µs per unconnected packet at
500 addresses (facts/packets.md, B7).  The host's own route is not touched: ours is a copy of the best one
with a better metric and the hint, made anew when the original changes and removed when it is gone.
"""

from collections.abc import Iterator
from ipaddress import IPv6Address

from netplan.model import (
    PROTOCOL_MARK,
    DesiredNetwork,
    ObservedNetwork,
    Operation,
    Route,
    RouteOperation,
    address_text,
)
from netplan.rtnetlink import ROUTE_LOCAL, ROUTE_UNICAST, TABLE_LOCAL, TABLE_LOCAL_SOURCE, TABLE_MAIN

_LOOPBACK = 1
_METRIC = 1024  # what the kernel gives a route that names none (IP6_RT_PRIO_USER)


def route_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[Operation]:
    """Yield what the wanted routes need, then the removal of those with our mark that nobody wants."""
    wanted = set()
    seen = {route._replace(protocol=0): route for route in observed.routes}
    for partition, identity, route in _wanted(desired, observed):
        wanted.add(route)
        here = seen.get(route._replace(protocol=0))
        if here is None or here.protocol != PROTOCOL_MARK:
            yield RouteOperation(
                id=identity,
                action="change" if here else "create",
                partition=partition,
                before=_describe(here, observed) if here else None,
                after=_describe(route, observed),
                reason="is not marked as ours" if here else "missing",
                add=route,
            )
    for route in observed.routes:
        if route.protocol == PROTOCOL_MARK and route not in wanted:
            yield RouteOperation(
                id=_identity(route),
                action="remove",
                before=_describe(route, observed),
                reason="no longer wanted",
                delete=route,
            )


def _wanted(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[tuple[str | None, str, Route]]:
    for one in desired.partitions:
        if one.ipv6_range:
            network = one.ipv6_range
            route = _local(TABLE_LOCAL, network.network_address.packed, network.prefixlen)
            yield one.id, _identity(route), route
        if one.ipv6 and desired.local_source_table and desired.host_ipv6:
            route = _local(TABLE_LOCAL_SOURCE, one.ipv6.packed, 128, desired.host_ipv6.packed)
            yield one.id, _identity(route), route
    if desired.host_ipv6 is not None:
        route_with_hint = _default(desired.host_ipv6, observed)
        if route_with_hint:
            yield None, _identity(route_with_hint), route_with_hint


def _local(table: int, destination: bytes, length: int, source: bytes = b"") -> Route:
    return Route(
        table, ROUTE_LOCAL, PROTOCOL_MARK, destination, length, b"", _LOOPBACK, _METRIC, source, flags=0
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
    kind = {TABLE_LOCAL: "range", TABLE_LOCAL_SOURCE: "source"}.get(route.table, "route")
    return f"{kind}/{route.text()}"


def _describe(route: Route, observed: ObservedNetwork) -> str:
    link = next((one.name for one in observed.links.values() if one.ifindex == route.link), str(route.link))
    words = [f"local {route.text()}" if route.kind == ROUTE_LOCAL else route.text()]
    if route.gateway:
        words.append(f"via {address_text(route.gateway)}")
    words.append(f"dev {link}")
    if route.source:
        words.append(f"src {address_text(route.source)}")
    if route.kind != ROUTE_LOCAL:
        words.append(f"metric {route.metric}")
    return " ".join(words)
