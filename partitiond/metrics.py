"""What the daemon counts of itself, and ``/metrics``: plain numbers here, OpenMetrics only when somebody asks."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from netplan import counters
from netplan.errors import NetplanError
from partitiond import metering, supervision, tunnel_status
from partitiond.errors import sentence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from partitiond.context import Context

logger = logging.getLogger(__name__)

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

    def families(self) -> Iterator[Metric]:
        """The counts as families of metrics."""
        from prometheus_client.metrics_core import (  # noqa: PLC0415 - 13 MB and 60 ms, only for who asks
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        drift = CounterMetricFamily(
            "partitiond_drift", "Resources found other than they should be.", labels=["resource"]
        )
        lanes = HistogramMetricFamily(
            "partitiond_lane_duration_seconds",
            "How long the passes of each lane took.",
            labels=["lane"],
            unit="seconds",
        )
        good = GaugeMetricFamily(
            "partitiond_lane_last_success_timestamp_seconds",
            "When a pass of each lane last ended without an error.",
            labels=["lane"],
            unit="seconds",
        )
        with self._turn:
            for resource, count in sorted(self._drift.items()):
                drift.add_metric([resource], count)
            for name, lane in sorted(self._lanes.items()):
                buckets = [*map(str, _BOUNDS), "+Inf"]
                counts = [*lane.within, lane.passes]
                lanes.add_metric([name], list(zip(buckets, counts, strict=True)), sum_value=lane.seconds)
                if lane.succeeded_at is not None:
                    good.add_metric([name], lane.succeeded_at)
        yield from (drift, lanes, good)


class _Collector:
    """What one scrape reads."""

    def __init__(self, context: Context, tally: Tally) -> None:
        self._context, self._tally = context, tally

    def collect(self) -> Iterator[Metric]:
        """All families."""
        from prometheus_client.metrics_core import (  # noqa: PLC0415 - as above
            CounterMetricFamily,
            GaugeMetricFamily,
            InfoMetricFamily,
        )

        yield from self._tally.families()
        reachable = self._context.master.as_json()["reachable"]
        master = GaugeMetricFamily("partitiond_master_up", "Whether the master's last answer was of use.")
        if reachable is not None:
            master.add_metric([], float(bool(reachable)))
        yield master
        partitions = InfoMetricFamily(
            "partitiond_partition", "The partitions of the node and what they own.", labels=["partition"]
        )
        node = self._context.node
        for item in node.partitions if node else ():
            tap = item.network.tap
            owned = {
                "user": item.user,
                "ipv4": str(item.ipv4),
                "ipv6": str(item.ipv6 or ""),
                "ipv6_range": str(item.network.ipv6_range or ""),
                "tap": tap.name if tap else "",
            }
            partitions.add_metric([item.id], owned)
        yield partitions
        yield from _tunnels(self._context)
        denied = CounterMetricFamily(
            "partitiond_partition_denied_packets",
            "What was refused to a partition's processes and guest, by the rule that did.",
            labels=["partition", "rule"],
        )
        refused: dict[tuple[str, str], int] = {}
        if node:
            reading = counters.read_counters(node.config.packet_filter)
            refused = metering.refusals(reading, node) | metering.refused_calls(node)[1]
        for (partition, rule), count in sorted(refused.items()):
            denied.add_metric([partition, rule], count)
        yield denied


def _tunnels(context: Context) -> Iterator[Metric]:
    """The tunnels that the last look at the node found declared, as they are now."""
    from prometheus_client.metrics_core import GaugeMetricFamily  # noqa: PLC0415 - as above

    labels = ["partition", "tunnel", "mode"]
    up = GaugeMetricFamily("partitiond_tunnel_up", "Whether stunnel listens there.", labels=labels)
    sessions = GaugeMetricFamily("partitiond_tunnel_sessions", "Sessions at this moment.", labels=labels)
    ends = GaugeMetricFamily(
        "partitiond_tunnel_certificate_not_after_timestamp_seconds",
        "When the certificate that the tunnel shows ends.",
        labels=labels,
        unit="seconds",
    )
    looked, node = context.looked, context.node
    if looked and node:
        running = supervision.running_groups(looked.processes)
        known = [item for item in node.partitions if item.id in looked.plan.declared]
        plan, now = looked.plan, datetime.now(UTC)
        try:
            states = tuple(tunnel_status.states(known, plan.declared, plan.published, running, now))
        except (NetplanError, OSError) as error:  # the rest is told all the same
            logger.warning("metrics: tunnels are left out: %s", sentence(error))
            return
        for one in states:
            which = [one.tunnel.partition, one.tunnel.short_name, one.tunnel.mode]
            up.add_metric(which, 0.0 if one.reason else 1.0)
            sessions.add_metric(which, one.sessions)
            if one.not_after:
                ends.add_metric(which, one.not_after.timestamp())
    yield from (up, sessions, ends)


def render(context: Context, tally: Tally) -> tuple[str, bytes]:
    """Return the content type and the text of ``/metrics``."""
    from prometheus_client import CollectorRegistry  # noqa: PLC0415 - as above
    from prometheus_client.openmetrics import exposition  # noqa: PLC0415

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(context, tally))
    text: bytes = exposition.generate_latest(registry)  # type: ignore[no-untyped-call]
    return exposition.CONTENT_TYPE_LATEST, text
