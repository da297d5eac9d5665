"""supervisord and the processes of instances as resources of the plan: running where they should, gone where not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitiond import files, privacy
from partitiond.errors import PartitiondError, sentence
from partitiond.operation import Operation
from partitiond.supervision import MESH, running_groups
from partitiond.tunnels import group_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from partitiond.context import Context
    from partitiond.node import Node, Partition
    from partitiond.operation import Action
    from partitiond.supervision import Process, Supervisor

_STRANGE = "its configuration is not root's alone"


logger = logging.getLogger(__name__)

_A_WHILE = 2.0  # for all that goes with the node's lock
_OUTDATED = "it runs on as it was started before supervisord was, and its configuration is another since"


@dataclass(frozen=True, slots=True)
class ServiceOperation(Operation):
    """A change of supervisord itself (``group`` None) or of one of its groups; ``owner`` is whose programs are to
    start, now or (where its group is removed) by the next pass.
    """

    group: str | None
    owner: Partition | None = None


def plan(
    context: Context,
    node: Node,
    processes: tuple[Process, ...],
    set_up: frozenset[str],
    strange: frozenset[str] = frozenset(),
    homeless: frozenset[str] = frozenset(),
) -> tuple[ServiceOperation, ...]:
    """Compare supervisord with what the last good configuration of each instance says; ``set_up`` are the groups on disk,
    ``strange`` those beside them whose files may be somebody else's, ``homeless`` the partitions whose namespaces are missing.
    """
    operations = [*_of_supervisord(context.supervisor, processes)]
    # with force_stop the next pass over instances stops what still runs
    to_run = frozenset() if context.config.grid.force_stop else context.store.to_run()
    by_group: dict[str, list[Process]] = {}
    for process in processes:
        by_group.setdefault(process.group, []).append(process)
    for partition in node.partitions:
        if partition.id not in set_up or partition.id not in to_run:
            continue
        known = by_group.get(partition.id, [])
        reason = _reason_to_start(context, partition, known, homeless=partition.id in homeless)
        if reason:
            operations.append(_operation(partition.id, "change", reason, partition))
        tunnel = group_name(partition.id)
        if tunnel in set_up and any(process.outdated for process in by_group.get(tunnel, [])):
            operations.append(_operation(tunnel, "change", _OUTDATED, partition))
    wanted: dict[str, Partition | None] = {
        name: item for item in node.partitions for name in (item.id, group_name(item.id))
    }
    if context.config.mesh is not None:
        wanted[MESH] = None
    operations += [
        *(
            _operation(name, "remove", "belongs to no partition")
            for name in sorted((set_up | strange) - wanted.keys())
        ),
        *(_operation(name, "remove", _STRANGE, wanted[name]) for name in sorted(strange & wanted.keys())),
        *(
            _operation(name, "remove", "supervisord still has it, although its configuration is gone")
            for name in sorted(by_group.keys() - set_up - strange)
        ),
    ]
    return tuple(operations)


def _of_supervisord(supervisor: Supervisor, processes: tuple[Process, ...]) -> list[ServiceOperation]:
    """What is to be done about supervisord itself: nothing, or one thing."""
    try:
        text = supervisor.configuration.read_text()
    except OSError:
        text = None
    running = bool(processes) or supervisor.running()
    reasons = [
        *(["its configuration is missing"] if text is None else []),
        *(["its configuration is another"] if text not in (None, supervisor.render()) else []),
        *([_STRANGE] if text is not None and not files.is_own(supervisor.configuration) else []),
        *([] if running else ["it does not run"]),
        *(
            ["it is of another version, and runs nothing"]
            if running and _may_go(supervisor, processes)
            else []
        ),
    ]
    if not reasons:
        return []
    return [
        ServiceOperation(
            id="supervisord",
            resource="supervisord",
            action="create" if text is None else "change",
            partition=None,
            before=None if text is None else "running" if running else "stopped",
            after="running",
            reason="; ".join(reasons),
            group=None,
        )
    ]


def _reason_to_start(
    context: Context, partition: Partition, known: list[Process], *, homeless: bool
) -> str | None:
    """Why the programs of an instance that is to run are to be started (anew), if they are."""
    # EXITED and FATAL are the instance's own doing; STOPPED without a start as its file says is a supervisord
    # that began anew, or an exchange that was cut off
    if not known or any(process.state == "STOPPED" and not process.started for process in known):
        return "not started"
    if any(process.outdated for process in known):
        return _OUTDATED
    if (
        homeless
        and all(process.state in ("EXITED", "FATAL") for process in known)
        and privacy.is_launched(context, partition)
    ):
        return "could not start"  # what was started without them ended at once
    return None


def _may_go(supervisor: Supervisor, processes: tuple[Process, ...]) -> bool:
    """Whether a supervisord without our plug-in can be replaced: nobody would notice."""
    return supervisor.is_outdated() and not running_groups(processes)


def open_cases(supervisor: Supervisor, processes: tuple[Process, ...]) -> list[str]:
    """What is open of supervisord itself, in words."""
    if not processes or not supervisor.is_outdated():
        return []
    text = (
        "supervisord is of another version of partitiond, as it holds what runs: it is replaced when it runs nothing, or was"
        " ended (supervisorctl shutdown); until then what this version does better is not done"
    )
    return [text]


def _operation(group: str, action: Action, reason: str, owner: Partition | None = None) -> ServiceOperation:
    return ServiceOperation(
        id=f"processes/{group}",
        resource="processes",
        action=action,
        partition=None if owner is None else owner.id,
        before="stopped" if action == "change" else "set up",
        after="running" if action == "change" else None,
        reason=reason,
        group=group,
        owner=owner,
    )


class Start:
    """supervisord on its way up: other work can be done until it answers. Both steps raise PartitiondError, OSError."""

    def __init__(self, context: Context) -> None:
        self._supervisor = context.supervisor
        self._ready: Callable[[], None] | None = None

    def begin(self) -> None:
        """Write its configuration, and start it where it does not run."""
        supervisor = self._supervisor
        files.write_path(supervisor.configuration, supervisor.render().encode(), mode=0o600)
        running = supervisor.running()
        if running and _may_go(supervisor, supervisor.processes()):
            supervisor.shutdown()
            running = False
        if not running:
            self._ready = supervisor.start()

    def wait(self) -> None:
        """Wait for what was begun, once."""
        ready, self._ready = self._ready, None
        if ready is not None:
            ready()


def apply(context: Context, operation: ServiceOperation) -> None:
    """Run one operation. Raises PartitiondError, OSError."""
    supervisor = context.supervisor
    if operation.group is None:
        start = Start(context)
        start.begin()
        start.wait()
    elif operation.action == "remove":
        supervisor.stop_group(operation.group)
        supervisor.remove_group(operation.group)
        supervisor.update(only=(operation.group,))
        if operation.owner is not None:
            context.store.make_due(operation.owner.id)
    else:
        if operation.owner is not None:
            privacy.relaunch(context, operation.owner, operation.group)
        waits = supervisor.take_in()
        if operation.group in waits and operation.reason == _OUTDATED:
            # nobody else exchanges it; what takes longer to end is found ended by the next look
            try:
                supervisor.stop_groups([operation.group], within=_A_WHILE)
            except PartitiondError as error:
                logger.warning("%s: %s", operation.id, sentence(error))
            waits = supervisor.take_in()
        # what would have to be stopped first is being exchanged, by somebody who waits for that
        if operation.group not in waits:
            supervisor.start_group(operation.group)
