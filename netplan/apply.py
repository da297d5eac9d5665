"""Carrying out a plan: operations of one kind together, in the order of the plan.  The only module with
effects, and it decides nothing.

One failed operation does not keep the others from being done; only when the packet filter could not be loaded
does nothing new come up behind it.
"""

import errno
import secrets
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from netplan import nftables, rtnetlink
from netplan.errors import NetplanError
from netplan.filter_state import load_filter
from netplan.model import (
    GROUP_GOING,
    AddressOperation,
    Operation,
    RefusedOperation,
    RouteOperation,
    RuleOperation,
    SysctlOperation,
    TapOperation,
)
from netplan.netlink import NETLINK_ROUTE, NetlinkSocket, Refusal, Request
from netplan.observe import NONLOCAL_BIND
from netplan.packet_filter import FORGET, NOTE, REMOVE, FilterOperation
from netplan.taps import make_taps


class Failure(NamedTuple):
    """An operation that was not done, and why."""

    operation: Operation
    error: NetplanError


class _Step(NamedTuple):
    """One netlink request of an operation; a refusal with one of the ``fine`` errnos means that it was done
    already.
    """

    operation: Operation
    request: Request
    fine: tuple[int, ...] = ()


def apply(operations: Sequence[Operation]) -> tuple[Failure, ...]:
    """Do the operations; return those that failed or were refused, in the order of the plan."""
    failures: list[Failure] = []
    blocked: NetplanError | None = None
    noted: NetplanError | None = None
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        for kind, grouped in groupby(operations, key=type):
            group = tuple(grouped)
            if blocked and kind is not RefusedOperation:
                failures += (Failure(one, blocked) for one in group)
                continue
            if noted and kind is FilterOperation and group[0].action == "remove":
                failures += (Failure(one, _still_noted(noted)) for one in group)
                continue
            failed = _HANDLERS[kind](sock, group)
            failures += failed
            if failed and kind is FilterOperation:
                blocked = _blocked(failed[0].error)
            if failed and kind is SysctlOperation and group[0].action == "remove":
                noted = failed[0].error
    return tuple(failures)


def _blocked(cause: NetplanError) -> NetplanError:
    error = NetplanError(
        "network.blocked",
        "left undone: the packet filter, which must be there first, could not be loaded",
        resource="filter/partitiond",
        hint=cause.message,
        retryable=cause.retryable,
    )
    error.__cause__ = cause
    return error


def _still_noted(cause: NetplanError) -> NetplanError:
    error = NetplanError(
        "network.blocked",
        "left undone: its table notes how a kernel setting was before, which could not be set back",
        resource="filter/partitiond",
        hint=cause.message,
        retryable=cause.retryable,
    )
    error.__cause__ = cause
    return error


def _refused(_sock: NetlinkSocket, group: Sequence[RefusedOperation]) -> list[Failure]:
    return [Failure(one, one.error) for one in group]


def _filter(_sock: NetlinkSocket, group: Sequence[FilterOperation]) -> list[Failure]:
    failures = []
    for one in group:
        try:
            if one.wanted:
                load_filter(one.wanted, one.loaded, note=one.note)
            else:
                nftables.run(REMOVE)
        except NetplanError as error:
            failures.append(Failure(one, error))
    return failures


def _sysctl(_sock: NetlinkSocket, group: Sequence[SysctlOperation]) -> list[Failure]:
    failures = []
    for one in group:
        try:
            if (
                one.note and one.enable
            ):  # first the note: a crash in between leaves one too many, not one too few
                nftables.run(NOTE)
            NONLOCAL_BIND.write_text("1" if one.enable else "0", encoding="ascii")
            if one.note and not one.enable:
                nftables.run(FORGET)
        except NetplanError as error:
            failures.append(Failure(one, error))
        except OSError as error:
            message = f"cannot write {NONLOCAL_BIND}: {error.strerror}"
            failures.append(Failure(one, NetplanError("network.sysctl", message, resource=one.id)))
    return failures


