"""What is refused: a wish of the configuration that cannot be granted now, and that no operation mends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from stunnel_mgr.model import Refused


@dataclass(frozen=True, slots=True)
class Refusal:
    """One wish, where it stands (``line`` from 1, or None), why it is refused, and what to do next.

    ``partition`` is empty for what belongs to the whole node.
    """

    resource: Literal["block-device", "directory", "instance", "mesh", "storage"]
    name: str
    partition: str
    file: str
    line: int | None
    code: str
    reason: str
    hint: str


def as_json(one: Refusal | Refused) -> dict[str, Any]:
    """Return the JSON object of a refusal; a tunnel's has no code of its own."""
    more = (
        {"resource": one.resource, "code": one.code, "hint": one.hint}
        if isinstance(one, Refusal)
        else {"resource": "tunnel", "code": "tunnel.refused", "hint": "correct the declaration"}
    )
    return {
        "name": one.name,
        "partition": one.partition,
        "file": one.file,
        "line": one.line,
        "reason": one.reason,
        **more,
    }
