"""Setting keys in a configuration file as a person would: the lines of these keys change, every other byte stays."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_SECTION = re.compile(r"\[([^\]]+)\]")
_SETTING = re.compile(r"([^\s#;=:\[][^=:]*?)\s*[=:]")
_COMMENT = re.compile(r"[ \t]+[#;]")


def set_keys(text: str, section: str, values: Mapping[str, str]) -> str:
    """Return the text with these keys set in a section. Pure.

    A key that is there keeps its place and the comment behind it; others come to the end of the section, which is made at the
    end of the file where there is none.
    """
    end = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith(("\n", "\r")):
        lines[-1] += end
    span = _span(lines, section)
    if span is None:
        lines += ([end] if lines else []) + [f"[{section}]{end}"]
        span = (len(lines), len(lines))
    inside = lines[span[0] : span[1]]
    for key, value in values.items():
        _set(inside, key, value, end)
    return "".join([*lines[: span[0]], *inside, *lines[span[1] :]])


def _span(lines: list[str], section: str) -> tuple[int, int] | None:
    """From where to where the lines below a section's head stand."""
    start = None
    for number, line in enumerate(lines):
        # some editors begin a file with a byte order mark
        head = _SECTION.match(line.removeprefix("\ufeff"))
        if head is None:
            continue
        if start is not None:
            return start, number
        if head[1].strip() == section:
            start = number + 1
    return None if start is None else (start, len(lines))


def _set(lines: list[str], key: str, value: str, end: str) -> None:
    for number, line in enumerate(lines):
        found = _SETTING.match(line)
        if found is None or found[1].strip().lower() != key:
            continue
        comment = _COMMENT.search(line, found.end())
        behind = line[comment.start() :].rstrip() if comment else ""
        lines[number] = f"{key} = {value}{behind}{end}"
        # the rest of a value of several lines; a line that begins with white space goes on with it
        following = number + 1
        while (
            following < len(lines) and (inside := lines[following].strip()) and lines[following][0] in " \t"
        ):
            if inside[0] in "#;":
                following += 1
            else:
                del lines[following]
        return
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    lines.insert(last + 1, f"{key} = {value}{end}")
