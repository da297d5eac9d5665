"""Tunnel identities: the self-signed certificate and key by which each partition's tunnels are known.

Promises: the key can be read by the partition's user alone and lies in a directory of root's; half a pair is never taken for
a whole one; no master and no authority is needed; before one ends, its successor lies beside it and is published, and which
of the two is shown follows from their dates alone.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from netplan.once import once_each
from partitiond import files
from partitiond.operation import Operation
from partitiond.settled import Settled
from stunnel_mgr.errors import TunnelError
from stunnel_mgr.render import IdentityFiles
from stunnel_mgr.validity import Validity, read_validity, shown_first

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.node import Partition

SLOTS = (("certificate.pem", "key.pem"), ("certificate-2.pem", "key-2.pem"))
"""Names of certificate and key. A successor goes where the one that is shown is not, so that nothing in use is written over."""

_KEY_MODE = 0o400

_read: Settled[tuple[Certificate, ...]] = Settled()


def directory_of(config: Config, partition: str) -> Path:
    """Where identity, pins and configuration of a partition's tunnels lie."""
    return _directory(config.state_dir, partition)


@lru_cache(maxsize=4096)
def _directory(state_dir: Path, partition: str) -> Path:
    # asked for several times a pass for each partition, and joining paths is what a pass would spend most of its time with
    return state_dir / "tunnels" / partition


@dataclass(frozen=True, slots=True)
class Certificate:
    """One certificate that has its key beside it, and the slot that it lies in.

    ``renewal`` is when a successor is due. ``loose``: the key's mode is another than we gave it. It is its owner's, who may
    change that, and it lies where nobody else comes to.
    """

    slot: int
    pem: str
    base64: str
    fingerprint: str
    validity: Validity
    renewal: datetime
    loose: bool = False


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """What others may know of a partition's identity: the certificate that is shown, and the one to come or the one before."""

    shown: Certificate
    coming: Certificate | None = None
    gone: Certificate | None = None

    @property
    def known(self) -> tuple[Certificate, ...]:
        """All by which the partition may be named, or have begun a session."""
        return tuple(one for one in (self.shown, self.coming, self.gone) if one)


@dataclass(frozen=True, slots=True)
class IdentityOperation(Operation):
    """Make a partition's identity, or its successor in the other slot; or ``closes`` its key again."""

    owner: Partition
    slot: int = 0
    closes: bool = False


def files_of(identity: PublicIdentity) -> IdentityFiles:
    """Where stunnel finds what a partition shows."""
    return IdentityFiles(*SLOTS[identity.shown.slot], identity.shown.fingerprint)


def choose(pairs: Iterable[Certificate], now: datetime) -> PublicIdentity | None:
    """Which of the pairs that are there is shown at ``now`` (aware); None where there is none."""
    ordered = sorted(pairs, key=lambda one: one.validity.not_before)
    # one from a time when the clock was ahead is of no use; where all are, it is the clock that is behind
    begun = [one for one in ordered if one.validity.not_before <= now] or ordered[:1]
    if not begun:
        return None
    if len(begun) == 1:
        return PublicIdentity(begun[0])
    old, new = begun
    if shown_first(old.validity, new.validity, now):
        return PublicIdentity(old, coming=new)
    return PublicIdentity(new, gone=old)


def certificates(published: Iterable[PublicIdentity | None]) -> dict[str, str]:
    """By each fingerprint that names a partition's identity all its certificates (PEM, one after the other).

    The one before a rotation among them, also when it has ended: to take it away would cut who began with it.
    """
    return {
        name.fingerprint: "".join(one.pem for one in identity.known)
        for identity in published
        if identity
        for name in identity.known
    }


def read(config: Config, partition: Partition, now: datetime | None = None) -> PublicIdentity | None:
    """Read what is published; None when it is missing or damaged. Cheap: no key is parsed."""
    return choose(_pairs(config, partition), now or datetime.now(UTC))


def _pairs(config: Config, partition: Partition) -> tuple[Certificate, ...]:
    directory = directory_of(config, partition.id)
    found = (_pair(directory, slot, partition.uid) for slot in range(len(SLOTS)))
    return tuple(one for one in found if one)


