"""The log of events: whole lines, bounded, readable over rotations and damage, harmless when it cannot be written."""

import errno
import json
import logging
import os
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
from json_schemas import schema, validate

from partitiond import event_reader, events
from partitiond.events import EventLog


def recorded(log_dir):
    follower = event_reader.Follower(log_dir)
    try:
        return [event["message"] for event in follower.past()]
    finally:
        follower.close()


def test_an_event_is_one_line_of_roots_that_the_schema_allows(tmp_path):
    EventLog(tmp_path).record(
        "drift.found", "tap/slaptap1: missing", partition="slappart1", resource="tap/slaptap1", seconds=None
    )
    file = tmp_path / "events.jsonl"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (line,) = file.read_bytes().splitlines()
    value = json.loads(line)
    assert "seconds" not in value
    validate({"schema": "partitiond/event/1", **value})


def test_the_schema_knows_every_event():
    assert set(schema("event")["properties"]["event"]["enum"]) == events.NAMES


def test_what_a_name_of_a_tenant_holds_stays_in_its_line(tmp_path):
    nasty = "a\nb\x85c\u2028d\udcffe"
    EventLog(tmp_path).record("instance.failed", nasty)
    assert recorded(tmp_path) == [nasty]


def test_the_log_is_bounded_and_the_oldest_goes(tmp_path):
    log = EventLog(tmp_path, limit=2000)
    for number in range(200):
        log.record("apply.done", str(number))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert set(files) <= {"events.jsonl", "events.jsonl.1", "events.jsonl.2", "events.jsonl.3"}
    assert len(files) >= 3
    assert all(path.stat().st_size < 2300 for path in tmp_path.iterdir())
    found = recorded(tmp_path)
    assert found == [str(number) for number in range(200 - len(found), 200)]
    assert [event["message"] for event in event_reader.last(tmp_path, 30)] == found[-30:]


def test_a_torn_line_costs_only_itself(tmp_path):
    log = EventLog(tmp_path)
    log.record("apply.done", "first")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"time": "2026-11-22T00:00:00.000Z", "eve')
    assert recorded(tmp_path) == ["first"]
    log.record("apply.done", "second")
    assert recorded(tmp_path) == ["first", "second"]
    (tmp_path / "events.jsonl").write_bytes(b'null\n[]\n"x"\n{}\n{"time": 3}\n\xff\n')
    assert recorded(tmp_path) == []


def test_several_programs_write_at_once(tmp_path):
    """Processes, with rotations among them: no line is lost or torn."""
    children = []
    for child in range(4):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                log = EventLog(tmp_path, limit=30_000)
                for number in range(200):
                    log.record("apply.done", f"{child} {number}")
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    found = recorded(tmp_path)
    assert len(found) == len(set(found)) == 800
    for child in range(4):
        # within one file in the order in which they were written
        numbers = [int(one.split()[1]) for one in found if one.startswith(f"{child} ")]
        assert sorted(numbers) == list(range(200))


@pytest.fixture
def small_disk(tmp_path):
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["/bin/umount", tmp_path], check=True)


def fill(file):
    while True:
        file.write(b"x" * 4096)


def test_a_full_disk_stops_nothing_and_is_said_once(small_disk, caplog):
    log = EventLog(small_disk)
    log.record("apply.done", "before")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        fill(file)
    with caplog.at_level(logging.WARNING):
        for _ in range(200):
            log.record("apply.done", "x" * 100)
    complaints = [one for one in caplog.records if "events are not recorded" in one.message]
    assert len(complaints) == 1
    filler.unlink()
    log.record("apply.done", "after")
    found = recorded(small_disk)
    assert (found[0], found[-1]) == ("before", "after")


def test_a_log_that_is_no_file_of_ours_is_not_written_to(tmp_path, caplog):
    (tmp_path / "events.jsonl").symlink_to("/etc/passwd")
    before = Path("/etc/passwd").read_bytes()
    EventLog(tmp_path).record("apply.done", "x")
    assert Path("/etc/passwd").read_bytes() == before
    assert "not recorded" in caplog.text


