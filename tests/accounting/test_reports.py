"""The report lane against the strict master: every day arrives, in order, and none twice but what the operator sent again."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sqlite3
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import strict_master
from accounting_world import a_pass, traffic

from accounting import AccountingError, Ledger, accepted, documents, outbox
from accounting.tariff import Rate, Tariff
from partitiond import cli, config, event_reader, report_verbs, reports, usage_intake
from partitiond.context import Context
from partitiond.node_plan import Outcome
from partitiond.state import InstanceState
from slap_client.client import SlapClient
from slap_client.errors import SlapError

sys.path.append(str(Path(__file__).resolve().parent.parent / "partitiond"))
from json_schemas import validate

HOUR, DAY = 3600.0, 86400.0
BEGIN = datetime(2026, 11, 10, 12, tzinfo=UTC).timestamp()
GUIDS = {"slappart0": "SOFTINST-0", "slappart1": "SOFTINST-1"}
TEXT = """\
[slapos]
computer_id = COMP-1
master_url = {url}
software_root = {top}/software
instance_root = {top}/instance

[slapformat]
interface_name = br0
partition_amount = 2

[partitiond]
state_dir = {top}/state
log_dir = {top}/log
run_dir = {top}/run
report_ambiguous = {ambiguous}

[accounting]
network_in = in per kB
network_out = out per kB
partition_resources = users
"""


class Days:
    """A node whose days go by: its ledger, its lane and its clock."""

    def __init__(self, master, top, ambiguous="hold"):
        self.master, self.file = master, top / "slapos.cfg"
        for name in ("state", "log", "run"):
            (top / name).mkdir(exist_ok=True)
        self.file.write_text(TEXT.format(url=master.url, top=top, ambiguous=ambiguous))
        self.now, self.sent, self.owners = BEGIN, 0, dict(GUIDS)
        self.context = Context.of(config.load(self.file))
        self.context.meters.clock = master.clock = lambda: self.now
        self.node = SimpleNamespace(partitions=())
        self.asked = 0

    def close(self):
        self.client.close()
        self.context.meters.close()

    @property
    def client(self):
        """The daemon's client with less patience."""
        settings = self.context.config
        held = getattr(self.context._local, "client", None)
        if held is None or held[0] is not settings:
            if held is not None:
                held[1].close()
            client = SlapClient(settings.master_url, settings.computer_id, timeout=3)
            self.context._local.client = held = (settings, client)
        return held[1]

    def use(self, more=1000):
        """One pass of the meters, after some traffic of the first partition."""
        self.sent += more
        self.context.meters.ledger().record(
            a_pass(self.now, traffic(value=self.sent), traffic("slappart1", 5), owners=self.owners)
        )

    def ask(self):
        self.asked += 1
        self.client.computer()

    def report(self, *, force=False):
        """One pass of the lane; the failures' codes, or that of the master's error."""
        assert self.client
        try:
            result = reports.run_pass(self.context, self.node, ask=self.ask, force=force)
        except SlapError as error:
            return [error.code]
        return [error.code for _, error in result.failures]

    def states(self):
        found = report_verbs.listing(self.context.config, everything=True)["documents"]
        return {one["reference"]: one["state"] for one in found}

    def change(self, action, *references):
        return report_verbs.change(self.context, action, references)

    def unreachable(self):
        """Let nobody listen where the master was."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        self.context.adopt(dataclasses.replace(self.context.config, master_url=url))

    def reachable(self):
        self.context.adopt(dataclasses.replace(self.context.config, master_url=self.master.url))

    def arrived(self):
        return [one.reference for one in self.master.kept]


@pytest.fixture
def master():
    with strict_master.running(guids=GUIDS.values(), resources=["in", "out", "users"]) as made:
        yield made


@pytest.fixture
def days(master, tmp_path):
    made = Days(master, tmp_path)
    yield made
    made.close()


def references(first, last):
    return [f"2026-11-{day}-node" for day in range(first, last + 1)]


def test_each_day_is_told_soon_after_it_has_ended(days):
    for _ in range(3):
        days.use()
        days.report()
        days.now += DAY
    days.use()
    assert days.report() == []
    assert days.arrived() == references(10, 12)
    assert days.master.violations == []
    asked = days.asked
    assert days.report() == []
    assert days.asked == asked  # nothing waits: nobody is bothered
    assert days.master.total("in", "SOFTINST-0") == 3.0


def test_seven_days_of_outage(days):
    """A day each: 503, nobody there, 500, 502, an answer that got lost, 503, nobody there; each tried several times."""
    outages = [503, "gone", 500, 502, "lost", 503, "gone"]
    days.use()
    for kind in outages:
        days.now += DAY
        days.use()
        days.master.outage = kind if isinstance(kind, int) else None
        if kind == "gone":
            days.unreachable()
        if kind == "lost":
            days.master.script("timeout_after_commit")
            assert days.report() == ["report.held"]  # the oldest of five, which did arrive
            assert days.states()["2026-11-10-node"] == "ambiguous"
            assert days.report() == ["report.paused"]
            days.master.outage = 503
        for _ in range(4):
            days.now += HOUR
            days.report()
        days.now -= 4 * HOUR
        days.reachable()
    assert days.states() == {"2026-11-10-node": "ambiguous"} | dict.fromkeys(references(11, 16), "waiting")
    days.master.outage = None
    days.now += 6 * HOUR
    assert days.report() == []
    assert days.arrived() == references(10, 16)
    # the operator looks at the master, and first decides wrongly
    days.change("resend", "2026-11-10-node")
    assert days.report() == []
    assert days.arrived() == [*references(10, 16), "2026-11-10-node"]
    assert days.master.duplicates == {"2026-11-10-node": 2}
    assert days.master.violations == []
    assert set(days.states().values()) == {"accepted"}
    assert days.master.total("in", "SOFTINST-0") == 7.0 + 1.0
    print("\nreports: 7 days of outage; all arrived in order, sent twice: 1, by the operator's word")


@pytest.mark.parametrize("how", ["reset_after_commit", "timeout_after_commit", "reset_before", "500", "502"])
def test_what_may_have_arrived_is_held(days, how):
    for _ in range(2):
        days.use()
        days.now += DAY
    days.use()
    days.master.script(how)
    assert days.report() == ["report.held"]
    assert days.states() == {"2026-11-10-node": "ambiguous", "2026-11-11-node": "waiting"}
    assert days.report() == ["report.paused"]
    assert days.report(force=True) == []  # the operator does not want to wait: with the next one
    assert days.states() == {"2026-11-10-node": "ambiguous", "2026-11-11-node": "accepted"}
    stored = how.endswith("after_commit")
    assert days.arrived() == [*(["2026-11-10-node"] if stored else []), "2026-11-11-node"]
    for _ in range(3):
        days.now += DAY
        days.report()
    assert days.states()["2026-11-10-node"] == "ambiguous"
    (case,) = [one for one in report_verbs.open_cases(days.context.config) if "decision" in one]
    assert case.startswith("1 usage document")
    days.change("drop" if stored else "resend", "2026-11-10-node")
    days.report()
    assert sorted(set(days.arrived())) == references(10, 11)
    assert days.master.duplicates == {}


@pytest.mark.parametrize("how", ["503", "outage", "gone"])
def test_what_certainly_did_not_arrive_is_sent_again(days, how):
    days.use()
    days.now += DAY
    days.use()
    if how == "503":
        days.master.script("503")
    elif how == "outage":
        days.master.outage = 500
    else:
        days.unreachable()
    assert days.report() in (["slap.unavailable"], ["slap.unreachable"])
    assert days.states() == {"2026-11-10-node": "waiting"}
    days.master.outage = None
    days.reachable()
    assert days.report() == []
    assert days.arrived() == ["2026-11-10-node"]


def test_one_that_is_refused_holds_up_no_other(days):
    for _ in range(3):
        days.use()
        days.now += DAY
    days.use()
    days.master.script("ok", "400")
    assert days.report() == ["report.refused"]
    assert days.states() == {
        "2026-11-10-node": "accepted",
        "2026-11-11-node": "refused",
        "2026-11-12-node": "accepted",
    }
    assert any(
        "1 usage documents were refused (" in one for one in report_verbs.open_cases(days.context.config)
    )
    days.change("resend", "2026-11-11-node")
    assert days.report() == []
    assert days.arrived() == ["2026-11-10-node", "2026-11-12-node", "2026-11-11-node"]


def test_one_that_we_refuse_ourselves_is_told_and_holds_up_no_other(days, monkeypatch):
    days.use()
    days.now += DAY
    days.use()
    with monkeypatch.context() as patch:
        patch.setattr(documents.rules, "problems", lambda *_, **__: ("movement 1: it is odd",))
        assert days.report() == ["report.refused"]
    events = event_reader.last(days.context.config.log_dir, 100)
    (event,) = [one for one in events if one["event"] == "report.refused"]
    assert event["resource"] == "report/2026-11-10-node"
    assert "it is odd" in event["message"]
    days.now += DAY
    days.use()
    assert days.report() == [], "told once"
    assert days.states() == {"2026-11-10-node": "refused", "2026-11-11-node": "accepted"}


def test_resend_in_the_configuration(master, tmp_path):
    days = Days(master, tmp_path, "resend")
    try:
        days.use()
        days.now += DAY
        days.use()
        master.script("timeout_after_commit")
        assert days.report() == ["report.held"]
        assert days.report() == ["report.paused"]
        days.now += HOUR
        assert days.report() == []
        assert master.duplicates == {"2026-11-10-node": 2}
    finally:
        days.close()


@pytest.mark.parametrize("how", ["500", "503"])
def test_one_that_the_master_never_takes_holds_up_no_other_for_ever(master, tmp_path, how):
    """Also where the operator wants sent again what may have arrived."""
    days = Days(master, tmp_path, "resend")
    try:
        for _ in range(3):
            days.use()
            days.now += DAY
        days.use()
        taken = master._use

        def use(handler, fields):
            if "2026-11-10-node" in fields["use_string"]:
                master.script(how)
            taken(handler, fields)

        master._use = use
        for _ in range(8):
            days.now += HOUR
            days.report()
        assert days.arrived() == references(11, 12)
        assert days.states()["2026-11-10-node"] == {"500": "ambiguous", "503": "waiting"}[how]
    finally:
        days.close()


def test_killed_while_it_sends(days):
    """kill -9 between the request and the answer: what was being sent is held, by whoever comes next."""
    days.use()
    days.now += DAY
    days.use()
    days.master.slow_seconds = 30
    days.master.script("slow")
    days.client.close()
    days.context.meters.close()
    child = os.fork()
    if not child:
        try:
            days.context._local.client = None
            days.context = Context.of(days.context.config)
            days.context.meters.clock = lambda: days.now
            reports.run_pass(days.context, days.node, ask=lambda: None)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 30
    while days.states().get("2026-11-10-node") != "sending":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert days.report() == []
    assert days.states() == {"2026-11-10-node": "ambiguous"}


def test_a_ledger_that_fails_when_the_answer_comes(days, monkeypatch):
    """The master has it, and we know; that the disk is full right then makes no riddle of it."""
    days.use()
    days.now += DAY
    days.use()
    end = outbox.end

    def full(*_):
        monkeypatch.setattr(outbox, "end", end)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(outbox, "end", full)
    assert days.report() == ["accounting.ledger_unavailable"]
    assert days.states() == {"2026-11-10-node": "sending"}
    assert days.report() == []
    assert days.states() == {"2026-11-10-node": "accepted"}
    assert days.arrived() == ["2026-11-10-node"]


def test_partitions_report_once_for_a_day_however_often_it_is_tried(days, monkeypatch):
    """Documents that cannot be made now are tried every half a minute, and each run of a tenant's scripts is billed."""
    rounds, run = [], usage_intake.run
    monkeypatch.setattr(usage_intake, "run", lambda *a, **k: rounds.append(k["since"]) or run(*a, **k))

    def broken(*_, **__):
        raise AccountingError("accounting.ledger_full", "full")

    def report(asked=False):
        assert days.client
        return reports.run_pass(days.context, days.node, ask=days.ask, asked=asked)

    days.use()
    report()
    assert rounds == []
    days.now += DAY
    days.use()
    with monkeypatch.context() as patch:
        patch.setattr(documents, "store", broken)
        for _ in range(3):
            assert [error.code for _, error in report().failures] == ["accounting.ledger_full"]
            days.now += 30
    assert len(rounds) == 1
    assert report().failures == []
    assert len(rounds) == 1
    report(asked=True)
    assert len(rounds) == 2
    days.now += DAY
    days.use()
    ledger = type(days.context.meters.ledger())
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "try_out", broken)
        report()
        report()
    report()
    report()
    assert len(rounds) == 5
    assert len(set(rounds)) == 3, "until its files are taken a round is the same one"


