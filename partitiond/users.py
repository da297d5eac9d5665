"""Unix users of the node: the software user and one user per partition.

Promises: all changes of a pass are one locked rewrite of the user database (``lckpwdf``, temporary file, fsync, rename),
whatever their number; no program is started; only users that carry our mark in the GECOS field, or that have exactly the
name that the configuration gives to a partition, are changed; lines of others are kept byte for byte. A rewrite that is cut
off between two of the four files is finished, or taken back, by the next one.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond.errors import PartitiondError
from partitiond.files import write_path
from partitiond.operation import Operation
from partitiond.settled import Settled

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

_read: Settled[UserDatabase] = Settled()

MARK = "partitiond"
SHELL = "/bin/sh"
ROLES = ("software", "mesh")
"""What users of no partition are for."""

# The order of the four files is what makes a rewrite that was cut off visible. The mark is in passwd: it comes first and goes
# last, so that nothing of ours is ever without it. That a user's group is missing is seen by every plan: so it comes last and
# goes first, and a user who has one is whole.
_CREATING = ("passwd", "shadow", "gshadow", "group")
_REMOVING = ("group", "gshadow", "shadow", "passwd")
_MODES = {"passwd": 0o644, "group": 0o644, "shadow": 0o640, "gshadow": 0o640}


@dataclass(frozen=True, slots=True)
class UserSpec:
    """A user as it should be. ``uid`` None: the next free one of the system range. ``role`` is what one of no partition is for,
    of :data:`ROLES`.
    """

    name: str
    uid: int | None
    home: str
    groups: tuple[str, ...]
    partition: str | None
    role: str = "software"

    @property
    def gecos(self) -> str:
        """The mark by which we find our users again."""
        return f"{MARK} {self.partition or self.role}"


@dataclass(frozen=True, slots=True)
class User:
    """A user as the database has it."""

    name: str
    uid: int
    gid: int
    gecos: str
    home: str
    shell: str
    locked: bool

    @property
    def ours(self) -> bool:
        """Whether it carries our mark."""
        return self.gecos.split(" ")[0] == MARK

    @property
    def partition(self) -> str | None:
        """The partition that the mark names; None for the node's own users."""
        name = self.gecos.partition(" ")[2]
        return None if name in ROLES else name or None


@dataclass(frozen=True, slots=True)
class UserDatabase:
    """The four files, parsed: users by name, gid by group, members by group."""

    users: Mapping[str, User]
    groups: Mapping[str, int]
    members: Mapping[str, frozenset[str]]

    def numbers(self) -> dict[str, tuple[int, int]]:
        """(uid, gid) of every user by name."""
        return {name: (user.uid, user.gid) for name, user in self.users.items()}


@dataclass(frozen=True, slots=True)
class UserOperation(Operation):
    """A change of one user; ``spec`` None removes it."""

    spec: UserSpec | None


def observe(etc: Path = Path("/etc")) -> UserDatabase:
    """Read the database. Raises PartitiondError ``users.unreadable``."""
    paths = tuple(f"{etc}/{name}" for name in ("passwd", "group", "shadow"))
    return _read.get(str(etc), paths, None, partial(_observe, etc))


def _observe(etc: Path) -> UserDatabase:
    files = {name: _lines(etc / name) for name in ("passwd", "group", "shadow")}
    # of two lines with one name getpwnam(3) knows the first
    shadow = {row[0]: _locked_field(row[1]) for row in _rows(files["shadow"]) if len(row) > 1}
    users = {}
    for line in reversed(files["passwd"]):
        user = _user(line, shadow.get(line.partition(":")[0], True))
        if user is not None:
            users[user.name] = user
    users = dict(reversed(users.items()))
    rows = [row for row in _rows(files["group"]) if len(row) == 4 and _number(row[2])]
    groups = {row[0]: int(row[2]) for row in rows}
    members = {row[0]: frozenset(filter(None, row[3].split(","))) for row in rows}
    return UserDatabase(users, groups, members)


def _rows(lines: Sequence[str]) -> Iterator[list[str]]:
    return (line.split(":") for line in reversed(lines))


@lru_cache(maxsize=1 << 13)  # when one user comes, the others' lines are as they were
def _user(line: str, shadow_locked: bool) -> User | None:
    row = line.split(":")
    if len(row) != 7 or not _number(row[2]) or not _number(row[3]):
        return None
    locked = _locked_field(row[1]) or (row[1] == "x" and shadow_locked)
    return User(row[0], int(row[2]), int(row[3]), row[4], row[5], row[6], locked)


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _locked_field(text: str) -> bool:
    return text[:1] in ("!", "*")


def _lines(path: Path) -> list[str]:
    try:
        # bytes: text mode would turn \r\n into \n in lines that are not ours
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PartitiondError(
            "users.unreadable",
            f"cannot read the user database: {error.strerror}",
            resource=str(path),
            hint="run as root",
        ) from error
    # at \n alone: str.splitlines would also cut a foreign line at U+2028 or a form feed
    return text.removesuffix("\n").split("\n") if text else []


