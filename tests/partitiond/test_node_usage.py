"""``usage``: calendar periods, CSV, words that are wrong, and the same words at ``/1/usage``."""

import csv
import io
import time
from datetime import UTC, datetime, timedelta

import pytest
from json_schemas import parsed, validate

from accounting.ledger import Ledger
from accounting.model import GaugeReading, Pass, TrafficReading
from partitiond import usage_query, usage_text
from partitiond.errors import WrongUseError
from partitiond.metering import ledger_path

NOON = datetime(2028, 3, 1, 12, tzinfo=UTC)
ADDRESS = "2001:db8::1"


def record(ledger, moment, octets, memory=0):
    reading = TrafficReading(
        "slappart0", ADDRESS, "ipv6", "remote", "boot/1", octets, 2 * octets, octets, octets
    )
    gauges = (GaugeReading("slappart0", "memory_bytes", memory),)
    owners = {"slappart0": "SOFTINST-1", "slappart1": None}
    ledger.record(Pass(moment.timestamp(), owners, (reading,), gauges=gauges))


@pytest.fixture
def ledger(tmp_path):
    """Levels at noon of four days around a leap day."""
    found = Ledger(tmp_path / "ledger.sqlite", clock=NOON.timestamp)
    for back, octets in ((4, 0), (2, 100), (1, 1100), (0, 11100)):
        record(found, NOON - timedelta(days=back), octets, memory=octets)
    yield found
    found.close()


def ask(ledger, **words):
    query = usage_query.parse(words, NOON.timestamp())
    value = usage_query.answer(ledger, query)
    return validate({"schema": f"partitiond/{'usage-periods' if query.period else 'usage'}/1", **value})


def received(value):
    return [
        sum(one["bytes_in"] for item in span["partitions"] for one in item["addresses"])
        for span in value["periods"]
    ]


def test_days_around_a_leap_day(ledger):
    value = ask(ledger, period="day", last="3")
    assert received(value) == [100, 1000, 10000]
    assert value["periods"][0]["from"] == "2028-02-28T00:00:00.000000Z"
    assert value["periods"][-1]["to"] == "2028-03-02T00:00:00.000000Z"
    assert len(ask(ledger, period="day")["periods"]) == 7


def test_other_periods_add_up(ledger):
    assert sum(received(ask(ledger, period="month"))) == 11100
    assert received(ask(ledger, period="month", last="2")) == [1100, 10000]
    assert received(ask(ledger, period="week", last="1")) == [11100], "from Monday, the 28th"
    assert received(ask(ledger, **{"from": "2028-02", "to": "2028-03", "period": "month"})) == [1100]
    assert received(ask(ledger, to="today", period="day", last="2")) == [100, 1000]


def test_named_times(ledger):
    def total(**words):
        value = ask(ledger, **words)
        return sum(one["bytes_in"] for item in value["partitions"] for one in item["addresses"])

    assert total(**{"from": "today"}) == 10000
    assert total(**{"from": "yesterday", "to": "today"}) == 1000
    assert total(**{"from": "2028-02", "to": "2028-02-29"}) == 100
    assert total(**{"from": "2028-02-29T12:00:00Z"}) == 10000
    assert total(partition="slappart1") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"period": "year"}, "'year' is no period"),
        ({"period": "day", "last": "0"}, "last is '0'"),
        ({"period": "day", "last": "-1"}, "last is '-1'"),
        ({"period": "day", "last": "1e3"}, "last is '1e3'"),
        ({"period": "day", "last": "1001"}, "last is '1001'"),
        ({"period": "day", "last": "٣"}, "last is '٣'"),
        ({"last": "3"}, "last goes with a period"),
        ({"period": "day", "last": "3", "from": "2026"}, "'2026' is no time"),
        ({"period": "day", "last": "3", "from": "today"}, "exclude each other"),
        ({"period": "day", "from": "1999-01-01"}, "more than 1000 periods"),
        ({"period": "month", "last": "1000", "to": "0050-01-01"}, "the calendar ends"),
        ({"from": "2026-13"}, "'2026-13' is no time"),
        ({"from": "0001-01-01T00:00:00+23:00"}, "is no time"),
        ({"from": "today", "to": "yesterday"}, "ends (yesterday) before it starts (today)"),
        ({"until": "today"}, "'until' is unknown"),
    ],
)
def test_wrong_words_say_what_is_allowed(words, said):
    with pytest.raises(WrongUseError) as caught:
        usage_query.parse(words, NOON.timestamp())
    assert said in str(caught.value)
    assert caught.value.hint


def test_text_and_csv_say_the_same(ledger):
    value = ask(ledger, period="day", last="2")
    text = usage_text.usage(value)
    assert text.count("from 2028-0") == 2
    assert "1000" in text
    rows = list(csv.DictReader(io.StringIO(usage_text.table(value))))
    assert [(row["from"][:10], row["bytes_in"]) for row in rows if row["address"]] == [
        ("2028-02-29", "1000"),
        ("2028-03-01", "10000"),
    ]
    assert sum(int(row["bytes_out"] or 0) for row in rows) == 22000
    (own,) = [row for row in rows if row["partition"] == "slappart0" and row["memory_bytes"] == "11100"]
    assert (own["instance_guid"], own["address"]) == ("SOFTINST-1", "")


def test_the_verb(command, node_config):
    node = node_config(2, interface="lo")
    node.state.mkdir()
    with Ledger(ledger_path(node.state)) as ledger:
        now = datetime.fromtimestamp(time.time(), UTC)
        record(ledger, now - timedelta(seconds=2), 0)
        record(ledger, now - timedelta(seconds=1), 77)
    value = parsed(command("usage", "--period", "month", "--last", "2", "--json", "-c", node.path))
    assert sum(received(value)) == 77
    done = command("usage", "--period", "week", "--csv", "--partition", "slappart0", "-c", node.path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert {row["partition"] for row in rows} == {"slappart0"}
    assert sum(int(row["bytes_in"] or 0) for row in rows) == 77
    for wrong in (("--period", "fortnight"), ("--last", "2"), ("--csv", "--json")):
        done = command("usage", *wrong, "-c", node.path)
        assert done.returncode == 64
        assert "next: " in done.stderr
