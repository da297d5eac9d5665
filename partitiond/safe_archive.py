"""Archives of releases from elsewhere, unpacked without believing them; and packed.

A signature says who made an archive, not that its maker was never broken into. Promises: nothing is written outside of a new
directory; every member lies below the one name that is expected; only plain files, directories and links come out, no link
leads out of the release, no bit makes anything run as somebody else or lets others write; bytes and members are bounded. What
breaks one of these is refused as a whole. Runs as the software user, never as root.
"""

from __future__ import annotations

import os
import stat
import tarfile
import zlib
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MOST_BYTES = 32 * 2**30
MOST_MEMBERS = 2_000_000
_LONGEST = 1024
_PIECE = 1 << 20
_DIRECTORY, _FILE, _PROGRAM = 0o755, 0o644, 0o755


class RefusedError(ValueError):
    """An archive that is not unpacked, and why."""


FAULTS = (RefusedError, OSError, EOFError, ValueError, tarfile.TarError, zlib.error)
"""What unpacking raises."""


@dataclass(slots=True)
class _Unpacking:
    """``name`` is the directory that all members lie below; ``final`` where it will stand, which absolute links may name."""

    target: Path
    name: str
    final: Path
    most_bytes: int
    most_members: int
    skip: frozenset[str]
    count: int = 0
    size: int = 0
    files: set[str] = field(default_factory=set)
    links: dict[str, str] = field(default_factory=dict)
    times: list[tuple[str, float]] = field(default_factory=list)

    def take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self.count += 1
        if self.count > self.most_members:
            raise RefusedError(f"it has more than {self.most_members} members")
        path = self._inside(member.name)
        if path in self.skip:
            return
        if member.isdir():
            (self.target / path).mkdir(mode=_DIRECTORY, parents=True, exist_ok=True)
        elif member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None:
            self._write(archive, member, path)
        elif member.issym():
            self._link(path, member.linkname)
        elif member.islnk():
            first = self._inside(member.linkname)
            if first not in self.files:
                raise RefusedError(
                    f"{member.name!r} is a hard link to {member.linkname!r}, which is no file of it"
                )
            self._parent(path)
            os.link(self.target / first, self.target / path, follow_symlinks=False)
            self.files.add(path)
        else:
            raise RefusedError(f"{member.name!r} is neither a file, a directory nor a link")

    def _inside(self, name: str) -> str:
        """The path below the release's directory; empty for that itself."""
        words = name.split("/")
        while len(words) > 1 and not words[-1]:
            words.pop()
        if len(name) > _LONGEST * 4 or "\0" in name or any(word in ("", ".", "..") for word in words):
            raise RefusedError(f"{name[:100]!r} is no name of a member")
        if words[0] != self.name:
            raise RefusedError(f"{name[:100]!r} lies outside of {self.name}")
        return "/".join(words[1:])

    def _parent(self, path: str) -> None:
        if not path:
            raise RefusedError("the release itself is no directory")
        (self.target / path).parent.mkdir(mode=_DIRECTORY, parents=True, exist_ok=True)

    def _write(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        self._parent(path)
        source = archive.extractfile(member)
        assert source is not None  # noqa: S101 - it is a file
        mode = _PROGRAM if member.mode & stat.S_IXUSR else _FILE
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(self.target / path, flags, mode), "wb") as sink:
            while piece := source.read(_PIECE):
                self.size += len(piece)
                if self.size > self.most_bytes:
                    raise RefusedError(f"it holds more than {self.most_bytes} bytes")
                sink.write(piece)
            sink.flush()  # what is written later would set the time again
            # interpreters compare the age of a source with what they compiled of it
            os.utime(sink.fileno(), (member.mtime, member.mtime))
        self.files.add(path)

    def _link(self, path: str, to: str) -> None:
        """Remember a link: they are made last, so that nothing is ever written through one."""
        self._parent(path)
        inside = to.removeprefix(f"{self.final}/") if to.startswith("/") else to
        words = [word for word in inside.split("/") if word not in ("", ".")]
        climbs = next((number for number, word in enumerate(words) if word != ".."), len(words))
        # .. behind a name may stand behind another link, and lead anywhere; before it, it counts real directories
        out = climbs > (0 if to.startswith("/") else path.count("/")) or ".." in words[climbs:]
        if inside.startswith("/") and to != str(self.final):
            out = True
        if out or "\0" in to or len(to) > _LONGEST:
            raise RefusedError(f"{path!r} is a link that leads out: {to[:100]!r}")
        if path in self.files or path in self.links:
            raise RefusedError(f"{path!r} comes twice")
        self.links[path] = to

    def finish(self) -> None:
        for path, to in self.links.items():
            (self.target / path).symlink_to(to)


def unpack(
    stream: IO[bytes],
    target: Path,
    *,
    name: str,
    final: Path,
    skip: frozenset[str] = frozenset(),
    most_bytes: int = MOST_BYTES,
    most_members: int = MOST_MEMBERS,
) -> None:
    """Unpack a compressed tar file into ``target``, a new directory, without its first component ``name``.

    Raises RefusedError, or another of FAULTS for one that is damaged; what is there by then is the caller's to remove.
    """
    target.mkdir(mode=_DIRECTORY)
    work = _Unpacking(target, name, final, most_bytes, most_members, skip)
    try:
        with tarfile.open(fileobj=stream, mode="r:gz") as archive:
            for member in archive:
                work.take(archive, member)
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep each of a million
        work.finish()
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise RefusedError(f"a name comes twice: {error.filename}") from error


def pack(directory: Path, sink: IO[bytes], *, skip: frozenset[str], going_on: Callable[[], bool]) -> None:
    """Pack a directory under its own name, without the entries at its top that ``skip`` names. Raises OSError."""

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if not going_on():
            raise InterruptedError("ended on request")
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return None if member.name.partition("/")[2] in skip else member

    with tarfile.open(fileobj=sink, mode="w:gz", compresslevel=6, format=tarfile.PAX_FORMAT) as archive:
        archive.add(directory, arcname=directory.name, filter=wanted)
