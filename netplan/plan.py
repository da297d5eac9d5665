"""The plan: what to do so that the network becomes what is wanted.  A pure function, and the only place that
decides.

Order, so that nothing is ever reachable without its rules:

1. what is ours and no longer wanted goes (rules, routes, addresses, taps; the note of ``ip_nonlocal_bind`` as
   it
   was);
2. the packet filter: made, changed, or removed when nothing is left to guard;
3. what is missing comes: ``ip_nonlocal_bind``, taps, addresses, routes, rules.

:func:`netplan.apply.apply` leaves step 3 undone when step 2 failed.
"""

from netplan.model import (
    DesiredNetwork,
    FilterState,
    ObservedNetwork,
    Operation,
    SysctlOperation,
)
from netplan.packet_filter import FilterOperation, render
from netplan.plan_addresses import address_operations
from netplan.plan_routes import route_operations
from netplan.plan_rules import rule_operations
from netplan.plan_taps import tap_operations

_FILTER = "filter/partitiond"
_SYSCTL = "sysctl/net.ipv6.ip_nonlocal_bind"
_REASONS = 5  # of drift that are named one by one


def plan(desired: DesiredNetwork, observed: ObservedNetwork) -> tuple[Operation, ...]:
    """Return the operations from ``observed`` to ``desired``, in the order they are to be done; empty:
    nothing to do.
    """
    packet_filter = filter_operations(desired, observed)
    changes = (
        *sysctl_operations(desired, observed, noting=bool(packet_filter)),
        *tap_operations(desired, observed),
        *address_operations(desired, observed),
        *route_operations(desired, observed),
        *rule_operations(desired, observed),
    )
    removals = [one for one in changes if one.action == "remove"]
    others = [one for one in changes if one.action != "remove"]
    removals.reverse()  # what came last goes first
    return (*removals, *packet_filter, *others)


def filter_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> tuple[FilterOperation, ...]:
    """Return the one operation that the packet filter needs, or none."""
    loaded = observed.filter
    before = f"rules {loaded.wanted[:12] or 'unknown'}" if loaded.loaded else None
    if not desired.filtered:
        if not loaded.loaded:
            return ()
        reason = "no longer wanted"
        return (FilterOperation(id=_FILTER, action="remove", before=before, reason=reason),)
    wanted = render(desired)
    reason = _filter_reason(loaded, wanted.fingerprint)
    if not reason:
        return ()
    note = _raises(desired, observed) and not observed.nonlocal_bind_note
    return (
        FilterOperation(
            id=_FILTER,
            action="change" if loaded.loaded else "create",
            before=before,
            after=f"rules {wanted.fingerprint[:12]} for {len(desired.partitions)} partitions",
            reason=reason,
            wanted=wanted,
            loaded=loaded.contents,
            note=note,
        ),
    )


def _filter_reason(loaded: FilterState, wanted: str) -> str:
    if not loaded.loaded:
        return "missing"
    if loaded.drift:
        more = len(loaded.drift) - _REASONS
        return "; ".join(loaded.drift[:_REASONS]) + (f"; {more} more" if more > 0 else "")
    return "" if loaded.wanted == wanted else "loaded for another desired state"


def sysctl_operations(
    desired: DesiredNetwork, observed: ObservedNetwork, *, noting: bool
) -> tuple[SysctlOperation, ...]:
    """Ranges can only be bound to when ``ip_nonlocal_bind`` is 1; where we found it 1, it stays so.

    That it was 0 is noted by the packet filter's own transaction (``noting``), else by this operation.
    """
    if _raises(desired, observed):
        noted = observed.nonlocal_bind_note or not desired.filtered or noting
        why = "partitions have ranges, and without it nobody can bind to their addresses"
        return (
            SysctlOperation(
                id=_SYSCTL,
                action="create",
                before="0",
                after="1",
                reason=why,
                enable=True,
                note=not noted,
            ),
        )
    if observed.nonlocal_bind_note and not _has_ranges(desired):
        why = "no partition has a range any more, and it was 0 before"
        return (
            SysctlOperation(
                id=_SYSCTL, action="remove", before="1", after="0", reason=why, enable=False, note=True
            ),
        )
    return ()


def _raises(desired: DesiredNetwork, observed: ObservedNetwork) -> bool:
    return _has_ranges(desired) and not observed.nonlocal_bind


def _has_ranges(desired: DesiredNetwork) -> bool:
    return any(one.ipv6_range for one in desired.partitions)
