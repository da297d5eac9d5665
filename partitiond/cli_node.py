"""``partitiond node``: the verbs of slapos.core's ``slapos node``, with its exit codes.

They do what ``apply`` and ``sync`` do: handed to the daemon where one runs, else here and now. Beside these they work on a
node that owns nothing of the machine (:mod:`partitiond.unmanaged`), as its user.

Exit codes as slapos.core 1.26 has them: 0 fine, 1 something failed, 2 a promise failed, or (``format``) the master could not be
told, 3 (``instance``) the master does not answer, 5 needs root, 10 another one is at work, 64 wrong use.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from partitiond import cli_node_parser, control, unmanaged_verbs
from partitiond.cli_node_parser import CONTROL, ELSEWHERE
from partitiond.errors import FAMILY, PartitiondError, WrongUseError, printable, sentence
from partitiond.log_echo import LogEcho
from partitiond.passes import Wish

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from partitiond.config import Config
    from partitiond.context import Context

    Changing = Callable[[str, dict[str, Any], Callable[[Context], dict[str, Any]]], dict[str, Any]]

logger = logging.getLogger(__name__)

OK, FAILED, PROMISE_FAILED, NOT_TOLD, OFFLINE, NEEDS_ROOT, BUSY, WRONG_USE = 0, 1, 2, 2, 3, 5, 10, 64
_HOUR = 3600
_SOON = 2.0
_LANES = {"software": "software", "instance": "instances", "report": "report"}
# the words by which scripts recognise the passes in logs of slapos.core
_BEGIN = {
    "software": "Processing software releases...",
    "instance": "Processing computer partitions...",
    "report": "Aggregating and sending usage reports...",
}
_FAILED_TOO = Wish(again=True)
_AWAY = ("slap.unreachable", "slap.timeout", "slap.unavailable")


def exit_status(options: argparse.Namespace, error: Exception) -> int:
    """The exit status that stands for an error."""
    code = str(getattr(error, "code", ""))
    if isinstance(error, WrongUseError):
        return WRONG_USE
    by_code = {"node.busy": BUSY, "cli.root": NEEDS_ROOT}
    if options.node_verb == "format" and code.startswith("slap."):
        return NOT_TOLD
    if options.node_verb == "instance" and code in _AWAY:
        return OFFLINE
    return by_code.get(code, FAILED)


def run(
    options: argparse.Namespace,
    config: Callable[[], Config],
    changing: Changing,
    show: Callable[[str, dict[str, Any]], None],
) -> int:
    """Run a verb; ``changing`` hands a change to the daemon or does it, ``show`` prints an object by its schema's name.

    Raises a family error.
    """
    name = options.node_verb
    if name is None:
        raise WrongUseError("node.verb", "name a verb", hint="partitiond node --help lists them")
    if name in ELSEWHERE:
        raise WrongUseError(
            "node.elsewhere", "is not among the verbs here", resource=name, hint=ELSEWHERE[name]
        )
    found = config()
    _log_to(options.log_file)
    for option, reason in cli_node_parser.idle(options).items():
        logger.warning("%s is not acted on: %s", option, reason)
    if options.json and name in ("status", "supervisord", *CONTROL):
        hint = "partitiond --json status and show list processes"
        raise WrongUseError("node.text", "has words of supervisord's, and no JSON", resource=name, hint=hint)
    if name == "status" or name in CONTROL:
        return _control(options, found)
    if found.unmanaged is not None:
        return unmanaged_verbs.run(options, found, show, _pass)
    if name == "supervisord":
        hint = "partitiond apply starts it, and the daemon sees that it runs"
        raise WrongUseError("node.elsewhere", "is not started by itself", resource=name, hint=hint)
    if name == "promise":
        hint = "partitiond show PARTITION says what fails; the daemon checks them, or node instance where none runs"
        raise WrongUseError("node.elsewhere", "is not among the verbs here", resource=name, hint=hint)
    return _managed(options, found, changing, show)


def _log_to(path: str | None) -> None:
    if path is None:
        return
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.getLogger().handlers[0].formatter)
    logging.getLogger().addHandler(handler)


def _control(options: argparse.Namespace, found: Config) -> int:
    """Have supervisord's own program say it: its lines and its exit codes are what scripts know."""
    from supervisor import supervisorctl  # noqa: PLC0415 - only what a verb needs is imported: start-up time counts

    file = found.instance_root / "etc" / "supervisord.conf"
    if not file.exists():
        raise PartitiondError(
            "supervisor.down",
            "there is no supervisord yet",
            resource=str(file),
            hint="run partitiond node format" + (", or partitiond apply" if found.unmanaged is None else ""),
        )
    words = [] if options.node_verb == "supervisorctl" else [options.node_verb]
    try:
        supervisorctl.main(args=["-c", str(file), *words, *options.words])
    except SystemExit as end:
        return int(end.code or 0)
    return OK


