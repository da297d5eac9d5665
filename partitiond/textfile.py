"""Metrics for node_exporter's textfile collector: a file in a directory that it reads.

Promises: the file is there whole or as it was before; whoever reads it sees no half of it.  node_exporter reads files that end
in ``.prom`` and takes the text format 0.0.4 (:func:`partitiond.metrics_text.prometheus`), not OpenMetrics: a family of a type
that it does not know, ``info``, makes it refuse the whole file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import files
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Set

logger = logging.getLogger(__name__)


def write(path: Path, text: str) -> None:
    """Put the text into the file, which everybody may read (0644).  Raises OSError; then the file is as it was.

    Its directory must be root's own: it is where root writes.
    """
    # a dot in front, and another end: neither node_exporter nor anybody else takes it for the file
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = f".{path.name}.{secrets.token_hex(4)}.new"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(text.encode())
                stream.flush()
                os.fchmod(stream.fileno(), 0o644)
            os.replace(name, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            raise
    finally:
        os.close(directory)


class Textfile:
    """The file, written again after each pass of the meters; what goes wrong is said once, and again after it went well.

    Files that are there are remembered in ``memory``, so that none tells old values, whoever ended how: see :func:`remove`.
    """

    def __init__(self) -> None:
        self._failed = ""

    def update(self, memory: Path, path: Path | None, text: str) -> None:
        """Write it; None: none is wanted. Those that were written elsewhere are removed."""
        said = ""
        try:
            if path is not None:
                _remember(memory, {*remembered(memory), path})
                write(path, text)
        except (PartitiondError, OSError) as error:
            said = f"{path}: metrics are not written: {error}"
        try:
            _remove(memory, but=path)
        except (PartitiondError, OSError) as error:
            said = said or f"old metrics are not removed: {error}"
        if said and said != self._failed:
            logger.warning("[metrics.textfile] %s", said)
        self._failed = said


def memory_path(state_dir: Path) -> Path:
    """Where it is remembered which files are there."""
    return state_dir / "textfiles.json"


def remembered(memory: Path) -> frozenset[Path]:
    """Return the files that may be there."""
    try:
        found = json.loads(memory.read_bytes())
    except (FileNotFoundError, ValueError):
        return frozenset()
    return (
        frozenset(Path(one) for one in found if isinstance(one, str))
        if isinstance(found, list)
        else frozenset()
    )


def remove(memory: Path) -> None:
    """Remove what was written: nobody will write it anew.  Raises OSError."""
    _remove(memory, but=None)


def _remove(memory: Path, *, but: Path | None) -> None:
    for one in remembered(memory) - {but}:
        one.unlink(missing_ok=True)
        _remember(memory, remembered(memory) - {one})


def _remember(memory: Path, paths: Set[Path]) -> None:
    if not paths:
        files.remove_path(memory)
    elif paths != remembered(memory):
        files.write_path(memory, json.dumps(sorted(map(str, paths))).encode(), mode=0o600)
