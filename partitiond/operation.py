"""An operation of the plan: what ``plan`` prints, ``apply`` runs and a test compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Action = Literal["create", "change", "remove"]


class AnyOperation(Protocol):
    """What the operations of every package have in common."""

    @property
    def id(self) -> str: ...  # noqa: D102 - the names are the contract's
    @property
    def resource(self) -> str: ...  # noqa: D102
    @property
    def action(self) -> str: ...  # noqa: D102
    @property
    def partition(self) -> str | None: ...  # noqa: D102
    @property
    def before(self) -> str | None: ...  # noqa: D102
    @property
    def after(self) -> str | None: ...  # noqa: D102
    @property
    def reason(self) -> str: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Operation:
    """One change. ``id`` is stable: the same drift has the same id each time it is planned."""

    id: str
    resource: str
    action: Action
    partition: str | None
    before: str | None
    after: str | None
    reason: str


def as_json(operation: AnyOperation) -> dict[str, str | None]:
    """Return the contract's JSON object of an operation."""
    return {
        name: getattr(operation, name)
        for name in ("id", "resource", "action", "partition", "before", "after", "reason")
    }
