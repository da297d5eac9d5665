"""What every part of a pass needs at hand: configuration, state, supervisord, the master, and the way to stop."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from partitiond.master import MasterContact
from partitiond.metering import Metering, ledger_path
from partitiond.slapformat import Copies
from partitiond.state import Store
from partitiond.supervision import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from partitiond.choices import Choice
    from partitiond.config import Config
    from partitiond.node import Node
    from slap_client.client import SlapClient


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _nobody() -> None:
    """Wake nobody: without a daemon there is no other lane."""


@dataclass(slots=True)
class Context:
    """One node at work.

    ``applying`` is held while the node is being changed; ``node`` is what the last look at it gave, ``choice`` the
    addresses that it gave to the partitions. ``formatted`` is what slapos.core left.
    """

    config: Config
    store: Store
    supervisor: Supervisor
    meters: Metering
    master: MasterContact
    formatted: Copies
    node: Node | None = None
    choice: Choice | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    applying: threading.RLock = field(default_factory=threading.RLock)
    wake_report: Callable[[], None] = _nobody
    wake_instances: Callable[[], None] = _nobody
    _local: threading.local = field(default_factory=threading.local)

    @classmethod
    def of(cls, config: Config) -> Context:
        """Make the context of a configuration."""
        state = config.state_dir
        return cls(
            config=config,
            store=Store(state),
            supervisor=Supervisor(config),
            meters=Metering(ledger_path(state)),
            master=MasterContact(state / "master.json"),
            formatted=Copies(config),
        )

    @property
    def client(self) -> SlapClient:
        """The connection to the master, one per thread: a lane that waits for an answer holds up no other."""
        client: SlapClient | None = getattr(self._local, "client", None)
        if client is None:
            from slap_client.client import SlapClient  # noqa: PLC0415 - verbs that talk to no master need no HTTP

            config = self.config
            client = SlapClient(
                config.master_url,
                config.computer_id,
                cert_file=_text(config.cert_file),
                key_file=_text(config.key_file),
                ca_file=_text(config.master_ca_file),
            )
            self._local.client = client
        return client
