"""Reports that the master does not take now: they wait in order, the latest of each resource, and survive the daemon."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest

from partitiond import messages, reboots
from partitiond.messages import Outbox
from partitiond.reporting import ReportingClient
from slap_client.client import SlapClient
from slap_client.errors import SlapError

AWAY = SlapError("slap.unreachable", "no connection", retryable=True)
UNKNOWN = SlapError("slap.not_found", "the master answered 404", status=404)
BROKEN = SlapError("slap.unavailable", "the master answered 500", status=500, retryable=True)
REVOKED = SlapError("slap.refused", "the master answered 403", status=403)


class Master:
    """What the reporting client's calls end in: in place of the network, and nothing else."""

    def __init__(self, monkeypatch):
        self.told = []
        self.answers = {}
        self.away = None
        for name in (
            *("software_building", "software_available", "software_error", "software_destroyed"),
            *(
                "instance_started",
                "instance_stopped",
                "instance_error",
                "instance_destroyed",
                "computer_bang",
            ),
        ):
            monkeypatch.setattr(SlapClient, name, self._call(name))
        monkeypatch.setattr(SlapClient, "computer", self._call("computer"))

    def _call(self, name):
        def call(_client, *arguments):
            answer = self.away or self.answers.get((name, *arguments[:1]))
            if answer:
                raise answer
            if name != "computer":
                self.told.append((name, *arguments))
            return "document"

        return call


@pytest.fixture
def master(monkeypatch):
    return Master(monkeypatch)


def client(state_dir):
    return ReportingClient("http://127.0.0.1:1/", "COMP-1", outbox=Outbox(state_dir))


def test_what_is_taken_leaves_no_trace(master, tmp_path):
    one = client(tmp_path)
    one.instance_started("slappart0")
    one.software_available("http://x/")
    assert master.told == [("instance_started", "slappart0"), ("software_available", "http://x/")]
    assert list(tmp_path.iterdir()) == []
    assert messages.open_cases(tmp_path) == []


def test_they_wait_in_order_and_the_latest_of_each_wins(master, tmp_path):
    one = client(tmp_path)
    master.away = AWAY
    one.software_building("http://x/")
    one.instance_error("slappart1", "a" * 5000 + " end")
    one.instance_stopped("slappart0")
    one.software_available("http://x/")
    one.instance_started("slappart0")
    (case,) = messages.open_cases(tmp_path)
    assert case.startswith("3 reports wait for the master since ")
    # the next daemon has them, too
    two = client(tmp_path)
    with pytest.raises(SlapError):
        two.computer()
    assert master.told == []
    master.away = None
    assert two.computer() == "document"
    assert [call[:2] for call in master.told] == [
        ("instance_error", "slappart1"),
        ("software_available", "http://x/"),
        ("instance_started", "slappart0"),
    ]
    assert master.told[0][2].endswith(" end")
    two.computer()
    assert len(master.told) == 3
    assert messages.open_cases(tmp_path) == []


def test_nothing_overtakes_what_waits(master, tmp_path):
    one = client(tmp_path)
    master.away = AWAY
    one.instance_stopped("slappart0")
    master.away = None
    one.instance_started("slappart1")
    assert master.told == [("instance_stopped", "slappart0"), ("instance_started", "slappart1")]


def test_a_certificate_that_is_not_let_in_keeps_reports_waiting(master, tmp_path):
    one = client(tmp_path)
    master.away = REVOKED
    one.instance_started("slappart0")
    master.away = None
    one.computer()
    assert master.told == [("instance_started", "slappart0")]


def test_what_is_refused_for_good_is_the_caller_s(master, tmp_path):
    master.answers["instance_started", "slappart0"] = UNKNOWN
    with pytest.raises(SlapError, match="404"):
        client(tmp_path).instance_started("slappart0")
    assert messages.open_cases(tmp_path) == []


class Clock:
    now = 1e9

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def timed(tmp_path, clock):
    return lambda: ReportingClient("http://127.0.0.1:1/", "COMP-1", outbox=Outbox(tmp_path, clock))


