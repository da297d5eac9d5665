"""The plan for the bridge and its ports: made, filled, emptied, removed; and the network as it is afterwards.

An interface that becomes a port no longer receives anything for its own addresses (net/core/dev.c,
rx_handler), so these and their routes move to the bridge at once, and back when the port leaves.  In the
kernel, and nowhere else, stands what was whose: our bridge and each port that we put into one carry our
alias, a moved address carries :data:`netplan.model.MOVED_MARK`.
"""

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network

from netplan.errors import NetplanError
from netplan.model import (
    BRIDGE_ALIAS,
    GROUP_MAKING,
    MOVED_MARK,
    PORT_ALIAS,
    PROTOCOL_MARK,
    BridgeSpec,
    DesiredNetwork,
    Link,
    Moving,
    ObservedNetwork,
)
from netplan.operations import BridgeOperation, Operation, PortOperation, RefusedOperation

_LOOPBACK = 1


def bridge_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[Operation]:
    """Yield what the bridge and its ports need, the ports of former plans, and former bridges."""
    spec = desired.bridge
    keeps: tuple[str, ...] = ()
    if spec is not None:
        problem = next(_problems(spec, observed), None)
        if problem is not None:
            yield problem
        else:
            yield from _wanted(spec, observed)
        keeps = spec.ports
    changing = {port.master for port in map(observed.links.get, keeps) if port}
    for link in observed.links.values():
        # a bridge whose port changes to another one goes in the next round: what was moved must move on first
        if _is_former(link, spec) and link.ifindex not in changing:
            yield BridgeOperation(
                id=f"bridge/{link.name}",
                action="remove",
                before="a bridge of ours",
                reason="no longer wanted",
                name=link.name,
                index=link.ifindex,
            )
    leaving = [link for link in observed.links.values() if _is_port(link) and link.name not in keeps]
    yield from _leaving(leaving, observed)


def _is_former(link: Link, spec: BridgeSpec | None) -> bool:
    ours = link.alias.startswith(BRIDGE_ALIAS) or (link.kind == "bridge" and link.group == GROUP_MAKING)
    return ours and (spec is None or link.name != spec.name)


def after(operations: tuple[Operation, ...], observed: ObservedNetwork) -> ObservedNetwork:
    """Return the network as it is when the bridge and its ports are as planned."""
    links = dict(observed.links)
    addresses, routes = observed.addresses, observed.routes
    for one in operations:
        if isinstance(one, BridgeOperation):
            if one.action == "create":
                links[one.name] = Link(
                    one.index, one.name, "bridge", one.alias or "", 0, True, one.mac or "", 0, False, -1
                )
            elif one.action == "remove":
                del links[one.name]
                links = {
                    name: link._replace(master=0) if link.master == one.index else link
                    for name, link in links.items()
                }
        elif isinstance(one, PortOperation):
            moved = {(moving.link, moving.packed) for moving in one.moving if not moving.is_route}
            routed = {moving.link for moving in one.moving if moving.is_route}
            addresses = tuple(
                address._replace(link=one.target) if (address.link, address.packed) in moved else address
                for address in addresses
            )
            routes = tuple(
                route._replace(link=one.target)
                if route.link in routed and route.protocol != PROTOCOL_MARK
                else route
                for route in routes
            )
    return replace(observed, links=links, addresses=addresses, routes=routes)


def _problems(spec: BridgeSpec, observed: ObservedNetwork) -> Iterator[RefusedOperation]:
    """Yield what stands in the way: then nothing of the bridge is touched."""
    link = observed.links.get(spec.name)
    if link is not None and link.kind != "bridge":
        message = f"{spec.name} is there, but it is no bridge ({link.kind or 'a physical interface'})"
        hint = "choose another name for bridge, or remove that interface"
        yield _refused(f"bridge/{spec.name}", "network.no_bridge", message, hint)
    for name in spec.ports:
        port = observed.links.get(name)
        resource = f"port/{name}"
        if port is None:
            others = _eligible(observed)
            hint = (
                f"bring it back, or set bridge_ports to interfaces of this node: {', '.join(others)}"
                if others
                else "bring it back: this node has no other interface that could be a port"
            )
            yield _refused(resource, "network.no_port", f"there is no network interface {name}", hint)
        elif port.ifindex == _LOOPBACK or port.kind in {"tun", "bridge"}:
            message = f"{name} cannot be a port ({port.kind or 'loopback'})"
            yield _refused(resource, "network.no_port", message, "name a physical interface in bridge_ports")
        elif port.master and (link is None or port.master != link.ifindex) and not _is_port(port):
            message = f"{name} is in {_name(port.master, observed)} already"
            hint = f"name that one as bridge, or take it out: ip link set {name} nomaster"
            yield _refused(resource, "network.port_taken", message, hint)


def _is_port(link: Link) -> bool:
    return link.alias.startswith(PORT_ALIAS)


def _eligible(observed: ObservedNetwork) -> list[str]:
    return sorted(
        link.name
        for link in observed.links.values()
        if link.ifindex != _LOOPBACK and link.kind not in {"tun", "bridge"}
    )


