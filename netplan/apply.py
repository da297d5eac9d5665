"""Carrying out a plan: operations of one kind together, in the order of the plan.  The only module with
effects, and it decides nothing.

One failed operation does not keep the others from being done; only when the packet filter could not be loaded
does nothing new come up behind it.
"""

import errno
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import NamedTuple, TypeVar

from netplan import moving, mtu, rtnetlink
from netplan.bpf_contents import HookOperation
from netplan.bpf_state import load_hooks, remove_hooks
from netplan.errors import NetplanError
from netplan.filter_state import load_filter, note_setting, remove_filter
from netplan.legacy_filter import LegacyOperation, load_legacy, note_legacy, remove_legacy
from netplan.model import GROUP_GOING, MOVED_MARK, Address, Moving, Route
from netplan.netlink import NETLINK_ROUTE, NetlinkSocket, Refusal, Request
from netplan.operations import (
    AddressOperation,
    BridgeOperation,
    Operation,
    PortOperation,
    RefusedOperation,
    RouteOperation,
    RuleOperation,
    SysctlOperation,
    TapOperation,
)
from netplan.packet_filter import FilterOperation
from netplan.sysctls import ipv6_switch
from netplan.taps import make_taps

# What a bridge takes over of its first port: whether it hears router advertisements, and how strictly it
# speaks for the node (Documentation/networking/ip-sysctl).
_LIKE_THE_PORT = (
    *(
        f"ipv6/conf/{{}}/{key}"
        for key in ("disable_ipv6", "accept_ra", "autoconf", "forwarding", "use_tempaddr", "proxy_ndp")
    ),
    *(
        f"ipv4/conf/{{}}/{key}"
        for key in ("forwarding", "rp_filter", "proxy_arp", "arp_ignore", "arp_announce")
    ),
)


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
    held: dict[type[Operation], NetplanError] = {}
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        for kind, grouped in groupby(operations, key=type):
            group = tuple(grouped)
            if blocked and kind is not RefusedOperation:
                failures += (Failure(one, blocked) for one in group)
                continue
            if kind in held and group[0].action == "remove":
                failures += (Failure(one, held[kind]) for one in group)
                continue
            failed = _HANDLERS[kind](sock, group)
            failures += failed
            if failed and kind in (FilterOperation, LegacyOperation):
                why = "the packet filter, which must be there first, could not be loaded"
                blocked = _blocked(why, "filter/partitiond", failed[0].error)
            if failed and kind in _HOLDS and group[0].action == "remove":
                later, why = _HOLDS[kind]
                held |= dict.fromkeys(later, _blocked(why, group[0].id, failed[0].error))
    return tuple(failures)


def _blocked(why: str, resource: str, cause: NetplanError) -> NetplanError:
    error = NetplanError(
        "network.blocked",
        f"left undone: {why}",
        resource=resource,
        hint=cause.message,
        retryable=cause.retryable,
    )
    error.__cause__ = cause
    return error


# what must not go when the removal of the first has failed: with it would go the only memory of how things were
_HOLDS: dict[type[Operation], tuple[tuple[type[Operation], ...], str]] = {
    SysctlOperation: (
        (FilterOperation, LegacyOperation),
        "its table notes how a kernel setting was before, which could not be set back",
    ),
    PortOperation: ((BridgeOperation,), "it has addresses that could not be moved back to their port"),
}


def _refused(_sock: NetlinkSocket, group: Sequence[RefusedOperation]) -> list[Failure]:
    return [Failure(one, one.error) for one in group]


_One = TypeVar("_One", bound=Operation)


def _each(group: Iterable[_One], work: Callable[[_One], None]) -> list[Failure]:
    """Do each by itself."""
    failures = []
    for one in group:
        try:
            work(one)
        except NetplanError as error:
            failures.append(Failure(one, error))
    return failures


