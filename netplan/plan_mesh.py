"""The plan for the interface of the mesh: a persistent tun without IPv6, that root alone attaches tincd to.

It is there before tincd and outlives it, so addresses, routes and rules do, too: while tincd is away, what is for the
mesh is dropped in the tun, and while the tun is away, refused by a route behind that over it
(:mod:`netplan.plan_routes`).  Without several queues (IFF_MULTI_QUEUE): whoever attaches must ask for what it was made
with (drivers/net/tun.c, tun_set_iff), and tincd asks for one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from netplan.errors import NetplanError
from netplan.model import GROUP_GOING, MESH_ALIAS, DesiredNetwork, Link, MeshSpec, ObservedNetwork
from netplan.once import once
from netplan.operations import Operation, RefusedOperation, TapOperation

_ROOT = 0


def settled(desired: DesiredNetwork, links: Mapping[str, Link]) -> DesiredNetwork:
    """Return what can be made of what is wanted: where somebody else's link has the name of the mesh's, that is said."""
    mesh = desired.mesh
    if mesh is None or mesh.taken or not _is_taken(links.get(mesh.interface)):
        return desired
    return _taken(desired)


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
