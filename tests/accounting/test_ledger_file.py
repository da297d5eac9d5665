"""What becomes of the ledger when its file is removed, exchanged, spoiled or has no room, while it is in use."""

import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from accounting_world import a_pass, bytes_in, process, traffic

from accounting import AccountingError, Ledger, store
from partitiond.events import EventLog
from partitiond.ledger_care import LedgerCare

KEY = ("slappart0", None)
NOW = 1_700_000_000.0
SPARE = 2**20


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    path.parent.mkdir()
    with Ledger(path) as opened:
        opened.record(a_pass(NOW, traffic(value=1)))
        yield opened


def remove(path):
    path.unlink()


def remove_all(path):
    for file in path.parent.iterdir():
        file.unlink()


def move_away(path):
    path.rename(path.with_name("elsewhere"))


def exchange(path):
    path.with_name("copy").write_bytes(b"precious")
    path.with_name("copy").replace(path)


def exchange_for_another_ledger(path):
    with Ledger(path.with_name("other")) as other:
        other.record(a_pass(5, traffic(value=10**9)))
    path.with_name("other").replace(path)


@pytest.mark.parametrize("harm", [remove, remove_all, move_away, exchange, exchange_for_another_ledger])
def test_a_file_that_is_not_there_any_more_is_put_back_with_all_it_had(ledger, path, harm):
    ledger.record(a_pass(NOW + 10, traffic(value=11)))
    harm(path)
    assert ledger.record(a_pass(NOW + 20, traffic(value=111))) == ()
    ledger.record(a_pass(NOW + 30, traffic(value=1111)))
    assert "put back" in ledger.recovered
    assert bytes_in(ledger) == {KEY: 1111}
    assert bytes_in(ledger, NOW + 15, None) == {KEY: 1100}
    with Ledger.open_readonly(path) as reader:
        assert bytes_in(reader) == {KEY: 1111}
    assert path.stat().st_mode & 0o777 == 0o600
    kept = [file for file in path.parent.iterdir() if ".damaged-" in file.name]
    assert bool(kept) == (harm in (exchange, exchange_for_another_ledger))
    ledger.close()
    with Ledger(path) as again:
        assert again.recovered is None
        assert bytes_in(again) == {KEY: 1111}
        assert again._connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)


# A child that finds its ledger's file gone and is killed before its n-th change of a directory.
KILLED = """
import os, signal, sys
from pathlib import Path
from accounting import Ledger
from accounting_world import a_pass, traffic
path, left = Path(sys.argv[1]), int(sys.argv[2])
ledger = Ledger(path)
ledger.record(a_pass(20, traffic(value=111)))
path.with_name("foreign").write_bytes(b"foreign")
path.with_name("foreign").replace(path)

def hook(event, arguments):
    global left
    if event in ("os.rename", "os.link", "os.remove", "sqlite3.connect"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
ledger.record(a_pass(30, traffic(value=1111)))
os._exit(0)
"""


def test_killed_while_it_puts_the_file_back_it_is_whole_or_not_there(tmp_path):
    path = tmp_path / "l"
    whole = 0
    for step in range(1, 30):
        child = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(step)],
            env={"PYTHONPATH": ":".join(sys.path)},
            check=False,
        )
        if path.read_bytes() != b"foreign":
            whole += 1
            with Ledger(path) as ledger:
                assert ledger.recovered is None
                ledger.record(a_pass(40, traffic(value=1112)))
                assert bytes_in(ledger) == {KEY: 1112}
        for file in tmp_path.iterdir():
            file.unlink()
        if child.returncode == 0:
            break
    assert child.returncode == 0
    assert whole >= 2


def documents(ledger, number, size=3000):
    ledger._connection.executemany(
        "INSERT INTO document (reference, day, kind, partition, guid, content, state, made, changed)"
        " VALUES (?, '2026-11-22', 'node', '', '', ?, 'waiting', 1, 1)",
        [(f"d{index}", f"{index} " + "x" * size) for index in range(number)],
    )
    ledger._connection.execute(
        "INSERT INTO intake (partition, guid, source, at, movements, document) VALUES ('p', 'g', 's', 1, '[]', 3)"
    )
    ledger._connection.execute(
        "INSERT INTO incident (partition, guid, kind, name, begun, seen, reason) VALUES ('p', 'g', 'k', 'n', 1, 2, 'r')"
    )
    ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def pages_of(path, table):
    with sqlite3.connect(path) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
    connection.close()
    return root


