"""The strict master of the tests judges as the facts about the real one say, and misbehaves as it is told."""

import json
import subprocess
from pathlib import Path

import pytest
import requests
import strict_master
from strict_master import read_date

from slap_client.client import SlapClient
from slap_client.errors import SlapError

NOW = 1795400000.0  # 2026-11-23
# slap_protocol.md 7.3
EXAMPLE = """<?xml version="1.0" encoding="utf-8"?>
<journal><transaction type="Sale Packing List"><title>Network usage of COMP-1</title>
<start_date>2026-11-21 00:00:00 UTC</start_date><stop_date>2026-11-21 23:59:59 UTC</stop_date>
<reference>2026-11-21-network</reference><currency></currency><payment_mode></payment_mode><category></category>
<arrow type="Destination"/>
<movement><resource>network_out</resource><title>Bytes sent 2001:db8:1::2</title><reference>SOFTINST-12</reference>
<quantity>42.5</quantity><price>0.0</price><VAT></VAT><category></category></movement>
</transaction></journal>"""
# what slapgrid 1.26 posts
SLAPGRID = (
    '<?xml version="1.0"?><journal><transaction type="Sale Packing List"><title>Resource consumptions</title>'
    "<start_date></start_date><stop_date>2026-11-22 at 15:53:05</stop_date><reference>COMP-1</reference>"
    "<currency></currency><payment_mode></payment_mode><category></category>"
    '<arrow type="Administration"><source></source><destination></destination></arrow>'
    "<movement><resource>network_out</resource><title>t</title><reference>slappart0</reference>"
    "<quantity>1.0</quantity><price>0.0</price><VAT>None</VAT><category>None</category></movement>"
    "</transaction></journal>"
)


@pytest.fixture(scope="module")
def standing():
    """One process with the schemas for all tests of this file."""
    with strict_master.running(guids=["SOFTINST-12"], resources=["network_out"]) as made:
        yield made


@pytest.fixture
def master(standing):
    with standing._lock:
        standing._arrivals.clear()
        standing._script.clear()
    standing.clock = lambda: NOW
    standing.default, standing.outage, standing.slow_seconds = "ok", None, 0.3
    standing.books = strict_master.Books("COMP-1", ["SOFTINST-12"], ["network_out"])
    return standing


@pytest.fixture
def client(master):
    with SlapClient(master.url, "COMP-1", timeout=1) as slap:
        yield slap


def test_the_example_is_accepted(master, client):
    client.use_computer(EXAMPLE)
    (arrival,) = master.accepted
    assert (arrival.reference, arrival.version) == ("2026-11-21-network", 1)
    assert (arrival.start, arrival.stop) == (1795219200.0, 1795305599.0)
    movement = strict_master.Taken("network_out", "SOFTINST-12", 42.5, "Bytes sent 2001:db8:1::2")
    assert arrival.movements == (movement,)
    assert master.violations == []


def test_what_slapgrid_posts_is_answered_well_and_rejected(master, client):
    client.use_computer(SLAPGRID)
    assert master.accepted == []
    assert [violation for _, violation in master.violations] == [
        "start_date '' is no date",
        "stop_date '2026-11-22 at 15:53:05' is no date",
        "reference 'slappart0' is of 0 items",
    ]


@pytest.mark.parametrize(
    ("old", "new", "violation"),
    [
        ("SOFTINST-12", "SOFTINST-13", "reference 'SOFTINST-13' is of 0 items"),
        ("<reference>SOFTINST-12</reference>", "", "a movement has no reference"),
        ("<resource>network_out", "<resource>network_in", "resource 'network_in' is of 0 services"),
        ("<resource>network_out", "<resource>", "a movement has no resource"),
        (">42.5<", ">0<", "quantity 0.0"),
        (">42.5<", ">-0.0e3<", "quantity -0.0"),
        (">42.5<", ">INF<", "quantity inf"),
        ("2026-11-21 23:59:59 UTC", "2026-11-23 23:59:59 UTC", "it stops in the future"),
        ("2026-11-21 23:59:59 UTC", "2026-11-20 23:59:59 UTC", "it starts after it stops"),
        ("2026-11-21-network", "", "it has no reference"),
        ("</journal>", EXAMPLE[EXAMPLE.index("<trans") :], "only the first of 2 transactions is read"),
    ],
)
def test_each_rule_rejects_the_whole(master, client, old, new, violation):
    client.use_computer(EXAMPLE.replace(old, new))
    assert [arrival.state for arrival in master.kept] == ["rejected"]
    assert [text for _, text in master.violations] == [violation]


def test_items_and_services_are_found_exactly_once(master, client):
    master.books.guids.append("SOFTINST-12")
    master.books.resources.append("network_out")
    client.use_computer(EXAMPLE)
    expected = ["resource 'network_out' is of 2 services", "reference 'SOFTINST-12' is of 2 items"]
    assert [text for _, text in master.violations] == expected


def test_an_open_order_is_needed(master, client):
    master.books.without_open_order = frozenset({"SOFTINST-12"})
    client.use_computer(EXAMPLE)
    assert [text for _, text in master.violations] == ["'SOFTINST-12' has no open order"]


