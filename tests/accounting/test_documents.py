"""Documents of ended days: each amount in exactly one of them, whatever happens to days, owners and files in between."""

import json
import random
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from accounting_world import a_pass, count, gauge, process, traffic
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import Ledger, balances, documents, incidents, outbox, tioxml
from accounting.errors import AccountingError
from accounting.tariff import Rate, Tariff

COMPUTER = "COMP-1"
HOUR, DAY = 3600.0, 86400.0
BEGIN = datetime(2026, 11, 20, tzinfo=UTC).timestamp()
OWNERS = {"slappart0": "SOFTINST-0", "slappart1": "SOFTINST-1", "slappart2": None}
TARIFF = Tariff(
    {
        "network_in": Rate("in"),
        "network_out": Rate("out", 1000, Decimal("0.5")),
        "local_in": Rate("local"),
        "tap_out": Rate("tap"),
        "cpu": Rate("cpu", 60),
        "memory": Rate("memory"),
        "disk": Rate("disk"),
        "outage": Rate("outage"),
    },
    frozenset({"users", "mails"}),
)


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def make(ledger, now, tariff=TARIFF, apart=frozenset()):
    """Make all documents that are due, as the report lane does; give them as data by reference."""
    made = []
    with ledger.transaction() as connection:
        periods = documents.due(connection)
    for period in periods:
        with ledger.transaction() as connection:
            last_one = period == periods[-1]
            drafts = documents.gather(connection, period, tariff, COMPUTER, last=last_one, apart=apart)
        with ledger.transaction("IMMEDIATE") as connection:
            made += documents.store(connection, drafts, tariff, COMPUTER, now)
    return {reference: text(ledger, reference) for reference in made}


def text(ledger, reference):
    with ledger.transaction() as connection:
        return tioxml.read(outbox.content(connection, reference))


def amounts(document):
    """Quantities by reference and resource; a document that says one twice is none."""
    found = {(one.reference, one.resource): one.quantity for one in document.movements}
    assert len(found) == len(document.movements)
    return found


def record(ledger, at, *readings, owners=OWNERS, processes=None):
    ledger.record(a_pass(at, *readings, owners=owners, processes=processes))


def take_in(ledger, partition, guid, *movements):
    with ledger.transaction("IMMEDIATE") as connection:
        connection.execute(
            "INSERT INTO intake (partition, guid, source, at, movements) VALUES (?, ?, ?, 0, ?)",
            (partition, guid, f"{partition} {guid}", json.dumps(movements)),
        )


def test_a_day_under_way_has_no_documents(ledger):
    record(ledger, BEGIN + HOUR, traffic(value=1000))
    assert make(ledger, BEGIN + 2 * HOUR) == {}


def test_one_document_tells_the_meters_of_all_instances(ledger):
    meters = (
        traffic(value=1000),
        traffic(value=70, scope="local"),
        traffic(value=300, family="tap", address="slaptap0"),
        traffic("slappart1", 5000),
        traffic("slappart2", 90),
        count("denied_packets", 3),
    )
    record(ledger, BEGIN + HOUR, *meters, processes=[process(7, 90_000_000)])
    record(ledger, BEGIN + DAY, *meters, processes=[])
    made = make(ledger, BEGIN + DAY + 1)
    assert list(made) == ["2026-11-20-node"]
    document = made["2026-11-20-node"]
    assert (document.start, document.stop) == (BEGIN, BEGIN + DAY - 1)
    assert amounts(document) == {
        ("SOFTINST-0", "in"): 1000,
        ("SOFTINST-0", "out"): 2,
        ("SOFTINST-0", "local"): 70,
        ("SOFTINST-0", "tap"): 600,
        ("SOFTINST-0", "cpu"): Decimal("1.5"),
        ("SOFTINST-1", "in"): 5000,
        ("SOFTINST-1", "out"): 10,
        (COMPUTER, "in"): 90,
        (COMPUTER, "out"): Decimal("0.18"),
    }
    assert {one.price for one in document.movements if one.resource == "out"} == {Decimal("0.5")}
    assert make(ledger, BEGIN + DAY + 2) == {}


def test_units_lose_nothing(ledger):
    record(ledger, BEGIN, traffic(value=123_456_789_012_345_670))
    record(ledger, BEGIN + DAY)
    tariff = Tariff({"network_in": Rate("in", 2**40)})
    found = amounts(make(ledger, BEGIN + DAY, tariff)["2026-11-20-node"])[("SOFTINST-0", "in")]
    assert round(found * 2**40) == 123_456_789_012_345_670


