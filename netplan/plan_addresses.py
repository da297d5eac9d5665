"""The plan for the partitions' own addresses: on the interface IPv6 with the interface's prefix length and
IPv4 as /32, on routed taps and tuns the host's ends, on the interface of the mesh those of the mesh.
"""

from collections.abc import Iterator
from ipaddress import IPv4Interface, IPv6Interface
from itertools import chain

from netplan.errors import NetplanError
from netplan.model import (
    PROTOCOL_MARK,
    Address,
    DesiredNetwork,
    ObservedNetwork,
    PartitionNetwork,
    address_text,
)
from netplan.once import once_each
from netplan.operations import AddressOperation, Operation, RefusedOperation
from netplan.plan_mesh import mesh_link
from netplan.rtnetlink import (
    IFA_F_DADFAILED,
    IFA_F_DEPRECATED,
    IFA_F_NODAD,
    IFA_F_NOPREFIXROUTE,
    IFA_F_PERMANENT,
    IFA_F_TENTATIVE,
)

# The kernel cannot change these in place, or would leave the address waiting for an answer that never comes.
_UNUSABLE = {IFA_F_DADFAILED: "duplicate address detection failed", IFA_F_TENTATIVE: "is tentative"}


def address_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[Operation]:
    """Yield what the wanted addresses need, then the removal of those with our mark that nobody wants there."""
    link, link4 = interfaces(desired, observed)
    seen: dict[bytes, list[Address]] = {}
    for address in observed.addresses:
        seen.setdefault(address.packed, []).append(address)
    names = {one.ifindex: one.name for one in observed.links.values()}
    wanted = set()
    of_mesh, mesh_ends = _of_mesh(desired, observed)
    for partition, address, settled in chain(_wanted(desired, link, link4), of_mesh):
        wanted.add((address.link, address.packed))
        if seen.get(address.packed) == settled:
            continue  # there, nowhere else, and all as we left it: so it is with nearly all of them
        operation = _operation(
            partition, address, seen.get(address.packed, []), names, markable=observed.address_marks
        )
        if operation is not None:
            yield operation
    for partition, name, address in chain(_ends(desired), mesh_ends):
        here = observed.links.get(name)
        at = address._replace(link=here.ifindex) if here else address
        wanted.add((at.link, at.packed))
        operation = _operation(
            partition, at, seen.get(at.packed, []), names, markable=observed.address_marks, on=name
        )
        if operation is not None:
            yield operation
    for address in observed.addresses:
        if address.protocol == PROTOCOL_MARK and (address.link, address.packed) not in wanted:
            yield AddressOperation(
                id=_resource(address),
                action="remove",
                before=_describe(address, names),
                reason="no longer wanted",
                delete=(address,),
            )


def interfaces(desired: DesiredNetwork, observed: ObservedNetwork) -> tuple[int, int]:
    """Return the numbers of the links for the partitions' IPv6 and IPv4 addresses; 0 for none."""
    link, link4 = (
        observed.links[name].ifindex if name else 0
        for name in (desired.interface, desired.ipv4_interface or desired.interface)
    )
    return link, link4


def _wanted(desired: DesiredNetwork, link: int, link4: int) -> Iterator[tuple[str, Address, list[Address]]]:
    for one in desired.partitions:
        yield from _of_partition(one, link, link4)


@once_each
def _of_partition(
    one: PartitionNetwork, link: int, link4: int
) -> tuple[tuple[str, Address, list[Address]], ...]:
    """Return partition and address, and what is seen of that address when all is well."""
    found = []
    if one.ipv6:
        # the on-link route stays that of the interface's own address: 500 addresses do not each bring it again
        flags = IFA_F_NODAD | IFA_F_NOPREFIXROUTE
        found.append(Address(link, one.ipv6.packed, one.ipv6.network.prefixlen, PROTOCOL_MARK, flags))
    ipv4 = (address for address in (one.ipv4, *one.world_ipv4) if address)
    found += (Address(link4, address.packed, 32, PROTOCOL_MARK, 0) for address in ipv4)
    return tuple((one.id, address, [_settled(address)]) for address in found)


_Wished = tuple[str | None, Address, list[Address]]


def _of_mesh(
    desired: DesiredNetwork, observed: ObservedNetwork
) -> tuple[list[_Wished], list[tuple[str | None, str, Address]]]:
    """Return the addresses on the interface of the mesh, as :func:`_of_partition` does; where it is still to be made, as
    :func:`_ends` does.
    """
    mesh, link = desired.mesh, mesh_link(desired, observed)
    if mesh is None or link is None:
        return [], []
    node = Address(link, mesh.address.packed, 32, PROTOCOL_MARK, 0)
    found: list[_Wished] = [(None, node, [_settled(node)])]
    for one in desired.partitions:
        found += _vpn_of_partition(one, link)
    return (found, []) if link else ([], [(owner, mesh.interface, address) for owner, address, _ in found])