def test_the_last_usage_goes_out_before_the_destroy_is_told(days, monkeypatch):
    days.use()
    partition = SimpleNamespace(id="slappart0", path=days.file.parent / "instance" / "slappart0")
    days.node = SimpleNamespace(partitions=(partition,))
    context = days.context
    state = InstanceState("slappart0", life="destroying", instance_guid="SOFTINST-0", wanted="destroyed")
    context.store.save_instance(state)
    told, order = [], days.master.others
    settled = []
    meters = type(context.meters)
    monkeypatch.setattr(meters, "settle", lambda *_: days.use(0 if settled else 500) or settled.append(1))
    monkeypatch.setattr(
        reports.destruction,
        "finish",
        lambda *_, unsettled, untold, **__: (
            told.append((unsettled, untold)) or SimpleNamespace(done=[], failures=[])
        ),
    )
    days.master.script("503")
    assert days.report() == ["slap.unavailable"]
    assert told == [(frozenset(), {"slappart0"})]
    assert days.report() == []
    assert told[1] == (frozenset(), frozenset())
    assert days.arrived() == ["2026-11-10-slappart0-last"]
    assert days.master.total("in", "SOFTINST-0") == 1.5
    assert days.master.violations == []
    assert order


def test_nothing_of_an_instance_goes_while_its_last_usage_cannot_be_told(days, monkeypatch):
    """Neither when documents cannot be made, nor before a day's document that names it is with the master."""
    days.use()
    days.now += DAY
    days.use()
    partition = SimpleNamespace(id="slappart1", path=days.file.parent / "instance" / "slappart1")
    days.node = SimpleNamespace(partitions=(partition,))
    state = InstanceState("slappart1", life="destroying", instance_guid="SOFTINST-1", wanted="destroyed")
    days.context.store.save_instance(state)
    monkeypatch.setattr(type(days.context.meters), "settle", lambda *_: None)
    gone = []
    monkeypatch.setattr(reports.destruction.instance_cleanup, "clean", lambda *_: gone.append("cleaned"))
    monkeypatch.setattr(reports.destruction.converge, "apply", lambda *_, **__: Outcome())
    gather = documents.gather_last

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(documents, "gather_last", full)
    assert days.report() == ["accounting.ledger_unavailable", "instances.unsettled"]
    assert gone == []
    monkeypatch.setattr(documents, "gather_last", gather)
    days.master.script("503")
    assert days.report() == ["slap.unavailable"]
    assert gone == ["cleaned"]
    assert "/destroyedComputerPartition" not in days.master.others
    assert days.context.store.instance("slappart1").life == "destroying"
    assert days.report() == []
    assert "2026-11-10-node" in days.arrived()
    assert "/destroyedComputerPartition" in days.master.others
    assert days.context.store.instance("slappart1").life == "free"
    assert days.master.violations == []