def _wanted(spec: BridgeSpec, observed: ObservedNetwork) -> Iterator[Operation]:
    link = observed.links.get(spec.name)
    first = observed.links[spec.ports[0]] if spec.ports else None
    if link is None:
        # the number is chosen here, so that what stands on the bridge can be planned before it is there
        index = 1 + max(one.ifindex for one in observed.links.values())
        mac = first.mac if first else spec.mac
        yield BridgeOperation(
            id=f"bridge/{spec.name}",
            action="create",
            after=f"bridge, {mac}",
            reason="missing",
            name=spec.name,
            index=index,
            mac=mac,
            alias=BRIDGE_ALIAS,
            like=first.name if first else None,
        )
    else:
        index = link.ifindex
        if link.group == GROUP_MAKING:
            yield BridgeOperation(
                id=f"bridge/{spec.name}",
                action="change",
                before="without a mark",
                after="a bridge of ours",
                reason="its making was cut off",
                name=spec.name,
                index=index,
                alias=BRIDGE_ALIAS,
                like=first.name if first else None,
            )
        elif not link.up:
            yield BridgeOperation(
                id=f"bridge/{spec.name}",
                action="change",
                before="down",
                after="up",
                reason="is down",
                name=spec.name,
                index=index,
            )
    ours = link is None or link.alias == BRIDGE_ALIAS or link.group == GROUP_MAKING
    for name in spec.ports:
        leads = ours and name == spec.ports[0]
        operation = _entering(observed.links[name], spec.name, index, observed, leads=leads)
        if operation is not None:
            yield operation


def _entering(
    port: Link, bridge: str, index: int, observed: ObservedNetwork, *, leads: bool
) -> PortOperation | None:
    moving = tuple(one for one in observed.moving if one.link == port.ifindex)
    marked = _is_port(port)
    former = next((link for link in observed.links.values() if link.ifindex == port.master), None)
    if marked and former is not None and port.master != index:
        moving += _belongings(former, observed)
    reasons = []
    if port.master != index:
        reasons.append(f"is not in {bridge}")
    elif not marked and not moving:
        return None  # somebody else's port of somebody else's bridge: as wanted, and not ours to take out
    elif moving:
        reasons.append(f"has {', '.join(one.text for one in moving)}, which belongs on {bridge}")
    if not port.up:
        reasons.append("is down")
    if not reasons:
        return None
    return PortOperation(
        id=f"port/{port.name}",
        action="change",
        before=_name(port.master, observed) if port.master else "in no bridge",
        after=f"in {bridge}"
        + (f", with {', '.join(one.text for one in moving)} moved there" if moving else ""),
        reason=", ".join(reasons),
        name=port.name,
        master=index,
        alias=port.alias if marked else PORT_ALIAS + port.alias,
        target=index,
        names=((former or port).name, bridge),
        moving=moving,
        protocol=MOVED_MARK,
        leads=leads,
    )


def _leaving(ports: list[Link], observed: ObservedNetwork) -> Iterator[PortOperation]:
    """Yield the ports to take out; with the last one goes what was moved to the bridge."""
    for bridge in {port.master for port in ports}:
        of_bridge = sorted((port for port in ports if port.master == bridge), key=lambda port: port.ifindex)
        link = next((one for one in observed.links.values() if one.ifindex == bridge), None)
        staying = any(
            one.master == bridge and _is_port(one) and one not in of_bridge for one in observed.links.values()
        )
        # the bridge took its address from the port that brought the others
        heir = next((port for port in of_bridge if link and port.mac == link.mac), of_bridge[0])
        for port in of_bridge:
            moving = _belongings(link, observed) if link and port is heir and not staying else ()
            yield PortOperation(
                id=f"port/{port.name}",
                action="remove",
                before=f"in {link.name}" if link else "in no bridge",
                after="in no bridge"
                + (f", with {', '.join(one.text for one in moving)} moved back" if moving else ""),
                reason="no longer wanted",
                name=port.name,
                master=0,
                alias=port.alias.removeprefix(PORT_ALIAS),
                target=port.ifindex,
                names=(link.name if link else "", port.name),
                moving=moving,
            )


def _belongings(bridge: Link, observed: ObservedNetwork) -> tuple[Moving, ...]:
    """Return what goes with the port: everything of a bridge of ours, of another what was moved there, and all
    routes but those that stand on an address of its own.
    """
    here = [one for one in observed.moving if one.link == bridge.ifindex]
    if bridge.alias.startswith(BRIDGE_ALIAS):
        return tuple(here)
    addresses = [one for one in here if not one.is_route]
    own = [one for one in addresses if one.protocol != MOVED_MARK]
    networks = [ip_network((one.packed, one.prefixlen), strict=False) for one in own]
    kept = {one.packed for one in own}
    moved = (
        one
        for one in here
        if one.is_route
        and one.source not in kept
        and not (one.packed and any(ip_address(one.packed) in network for network in networks))
    )
    return (*(one for one in addresses if one.protocol == MOVED_MARK), *moved)


def _name(index: int, observed: ObservedNetwork) -> str:
    return next((link.name for link in observed.links.values() if link.ifindex == index), f"link {index}")


def _refused(resource: str, code: str, message: str, hint: str) -> RefusedOperation:
    return RefusedOperation(
        id=resource,
        action="change",
        reason=message,
        error=NetplanError(code, message, resource=resource, hint=hint),
    )