def plan(desired: Sequence[UserSpec], observed: UserDatabase) -> tuple[UserOperation, ...]:
    """Compare; pure. Raises PartitiondError ``users.uid_taken`` before anything is changed."""
    _refuse_taken(desired, observed)
    member_of: dict[str, set[str]] = {}
    for group, members in observed.members.items():
        for member in members:
            member_of.setdefault(member, set()).add(group)
    operations = []
    for spec in desired:
        user = observed.users.get(spec.name)
        reasons = _differences(spec, user, observed, member_of.get(spec.name, set()))
        if reasons:
            operations.append(
                UserOperation(
                    id=f"user/{spec.name}",
                    resource="user",
                    action="change" if user else "create",
                    partition=spec.partition,
                    before=f"uid {user.uid}, home {user.home}, shell {user.shell}" if user else None,
                    after=f"uid {_wanted_uid(spec, user)}, home {spec.home}, shell {SHELL}",
                    reason="; ".join(reasons),
                    spec=spec,
                )
            )
    wanted = {spec.name for spec in desired}
    return (
        *operations,
        *(_removal(user) for user in observed.users.values() if user.ours and user.name not in wanted),
    )


def _wanted_uid(spec: UserSpec, user: User | None) -> str:
    if user:
        return str(user.uid)
    return "next free" if spec.uid is None else str(spec.uid)


def _removal(user: User) -> UserOperation:
    return UserOperation(
        id=f"user/{user.name}",
        resource="user",
        action="remove",
        partition=user.partition,
        before=f"uid {user.uid}, home {user.home}",
        after=None,
        reason="carries our mark but is not wanted any more",
        spec=None,
    )


def _refuse_taken(desired: Sequence[UserSpec], observed: UserDatabase) -> None:
    """A number that two users share would make one the owner of the other's files and processes."""
    wanted = {spec.name for spec in desired}
    # users of ours that are not wanted any more go in the same rewrite, and their numbers become free
    going = {user.name for user in observed.users.values() if user.ours} - wanted
    by_uid: dict[int, set[str]] = {}
    for user in observed.users.values():
        by_uid.setdefault(user.uid, set()).add(user.name)
    by_gid: dict[int, set[str]] = {}
    for name, gid in observed.groups.items():
        by_gid.setdefault(gid, set()).add(name)
    for spec in desired:
        existing = observed.users.get(spec.name)
        uid = existing.uid if existing else spec.uid
        if uid == 0:
            raise PartitiondError(
                "users.root",
                f"{spec.name} has uid 0; programs of the node's tenants would run as root",
                resource=f"user {spec.name}",
                hint="name another user in the configuration",
            )
        if uid is None:
            continue
        others = by_uid.get(uid, set()) | (by_gid.get(uid, set()) if existing is None else set())
        holders = sorted(others - going - {spec.name})
        if holders:
            raise PartitiondError(
                "users.uid_taken",
                f"uid or gid {uid} of {spec.name} belongs to {', '.join(holders)}",
                resource=f"user {spec.name}",
                hint="set uid_base in [partitiond] to a free range",
            )


def _differences(spec: UserSpec, user: User | None, observed: UserDatabase, member_of: set[str]) -> list[str]:
    if user is None:
        return ["missing"]
    reasons = []
    if user.gecos != spec.gecos:
        reasons.append("not marked as ours")
    if user.home != spec.home:
        reasons.append(f"home is {user.home}, should be {spec.home}")
    if user.shell != SHELL:
        reasons.append(f"shell is {user.shell}, should be {SHELL}")
    if not user.locked:
        reasons.append("has a password, should be locked")
    missing = set(spec.groups) - member_of
    foreign = {
        group for group in member_of if group not in spec.groups and observed.groups.get(group) != user.gid
    }
    if spec.name not in observed.groups:
        reasons.append("its group is missing")
    if missing:
        reasons.append(f"is not in group {', '.join(sorted(missing))}")
    if foreign:
        reasons.append(f"is in foreign group {', '.join(sorted(foreign))}")
    return reasons


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock of shadow(3) that useradd and passwd respect. Raises PartitiondError ``users.locked``."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.lckpwdf() != 0:
        raise PartitiondError(
            "users.locked",
            f"the user database is locked: {os.strerror(ctypes.get_errno())}",
            resource="/etc/.pwd.lock",
            hint="wait for the other program to end, then apply again",
            retryable=True,
        )
    try:
        yield
    finally:
        libc.ulckpwdf()


@dataclass(slots=True)
class _Files:
    """The rows of the four files, being edited."""

    passwd: list[list[str]]
    group: list[list[str]]
    shadow: list[list[str]]
    gshadow: list[list[str]]

    def drop(self, name: str) -> None:
        self.passwd = [row for row in self.passwd if row[0] != name]
        self.shadow = [row for row in self.shadow if row[0] != name]

    def drop_group(self, name: str) -> None:
        self.group = [row for row in self.group if row[0] != name]
        self.gshadow = [row for row in self.gshadow if row[0] != name]


