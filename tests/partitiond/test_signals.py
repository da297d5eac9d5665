"""Signals are heard whatever thread the kernel interrupts for them, and whatever the main thread is amid."""

import ctypes
import os
import queue
import select
import signal
import threading
import time
from pathlib import Path

import pytest

from partitiond import signals

PATIENCE = 20.0
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def _handlers():
    """As they were before."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_heard_while_the_main_thread_waits_and_another_is_interrupted():
    heard, ready = queue.SimpleQueue(), threading.Event()

    def other():
        ready.wait(PATIENCE)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    thread = threading.Thread(target=other)
    thread.start()
    with signals.heard({signal.SIGTERM: lambda: heard.put("SIGTERM")}):
        ready.set()
        assert heard.get(timeout=PATIENCE) == "SIGTERM"
    thread.join()


def test_heard_amid_a_method_of_what_the_call_uses():
    """A handler of Python's would wait here for the lock that its own thread holds."""
    stop = threading.Event()
    with signals.heard({signal.SIGTERM: stop.set}):
        with stop._cond:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        assert stop.wait(PATIENCE)


def test_each_is_heard_in_turn_and_none_after_the_end():
    heard = queue.SimpleQueue()
    calls = {number: lambda number=number: heard.put(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    threads = threading.active_count()
    with signals.heard(calls):
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
            assert heard.get(timeout=PATIENCE) == number
    os.kill(os.getpid(), signal.SIGTERM)  # who asks twice cuts nothing short
    assert threading.active_count() == threads
    assert heard.empty()
    assert signal.set_wakeup_fd(-1) == -1


def test_the_daemon_ends_and_reloads_whichever_thread_is_interrupted(bridge, node_config, command):
    node = node_config(1)
    daemon = command.start("run", "-c", node.path)
    try:
        said = ""

        def until(words):
            nonlocal said
            while words not in said:
                assert select.select([daemon.stderr], [], [], PATIENCE)[0], said
                said += daemon.stderr.readline()

        until("is up with")
        tasks = [int(path.name) for path in Path(f"/proc/{daemon.pid}/task").iterdir()]
        others = [task for task in tasks if task != daemon.pid]
        node.write(slapformat={"partition_amount": 2})
        assert _libc.tgkill(daemon.pid, others[0], signal.SIGHUP) == 0
        until("in force, with 2 partitions")
        assert _libc.tgkill(daemon.pid, others[-1], signal.SIGTERM) == 0
        assert daemon.wait(PATIENCE) == 0
    finally:
        daemon.kill()
        said += daemon.communicate()[1]
    assert "ended; supervisord and what it runs go on" in said
