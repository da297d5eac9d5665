"""A key and its certificate as two files that change together: whoever opens them finds both old or both new.

Two renames cannot be one, and whoever is killed between them leaves a key with another's certificate. So the two names are
links into a directory, which is exchanged as a whole by the rename of one more link:

    slappart3.key -> .slappart3.pair/key       slappart3.crt -> .slappart3.pair/certificate
    .slappart3.pair -> .slappart3-5f0c19d2a7e4

Promises: at no moment, a loss of power included, do the two names show files that were not written together; plain files of
those names (slapos.core leaves such) are taken in on the way without a moment in which they do not match.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitiond import files
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from pathlib import Path

KEY, CERTIFICATE, ABOUT = "key", "certificate", "about"
_LIMIT = 64 * 1024


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pair lies: a directory of root's, a name for the two together, and the names by which others know them."""

    directory: Path
    stem: str
    key: str
    certificate: str
    key_mode: int = 0o400
    certificate_mode: int = 0o400
    owner: tuple[int, int] = (0, 0)

    @property
    def switch(self) -> str:
        """The link that says which directory holds now."""
        return f".{self.stem}.pair"

    def slot(self, name: str) -> bool:
        """Whether that is the name of one of the directories of this pair."""
        return re.fullmatch(rf"\.{re.escape(self.stem)}-[0-9a-f]{{12}}", name) is not None


@dataclass(frozen=True, slots=True)
class Found:
    """What lies there now; ``about`` is root's note on it, empty where it came without one."""

    key: bytes
    certificate: bytes
    about: bytes = b""


def read(place: Place, *, reader: int | None = None) -> Found | None:
    """Read the pair; None unless both are there. ``reader`` as for :func:`partitiond.files.read`.

    Raises PartitiondError ``files.refused`` for what is no small plain file, OSError.
    """
    try:
        with files.directory(place.directory) as top:
            current = _current(place, top)
            if current is None:
                if _is_ours(place, top):
                    return None  # the first one, whose writer was cut short
                return Found(
                    files.read(place.key, dir_fd=top, limit=_LIMIT, reader=reader),
                    files.read(place.certificate, dir_fd=top, limit=_LIMIT, reader=reader),
                )
            with files.directory(place.directory, current) as slot:
                about = b""
                with suppress(FileNotFoundError):
                    about = files.read(ABOUT, dir_fd=slot, limit=_LIMIT)
                return Found(
                    files.read(KEY, dir_fd=slot, limit=_LIMIT, reader=reader),
                    files.read(CERTIFICATE, dir_fd=slot, limit=_LIMIT, reader=reader),
                    about,
                )
    except FileNotFoundError:
        return None


def about(place: Place) -> bytes:
    """Root's note on the pair, without reading the pair itself; empty where there is none. Raises OSError, PartitiondError."""
    with suppress(FileNotFoundError), files.directory(place.directory) as top:
        current = _current(place, top)
        if current is not None:
            with files.directory(place.directory, current) as slot:
                return files.read(ABOUT, dir_fd=slot, limit=_LIMIT)
    return b""


def write(place: Place, found: Found) -> None:
    """Put a pair in the place of the present one. Raises OSError, PartitiondError."""
    with files.directory(place.directory) as top:
        _take_in(place, top)
        following = _fill(place, top, found)
        # dangling until the switch below is there: so the first pair appears as a whole, too
        _link(place.key, f"{place.switch}/{KEY}", top)
        _link(place.certificate, f"{place.switch}/{CERTIFICATE}", top)
        _link(place.switch, following, top)
        os.fsync(top)
        _sweep(place, top, kept=following)


def remove(place: Place) -> None:
    """Remove the pair and all before it. Raises OSError, PartitiondError."""
    with suppress(FileNotFoundError), files.directory(place.directory) as top:
        for name in (place.key, place.certificate, place.switch):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=top)
        _sweep(place, top)
        os.fsync(top)


def _current(place: Place, top: int) -> str | None:
    """The directory that holds now; None where the names are no links of ours, whatever else they are."""
    if not _is_ours(place, top):
        return None
    try:
        target = os.readlink(place.switch, dir_fd=top)
    except OSError:
        return None
    return target if place.slot(target) else None


def _is_ours(place: Place, top: int) -> bool:
    try:
        return os.readlink(place.key, dir_fd=top) == f"{place.switch}/{KEY}"
    except OSError:
        return False


def _take_in(place: Place, top: int) -> None:
    """Put plain files of these names behind the links, with the same content throughout."""
    plain = {}
    for kind, name in ((KEY, place.key), (CERTIFICATE, place.certificate)):
        with suppress(FileNotFoundError):
            if stat.S_ISREG(os.lstat(name, dir_fd=top).st_mode):
                with suppress(PartitiondError):  # not even readable as a key: nothing that could match
                    plain[kind] = files.read(name, dir_fd=top, limit=_LIMIT)
    if not plain:
        return
    if len(plain) < 2:
        # only one of them: either it is alone, or whoever took them in was cut short and the other is a link already
        current = _current(place, top)
        if current is None:
            for kind, name in ((KEY, place.key), (CERTIFICATE, place.certificate)):
                if kind in plain:
                    os.unlink(name, dir_fd=top)
            return
    else:
        taken = _fill(place, top, Found(plain[KEY], plain[CERTIFICATE]))
        _link(place.switch, taken, top)
        os.fsync(top)
    _link(place.key, f"{place.switch}/{KEY}", top)
    _link(place.certificate, f"{place.switch}/{CERTIFICATE}", top)
    os.fsync(top)


def _fill(place: Place, top: int, found: Found) -> str:
    """Write a pair into a directory of its own, durably, which nothing leads to yet."""
    name = f".{place.stem}-{secrets.token_hex(6)}"
    os.mkdir(name, 0o711, dir_fd=top)
    with files.directory(place.directory, name) as slot:
        # whatever the umask is: the owner of the files has to get through
        os.fchmod(slot, 0o711)
        for kind, content, mode, owner in (
            (KEY, found.key, place.key_mode, place.owner),
            (CERTIFICATE, found.certificate, place.certificate_mode, place.owner),
            (ABOUT, found.about, 0o600, (0, 0)),
        ):
            files.write(kind, content, dir_fd=slot, mode=mode, owner=owner, durable=True)
    return name


def _link(name: str, target: str, top: int) -> None:
    """Replace a link, in one step; one that is as it should be stays."""
    with suppress(OSError):
        if os.readlink(name, dir_fd=top) == target:
            return
    files.link(name, target, dir_fd=top)


def _sweep(place: Place, top: int, *, kept: str = "") -> None:
    """Remove the directories that nothing leads to any more."""
    with os.scandir(top) as entries:
        names = [entry.name for entry in entries if place.slot(entry.name) and entry.name != kept]
    for name in names:
        with files.directory(place.directory, name) as slot:
            for one in files.names(slot):
                os.unlink(one, dir_fd=slot)
        os.rmdir(name, dir_fd=top)
