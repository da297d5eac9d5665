"""When the kernel's notices lead to a look: soon, once for many, ever more seldom in a fight, and never not at all."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitiond.pacing import FIRST_HOLD, FREE, LONGEST_HOLD, LONGEST_WAIT, QUIET, Pacer


def test_nothing_is_due_when_nothing_happened():
    pacer = Pacer()
    assert pacer.due() is None
    assert not pacer.announce(1e9)
    assert pacer.take() == {}


def test_one_look_for_a_burst_soon_after_it():
    pacer = Pacer()
    for number in range(100):
        pacer.note(f"address/{number}", 10 + number / 10000)
    assert pacer.due() == pytest.approx(10.0099 + QUIET)
    assert not pacer.announce(10.01)
    assert pacer.announce(10.1)
    assert not pacer.announce(10.2), "once"
    assert pacer.due() is None
    assert len(pacer.take()) == 100
    assert pacer.take() == {}


def test_a_burst_without_end_waits_no_longer_than_allowed():
    pacer = Pacer()
    for number in range(1000):
        pacer.note("tap/a", 10 + number * QUIET / 2)
    assert pacer.due() == 10 + LONGEST_WAIT


def test_what_is_urgent_waits_for_nothing():
    pacer = Pacer()
    pacer.note("filter/partitiond", 10, urgent=True)
    assert pacer.due() == 10
    assert pacer.announce(10)
    pacer.note("tap/a", 11)
    assert pacer.due() == 11 + QUIET, "and the next is not"


def test_what_comes_during_a_look_is_looked_at_afterwards():
    pacer = Pacer()
    pacer.note("tap/a", 10)
    assert pacer.announce(10 + QUIET)
    assert pacer.take() == {"tap/a": 10}
    pacer.note("tap/a", 10.06)
    assert pacer.due() == 10.06 + QUIET


def fight(pacer, cause, until, again=0.05):
    """Something that is undone so often; return when it was looked at."""
    looks, now = [], 0.0
    fights = []
    while now < until:
        pacer.note(cause, now)
        if pacer.announce(now):
            found = pacer.take()
            looks.append(now)
            fights += pacer.strike(found, now)
        now += again
    return looks, fights


def test_a_fight_is_told_once_and_answered_ever_more_seldom():
    looks, fights = fight(Pacer(), "tap/a", 600)
    assert fights == ["tap/a"]
    pauses = [later - sooner for sooner, later in pairwise(looks)]
    assert max(pauses[: FREE - 1]) < 0.3
    assert pauses[FREE] >= FIRST_HOLD
    assert all(later >= sooner - 0.2 for sooner, later in pairwise(pauses[FREE:]))
    assert max(pauses) < LONGEST_HOLD + 1
    assert pauses[-1] >= LONGEST_HOLD - 1
    assert len(looks) < 25


def test_other_causes_are_answered_at_once_meanwhile_and_that_look_answers_all():
    pacer = Pacer()
    fight(pacer, "tap/a", 100)
    now = 100.0
    pacer.note("tap/a", now)
    held = pacer.due()
    assert held is None or held > now + 1
    pacer.note("tap/b", now)
    assert pacer.due() == now + QUIET
    assert pacer.announce(now + QUIET)
    assert set(pacer.take()) == {"tap/a", "tap/b"}


def test_peace_is_forgiven():
    pacer = Pacer()
    fight(pacer, "tap/a", 10)
    pacer.take()
    pacer.strike([], 1000)
    pacer.note("tap/a", 1000)
    assert pacer.due() == 1000 + QUIET
    assert pacer.strike(["tap/a"] * FREE, 1001) == []


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.sampled_from("abc"), st.sampled_from(["note", "urgent", "look"])),
        max_size=60,
    )
)
def test_no_notice_is_ever_forgotten(steps):
    """Whatever happens: what was noted and not taken is due some time, at the latest after the longest hold."""
    pacer, now, waiting = Pacer(), 0.0, {}
    for pause, cause, what in steps:
        now += pause
        if what == "look":
            pacer.announce(now)
            taken = pacer.take()
            assert taken == waiting
            pacer.strike(taken, now)
            waiting = {}
        else:
            pacer.note(cause, now, urgent=what == "urgent")
            waiting.setdefault(cause, now)
        if waiting:
            due = pacer.due()
            assert due is not None
            assert due <= now + LONGEST_HOLD
            if due <= now:
                assert pacer.announce(now)
                assert pacer.take() == waiting
                waiting = {}
