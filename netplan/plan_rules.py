"""The plan for routing rules: the local source table, and the way out of routable addresses.

**Local sources** (:attr:`netplan.model.DesiredNetwork.local_source_table`).  A process that binds nothing and
connects to a partition of this host leaves, by the kernel's own table ``local``, with the destination's
address as its source, which is not its to use.  A table of ours before ``local`` knows the same addresses
with the host's as the source (facts/probes.md, section 6).  ``local`` itself has preference 0, so it has to
make room:

    0: everything → ours      1: everything → local

Each step leaves ``local`` reachable: it is added behind before it is removed in front, and the other way
round.

**Gateways.**  What comes from a routable address leaves by that address' own gateway, whatever the default
route of the node is: one rule for each address, before ``main``.
"""

from collections.abc import Iterator
from socket import AF_INET, AF_INET6

from netplan.model import PROTOCOL_MARK, DesiredNetwork, ObservedNetwork, Rule, address_text
from netplan.operations import RuleOperation
from netplan.plan_routes import TABLE_GATEWAYS, gateway_tables
from netplan.rtnetlink import TABLE_LOCAL, TABLE_LOCAL_SOURCE

_RTPROT_KERNEL = 2
_GATEWAY_PREFERENCE = 11200


def rule_operations(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[RuleOperation]:
    """Yield the operations that the rules need."""
    local = desired.local_source_table
    six = local and desired.host_ipv6 is not None and any(one.reached_ipv6 for one in desired.partitions)
    four = local and any(
        (desired.host_ipv4 and one.reached_ipv4) or (desired.mesh and one.vpn_ipv4)
        for one in desired.partitions
    )
    yield from _local_first(observed, AF_INET6, wanted=six)
    yield from _local_first(observed, AF_INET, wanted=four)
    yield from _gateways(desired, observed)


def _local_first(observed: ObservedNetwork, family: int, *, wanted: bool) -> Iterator[RuleOperation]:
    first = Rule(0, TABLE_LOCAL, _RTPROT_KERNEL, family)  # as the kernel makes it (net/ipv6/fib6_rules.c)
    ours = Rule(0, TABLE_LOCAL_SOURCE, PROTOCOL_MARK, family)
    behind = Rule(1, TABLE_LOCAL, PROTOCOL_MARK, family)
    seen = {rule for rule in observed.rules if rule.family == family}
    in_front = tuple(rule for rule in seen if rule[:2] == first[:2] and not rule.source)
    identity = "rule/local-source" if family == AF_INET6 else "rule/local-source-ipv4"
    if wanted:
        missing = tuple(rule for rule in (behind, ours) if rule not in seen)
        if missing or in_front:
            yield RuleOperation(
                id=identity,
                action="create",
                before=_describe(seen),
                after=_describe((ours, behind)),
                reason="missing" if missing else "table local still comes first",
                add=missing,
                delete=in_front,
            )
        return
    there = tuple(rule for rule in (ours, behind) if rule in seen)
    if there:
        yield RuleOperation(
            id=identity,
            action="remove",
            before=_describe(there),
            after=_describe((first,)),
            reason="no longer wanted",
            add=() if in_front else (first,),
            delete=there,
        )


def _gateways(desired: DesiredNetwork, observed: ObservedNetwork) -> Iterator[RuleOperation]:
    tables = gateway_tables(desired)
    wanted = {}
    for one in desired.partitions:
        if one.routable_ipv4:
            table, address = tables[one.routable_ipv4.gateway], one.routable_ipv4.interface.ip.packed
            wanted[Rule(_GATEWAY_PREFERENCE, table, PROTOCOL_MARK, AF_INET, address)] = one.id
    seen = {
        rule for rule in observed.rules if rule.protocol == PROTOCOL_MARK and rule.table >= TABLE_GATEWAYS
    }
    for rule, partition in wanted.items():
        if rule not in seen:
            yield RuleOperation(
                id=_identity(rule),
                action="create",
                partition=partition,
                after=f"to table {rule.table}",
                reason="missing",
                add=(rule,),
            )
    for rule in sorted(seen - wanted.keys()):
        yield RuleOperation(
            id=_identity(rule),
            action="remove",
            before=f"to table {rule.table}",
            reason="no longer wanted",
            delete=(rule,),
        )


def _identity(rule: Rule) -> str:
    return f"rule/from-{address_text(rule.source)}" if rule.source else f"rule/{rule.preference}"


def _describe(rules: set[Rule] | tuple[Rule, ...]) -> str:
    words = {TABLE_LOCAL: "local", TABLE_LOCAL_SOURCE: "ours"}
    return ", ".join(
        f"{rule.preference}: {words[rule.table]}" for rule in sorted(rules) if rule.table in words
    )
