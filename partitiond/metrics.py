"""What the daemon counts of itself, and ``/metrics``: plain numbers here, OpenMetrics only when somebody asks.

Promises: whoever sees one partition is told nothing of others; what cannot be read is left out, and the rest is told.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from accounting.errors import AccountingError
from netplan.errors import NetplanError
from netplan.mesh_guard import VERDICTS
from partitiond import (
    certificate_expiry,
    metrics_text,
    node_metrics,
    supervision,
    tunnel_status,
    usage_metrics,
)
from partitiond.errors import sentence
from partitiond.incidents import watched_troubles
from partitiond.metering import Recorded
from partitiond.metrics_text import Family, family, labels
from partitiond.textfile import Textfile, memory_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from partitiond.context import Context
    from partitiond.node import Partition

logger = logging.getLogger(__name__)

CONTENT_TYPE = metrics_text.CONTENT_TYPE
_DURATION = "partitiond_lane_duration_seconds"
_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 10.0, 60.0, 600.0)


@dataclass(slots=True)
class _Lane:
    """Passes of a lane: how many took at most each of the bounds, all of them, their seconds, the last good one's end."""

    within: list[int] = field(default_factory=lambda: [0] * len(_BOUNDS))
    passes: int = 0
    seconds: float = 0.0
    succeeded_at: float | None = None


class Tally:
    """The daemon's own counts; from any thread."""

    def __init__(self) -> None:
        self.usage = usage_metrics.UsageText()
        self.textfile = Textfile()
        self._turn = threading.Lock()
        self._drift: Counter[str] = Counter()
        self._lanes: dict[str, _Lane] = {}

    def drift(self, resources: Counter[str]) -> None:
        """Count what was found drifting, by kind of resource (``tap``)."""
        with self._turn:
            self._drift.update(resources)

    def lane(self, name: str, seconds: float, *, good: bool) -> None:
        """Count a pass of a lane."""
        with self._turn:
            lane = self._lanes.setdefault(name, _Lane())
            lane.passes += 1
            lane.seconds += seconds
            for place, bound in enumerate(_BOUNDS):
                lane.within[place] += seconds <= bound
            if good:
                lane.succeeded_at = time.time()

    def families(self) -> Iterator[Family]:
        """The counts as families of metrics."""
        with self._turn:
            drift = [(labels(("resource", name)), count) for name, count in sorted(self._drift.items())]
            lanes = sorted(self._lanes.items())
            passes = "".join(_histogram(name, lane) for name, lane in lanes)
            good = [
                (labels(("lane", name)), lane.succeeded_at)
                for name, lane in lanes
                if lane.succeeded_at is not None
            ]
        yield family("partitiond_drift", "counter", "Resources found other than they should be.", drift)
        yield Family(_DURATION, "histogram", "How long the passes of each lane took.", passes, "seconds")
        yield family(
            "partitiond_lane_last_success_timestamp_seconds",
            "gauge",
            "When a pass of each lane last ended without any failure.",
            good,
            unit="seconds",
        )


def _histogram(name: str, lane: _Lane) -> str:
    buckets = zip((*map(str, _BOUNDS), "+Inf"), (*lane.within, lane.passes), strict=True)
    which = labels(("lane", name))
    return "".join(
        (
            *(f"{_DURATION}_bucket{labels(('lane', name), ('le', le))} {count}\n" for le, count in buckets),
            f"{_DURATION}_count{which} {lane.passes}\n",
            f"{_DURATION}_sum{which} {lane.seconds}\n",
        )
    )


def everything(context: Context, tally: Tally) -> bytes:
    """Return the text of ``/metrics`` for those who may see all."""
    return metrics_text.openmetrics(_everything(context, tally))


def textfile(context: Context, tally: Tally) -> str:
    """Return the same as node_exporter reads it from a file, without the node's hardware, which it knows better."""
    return metrics_text.prometheus(_daemon(context, tally))


def after_pass(context: Context, tally: Tally) -> None:
    """Make ready what those who scrape will ask for, right after a pass of the meters, however that ended."""
    try:
        tally.usage.prepare(context.meters)
    except AccountingError as error:
        logger.warning("metrics: usage stays as it was: %s", sentence(error))
    path = context.config.accounting.textfile
    tally.textfile.update(
        memory_path(context.config.state_dir), path, "" if path is None else textfile(context, tally)
    )


def of_partition(context: Context, partition: str | None) -> bytes:
    """Return the text of ``/metrics`` for the user of a partition; None: for those who have none."""
    found = list(node_metrics.families(context.config))
    if partition is not None:
        found += _partitions(context, partition)
        recorded = _recorded(context)
        totals = [entry for entry in recorded.totals if entry.id == partition]
        denied = {key: count for key, count in recorded.denied.items() if key[0] == partition}
        found += usage_metrics.families(totals, denied)
    return metrics_text.openmetrics(found)


def _recorded(context: Context) -> Recorded:
    try:
        return context.meters.recorded()
    except AccountingError as error:
        logger.warning("metrics: usage is left out: %s", sentence(error))
        return Recorded()


def _everything(context: Context, tally: Tally) -> Iterator[Family]:
    yield from _daemon(context, tally)
    yield from node_metrics.families(context.config)


