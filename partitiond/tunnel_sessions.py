"""Who is connected through the tunnels: followed in the logs of stunnel, and cut where somebody is allowed no longer.

Promises: what is known of live sessions outlives the daemon and the rotation of logs, in a file beside the configuration; what
is told is what a process of the tenant wrote, and informative; whoever is cut is found by the kernel's own table and that log,
at a tunnel from which a certificate was taken.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netplan import sock_diag
from partitiond import files, identities, tunnels
from stunnel_mgr.log_follower import MOST, LogFollower, Place
from stunnel_mgr.revocation import sessions_to_cut
from stunnel_mgr.session_log import SessionReader

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.node import Partition
    from partitiond.tunnel_memory import Allowed
    from stunnel_mgr.model import Endpoint
    from stunnel_mgr.revocation import Cut
    from stunnel_mgr.session_records import LiveSession, Record

FILE = "sessions.json"

_MOST_BYTES = 32 << 20  # of one reading: more than supervisord keeps
_DOUBT_SECONDS = 1.0
_PAUSE = 0.05


@dataclass(slots=True)
class _Page:
    """What is known of one partition's sessions, up to which place of its log, and how that looked then."""

    reader: SessionReader
    follower: LogFollower
    look: tuple[int, ...] = ()


class SessionBook:
    """The live sessions of all tunnels, from whatever thread."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._pages: dict[str, _Page] = {}

    def news(self, config: Config, partition: Partition) -> list[Record]:
        """Read on; return what ended or was refused since the last time. Raises TunnelError ``tunnel.observe``, OSError."""
        with self._turn:
            return self._read(config, partition)[1]

    def live(
        self, config: Config, partition: Partition
    ) -> tuple[Mapping[tuple[str, Endpoint], LiveSession], list[Record]]:
        """Read on; return what is live, by service and peer, and what :meth:`news` does."""
        with self._turn:
            page, records = self._read(config, partition)
            return page.reader.by_remote(), records

    def _read(self, config: Config, partition: Partition) -> tuple[_Page, list[Record]]:
        log, file = tunnels.log_file(config, partition), identities.directory_of(config, partition.id) / FILE
        page, look = self._pages.get(partition.id), _look(log)
        if page is None:
            page = self._pages[partition.id] = _load(log, file)
        elif look == page.look:
            return page, []
        records = _read_on(page)
        page.look = look
        _save(page, file)
        return page, records

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


def _load(log: Path, file: Path) -> _Page:
    try:
        value = json.loads(file.read_bytes())
        reader, place = SessionReader.from_json(value["reader"]), Place.from_json(value["place"])
    except (OSError, ValueError, KeyError, TypeError):
        reader, place = SessionReader(), None
    return _Page(reader, LogFollower(log, place))


def _save(page: _Page, file: Path) -> None:
    place = page.follower.place
    value = {"reader": page.reader.to_json(), "place": place.to_json() if place else None}
    if file.parent.is_dir():
        files.write_path(file, json.dumps(value).encode(), mode=0o600)


def _read_on(page: _Page) -> list[Record]:
    records: list[Record] = []
    for _ in range(_MOST_BYTES // MOST):
        data = page.follower.read()
        if page.follower.lost:
            page.reader.forget()
        records += page.reader.feed(data)
        if len(data) < MOST:
            break
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
    services = {
        endpoint: name
        for name, allowed in before.items()
        if name not in new or old[name].keys() - new[name].keys()
        for endpoint in allowed.listens
    }
    done: list[Cut] = []
    told: list[Record] = []
    if not services:
        return done, told
    # who comes from now on is judged by the new certificates already; a listing is no snapshot, so it is made twice
    old_ones = {one.cookie for _ in range(2) for one in _alive(services).values()}
    until = time.monotonic() + _DOUBT_SECONDS
    while True:
        waiting = time.monotonic() < until
        alive = {key: one for key, one in _alive(services).items() if one.cookie in old_ones}
        sessions, records = book.live(config, partition)
        told += records
        found = sessions_to_cut(allowed_before=old, allowed_now=new, sessions=sessions, alive=alive)
        going = [one for one in found if not (one.doubtful and waiting)]
        sock_diag.destroy_all([alive[one.service, one.remote] for one in going])
        done += going
        if not waiting or len(going) == len(found):
            return done, told
        time.sleep(_PAUSE)


def _alive(services: Mapping[Endpoint, str]) -> dict[tuple[str, Endpoint], sock_diag.Session]:
    found = sock_diag.sessions(tuple(services))
    return {(services[listen], one.remote): one for listen, some in found.items() for one in some}