def _taps(sock: NetlinkSocket, group: Sequence[TapOperation]) -> list[Failure]:
    gone = [one for one in group if one.action == "remove"]
    kept = [one for one in group if one.action != "remove"]
    failures = _remove_taps(sock, gone) if gone else []
    aliases = {one.name: one.alias for one in kept}

    def mark(names: Iterable[str]) -> None:
        # a refusal comes again, and is told, with all the settings
        sock.batch(
            [rtnetlink.set_link(name, alias=aliases[name], mac=None, master=None, up=False) for name in names]
        )

    try:
        failed = make_taps(((one.name, one.owner) for one in kept if one.owner is not None), mark=mark)
    except NetplanError as error:
        return [*failures, *(Failure(one, error) for one in kept)]
    failures += (Failure(one, failed[one.name]) for one in kept if one.name in failed)
    return failures + _send(sock, (_Step(one, _settings(one)) for one in kept if one.name not in failed))


def _settings(one: TapOperation) -> Request:
    return rtnetlink.set_link(
        one.name, alias=one.alias, mac=one.mac, master=one.master, up=one.up, group=one.group
    )


def _remove_taps(sock: NetlinkSocket, group: Sequence[TapOperation]) -> list[Failure]:
    """Put the taps into a link group that nobody else uses, and remove the group."""
    number = GROUP_GOING | secrets.randbits(30)
    requests = (
        rtnetlink.set_link(one.name, alias=None, mac=None, master=None, up=False, group=number)
        for one in group
    )
    steps = [_Step(one, request, (errno.ENODEV,)) for one, request in zip(group, requests, strict=True)]
    failures = _send(sock, steps)
    refused = sock.batch([rtnetlink.delete_group(number)])
    if refused and refused[0].errno != errno.ENODEV:
        return [Failure(one, _error(one, refused[0])) for one in group]
    return failures


def _addresses(sock: NetlinkSocket, group: Sequence[AddressOperation]) -> list[Failure]:
    steps: list[_Step] = []
    for one in group:
        steps += (_Step(one, rtnetlink.delete_address(old), (errno.EADDRNOTAVAIL,)) for old in one.delete)
        if one.add:
            steps.append(_Step(one, rtnetlink.set_address(one.add)))
    return _send(sock, steps)


def _routes(sock: NetlinkSocket, group: Sequence[RouteOperation]) -> list[Failure]:
    steps: list[_Step] = []
    for one in group:
        if one.delete:
            steps.append(_Step(one, rtnetlink.delete_route(one.delete), (errno.ESRCH,)))
        if one.add:
            steps.append(_Step(one, rtnetlink.set_route(one.add)))
    return _send(sock, steps)


def _rules(sock: NetlinkSocket, group: Sequence[RuleOperation]) -> list[Failure]:
    """Add first; where that is refused nothing is taken away, which may be the only way to table local."""
    added = [_Step(one, rtnetlink.set_rule(rule), (errno.EEXIST,)) for one in group for rule in one.add]
    failures = _send(sock, added) if added else []
    failed = {failure.operation.id for failure in failures}
    deleted = [
        _Step(one, rtnetlink.delete_rule(rule), (errno.ENOENT,))
        for one in group
        if one.id not in failed
        for rule in one.delete
    ]
    return failures + (_send(sock, deleted) if deleted else [])


def _send(sock: NetlinkSocket, steps: Iterable[_Step]) -> list[Failure]:
    """Send the requests in few writes; one failure at most per operation."""
    steps = list(steps)
    failures: dict[str, Failure] = {}
    try:
        refused = sock.batch([step.request for step in steps])
    except NetplanError as error:  # the channel itself failed: nothing is known of any of them
        return [Failure(step.operation, error) for step in steps]
    for place, refusal in sorted(refused.items()):
        operation, _, fine = steps[place]
        if refusal.errno not in fine:
            failures.setdefault(operation.id, Failure(operation, _error(operation, refusal)))
    return list(failures.values())


def _error(operation: Operation, refusal: Refusal) -> NetplanError:
    return NetplanError(
        "network.netlink",
        f"cannot {operation.action} {operation.after or operation.before}: {refusal.text()}",
        resource=operation.id,
        retryable=refusal.errno in {errno.EBUSY, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN},
    )


# each takes operations of its own kind alone, which groupby sees to
_HANDLERS: dict[type[Operation], Callable[..., list[Failure]]] = {
    RefusedOperation: _refused,
    FilterOperation: _filter,
    SysctlOperation: _sysctl,
    TapOperation: _taps,
    AddressOperation: _addresses,
    RouteOperation: _routes,
    RuleOperation: _rules,
}