def test_levels_are_told_as_bytes_times_hours(ledger):
    for step in range(24 * 12):  # every five minutes
        size = 100 if step < 12 * 6 else 400
        record(ledger, BEGIN + step * 300, gauge("memory_bytes", size), gauge("disk_bytes", 7))
    record(ledger, BEGIN + DAY, gauge("memory_bytes", 1), gauge("disk_bytes", 7))
    found = amounts(make(ledger, BEGIN + DAY)["2026-11-20-node"])
    assert found[("SOFTINST-0", "memory")] == 6 * 100 + 18 * 400
    assert found[("SOFTINST-0", "disk")] == 24 * 7
    # the second day begins with what the first has left
    for step in range(12):
        record(ledger, BEGIN + DAY + (step + 1) * 300, gauge("disk_bytes", 7 if step < 6 else 9))
    record(ledger, BEGIN + 2 * DAY)
    found = amounts(make(ledger, BEGIN + 2 * DAY)["2026-11-21-node"])
    assert found[("SOFTINST-0", "disk")] == round(Decimal(7 * 7 + 6 * 9) / 12, 12)


def test_nothing_is_told_of_what_no_resource_is_named_for(ledger):
    record(ledger, BEGIN, traffic(value=1000))
    record(ledger, BEGIN + DAY, traffic(value=1000))
    assert make(ledger, BEGIN + DAY, Tariff()) == {}
    record(ledger, BEGIN + 2 * DAY, traffic(value=1500))
    record(ledger, BEGIN + 3 * DAY, traffic(value=1500))
    made = make(ledger, BEGIN + 3 * DAY)  # named since: of the days that ended since
    assert {reference: amounts(one)[("SOFTINST-0", "in")] for reference, one in made.items()} == {
        "2026-11-22-node": 500
    }


def test_who_is_gone_has_a_document_of_its_own(ledger):
    record(ledger, BEGIN, traffic(value=1000), traffic("slappart1", 10))
    later = OWNERS | {"slappart0": "SOFTINST-9"}
    record(ledger, BEGIN + HOUR, traffic(value=1500), traffic("slappart1", 30), owners=later)
    record(ledger, BEGIN + DAY, owners=later)
    made = make(ledger, BEGIN + DAY)
    assert amounts(made["2026-11-20-slappart0-last"])[("SOFTINST-0", "in")] == 1000
    assert {key[0] for key in amounts(made["2026-11-20-slappart0-last"])} == {"SOFTINST-0"}
    assert amounts(made["2026-11-20-node"])[("SOFTINST-9", "in")] == 500
    assert {key[0] for key in amounts(made["2026-11-20-node"])} == {"SOFTINST-1", "SOFTINST-9"}


def test_one_that_the_master_does_not_know_spoils_no_document_of_others(ledger):
    """It is in one of its own, and the same is told in all."""
    record(ledger, BEGIN, traffic(value=0), traffic("slappart1", value=0))
    record(ledger, BEGIN + HOUR, traffic(value=1000), traffic("slappart1", value=300))
    record(ledger, BEGIN + DAY)
    made = make(ledger, BEGIN + DAY, apart=frozenset(("slappart1",)))
    assert set(made) == {"2026-11-20-node", "2026-11-20-slappart1-last"}
    assert {one.reference for one in made["2026-11-20-node"].movements} == {"SOFTINST-0"}
    assert {one.reference for one in made["2026-11-20-slappart1-last"].movements} == {"SOFTINST-1"}


def last(ledger, partition, guid, now):
    """Make the last documents of an instance; their references."""
    with ledger.transaction() as connection:
        drafts = documents.gather_last(connection, partition, guid, TARIFF, now)
    if drafts is None:
        return []
    with ledger.transaction("IMMEDIATE") as connection:
        return documents.store(connection, drafts, TARIFF, COMPUTER, now)


