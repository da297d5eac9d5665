"""The private namespaces of partitions as a resource of the plan, and how a partition's programs are started in them.

Promises: a partition that has something to run has its namespaces before it runs, and where they cannot be made it does not
run; those that are in order are left alone; what is switched off or gone is taken back. A running program is never moved: it
begins in the namespaces when it is next started.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import execute, files, namespaces
from partitiond.errors import PartitiondError
from partitiond.operation import Operation
from partitiond.supervision import relaunched

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping

    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.namespaces import Mounted
    from partitiond.node import Partition
    from partitiond.operation import Action
    from partitiond.supervision import Group, Process, Supervisor


@dataclass(frozen=True, slots=True)
class PrivacyOperation(Operation):
    """Make the namespaces called ``name``, close ``windows`` in them, or remove them.

    ``owner`` is there as long as the node has that partition.
    """

    name: str
    owner: Partition | None
    windows: tuple[Mounted, ...] = ()


def directory(config: Config) -> Path:
    """Where the namespaces are pinned."""
    return config.run_dir / "namespaces"


def is_private(config: Config, partition: Partition) -> bool:
    """Whether a partition is to have namespaces of its own."""
    return partition.id not in config.shared_namespaces


def entry(config: Config, partition: Partition) -> tuple[str, ...]:
    """The words before a command that let it begin in the partition's namespaces; none where it shares the node's."""
    if not is_private(config, partition):
        return ()
    return namespaces.entry(directory(config), partition.id, partition.path)


def launcher(config: Config, partition: Partition) -> tuple[str, ...]:
    """The words by which supervisord starts a program of a partition in its namespaces; none: supervisord does it itself."""
    enter = entry(config, partition)
    return (*enter, *execute.switch(str(partition.uid), str(partition.gid))) if enter else ()


@dataclass(frozen=True, slots=True)
class Observed:
    """The names of pins and whether a namespace is there, and by which other ``/proc`` one sees more than its own."""

    pinned: Mapping[str, bool]
    windows: Mapping[str, tuple[Mounted, ...]] = field(default_factory=dict)


def observe(config: Config) -> Observed:
    """Look at what is pinned. Raises OSError."""
    pinned = namespaces.pinned(directory(config))
    here = [name for name, right in pinned.items() if right]
    # where the kernel hides no processes there is nothing to be kept from
    found = namespaces.windows() if here and namespaces.hides_processes() else ()
    return Observed(pinned, namespaces.open_windows(directory(config), here, found))


def plan(
    config: Config, partitions: Iterable[Partition], used: Container[str], seen: Observed
) -> tuple[PrivacyOperation, ...]:
    """Compare with what was ``seen``; ``used`` are the partitions that have something to run."""
    operations = []
    left = dict(seen.pinned)
    for item in partitions:
        found = left.pop(item.id, None)
        if is_private(config, item) and item.id in used:
            if not found:
                reason = "missing" if found is None else "nothing is pinned there"
                operations.append(_operation(item.id, item, "create", reason))
            elif windows := seen.windows.get(item.id):
                reason = f"all processes are seen by {', '.join(one.place for one in windows)}"
                operations.append(replace(_operation(item.id, item, "change", reason), windows=windows))
        elif found is not None:
            reason = "nothing is to run there" if is_private(config, item) else "switched off"
            operations.append(_operation(item.id, item, "remove", reason))
    operations += [_operation(name, None, "remove", "belongs to no partition") for name in sorted(left)]
    return tuple(operations)


def missing(operations: Iterable[PrivacyOperation]) -> frozenset[str]:
    """The partitions whose namespaces are to be made."""
    return frozenset(one.name for one in operations if one.action == "create")


def _operation(name: str, owner: Partition | None, action: Action, reason: str) -> PrivacyOperation:
    return PrivacyOperation(
        id=f"namespaces/{name}",
        resource="namespaces",
        action=action,
        partition=owner.id if owner else None,
        before=None if action == "create" else "pinned",
        after=None if action == "remove" else "pinned",
        reason=reason,
        name=name,
        owner=owner,
    )


def make(
    config: Config, operations: Iterable[PrivacyOperation]
) -> tuple[tuple[PrivacyOperation, PartitiondError], ...]:
    """Make all that is missing, at once; return what failed."""
    missing = {one.name: one for one in operations if one.action == "create"}
    if not missing:
        return ()
    try:
        failed = namespaces.make(directory(config), missing, _shown(config))
    except OSError as error:
        failed = tuple((name, error) for name in missing)
    return tuple((missing[name], _not_made(name, error)) for name, error in failed)


def _not_made(name: str, error: OSError) -> PartitiondError:
    return PartitiondError(
        "privacy.not_made",
        f"its namespaces cannot be made: {error.strerror or error}",
        resource=name,
        hint="its programs do not start without them; where the machine forbids them (some containers do), switch them off"
        " with private_namespaces = off in [partitiond]",
        retryable=True,
    )


def _shown(config: Config) -> tuple[Path, ...]:
    """What a partition's programs need, wherever the operator has put it."""
    own = (config.instance_root, config.software_root, config.state_dir, config.log_dir, config.run_dir)
    more = (config.instance_storage_home, config.certificate_repository)
    parts = map(Path, config.shared_part_list.split())
    return (*own, *(path for path in more if path), *parts, Path(sys.prefix))


