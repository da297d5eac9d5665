"""Software releases: taken from a network cache or built, as the software user, in place, with what a published zc.buildout
needs beyond slapgrid's contract (links to eggs without metadata, no index: ``docs/design/software-releases.md``).

Runs in the process that ``build_keeper`` starts, for hours perhaps.
"""

from __future__ import annotations

import contextlib
import email
import os
import pwd
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import binary_cache, buildout, execute, files
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    import threading

    from partitiond.config import Config

# what build steps, as the software user, may have put there is not taken for more than it can be
_MOST_EGGS = 10_000
_EGG = re.compile(r"[A-Za-z0-9_.+!-]+\.egg")
_PROJECT = re.compile(r"[A-Za-z0-9_.-]+")
_NETRC_LIMIT = 64 * 1024
# the kernel reads so much of a script's first line (BINPRM_BUF_SIZE)
_SHEBANG = 256
_COMPILE = "import compileall, sys; compileall.compile_dir(sys.argv[1], quiet=2, workers=1)"
_BOOTSTRAP = "import sys; from zc.buildout.buildout import main; sys.argv[0] = 'buildout'; main()"


def software_profile(config: Config, url: str) -> str:
    """The ``buildout.cfg`` of a release: the release's own URL first, then what this node adds."""
    lines = ["[buildout]", f"extends = {url}"]
    if buildout.wheels().is_dir():
        lines.append(f"find-links += {buildout.wheels()}")
    if config.offline_builds:
        lines += [f"index = {buildout.NO_INDEX}", "allow-hosts ="]
    # slapgrid has both in any case: recipes of SlapOS (slapos.recipe.cmmi) ask for them by name
    lines.append(_lines_of("shared-part-list", config.shared_part_list))
    lines.append(_lines_of("build-time-part-list", config.software.build_time_part_list))
    return "\n".join(lines) + "\n"


def _lines_of(key: str, value: str) -> str:
    return "\n  ".join((f"{key} =", *value.split()))


def options_of(config: Config, directory: Path, *, force: bool) -> list[str]:
    """What buildout is told on its command line, as slapgrid has it; by force also newer versions are looked for."""
    found = [f"buildout:extends-cache={directory}/extends-cache", f"buildout:directory={directory}"]
    if config.software.cache.options:
        found.append("buildout:networkcache-section=networkcache")
        found += (f"networkcache:{name}={value}" for name, value in config.software.cache.options)
    if config.software.buildout_version:
        found.append(f"versions:zc.buildout={config.software.buildout_version}")
    return ["-U", *([] if force else ["-N"]), "-c", "buildout.cfg", *found]


@dataclass(frozen=True, slots=True)
class _Steps:
    """How programs of a build are run: as the software user, in the release's directory, into its log."""

    config: Config
    directory: Path
    log: int
    stop: threading.Event
    session: Path | None

    def run(self, command: list[str]) -> execute.Outcome:
        config = self.config
        return execute.as_user(
            config.software_user,
            config.software_user,
            command,
            cwd=self.directory,
            env=_environment(config, self.directory),
            log=self.log,
            stop=self.stop,
            record=self.session,
        )


def build_software(
    config: Config, url: str, *, stop: threading.Event, force: bool = False, session: Path | None = None
) -> str:
    """Bring a release to the disk, as the software user; return ``built`` or ``cached``.

    ``session`` is a file that names the session of the step under way. Raises PartitiondError ``software.build`` with the cause
    and the end of the log, ``software.cache_only`` for one that must not be built, or OSError.
    """
    directory = buildout.software_directory(config, url)
    owner = pwd.getpwnam(config.software_user)
    numbers = (owner.pw_uid, owner.pw_gid)
    cached, failed = False, None
    path = buildout.software_log(config, url)
    with buildout.Log(path, f"building {url}") as log:
        if not force:
            cached = binary_cache.fetch(config, url, stop=stop, log=log, session=session)
        _prepare(config, url, numbers)
        steps = _Steps(config, directory, log, stop, session)
        if not cached:
            failed = _run_buildout(steps, options_of(config, directory, force=force))
        if failed is None:
            failed = _finish(steps, numbers)
    if failed is not None:  # by now all that was said is in the log
        raise buildout.build_error("software.build", url, failed, path)
    _mark(config, directory.name, numbers)
    return "cached" if cached else "built"


