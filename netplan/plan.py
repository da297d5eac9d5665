"""The plan: what to do so that the network becomes what is wanted.  A pure function, and the only place that
decides.

Order, so that nothing is ever reachable without its rules:

1. what is ours and no longer wanted goes (rules, routes, addresses, taps, ports, bridge; kernel settings as
   they were);
2. the packet filter: made, changed, or removed when nothing is left to guard; then the programs at the cgroup;
3. what is missing comes: kernel settings, bridge, ports, taps, addresses, routes, rules;
4. the programs go where they are not wanted any more.

:func:`netplan.apply.apply` leaves the steps after it undone when the packet filter failed.
"""

from collections.abc import Iterator

from netplan.legacy_filter import LegacyOperation
from netplan.legacy_rules import render_legacy
from netplan.model import Backend, DesiredNetwork, FilterState, ObservedNetwork
from netplan.nfnetlink import split_name
from netplan.operations import Operation, SysctlOperation
from netplan.packet_filter import Filter, FilterOperation, render
from netplan.plan_addresses import address_operations
from netplan.plan_bridge import after, bridge_operations
from netplan.plan_hooks import hook_operations
from netplan.plan_mesh import mesh_operations, refusals, settled
from netplan.plan_routes import route_operations
from netplan.plan_rules import rule_operations
from netplan.plan_taps import tap_operations
from netplan.rate_limits import changes
from netplan.sysctls import ALL, Sysctl, needed

_FILTER = "filter/partitiond"
_LEGACY = "filter/iptables"
_REASONS = 5  # of drift that are named one by one


def plan(desired: DesiredNetwork, observed: ObservedNetwork) -> tuple[Operation, ...]:
    """Return the operations from ``observed`` to ``desired``, in the order they are to be done; empty:
    nothing to do.
    """
    refused = tuple(refusals(desired, observed))
    desired = settled(desired, observed.links, observed.addresses)
    packet_filter = filter_operations(desired, observed)
    hooks = hook_operations(desired, observed)
    bridging = tuple(bridge_operations(desired, observed))
    bridged = after(bridging, observed)
    if any(name and name not in bridged.links for name in (desired.interface, desired.ipv4_interface)):
        # what stands in the way of the bridge has to go first, by somebody else's hand
        return bridging
    changes = (
        *sysctl_operations(desired, observed, noting=bool(packet_filter)),
        *bridging,
        *tap_operations(desired, bridged),
        *refused,
        *mesh_operations(desired, bridged),
        *address_operations(desired, bridged),
        *route_operations(desired, bridged),
        *rule_operations(desired, observed),
    )
    removals = [one for one in changes if one.action == "remove"]
    others = [one for one in changes if one.action != "remove"]
    removals.reverse()  # what came last goes first
    going = [one for one in hooks if one.action == "remove"]
    coming = [one for one in hooks if one.action != "remove"]
    return (*removals, *packet_filter, *coming, *others, *going)


def filter_operations(
    desired: DesiredNetwork, observed: ObservedNetwork
) -> tuple[FilterOperation | LegacyOperation, ...]:
    """Return what the packet filter needs: the wanted backend's rules, and only behind them the other's end."""
    nft, legacy = _nft_operations, _legacy_operations
    both = (legacy, nft) if desired.backend == "iptables" else (nft, legacy)
    return tuple(one for operations in both for one in operations(desired, observed))


def _before(loaded: FilterState) -> str | None:
    return f"rules {loaded.wanted[:12] or 'unknown'}" if loaded.loaded else None


def _legacy_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[LegacyOperation]:
    loaded = observed.legacy
    before = _before(loaded)
    if not desired.filtered or desired.backend != "iptables":
        if loaded.loaded:
            reason = "no longer wanted"
            yield LegacyOperation(id=_LEGACY, action="remove", before=before, reason=reason)
        return
    wanted = render_legacy(desired)
    reason = _filter_reason(loaded, wanted.fingerprint)
    if reason:
        yield LegacyOperation(
            id=_LEGACY,
            action="change" if loaded.loaded else "create",
            before=before,
            after=f"rules {wanted.fingerprint[:12]} of iptables for {len(desired.partitions)} partitions",
            reason=reason,
            wanted=wanted,
            notes=_notes_to_come(desired, observed, observed.legacy_notes),
        )


