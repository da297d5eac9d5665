"""What may stand on the command line: verbs, and their options before or after them."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, NoReturn

from partitiond import __version__, cli_logs, cli_node_parser, cli_register
from partitiond.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    Add = Callable[[str, str], argparse.ArgumentParser]

WRONG_USE = 64
DEFAULT_FILE = "/etc/opt/slapos/slapos.cfg"
_FORCE = "take busy partitions away, too: what runs in them is ended, their data stays"
_LONGEST_TRIAL = 86400.0
_TIME = "ISO 8601 time, date or month, today, yesterday"


class Misuse(SystemExit):
    """The arguments are wrong; standard error says so already. ``program`` is the verb's."""

    def __init__(self, program: str, message: str) -> None:
        super().__init__(WRONG_USE)
        self.program, self.message = program, message


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        sys.stderr.write(printable(f"{self.prog}: {message}\nnext: {self.prog} --help\n"))
        raise Misuse(self.prog, message)


def _common() -> _Parser:
    """Options that stand before or after the verb; absent ones leave no trace, so that neither place hides the other."""
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("-c", "--cfg", metavar="FILE", help=f"configuration [{DEFAULT_FILE}]")
    common.add_argument("-v", "--verbose", action="count", help="say more; twice: with tracebacks")
    common.add_argument("-q", "--quiet", action="store_true", help="say only what went wrong")
    common.add_argument("--json", action="store_true", help="print one JSON object")
    return common


def _timeout(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= _LONGEST_TRIAL:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 1 to {_LONGEST_TRIAL:.0f}")
    return seconds


def _nodes(text: str) -> int:
    if not re.fullmatch("[1-9]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of nodes from 1 to 9")
    return int(text)


def _add_usage(usage: argparse.ArgumentParser) -> None:
    usage.add_argument("--from", metavar="T", help=f"{_TIME}; without it: since the beginning")
    usage.add_argument("--to", metavar="T", help="likewise; without it: until now")
    usage.add_argument("--partition", metavar="ID", help="only this partition")
    usage.add_argument("--period", metavar="day|week|month", help="by calendar periods, UTC, from Monday on")
    usage.add_argument(
        "--last", metavar="N", help="so many periods, the present one included [7 days, 5 weeks, 12 months]"
    )
    usage.add_argument("--csv", action="store_true", help="comma-separated values")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    common = _common()
    top = _Parser(prog="partitiond", description="The node daemon of SlapOS.", parents=[common])
    top.add_argument("--version", action="version", version=f"partitiond {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, parents=[common])

    verb("run", "the daemon, in the foreground")
    _add_changing(verb)
    _add_reading(verb)
    _add_tunnel(verb("tunnel", "the encrypted tunnels"), common)
    cli_register.add_options(verb("register", "get the node's X509 pair from the master"))
    _add_report(verb("report", "the usage documents for the master"), common)
    cli_node_parser.add(verb("node", "the verbs of slapos node, with their options"), common, _Parser)
    teardown = verb("teardown", "remove all that partitiond made from the system")
    teardown.add_argument("--purge", action="store_true", help="data, too")
    demo = verb("demo", "the whole way through, in private namespaces")
    demo.add_argument("--keep", action="store_true", help="leave it up until Enter is pressed")
    demo.add_argument(
        "--nodes",
        type=_nodes,
        default=1,
        metavar="N",
        help="services across 2 to 9 nodes [1: one node alone]",
    )
    demo.add_argument("--mesh", action="store_true", help="nodes without IPv6, over tinc")
    demo.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return top


def _add_changing(verb: Add) -> None:
    verb("plan", "show what apply would do, and why; touches nothing")
    apply = verb("apply", "converge the node once, then look again")
    apply.add_argument("--partition", action="append", default=[], metavar="ID", help="only this partition")
    apply.add_argument("--force", action="store_true", help=_FORCE)
    attempt = verb("try", "apply, and take it back by itself unless it is confirmed in time")
    attempt.add_argument(
        "--timeout", type=_timeout, default=120.0, metavar="S", help="seconds to confirm it [120]"
    )
    attempt.add_argument("--force", action="store_true", help=_FORCE)
    verb("confirm", "keep what is on trial")
    sync = verb("sync", "one pass of a lane")
    sync.add_argument("lane", choices=("capacity", "software", "instances", "usage", "report"))
    sync.add_argument("--force", action="store_true", help="also what is not due")


def _add_reading(verb: Add) -> None:
    verb("status", "the node and its partitions")
    show = verb("show", "one partition")
    show.add_argument("partition", metavar="PARTITION")
    _add_usage(verb("usage", "metered usage per partition and address"))
    cli_logs.add(verb("logs", "what a partition's programs and buildouts say, and builds of releases"))
    events = verb("events", "what happened, as text or JSON lines")
    events.add_argument("-f", "--follow", action="store_true", help="go on with what happens from now on")
    events.add_argument("--partition", metavar="ID", help="only what concerns this partition")
    events.add_argument("--from", dest="start", metavar="T", help=f"{_TIME}; without it: since the beginning")


def _add_tunnel(tunnel: argparse.ArgumentParser, common: _Parser) -> None:
    verbs = tunnel.add_subparsers(dest="tunnel_verb", metavar="VERB", parser_class=_Parser)
    verbs.add_parser("list", help="tunnels with state, peers, expiry, sessions", parents=[common])
    check = verbs.add_parser("check", help="try them with real TLS connections", parents=[common])
    check.add_argument("name", metavar="NAME", nargs="?", help="a tunnel, or a partition; without it: all")


def _add_report(report: argparse.ArgumentParser, common: _Parser) -> None:
    verbs = report.add_subparsers(dest="report_verb", metavar="VERB", parser_class=_Parser)
    listed = verbs.add_parser("list", help="where each is", parents=[common])
    listed.add_argument("--all", action="store_true", help="also all that the master has taken")
    shown = verbs.add_parser("show", help="one, as it is sent", parents=[common])
    shown.add_argument("reference", metavar="REFERENCE")
    for name, text in (
        ("resend", "send again what is held or was refused: the master may then have it twice"),
        ("drop", "do not send it (again); it is kept"),
    ):
        changing = verbs.add_parser(name, help=text, description=text, parents=[common])
        changing.add_argument("references", metavar="REFERENCE", nargs="+")


def named(options: argparse.Namespace) -> str:
    """What goes on, for whoever has to wait for it: the verb with its lane."""
    words = (options.verb, *(getattr(options, name, None) for name in ("node_verb", "lane")))
    return " ".join(filter(None, words))
