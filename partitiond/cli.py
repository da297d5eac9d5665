"""The command line: each verb, human text or one JSON object, and the exit codes.

0 fine, 1 error, 2 ``plan`` has changes, 3 degraded, 64 wrong use.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitiond import cli_logs, cli_node_parser
from partitiond.cli_output import hush, log_to_stderr, print_error, write_line
from partitiond.cli_parser import DEFAULT_FILE, WRONG_USE, Misuse, named, parser
from partitiond.errors import FAMILY, PartitiondError, WrongUseError, printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from partitiond.config import Config
    from partitiond.context import Context

OK, ERROR, CHANGES, DEGRADED = 0, 1, 2, 3
_WAIT_FOR_OTHERS = 30.0
_ANSWER_SECONDS = 2.0
_BEFORE = 10
# what there is on a node that owns nothing of the machine
_UNMANAGED = ("node", "sync", "status", "show")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parsed(sys.argv[1:] if arguments is None else arguments)
    file = os.environ.get("SLAPOS_CONFIGURATION") if options.verb == "node" or os.geteuid() != 0 else None
    for name, value in (
        ("cfg", file or DEFAULT_FILE),
        ("verbose", 0),
        ("quiet", False),
        ("json", False),
    ):
        if not hasattr(options, name):
            setattr(options, name, value)
    log_to_stderr(options)
    if options.verb is None:
        parser().print_help(sys.stderr)
        if options.json:
            print_error("cli.usage", "name a verb", "partitiond", "partitiond --help")
        return WRONG_USE
    try:
        return _flushed(_VERBS[options.verb](options))
    except BrokenPipeError:
        hush()
        return OK
    except WrongUseError as error:
        _complain(options, error.code, str(error), error.resource, error.hint, error)
        return WRONG_USE
    except FAMILY as error:
        return _complain(options, error.code, str(error), error.resource, error.hint, error)
    except OSError as error:
        where = str(error.filename or "")
        return _complain(
            options, "system", error.strerror or str(error), where, "look at the resource named", error
        )
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the last resort: a mistake of ours is reported like any error
        return _complain(
            options,
            "internal",
            f"{type(error).__name__}: {error}",
            options.verb,
            "repeat with -vv and report it",
            error,
        )


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    whole = parser()
    try:
        options, others = whole.parse_known_args(arguments)
        if others and not (options.verb == "node" and options.node_verb in cli_node_parser.CONTROL):
            whole.error(f"unrecognized arguments: {' '.join(others)}")
    except Misuse as error:
        if "--json" in arguments:
            print_error("cli.usage", error.message, error.program, f"{error.program} --help")
        raise
    if others:
        options.words = [*others, *options.words]  # such as tail -f NAME
    return options


def _flushed(status: int) -> int:
    """Write what is still in the buffer now, while an error can be dealt with."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        hush()
    return status


def _complain(
    options: argparse.Namespace, code: str, message: str, resource: str, hint: str, error: BaseException
) -> int:
    if options.json:
        print_error(code, message, resource, hint)
    about = f"{resource}: " if resource else ""
    sys.stderr.write(printable(f"partitiond: [{code}] {about}{message}\n"))
    if hint:
        sys.stderr.write(printable(f"next: {hint}\n"))
    if options.verbose > 1:
        logging.getLogger(__name__).error("traceback", exc_info=error)
    return ERROR


def _print(
    options: argparse.Namespace, name: str, value: dict[str, Any], text: Callable[[dict[str, Any]], str]
) -> None:
    write = print if options.verb == "events" else write_line  # without a reader there is nothing to follow
    if options.json:
        write(json.dumps({"schema": f"partitiond/{name}/1", **value}))
    elif not options.quiet:
        write(text(value))


def _config(options: argparse.Namespace) -> Config:
    from partitiond import config  # noqa: PLC0415 - only what a verb needs is imported: start-up time counts

    overrides = cli_node_parser.overrides(options) if options.verb == "node" else {}
    load = partial(config.load, Path(options.cfg), overrides)
    try:
        found = load() if os.geteuid() == 0 else _own_config(options, load)
    except PartitiondError as error:
        blamed = cli_node_parser.blame(str(error)) if error.code == "config.value" else None
        if blamed is None:
            raise
        verb = f"partitiond node {options.node_verb}"
        raise WrongUseError("cli.usage", blamed, resource=verb, hint=f"{verb} --help") from None
    log = logging.getLogger(__name__)
    for warning in found.warnings:
        log.warning("%s", warning)
    return found


