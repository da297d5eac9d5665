"""The watchdog of an unmanaged node: an event listener of supervisord that tells the master when a service has ended.

Where a daemon runs, that is the daemon's; here is none. Once for each time that the instance was configured, as slapos.core
has it: the bang makes the master ask for it to be configured anew, with another timestamp.
Protocol: http://supervisord.org/events.html, event listeners.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from partitiond import config, unmanaged
from partitiond.errors import FAMILY, sentence

if TYPE_CHECKING:
    from typing import TextIO

    from partitiond.context import Context

WATCHED = "-on-watch"
_ENDED = ("PROCESS_STATE_EXITED", "PROCESS_STATE_FATAL")


def _words(line: str) -> dict[str, str]:
    return dict(word.split(":", 1) for word in line.split() if ":" in word)


class Watchdog:
    """Tells of each ended service, once a deployment."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._told: dict[str, str | None] = {}

    def take(self, event: str, payload: str) -> None:
        """Take one event of supervisord. Raises a family error when the master does not take it."""
        words = _words(payload.partition("\n")[0])
        name, partition = words.get("processname", ""), words.get("groupname", "")
        if event not in _ENDED or not name.endswith(WATCHED):
            return
        state = self._context.store.instance(partition)
        if state.wanted != "started" or self._told.get(partition, "") == state.timestamp:
            return
        self._context.client.bang(partition, f"{name} ended unexpectedly")
        self._told[partition] = state.timestamp


def listen(watchdog: Watchdog, events: TextIO, answers: TextIO) -> None:
    """Take events until supervisord ends."""
    while True:
        answers.write("READY\n")
        answers.flush()
        head = _words(events.readline())
        if not head:
            return
        payload = events.read(int(head["len"]))
        try:
            watchdog.take(head["eventname"], payload)
        except FAMILY as error:
            # one service's trouble must not keep the others from being watched
            sys.stderr.write(f"{sentence(error)}\n")
            sys.stderr.flush()
        answers.write("RESULT 2\nOK")
        answers.flush()


def main() -> None:
    """Run it as supervisord does: the configuration is its argument."""
    listen(Watchdog(unmanaged.context(config.load(Path(sys.argv[1])))), sys.stdin, sys.stdout)


if __name__ == "__main__":
    main()
