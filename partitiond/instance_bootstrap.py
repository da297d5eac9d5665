"""Which buildout configures an instance: that of its release, or one that is bootstrapped into the partition's ``sbin``.

As slapgrid (slapos.core 1.26) finds it: a release with one ``bin/bootstrap*`` bootstraps by that, a release without
``bin/buildout`` by the node's own buildout, and all others, which is nearly every one, are run by their ``bin/buildout``.
"""

from __future__ import annotations

import os
import pwd
import sys
from typing import TYPE_CHECKING

from partitiond import files
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.node import Partition

_MOST_NAMES = 10_000
_SCRIPT_LIMIT = 1 << 20
_OWN = "import sys; from zc.buildout.buildout import main; sys.argv[0] = 'buildout'; main()"


def command(config: Config, partition: Partition, directory: Path) -> list[str]:
    """What bootstraps an instance of the release in ``directory``; empty where the release's own buildout does without.

    Raises PartitiondError ``instance.bootstrap``, ``files.refused``, ``files.not_a_directory``, OSError.
    """
    owner = pwd.getpwnam(config.software_user).pw_uid
    try:
        with files.directory(config.software_root, directory.name, "bin") as descriptor:
            names = files.names(descriptor, _MOST_NAMES)
            found = [name for name in names if name.startswith("bootstrap")]
            if len(found) > 1:
                raise PartitiondError(
                    "instance.bootstrap",
                    f"the software release has more than one bin/bootstrap*: {', '.join(map(ascii, found[:3]))}",
                    resource=partition.id,
                    hint=f"look into {directory / 'bin'}",
                )
            if found:
                script = files.read(found[0], dir_fd=descriptor, limit=_SCRIPT_LIMIT, reader=owner)
                return [*_interpreter(script), str(directory / "bin" / found[0])]
    except FileNotFoundError:
        names = []
    if "buildout" in names:
        return []
    target = f"buildout:bin-directory={partition.path / 'sbin'}"
    return [sys.executable, "-I", "-W", "ignore", "-c", _OWN, "-U", target, "bootstrap"]


def _interpreter(script: bytes) -> list[str]:
    """The words of its first line: what the kernel would run it by, had it the permission and the line no bound."""
    first = script.partition(b"\n")[0]
    return os.fsdecode(first[2:]).split() if first.startswith(b"#!") else []
