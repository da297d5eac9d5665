"""The plan for taps: missing, not as wanted, taken by somebody else, no longer wanted."""

from collections.abc import Iterator

from netplan.errors import NetplanError
from netplan.model import (
    ALIAS_MARK,
    GROUP_GOING,
    DesiredNetwork,
    Link,
    ObservedNetwork,
    Operation,
    PartitionNetwork,
    RefusedOperation,
    TapOperation,
    TapSpec,
)


def tap_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[Operation]:
    """Yield what the wanted taps need, then the removal of those with our mark that nobody wants."""
    wanted = set()
    for partition in desired.partitions:
        if partition.tap is not None:
            wanted.add(partition.tap.name)
            yield from _wanted(partition, partition.tap, observed)
    for link in observed.links.values():
        if link.tap and link.alias.startswith(ALIAS_MARK) and link.name not in wanted:
            yield TapOperation(
                id=f"tap/{link.name}",
                action="remove",
                partition=link.alias.removeprefix(ALIAS_MARK),
                before=_describe(link, observed),
                reason="no longer wanted",
                name=link.name,
            )


def _wanted(partition: PartitionNetwork, tap: TapSpec, observed: ObservedNetwork) -> Iterator[Operation]:
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
    if link is not None and (taken := _taken(link, tap, observed)):
        hint = f"remove or rename that interface, or change tap_base_name (ip link delete {tap.name})"
        yield _refused(partition, tap, link, "network.name_taken", taken, hint)
        return
    master = bridge.ifindex if bridge else 0
    alias = ALIAS_MARK + partition.id
    if link is None:
        yield TapOperation(
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
        )
    elif reasons := list(_differences(link, tap, alias, master, observed)):
        yield TapOperation(
            id=f"tap/{tap.name}",
            action="change",
            partition=partition.id,
            before=_describe(link, observed),
            after=_wish(tap),
            reason=", ".join(reasons),
            name=tap.name,
            owner=tap.owner_uid if link.tap_owner != tap.owner_uid else None,
            alias=alias if link.alias != alias else None,
            mac=tap.mac if link.mac != tap.mac else None,
            master=master if link.master != master else None,
            up=not link.up,
            group=0 if link.group >= GROUP_GOING else None,
        )


def _taken(link: Link, tap: TapSpec, observed: ObservedNetwork) -> str:
    """Say why a like-named link cannot be taken over; a tap of the right owner is (slapformat made it)."""
    if not link.tap:
        return f"an interface of another kind ({link.kind or 'physical'}) is called {link.name}"
    if not link.alias.startswith(ALIAS_MARK) and link.tap_owner != tap.owner_uid:
        return f"{link.name} is not ours ({_describe(link, observed)})"
    return ""


def _differences(
    link: Link, tap: TapSpec, alias: str, master: int, observed: ObservedNetwork
) -> Iterator[str]:
    if link.tap_owner != tap.owner_uid:
        yield f"owner is {_owner(link)}, should be {tap.owner_uid}"
    if link.master != master:
        yield f"is in {_name(link.master, observed)}, should be in {tap.bridge or 'no bridge'}"
    if not link.up:
        yield "is down"
    if link.group >= GROUP_GOING:
        yield "its removal was cut off"
    if link.mac != tap.mac:
        yield f"address is {link.mac}, should be {tap.mac}"
    if link.alias != alias:
        yield f"alias is {link.alias!r}, should be {alias!r}" if link.alias else "is not marked as ours"


def _describe(link: Link, observed: ObservedNetwork) -> str:
    where = f"in {_name(link.master, observed)}" if link.master else "routed"
    kind = f"tap of uid {_owner(link)}" if link.tap else link.kind or "interface"
    return f"{kind}, {link.mac}, {where}{'' if link.up else ', down'}"


def _wish(tap: TapSpec) -> str:
    return f"tap of uid {tap.owner_uid}, {tap.mac}, " + (f"in {tap.bridge}" if tap.bridge else "routed")


def _owner(link: Link) -> str:
    return "nobody" if link.tap_owner < 0 else str(link.tap_owner)


def _name(index: int, observed: ObservedNetwork) -> str:
    if not index:
        return "no bridge"
    return next((link.name for link in observed.links.values() if link.ifindex == index), f"link {index}")


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
