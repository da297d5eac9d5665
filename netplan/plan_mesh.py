"""The plan for the interface of the mesh: a persistent tun without IPv6, that root alone attaches tincd to.

It is there before tincd and outlives it, so addresses, routes and rules do, too: while tincd is away, what is for the
mesh is dropped in the tun, and while the tun is away, refused by a route behind that over it
(:mod:`netplan.plan_routes`).  Without several queues (IFF_MULTI_QUEUE): whoever attaches must ask for what it was made
with (drivers/net/tun.c, tun_set_iff), and tincd asks for one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address

from netplan.errors import NetplanError
from netplan.model import (
    GROUP_GOING,
    MESH_ALIAS,
    PROTOCOL_MARK,
    Address,
    DesiredNetwork,
    Link,
    MeshSpec,
    ObservedNetwork,
)
from netplan.once import once
from netplan.operations import Operation, RefusedOperation, TapOperation

_ROOT = 0


def settled(
    desired: DesiredNetwork, links: Mapping[str, Link], addresses: Sequence[Address]
) -> DesiredNetwork:
    """Return what can be made of what is wanted: where somebody else's link has the name of the mesh's, that is said;
    where the node itself is in its network by another interface, there is no mesh.
    """
    mesh = desired.mesh
    if mesh is None or mesh.taken:
        return desired
    if _in_use(mesh, links, addresses):
        return _without(desired)
    return _taken(desired) if _is_taken(links.get(mesh.interface)) else desired


def _in_use(mesh: MeshSpec, links: Mapping[str, Link], addresses: Sequence[Address]) -> Address | None:
    """Return an address of the network that the node has elsewhere: the rules of the mesh would cut it off there.

    A mesh that is there already stays as it is: who gives the node such an address later does not end it.
    """
    if any(one.alias.startswith(MESH_ALIAS) for one in links.values()):
        return None
    return next(
        (
            one
            for one in addresses
            if len(one.packed) == len(mesh.address.packed)
            and one.protocol != PROTOCOL_MARK
            and IPv4Address(one.packed) in mesh.network
        ),
        None,
    )


@once
def _without(desired: DesiredNetwork) -> DesiredNetwork:
    partitions = tuple(replace(one, vpn_ipv4=None) if one.vpn_ipv4 else one for one in desired.partitions)
    others = desired.host_ipv6 or desired.host_ipv4
    return replace(
        desired,
        partitions=partitions,
        mesh=None,
        local_source_table=desired.local_source_table and bool(others),
    )


def refusals(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[RefusedOperation]:
    """Yield why there can be no mesh here at all, ``desired`` being what was asked for."""
    mesh = desired.mesh
    used = _in_use(mesh, observed.links, observed.addresses) if mesh and not mesh.taken else None
    if mesh is None or used is None:
        return
    names = {one.ifindex: one.name for one in observed.links.values()}
    where = f"{used.text()} on {names.get(used.link, used.link)}"
    message = f"this node has {where}, which is in {mesh.network}, the network of the mesh"
    hint = "set another network in [tinc], on all nodes, or take that address away: the mesh would cut it off"
    identity = f"mesh/{mesh.interface}"
    error = NetplanError("network.range_taken", message, resource=identity, hint=hint)
    yield RefusedOperation(id=identity, action="create", reason=message, error=error)


@once
def _taken(desired: DesiredNetwork) -> DesiredNetwork:
    return replace(desired, mesh=replace(desired.mesh, taken=True)) if desired.mesh else desired


def _is_taken(link: Link | None) -> bool:
    """Whether it is no tun of ours: one that bears our mark, or is root's."""
    if link is None:
        return False
    ours = link.alias.startswith(MESH_ALIAS) or link.tap_owner == _ROOT
    return link.kind != "tun" or link.tap or not ours


def mesh_link(desired: DesiredNetwork, observed: ObservedNetwork) -> int | None:
    """Return the number of the interface of the mesh, 0 where it is still to be made, None where nothing is to be put on
    it.
    """
    mesh = desired.mesh
    if mesh is None or mesh.taken:
        return None
    link = observed.links.get(mesh.interface)
    return link.ifindex if link else 0


def mesh_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[Operation]:
    """Yield what the interface of the mesh needs, then the removal of one with our mark that nobody wants."""
    mesh = desired.mesh
    if mesh is not None:
        yield from _wanted(mesh, observed)
    for link in observed.links.values():
        if link.alias.startswith(MESH_ALIAS) and (mesh is None or link.name != mesh.interface):
            yield TapOperation(
                id=f"mesh/{link.name}",
                action="remove",
                before=_describe(link),
                reason="no longer wanted",
                name=link.name,
            )


def _wanted(mesh: MeshSpec, observed: ObservedNetwork) -> Iterator[Operation]:
    identity, link = f"mesh/{mesh.interface}", observed.links.get(mesh.interface)
    made = TapOperation(
        id=identity,
        action="create",
        after=f"tun of root, without IPv6, for {mesh.network}",
        reason="missing",
        name=mesh.interface,
        tun=True,
        owner=_ROOT,
        alias=MESH_ALIAS,
        up=True,
        without_ipv6=True,
    )
    if link is None:
        yield made
        return
    if mesh.taken:
        message = f"{link.name} is there and not ours ({_describe(link)})"
        hint = f"remove or rename that interface (ip link delete {link.name}), or set interface in [tinc]"
        error = NetplanError("network.name_taken", message, resource=identity, hint=hint)
        yield RefusedOperation(id=identity, action="change", reason=message, error=error)
        return
    reasons = ", ".join(_differences(link, ipv6=observed.mesh_ipv6))
    if reasons:
        lost = link.tap_owner != _ROOT
        yield replace(
            made,
            action="change",
            before=_describe(link),
            reason=reasons,
            owner=_ROOT if lost else None,
            alias=MESH_ALIAS if lost or link.alias != MESH_ALIAS else None,
            up=lost or not link.up,
            group=0 if link.group >= GROUP_GOING else None,
            anew=lost,
            without_ipv6=lost or observed.mesh_ipv6,
        )


def _differences(link: Link, *, ipv6: bool) -> Iterator[str]:
    if link.tap_owner != _ROOT:
        yield f"owner is {_owner(link)}, should be root"
    if not link.up:
        yield "is down"
    if link.alias != MESH_ALIAS:
        yield "is not marked as ours"
    if link.group >= GROUP_GOING:
        yield "its removal was cut off"
    if ipv6:
        yield "has IPv6"


def _describe(link: Link) -> str:
    state = "" if link.up else ", down"
    if link.kind != "tun":
        return f"{link.kind or 'a physical interface'}{state}"
    return f"{'tap' if link.tap else 'tun'} of {_owner(link)}{state}"


def _owner(link: Link) -> str:
    return "root" if link.tap_owner == _ROOT else "nobody" if link.tap_owner < 0 else f"uid {link.tap_owner}"
