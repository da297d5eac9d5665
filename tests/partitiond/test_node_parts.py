"""The small parts: lock, state, destroy guard, directories, configuration of supervisord, human text, schemas."""

import configparser
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from json_schemas import schema
from jsonschema import Draft202012Validator
from supervisor.options import ServerOptions

from partitiond import buildout, destroy_guard, directories, lock, present, software_build, teardown
from partitiond.config_software import SoftwareKeys
from partitiond.directories import DirectorySpec
from partitiond.errors import PartitiondError, sentence
from partitiond.state import InstanceState, SoftwareState, Store
from partitiond.supervision import Group, Program
from slap_client.documents import ComputerDocument

ROOT = Path(__file__).resolve().parents[2]

# --- lock -------------------------------------------------------------------------------------------------------------


def test_one_at_a_time_and_the_holder_is_named(tmp_path):
    with (
        lock.exclusive(tmp_path / "new" / "state", "apply"),
        pytest.raises(PartitiondError) as caught,
        lock.exclusive(tmp_path / "new" / "state", "teardown"),
    ):
        pass
    assert caught.value.code == "node.busy"
    assert f"partitiond apply (process {os.getpid()})" in str(caught.value)
    assert caught.value.retryable
    with lock.exclusive(tmp_path / "new" / "state", "plan"):
        pass


def test_who_waits_gets_it(tmp_path):
    got = []

    def second():
        with lock.exclusive(tmp_path, "second", wait=20):
            got.append("second")

    with lock.exclusive(tmp_path, "first"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.15)
        got.append("first")
    thread.join(20)
    assert got == ["first", "second"]


def test_a_killed_holder_holds_nothing(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import pathlib, time\nfrom partitiond import lock\n"
        f"with lock.exclusive(pathlib.Path({str(tmp_path)!r}), 'held'):\n    print('held', flush=True); time.sleep(1000)\n"
    )
    holder = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PartitiondError), lock.exclusive(tmp_path, "other"):
            pass
        holder.kill()
    with lock.exclusive(tmp_path, "other") as cut_off:
        assert cut_off
    with lock.exclusive(tmp_path, "another") as cut_off:
        assert not cut_off


def test_who_fails_was_cut_off_too(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.exclusive(tmp_path, "a long name for a short life"):
        raise ZeroDivisionError
    with lock.exclusive(tmp_path, "next") as cut_off:
        assert cut_off
        assert (tmp_path / "lock").read_text() == f"partitiond next (process {os.getpid()})\n"


def test_a_lock_whose_file_was_removed_is_not_two_locks(tmp_path):
    """As ``teardown --purge`` does while it holds it: who waited must not hold the removed file alone."""
    inside, most = [], []

    def waiter():
        with lock.exclusive(tmp_path, "waiter", wait=20):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()

    with lock.exclusive(tmp_path, "teardown"):
        threads = [threading.Thread(target=waiter)]
        threads[0].start()
        time.sleep(0.15)
        (tmp_path / "lock").unlink()
    threads += [threading.Thread(target=waiter) for _ in range(3)]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1, 1, 1, 1]


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def test_states_come_back_as_they_were(store):
    one = InstanceState(
        "slappart1", "failed", "started", "SOFTINST-1", "http://r", "t", "17", 3.5, 2, 4.0, "no", False, True
    )
    store.save_instance(one)
    store.save_instance(InstanceState("slappart2", "started"))
    assert store.instance("slappart1") == one
    assert store.partitions() == ["slappart1", "slappart2"]
    release = SoftwareState("http://r", True, False, 1, 2.0, "e")
    store.save_software(release)
    assert store.softwares() == [release]
    store.forget_software("http://r")
    assert store.softwares() == []


def test_a_free_partition_is_forgotten(store, tmp_path):
    store.save_instance(InstanceState("slappart1", "started"))
    store.save_instance(InstanceState("slappart1", "free"))
    assert store.instance("slappart1") == InstanceState("slappart1")
    assert list((tmp_path / "instances").iterdir()) == []


