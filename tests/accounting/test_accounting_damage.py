"""What the ledger does when its file, its disk or its neighbours misbehave."""

import os
import sqlite3
import subprocess
import sys
import threading

import pytest
from accounting_world import a_pass, bytes_in, process, traffic

from accounting import AccountingError, Ledger, store

NOW = 1_700_000_000.0
KEY = ("slappart0", None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def fill(path, rounds=30):
    """A ledger of some pages, last written at NOW - 60."""
    with Ledger(path) as ledger:
        for at in range(rounds):
            ledger.record(
                a_pass(
                    at,
                    *(traffic(f"slappart{index}", 1000 * (at + 1)) for index in range(40)),
                    processes=[process(1, 1_000_000)],
                )
            )
    os.utime(path, (NOW - 60, NOW - 60))


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, (NOW - 60, NOW - 60))


def spoil_header(path):
    overwrite(path, 0, b"\xa5" * 200)


def spoil_pages(path):
    overwrite(path, 3 * 4096, b"\xa5" * 4096 * 5)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)
    os.utime(path, (NOW - 60, NOW - 60))


@pytest.mark.parametrize("spoil", [spoil_header, spoil_pages, truncate])
def test_a_damaged_file_is_kept_and_a_new_ledger_begun(path, spoil):
    fill(path)
    spoil(path)
    damaged = path.read_bytes()
    with Ledger(path, clock=lambda: NOW) as ledger:
        aside = path.with_name("ledger.sqlite.damaged-20231114T221320Z")
        assert str(aside) in ledger.recovered
        assert aside.read_bytes() == damaged
        (gap,) = ledger.usage(None, None).gaps
        assert (gap.start, gap.end, gap.reason) == (NOW - 60, NOW, ledger.recovered)
        # What the counters say now is in the damaged ledger, and perhaps billed: never again.
        ledger.record(a_pass(NOW + 5, traffic(value=31_000), processes=[process(1, 1_500_000)]))
        assert bytes_in(ledger) == {}
        ledger.record(a_pass(NOW + 15, traffic(value=31_007), processes=[process(1, 1_600_000)]))
        assert bytes_in(ledger) == {KEY: 7}
        report = ledger.usage(None, None)
        assert report.partitions[0].cpu_seconds == 0.1
        assert [(gap.start, gap.end) for gap in report.gaps] == [(NOW - 60, NOW + 5)]
        # A counter that is made from now on counts from zero again.
        ledger.record(a_pass(NOW + 25, traffic("slappart1", 3), processes=[process(2, 50_000)]))
        assert bytes_in(ledger) == {KEY: 7, ("slappart1", None): 3}
    with Ledger(path) as ledger:
        assert ledger.recovered is None
        assert bytes_in(ledger) == {KEY: 7, ("slappart1", None): 3}
    assert sorted(file.name for file in path.parent.iterdir()) == ["ledger.begun", path.name, aside.name]


def test_a_second_damage_in_the_same_second_keeps_both(path):
    for _ in range(2):
        path.write_bytes(b"\xa5" * 5000)
        Ledger(path, clock=lambda: NOW).close()
    assert [file.name for file in sorted(path.parent.iterdir())] == [
        "ledger.begun",
        "ledger.sqlite",
        "ledger.sqlite.damaged-20231114T221320Z",
        "ledger.sqlite.damaged-20231114T221320Z-2",
    ]


def test_damage_found_in_use_is_said_and_can_be_recovered_from(path):
    fill(path)
    with Ledger(path, clock=lambda: NOW) as ledger:
        spoil_pages(path)
        ledger._connection.execute("PRAGMA cache_size = 1")
        everything = a_pass(100, *(traffic(f"slappart{index}", 10**6) for index in range(40)))
        with pytest.raises(AccountingError) as caught:
            ledger.record(everything)
        assert (caught.value.code, caught.value.retryable) == ("accounting.ledger_damaged", False)
        assert ledger.recover(str(caught.value)) == ledger.recovered
        ledger.record(a_pass(NOW, traffic(value=5)))
        ledger.record(a_pass(NOW, traffic(value=6)))
        assert bytes_in(ledger) == {KEY: 1}


