"""Reading a configuration file: sections and values with the place of each, and every complaint collected on the way."""

from __future__ import annotations

import configparser
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Collection

_SYSTEM_DIRECTORIES = frozenset(
    (
        "/ /bin /boot /dev /etc /home /lib /lib64 /media /mnt /opt /proc /root /run /run/lock /sbin /srv /sys /tmp /usr"
        " /usr/bin /usr/lib /usr/local /usr/sbin /usr/share /var /var/cache /var/lib /var/log /var/run /var/spool /var/tmp"
        " /etc/opt /etc/opt/slapos /etc/slapos"
    ).split()
)


COMMAND_LINE = "the command line"
"""The place of what an option says."""


@dataclass(slots=True)
class Reader:
    """The parsed sections, and every complaint collected on the way."""

    parser: configparser.ConfigParser
    files: tuple[Path, ...]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    given: frozenset[tuple[str, str]] = frozenset()  # on the command line, in place of what the files say

    def place(self, section: str, key: str) -> str:
        """``file:line`` of the last setting of a key; the section's head when the key is not there."""
        if (section, key) in self.given:
            return COMMAND_LINE
        found = f"{self.files[0]}: [{section}]"
        for path in self.files:
            current = ""
            for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
                # an indented one is the next line of a value, such as the address of a tunnel's peer
                head = re.match(r"\[([^\]]+)\]", line)
                if head:
                    current = head[1].strip()
                if current != section:
                    continue
                setting = re.match(r"([^\s#;=:\[][^=:]*?)\s*[=:]", line)
                if (head and not key) or (setting and setting[1].strip().lower() == key):
                    found = f"{path}:{number}"
        return found

    def raw(self, section: str, key: str) -> str:
        """The text of a value; empty when it is not there."""
        return self.parser.get(section, key, fallback="").strip()

    def text(
        self, section: str, key: str, default: str | None, allowed: re.Pattern[str] | None, words: str
    ) -> str:
        """A value of an allowed form, or the default; with default None the key must be there."""
        value = self.raw(section, key)
        if not value:
            if default is None:
                self.problems.append(f"{self.place(section, '')}: {key} is missing; allowed: {words}")
                return ""
            return default
        if allowed is not None and not allowed.fullmatch(value):
            self.bad(section, key, value, words)
        return value

    def bad(self, section: str, key: str, value: str, words: str) -> None:
        """Complain of a value."""
        self.problems.append(f"{self.place(section, key)}: {key} = {value!r}; allowed: {words}")

    def warn_unknown(self, section: str, key: str, known: Collection[str]) -> None:
        """Warn of a key that nothing reads, with what may have been meant."""
        near = difflib.get_close_matches(key, sorted(known), 1)
        meant = f", did you mean {near[0]!r}?" if near else ""
        self.warnings.append(f"{self.place(section, key)}: unknown key {key!r}{meant}")

    def number(self, section: str, key: str, default: int | None, low: int, high: int) -> int:
        """A whole number within bounds."""
        words = f"a whole number from {low} to {high}"
        value = self.text(section, key, None if default is None else str(default), None, words)
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", value):
            if value:
                self.bad(section, key, value, words)
            return low
        number = int(value)
        if not low <= number <= high:
            self.bad(section, key, value, words)
        return number

    def truth(self, section: str, key: str, default: bool) -> bool:
        """A boolean, in any of the words that configparser knows."""
        value = self.raw(section, key).lower()
        if not value:
            return default
        if value not in configparser.ConfigParser.BOOLEAN_STATES:
            self.bad(section, key, value, "true, false, yes, no, on, off, 1 or 0")
            return default
        return configparser.ConfigParser.BOOLEAN_STATES[value]

    def choice(self, section: str, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of a few words."""
        value = self.raw(section, key) or default
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, 1)
            self.bad(
                section, key, value, " or ".join(allowed) + (f" (did you mean {near[0]}?)" if near else "")
            )
        return value

    def path(self, section: str, key: str, default: str | None) -> Path:
        """An absolute path without anything that means something to supervisord or buildout."""
        value = self.text(section, key, default, None, "an absolute path")
        # the path ends up in files of supervisord and buildout, where these would change the meaning
        if value and (not value.startswith("/") or re.search(r"[\s%\"'\\$*?\[\],;#\x00-\x1f\x7f]", value)):
            words = "an absolute path without spaces, quotes and any of % $ * ? [ ] , ; # and backslash"
            self.bad(section, key, value, words)
        elif ".." in value.split("/"):
            self.bad(section, key, value, "an absolute path without ..")
        return Path(re.sub("/+", "/", value) or "/")

    def own_path(self, section: str, key: str, default: str | None) -> Path:
        """A directory that becomes the node's own: its owner and mode are set, and ``teardown --purge`` empties it."""
        path = self.path(section, key, default)
        if self.raw(section, key) and str(path) in _SYSTEM_DIRECTORIES:
            self.bad(section, key, str(path), "a directory of its own, such as /srv/slapgrid")
        return path

    def optional_path(self, section: str, key: str) -> Path | None:
        """A path, or None where the key is empty."""
        return self.path(section, key, "") if self.raw(section, key) else None


def read(parser: configparser.ConfigParser, file: Path) -> None:
    """Read one file into the parser. Raises PartitiondError ``config.unreadable`` or ``config.syntax`` with file and line."""
    try:
        content = file.read_bytes()
        # some editors begin a file with a byte order mark
        parser.read_string(content.decode("utf-8-sig"), source=str(file))
    except OSError as error:
        raise PartitiondError(
            "config.unreadable",
            f"cannot read the configuration: {error.strerror}",
            resource=str(file),
            hint="name another file with -c FILE",
        ) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PartitiondError(
            "config.unreadable",
            f"cannot read the configuration: byte 0x{content[error.start]:02x} is not UTF-8",
            resource=f"{file}:{line}",
            hint="write the file in UTF-8",
        ) from error
    except configparser.Error as error:
        raise PartitiondError(
            "config.syntax",
            _syntax_error(error),
            resource=f"{file}:{_syntax_line(error)}",
            hint="a section is [name], a setting is key = value; each only once",
        ) from error


def merged(parser: configparser.ConfigParser) -> str:
    """All sections as one text that :func:`read` takes for the same; comments and the order of files are gone.

    Not ``ConfigParser.write``, which from Python 3.14 on refuses some of what it has read.
    """
    lines = []
    for section in parser.sections():
        lines.append(f"[{section}]")
        # a line that begins with white space goes on with the value
        lines += (f"{key} = {value}".replace("\n", "\n\t") for key, value in parser[section].items())
    return "".join(f"{line}\n" for line in lines)


def _syntax_error(error: configparser.Error) -> str:
    if isinstance(error, configparser.DuplicateOptionError):
        return f"{error.option} is set a second time in [{error.section}]"
    if isinstance(error, configparser.DuplicateSectionError):
        return f"section [{error.section}] begins a second time"
    if isinstance(error, configparser.MissingSectionHeaderError):
        return f"{error.line.strip()!r} stands before the first section"
    if isinstance(error, configparser.ParsingError):
        return "; ".join(f"line {number}: {text} is no setting" for number, text in error.errors)
    return " ".join(str(error).split())


def _syntax_line(error: configparser.Error) -> int:
    """The line of the first mistake."""
    if found := getattr(error, "errors", None):
        return int(found[0][0])
    return int(getattr(error, "lineno", None) or 1)
