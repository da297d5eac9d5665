"""Old passes are joined: nothing is lost by it, no day changes, and what is recent stays as it is."""

import subprocess
import sys
import tempfile
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from accounting_world import a_pass, bytes_in, gauge, traffic
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import Ledger, balances, thinning

DAY = 86_400
START = 1_700_006_400.0  # midnight
NAMES = ("slappart0", "slappart1", "slappart2")


def document_all(ledger):
    ledger._connection.execute("UPDATE period SET documented = 1 WHERE until_seq IS NOT NULL")


def forget_jumps(ledger):
    """As if the last time that the clock was set were more than a day ago."""
    ledger._connection.execute("UPDATE clock SET jumped = NULL")


def thin_all(ledger, now):
    for _ in range(5_000):
        if not ledger.thin(now, 0):
            return
    raise AssertionError("thinning comes to no end")


def rows(ledger, table):
    return ledger._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608


def times(ledger):
    return [at / 1e6 for (at,) in ledger._connection.execute("SELECT at FROM pass ORDER BY seq")]


def plain_sums(ledger, after, until):
    """The slowest way: all samples of the interval, one by one."""
    found = Counter()
    for account, value in ledger._connection.execute(
        "SELECT account, bytes_in FROM sample JOIN pass USING (seq) WHERE at > ? AND at <= ?",
        (after * 10**6, until * 10**6),
    ):
        found[account] += value
    return +found


steps = st.lists(
    st.tuples(
        st.sampled_from([10, 10, 25, 25, 600, 3600, 3600, 5 * 3600, DAY, DAY, 9 * DAY, 40 * DAY])
        | st.sampled_from([0, -5, -5, -7200, -3 * DAY, -400 * DAY, 400 * DAY]),
        st.lists(st.integers(0, 9), min_size=3, max_size=3),
        st.sampled_from(["A", "B", None]),
    ),
    min_size=5,
    max_size=60,
)


