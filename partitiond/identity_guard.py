"""Two machines with one identity: found out, told, and not fought with.

Whoever was there first goes on as it is: what runs keeps running, and the master is told nothing that the other would take
back. A node that begins with nothing and finds that somebody answers at the addresses that the master has does not begin: a
database that runs twice is worse than one that begins later. A node that is rebuilt takes over the addresses that its
partitions had, as far as they are of its networks.
"""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from partitiond import alive, converge, identities, published
from partitiond.choices import NATURAL
from partitiond.errors import PartitiondError
from partitiond.offers import Offered, addresses_of, compare, digest
from partitiond.wishes import is_absence
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from partitiond.context import Context
    from partitiond.node import Node
    from slap_client.documents import ComputerDocument

logger = logging.getLogger(__name__)

CODE = "node.twin"
_ASKED = 16  # addresses
_NAMED = 3
_STALE = 2


def look(context: Context, document: ComputerDocument) -> None:
    """Judge an answer of the master by the addresses in it, and by what instances published."""
    # lanes share an answer, and what one of them finds out the other does not tell again
    with context.offers.changing:
        _look_at_addresses(context, document)
        _look_at_published(context, document)


def _look_at_addresses(context: Context, document: ComputerDocument) -> None:
    book = context.offers
    verdict, other = compare(book.read(), addresses_of(document))
    book.missed = book.missed and not document.partitions
    book.stale = book.stale + 1 if verdict == "older" else 0
    if book.stale == _STALE:
        # also those of the machine before this one, which may have come back
        if _answering(context.node_in_force or converge.observe(context).node, other):
            verdict = "foreign"
        else:
            logger.warning(
                "the master has addresses of partitions that it was told earlier; it is told again"
            )
            context.wake_capacity()
    if verdict == "foreign":
        _suspect(context, other)
    elif verdict == "ours" and book.read().foreign:
        book.suspect({})
        _record(context, "the master has the addresses of this node's partitions again")


def missed(context: Context) -> None:
    """Offer the node again, once, to a master that seems not to know it, although it was told."""
    book = context.offers
    if book.read().told and not book.missed:
        book.missed = True
        context.wake_capacity()


def refuse(context: Context) -> None:
    """Raise PartitiondError ``node.twin`` where this node may not begin."""
    if context.offers.read().alive:
        raise _alive(context.offers.read())


def begin(context: Context, document: ComputerDocument) -> None:
    """For who is about to do what the master wants, perhaps before it was told anything. Raises PartitiondError ``node.twin``.

    A master that was away when it was to be told may be back for another lane first.
    """
    if context.config.unmanaged is None and not context.offers.read().told and _is_blank(context):
        node = context.node_in_force or converge.observe(context).node
        if node.address is not None:  # else there are no networks that the master's addresses could be of
            _begin(context, node, document, force=False)
    refuse(context)


def before_offer(context: Context, node: Node, *, force: bool) -> Node:
    """What is asked before the master is told of a node; give the node as it is then.

    ``force``: the operator says that this is the one. Raises PartitiondError ``node.twin``, and SlapError where the master is
    away.
    """
    book = context.offers
    if force:
        with book.changing:
            book.save(replace(book.read(), published={}))
    told = bool(book.read().told)
    document = None if told and (force or context.lane) else _asked(context, force=force)
    if document is not None and told:
        look(context, document)
    elif document is not None:
        node = _begin(context, node, document, force=force)
    if book.read().foreign and not force:
        raise _twin(book.read())
    return node


def suspicion(context: Context) -> PartitiondError | None:
    """What is said although the master is told: by what a tenant publishes, which may be anything, nobody is silenced."""
    return _twin(context.offers.read()) if context.offers.read().published else None


def _asked(context: Context, *, force: bool) -> ComputerDocument | None:
    """What the master has of this node; None where it does not know it yet. Raises SlapError.

    An answer that is not understood is none: what it has may be another's.
    """
    try:
        return context.client.computer()
    except SlapError as error:
        if is_absence(error) or (error.status in (None, 200) and not force):
            raise
        return None


def open_cases(context: Context) -> list[str]:
    """What ``partitiond status`` says of it."""
    offered = context.offers.read()
    errors = [_twin(offered)] if offered.foreign or offered.published else []
    errors += [_alive(offered)] if offered.alive else []
    return [f"{error}; {error.hint}" for error in errors]


def _begin(context: Context, node: Node, document: ComputerDocument, *, force: bool) -> Node:
    """The first word to a master: of a node that is new, rebuilt, or the twin of another."""
    found = addresses_of(document)
    blank = _is_blank(context)
    if blank:
        answering = () if force else _answering(node, found)
        if answering:
            raise _not_begun(context, answering)
    # what it has is not what somebody else tells it after this node did
    first = ({name: digest(rows) for name, rows in found.items()},) if found else ()
    with context.offers.changing:
        before = context.offers.read()
        if before.told and not force:  # another lane came here first, and may have told the master by now
            context.offers.save(replace(before, alive=()))
        else:
            context.offers.save(Offered(first, seen=before.seen))
    return _take_over(context, node, document) if blank else node


def _not_begun(context: Context, answering: tuple[str, ...]) -> PartitiondError:
    """Remember at which addresses somebody answers, and tell of it once."""
    with context.offers.changing:
        before = context.offers.read()
        offered = replace(before, alive=answering)
        error = _alive(offered)
        if (
            before.told
        ):  # another lane found nobody there, and this node has begun: only this pass is given up
            return error
        context.offers.save(offered)
    if not before.alive:
        _record(context, str(error), error.hint)
    return error


