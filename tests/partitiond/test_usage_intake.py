"""Usage files of real partitions, written by their users: what is good is taken once, what is not harms nobody."""

import contextlib
import json
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from accounting import AccountingError, Ledger, intake
from partitiond import event_reader, execute, privacy, refused_usage, usage_intake, usage_scripts, verbs
from partitiond.context import Context
from partitiond.state import InstanceState
from partitiond.usage_scripts import Limits

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "accounting"))
from hostile_usage import COUNT, Tenant, good_files, hostile_files  # noqa: E402 - it lies beside the tests of the reader

RESOURCES = frozenset({"cpu", "disk", "requests"})


class Scene:
    def __init__(self, files):
        files.write(slapformat={"partition_amount": 4})
        self.context = Context.of(files.load())
        outcome = verbs.apply(self.context, [])
        assert (outcome["failures"], outcome["left"]) == ([], [])
        self.node = self.context.node
        self.log = files.log
        for item in self.node.partitions[:3]:
            self.context.store.save_instance(
                InstanceState(
                    item.id, life="started", wanted="stopped", instance_guid=f"SOFTINST-{item.index}"
                )
            )
            privacy.ensure(self.context, item)
        self.shadow = files.root / "shadow"
        self.shadow.write_bytes(b"root:secret")
        self.shadow.chmod(0o600)
        self.ledger = Ledger(files.state / "intake.sqlite")
        self.seen = 0

    def partition(self, number):
        return self.node.partitions[number]

    def place(self, number=0, *below):
        """A directory of a partition, made by its user."""
        item = self.partition(number)
        path = item.path
        for name in below or ("var", "xml_report"):
            path /= name
            if not path.exists():
                path.mkdir()
                os.chown(path, item.uid, item.gid)
        return path

    def script(self, number, name, text, mode=0o755):
        path = self.place(number, "etc", "report") / name
        self.place(number)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(mode)
        os.chown(path, self.partition(number).uid, self.partition(number).gid)
        return path

    def put(self, number, name, content):
        path = self.place(number) / name
        path.write_text(content)
        os.chown(path, self.partition(number).uid, self.partition(number).gid)
        return path

    def run(self, limits=usage_scripts.LIMITS, resources=RESOURCES):
        return usage_intake.run(self.context, self.node, self.ledger, resources, limits)

    def new(self):
        """What was taken since the last question, as (guid, resource, title, quantity)."""
        found = self.ledger.intake_waiting()
        new, self.seen = found[self.seen :], len(found)
        return [(one.guid, said.resource, said.title, said.quantity) for one in new for said in one.movements]

    def events(self, name):
        return [one for one in event_reader.last(self.log, 10_000) if one["event"] == name]

    def clear(self):
        for item in self.node.partitions:
            execute.end_processes_of(item.uid, item.gid)
            for below in ("etc/report", "var/xml_report", "var", "etc"):
                subprocess.run(["/bin/rm", "-rf", "--", str(item.path / below)], check=True)
            subprocess.run(
                ["/bin/rm", "-rf", str(refused_usage.directory(self.context.config.state_dir, item.id))],
                check=True,
            )
        self.context.turns.ran.clear()
        self.context.turns.late.clear()
        self.context.turns.taken.clear()
        self.context.turns.last.clear()


@pytest.fixture(scope="module")
def standing(module_node_config):
    scene = Scene(module_node_config)
    try:
        yield scene
    finally:
        scene.ledger.close()
        scene.context.meters.close()


@pytest.fixture
def scene(standing):
    yield standing
    standing.clear()
    standing.new()


def usage(quantity="2", reference="", title="t"):
    return (
        f"<consumption><movement><resource>cpu</resource><title>{title}</title><reference>{reference}</reference>"
        f"<quantity>{quantity}</quantity><price>0</price><VAT/></movement></consumption>"
    )


# --- scripts ----------------------------------------------------------------------------------------------------------


