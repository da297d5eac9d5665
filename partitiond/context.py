"""What every part of a pass needs at hand: configuration, state, supervisord, the master, and the way to stop."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from partitiond.build_server import BuildServer
from partitiond.events import SESSIONS, EventLog
from partitiond.farewells import Farewells
from partitiond.incidents import IncidentWatch
from partitiond.master import Connection, MasterContact
from partitiond.mesh_book import MeshBook
from partitiond.messages import Outbox
from partitiond.metering import Metering, ledger_path
from partitiond.promise_book import PromiseBook
from partitiond.quotas import QuotaBook
from partitiond.slapformat import Copies
from partitiond.state import Store
from partitiond.supervision import Supervisor
from partitiond.told_ends import ToldEnds
from partitiond.tunnel_sessions import SessionBook
from partitiond.usage_scripts import Turns
from partitiond.wishes import Wishes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from accounting.outbox import Entry, State
    from netplan.model import Link
    from partitiond.choices import Choice
    from partitiond.config import Config
    from partitiond.node import Node
    from partitiond.node_plan import Looked
    from partitiond.process_events import ProcessEnded
    from partitiond.reporting import ReportingClient


def _nobody() -> None:
    """Wake nobody: without a daemon there is no other lane."""


def _unheard(_: ProcessEnded) -> None:
    """Nobody wants to know of processes."""


def _unknown() -> None:
    """Nobody listens to the kernel."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration in force and what follows from it; exchanged as a whole."""

    config: Config
    supervisor: Supervisor
    events: EventLog
    session_events: EventLog
    formatted: Copies

    @classmethod
    def of(cls, config: Config) -> Settings:
        """Make the settings of a configuration."""
        log_dir = config.log_dir
        sessions = EventLog(log_dir, name=SESSIONS)
        return cls(config, Supervisor(config), EventLog(log_dir), sessions, Copies(config))


@dataclass(slots=True)
class Context:
    """One node at work.

    ``applying`` is held while the node is being changed; ``node`` is what the last look at it gave, ``choice`` the
    addresses that it gave to the partitions, ``looked`` what the last look at the whole node led to. ``looking`` is called
    right before such a look: what was told of the node until then is answered by it. ``links`` are those that somebody who
    listens knows, None where nobody does. ``taken_in_at`` is when partitions were last asked for their own usage files;
    ``judged`` what became of documents, where the ledger could not be told yet. ``free_seen`` is when the directories of free
    partitions were last changed, of those that were looked at; ``building``: since when
    which instances are being built.
    """

    current: Settings
    store: Store
    meters: Metering
    master: MasterContact
    quotas: QuotaBook
    promises: PromiseBook
    outbox: Outbox
    connection: Connection
    wishes: Wishes = field(default_factory=Wishes)
    ends: ToldEnds = field(default_factory=ToldEnds)
    sessions: SessionBook = field(default_factory=SessionBook)
    turns: Turns = field(default_factory=Turns)
    mesh: MeshBook = field(default_factory=MeshBook)
    incidents: IncidentWatch = field(default_factory=IncidentWatch)
    builds: BuildServer = field(default_factory=BuildServer)
    farewells: Farewells = field(default_factory=Farewells)
    node: Node | None = None
    choice: Choice | None = None
    looked: Looked | None = None
    taken_in_at: float | None = None
    judged: list[tuple[Entry, State, str]] = field(default_factory=list)
    free_seen: dict[str, int] = field(default_factory=dict)
    building: dict[str, float] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    applying: threading.RLock = field(default_factory=threading.RLock)
    wake_report: Callable[[], None] = _nobody
    wake_instances: Callable[[], None] = _nobody
    day_ended: Callable[[], None] = _nobody
    limits_changed: Callable[[], None] = _nobody
    # called by the thread that hears of supervisord's processes, at once and for each: it has to return soon
    process_ended: Callable[[ProcessEnded], None] = _unheard
    looking: Callable[[], None] = _nobody
    links: Callable[[], Mapping[str, Link] | None] = _unknown
    # what only a daemon knows to be open; each may be empty
    troubles: dict[str, Callable[[], str]] = field(default_factory=dict)
    _local: threading.local = field(default_factory=threading.local)

    @classmethod
    def of(cls, config: Config) -> Context:
        """Make the context of a configuration."""
        state = config.state_dir
        return cls(
            current=Settings.of(config),
            store=Store(state),
            meters=Metering(ledger_path(state)),
            master=MasterContact(state / "master.json"),
            quotas=QuotaBook(state / "quotas.json"),
            promises=PromiseBook(state / "promises"),
            outbox=(outbox := Outbox(state)),
            connection=Connection(outbox),
        )

    def adopt(self, config: Config) -> None:
        """Put another configuration into force; the caller holds ``applying``."""
        self.current = Settings.of(config)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Let this thread see the settings that are in force now, and no others, until the end of the block."""
        before = getattr(self._local, "settings", None)
        self._local.settings = self.current
        try:
            yield
        finally:
            self._local.settings = before

    @contextmanager
    def in_lane(self, name: str) -> Iterator[None]:
        """Let this thread be the one of a lane until the end of the block: it goes along with what others learn."""
        self._local.lane = name
        try:
            yield
        finally:
            self._local.lane = ""

    @property
    def lane(self) -> str:
        """The lane that this thread works for by itself; empty where somebody asked for the pass."""
        name: str = getattr(self._local, "lane", "")
        return name

    def clock(self) -> float:
        """The time in Unix seconds, as the meters have it."""
        return self.meters.clock()

    @property
    def node_in_force(self) -> Node | None:
        """What the last look at the node gave, if that was by the configuration in force."""
        found = self.node
        return found if found is not None and found.config is self.config else None

    @property
    def _settings(self) -> Settings:
        pinned: Settings | None = getattr(self._local, "settings", None)
        return pinned or self.current

    @property
    def config(self) -> Config:
        """The configuration: the one in force, or in a :meth:`steady` block the one that was in force at its begin."""
        return self._settings.config

    @property
    def supervisor(self) -> Supervisor:
        """The node's supervisord."""
        return self._settings.supervisor

    @property
    def session_events(self) -> EventLog:
        """The log of what peers do at tunnels."""
        return self._settings.session_events

    @property
    def events(self) -> EventLog:
        """The log of what happened."""
        return self._settings.events

    @property
    def formatted(self) -> Copies:
        """What slapos.core left."""
        return self._settings.formatted

    @property
    def client(self) -> ReportingClient:
        """The client of the master; all lanes share its connection. Reports that it does not take wait in :attr:`outbox`."""
        return self.connection.of(self.config)

    def is_current(self, client: ReportingClient) -> bool:
        """Whether a client is that of the configuration in force, and not of one that a pass began with."""
        return self.connection.of(self.current.config) is client

    @property
    def first_pause(self) -> float:
        """Seconds for which the master is left alone after a first failure."""
        intervals = self.config.intervals
        return min(intervals.software, intervals.instances)
