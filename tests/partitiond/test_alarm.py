"""However often a later pass is asked for, one comes: passes that fail must not multiply."""

import threading
import time

import pytest

from partitiond import daemon
from partitiond.alarm import Alarm
from partitiond.passes import Result


def timers():
    return [one for one in threading.enumerate() if isinstance(one, threading.Timer)]


def test_it_rings_once_at_the_earliest_time_and_can_be_set_again():
    rung = threading.Semaphore(0)
    alarm = Alarm(rung.release)
    for seconds in (60.0, 0.05, 30.0, 0.05):
        alarm.ring_in(seconds)
    assert rung.acquire(timeout=10)
    assert not rung.acquire(timeout=0.2)
    assert not alarm.is_set
    alarm.ring_in(0.01)
    assert rung.acquire(timeout=10)
    assert timers() == []


@pytest.mark.parametrize("who", ["report", "day", "watchdog"])
def test_a_daemon_has_one_for_each_purpose_however_many_passes_ask(node_config, monkeypatch, who):
    monkeypatch.setattr(daemon.lanes, "report", lambda _: Result([], [("slappart0", OSError())]))
    ours = daemon.Daemon(node_config(1, interface="lo").load())
    ask = {
        "report": lambda: ours._report(ours.context),
        "day": ours._day_ended,
        "watchdog": lambda: ours._wake_watchdog(30.0),
    }[who]
    try:
        for _ in range(20):
            ask()
        time.sleep(0.1)
        assert len(timers()) == 1
    finally:
        for timer in timers():
            timer.cancel()
        ours._processes.close()
        ours.context.meters.close()
        ours.context.connection.close()
