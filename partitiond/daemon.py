"""The daemon: lanes that each do one kind of work in their own rhythm, and the control socket.

Promises: at most one daemon on a state directory; what runs keeps running when the master is away, slow or wrong, and when
the daemon ends, however it ends; retries are jittered and back off.
"""

from __future__ import annotations

import logging
import os
import pwd
import queue
import random
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from netplan import holding
from partitiond import (
    __version__,
    certificate_lane,
    control,
    converge,
    execute,
    instance_build,
    keyring,
    lanes,
    memory,
    mesh_lane,
    mesh_verbs,
    metrics,
    metrics_listener,
    node_pair,
    recovery,
    reload,
    report_verbs,
    request_body,
    signals,
    textfile,
    verbs,
)
from partitiond.alarm import Alarm
from partitiond.api import Api
from partitiond.asked_passes import AskedPasses
from partitiond.bounded_http import Unknown
from partitiond.certificate_lane import CertificateLane
from partitiond.context import Context
from partitiond.daemon_trials import Trials
from partitiond.errors import FAMILY, printable, sentence
from partitiond.heal import Healer
from partitiond.incidents import WATCHED
from partitiond.mesh_lane import MeshLane
from partitiond.metrics_listener import MetricsListener
from partitiond.passes import Wish
from partitiond.peers import Judge
from partitiond.polling import FIRST_PAUSE, LONGEST_PAUSE, Pace, first_pause
from partitiond.process_watch import ProcessWatch
from partitiond.reboots import Reboots
from partitiond.reflexes import Reflexes
from partitiond.tunnel_lane import SECONDS, TunnelLane
from partitiond.watch import Watch
from partitiond.watchdog import Watchdog
from slap_client.backoff import Backoff

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from partitiond.config import Config
    from partitiond.metrics import Tally
    from partitiond.node_plan import Outcome
    from partitiond.passes import Result
    from partitiond.process_events import ProcessEnded

logger = logging.getLogger(__name__)

_SWEEP_SECONDS = 60.0
# a build is given 5 s to end by itself, and as much after a SIGKILL
_LAST_WORDS = 12.0
_REPORTS_WITHIN = 3600.0  # after midnight UTC
# whoever answers somebody lets go of the interpreter at each read and write, and would wait 5 ms each time for a lane at work
_SWITCH_SECONDS = 0.0005