def test_following_goes_on_over_rotations(tmp_path):
    follower = event_reader.Follower(tmp_path)
    log = EventLog(tmp_path, limit=2000)
    try:
        assert list(follower.past()) == []
        found = []
        for number in range(200):
            log.record("apply.done", str(number))
            if number % 25 == 0:  # over several rotations at once, but not all files
                found += [event["message"] for event in follower.new()]
        found += [event["message"] for event in follower.new()]
        assert found == [str(number) for number in range(200)]
    finally:
        follower.close()


def test_who_is_concerned(tmp_path):
    log = EventLog(tmp_path)
    log.record("apply.done", "node")
    log.record("drift.found", "one", partition="slappart1", partitions=["slappart1"])
    log.record("drift.found", "all", partitions=["slappart0", "slappart1"])
    log.record("drift.found", "other", partition="slappart10", partitions=["slappart10"])
    assert [event["message"] for event in event_reader.last(tmp_path, 9, "slappart1")] == ["one", "all"]
    assert [event["message"] for event in event_reader.last(tmp_path, 1, "slappart1")] == ["all"]


# --- the verb


@pytest.fixture
def node(node_config):
    made = node_config(2, interface="lo")
    made.log.mkdir()
    return made


def test_the_verb_shows_and_chooses(node, command):
    log = EventLog(node.log)
    log.record("node.started", "up")
    log.record("drift.found", "tap/slaptap1: missing", partition="slappart1", resource="tap/slaptap1")
    log.record("drift.found", "gone \x1b[31m", partition="slappart9")
    shown = command("events", "-c", node.path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert [line.split("  ")[1:3] for line in shown.stdout.splitlines()] == [
        ["node.started", "-"],
        ["drift.found", "slappart1"],
        ["drift.found", "slappart9"],
    ]
    assert "\x1b" not in shown.stdout
    values = [json.loads(line) for line in command("--json", "events", "-c", node.path).stdout.splitlines()]
    assert [validate(value)["message"] for value in values] == [
        "up",
        "tap/slaptap1: missing",
        "gone \x1b[31m",
    ]
    one = command("events", "--json", "--partition", "slappart1", "-c", node.path)
    assert validate(json.loads(one.stdout))["resource"] == "tap/slaptap1"
    # a partition that is no more
    assert command("events", "--partition", "slappart9", "-c", node.path).stdout.count("\n") == 1
    later = command("events", "--from", "2999-01-01T00:00:00Z", "-c", node.path)
    assert (later.returncode, later.stdout) == (0, "")


def test_the_verb_refuses_what_it_cannot_answer(node, command):
    unknown = command("events", "--partition", "slappart7", "--json", "-c", node.path)
    assert unknown.returncode == 1
    assert validate(json.loads(unknown.stdout))["error"]["code"] == "events.unknown_partition"
    assert command("events", "--from", "some day", "-c", node.path).returncode == 64
    empty = command("events", "--partition", "slappart0", "-c", node.path)
    assert (empty.returncode, empty.stdout, empty.stderr) == (0, "", "")


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_following_shows_the_last_ones_and_what_comes_and_ends_quietly(node, command, form):
    log = EventLog(node.log, limit=3000)
    for number in range(15):
        log.record("apply.done", f"old {number}")
    started = command.start("events", "-f", "-c", node.path, *form)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(iter(started.stdout.readline, "")))
    reader.start()
    try:
        wait(lambda: len(lines) >= 10)
        for number in range(50):  # over a rotation
            log.record("apply.done", f"new {number}")
        wait(lambda: len(lines) >= 60)
    finally:
        started.send_signal(signal.SIGINT)
        status = started.wait(20)
        reader.join(20)
        with started.stdout, started.stderr:
            said = started.stderr.read()
    assert (status, said) == (0, "")
    words = [f"old {number}" for number in range(5, 15)] + [f"new {number}" for number in range(50)]
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))
    if form:
        assert [validate(json.loads(line))["message"] for line in lines] == words


def wait(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
