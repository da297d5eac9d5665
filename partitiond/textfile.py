"""Metrics for node_exporter's textfile collector: a file in a directory that it reads.

Promises: the file is there whole or as it was before; whoever reads it sees no half of it.  node_exporter reads files that end
in ``.prom`` and takes the text format 0.0.4 (:func:`partitiond.metrics_text.prometheus`), not OpenMetrics: a family of a type
that it does not know, ``info``, makes it refuse the whole file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

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
    """The file, written again after each pass of the meters; what goes wrong is said once, and again after it went well."""

    def __init__(self) -> None:
        self._failed = ""
        self._left: set[Path] = set()

    def update(self, path: Path | None, text: str) -> None:
        """Write it; None: none is wanted, and those that were written are removed, else they would tell old values."""
        for other in {one for one in self._left if one != path}:
            with contextlib.suppress(FileNotFoundError):
                other.unlink()
            self._left.discard(other)
        if path is None:
            return
        try:
            write(path, text)
        except OSError as error:
            said = f"{path}: metrics are not written: {error.strerror or error}"
            if said != self._failed:
                logger.warning("[metrics.textfile] %s", said)
            self._failed = said
        else:
            self._left.add(path)
            self._failed = ""
