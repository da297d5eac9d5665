"""That something was destroyed, told to the master: again until it takes it, and not again and again.

It may refuse, for as long as an instance has others that it requested, say; that is no sign that it is away. Each refusal makes
the pause of that one resource longer, and where another end is taken, which may be what it waited for, it is tried next. While
the master is away it is told nothing, and the lanes find out when it is back. Whoever asks by hand always asks the master.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from partitiond.wishes import is_absence
from slap_client.errors import SlapError

if TYPE_CHECKING:
    from collections.abc import Callable

    from partitiond.context import Context
    from partitiond.reporting import ReportingClient


_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 3600.0


@dataclass(slots=True)
class _Refusal:
    error: SlapError
    client: ReportingClient
    times: int
    at: float
    until: float


@dataclass(slots=True)
class ToldEnds:
    """What the master would not take. Each resource belongs to one lane."""

    clock: Callable[[], float] = time.monotonic
    _refused: dict[str, _Refusal] = field(default_factory=dict)

    def tell(self, context: Context, resource: str, call: Callable[[ReportingClient], None]) -> None:
        """Tell the master of one end. Raises SlapError, which is ``unsent`` while it is not to be told again yet."""
        client = context.client
        before = self._refused.get(resource)
        if before is not None and before.client is not client:
            before = None  # another master has refused nothing yet
        if before is not None and context.lane and self.clock() < before.until:
            raise self._later(before) from before.error
        try:
            with context.wishes.telling(client, context.lane, context.first_pause):
                call(client)
        except SlapError as error:
            if not is_absence(error):
                times, now = (before.times if before else 0) + 1, self.clock()
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(times - 1, 10))
                self._refused[resource] = _Refusal(error, client, times, now, now + pause)
            raise
        self._refused.pop(resource, None)
        for other in list(self._refused.values()):
            if other.error.code == "slap.destroy_refused":
                other.until = 0.0

    def _later(self, refusal: _Refusal) -> SlapError:
        error, now = refusal.error, self.clock()
        return SlapError(
            error.code,
            f"{error.message} (told {now - refusal.at:.0f} s ago; again in {max(0, refusal.until - now):.0f} s)",
            resource=error.resource,
            hint=error.hint,
            retryable=error.retryable,
            status=error.status,
            unsent=True,
        )
