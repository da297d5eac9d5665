"""What the control socket answers, and to whom.

| who | sees | does |
|---|---|---|
| root | everything | everything |
| members of the group `partitiond` | everything | `POST /1/apply` |
| the user of a partition | its own partition, the node's hardware | nothing |
| everybody else | the node's hardware | nothing |

The other verbs are root's alone: `try` and `sync` hold lanes up for as long as they like, `teardown` takes the node away.

Promises: what a tenant is told of a partition that is not its own does not depend on whether there is one; nothing that a
tenant asks costs more than its share: looks at the whole node are shared by all tenants, and what reads files is paced.
"""

from __future__ import annotations

import math
import threading
import time
import urllib.parse
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from partitiond import event_reader, metrics, node_metrics, status, usage_query
from partitiond.bounded_http import Refusal, Text, Unknown
from partitiond.errors import WrongUseError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from partitiond.bounded_http import Answer
    from partitiond.config import Config
    from partitiond.context import Context
    from partitiond.metrics import Tally
    from partitiond.peers import Peer

_MOST_EVENTS = 10_000
_TENANTS_EVENTS = 1000
_TENANTS_PERIODS = 100
_LOOK_SECONDS = 10.0
_FOR_MEMBERS = "/1/apply"
_PARTITIONS = "/1/partitions/"

# what a request of a tenant costs; it may spend so many at once, and has one more each second
_COSTS = {"/1/events": 10.0, "/1/usage": 5.0}
_PURSE = 30.0
_HALF_FORGOTTEN = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class _Request:
    """One request, taken apart."""

    method: str
    path: str
    query: Mapping[str, str]
    body: dict[str, Any]
    peer: Peer


class Api:
    """Answers the control socket.  ``verbs`` are what POST does, by path; each is given the body."""

    def __init__(
        self,
        context: Context,
        tally: Tally,
        verbs: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]],
    ) -> None:
        self._context, self._tally, self._verbs = context, tally, verbs
        self._paces = _Paces()
        self._looks = _SharedLook(context)
        self._reads = _SlowLane()  # of files and the ledger, for tenants
        self._readers: dict[str, Callable[[_Request], Answer]] = {
            "/1/node": lambda _: node_metrics.as_json(self._context.config),
            "/1/status": self._status,
            "/1/events": self._events,
            "/1/usage": self._usage,
            "/metrics": self._metrics,
        }

    def answer(self, method: str, path: str, body: dict[str, Any], peer: Peer) -> Answer:
        """Answer one request.  Raises Unknown, Refusal, a family error."""
        where, _, rest = path.partition("?")
        request = _Request(method, where, dict(urllib.parse.parse_qsl(rest)), body, peer)
        if not peer.sees_all:
            self._paces.spend(peer.partition or "others", _COSTS.get(where, 1.0))
        if method == "POST":
            if not (peer.is_root or (peer.sees_all and where == _FOR_MEMBERS)):
                raise _forbidden(peer)
            verb = self._verbs.get(where)
            if verb is None:
                raise Unknown
            return verb(body)
        reader = self._readers.get(where)
        if reader is not None:
            return reader(request)
        if where.startswith(_PARTITIONS):
            return self._partition(request)
        raise Unknown

    def _status(self, request: _Request) -> Answer:
        peer = request.peer
        if peer.sees_all:
            with self._context.steady():
                return status.node(self._context)
        found = self._looks.partition(_own(peer, None))
        own = [] if found is None else [found]
        return {"node": {"computer_id": self._context.config.computer_id}, "partitions": own}

    def _partition(self, request: _Request) -> Answer:
        name, peer = request.path.removeprefix(_PARTITIONS), request.peer
        if peer.sees_all:
            with self._context.steady():
                found = status.partition(self._context, name)
        else:
            found = self._looks.partition(_own(peer, name))
        if found is None:
            raise Unknown
        return found

    def _events(self, request: _Request) -> Answer:
        """The last events, the newest at the end."""
        peer, query = request.peer, request.query
        most = _MOST_EVENTS if peer.sees_all else _TENANTS_EVENTS
        limit = query.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 0 < int(limit) <= most):
            raise WrongUseError(
                "control.query", f"limit is {limit!r}", hint=f"allowed: a whole number from 1 to {most}"
            )
        log_dir, name = self._context.config.log_dir, query.get("partition")
        if peer.sees_all:
            return {"events": event_reader.last(log_dir, int(limit), name)}
        own = _own(peer, name)
        with self._reads.turn(own):
            found = event_reader.last(log_dir, int(limit), own)
        return {"events": _of_the_present_instance(found, own)}

    def _usage(self, request: _Request) -> Answer:
        peer, meters = request.peer, self._context.meters
        query = usage_query.parse(request.query, time.time())
        if peer.sees_all:
            with meters.reader() as ledger:
                return usage_query.answer(ledger, query)
        own = _own(peer, query.partition)
        if len(query.spans) > _TENANTS_PERIODS:
            hint = f"ask for {_TENANTS_PERIODS} at most"
            raise WrongUseError("usage.query", f"these are {len(query.spans)} periods", hint=hint)
        guid = self._context.store.instance(own).instance_guid
        with self._reads.turn(own), meters.reader() as ledger:
            # what an earlier instance used in this partition was somebody else's
            return usage_query.answer(ledger, replace(query, partition=own), only=lambda one: one == guid)

    def _metrics(self, request: _Request) -> Answer:
        peer = request.peer
        if peer.sees_all:
            text = metrics.everything(self._context, self._tally)
        else:
            text = metrics.of_partition(self._context, peer.partition)
        return Text(metrics.CONTENT_TYPE, text)


