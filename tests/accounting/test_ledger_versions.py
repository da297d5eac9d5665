"""A ledger of version 1 becomes one of version 2: nothing changes in it, and killed anywhere it is one or the other."""

import sqlite3
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest
from accounting_world import a_pass, back_to_version_1, bytes_in, process, traffic

from accounting import AccountingError, Ledger, schema, store

DAY = 86_400
START = 1_790_000_000.0
NAMES = ("slappart0", "slappart1")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def first(path, passes=40):
    """Write a ledger of version 1 by its own statements; give the truth of it: bytes by time, partition and guid."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(schema._FIRST)
    owners = [(1, "slappart0", "", 1, 10), (2, "slappart0", "A", 10, None), (3, "slappart1", "B", 1, None)]
    connection.executemany("INSERT INTO owner VALUES (?, ?, ?, ?, ?)", owners)
    truth, sums = [], Counter()
    for account, owner in enumerate((1, 2, 3), 1):
        connection.execute(
            "INSERT INTO account VALUES (?, ?, 'traffic', '2001:db8::1', 'ipv6', 'remote', 0, 0, 0, 0, 0)",
            (account, owner),
        )
        connection.execute(
            "INSERT INTO account VALUES (?, ?, 'cpu_seconds', '', '', '', 0, 0, 0, 0, 0)",
            (10 + account, owner),
        )
    for seq in range(1, passes + 1):
        at = START + 3000 * seq
        connection.execute(
            "INSERT INTO pass VALUES (?, ?, ?)", (seq, at * 10**6, (at - 3000) * 10**6 if seq > 1 else None)
        )
        for account, key in (
            (1 if seq < 10 else 2, ("slappart0", "A" if seq >= 10 else None)),
            (3, ("slappart1", "B")),
        ):
            amounts = (seq, 2 * seq, 1, 1, 0)
            for number, row in ((account, amounts), (10 + account, (0, 0, 0, 0, 500_000))):
                connection.execute("INSERT INTO sample VALUES (?, ?, ?, ?, ?, ?, ?)", (seq, number, *row))
                connection.execute(
                    "UPDATE account SET bytes_in = bytes_in + ?, bytes_out = bytes_out + ?, packets_in = packets_in + ?,"
                    " packets_out = packets_out + ?, quantity = quantity + ? WHERE id = ?",
                    (*row, number),
                )
            truth.append((at, key, seq))
            sums[key[0]] += seq
    for name in NAMES:
        value = sums[name]
        connection.execute(
            "INSERT INTO level VALUES (?, 'traffic', '2001:db8::1', 'ipv6', 'remote', 'e1', ?, ?, ?, ?, 0)",
            (name, value, 2 * value, value // 10, value // 5),
        )
    connection.execute("INSERT INTO process VALUES (7, 1, 'b1', 'slappart0', 20000000)")
    connection.execute("INSERT INTO gauge VALUES (1, 2, 'memory_bytes', 10, 30, 4096)")
    connection.executemany("INSERT INTO gauge_sample VALUES (?, 1, ?)", [(10, 8192), (30, 4096)])
    connection.execute(
        "INSERT INTO gap VALUES (1, 'slappart1', ?, ?, 'counters restarted (ipv6)')",
        (START * 10**6, (START + 3000) * 10**6),
    )
    connection.close()
    return truth


def reports(ledger):
    """All that can be asked, over many intervals."""
    cuts = [None, *(START + 3000 * seq + side for seq in (1, 9, 10, 17, 39) for side in (0, 1))]
    pairs = [(start, end) for start, end in combinations(cuts, 2) if end is not None]
    return [ledger.usage(start, end).as_json() for start, end in [(None, None), *pairs]], ledger.totals()


def version(path):
    connection = sqlite3.connect(path)
    try:
        return connection.execute("PRAGMA user_version").fetchone()[0]
    finally:
        connection.close()


def test_everything_is_the_same_after_it(path):
    truth = first(path)
    with Ledger.open_readonly(path) as reader:
        before = reports(reader)
    assert version(path) == 1  # a reader changes nothing
    with Ledger(path) as ledger:
        assert ledger.recovered is None
        assert reports(ledger) == before
        sums = Counter()
        for _, key, amount in truth:
            sums[key] += amount
        assert bytes_in(ledger) == sums
        for start, end in ((START + 9000, START + 60_000), (START, START + DAY)):
            assert bytes_in(ledger, start, end) == +sum(
                (Counter({key: amount}) for at, key, amount in truth if start < at <= end), Counter()
            )
    assert version(path) == schema.VERSION == 2
    with Ledger.open_readonly(path) as reader:
        assert reports(reader) == before


def next_passes(ledger, truth, passes=30):
    """Go on from where the counters of the old ledger were; give what the partitions have after it."""
    sums = Counter()
    for _, key, amount in truth:
        sums[key] += amount
    raw = {name: sum(amount for key, amount in sums.items() if key[0] == name) for name in NAMES}
    for number in range(passes):
        for name in NAMES:
            raw[name] += 100
        ledger.record(
            a_pass(
                START + 200_000 + 4000 * number,
                *(traffic(name, value) for name, value in raw.items()),
                owners={"slappart0": "A", "slappart1": "B"},
                processes=[process(7, 20_000_000 + 1000 * number)],
            )
        )
    sums["slappart0", "A"] += 100 * passes
    sums["slappart1", "B"] += 100 * passes
    return sums


def test_counting_goes_on_where_it_was_and_what_is_old_is_joined(path):
    truth = first(path)
    with Ledger(path) as ledger:
        sums = next_passes(ledger, truth)
        assert bytes_in(ledger) == sums
        assert [gap.reason for gap in ledger.usage(None, None).gaps] == ["counters restarted (ipv6)"]
        days = [(START // DAY + number) * DAY for number in range(6)]
        before = [ledger.usage(*pair).as_json() for pair in combinations(days, 2)]
        # of the days since the upgrade none has its documents; those before never will
        passes = [seq for (seq,) in ledger._connection.execute("SELECT seq FROM pass")]
        while ledger.thin(START + 400 * DAY, 0):
            pass
        left = [seq for (seq,) in ledger._connection.execute("SELECT seq FROM pass")]
        assert left[-30:] == passes[-30:]
        assert len(left) == 30 + 2  # two days of version 1
        assert [ledger.usage(*pair).as_json() for pair in combinations(days, 2)] == before
        assert bytes_in(ledger) == sums


# A child that opens an old ledger and kills itself after so many statements, or instructions of SQLite's virtual machine.
KILLED = """
import os, signal, sqlite3, sys
from pathlib import Path
from accounting import Ledger, store
left = int(sys.argv[2])