def command(days, *words):
    return cli.main([*words, "--json", "-c", str(days.file)])


def test_the_operator_reads_and_decides(days, capsys):
    assert command(days, "report", "list") == 0
    value = json.loads(capsys.readouterr().out)
    validate(value)
    assert value["documents"] == []
    days.use()
    days.now += DAY
    days.use()
    days.master.script("502")
    days.report()
    assert command(days, "report", "list") == 0
    value = json.loads(capsys.readouterr().out)
    validate(value)
    (held,) = value["documents"]
    assert (held["reference"], held["state"], held["kind"]) == ("2026-11-10-node", "ambiguous", "node")
    assert "502" in held["reason"]
    assert command(days, "report", "show", "2026-11-10-node") == 0
    value = json.loads(capsys.readouterr().out)
    validate(value)
    assert value["content"].startswith("<?xml")
    assert cli.main(["report", "list", "-c", str(days.file)]) == 0
    assert "ambiguous" in capsys.readouterr().out
    for wrong in (["report", "show", "x"], ["report", "resend", "2026-11-10-node", "x"]):
        assert command(days, *wrong) == 1
        error = json.loads(capsys.readouterr().out)["error"]
        assert (error["code"], error["resource"]) == ("accounting.document", "x")
        assert "report list" in error["hint"]
    assert days.states() == {"2026-11-10-node": "ambiguous"}  # all of them or none
    assert command(days, "report", "drop", "2026-11-10-node") == 0
    validate(json.loads(capsys.readouterr().out))
    assert days.states() == {"2026-11-10-node": "dropped"}
    assert command(days, "report") == 64
    with pytest.raises(SystemExit) as left:
        command(days, "report", "resend")
    assert left.value.code == 64