def _own_config(options: argparse.Namespace, load: Callable[[], Config]) -> Config:
    """The configuration of a node that an ordinary user may have: one that owns nothing of the machine."""
    root = PartitiondError("cli.root", "this verb needs root", resource=options.verb, hint="run it with sudo")
    try:
        found = load()
    except PartitiondError as error:
        if _is_foreign(options, error) or (
            options.verb not in _UNMANAGED and error.code != "config.unreadable"
        ):
            raise root from None
        raise
    if found.unmanaged is None:
        raise root
    if options.verb not in _UNMANAGED:
        raise PartitiondError(
            "node.unmanaged",
            "this node owns nothing of the machine: alter_user and alter_network are false",
            resource=options.verb,
            hint=f"there are {', '.join(_UNMANAGED)} and logs",
        )
    return found


def _is_foreign(options: argparse.Namespace, error: PartitiondError) -> bool:
    """Whether a configuration is that of a node which is not the user's own: it may not be read, or nobody named it."""
    if error.code != "config.unreadable" or error.resource != str(Path(options.cfg)):
        return False
    missing = isinstance(error.__cause__, FileNotFoundError) and options.cfg == DEFAULT_FILE
    return missing or isinstance(error.__cause__, PermissionError)


def _context(options: argparse.Namespace) -> Context:
    from partitiond.context import Context  # noqa: PLC0415 - as above

    return Context.of(_config(options))


def _config_in_force(options: argparse.Namespace) -> Config:
    """For verbs that show the node: by what is in force, which during and after a trial is not always the file."""
    from partitiond import rollback  # noqa: PLC0415 - as above

    return rollback.in_force(_config(options))


def _reading(options: argparse.Namespace) -> Context:
    from partitiond.context import Context  # noqa: PLC0415 - as above

    return Context.of(_config_in_force(options))


def _changing(
    options: argparse.Namespace,
    path: str,
    body: dict[str, Any],
    alone: Callable[[Context], dict[str, Any]],
    *,
    patience: float = _WAIT_FOR_OTHERS,
) -> dict[str, Any]:
    """Let the daemon do a change, or do it alone under the lock where none runs.

    Another one at work is waited for with ``patience``, in seconds.
    """
    from partitiond import control, recovery  # noqa: PLC0415 - as above

    config = _config(options)
    deadline = time.monotonic() + patience
    while True:
        answer = control.call(config.run_dir / "control.sock", "POST", path, body)
        if answer is not None:
            return answer
        try:
            # a daemon that is just starting holds the lock before it listens: ask it again every second
            with recovery.exclusive(config, named(options), wait=1.0):
                return _alone(config, alone)
        except PartitiondError as error:
            if error.code != "node.busy" or time.monotonic() > deadline:
                raise


def _alone(config: Config, alone: Callable[[Context], dict[str, Any]]) -> dict[str, Any]:
    from partitiond.context import Context  # noqa: PLC0415 - where a daemon answers, nothing of a node is needed here

    context = Context.of(config)
    try:
        return alone(context)
    finally:
        context.meters.close()


def _run(options: argparse.Namespace) -> int:
    from partitiond.daemon import Daemon  # noqa: PLC0415 - as above

    return Daemon(_config(options)).run()


def _plan(options: argparse.Namespace) -> int:
    from partitiond import present, verbs  # noqa: PLC0415 - as above

    value = verbs.plan(_context(options))
    _print(options, "plan", value, present.plan)
    return CHANGES if value["operations"] else OK


def _exit(value: dict[str, Any]) -> int:
    return DEGRADED if value["failures"] or value.get("left") or value.get("refused") else OK


def _apply(options: argparse.Namespace) -> int:
    from partitiond import present  # noqa: PLC0415 - as above

    names, force = list(options.partition), options.force

    def by_ourselves(context: Context) -> dict[str, Any]:
        from partitiond import alone  # noqa: PLC0415 - as above

        return alone.apply(context, names, force=force)

    value = _changing(options, "/1/apply", {"partitions": names, "force": force}, by_ourselves)
    _print(options, "apply", value, present.applied)
    return _exit(value)


def _try(options: argparse.Namespace) -> int:
    from partitiond import present  # noqa: PLC0415 - as above

    timeout, force = options.timeout, options.force

    def by_ourselves(context: Context) -> dict[str, Any]:
        from partitiond import alone  # noqa: PLC0415 - as above

        return alone.try_out(context, timeout, force=force)

    value = _changing(options, "/1/try", {"timeout": timeout, "force": force}, by_ourselves)
    _print(options, "try", value, present.tried)
    return _exit(value)


def _confirm(options: argparse.Namespace) -> int:
    from partitiond import control, present, verbs  # noqa: PLC0415 - as above

    config = _config(options)
    value = verbs.confirm(config)
    with contextlib.suppress(PartitiondError):  # it holds without the daemon, which finds out by itself, too
        control.call(config.run_dir / "control.sock", "POST", "/1/confirmed", {}, timeout=_ANSWER_SECONDS)
    _print(options, "confirm", value, present.confirmed)
    return OK


