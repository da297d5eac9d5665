"""The node's memory of its master, whether it answers and since when not; and the connection to it."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from partitiond import files

if TYPE_CHECKING:
    from pathlib import Path

    from partitiond.config import Config
    from partitiond.messages import Outbox
    from partitiond.reporting import ReportingClient

# what of a configuration decides how the master is talked to
_Key: TypeAlias = "tuple[str, str, Path | None, Path | None, Path | None, str]"
_HELD = 3


@dataclass(slots=True)
class Connection:
    """The clients of the master: one for all threads as long as the configuration says the same.

    ``outbox`` is where reports wait. A pass that began before a reload has the client of before, whose connection is closed as
    soon as no call uses it.
    """

    outbox: Outbox
    _held: dict[_Key, ReportingClient] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, config: Config) -> ReportingClient:
        """The client for a configuration."""
        pin = config.grid.master_fingerprint
        key = (
            config.master_url,
            config.computer_id,
            config.cert_file,
            config.key_file,
            config.master_ca_file,
            pin,
        )
        with self._lock:
            found = self._held.get(key)
            if found is None:
                for other in self._held.values():
                    other.close()
                while len(self._held) >= _HELD:
                    del self._held[next(iter(self._held))]
                found = self._held[key] = _client(config, self.outbox)
            return found

    def close(self) -> None:
        """Close what is open, as soon as no call uses it."""
        with self._lock:
            for client in self._held.values():
                client.close()
            self._held.clear()


def _client(config: Config, outbox: Outbox) -> ReportingClient:
    from partitiond.reporting import ReportingClient  # noqa: PLC0415 - verbs that talk to no master need no HTTP

    return ReportingClient(
        config.master_url,
        config.computer_id,
        cert_file=_text(config.cert_file),
        key_file=_text(config.key_file),
        ca_file=_text(config.master_ca_file),
        fingerprint=config.grid.master_fingerprint,
        outbox=outbox,
    )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


class MasterContact:
    """When the master last gave a usable answer.

    On disk only when it comes or goes, so that a pass without change writes nothing.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._turn = threading.Lock()
        self._reachable: bool | None = None
        self._last: float | None = None
        try:
            found = json.loads(self._file.read_bytes())
            self._reachable, self._last = found["reachable"], found["last_contact"]
        except (OSError, ValueError, KeyError):
            return

    def note(self, reachable: bool) -> str:
        """Remember how a call went. Return what to tell when the master came or went, else nothing."""
        with self._turn:
            changed, known, before = reachable != self._reachable, self._reachable is not None, self._last
            self._reachable = reachable
            if reachable:
                self._last = time.time()
            if not changed:
                return ""
            value = {"reachable": reachable, "last_contact": self._last}
            files.write_path(self._file, json.dumps(value).encode(), mode=0o600)
        if not reachable:
            ago = f"its last good answer was {_since(before)} ago" if before else "it never gave one"
            return f"the master gives no answer of use; {ago}; what runs keeps running"
        if not known:
            return ""
        return f"the master answers again after {_since(before)}" if before else "the master answers now"

    def as_json(self) -> dict[str, object]:
        """The contract's fields."""
        last = None if self._last is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._last))
        return {"reachable": self._reachable, "last_contact": last}


def _since(moment: float) -> str:
    """How long, for people."""
    left = max(0, round(time.time() - moment))
    days, left = divmod(left, 86400)
    hours, left = divmod(left, 3600)
    parts = ((days, "d"), (hours, "h"), (left // 60, "min"), (left % 60, "s"))
    return " ".join([f"{count} {unit}" for count, unit in parts if count][:2]) or "0 s"
