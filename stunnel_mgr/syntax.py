"""A strict reader of the INI dialect of tunnel declarations, which knows the line of everything that it read.

It takes what ``configparser`` takes with ``=`` alone as delimiter, no interpolation, and ``;`` and ``#``
comments on lines of their own and, after a blank, behind a value; a line that starts with a blank continues
the value before it. It is not ``configparser`` because that gives no line numbers for values, and a tenant
with forty pins needs to know which is bad.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import TunnelError

MAX_TEXT = 64 * 1024
"""Longest declaration, in characters: some hundred pins of P-256."""

_COMMENT = re.compile(r"(?:^|(?<=\s))[;#].*")
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SHOWN = 80
# Unicode's control characters (NUL and CR among them, the tab not), and what surrogateescape makes of bytes
# not in UTF-8.
_FORBIDDEN = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff]")


def shown(text: str) -> str:
    """Quote what was read for a message: ASCII only, and short."""
    return ascii(text) if len(text) <= _SHOWN else ascii(text[:_SHOWN]) + "…"


def plain(text: str) -> str:
    """Give a name as it is where it is harmless in a log, else escaped: tenants name files as they like."""
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]


class FaultError(Exception):
    """What is wrong in which line; the reader of the whole declaration adds the file."""

    def __init__(self, line: int | None, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason
        self.hint = hint

    def error(self, *, name: str, file: str) -> TunnelError:
        """Make the error for callers: its message starts with ``file:line: ``."""
        file = plain(file)
        place = file if self.line is None else f"{file}:{self.line}"
        return TunnelError(
            "tunnel.declaration", f"{place}: {self.reason}", resource=name, hint=self.hint, line=self.line
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """The value of a key: the line of the key, and each part that is not empty with its own line."""

    line: int
    parts: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, value: str, line: int) -> "Entry":
        """Make an entry of a value that another reader found at ``line`` (a ``[tunnel NAME]`` of
        ``slapos.cfg``).
        """
        lines = enumerate(value.split("\n"), line)
        return cls(line, tuple((number, part.strip()) for number, part in lines if part.strip()))


@dataclass(frozen=True, slots=True)
class Section:
    """One section: the line of its header, and its keys in lower case."""

    line: int
    entries: Mapping[str, Entry]


def read_sections(text: str) -> Mapping[str, Section]:
    """Split ``text`` into sections. Raises FaultError for all that is not clearly of the dialect."""
    if len(text) > MAX_TEXT:
        raise FaultError(None, f"{len(text)} characters; allowed: at most {MAX_TEXT}")
    sections: dict[str, tuple[int, dict[str, _Draft]]] = {}
    current: dict[str, _Draft] | None = None
    value: _Draft | None = None
    for number, raw in enumerate(text.split("\n"), 1):
        _check_characters(raw, number)
        line = _COMMENT.sub("", raw).rstrip()
        if not line:
            continue
        if line[0].isspace():
            if value is None:
                raise FaultError(number, f"{shown(line)} continues a value, but no value comes before it")
            value[1].append((number, line.strip()))
        elif line[0] == "[":
            current, value = _open_section(sections, line, number), None
        else:
            if current is None:
                raise FaultError(number, f"{shown(line)} stands before any section; allowed: [tunnel] first")
            value = _open_entry(current, line, number)
    return {
        name: Section(line, {key: Entry(at, tuple(parts)) for key, (at, parts) in entries.items()})
        for name, (line, entries) in sections.items()
    }


_Draft = tuple[int, list[tuple[int, str]]]


def _check_characters(raw: str, number: int) -> None:
    if found := _FORBIDDEN.search(raw):
        raise FaultError(number, f"character U+{ord(found.group()):04X}; allowed: printable text in UTF-8")


def _open_section(
    sections: dict[str, tuple[int, dict[str, _Draft]]], line: str, number: int
) -> dict[str, _Draft]:
    if not line.endswith("]"):
        raise FaultError(number, f"{shown(line)} is no section; allowed: [tunnel]")
    name = line[1:-1]
    if name in sections:
        raise FaultError(number, f"section {shown(line)} stands twice, first in line {sections[name][0]}")
    sections[name] = (number, {})
    return sections[name][1]


def _open_entry(entries: dict[str, _Draft], line: str, number: int) -> _Draft:
    name, delimiter, value = line.partition("=")
    key = name.strip().lower()
    if not delimiter or not _KEY.fullmatch(key):
        raise FaultError(number, f"{shown(line)}; allowed: key = value, or a section in brackets")
    if key in entries:
        raise FaultError(number, f"{key}: stands twice, first in line {entries[key][0]}")
    entries[key] = (number, [(number, value.strip())] if value.strip() else [])
    return entries[key]