def _run_buildout(steps: _Steps, options: list[str]) -> execute.Outcome | None:
    """Bootstrap and run buildout; how the step ended that failed, or None."""
    bootstrap = [sys.executable, "-I", "-W", "ignore", "-c", _BOOTSTRAP, *options, "bootstrap"]
    for made in (False, True):
        outcome = steps.run([*_started_by(steps), *options] if made else bootstrap)
        if not outcome.ok:
            return outcome
    return None


def _finish(steps: _Steps, owner: tuple[int, int]) -> execute.Outcome | None:
    """Make what is built fit for instances; how that was cut short, or None."""
    _link_eggs(steps.config.software_root, steps.directory, *owner)
    # eggs come without bytecode and partition users cannot write it: a third of each instance's time (measured).
    # Some eggs hold files of other Pythons, which do not compile: no failure.
    outcome = steps.run([sys.executable, "-I", "-c", _COMPILE, str(steps.directory / "eggs")])
    return outcome if outcome.cut_short else None


def _started_by(steps: _Steps) -> list[str]:
    """The release's own buildout; its interpreter by name, for its path may be longer than the kernel reads of a script."""
    program = steps.directory / "bin" / "buildout"
    root, uid = steps.config.software_root, pwd.getpwnam(steps.config.software_user).pw_uid
    with files.directory(root, steps.directory.name, "bin") as descriptor:
        text = files.read("buildout", dir_fd=descriptor, limit=buildout.PROFILE_LIMIT, reader=uid)
    first = text.partition(b"\n")[0]
    if first.startswith(b"#!") and len(first) >= _SHEBANG:
        return [*first[2:].decode("utf-8", "surrogateescape").split(), str(program)]
    return [str(program)]


def _mark(config: Config, name: str, owner: tuple[int, int]) -> None:
    """Say that a release is whole, also after a power cut."""
    content = time.asctime().encode() + b"\n"
    with files.directory(config.software_root, name) as descriptor:
        # thousands of files, for which the mark is about to vouch
        files.flush(descriptor)
        files.write(buildout.COMPLETED, content, dir_fd=descriptor, mode=0o644, owner=owner, durable=True)


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
        with contextlib.suppress(FileExistsError):
            os.mkdir("extends-cache", 0o755, dir_fd=descriptor)
        with files.directory(config.software_root, directory.name, "extends-cache") as cache:
            os.fchown(cache, *owner)
        _take_netrc(descriptor, owner)


def _take_netrc(descriptor: int, owner: tuple[int, int]) -> None:
    """Copy the software user's credentials, as slapgrid does: HOME of a build is the release's own directory."""
    try:
        with files.directory(Path(pwd.getpwuid(owner[0]).pw_dir)) as home:
            content = files.read(".netrc", dir_fd=home, limit=_NETRC_LIMIT, reader=owner[0])
    except (FileNotFoundError, NotADirectoryError):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(".netrc", dir_fd=descriptor)
        return
    files.write(".netrc", content, dir_fd=descriptor, mode=0o600, owner=owner)


def _environment(config: Config, directory: Path) -> dict[str, str]:
    env = execute.environment(str(directory), config.software_user)
    if config.offline_builds:
        # buildout starts pip for what is no wheel, and pip would ask the network for build requirements
        env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(buildout.wheels())}
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
    """Remove a release from the disk, and what was said while it was built."""
    buildout.remove_tree(config.software_root, buildout.software_directory(config, url).name)
    log = buildout.software_log(config, url)
    for path in (log, log.with_name(f"{log.name}.1")):
        path.unlink(missing_ok=True)