def ensure(context: Context, partition: Partition) -> None:
    """Have a partition's namespaces before anything of it is run. Raises PartitiondError ``privacy.not_made``, OSError."""
    config = context.config
    if not is_private(config, partition):
        return
    with context.applying:
        pinned = namespaces.pinned(directory(config))
        here = {name: right for name, right in pinned.items() if name == partition.id}
        for _, error in make(config, plan(config, (partition,), (partition.id,), Observed(here))):
            raise error


def apply(context: Context, operation: PrivacyOperation) -> None:
    """Remove or close what an operation says. Raises PartitiondError, OSError."""
    owner = operation.owner
    if operation.windows:
        namespaces.close(directory(context.config), operation.name, operation.windows)
        return
    if owner is not None and context.supervisor.has_group(owner.id):
        # what it has would not start any more
        relaunch(context, owner, owner.id)
        if context.supervisor.running():
            _start_anew(context, owner)
    namespaces.remove(directory(context.config), operation.name)


def _start_anew(context: Context, partition: Partition) -> None:
    """Let supervisord know of a partition's file that changed, and start at once what that stopped: a failure elsewhere, or
    our own end, must not leave it so.

    Also when the file is as it was: one who was killed after writing it has told supervisord nothing.
    """
    to_run = context.store.to_run()
    for name in sorted(context.supervisor.update(only=(partition.id,))):
        if name in to_run:
            context.supervisor.start_group(name)


def relaunch(context: Context, partition: Partition, group: str) -> bool:
    """Let the file of a partition's group say how its programs are started now; return whether it said something else.

    Programs that run are stopped when supervisord is told of it.
    """
    supervisor = context.supervisor
    text = supervisor.group_text(group)
    if text is None:
        return False
    new = relaunched(text, partition.uid, launcher(context.config, partition))
    if new == text:
        return False
    files.write_path(supervisor.group_file(group), new.encode(), mode=0o600)
    return True


def is_launched(context: Context, partition: Partition) -> bool:
    """Whether supervisord is to start a partition's programs in its namespaces, by the file that it has of them."""
    text = context.supervisor.group_text(partition.id)
    words = launcher(context.config, partition)
    return text is not None and bool(words) and text == relaunched(text, partition.uid, words)


def differs_by_launcher(text: str | None, group: Group) -> bool:
    """Whether supervisord has a group as it was before its partition was private, and else as it should be."""
    return bool(group.launcher) and text == replace(group, launcher=()).render()


def is_late(supervisor: Supervisor, group: Group) -> bool:
    """Whether a group runs as before its partition was private, which is no reason to end it: its next start is private."""
    return differs_by_launcher(supervisor.group_text(group.name), group) and any(
        process.group == group.name and process.pid for process in supervisor.processes()
    )


def forget(config: Config, partition: Partition) -> None:
    """Remove what an instance leaves behind in its namespaces, with them. Raises OSError."""
    namespaces.remove(directory(config), partition.id)


def open_cases(config: Config, partitions: Iterable[Partition], processes: Iterable[Process]) -> list[str]:
    """What of the privacy of partitions is open on this node, in words."""
    private = {item.id: item for item in partitions if is_private(config, item)}
    found = []
    shared = sorted(item.id for item in partitions if item.id not in private)
    if shared:
        names = "every partition" if not private else ", ".join(shared)
        found.append(
            f"private_namespaces is off for {names}: /proc, /tmp, /dev/shm, /run/lock and System V IPC are the node's own"
        )
    if not private:
        return found
    if not namespaces.hides_processes():
        found.append("partitions see the processes of others in /proc: this kernel is older than Linux 5.8")
    if not namespaces.mounts_arrive():
        found.append(
            "/ is no shared mount, so what is mounted later does not reach partitions that have begun, and what is unmounted"
            " stays in use there; mount --make-rshared / before the first partition starts"
        )
    late = sorted(set(_outside(config, private, processes)))
    if late:
        found.append(
            f"{', '.join(late)} began before its namespaces were made: private when it is stopped and started, or gets another"
            " release"
        )
    return found


def _outside(config: Config, private: Mapping[str, Partition], processes: Iterable[Process]) -> Iterator[str]:
    """The private partitions of which supervisord runs something that has begun elsewhere."""
    for process in processes:
        name = process.group.removesuffix("-tunnel")
        if name in private and process.pid and namespaces.is_outside(directory(config) / name, process.pid):
            yield name


def remove_all(config: Config) -> None:
    """Remove everything. Raises OSError."""
    namespaces.remove_all(directory(config))
