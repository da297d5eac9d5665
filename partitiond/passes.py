"""What the passes over software and over instances have in common: their result, their pauses, their reports."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partitiond.errors import sentence
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 3600.0


@dataclass(slots=True)
class Result:
    """What a pass did: one line per thing done, and the failures as (resource, error)."""

    done: list[str]
    failures: list[tuple[str, Exception]]


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody who asks for a pass wants of it.

    ``force``: also what is not due. ``only``: these partitions, or releases by URL or its MD5. ``again``: what failed is tried
    now, and not when its pause is over. ``collect``: releases that the master does not list any more go.
    """

    force: bool = False
    only: frozenset[str] = frozenset()
    again: bool = False
    collect: bool = False

    def as_json(self) -> dict[str, object]:
        """What :meth:`read` takes."""
        return {"force": self.force, "only": sorted(self.only), "again": self.again, "collect": self.collect}

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Wish:
        """Make one of the body of a request, whose kinds were checked."""
        return cls(
            force=bool(body.get("force")),
            only=frozenset(body.get("only", ())),
            again=bool(body.get("again")),
            collect=bool(body.get("collect")),
        )


def pause_after(failures: int, first: float = _FIRST_PAUSE) -> float:
    """Seconds until the next try after so many failures in a row, ``first`` after one."""
    return float(min(_LONGEST_PAUSE, first * 2 ** min(failures - 1, 10)))


def report(call: Callable[[], object], resource: str) -> bool:
    """Tell the master something; whether it took it. What it did not take holds up nothing."""
    try:
        call()
    except SlapError as error:
        logger.warning("%s: the master did not take a report: %s", resource, sentence(error))
        return False
    return True