def test_the_last_usage_is_told_before_a_destroy_and_not_again(ledger):
    record(ledger, BEGIN, traffic(value=1000))
    take_in(ledger, "slappart0", "SOFTINST-0", ["users", "", "3"])
    take_in(ledger, "slappart1", "SOFTINST-1", ["users", "", "4"])
    now = BEGIN + HOUR
    made = last(ledger, "slappart0", "SOFTINST-0", now)
    assert made == ["2026-11-20-slappart0-last", "2026-11-20-slappart0"]
    assert amounts(text(ledger, made[0]))[("SOFTINST-0", "in")] == 1000
    assert text(ledger, made[0]).stop == now
    assert amounts(text(ledger, made[1])) == {("SOFTINST-0", "users"): 3}
    assert last(ledger, "slappart0", "SOFTINST-0", now) == []
    # what comes up to the very end, and afterwards, names nobody whom the master does not know any more
    record(ledger, BEGIN + 2 * HOUR, traffic(value=1040))
    record(ledger, BEGIN + DAY, owners=OWNERS | {"slappart0": None})
    made = make(ledger, BEGIN + DAY)
    assert list(made) == ["2026-11-20-node", "2026-11-20-slappart1"]
    assert amounts(made["2026-11-20-node"])[(COMPUTER, "in")] == 40
    assert not any(who == "SOFTINST-0" for who, _ in amounts(made["2026-11-20-node"]))
    assert amounts(made["2026-11-20-slappart1"]) == {("SOFTINST-1", "users"): 4}


def test_levels_are_told_once_by_last_documents_too(ledger):
    """In the middle of a span, and the rest of it by the day's document: together what one document would tell."""
    for step in range(3):
        record(
            ledger,
            BEGIN + step * 100,
            gauge("memory_bytes", 3600),
            gauge("memory_bytes", 36, partition="slappart1"),
        )
    (reference,) = last(ledger, "slappart0", "SOFTINST-0", BEGIN + 200)
    told = amounts(text(ledger, reference))[("SOFTINST-0", "memory")]
    assert told == 200
    for step in range(3, 6):
        record(
            ledger,
            BEGIN + step * 100,
            gauge("memory_bytes", 3600),
            gauge("memory_bytes", 36, partition="slappart1"),
        )
    record(ledger, BEGIN + DAY, owners=OWNERS | {"slappart0": None})
    found = amounts(make(ledger, BEGIN + DAY)["2026-11-20-node"])
    assert found[(COMPUTER, "memory")] == 600 - 200
    assert found[("SOFTINST-1", "memory")] == 6


def of_a_day(ledger, passes, partitions=10):
    """A day under way of so many passes, in each of which every partition used something."""
    names = {f"slappart{number}": f"SOFTINST-{number}" for number in range(partitions)}
    for number in range(passes):
        meters = [traffic(name, 100 * number) for name in names]
        levels = [gauge("memory_bytes", 1000 + number, partition=name) for name in names]
        record(ledger, BEGIN + 60.0 * number, *meters, *levels, owners=names)


def test_a_last_document_does_not_add_up_the_day_of_all(tmp_path):
    """It is made while a destroy waits; so its cost must not grow with what the others used."""
    steps = []
    for partitions in (2, 40):
        with Ledger(tmp_path / f"{partitions}.sqlite") as ledger:
            of_a_day(ledger, 200, partitions)
            with ledger.transaction() as connection:
                steps.append([])
                connection.set_progress_handler(lambda: steps[-1].append(1), 100)
                now = BEGIN + 60 * 200
                drafts = documents.gather_last(connection, "slappart1", "SOFTINST-1", TARIFF, now)
                connection.set_progress_handler(None, 0)
            found = {one.resource: one.quantity for one in drafts.drafts[0].movements}
            assert found["in"] == 100 * 199
            assert found["memory"] > 0
    few, many = map(len, steps)
    assert many < 3 * few, (few, many)


def test_amounts_of_some_accounts_are_the_sums_of_their_samples(ledger):
    of_a_day(ledger, 150)
    dice = random.Random(6)  # noqa: S311 - dice of a test
    with ledger.transaction() as connection:
        assert connection.execute("SELECT count(*) FROM balanced").fetchone()[0] > 1
        every = [number for (number,) in connection.execute("SELECT id FROM account")]
        for _ in range(60):
            first, last = sorted(dice.choices(range(1, 151), k=2))
            some = dice.sample(every, dice.randint(1, 8))
            sums = dict(
                connection.execute(
                    "SELECT account, sum(bytes_in) FROM sample WHERE seq BETWEEN ? AND ? GROUP BY account",
                    (first, last),
                ).fetchall()
            )
            for among, asked in ((some, some), (None, every)):
                found = {
                    key: value[0] for key, value in balances.used_in(connection, first, last, among).items()
                }
                assert {key: value for key, value in found.items() if value} == {
                    key: value for key, value in sums.items() if key in asked and value
                }


