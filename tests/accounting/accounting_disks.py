"""File systems on loop devices; where there are none, the tests that need one are skipped."""

import contextlib
import os
import subprocess

from device_loops import Disk

MAKE = {"ext4": ("mkfs.ext4", "-q", "-O", "^has_journal"), "btrfs": ("mkfs.btrfs", "-q", "-m", "single")}


@contextlib.contextmanager
def mounted(kind, directory, megabytes=16):
    """Make a file system in a file of ``directory`` and mount it there."""
    backing, top = directory / "disk", directory / "top"
    backing.touch()
    os.truncate(backing, megabytes << 20)
    top.mkdir()
    with contextlib.ExitStack() as stack:
        disk = Disk(backing)
        stack.callback(disk.close)
        subprocess.run([*MAKE[kind], str(disk.node)], check=True)
        subprocess.run(["/bin/mount", "-t", kind, str(disk.node), str(top)], check=True)
        stack.callback(subprocess.run, ["/bin/umount", str(top)], check=True)
        yield top