def spoil(path, page):
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xa5" * 4096)


def test_reports_are_taken_over_from_a_file_that_is_damaged_elsewhere(ledger, path):
    documents(ledger, 40)
    ledger.close()
    spoil(path, pages_of(path, "sample"))
    with Ledger(path) as again:
        assert "all 42 rows were taken over" in again.recovered
        rows = again._connection.execute("SELECT id, reference, content FROM document").fetchall()
        assert rows == [(index + 1, f"d{index}", f"{index} " + "x" * 3000) for index in range(40)]
        assert again._connection.execute("SELECT document, removed FROM intake").fetchall() == [(3, 0)]
        assert again._connection.execute("SELECT seen, ended FROM incident").fetchall() == [(2, None)]
        again.record(a_pass(NOW, traffic(value=5)))
        again.record(a_pass(NOW, traffic(value=6)))
        assert bytes_in(again) == {KEY: 1}


def test_reports_are_taken_over_row_by_row_where_one_of_their_pages_is_gone(ledger, path):
    documents(ledger, 40)
    ledger.close()
    content = path.read_bytes()
    page = content.index(b"20 xxxxx") // 4096 + 1
    spoil(path, page)
    with Ledger(path) as again:
        taken = [number for (number,) in again._connection.execute("SELECT id FROM document ORDER BY id")]
        assert 37 <= len(taken) < 40
        assert 21 not in taken
        assert f"{len(taken) + 2} rows were taken over" in again.recovered
        assert again._connection.execute("PRAGMA quick_check").fetchone() == ("ok",)


def test_a_file_of_which_nothing_can_be_read_is_said(ledger, path):
    documents(ledger, 5)
    ledger.close()
    spoil(path, 1)
    with Ledger(path) as again:
        assert "it can not be read" in again.recovered


def events(directory):
    file = directory / "events.jsonl"
    return [json.loads(line)["event"] for line in file.read_text().splitlines()] if file.exists() else []


def post(care, ledger, log, at, value, *more):
    with care.watching(log):
        return care.post(ledger, a_pass(at, traffic(value=value), *more), log)


def overwrite(path):
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\xa5" * size)


def truncate(path):
    os.truncate(path, 4096)


