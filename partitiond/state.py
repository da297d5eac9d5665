"""What the node remembers between passes: the last outcome of each instance and of each software release.

Everything else is observed. One small JSON file each below ``state_dir``, written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv6Interface
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from partitiond import files
from partitiond.choices import FIELDS, NATURAL, PARSERS, Kept
from partitiond.errors import PartitiondError
from partitiond.settled import Settled

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

InstanceLife = Literal["free", "started", "stopped", "destroying", "failed"]


@dataclass(frozen=True, slots=True)
class InstanceState:
    """The last outcome of a partition's instance; ``timestamp`` is the master's, opaque; times are Unix seconds.

    ``by_promise``: the last try failed because a promise did. ``retention_days`` is fixed when the instance is first deployed,
    negative until then. Of one that is to be destroyed: ``keep_until``, nothing of it is removed before; ``leaving``, it has
    begun to take its leave; ``prerm_ran``, it has taken it; ``settled``, its last usage is in documents; ``removing``, there is
    no way back; ``destroy_ran``, its own ``sbin/destroy`` needs not be run again; ``cleaned``, what it had is removed;
    ``dropped``, the master knows nothing of it any more, so that there is nobody to be told of its end; of one that goes on,
    ``rival`` is then who is wanted in its place. ``title`` is its own and its root's, as the master has them. ``rebuilt``: it
    was made anew where the master had known it before, and those of its tree do not know yet.
    """

    partition: str
    life: InstanceLife = "free"
    wanted: str = ""
    instance_guid: str | None = None
    software_release: str | None = None
    software_type: str | None = None
    timestamp: str | None = None
    processed_at: float = 0.0
    failures: int = 0
    next_try: float = 0.0
    error: str | None = None
    reported: bool = True
    cleaned: bool = False
    settled: bool = False
    retention_days: float = -1.0
    by_promise: bool = False
    keep_until: float = 0.0
    prerm_ran: bool = False
    removing: bool = False
    leaving: bool = False
    destroy_ran: bool = False
    dropped: bool = False
    rival: str = ""
    title: str = ""
    rebuilt: bool = False


@dataclass(frozen=True, slots=True)
class SoftwareState:
    """The last outcome of building a software release; ``kept_for``: the partitions because of which it is not removed."""

    url: str
    available: bool = False
    reported: bool = True
    failures: int = 0
    next_try: float = 0.0
    error: str | None = None
    listed: bool = True
    kept_for: str = ""


_INSTANCE_HINT = "move it away; the instance is configured again"
_SOFTWARE_HINT = "move it away; the release is looked at again, and not built if it is whole"
_ADDRESSES_HINT = (
    "restore it from a backup; without it, addresses that were not the natural ones are chosen anew"
)

State = TypeVar("State", InstanceState, SoftwareState)


def software_name(url: str) -> str:
    """The directory name of a release: the MD5 of its URL in hexadecimal, as slapos.core names it."""
    return hashlib.md5(url.encode(), usedforsecurity=False).hexdigest()


class Store:
    """Reads and writes the states. Raises PartitiondError ``state.damaged`` for a file that cannot be read."""

    def __init__(self, state_dir: Path) -> None:
        self._instances = state_dir / "instances"
        self._software = state_dir / "software"
        self._base = state_dir / "base-address"
        self._addresses = state_dir / "addresses.json"
        # what the file of that inode, size and time holds: it is asked for in each pass, and hardly ever changes
        self._kept: tuple[object, Mapping[str, Kept]] = (None, {})
        self._settled: Settled[InstanceState] = Settled()
        self._of_addresses = (self._base, self._addresses)

    def instance(self, partition: str) -> InstanceState:
        """The state of a partition; a free one when nothing is known."""
        path = f"{self._instances}/{partition}.json"
        # each pass of each lane asks for all of them, and hardly any has changed
        return self._settled.get(partition, (path,), None, partial(self._instance, partition))

    def _instance(self, partition: str) -> InstanceState:
        path = self._instances / f"{partition}.json"
        found = self._read(path)
        return InstanceState(partition) if found is None else _state(InstanceState, path, found)

    def partitions(self) -> list[str]:
        """All partitions of whose instance something is remembered, whether it can be read or not."""
        return sorted(path.stem for path in self._instances.glob("*.json"))

    def readable(self) -> tuple[dict[str, InstanceState], dict[str, PartitiondError]]:
        """All known instances whose states can be read, and what is wrong with the others, by partition."""
        states: dict[str, InstanceState] = {}
        damaged: dict[str, PartitiondError] = {}
        for name in self.partitions():
            try:
                states[name] = self.instance(name)
            except PartitiondError as error:
                damaged[name] = error
        return states, damaged

    def to_run(self) -> frozenset[str]:
        """The partitions whose programs, as far as supervisord has them, are to run.

        Also those of whom nothing can be read: a partition that is stopped, or destroyed, has no programs there any more.
        """
        states, damaged = self.readable()
        return frozenset((*damaged, *(name for name, state in states.items() if state.wanted == "started")))

    def save_instance(self, state: InstanceState) -> None:
        """Remember; a free partition is forgotten."""
        path = self._instances / f"{state.partition}.json"
        if state.life == "free":
            files.remove_path(path)
        else:
            self._write(path, dataclasses.asdict(state))

    def make_due(self, partition: str) -> None:
        """Let the next pass configure the instance and start it, whatever the master says of its timestamp.

        One that cannot be read stays as it is: moved away, as its hint says, it is due.
        """
        try:
            state = self.instance(partition)
        except PartitiondError:
            return
        if state.life != "free" and state.timestamp is not None:
            self.save_instance(replace(state, timestamp=None))

    def software(self, url: str) -> SoftwareState:
        """The state of a release."""
        path = self._software / f"{software_name(url)}.json"
        return self._release(path) or SoftwareState(url)

    def _release(self, path: Path) -> SoftwareState | None:
        found = self._read(path, _SOFTWARE_HINT)
        return None if found is None else _state(SoftwareState, path, found, _SOFTWARE_HINT)

    def softwares(self) -> list[SoftwareState]:
        """All known releases whose states can be read."""
        return self.readable_softwares()[0]

    def readable_softwares(self) -> tuple[list[SoftwareState], dict[str, PartitiondError]]:
        """All known releases whose states can be read, and what is wrong with the others, by their directories' names."""
        states: list[SoftwareState] = []
        damaged: dict[str, PartitiondError] = {}
        for path in sorted(self._software.glob("*.json")) if self._software.is_dir() else []:
            try:
                found = self._release(path)
            except PartitiondError as error:
                damaged[path.stem] = error
            else:
                states += [found] if found is not None else []
        return states, damaged

    def save_software(self, state: SoftwareState) -> None:
        """Remember a release."""
        self._write(self._software / f"{software_name(state.url)}.json", dataclasses.asdict(state))

    def base(self) -> IPv6Interface | None:
        """The address of which those of the partitions were derived last."""
        try:
            return IPv6Interface(self._base.read_text("ascii").strip())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _damaged(self._base, str(error)) from error

    def save_base(self, base: IPv6Interface | None) -> None:
        """Remember the base; nothing is written when it is the same."""
        if base is not None and base != self.base():
            files.write_path(self._base, f"{base}\n".encode(), mode=0o600)

    def addresses(self) -> Mapping[str, Kept]:
        """What is remembered of the partitions' addresses: of each that was in place once, where it was not natural.

        As long as the file is the same, so is the object.
        """
        mark = _mark(self._addresses)
        if mark != self._kept[0]:
            self._kept = (mark, _kept(self._addresses, self._read(self._addresses, _ADDRESSES_HINT) or {}))
        return self._kept[1]

    def save_addresses(self, kept: Mapping[str, Kept]) -> None:
        """Remember the addresses, and forget those of other partitions; nothing is written when they are the same."""
        if kept != self.addresses():
            partitions = {
                name: {key: str(value) for key in FIELDS if (value := getattr(one, key)) is not None}
                for name, one in kept.items()
            }
            self._write(self._addresses, {"partitions": partitions})

    def memory(self) -> dict[str, str | None]:
        """What the addresses of partitions hang on, by file: a trial that is taken back must not have changed it."""
        return {path.name: _text(path) for path in self._of_addresses}

    def restore(self, memory: Mapping[str, str | None]) -> None:
        """Remember again what :meth:`memory` gave."""
        for path in self._of_addresses:
            text = memory.get(path.name)
            if text is None:
                path.unlink(missing_ok=True)
            elif text != _text(path):
                files.write_path(path, text.encode(), mode=0o600)

    def forget_software(self, url: str) -> None:
        """Forget a release that was removed."""
        files.remove_path(self._software / f"{software_name(url)}.json")

    def _write(self, path: Path, value: dict[str, object]) -> None:
        files.make_directory(path.parent, 0o700)
        files.write_path(path, json.dumps(value, sort_keys=True).encode(), mode=0o600)

    def _read(self, path: Path, hint: str = _INSTANCE_HINT) -> dict[str, Any] | None:
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error), hint) from error
        if not isinstance(value, dict):
            raise _damaged(path, "is no object", hint)
        return value


