"""Makes the documents of a day that has ended from what the ledger holds, each amount in exactly one of them.

What the master would reject as a whole is kept small: the meters of all present instances are one document a day, what an
instance used that is gone by now is another, and what a partition says itself is one of its own.

``gather`` only reads, so that a day of millions of samples holds up no pass; ``store`` writes the documents and, in the same
transaction, what they are made of as told. Both are for one caller at a time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import TYPE_CHECKING, Literal, NamedTuple

from accounting import amounts, incidents, rules, tioxml
from accounting.errors import AccountingError
from accounting.tariff import METERS
from accounting.tioxml import Document, Movement

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator, Mapping

    from accounting.tariff import Rate, Tariff

Kind = Literal["node", "instance", "partition"]
_DAY = 86400
# 12 places of a TiB are 1 byte
_PLACES = Decimal(10) ** -12
_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)
_METERS_OF_INCIDENTS = {incidents.SERVICE: "outage", incidents.PROMISE: "promise"}
_TITLES: Mapping[Kind, str] = {
    "node": "Usage of {computer}",
    "instance": "Last usage of {guid} on {computer}",
    "partition": "Usage of {guid} as {partition} of {computer} reports it",
}


class Period(NamedTuple):
    """The passes of one day."""

    id: int
    day: str
    first_seq: int
    until_seq: int


class Owner(NamedTuple):
    """Who holds or held a partition; ``guid`` is empty for nobody. ``gone``: the master does not know it any more."""

    id: int
    partition: str
    guid: str
    reported_seq: int
    present: bool
    gone: bool


@dataclass(frozen=True, slots=True)
class Draft:
    """A document before it has its reference, and the rows of intake that it tells."""

    kind: Kind
    movements: tuple[Movement, ...]
    partition: str = ""
    guid: str = ""
    intake: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Drafts:
    """All documents of a period of a ``ledger``. They tell of ``owners`` up to its last pass, and of ``incidents`` so many
    microseconds more. ``closes``: the period is done with.
    """

    ledger: str
    period: Period
    drafts: tuple[Draft, ...]
    owners: tuple[int, ...] = ()
    incidents: tuple[tuple[int, int], ...] = ()
    closes: bool = True


@dataclass(slots=True)
class _Part:
    """What is gathered of one owner."""

    quantities: dict[str, Decimal] = field(default_factory=dict)
    incidents: list[tuple[int, int]] = field(default_factory=list)


def due(connection: sqlite3.Connection) -> tuple[Period, ...]:
    """Give the periods that have ended and have no documents yet, the oldest first."""
    rows = connection.execute(
        "SELECT id, day, first_seq, until_seq FROM period WHERE until_seq IS NOT NULL AND documented = 0 ORDER BY id"
    )
    return tuple(Period(*row) for row in rows)


def under_way(connection: sqlite3.Connection) -> Period | None:
    """Give the period that has not ended, as far as it has come."""
    row = connection.execute(
        "SELECT id, day, first_seq, (SELECT max(seq) FROM pass) FROM period WHERE until_seq IS NULL"
    ).fetchone()
    return None if row is None else Period(*row)


def gather(
    connection: sqlite3.Connection,
    period: Period,
    tariff: Tariff,
    computer: str,
    *,
    last: bool,
    apart: frozenset[str] = frozenset(),
) -> Drafts:
    """Give the documents of a period that has ended; with ``last`` also what partitions have said so far.

    ``apart`` are partitions whose instances the master may not know: a document that names one is rejected as a whole, so each
    has one of its own.
    """
    owners = _owners(connection)
    parts = _parts(connection, period, owners, tariff, until=_end_of(period.day))
    drafts = [_of_node(owners, parts, tariff, computer, apart)]
    drafts += [
        _of_instance(owner, parts[owner.id], tariff)
        for owner in owners
        if owner.guid and not owner.gone and (not owner.present or owner.partition in apart)
    ]
    if last:
        drafts += _of_partitions(connection, tariff)
    return _drafts(connection, period, drafts, parts, closes=True)


def gather_last(
    connection: sqlite3.Connection, partition: str, guid: str, tariff: Tariff, now: float
) -> Drafts | None:
    """Give the last documents about an instance that is about to be destroyed: what it used that no document tells, the day
    under way included, and what it says itself. A master that has let go of an instance rejects what names it, so they are
    made once; None afterwards.
    """
    period = under_way(connection)
    owners = [one for one in _owners(connection) if (one.partition, one.guid) == (partition, guid)]
    if period is None or not owners or owners[0].gone:
        return None
    # days that have ended and have no documents yet will find this owner told of
    period = period._replace(first_seq=min(one.first_seq for one in (*due(connection), period)))
    parts = _parts(connection, period, owners, tariff, until=now, ended=False)
    own = _of_instance(owners[0], parts[owners[0].id], tariff)
    said = [
        one for one in _of_partitions(connection, tariff) if (one.partition, one.guid) == (partition, guid)
    ]
    return _drafts(connection, period, [own, *said], parts, closes=False)


def _drafts(
    connection: sqlite3.Connection,
    period: Period,
    drafts: list[Draft],
    parts: Mapping[int, _Part],
    *,
    closes: bool,
) -> Drafts:
    told = tuple(one for part in parts.values() for one in part.incidents)
    filled = tuple(draft for draft in drafts if draft.movements)
    return Drafts(_identity(connection), period, filled, tuple(parts), told, closes)


def _identity(connection: sqlite3.Connection) -> str:
    return str(connection.execute("SELECT id FROM identity").fetchone()[0])


def _refuse_other(connection: sqlite3.Connection, drafts: Drafts) -> None:
    """Refuse drafts of a ledger that is not there any more, damaged between ``gather`` and ``store``: all numbers are its."""
    if _identity(connection) == drafts.ledger and (not drafts.closes or drafts.period in due(connection)):
        return
    raise AccountingError(
        "accounting.ledger_changed",
        f"the documents of {drafts.period.day} were made of what is not in use any more",
        hint="the next pass makes what this one has",
        retryable=True,
    )


def store(
    connection: sqlite3.Connection, drafts: Drafts, tariff: Tariff, computer: str, now: float
) -> list[str]:
    """Write the documents, and what they are made of as told; give their references. In the caller's transaction.

    One that the master would reject, which would be a mistake of ours, is kept as refused and spoils no other. Raises
    AccountingError ``accounting.ledger_changed`` where these are drafts of another ledger, or the period has its documents.
    """
    _refuse_other(connection, drafts)
    made = []
    period, moment = drafts.period, round(now * 10**6)
    guids = {guid for (guid,) in connection.execute("SELECT guid FROM owner WHERE guid != ''")}
    for draft in drafts.drafts:
        document = _document(connection, draft, period.day, computer, now)
        wrong = rules.problems(document, references={computer, *guids}, resources=tariff.resources, now=now)
        state = "refused" if wrong else "waiting"
        names = (document.reference, period.day, draft.kind, draft.partition, draft.guid)
        row = connection.execute(
            "INSERT INTO document (reference, day, kind, partition, guid, content, state, made, changed, reason)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
            (*names, tioxml.write(document), state, moment, moment, "; ".join(wrong)),
        ).fetchone()
        connection.executemany(
            "UPDATE intake SET document = ? WHERE id = ?", [(int(row[0]), number) for number in draft.intake]
        )
        made.append(document.reference)
    connection.executemany(
        "UPDATE owner SET reported_seq = max(reported_seq, ?) WHERE id = ?",
        [(period.until_seq, owner) for owner in drafts.owners],
    )
    for number, more in drafts.incidents:
        incidents.mark_reported(connection, number, more)
    if not drafts.closes:
        connection.executemany(
            "UPDATE owner SET gone = 1 WHERE id = ?", [(owner,) for owner in drafts.owners]
        )
    else:
        connection.execute("UPDATE period SET documented = 1 WHERE id = ?", (period.id,))
    return made


def _document(connection: sqlite3.Connection, draft: Draft, day: str, computer: str, now: float) -> Document:
    # a clock that was ahead for a while has made days that are still to come
    stop = min(_end_of(day), now)
    name = {"node": "node", "instance": f"{draft.partition}-last"}.get(draft.kind, draft.partition)
    return Document(
        reference=_unique(connection, f"{day}-{name}"),
        title=_TITLES[draft.kind].format(computer=computer, guid=draft.guid, partition=draft.partition),
        start=min(_start_of(day), stop),
        stop=stop,
        movements=draft.movements,
    )


def _unique(connection: sqlite3.Connection, name: str) -> str:
    """A reference that no document had: the day may have come a second time, or a last usage not be the last."""
    number, reference = 1, name
    while connection.execute("SELECT 1 FROM document WHERE reference = ?", (reference,)).fetchone():
        number += 1
        reference = f"{name}-{number}"
    return reference


def _start_of(day: str) -> float:
    return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()


def _end_of(day: str) -> float:
    return _start_of(day) + _DAY - 1


def _owners(connection: sqlite3.Connection) -> list[Owner]:
    rows = connection.execute(
        "SELECT id, partition, guid, reported_seq, until_seq IS NULL, gone FROM owner ORDER BY id"
    )
    return [
        Owner(number, partition, guid, seq, bool(present), bool(gone))
        for number, partition, guid, seq, present, gone in rows
    ]


def _parts(
    connection: sqlite3.Connection,
    period: Period,
    owners: Iterable[Owner],
    tariff: Tariff,
    *,
    until: float,
    ended: bool = True,
) -> dict[int, _Part]:
    """Give what each owner used in the passes of the period that are in no document yet, by meter; ``ended``: the period is."""
    parts = {owner.id: _Part() for owner in owners}
    told = {owner.id: owner.reported_seq for owner in owners}
    for owner, meter, amount in amounts.of_samples(connection, period.first_seq, period.until_seq, told):
        if owner in parts and meter in tariff.rates:
            _add(parts[owner], meter, amount)
    if tariff.rates.keys() & amounts.LEVELS.values():
        levels = amounts.of_levels(connection, period.first_seq, period.until_seq, told, ended=ended)
        for owner, meter, amount in levels:
            if owner in parts and meter in tariff.rates:
                _add(parts[owner], meter, amount)
    by_guid = {(owner.partition, owner.guid): owner.id for owner in owners}
    for incident in incidents.waiting(connection, until):
        number = by_guid.get((incident.partition, incident.guid))
        if number is not None:
            # also where it is reported to nobody: it must not be when the operator names a resource some day
            parts[number].incidents.append((incident.id, incident.microseconds))
            meter = _METERS_OF_INCIDENTS[incident.kind]
            if meter in tariff.rates:
                _add(parts[number], meter, Decimal(incident.microseconds) / 10**6)
    return parts


def _add(part: _Part, meter: str, amount: Decimal) -> None:
    part.quantities[meter] = part.quantities.get(meter, Decimal(0)) + amount


def _of_node(
    owners: Iterable[Owner],
    parts: Mapping[int, _Part],
    tariff: Tariff,
    computer: str,
    apart: frozenset[str],
) -> Draft:
    """The meters of all that is there, but for those ``apart``. The node's own is what nobody's partitions used, and what came
    up of an instance after its last documents: the master rejects what names it then.
    """
    movements: list[Movement] = []
    free = _Part()
    for owner in owners:
        part = parts[owner.id]
        if owner.guid and owner.present and not owner.gone:
            if owner.partition in apart:
                continue
            movements += _movements(part, tariff, owner.guid, owner.partition)
        elif owner.gone or not owner.guid:
            for meter, amount in part.quantities.items():
                _add(free, meter, amount)
    movements += _movements(free, tariff, computer, "partitions without an instance")
    return Draft("node", tuple(movements))


def _of_instance(owner: Owner, part: _Part, tariff: Tariff) -> Draft:
    movements = tuple(_movements(part, tariff, owner.guid, owner.partition))
    return Draft("instance", movements, owner.partition, owner.guid)


def _movements(part: _Part, tariff: Tariff, reference: str, whose: str) -> Iterator[Movement]:
    for meter, kind in METERS.items():
        if meter in part.quantities and (quantity := _quantity(part.quantities[meter], tariff.rates[meter])):
            rate = tariff.rates[meter]
            yield Movement(rate.resource, reference, quantity, f"{kind.title}, {whose}", rate.price)


def _quantity(amount: Decimal, rate: Rate) -> Decimal:
    return _EXACT.divide(amount, Decimal(rate.per)).quantize(_PLACES, context=_EXACT)


def _of_partitions(connection: sqlite3.Connection, tariff: Tariff) -> list[Draft]:
    """What partitions said and no document tells yet, one for each instance."""
    found: dict[tuple[str, str], Draft] = {}
    sums: dict[tuple[str, str], dict[tuple[str, str], Decimal]] = {}
    rows = connection.execute(
        "SELECT id, partition, guid, movements FROM intake WHERE document IS NULL ORDER BY id"
    )
    for number, partition, guid, text in rows:
        said = [(str(resource), str(title), Decimal(amount)) for resource, title, amount in json.loads(text)]
        if not all(resource in tariff.partition_resources for resource, _, _ in said):
            continue  # the operator took a resource away meanwhile: kept until it is named again
        key = (partition, guid)
        draft = found.get(key, Draft("partition", (), partition, guid))
        found[key] = replace(draft, intake=(*draft.intake, number))
        mine = sums.setdefault(key, {})
        for resource, title, amount in said:
            mine[resource, title] = _EXACT.add(mine.get((resource, title), Decimal(0)), amount)
    return [
        replace(
            draft,
            movements=tuple(
                Movement(resource, draft.guid, amount, title)
                for (resource, title), amount in sums[key].items()
            ),
        )
        for key, draft in found.items()
    ]
