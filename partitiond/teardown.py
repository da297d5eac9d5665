"""Teardown: everything that partitiond made goes, in the reverse order; data only on request."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from netplan import apply as netplan_apply
from netplan import observe as netplan_observe
from netplan import plan as netplan_plan
from netplan.model import DesiredNetwork
from partitiond import (
    block_devices,
    build_keeper,
    certificates,
    converge,
    device_access,
    execute,
    files,
    last_good,
    lock,
    mesh,
    port_reservation,
    privacy,
    storage,
    textfile,
    users,
)
from partitiond.converge import refuse_other_node
from partitiond.errors import FAMILY, sentence
from partitiond.node_plan import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.context import Context

logger = logging.getLogger(__name__)


def run(context: Context, *, purge: bool) -> Outcome:
    """Take everything down. What cannot be removed is in the outcome's failures; the rest is done all the same."""
    outcome = Outcome()
    refuse_other_node(context, users.observe())
    with context.applying:
        steps: list[tuple[str, Callable[[], None]]] = [
            ("software builds", lambda: _builds(context.config)),
            ("supervisord", lambda: _supervisord(context)),
            ("processes", _processes),
            ("namespaces", lambda: privacy.remove_all(context.config)),
            ("block devices", lambda: _devices(context, outcome)),
            *(() if purge else (("usage", lambda: _settle(context)),)),
            ("metrics", lambda: textfile.remove(textfile.memory_path(context.config.state_dir))),
            ("network", lambda: _network(outcome)),
            ("reserved ports", lambda: port_reservation.remove(context.config)),
            *((("storage", lambda: storage.purge(context.config)),) if purge else ()),
            *((("certificates", lambda: certificates.purge(context.config)),) if purge else ()),
            ("data", lambda: _purge(context.config)) if purge else ("state", lambda: _state(context)),
            ("mesh", lambda: _mesh(context.config)),
            ("users", lambda: _users(context.config)),
        ]
        if purge:
            # with the lock that is held right now, so last of all: until then nobody else can begin
            steps.append(("state", lambda: _purge_state(context.config.state_dir)))
        for name, step in steps:
            try:
                step()
                outcome.done += 1
            except (*FAMILY, OSError) as error:
                outcome.failures.append((name, error))
                logger.warning("%s: %s", name, sentence(error))
    outcome.stands = not outcome.failures
    return outcome


def _supervisord(context: Context) -> None:
    context.supervisor.shutdown()
    context.supervisor.configuration.unlink(missing_ok=True)
    for name in context.supervisor.group_names():
        context.supervisor.remove_group(name)


def _builds(config: Config) -> None:
    build_keeper.end(config)


def _processes() -> None:
    for user in users.observe().users.values():
        if user.ours:
            execute.end_processes_of(user.uid, user.gid)


def _devices(context: Context, outcome: Outcome) -> None:
    outcome.failures += device_access.withdraw_all(context.config, users.observe())


def _settle(context: Context) -> None:
    """Book what was used to the end: the counters go, the ledger stays."""
    if context.config.state_dir.is_dir():
        context.meters.record(context, context.node or converge.observe(context).node)


def _network(outcome: Outcome) -> None:
    nothing = DesiredNetwork()
    for operation, error in netplan_apply.apply(netplan_plan.plan(nothing, netplan_observe.observe(nothing))):
        outcome.failures.append((operation.id, error))
        logger.warning("%s: %s", operation.id, sentence(error))


def _mesh(config: Config) -> None:
    """What tincd reads. The operator's directory is configuration, and stays with ``purge``, too.

    Its key and peers are what the node's X509 pair is: by them a node that is made anew is the same to all others.
    """
    directory = mesh.directory_of(config)
    if _is_own(directory):
        with files.directory(directory) as descriptor:
            files.empty(descriptor)
        directory.rmdir()


def _users(config: Config) -> None:
    """Remove the users, but those that still have a device: the next one with their number would have it."""
    database = users.observe()
    kept = {uid for _, uid in block_devices.observe(config, (), database).held}
    users.apply(
        operation
        for operation in users.plan((), database)
        if database.users[operation.id.partition("/")[2]].uid not in kept
    )


def _state(context: Context) -> None:
    """Make every instance due again, so that a node set up anew configures and starts it."""
    for partition in context.store.partitions():
        context.store.make_due(partition)
    last_good.forget(context.config.state_dir)


def _purge(config: Config) -> None:
    for path in (config.instance_root, config.software_root, config.log_dir, config.run_dir):
        if _is_own(path):
            with files.directory(path) as descriptor:
                files.empty(descriptor)
            _remove_empty(path)


def _purge_state(state_dir: Path) -> None:
    if _is_own(state_dir):
        with files.directory(state_dir) as descriptor:
            files.empty(descriptor, keep=frozenset((lock.NAME,)))
        (state_dir / lock.NAME).unlink(missing_ok=True)
        _remove_empty(state_dir, errno.ENOTEMPTY)  # who waited for the lock may have begun


def _is_own(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove_empty(path: Path, *fine: int) -> None:
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.EBUSY, *fine):  # a mount point stays, empty
            raise
