"""Usage files that were refused: what they held and why, in a directory of root's, bounded for each partition.

``state_dir/refused-usage/<partition>/<time>-<number>.xml`` is the begin of a file's content, ``.json`` beside it says why.
Both are on the disk before the file is removed from the partition.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitiond import files
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MOST_KEPT = 20
KEPT_BYTES = 48 * 1024
"""Of one file: all that are kept of a partition stay below a mebibyte."""
_MOST_LISTED = 10_000
_SHOWN = 100
_STEM = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Refused:
    """One file that is not reported; ``name`` is fit for every log.

    ``once`` names something that stays where it is, and is told once.
    """

    name: str
    reason: str
    content: bytes = b""
    size: int | None = None
    once: str | None = None


def plain(name: str) -> str:
    """A tenant's name of a file, in ASCII and not too long."""
    return ascii(name[:_SHOWN])[1:-1][: 2 * _SHOWN] + ("..." if len(name) > _SHOWN else "")


def directory(state_dir: Path, partition: str) -> Path:
    """Where those of a partition are."""
    return state_dir / "refused-usage" / partition


def keep(state_dir: Path, partition: str, guid: str, refused: Sequence[Refused]) -> tuple[Refused, ...]:
    """Keep the last ones, durably; return those that were not told before. Raises PartitiondError ``usage.not_kept``."""
    if not refused:
        return ()
    place = directory(state_dir, partition)
    try:
        place.parent.mkdir(mode=0o700, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)
        with files.directory(place) as here:
            known = frozenset(files.names(here, _MOST_LISTED))
            new = tuple(one for one in refused if one.once is None or f"{one.once}.json" not in known)
            for one in new[-MOST_KEPT:]:
                _write(here, guid, one)
            if new:
                _forget(here)
                files.flush(here)
            return new
    except OSError as error:
        raise PartitiondError(
            "usage.not_kept",
            f"refused usage files cannot be kept: {error.strerror}",
            resource=str(place),
            hint="they stay in the partition until they can be",
            retryable=True,
        ) from error


def _write(here: int, guid: str, one: Refused) -> None:
    now = time.time()
    stem = one.once or f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}-{secrets.token_hex(4)}"
    text = {"time": now, "instance_guid": guid, "file": one.name, "size": one.size, "reason": one.reason}
    if one.content:
        files.write(f"{stem}.xml", one.content[:KEPT_BYTES], dir_fd=here, mode=0o600)
    files.write(f"{stem}.json", json.dumps(text).encode(), dir_fd=here, mode=0o600)


def _forget(here: int) -> None:
    """Remove all but the newest, of what was removed and of what stays where it is: else that would be told again."""
    names = files.names(here, _MOST_LISTED)
    ages = {name: os.stat(name, dir_fd=here, follow_symlinks=False).st_mtime_ns for name in names}
    reasons = sorted((name for name in names if name.endswith(".json")), key=ages.__getitem__, reverse=True)
    stems = [name.removesuffix(".json") for name in reasons]
    kept = {stem for of_a_file in (True, False) for stem in _newest(stems, of_a_file=of_a_file)}
    for name in names:
        if name.rpartition(".")[0] not in kept:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=here)


def _newest(stems: Sequence[str], *, of_a_file: bool) -> list[str]:
    return [stem for stem in stems if bool(_STEM.fullmatch(stem)) == of_a_file][:MOST_KEPT]
