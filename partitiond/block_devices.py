"""Block devices that the operator gives to partitions: who may open which node, and what nobody may be given.

A device is given by an entry for the partition's user in the access control list of its node: owner, group and mode stay the
system's, so no tenant can hand it on with chmod(2), and the entry is the mark by which it is found again. Only a file system of
``/dev`` without such lists makes the user the owner.

Promises: what the system uses (mounted at any layer, swap, a volume or an array on it) is given to nobody, whatever the
configuration says, and is taken back once it is used; what is given without the configuration's word is taken back; nodes that
carry neither an entry nor an owner of ours are never touched. Here is what is seen and planned; ``device_access.py`` does it.
"""

# ruff: noqa: PTH116 - nodes, many and short-lived: this is done at every pass

from __future__ import annotations

import errno
import os
import pwd
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import block_layers, posix_acl, trusted_path
from partitiond.block_layers import Layers
from partitiond.errors import PartitiondError
from partitiond.operation import Operation
from partitiond.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from partitiond.block_layers import Use
    from partitiond.config import Config
    from partitiond.device_config import OperatorDevice
    from partitiond.node import Partition
    from partitiond.posix_acl import Acl
    from partitiond.users import UserDatabase

DEV = Path("/dev")
# as many as partition_amount can be: numbers of users that are gone are still ours
_OUR_RANGE = 10_000
_RW = posix_acl.READ_WRITE
OWNER_RW = 0o600
EXCLUSIVE = os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_ABSENT = (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM)
_SURVIVES = "whoever of it has the device open keeps it until that process ends"


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A node of a block device; ``acl`` is None where the file system has no access control lists."""

    path: str
    rdev: int
    uid: int
    gid: int
    mode: int
    acl: Acl | None

    def given(self, uid: int) -> bool:
        """Whether a user of ours may read and write it, in the way in which we give."""
        if self.acl is None:
            return self.uid == uid and self.mode & OWNER_RW == OWNER_RW
        return self.uid != uid and self.acl.of_user(uid) & _RW == _RW

    def holds(self, uid: int) -> bool:
        """Whether a user has anything of it, be it not all."""
        return self.uid == uid or (self.acl is not None and uid in self.acl.users)


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a device cannot be given."""

    code: str
    reason: str
    hint: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device of the configuration and what stands behind its name now; ``under`` are the devices that it is a part of."""

    device: OperatorDevice
    partition: Partition
    node: DeviceNode | None
    under: frozenset[int]
    trouble: Trouble | None


@dataclass(frozen=True, slots=True)
class Observed:
    """The devices of the configuration, and the nodes that users of ours hold.

    ``held`` are (node, uid), ``names`` the users by uid, ``groups`` the numbers of our users' groups.
    """

    candidates: tuple[Candidate, ...] = ()
    held: tuple[tuple[DeviceNode, int], ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    groups: frozenset[int] = frozenset()

    def user(self, uid: int) -> str:
        """The user's name, or its number once it is gone."""
        return self.names.get(uid, f"uid {uid}")

    def owner_again(self, node: DeviceNode, uid: int) -> tuple[int, int] | None:
        """Whom a node that this user owns belongs to again; its group the user may have chosen, too. None: not its own."""
        if node.uid != uid:
            return None
        return (0, 0 if node.gid in self.groups or node.gid == uid else node.gid)

    def given_names(self) -> dict[str, list[str]]:
        """The stable names of what partitions have, by partition; those without any are left out."""
        found: dict[str, list[str]] = {}
        for one in self.candidates:
            if one.node and one.node.given(one.partition.uid):
                found.setdefault(one.partition.id, []).append(one.device.name)
        return found

    def given(self, partition: Partition) -> list[str]:
        """All that a partition has: stable names, and the nodes of what no name leads to."""
        named = {one.node.path for one in self.candidates if one.partition.id == partition.id and one.node}
        others = [node.path for node, uid in self.held if uid == partition.uid and node.path not in named]
        return self.given_names().get(partition.id, []) + others