GOOD_STATE = json.dumps(dataclasses.asdict(InstanceState("slappart1", "started")))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"partition": 7}',
        '{"partition": "slappart1", "life": "happy"}',
        '{"partition": "slappart1", "failures": "many"}',
        '{"partition": "slappart1", "error": []}',
        GOOD_STATE[:-10],
        "\udcff",
    ],
)
def test_a_damaged_state_is_named(store, tmp_path, text):
    path = tmp_path / "instances" / "slappart1.json"
    path.parent.mkdir()
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    store.save_instance(InstanceState("slappart2", "stopped", "stopped"))
    states, damaged = store.readable()
    assert (set(states), set(damaged), store.partitions()) == (
        {"slappart2"},
        {"slappart1"},
        ["slappart1", "slappart2"],
    )
    assert damaged["slappart1"].code == "state.damaged"
    assert damaged["slappart1"].resource == str(path)
    assert damaged["slappart1"].hint
    # what is stopped has no programs that could be started
    assert store.to_run() == {"slappart1"}
    store.make_due("slappart1")
    assert path.read_bytes() == text.encode("utf-8", "surrogateescape")


def test_a_state_of_a_later_version_can_be_read(store, tmp_path):
    path = tmp_path / "instances" / "slappart1.json"
    path.parent.mkdir()
    path.write_text(GOOD_STATE[:-1] + ', "new_thing": 1}')
    assert store.instance("slappart1") == InstanceState("slappart1", "started")


# --- destroy guard ----------------------------------------------------------------------------------------------------


def names(*numbers):
    return frozenset(f"slappart{number}" for number in numbers)


@pytest.mark.parametrize(
    ("busy", "explicit", "dropped", "previous", "held"),
    [
        # explicit single destroys do not wait
        (names(*range(10)), names(1), names(), names(), names()),
        (names(*range(10)), names(1, 2), names(), names(), names()),
        (names(*range(20)), names(1, 2, 3, 4), names(), names(), names()),
        # more than max(2, 20 %) does
        (names(*range(10)), names(1, 2, 3), names(), names(), names(1, 2, 3)),
        (names(*range(20)), names(1, 2, 3, 4, 5), names(), names(), names(1, 2, 3, 4, 5)),
        (names(0, 1, 2), names(0, 1, 2), names(), names(), names(0, 1, 2)),
        # the second equal answer is believed
        (names(*range(10)), names(1, 2, 3), names(), names(1, 2, 3), names()),
        # one that is not equal is not
        (names(*range(10)), names(1, 2, 3, 4), names(), names(1, 2, 3), names(1, 2, 3, 4)),
        (names(*range(10)), names(1, 2, 3), names(), names(1, 2, 3, 4), names(1, 2, 3)),
        # unless the first was half carried out
        (names(*range(3, 13)), names(3, 4, 5, 6), names(), names(1, 2, 3, 4, 5, 6), names()),
        # an instance that is only not listed any more always waits for a second answer
        (names(*range(10)), names(), names(1), names(), names(1)),
        (names(*range(10)), names(), names(1), names(1), names()),
        (names(*range(10)), names(2), names(1), names(), names(1)),
        # what is not busy does not count
        (names(1), names(2, 3, 4, 5), names(6, 7), names(), names()),
        (names(), names(1, 2, 3), names(), names(), names()),
    ],
)
def test_the_guard(busy, explicit, dropped, previous, held):
    assert destroy_guard.held(busy, explicit, dropped, previous) == held


def answer(destroyed=(), free=()):
    everything = {*destroyed, *free}
    entries = [
        SimpleNamespace(partition_id=name, destroy_requested=name in destroyed, free=name in free)
        for name in sorted(everything)
    ]
    return SimpleNamespace(partitions=entries)