def test_the_computer_is_an_item(master, client):
    client.use_computer(EXAMPLE.replace("SOFTINST-12", "COMP-1"))
    assert len(master.accepted) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<VAT></VAT>", ""),
        ("<price>0.0</price>", ""),
        ('<arrow type="Destination"/>', ""),
        (' type="Destination"', ""),
        ("<start_date>2026-11-21 00:00:00 UTC</start_date>", ""),
        ("<quantity>42.5</quantity>", "<quantity>much</quantity>"),
        ("</movement>", "<extra/></movement>"),
        (EXAMPLE[EXAMPLE.index("<movement>") : EXAMPLE.index("</transaction>")], ""),
        (
            "<currency></currency><payment_mode></payment_mode>",
            "<payment_mode></payment_mode><currency></currency>",
        ),
        ("</journal>", ""),
    ],
)
def test_what_the_schema_refuses_is_answered_400(master, client, old, new):
    assert old in EXAMPLE
    with pytest.raises(SlapError) as caught:
        client.use_computer(EXAMPLE.replace(old, new))
    assert caught.value.code == "slap.refused"
    assert [arrival.state for arrival in master.arrivals] == ["invalid"]
    assert master.kept == []


def test_title_and_category_are_optional(master, client):
    text = EXAMPLE.replace("<category></category>", "").replace("<title>Network usage of COMP-1</title>", "")
    client.use_computer(text)
    assert len(master.accepted) == 1


def test_duplicates_are_kept_again(master, client):
    for _ in range(3):
        client.use_computer(EXAMPLE)
    assert [arrival.version for arrival in master.accepted] == [1, 2, 3]
    assert master.duplicates == {"2026-11-21-network": 3}
    assert master.total("network_out", "SOFTINST-12") == 127.5


@pytest.mark.parametrize(
    ("behaviour", "code", "kept"),
    [
        ("400", "slap.refused", 0),
        ("500", None, 0),
        ("502", None, 0),
        ("503", None, 0),
        ("reset_before", None, 0),
        ("reset_after_commit", None, 1),
        ("timeout_after_commit", None, 1),
    ],
)
def test_it_misbehaves_as_told_and_once(master, client, behaviour, code, kept):
    master.script(behaviour)
    with pytest.raises(SlapError) as caught:
        client.use_computer(EXAMPLE)
    assert code in (None, caught.value.code)
    assert [arrival.behaviour for arrival in master.arrivals] == [behaviour]
    assert len(master.kept) == kept
    client.use_computer(EXAMPLE)
    assert len(master.kept) == kept + 1


def test_a_reset_is_a_reset(master):
    master.script("reset_before")
    with pytest.raises(requests.ConnectionError, match="reset by peer"):
        requests.post(master.url + "useComputer", {"computer_id": "COMP-1", "use_string": EXAMPLE}, timeout=5)


def test_slow_is_well_all_the_same(master, client):
    master.slow_seconds = 0.1
    master.script("slow")
    client.use_computer(EXAMPLE)
    assert len(master.accepted) == 1


def test_an_outage_meets_all_endpoints(master, client):
    master.outage = 503
    with pytest.raises(SlapError):
        client.use_computer(EXAMPLE)
    with pytest.raises(SlapError):
        client.computer()
    assert master.arrivals == []


def test_words_that_it_does_not_know_are_refused(master):
    with pytest.raises(ValueError, match="fine"):
        master.script("fine")


def test_another_computer_is_not_there(master):
    with SlapClient(master.url, "COMP-2", timeout=1) as other, pytest.raises(SlapError):
        other.use_computer(EXAMPLE)
    assert master.arrivals == []


def test_the_computer_has_the_partitions_it_was_given(master, client):
    master.partitions = [("slappart0", "SOFTINST-12"), ("slappart1", None), ("slappart2", "A & <B>")]
    computer = client.computer()
    assert computer.computer_id == "COMP-1"
    assert [(entry.partition_id, entry.instance_guid, entry.free) for entry in computer.partitions] == [
        ("slappart0", "SOFTINST-12", False),
        ("slappart1", "", True),
        ("slappart2", "A & <B>", False),
    ]


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-21 00:00:00 UTC", 1795219200.0),
        ("2026/11/21 01:00:00 +0100", 1795219200.0),
        ("2026-11-21T00:00:00.5Z", 1795219200.5),
        ("2026-11-21 00:00:00", None),
        ("2026-11-21 at 00:00:00", None),
        ("2026-02-30 00:00:00 UTC", None),
        ("2026-11-21 24:00:00 UTC", None),
        ("2026-11-21", None),
        ("", None),
    ],
)
def test_dates(text, moment):
    assert read_date(text) == moment


def test_it_runs_as_a_program():
    command = [strict_master.INTERPRETER, strict_master.__file__, "--guid", "SOFTINST-12"]
    with subprocess.Popen(
        [*command, "--resource", "network_out", "--script", "503"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path("/"),
    ) as process:
        url = process.stdout.readline().strip()
        fields = {"computer_id": "COMP-1", "use_string": EXAMPLE}
        answers = [requests.post(f"{url}useComputer", fields, timeout=5).status_code for _ in range(2)]
        lines = [json.loads(process.stdout.readline()) for _ in answers]
        process.stdin.close()
        assert process.wait(10) == 0
    assert answers == [503, 200]
    assert [line["state"] for line in lines] == ["lost", "accepted"]
