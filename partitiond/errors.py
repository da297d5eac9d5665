"""The error family of the composition root; the leaf packages have classes of the same shape."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from accounting.errors import AccountingError
from netplan.errors import NetplanError
from slap_client.errors import SlapError
from stunnel_mgr.errors import TunnelError


class PartitiondError(Exception):
    """Something that the operator should know about.

    ``code`` is stable and dotted (``config.value``), ``resource`` names what it is about (a file and line, a
    partition), ``hint`` says what to do next, ``retryable`` whether trying again later may help.
    """

    def __init__(
        self, code: str, message: str, *, resource: str = "", hint: str = "", retryable: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.resource = resource
        self.hint = hint
        self.retryable = retryable


class WrongUseError(PartitiondError):
    """A question that cannot be asked so: exit status 64, HTTP status 400.  ``hint`` says what is allowed."""


@runtime_checkable
class FamilyError(Protocol):
    """What every error of ours has, whichever package raised it."""

    code: str
    resource: str
    hint: str
    retryable: bool


FAMILY = (PartitiondError, AccountingError, NetplanError, SlapError, TunnelError)


def printable(text: str) -> str:
    """Return a text without what would steer the terminal of whoever reads it; some of it was written by tenants."""
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)


def sentence(error: BaseException) -> str:
    """Return one line for logs: code, resource and what happened; of a log's end only the last line."""
    if isinstance(error, FAMILY):
        about = f"{error.resource}: " if error.resource else ""
        text = f"[{error.code}] {about}{error}"
    else:
        text = f"{type(error).__name__}: {error}"
    first, *rest = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return printable(f"{first} … {rest[-1]}" if rest else first)