def empty(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("harm", [overwrite, truncate, empty, remove, exchange])
def test_in_the_middle_of_a_run_service_goes_on_and_the_operator_is_told_once(ledger, path, tmp_path, harm):
    care, log = LedgerCare(path), EventLog(tmp_path)
    many = [traffic(f"slappart{index}", 7) for index in range(1, 60)]
    post(care, ledger, log, NOW + 1, 2, *many)
    assert (care.cases(), events(tmp_path)) == ([], [])
    # all is in the file, and nothing of it in memory
    ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger._connection.execute("PRAGMA shrink_memory")
    harm(path)
    for number in range(4):
        post(care, ledger, log, NOW + 10 + number, 100 + number, *many)
    assert events(tmp_path) == ["usage.damaged"]
    damaged = harm in (overwrite, truncate, empty)
    assert bytes_in(ledger)[KEY] == (3 if damaged else 103)
    assert len(ledger.usage(None, None).gaps) == damaged
    assert len(care.cases()) == (harm is not remove)
    with Ledger.open_readonly(path) as reader:
        assert bytes_in(reader) == bytes_in(ledger)
    for file in path.parent.glob("*.damaged-*"):
        file.unlink()
    assert care.cases() == []


# In a mount namespace of its own: a small file system that fills up.
FULL = """
import os, subprocess, sys
from pathlib import Path
from accounting import AccountingError, Ledger
from accounting_world import a_pass, bytes_in, traffic
from partitiond.events import EventLog
from partitiond.ledger_care import LedgerCare
from test_ledger_file import NOW, events, post

where, logs = Path(sys.argv[1]) / "small", Path(sys.argv[1])
where.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32M", "none", str(where)], check=True)
path = where / "l"

def fill():
    with (where / "filler").open("ab", buffering=0) as file:
        for size in (65536, 4096, 512):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass

def free():
    (where / "filler").unlink()

care, log = LedgerCare(path), EventLog(logs)
fill()
for _ in range(2):
    try:
        with care.watching(log):
            Ledger(path)
    except AccountingError as error:
        print("opening", error.code)
free()
ledger = Ledger(path)
for number in range(300):
    post(care, ledger, log, NOW + 10 * number, number + 1)
post(care, ledger, log, NOW + 86400, 301)
ledger._connection.execute("UPDATE period SET documented = 1 WHERE until_seq IS NOT NULL")
print("cases", len(care.cases()))
ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else there is room in it
fill()
many = [traffic(f"slappart{index}", 5) for index in range(1, 500)]
for number in range(3):
    try:
        post(care, ledger, log, NOW + 86410 + number, 310 + number, *many)
    except AccountingError as error:
        print("pass", error.code, error.retryable, bytes_in(ledger), len(care.cases()))
before = ledger._connection.execute("SELECT count(*) FROM pass").fetchone()[0]
for _ in range(200):
    try:
        if not ledger.thin(NOW + 9 * 86400, 0.01):
            break
    except AccountingError as error:
        print("thinning", error.code, bytes_in(ledger))
        break
free()
post(care, ledger, log, NOW + 86420, 320, *many)
print("after", sum(bytes_in(ledger).values()) - 5 * 499, len(care.cases()))
while ledger.thin(NOW + 9 * 86400, 0):
    pass
print("joined", ledger._connection.execute("SELECT count(*) FROM pass").fetchone()[0] < before)
print("sums", sum(bytes_in(ledger, NOW - 86400, None).values()) - 5 * 499)
print(ledger._connection.execute("PRAGMA integrity_check").fetchone(), ledger.usage(None, None).gaps)
print(events(logs))
"""


def test_a_real_disk_that_is_full_when_it_opens_records_and_thins(tmp_path):
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespace may be made here")
    child = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", FULL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": ":".join([*sys.path, str(Path(__file__).parent)])},
        check=False,
        capture_output=True,
        text=True,
    )
    said = child.stdout.splitlines()
    assert said[:2] == ["opening accounting.ledger_full"] * 2, child.stderr
    assert [line for line in said[2:] if not line.startswith("thinning")] == [
        "cases 0",
        *["pass accounting.ledger_full True {('slappart0', None): 301} 1"] * 3,
        "after 320 0",
        "joined True",
        "sums 320",
        "('ok',) ()",
        "['usage.full', 'usage.resumed', 'usage.full', 'usage.resumed']",
    ], child.stderr
    assert any(line.startswith("thinning accounting.ledger_full {('slappart0', None): 301}") for line in said)


def test_where_even_the_directory_is_gone_passes_fail_until_it_is_back(ledger, path):
    away = path.parent.with_name("away")
    path.parent.rename(away)
    with pytest.raises(AccountingError) as caught:
        ledger.record(a_pass(NOW + 10, traffic(value=11)))
    assert (caught.value.code, caught.value.retryable) == ("accounting.ledger_unavailable", True)
    shutil.rmtree(away)
    path.parent.mkdir()
    ledger.record(a_pass(NOW + 20, traffic(value=111)))
    assert bytes_in(ledger) == {KEY: 111}


def in_the_way(path):
    """Something that the new ledger can not take the place of."""
    path.with_name(path.name + ".new").mkdir()
    return path.with_name(path.name + ".new").rmdir