def _daemon(context: Context, tally: Tally) -> Iterator[Family]:
    yield from tally.families()
    reachable = context.master.as_json()["reachable"]
    yield family(
        "partitiond_master_up",
        "gauge",
        "Whether the master's last answer was of use.",
        [] if reachable is None else [("", int(bool(reachable)))],
    )
    yield family(
        "partitiond_certificate_not_after_timestamp_seconds",
        "gauge",
        "When the certificates that the master gave end: the node's, and those of instances.",
        _ends(context),
        unit="seconds",
    )
    yield family(
        "partitiond_mesh_peer_up",
        "gauge",
        "Whether a peer answers over the mesh.",
        [(labels(("peer", name)), int(up)) for name, up in sorted(context.mesh.up.items())],
    )
    yield _mesh_dropped(context)
    yield from _partitions(context)
    try:
        yield from tally.usage.families(context.meters)
    except AccountingError as error:
        logger.warning("metrics: usage is left out: %s", sentence(error))


def _mesh_dropped(context: Context) -> Family:
    found = context.meters.mesh_dropped()
    verdicts = VERDICTS if context.config.mesh else ()
    return family(
        "partitiond_mesh_dropped_packets",
        "counter",
        "What the mesh's source checks dropped, by direction and reason.",
        [
            (labels(("direction", one.direction), ("reason", one.reason)), found.get(one, 0))
            for one in verdicts
        ],
        unit="packets",
    )


def _ends(context: Context) -> list[tuple[str, float]]:
    node = context.node
    found = certificate_expiry.dates(context.config, node.partitions if node else ())
    return [(labels(("subject", name)), end.timestamp()) for name, end in sorted(found.items())]


def _partitions(context: Context, only: str | None = None) -> Iterator[Family]:
    """What partitions are, and how they and their tunnels are; of all, or of one."""
    node = context.node
    known = [item for item in (node.partitions if node else ()) if only in (None, item.id)]
    yield family(
        "partitiond_partition",
        "info",
        "The partitions of the node and what they own.",
        ((_owned(item), 1) for item in known),
    )
    yield from _up(context, known)
    yield from _promises(context, known)
    yield from _quotas(context, known)
    yield from _tunnels(context, known)


def _owned(item: Partition) -> str:
    tap = item.network.tap
    return labels(
        ("partition", item.id),
        ("user", item.user),
        ("ipv4", str(item.ipv4)),
        ("ipv6", str(item.ipv6 or "")),
        ("ipv6_range", str(item.network.ipv6_range or "")),
        ("tap", tap.name if tap else ""),
    )


def _up(context: Context, known: list[Partition]) -> Iterator[Family]:
    """Of partitions that shall run: whether they do, by what supervisord said in the last look at the whole node."""
    looked = context.looked
    if looked is None:
        return
    # a group that supervisord does not have, or that cannot be told of because it does not answer, does not run either
    there = {one.group for one in looked.processes}
    expected = set(context.supervisor.group_names())
    trouble = watched_troubles(looked.processes).keys() | (expected - there)
    states, damaged = context.store.readable()
    to_run = context.store.to_run()
    # of a state that cannot be read the programs alone tell
    wanted = [
        item.id for item in known if item.id in to_run and (item.id not in damaged or item.id in expected)
    ]
    yield family(
        "partitiond_partition_up",
        "gauge",
        "Whether an instance that shall be started is, and none of its services is out.",
        (
            (
                labels(("partition", name)),
                int((name in damaged or states[name].life == "started") and name not in trouble),
            )
            for name in wanted
        ),
    )


def _promises(context: Context, known: list[Partition]) -> Iterator[Family]:
    """Of partitions whose promises were run: how many fail. Nothing where nobody has run any yet."""
    pages = [(item.id, context.promises.known(item.id)) for item in known]
    told = [
        (labels(("partition", name)), len(page.failing())) for name, page in pages if page and page.ran_at
    ]
    if told:
        yield family(
            "partitiond_partition_promise_failed", "gauge", "Promises of an instance that fail.", told
        )


def _quotas(context: Context, known: list[Partition]) -> Iterator[Family]:
    quotas, standings = context.config.quotas, context.quotas.standings()
    asked = [item.id for item in known if item.id in quotas]
    if not asked:
        return
    yield family(
        "partitiond_partition_quota_bytes",
        "gauge",
        "What a partition may exchange with other nodes in a calendar month (UTC).",
        ((labels(("partition", name)), quotas[name].octets) for name in asked),
        unit="bytes",
    )
    yield family(
        "partitiond_partition_quota_used_bytes",
        "gauge",
        "What of that its present instance has used this month.",
        ((labels(("partition", name)), standings[name].used) for name in asked if name in standings),
        unit="bytes",
    )


def _tunnels(context: Context, partitions: list[Partition]) -> Iterator[Family]:
    """The tunnels that the last look at the node found declared, as they are now."""
    looked = context.looked
    if looked is None:
        return
    running = supervision.running_groups(looked.processes)
    known = [item for item in partitions if item.id in looked.plan.declared]
    plan, now = looked.plan, datetime.now(UTC)
    try:
        states = tuple(tunnel_status.states(known, plan.declared, plan.published, running, now))
    except (NetplanError, OSError) as error:  # the rest is told all the same
        logger.warning("metrics: tunnels are left out: %s", sentence(error))
        return
    names = [
        labels(
            ("partition", one.tunnel.partition),
            ("tunnel", one.tunnel.short_name),
            ("mode", one.tunnel.mode),
        )
        for one in states
    ]
    told = list(zip(names, states, strict=True))
    up = [(where, 0 if one.reason else 1) for where, one in told]
    yield family("partitiond_tunnel_up", "gauge", "Whether stunnel listens there.", up)
    sessions = [(where, one.sessions) for where, one in told]
    yield family("partitiond_tunnel_sessions", "gauge", "Sessions at this moment.", sessions)
    yield family(
        "partitiond_tunnel_certificate_not_after_timestamp_seconds",
        "gauge",
        "When the certificate that the tunnel shows ends.",
        [(where, one.not_after.timestamp()) for where, one in told if one.not_after],
        unit="seconds",
    )