def apply(operations: Iterable[UserOperation], etc: Path = Path("/etc")) -> None:
    """Run the operations under one lock. Raises PartitiondError ``users.locked`` or OSError of the file system."""
    todo = tuple(operations)
    made = tuple(operation for operation in todo if operation.spec)
    gone = tuple(operation for operation in todo if not operation.spec)
    if not todo:
        return
    with _locked():
        if made:
            _rewrite(etc, made, _CREATING)
        if gone:
            _rewrite(etc, gone, _REMOVING)


def _rewrite(etc: Path, todo: Sequence[UserOperation], order: Sequence[str]) -> None:
    names = ("passwd", "group", "shadow", "gshadow")
    files = _Files(*([line.split(":") for line in _lines(etc / name)] for name in names))
    _edit(files, todo, str(int(time.time() // 86400)))
    for name in order:
        rows: list[list[str]] = getattr(files, name)
        if rows or (etc / name).exists():
            _replace(etc / name, "".join(":".join(row) + "\n" for row in rows), _MODES[name])


def _edit(files: _Files, todo: Sequence[UserOperation], today: str) -> None:
    current = {row[0]: row for row in reversed(files.passwd) if len(row) == 7}
    gone = {operation.id.partition("/")[2] for operation in todo if operation.spec is None}
    for name in gone:
        files.drop(name)
        files.drop_group(name)
    specs = _with_uids([operation.spec for operation in todo if operation.spec], files)
    touched = {spec.name for spec in specs} | gone
    memberships = {spec.name: spec.groups for spec in specs}
    groups = {row[0]: row for row in reversed(files.group) if len(row) == 4}
    shadowed = {row[0]: row for row in reversed(files.shadow) if len(row) > 1}
    shadowed_groups = {row[0] for row in files.gshadow}
    for spec in specs:
        row = current.get(spec.name)
        own = groups.get(spec.name)
        uid, gid = (row[2], row[3]) if row else (str(spec.uid), own[2] if own else str(spec.uid))
        if row is None:
            files.passwd.append([spec.name, "x", uid, gid, spec.gecos, spec.home, SHELL])
        else:
            row[1], row[4:7] = "x", [spec.gecos, spec.home, SHELL]
        if spec.name not in groups:
            files.group.append([spec.name, "x", gid, ""])
        if spec.name not in shadowed_groups:
            files.gshadow.append([spec.name, "!", "", ""])
        if spec.name not in shadowed:
            files.shadow.append([spec.name, "!", today, "", "", "", "", "", ""])
        elif shadowed[spec.name][1][:1] not in ("!", "*"):
            shadowed[spec.name][1] = "!" + shadowed[spec.name][1]
    for row in (*files.group, *files.gshadow):
        if len(row) == 4:
            _set_members(row, touched, memberships)


def _set_members(row: list[str], touched: set[str], memberships: Mapping[str, tuple[str, ...]]) -> None:
    """Put the touched users into exactly their groups; members that are not ours stay, in their order."""
    members = list(filter(None, row[3].split(",")))
    kept = [name for name in members if name not in touched or row[0] in memberships.get(name, ())]
    present = set(kept)
    kept += [name for name, groups in memberships.items() if row[0] in groups and name not in present]
    if kept != members:
        row[3] = ",".join(kept)


def _with_uids(specs: Iterable[UserSpec], files: _Files) -> list[UserSpec]:
    """Choose a number for each that has none and needs one."""
    taken = {row[2] for row in (*files.passwd, *files.group) if len(row) > 2}
    known = {row[0] for row in files.passwd}
    found = []
    for spec in specs:
        found.append(spec if spec.uid is not None or spec.name in known else _with_uid(spec, taken))
        taken.add(str(found[-1].uid))
    return found


def _with_uid(spec: UserSpec, taken: Container[str]) -> UserSpec:
    """Choose a number as ``useradd --system`` does: the highest that neither a user nor a group has."""
    for uid in range(999, 99, -1):
        if str(uid) not in taken:
            return replace(spec, uid=uid)
    raise PartitiondError(
        "users.no_uid",
        "no free system uid from 100 to 999",
        resource=f"user {spec.name}",
        hint="remove unused system users",
    )


def _replace(path: Path, text: str, mode: int) -> None:
    """Write a file of the database anew, whole or not at all, keeping owner and mode."""
    try:
        old = path.stat()
        owner, mode = (old.st_uid, old.st_gid), old.st_mode & 0o7777
    except FileNotFoundError:
        owner = (0, 0)
    content = text.encode("utf-8", "surrogateescape")
    if path.exists() and path.read_bytes() == content:
        return
    write_path(path, content, mode=mode, owner=owner)