def _filter(_sock: NetlinkSocket, group: Sequence[FilterOperation]) -> list[Failure]:
    def work(one: FilterOperation) -> None:
        if one.wanted:
            load_filter(one.wanted, one.loaded, one.notes)
        else:
            remove_filter()

    return _each(group, work)


def _legacy(_sock: NetlinkSocket, group: Sequence[LegacyOperation]) -> list[Failure]:
    def work(one: LegacyOperation) -> None:
        if one.wanted:
            load_legacy(one.wanted, one.notes)
        else:
            remove_legacy()

    return _each(group, work)


def _hooks(_sock: NetlinkSocket, group: Sequence[HookOperation]) -> list[Failure]:
    def work(one: HookOperation) -> None:
        if one.wanted:
            load_hooks(one.wanted, one.state)
        else:
            remove_hooks()

    return _each(group, work)


def _note(one: SysctlOperation, *, add: bool) -> None:
    for backend in one.noted_in:
        if backend == "iptables":
            note_legacy(one.setting.note, add=add)
        else:
            note_setting(one.setting.note, there=add)


def _sysctl(_sock: NetlinkSocket, group: Sequence[SysctlOperation]) -> list[Failure]:
    failures = []
    for one in group:
        try:
            # first the note: a crash in between leaves one too many, not one too few
            if one.note and one.action != "remove":
                _note(one, add=True)
            one.setting.path.write_text(one.value, encoding="ascii")
            if one.note and one.action == "remove":
                _note(one, add=False)
        except NetplanError as error:
            failures.append(Failure(one, error))
        except FileNotFoundError:
            continue  # the module that had the setting is gone, and with it what it did
        except OSError as error:
            failures.append(Failure(one, _unwritable(one.setting.path, one.id, error)))
    return failures


def _unwritable(path: Path, resource: str, error: OSError) -> NetplanError:
    message = f"cannot write {path}: {error.strerror}"
    hint = "is /proc/sys read-only, as in a container?"
    return NetplanError("network.sysctl", message, resource=resource, hint=hint)


def _bridges(sock: NetlinkSocket, group: Sequence[BridgeOperation]) -> list[Failure]:
    gone = [
        _Step(one, rtnetlink.delete_link(one.name), (errno.ENODEV,))
        for one in group
        if one.action == "remove"
    ]
    made = [
        _Step(one, rtnetlink.make_bridge(one.name, one.index, one.mac))
        for one in group
        if one.mac is not None
    ]
    failures = _send(sock, gone + made) if gone or made else []
    failed = {one.operation.id for one in failures}
    kept = [one for one in group if one.action != "remove" and one.id not in failed]
    for one in kept:
        if one.like is not None:
            failures += _copy_settings(one, one.like)
    up = (
        _Step(
            one,
            rtnetlink.set_link(
                one.name, alias=one.alias, mac=None, master=None, up=True, group=0 if one.alias else None
            ),
        )
        for one in kept
    )
    return failures + _send(sock, up)


def _copy_settings(one: BridgeOperation, port: str) -> list[Failure]:
    for setting in _LIKE_THE_PORT:
        source, target = (Path("/proc/sys/net", setting.format(name)) for name in (port, one.name))
        try:
            value = source.read_text(encoding="ascii")
            if target.read_text(encoding="ascii") != value:
                target.write_text(value, encoding="ascii")
        except FileNotFoundError:
            continue  # no IPv6 in this kernel
        except OSError as error:
            return [Failure(one, _unwritable(target, one.id, error))]
    return []


def _ports(sock: NetlinkSocket, group: Sequence[PortOperation]) -> list[Failure]:
    """Put each port in or out and move what is its own.

    Each write is sent only when the kernel took the one before: else the node's addresses would end on a bridge
    that leads nowhere, or nowhere at all.  A port that leaves keeps its mark until all is back: by it a move
    that was cut off is known.
    """
    failures: list[Failure] = []
    for one in group:
        if one.leads:
            failures += _keep_jumbo(one)
        link = rtnetlink.set_link(one.name, alias=one.alias, mac=None, master=one.master, up=True)
        step, (put, take) = [_Step(one, link)], _moves(one)
        # one by one what is put: were the first address of a network refused, the second would take its rank
        puts = [[each] for each in put]
        for write in (step, *puts, take) if one.master else (*puts, take, step):
            if failed := _send(sock, write):
                failures += failed
                break
    return failures