def test_a_script_begins_as_slapos_core_begins_it_and_its_file_counts_at_once(scene):
    item = scene.partition(0)
    (item.path / "var").mkdir(exist_ok=True)
    scene.script(
        0,
        "report",
        f'echo "$@"; echo "$#"; pwd; id -u; echo "$HOME"; umask; ls /proc/1 2>&1; echo "{usage()}" > "$1"',
    )
    scene.script(0, "not-executable", "exit 1", mode=0o644)
    result = scene.run()
    assert (result.failures, result.done) == ([], ["slappart0: 1 usage files taken, 0 refused"])
    assert scene.new() == [("SOFTINST-0", "cpu", "t", Decimal(2))]
    assert list(scene.place().iterdir()) == []
    path = scene.log / item.id / usage_scripts.LOG
    head, argument, count, cwd, uid, home, umask, *rest = path.read_text().splitlines()
    assert head.endswith("etc/report/report")
    assert argument.startswith(f"{item.path}/var/xml_report/slapreport.")
    assert (count, cwd, uid, home) == ("1", f"{item.path}/etc/report", str(item.uid), str(item.path))
    assert umask.endswith("027")
    assert "No such file" in " ".join(rest), "it is in the partition's namespaces"
    assert path.stat().st_uid == 0


def test_each_script_has_a_file_of_its_own_and_one_that_fails_is_told(scene):
    for name in ("a", "b"):
        scene.script(0, name, f'echo "{usage(title=name)}" > "$1"')
    scene.script(0, "c", "echo alas; exit 7")
    result = scene.run()
    assert result.failures == []
    assert sorted(one[2] for one in scene.new()) == ["a", "b"]
    event = scene.events("usage.failed")[-1]
    assert (event["partition"], event["reason"]) == ("slappart0", "etc/report/c: exit status 7")
    assert "alas" in (scene.log / "slappart0" / usage_scripts.LOG).read_text()


def test_one_that_never_ends_is_ended_with_all_it_began_and_comes_last_next_time(scene):
    scene.script(0, "sleeps", "sleep 4711 & setsid sleep 4712 & trap '' TERM; while :; do sleep 1; done")
    scene.script(1, "works", f'echo "{usage()}" > "$1"')
    began = time.monotonic()
    scene.run(Limits(script=0.5, partition=1.0, whole=30.0, side_by_side=1))
    assert time.monotonic() - began < 20
    assert scene.new() == [("SOFTINST-1", "cpu", "t", Decimal(2))]
    assert scene.events("usage.failed")[-1]["reason"] == "etc/report/sleeps: took too long"
    assert scene.context.turns.late == {"slappart0"}
    first, *_, last = scene.context.turns.order(scene.node.partitions[:2])
    assert (first.id, last.id) == ("slappart1", "slappart0")
    assert not any(word in line for line in _commands() for word in ("4711", "etc/report"))


def _commands():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")


def test_sleepers_hold_up_a_pass_no_longer_than_its_time_and_the_others_come_first_then(scene):
    for number in range(3):
        scene.script(number, "sleeps", "sleep 4711")
    limits = Limits(script=0.5, partition=0.5, whole=0.3, side_by_side=1)
    began = time.monotonic()
    scene.run(limits)
    assert time.monotonic() - began < 15
    assert scene.context.turns.late == {"slappart0"}
    scene.run(limits)
    assert scene.context.turns.late == {"slappart0", "slappart1"}


def test_what_scripts_say_is_bounded_and_nobody_waits_for_those_that_say_much(scene):
    scene.script(0, "says", f'head -c 3000000 /dev/zero | tr "\\0" x; echo "{usage()}" > "$1"')
    scene.script(0, "leaves", "setsid sleep 4713 & exit 0")
    began = time.monotonic()
    scene.run()
    assert time.monotonic() - began < 20
    assert len(scene.new()) == 1
    size = (scene.log / "slappart0" / usage_scripts.LOG).stat().st_size
    assert usage_scripts._SAID_LIMIT < size <= usage_scripts._LOG_LIMIT