def _own(peer: Peer, asked: str | None) -> str:
    """Return the peer's partition; what is ``asked`` for is that, or nothing in particular.  Raises Refusal."""
    if peer.partition is None or asked not in (None, peer.partition):
        raise _forbidden(peer)
    return peer.partition


def _forbidden(peer: Peer) -> Refusal:
    return Refusal(
        403,
        "control.forbidden",
        f"uid {peer.uid} may not do this",
        "a partition's user sees its own partition, everybody /1/node and /metrics of the node",
    )


def _of_the_present_instance(events: list[dict[str, Any]], partition: str) -> list[dict[str, Any]]:
    """Leave out what concerns others too, and what was before the present instance came: that was somebody else's."""
    found: list[dict[str, Any]] = []
    for event in events:
        if event.get("partition") == partition:
            found = [] if event.get("event") == "instance.destroyed" else [*found, event]
    return found


class _Paces:
    """How much each may ask in a time."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._purses: dict[str, tuple[float, float]] = {}  # as many as there were partitions, and one

    def spend(self, name: str, cost: float) -> None:
        """Take the cost from its purse, which one more flows into each second.  Raises Refusal."""
        now = time.monotonic()
        with self._turn:
            left, at = self._purses.get(name, (_PURSE, now))
            left = min(_PURSE, left + now - at)
            if left < cost:
                self._purses[name] = (left, now)
                raise Refusal(429, "control.too_often", "too many requests", f"wait {cost - left:.0f} s")
            self._purses[name] = (left - cost, now)


class _SlowLane:
    """Lets one at a time through, and pauses for three times as long as it worked: all tenants together take a quarter of a
    processor at most.

    Of each tenant one request at most waits for its turn, the others wait for that one; and whose took the least time lately
    comes first. So whoever asks much waits for itself, and everybody else for one of its requests at most.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._own: dict[str, threading.Lock] = {}  # as many as there were partitions
        self._waiting: set[str] = set()
        self._busy = False
        self._worked: dict[
            str, tuple[float, float]
        ] = {}  # seconds, half of which are forgotten in a minute, as of when

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Wait for the turn of a tenant, and give it back at the end of the block."""
        with self._changed:
            own = self._own.setdefault(name, threading.Lock())
        with own:
            with self._changed:
                self._waiting.add(name)
                try:
                    self._changed.wait_for(lambda: not self._busy and self._next() == name)
                finally:
                    self._waiting.discard(name)
                self._busy = True
            began = time.monotonic()
            try:
                yield
            finally:
                seconds = time.monotonic() - began
                time.sleep(3 * seconds)
                with self._changed:
                    self._worked[name] = (self._cost(name) + seconds, time.monotonic())
                    self._busy = False
                    self._changed.notify_all()

    def _next(self) -> str:
        """Whose turn it is of those who wait: of who took the least."""
        return min(self._waiting, key=lambda name: (self._cost(name), name))

    def _cost(self, name: str) -> float:
        seconds, at = self._worked.get(name, (0.0, 0.0))
        return seconds * math.exp2((at - time.monotonic()) / _HALF_FORGOTTEN)


class _SharedLook:
    """The partitions as the last look at the whole node found them, which all tenants share: it costs 100 ms at 300."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._turn = threading.Lock()
        self._of: tuple[Config, float] | None = None
        self._found: dict[str, dict[str, Any]] = {}

    def partition(self, name: str) -> dict[str, Any] | None:
        """Return the object of one partition, at most some seconds old."""
        with self._turn, self._context.steady():
            config, now = self._context.config, time.monotonic()
            if self._of is None or self._of[0] is not config or now - self._of[1] > _LOOK_SECONDS:
                found = status.node(self._context)
                self._found = {item["id"]: item for item in found["partitions"]}
                self._of = (config, time.monotonic())
            return self._found.get(name)