def test_what_a_partition_says_is_added_up_and_told_once(ledger):
    record(ledger, BEGIN)
    take_in(ledger, "slappart0", "SOFTINST-0", ["users", "of today", "3"], ["mails", "", "0.000000001"])
    take_in(ledger, "slappart0", "SOFTINST-0", ["users", "of today", "4.5"])
    record(ledger, BEGIN + DAY)
    made = make(ledger, BEGIN + DAY)
    assert list(made) == ["2026-11-20-slappart0"]
    assert amounts(made["2026-11-20-slappart0"]) == {
        ("SOFTINST-0", "users"): Decimal("7.5"),
        ("SOFTINST-0", "mails"): Decimal("1e-9"),
    }
    record(ledger, BEGIN + 2 * DAY)
    assert make(ledger, BEGIN + 2 * DAY) == {}


def test_what_the_operator_took_away_waits(ledger):
    record(ledger, BEGIN)
    take_in(ledger, "slappart0", "SOFTINST-0", ["users", "", "3"])
    record(ledger, BEGIN + DAY)
    assert make(ledger, BEGIN + DAY, Tariff({}, frozenset({"mails"}))) == {}
    record(ledger, BEGIN + 2 * DAY)
    assert list(make(ledger, BEGIN + 2 * DAY)) == ["2026-11-21-slappart0"]


def incident(ledger, partition, kind, begun, seen, ended=None):
    times = [None if one is None else round(one * 1e6) for one in (begun, seen, ended)]
    with ledger.transaction("IMMEDIATE") as connection:
        connection.execute(
            "INSERT INTO incident (partition, guid, kind, name, begun, seen, ended, reason)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, '')",
            (partition, OWNERS[partition], kind, f"{begun}", *times),
        )


def test_incidents_are_told_by_their_seconds(ledger):
    record(ledger, BEGIN)
    incident(ledger, "slappart0", "service", BEGIN + 10, BEGIN + 70, BEGIN + 70)
    incident(ledger, "slappart0", "service", BEGIN + DAY - 100, BEGIN + DAY + 50)  # over midnight
    incident(ledger, "slappart1", "promise", BEGIN, BEGIN + 9)  # no resource is named for it
    record(ledger, BEGIN + DAY + 60)
    assert amounts(make(ledger, BEGIN + DAY + 60)["2026-11-20-node"]) == {("SOFTINST-0", "outage"): 60 + 99}
    record(ledger, BEGIN + 2 * DAY)
    assert amounts(make(ledger, BEGIN + 2 * DAY)["2026-11-21-node"]) == {("SOFTINST-0", "outage"): 51}


def test_a_clock_that_was_ahead_makes_no_document_of_the_future(ledger):
    record(ledger, BEGIN, traffic(value=10))
    record(ledger, BEGIN + 400 * DAY, traffic(value=30))
    record(ledger, BEGIN + HOUR, traffic(value=60))
    record(ledger, BEGIN + DAY, traffic(value=60))
    made = make(ledger, BEGIN + DAY)
    assert {reference: amounts(one)[("SOFTINST-0", "in")] for reference, one in made.items()} == {
        "2026-11-20-node": 10,
        "2027-12-25-node": 20,
        "2026-11-20-node-2": 30,
    }
    assert made["2027-12-25-node"].stop == BEGIN + DAY


def test_days_without_a_pass_belong_to_the_first_pass_after_them(ledger):
    record(ledger, BEGIN, traffic(value=10))
    record(ledger, BEGIN + 3 * DAY, traffic(value=30))
    record(ledger, BEGIN + 4 * DAY, traffic(value=30))
    made = make(ledger, BEGIN + 4 * DAY)
    assert {reference: amounts(one)[("SOFTINST-0", "in")] for reference, one in made.items()} == {
        "2026-11-20-node": 10,
        "2026-11-23-node": 20,
    }


def test_one_that_the_master_would_reject_is_kept_as_refused(ledger):
    record(ledger, BEGIN, traffic(value=10))
    record(ledger, BEGIN + DAY)
    with ledger.transaction() as connection:
        (period,) = documents.due(connection)
        drafts = documents.gather(connection, period, TARIFF, COMPUTER, last=True)
    with ledger.transaction("IMMEDIATE") as connection:
        documents.store(connection, drafts, Tariff(), COMPUTER, BEGIN + DAY)
        (entry,) = outbox.entries(connection, *outbox.STATES)
    assert entry.state == "refused"
    assert "'in' is not a configured one" in entry.reason