@dataclass(frozen=True, slots=True)
class WithdrawOperation(Operation):
    """Take a node back from one user. ``owner``: the (uid, gid) that the node gets again, None when it has another owner."""

    path: str
    rdev: int
    uid: int
    owner: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class GrantOperation(Operation):
    """Give a node to one user; ``first`` when the user has nothing of it yet. ``owner`` as in WithdrawOperation."""

    path: str
    rdev: int
    uid: int
    first: bool
    owner: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What is to be taken, given, and cannot be."""

    withdrawals: tuple[WithdrawOperation, ...] = ()
    grants: tuple[GrantOperation, ...] = ()
    refused: tuple[Refusal, ...] = ()


# --- observe ----------------------------------------------------------------------------------------------------------


def observe(
    config: Config,
    partitions: Sequence[Partition],
    database: UserDatabase,
    *,
    dev: Path = DEV,
    proc: Path = Path("/proc"),
) -> Observed:
    """Look at the nodes, and at what stands behind the names of the configuration. Raises OSError."""
    names = {user.uid: user.name for user in database.users.values()}
    marked = [user for user in database.users.values() if user.ours]
    ours = {user.uid for user in marked} | {item.uid for item in partitions}
    left = range(config.uid_base, config.uid_base + _OUR_RANGE)
    held = tuple(
        (node, uid)
        for node in _marked_nodes(dev)
        for uid in sorted({node.uid, *(node.acl.users if node.acl else ())})
        if uid in ours or (uid in left and uid not in names and _is_nobodys(uid))
    )
    candidates: tuple[Candidate, ...] = ()
    if config.block_devices:
        named = {device.partition for device in config.block_devices}
        by_id = {item.id: item for item in partitions if item.id in named}
        layers, used = Layers(), block_layers.uses(proc)
        bearers = layers.bearers(used)
        candidates = tuple(
            _candidate(device, by_id[device.partition], dev, layers, used, bearers)
            for device in config.block_devices
            if device.partition in by_id
        )
    groups = frozenset(user.gid for user in marked) | {item.gid for item in partitions}
    return Observed(candidates, held, names, groups)


def _is_nobodys(uid: int) -> bool:
    """Whether no user of any directory service has a number; only asked about numbers that stand on a node."""
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return True
    return False


def _marked_nodes(dev: Path) -> Iterator[DeviceNode]:
    """The nodes that are not root's alone; most are."""
    for path, found in _block_nodes(dev):
        with suppress(FileNotFoundError):
            if found.st_uid != 0 or posix_acl.exists(path):
                yield seen_as(path, found)


