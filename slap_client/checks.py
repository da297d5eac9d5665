"""Checks of single values that a master sent, before they become file names, lines of a config, or log text.

Each returns the value with its type narrowed or raises ``SlapError("slap.garbage", …)`` that names the field.
"""

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from slap_client.errors import SlapError
from slap_client.values import Instance, Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Frozen: TypeAlias = "bool | int | float | str | tuple[Frozen, ...] | Mapping[str, Frozen] | None"

PARTITION_ID = re.compile(r"(?![.-])[A-Za-z0-9_.-]{1,64}")
_URL_LENGTH = 4096
_TEXT_LENGTH = 1024
_SHOWN_LENGTH = 4096


def garbage(message: str) -> SlapError:
    """Return the error for an answer that makes no sense."""
    return SlapError("slap.garbage", message, hint="ask the operator of the master; nothing was changed here")


def partition_id(value: Value) -> str:
    """Return the name of a partition, which is also a directory, a user's home and a part of unit names."""
    if not isinstance(value, str) or not PARTITION_ID.fullmatch(value):
        raise garbage(f"{_quoted(value)} can not be the name of a partition")
    return value


def software_url(value: Value) -> str:
    """Return a software release, a URL or path; it is written to a line of ``buildout.cfg``."""
    # isprintable: no control, format, surrogate or separator character, except for the space.
    if not isinstance(value, str) or not value.isprintable() or " " in value:
        raise garbage(f"{_quoted(value)} can not be a software release: white space or control characters")
    if "${" in value:  # no URL has braces (RFC 3986), and buildout would put the value of an option there
        raise garbage(f"{_quoted(value)} can not be a software release: ${{")
    if not 0 < len(value) <= _URL_LENGTH:
        raise garbage(f"a software release of {len(value)} characters; 1 to {_URL_LENGTH} are allowed")
    return value


def line(value: Value, name: str) -> str:
    """Return one printable line, of at most 1024 characters, perhaps empty; None counts as empty."""
    if value is None:
        return ""
    if not isinstance(value, str) or not value.isprintable() or len(value) > _TEXT_LENGTH:
        raise garbage(f"{name} is not one printable line of at most {_TEXT_LENGTH} characters")
    return value


def shown_text(value: Value, name: str) -> str:
    """Return free text for people, its first 4096 characters; what could steer a terminal becomes U+FFFD."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise garbage(f"{name} is not text")
    return "".join(char if char.isprintable() else "\ufffd" for char in value[:_SHOWN_LENGTH])


def opaque_stamp(value: Value) -> str:
    """Return a timestamp as text: an int of the production master, text of slapproxy; only to be compared."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return line(value, "the timestamp")


def mapping(value: Value, name: str) -> dict[str, Value]:
    """Return a dictionary; None counts as an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise garbage(f"{name} is not a dictionary")
    return value


def sequence(value: Value, name: str) -> "list[Value] | tuple[Value, ...]":
    """Return a list or tuple; None counts as an empty one."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise garbage(f"{name} is not a list")
    return value


def text_rows(value: Value, name: str) -> tuple[tuple[str, ...], ...]:
    """Return a list of tuples of text, such as (interface, address)."""
    return tuple(tuple(line(cell, name) for cell in sequence(row, name)) for row in sequence(value, name))


def frozen_mapping(value: Value, name: str) -> "Mapping[str, Frozen]":
    """Return a read-only deep copy of a dictionary; None counts as an empty one."""
    return _frozen_items(mapping(value, name).items(), name)


def frozen_mappings(value: Value, name: str) -> "tuple[Mapping[str, Frozen], ...]":
    """Return a read-only deep copy of a list of dictionaries."""
    return tuple(frozen_mapping(entry, name) for entry in sequence(value, name))


def _frozen_items(items: "Iterable[tuple[str, Value]]", name: str) -> "Mapping[str, Frozen]":
    return MappingProxyType({key: _frozen(value, name) for key, value in items})


def _frozen(value: Value, name: str) -> Frozen:
    match value:
        case dict():
            return _frozen_items(value.items(), name)
        case list() | tuple():
            return tuple(_frozen(item, name) for item in value)
        case Instance():
            raise garbage(f"{name} holds an object")
        case _:
            return value


def _quoted(value: Value) -> str:
    """What to show of a refused value: short, on one line, harmless to a terminal."""
    if not isinstance(value, str):
        return f"a {type(value).__name__}"
    return ascii(value if len(value) <= 80 else f"{value[:77]}...")