def test_root_does_not_carry_a_script_to_where_a_link_leads(scene, tmp_path):
    """The directory of scripts is a link to one that only root may enter."""
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "x").write_text("#!/bin/sh\npwd -P > /tmp/where\n")
    (hidden / "x").chmod(0o755)
    path = scene.place(0, "etc") / "report"
    path.symlink_to(hidden)
    result = scene.run()
    assert result.failures == []
    assert "no directory" in scene.events("usage.failed")[-1]["reason"]


def test_stopping_ends_a_pass_at_once(scene):
    scene.script(0, "sleeps", "sleep 4711")
    scene.put(0, "good", usage())
    scene.context.stop.set()
    try:
        began = time.monotonic()
        assert scene.run().done == []
        assert time.monotonic() - began < 5
    finally:
        scene.context.stop.clear()
    assert scene.new() == []


# --- files ------------------------------------------------------------------------------------------------------------


def test_without_resources_nothing_is_touched_and_an_open_case_says_so(scene):
    scene.script(0, "ran", f'touch "{scene.partition(0).path}/ran"')
    path = scene.put(0, "good", usage())
    assert usage_intake.open_cases(scene.context, scene.node, RESOURCES) == []
    (case,) = usage_intake.open_cases(scene.context, scene.node, frozenset())
    assert "slappart0" in case
    assert "partition_resources" in case
    assert scene.run(resources=frozenset()).done == []
    assert path.exists()
    assert not (scene.partition(0).path / "ran").exists()
    path.unlink()
    assert usage_intake.open_cases(scene.context, scene.node, frozenset()) == []


def test_a_partition_without_an_instance_is_left_alone(scene):
    path = scene.put(3, "good", usage())
    assert scene.run().done == []
    assert path.exists()


def test_what_is_still_being_written_waits(scene):
    for name in (".hidden", "a~", "b.tmp", "c.part"):
        scene.put(0, name, usage())
    scene.put(0, "fresh", usage(title="fresh"))
    scene.put(0, "endless", usage(title="endless"))
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            while True:
                os.utime(scene.place() / "endless")
                time.sleep(0.05)
        os._exit(0)
    try:
        began = time.monotonic()
        scene.run()
        assert time.monotonic() - began >= usage_intake._QUIET_SECONDS, "it looks again when it may be whole"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert [one[2] for one in scene.new()] == ["fresh"]
    assert sorted(path.name for path in scene.place().iterdir()) == [
        ".hidden",
        "a~",
        "b.tmp",
        "c.part",
        "endless",
    ]


def test_the_last_pass_of_an_instance_takes_everything(scene):
    scene.script(0, "report", f'echo "{usage(title="script")}" > "$1"')
    for number in range(usage_intake.MOST_FILES + 50):
        scene.put(0, f"file-{number}", usage(title=str(number)))
    result = usage_intake.final(scene.context, scene.node.partitions[:1], scene.ledger, RESOURCES)
    assert result.failures == []
    assert len(scene.new()) == usage_intake.MOST_FILES + 51
    assert list(scene.place().iterdir()) == []


def test_those_that_go_together_are_done_together_and_hold_up_nobody(scene):
    for number in range(3):
        scene.script(number, "report", "sleep 4711" if number else f'echo "{usage()}" > "$1"')
        scene.put(number, "file", usage(title=str(number)))
    limits = Limits(script=0.5, partition=0.5, whole=0.3, side_by_side=1, all_files=20.0)
    scene.context.turns.late |= {"slappart1", "slappart2"}
    began = time.monotonic()
    going = scene.node.partitions[:3]
    assert usage_intake.final(scene.context, going, scene.ledger, RESOURCES, limits).failures == []
    assert time.monotonic() - began < 15
    assert sorted(one[0] for one in scene.new()) == ["SOFTINST-0", "SOFTINST-0", "SOFTINST-1", "SOFTINST-2"]
    scene.put(0, "more", usage(title="more"))
    usage_intake.final(scene.context, going, scene.ledger, RESOURCES, limits)
    assert [one[2] for one in scene.new()] == ["more"], "no script runs a second time"
    usage_intake.final(scene.context, going, scene.ledger, RESOURCES, Limits(all_files=0.0))
    assert not scene.context.turns.last.keys() - {"SOFTINST-0", "SOFTINST-1", "SOFTINST-2"}


