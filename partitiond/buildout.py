"""Buildout: software releases as the software user, instances as the partition's user.

The contract is that of slapgrid (slapos.core 1.26): same directories, same appended sections, ``offline = true`` in
instances. What a published zc.buildout needs beyond it (links to eggs without metadata, no index) is in
``docs/design/software-releases.md``.
"""

from __future__ import annotations

import contextlib
import email
import logging
import os
import pwd
import re
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import certificates, execute, files, privacy
from partitiond.errors import PartitiondError
from partitiond.state import software_name

if TYPE_CHECKING:
    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.node import Partition
    from slap_client.documents import PartitionDocument

logger = logging.getLogger(__name__)

COMPLETED = ".completed"
_TAIL = 4000
_LOG_LIMIT = 5 * 1024 * 1024
_PROFILE_LIMIT = 4 * 1024 * 1024
# the line that begins each build in a log
_HEAD = re.compile(r"^--- \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (?:building|configuring) .*\n", re.MULTILINE)
# what build steps, as the software user, may have put there is not taken for more than it can be
_MOST_EGGS = 10_000
_EGG = re.compile(r"[A-Za-z0-9_.+!-]+\.egg")
_PROJECT = re.compile(r"[A-Za-z0-9_.-]+")
_NO_INDEX = "file:///nonexistent/"
# slapgrid copies the user's .netrc into each software; ours reads the one of the software user's home itself
_COMPILE = "import compileall, sys; compileall.compile_dir(sys.argv[1], quiet=2, workers=1)"


def wheels() -> Path:
    """The directory of wheels that our environment ships, for builds without a network."""
    return Path(sys.prefix) / "share" / "wheels"


def software_directory(config: Config, url: str) -> Path:
    """Where a release is built."""
    return config.software_root / software_name(url)


def software_log(config: Config, url: str) -> Path:
    """The log of the builds of a release."""
    return config.log_dir / "software" / f"{software_name(url)}.log"


def session_record(config: Config, what: str) -> Path:
    """Where the session of a build under way is written down: of the one of ``software``, or of a partition's."""
    return config.run_dir / f"{what}.session"


def completed(config: Config, url: str) -> bool:
    """Whether a release was built to its end (also by slapos.core before us)."""
    try:
        return stat.S_ISREG(os.lstat(software_directory(config, url) / COMPLETED).st_mode)
    except OSError:
        return False


def software_profile(config: Config, url: str) -> str:
    """The ``buildout.cfg`` of a release: the release's own URL first, then what this node adds."""
    lines = ["[buildout]", f"extends = {url}"]
    if wheels().is_dir():
        lines.append(f"find-links += {wheels()}")
    if config.offline_builds:
        lines += [f"index = {_NO_INDEX}", "allow-hosts ="]
    if config.shared_part_list:
        lines.append("shared-part-list =\n  " + "\n  ".join(config.shared_part_list.split()))
    return "\n".join(lines) + "\n"


def build_software(context: Context, url: str) -> None:
    """Build a release in place, as the software user.

    Raises PartitiondError ``software.build`` with the end of the log, or OSError.
    """
    config = context.config
    directory = software_directory(config, url)
    owner = pwd.getpwnam(config.software_user)
    _prepare(config, url, (owner.pw_uid, owner.pw_gid))
    options = ["-U", "-N", "-c", "buildout.cfg", f"buildout:directory={directory}"]
    start = "import sys; from zc.buildout.buildout import main; sys.argv[0] = 'buildout'; main()"
    steps = (
        [sys.executable, "-I", "-W", "ignore", "-c", start, *options, "bootstrap"],
        [str(directory / "bin" / "buildout"), *options],
    )
    with _log(software_log(config, url), f"building {url}") as log:
        for command in steps:
            outcome = _as_software_user(context, directory, command, log)
            if not outcome.ok:
                raise _build_error("software.build", url, outcome, software_log(config, url))
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
        files.write(COMPLETED, content, dir_fd=descriptor, mode=0o644, owner=numbers, durable=True)


def _prepare(config: Config, url: str, owner: tuple[int, int]) -> None:
    """Make the directory of a release and its profile. Raises OSError, PartitiondError."""
    directory = software_directory(config, url)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o755)
    # what a release runs owns all this and could put a link in the place of a directory: never through one
    with files.directory(config.software_root, directory.name) as descriptor:
        os.fchown(descriptor, *owner)
        with contextlib.suppress(FileNotFoundError):
            # built again by force: until it is whole no instance is configured with it (bootstrap empties develop-eggs)
            os.unlink(COMPLETED, dir_fd=descriptor)
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
        record=session_record(config, "software"),
    )


def _environment(config: Config, directory: Path) -> dict[str, str]:
    env = execute.environment(str(directory), config.software_user)
    if config.offline_builds:
        # buildout starts pip for what is no wheel, and pip would ask the network for build requirements
        env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels())}
    return env