def _keep_jumbo(one: PortOperation) -> list[Failure]:
    bridge = one.names[1]
    try:
        mtu.keep_jumbo(one.name, bridge)
    except OSError as error:
        message = f"cannot give {bridge} the MTU of {one.name}: {error.strerror}"
        return [Failure(one, NetplanError("network.mtu", message, resource=one.id))]
    return []


def _moves(one: PortOperation) -> tuple[list[_Step], list[_Step]]:
    """Return the steps that put everything on the new link, and those that take it from the old one.

    IPv4 drops routes that name an address as their source when that leaves any link
    (net/ipv4/fib_frontend.c, fib_del_ifaddr), so the routes are set once more at the end.
    """
    addresses = [item for item in one.moving if not item.is_route]
    # the kernel puts a new IPv6 address before those that are there: so they keep their order
    addresses = [
        *(item for item in addresses if item.family == AF_INET),
        *(item for item in reversed(addresses) if item.family == AF_INET6),
    ]
    # a gateway must be reachable by a route that is there already
    routes = sorted((item for item in one.moving if item.is_route), key=lambda item: bool(item.packed))
    put = [
        _Step(one, moving.put_address(item, one.target, one.names, one.protocol or _unmarked(item)))
        for item in addresses
    ]
    over = [_Step(one, moving.put_route(item, one.target)) for item in routes]
    # the first IPv4 address of a network takes the others with it, unless it goes last; and IPv6 leaves a prefix
    # route behind when an address without one outlives it (net/ipv6/addrconf.c, check_cleanup_prefix_route)
    going = [
        *(item for item in addresses[::-1] if not moving.has_prefix_route(item)),
        *(item for item in addresses[::-1] if moving.has_prefix_route(item)),
    ]
    take = [_Step(one, moving.take_address(item), (errno.EADDRNOTAVAIL,)) for item in going]
    early = [step._replace(fine=(errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL)) for step in over]
    return [*put, *early], [*take, *over]


def _unmarked(item: Moving) -> int:
    return 0 if item.protocol == MOVED_MARK else item.protocol


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
        failed = _make(kept, mark)
    except NetplanError as error:
        return [*failures, *(Failure(one, error) for one in kept)]
    if stolen := [one for one in kept if one.name in failed and one.anew and failed[one.name].retryable]:
        failed = {name: error for name, error in failed.items() if name not in {one.name for one in stolen}}
        # their owner was changed by who holds them, which needs no privilege (TUNSETOWNER), and while he holds them
        # nobody else can give them back
        sock.batch([rtnetlink.delete_link(one.name) for one in stolen])
        failed |= _make(stolen, mark)
    failures += (Failure(one, failed[one.name]) for one in kept if one.name in failed)
    # what else is to be set is set also where the owner could not be
    settings = [one for one in kept if one.name not in failed or one.action == "change"]
    open_ = _switch_ipv6_off([one for one in settings if one.without_ipv6])
    failures += open_
    if open_:
        names = {one.operation.id for one in open_}
        settings = [one for one in settings if one.id not in names]
    return failures + _send(sock, (step for one in settings for step in _settings(one)))


def _switch_ipv6_off(group: Sequence[TapOperation]) -> list[Failure]:
    """Keep links from having IPv6 at all; return those where it could not be done, which do not come up."""
    failures = []
    for one in group:
        setting = ipv6_switch(one.name)
        try:
            setting.write_text("1", encoding="ascii")
        except FileNotFoundError:
            continue  # no IPv6 in this kernel
        except OSError as error:
            failures.append(Failure(one, _unwritable(setting, one.id, error)))
    return failures