def _block_nodes(dev: Path) -> Iterator[tuple[str, os.stat_result]]:
    """All block device nodes of one file system, not through links nor into what is mounted below."""
    device = os.stat(dev).st_dev
    pending = [str(dev)]
    while pending:
        with suppress(FileNotFoundError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                # of links, by far the most, nothing is asked
                if entry.is_symlink():
                    continue
                try:
                    found = entry.stat(follow_symlinks=False)
                    kind = stat.S_IFMT(found.st_mode)
                    if kind == stat.S_IFBLK:
                        yield entry.path, found
                    elif kind == stat.S_IFDIR and found.st_dev == device:
                        pending.append(entry.path)
                except FileNotFoundError:
                    continue  # devices come and go


def seen_as(path: str, found: os.stat_result) -> DeviceNode:
    """A node with its access control list. Raises OSError, ValueError."""
    acl = posix_acl.read(path, found.st_mode)
    return DeviceNode(path, found.st_rdev, found.st_uid, found.st_gid, found.st_mode & 0o7777, acl)


def _candidate(
    device: OperatorDevice,
    partition: Partition,
    dev: Path,
    layers: Layers,
    used: Mapping[int, Use],
    bearers: Mapping[int, Use],
) -> Candidate:
    try:
        node = _behind(device.name, dev, layers)
    except PartitiondError as error:
        trouble = Trouble(error.code, str(error), error.hint)
        return Candidate(device, partition, None, frozenset(), trouble)
    under = layers.under(node.rdev)
    found = _in_use(node, under, layers, used, bearers)
    if found is None and not node.holds(partition.uid):
        # once it is given, it may be the partition itself that holds it
        found = _claimed(node.path)
    return Candidate(device, partition, node, under, found)


def _behind(name: str, dev: Path, layers: Layers) -> DeviceNode:
    """The node that a name leads to. Raises PartitiondError with the code of the refusal."""
    try:
        path = trusted_path.resolve(name)
        if not path.startswith(f"{dev}/"):
            raise PartitiondError(
                "device.outside",
                f"leads to {path}, outside of {dev}",
                resource=name,
                hint=f"name a device below {dev}",
            )
        found = os.lstat(path)
        if found.st_dev != os.stat(dev).st_dev:
            # there it would not be found again to be taken back
            raise PartitiondError(
                "device.outside",
                f"{path} lies on another file system than {dev}",
                resource=name,
                hint=f"name a device in {dev} itself",
            )
        if not stat.S_ISBLK(found.st_mode):
            raise PartitiondError(
                "device.no_block_device",
                f"{path} is no block device",
                resource=name,
                hint="ls -l /dev/disk/by-id shows the disks",
            )
        node = seen_as(path, found)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _missing(name, reason) from error
    if not layers.exists(node.rdev):
        raise _missing(name, "the kernel has no such device")
    return node


def _missing(name: str, reason: str) -> PartitiondError:
    return PartitiondError(
        "device.missing",
        f"is not there: {reason}",
        resource=name,
        hint="plug it in, or correct the name; it is looked for again at every pass",
        retryable=True,
    )


def _in_use(
    node: DeviceNode,
    under: frozenset[int],
    layers: Layers,
    used: Mapping[int, Use],
    bearers: Mapping[int, Use],
) -> Trouble | None:
    """What the system does with the device, as far as it can be seen from here."""
    whole = next((used[rdev] for rdev in under if rdev in used), None)
    use = bearers.get(node.rdev) or whole
    part = (
        "the disk of which it is a part" if whole and node.rdev not in bearers else "it or what stands on it"
    )
    if use and use.kind == "swap":
        return Trouble("device.swap", f"{part} is swap ({use.where})", f"swapoff {use.where}")
    if use and use.by_system:
        hint = "name another device: this one is the machine's own"
        return Trouble("device.system_disk", f"{part} is mounted at {use.where}", hint)
    if use:
        return Trouble("device.mounted", f"{part} is mounted at {use.where}", f"umount {use.where}")
    if holders := layers.holders(node.rdev):
        hint = (
            "deactivate what stands on it (vgchange -an, mdadm --stop), and keep the host from assembling what"
            " partitions write (global_filter in lvm.conf, AUTO -all in mdadm.conf)"
        )
        return Trouble("device.held", f"{', '.join(holders)} of the host stands on it", hint)
    return None


def _claimed(path: str) -> Trouble | None:
    """Ask the kernel, which alone knows the mounts of all namespaces, whether somebody holds the device for itself."""
    try:
        os.close(os.open(path, EXCLUSIVE))
    except OSError as error:
        refused = not_opened(path, error)
        return Trouble(refused.code, str(refused), refused.hint)
    return None


def not_opened(path: str, error: OSError) -> PartitiondError:
    """Why a device could not be opened: ``device.busy``, ``device.missing`` or ``device.unusable``."""
    if error.errno == errno.EBUSY:
        return PartitiondError(
            "device.busy",
            "the kernel says that something has it for itself: a mount in another namespace, a volume manager, a program",
            resource=path,
            hint=f"lsblk {path} and fuser -v {path} may tell what it is",
            retryable=True,
        )
    if error.errno in _ABSENT:
        return _missing(path, error.strerror or str(error))
    return PartitiondError(
        "device.unusable",
        f"cannot be opened: {error.strerror}",
        resource=path,
        hint="look into the kernel's log",
        retryable=True,
    )


# --- plan -------------------------------------------------------------------------------------------------------------


def plan(observed: Observed) -> DevicePlan:
    """Compare; pure."""
    troubles = _troubles(observed.candidates)
    good = [one for one, trouble in zip(observed.candidates, troubles, strict=True) if trouble is None]
    wanted = {(one.node.path, one.partition.uid): one for one in good if one.node}
    why = {
        (one.node.path, one.partition.uid): trouble.reason
        for one, trouble in zip(observed.candidates, troubles, strict=True)
        if one.node and trouble
    }
    return DevicePlan(
        withdrawals=tuple(
            _withdrawal(node, uid, observed, why.get((node.path, uid)))
            for node, uid in observed.held
            if (node.path, uid) not in wanted
        ),
        grants=tuple(
            _grant(one, one.node, observed)
            for one in wanted.values()
            if one.node and not one.node.given(one.partition.uid)
        ),
        refused=tuple(
            _refusal(one, trouble)
            for one, trouble in zip(observed.candidates, troubles, strict=True)
            if trouble is not None
        ),
    )


def _troubles(candidates: Sequence[Candidate]) -> list[Trouble | None]:
    """The trouble of each, that of two partitions on one disk included: neither can be preferred."""
    owners: dict[int, set[str]] = {}
    covered: dict[int, set[str]] = {}
    for one in candidates:
        if one.node:
            owners.setdefault(one.node.rdev, set()).add(one.partition.id)
            for rdev in one.under:
                covered.setdefault(rdev, set()).add(one.partition.id)
    found = []
    for one in candidates:
        others: set[str] = set()
        if one.node:
            others = others.union(
                covered.get(one.node.rdev, ()),
                *(owners.get(rdev, ()) for rdev in (one.node.rdev, *one.under)),
            )
        others.discard(one.partition.id)
        shared = Trouble(
            "device.shared",
            f"is, or is a part of, what {', '.join(sorted(others))} is given",
            "give each device to one partition; names by label or uuid may have been copied",
        )
        found.append(one.trouble or (shared if others else None))
    return found


def _withdrawal(node: DeviceNode, uid: int, observed: Observed, why: str | None) -> WithdrawOperation:
    user = observed.user(uid)
    reason = why or f"[block_devices] does not give it to {user}"
    return WithdrawOperation(
        id=f"block-device{node.path}/{user.replace(' ', '-')}",
        resource="block-device",
        action="remove",
        # of the whole node: it is not put off when other partitions alone are applied
        partition=None,
        before=f"{user} may use {node.path}",
        after=None,
        reason=f"{reason}; {_SURVIVES}",
        path=node.path,
        rdev=node.rdev,
        uid=uid,
        owner=observed.owner_again(node, uid),
    )


def _grant(one: Candidate, node: DeviceNode, observed: Observed) -> GrantOperation:
    item = one.partition
    first = not node.holds(item.uid)
    owned = node.acl is not None and node.uid == item.uid
    has = "owns the node, and could hand it on" if owned else "may not read and write it any more"
    return GrantOperation(
        id=f"block-device{node.path}/{item.user}",
        resource="block-device",
        action="create" if first else "change",
        partition=item.id,
        before=None if first else f"{item.user} {has}",
        after=f"{item.user} may use {node.path}",
        reason=f"[block_devices] gives {one.device.name} to {item.id}",
        path=node.path,
        rdev=node.rdev,
        uid=item.uid,
        first=first,
        owner=observed.owner_again(node, item.uid) if owned else None,
    )


def _refusal(one: Candidate, trouble: Trouble) -> Refusal:
    return Refusal(
        resource="block-device",
        name=one.device.name,
        partition=one.device.partition,
        file=one.device.file,
        line=one.device.line or None,
        code=trouble.code,
        reason=trouble.reason,
        hint=trouble.hint,
    )
