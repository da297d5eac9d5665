"""The plan for the cgroup programs.  Pure.

The routing table before ``local`` (:mod:`netplan.plan_rules`) is there with them and without.  A socket that has a port
and no address (``bind(("", 0))`` before connect(2), as every DatagramSocket of Java) cannot be given an address by a
program any more, and towards a partition of this host the kernel would take that partition's own as its source.
"""

from netplan.bpf_contents import HookOperation, contents
from netplan.model import DesiredNetwork, ObservedNetwork

_ID = "bpf/cgroup"


def hook_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> tuple[HookOperation, ...]:
    """Return the one operation that the programs need, or none."""
    state = observed.hooks
    before = ", ".join((*([f"programs {state.version}"] if state.version else []), *state.leftover)) or None
    if not desired.hooked or (state.refused and state.leftover):
        if not state.leftover:
            return ()
        reason = f"they cannot be in force: {state.refused}" if state.refused else "no longer wanted"
        return (HookOperation(id=_ID, action="remove", before=before, reason=reason, state=state),)
    if state.refused:
        return ()
    wanted = contents(desired)
    reason = _reason(desired, observed)
    if not reason:
        return ()
    return (
        HookOperation(
            id=_ID,
            action="change" if state.version else "create",
            before=before,
            after=f"addresses {wanted.fingerprint[:12]} of {len(desired.partitions)} partitions",
            reason=reason,
            wanted=wanted,
            state=state,
        ),
    )


def _reason(desired: DesiredNetwork, observed: ObservedNetwork) -> str:
    state = observed.hooks
    if not state.version:
        return "not in force" if state.leftover else "missing"
    if state.contents != contents(desired).fingerprint:
        return "loaded for another desired state"
    return f"{', '.join(state.leftover)} is left over" if state.leftover else ""
