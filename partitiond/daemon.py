"""The daemon: lanes that each do one kind of work in their own rhythm, and the control socket.

Promises: at most one daemon on a state directory; what runs keeps running when the master is away, slow or wrong, and when
the daemon ends, however it ends; retries are jittered and back off.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from partitiond import control, converge, execute, lanes, recovery, status, verbs
from partitiond.context import Context
from partitiond.errors import FAMILY, sentence
from slap_client.backoff import Backoff

if TYPE_CHECKING:
    from collections.abc import Callable

    from partitiond.config import Config
    from partitiond.passes import Result

logger = logging.getLogger(__name__)

_SWEEP_SECONDS = 60.0
_SOON = 5.0
_LONGEST_PAUSE = 300.0
# a build is given 5 s to end by itself, and as much after a SIGKILL
_LAST_WORDS = 12.0


class Lane(threading.Thread):
    """A kind of work, done again and again.

    One pass never runs twice at the same time, also when somebody asks for one by hand.
    """

    def __init__(
        self,
        name: str,
        interval: float,
        body: Callable[[], Result | None],
        stop: threading.Event,
        after: Lane | None = None,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._interval, self._body, self._halt = interval, body, stop
        self._wake = threading.Event()
        self._after = after
        self.tried = threading.Event()
        self._one_at_a_time = threading.Lock()
        # what failed is tried again within minutes, also in a lane that has work only once a day
        self._backoff = Backoff(base=min(_SOON, interval), cap=_LONGEST_PAUSE)

    def wake(self) -> None:
        """Ask for a pass soon."""
        self._wake.set()

    def once(self, body: Callable[[], Any]) -> Any:
        """Run a body in this lane's turn."""
        with self._one_at_a_time:
            return body()

    def run(self) -> None:
        """Until the daemon stops: a pass, then a jittered pause, longer and longer while passes fail."""
        while self._after and not self._after.tried.wait(0.2) and not self._halt.is_set():
            continue
        while not self._halt.is_set():
            pause = self._pass()
            self.tried.set()
            self._wake.wait(pause)
            self._wake.clear()

    def _pass(self) -> float:
        try:
            self.once(self._body)
        except FAMILY as error:
            if self._halt.is_set():
                return 0.0
            pause = self._backoff.next()
            logger.warning("%s: %s; again in %.0f s", self.name, sentence(error), pause)
            return pause
        except Exception:
            # a lane must not end because of a mistake of ours: what it keeps up would rot in silence
            pause = self._backoff.next()
            logger.exception("%s: unexpected error; again in %.0f s", self.name, pause)
            return pause
        self._backoff.reset()
        # jittered, so that nodes that started together do not ask the master together
        return self._interval * random.uniform(0.9, 1.1)  # noqa: S311 - jitter, no secret


class Daemon:
    """The lanes and the control socket of one node."""

    def __init__(self, config: Config) -> None:
        self.context = Context.of(config)
        self._done = threading.Event()
        self._torn_down = False
        self._known_drift: frozenset[tuple[str, str]] = frozenset()
        stop, intervals = self.context.stop, config.intervals
        capacity = Lane("capacity", intervals.capacity, lambda: lanes.capacity(self.context), stop)
        # the master answers nothing of use, slapproxy an error, about a node that it does not know yet
        self._lanes = {
            "converge": Lane("converge", _SWEEP_SECONDS, self._sweep, stop),
            "usage": Lane("usage", intervals.meter, lambda: lanes.usage(self.context), stop),
            "capacity": capacity,
            "software": Lane(
                "software", intervals.software, lambda: lanes.software(self.context), stop, capacity
            ),
            "instances": Lane(
                "instances", intervals.instances, lambda: lanes.instance(self.context), stop, capacity
            ),
            "report": Lane("report", intervals.report, self._report, stop),
        }
        self.context.wake_report = self._lanes["report"].wake
        self.context.wake_instances = self._lanes["instances"].wake

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; return the exit status. Raises a family error when the start fails."""
        config = self.context.config
        with recovery.exclusive(config, "run"):
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self._end())
            self._start_up()
            server = control.serve(config.run_dir / "control.sock", self._handle)
            answering = threading.Thread(target=server.serve_forever, name="control", daemon=True)
            answering.start()
            for lane in self._lanes.values():
                lane.start()
            notify("READY=1")
            logger.info("node %s is up with %d partitions", config.computer_id, config.partition_amount)
            self._done.wait()
            notify("STOPPING=1")
            server.shutdown()
            server.server_close()
            (config.run_dir / "control.sock").unlink(missing_ok=True)
            self._join()
        logger.info("ended" if self._torn_down else "ended; supervisord and what it runs go on")
        return 0

    def _start_up(self) -> None:
        for record in self.context.config.run_dir.glob("*.session"):
            execute.end_cut_off(record)
        outcome = converge.apply(self.context)
        for name, error in outcome.failures:
            logger.error("%s: %s", name, sentence(error))
        for refusal in outcome.refused:
            logger.warning("%s: refused: %s", refusal.name, refusal.reason)

    def _end(self) -> None:
        self.context.stop.set()
        for lane in self._lanes.values():
            lane.wake()
        self._done.set()

    def _join(self) -> None:
        """Wait for the lanes, all of them together; one that waits for the master is left: it ends with the process."""
        deadline = time.monotonic() + _LAST_WORDS
        for lane in self._lanes.values():
            lane.wake()
        for lane in self._lanes.values():
            lane.join(max(0.0, deadline - time.monotonic()))

    def _sweep(self) -> None:
        # what a lane is in the midst of changing is no drift
        with self.context.applying:
            todo = converge.plan(self.context, converge.observe(self.context))
        found = frozenset((operation.id, operation.reason) for operation in todo)
        # what could not be repaired is said once, not every minute
        for name, reason in sorted(found - self._known_drift):
            logger.warning("drift: %s: %s", name, reason)
        self._known_drift = found
        if not found:
            return
        outcome = converge.apply(self.context)
        if outcome.done:
            logger.info("repaired: %d done, %d failed", outcome.done, len(outcome.failures))

    def _report(self) -> Result:
        result = lanes.report(self.context)
        if result.failures:
            again = threading.Timer(_SOON * 6, self._lanes["report"].wake)
            again.daemon = True  # the process does not wait for it when it ends
            again.start()
        return result

    def _handle(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Answer the control socket; control.Unknown for what is not there."""
        context = self.context
        if method == "GET" and path == "/1/status":
            return status.node(context)
        if method == "GET" and path.startswith("/1/partitions/"):
            found = status.partition(context, path.removeprefix("/1/partitions/"))
            if found is None:
                raise control.Unknown
            return found
        if method == "POST" and path == "/1/apply":
            return verbs.apply(context, [str(name) for name in body.get("partitions", [])])
        if method == "POST" and path == "/1/sync":
            name = str(body.get("lane"))
            if name not in lanes.LANES:
                raise control.Unknown
            force = bool(body.get("force"))
            answer: dict[str, Any] = self._lanes[name].once(lambda: verbs.sync(context, name, force=force))
            return answer
        if method == "POST" and path == "/1/teardown":
            return self._tear_down(purge=bool(body.get("purge")))
        raise control.Unknown

    def _tear_down(self, *, purge: bool) -> dict[str, Any]:
        """Take the node down and end: a daemon that went on would build it up again."""
        self.context.stop.set()
        self._join()
        answer = verbs.tear_down(self.context, purge=purge)
        self._torn_down = True
        threading.Timer(0.2, self._end).start()
        return answer


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); nothing where it did not ask."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
        channel.send(f"{state}\n".encode())