def test_the_guard_remembers_one_answer_only(tmp_path):
    file, busy, mass = tmp_path / "guard.json", names(*range(10)), answer(destroyed=names(1, 2, 3))
    assert destroy_guard.decide(file, busy, mass) == names(1, 2, 3)
    assert destroy_guard.decide(file, busy, answer()) == names()
    assert destroy_guard.decide(file, busy, mass) == names(1, 2, 3)
    assert destroy_guard.decide(file, busy, mass) == names()


def releases(gone, kept=()):
    entries = [SimpleNamespace(url=url, requested_state="destroyed") for url in gone]
    entries += [SimpleNamespace(url=url, requested_state="available") for url in kept]
    return ComputerDocument("COMP-1", (), tuple(entries), (), ())


def test_releases_are_held_likewise_and_it_is_told(tmp_path):
    events = []
    built = [SoftwareState(f"http://x/{number}", available=True) for number in range(10)]
    context = SimpleNamespace(
        config=SimpleNamespace(state_dir=tmp_path, destroy_guard=True),
        store=SimpleNamespace(softwares=lambda: built, readable_softwares=lambda: (built, {})),
        events=SimpleNamespace(record=lambda event, _, **more: events.append((event, more["names"]))),
    )
    urls = [state.url for state in built]
    one = releases(urls[:2], urls[2:])
    assert destroy_guard.spare_software(context, one) == (one, [])
    many = releases(urls[:3], urls[3:])
    document, failures = destroy_guard.spare_software(context, many)
    assert [entry.url for entry in document.software] == urls[3:]
    assert [(url, error.code) for url, error in failures] == [(url, "software.held") for url in urls[:3]]
    assert events == [("destroy.held", urls[:3])]
    assert destroy_guard.spare_software(context, many) == (many, [])
    assert destroy_guard.spare_software(context, releases([], urls[:3]))[1] == []
    context.config.destroy_guard = False
    assert destroy_guard.spare_software(context, many) == (many, [])


@pytest.mark.parametrize("content", [b"", b"{", b"7", b"[[]]", b'[{"a": 1}]', b"\xff"])
def test_a_damaged_memory_holds_more_and_not_less(tmp_path, content):
    file = tmp_path / "guard.json"
    file.write_bytes(content)
    assert destroy_guard.decide(file, names(*range(10)), answer(destroyed=names(1, 2, 3))) == names(1, 2, 3)


def test_a_quiet_answer_writes_nothing(tmp_path):
    destroy_guard.decide(tmp_path / "guard.json", names(1), answer())
    assert list(tmp_path.iterdir()) == []


# --- directories ------------------------------------------------------------------------------------------------------

NUMBERS = {"root": (0, 0), "slapuser0": (5000, 5001)}


def test_directories_are_made_and_kept(tmp_path):
    desired = [
        DirectorySpec(tmp_path / "a" / "i", "root", "root", 0o755),
        DirectorySpec(tmp_path / "a" / "i" / "p", "slapuser0", "slapuser0", 0o750, "slappart0"),
    ]
    operations = directories.plan(desired, NUMBERS)
    assert [(one.action, one.reason, one.partition) for one in operations] == [
        ("create", "missing", None),
        ("create", "missing", "slappart0"),
    ]
    directories.apply(operations, NUMBERS)
    assert directories.plan(desired, NUMBERS) == ()
    (tmp_path / "a" / "i" / "p").chmod(0o777)
    (operation,) = directories.plan(desired, NUMBERS)
    assert (operation.action, operation.reason) == ("change", "is uid 5000, gid 5001, mode 0777")
    directories.apply([operation], NUMBERS)
    assert directories.plan(desired, NUMBERS) == ()


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_stands_in_the_way_is_not_replaced(tmp_path, kind):
    path = tmp_path / "p"
    if kind == "file":
        path.write_bytes(b"x")
    else:
        path.symlink_to(tmp_path if kind == "link" else tmp_path / "nothing")
    with pytest.raises(PartitiondError) as caught:
        directories.plan([DirectorySpec(path, "root", "root", 0o755)], NUMBERS)
    assert caught.value.code == "directory.in_the_way"
    assert caught.value.resource == str(path)


