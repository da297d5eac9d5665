"""``partitiond logs``: what a partition's programs and buildouts say, and what builds of releases say; also as it comes.

Needs no root: who may read the files (a partition's own user, by its group) may use it. What tenants write is shown so that it
cannot steer a terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond.errors import PartitiondError, WrongUseError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from partitiond.config import Config
    from partitiond.log_reader import Line, LogFile

SOFTWARE = "software"
_LINES = 100
_MOST_LINES = 1_000_000
_PAUSE = 0.2
# new logs, of programs that are started while we follow, are looked for so often
_LOOK_AGAIN = 10
_COLOURS = (36, 33, 32, 35, 34, 31)


def add(logs: argparse.ArgumentParser) -> None:
    """Add the options."""
    logs.add_argument(
        "partition", metavar="PARTITION|software", help="a partition, or the builds of releases"
    )
    logs.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help="only these logs, such as buildout; of software: a URL, or the MD5 of one",
    )
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what comes")
    logs.add_argument(
        "-n",
        "--lines",
        type=_count,
        default=_LINES,
        metavar="N",
        help=f"so many lines of each log [{_LINES}]",
    )

    _take_names_behind_options(logs)


def _take_names_behind_options(logs: argparse.ArgumentParser) -> None:
    """Let names also stand behind options (``logs software -f URL``), which argparse before Python 3.12 does not."""
    usual = logs.parse_known_args

    def parse(
        args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, rest = usual(args, namespace)
        if rest and not any(word.startswith("-") for word in rest):
            found.names, rest = [*found.names, *rest], []
        return found, rest

    logs.parse_known_args = parse  # type: ignore[method-assign, assignment]


def _count(text: str) -> int:
    if text == "all":
        return _MOST_LINES
    if not text.isascii() or not text.isdigit() or int(text) > _MOST_LINES:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to {_MOST_LINES}, nor all")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Show the logs, and what comes with ``--follow``."""
    from partitiond import config, log_reader  # noqa: PLC0415 - only what a verb needs is imported

    found = config.load(Path(options.cfg))
    printer = _Printer(options)
    with contextlib.ExitStack() as stack:
        logs = [log_reader.LogFile(name, path) for name, path in _paths(found, options).items()]
        for log in logs:
            stack.callback(log.close)
        printer.begin([log.name for log in logs])
        for log in logs:
            for line in _readable(log, options.lines):
                printer.show(line)
            if not options.follow:
                for line in log.finish():
                    printer.show(line)
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):  # which is how following ends
            if options.follow:
                _follow(found, options, logs, printer, stack)
    return 0


def _follow(
    config: Config,
    options: argparse.Namespace,
    logs: list[LogFile],
    printer: _Printer,
    stack: contextlib.ExitStack,
) -> None:
    from partitiond.log_reader import LogFile  # noqa: PLC0415 - as above

    turn = 0
    while True:
        for log in logs:
            for line in log.new():
                printer.show(line)
        sys.stdout.flush()
        time.sleep(_PAUSE)
        turn += 1
        if turn % _LOOK_AGAIN == 0:
            known = {log.name for log in logs}
            with contextlib.suppress(PartitiondError, OSError):
                for name, path in _paths(config, options).items():
                    if name not in known:
                        logs.append(log := LogFile(name, path))
                        stack.callback(log.close)
            printer.begin([log.name for log in logs])


def _paths(config: Config, options: argparse.Namespace) -> dict[str, Path]:
    """The logs that were asked for. Raises PartitiondError."""
    from partitiond import log_reader  # noqa: PLC0415 - as above
    from partitiond.state import Store  # noqa: PLC0415 - as above

    name, names = options.partition, options.names
    try:
        if name == SOFTWARE:
            if len(names) > 1:
                raise WrongUseError("cli.logs", "give one release, or none for all", resource=names[1])
            urls = [one.url for one in Store(config.state_dir).softwares()] if os.geteuid() == 0 else []
            return log_reader.of_software(config.log_dir, urls, names[0] if names else None)
        if name not in {f"{config.partition_base}{index}" for index in range(config.partition_amount)}:
            raise PartitiondError(
                "logs.unknown_partition",
                "there is no such partition",
                resource=name,
                hint="partitiond status lists them; for builds of releases: partitiond logs software",
            )
        found = log_reader.names_of(config.log_dir / name, names)
    except FileNotFoundError:
        found = {}
    except PermissionError as error:
        raise _forbidden(name) from error
    if names and not found and not options.follow:
        raise PartitiondError(
            "logs.unknown_log",
            f"there is no log named {' or '.join(names)}",
            resource=name,
            hint=f"partitiond logs {name} -n 0 -v lists them",
        )
    logging.getLogger(__name__).info("logs: %s", ", ".join(found) or "none")
    return found


def _readable(log: LogFile, count: int) -> list[Line]:
    try:
        return log.last(count)
    except PermissionError as error:
        raise _forbidden(log.name) from error


def _forbidden(name: str) -> PartitiondError:
    return PartitiondError(
        "logs.forbidden",
        "its logs are for root and for the partition's own user",
        resource=name,
        hint="run it with sudo, or as that user",
    )


class _Printer:
    """Lines as text, with the name of their log where there are several, or as JSON lines."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._json = options.json
        self._subject = options.partition
        self._colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._width, self._several = 0, False
        self._of: dict[str, int] = {}

    def begin(self, names: Sequence[str]) -> None:
        """Learn which logs there are."""
        self._several = len(names) > 1
        self._width = max((len(name) for name in names), default=0)
        for name in names:
            self._of.setdefault(name, _COLOURS[len(self._of) % len(_COLOURS)])

    def show(self, line: Line) -> None:
        """Write one line."""
        if self._json:
            value = {
                "schema": "partitiond/log/1",
                "partition": None if self._subject == SOFTWARE else self._subject,
                "log": line.name,
                "line": line.text,
            }
            sys.stdout.write(json.dumps(value) + "\n")
            return
        text = printable(line.text)
        if self._several:
            head = f"{printable(line.name):<{self._width}} |"
            text = f"\033[{self._of[line.name]}m{head}\033[0m {text}" if self._colours else f"{head} {text}"
        sys.stdout.write(f"{text}\n")
