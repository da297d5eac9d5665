"""What a failed build died of, in one line: the end of its log is made for people, and mostly says something else.

Pure. buildout says ``Error: …`` after a block ``While:``; recipes that compile raise a traceback after the compiler's words,
which then are the cause. A master keeps 80 characters of what it is told (the last ones of an instance's error), so the cause
is the first line of what is told, and the last one again, cut to fit.
"""

from __future__ import annotations

import re

MASTER_KEEPS = 80

# colours and cursor movements (ECMA-48), titles of windows, and what else begins with an escape
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_BUILDOUT = re.compile(r"^\s*(?:Error|[A-Za-z_.]*Error): (?P<said>.+)$")
# compilers and their kin: file:line[:column]: error: …, ld: …, configure: error: …, make: *** …
_COMPILER = re.compile(
    r"^(?:[^\s:]+:\d+(?::\d+)?: (?:fatal )?error: .+|configure: error: .+|\S*ld: .*(?:undefined|cannot find).+"
    r"|CMake Error.+|error(?:\[E\d+\])?: .+|E: .+|.*: command not found)$"
)
_MAKE = re.compile(r"^g?make(?:\[\d+\])?: \*\*\* (?!\[?Waiting).+$")
_WHILE = re.compile(r"^While:\s*$")
# errors of buildout that only say that something else has failed
_EMPTY_WORDS = re.compile(
    r"^(?:System error|Failed running .*|Error: )$|^.*returned non-zero exit status \d+\.?$|^Couldn't install: .*$"
)


def plain(text: str) -> str:
    """A text without escape sequences; of lines that were written over by carriage returns the last state."""
    lines = _ESCAPES.sub("", text).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


def cause(text: str) -> str:
    """The line that says why, with what buildout was doing; of a log that says nothing the last line that is not empty."""
    lines = [line.strip() for line in plain(text).split("\n")]
    said = _last(lines, _BUILDOUT)
    tool = _first(lines, _COMPILER) or _first(lines, _MAKE)
    found = said if said and not (tool and _EMPTY_WORDS.match(said)) else tool or said
    if not found:
        return next((line for line in reversed(lines) if line), "")
    doing = _doing(lines)
    return f"{found} ({doing})" if doing else found


def for_master(error_text: str) -> str:
    """What a master is told of an error, whose first line is the cause: that line once more at the end, cut to fit."""
    head = error_text.strip().partition("\n")[0].strip()
    if len(head) > MASTER_KEEPS:
        head = f"{head[: MASTER_KEEPS - 1]}…"
    return f"{error_text.rstrip()}\n{head}" if "\n" in error_text.strip() else error_text.strip()


def _last(lines: list[str], shape: re.Pattern[str]) -> str:
    return next((match["said"].strip() for line in reversed(lines) if (match := shape.match(line))), "")


def _first(lines: list[str], shape: re.Pattern[str]) -> str:
    """The first: what follows it, it has brought about."""
    return next((line for line in lines if shape.match(line)), "")


def _doing(lines: list[str]) -> str:
    """The last line of the last block ``While:``, which is the innermost thing that buildout was doing."""
    start = next((number for number in range(len(lines) - 1, -1, -1) if _WHILE.match(lines[number])), None)
    if start is None:
        return ""
    inner = ""
    for line in lines[start + 1 :]:
        if not line or _BUILDOUT.match(line) or not line.endswith("."):
            break
        inner = line.rstrip(".")
    return inner[:1].lower() + inner[1:]
