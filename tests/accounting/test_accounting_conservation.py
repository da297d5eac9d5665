"""What the ledger says equals what was counted, whatever happens between passes and wherever it is killed."""

import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from accounting_world import a_pass, bytes_in, process, traffic
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from accounting import AccountingError, Ledger

KEYS = [(partition, scope) for partition in ("slappart0", "slappart1") for scope in ("remote", "local")]
keys = st.sampled_from(KEYS)
partitions = st.sampled_from(["slappart0", "slappart1"])


class Conservation(RuleBasedStateMachine):
    """Kernel, owners and clock do what they like; ``truth`` follows by the plainest bookkeeping."""

    @initialize()
    def begin(self):
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "ledger.sqlite"
        self.ledger = Ledger(self.path)
        self.raw = Counter()
        self.epoch = Counter()
        self.unrecorded = Counter()
        self.cpu = {}
        self.cpu_unrecorded = Counter()
        self.owners = {"slappart0": None, "slappart1": "A"}
        self.truth = Counter()
        self.cpu_truth = Counter()
        self.at = 1000.0
        self.times = [0.0]
        self.last = None

    @rule(key=keys, amount=st.integers(1, 10**12))
    def the_kernel_counts(self, key, amount):
        self.raw[key] += amount
        self.unrecorded[key] += amount

    @rule(key=keys, amount=st.integers(0, 1000))
    def a_counter_restarts(self, key, amount):
        """What it counted since the last pass is lost to everybody."""
        self.epoch[key] += 1
        self.raw[key] = self.unrecorded[key] = amount

    @rule(
        pid=st.integers(1, 5),
        partition=partitions,
        used=st.integers(0, 10**7),
    )
    def a_process_runs(self, pid, partition, used):
        partition = self.cpu.get(pid, (partition, 0))[0]
        self.cpu[pid] = (partition, self.cpu.get(pid, (partition, 0))[1] + used)
        self.cpu_unrecorded[pid] += used

    @rule(guid=st.sampled_from([None, "A", "B"]), partition=partitions)
    def a_partition_changes_hands(self, guid, partition):
        self.owners[partition] = guid

    @rule(step=st.sampled_from([10.0, 0.5, 0.0, -300.0]))
    def time_passes(self, step):
        self.at += step

    @rule(left_out=st.sets(keys, max_size=2), scanned=st.booleans())
    def a_pass_is_recorded(self, left_out, scanned):
        read = [key for key in KEYS if key not in left_out]
        self.last = (self.reading(read, scanned), read, scanned)
        self.ledger.record(self.last[0])
        self.settle(read, scanned)

    @rule()
    def a_pass_is_recorded_again(self):
        """As after an error of which nobody knows whether it came before or after the commit."""
        if self.last is not None and not self.unrecorded.total() and not self.cpu_unrecorded.total():
            reading = self.reading(KEYS, scanned=True)
            self.ledger.record(reading)
            self.settle(KEYS, scanned=True)
            self.ledger.record(reading)

    @rule()
    def a_pass_fails_for_want_of_space(self):
        """A pass with much new in it meets a limit; the next one is none the worse."""
        connection = self.ledger._connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        many = [traffic(f"slappart{index}", 1) for index in range(100, 700)]
        with pytest.raises(AccountingError) as caught:
            self.ledger.record(a_pass(self.at, *self.reading(KEYS, scanned=False).traffic, *many))
        assert (caught.value.code, caught.value.retryable) == ("accounting.ledger_full", True)
        connection.execute("PRAGMA max_page_count = 1073741823")

    @rule()
    def the_daemon_restarts(self):
        self.ledger.close()
        self.ledger = Ledger(self.path)
        assert self.ledger.recovered is None

    def reading(self, read, scanned):
        return a_pass(
            self.at,
            *(traffic(k[0], self.raw[k], scope=k[1], epoch=str(self.epoch[k])) for k in read),
            owners=dict(self.owners),
            processes=[process(p, used, partition=name) for p, (name, used) in self.cpu.items()]
            if scanned
            else None,
        )

    def settle(self, read, scanned):
        self.times.append(self.at)
        for key in read:
            self.truth[key[0], self.owners[key[0]]] += self.unrecorded.pop(key, 0)
        if scanned:
            for pid, used in self.cpu_unrecorded.items():
                partition = self.cpu[pid][0]
                self.cpu_truth[partition, self.owners[partition]] += used
            self.cpu_unrecorded.clear()

    @invariant()
    def totals_are_the_truth(self):
        assert bytes_in(self.ledger) == +self.truth
        used = {
            (entry.id, entry.instance_guid): round(entry.cpu_seconds * 1e6)
            for entry in self.ledger.usage(None, None).partitions
        }
        assert +Counter(used) == +self.cpu_truth

    @invariant()
    def intervals_add_up_wherever_time_is_cut(self):
        cut = self.times[len(self.times) // 2]
        parts = Counter(bytes_in(self.ledger, None, cut)) + Counter(bytes_in(self.ledger, cut, None))
        assert parts == +self.truth
        assert Counter(bytes_in(self.ledger, 0, cut)) == Counter(bytes_in(self.ledger, None, cut))

    def teardown(self):
        if hasattr(self, "ledger"):
            self.ledger.close()
            self.directory.cleanup()


TestConservation = Conservation.TestCase
TestConservation.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)

