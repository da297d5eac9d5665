"""Software releases: built as the software user, in place, with what a published zc.buildout needs beyond slapgrid's contract
(links to eggs without metadata, no index: ``docs/design/software-releases.md``).
"""

from __future__ import annotations

import contextlib
import email
import os
import pwd
import re
import sys
import time
from typing import TYPE_CHECKING

from partitiond import buildout, execute, files
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.context import Context

# what build steps, as the software user, may have put there is not taken for more than it can be
_MOST_EGGS = 10_000
_EGG = re.compile(r"[A-Za-z0-9_.+!-]+\.egg")
_PROJECT = re.compile(r"[A-Za-z0-9_.-]+")
# slapgrid copies the user's .netrc into each software; ours reads the one of the software user's home itself
_COMPILE = "import compileall, sys; compileall.compile_dir(sys.argv[1], quiet=2, workers=1)"


def software_profile(config: Config, url: str) -> str:
    """The ``buildout.cfg`` of a release: the release's own URL first, then what this node adds."""
    lines = ["[buildout]", f"extends = {url}"]
    if buildout.wheels().is_dir():
        lines.append(f"find-links += {buildout.wheels()}")
    if config.offline_builds:
        lines += [f"index = {buildout.NO_INDEX}", "allow-hosts ="]
    if config.shared_part_list:
        lines.append("shared-part-list =\n  " + "\n  ".join(config.shared_part_list.split()))
    return "\n".join(lines) + "\n"


def build_software(context: Context, url: str) -> None:
    """Build a release in place, as the software user.

    Raises PartitiondError ``software.build`` with the end of the log, or OSError.
    """
    config = context.config
    directory = buildout.software_directory(config, url)
    owner = pwd.getpwnam(config.software_user)
    _prepare(config, url, (owner.pw_uid, owner.pw_gid))
    options = ["-U", "-N", "-c", "buildout.cfg", f"buildout:directory={directory}"]
    start = "import sys; from zc.buildout.buildout import main; sys.argv[0] = 'buildout'; main()"
    steps = (
        [sys.executable, "-I", "-W", "ignore", "-c", start, *options, "bootstrap"],
        [str(directory / "bin" / "buildout"), *options],
    )
    with buildout.Log(buildout.software_log(config, url), f"building {url}") as log:
        for command in steps:
            outcome = _as_software_user(context, directory, command, log)
            if not outcome.ok:
                raise buildout.build_error("software.build", url, outcome, buildout.software_log(config, url))
        _link_eggs(config.software_root, directory, owner.pw_uid, owner.pw_gid)
        # eggs come without bytecode and partition users cannot write it: a third of each instance's time (measured).
        # Some eggs hold files of other Pythons, which do not compile: no failure.
        compile_all = [sys.executable, "-I", "-c", _COMPILE, str(directory / "eggs")]
        _as_software_user(context, directory, compile_all, log)
    with files.directory(config.software_root, directory.name) as descriptor:
        content = time.asctime().encode() + b"\n"
        numbers = (owner.pw_uid, owner.pw_gid)
        # thousands of files, for which the mark is about to vouch, also after a power cut
        files.flush(descriptor)
        files.write(buildout.COMPLETED, content, dir_fd=descriptor, mode=0o644, owner=numbers, durable=True)


def _prepare(config: Config, url: str, owner: tuple[int, int]) -> None:
    """Make the directory of a release and its profile. Raises OSError, PartitiondError."""
    directory = buildout.software_directory(config, url)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o755)
    # what a release runs owns all this and could put a link in the place of a directory: never through one
    with files.directory(config.software_root, directory.name) as descriptor:
        os.fchown(descriptor, *owner)
        with contextlib.suppress(FileNotFoundError):
            # built again by force: until it is whole no instance is configured with it (bootstrap empties develop-eggs)
            os.unlink(buildout.COMPLETED, dir_fd=descriptor)
        profile = software_profile(config, url).encode()
        files.write("buildout.cfg", profile, dir_fd=descriptor, mode=0o644, owner=owner)


def _as_software_user(context: Context, directory: Path, command: list[str], log: int) -> execute.Outcome:
    config = context.config
    return execute.as_user(
        config.software_user,
        config.software_user,
        command,
        cwd=directory,
        env=_environment(config, directory),
        log=log,
        stop=context.stop,
        record=buildout.session_record(config, "software"),
    )


def _environment(config: Config, directory: Path) -> dict[str, str]:
    env = execute.environment(str(directory), config.software_user)
    if config.offline_builds:
        # buildout starts pip for what is no wheel, and pip would ask the network for build requirements
        env |= {"PIPbuildout.NO_INDEX": "1", "PIP_FIND_LINKS": str(buildout.wheels())}
    return env


def _link_eggs(root: Path, directory: Path, uid: int, gid: int) -> None:
    """Make eggs that were installed without ``EGG-INFO`` visible to offline instances.

    Offline, a published zc.buildout looks only at ``EGG-INFO`` in ``eggs/``; an egg link is another way in (measured with
    4.2, 5.2 and 6.0). A link of the release's own develop part is left alone.
    """
    try:
        with files.directory(root, directory.name, "eggs") as descriptor:
            eggs = [name for name in files.names(descriptor, _MOST_EGGS) if _EGG.fullmatch(name)]
    except FileNotFoundError:
        return
    with files.directory(root, directory.name, "develop-eggs") as links:
        there = frozenset(files.names(links, _MOST_EGGS))
        for egg in eggs:
            name = _project_of(root, directory.name, "eggs", egg, owner=uid)
            if name is None or f"{name}.egg-link" in there:
                continue
            link = egg.removesuffix(".egg") + ".egg-link"
            text = f"{directory}/eggs/{egg}\n.\n".encode()
            files.write(link, text, dir_fd=links, mode=0o640, owner=(uid, gid))


def _project_of(root: Path, *egg: str, owner: int) -> str | None:
    """The project's name of an egg directory that has wheel metadata only, else None."""
    try:
        with files.directory(root, *egg) as descriptor:
            inside = files.names(descriptor)
        found = [name for name in inside if name.endswith(".dist-info")]
        if "EGG-INFO" in inside or len(found) != 1:
            return None
        with files.directory(root, *egg, found[0]) as descriptor:
            metadata = files.read("METADATA", dir_fd=descriptor, limit=buildout.PROFILE_LIMIT, reader=owner)
    except (PartitiondError, FileNotFoundError):
        return None  # an egg that is one file, a link, or not what it seems: buildout may have another use for it
    name = email.message_from_bytes(metadata)["Name"]
    # of a name that is not ASCII email makes an object of its own
    return name if isinstance(name, str) and _PROJECT.fullmatch(name) else None


def remove_software(config: Config, url: str) -> None:
    """Remove a release from the disk."""
    directory = buildout.software_directory(config, url)
    if directory.is_symlink():
        directory.unlink()
        return
    try:
        with files.directory(config.software_root, directory.name) as descriptor:
            # the mark goes first: half a release must not look whole
            with contextlib.suppress(FileNotFoundError):
                os.unlink(buildout.COMPLETED, dir_fd=descriptor)
            files.empty(descriptor)
    except FileNotFoundError:
        return
    directory.rmdir()