@once_each
def _vpn_of_partition(one: PartitionNetwork, link: int) -> tuple[_Wished, ...]:
    if one.vpn_ipv4 is None:
        return ()
    address = Address(link, one.vpn_ipv4.packed, 32, PROTOCOL_MARK, 0)
    return ((one.id, address, [_settled(address)]),)


def _ends(desired: DesiredNetwork) -> Iterator[tuple[str, str, Address]]:
    for one in desired.partitions:
        yield from _ends_of_partition(one)


@once_each
def _ends_of_partition(one: PartitionNetwork) -> tuple[tuple[str, str, Address], ...]:
    """Return partition, link and address of the host's ends; link number 0: the link may be still to be made."""
    found = []
    if one.tap and one.tap.ipv6:
        # its network is routed by the guest's address (netplan.plan_routes), as slapformat does
        found.append((one.tap.name, _on_link(one.tap.ipv6, IFA_F_NODAD | IFA_F_NOPREFIXROUTE)))
    if one.tun and one.tun.ipv6:
        found.append((one.tun.name, _on_link(one.tun.ipv6, IFA_F_NODAD)))
    if one.tun and one.tun.ipv4:
        found.append((one.tun.name, _on_link(one.tun.ipv4, 0)))
    return tuple((one.id, name, address) for name, address in found)


def _settled(wanted: Address) -> Address:
    """Return what the kernel makes of an address that we set."""
    return Address(*wanted[:4], wanted.flags | IFA_F_PERMANENT | IFA_F_DEPRECATED)


def _on_link(interface: IPv4Interface | IPv6Interface, flags: int) -> Address:
    return Address(0, interface.packed, interface.network.prefixlen, PROTOCOL_MARK, flags)


def _operation(
    partition: str | None,
    wanted: Address,
    seen: list[Address],
    names: dict[int, str],
    *,
    markable: bool,
    on: str = "",
) -> Operation | None:
    here = next((one for one in seen if one.link == wanted.link), None)
    foreign = [one for one in seen if one.protocol != PROTOCOL_MARK and not _adoptable(one, wanted)]
    if foreign:
        return _taken(partition, foreign[0], names)
    if here is None:
        return AddressOperation(
            id=_resource(wanted),
            action="create",
            partition=partition,
            after=f"{wanted.text()} on {on}" if on else _describe(wanted, names),
            reason="missing",
            add=wanted,
            on=on or None,
        )
    reasons = list(_differences(here, wanted, markable=markable))
    if not reasons:
        return None
    again = here.prefixlen != wanted.prefixlen or any(here.flags & flag for flag in _UNUSABLE)
    if not again:
        # an address of slapformat's keeps its on-link route: whether the interface has another one is not
        # ours to know
        kept = here.flags & IFA_F_NOPREFIXROUTE
        wanted = wanted._replace(flags=wanted.flags & ~IFA_F_NOPREFIXROUTE | kept)
    return AddressOperation(
        id=_resource(wanted),
        action="change",
        partition=partition,
        before=_describe(here, names),
        after=_describe(wanted, names),
        reason=", ".join(reasons),
        delete=(here,) if again else (),
        add=wanted,
    )


def _adoptable(address: Address, wanted: Address) -> bool:
    return address.link == wanted.link and address.prefixlen == wanted.prefixlen


def _differences(here: Address, wanted: Address, *, markable: bool) -> Iterator[str]:
    if here.prefixlen != wanted.prefixlen:
        yield f"prefix length is {here.prefixlen}, should be {wanted.prefixlen}"
    for flag, words in _UNUSABLE.items():
        if here.flags & flag:
            yield words
    if not here.flags & IFA_F_DEPRECATED:
        yield "preferred lifetime is not 0, so others' traffic may leave with it"
    if wanted.flags & IFA_F_NODAD and not here.flags & IFA_F_NODAD:
        yield "duplicate address detection is on"
    # before Linux 5.18 an address that keeps its prefix route cannot be marked
    if here.protocol != PROTOCOL_MARK and (markable or here.flags & IFA_F_NOPREFIXROUTE):
        yield "is not marked as ours"


def _resource(address: Address) -> str:
    return f"address/{address_text(address.packed)}"


def _describe(address: Address, names: dict[int, str]) -> str:
    return f"{address.text()} on {names.get(address.link, f'link {address.link}')}"


def _taken(partition: str | None, foreign: Address, names: dict[int, str]) -> RefusedOperation:
    message = f"{_describe(foreign, names)} is already there and not ours"
    return RefusedOperation(
        id=_resource(foreign),
        action="create",
        partition=partition,
        before=_describe(foreign, names),
        reason=message,
        error=NetplanError(
            "network.address_taken",
            message,
            resource=_resource(foreign),
            hint="remove that address, or choose another network for the partitions",
        ),
    )
