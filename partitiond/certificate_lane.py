"""What the daemon does about certificates by itself: it has those of instances renewed, and tells in time of what ends.

An instance's pair comes with its processing, of which there may be none for months. So one that ends within 30 days is asked
for once a day, at another time on each node; where it is another, the instance is processed and its tunnels follow.
"""

from __future__ import annotations

import logging
import random
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from partitiond import certificate_expiry, certificates, converge
from partitiond.certificate_expiry import NODE, RENEWED_BEFORE, Told
from partitiond.errors import FAMILY, sentence
from partitiond.passes import Result

if TYPE_CHECKING:
    from partitiond.context import Context
    from partitiond.node import Partition

logger = logging.getLogger(__name__)

SECONDS = 900.0
_HOUR, _DAY = 3600.0, 86400.0


class CertificateLane:
    """One pass after the other; ``spread`` (seconds) is within what time after its start a node asks first."""

    def __init__(self, spread: float = _HOUR) -> None:
        self._spread = spread
        self._due: dict[str, float] = {}  # by the monotonic clock

    def run(self, context: Context) -> Result:
        """Renew what ends soon, and tell of what still does."""
        node = context.node_in_force or converge.observe(context).node
        config, now, result = context.config, datetime.now(UTC), Result([], [])
        states, _ = context.store.readable()
        used = [
            item for item in node.partitions if (state := states.get(item.id)) and state.life != "destroying"
        ]
        found = certificate_expiry.dates(config, used)
        for partition in used:
            end = found.get(partition.id)
            if context.stop.is_set() or end is None or end - now > RENEWED_BEFORE:
                self._due.pop(partition.id, None)
            elif self._is_due(partition.id, ended=end <= now):
                self._renew(context, partition, result)
        endings = certificate_expiry.near(certificate_expiry.dates(config, used), now)
        for one in Told(config.state_dir / "certificates.json").news(endings):
            logger.warning("%s", one.sentence())
            own = one.subject == NODE
            context.events.record(
                "certificate.expiring",
                one.sentence(),
                partition=None if own else one.subject,
                resource=str(config.cert_file) if own else f"certificate/{one.subject}",
                not_after=one.not_after.isoformat(),
                hint=one.hint,
            )
        return result

    def _is_due(self, name: str, *, ended: bool) -> bool:
        moment = time.monotonic()
        due = self._due.setdefault(name, moment + random.uniform(0, self._spread))  # noqa: S311 - jitter, no secret
        if moment < due:
            return False
        self._due[name] = moment + (_HOUR if ended else _DAY) * random.uniform(0.9, 1.1)  # noqa: S311 - as above
        return True

    @staticmethod
    def _renew(context: Context, partition: Partition, result: Result) -> None:
        try:
            if not certificates.fetch(context, partition):
                return
            context.store.make_due(partition.id)
            converge.apply(context, only=frozenset((partition.id,)))
        except (*FAMILY, OSError) as error:
            result.failures.append((partition.id, error))
            logger.warning("%s: its certificate is not renewed: %s", partition.id, sentence(error))
            return
        context.wake_instances()
        result.done.append(f"{partition.id}: its certificate is renewed")
        logger.info("%s: its certificate is renewed", partition.id)
        context.events.record(
            "certificate.renewed",
            f"{partition.id}: the master gave its instance another certificate",
            partition=partition.id,
            resource=f"certificate/{partition.id}",
        )