def test_meters_that_nobody_named_are_an_open_case(days):
    bare = dataclasses.replace(days.context.config, accounting=type(days.context.config.accounting)())
    (case,) = report_verbs.open_cases(bare)
    assert "names no resource" in case
    assert report_verbs.open_cases(days.context.config) == []
    with days.context.meters.ledger().transaction() as connection:
        assert documents.due(connection) == ()
        assert outbox.count(connection) == {}


def spoil_first_leaf(path, table):
    """Overwrite a page that no pass touches: the first of a table of several."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
    with path.open("r+b") as file:
        # https://sqlite.org/fileformat2.html, 1.6: an interior page begins its cells with the number of a page below
        file.seek((root - 1) * 4096)
        page = file.read(4096)
        assert page[0] in (2, 5)
        cell = int.from_bytes(page[12:14])
        file.seek((int.from_bytes(page[cell : cell + 4]) - 1) * 4096)
        file.write(b"\xa5" * 4096)


def test_damage_that_only_reports_meet_is_told_and_recovered_from(days):
    """A page of what was struck once, which no pass reads any more: reports must not stand still for it."""
    meters, context = days.context.meters, days.context
    many = [traffic(f"slappart{number}", 5, address=f"2001:db8::{number}") for number in range(2, 400)]

    def use(value):
        reading = a_pass(days.now, traffic(value=value), *many, owners=days.owners)
        with meters._turn, meters._care.watching(context.events):
            meters._care.post(meters._opened(), reading, context.events)

    for number in range(60):
        many = [one._replace(bytes_in=number) for one in many]
        use(number)
        days.now += 10
    days.now += DAY
    use(1000)
    ledger = meters.ledger()
    ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger._connection.execute("PRAGMA shrink_memory")
    spoil_first_leaf(meters.path, "balance")
    days.now += 10
    use(1001)
    assert meters.open_cases() == []
    assert days.report() == ["accounting.ledger_damaged"]
    (case,) = meters.open_cases()
    assert "malformed" in case
    days.now += 10
    use(1002)
    assert "what was metered on 2026-11-10 is in none" in ledger.recovered
    assert ledger.doubt is None
    (case,) = meters.open_cases()
    assert "is kept as" in case
    told = [json.loads(line) for line in (context.config.log_dir / "events.jsonl").read_text().splitlines()]
    assert [one["event"] for one in told if one["event"].startswith("usage.")] == ["usage.damaged"]
    use(1003)
    days.now += DAY
    use(2003)
    assert days.report() == []
    assert days.arrived() == ["2026-11-11-node"]
    assert days.master.total("in", "SOFTINST-0") == 0.001


def test_damage_that_proves_none_costs_nothing(days):
    days.use()
    ledger = days.context.meters.ledger()
    ledger.note(AccountingError("accounting.ledger_damaged", "somebody says so"))
    assert len(days.context.meters.open_cases()) == 1
    reading = a_pass(days.now, traffic(value=days.sent + 1), owners=days.owners)
    days.context.meters._care.post(ledger, reading, days.context.events)
    assert days.context.meters.open_cases() == []
    assert ledger.recovered is None


def test_a_state_that_can_not_be_read_holds_up_no_report_and_no_meter(days):
    """Of another partition, too: what each uses is booked to whom it was before."""
    nowhere = days.file.with_name("nowhere")
    days.node = SimpleNamespace(
        config=days.context.config,
        partitions=tuple(SimpleNamespace(id=name, uid=0, gid=0, path=nowhere / name) for name in GUIDS),
    )
    store, meters = days.context.store, days.context.meters
    for name, guid in GUIDS.items():
        store.save_instance(InstanceState(name, life="started", instance_guid=guid))
    days.use()
    days.now += DAY
    days.use()
    assert meters.holders(days.context) == GUIDS
    (days.context.config.state_dir / "instances" / "slappart1.json").write_bytes(b"\xa5")
    for _ in range(2):
        assert meters.holders(days.context) == GUIDS
    (case,) = meters.open_cases()
    assert case.startswith("slappart1: the state of its instance cannot be read")
    assert days.report() == ["state.damaged"]
    assert days.arrived() == ["2026-11-10-node"]
    store.save_instance(InstanceState("slappart1", life="started", instance_guid="SOFTINST-2"))
    assert meters.holders(days.context) == GUIDS | {"slappart1": "SOFTINST-2"}
    assert meters.open_cases() == []


@pytest.mark.parametrize("sent_since", [0, 1, 2])
def test_a_ledger_that_is_put_back_from_a_copy_tells_and_counts_nothing_again(days, sent_since):
    """A copy of the eleventh, put back some days later; what was told of days in between the master has."""
    meters, path = days.context.meters, days.context.meters.path
    days.use()
    days.now += DAY
    days.use()
    meters.ledger()
    days.report()
    meters.close()
    copy = path.read_bytes()
    for _ in range(sent_since):
        days.now += DAY
        days.use()
        days.report()
    meters.close()
    path.write_bytes(copy)
    days.now += HOUR
    days.use(70)
    days.now += DAY
    days.use(7000)
    assert days.report() == []
    gaps = meters.ledger().usage(None, None).gaps
    if sent_since:
        assert "put back from a copy" in gaps[0].reason
        assert len(gaps) == 1
        assert meters.ledger().recovered == gaps[0].reason
    else:
        assert gaps == ()
    assert days.master.duplicates == {}
    # the pass after it was put back counts only what nobody was told of
    expected = 1.0 * (1 + sent_since) if sent_since else 1.0 + 1.0 + 0.07
    assert days.master.total("in", "SOFTINST-0") == pytest.approx(expected)
    meters.close()
    days.now += DAY
    days.use()
    assert days.report() == []
    assert days.master.total("in", "SOFTINST-0") == pytest.approx(expected + 7.0)
    assert len(meters.ledger().usage(None, None).gaps) == len(gaps)
    assert meters.ledger().recovered is None


def test_a_document_that_was_taken_right_before_the_end_is_known_as_taken(days, monkeypatch):
    days.use()
    days.now += DAY
    days.use()

    def killed(connection, entry, state, *_):
        raise OSError(5, "ended here")

    monkeypatch.setattr(outbox, "end", killed)
    assert days.report() == ["accounting.ledger_unavailable"]
    monkeypatch.undo()
    days.context.judged.clear()
    assert days.states() == {"2026-11-10-node": "sending"}
    days.context.meters.close()
    with days.context.meters.ledger().transaction() as connection:
        assert outbox.count(connection) == {"accepted": 1}
    assert days.report() == []
    assert days.arrived() == ["2026-11-10-node"]


def test_last_documents_that_a_copy_does_not_know_concern_their_instance_alone(tmp_path):
    """The copy is of the morning; by the evening an instance is gone and told, and nothing of the day else."""
    path, tariff = tmp_path / "ledger.sqlite", Tariff({"network_in": Rate("in")}, frozenset({"users"}))

    def use(ledger, at, first, second):
        ledger.record(a_pass(BEGIN + at, traffic(value=first), traffic("slappart1", second), owners=GUIDS))

    with Ledger(path) as ledger:
        use(ledger, 0, 1, 10)
        ledger.take_in("slappart1", "SOFTINST-1", "a file", [], BEGIN)
    copy = path.read_bytes()
    for one in ("2026-11-10-slappart1-last", "instance"), ("2026-11-10-slappart1", "partition"):
        accepted.append(path, accepted.Accepted(one[0], "2026-11-10", one[1], "slappart1", "SOFTINST-1"))
    with path.with_name("ledger.accepted").open("a") as file:
        file.write('["2026-11-11-no')
    path.write_bytes(copy)
    with Ledger(path, clock=lambda: BEGIN + 50) as ledger:
        assert "put back from a copy" in ledger.recovered
        use(ledger, 100, 5, 50)
        use(ledger, 200, 6, 60)
        use(ledger, DAY, 7, 70)
        assert ledger.intake_waiting() == ()
        with ledger.transaction("IMMEDIATE") as connection:
            (period,) = documents.due(connection)
            drafts = documents.gather(connection, period, tariff, "COMP-1", last=True)
            made = documents.store(connection, drafts, tariff, "COMP-1", BEGIN + DAY)
            assert made == ["2026-11-10-node"]
            assert {one.reference: one.quantity for draft in drafts.drafts for one in draft.movements}[
                "SOFTINST-0"
            ] == 6
        accepted.append(path, accepted.Accepted("2026-11-09-node", "2026-11-09", "node", "", ""))
    assert [one.reference for one in accepted.read(path)][-1] == "2026-11-09-node"
