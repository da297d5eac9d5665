"""Who is connected through the tunnels: followed in the logs of stunnel, and cut where somebody is allowed no longer.

Promises: what is known of live sessions outlives the daemon and the rotation of logs, in a file beside the configuration; what
is told is what a process of the tenant wrote, and informative; whoever is cut is found by the kernel's own table and that log,
at a tunnel from which a certificate was taken.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from netplan import sock_diag
from partitiond import files, identities, tunnels
from partitiond.tunnel_memory import Allowed
from stunnel_mgr.log_follower import MOST, LogFollower, Place
from stunnel_mgr.revocation import Cut, sessions_to_cut
from stunnel_mgr.session_log import SessionReader

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.node import Partition
    from stunnel_mgr.model import Endpoint
    from stunnel_mgr.session_records import LiveSession, Record

FILE = "sessions.json"

_MOST_BYTES = 32 << 20  # of one reading: more than supervisord keeps
_DOUBT_SECONDS = 1.0
_PAUSE = 0.05
_MANY, _SELDOM = 500, 60.0  # live sessions; seconds


@dataclass(slots=True)
class _Page:
    """What is known of one partition's sessions, up to which place of its log, and how that looked then."""

    reader: SessionReader
    follower: LogFollower
    look: tuple[int, ...] = ()
    saved: float = 0.0
    turn: threading.Lock = field(default_factory=threading.Lock)


class SessionBook:
    """The live sessions of all tunnels, from whatever thread."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._pages: dict[str, _Page] = {}

    def news(self, config: Config, partition: Partition) -> list[Record]:
        """Read on; return what ended or was refused since the last time. Raises TunnelError ``tunnel.observe``, OSError."""
        with self._page(config, partition) as page:
            return _read_on(page, config, partition)

    def live(
        self, config: Config, partition: Partition
    ) -> tuple[Mapping[tuple[str, Endpoint], LiveSession], list[Record]]:
        """Read on; return what is live, by service and peer, and what :meth:`news` does."""
        with self._page(config, partition) as page:
            records = _read_on(page, config, partition)
            return page.reader.by_remote(), records

    @contextmanager
    def _page(self, config: Config, partition: Partition) -> Iterator[_Page]:
        """One partition's page, to oneself: what one tenant's log is full of holds up nobody else."""
        with self._turn:
            page = self._pages.get(partition.id)
            if page is None:
                page = self._pages[partition.id] = _load(config, partition)
        with page.turn:
            yield page

    def forget(self, partition: str) -> None:
        """Forget a partition, whose log and files are removed."""
        with self._turn:
            self._pages.pop(partition, None)


def _look(log: Path) -> tuple[int, ...]:
    try:
        found = log.stat()
    except FileNotFoundError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size)


def _file(config: Config, partition: Partition) -> Path:
    return identities.directory_of(config, partition.id) / FILE


def _load(config: Config, partition: Partition) -> _Page:
    try:
        value = json.loads(_file(config, partition).read_bytes())
        reader, place = SessionReader.from_json(value["reader"]), Place.from_json(value["place"])
    except (OSError, ValueError, KeyError, TypeError):
        reader, place = SessionReader(), None
    return _Page(reader, LogFollower(tunnels.log_file(config, partition), place))


def _save(page: _Page, file: Path) -> None:
    """Keep what is known. When that is much, seldom: what came since stands in the log still."""
    count = sum(1 for _ in page.reader.live())
    if count > _MANY and time.monotonic() - page.saved < _SELDOM:
        return
    place = page.follower.place
    value = {"reader": page.reader.to_json(), "place": place.to_json() if place else None}
    if file.parent.is_dir():
        with files.directory(file.parent) as descriptor:
            files.write(file.name, json.dumps(value).encode(), dir_fd=descriptor, mode=0o600)
    page.saved = time.monotonic()


def _read_on(page: _Page, config: Config, partition: Partition) -> list[Record]:
    look = _look(tunnels.log_file(config, partition))
    if look == page.look:
        return []
    records: list[Record] = []
    for _ in range(_MOST_BYTES // MOST):
        data = page.follower.read()
        if page.follower.lost:
            page.reader.forget()
        records += page.reader.feed(data)
        if len(data) < MOST:
            break
    page.look = look
    _save(page, _file(config, partition))
    return records


# --- cutting ----------------------------------------------------------------------------------------------------------


def cut(
    book: SessionBook,
    config: Config,
    partition: Partition,
    before: Mapping[str, Allowed],
    now: Mapping[str, Allowed],
) -> tuple[list[Cut], list[Record]]:
    """End the sessions of whoever was allowed ``before`` and is not ``now``; stunnel takes new ones by ``now`` already.

    Return which were ended, and what else the log told meanwhile. What is in doubt is looked at again for a moment: the log
    comes through supervisord. Raises NetplanError, TunnelError, OSError.
    """
    old = {name: allowed.subjects for name, allowed in before.items()}
    new = {name: allowed.subjects for name, allowed in now.items()}
    touched = [name for name in old if name not in new or old[name].keys() - new[name].keys()]
    done: list[Cut] = []
    told: list[Record] = []
    if not touched:
        return done, told
    places = {place for name in touched for place in before[name].listens}
    # who comes from now on is judged by the new certificates already; a listing is no snapshot, so it is made twice
    old_ones = {one.cookie for _ in range(2) for one in _alive(places)}
    until = time.monotonic() + _DOUBT_SECONDS
    while True:
        waiting = time.monotonic() < until
        sockets = [one for one in _alive(places) if one.cookie in old_ones]
        sessions, records = book.live(config, partition)
        told += records
        alive = {(_service(one, before, touched, sessions), one.remote): one for one in sockets}
        found = sessions_to_cut(allowed_before=old, allowed_now=new, sessions=sessions, alive=alive)
        going = [one for one in found if not (one.doubtful and waiting)]
        sock_diag.destroy_all([alive[one.service, one.remote] for one in going])
        done += going
        if not waiting or len(going) == len(found):
            return done, told
        time.sleep(_PAUSE)


def _service(
    socket: sock_diag.Session,
    before: Mapping[str, Allowed],
    touched: Sequence[str],
    sessions: Mapping[tuple[str, Endpoint], LiveSession],
) -> str:
    """The service that a connection came by: several may have listened at that place, one after the other."""
    names = [name for name, allowed in before.items() if socket.local in allowed.listens]
    # where the log does not know it, it is in doubt, and so taken for one of those from which something was taken
    names.sort(key=lambda name: ((name, socket.remote) not in sessions, name not in touched))
    return names[0]


def all_of(services: Mapping[str, Allowed]) -> list[Cut]:
    """The connections that end with their stunnel. Raises NetplanError."""
    places = {place: name for name, allowed in services.items() for place in allowed.listens}
    return [Cut(places[one.local], one.remote, "the tunnel is gone") for one in _alive(places)]


def still_used(services: Mapping[str, Allowed], now: Mapping[str, Allowed]) -> dict[str, Allowed]:
    """Those of ``now`` with the places at which they listened before and still have sessions. Raises NetplanError."""
    left = {
        place for name, one in services.items() if name in now for place in one.listens - now[name].listens
    }
    used = {one.local for one in _alive(left)}
    return {
        name: Allowed(
            one.listens | (services[name].listens & used if name in services else frozenset()), one.subjects
        )
        for name, one in now.items()
    }


def _alive(places: Collection[Endpoint]) -> list[sock_diag.Session]:
    return [one for some in sock_diag.sessions(places).values() for one in some]
