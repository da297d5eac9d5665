"""What supervisord tells of the processes that it runs, at the moment when it happens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """A process that ended by itself, or could not be started.

    ``name`` is supervisord's process name (``-on-watch`` marks what is watched); ``state`` is ``EXITED``, ``BACKOFF`` or
    ``FATAL``; ``expected`` whether its exit status is one of a good end; ``at`` Unix seconds.
    """

    group: str
    name: str
    pid: int
    state: str
    expected: bool
    at: float
