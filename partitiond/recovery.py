"""What a partitiond that was killed left in the file system and no plan looks for.

Whatever is half done the next plan finds, but not the temporary file beside a file that is as it should be, nor the rest of a
tree whose removal had begun. These are looked for when the lock says that its last holder never came to an end, and only then:
a node at rest pays nothing for it.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import build_keeper, files, lock, messages
from partitiond.errors import PartitiondError, sentence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from partitiond.config import Config

USER_DATABASE = Path("/etc")

logger = logging.getLogger(__name__)


@contextmanager
def exclusive(config: Config, what: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the node's lock and begin with a clean slate. Raises PartitiondError ``node.busy``."""
    with lock.exclusive(config.state_dir, what, wait=wait) as cut_off:
        if cut_off:
            remove_leftovers(config)
        yield


def remove_leftovers(config: Config) -> None:
    """Remove them everywhere; what cannot be removed is logged and stays."""
    for root in (config.instance_root, config.state_dir, config.log_dir, config.run_dir):
        _remove(root, trees=True)
    for directory in (
        USER_DATABASE,
        config.instance_root / "etc",
        config.instance_root / "etc" / "supervisord.conf.d",
        config.state_dir / "instances",
        config.state_dir / "software",
        config.state_dir / messages.DIRECTORY,
        *filter(None, (config.certificate_repository,)),
    ):
        _remove(directory)
    for parent in (config.instance_root, config.state_dir / "tunnels"):
        for name in _directories(parent):
            _remove(parent, name)
    try:
        with build_keeper.idle(config) as nobody:
            if nobody:
                _remove_of_builds(config)
    except OSError as error:
        logger.warning("left over from a partitiond that was killed: %s", sentence(error))


def _remove_of_builds(config: Config) -> None:
    """Where builds write, too: one that outlived its daemon may be about to give such a file its name."""
    _remove(config.software_root, trees=True)
    _remove(build_keeper.Places.of(config).outcomes)
    for name in _directories(config.software_root):
        _remove(config.software_root, name)


def _remove(root: Path, *below: str, trees: bool = False) -> None:
    try:
        with files.directory(root, *below) as descriptor:
            files.remove_leftovers(descriptor, trees=trees)
    except FileNotFoundError:
        return
    except (PartitiondError, OSError) as error:
        logger.warning("left over from a partitiond that was killed: %s", sentence(error))


def _directories(parent: Path) -> list[str]:
    try:
        return sorted(one.name for one in parent.iterdir() if one.is_dir() and not one.is_symlink())
    except FileNotFoundError:
        return []
