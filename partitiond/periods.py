"""How often an instance is configured again although nothing changed: what its release says, else ``maximum_periodicity``.

As in slapgrid (slapos.core 1.26): an integer in ``<software>/periodicity``, in seconds; negative: never.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from partitiond import buildout, files
from partitiond.errors import FAMILY, sentence
from partitiond.settled import Settled

if TYPE_CHECKING:
    from partitiond.config import Config

logger = logging.getLogger(__name__)

FILE = "periodicity"
_LIMIT = 64
# read again when a file changed, and so warned of once
_READ: Settled[int | None] = Settled()


class Periods:
    """The periods of releases, each looked at once in a pass."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._known: dict[str, int] = {}

    def __call__(self, url: str) -> int:
        """Seconds after which an instance of a release is due; negative: never."""
        if url not in self._known:
            path = buildout.software_directory(self._config, url) / FILE
            found = _READ.get(str(path), (str(path),), None, lambda: _read(self._config, path.parent.name))
            self._known[url] = self._config.maximum_periodicity if found is None else found
        return self._known[url]


def _read(config: Config, name: str) -> int | None:
    """What a release says; None where it says nothing, or nothing of use, which is logged."""
    try:
        with files.directory(config.software_root, name) as descriptor:
            text = files.read(FILE, dir_fd=descriptor, limit=_LIMIT)
        return int(text)
    except FileNotFoundError:
        return None
    except (*FAMILY, OSError, ValueError) as error:
        logger.warning("%s/%s is not heeded: %s", config.software_root / name, FILE, sentence(error))
        return None