def test_a_link_that_comes_between_plan_and_apply_is_not_followed(tmp_path):
    (tmp_path / "else").mkdir(mode=0o700)
    operations = directories.plan([DirectorySpec(tmp_path / "p", "slapuser0", "slapuser0", 0o777)], NUMBERS)
    (tmp_path / "p").symlink_to(tmp_path / "else")
    with pytest.raises(OSError, match="p"):
        directories.apply(operations, NUMBERS)
    found = (tmp_path / "else").stat()
    assert (found.st_uid, found.st_mode & 0o777) == (0, 0o700)


def test_what_another_user_has_filled_does_not_become_roots(tmp_path):
    path = tmp_path / "i"
    path.mkdir()
    os.chown(path, 65534, 65534)
    spec = DirectorySpec(path, "root", "root", 0o755)
    operations = directories.plan([spec], NUMBERS)
    (path / "etc").mkdir()
    with pytest.raises(PartitiondError) as caught:
        directories.apply(operations, NUMBERS)
    assert caught.value.code == "directory.foreign"
    assert path.stat().st_uid == 65534
    with pytest.raises(PartitiondError) as caught:
        directories.plan([spec], NUMBERS)
    assert (caught.value.code, caught.value.resource) == ("directory.foreign", str(path))
    assert "uid 65534" in str(caught.value)
    (path / "etc").rmdir()
    directories.apply(operations, NUMBERS)
    assert directories.plan([spec], NUMBERS) == ()


# --- supervisord --------------------------------------------------------------------------------------------------------


def group(*programs, directory="/srv/i/slappart0", name="slappart0"):
    return Group(name, "daemon", 1, 1, Path(directory), Path("/srv/log/slappart0"), programs)


def test_a_group_reads_back_as_it_was_meant(tmp_path):
    """By supervisord's own parser: a % is text and no expansion."""
    made = group(
        Program("web", "web", "/srv/i/slappart0/etc/run/web --format %h"),
        Program("db", "db-on-watch", "/srv/i/slappart0/etc/service/db", restart=True),
    )
    parsed = configparser.RawConfigParser()
    parsed.read_string(made.render())
    assert parsed["group:slappart0"]["programs"] == "slappart0_web,slappart0_db"
    assert parsed["program:slappart0_web"]["command"] == "/srv/i/slappart0/etc/run/web --format %%h"
    configuration = tmp_path / "supervisord.conf"
    configuration.write_text(
        "[supervisord]\nlogfile=/dev/null\n" + made.render().replace("/srv/log", str(tmp_path))
    )
    (tmp_path / "slappart0").mkdir()
    (found,) = ServerOptions().read_config(str(configuration)).process_group_configs
    web, db = found.process_configs
    assert (web.command, web.autostart, web.autorestart) == (
        "/srv/i/slappart0/etc/run/web --format %h",
        False,
        False,
    )
    assert (db.name, db.uid, db.startretries) == ("db-on-watch", 1, 1000)
    assert web.stdout_logfile == str(tmp_path / "slappart0" / "web.log")
    assert web.environment["HOME"] == "/srv/i/slappart0"


@pytest.mark.parametrize(
    "bad",
    ["", ".hidden", "-x", "a b", "a/b", "a%b", "a\nuser=0", "a]", "a,b", "a:b", "a;b", "ä", "x" * 101],
)
def test_a_name_that_would_be_configuration_is_refused(bad):
    for program in (Program(bad, "x", "/x"), Program("x", bad, "/x")):
        with pytest.raises(PartitiondError) as caught:
            group(program).render()
        assert caught.value.code == "supervisor.name"
    with pytest.raises(PartitiondError):
        group(Program("x", "x", "/x"), name=bad if bad != ".hidden" else "a\nb").render()