def _pair(directory: Path, slot: int, uid: int) -> Certificate | None:
    certificate, key_name = SLOTS[slot]
    try:
        with open(f"{directory}/{certificate}", "rb", buffering=0) as stream:
            published = _published(stream.read().decode("ascii"), slot)
        key = os.lstat(f"{directory}/{key_name}")
    except (OSError, ValueError, TunnelError):
        return None
    if not stat.S_ISREG(key.st_mode) or key.st_uid != uid or not key.st_size:
        return None
    return published if stat.S_IMODE(key.st_mode) == _KEY_MODE else replace(published, loose=True)


@lru_cache(maxsize=4096)
def _published(pem: str, slot: int) -> Certificate:
    """Derive from a certificate what others may know. Raises ValueError, TunnelError."""
    import ssl  # noqa: PLC0415 - only where identities are looked at
    from base64 import b64encode  # noqa: PLC0415

    der = ssl.PEM_cert_to_DER_cert(pem)
    validity = read_validity(der)
    fingerprint = "sha256:" + hashlib.sha256(der).hexdigest()
    return Certificate(slot, pem, b64encode(der).decode(), fingerprint, validity, validity.renewal)


def observe(config: Config, partitions: Iterable[Partition]) -> dict[str, PublicIdentity | None]:
    """Read what partitions publish, by partition."""
    now = datetime.now(UTC)
    return {
        item.id: choose(
            _read.get(*_files_of(item, config.state_dir), item.uid, partial(_pairs, config, item)), now
        )
        for item in partitions
    }


@once_each
def _files_of(item: Partition, state_dir: Path) -> tuple[str, tuple[str, ...]]:
    # a file that comes or goes, or is replaced as we do it, changes the directory: the second slot, mostly empty, needs no look
    directory = str(_directory(state_dir, item.id))
    return directory, (directory, *(f"{directory}/{name}" for name in SLOTS[0]))


def plan(
    partitions: Iterable[Partition],
    published: Mapping[str, PublicIdentity | None],
    now: datetime | None = None,
) -> tuple[IdentityOperation, ...]:
    """Which identities must be made or need a successor at ``now`` (aware); ``published`` are those that are there."""
    moment = now or datetime.now(UTC)
    operations = []
    for partition in partitions:
        identity = published[partition.id]
        if identity is None:
            operations.append(_operation(partition, None, "missing or damaged"))
        elif loose := next((one for one in identity.known if one.loose), None):
            reason = "the mode of its key was changed"
            operations.append(replace(_operation(partition, loose, reason), slot=loose.slot, closes=True))
        elif identity.coming is None and moment >= identity.shown.renewal:
            ends = identity.shown.validity.not_after
            reason = f"ends on {ends:%Y-%m-%d}; its successor is published beside it until halfway there, then shown"
            operations.append(_operation(partition, identity.shown, reason))
    return tuple(operations)


def _operation(partition: Partition, shown: Certificate | None, reason: str) -> IdentityOperation:
    return IdentityOperation(
        id=f"identity/{partition.id}",
        resource="identity",
        action="change" if shown else "create",
        partition=partition.id,
        before=shown.fingerprint if shown else None,
        after="a self-signed P-256 certificate",
        reason=reason,
        owner=partition,
        slot=1 - shown.slot if shown else 0,
    )


def make(config: Config, partition: Partition, slot: int = 0) -> None:
    """Make a new identity; the certificate is written last, so that half a pair is never taken for a whole one.

    Durably: others are about to be told its fingerprint, and one that a power cut took could never be made again.
    """
    from stunnel_mgr.identity import make_identity as generate  # noqa: PLC0415 - cryptography is slow to import

    identity = generate(partition.id)
    directory = directory_of(config, partition.id)
    certificate, key = SLOTS[slot]
    (directory / certificate).unlink(missing_ok=True)
    with files.directory(directory) as descriptor:
        owner = (partition.uid, partition.gid)
        files.write(key, identity.key_pem, dir_fd=descriptor, mode=_KEY_MODE, owner=owner, durable=True)
        files.write(certificate, identity.certificate_pem, dir_fd=descriptor, mode=0o444, durable=True)


def close(config: Config, partition: Partition, slot: int) -> None:
    """Let a key be readable by its owner alone again. Raises OSError."""
    with files.directory(directory_of(config, partition.id)) as descriptor:
        # root's directory: nothing else can be in its place
        os.chmod(SLOTS[slot][1], _KEY_MODE, dir_fd=descriptor)


def remove(config: Config, partition: Partition) -> None:
    """Remove identity, pins and configuration: the next instance of the partition is somebody else."""
    directory = directory_of(config, partition.id)
    if directory.is_dir():
        with files.directory(directory) as descriptor:
            files.empty(descriptor)