@pytest.mark.parametrize("answer", [UNKNOWN, BROKEN])
def test_one_that_waits_and_is_refused_holds_up_no_other(master, timed, tmp_path, caplog, answer):
    one = timed()
    master.away = AWAY
    one.instance_started("slappart0")
    one.instance_started("slappart1")
    master.away = None
    master.answers["instance_started", "slappart0"] = answer
    one.computer()
    for number in range(2, 20):
        one.instance_started(f"slappart{number}")
    assert master.told == [("instance_started", f"slappart{number}") for number in range(1, 20)]
    (case,) = messages.open_cases(tmp_path)
    assert "instance_started slappart0" in case
    assert str(answer) in case
    assert caplog.text.count("refuses") == 1


def test_what_is_refused_is_tried_ever_more_seldom_and_never_lost(master, timed, clock, tmp_path):
    one = timed()
    master.away = AWAY
    one.instance_started("slappart0")
    master.away = None
    master.answers["instance_started", "slappart0"] = UNKNOWN
    tries = []
    known = 0
    for _ in range(200):
        one = timed()  # over restarts
        one.computer()
        (waiting,) = Outbox(tmp_path).waiting()
        tries.append(waiting.refused - known)
        known = waiting.refused
        clock.now += 3600
    assert 4 <= sum(tries[:18]) <= 10
    assert 10 <= sum(tries) < 20
    clock.now -= 1e8  # set back: it waits for no day of years to come
    master.answers.clear()
    one.computer()
    assert master.told == [("instance_started", "slappart0")]
    assert messages.open_cases(tmp_path) == []


@pytest.mark.parametrize("answer", [None, UNKNOWN])
def test_newer_news_take_the_place_of_what_is_refused(master, timed, clock, tmp_path, answer):
    one = timed()
    master.away = AWAY
    one.instance_error("slappart0", "old")
    master.away, master.answers["instance_error", "slappart0"] = None, UNKNOWN
    one.computer()
    assert len(messages.open_cases(tmp_path)) == 1
    master.answers["instance_started", "slappart0"] = answer
    with pytest.raises(SlapError) if answer else contextlib.nullcontext():
        one.instance_started("slappart0")
    master.answers.clear()
    clock.now += 1e6
    timed().computer()
    assert [name for name, *_ in master.told] == ([] if answer else ["instance_started"])


def test_destroyed_goes_after_what_waits_and_ends_it(master, tmp_path):
    one = client(tmp_path)
    master.away = AWAY
    one.instance_stopped("slappart0")
    with pytest.raises(SlapError):  # its caller must know
        one.instance_destroyed("slappart0")
    master.away = None
    one.instance_destroyed("slappart0")
    assert master.told == [("instance_stopped", "slappart0"), ("instance_destroyed", "slappart0")]
    # a report that the master does not want is not told of the next instance there
    master.away = AWAY
    one.instance_stopped("slappart0")
    master.away, master.answers["instance_stopped", "slappart0"] = None, UNKNOWN
    one.instance_destroyed("slappart0")
    assert messages.open_cases(tmp_path) == []


def test_killed_between_the_new_and_the_old(master, tmp_path):
    box = Outbox(tmp_path)
    box.put("instance_stopped", "slappart0")
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "outbox", kept)
    box.put("instance_started", "slappart0")
    for path in kept.iterdir():
        shutil.copy(path, tmp_path / "outbox")
    assert [one.kind for one in Outbox(tmp_path).waiting()] == ["instance_started"]
    assert len(list((tmp_path / "outbox").iterdir())) == 1


def test_programs_beside_each_other_lose_nothing_of_each_other(tmp_path):
    software, instance = Outbox(tmp_path), Outbox(tmp_path)
    assert software.waiting() == instance.waiting() == []
    software.put("software_building", "https://example.org/software.cfg")
    instance.put("instance_error", "slappart0", "bad")
    software.put("software_available", "https://example.org/software.cfg")
    instance.put("instance_started", "slappart0")
    kept = [(one.number, one.kind) for one in Outbox(tmp_path).waiting()]
    assert kept == [(3, "software_available"), (4, "instance_started")]
    assert [one.kind for one in instance.waiting()] == ["software_available", "instance_started"]