# A child that opens a damaged ledger and is killed before its n-th change of a directory.
KILLED = """
import os, signal, sys
from pathlib import Path
from accounting import Ledger
left = int(sys.argv[2])

def hook(event, arguments):
    global left
    if event in ("os.rename", "os.link", "os.remove"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
Ledger(Path(sys.argv[1])).close()
"""


def test_killed_while_it_sets_damage_aside_it_still_counts_nothing_twice(path):
    for step in range(1, 50):
        fill(path, rounds=3)
        spoil_header(path)
        path.with_name(path.name + "-wal").write_bytes(b"left over")
        child = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(step)],
            env={"PYTHONPATH": ":".join(sys.path)},
            check=False,
        )
        with Ledger(path) as ledger:
            assert len(ledger.usage(None, None).gaps) == 1
            ledger.record(a_pass(NOW, traffic(value=3000)))
            ledger.record(a_pass(NOW, traffic(value=3001)))
            assert bytes_in(ledger) == {KEY: 1}
        for file in path.parent.iterdir():
            file.unlink()
        if child.returncode == 0:
            break
    assert step >= 7  # three removals, two or more renames, the link, the exchange


def test_a_file_that_is_no_ledger_is_left_alone(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE precious (thing)")
    connection.close()
    before = path.read_bytes()
    for opening in (Ledger, Ledger.open_readonly):
        with pytest.raises(AccountingError) as caught:
            opening(path)
        assert caught.value.code == "accounting.ledger_version"
    assert path.read_bytes() == before


def test_a_ledger_of_a_later_version_is_left_alone(path):
    with Ledger(path) as ledger:
        ledger._connection.execute("PRAGMA user_version = 99")
    for opening in (Ledger, Ledger.open_readonly):
        with pytest.raises(AccountingError, match="version 99") as caught:
            opening(path)
        assert caught.value.code == "accounting.ledger_version"


def test_a_missing_directory_is_said(tmp_path):
    with pytest.raises(AccountingError) as caught:
        Ledger(tmp_path / "nowhere" / "ledger.sqlite")
    assert (caught.value.code, caught.value.retryable) == ("accounting.ledger_unavailable", True)


def test_a_ledger_that_another_process_writes_is_busy(path, monkeypatch):
    monkeypatch.setattr(store, "BUSY_SECONDS", 0.05)
    with Ledger(path) as ledger, Ledger(path) as other, store.transaction(other._connection):
        with pytest.raises(AccountingError) as caught:
            ledger.record(a_pass(1, traffic(value=1)))
        assert (caught.value.code, caught.value.retryable) == ("accounting.ledger_busy", True)


def test_two_writers_in_turn_agree(path):
    """The verb `sync usage` without a daemon, then the daemon again."""
    with Ledger(path) as one, Ledger(path) as two:
        for step in range(1, 7):
            (one if step % 2 else two).record(a_pass(step, traffic(value=step * 10)))
        assert bytes_in(one) == bytes_in(two) == {KEY: 60}


def test_a_full_ledger_is_made_up_for_by_the_next_pass(path):
    with Ledger(path) as ledger:
        ledger.record(a_pass(1, traffic(value=1)))
        (pages,) = ledger._connection.execute("PRAGMA page_count").fetchone()
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        many = [traffic(f"slappart{index}", 5) for index in range(1, 500)]
        with pytest.raises(AccountingError) as caught:
            ledger.record(a_pass(2, traffic(value=2), *many))
        assert (caught.value.code, caught.value.retryable) == ("accounting.ledger_full", True)
        assert bytes_in(ledger) == {KEY: 1}
        ledger._connection.execute("PRAGMA max_page_count = 100000")
        ledger.record(a_pass(3, traffic(value=3), *many))
        assert sum(bytes_in(ledger).values()) == 3 + 5 * 499


# In a mount namespace of its own: a file system that fills up, then one that goes read-only.
MOUNTED = """
import os, subprocess, sys
from pathlib import Path
from accounting import AccountingError, Ledger
from accounting_world import a_pass, bytes_in, traffic

where = Path(sys.argv[1])
mount = lambda *words: subprocess.run(["mount", *words, str(where)], check=True)
mount("-t", "tmpfs", "-o", "size=1M", "none")
ledger = Ledger(where / "l.sqlite")
ledger.record(a_pass(1, traffic(value=1)))
try:
    (where / "filler").write_bytes(b"x" * 2**20)
except OSError as error:
    print("filler", error.errno)
many = [traffic(f"slappart{index}", 5) for index in range(1, 500)]
try:
    ledger.record(a_pass(2, traffic(value=2), *many))
except AccountingError as error:
    print(error.code, error.retryable, bytes_in(ledger))
(where / "filler").unlink()
ledger.record(a_pass(3, traffic(value=3), *many))
print(sum(bytes_in(ledger).values()))
ledger.close()

mount("-o", "remount,ro")
with Ledger.open_readonly(where / "l.sqlite") as reader:
    print(sum(bytes_in(reader).values()))
try:
    Ledger(where / "l.sqlite")
except AccountingError as error:
    print(error.code, error.retryable)
"""


def test_a_real_disk_that_is_full_then_read_only(tmp_path):
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespace may be made here")
    child = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", MOUNTED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert child.stderr == ""
    assert child.stdout.splitlines() == [
        "filler 28",
        "accounting.ledger_full True {('slappart0', None): 1}",
        str(3 + 5 * 499),
        str(3 + 5 * 499),
        "accounting.ledger_unavailable True",
    ]


def test_a_reader_without_a_ledger_has_an_empty_report_and_makes_no_file(path):
    with Ledger.open_readonly(path) as reader:
        assert reader.usage(None, None).partitions == ()
        assert reader.totals() == ()
    assert list(path.parent.iterdir()) == []


def test_a_reader_of_a_ledger_that_is_just_being_made_has_an_empty_report(path):
    path.touch()
    with Ledger.open_readonly(path) as reader:
        assert reader.usage(None, None).partitions == ()


def test_a_reader_can_not_write(path):
    Ledger(path).close()
    with Ledger.open_readonly(path) as reader, pytest.raises(sqlite3.OperationalError):
        reader._connection.execute("DELETE FROM pass")


def test_a_reader_of_a_damaged_ledger_says_so_and_leaves_it(path):
    fill(path)
    spoil_header(path)
    before = path.read_bytes()
    with pytest.raises(AccountingError) as caught:
        Ledger.open_readonly(path)
    assert caught.value.code == "accounting.ledger_damaged"
    assert path.read_bytes() == before


def test_a_closed_ledger_says_so(path):
    ledger = Ledger(path)
    ledger.close()
    ledger.close()
    with pytest.raises(AccountingError) as caught:
        ledger.record(a_pass(1))
    assert caught.value.code == "accounting.ledger_unavailable"


@pytest.mark.parametrize("beside", [True, False], ids=["its own connection", "the writer's connection"])
def test_a_reader_sees_whole_passes_while_they_are_written(path, beside):
    """Each pass adds the same to forty partitions: a reader that saw half of one would see two values."""
    names = [f"slappart{index}" for index in range(40)]
    seen, stop = [], threading.Event()

    def read(reader):
        while not stop.is_set():
            report = reader.usage(None, None)
            values = {entry.addresses[0].bytes_in for entry in report.partitions}
            seen.append((values, report.end))

    with Ledger(path) as ledger:
        ledger.record(a_pass(0, *(traffic(name, 1) for name in names)))
        reader = Ledger.open_readonly(path) if beside else ledger
        thread = threading.Thread(target=read, args=(reader,))
        thread.start()
        try:
            for step in range(1, 150):
                ledger.record(a_pass(step, *(traffic(name, step + 1) for name in names)))
        finally:
            stop.set()
            thread.join()
            reader.close()
    assert len(seen) > 10
    assert all(values == {end + 1} for values, end in seen)


def test_closed_it_is_whole_without_its_log_while_somebody_reads(path):
    with Ledger.open_readonly(path):
        ledger = Ledger(path)
        ledger.record(a_pass(1, traffic(value=7)))
    with Ledger.open_readonly(path) as reader:
        reader.totals()
        ledger.close()
        copy = path.with_name("copy.sqlite")
        copy.write_bytes(path.read_bytes())
    with Ledger(copy) as restored:
        assert bytes_in(restored) == {KEY: 7}
