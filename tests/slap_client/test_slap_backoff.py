from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slap_client.backoff import Backoff


def seeded(seed) -> Random:
    return Random(seed)  # noqa: S311 - repeatable on purpose


def test_without_jitter_the_delays_double_up_to_the_cap():
    backoff = Backoff(2, 30, 0)
    assert [backoff.next() for _ in range(6)] == [2, 4, 8, 16, 30, 30]
    assert backoff.attempts == 6
    backoff.reset()
    assert backoff.attempts == 0
    assert backoff.next() == 2


def test_a_seeded_generator_makes_the_delays_repeatable():
    def delays(seed):
        backoff = Backoff(1, 300, 1, seeded(seed))
        return [backoff.next() for _ in range(20)]

    assert delays(7) == delays(7)
    assert delays(7) != delays(8)


def test_without_a_generator_the_delays_differ_between_nodes():
    assert len({Backoff(1, 300).next() for _ in range(10)}) > 1


@given(
    base=st.floats(0.001, 100),
    factor=st.floats(1, 1e6),
    jitter=st.floats(0, 1),
    seed=st.integers(),
)
def test_delays_stay_between_their_bounds(base, factor, jitter, seed):
    cap = base * factor
    backoff = Backoff(base, cap, jitter, seeded(seed))
    for attempt in range(100):
        window = min(cap, base * 2.0**attempt)
        assert window * (1 - jitter) * (1 - 1e-9) <= backoff.next() <= window


@pytest.mark.parametrize(
    "numbers",
    [(0, 1, 0), (-1, 1, 0), (2, 1, 0), (1, float("inf"), 0), (1, 2, -0.1), (1, 2, 1.1), (float("nan"), 2, 0)],
)
def test_numbers_that_make_no_sense_are_refused(numbers):
    with pytest.raises(ValueError, match=r"needs 0 < base|between 0 and 1"):
        Backoff(*numbers)
