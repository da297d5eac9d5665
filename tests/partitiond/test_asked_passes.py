"""Passes asked for by hand while a lane is at work: few wait, equal ones are one, and the crontab's are told at once."""

import threading
import time
from types import SimpleNamespace

import pytest

from partitiond.asked_passes import AskedPasses
from partitiond.daemon import Lane
from partitiond.errors import PartitiondError
from partitiond.passes import Wish

PLAIN, FORCED = Wish(), Wish(force=True)


@pytest.fixture
def scene():
    """A lane in the midst of a pass of its own, until ``built`` is set."""
    tally = SimpleNamespace(lane=lambda *_, **__: None)
    building, built = threading.Event(), threading.Event()

    def body():
        building.set()
        assert built.wait(10)

    lane = Lane("software", 3600.0, body, threading.Event(), tally)
    asked, ran, threads, answers = AskedPasses(), [], [], []

    def take(wish, name, *, wait=True, fails=False):
        def work():
            ran.append(name)
            if fails:
                raise PartitiondError("software.build", "no")
            return {"by": name}

        try:
            answers.append(asked.take("software", wish, lane.once, work, wait=wait)["by"])
        except PartitiondError as error:
            answers.append(error.code)

    def ask(*words, **more):
        thread = threading.Thread(target=take, args=words, kwargs=more)
        thread.start()
        threads.append(thread)
        deadline = time.monotonic() + 10
        while asked._asking["software"] < len(threads):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def over():
        built.set()
        for thread in threads:
            thread.join(10)
        threads.clear()

    own = threading.Thread(target=lane.once, args=(body,))
    own.start()
    assert building.wait(10)
    yield SimpleNamespace(take=take, ask=ask, over=over, ran=ran, answers=answers, asked=asked)
    over()
    own.join(10)


def test_a_crontab_that_asks_each_minute(scene):
    scene.ask(PLAIN, "first", wait=False)
    for _ in range(70):
        scene.take(PLAIN, "later", wait=False)
    assert scene.answers == ["node.busy"] * 70
    scene.over()
    assert scene.answers[70:] == scene.ran == ["first"]
    scene.take(PLAIN, "again", wait=False)
    assert scene.answers[-1] == "again"


def test_equal_ones_are_done_once_and_few_wait(scene):
    for number in range(6):
        scene.ask(PLAIN, f"plain {number}")
    scene.ask(FORCED, "forced", fails=True)
    scene.ask(FORCED, "forced too")
    scene.take(Wish(collect=True), "one too many")
    assert scene.answers == ["node.busy"]
    scene.over()
    assert sorted(scene.ran) == ["forced", "plain 0"]
    assert sorted(scene.answers[1:]) == ["plain 0"] * 6 + ["software.build"] * 2
    assert not scene.asked._waiting
    assert not +scene.asked._asking