def test_scripts_that_ran_since_are_not_run_again_and_none_runs_for_a_ledger_that_cannot_be_written(scene):
    scene.script(0, "report", f'echo x >> "{scene.partition(0).path}/ran"; echo "{usage()}" > "$1"')
    ran, turns = scene.partition(0).path / "ran", scene.context.turns
    scene.ledger._connection.execute("PRAGMA query_only = ON")
    try:
        with pytest.raises(AccountingError):
            scene.run()
        with pytest.raises(AccountingError):
            usage_intake.final(scene.context, scene.node.partitions[:1], scene.ledger, RESOURCES)
    finally:
        scene.ledger._connection.execute("PRAGMA query_only = OFF")
    assert not ran.exists()
    turns.begin()
    try:
        for _ in range(3):
            usage_intake.run(scene.context, scene.node, scene.ledger, RESOURCES, since=turns.begun)
        assert ran.read_text().count("x") == 1
        turns.begin()
        usage_intake.run(scene.context, scene.node, scene.ledger, RESOURCES, since=turns.begun)
        assert ran.read_text().count("x") == 2
    finally:
        ran.unlink()
    assert len(scene.new()) == 2


def test_the_second_look_at_fresh_files_has_no_more_time_than_the_first(scene):
    for number in range(3):
        scene.put(number, "fresh", usage())
    scene.run(Limits(all_files=1.0))
    assert scene.new() == [], "its time was over before they were quiet"


def test_of_very_many_files_the_oldest_come_first_and_the_others_in_the_next_pass(scene):
    for number in range(usage_intake.MOST_FILES + 10):
        path = scene.put(0, f"{999 - number}", usage(title=str(number)))
        os.utime(path, (number + 1, number + 1))
    time.sleep(usage_intake._QUIET_SECONDS)
    scene.run()
    assert [int(one[2]) for one in scene.new()] == list(range(usage_intake.MOST_FILES))
    scene.run()
    assert len(scene.new()) == 10


def test_files_have_their_time_too_and_those_that_had_none_come_first(scene):
    for number in range(3):
        for name in ("a", "b"):
            scene.put(number, name, usage(title=name))
    time.sleep(usage_intake._QUIET_SECONDS)
    scene.run(Limits(all_files=0.0))
    assert scene.new() == []
    scene.run(Limits(files=0.0))
    assert scene.new() == []
    assert all(path.name.startswith(".taking-") for path in scene.place().iterdir()), (
        "as if it had been killed"
    )
    scene.context.turns.taken["slappart2"] = 0.0
    scene.run()
    assert [one[0] for one in scene.new()] == [f"SOFTINST-{number}" for number in (2, 2, 0, 0, 1, 1)]


def test_a_ledger_that_fails_ends_the_pass_and_nothing_is_lost(scene):
    for number in range(3):
        scene.put(number, "good", usage())
    time.sleep(usage_intake._QUIET_SECONDS)
    scene.ledger._connection.execute("PRAGMA query_only = ON")
    try:
        with pytest.raises(AccountingError):
            scene.run()
    finally:
        scene.ledger._connection.execute("PRAGMA query_only = OFF")
    assert len(scene.run().done) == 3
    assert len(scene.new()) == 3


def test_refused_files_are_kept_with_their_reason_in_bounds(scene):
    for number in range(60):
        scene.put(0, f"bad-{number}", usage(reference="SOFTINST-1") + " " * 100_000)
    scene.put(0, "good", usage())
    time.sleep(usage_intake._QUIET_SECONDS)
    before = len(scene.events("usage.refused"))
    assert scene.run().done == ["slappart0: 1 usage files taken, 60 refused"]
    assert scene.new() == [("SOFTINST-0", "cpu", "t", Decimal(2))]
    place = refused_usage.directory(scene.context.config.state_dir, "slappart0")
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert len(list(place.glob("*.json"))) == refused_usage.MOST_KEPT
    assert sum(path.stat().st_size for path in place.iterdir()) < 1 << 20
    said = json.loads(next(place.glob("*.json")).read_text())
    assert "only about itself" in said["reason"]
    assert said["instance_guid"] == "SOFTINST-0"
    events = scene.events("usage.refused")[before:]
    assert [(one["count"], one["partition"]) for one in events] == [(60, "slappart0")] * usage_intake._TOLD


