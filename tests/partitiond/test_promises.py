"""Promises of real partitions, run by their users: what fails is found, told once, and shown; plugins are slapos.core's own."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from promise_scene import PYTHON, RELEASE, PromiseScene, slapgrid_launcher

from accounting import Ledger
from partitiond import alone, metrics, present, promise_book, promises, status
from partitiond.promise_book import Page, Standing, stand
from partitiond.promise_results import PromiseResult


@pytest.fixture(scope="module")
def standing(module_node_config):
    made = PromiseScene(module_node_config)
    yield made
    made.context.meters.close()


@pytest.fixture
def scene(standing):
    """The node, with nothing in its partitions and nobody knowing of anything."""
    standing.clear()
    return standing


# --- at processing ----------------------------------------------------------------------------------------------------


def test_a_program_is_its_exit_status_and_what_it_says(scene):
    scene.promise("good", "echo all is well")
    scene.promise("bad", "echo no answer; echo from the port >&2; exit 3")
    scene.promise("not-executable", "exit 1", mode=0o644)
    assert scene.check() == {"bad": "no answer\nfrom the port"}
    result = scene.result("good")
    path = scene.partition().path / "etc" / "promise" / "good"
    assert (result["title"], result["name"], result["path"]) == ("good", "good", str(path))
    assert {**result["result"], "date": ""} == {
        "type": "Test Result",
        "failed": False,
        "date": "",
        "message": "all is well",
    }
    assert time.strptime(result["result"]["date"], "%Y-%m-%dT%H:%M:%S+0000")
    assert scene.result("bad")["result"]["failed"]
    assert not scene.file("result", "not-executable.status.json").exists()


def test_the_message_for_the_master_is_that_of_slapgrid(scene):
    scene.promise("b", "echo second; exit 1")
    scene.promise("a", "echo first; exit 1")
    outcome = promises.check(scene.context, scene.partition(), RELEASE)
    assert outcome.message == "Promise 'a' failed with output: first"
    assert promises.PromiseOutcome().message == ""


def test_it_runs_as_its_user_in_its_namespaces_with_a_clean_environment(scene):
    scene.promise(
        "who",
        "id -u; id -G; pwd; umask; grep NoNewPrivs /proc/self/status; env | sort; readlink /proc/self/ns/mnt; exit 1",
    )
    item = scene.partition()
    lines = scene.check()["who"].splitlines()
    assert lines[0] == str(item.uid)
    assert str(item.gid) in lines[1].split()
    assert "0" not in lines[1].split()
    assert lines[2:4] == [str(item.path), "0027"]
    assert lines[4].split() == ["NoNewPrivs:", "1"]
    names = {line.partition("=")[0] for line in lines[5:-1]}
    wanted = {
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "PATH",
        "LANG",
        "PYTHONNOUSERSITE",
        "SLAPGRID_INSTANCE_ROOT",
    }
    assert names - {"PWD", "_", "SHLVL", "OLDPWD"} == wanted
    assert lines[-1] != str(Path("/proc/self/ns/mnt").readlink())


def test_a_plugin(scene):
    scene.plugin("one.py", "self.logger.info('port %s', self.getConfig('port'))", port="80")
    scene.plugin("two.py", "self.logger.error('down')")
    scene.plugin("three.py", "raise RuntimeError('broken inside')")
    assert scene.check() == {"three.py": "broken inside", "two.py": "down"}
    assert scene.result("one")["result"]["message"] == "port 80"
    assert scene.result("two")["result"]["type"] == "Test Result"
    cache = json.loads(scene.file("cache", "one").read_text())
    assert (cache["is_tested"], cache["is_anomaly_detected"], cache["periodicity"]) == (True, True, 2)
    assert "port 80" in scene.file("log", "one.log").read_text()


def test_a_plugin_is_told_what_slapgrid_tells(scene):
    keys = ["master-url", "partition-id", "computer-id", "partition-cert", "promise-timeout"]
    scene.plugin(
        "told.py",
        f"self.logger.error('%s', [self.getConfig(k) for k in {keys!r}] + [self.getPartitionFolder()])",
    )
    config = scene.context.config
    assert scene.check()["told.py"] == str(
        [config.master_url, "slappart0", config.computer_id, None, 20, str(scene.partition().path)]
    )


_NONE = {
    "a": ("import no_such_thing", "no_such_thing"),
    "b": ("x = 1", "Class RunPromise not found"),
    "c": ("class RunPromise:\n  pass", "IPromise"),
    "d": ("(", "SyntaxError"),
    "e": ("import os; os._exit(0)", "Error: No output returned by the promise"),
    "f": ("import os; os.kill(os.getpid(), 9)", "Error: No output returned by the promise"),
    "0": ("", "is not valid"),
}


def test_plugins_that_are_none_fail_each_for_itself(scene):
    scene.plugin("zz.py")
    head = (scene.partition().path / "etc/plugin/zz.py").read_text().partition("extra_config_dict")[0]
    for name, (text, _) in _NONE.items():
        (scene.partition().path / "etc/plugin" / f"{name}.py").write_text(f"{head}\n{text}\n")
    failed = scene.check()
    assert failed.keys() == {f"{name}.py" for name in _NONE}
    for name, (_, why) in _NONE.items():
        assert why in failed[f"{name}.py"]


def test_the_interpreter_is_that_of_the_release(scene):
    place = promises.buildout.software_directory(scene.context.config, RELEASE) / "bin" / "buildout"
    assert promises.interpreter(scene.context, RELEASE) == PYTHON
    try:
        place.write_text('#!/bin/sh\nexec "/very long/python3" "$0"\n')
        assert promises.interpreter(scene.context, RELEASE) == "/very long/python3"
        scene.plugin("one.py")
        assert "/very long/python3: No such file" in scene.check()["one.py"]
    finally:
        place.write_text(f"#!{PYTHON}\n")
    assert promises.interpreter(scene.context, "http://none/").endswith("python3")


def test_nobody_who_has_no_promises_costs_a_process(scene, monkeypatch):
    monkeypatch.setattr(promises, "PromiseServer", None)
    assert scene.check() == {}
    assert scene.run_pass().failures == []


def test_slapgrid_finds_the_same(scene):
    """Its own launcher over the same partition: the same failures, the same files, the same words in them."""
    scene.promise("good", "echo fine")
    scene.promise("bad", "echo nothing there; exit 1")
    scene.plugin("up.py", "self.logger.info('up')")
    scene.plugin("down.py", "self.logger.error('down')")
    scene.plugin("untested.py", "self.logger.error('never seen')", init="self.setTestLess()")
    theirs = slapgrid_launcher(scene)
    files = {path.name: _stable(path) for path in scene.file("result").iterdir()}
    caches = {path.name: set(json.loads(path.read_text())) for path in scene.file("cache").iterdir()}
    logs = {path.name for path in scene.file("log").iterdir()}
    # as it has just made .slapgrid, that is root's
    shutil.rmtree(scene.file("result").parent)
    ours = scene.check()
    assert ours == {"bad": "nothing there", "down.py": "down"}
    assert theirs.startswith("Promise 'down.py' failed with output: down")
    assert {path.name: _stable(path) for path in scene.file("result").iterdir()} == files
    assert {path.name: set(json.loads(path.read_text())) for path in scene.file("cache").iterdir()} == caches
    assert {path.name for path in scene.file("log").iterdir()} == logs


def _stable(path):
    found = json.loads(path.read_text())
    found["result"].pop("date")
    found.pop("execution-time")
    return found


# --- in between -------------------------------------------------------------------------------------------------------


def test_a_program_that_fails_three_times_is_told_of_once_and_so_is_that_it_is_good_again(scene):
    scene.promise("flag", 'test -e flag || { echo "no flag"; exit 1; }')
    scene.run_pass()
    scene.run_pass()
    assert (scene.standings(), scene.master.told) == ({"promise/flag": False}, [])
    scene.run_pass()
    error = ("error", "slappart0", "Promise 'flag' failed with output: no flag")
    assert (scene.standings(), scene.master.told) == ({"promise/flag": True}, [error])
    scene.run_pass()
    assert scene.master.told == [error]
    scene.file("..", "..", "flag").write_text("")
    scene.run_pass()
    scene.run_pass()
    assert scene.master.told == [error, ("started", "slappart0")]
    assert scene.events() == [
        ("promise.failed", "promise/slappart0/flag"),
        ("promise.ok", "promise/slappart0/flag"),
    ]


def test_a_plugin_bangs_when_it_finds_an_anomaly_and_not_at_each_pass(scene):
    scene.plugin("mad.py", "self.logger.error('mad')")
    scene.plugin("calm.py", "self.logger.error('calm')", init="self.allowBang(False)", number=1)
    scene.run_pass()
    scene.run_pass()
    assert sorted(scene.master.told) == [
        ("bang", "slappart0", "Promise mad is failing"),
        ("error", "slappart0", "Promise 'mad.py' failed with output: mad"),
        ("error", "slappart1", "Promise 'calm.py' failed with output: calm"),
    ]
    scene.page(0).bang_after = 0.0
    scene.run_pass()
    assert scene.page(0).bangs == 2
    assert [words[0] for words in scene.master.told].count("bang") == 2


def test_what_the_master_did_not_take_is_told_again(scene):
    scene.promise("down", "exit 1")
    scene.master.down = True
    for _ in range(3):
        scene.run_pass()
    assert scene.standings() == {"promise/down": True}
    scene.master.down = False
    scene.run_pass()
    assert [words[0] for words in scene.master.told] == ["error"]


def test_a_daemon_that_begins_anew_tells_nothing_twice(scene):
    scene.promise("down", "exit 1")
    for _ in range(3):
        scene.run_pass()
    since = scene.page().standings["promise/down"].since
    scene.context.promises = promise_book.PromiseBook(scene.context.config.state_dir / "promises")
    assert scene.standings() == {"promise/down": True}
    scene.run_pass()
    assert [words[0] for words in scene.master.told] == ["error"]
    assert scene.page().standings["promise/down"].since == since
    assert len(scene.events()) == 1


def test_programs_that_each_make_one_pass_find_what_a_daemon_would(scene):
    scene.promise("down", "echo x >> down; exit 1")
    scene.plugin("mad.py", "open('mad', 'a').write('x'); self.logger.error('mad')", number=1)
    directory = scene.context.config.state_dir / "promises"
    content = []
    for number in range(5):
        scene.context.promises = promise_book.PromiseBook(directory)
        page = scene.context.promises.page("slappart0", "SOFTINST-0")
        for one in page.standings.values() if number in (1, 2) else ():
            one.due = 0.0
        assert alone.in_between(scene.context, frozenset(), watchdog=False).failures == []
        content.append({path.name: path.read_bytes() for path in directory.iterdir()})
    assert [words[:2] for words in scene.master.told] == [
        ("bang", "slappart1"),
        ("error", "slappart1"),
        ("error", "slappart0"),
    ]
    # it has its rhythm, and what was not due changes nothing
    assert [len((scene.partition(0).path / "down").read_text().split())] == [3]
    assert (scene.partition(1).path / "mad").read_text() == "x"
    assert content[2] == content[3] == content[4]


def test_a_time_on_disk_that_is_far_away_keeps_no_promise_from_its_turn(tmp_path):
    book = promise_book.PromiseBook(tmp_path)
    one = promise_book.Standing(True, "m", 1.0, 0.1, row=2, due=time.monotonic() + 1e9)
    book.save("slappart0", promise_book.Page("guid", {"promise/x": one}, bangs=3))
    found = promise_book.PromiseBook(tmp_path).known("slappart0")
    assert (found.standings["promise/x"].due, found.standings["promise/x"].row, found.bangs) == (0.0, 2, 3)


def test_each_has_its_own_rhythm_and_a_pass_in_which_nothing_is_due_starts_nothing(scene, monkeypatch):
    scene.promise("often", "echo x >> often")
    scene.plugin("seldom.py", "open('seldom', 'a').write('x')", init="self.setPeriodicity(60)")
    scene.plugin("blind.py", "open('blind', 'a').write('x')", init="self.setAnomalyLess()")
    scene.check()
    standings = scene.page().standings
    rhythms = {key: one.due - time.monotonic() for key, one in standings.items()}
    assert 100 < rhythms["promise/often"] <= 120
    assert 3580 < rhythms["plugin/seldom.py"] <= 3600
    standings["promise/often"].due = standings["plugin/blind.py"].due = 0.0
    scene.run_pass(later=False)
    counts = {
        name: len(scene.file("..", "..", name).read_text().split()) for name in ("often", "seldom", "blind")
    }
    assert counts == {"often": 2, "seldom": 1, "blind": 1}
    assert scene.standings() == {"promise/often": False, "plugin/seldom.py": False, "plugin/blind.py": False}
    monkeypatch.setattr(promises, "_serving", None)
    scene.page().standings["promise/often"].due = time.monotonic() + 100
    assert scene.run_pass(later=False).failures == []


def test_only_what_is_meant_to_run_is_asked(scene):
    for number, values in enumerate(
        ({"life": "stopped", "wanted": "stopped"}, {"life": "destroying", "wanted": "destroyed"})
    ):
        scene.promise("ran", "echo >> ran", number)
        scene.check(number)
        scene.change(number, **values)
    scene.run_pass()
    for number in (0, 1):
        assert (scene.partition(number).path / "ran").read_text() == "\n"
        assert scene.page(number) is None
    assert not list((scene.context.config.state_dir / "promises").iterdir())


def test_an_instance_that_failed_by_its_promises_is_due_again_as_soon_as_they_are_good(scene):
    woken = []
    scene.context.wake_instances = lambda: woken.append(1)
    scene.promise("flag", "test -e flag")
    assert scene.check()
    scene.change(0, life="failed", failures=1)
    scene.run_pass()
    assert not scene.context.promises.mended
    scene.file("..", "..", "flag").write_text("")
    scene.run_pass()
    scene.run_pass()
    assert woken == [1]
    assert scene.context.promises.mended == {"slappart0"}
    assert scene.master.told == []  # its processing will tell
    assert scene.check() == {}
    assert not scene.context.promises.mended


def test_no_anomaly_is_found_of_one_that_is_being_processed(scene):
    scene.promise("ran", "echo >> ran")
    with scene.context.promises.resting("slappart0"):
        scene.run_pass()
    assert not scene.file("..", "..", "ran").exists()
    scene.promise("ran", "echo >> ran; until test -e go; do sleep 0.02; done")
    changing = threading.Thread(target=_stop_meanwhile, args=(scene,))
    changing.start()
    scene.run_pass()
    changing.join()
    # what became of it while it ran is not what it was asked for
    assert scene.file("..", "..", "ran").exists()
    assert scene.page() is None or not scene.page().standings


def _stop_meanwhile(scene):
    deadline = time.monotonic() + 20
    while not scene.file("..", "..", "ran").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    scene.change(0, life="stopped", wanted="stopped")
    scene.file("..", "..", "go").write_text("")


def test_failures_are_incidents_a_metric_and_shown(scene):
    ledger = Ledger(scene.context.config.state_dir / "promises.sqlite")
    try:
        scene.promise("down", "echo down; exit 1")
        scene.promise("good", "echo fine", number=1)
        for _ in range(3):
            scene.run_pass()
        promises.observe(scene.context, ledger)
        assert [(row.partition, row.guid, row.kind, row.name, row.reason) for row in ledger.incidents()] == [
            ("slappart0", "SOFTINST-0", "promise", "down", "down")
        ]
        text = "".join(one.samples for one in metrics._promises(scene.context, list(scene.node.partitions)))
        assert text.splitlines() == [
            'partitiond_partition_promise_failed{partition="slappart0"} 1',
            'partitiond_partition_promise_failed{partition="slappart1"} 0',
        ]
        shown = status.partition(scene.context, "slappart0")
        (one,) = shown["promises"]
        assert (one["name"], one["kind"], one["state"], one["message"]) == (
            "down",
            "promise",
            "failed",
            "down",
        )
        assert "down failed since" in present.show(shown)
        scene.file("..", "..", "etc/promise/down").unlink()
        scene.run_pass()
        promises.observe(scene.context, ledger)
        assert not ledger.incidents()
        assert scene.events()[-1] == ("promise.ok", "promise/slappart0/down")
    finally:
        ledger.close()


# --- pure -------------------------------------------------------------------------------------------------------------


def result(**values):
    found = {
        "key": "plugin/a.py",
        "form": "anomaly",
        "failed": True,
        "message": "down",
        "seconds": 0.1,
        "row": 1,
        "periodicity": 120.0,
        "tested": True,
        "sensed": True,
        "bang": False,
    }
    return PromiseResult(**{**found, **values})


def test_a_promise_stands_since_its_state_changed():
    first = stand(result(), None, 100.0)
    assert (first.failed, first.since) == (True, 100.0)
    assert stand(result(message="still"), first, 200.0).since == 100.0
    assert stand(result(failed=False), first, 200.0).since == 200.0


def test_one_that_has_nothing_to_say_stands_as_it_did():
    before = Standing(failed=True, message="down", since=1.0, seconds=0.1)
    after = stand(result(form="none", failed=False, message=""), before, 200.0)
    assert (after.failed, after.message, after.since) == (True, "down", 1.0)


def test_a_memory_that_cannot_be_read_is_made_anew(tmp_path):
    book = promise_book.PromiseBook(tmp_path / "promises")
    book.save("slappart0", Page("g", {"plugin/a.py": Standing(True, "x", 1.0, 0.1)}))
    path = tmp_path / "promises" / "slappart0.json"
    for text in ("{", "[]", '{"guid": "g"}', '{"guid": "g", "told": 1, "broken": 0, "promises": {"a": 1}}'):
        path.write_text(text)
        assert promise_book.PromiseBook(tmp_path / "promises").known("slappart0") is None
