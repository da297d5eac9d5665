"""The X509 pair that the master gives for an instance, as files that only the partition's user can read."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from partitiond import files
from partitiond.errors import PartitiondError
from stunnel_mgr.errors import TunnelError
from stunnel_mgr.render import IdentityFiles

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.node import Partition

_LIMIT = 16 * 1024
_COPY = re.compile(r"^cert = /.*/(master-[0-9a-f]{32})\.crt$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class MasterPair:
    """The pair of an instance, checked: the names that copies of it have for stunnel, their content, and when it ends.

    ``stale`` says why it is the copy that stunnel has, and not what lies in the repository now.
    """

    files: IdentityFiles
    certificate: bytes
    key: bytes = field(repr=False)
    not_after: datetime
    stale: str = ""


def paths(config: Config, partition: Partition) -> tuple[Path, Path] | None:
    """Where (key, certificate) lie, or None where the node has no certificate repository."""
    repository = config.certificate_repository
    if repository is None:
        return None
    return repository / f"{partition.id}.key", repository / f"{partition.id}.crt"


def fetch(context: Context, partition: Partition) -> None:
    """Ask the master for the pair and write it where it changed. Raises SlapError, OSError."""
    where = paths(context.config, partition)
    if where is None:
        return
    pair = context.client.partition_certificate(partition.id)
    where[0].parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    # whoever looks at the node sees both or none
    with context.applying:
        for path, text in zip(where, (pair.key, pair.certificate), strict=True):
            content = text.encode()
            if not _holds(path, content):
                files.write_path(path, content, mode=0o400, owner=(partition.uid, partition.gid))


def read_pair(config: Config, partition: Partition) -> MasterPair:
    """Read the pair for stunnel, which gets a copy: the files are the tenant's, who may change them at any moment.

    Raises PartitiondError ``tunnel.no_pair`` where there is none, or none of use.
    """
    where = paths(config, partition)
    if where is None:
        raise _no_pair(partition, "the node keeps no pairs", "set certificate_repository_path in [slapos]")
    try:
        with files.directory(where[0].parent) as descriptor:
            key, certificate = (
                files.read(path.name, dir_fd=descriptor, limit=_LIMIT, reader=partition.uid) for path in where
            )
        return _checked(certificate, key)
    except FileNotFoundError as error:
        hint = "it comes with the instance: partitiond sync instances --force"
        raise _no_pair(partition, "the master gave no pair for this instance", hint) from error
    except (PartitiondError, TunnelError, OSError) as error:
        hint = "remove the two files and run partitiond sync instances --force"
        raise _no_pair(partition, f"the pair of the instance is of no use: {error}", hint) from error


def read_copy(directory: Path, configuration: str, stale: str) -> MasterPair | None:
    """The copy that a stunnel runs with, by its configuration; None where it has none of use."""
    found = _COPY.search(configuration)
    if found is None:
        return None
    try:
        certificate, key = ((directory / f"{found[1]}.{kind}").read_bytes() for kind in ("crt", "key"))
        return replace(_checked(certificate, key), stale=stale)
    except (OSError, TunnelError):
        return None


@lru_cache(maxsize=512)
def _checked(certificate: bytes, key: bytes) -> MasterPair:
    from stunnel_mgr.identity import load_identity  # noqa: PLC0415 - cryptography is slow to import

    found = load_identity(certificate, key)
    # by all of its content: a chain may be renewed without its certificate
    digest = hashlib.sha256(found.certificate_pem + found.key_pem).hexdigest()[:32]
    names = IdentityFiles(f"master-{digest}.crt", f"master-{digest}.key", found.fingerprint)
    return MasterPair(names, found.certificate_pem, found.key_pem, found.not_after)


def _no_pair(partition: Partition, reason: str, hint: str) -> PartitiondError:
    return PartitiondError("tunnel.no_pair", reason, resource=partition.id, hint=hint)


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file has that content. It is the tenant's, who may have changed it, made it endless or taken a lease on it."""
    try:
        with files.directory(path.parent) as descriptor:
            return files.read(path.name, dir_fd=descriptor, limit=len(content)) == content
    except (FileNotFoundError, PartitiondError):
        return False


def remove(context: Context, partition: Partition) -> None:
    """Remove the pair of an instance that is destroyed."""
    for path in paths(context.config, partition) or ():
        path.unlink(missing_ok=True)