# A child that records pass after pass, says which it has recorded, and kills itself in the middle of one.
CHILD = """
import os, signal, sys
from pathlib import Path
from test_accounting_conservation import numbered_pass
from accounting import Ledger

first, instructions = int(sys.argv[2]), int(sys.argv[3])
ledger = Ledger(Path(sys.argv[1]))
left = instructions

def tick():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

if instructions:
    ledger._connection.set_progress_handler(tick, 1)  # after each instruction of SQLite's virtual machine
for number in range(first, first + 100_000):
    ledger.record(numbered_pass(number))
    os.write(1, b"%d\\n" % number)
"""


def numbered_pass(number):
    """What meters read at step ``number``: one counter restarts every 7 steps, the owner changes every 5."""
    return a_pass(
        float(number),
        *(traffic("slappart0", 1000 * number, address=f"2001:db8::{index}") for index in range(5)),
        traffic("slappart1", 10 * (number % 7 + 1), epoch=str(number // 7)),
        owners={"slappart0": f"GUID{number // 5}", "slappart1": "X"},
        processes=[process(1 + number // 3, 100 * number, partition="slappart1")],
    )


def expected(numbers):
    """The truth after these passes, in a dictionary of its own making."""
    sums, last = Counter(), 0
    for number in numbers:
        sums["slappart0", f"GUID{number // 5}"] += 5 * 1000 * (number - last)
        before = 10 * (last % 7 + 1) if last and last // 7 == number // 7 else 0
        sums["slappart1", "X"] += 10 * (number % 7 + 1) - before
        last = number
    return +sums


def run_child(path, first, instructions, seconds):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(first), str(instructions)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    with child:
        first_line = child.stdout.readline() if not instructions else b""
        time.sleep(seconds)
        if not instructions:
            child.kill()
        said = first_line + child.stdout.read()
    assert child.returncode == -9
    # What a kill cut in half was a pipe write of a few bytes: it is there or it is not.
    return [int(line) for line in said.split()]


@pytest.mark.parametrize("by", ["instruction", "time"])
def test_killed_anywhere_it_loses_and_doubles_nothing(tmp_path, by):
    path = tmp_path / "ledger.sqlite"
    dice = random.Random(20)  # noqa: S311 (a test's dice must fall alike each time)
    recorded = []
    for _ in range(12):
        first = recorded[-1] + 1 if recorded else 1
        instructions = dice.randrange(1, 12_000) if by == "instruction" else 0
        said = run_child(path, first, instructions, 0 if instructions else dice.random() / 20)
        assert said == list(range(first, first + len(said)))
        recorded += said
        with Ledger(path) as ledger:
            assert ledger.recovered is None
            done = round(ledger.usage(None, None).end or 0)
            # A pass that was said is there; at most one more, which was committed but not said any more.
            last = recorded[-1] if recorded else 0
            assert done in (last, last + 1)
            if done == last + 1:
                recorded.append(done)
            assert bytes_in(ledger) == expected(recorded)
            assert bytes_in(ledger, 0, None) == expected(recorded)
            assert [entry.cpu_seconds for entry in ledger.usage(None, None, "slappart1").partitions] == [
                processor_time(recorded)
            ] * bool(recorded)
    assert len(recorded) > 5


def processor_time(numbers):
    used, last = 0, (0, 0)
    for number in numbers:
        pid, cpu = 1 + number // 3, 100 * number
        used += cpu - (last[1] if last[0] == pid else 0)
        last = (pid, cpu)
    return used / 1e6
