"""What a build says into a log of root's is bounded, while it runs and after it."""

import subprocess
import time
from types import SimpleNamespace

import pytest

from partitiond import buildout, instance_build

LIMIT = 256 * 1024


def size(path):
    return sum(one.stat().st_size for one in path.parent.iterdir())


def say(code, log):
    return subprocess.run(["/bin/sh", "-c", code], stdout=log, stderr=log, check=False, timeout=60).returncode


@pytest.fixture
def path(tmp_path):
    (tmp_path / "log").mkdir()
    return tmp_path / "log" / "buildout.log"


def test_what_is_said_is_all_there(path):
    with buildout.Log(path, "configuring it") as log:
        assert say("echo one; echo two >&2; exit 3", log) == 3
    head, *rest = path.read_text().splitlines()
    assert head.endswith("configuring it")
    assert rest == ["one", "two"]


def test_one_that_says_much_is_bounded_and_its_last_words_are_there(path):
    with buildout.Log(path, "configuring it", LIMIT) as log:
        assert say("head -c 2000000 /dev/zero | tr '\\0' x; echo; echo why it failed", log) == 0
    assert size(path) <= 2 * LIMIT + 1024
    assert path.read_text().endswith("\nwhy it failed\n")


def test_who_is_left_running_is_listened_to_no_longer(path):
    with buildout.Log(path, "configuring it", LIMIT) as log:
        assert say("echo begun; setsid sh -c 'while echo more; do sleep 0.01; done' & sleep 0.1", log) == 0
    before = size(path)
    time.sleep(0.3)
    assert size(path) == before, "and it has ended: the guard of the tests looks for it"


def test_where_nothing_can_be_kept_the_build_goes_on(path, monkeypatch, caplog):
    def full(_log):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(buildout.Log, "_put_aside", full)
    with buildout.Log(path, "configuring it", LIMIT) as log:
        assert say("head -c 2000000 /dev/zero", log) == 0
    assert size(path) <= LIMIT + 1024
    assert [one.message for one in caplog.records if "No space left" in one.message]


def test_one_that_takes_long_is_an_open_case():
    context = SimpleNamespace(building={"slappart1": time.time(), "slappart2": time.time() - 1000})
    told = instance_build.trouble(context)
    assert "slappart2 has been configuring since" in told
    assert "slappart1" not in told
    del context.building["slappart2"]
    assert instance_build.trouble(context) == ""
