"""What masters demand of usage beyond the schema, and what a tenant may say: pure judgements.

A production master takes any document that passes its schema, says nothing, and later rejects the *whole* of
it for one movement that it can not place (slapos_accounting of slapos.core's master). So everything that it
looks at is looked at here before a document is made.
"""

from __future__ import annotations

import math
import re
from decimal import Context, Decimal
from itertools import islice
from typing import TYPE_CHECKING

from accounting.elements import refusal, shown
from accounting.tioxml import LARGEST, Claim, Document, Movement, clean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Set

_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,119}")
_EXACT = Context(prec=128)
_NAMED = 10  # resources that an error lists
_SAID = 20  # problems of a document that are told


def problems(
    document: Document,
    *,
    references: Set[str],
    resources: Set[str],
    now: float,
    known: Set[str] = frozenset(),
) -> tuple[str, ...]:
    """Give one sentence for each thing for which a master would reject the document; none, and it is good.

    ``references`` are the guids of this node's instances and the node's own, ``resources`` those that the
    master has services for, ``known`` the references of documents that were made before.
    """
    found = _problems(document, references=references, resources=resources, now=now, known=known)
    return tuple(islice(found, _SAID))


def _problems(
    document: Document, *, references: Set[str], resources: Set[str], now: float, known: Set[str]
) -> Iterator[str]:
    if _REFERENCE.fullmatch(document.reference) is None:
        yield f"reference {shown(document.reference)} is not of letters, digits and . _ : - alone"
    if document.reference in known:
        yield f"reference {shown(document.reference)} was used before"
    if not (math.isfinite(document.start) and math.isfinite(document.stop)):
        yield "a date is not finite"
    elif not document.start <= document.stop <= now:
        yield f"it does not start before it stops, or stops after {now:.0f}"
    if not document.movements:
        yield "it has no movement"
    for number, movement in enumerate(document.movements, 1):
        if movement.resource not in resources:
            yield f"movement {number}: resource {shown(movement.resource)} is not a configured one"
        if movement.reference not in references:
            yield f"movement {number}: {shown(movement.reference)} is no instance of this node"
        if not movement.quantity.is_finite() or not movement.quantity:
            yield f"movement {number}: quantity {movement.quantity} is not finite, or 0"
        if not movement.price.is_finite():
            yield f"movement {number}: price {movement.price} is not finite"


def accept(
    claims: Iterable[Claim], *, guid: str, own_names: Set[str], resources: Set[str]
) -> tuple[Movement, ...]:
    """Give a tenant's claims as movements about its own guid; raises AccountingError for the whole file.

    A reference may be left out, be the guid or one of ``own_names`` (the partition and its user: what
    software that knows of no guid writes). Claims of one resource and title are added up.
    """
    sums: dict[tuple[str, str], Decimal] = {}
    for claim in claims:
        if claim.reference and claim.reference != guid and claim.reference not in own_names:
            raise refusal(f"reports about {shown(claim.reference)}; a partition reports only about itself")
        if claim.resource not in resources:
            raise refusal(f"resource {shown(claim.resource)} is not one of {_list(resources)}")
        key = claim.resource, " ".join(clean(claim.title).split())
        sums[key] = _EXACT.add(sums.get(key, Decimal(0)), claim.quantity)
        if not 0 < sums[key] <= LARGEST:
            raise refusal(f"quantities of {shown(claim.resource)} add up to more than {LARGEST:f}")
    return tuple(
        Movement(resource=resource, reference=guid, quantity=quantity, title=title)
        for (resource, title), quantity in sums.items()
    )


def _list(resources: Set[str]) -> str:
    if not resources:
        return "those that partitions may report: there are none"
    names = [shown(name) for name in sorted(resources)[:_NAMED]]
    return ", ".join(names) + (f" and {len(resources) - _NAMED} more" if len(resources) > _NAMED else "")