def record(ledger, taken, offset=0, at=START + DAY - 35.0):
    """Record passes a step apart; give what each of them added, by owner, with its time."""
    raw, truth = Counter(), []
    for number, (step, amounts, guid) in enumerate(taken):
        at += step
        owners = {"slappart0": guid, "slappart1": "X", "slappart2": "Y"}
        for name, amount in zip(NAMES, amounts, strict=True):
            raw[name] += amount
        ledger.record(
            a_pass(
                at,
                *(traffic(name, raw[name]) for name in NAMES),
                gauge("memory_bytes", sum(amounts)),
                gauge("disk_bytes", number // 10, partition="slappart1"),
                owners=owners,
            )
        )
        truth.append(
            (
                at,
                +Counter({(name, owners[name]): amount for name, amount in zip(NAMES, amounts, strict=True)}),
            )
        )
    return truth, at


def used(truth, after, until):
    return sum((amounts for at, amounts in truth if after < at <= until), Counter())


@settings(max_examples=80, deadline=None)
@given(taken=steps, few=st.booleans(), data=st.data())
def test_days_are_the_same_before_and_after_and_every_sum_is_that_of_its_samples(taken, few, data):
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        if few:
            patch.setattr(balances, "_PASSES", 2)
            patch.setattr(balances, "_PASSES_AT_DAYS", 1)
            patch.setattr(thinning, "_ROWS", 5)
            patch.setattr(thinning, "_PASSES", 3)
        with Ledger(Path(directory) / "ledger.sqlite") as ledger:
            truth, last = record(ledger, taken)
            document_all(ledger)
            forget_jumps(ledger)
            borders = sorted({(at // DAY + side) * DAY for at, _ in truth for side in (0, 1)})
            pairs = [
                (None, borders[len(borders) // 2]),
                (borders[0], None),
                *list(combinations(borders, 2))[:150],
            ]
            before = [ledger.usage(*pair).as_json() for pair in pairs]
            now = data.draw(st.sampled_from([last, max(at for at, _ in truth) + 100 * DAY]))
            thin_all(ledger, now)
            assert [ledger.usage(*pair).as_json() for pair in pairs] == before
            for start, end in pairs[2:]:
                assert bytes_in(ledger, start, end) == used(truth, start, end)
            assert bytes_in(ledger) == used(truth, 0, 2**40)
            cuts = [int(at) for at in times(ledger)] + [int(last) - 17]
            for one, other in list(combinations(sorted(cuts), 2))[:60]:
                found = {
                    account: amounts[0]
                    for account, amounts in balances.used(
                        ledger._connection, one * 10**6, other * 10**6
                    ).items()
                    if amounts[0]
                }
                assert found == plain_sums(ledger, one, other)


def test_what_is_left_gets_coarser_with_age(tmp_path):
    now = START + 100 * DAY
    with Ledger(tmp_path / "l") as ledger:
        taken = [
            *((600, [1, 1, 1], "A") for _ in range(4 * 144)),  # four days of ten minutes, long ago
            (89 * DAY, [1, 1, 1], "A"),  # some hours, weeks ago
            *((20, [1, 1, 1], "A") for _ in range(400)),
            (4 * DAY, [1, 1, 1], "A"),
            *((10, [1, 1, 1], "A") for _ in range(100)),
            (DAY, [1, 1, 1], "A"),
            *((10, [1, 1, 1], "A") for _ in range(100)),
        ]
        truth, now = record(ledger, taken)
        document_all(ledger)
        thin_all(ledger, now)
        left = Counter(at // DAY for at in times(ledger))
        days = sorted(left)
        assert all(left[day] == 1 for day in days if day < now // DAY - 90)
        # 101 passes: two minutes' worth of 10 s apart and 19 minutes in four days
        assert times(ledger)[-101:] == [at for at, _ in truth[-101:]]
        assert len(times(ledger)) < 101 + 20 + 3 * 60 + 6
        assert bytes_in(ledger) == used(truth, 0, 2**40)


def test_nothing_is_joined_of_a_day_without_its_documents(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        _, last = record(ledger, [(10, [1, 2, 3], "A")] * 30)
        before = times(ledger)
        thin_all(ledger, last + 500 * DAY)
        assert times(ledger) == before
        ledger._connection.execute("UPDATE period SET documented = 2 WHERE id = 1")
        thin_all(ledger, last + 500 * DAY)
        periods = ledger._connection.execute("SELECT first_seq, until_seq FROM period").fetchall()
        assert periods[0] == (1, 3)  # up to midnight, by ten seconds
        assert times(ledger) == before[2:]


def test_where_the_clock_was_ahead_for_a_while_thinning_goes_on(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        ahead = [(400 * DAY, [1, 1, 1], "A"), (10, [1, 1, 1], "A"), (-400 * DAY, [1, 1, 1], "A")]
        truth, last = record(ledger, [(10, [1, 1, 1], "A")] * 20 + ahead + [(10, [1, 1, 1], "A")] * 20)
        document_all(ledger)
        forget_jumps(ledger)
        thin_all(ledger, last + 2 * DAY)  # 398 days before what the clock said then
        assert len(times(ledger)) < 20 + 15
        assert bytes_in(ledger) == used(truth, 0, 2**40)


def test_after_the_clock_was_set_nothing_is_joined_for_a_day(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        record(ledger, [(10, [1, 1, 1], "A")] * 20)
        _, last = record(ledger, [(10, [1, 1, 1], "A")] * 2)
        at = last + 400 * DAY
        ledger.record(a_pass(at, boot="b", uptime=100.0))
        ledger.record(a_pass(at + 2 * 3600, boot="b", uptime=110.0))
        document_all(ledger)
        before = times(ledger)
        thin_all(ledger, at + 3 * 3600)
        assert times(ledger) == before
        thin_all(ledger, at + 2 * DAY)
        assert len(times(ledger)) < len(before)


def test_space_is_given_back(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        for number in range(2000):
            raw = number + 1
            ledger.record(
                a_pass(START + 10 * number, *(traffic(f"slappart{index}", raw) for index in range(20)))
            )
        ledger.record(a_pass(START + 3 * DAY))
        document_all(ledger)
        before = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        thin_all(ledger, START + 4 * DAY)
        after, free = (
            ledger._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count")
        )
        assert after < before / 2
        assert free <= after / 10
        ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert (tmp_path / "l").stat().st_size == after * 4096


def test_a_limit_is_kept(tmp_path):
    """No step is more than a few thousand rows: with no time there is one step, and more to do."""
    with Ledger(tmp_path / "l") as ledger:
        record(ledger, [(10, [1, 2, 3], "A")] * 60)
        document_all(ledger)
        ledger._connection.execute("UPDATE period SET documented = 1, until_seq = coalesce(until_seq, 60)")
        calls = 0
        while ledger.thin(START + 500 * DAY, 0):
            calls += 1
            assert rows(ledger, "pass") >= 60 - 6 * calls
        assert calls > 10


# A child that thins until it kills itself in the middle.
KILLED = """
import os, signal, sys
from pathlib import Path
from accounting import Ledger
ledger = Ledger(Path(sys.argv[1]))
left = int(sys.argv[2])

def tick():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

if left:
    ledger._connection.set_progress_handler(tick, 1)
while ledger.thin(float(sys.argv[3]), 0):
    pass
"""


def test_killed_anywhere_it_loses_and_doubles_nothing(tmp_path):
    path = tmp_path / "l"
    with Ledger(path) as ledger:
        taken = [(step, [1, 2, 3], "A") for step in (10, 10, 10, 10, 3600, 10, 10)] * 30
        truth, last = record(ledger, taken)
        document_all(ledger)
        borders = sorted({(at // DAY + side) * DAY for at, _ in truth for side in (0, 1)})
        expected = [bytes_in(ledger, *pair) for pair in combinations(borders, 2)]
    killed = 0
    for instructions in (300, 1100, 2500, 4000, 7000, 9000, 20_000, 0):
        child = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(instructions), str(last + 500 * DAY)],
            env={"PYTHONPATH": ":".join(sys.path)},
            check=False,
        )
        killed += child.returncode == -9
        with Ledger(path) as ledger:
            assert ledger.recovered is None
            assert [bytes_in(ledger, *pair) for pair in combinations(borders, 2)] == expected
            assert bytes_in(ledger) == used(truth, 0, 2**40)
    assert child.returncode == 0
    assert killed >= 5