def no_more_files(path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("harm", [overwrite, remove, exchange])
@pytest.mark.parametrize("obstacle", [in_the_way, no_more_files])
def test_a_recovery_that_fails_is_made_up_for_once_its_cause_is_gone(ledger, path, tmp_path, harm, obstacle):
    care, log = LedgerCare(path), EventLog(tmp_path)
    post(care, ledger, log, NOW + 1, 2)
    ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger._connection.execute("PRAGMA shrink_memory")
    harm(path)
    away = obstacle(path)
    try:
        for number in range(2):
            with pytest.raises(AccountingError) as caught:
                ledger.record(a_pass(NOW + 2 + number, traffic(value=3)))
            if caught.value.code == "accounting.ledger_damaged":
                with pytest.raises(AccountingError) as caught:
                    ledger.recover("damaged")
            assert (caught.value.code, caught.value.retryable) == ("accounting.ledger_unavailable", True)
    finally:
        away()
    for number in range(3):
        post(care, ledger, log, NOW + 10 + number, 100 + number)
    assert bytes_in(ledger) == {KEY: 2 if harm is overwrite else 102}
    assert events(tmp_path) == ["usage.damaged"]
    assert care.cases() == [] or harm is not remove
    with ledger.transaction() as connection:
        assert connection.execute("PRAGMA quick_check").fetchone() == ("ok",)


def test_a_ledger_that_can_not_be_opened_again_is_opened_later(ledger, path, monkeypatch):
    ledger.record(a_pass(NOW + 10, traffic(value=11)))
    path.unlink()
    opened = store.open_writer

    def fail(*_, **__):
        message = "no room"
        raise AccountingError("accounting.ledger_full", message, retryable=True)

    monkeypatch.setattr(store, "open_writer", fail)
    for _ in range(2):
        with pytest.raises(AccountingError, match="no room"):
            ledger.record(a_pass(NOW + 20, traffic(value=12)))
        with pytest.raises(AccountingError, match="no room"):
            ledger.usage(None, None)
    monkeypatch.setattr(store, "open_writer", opened)
    assert bytes_in(ledger) == {KEY: 11}
    ledger.record(a_pass(NOW + 30, traffic(value=13)))
    assert bytes_in(ledger) == {KEY: 13}
    assert "put back" in ledger.recovered


def remove_its_log_too(path):
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


@pytest.mark.parametrize("harm", [remove, remove_its_log_too, move_away, empty])
def test_a_ledger_that_is_moved_away_between_two_runs_is_not_counted_again(ledger, path, harm):
    ledger.record(a_pass(NOW + 10, traffic(value=10**9), processes=[process(1, 3_600_000_000)]))
    ledger.close()
    harm(path)
    with Ledger(path, clock=lambda: NOW + 15) as again:
        assert "a new one was begun" in again.recovered
        again.record(a_pass(NOW + 20, traffic(value=10**9 + 5), processes=[process(1, 3_600_000_000)]))
        again.record(a_pass(NOW + 30, traffic(value=10**9 + 7), processes=[process(1, 3_600_000_000)]))
        assert bytes_in(again) == {KEY: 2}
        assert [(gap.end, gap.reason) for gap in again.usage(None, None).gaps] == [
            (NOW + 20, again.recovered)
        ]
        assert again.totals()[0].cpu_seconds == 0
    assert len(list(path.parent.glob("*.damaged-*"))) == (harm is empty)


def test_the_first_ledger_of_a_node_counts_from_the_first_pass_also_if_it_was_killed_when_it_began(path):
    path.parent.mkdir()
    store.open_writer(path).close()  # killed before it noted that it was begun
    for _ in range(2):
        with Ledger(path) as ledger:
            assert ledger.recovered is None
            ledger.record(a_pass(NOW, traffic(value=7)))
            assert bytes_in(ledger) == {KEY: 7}
            assert ledger.usage(None, None).gaps == ()


def test_a_ledger_from_before_there_was_a_mark_is_marked_when_it_is_opened(ledger, path):
    ledger.close()
    path.with_name("ledger.begun").unlink()
    Ledger(path).close()
    path.unlink()
    with Ledger(path) as again:
        again.record(a_pass(NOW + 20, traffic(value=10**9)))
        assert bytes_in(again) == {}


# A child whose ledger was moved away, killed before its n-th change of a directory.
KILLED_ANEW = (
    KILLED.split("path, left", maxsplit=1)[0]
    + """
path, left = Path(sys.argv[1]), int(sys.argv[2])
def hook"""
    + KILLED.split("def hook")[1].replace(
        "ledger.record(a_pass(30, traffic(value=1111)))", "Ledger(path).close()"
    )
)


def test_killed_while_it_begins_anew_it_still_counts_nothing_twice(tmp_path):
    path = tmp_path / "l"
    for step in range(1, 30):
        with Ledger(path) as ledger:
            ledger.record(a_pass(20, traffic(value=111)))
        path.unlink()
        child = subprocess.run(
            [sys.executable, "-c", KILLED_ANEW, str(path), str(step)],
            env={"PYTHONPATH": ":".join(sys.path)},
            check=False,
        )
        with Ledger(path) as ledger:
            ledger.record(a_pass(40, traffic(value=1112)))
            ledger.record(a_pass(50, traffic(value=1113)))
            assert bytes_in(ledger) == {KEY: 1}
            assert len(ledger.usage(None, None).gaps) == 1
        for file in tmp_path.iterdir():
            file.unlink()
        if child.returncode == 0:
            break
    assert child.returncode == 0
    assert step >= 4


def test_a_partition_that_goes_while_nothing_can_be_recorded_is_recorded_afterwards(
    ledger, path, tmp_path, monkeypatch
):
    """Its last reading was taken, and nothing shows it again; what is still there is made up for by the next pass anyhow."""
    care, log = LedgerCare(path), EventLog(tmp_path)
    gone = traffic("slappart1", 1000)
    mine, other = {"slappart0": "A", "slappart1": "B"}, {"slappart0": "C"}
    recorded = Ledger.record

    def fail(*_):
        message = "no room"
        raise AccountingError("accounting.ledger_full", message, retryable=True)

    def attempt(number, *readings, owners):
        reading = a_pass(NOW + number, *readings, owners=owners)
        try:
            with care.watching(log):
                care.post(ledger, reading, log)
        except AccountingError as error:
            care.keep(reading, error)

    attempt(1, traffic(value=10), gone._replace(bytes_in=900), owners=mine)
    monkeypatch.setattr(Ledger, "record", fail)
    for number in range(2, 6):
        attempt(number, traffic(value=10 * number), gone, owners=mine)
    assert len(care._kept) == 1
    for number in range(6, 9):
        attempt(number, traffic(value=10 * number), owners=other)
    attempt(9, traffic(value=5, epoch="e2"), owners=other)
    attempt(10, traffic(value=6, epoch="e2"), owners=other)
    assert len(care._kept) == 3
    monkeypatch.setattr(Ledger, "record", recorded)
    attempt(11, traffic(value=7, epoch="e2"), owners=other)
    assert care._kept == []
    assert bytes_in(ledger) == {
        KEY: 1,
        ("slappart0", "A"): 49,
        ("slappart0", "C"): 37,
        ("slappart1", "B"): 1000,
    }
    monkeypatch.setattr(Ledger, "record", fail)
    for number in range(12, 80):
        attempt(number, traffic(value=1, epoch=f"e{number}"), owners=other)
    assert len(care._kept) == 30
    # what can not be true is no pass at all
    monkeypatch.setattr(Ledger, "record", recorded)
    attempt(80, traffic(value=-1), owners=other)
    assert care._kept == []
    assert care.cases()[0].startswith("usage is not recorded")


def test_rows_are_taken_over_one_by_one_also_where_thousands_before_them_are_forgotten(ledger, path):
    documents(ledger, 40)
    ledger._connection.execute("UPDATE document SET id = id + 5000")
    ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger.close()
    spoil(path, path.read_bytes().index(b"20 xxxxx") // 4096 + 1)
    with Ledger(path) as again:
        taken = [number for (number,) in again._connection.execute("SELECT id FROM document ORDER BY id")]
        assert 37 <= len(taken) < 40
        assert taken[0] == 5001
        assert taken[-1] == 5040
