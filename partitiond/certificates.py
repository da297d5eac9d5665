"""The X509 pair that the master gives for an instance, as files that only the partition's user can read.

Promises: key and certificate change together (:mod:`partitiond.pair_files`), and only for a pair that fits; a master that gives
none, or a bad one, takes nothing away. They are written only when they changed, and go with the instance.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING

from partitiond import pair_files
from partitiond.errors import FAMILY, PartitiondError, sentence
from stunnel_mgr.errors import TunnelError
from stunnel_mgr.render import IdentityFiles

if TYPE_CHECKING:
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.node import Partition
    from slap_client.documents import CertificatePair

logger = logging.getLogger(__name__)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)  # when what is no certificate ends
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


@dataclass(frozen=True, slots=True)
class Note:
    """What root knows of a pair: whose it is, and when it ends; of empty files ``fingerprint`` is empty."""

    guid: str
    fingerprint: str
    not_after: datetime


def place(config: Config, partition: Partition) -> pair_files.Place | None:
    """Where the pair lies, or None where the node has no certificate repository."""
    repository = config.certificate_repository
    if repository is None:
        return None
    return _place(repository, partition.id, (partition.uid, partition.gid))


def _place(repository: Path, name: str, owner: tuple[int, int] = (0, 0)) -> pair_files.Place:
    return pair_files.Place(repository, name, f"{name}.key", f"{name}.crt", owner=owner)


def paths(config: Config, partition: Partition) -> tuple[Path, Path] | None:
    """Where software finds (key, certificate), or None where the node has no certificate repository."""
    where = place(config, partition)
    return (where.directory / where.key, where.directory / where.certificate) if where else None


def note(config: Config, partition: Partition) -> Note | None:
    """What is known of the pair without reading what is the tenant's; None where nothing is.

    Raises OSError, PartitiondError.
    """
    where = place(config, partition)
    return _note(pair_files.about(where)) if where else None


def fetch(context: Context, partition: Partition) -> bool:
    """Ask the master for the pair and write it where it changed; whether it did.

    What the master does not give, or gives in a form that is of no use, leaves the present pair in force as long as that is
    this instance's and has not ended. Raises SlapError, PartitiondError ``certificate.refused``, OSError where it is not.
    """
    where = place(context.config, partition)
    if where is None:
        return False
    guid = context.store.instance(partition.id).instance_guid or ""
    present = _present(where, partition)
    known = _note(present.about) if present else None
    good = known is not None and known.guid == guid and known.not_after > datetime.now(UTC)
    try:
        following = _received(partition, context.client.partition_certificate(partition.id), guid)
        if good and (not following.key or _ended(following)):
            what = "no pair any more" if not following.key else "a pair that has ended"
            raise _refused(partition, f"the master gives {what}")
    except FAMILY as error:
        if not good:
            raise
        # the instance can work with what it has; its next processing, and the daily look before the end, ask again
        logger.warning("%s: keeps its present pair: %s", partition.id, sentence(error))
        return False
    if following == present:
        return False
    where.directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    # whoever looks at the node sees both or none
    with context.applying:
        pair_files.write(where, following)
    return present is None or present.certificate != following.certificate


def _present(where: pair_files.Place, partition: Partition) -> pair_files.Found | None:
    """The pair as it lies there. It is the tenant's, who may have changed it, made it endless or taken a lease on it."""
    try:
        return pair_files.read(where, reader=partition.uid)
    except PartitiondError:
        return None


def _received(partition: Partition, pair: CertificatePair, guid: str) -> pair_files.Found:
    """The master's answer, checked; slapproxy gives two empty texts, which become empty files, as with slapos.core."""
    key, certificate = pair.key.encode(), pair.certificate.encode()
    if not key and not certificate:
        return pair_files.Found(b"", b"", _about(Note(guid, "", _EPOCH)))
    try:
        checked = _checked(certificate, key)
    except TunnelError as error:
        raise _refused(partition, f"the pair that the master gives is of no use: {error}") from error
    return pair_files.Found(
        key, certificate, _about(Note(guid, checked.files.fingerprint, checked.not_after))
    )


def _ended(pair: pair_files.Found) -> bool:
    found = _note(pair.about)
    return found is None or found.not_after <= datetime.now(UTC)


def _refused(partition: Partition, reason: str) -> PartitiondError:
    hint = "have the master's operator renew the instance's certificate; it is asked for again"
    return PartitiondError("certificate.refused", reason, resource=partition.id, hint=hint, retryable=True)


def _about(known: Note) -> bytes:
    value = {
        "instance": known.guid,
        "fingerprint": known.fingerprint,
        "not_after": known.not_after.isoformat(),
    }
    return json.dumps(value, sort_keys=True).encode()


def _note(content: bytes) -> Note | None:
    """Read root's own note; one that cannot be read is none, and the pair is asked for again."""
    try:
        value = json.loads(content)
        return Note(
            value["instance"],
            value["fingerprint"],
            datetime.fromisoformat(value["not_after"]).astimezone(UTC),
        )
    except (ValueError, TypeError, KeyError):
        return None


def read_pair(config: Config, partition: Partition) -> MasterPair:
    """Read the pair for stunnel, which gets a copy: the files are the tenant's, who may change them at any moment.

    Raises PartitiondError ``tunnel.no_pair`` where there is none, or none of use.
    """
    where = place(config, partition)
    if where is None:
        raise _no_pair(partition, "the node keeps no pairs", "set certificate_repository_path in [slapos]")
    try:
        found = pair_files.read(where, reader=partition.uid)
        if found is not None and found.key:
            return _checked(found.certificate, found.key)
    except (PartitiondError, TunnelError, OSError) as error:
        hint = "remove the two files and run partitiond sync instances --force"
        raise _no_pair(partition, f"the pair of the instance is of no use: {error}", hint) from error
    hint = "it comes with the instance: partitiond sync instances --force"
    raise _no_pair(partition, "the master gave no pair for this instance", hint)


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


def remove(context: Context, partition: Partition) -> None:
    """Remove the pair of an instance that is destroyed."""
    where = place(context.config, partition)
    if where is not None:
        pair_files.remove(where)


def purge(config: Config) -> None:
    """Remove the pairs of all partitions that there are or ever were: the next user of the number would have the key.

    Raises OSError, PartitiondError.
    """
    repository = config.certificate_repository
    if repository is None:
        return
    name = re.compile(rf"\.?({re.escape(config.partition_base)}[0-9]+)(?:\.key|\.crt|\.pair|-[0-9a-f]{{12}})")
    try:
        found = {match[1] for one in os.listdir(repository) if (match := name.fullmatch(one))}  # noqa: PTH208 - names suffice
    except FileNotFoundError:
        return
    for one in sorted(found):
        pair_files.remove(_place(repository, one))
