"""Errands done as other users: who the child is, what it has, and that it ends."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from partitiond import errands
from partitiond.errands import Answer, Errand

UID, GID = 54321, 54322


def status(key):
    return next(
        line.split()[1:]
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key)
    )


def who():
    return {
        "uids": os.getresuid(),
        "gids": os.getresgid(),
        "groups": os.getgroups(),
        "privileges": [status(key) for key in ("CapEff", "CapPrm", "CapAmb", "NoNewPrivs")],
        "threads": status("Threads"),
        "pid": os.getpid(),
    }


def only(*jobs, seconds=20.0):
    (found,) = errands.run([Errand(UID, GID, jobs, seconds)])
    return found


def test_a_child_is_its_user_and_has_nothing_of_roots():
    (answer,) = only(who)
    found = answer.value
    assert (found["uids"], found["gids"], found["groups"]) == ([UID] * 3, [GID] * 3, [])
    assert found["privileges"] == [["0000000000000000"]] * 3 + [["1"]]
    assert found["pid"] != os.getpid()


def test_no_open_file_goes_along(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")

    def look():
        # root's alone now: the user cannot even list its descriptors, so they are tried
        found = []
        for number in range(3, 256):
            try:
                found.append(os.fstat(number).st_mode & 0o170000)
            except OSError:
                continue
        return found, [os.fstat(number).st_rdev for number in range(3)]

    with secret.open(), secret.open():
        (answer,) = only(look)
    kinds, standard = answer.value
    assert kinds == [0o010000]  # the pipe to us
    assert standard == [Path(os.devnull).stat().st_rdev] * 3


def test_nobody_of_that_user_can_look_into_it():
    def look():
        return [Path(f"/proc/{os.getpid()}/environ").stat().st_uid, os.access("/proc/self/mem", os.R_OK)]

    (answer,) = only(look)
    assert answer.value == [0, False]


def test_answers_stand_where_the_jobs_do():
    def late(number):
        time.sleep(0.05 * (number % 3))
        return number

    jobs = [lambda number=number: late(number) for number in range(3 * errands.THREADS)]
    found = errands.run(
        [Errand(UID + index, GID, jobs[index:], 20.0) for index in range(2 * errands.PROCESSES)]
    )
    assert found == [
        [Answer(number) for number in range(index, len(jobs))] for index in range(2 * errands.PROCESSES)
    ]


def test_what_a_job_raises_is_told_and_harms_no_other():
    def bad():
        raise ValueError("no good")

    raised, good, untold = only(bad, lambda: "good", lambda: {1, 2})
    assert (raised, good) == (Answer(fault="ValueError: no good"), Answer("good"))
    assert "not JSON serializable" in untold.fault


@pytest.mark.parametrize("late", [lambda: time.sleep(1000), lambda: os.kill(os.getpid(), signal.SIGSTOP)])
def test_who_is_late_is_ended_and_what_was_said_counts(monkeypatch, late):
    monkeypatch.setattr(errands, "_SPARE_SECONDS", 0.0)
    slow, fast = errands.run(
        [
            Errand(UID, GID, [lambda: "said", lambda: [time.sleep(0.2), late()]], 0.5),
            Errand(UID, GID, [lambda: "done"], 20.0),
        ]
    )
    assert slow == [Answer("said"), Answer(fault="it came to no end in time, or was ended")]
    assert fast == [Answer("done")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_who_is_killed_says_nothing(number):
    def die():
        time.sleep(0.2)
        os.kill(os.getpid(), number)
        time.sleep(1000)

    first, second = only(lambda: "said", die)
    assert first == Answer("said")
    assert second.fault


def write(text):
    """Say something by whatever pipe there is, as a child that is no longer ours might."""
    for pipe in range(3, 256):
        try:
            os.fstat(pipe)
        except OSError:
            continue
        os.write(pipe, text)


@pytest.mark.parametrize(
    "text",
    [
        b"nonsense\n",
        b"[" * 3000 + b"\n",
        b'{"job": 7, "value": 1, "fault": ""}\n',
        b'{"job": -1, "value": 1, "fault": ""}\n',
        b'{"job": 0, "value": 1, "fault": 1}\n',
        b'{"job": [], "value": 1, "fault": ""}\n',
        b"[]\n1\nnull\n\xff\xfe\n",
    ],
)
def test_what_is_no_answer_is_passed_over(text):
    def job():
        write(text)
        return "good"

    assert only(job) == [Answer("good")]


def test_who_says_too_much_is_ended():
    def talk():
        while True:
            write(b"x" * 4096)

    assert only(talk)[0].fault


def test_who_goes_on_after_it_hung_up_is_ended():
    def job():
        for number in range(3, 256):
            with contextlib.suppress(OSError):
                os.close(number)
        time.sleep(1000)

    # not waited for: the test would not come to its end
    assert only(job, seconds=1000.0)[0].fault


def test_children_that_nobody_may_wait_for():
    """As under a caller that ignores SIGCHLD: the kernel forgets them at once."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert only(lambda: "done") == [Answer("done")]
    finally:
        signal.signal(signal.SIGCHLD, before)
