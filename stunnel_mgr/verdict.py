"""What stunnel made of its configuration, told from its log: a SIGHUP gives no other answer (5.68, measured).

A failed reload leaves the old configuration in place, without a sign but a line in the log; a port that is
taken closes *all* listeners, and stunnel tries again on its own after 10 ms to 10 s, reading the file anew
each time. Each reading is a round here, and the last finished round is the verdict.

Only lines of the main thread (``LOGn[ui]``, or no thread at all before others exist) are believed. Names of
peers, which strangers choose, stand in lines of other threads, with their line ends escaped (measured).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .log_follower import LogFollower

# With a time and the thread once the log is open; a start that fails before writes "[!] …" for errors,
# without either.
_LINE = re.compile(r"(?:\d{4}\.\d\d\.\d\d \d\d:\d\d:\d\d LOG(\d)\[ui\]|\[([!:. ])\]):? (.*)")
_MARKED_ERROR = "!"
_BOUND = re.compile(r"Service \[([^\]]*)\] \(FD=\d+\) bound to .*")
_NOT_BOUND = re.compile(r"Binding service \[([^\]]*)\] to (\S+): (.*)")
_BIND_FAILED = re.compile(r"Binding service \[([^\]]*)\] failed")
_START = "Reading configuration from file "
_FAILED = ("Configuration failed", "Failed to reload the configuration file")
_ERROR_LEVEL = 3  # syslog's LOG_ERR; lower is worse
_MAX_LINE = 16 * 1024
_MAX_REASON = 1000
_MOST_REASONS = 20


@dataclass(frozen=True, slots=True)
class ReloadVerdict:
    """How the last finished reading of the configuration went.

    ``ok``: it is in force and every service listens. Otherwise ``reason`` is for people, ``services`` names
    the tunnels to blame where the log does, and ``listeners_lost`` says that nothing listens any more (a port
    was taken) and that a running stunnel keeps trying by itself; else the configuration from before is still
    in force.
    """

    ok: bool
    reason: str = ""
    services: tuple[str, ...] = ()
    listeners_lost: bool = False


class VerdictReader:
    """Follows the log from a place before the SIGHUP (or the start) on; feed it what was added, as it comes.

    ``services`` are those of ``RenderedConfig``: the verdict is good only when each of them listens.
    """

    def __init__(self, services: Collection[str]) -> None:
        self._expected = frozenset(services)
        self._rest = b""
        self._bound: set[str] = set()
        self._errors: list[str] = []
        self._taken: list[str] = []
        self._verdict: ReloadVerdict | None = None

    def feed(self, data: bytes) -> ReloadVerdict | None:
        """Take bytes of the log, cut anywhere; gives the verdict of the last finished round, None before
        there is one.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[:_MAX_LINE]  # a line that never ends must not fill the memory
        for line in lines:
            if found := _LINE.fullmatch(line.decode("utf-8", "replace")):
                level, mark, message = found.groups()
                self._line(
                    message, error=mark == _MARKED_ERROR or (mark is None and int(level) <= _ERROR_LEVEL)
                )
        return self._verdict

    def _line(self, message: str, *, error: bool) -> None:
        if message.startswith(_START):
            self._bound, self._errors, self._taken = set(), [], []
        elif message in _FAILED:
            self._fail(self._errors or [message])
        elif bound := _BOUND.fullmatch(message):
            if bound[1] in self._expected:
                self._bound.add(bound[1])
            if self._expected <= self._bound:
                self._verdict = ReloadVerdict(ok=True)
        elif taken := _NOT_BOUND.fullmatch(message):
            _note(self._taken, f"{taken[1]} cannot listen on {taken[2]}: {taken[3]}")
        elif failed := _BIND_FAILED.fullmatch(message):
            self._fail(self._taken or [message], services=(failed[1],), listeners_lost=True)
        elif error:
            _note(self._errors, message)

    def _fail(
        self, reasons: list[str], *, services: tuple[str, ...] = (), listeners_lost: bool = False
    ) -> None:
        reason = "; ".join(reasons)[:_MAX_REASON]
        self._verdict = ReloadVerdict(False, reason, services, listeners_lost)


def _note(texts: list[str], text: str) -> None:
    # the log is that of a tenant's process, which may say as much as it likes
    if len(texts) < _MOST_REASONS:
        texts.append(text[:_MAX_REASON])


def read_verdict(log: bytes, services: Collection[str]) -> ReloadVerdict | None:
    """Tell the verdict from a piece of log at once."""
    return VerdictReader(services).feed(log)


class LogTail(LogFollower):
    """Gives what is added to a log from now on; ``path`` may not exist yet. Nothing has to be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, LogFollower.at_end(path).place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