def tick(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

connect = store._connect
def watched(uri):
    connection = connect(uri)
    if left:
        if sys.argv[3] == "instruction":
            connection.set_progress_handler(tick, 1)
        else:
            connection.set_trace_callback(tick)
    return connection
store._connect = watched
Ledger(Path(sys.argv[1])).close()
"""


def killed(path, left, by):
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(left), by],
        env={"PYTHONPATH": ":".join(sys.path)},
        check=False,
    ).returncode


@pytest.mark.parametrize(
    ("by", "steps"),
    # how many there are is SQLite's affair (3.46 takes more than 3.40): until one of them does not come any more
    [("statement", range(1, 2000, 4)), ("instruction", range(1, 100_000, 160))],
)
def test_killed_at_any_step_it_is_of_one_version_or_the_other(tmp_path, by, steps):
    truth = first(tmp_path / "first")
    with Ledger.open_readonly(tmp_path / "first") as reader:
        before = reports(reader)
    seen = Counter()
    for number, step in enumerate(steps):
        path = tmp_path / f"l{number}"
        path.write_bytes((tmp_path / "first").read_bytes())
        code = killed(path, step, by)
        found = version(path)
        seen[code, found] += 1
        with Ledger.open_readonly(path) as reader:
            assert reports(reader) == before
        with Ledger(path) as ledger:
            assert ledger.recovered is None
            assert reports(ledger) == before
            sums = next_passes(ledger, truth, 2)
            assert bytes_in(ledger) == sums
        if code == 0:
            break
    assert seen[0, 2] == 1
    assert {found for _, found in seen} == {1, 2}
    assert seen[-9, 1] >= 3


def test_what_version_1_wrote_while_nobody_checkpointed_is_in_it_too(path):
    """As an upgrade finds it after the old daemon was killed: the last passes are in its WAL."""
    truth = first(path)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("UPDATE account SET bytes_in = bytes_in + 7 WHERE id = 3")
    assert path.with_name(path.name + "-wal").stat().st_size > 0
    copy = path.with_name("copy")
    for suffix in ("", "-wal"):
        copy.with_name(copy.name + suffix).write_bytes(path.with_name(path.name + suffix).read_bytes())
    connection.close()
    with Ledger(copy) as ledger:
        expected = sum(amount for _, key, amount in truth if key[0] == "slappart1") + 7
        assert bytes_in(ledger)["slappart1", "B"] == expected


def test_an_older_partitiond_refuses_it_with_a_clear_sentence(path, monkeypatch):
    first(path)
    with Ledger(path):
        pass
    before = path.read_bytes()
    monkeypatch.setattr(store, "VERSION", 1)
    for opening in (Ledger, Ledger.open_readonly):
        with pytest.raises(
            AccountingError, match="is of version 2, this partitiond writes version 1"
        ) as caught:
            opening(path)
        assert caught.value.code == "accounting.ledger_version"
        assert "use the partitiond that wrote it" in caught.value.hint
    assert path.read_bytes() == before


def test_a_reader_of_version_1_goes_on_while_it_is_brought_to_2(path):
    first(path)
    with Ledger.open_readonly(path) as reader:
        before = reports(reader)
        with Ledger(path) as ledger:
            assert reports(reader) == before
            ledger.record(a_pass(START + 200_000, traffic("slappart1", 10**6), owners={"slappart1": "B"}))
            assert sum(bytes_in(reader).values()) > 10**6


def test_taken_back_to_version_1_it_has_the_tables_of_version_1(path, tmp_path):
    """What tests of an upgrade under traffic begin from."""
    Ledger(path).close()
    back_to_version_1(path)
    first(tmp_path / "first")
    columns = []
    for file in (path, tmp_path / "first"):
        connection = sqlite3.connect(file)
        columns.append(
            connection.execute(
                "SELECT s.name, c.name FROM sqlite_schema s, pragma_table_info(s.name) c ORDER BY 1, c.cid"
            ).fetchall()
        )
        connection.close()
    assert columns[0] == columns[1]
    assert version(path) == 1