@pytest.mark.parametrize("bad", ["/x\nuser=root", "/x\r", "/x ; comment", "/x\x1b[31m", "/x\u2028y"])
def test_a_command_that_would_end_its_line_is_refused(bad):
    with pytest.raises(PartitiondError):
        group(Program("x", "x", bad)).render()
    with pytest.raises(PartitiondError):
        group(Program("x", "x", "/x"), directory=bad).render()


# --- software -----------------------------------------------------------------------------------------------------------


def test_a_release_that_became_a_link_is_removed_as_a_link(tmp_path):
    """The software user owns the directory of releases; what its builds put there is not followed."""
    config = SimpleNamespace(software_root=tmp_path / "software", log_dir=tmp_path)
    config.software_root.mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"x")
    directory = buildout.software_directory(config, "http://r")
    directory.symlink_to(tmp_path / "precious")
    software_build.remove_software(config, "http://r")
    assert not directory.is_symlink()
    assert (tmp_path / "precious" / "file").exists()
    software_build.remove_software(config, "http://r")


def test_a_build_does_not_take_what_a_link_points_to(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    config = SimpleNamespace(
        software_root=tmp_path / "software",
        software_user="daemon",
        log_dir=tmp_path,
        offline_builds=False,
        software=SoftwareKeys(),
        shared_part_list="",
    )
    config.software_root.mkdir()
    buildout.software_directory(config, "http://r").symlink_to(precious)
    with pytest.raises(PartitiondError) as caught:
        software_build.build_software(config, "http://r", stop=threading.Event())
    assert caught.value.code == "files.not_a_directory"
    assert precious.stat().st_uid == 0
    assert list(precious.iterdir()) == []


def test_a_release_is_removed_with_all_that_is_in_it(tmp_path):
    config = SimpleNamespace(software_root=tmp_path / "software", log_dir=tmp_path)
    directory = buildout.software_directory(config, "http://r")
    (directory / "parts" / "x").mkdir(parents=True)
    (directory / buildout.COMPLETED).write_bytes(b"")
    assert buildout.completed(config, "http://r")
    software_build.remove_software(config, "http://r")
    assert list(config.software_root.iterdir()) == []


# --- text and schemas -----------------------------------------------------------------------------------------------------


def test_what_tenants_wrote_does_not_steer_the_terminal():
    assert present.printable("red \x1b[31m\a\nnext\tline ä") == "red \\x1b[31m\\x07\nnext\tline ä"
    assert "\x1b" not in present.table(("name",), [("a\x1b]0;title\a",)])


def test_a_table_puts_numbers_to_the_right():
    assert present.table(("name", "count"), [("a", 1), ("bbbbbb", 22), ("c", None)]).splitlines() == [
        "name    count",
        "a           1",
        "bbbbbb     22",
        "c           -",
    ]


@pytest.mark.parametrize(
    "verb",
    ["plan", "status", "show", "usage", "tunnel-list", "tunnel-check", "apply", "teardown", "sync", "error"],
)
def test_the_schemas_are_schemas(verb):
    found = schema(verb)
    Draft202012Validator.check_schema(found)
    assert found["$id"] == f"partitiond/{verb}/1"
    assert found["properties"]["schema"] == {"const": found["$id"]}


def test_an_error_in_one_line():
    error = PartitiondError("a.b", "is bad", resource="slappart1")
    assert sentence(error) == "[a.b] slappart1: is bad"
    assert sentence(ValueError("x")) == "ValueError: x"


def test_purging_stays_out_of_what_a_link_points_to(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"x")
    (tmp_path / "i").symlink_to(tmp_path / "precious")
    for name in ("s", "l", "r", "st"):
        (tmp_path / name).mkdir()
    config = SimpleNamespace(
        instance_root=tmp_path / "i",
        software_root=tmp_path / "s",
        log_dir=tmp_path / "l",
        run_dir=tmp_path / "r",
        state_dir=tmp_path / "st",
    )
    teardown._purge(config)
    teardown._purge_state(config.state_dir)
    assert (tmp_path / "precious" / "file").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "precious"]
