"""Tunnel identities: the self-signed certificate and key by which each partition's tunnels are known.

Promises: the key can be read by the partition's user alone and lies in a directory of root's; half a pair is never taken for
a whole one; no master and no authority is needed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from netplan.once import once_each
from partitiond import files
from partitiond.operation import Operation
from partitiond.settled import Settled
from stunnel_mgr import render

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.node import Partition

_read: Settled[PublicIdentity | None] = Settled()

CERTIFICATE_FILE, KEY_FILE = render.IDENTITY_FILES["partition"]


def directory_of(config: Config, partition: str) -> Path:
    """Where identity, pins and configuration of a partition's tunnels lie."""
    return _directory(config.state_dir, partition)


@lru_cache(maxsize=4096)
def _directory(state_dir: Path, partition: str) -> Path:
    # asked for several times a pass for each partition, and joining paths is what a pass would spend most of its time with
    return state_dir / "tunnels" / partition


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """What others may know of a partition's identity."""

    certificate_pem: str
    certificate_base64: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class IdentityOperation(Operation):
    """Make a partition's identity."""

    owner: Partition


def read(config: Config, partition: Partition) -> PublicIdentity | None:
    """Read what is published; None when it is missing or damaged. Cheap: no key is parsed."""
    directory = directory_of(config, partition.id)
    try:
        with open(f"{directory}/{CERTIFICATE_FILE}", "rb", buffering=0) as stream:
            published = _published(stream.read().decode("ascii"))
        key = os.lstat(f"{directory}/{KEY_FILE}")
    except (OSError, ValueError):
        return None
    if (
        not stat.S_ISREG(key.st_mode)
        or (key.st_uid, stat.S_IMODE(key.st_mode)) != (partition.uid, 0o400)
        or not key.st_size
    ):
        return None
    return published


@lru_cache(maxsize=4096)
def _published(pem: str) -> PublicIdentity:
    """Derive from a certificate what others may know. Raises ValueError."""
    import ssl  # noqa: PLC0415 - only where identities are looked at
    from base64 import b64encode  # noqa: PLC0415

    der = ssl.PEM_cert_to_DER_cert(pem)
    return PublicIdentity(pem, b64encode(der).decode(), "sha256:" + hashlib.sha256(der).hexdigest())


def observe(config: Config, partitions: Iterable[Partition]) -> dict[str, PublicIdentity | None]:
    """Read what partitions publish, by partition."""
    return {
        item.id: _read.get(*_files_of(item, config.state_dir), item.uid, partial(read, config, item))
        for item in partitions
    }


@once_each
def _files_of(item: Partition, state_dir: Path) -> tuple[str, tuple[str, str]]:
    directory = str(_directory(state_dir, item.id))
    return directory, (f"{directory}/{CERTIFICATE_FILE}", f"{directory}/{KEY_FILE}")


def plan(
    partitions: Iterable[Partition], published: Mapping[str, PublicIdentity | None]
) -> tuple[IdentityOperation, ...]:
    """Which identities must be made; ``published`` are those that are there."""
    return tuple(
        IdentityOperation(
            id=f"identity/{partition.id}",
            resource="identity",
            action="create",
            partition=partition.id,
            before=None,
            after="a self-signed P-256 certificate",
            reason="missing, damaged or readable by others",
            owner=partition,
        )
        for partition in partitions
        if published[partition.id] is None
    )


def make(config: Config, partition: Partition) -> None:
    """Make a new identity; the certificate is written last, so that half a pair is never taken for a whole one.

    Durably: others are about to be told its fingerprint, and one that a power cut took could never be made again.
    """
    from stunnel_mgr.identity import make_identity as generate  # noqa: PLC0415 - cryptography is slow to import

    identity = generate(partition.id)
    directory = directory_of(config, partition.id)
    (directory / CERTIFICATE_FILE).unlink(missing_ok=True)
    with files.directory(directory) as descriptor:
        owner = (partition.uid, partition.gid)
        files.write(KEY_FILE, identity.key_pem, dir_fd=descriptor, mode=0o400, owner=owner, durable=True)
        files.write(CERTIFICATE_FILE, identity.certificate_pem, dir_fd=descriptor, mode=0o444, durable=True)


def remove(config: Config, partition: Partition) -> None:
    """Remove identity, pins and configuration: the next instance of the partition is somebody else."""
    directory = directory_of(config, partition.id)
    if directory.is_dir():
        with files.directory(directory) as descriptor:
            files.empty(descriptor)
