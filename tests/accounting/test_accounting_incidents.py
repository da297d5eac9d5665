"""Incidents: what is seen wrong has a begin and an end, however often it is looked at and whoever restarts in between."""

import contextlib
import sqlite3

import pytest

from accounting import Ledger, incidents, schema
from accounting.incidents import PROMISE, SERVICE, Look

GUID = "SOFTINST-1"


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as made:
        yield made


def wrong(*names, guid=GUID):
    return Look(guid, alive=True, troubles=dict.fromkeys(names, "EXITED"))


def see(ledger, at, *names, kind=SERVICE, **options):
    return ledger.observe_incidents(kind, at, {"slappart0": wrong(*names)}, **options)


def seconds(ledger, until=10**9):
    with ledger.transaction("DEFERRED") as connection:
        return [(one.kind, one.name, one.microseconds / 1e6) for one in incidents.waiting(connection, until)]


def names(rows):
    return [row.name for row in rows]


def test_it_lasts_from_when_it_was_first_seen_until_it_was_first_seen_gone(ledger):
    assert names(see(ledger, 1000.0, "db").begun) == ["db"]
    for at in (1060.0, 1120.0):
        changes = see(ledger, at, "db")
        assert (changes.begun, names(changes.kept), changes.ended) == ((), ["db"], ())
    changes = see(ledger, 1180.0)
    assert [(row.name, row.microseconds) for row in changes.ended] == [("db", 180 * 10**6)]
    assert ledger.incidents() == ()
    assert seconds(ledger) == [("service", "db", 180.0)]


def test_the_same_look_twice_changes_nothing(ledger):
    see(ledger, 1000.0, "db")
    see(ledger, 1060.0, "db")
    before = ledger._connection.execute("SELECT * FROM incident").fetchall()
    changed = ledger._connection.total_changes
    changes = see(ledger, 1060.0, "db")
    assert (changes.begun, changes.ended) == ((), ())
    assert ledger._connection.total_changes == changed
    assert ledger._connection.execute("SELECT * FROM incident").fetchall() == before


def test_what_comes_again_within_a_minute_is_one_and_later_is_another(ledger):
    (first,) = see(ledger, 1000.0, "db").begun
    for at in range(1010, 2000, 20):  # it flaps
        assert names(see(ledger, float(at)).ended) == ["db"]
        changes = see(ledger, at + 10.0, "db")
        assert (changes.begun, [row.id for row in changes.kept]) == ((), [first.id])
    see(ledger, 2010.0)
    assert names(see(ledger, 2071.0, "db").begun) == ["db"]
    assert seconds(ledger, 2010.0) == [("service", "db", 1010.0)]
    assert ledger._connection.execute("SELECT count(*) FROM incident").fetchone() == (2,)


def test_while_nobody_looked_it_counts_if_it_is_there_afterwards(ledger):
    see(ledger, 1000.0, "there", "gone")
    see(ledger, 1060.0, "there", "gone")
    changes = see(ledger, 9000.0, "there")
    assert names(changes.kept) == ["there"]
    assert [(row.name, row.microseconds) for row in changes.ended] == [("gone", 60 * 10**6)]
    assert seconds(ledger) == [("service", "gone", 60.0), ("service", "there", 8000.0)]


def test_another_ledger_of_the_same_file_goes_on(ledger):
    see(ledger, 1000.0, "db")
    with Ledger(ledger.path) as after:
        assert names(after.incidents()) == ["db"]
        assert names(see(after, 1060.0, "db").kept) == ["db"]
        assert names(see(after, 1120.0).ended) == ["db"]


@pytest.mark.parametrize("at", [1000.0 + 10**8, -(10.0**8)])
def test_a_clock_that_jumped_counts_nothing_of_the_jump(ledger, at):
    see(ledger, 1000.0, "db", "web")
    see(ledger, 1060.0, "db", "web")
    changes = see(ledger, at, "db", jumped=True)
    assert sorted(row.microseconds for row in changes.ended) == [60 * 10**6] * 2
    assert names(changes.begun) == ["db"]
    assert names(see(ledger, at + 60.0, "db").kept) == ["db"]
    assert seconds(ledger)[-1] == ("service", "db", 60.0)
    assert [row.begun for row in ledger.incidents()] == [round(at * 1e6)]


