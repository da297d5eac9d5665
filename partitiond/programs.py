"""The programs that a partition declares: the executables of ``etc/run`` and, watched, of ``etc/service``.

Promises: root only lists these directories and looks at what lies in them; where a link leads is asked as the partition's user,
who must not learn through root what there is elsewhere, nor keep root busy with paths that lead round and round; a name that is
not a plain one is left out with a warning, and so is the second of two that supervisord could not tell apart; a program of
``etc/run`` is not watched, whatever its name (slapgrid watches one that is called as its own are).
"""

from __future__ import annotations

import logging
import os
import stat
from typing import TYPE_CHECKING

from partitiond import execute, files, privacy
from partitiond.errors import PartitiondError
from partitiond.incidents import WATCHED
from partitiond.supervision import MOST_PROGRAMS, PROGRAM_NAME, Group, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from partitiond.context import Context
    from partitiond.node import Partition

logger = logging.getLogger(__name__)

_SHOWN = 3
_UNWATCHED = "-run"
_LINK_SECONDS = 5.0
_ANSWER_LIMIT = 16 * 1024  # of MOST_PROGRAMS names; a pipe holds more
_LOOK = 'for one do if [ -f "$one" ] && [ -x "$one" ]; then echo "${one##*/}"; fi; done'


def group(context: Context, partition: Partition) -> Group:
    """The group of supervisord that a partition's programs make.

    Raises PartitiondError ``instance.too_many_programs``, ``instance.links``, ``files.not_a_directory``, or OSError.
    """
    programs = []
    for kind in ("run", "service"):
        for name in executables(context, partition, "etc", kind):
            command = str(partition.path / "etc" / kind / name)
            programs.append(Program(name=name, process_name=_process_name(kind, name), command=command))
    return Group(
        name=partition.id,
        user=partition.user,
        uid=partition.uid,
        gid=partition.gid,
        directory=partition.path,
        log_directory=context.config.log_dir / partition.id,
        programs=tuple(_without_doubles(partition.id, programs)),
        launcher=privacy.launcher(context.config, partition),
    )


def _process_name(kind: str, name: str) -> str:
    """What supervisord calls the process: by that alone those are known that are watched."""
    if kind == "service":
        return name + WATCHED
    return name + _UNWATCHED if name.endswith(WATCHED) else name


def _without_doubles(partition: str, programs: Sequence[Program]) -> list[Program]:
    kept: list[Program] = []
    if len(programs) > MOST_PROGRAMS:
        raise _too_many(partition, len(programs))
    for program in programs:
        if any(
            program.name == other.name or program.process_name == other.process_name for other in kept
        ) or not PROGRAM_NAME.fullmatch(program.process_name):
            logger.warning(
                "%s: %s is both in etc/run and etc/service, or its name is too long; it is left out",
                partition,
                program.command,
            )
            continue
        kept.append(program)
    return kept


def _too_many(partition: str, count: int) -> PartitiondError:
    return PartitiondError(
        "instance.too_many_programs",
        f"etc/run and etc/service have {count} programs; at most {MOST_PROGRAMS} are started",
        resource=partition,
        hint="a release with so many must be divided into several instances",
    )


def executables(context: Context, partition: Partition, *below: str) -> list[str]:
    """Names of the executable plain files, or links to such, in a directory of the partition. Raises as :func:`group` does."""
    found, links, strange = [], [], []
    try:
        with files.directory(partition.path, *below) as descriptor:
            for name in files.names(descriptor):
                if not PROGRAM_NAME.fullmatch(name):
                    strange.append(name)
                    continue
                mode = _mode_of(name, descriptor)
                if stat.S_ISLNK(mode):
                    links.append(name)
                elif stat.S_ISREG(mode) and mode & 0o111:
                    found.append(name)
    except FileNotFoundError:
        return []
    if strange:
        logger.warning(
            "%s: %s: not started: %s%s; allowed are letters, digits and _.+-",
            partition.id,
            "/".join(below),
            ", ".join(map(repr, strange[:_SHOWN])),
            f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else "",
        )
    if len(links) > MOST_PROGRAMS:
        raise _too_many(partition.id, len(found) + len(links))
    return sorted([*found, *_leading_toexecutables(context, partition, below, links)])


def _mode_of(name: str, descriptor: int) -> int:
    """The mode of what has that name; 0 when it is gone, or out of reach (a file system that the tenant has mounted there)."""
    try:
        return os.lstat(name, dir_fd=descriptor).st_mode
    except OSError:
        return 0


def _leading_toexecutables(
    context: Context, partition: Partition, below: Sequence[str], links: Sequence[str]
) -> frozenset[str]:
    """Which of the links lead to a file that the partition's user may execute. Raises PartitiondError ``instance.links``."""
    if not links:
        return frozenset()
    paths = [str(partition.path.joinpath(*below, name)) for name in links]
    reading, writing = os.pipe()
    os.set_blocking(reading, False)  # what the tenant left running may still have the other end
    try:
        try:
            outcome = execute.as_user(
                partition.user,
                partition.user,
                ["/bin/sh", "-c", _LOOK, "sh", *paths],
                cwd=partition.path,
                env=execute.environment(str(partition.path), partition.user),
                log=writing,
                stop=context.stop,
                timeout=_LINK_SECONDS,
                enter=privacy.entry(context.config, partition),
            )
        finally:
            os.close(writing)
        if not outcome.ok:
            raise PartitiondError(
                "instance.links",
                f"where the links in {'/'.join(below)} lead could not be found out ({outcome.cut_short or outcome.status})",
                resource=partition.id,
                hint="the release should put plain files there",
                retryable=True,
            )
        # from the tenant's hands: no more than which of our own names are among it
        answer = frozenset(_read(reading).decode("utf-8", "replace").splitlines())
        return answer.intersection(links)
    finally:
        os.close(reading)


def _read(descriptor: int) -> bytes:
    """Read what is in a pipe, and wait for nothing."""
    try:
        return os.read(descriptor, _ANSWER_LIMIT)
    except BlockingIOError:
        return b""
