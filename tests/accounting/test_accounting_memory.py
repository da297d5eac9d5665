"""What the ledger keeps in memory between passes is the same as what it would read: nobody can tell from the file."""

import contextlib
import random
import sqlite3

import pytest
from accounting_world import a_pass, count, gauge, process, traffic

from accounting import AccountingError, Ledger


def passes(seed, number=25):
    """Passes in which about everything happens: owners, epochs, processes and gauges that change, come and go."""
    chance = random.Random(seed)  # noqa: S311 (the same each time)
    value = 0
    for at in range(number):
        value += chance.choice((0, 7, 30))
        readings = []
        for index in range(chance.choice((3, 4))):
            name = f"slappart{index}"
            epoch = f"e{chance.randrange(2)}" if chance.random() < 0.1 else "e"
            readings += [
                traffic(name, value, epoch=epoch),
                traffic(name, value // 2, scope="local"),
                count("denied_packets", value, partition=name),
                gauge("memory_bytes", value // 9, partition=name),
            ]
        owners = {f"slappart{index}": chance.choice((None, "A", "B", "B")) for index in range(4)}
        running = [
            process(pid, value, partition=f"slappart{pid % 4}", io=(value, value), parent=pid - 1)
            for pid in range(9)
            if chance.random() < 0.8
        ]
        yield a_pass(at, *readings, owners=owners, processes=chance.choice((running, running, None)))


def content(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        # each ledger has a number of its own
        return [line for line in connection.iterdump() if not line.startswith('INSERT INTO "identity"')]


@pytest.fixture
def truth(tmp_path):
    """The file of one who forgets all after each pass."""

    def make(seed):
        path = tmp_path / "truth.sqlite"
        for reading in passes(seed):
            with Ledger(path) as ledger:
                ledger.record(reading)
        return content(path)

    return make


@pytest.mark.parametrize("seed", range(5))
def test_one_who_remembers_writes_the_same(tmp_path, truth, seed):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        for reading in passes(seed):
            ledger.record(reading)
    assert content(path) == truth(seed)


@pytest.mark.parametrize("seed", range(5, 8))
def test_two_who_take_turns_write_the_same(tmp_path, truth, seed):
    path = tmp_path / "ledger.sqlite"
    turns = random.Random(seed)  # noqa: S311 (likewise)
    with Ledger(path) as one, Ledger(path) as other:
        for reading in passes(seed):
            turns.choice((one, other)).record(reading)
    assert content(path) == truth(seed)


@pytest.mark.parametrize("table", ["account", "sample", "level", "process", "gauge_sample", "pass"])
def test_a_pass_that_failed_half_way_leaves_nothing_in_memory(tmp_path, truth, table):
    path = tmp_path / "ledger.sqlite"
    failed = 0
    with Ledger(path) as ledger:
        connection = ledger._connection
        for number, reading in enumerate(passes(9)):
            if number % 3 == 2:
                when = "UPDATE" if table in ("account", "level") else "INSERT"
                connection.execute(
                    f"CREATE TEMP TRIGGER fails BEFORE {when} ON main.{table}"
                    " BEGIN SELECT RAISE(ABORT, 'no'); END"
                )
                try:
                    ledger.record(reading)
                except AccountingError:
                    failed += 1
                connection.execute("DROP TRIGGER fails")
                if connection.execute("SELECT max(at) FROM pass").fetchone()[0] == number * 10**6:
                    continue  # there was nothing that could fail
            ledger.record(reading)
    assert failed > 3
    assert content(path) == truth(9)


def test_a_quiet_pass_reads_no_table_of_levels(tmp_path):
    """The promise of it all; sqlite's tracer tells every statement."""
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        readings = list(passes(1))
        ledger.record(readings[0])
        said = []
        ledger._connection.set_trace_callback(said.append)
        ledger.record(readings[0])
        ledger._connection.set_trace_callback(None)
    assert any("INSERT INTO pass" in one for one in said)
    assert [
        one for one in said if "FROM level" in one or "FROM account" in one or "FROM process" in one
    ] == []
