"""What a run of promises says, decoded strictly: it comes from the hands of a tenant. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["plugin", "promise"]
Form = Literal["test", "anomaly", "none"]

_KINDS: tuple[Kind, ...] = ("plugin", "promise")
_FORMS: tuple[Form, ...] = ("test", "anomaly", "none")
_NAME_LIMIT = 255
_MESSAGE_LIMIT = 2000
_LONGEST = 366 * 24 * 60.0  # minutes
_SHORTEST = 0.05
_MOST_COUNTED = 10**6
_FLAGS = ("failed", "tested", "sensed", "bang")


@dataclass(frozen=True, slots=True)
class PromiseResult:
    """What came of one promise; ``key`` is its place below ``etc``.

    ``form`` is ``none`` where it has nothing to say in that mode; ``row`` counts failures in a row; ``periodicity`` is in
    seconds; ``tested`` and ``sensed``: whether it is of use at processing, and in between; ``bang``: it asks for one.
    """

    key: str
    form: Form
    failed: bool
    message: str
    seconds: float
    row: int
    periodicity: float
    tested: bool
    sensed: bool
    bang: bool


@dataclass(slots=True)
class Ran:
    """A run: results by key, what was there and not due, and what went wrong with it as a whole.

    ``left`` were not begun because the partition's time was over, ``more`` are too many to be run at all.
    """

    results: dict[str, PromiseResult] = field(default_factory=dict)
    spared: set[str] = field(default_factory=set)
    left: int = 0
    more: int = 0
    whole: bool = False
    fault: str = ""
    seconds: float = 0.0


def shown(key: str) -> str:
    """Return a name as people read it: the file's, without what is no letter; a tenant chose it."""
    name = key.partition("/")[2]
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in name)


def take_line(ran: Ran, line: bytes) -> None:
    """Take in one line of a run. Raises ValueError for one that a run of ours does not write."""
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("is no object")  # noqa: TRY004 - of a text, it is its value that is wrong
    if "error" in value:
        ran.fault = _text(value, "error", _MESSAGE_LIMIT)
    elif "done" in value:
        ran.whole = True
        ran.left, ran.more = _count(value, "left"), _count(value, "more")
    elif "there" in value:
        ran.spared.add(_key(value))
    else:
        result = _result(value)
        ran.results[result.key] = result


def _result(value: dict[str, Any]) -> PromiseResult:
    flags = [value.get(name) for name in _FLAGS]
    if not all(isinstance(flag, bool) for flag in flags):
        raise ValueError("a flag is none")
    failed, tested, sensed, bang = map(bool, flags)
    form = value.get("type")
    if form not in _FORMS:
        raise ValueError(f"type is {form!r}")
    minutes = min(max(_number(value, "periodicity"), _SHORTEST), _LONGEST)
    return PromiseResult(
        key=_key(value),
        form=form,
        failed=failed and form != "none",
        message=_text(value, "message", _MESSAGE_LIMIT),
        seconds=_number(value, "seconds"),
        row=_count(value, "row"),
        periodicity=minutes * 60,
        tested=tested,
        sensed=sensed,
        bang=bang and form == "anomaly",
    )


def _key(value: dict[str, Any]) -> str:
    kind, name = value.get("kind"), _text(value, "name", _NAME_LIMIT)
    if kind not in _KINDS or not name or "/" in name or "\0" in name:
        raise ValueError(f"{kind!r} {name!r} is no promise")
    return f"{kind}/{name}"


def _text(value: dict[str, Any], name: str, limit: int) -> str:
    found = value.get(name)
    if not isinstance(found, str) or len(found) > limit:
        raise ValueError(f"{name} is no text of at most {limit} characters")
    # half of a pair that UTF-16 knows cannot be written anywhere, and a name may hold such for bytes that are no UTF-8
    return found if name == "name" else found.encode("utf-8", "replace").decode()


def _number(value: dict[str, Any], name: str) -> float:
    found = value.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or found < 0:
        raise ValueError(f"{name} is no number")
    return float(found)


def _count(value: dict[str, Any], name: str) -> int:
    found = value.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= _MOST_COUNTED:
        raise ValueError(f"{name} is no count")
    return found
