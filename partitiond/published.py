"""Certificates of partitions' tunnels among what their instances have published: a second way in which a twin shows.

Two machines with one identity in one network have the same addresses, but each has tunnel identities of its own. Where the
master shows a certificate of this node's instance, and then another one of the same partition's name although the instance was
not configured meanwhile, somebody else's instance has published it. Pure but for what it is given.
"""

from __future__ import annotations

import json
from base64 import b64decode
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from partitiond.offers import digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from slap_client.documents import PartitionDocument

_SHORTEST, _LONGEST = 200, 8192  # of a certificate in base64
_MOST = 32  # of an instance, which may publish anything


@dataclass(frozen=True, slots=True)
class Shown:
    """What an answer showed of an instance's own certificates, by their keys; ``configured`` is when it was configured last."""

    configured: float
    values: Mapping[str, str]


def certificates(entry: PartitionDocument) -> dict[str, str]:
    """The published values that are certificates (base64 of the DER) with the partition's name, by their keys."""
    found = ((key, value) for key, value in _texts(entry.connection) if _name(value) == entry.partition_id)
    return dict(islice(found, _MOST))


def judge(
    found: Mapping[str, str], own: frozenset[str], before: Shown | None, configured: float
) -> tuple[Shown | None, frozenset[str]]:
    """What is shown of the instance's ``own``, for the next answer, and which certificates somebody else published."""
    mine = {key: value for key, value in found.items() if value in own}
    if before is None or before.configured != configured:
        return (Shown(configured, mine) if mine else None), frozenset()
    strange = frozenset(
        value for key, value in found.items() if value not in own and before.values.get(key, value) != value
    )
    return (Shown(configured, {**before.values, **mine}), strange)


def names(values: Mapping[str, str], own: frozenset[str]) -> frozenset[str]:
    """Digests of what is not the instance's own."""
    return frozenset(digest((value,)) for value in values.values() if value not in own)


def _texts(connection: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for key, value in connection.items():
        if not isinstance(value, str):
            continue
        yield key, value
        if key == "_":  # "json in xml": one key with all in it
            try:
                inner = json.loads(value)
            except ValueError:
                continue
            if isinstance(inner, dict):
                yield from ((name, one) for name, one in inner.items() if isinstance(one, str))


@lru_cache(maxsize=4096)
def _name(text: str) -> str:
    """The common name of a certificate; empty for what is none."""
    if not (_SHORTEST <= len(text) <= _LONGEST and text.startswith("MII")):
        return ""
    from cryptography import x509  # noqa: PLC0415 - only where something looks like one

    try:
        subject = x509.load_der_x509_certificate(b64decode(text, validate=True)).subject
        found = subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    except ValueError:
        return ""
    return str(found[0].value) if len(found) == 1 else ""
