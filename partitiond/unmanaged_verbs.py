"""The verbs on a node that owns nothing of the machine: ``node``, ``sync``, ``status`` and ``show``, as whoever runs it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from partitiond import (
    alone,
    cli_node_parser,
    lock,
    messages,
    node_pair,
    promises,
    recovery,
    remembered,
    services,
    software_status,
    status,
    unmanaged,
    verbs,
)
from partitiond.errors import PartitiondError, WrongUseError, printable, sentence
from partitiond.passes import Wish
from partitiond.unmanaged_supervisor import UnmanagedSupervisor
from slap_client.errors import SlapError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from partitiond.config import Config
    from partitiond.context import Context

logger = logging.getLogger(__name__)

SYNCED = ("capacity", "software", "instances", "report")


def run(
    options: argparse.Namespace,
    config: Config,
    show: Callable[[str, dict[str, Any]], None],
    take_pass: Callable[..., int],
) -> int:
    """Run a verb of ``node``; ``take_pass`` is what the passes have in common with those of other nodes."""
    name = options.node_verb
    if name == "collect":
        raise WrongUseError(
            "node.elsewhere",
            "is not among the verbs of a node without meters and daemon",
            resource=name,
            hint="partitiond node --help",
        )
    context = unmanaged.context(config)
    if name == "promise":
        return _promise(options, context, show)
    if name == "supervisord":
        return _supervisord(context, foreground=options.nodaemon)
    if name == "format":
        if options.dry_run:
            changes = unmanaged.plan(context)
            for one in changes:
                logger.info("%s: %s", one.path, one.reason)
            if options.json:
                show("plan", {"operations": [_operation(one) for one in changes], "refused": []})
            return 0
        value = sync(context, "capacity", Wish(), told=not options.local)
        show("sync", value)
        return 0

    return take_pass(options, config, lambda lane, wish: sync(context, lane, wish), show)


def sync(context: Context, lane: str, wish: Wish, *, told: bool = True) -> dict[str, Any]:
    """One pass of a lane, with the node made before it; ``told``: the master is told of its capacity.

    Raises PartitiondError ``node.busy`` when the same goes on already, SlapError.
    """
    if lane not in SYNCED:
        raise WrongUseError(
            "node.unmanaged",
            "nothing is metered on this node",
            resource=lane,
            hint=f"one of {', '.join(SYNCED)}",
        )
    with _turn(context.config, lane):
        unmanaged.apply(context)
        if lane == "capacity" and not told:
            return {"lane": lane, "done": [], "failures": []}
        if lane in ("instances", "report"):
            _have_supervisor(context)
        try:
            value = verbs.sync(context, lane, wish)
        except SlapError as error:
            if lane == "instances" and error.retryable:
                _start_all(context)
            raise
        if lane == "instances":  # its supervisord has a watchdog
            alone.add(value, alone.in_between(context, wish.only, watchdog=False))
        return value


@contextlib.contextmanager
def _turn(config: Config, lane: str) -> Iterator[None]:
    """One pass of a kind at a time; a build of hours holds up nothing else, the others wait for each other."""
    state = config.state_dir
    state.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock.exclusive(state / f"pass-{lane}", f"node {lane}"):
        if lane == "software":
            yield
            return
        with recovery.exclusive(config, f"node {lane}", wait=float("inf")):
            yield


def _have_supervisor(context: Context) -> None:
    own, supervisor = context.config.unmanaged, context.supervisor
    if own is not None and own.starts_supervisord:
        start = services.Start(context)
        start.begin()
        start.wait()
    elif isinstance(supervisor, UnmanagedSupervisor):
        supervisor.need()


def _start_all(context: Context) -> None:
    """Start what is to run: the master's absence must not keep it from running."""
    if context.config.grid.force_stop:
        return
    for name in sorted(context.store.to_run()):
        if context.supervisor.has_group(name):
            try:
                context.supervisor.start_group(name)
            except PartitiondError as error:
                logger.warning("%s: %s", name, sentence(error))


def _supervisord(context: Context, *, foreground: bool) -> int:
    unmanaged.apply(context)
    if foreground:
        file = str(context.supervisor.configuration)
        words = [sys.executable, "-I", "-m", "supervisor.supervisord", "--nodaemon", "-c", file]
        sys.stdout.flush()
        os.execv(words[0], words)  # noqa: S606 - our own interpreter
    start = services.Start(context)
    start.begin()
    start.wait()
    return 0


def _operation(change: unmanaged.Change) -> dict[str, str | None]:
    """A change as ``plan`` shows it."""
    kind = "directory" if change.content is None else "file"
    return {
        "id": f"{kind}:{change.path}",
        "resource": str(change.path),
        "action": "create" if change.reason == "missing" else "change",
        "partition": None,
        "before": None,
        "after": kind,
        "reason": change.reason,
    }


def _tested(context: Context, only: frozenset[str]) -> dict[str, promises.PromiseOutcome]:
    """Test the promises of the instances that are to run, or ``only`` of these."""
    node = context.node_in_force or unmanaged.node(context.config)
    states, damaged = context.store.readable()
    for name, error in damaged.items():
        logger.warning("%s: %s", name, sentence(error))
    tested = {
        item.id: item for item in node.partitions if item.id in states and (not only or item.id in only)
    }
    releases = {
        name: states[name].software_release or "" for name in tested if states[name].wanted == "started"
    }
    return promises.check_all(context, releases, [tested[name] for name in releases])


def _promise(
    options: argparse.Namespace, context: Context, show: Callable[[str, dict[str, Any]], None]
) -> int:
    """Test the promises of the instances that run; 2 when one fails, as slapgrid has it."""
    only = cli_node_parser.named(options)
    verbs.refuse_unknown(context.config, only)
    with _turn(context.config, "instances"):
        found = _tested(context, only)
    for name, outcome in found.items():
        for promise, said in outcome.failed.items():
            logger.warning("%s: promise %s fails: %s", name, promise, printable(said))
    failed = [
        (name, PartitiondError("instance.promise", outcome.message, resource=name, hint="mend what it says"))
        for name, outcome in found.items()
        if outcome.failed
    ]
    if options.json:
        failures = verbs.failures_as_json(failed)
        show(
            "sync", {"lane": "promises", "done": [f"{name}: tested" for name in found], "failures": failures}
        )
    return 2 if failed else 0


def node_status(context: Context) -> dict[str, Any]:
    """The contract's ``status`` object of such a node."""
    config = context.config
    states = status.states_before(context)
    processes = context.supervisor.processes()
    node = context.node_in_force or unmanaged.node(config)
    return {
        "node": {
            "computer_id": config.computer_id,
            "master": {"url": config.master_url, **context.master.as_json()},
            "interface": "",
            "bridge": None,
            "source_selection": "kernel",
            "trial": None,
            "bridge_ports": [],
            "open_cases": [
                "alter_user and alter_network are false: nothing keeps partitions apart or is metered",
                *remembered.open_cases(context),
                *node_pair.open_cases(context.config),
                *messages.open_cases(context.config.state_dir),
            ],
            "drift": [],
        },
        "partitions": [
            status.partition_object(context, item, states.get(item.id), processes) for item in node.partitions
        ],
        "software": software_status.releases(context),
    }