def test_files_that_make_the_document_of_an_instance_too_large_are_set_aside(scene, monkeypatch):
    there = len(scene.ledger.intake_room("slappart0", "SOFTINST-0").told)
    monkeypatch.setattr(intake, "MOST_MOVEMENTS", there + 5)
    for number in range(8):
        path = scene.put(0, f"file-{number}", usage(title=f"room {number}"))
        os.utime(path, (number + 1, number + 1))
    scene.put(0, "again", usage(title="room 3"))
    scene.put(1, "other", usage(title="room 9"))
    time.sleep(usage_intake._QUIET_SECONDS)
    assert set(scene.run().done) == {
        "slappart0: 6 usage files taken, 3 refused",
        "slappart1: 1 usage files taken, 0 refused",
    }
    assert sorted(one[2].removeprefix("room ") for one in scene.new()) == ["0", "1", "2", "3", "3", "4", "9"]
    assert f"{there + 6} different movements" in scene.events("usage.refused")[-1]["reason"]
    place = refused_usage.directory(scene.context.config.state_dir, "slappart0")
    assert len(list(place.glob("*.xml"))) == 3
    assert list(scene.place().iterdir()) == []


# --- everything at once -----------------------------------------------------------------------------------------------

NAMES = (
    b"new\nline",
    b"\x1b]0;owned\x07\x1b[2J",
    b"\xff\xfe\xfd",
    b"\xed\xa0\x80",
    "\u202e\u2028".encode(),
    b"x" * 255,
    b"-rf",
    b" ",
    b"...",
    b"$(id)",
    b"%s%n",
)

_WRITER = """
import os, pickle, sys
os.chdir(sys.argv[1])
for name, content in pickle.load(sys.stdin.buffer):
    with open(name, "wb") as file:
        file.write(content)
"""

_LEASE = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
held = os.open(sys.argv[1], os.O_RDONLY)
fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
signal.pause()
"""

_REWRITER = """
import itertools, os, sys
parts = [open(name, "rb").read() for name in sys.argv[2:]]
print("writing", flush=True)
for content in itertools.cycle(parts):
    try:
        with open(sys.argv[1], "wb") as file:
            file.write(content)
    except OSError:
        pass