def _answering(node: Node, found: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Those of the master's addresses at which another machine answers."""
    others = [one for rows in found.values() for text in _public(rows) if (one := _elsewhere(node, text))]
    return tuple(map(str, alive.answering(others[:_ASKED])))


def _is_blank(context: Context) -> bool:
    """Whether there is nothing that this node could lose to another."""
    return not context.store.partitions()


def _public(rows: list[str]) -> list[str]:
    """Without a partition's private IPv4, which any host of any site may have: the first one, where no IPv6 tells."""
    return [text for text in rows if ":" in text] or rows[1:]


def _elsewhere(node: Node, text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address that is in none of this node's networks, where others would reach it."""
    rules = node.choice.rules
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    own = (rules.ipv4_network, rules.partition_network, rules.mesh_range, rules.base and rules.base.network)
    return None if any(address in one for one in own if one) else address


def _take_over(context: Context, node: Node, document: ComputerDocument) -> Node:
    """Give partitions the addresses that the master has of them, where these are of the node's networks."""
    kept = dict(context.store.addresses())
    for entry in document.partitions:
        item = node.partition(entry.partition_id)
        if item is None:
            continue
        had = _fitting(node, [row[1] for row in entry.ip_list if len(row) > 1])
        chosen = item.chosen
        now = {"ipv4": chosen.ipv4, "ipv6": chosen.ipv6 and chosen.ipv6.ip}
        now |= {"public_ipv4": chosen.public_ipv4, "vpn_ipv4": chosen.vpn_ipv4}
        other = {name: value for name, value in had.items() if now[name] != value}
        if other:
            changes: dict[str, Any] = dict(other)
            kept[item.id] = replace(kept.get(item.id, NATURAL), **changes)
    changed = [name for name in kept if kept[name] != context.store.addresses().get(name)]
    if not changed:
        return node
    logger.info("taken over from the master: the addresses of %s", ", ".join(changed))
    context.store.save_addresses(kept)
    converge.apply(context)
    return converge.observe(context).node


def _fitting(node: Node, texts: list[str]) -> dict[str, ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Which of these could be a partition's, by the name of what it would be."""
    rules = node.choice.rules
    kinds = (
        ("public_ipv4", rules.partition_network),
        ("vpn_ipv4", rules.mesh_range),
        ("ipv4", rules.ipv4_network),
        ("ipv6", rules.base.network if rules.base else None),
    )
    found: dict[str, ipaddress.IPv4Address | ipaddress.IPv6Address] = {}
    for text in texts:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        name = next((name for name, network in kinds if network is not None and address in network), "")
        if name:
            found.setdefault(name, address)
    return found


def _suspect(context: Context, other: Mapping[str, list[str]]) -> None:
    if context.offers.read().foreign == other:
        return
    context.offers.suspect(other)
    error = _twin(context.offers.read())
    _record(context, str(error), error.hint)


def _look_at_published(context: Context, document: ComputerDocument) -> None:
    """Judge what instances that are here have published, by the tunnel certificates among it."""
    book, node = context.offers, context.node_in_force
    found = {one.partition_id: rows for one in document.partitions if (rows := published.certificates(one))}
    items = [item for name in found if node and (item := node.partition(name))]
    if not items:
        return
    states, _ = context.store.readable()
    for item, identity in zip(items, identities.observe(context.config, items).values(), strict=True):
        state = states.get(item.id)
        if state is None or identity is None or state.life == "destroying":
            book.see(published.names(found[item.id], frozenset()))
            continue
        own = frozenset(one.base64 for one in identity.known)
        shown, strange = published.judge(found[item.id], own, book.shown.get(item.id), state.processed_at)
        book.shown.pop(item.id, None)
        if shown:
            book.shown[item.id] = shown
        news = {digest((one,)) for one in strange} - set(book.read().seen)
        book.see(published.names(found[item.id], own))
        if news and not book.read().foreign and item.id not in book.read().published:
            book.save(replace(book.read(), published={**book.read().published, item.id: min(news)}))
            error = _twin(book.read())
            _record(context, str(error), error.hint)


def _record(context: Context, message: str, hint: str = "") -> None:
    (logger.error if hint else logger.info)("%s", message)
    more = {"hint": hint, "code": CODE} if hint else {}
    context.events.record(CODE, message, resource=context.config.computer_id, **more)


def _twin(offered: Offered) -> PartitiondError:
    names = sorted(offered.foreign or offered.published)
    shown = "; ".join(
        f"{name}: {', '.join(offered.foreign[name])}" if offered.foreign else name for name in names[:_NAMED]
    )
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    hint = "end one of the two; on the one that stays: partitiond sync capacity --force"
    if offered.foreign:
        what = f"of {shown}{more} the master has addresses that were never told by this one; it is not told again, and"
    else:
        what = f"for {shown}{more} somebody published a certificate that this one's instance does not have;"
        hint += "; that also where the instance has published another's certificate itself"
    return PartitiondError(
        CODE,
        f"another machine told the master that it is this node: {what} what runs here keeps running",
        hint=hint,
    )


def _alive(offered: Offered) -> PartitiondError:
    shown = ", ".join(offered.alive[:_NAMED])
    return PartitiondError(
        CODE,
        f"another machine with this identity seems to be up: somebody answers at {shown}, which the master has as addresses"
        " of this node's partitions, and this node begins with nothing",
        hint="end the other machine, and this one begins by itself; or, if it is another's address by now: partitiond"
        " sync capacity --force",
        retryable=True,
    )
