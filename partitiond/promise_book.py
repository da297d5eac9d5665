"""What is known of each partition's promises, and what the master was told of it.

Lives in memory; a change of a state, and what the master was told, is also on disk (``state_dir/promises/``), so that a daemon
that begins anew tells nothing twice, and readers without a daemon see it. Where no daemon runs, and a program of its own makes
each pass, that keeps all of it there: what is due when, and what failed how often in a row.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accounting.model import iso_utc
from partitiond import files
from partitiond.pacing import Allowance
from partitiond.promise_results import shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from partitiond.promise_results import PromiseResult

logger = logging.getLogger(__name__)

ALL = "promise/(all)"
"""The key of what is wrong with the run of a partition's promises as a whole."""

_LONGEST_REST = 86400.0  # of what is remembered on disk: the clock may have been set back since
_MOST_TOLD, _HOUR = (
    20,
    3600.0,
)  # events of a partition: a tenant may let its promises fail as often as it likes


@dataclass(slots=True)
class Standing:
    """How a promise stands: since when, what it said last and how long it took; ``due`` is by the monotonic clock."""

    failed: bool
    message: str
    since: float
    seconds: float
    row: int = 0
    due: float = 0.0
    tested: bool = True
    sensed: bool = True
    bang: bool = False


@dataclass(slots=True)
class Page:
    """The promises of one partition's instance.

    ``told``: the master was told of a failure in between. ``broken``: at processing some failed; that is the instance's own
    failure. ``faults``: how many runs in a row were no good as a whole. ``last``: those that had their turn in a run that had
    no time for all. ``posted``: some are incidents.
    """

    guid: str
    standings: dict[str, Standing] = field(default_factory=dict)
    told: bool = False
    broken: bool = False
    faults: int = 0
    ran_at: float = 0.0
    slow: bool = False
    last: frozenset[str] = frozenset()
    bangs: int = 0
    bang_after: float = 0.0
    posted: bool = False

    def failing(self) -> dict[str, str]:
        """The names of those that fail, and what they say."""
        return {shown(key): one.message for key, one in sorted(self.standings.items()) if one.failed}