"""


def write_as(item, place, contents):
    subprocess.run(
        [sys.executable, "-I", "-c", _WRITER, str(place)],
        input=pickle.dumps(contents),
        user=item.uid,
        group=item.gid,
        extra_groups=[],
        check=True,
    )


@contextlib.contextmanager
def beside(item, program, *arguments):
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", program, *map(str, arguments)],
        user=item.uid,
        group=item.gid,
        extra_groups=[],
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout.readline()
        yield
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def strange_things(scene, number):
    """What is no plain file of the partition's own; the directory stays, all else must go."""
    place, item = scene.place(number), scene.partition(number)
    other = scene.place((number + 1) % 3) / "good-shortest"
    (place / "link-to-shadow").symlink_to(scene.shadow)
    (place / "link-to-other").symlink_to(other)
    (place / "link-to-itself").symlink_to("link-to-itself")
    (place / "link-to-directory").symlink_to("/")
    os.mkfifo(place / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(place)
        listener.bind("socket")
        os.chdir("/")
    os.mknod(place / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(place / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (place / "directory").mkdir()
    (place / "directory" / "file").write_text(usage())
    os.link(scene.shadow, place / "hard-link-to-shadow")
    os.link(other, place / "hard-link-to-other")
    with open(place / "sparse", "wb") as file:
        file.truncate(10 << 40)
    with open(place / "giant", "wb") as file:
        file.write(b" " * (3 << 20))
    (place / "roots-own").write_text(usage())
    for path in place.iterdir():
        if path.name not in ("hard-link-to-shadow", "hard-link-to-other", "roots-own"):
            os.lchown(path, item.uid, item.gid)


def hostile_tenants(scene):
    """Write the thousand files, good ones among them, as the partitions' users; give what must be taken of it."""
    expected = []
    for number in range(3):
        item = scene.partition(number)
        foreign = f"SOFTINST-{(number + 1) % 3}"
        tenant = Tenant(f"SOFTINST-{number}", item.id, foreign, scene.context.config.computer_id)
        files = [(name.encode(), content) for name, content, _ in good_files(tenant)]
        for _, _, movements in good_files(tenant):
            expected += [(tenant.guid, *key, quantity) for key, quantity in movements.items()]
        hostile = [one for place, one in enumerate(hostile_files(tenant)) if place % 3 == number]
        files += [(name.encode(), content) for name, content, _ in hostile]
        files += [(name, usage("1e400").encode()) for name in NAMES]
        scene.place(number)
        write_as(item, scene.place(number), files)
    return expected


def test_a_thousand_hostile_files_of_several_partitions(scene, monkeypatch):
    monkeypatch.setattr(usage_intake, "MOST_FILES", 2000)
    monkeypatch.setattr(usage_intake, "_MOST_LISTED", 4000)
    expected = hostile_tenants(scene)
    for number in range(3):
        strange_things(scene, number)
    before = scene.shadow.stat()
    leased, torn = scene.put(0, "leased", usage()), scene.put(1, "torn", usage())
    parts = [scene.partition(1).path / name for name in ("whole", "half")]
    for path, text in zip(parts, (usage("7", title="torn"), usage("7", title="torn")[:100]), strict=True):
        path.write_text(text)
        path.chmod(0o644)
    time.sleep(usage_intake._QUIET_SECONDS)
    began = time.monotonic()
    with beside(scene.partition(0), _LEASE, leased), beside(scene.partition(1), _REWRITER, torn, *parts):
        result = scene.run(Limits(files=300.0))
    seconds = time.monotonic() - began
    assert result.failures == []
    found = [one for one in scene.new() if one[2] != "torn"]
    assert Counter(expected) - Counter(found) == Counter(), "lost"
    print(
        f"{COUNT} hostile files in {seconds:.1f} s, {len(found)} movements of good ones and of those that may be taken"
    )
    assert {guid for guid, *_ in found} == {"SOFTINST-0", "SOFTINST-1", "SOFTINST-2"}
    assert all(resource in RESOURCES and 0 < quantity <= 10**15 for _, resource, _, quantity in found)
    nothing_harmed(scene, before)
    told = len(scene.events("usage.refused"))
    assert scene.run().failures == []
    assert [one for one in scene.new() if one[2] != "torn"] == [], "twice"
    assert {one["file"] for one in scene.events("usage.refused")[told:]} <= {"torn"}


def nothing_harmed(scene, before):
    after = scene.shadow.stat()
    assert (after.st_mode, after.st_uid, after.st_size, after.st_nlink, after.st_atime_ns) == (
        before.st_mode,
        before.st_uid,
        before.st_size,
        1,
        before.st_atime_ns,
    )
    for number in range(3):
        names = {path.name for path in scene.place(number).iterdir() if not path.name.startswith(".taking-")}
        assert names <= {"directory", "torn", "..."}  # the last is a hidden one
        assert (scene.place(number) / "directory" / "file").exists()
        place = refused_usage.directory(scene.context.config.state_dir, f"slappart{number}")
        assert len(list(place.glob("2*.json"))) == refused_usage.MOST_KEPT
        assert [json.loads(path.read_text())["file"] for path in place.glob("directory-*.json")] == [
            "directory"
        ]
        assert all(scene.shadow.read_bytes() not in path.read_bytes() for path in place.iterdir())
        assert all(path.name.isascii() and path.stat().st_uid == 0 for path in place.iterdir())
    assert all(line.isascii() and line.isprintable() for line in _event_lines(scene))


def _event_lines(scene):
    return (scene.log / "events.jsonl").read_text().splitlines()
