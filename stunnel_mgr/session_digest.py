"""What one pass tells of the sessions of one partition: so much and no more, whatever strangers do.

The first records of each kind are told singly, the rest summed up, and of the sums the largest, so that
neither a busy tunnel nor somebody who knocks a thousand times a second can flush the node's log of events.
Texts that strangers chose are escaped and short here.
"""

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .session_records import EndedSession, FailedReason, FailedSession, Record, RefusedPeer, RefusedReason
from .syntax import plain

MOST = 20
"""Records of each kind that are told singly, and sums of each kind; one sum more has all that remains."""
_LONGEST = 200  # of a subject, escaped, in characters


@dataclass(frozen=True, slots=True)
class SessionSum:
    """Sessions not told singly, of one service and subject; without both, of all that remain.

    The bytes are those that are known, ``seconds`` is the sum of all.
    """

    service: str
    subject: str | None
    count: int
    bytes_to_tls: int
    bytes_to_socket: int
    seconds: int


@dataclass(frozen=True, slots=True)
class ReasonSum:
    """Refused peers or failed sessions not told singly, of one service and reason; without both, of all that
    remain. The service is empty with ``too_many``, too, which stunnel says without one.
    """

    service: str
    reason: RefusedReason | FailedReason | None
    count: int


@dataclass(frozen=True, slots=True)
class SessionDigest:
    """At most ``most`` of each of the six, and one more of each sum."""

    ended: tuple[EndedSession, ...]
    ended_sums: tuple[SessionSum, ...]
    failed: tuple[FailedSession, ...]
    failed_sums: tuple[ReasonSum, ...]
    refused: tuple[RefusedPeer, ...]
    refused_sums: tuple[ReasonSum, ...]


def digest(records: Iterable[Record], *, most: int = MOST) -> SessionDigest:
    """Sum up the records of one pass. Those that name nobody are always in the sums."""
    ended: list[EndedSession] = []
    failed: list[FailedSession] = []
    refused: list[RefusedPeer] = []
    more_ended: dict[tuple[str, str | None], SessionSum] = {}
    more_failed = Counter[tuple[str, FailedReason]]()
    more_refused = Counter[tuple[str, RefusedReason]]()
    for record in records:
        if isinstance(record, EndedSession):
            if len(ended) < most:
                ended.append(replace(record, subject=_escaped(record.subject)))
            else:
                who = record.service, _escaped(record.subject)
                more_ended[who] = _joined(more_ended.get(who, SessionSum(*who, 0, 0, 0, 0)), _sum(record))
        elif isinstance(record, FailedSession):
            if len(failed) < most:
                failed.append(replace(record, subject=_escaped(record.subject)))
            else:
                more_failed[record.service, record.reason] += 1
        elif len(refused) < most and record.remote is not None:
            refused.append(replace(record, subject=_escaped(record.subject)))
        else:
            more_refused[record.service, record.reason] += 1
    return SessionDigest(
        ended=tuple(ended),
        ended_sums=_largest_sessions(more_ended.values(), most),
        failed=tuple(failed),
        failed_sums=_largest_reasons(more_failed, most),
        refused=tuple(refused),
        refused_sums=_largest_reasons(more_refused, most),
    )


def _escaped(subject: str | None) -> str | None:
    if subject is None:
        return None
    text = plain(subject[:_LONGEST])
    return text if len(text) <= _LONGEST and len(subject) <= _LONGEST else f"{text[:_LONGEST]}..."


def _sum(session: EndedSession) -> SessionSum:
    to_tls, to_socket = session.bytes_to_tls or 0, session.bytes_to_socket or 0
    return SessionSum(session.service, session.subject, 1, to_tls, to_socket, session.seconds)


def _joined(one: SessionSum, other: SessionSum) -> SessionSum:
    return replace(
        one,
        count=one.count + other.count,
        bytes_to_tls=one.bytes_to_tls + other.bytes_to_tls,
        bytes_to_socket=one.bytes_to_socket + other.bytes_to_socket,
        seconds=one.seconds + other.seconds,
    )


def _largest_sessions(sums: Iterable[SessionSum], most: int) -> tuple[SessionSum, ...]:
    ordered = sorted(sums, key=lambda one: one.count, reverse=True)
    if len(ordered) <= most:
        return tuple(ordered)
    return (*ordered[:most], functools.reduce(_joined, ordered[most:], SessionSum("", None, 0, 0, 0, 0)))


def _largest_reasons(
    counts: Counter[tuple[str, FailedReason]] | Counter[tuple[str, RefusedReason]], most: int
) -> tuple[ReasonSum, ...]:
    ordered = [ReasonSum(service, reason, count) for (service, reason), count in counts.most_common()]
    if len(ordered) <= most:
        return tuple(ordered)
    return (*ordered[:most], ReasonSum("", None, sum(one.count for one in ordered[most:])))