def _mark(path: Path) -> object:
    """What changes whenever a file is replaced; None without one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _kept(path: Path, found: dict[str, Any]) -> dict[str, Kept]:
    """Decode what was read; fields of a later version are left out."""
    rows = found.get("partitions", {})
    if not isinstance(rows, dict):
        raise _damaged(path, "partitions is no object", _ADDRESSES_HINT)
    try:
        return {name: _kept_row(row) if row != {} else NATURAL for name, row in rows.items()}
    except ValueError as error:
        raise _damaged(path, str(error), _ADDRESSES_HINT) from error


def _kept_row(row: object) -> Kept:
    """Decode one partition. Raises ValueError."""
    if not isinstance(row, dict) or not all(isinstance(row.get(key, ""), str) for key in FIELDS):
        raise ValueError(f"{row!r} is no object of texts")
    values: dict[str, Any] = {key: PARSERS[key](row[key]) for key in FIELDS if key in row}
    return Kept(**values)


def _state(kind: type[State], path: Path, found: dict[str, Any], hint: str = _INSTANCE_HINT) -> State:
    """Make a state of what was read; keys of a later version are left out, so that one can go back."""
    known = {one.name: one for one in dataclasses.fields(kind)}
    try:
        value = kind(**{name: content for name, content in found.items() if name in known})
    except TypeError as error:
        raise _damaged(path, str(error), hint) from error
    for name, one in known.items():
        content, default = getattr(value, name), one.default
        wanted = str if default is dataclasses.MISSING else type(default)
        fits = isinstance(content, str | None) if default is None else isinstance(content, wanted)
        # JSON of other programs may have 0 for 0.0
        if not fits and not (wanted is float and type(content) is int):
            raise _damaged(path, f"{name} is {content!r}", hint)
    if isinstance(value, InstanceState) and value.life not in get_args(InstanceLife):
        raise _damaged(path, f"life is {value.life!r}")
    return value


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None


def _damaged(path: Path, why: str, hint: str = _INSTANCE_HINT) -> PartitiondError:
    return PartitiondError(
        "state.damaged",
        f"cannot be read: {why}",
        resource=str(path),
        hint=hint,
    )
