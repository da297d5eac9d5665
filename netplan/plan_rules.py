"""The plan for the routing rules of the local source table
(:attr:`netplan.model.DesiredNetwork.local_source_table`).

A process that binds nothing and connects to a partition of this host leaves, by the kernel's own table
``local``, with the destination's address as its source, which is not its to use.  A table of ours before
``local`` knows the same addresses with the host's as the source (facts/probes.md, section 6).  ``local``
itself has preference 0, so it has to make room:

    0: everything → ours      1: everything → local

Each step leaves ``local`` reachable: it is added behind before it is removed in front, and the other way
round.
"""

from collections.abc import Iterator

from netplan.model import PROTOCOL_MARK, DesiredNetwork, ObservedNetwork, Rule, RuleOperation
from netplan.rtnetlink import TABLE_LOCAL, TABLE_LOCAL_SOURCE

_RTPROT_KERNEL = 2
_FIRST = Rule(0, TABLE_LOCAL, _RTPROT_KERNEL)  # as the kernel makes it (net/ipv6/fib6_rules.c)
_OURS = Rule(0, TABLE_LOCAL_SOURCE, PROTOCOL_MARK)
_BEHIND = Rule(1, TABLE_LOCAL, PROTOCOL_MARK)
_ID = "rule/local-source"


def rule_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[RuleOperation]:
    """Yield the one operation that the rules need, if any."""
    seen = set(observed.rules)
    in_front = tuple(rule for rule in observed.rules if rule[:2] == _FIRST[:2])
    if desired.local_source_table and any(one.ipv6 for one in desired.partitions):
        missing = tuple(rule for rule in (_BEHIND, _OURS) if rule not in seen)
        if missing or in_front:
            yield RuleOperation(
                id=_ID,
                action="create",
                before=_describe(observed.rules),
                after=_describe((_OURS, _BEHIND)),
                reason="missing" if missing else "table local still comes first",
                add=missing,
                delete=in_front,
            )
        return
    ours = tuple(rule for rule in (_OURS, _BEHIND) if rule in seen)
    if ours:
        yield RuleOperation(
            id=_ID,
            action="remove",
            before=_describe(ours),
            after=_describe((_FIRST,)),
            reason="no longer wanted",
            add=() if in_front else (_FIRST,),
            delete=ours,
        )


def _describe(rules: tuple[Rule, ...]) -> str:
    words = {TABLE_LOCAL: "local", TABLE_LOCAL_SOURCE: "ours"}
    return ", ".join(
        f"{rule.preference}: {words[rule.table]}" for rule in sorted(rules) if rule.table in words
    )