def test_an_instance_that_stops_or_goes_has_none(ledger):
    for kind in (SERVICE, PROMISE):
        see(ledger, 1000.0, "a", kind=kind)
        ledger.observe_incidents(kind, 1000.0, {"slappart1": wrong("b", guid="SOFTINST-2")}, whole=False)
    stopped = {"slappart0": Look(GUID, alive=False), "slappart1": wrong("b", guid="SOFTINST-2")}
    changes = ledger.observe_incidents(SERVICE, 1060.0, stopped)
    assert sorted((row.kind, row.name) for row in changes.ended) == [("promise", "a"), ("service", "a")]
    changes = ledger.observe_incidents(SERVICE, 1120.0, {"slappart0": Look(GUID, alive=False)})
    assert sorted((row.kind, row.name) for row in changes.ended) == [("promise", "b"), ("service", "b")]


def test_another_instance_of_the_partition_has_its_own(ledger):
    see(ledger, 1000.0, "db")
    changes = ledger.observe_incidents(SERVICE, 1060.0, {"slappart0": wrong("db", guid="SOFTINST-9")})
    assert [(row.guid, row.name) for row in changes.ended] == [(GUID, "db")]
    assert [(row.guid, row.name) for row in changes.begun] == [("SOFTINST-9", "db")]
    changes = see(ledger, 1070.0, "db")  # and back
    assert [row.guid for row in changes.ended] == ["SOFTINST-9"]
    assert [row.guid for row in changes.kept] == [GUID]


def test_promises_and_services_know_nothing_of_each_other(ledger):
    see(ledger, 1000.0, "x")
    see(ledger, 1000.0, "x", kind=PROMISE, whole=False)
    assert see(ledger, 1060.0, kind=PROMISE, whole=False).ended[0].kind == "promise"
    assert [(row.kind, row.name) for row in ledger.incidents()] == [("service", "x")]


def test_a_partition_that_was_not_looked_at_keeps_what_it_has(ledger):
    see(ledger, 1000.0, "x", kind=PROMISE, whole=False)
    changes = ledger.observe_incidents(PROMISE, 1060.0, {"slappart1": wrong()}, whole=False)
    assert changes == incidents.Changes()


def test_seconds_are_reported_once_also_while_it_lasts(ledger):
    see(ledger, 1000.0, "db")
    see(ledger, 1100.0, "db")
    told = 0
    for until in (1050.0, 1050.0, 10**9):
        with ledger.transaction("IMMEDIATE") as connection:
            for one in incidents.waiting(connection, until):
                assert (one.partition, one.guid) == ("slappart0", GUID)
                incidents.mark_reported(connection, one.id, one.microseconds)
                told += one.microseconds
    assert told == 100 * 10**6
    see(ledger, 1150.0)
    see(ledger, 1200.0, "db")  # the same one again: what it lasts never shrinks below what was told
    assert seconds(ledger) == [("service", "db", 100.0)]
    see(ledger, 1230.0)
    assert seconds(ledger) == [("service", "db", 130.0)]
    assert seconds(ledger, 900.0) == []


def test_there_is_a_bound_for_each_partition(ledger):
    many = [f"{number:0>4}" for number in range(5000)]
    assert len(see(ledger, 1000.0, *many).begun) == incidents._MOST_OPEN
    assert see(ledger, 1060.0, *many).begun == ()


def test_a_reader_of_a_ledger_from_before_there_were_any_finds_none(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as connection:
        connection.executescript(schema._FIRST)
    with Ledger.open_readonly(tmp_path / "ledger.sqlite") as reader:
        assert reader.incidents() == ()
