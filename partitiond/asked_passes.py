"""Passes that somebody asks the daemon for, beside those that lanes take by themselves.

A pass may wait for a build of hours, and a crontab of slapos.core's asks for another one each minute. Promises: equal passes
that wait are done once, for all who asked; no more than a few wait, so that they leave others their places at the control
socket; and who does not want to wait (``partitiond node``, as slapgrid) is told that it is not the first.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Callable

    from partitiond.passes import Wish

    Answer = dict[str, Any]

# of each lane; all of them together are fewer than root's connections (peers.py)
_MOST = 8


@dataclass(slots=True)
class _Pass:
    """One that waits or goes on, and how it ended."""

    over: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None
    error: Exception | None = None

    def ended(self) -> Answer:
        if self.error is not None:
            raise self.error
        return self.answer or {}


class AskedPasses:
    """Takes them in the turn of their lanes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking: Counter[str] = Counter()
        self._waiting: dict[tuple[str, Wish], _Pass] = {}

    def take(
        self,
        lane: str,
        wish: Wish,
        in_turn: Callable[[Callable[[], Answer]], Answer],
        body: Callable[[], Answer],
        *,
        wait: bool,
    ) -> Answer:
        """Do ``body`` by ``in_turn``, or hear what comes of an equal one that waits for its turn.

        Without ``wait`` only where nobody else has asked for a pass of the lane that is not over: what the lane does by itself
        is waited for. Raises PartitiondError ``node.busy``, and what the pass raises.
        """
        key = lane, wish
        with self._lock:
            if self._asking[lane] >= (_MOST if wait else 1):
                raise _busy(lane)
            self._asking[lane] += 1
            shared = self._waiting.get(key)
            own = shared or self._waiting.setdefault(key, _Pass())
        try:
            if shared is not None:
                shared.over.wait()
                return shared.ended()
            return self._do(key, own, in_turn, body)
        finally:
            with self._lock:
                self._asking[lane] -= 1

    def _do(
        self,
        key: tuple[str, Wish],
        own: _Pass,
        in_turn: Callable[[Callable[[], Answer]], Answer],
        body: Callable[[], Answer],
    ) -> Answer:
        def begin() -> Answer:
            with self._lock:
                del self._waiting[key]  # who asks from now on may mean what has changed meanwhile
            return body()

        try:
            own.answer = in_turn(begin)
        except Exception as error:
            own.error = error
            raise
        finally:
            own.over.set()
        return own.answer


def _busy(lane: str) -> PartitiondError:
    return PartitiondError(
        "node.busy",
        f"a pass of the lane {lane} that was asked for is not over",
        resource=lane,
        hint="wait for it: partitiond status shows what is being done, partitiond logs software a build",
        retryable=True,
    )