class _log:  # noqa: N801 - reads as the function that it stands for
    """A log file of ours, opened for appending, with a line that says what follows; a long one is put aside first."""

    def __init__(self, path: Path, title: str) -> None:
        self._path, self._title = path, title

    def __enter__(self) -> int:
        if self._path.exists() and self._path.stat().st_size > _LOG_LIMIT:
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o644)
        os.write(
            self._descriptor,
            f"--- {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {self._title}\n".encode(),
        )
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _build_error(code: str, what: str, outcome: execute.Outcome, log: Path) -> PartitiondError:
    ended = outcome.cut_short or (
        f"exit status {outcome.status}" if outcome.status >= 0 else f"signal {-outcome.status}"
    )
    return PartitiondError(
        code, f"buildout failed ({ended}):\n{tail(log)}", resource=what, hint=f"read {log}", retryable=True
    )


def tail(log: Path, size: int = _TAIL) -> str:
    """The last lines of the last build in a log, at most ``size`` bytes."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - size))
            # what a build left running may write on: to its end would be for ever
            text = stream.read(size).decode("utf-8", "replace")
    except OSError:
        return ""
    return _HEAD.split(text)[-1]


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
            metadata = files.read("METADATA", dir_fd=descriptor, limit=_PROFILE_LIMIT, reader=owner)
    except (PartitiondError, FileNotFoundError):
        return None  # an egg that is one file, a link, or not what it seems: buildout may have another use for it
    name = email.message_from_bytes(metadata)["Name"]
    # of a name that is not ASCII email makes an object of its own
    return name if isinstance(name, str) and _PROJECT.fullmatch(name) else None


def remove_software(config: Config, url: str) -> None:
    """Remove a release from the disk."""
    directory = software_directory(config, url)
    if directory.is_symlink():
        directory.unlink()
        return
    try:
        with files.directory(config.software_root, directory.name) as descriptor:
            # the mark goes first: half a release must not look whole
            with contextlib.suppress(FileNotFoundError):
                os.unlink(COMPLETED, dir_fd=descriptor)
            files.empty(descriptor)
    except FileNotFoundError:
        return
    directory.rmdir()


# --- instances --------------------------------------------------------------------------------------------------------


def instance_profile(context: Context, partition: Partition, entry: PartitionDocument) -> bytes:
    """The ``buildout.cfg`` of an instance: the release's template and the sections of slapgrid."""
    config = context.config
    url = entry.software_release or ""
    key, certificate = certificates.paths(context.config, partition) or ("", "")
    directory = software_directory(config, url)
    appended = f"""
[buildout]
bin-directory = ${{buildout:directory}}/sbin
offline = true
index = {_NO_INDEX}

[slap-connection]
computer-id = {config.computer_id}
partition-id = {partition.id}
server-url = {config.master_url}
software-release-url = {url}
key-file = {key}
cert-file = {certificate}
shared-part-list = {" ".join(config.shared_part_list.split())}
build-time-part-list = {" ".join(config.shared_part_list.split())}
requested-state = {entry.requested_state}

[slap_connection]
computer_id = {config.computer_id}
partition_id = {partition.id}
server_url = {config.master_url}
software_release_url = {url}
key_file = {key}
cert_file = {certificate}

[storage-configuration]
storage-home = {config.instance_storage_home or ""}

[network-information]
global-ipv4-network = {config.ipv4_network}
"""
    owner = pwd.getpwnam(config.software_user).pw_uid
    with files.directory(config.software_root, directory.name) as descriptor:
        for name in ("instance.cfg", "template.cfg"):
            try:
                # a link of the software user's to somebody's secret would be handed to the tenant
                profile = files.read(name, dir_fd=descriptor, limit=_PROFILE_LIMIT, reader=owner)
                return profile + appended.encode()
            except FileNotFoundError:
                continue
    raise PartitiondError(
        "instance.no_profile",
        "the software release has neither instance.cfg nor template.cfg",
        resource=partition.id,
        hint=f"look into {directory}",
    )


def configure_instance(context: Context, partition: Partition, entry: PartitionDocument) -> None:
    """Write an instance's profile and run buildout on it as its user.

    Raises PartitiondError ``instance.build`` with the end of the log, ``instance.no_profile``, or OSError.
    """
    config = context.config
    directory = software_directory(config, entry.software_release or "")
    profile = instance_profile(context, partition, entry)
    with files.directory(partition.path) as descriptor:
        files.write("buildout.cfg", profile, dir_fd=descriptor, mode=0o640, owner=(0, partition.gid))
        _link_software(descriptor, directory)
    env = execute.environment(str(partition.path), partition.user)
    env["SLAPGRID_INSTANCE_ROOT"] = str(config.instance_root)
    path = config.log_dir / partition.id / "buildout.log"
    with _log(path, f"configuring {partition.id}") as log:
        outcome = execute.as_user(
            partition.user,
            partition.user,
            [str(directory / "bin" / "buildout"), "-U"],
            cwd=partition.path,
            env=env,
            log=log,
            stop=context.stop,
            record=session_record(config, partition.id),
            enter=privacy.entry(config, partition),
        )
    if not outcome.ok:
        raise _build_error("instance.build", partition.id, outcome, path)


def _link_software(descriptor: int, directory: Path) -> None:
    name = "software_release"
    try:
        if os.readlink(name, dir_fd=descriptor) == str(directory):
            return
    except OSError:
        pass  # no link yet, or something else in its place
    files.link(name, directory, dir_fd=descriptor)
