"""Rows of usage files: each is counted once, wherever the one who takes it is killed, and a file like it counts again."""

import os
import signal
from decimal import Decimal

import pytest

from accounting import AccountingError, Ledger
from accounting.intake import MOST_BYTES, MOST_MOVEMENTS, Said
from accounting.tioxml import Document, Movement, write

CPU = (Said("cpu", "hours of \u00e9", Decimal("1.000000001")), Said("disk", "", Decimal(10) ** 15))


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as made:
        yield made


def test_what_a_file_said_is_kept_as_it_was(ledger):
    assert ledger.take_in("slappart0", "SOFTINST-1", "1:2:aa", CPU, 1000.5)
    (taken,) = ledger.intake_waiting()
    assert (taken.partition, taken.guid, taken.at) == ("slappart0", "SOFTINST-1", 1000.5)
    assert taken.movements == CPU


def test_a_file_counts_once_until_it_is_removed_and_then_another_one_like_it_counts(ledger):
    assert ledger.take_in("slappart0", "SOFTINST-1", "1:2:aa", CPU, 1000.0)
    assert not ledger.take_in("slappart0", "SOFTINST-1", "1:2:aa", CPU, 2000.0)
    assert ledger.intake_left() == {"slappart0": {"1:2:aa"}}
    ledger.removed("slappart0", ["1:2:aa"])
    assert ledger.intake_left() == {}
    assert ledger.take_in("slappart0", "SOFTINST-1", "1:2:aa", CPU, 3000.0)
    assert [taken.at for taken in ledger.intake_waiting()] == [1000.0, 3000.0]


def test_the_same_file_seen_through_another_partition_is_another_one(ledger):
    """A name of a file in two partitions' directories must not let one keep the other's from counting."""
    assert ledger.take_in("slappart0", "SOFTINST-1", "1:2:aa", CPU, 1000.0)
    assert ledger.take_in("slappart1", "SOFTINST-2", "1:2:aa", CPU, 1000.0)
    ledger.removed("slappart1", ["1:2:aa"])
    assert ledger.intake_left() == {"slappart0": {"1:2:aa"}}


def test_what_is_in_a_document_does_not_wait(ledger):
    ledger.take_in("slappart0", "SOFTINST-1", "1:2:aa", CPU, 1000.0)
    with ledger.transaction("IMMEDIATE") as connection:
        connection.execute(
            "INSERT INTO document (id, reference, day, kind, partition, guid, content, state, made, changed)"
            " VALUES (7, 'R', '2026-11-22', 'usage', 'slappart0', 'SOFTINST-1', '', 'waiting', 0, 0)"
        )
        connection.execute("UPDATE intake SET document = 7")
    assert ledger.intake_waiting() == ()


def test_a_taker_that_is_killed_after_the_commit_has_counted_and_before_it_has_not(tmp_path):
    for killed_inside in (True, False):
        path = tmp_path / f"{killed_inside}.sqlite"
        Ledger(path).close()
        child = os.fork()
        if not child:
            made = Ledger(path)
            if killed_inside:
                with made.transaction("IMMEDIATE") as connection:
                    connection.execute(
                        "INSERT INTO intake (partition, guid, source, at, movements) VALUES ('a', 'b', 's', 1, '[]')"
                    )
                    os.kill(os.getpid(), signal.SIGKILL)
            made.take_in("slappart0", "SOFTINST-1", "s", CPU, 1.0)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        with Ledger(path) as made:
            assert len(made.intake_waiting()) == (0 if killed_inside else 1)


def test_a_full_disk_counts_nothing_and_says_so(ledger):
    (pages,) = ledger._connection.execute("PRAGMA page_count").fetchone()
    ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
    many = [Said("cpu", f"{number:0>200}", Decimal(1)) for number in range(1000)]
    with pytest.raises(AccountingError) as caught:
        ledger.take_in("slappart0", "SOFTINST-1", "s", many, 1.0)
    assert (caught.value.code, caught.value.retryable) == ("accounting.ledger_full", True)
    assert ledger.intake_waiting() == ()
    assert ledger.intake_left() == {}


def test_the_question_before_each_file_is_answered_by_an_index(ledger):
    plan = ledger._connection.execute(
        "EXPLAIN QUERY PLAN SELECT 1 FROM intake WHERE removed = 0 AND source = ? AND partition = ?", ("", "")
    ).fetchall()
    assert "intake_left" in plan[0][3]


def test_what_waits_to_be_reported_of_an_instance_is_bounded_by_what_its_document_will_be(ledger):
    """Titles that grow when they are written: a document that fits is as large as is said, and one more does not fit."""
    said = [
        Movement("cpu", "SOFTINST-1", Decimal(10) ** 15, f"{number:0>4}" + "<" * 190)
        for number in range(2000)
    ]
    room, taken = ledger.intake_room("slappart0", "SOFTINST-1"), []
    while fits(room, said[len(taken)]):
        taken.append(said[len(taken)])
        ledger.take_in("slappart0", "SOFTINST-1", str(len(taken)), taken[-1:], 1.0)
    assert not fits(room, said[-1]), "what was refused takes no room"
    assert ledger.intake_room("slappart0", "SOFTINST-1") == room
    assert ledger.intake_room("slappart0", "SOFTINST-2").document_bytes == 0
    text = write(Document("R", "T", 0, 1, tuple(taken)))
    assert 0.9 * MOST_BYTES < len(text) < 1.01 * MOST_BYTES


def fits(room, *movements):
    try:
        room.take(movements)
    except AccountingError as error:
        if "bytes" in error.message:
            return False
        raise
    return True


def test_equal_movements_share_room_and_different_ones_are_counted(ledger):
    room = ledger.intake_room("slappart0", "SOFTINST-1")
    for _ in range(10):
        room.take(
            [Movement("cpu", "SOFTINST-1", Decimal(1), str(number)) for number in range(MOST_MOVEMENTS)]
        )
    with pytest.raises(AccountingError, match=f"{MOST_MOVEMENTS + 1} different movements"):
        room.take([Movement("cpu", "SOFTINST-1", Decimal(1), "one more")])
    same = [Movement("cpu", "SOFTINST-1", Decimal(1), str(number)) for number in range(1000)]
    assert not all(fits(room, *same) for _ in range(100)), "rows that wait are not added up"
