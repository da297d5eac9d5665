"""What may stand in the body of a request to the control socket: nothing unknown, nothing of another kind.

A word that was misspelled must not do more than was meant: ``{"partition": ["slappart3"]}`` would apply the whole node, and
``{"purge": "false"}`` take all data away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from partitiond.errors import WrongUseError

if TYPE_CHECKING:
    from collections.abc import Mapping

_MOST_NAMES = 10_000


def check(body: Mapping[str, Any], **kinds: type) -> None:
    """Refuse a body that has other keys than ``kinds``, or values of another kind; a list is one of texts.

    Raises WrongUseError ``control.body``.
    """
    for key, value in body.items():
        kind = kinds.get(key)
        if kind is None:
            raise _wrong(f"{key!r} is not known here", f"allowed: {', '.join(sorted(kinds)) or 'nothing'}")
        right = type(value) is kind
        if right and kind is list:
            right = len(value) <= _MOST_NAMES and all(isinstance(one, str) for one in value)
        if not right:
            words = {bool: "true or false", str: "a text", list: "a list of texts", float: "a number"}
            raise _wrong(f"{key} is {type(value).__name__}", f"allowed: {words[kind]}")


def _wrong(message: str, hint: str) -> WrongUseError:
    return WrongUseError("control.body", message[:200], hint=hint)