def _sync(options: argparse.Namespace) -> int:
    from partitiond import present  # noqa: PLC0415 - as above
    from partitiond.passes import Wish  # noqa: PLC0415 - as above

    def by_ourselves(context: Context) -> dict[str, Any]:
        from partitiond import alone  # noqa: PLC0415 - as above

        return alone.sync(context, lane, wish)

    lane, wish = options.lane, Wish(force=options.force, only=frozenset(options.partition))
    if wish.only and lane != "instances":
        raise WrongUseError("sync.partition", "only instances are had by partition", resource=lane)
    if os.geteuid() != 0:
        from partitiond import unmanaged, unmanaged_verbs  # noqa: PLC0415 - as above

        value = unmanaged_verbs.sync(unmanaged.context(_config(options)), lane, wish)
    else:
        body = {"lane": lane, **wish.as_json()}
        value = _changing(options, "/1/sync", body, by_ourselves)
    _print(options, "sync", value, present.synced)
    return _exit(value)


def _teardown(options: argparse.Namespace) -> int:
    from partitiond import present  # noqa: PLC0415 - as above

    purge = options.purge

    def by_ourselves(context: Context) -> dict[str, Any]:
        from partitiond import verbs  # noqa: PLC0415 - as above

        return verbs.tear_down(context, purge=purge)

    value = _changing(options, "/1/teardown", {"purge": purge}, by_ourselves)
    _print(options, "teardown", value, present.applied)
    return _exit(value)


def _status(options: argparse.Namespace) -> int:
    from partitiond import control, present  # noqa: PLC0415 - as above

    if os.geteuid() != 0:
        _print(options, "status", _unmanaged_status(options), present.status)
        return OK
    config = _config_in_force(options)
    # the daemon knows when the master last answered
    value = control.call(config.run_dir / "control.sock", "GET", "/1/status") or _status_without(config)
    _print(options, "status", value, present.status)
    return OK


def _status_without(config: Config) -> dict[str, Any]:
    """What can be said of a node of which no daemon runs."""
    from partitiond import status  # noqa: PLC0415 - as above
    from partitiond.context import Context  # noqa: PLC0415 - as above

    return status.node(Context.of(config))


def _show(options: argparse.Namespace) -> int:
    from partitiond import present, status  # noqa: PLC0415 - as above

    if os.geteuid() != 0:
        own = _unmanaged_status(options)["partitions"]
        value = next((item for item in own if item["id"] == options.partition), None)
    else:
        value = status.partition(_reading(options), options.partition)
    if value is None:
        raise PartitiondError(
            "show.unknown_partition",
            "there is no such partition",
            resource=options.partition,
            hint="partitiond status lists them",
        )
    _print(options, "show", value, present.show)
    return OK


def _unmanaged_status(options: argparse.Namespace) -> dict[str, Any]:
    from partitiond import unmanaged, unmanaged_verbs  # noqa: PLC0415 - as above

    return unmanaged_verbs.node_status(unmanaged.context(_config(options)))


def _node(options: argparse.Namespace) -> int:
    from partitiond import cli_node, present  # noqa: PLC0415 - as above

    texts = {"plan": present.plan, "apply": present.applied, "sync": present.synced}
    try:
        return cli_node.run(
            options,
            lambda: _config(options),
            lambda path, body, alone: _changing(options, path, body, alone, patience=_ANSWER_SECONDS),
            lambda name, value: _print(options, name, value, texts[name]),
        )
    except FAMILY as error:
        _complain(options, error.code, str(error), error.resource, error.hint, error)
        return cli_node.exit_status(options, error)


def _usage(options: argparse.Namespace) -> int:
    from accounting.ledger import Ledger  # noqa: PLC0415 - as above
    from partitiond import usage_query, usage_text  # noqa: PLC0415 - as above
    from partitiond.metering import ledger_path  # noqa: PLC0415 - as above

    if options.csv and options.json:
        raise WrongUseError("cli.usage", "--csv and --json exclude each other", hint="give one of them")
    query = usage_query.parse({name: getattr(options, name) for name in usage_query.WORDS}, time.time())
    found = _config(options)
    with Ledger.open_readonly(ledger_path(found.state_dir)) as ledger:
        value = usage_query.answer(ledger, query)
    known = [f"{found.partition_base}{index}" for index in range(found.partition_amount)]
    if query.partition and query.partition not in known and not usage_query.mentions(value):
        raise PartitiondError(
            "usage.unknown_partition",
            "there is no such partition, and never was",
            resource=query.partition,
            hint="partitiond status lists them",
        )
    name = "usage-periods" if query.period else "usage"
    _print(options, name, value, usage_text.table if options.csv else usage_text.usage)
    return OK


