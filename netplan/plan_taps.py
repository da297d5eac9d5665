"""The plan for taps and tuns: missing, not as wanted, taken by somebody else, no longer wanted."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from netplan.errors import NetplanError
from netplan.model import (
    ALIAS_MARK,
    GROUP_GOING,
    GUARDED_PORT,
    MESH_ALIAS,
    DesiredNetwork,
    Link,
    ObservedNetwork,
    PartitionNetwork,
    TapSpec,
    TunSpec,
)
from netplan.operations import Operation, RefusedOperation, TapOperation


def tap_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[Operation]:
    """Yield what the wanted taps and tuns need, then the removal of those with our mark that nobody wants."""
    wanted = set()
    names = {link.ifindex: link.name for link in observed.links.values()}
    for partition in desired.partitions:
        if partition.tap is not None:
            wanted.add(partition.tap.name)
            yield from _wanted(partition, partition.tap, observed, names)
        if partition.tun is not None:
            wanted.add(partition.tun.name)
            yield from _wanted_tun(partition, partition.tun, observed)
    for link in observed.links.values():
        ours = link.alias.startswith(ALIAS_MARK) and not link.alias.startswith(MESH_ALIAS)
        if link.kind == "tun" and ours and link.name not in wanted:
            yield TapOperation(
                id=f"{_kind(link)}/{link.name}",
                action="remove",
                partition=link.alias.removeprefix(ALIAS_MARK),
                before=_describe(link, names),
                reason="no longer wanted",
                name=link.name,
            )


def _wanted(
    partition: PartitionNetwork, tap: TapSpec, observed: ObservedNetwork, names: Mapping[int, str]
) -> Iterator[Operation]:
    bridge = observed.links.get(tap.bridge) if tap.bridge else None
    link = observed.links.get(tap.name)
    if tap.bridge and (bridge is None or bridge.kind != "bridge"):
        why = "is not a bridge" if bridge else "does not exist"
        yield _refused(
            partition,
            tap,
            link,
            "network.no_bridge",
            f"{tap.bridge} {why}",
            "create the bridge, or change its name",
        )
        return
    if link is not None and (taken := _taken(link, tap, names)):
        hint = f"remove or rename that interface, or change tap_base_name (ip link delete {tap.name})"
        yield _refused(partition, tap, link, "network.name_taken", taken, hint)
        return
    master = bridge.ifindex if bridge else 0
    alias = ALIAS_MARK + partition.id
    made = TapOperation(
        id=f"tap/{tap.name}",
        action="create",
        partition=partition.id,
        after=_wish(tap),
        reason="missing",
        name=tap.name,
        owner=tap.owner_uid,
        alias=alias,
        mac=tap.mac,
        master=master or None,
        up=True,
        forwards=_forwards(tap) or None,
    )
    if link is None:
        yield made
        return
    reasons = ", ".join(_differences(link, tap, alias, master, names))
    if not reasons:
        return
    change = replace(
        made,
        action="change",
        before=_describe(link, names),
        reason=reasons,
        group=0 if link.group >= GROUP_GOING else None,
        anew=link.alias == alias,
    )
    if link.tap_owner != tap.owner_uid:
        yield change  # all of it, should it have to be made again
        return
    yield replace(
        change,
        owner=None,
        alias=alias if link.alias != alias else None,
        mac=tap.mac if _foreign_mac(link, tap) else None,
        master=master if link.master != master else None,
        up=not link.up,
        forwards=_forwards(tap) if _other_port(link, tap, master) else None,
        anew=False,
    )


def _forwards(tap: TapSpec) -> int:
    return GUARDED_PORT if tap.guard and tap.bridge else 0


def _other_port(link: Link, tap: TapSpec, master: int) -> bool:
    """Whether its port must be set: one that is put into a bridge begins anew; what we did not set stays."""
    if not master:
        return False  # no port any more, which a bridge that goes in the same plan may have made of it
    if link.master != master:
        return bool(_forwards(tap))
    return link.forwards != _forwards(tap) and GUARDED_PORT in {link.forwards, _forwards(tap)}


def _wanted_tun(partition: PartitionNetwork, tun: TunSpec, observed: ObservedNetwork) -> Iterator[Operation]:
    link = observed.links.get(tun.name)
    identity, alias, wish = f"tun/{tun.name}", ALIAS_MARK + partition.id, f"tun of uid {tun.owner_uid}"
    if link is None:
        yield TapOperation(
            id=identity,
            action="create",
            partition=partition.id,
            after=wish,
            reason="missing",
            name=tun.name,
            tun=True,
            owner=tun.owner_uid,
            alias=alias,
            up=True,
        )
        return
    ours = link.alias.startswith(ALIAS_MARK)
    if link.kind != "tun" or link.tap or not (ours or link.tap_owner == tun.owner_uid):
        message = f"{link.name} is there and not ours ({_describe(link, {})})"
        hint = f"remove or rename that interface (ip link delete {tun.name})"
        error = NetplanError("network.name_taken", message, resource=identity, hint=hint)
        yield RefusedOperation(
            id=identity, action="change", partition=partition.id, reason=message, error=error
        )
        return
    reasons = [] if link.tap_owner == tun.owner_uid else [f"owner is {_owner(link)}"]
    reasons += [] if link.up else ["is down"]
    reasons += [] if link.alias == alias else ["is not marked as this partition's"]
    reasons += ["its removal was cut off"] if link.group >= GROUP_GOING else []
    if reasons:
        lost = link.tap_owner != tun.owner_uid
        yield TapOperation(
            id=identity,
            action="change",
            partition=partition.id,
            before=_describe(link, {}),
            after=wish,
            reason=", ".join(reasons),
            name=tun.name,
            tun=True,
            owner=tun.owner_uid if lost else None,
            alias=alias if lost or link.alias != alias else None,
            up=lost or not link.up,
            group=0 if link.group >= GROUP_GOING else None,
            anew=lost and link.alias == alias,
        )


def _taken(link: Link, tap: TapSpec, names: Mapping[int, str]) -> str:
    """Say why a like-named link cannot be taken over; a tap of the right owner is (slapformat made it)."""
    if not link.tap:
        return f"an interface of another kind ({link.kind or 'physical'}) is called {link.name}"
    if not link.alias.startswith(ALIAS_MARK) and link.tap_owner != tap.owner_uid:
        return f"{link.name} is not ours ({_describe(link, names)})"
    return ""


def _differences(
    link: Link, tap: TapSpec, alias: str, master: int, names: Mapping[int, str]
) -> Iterator[str]:
    if link.tap_owner != tap.owner_uid:
        yield f"owner is {_owner(link)}, should be {tap.owner_uid}"
    if link.master != master:
        yield f"is in {_name(link.master, names)}, should be in {tap.bridge or 'no bridge'}"
    if not link.up:
        yield "is down"
    if link.group >= GROUP_GOING:
        yield "its removal was cut off"
    if _foreign_mac(link, tap):
        yield f"address is {link.mac}, should be {tap.mac}"
    if link.master == master and _other_port(link, tap, master):
        yield "its port forwards other frames than the guard needs"
    if link.alias != alias:
        yield f"alias is {link.alias!r}, should be {alias!r}" if link.alias else "is not marked as ours"


def _foreign_mac(link: Link, tap: TapSpec) -> bool:
    """Whether the MAC of the host's end must change: it could become that of the bridge.

    A routed tap keeps what it has, for its guest knows the host by it.
    """
    return bool(tap.bridge) and link.mac != tap.mac


def _kind(link: Link) -> str:
    return "tap" if link.tap else "tun"


def _describe(link: Link, names: Mapping[int, str]) -> str:
    state = "" if link.up else ", down"
    if link.kind == "tun" and not link.tap:
        return f"tun of uid {_owner(link)}{state}"
    where = f"in {_name(link.master, names)}" if link.master else "routed"
    kind = f"tap of uid {_owner(link)}" if link.tap else link.kind or "interface"
    return f"{kind}, {link.mac}, {where}{state}"


def _wish(tap: TapSpec) -> str:
    return f"tap of uid {tap.owner_uid}, {tap.mac}, " + (f"in {tap.bridge}" if tap.bridge else "routed")


def _owner(link: Link) -> str:
    return "nobody" if link.tap_owner < 0 else str(link.tap_owner)


def _name(index: int, names: Mapping[int, str]) -> str:
    return names.get(index, f"link {index}") if index else "no bridge"


def _refused(
    partition: PartitionNetwork, tap: TapSpec, link: Link | None, code: str, message: str, hint: str
) -> RefusedOperation:
    resource = f"tap/{tap.name}"
    return RefusedOperation(
        id=resource,
        action="change" if link else "create",
        partition=partition.id,
        reason=message,
        error=NetplanError(code, message, resource=resource, hint=hint),
    )
