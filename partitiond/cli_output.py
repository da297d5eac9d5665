"""Standard output and standard error of the command line: what of tenants must not steer a terminal, and a reader that goes."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TYPE_CHECKING

from partitiond.errors import printable

if TYPE_CHECKING:
    import argparse


def hush() -> None:
    """Whoever read our output has seen enough; what is still in the buffer must not be tried again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_line(text: str) -> None:
    """Write a line of output; who does not want it any more changes nothing of the verb's work and status."""
    try:
        print(text, flush=True)  # noqa: T201 - the output of the program
    except BrokenPipeError:
        hush()


def print_error(code: str, message: str, resource: str, hint: str) -> None:
    """Print why a verb could not do its work, as an object."""
    value = {"code": code, "message": message, "resource": resource, "hint": hint}
    write_line(json.dumps({"schema": "partitiond/error/1", "error": value}))


class _PlainFormatter(logging.Formatter):
    """Lets nothing through that would steer a terminal: names and messages of tenants end up in the log."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_stderr(options: argparse.Namespace) -> None:
    """Let the log go to standard error, as much of it as was asked for."""
    running = options.verb in ("run", "demo", "node")
    level = logging.INFO if running or options.verbose else logging.WARNING
    if options.quiet:
        level = logging.ERROR
    if options.verbose > 1:
        level = logging.DEBUG
    form = "%(asctime)s %(levelname)s %(message)s" if running else "%(levelname)s: %(message)s"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter(form, "%Y-%m-%dT%H:%M:%S%z"))
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("urllib3").setLevel(logging.WARNING)