def _events(options: argparse.Namespace) -> int:
    from collections import deque  # noqa: PLC0415 - as above

    from partitiond import event_reader, present, usage_query  # noqa: PLC0415

    start = None if options.start is None else usage_query.time(options.start, time.time())
    found, name = _config(options), options.partition

    def wanted(event: dict[str, Any]) -> bool:
        return event_reader.concerns(event, name) and event_reader.at(event) >= (start or 0.0)

    with contextlib.closing(event_reader.Follower(found.log_dir)) as follower:
        # as tail(1) does, whoever follows is shown the last few first
        most = _BEFORE if options.follow and start is None else None
        past = deque(filter(wanted, follower.past()), maxlen=most)
        known = (f"{found.partition_base}{index}" for index in range(found.partition_amount))
        if name is not None and not past and name not in known:
            raise PartitiondError(
                "events.unknown_partition",
                "there is no such partition, and nothing is recorded of one",
                resource=name,
                hint="partitiond status lists them",
            )
        for event in past:
            _print(options, "event", event, present.event)
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):  # which is how following ends
            for event in filter(wanted, event_reader.follow(follower)) if options.follow else ():
                _print(options, "event", event, present.event)
                sys.stdout.flush()
    return OK


def _tunnel(options: argparse.Namespace) -> int:
    from partitiond import present, tunnel_status  # noqa: PLC0415 - as above

    if options.tunnel_verb is None:
        raise WrongUseError("cli.usage", "name a verb", resource="partitiond tunnel", hint="list, check")
    if options.tunnel_verb == "check":
        return _tunnel_check(options)
    _print(options, "tunnel-list", tunnel_status.listing(_reading(options)), present.tunnels)
    return OK


def _tunnel_check(options: argparse.Namespace) -> int:
    from partitiond import present, tunnel_check  # noqa: PLC0415 - as above

    value = tunnel_check.run(_reading(options), options.name)
    _print(options, "tunnel-check", value, present.tunnel_checks)
    return OK if tunnel_check.healthy(value) else DEGRADED


def _report(options: argparse.Namespace) -> int:
    from partitiond import present, report_verbs  # noqa: PLC0415 - as above

    name = options.report_verb
    if name is None:
        hint = "list, show, resend, drop"
        raise WrongUseError("cli.usage", "name a verb", resource="partitiond report", hint=hint)
    if name == "list":
        _print(
            options,
            "report-list",
            report_verbs.listing(_config(options), everything=options.all),
            present.reports,
        )
    elif name == "show":
        value = report_verbs.show(_config(options), options.reference)
        _print(options, "report-show", value, lambda found: str(found["content"]))
    else:
        references = list(options.references)
        body = {"action": name, "references": references}
        value = _changing(
            options, "/1/report", body, lambda context: report_verbs.change(context, name, references)
        )
        _print(options, "report-change", value, present.reports_changed)
    return OK


def _mesh(options: argparse.Namespace) -> int:
    from partitiond import cli_mesh  # noqa: PLC0415 - as above

    def by_ourselves(context: Context, body: dict[str, Any]) -> dict[str, Any]:
        from partitiond import alone  # noqa: PLC0415 - as above

        return alone.change_mesh(context, body)

    return cli_mesh.run(
        options,
        lambda: _reading(options),
        lambda body: _changing(options, "/1/mesh", body, lambda context: by_ourselves(context, body)),
        lambda name, value, text: _print(options, name, value, text),
    )


def _register(options: argparse.Namespace) -> int:
    from partitiond import cli_register  # noqa: PLC0415 - as above

    return cli_register.run(options, lambda name, value, text: _print(options, name, value, text))


def _demo(options: argparse.Namespace) -> int:
    from partitiond.demo import run  # noqa: PLC0415 - as above

    if os.geteuid() != 0:
        raise PartitiondError("cli.root", "namespaces need root", resource="demo", hint="run it with sudo")
    if options.mesh and options.nodes == 1:
        raise WrongUseError(
            "cli.mesh_of_one",
            "a mesh of one node is none",
            resource="demo --mesh",
            hint="demo --mesh --nodes 3",
        )
    play = run.inside if options.inside else run.outside
    return play(keep=options.keep, nodes=options.nodes, mesh=options.mesh)


_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "plan": _plan,
    "apply": _apply,
    "try": _try,
    "confirm": _confirm,
    "sync": _sync,
    "status": _status,
    "show": _show,
    "usage": _usage,
    "events": _events,
    "logs": cli_logs.run,
    "tunnel": _tunnel,
    "report": _report,
    "mesh": _mesh,
    "node": _node,
    "register": _register,
    "teardown": _teardown,
    "demo": _demo,
}