def _managed(
    options: argparse.Namespace,
    found: Config,
    changing: Changing,
    show: Callable[[str, dict[str, Any]], None],
) -> int:
    name = options.node_verb
    replaced = cli_node_parser.overrides(options)
    if replaced and control.call(found.run_dir / "control.sock", "GET", "/1/node", timeout=_SOON) is not None:
        names = ", ".join(sorted(key for _, key in replaced))
        logger.warning("not acted on: %s: the daemon goes by its configuration", names)

    def sync(lane: str, wish: Wish = _FAILED_TOO, *, wait: bool = True) -> dict[str, Any]:
        from partitiond import alone  # noqa: PLC0415 - as above

        body = {"lane": lane, "wait": wait, **wish.as_json()}
        return changing("/1/sync", body, lambda context: alone.sync(context, lane, wish))

    if name == "collect":
        value = sync("usage")
        show("sync", value)
        return FAILED if value["failures"] else OK
    if name == "format":
        return _format(options, found, changing, sync, show)
    # a crontab asks each minute, also while a build of hours goes on
    return _pass(options, found, partial(sync, wait=False), show)


def _format(
    options: argparse.Namespace,
    found: Config,
    changing: Changing,
    sync: Callable[[str], dict[str, Any]],
    show: Callable[[str, dict[str, Any]], None],
) -> int:
    from partitiond import alone, verbs  # noqa: PLC0415 - as above
    from partitiond.context import Context  # noqa: PLC0415 - as above

    if options.dry_run:
        show("plan", verbs.plan(Context.of(found)))
        return OK
    wait(options, _HOUR)
    value = changing(
        "/1/apply", {"partitions": [], "force": False}, lambda context: alone.apply(context, [], force=False)
    )
    status = FAILED if value["failures"] or value["left"] else OK
    if status == OK and not options.local:
        # made it is all the same: that is shown, in one object with what came of the telling
        untold = _untold(sync)
        if untold is not None:
            value = {**value, "failures": verbs.failures_as_json([untold])}
            status = exit_status(options, untold[1])
    show("apply", value)
    return status


def _untold(sync: Callable[[str], dict[str, Any]]) -> tuple[str, Exception] | None:
    """Tell the master what there is; what could not be told it, and why."""
    try:
        told = sync("capacity")
    except FAMILY as error:
        logger.error("%s (%s)", sentence(error), printable(error.hint))  # noqa: TRY400 - told in words
        return error.resource, error
    logger.info("%s", "; ".join(told["done"]))
    return None


def wait(options: argparse.Namespace, longest: int) -> None:
    """Begin at some time within so many seconds: thousands of nodes have the same crontab."""
    if longest <= 0 or options.now:
        return
    seconds = random.uniform(0, longest)  # noqa: S311 - jitter
    logger.info("beginning in %d s; --now begins at once", math.ceil(seconds))
    time.sleep(seconds)


def _pass(
    options: argparse.Namespace,
    found: Config,
    sync: Callable[..., dict[str, Any]],
    show: Callable[[str, dict[str, Any]], None],
) -> int:
    """One pass of a lane, with what builds say shown meanwhile."""
    name = options.node_verb
    wait(options, options.maximal_delay)
    logger.info("%s", _BEGIN[name])
    only = cli_node_parser.named(options) if name != "report" else frozenset()
    # as slapgrid has it, a release that is named is built even if it is there
    force = name != "report" and (options.force or (name == "software" and bool(only)))
    collect = name == "software" and options.garbage_collect
    patterns = {"software": ("software/*.log",), "instance": ("*/buildout.log",)}.get(name, ())
    silent = options.json or options.quiet
    echo = LogEcho(found.log_dir, *patterns) if patterns and not silent else contextlib.nullcontext()
    with echo:
        value = sync(_LANES[name], Wish(force=force, only=only, again=True, collect=collect))
    show("sync", value)
    codes = {one["code"] for one in value["failures"]}
    # as in slapgrid, any other failure outweighs those of promises
    return OK if not codes else PROMISE_FAILED if codes == {"instance.promise"} else FAILED