def test_a_damaged_one_harms_no_other(master, tmp_path, caplog):
    Outbox(tmp_path).put("instance_started", "slappart0")
    for number, content in enumerate(
        (b"\xff", b"[]", b'{"kind": "x"}', b'{"number": 1, "kind": "erase", "about": ""}')
    ):
        (tmp_path / "outbox" / f"9{number:011}.json").write_bytes(content)
    assert [one.about for one in Outbox(tmp_path).waiting()] == ["slappart0"]
    assert caplog.text.count("stays untold") == 4


def test_a_full_disk_leaves_it_to_the_caller(master, tmp_path):
    (tmp_path / "outbox").write_text("in the way")
    master.away = AWAY
    with pytest.raises(SlapError, match="neither told nor kept"):
        client(tmp_path).instance_started("slappart0")


def test_there_is_a_bound_that_spares_the_reboot(master, tmp_path, monkeypatch):
    monkeypatch.setattr(messages, "_MOST", 3)
    box = Outbox(tmp_path)
    box.put("computer_bang", "", "Reboot")
    for number in range(5):
        box.put("instance_started", f"slappart{number}")
    assert [one.about for one in box.waiting()] == ["", "slappart3", "slappart4"]


# --- reboots


@pytest.fixture
def machine(tmp_path, monkeypatch):
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(reboots, "BOOT_ID", boot)
    state = tmp_path / "state"
    state.mkdir()
    events = []

    def made(number):
        boot.write_text(f"boot-{number}\n")
        record = lambda event, *_, **__: events.append(event)  # noqa: E731 - a word for it
        context = SimpleNamespace(
            config=SimpleNamespace(state_dir=state),
            outbox=Outbox(state),
            events=SimpleNamespace(record=record),
        )
        return reboots.Reboots(context)

    return SimpleNamespace(start=lambda number: made(number).note(), reboots=made, state=state, events=events)


def test_a_reboot_is_told_once(master, machine):
    assert not machine.start(1)  # the first run of all
    assert not machine.start(1)
    assert client(machine.state).computer()
    assert master.told == []
    assert machine.start(2)
    assert not machine.start(2)  # a daemon that is restarted before the master answers
    master.away = AWAY
    with pytest.raises(SlapError):
        client(machine.state).computer()
    assert machine.start(3)  # and booted once more meanwhile
    master.away = None
    for _ in range(3):
        client(machine.state).computer()
        assert not machine.start(3)
    ((name, text),) = master.told
    assert name == "computer_bang"
    assert text.startswith("Reboot at 20")
    assert machine.events == ["node.rebooted", "node.rebooted"]


def test_killed_before_the_boot_is_remembered(master, machine, monkeypatch):
    machine.start(1)
    before = (machine.state / reboots.FILE).read_bytes()
    machine.start(2)
    (machine.state / reboots.FILE).write_bytes(before)
    machine.start(2)
    client(machine.state).computer()
    assert len(master.told) == 1
    assert json.loads((machine.state / reboots.FILE).read_bytes()) == {"boot_id": "boot-2"}


def test_a_boot_that_cannot_be_noted_is_noted_later_and_told_once(master, machine, monkeypatch, caplog):
    machine.start(1)
    (machine.state / "outbox").write_text("in the way")
    found = machine.reboots(2)
    assert not found.note()
    assert not found.note()
    assert caplog.text.count("tried again") == 1
    (machine.state / "outbox").unlink()
    # now the report is kept, and what follows is not
    write = reboots.files.write_path

    def full(path, *arguments, **options):
        if path.name == reboots.FILE:
            raise OSError(28, "No space left on device")
        write(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(reboots.files, "write_path", full)
        assert not found.note()
    client(machine.state).computer()
    assert found.note()
    assert not found.note()
    client(machine.state).computer()
    assert len(master.told) == 1
    assert machine.events == ["node.rebooted"]
