"""From when until when a certificate is valid, read without a library for X.509, and what follows for two of them.

A node looks at the identities of all its partitions in each pass, and most passes have no other use for
``cryptography``, which takes 50 ms and 15 MB to load. What is read here is root's own and was made by
``identity.make_identity``; a certificate of anybody else's is read by ``pins``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from .errors import TunnelError

CLOCK_SKEW = timedelta(days=1)
"""How far before it is made an identity starts to be valid, for peers whose clock is behind (or in local time)."""

RENEWED_BEFORE = timedelta(days=90)
"""How long before its end an identity gets a successor, or a third of its whole life where that is shorter."""

_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18
_LONG_FORM = 0x80


@dataclass(frozen=True, slots=True)
class Validity:
    """From when until when (aware, UTC) a certificate is valid."""

    not_before: datetime
    not_after: datetime

    @property
    def renewal(self) -> datetime:
        """When a successor is to be made."""
        return self.not_after - min(RENEWED_BEFORE, (self.not_after - self.not_before) / 3)


def read_validity(der: bytes) -> Validity:
    """Read it from the DER of a certificate (RFC 5280, 4.1). Raises TunnelError ``tunnel.identity``."""
    try:
        certificate = _contents(der, _SEQUENCE)
        parts = _parts(_contents(certificate, _SEQUENCE))
        if next(parts)[0] == _VERSION:
            next(parts)  # the serial number, which stands first where there is no version
        next(parts)  # algorithm
        next(parts)  # issuer
        tag, validity = next(parts)
        if tag != _SEQUENCE:
            raise ValueError("no validity where one should be")
        not_before, not_after = (_time(*part) for part in _parts(validity))
    except (ValueError, IndexError, StopIteration) as error:
        raise TunnelError("tunnel.identity", "the certificate is damaged") from error
    return Validity(not_before, not_after)


def shown_first(old: Validity, new: Validity, now: datetime) -> bool:
    """Whether of two identities of one partition the older one is still the one to show at ``now``.

    Its successor is published from when it is made on, and shown from halfway between that and the end of the
    old one: peers have the first half to learn of it, and the second to come back from wherever they were.
    """
    made = new.not_before + CLOCK_SKEW
    return now < min(old.not_after, made + (old.not_after - made) / 2)


def _contents(data: bytes, wanted: int) -> bytes:
    tag, contents = next(_parts(data))
    if tag != wanted:
        raise ValueError(f"tag {tag}, not {wanted}")
    return contents


def _parts(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Split DER into tags and contents (X.690, 8.1)."""
    at = 0
    while at < len(data):
        tag, length = data[at], data[at + 1]
        at += 2
        if length >= _LONG_FORM:
            digits = length - _LONG_FORM
            length = int.from_bytes(data[at : at + digits])
            at += digits
        if at + length > len(data):
            raise ValueError("cut off")
        yield tag, data[at : at + length]
        at += length


def _time(tag: int, contents: bytes) -> datetime:
    """A time as RFC 5280, 4.1.2.5 has it: in UTC, to the second; two digits of a year mean 1950 to 2049."""
    text = contents.decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError(f"tag {tag} is no time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
