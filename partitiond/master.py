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
    from slap_client.client import SlapClient

# what of a configuration decides how the master is talked to
_Key: TypeAlias = "tuple[str, str, Path | None, Path | None, Path | None, str]"
_HELD = 3


@dataclass(slots=True)
class Connection:
    """The clients of the master: one for all threads as long as the configuration says the same.

    A pass that began before a reload has that of before; its connection is closed as soon as no call uses it.
    """

    _held: dict[_Key, SlapClient] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, config: Config) -> SlapClient:
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
                found = self._held[key] = _client(config)
            return found

    def close(self) -> None:
        """Close what is open, as soon as no call uses it."""
        with self._lock:
            for client in self._held.values():
                client.close()
            self._held.clear()


def _client(config: Config) -> SlapClient:
    from slap_client.client import SlapClient  # noqa: PLC0415 - verbs that talk to no master need no HTTP

    return SlapClient(
        config.master_url,
        config.computer_id,
        cert_file=_text(config.cert_file),
        key_file=_text(config.key_file),
        ca_file=_text(config.master_ca_file),
        fingerprint=config.grid.master_fingerprint,
    )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


class MasterContact:
    """When the master last gave a usable answer.

    On disk only when it comes or goes, so that a pass without change writes nothing.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._reachable: bool | None = None
        self._last: float | None = None
        try:
            found = json.loads(self._file.read_bytes())
            self._reachable, self._last = found["reachable"], found["last_contact"]
        except (OSError, ValueError, KeyError):
            return

    def note(self, reachable: bool) -> None:
        """Remember how a call went."""
        changed = reachable != self._reachable
        self._reachable = reachable
        if reachable:
            self._last = time.time()
        if changed:
            value = {"reachable": reachable, "last_contact": self._last}
            files.write_path(self._file, json.dumps(value).encode(), mode=0o600)

    def as_json(self) -> dict[str, object]:
        """The contract's fields."""
        last = None if self._last is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._last))
        return {"reachable": self._reachable, "last_contact": last}