STEP = st.tuples(
    st.sampled_from(["pass", "make", "own", "last"]),
    st.integers(1, 40),
    st.sampled_from([60.0, HOUR, 6 * HOUR, DAY, -30.0, -3 * HOUR]),
)


class World:
    """A partition whose one counter grows, whose owner changes, and whose documents are made now and then."""

    def __init__(self, ledger):
        self.ledger, self.now, self.value, self.guid = ledger, BEGIN, 0, 0
        self.gone = set()

    def step(self, what, more, ahead):
        self.now += ahead
        if what == "make":
            make(self.ledger, self.now)
        elif what == "last":
            last(self.ledger, "slappart0", f"SOFTINST-{self.guid}", self.now)
            self.gone.add(f"SOFTINST-{self.guid}")
        else:
            self.guid = more % 4 if what == "own" else self.guid
            self.value += more
            owners = {"slappart0": f"SOFTINST-{self.guid}"}
            record(self.ledger, self.now, traffic(value=self.value), owners=owners)

    def told(self):
        """Bytes that all documents tell, by guid."""
        found = {}
        with self.ledger.transaction() as connection:
            whole = outbox.entries(connection, *outbox.STATES)
        for entry in whole:
            for (who, resource), quantity in amounts(text(self.ledger, entry.reference)).items():
                if resource == "in":
                    found[who] = found.get(who, 0) + quantity
        return found

    def used(self):
        entries = self.ledger.usage(None, None).partitions
        sums = {entry.instance_guid: sum(one.bytes_in for one in entry.addresses) for entry in entries}
        return {guid: amount for guid, amount in sums.items() if amount}


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=30))
def test_each_byte_is_in_one_document(tmp_path_factory, steps):
    """Whatever passes, clocks, owners, documents and last documents do: at the end the documents say what the totals say."""
    with Ledger(tmp_path_factory.mktemp("ledger") / "ledger.sqlite") as ledger:
        world = World(ledger)
        for step in (*steps, ("pass", 1, DAY), ("pass", 0, DAY), ("make", 1, 0.0)):
            world.step(*step)
        told, used = world.told(), world.used()
        assert sum(told.values()) == sum(used.values()) == world.value
        for guid, amount in used.items():
            assert told.get(guid, 0) == amount or (guid in world.gone and told.get(guid, 0) < amount)


def test_documents_that_went_out_stay_so(ledger):
    record(ledger, BEGIN, traffic(value=10))
    record(ledger, BEGIN + DAY)
    (reference,) = make(ledger, BEGIN + DAY)
    now = BEGIN + DAY
    with ledger.transaction("IMMEDIATE") as connection:
        (entry,) = outbox.entries(connection, "waiting")
        outbox.begin(connection, entry, now)
        assert outbox.entries(connection, "waiting") == []
        (cut_off,) = outbox.find_cut_off(connection, now)
        assert cut_off.reference == reference
        (held,) = outbox.entries(connection, "ambiguous")
        assert (held.tries, held.reason) == (1, "partitiond ended while it was being sent")
        outbox.resend(connection, reference, now)
        (entry,) = outbox.entries(connection, "waiting")
        outbox.begin(connection, entry, now)
        outbox.end(connection, entry, "accepted", now)
        assert outbox.count(connection) == {"accepted": 1}
        for change in (outbox.resend, outbox.drop):
            with pytest.raises(AccountingError, match="it is accepted; this can be done with"):
                change(connection, reference, now)
            with pytest.raises(AccountingError, match="no such document"):
                change(connection, "nothing", now)
        outbox.forget_old(connection, now + 399 * DAY)
        assert outbox.content(connection, reference)
        outbox.forget_old(connection, now + 401 * DAY)
        assert outbox.content(connection, reference) == ""
        assert outbox.content(connection, "nothing") is None