class PromiseBook:
    """The pages of all partitions. A page is written by whoever has its partition's turn."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._pages: dict[str, Page] = {}
        self._turns: dict[str, threading.Lock] = {}
        self.allowance = Allowance(_MOST_TOLD, _HOUR)
        self._resting: Counter[str] = Counter()
        # partitions whose last processing failed by promises that have become good since
        self.mended: set[str] = set()

    @contextmanager
    def turn(self, partition: str, *, wait: bool) -> Iterator[bool]:
        """Take the turn of a partition for the block; whether it was got."""
        with self._lock:
            lock = self._turns.setdefault(partition, threading.Lock())
        got = lock.acquire(blocking=wait)
        try:
            yield got
        finally:
            if got:
                lock.release()

    @contextmanager
    def resting(self, partition: str) -> Iterator[None]:
        """Find no anomalies of a partition during the block: it is being processed, and tested at the end of that."""
        with self._lock:
            self._resting[partition] += 1
        try:
            yield
        finally:
            with self._lock:
                self._resting[partition] -= 1

    def rests(self, partition: str) -> bool:
        """Whether a partition is being processed."""
        with self._lock:
            return self._resting[partition] > 0

    def page(self, partition: str, guid: str) -> Page:
        """The page of a partition's instance: a new one for another instance."""
        with self._lock:
            found = self._pages.get(partition)
            if found is None:
                found = self._pages[partition] = self._read(partition) or Page(guid)
            if found.guid != guid:
                found = self._pages[partition] = Page(guid)
            return found

    def known(self, partition: str) -> Page | None:
        """What is known of a partition, from whoever ran its promises."""
        with self._lock:
            return self._pages.get(partition) or self._read(partition)

    def forget(self, partition: str) -> None:
        """Forget a partition whose instance does not run. Raises OSError."""
        with self._lock:
            self._pages.pop(partition, None)
            self.mended.discard(partition)
            if self._path(partition).exists():
                files.remove_path(self._path(partition))

    def partitions(self) -> list[str]:
        """The partitions of which something is known, in memory or on disk."""
        with self._lock:
            there = self._directory.glob("*.json") if self._directory.is_dir() else ()
            return sorted({*self._pages, *(path.stem for path in there)})

    def ran(self) -> dict[str, Page]:
        """The pages of partitions whose promises were run since this program began."""
        with self._lock:
            return {name: page for name, page in self._pages.items() if page.ran_at}

    def save(self, partition: str, page: Page) -> None:
        """Remember what must outlive the daemon. Raises OSError."""
        files.make_directory(self._directory, 0o700)
        files.write_path(self._path(partition), _content(page), mode=0o600)

    def keep(self) -> None:
        """Remember all that the next program has to know of what was run by this one. Raises OSError."""
        for name, page in self.ran().items():
            try:
                known = self._path(name).read_bytes()
            except FileNotFoundError:
                known = b""
            if (page.standings or known) and _content(page) != known:
                self.save(name, page)

    def _path(self, partition: str) -> Path:
        return self._directory / f"{partition}.json"

    def _read(self, partition: str) -> Page | None:
        """What was remembered; what cannot be read is found out anew by the next run."""
        try:
            value = json.loads(self._path(partition).read_bytes())
            standings = {
                key: Standing(
                    failed=bool(one["failed"]),
                    message=str(one["message"]),
                    since=float(one["since"]),
                    seconds=float(one["seconds"]),
                    # one that is an anomaly failed as often as it takes
                    row=int(one.get("row", 3 if one["failed"] else 0)),
                    due=_monotonic(one.get("due", 0.0)),
                    bang=bool(one.get("bang", False)),
                )
                for key, one in value["promises"].items()
            }
            return Page(
                str(value["guid"]),
                standings,
                told=bool(value["told"]),
                broken=bool(value["broken"]),
                faults=int(value.get("faults", 0)),
                bangs=int(value.get("bangs", 0)),
                bang_after=_monotonic(value.get("bang_after", 0.0)),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: cannot be read, and is made anew: %s", self._path(partition), error)
            return None


def _content(page: Page) -> bytes:
    """What is on disk of a page."""
    value = {
        "guid": page.guid,
        "told": page.told,
        "broken": page.broken,
        "faults": page.faults,
        "bangs": page.bangs,
        "bang_after": _unix(page.bang_after),
        "promises": {
            key: {
                "failed": one.failed,
                "message": one.message,
                "since": one.since,
                "seconds": one.seconds,
                "row": one.row,
                "due": _unix(one.due),
                "bang": one.bang,
            }
            for key, one in sorted(page.standings.items())
        },
    }
    return json.dumps(value).encode("ascii")


def _unix(at: float) -> int:
    """A time of the monotonic clock in whole Unix seconds: what was read is written as it was; 0 for what is over."""
    left = at - time.monotonic()
    return round(time.time() + left) if left > 0 else 0


def _monotonic(at: float) -> float:
    left = float(at) - time.time()
    return time.monotonic() + left if 0 < left <= _LONGEST_REST else 0.0


def stand(result: PromiseResult, before: Standing | None, now: float) -> Standing:
    """How a promise stands after a result; one that had nothing to say stands as it did. Pure but for the clock."""
    if result.form == "none" and before is not None:
        failed, message = before.failed, before.message
    else:
        failed, message = result.failed, result.message
    return Standing(
        failed=failed,
        message=message,
        since=before.since if before is not None and before.failed == failed else now,
        seconds=result.seconds,
        row=result.row,
        due=time.monotonic() + result.periodicity,
        tested=result.tested,
        sensed=result.sensed,
        bang=result.bang,
    )


def as_json(page: Page | None) -> list[dict[str, Any]]:
    """The promises of a partition as ``status`` shows them."""
    if page is None:
        return []
    return [
        {
            "name": shown(key),
            "kind": key.partition("/")[0],
            "state": "failed" if one.failed else "ok",
            "message": one.message,
            "since": iso_utc(one.since),
            "seconds": round(one.seconds, 3),
        }
        for key, one in sorted(page.standings.items())
    ]
