"""A call some time from now, of which there is never more than one: each pass that fails may ask for the next."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Alarm:
    """Rings once, at the earliest time that was asked for since it rang last; whoever is woken then looks at everything.

    One that nobody waits for keeps no process from ending.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._at = 0.0

    @property
    def is_set(self) -> bool:
        """Whether it is going to ring."""
        return self._timer is not None

    def ring_in(self, seconds: float) -> None:
        """Ring in so many seconds, or sooner where that was asked for already."""
        at = time.monotonic() + seconds
        with self._lock:
            if self._timer is not None:
                if self._at <= at:
                    return
                self._timer.cancel()
            self._at = at
            self._timer = timer = threading.Timer(seconds, self._rings, (at,))
            timer.daemon = True
            timer.start()

    def _rings(self, at: float) -> None:
        with self._lock:
            if self._at != at:
                return  # it was too late to cancel it: another one rings
            self._timer = None
        self._ring()