@pytest.mark.parametrize("same_day", [True, False])
def test_drafts_of_one_ledger_are_not_written_into_another(tmp_path, same_day):
    """The lane of the meters finds damage while that of the reports has drafts in its hands: all numbers are others then."""
    with Ledger(tmp_path / "l", clock=lambda: BEGIN + DAY) as ledger:
        for number in range(3):
            record(ledger, BEGIN + number * HOUR, traffic(value=1000 * number))
        record(ledger, BEGIN + DAY, traffic(value=5000))
        with ledger.transaction() as connection:
            (period,) = documents.due(connection)
            drafts = documents.gather(connection, period, TARIFF, COMPUTER, last=True)
            last = documents.gather_last(connection, "slappart0", "SOFTINST-0", TARIFF, BEGIN + DAY)
        ledger.recover("found by a test")
        for number in range(3 if same_day else 0):
            record(ledger, BEGIN + number * HOUR, traffic(value=6000 + number))
        record(ledger, BEGIN + DAY + HOUR, traffic(value=7000))
        for one in (drafts, last):
            with pytest.raises(AccountingError) as caught, ledger.transaction("IMMEDIATE") as connection:
                documents.store(connection, one, TARIFF, COMPUTER, BEGIN + DAY)
            assert (caught.value.code, caught.value.retryable) == ("accounting.ledger_changed", True)
        with ledger.transaction() as connection:
            assert outbox.count(connection) == {}
            assert {seq for (seq,) in connection.execute("SELECT reported_seq FROM owner")} == {0}
        made = make(ledger, BEGIN + DAY + HOUR)
        assert list(made) == (["2026-11-20-node"] if same_day else [])


def test_a_period_has_its_documents_once(ledger):
    record(ledger, BEGIN, traffic(value=1000))
    record(ledger, BEGIN + DAY, traffic(value=5000))
    with ledger.transaction() as connection:
        (period,) = documents.due(connection)
        drafts = documents.gather(connection, period, TARIFF, COMPUTER, last=True)
    with ledger.transaction("IMMEDIATE") as connection:
        assert documents.store(connection, drafts, TARIFF, COMPUTER, BEGIN + DAY) == ["2026-11-20-node"]
        with pytest.raises(AccountingError, match="not in use any more"):
            documents.store(connection, drafts, TARIFF, COMPUTER, BEGIN + DAY)


def test_what_is_done_with_is_forgotten_after_400_days(ledger):
    """Of files their movements, of incidents all; nothing that waits to be told, however old."""
    record(ledger, BEGIN, traffic(value=1))
    for number, guid in enumerate(("SOFTINST-0", "SOFTINST-1", "SOFTINST-9")):
        take_in(ledger, f"slappart{number}", guid, ["users", "", str(number + 1)])
    with ledger.transaction("IMMEDIATE") as connection:
        connection.execute("UPDATE intake SET at = ?, removed = 1", (int(BEGIN * 1e6),))
    for name, ended in (("old", HOUR), ("late", 401 * DAY), ("open", None)):
        look = incidents.Look("SOFTINST-0", alive=True, troubles={name: "FATAL"})
        ledger.observe_incidents(incidents.SERVICE, BEGIN + 60, {"slappart0": look}, whole=False)
        if ended is not None:
            with ledger.transaction("IMMEDIATE") as connection:
                connection.execute(
                    "UPDATE incident SET ended = ? WHERE ended IS NULL", (int((BEGIN + ended) * 1e6),)
                )
    record(ledger, BEGIN + DAY, traffic(value=2))
    far = BEGIN + 402 * DAY

    def left():
        with ledger.transaction("IMMEDIATE") as connection:
            outbox.forget_old(connection, far)
            names = [name for (name,) in connection.execute("SELECT name FROM incident ORDER BY id")]
            movements = [
                text != "[]" for (text,) in connection.execute("SELECT movements FROM intake ORDER BY id")
            ]
        return names, movements

    assert left() == (["old", "late", "open"], [True] * 3)  # the day has no documents yet
    make(ledger, BEGIN + DAY)
    with ledger.transaction("IMMEDIATE") as connection:
        told = [one for one in outbox.entries(connection, "waiting") if one.partition == "slappart0"]
        for one in told:
            outbox.end(connection, one, "accepted", BEGIN + DAY)
    assert left() == (["late", "open"], [False, True, True])
    with ledger.transaction() as connection:
        plan = connection.execute(
            "EXPLAIN QUERY PLAN SELECT * FROM incident WHERE ended >= 1 ORDER BY ended DESC"
        )
        assert [row[-1] for row in plan] == ["SEARCH incident USING INDEX incident_ended (ended>?)"]
    make(ledger, far)
    assert left() == (["late", "open"], [False, True, True])