def _nft_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> tuple[FilterOperation, ...]:
    loaded = observed.filter
    before = _before(loaded)
    if not desired.filtered or desired.backend != "nftables":
        if not loaded.loaded:
            return ()
        reason = "no longer wanted"
        return (FilterOperation(id=_FILTER, action="remove", before=before, reason=reason),)
    wanted = render(desired)
    reason = _filter_reason(loaded, wanted.fingerprint)
    if not reason:
        return ()
    if loaded.loaded:
        reason = "; ".join((reason, *_limits_that_change(wanted, loaded)))
    notes = _notes_to_come(desired, observed, observed.notes)
    return (
        FilterOperation(
            id=_FILTER,
            action="change" if loaded.loaded else "create",
            before=before,
            after=f"rules {wanted.fingerprint[:12]} for {len(desired.partitions)} partitions",
            reason=reason,
            wanted=wanted,
            loaded=loaded.contents,
            notes=notes,
        ),
    )


def _limits_that_change(wanted: Filter, loaded: FilterState) -> Iterator[str]:
    names = ((split_name(full)[1] for full in limits) for limits in (wanted.limits, loaded.contents.limits))
    found = list(changes(*names))
    yield from found[:_REASONS]
    if len(found) > _REASONS:
        yield f"{len(found) - _REASONS} more limits change"


def _notes_to_come(
    desired: DesiredNetwork, observed: ObservedNetwork, there: frozenset[str]
) -> tuple[str, ...]:
    """Return the notes of settings that the wanted backend has not: those to be changed, and what the other one
    knows.
    """
    noted = {*observed.notes, *observed.legacy_notes}
    fresh = [one.note for one in _unlike(desired, observed) if one.name not in noted]
    return (*fresh, *(one.note for one in ALL if one.name in noted - there))


def _filter_reason(loaded: FilterState, wanted: str) -> str:
    if not loaded.loaded:
        return "missing"
    if loaded.drift:
        more = len(loaded.drift) - _REASONS
        return "; ".join(loaded.drift[:_REASONS]) + (f"; {more} more" if more > 0 else "")
    return "" if loaded.wanted == wanted else "loaded for another desired state"


def sysctl_operations(
    desired: DesiredNetwork, observed: ObservedNetwork, *, noting: bool
) -> Iterator[SysctlOperation]:
    """Yield the settings to change and those to give back; what we found as we want it, stays so.

    What was there before is noted by the packet filter's own transaction (``noting``), else by the operation.
    """
    wanted = needed(desired)
    places: tuple[tuple[Backend, frozenset[str]], ...] = (
        ("nftables", observed.notes),
        ("iptables", observed.legacy_notes),
    )
    noted = observed.notes | observed.legacy_notes
    for one in _unlike(desired, observed):
        yield SysctlOperation(
            id=f"sysctl/{one.name}",
            action="create",
            before=one.other,
            after=one.wanted,
            reason=one.why,
            setting=one,
            value=one.wanted,
            note=desired.filtered and not noting and one.name not in noted,
            noted_in=(desired.backend,),
        )
    for one in ALL:
        if one.name in noted and one not in wanted:
            yield SysctlOperation(
                id=f"sysctl/{one.name}",
                action="remove",
                before=observed.sysctls.get(one.name, one.wanted),
                after=one.other,
                reason="no longer needed, and this is what it was before",
                setting=one,
                value=one.other,
                note=True,
                noted_in=tuple(backend for backend, names in places if one.name in names),
            )


def _unlike(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[Sysctl]:
    """Yield the settings that are needed and not so."""
    for one in needed(desired):
        if observed.sysctls.get(one.name, one.wanted) != one.wanted:
            yield one