def _make(group: Sequence[TapOperation], mark: Callable[[Iterable[str]], None]) -> dict[str, NetplanError]:
    """Make the taps and tuns that are to have an owner, or give them to it; return the failures by name."""
    failed: dict[str, NetplanError] = {}
    for tun in (False, True):
        these = [(one.name, one.owner) for one in group if one.owner is not None and one.tun == tun]
        failed |= make_taps(these, tun=tun, mark=mark) if these else {}
    return failed


def block_taps(macs: Mapping[str, str | None]) -> None:
    """Set taps down at once, by name, and give those back their MACs that have one here: no frame leaves a tap that is
    down, and none is sent to it for another's sake.  Those that are not there need nothing.
    """
    requests = [rtnetlink.set_down(name) for name in macs]
    requests += (
        rtnetlink.set_link(name, alias=None, mac=mac, master=None, up=False)
        for name, mac in macs.items()
        if mac is not None
    )
    with NetlinkSocket(NETLINK_ROUTE) as sock:
        sock.batch(requests)


def _settings(one: TapOperation) -> Iterator[_Step]:
    """Yield the steps; a tap whose port has settings of its own is not up before they are made."""
    early = one.up and one.forwards is None
    settings = rtnetlink.set_link(
        one.name, alias=one.alias, mac=one.mac, master=one.master, up=early, group=one.group
    )
    yield _Step(one, settings)
    if one.forwards is not None:
        yield _Step(one, rtnetlink.set_port(one.name, one.forwards))
        if one.up:
            yield _Step(one, rtnetlink.set_link(one.name, alias=None, mac=None, master=None, up=True))


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
    links, missing = _new_links(sock, group)
    for one in group:
        steps += (_Step(one, rtnetlink.delete_address(old), (errno.EADDRNOTAVAIL,)) for old in one.delete)
        if one.add and one.on in links:
            steps.append(_Step(one, rtnetlink.set_address(_over(one.add, links[one.on]))))
    return missing + _send(sock, steps)


def _routes(sock: NetlinkSocket, group: Sequence[RouteOperation]) -> list[Failure]:
    steps: list[_Step] = []
    links, missing = _new_links(sock, group)
    for one in group:
        if one.delete:
            steps.append(_Step(one, rtnetlink.delete_route(one.delete), (errno.ESRCH,)))
        if one.add and one.on in links:
            steps.append(_Step(one, rtnetlink.set_route(_over(one.add, links[one.on]))))
    return missing + _send(sock, steps)


_Placed = TypeVar("_Placed", Address, Route)


def _over(one: _Placed, link: int | None) -> _Placed:
    """Return it on another link, or as it is."""
    return one if link is None else one._replace(link=link)


def _new_links(
    sock: NetlinkSocket, group: Sequence[AddressOperation | RouteOperation]
) -> tuple[dict[str | None, int | None], list[Failure]]:
    """Return the numbers of the links that operations before these have made, by name (None: what names its link by number
    itself), and the operations whose link is not there.
    """
    links: dict[str | None, int | None] = {None: None}
    if any(one.on is not None for one in group):
        links |= {name: link.ifindex for name, link in rtnetlink.links(sock).items()}
    return links, [_no_link(one, one.on) for one in group if one.on is not None and one.on not in links]


def _no_link(one: Operation, name: str) -> Failure:
    message = f"left undone: {name}, which it is for, could not be made"
    return Failure(one, NetplanError("network.blocked", message, resource=one.id, retryable=True))


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
    HookOperation: _hooks,
    LegacyOperation: _legacy,
    SysctlOperation: _sysctl,
    BridgeOperation: _bridges,
    PortOperation: _ports,
    TapOperation: _taps,
    AddressOperation: _addresses,
    RouteOperation: _routes,
    RuleOperation: _rules,
}
