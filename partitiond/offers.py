"""What this node told its master of its partitions' addresses, and whose those are that the master has. Pure but for a file.

The master gives the addresses of busy partitions back in each answer. What this node never told it was told by somebody else
with this node's identity; what it told earlier comes from an older database, or a cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from partitiond import files

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from partitiond.published import Shown
    from slap_client.documents import ComputerDocument

logger = logging.getLogger(__name__)

Verdict = Literal["ours", "older", "foreign", "unknown"]
_REMEMBERED, _SEEN = 10, 2000


@dataclass(frozen=True, slots=True)
class Offered:
    """What was said to the master, and what of it was another's.

    ``told``: a digest of each partition's addresses, by partition, for each thing told, the last one last; the first may be
    what the master had before the node told it anything. ``foreign``: the addresses that somebody else told, by partition.
    ``alive``: those because of which nothing was told at all, as somebody answers there. ``published``: digests of certificates
    that somebody else's instance published, by partition; ``seen``: of those that were not this machine's, and no news.
    """

    told: tuple[Mapping[str, str], ...] = ()
    foreign: Mapping[str, list[str]] = field(default_factory=dict)
    alive: tuple[str, ...] = ()
    published: Mapping[str, str] = field(default_factory=dict)
    seen: tuple[str, ...] = ()


def digest(addresses: Iterable[str]) -> str:
    """A short name of a set of addresses."""
    return hashlib.sha256("\n".join(sorted(set(addresses))).encode()).hexdigest()[:16]


def addresses_of(document: ComputerDocument) -> dict[str, list[str]]:
    """The addresses that the master has, in its order, of those partitions that it says them of: those in use."""
    return {
        entry.partition_id: [row[1] for row in entry.ip_list if len(row) > 1]
        for entry in document.partitions
        if entry.ip_list
    }


def compare(offered: Offered, found: Mapping[str, list[str]]) -> tuple[Verdict, dict[str, list[str]]]:
    """Whose the master's addresses are, and those that are not what was told last, by partition. Pure."""
    if not offered.told:
        return "unknown", {}
    last = offered.told[-1]
    if not last.keys() & found.keys():
        return "unknown", {}
    other = {name: rows for name, rows in found.items() if name in last and digest(rows) != last[name]}
    if not other:
        return "ours", {}
    earlier = all(any(one.get(name) == digest(rows) for one in offered.told) for name, rows in other.items())
    return ("older" if earlier else "foreign"), other


class OfferBook:
    """The file, and what was read of it. A file that cannot be read is begun anew: then nobody is suspected.

    Lanes share it: whoever saves by what is remembered holds ``changing`` from the reading on, and takes ``applying`` before
    that or not at all.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read: Offered | None = None
        self.changing = threading.RLock()
        self.turn = 0  # odd while the master is being told
        self.stale = 0  # answers with older addresses since the master had those of now
        self.shown: dict[str, Shown] = {}
        self.missed = False  # the capacity was offered again since the master was last seen to know this node

    def read(self) -> Offered:
        """What is remembered."""
        if self._read is None:
            self._read = _read(self._file)
        return self._read

    def save(self, offered: Offered) -> None:
        """Remember; nothing is written when it is the same. Raises OSError."""
        if offered == self.read():
            return
        files.make_directory(self._file.parent, 0o700)
        files.write_path(self._file, json.dumps(asdict(offered), sort_keys=True).encode(), mode=0o600)
        self._read = offered

    @contextmanager
    def telling(self, addresses: Mapping[str, Iterable[str]]) -> Iterator[None]:
        """For the call that tells the master these; when it ends well they are what it was told last, and nobody is suspected
        of having told others.

        Before that they count as told earlier: the master may take them although its answer gets lost.
        """
        row = {name: digest(one) for name, one in addresses.items()}
        self.turn += 1
        try:
            with self.changing:
                before = self.read()
                if row not in before.told:
                    rows = (*before.told[:-1], row, *before.told[-1:])[-_REMEMBERED:]
                    self.save(replace(before, told=rows))
            yield
            with self.changing:
                before = self.read()
                others = tuple(one for one in before.told if one != row)
                self.save(Offered((*others, row), published=before.published, seen=before.seen))
        finally:
            self.turn += 1

    def see(self, digests: Iterable[str]) -> None:
        """Remember certificates that are not this machine's own."""
        with self.changing:
            before = self.read()
            if new := sorted(set(digests) - set(before.seen)):
                self.save(replace(before, seen=(*before.seen, *new)[-_SEEN:]))

    def judges(self, turn: int) -> bool:
        """Whether what was asked for at that ``turn`` may be compared: the master was told nothing new meanwhile."""
        return turn == self.turn and turn % 2 == 0

    def suspect(self, foreign: Mapping[str, list[str]]) -> None:
        """Remember that somebody else told the master these; empty: nobody does any more."""
        with self.changing:
            self.save(replace(self.read(), foreign=dict(foreign)))


def _read(file: Path) -> Offered:
    try:
        value: dict[str, Any] = json.loads(file.read_bytes())
        rows = tuple({str(name): str(text) for name, text in row.items()} for row in value["told"])
        foreign = {str(name): [str(one) for one in found] for name, found in value["foreign"].items()}
        published = {str(name): str(one) for name, one in value["published"].items()}
        return Offered(
            rows, foreign, tuple(map(str, value["alive"])), published, tuple(map(str, value["seen"]))
        )
    except FileNotFoundError:
        return Offered()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is not heeded: %s", file, error)
        return Offered()