class Lane(threading.Thread):
    """A kind of work, done again and again.

    One pass never runs twice at the same time, also when somebody asks for one by hand. The interval of its ``pace`` may be
    set anew, which holds from the next pass on; ``delay`` seconds are waited for before the first.
    """

    def __init__(
        self,
        name: str,
        interval: float,
        body: Callable[[], object],
        stop: threading.Event,
        tally: Tally,
        after: Lane | None = None,
        phase: float | None = None,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.pace = Pace(interval, phase=phase)
        self.delay, self.patience = 0.0, float("inf")
        self._due = float("inf")
        self._body, self._halt, self._tally = body, stop, tally
        self._wake = threading.Event()
        self._after = after
        self.tried = threading.Event()
        self._one_at_a_time = threading.Lock()

    def wake(self) -> None:
        """Ask for a pass soon."""
        self._wake.set()

    def join_in(self) -> None:
        """Take a pass with what another lane just learnt, if one is due soon or waits for the master to answer."""
        if self.pace.joins(self._due - time.monotonic()):
            self.wake()

    def once(self, body: Callable[[], Any]) -> Any:
        """Run a body in this lane's turn."""
        with self._one_at_a_time:
            began, good = time.monotonic(), False
            try:
                answer = body()
                good = not _failures(answer)
            finally:
                self._tally.lane(self.name, time.monotonic() - began, good=good)
            return answer

    def run(self) -> None:
        """Until the daemon stops: a pass, then a jittered pause, longer and longer while passes fail."""
        self._wait_for_other()
        self._wake.wait(self.delay)
        while not self._halt.is_set():
            pause = self._pass()
            self.tried.set()
            self._due = time.monotonic() + pause
            self._wake.wait(pause)
            self._due = float("inf")
            self._wake.clear()

    def _wait_for_other(self) -> None:
        end = time.monotonic() + self.patience
        while self._after and not self._after.tried.wait(0.2) and not self._halt.is_set():
            if time.monotonic() >= end:
                return

    def _pass(self) -> float:
        try:
            self.once(self._body)
        except FAMILY as error:
            if self._halt.is_set():
                return 0.0
            pause = self.pace.bad(getattr(error, "retry_after", None))
            # said once, and not at each try
            hint = f" ({error.hint})" if error.hint and self.pace.failures == 1 else ""
            logger.warning("%s: %s; again in %.0f s%s", self.name, sentence(error), pause, printable(hint))
            return pause
        except Exception:
            # a lane must not end because of a mistake of ours: what it keeps up would rot in silence
            pause = self.pace.bad()
            logger.exception("%s: unexpected error; again in %.0f s", self.name, pause)
            return pause
        return self.pace.good()


class Daemon:
    """The lanes, the watch and the control socket of one node."""

    def __init__(self, config: Config) -> None:
        self.context = context = Context.of(config)
        self._tally = metrics.Tally()
        self._phase = random.random()  # noqa: S311 - jitter, no secret
        self._requests: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._torn_down = False
        self._asked = AskedPasses()
        self._healer: Healer | None = None
        self._processes = ProcessWatch(context, self._supervisor_ended)
        self._watchdog = Watchdog(context, self._wake_watchdog)
        self._reboots = Reboots(context)
        capacity = self._lane("capacity", lanes.capacity)
        instances = self._lane("instances", lanes.instance, capacity)
        # the master answers nothing of use, slapproxy an error, about a node that it does not know yet
        self._lanes = {
            "converge": Lane("converge", _SWEEP_SECONDS, self._sweep, context.stop, self._tally),
            "usage": self._lane("usage", self._meter),
            "capacity": capacity,
            "software": self._lane("software", lanes.software, capacity),
            "instances": instances,
            # what has just been started is no anomaly yet
            "promises": self._lane("promises", lanes.promise, instances),
            "watchdog": self._lane("watchdog", lambda _: self._watchdog.run()),
            "report": self._lane("report", self._report),
            "tunnels": self._lane("tunnels", TunnelLane(self._processes.attend).run),
            "certificates": self._lane("certificates", CertificateLane().run),
            "mesh": self._lane("mesh", MeshLane().run),
        }
        wake_report = self._lanes["report"].wake
        self._report_alarm, self._day_alarm = Alarm(wake_report), Alarm(wake_report)
        self._report_backoff = Backoff(FIRST_PAUSE * 6, LONGEST_PAUSE)
        self._watchdog_alarm = Alarm(self._lanes["watchdog"].wake)
        # one buildout that never ends must not keep all of them unlooked at
        self._lanes["promises"].patience = self._interval("promises")
        context.builds.patience = 1  # where one comes, others may follow
        if "NOTIFY_SOCKET" in os.environ:  # started by systemd, so perhaps with the machine
            capacity.delay = first_pause(time.clock_gettime(time.CLOCK_BOOTTIME))
        context.wishes.answered = self._answered
        context.troubles["instances"] = lambda: instance_build.trouble(context)
        context.troubles["master"] = lambda: context.wishes.trouble
        context.process_ended = self._process_ended
        context.wake_report = wake_report
        context.wake_instances = self._lanes["instances"].wake
        context.wake_capacity = capacity.wake
        context.day_ended = self._day_ended
        context.limits_changed = lambda: self._tell(converge.apply(context))
        self._trials = Trials(context, self._lanes["converge"].wake, self._reloaded, self._give_up)
        verbs_of_post: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "/1/apply": self._apply,
            "/1/try": self._trials.try_out,
            "/1/confirmed": lambda _: self._trials.confirmed(),
            "/1/rollback": self._trials.roll_back,
            "/1/sync": self._sync,
            "/1/report": self._change_reports,
            "/1/mesh": self._change_mesh,
            "/1/teardown": self._tear_down,
        }
        self._api = Api(context, self._tally, verbs_of_post)
        self._listener = MetricsListener(
            lambda: metrics.everything(context, self._tally),
            metrics_listener.Judge(lambda: context.node, self._software),
        )
        context.troubles["metrics_listen"] = lambda: self._listener.trouble

    def _lane(self, name: str, work: Callable[[Context], object], after: Lane | None = None) -> Lane:
        def body() -> object:
            with self.context.steady(), self.context.in_lane(name):
                return work(self.context)

        return Lane(name, self._interval(name), body, self.context.stop, self._tally, after, self._phase)

    def _answered(self, lane: str) -> None:
        """Let the others that want the master's wishes go along with the one that asked."""
        for name in ("capacity", "software", "instances"):
            if name != lane and (name != "capacity" or self._lanes[name].pace.failures):
                self._lanes[name].join_in()

    def _software(self) -> tuple[str, int] | None:
        name = self.context.config.software_user
        try:
            return name, pwd.getpwnam(name).pw_uid
        except KeyError:
            return None

    def _interval(self, lane: str) -> float:
        intervals = self.context.config.intervals
        if lane in (
            own := {"tunnels": SECONDS, "certificates": certificate_lane.SECONDS, "mesh": mesh_lane.SECONDS}
        ):
            return own[lane]
        key = {"usage": "meter", "promises": "promise"}.get(lane, lane)
        return float(getattr(intervals, key, _SWEEP_SECONDS))

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; return the exit status. Raises a family error when the start fails."""
        context, config = self.context, self.context.config
        memory.be_frugal()
        keyring.leave()
        sys.setswitchinterval(_SWITCH_SECONDS)
        calls: dict[int, Callable[[], None]] = {
            signal.SIGTERM: self._end,
            signal.SIGINT: self._end,
            signal.SIGHUP: lambda: self._requests.put(self._reload),
        }
        with recovery.exclusive(config, "run"), signals.heard(calls):
            watch = Watch(config, self._lanes["converge"].wake, Reflexes(context))
            holding.begin()
            try:
                self._healer = Healer(context, watch, self._tally)
                self._start_up()
                memory.settle()
                self._listener.attend(config.metrics_listen)
                socket_path, judge = config.run_dir / "control.sock", Judge(lambda: context.node)
                with control.answering(socket_path, self._api.answer, judge):
                    for thread in (watch, self._processes, self._listener, *self._lanes.values()):
                        thread.start()
                    notify("READY=1")
                    logger.info(
                        "node %s is up with %d partitions", config.computer_id, config.partition_amount
                    )
                    while (request := self._requests.get()) is not None:
                        request()
                    notify("STOPPING=1")
                self._join()
            finally:
                holding.end()
                watch.close()
                self._processes.close()
                self._listener.close()
                self._remove_textfile()
                # a lane that still waits for the master finds its ledger closed, and is told so as of any other
                context.meters.close()
                context.connection.close()
                context.builds.close()
        if not self._torn_down:
            context.events.record("node.stopped", "the daemon ended; supervisord and what it runs go on")
        logger.info("ended" if self._torn_down else "ended; supervisord and what it runs go on")
        return 0

    def _remove_textfile(self) -> None:
        """Leave nothing that would tell old values for ever."""
        try:
            textfile.remove(textfile.memory_path(self.context.config.state_dir))
        except (*FAMILY, OSError) as error:
            logger.warning("[metrics.textfile] what was written stays: %s", error)

    def _start_up(self) -> None:
        context = self.context
        for record in context.config.run_dir.glob("*.session"):
            execute.end_cut_off(record)
        self._trials.begin()
        self._reboots.note()
        outcome = converge.apply(context)
        config = context.config
        context.events.record(
            "node.started",
            f"partitiond {__version__}: node {config.computer_id} with {config.partition_amount} partitions",
        )
        self._tell(outcome)
        for case in node_pair.open_cases(config):
            logger.error("[node.certificate] %s", case)

    def _supervisor_ended(self) -> None:
        self._lanes["converge"].wake()

    def _process_ended(self, ended: ProcessEnded) -> None:
        if ended.name.endswith(WATCHED):
            self._watchdog.ended()

    def _wake_watchdog(self, seconds: float) -> None:
        if seconds <= 0:
            self._lanes["watchdog"].wake()
            return
        self._watchdog_alarm.ring_in(seconds)

    def _tell(self, outcome: Outcome) -> None:
        """Say what an apply that nobody waits for has led to."""
        verbs.record(self.context, outcome)
        for name, error in outcome.failures:
            logger.error("%s: %s", name, sentence(error))
        if self._healer is not None:
            self._healer.tell_refused(outcome.refused)

    def _end(self) -> None:
        self.context.stop.set()
        self._requests.put(None)

    def _reload(self) -> None:
        """Take the edited configuration into force, on SIGHUP. What is wrong with it is in the log then."""
        # systemd.service(5), Type=notify-reload, and sd_notify(3): the time tells this reload from earlier ones
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            with self.context.applying:
                self._trials.refuse_reload()
                first = reload.reload(self.context)
                if first:
                    self._reloaded()
                    self._tell(converge.apply(self.context, first=first))
        except FAMILY as error:
            logger.warning("reload: %s", sentence(error))
        except Exception:
            logger.exception("reload: unexpected error")
        notify("READY=1")

    def _reloaded(self) -> None:
        """Let everything that holds something of the configuration follow it."""
        for name, lane in self._lanes.items():
            interval = self._interval(name)
            changed, lane.pace.interval = interval != lane.pace.interval, interval
            if changed or lane.pace.failures:  # what failed may be what was mended
                lane.wake()
        self._listener.attend(self.context.config.metrics_listen)
        self._lanes["capacity"].wake()  # the master has to know what is offered now
        self._lanes["converge"].wake()  # what the new configuration leaves as it is was not looked at
        if self._healer is not None:
            self._healer.watch.attend(self.context.config)

    def _join(self) -> None:
        """Wait for the lanes, all of them together; one that waits for the master is left: it ends with the process."""
        deadline = time.monotonic() + _LAST_WORDS
        for lane in self._lanes.values():
            lane.wake()
        for lane in self._lanes.values():
            lane.join(max(0.0, deadline - time.monotonic()))

    def _sweep(self) -> None:
        assert self._healer is not None  # noqa: S101 - made before the lanes start
        self._trials.look()
        self._reboots.note()
        self._healer.run()
        memory.trim()

    def _meter(self, context: Context) -> Result:
        try:
            return lanes.usage(context)
        finally:
            metrics.after_pass(context, self._tally)

    def _report(self, context: Context) -> Result:
        result = lanes.report(context)
        if result.failures:
            self._report_alarm.ring_in(self._report_backoff.next())
        else:
            self._report_backoff.reset()
        return result

    def _day_ended(self) -> None:
        """Have the day reported, not by all nodes of a master at the same time."""
        if not self._day_alarm.is_set:  # else each pass would draw again, until it is soon
            most = min(self._interval("report"), _REPORTS_WITHIN)
            self._day_alarm.ring_in(random.uniform(0, most))  # noqa: S311 - jitter

    def _apply(self, body: dict[str, Any]) -> dict[str, Any]:
        """Apply, by the file as it is now."""
        request_body.check(body, partitions=list, force=bool)
        # held throughout: to the sweep, what the new configuration wants would be drift
        force = bool(body.get("force"))
        with self.context.applying:
            self._trials.refuse_other()
            first = reload.reload(self.context, force=force)
            if first:
                self._reloaded()
            names: list[str] = body.get("partitions", [])
            return verbs.apply(self.context, names, force=force, first=first)

    def _sync(self, body: dict[str, Any]) -> dict[str, Any]:
        request_body.check(body, lane=str, force=bool, only=list, again=bool, collect=bool, wait=bool)
        name = body.get("lane")
        if name not in lanes.LANES:
            raise Unknown
        wish = Wish.read(body)

        def once() -> dict[str, Any]:
            with self.context.steady():
                return verbs.sync(self.context, name, wish)

        return self._asked.take(name, wish, self._lanes[name].once, once, wait=body.get("wait", True))

    def _change_reports(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send documents again, or drop them, between two reports."""
        action, references = body.get("action"), body.get("references")
        if action not in report_verbs.ACTIONS or not isinstance(references, list):
            raise Unknown
        names = [str(name) for name in references]
        answer: dict[str, Any] = self._lanes["report"].once(
            lambda: report_verbs.change(self.context, action, names)
        )
        return answer

    def _change_mesh(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take peers of the mesh in, or away, and apply that: by the file as it is now."""
        request_body.check(body, action=str, blocks=str, names=list, replace=bool)
        if body.get("action") not in mesh_verbs.ACTIONS:
            raise Unknown
        with self.context.applying:
            self._trials.refuse_other()
            if reload.reload(self.context, force=False):
                self._reloaded()
            found = mesh_verbs.change(self.context, body)
            return {**found, "applied": verbs.apply(self.context, [])}

    def _tear_down(self, body: dict[str, Any]) -> dict[str, Any]:
        """Take the node down and end: a daemon that went on would build it up again."""
        request_body.check(body, purge=bool)
        with self._give_up():
            return verbs.tear_down(self.context, purge=bool(body.get("purge")))

    @contextmanager
    def _give_up(self) -> Iterator[None]:
        """Stop all work for the block, and end after it."""
        self.context.stop.set()
        self._join()
        yield
        self._torn_down = True
        threading.Timer(0.2, self._end).start()


def _failures(answer: Any) -> object:
    """What failed in a pass that ended all the same, by its answer: a result or outcome, or the JSON of one."""
    return answer.get("failures") if isinstance(answer, dict) else getattr(answer, "failures", None)


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); nothing where it did not ask."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
        channel.send(f"{state}\n".encode())
