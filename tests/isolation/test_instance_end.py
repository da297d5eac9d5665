"""The life of an instance by the master's word, and all that its user leaves: on a real node, with a master in memory."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile_node
import pytest

from partitiond import (
    buildout,
    destruction,
    instance_build,
    instance_cleanup,
    instances,
    lanes,
    marks,
    metrics,
    periods,
    procfs,
    programs,
    remains,
    retention,
    running,
    softwares,
    status,
    verbs,
)
from partitiond.context import Context
from partitiond.errors import PartitiondError
from partitiond.metrics import Tally
from partitiond.passes import Wish
from partitiond.state import InstanceState
from slap_client.documents import ComputerDocument, PartitionDocument
from slap_client.errors import SlapError

NAME, GUID = "slappart0", "SOFTINST-1"
DAY = 86400


class Master:
    """Takes everything, and remembers it."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        if not name.startswith("instance_"):
            raise AttributeError(name)
        return lambda *words: self.told.append((name.removeprefix("instance_"), *words))

    def partition_certificate(self, _name):
        return PairOfNothing()

    def words(self):
        return [one[0] for one in self.told]


class PairOfNothing:
    certificate = key = ""


@pytest.fixture(scope="module")
def scene(module_node_config):
    yield from hostile_node.standing(module_node_config)


@pytest.fixture
def life(scene, monkeypatch):
    yield Life(scene, monkeypatch)
    state = scene.context.store.instance(NAME)
    scene.context.store.save_instance(dataclasses.replace(state, life="free"))
    scene.removed()
    (scene.software / "periodicity").unlink(missing_ok=True)
    (scene.software / "bin" / "buildout").write_text("#!/bin/sh\nexit 0\n")
    scene.context.promises.mended.clear()
    scene.context.adopt(scene.config)


class Life:
    """One partition of a node, brought about by passes over what the master wants."""

    def __init__(self, scene, monkeypatch):
        self.scene, self.context, self.partition = scene, scene.context, scene.partition
        self.path, self.uid = scene.path, scene.partition.uid
        self.master = Master()
        monkeypatch.setattr(Context, "client", self.master)

    def wants(self, state="started", stamp="1", guid=GUID, force=False, **more):
        """Let the master want it and take a pass; give the failures' codes."""
        entry = PartitionDocument(
            NAME, state, software_release=hostile_node.URL, instance_guid=guid, timestamp=stamp, **more
        )
        return self.take(entry, force=force)

    def take(self, entry, **how):
        document = ComputerDocument("COMP-1", (entry,))
        known = self.context.store.readable()[0]
        result = instances.run_pass(self.context, self.context.node, document, known=known, **how)
        return [error.code for _, error in result.failures]

    @property
    def state(self):
        return self.context.store.instance(NAME)

    def builds(self):
        log = self.scene.config.log_dir / NAME / "buildout.log"
        return log.read_text().count("configuring") if log.exists() else 0

    def program(self, *below, text):
        self.scene.tenant_directory(*below[:-1])
        path = self.path.joinpath(*below)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        os.chown(path, self.uid, self.uid)

    def finish(self, **more):
        result = destruction.finish(self.context, self.context.node, **more)
        return result.done, [getattr(error, "code", "os") for _, error in result.failures]

    def time_is_over(self):
        self.context.store.save_instance(dataclasses.replace(self.state, keep_until=time.time() - 1))

    def limit(self, **grid):
        config = self.scene.config
        self.context.adopt(dataclasses.replace(config, grid=dataclasses.replace(config.grid, **grid)))

    def as_user(self, code):
        # a user that the tests put beside it would do as well: it is the uid that counts
        return subprocess.run(
            [sys.executable, "-I", "-c", code],
            user=self.uid,
            group=self.uid,
            extra_groups=[],
            check=True,
            capture_output=True,
            text=True,
        ).stdout


# --- when it is configured, and what the master is told ---------------------------------------------------------------


def test_it_is_configured_when_something_changed_and_else_at_its_period(life):
    assert life.wants() == []
    assert (life.builds(), life.master.words()) == (1, ["started"])
    assert life.wants() == []
    assert life.builds() == 1
    for change in (
        {"stamp": "2"},
        {"stamp": "2", "software_type": "other"},
        {"stamp": "2", "state": "stopped"},
    ):
        before = life.builds()
        assert life.wants(**change) == []
        assert life.wants(**change) == []
        assert life.builds() == before + 1, change
    assert life.master.words() == ["started", "started", "started", "stopped"]
    before = life.builds()
    life.wants(stamp="2", state="stopped", force=True)
    assert life.builds() == before + 1


def test_without_a_timestamp_it_is_configured_each_time_but_not_while_it_fails(life):
    life.wants(stamp="")
    life.wants(stamp="")
    assert life.builds() == 2
    (life.scene.software / "bin" / "buildout").write_text("#!/bin/sh\nexit 1\n")
    assert life.wants(stamp="") == ["instance.build"]
    assert life.wants(stamp="") == []
    assert life.builds() == 3


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("0", True),
        ("-1", False),
        ("100", False),
        ("10\n", True),
        ("soon", False),
        ("9" * 100, False),
        (None, False),
    ],
)
def test_the_release_says_how_often(life, text, due):
    if text is not None:
        (life.scene.software / "periodicity").write_text(text)
    life.wants()
    life.context.store.save_instance(dataclasses.replace(life.state, processed_at=time.time() - 50))
    life.wants()
    assert life.builds() == 1 + due


def test_a_period_of_no_use_is_warned_of_once_and_left(life, caplog):
    path = life.scene.software / "periodicity"
    path.write_text("soon")
    time.sleep(0.2)  # files that changed a moment ago are read again, see partitiond/settled.py
    for _ in range(3):
        assert periods.Periods(life.scene.config)(hostile_node.URL) == life.scene.config.maximum_periodicity
    assert len([one for one in caplog.messages if "periodicity is not heeded" in one]) == 1
    assert path.read_text() == "soon"


def test_what_the_master_shows_as_failed_is_told_again(life):
    life.wants()
    life.wants(access_status="#access Instance correctly started")
    assert life.master.words() == ["started"]
    life.wants(access_status="#error while instanciating: of old")
    assert life.master.words() == ["started", "started"]
    assert life.builds() == 1
    # not where it knows of a promise that fails
    life.context.promises.page(NAME, GUID).told = True
    life.wants(access_status="#error while instanciating: a promise")
    assert life.master.words() == ["started", "started"]
    life.context.promises.forget(NAME)


def test_a_failure_is_told_once_as_long_as_it_is_the_same(life):
    (life.scene.software / "bin" / "buildout").write_text("#!/bin/sh\necho broken; exit 1\n")
    for _ in range(3):
        life.wants(force=True, access_status="#error while instanciating: broken")
    assert life.master.words() == ["error"]
    life.wants(force=True, access_status="#access something else")
    assert life.master.words() == ["error", "error"]
    (life.scene.software / "bin" / "buildout").write_text("#!/bin/sh\necho otherwise; exit 1\n")
    life.wants(force=True, access_status="#error while instanciating: broken")
    assert life.master.words() == ["error"] * 3
    assert "otherwise" in (life.path / f".slapgrid-{NAME}-error.log").read_text()


def test_a_full_disk_is_said_before_anything_is_done(life):
    life.limit(instance_min_free_space=2**62)
    assert life.wants() == ["instance.no_space"]
    assert life.builds() == 0
    assert "instance_min_free_space" in life.context.store.instance(NAME).error or life.master.words() == [
        "error"
    ]


_BOOTSTRAP = """import os, pathlib
pathlib.Path("sbin").mkdir(exist_ok=True)
script = pathlib.Path("sbin/buildout")
script.write_text("#!/bin/sh\\necho $1 $(id -u) $SLAPGRID_INSTANCE_ROOT > bootstrapped\\n")
script.chmod(0o755)
"""


@pytest.fixture
def release_bin(life):
    """The programs of the release, put back afterwards."""
    place = life.scene.software / "bin"
    yield place
    for path in place.iterdir():
        if path.name != "buildout":
            path.unlink()
    life.scene.make_software()


def test_a_release_may_bootstrap_its_buildout_in_the_partition(life, release_bin):
    script = release_bin / "bootstrap-of-it"
    script.write_text(f"#!{sys.executable} -I\n{_BOOTSTRAP}")  # not executable
    os.chown(script, life.scene.soft.pw_uid, life.scene.soft.pw_gid)
    script.chmod(0o644)
    assert life.wants() == []
    said = (life.path / "bootstrapped").read_text().split()
    assert said == ["-U", str(life.uid), str(life.scene.config.instance_root)]
    script.write_text("#!/bin/sh\nexit 5\n")
    assert life.wants(stamp="2") == ["instance.build"]
    (release_bin / "bootstrap2").write_text("")
    assert life.wants(stamp="3") == ["instance.bootstrap"]


def test_a_release_without_a_buildout_has_the_nodes_own(life, release_bin):
    (release_bin / "buildout").unlink()
    assert life.wants() == [], (life.scene.config.log_dir / NAME / "buildout.log").read_text()
    made = life.path / "sbin" / "buildout"
    assert made.stat().st_uid == life.uid
    log = (life.scene.config.log_dir / NAME / "buildout.log").read_text()
    assert f"Generated script '{made}'" in log


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "step",
    [
        "running.stop",
        "remains.remove_jobs",
        "execute.end_processes_of",
        "privacy.forget",
        "remains.remove",
        "certificates.remove",
        "identities.remove",
        "files.remove_emptied",
        "storage.empty",
    ],
)
def test_an_end_that_is_cut_short_is_finished(life, monkeypatch, step, when):
    """As by a kill: what has no handler of ours runs through."""
    module, name = step.split(".")
    target = getattr(instance_cleanup, module)
    real = getattr(target, name)

    def killed(*words, **more):
        if when == "after":
            real(*words, **more)
        raise KeyboardInterrupt

    life.wants()
    (life.path / "data").write_text("")
    life.wants(state="destroyed")
    with monkeypatch.context() as patch:
        patch.setattr(target, name, killed)
        with pytest.raises(KeyboardInterrupt):
            life.finish()
    assert (life.state.life, life.state.removing, life.state.cleaned) == ("destroying", True, False)
    assert life.master.words()[-1] == "stopped"
    # too late to come back
    assert life.wants(state="started") == []
    assert life.finish() == ([f"{NAME}: destroyed"], [])
    assert [path.name for path in life.path.iterdir()] == [".slapos-resource"]


def test_one_that_the_master_was_not_told_of_is_told_again(life, monkeypatch):
    life.wants()
    life.wants(state="destroyed")
    with monkeypatch.context() as patch:
        patch.setattr(Master, "instance_destroyed", unreachable, raising=False)
        assert life.finish() == ([], ["slap.unreachable"])
    assert (life.state.life, life.state.cleaned) == ("destroying", True)
    assert life.finish() == ([f"{NAME}: destroyed"], [])


def unknown(*_):
    """As the production master answers about a partition that it has nothing in."""
    raise SlapError("slap.http", "404")


def test_of_one_that_the_master_dropped_it_is_told_nothing(life, monkeypatch):
    life.wants()
    monkeypatch.setattr(Master, "instance_destroyed", unknown, raising=False)
    free = PartitionDocument(NAME, "destroyed")
    assert life.take(free) == ["instances.held"]
    for _ in range(3):
        assert life.take(free) == ["instances.dropped"]
    assert (life.state.life, life.state.dropped) == ("started", True)
    assert life.take(free, force=True, only=frozenset((NAME,))) == []
    life.context.outbox.put("instance_stopped", NAME)
    assert life.finish(untold=frozenset((NAME,))) == ([f"{NAME}: destroyed"], [])
    assert (life.state.life, life.master.words()) == ("free", ["started"])
    assert life.context.outbox.waiting() == []


def test_an_end_whose_answer_was_lost_is_over_when_the_master_has_nothing_there(life, monkeypatch):
    life.wants()
    life.wants(state="destroyed")
    with monkeypatch.context() as patch:
        patch.setattr(Master, "instance_destroyed", unreachable, raising=False)
        assert life.finish() == ([], ["slap.unreachable"])
        # a 404 alone is no word of it
        patch.setattr(Master, "instance_destroyed", unknown)
        assert life.finish() == ([], ["slap.http"])
        assert life.state.life == "destroying"
        assert life.take(PartitionDocument(NAME, "destroyed")) == []
        assert life.finish() == ([f"{NAME}: destroyed"], [])


def test_the_end_of_one_is_not_told_of_the_next(life):
    life.wants()
    life.wants(state="destroyed")
    assert life.wants(guid="SOFTINST-2") == []
    assert life.finish() == ([f"{NAME}: destroyed"], [])
    assert life.master.words() == ["started", "stopped"]
    assert life.wants(guid="SOFTINST-2") == []
    # and one that the master lists again before the end is told of
    life.wants(guid="SOFTINST-2", state="destroyed")
    assert life.wants(guid="SOFTINST-3") == []
    assert life.state.dropped
    assert life.wants(guid="SOFTINST-2", state="destroyed") == []
    assert life.finish() == ([f"{NAME}: destroyed"], [])
    assert life.master.words()[-1] == "destroyed"


def unreachable(*_):
    raise SlapError("slap.unreachable", "no route", retryable=True)


# --- the files that slapgrid leaves -----------------------------------------------------------------------------------


def hostile(path, kind, canary):
    {
        "directory": path.mkdir,
        "link": lambda: path.symlink_to(canary.file),
        "loop": lambda: path.symlink_to(path),
        "pipe": lambda: os.mkfifo(path),
    }[kind]()


@pytest.mark.parametrize("kind", ["directory", "link", "loop", "pipe"])
def test_a_tenant_in_the_way_of_marks_harms_only_them(life, kind):
    names = (".timestamp", marks.error_log(life.partition), marks.RETENTION_DELAY, marks.RETENTION_DATE)
    for name in (*names, f".slapos-request-transaction-{NAME}"):
        hostile(life.path / name, kind, life.scene.canary)
    assert life.wants(filter={"retention_delay": "1"}) == []
    assert life.state.retention_days == 1
    assert life.wants(state="destroyed") == []
    assert life.state.life == "destroying"
    assert life.scene.canary.changes() == []


def test_a_free_partition_is_tidied_and_what_stays_is_warned_of_once(life, caplog):
    free = PartitionDocument(NAME, "destroyed")
    (life.path / ".timestamp").write_text("1")
    (life.path / ".slapgrid" / "promise").mkdir(parents=True)
    (life.path / ".slapgrid" / "link").symlink_to(life.scene.canary.directory)
    (life.path / "of somebody").write_text("")
    for _ in range(3):
        assert life.take(free) == []
    assert {one.name for one in life.path.iterdir()} == {".slapos-resource", "of somebody"}
    assert len([one for one in caplog.messages if "is free and has files" in one]) == 1
    (life.path / "and another").write_text("")
    life.take(free)
    assert len([one for one in caplog.messages if "'and another', 'of somebody'" in one]) == 1
    assert life.scene.canary.changes() == []
    assert life.master.told == []


# --- kept, and wanted back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "days"),
    [("3", 3), (2, 2), (0.5, 0.5), ("-1", 0), ("nan", 0), ("soon", 0), ("1e9", retention.MOST_DAYS), ((), 0)],
)
def test_the_delay_is_fixed_at_the_first_deployment(life, asked, days):
    life.wants(filter={"retention_delay": asked})
    assert life.state.retention_days == days
    assert float((life.path / marks.RETENTION_DELAY).read_text()) == days
    life.wants(stamp="2", filter={"retention_delay": "7"})
    assert life.state.retention_days == days


@pytest.mark.parametrize(("owner", "days"), [(0, 5), ("software", 5), ("tenant", 1)])
def test_a_delay_that_slapgrid_has_fixed_holds(life, owner, days):
    path = life.path / marks.RETENTION_DELAY
    path.write_text("5.0")
    uid = {"software": life.scene.soft.pw_uid, "tenant": life.uid}.get(owner, 0)
    os.chown(path, uid, uid)
    life.wants(filter={"retention_delay": "1"})
    assert life.state.retention_days == days


def test_one_that_slapgrid_has_begun_to_destroy_is_kept_as_it_would(life):
    until = time.time() + 2 * DAY
    (life.path / marks.RETENTION_DELAY).write_text("5.0")
    (life.path / marks.RETENTION_DATE).write_text(str(until))
    life.wants(state="destroyed")
    assert life.state.keep_until == pytest.approx(until)


def test_one_is_kept_until_its_time_is_over_whoever_asks(life):
    life.wants(filter={"retention_delay": 2})
    life.wants(state="destroyed")
    assert life.state.keep_until == pytest.approx(time.time() + 2 * DAY, abs=60)
    for force in (False, True):
        assert life.finish(force=force) == ([], [])
    assert life.master.words() == ["started", "stopped"]
    cases = status.node(life.context)["node"]["open_cases"]
    assert len([one for one in cases if one.startswith(f"{NAME} is to be destroyed and kept until 2")]) == 1
    life.time_is_over()
    woken = []
    life.context.wake_report = lambda: woken.append(1)
    life.wants(state="destroyed")
    assert woken == [1], "the report lane does not know the time"
    assert life.finish() == ([f"{NAME}: destroyed"], [])
    assert life.master.words()[-1] == "destroyed"
    assert life.state == InstanceState(NAME)


def test_it_comes_back_until_its_removal_has_begun(life):
    life.wants(filter={"retention_delay": 2})
    (life.path / "data").write_text("of days")
    life.wants(state="destroyed")
    life.wants(state="started")
    assert (life.state.life, life.state.keep_until, life.state.retention_days) == ("started", 0, 2)
    assert (life.path / "data").exists()
    for late in ("settled", "removing", "cleaned"):
        life.wants(state="destroyed")
        life.context.store.save_instance(dataclasses.replace(life.state, **{late: True}))
        assert life.wants(state="started") == []
        assert life.state.life == "destroying", late
        life.context.store.save_instance(dataclasses.replace(life.state, **{late: False}))
        life.wants(state="started")
        assert life.state.life == "started"


def test_another_instance_does_not_take_the_place_of_one_that_is_kept(life):
    life.wants(filter={"retention_delay": 2})
    life.wants(state="destroyed")
    assert life.wants(guid="SOFTINST-2") == ["instances.kept"]
    assert life.state.instance_guid == GUID
    life.time_is_over()
    assert life.wants(guid="SOFTINST-2") == []
    life.finish()
    assert life.wants(guid="SOFTINST-2") == []
    assert (life.state.life, life.state.instance_guid) == ("started", "SOFTINST-2")


# --- its leave --------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(life):
    """A file in a directory of everybody, which stays."""
    place = life.scene.files.root / "said"
    place.mkdir()
    place.chmod(0o777)
    yield place / "said"
    shutil.rmtree(place)


def test_its_farewell_is_run_once_by_its_user_before_anything_goes(life, said):
    for name in ("a", "b"):
        life.program("etc", "prerm", name, text=f"echo {name} $(id -u) $(ls -d $HOME/data) >> {said}")
    life.program("sbin", "destroy", text=f"echo destroy $(id -u) $(ls -d $HOME/data) >> {said}")
    life.wants()
    (life.path / "data").write_text("")
    life.wants(state="destroyed")
    assert life.finish() == ([f"{NAME}: destroyed"], [])
    home = f"{life.uid} {life.path / 'data'}"
    assert said.read_text().splitlines() == [f"a {home}", f"b {home}", f"destroy {home}"]


def test_a_farewell_without_end_is_ended(life, caplog):
    life.limit(prerm_timeout=1.0)
    life.program("etc", "prerm", "a", text="yes & sleep 1000000")
    life.program("etc", "prerm", "b", text="true")
    life.wants()
    life.wants(state="destroyed")
    destruction.take_leave(life.context, [life.partition])
    assert life.state.prerm_ran
    log = life.scene.config.log_dir / NAME / destruction.LOG
    assert log.stat().st_size < 200_000
    assert len([one for one in caplog.messages if "etc/prerm/a: took too long" in one]) == 1
    assert len([one for one in caplog.messages if "etc/prerm/b: no time was left" in one]) == 1
    assert life.finish() == ([f"{NAME}: destroyed"], [])


def test_who_is_wanted_back_while_it_takes_its_leave_is_not_started_beside_that(life, said):
    life.program("etc", "prerm", "a", text=f"echo $$ > {said}; exec sleep 1000000")
    life.program("etc", "prerm", "b", text=f"echo b >> {said}")
    life.wants()
    life.wants(state="destroyed")
    with ThreadPoolExecutor(1) as other:
        finished = other.submit(life.finish)
        while not (said.exists() and said.read_text().strip()):
            time.sleep(0.01)
        assert life.wants(state="started") == []
        assert not procfs.is_alive(int(said.read_text())), "its farewell goes on beside it"
        assert finished.result() == ([], [])
    assert (life.state.life, life.state.prerm_ran, life.state.leaving) == ("started", False, False)
    assert "its etc/prerm had begun" in (life.scene.config.log_dir / "events.jsonl").read_text()


def test_nothing_of_a_farewell_that_a_killed_daemon_began_runs_beside_who_is_wanted_back(life):
    life.wants()
    life.wants(state="destroyed")
    life.context.store.save_instance(dataclasses.replace(life.state, leaving=True))
    command = ["/bin/sleep", "1000000"]
    with subprocess.Popen(command, user=life.uid, group=life.uid, start_new_session=True) as left:
        record = buildout.session_record(life.scene.config, f"{NAME}.prerm")
        record.write_text(f"{left.pid} {life.uid}\n")
        assert life.wants(state="started") == []
        assert left.wait(10) == -9
    assert life.state.life == "started"


def test_its_own_destroy_that_fails_holds_it_until_somebody_forces_it(life):
    life.program("sbin", "destroy", text="echo not yet; exit 3")
    life.wants()
    life.wants(state="destroyed")
    assert life.finish() == ([], ["instance.destroy_program"])
    assert life.path.joinpath("sbin", "destroy").exists()
    assert life.master.words() == ["started", "stopped", "error"]
    assert life.finish() == ([], ["instances.not_destroyed"]), "tried again at once"
    life.context.store.save_instance(dataclasses.replace(life.state, next_try=0.0))
    assert life.finish() == ([], ["instance.destroy_program"])
    assert life.state.failures == 2
    assert life.master.words().count("error") == 1
    assert life.finish(force=True) == ([f"{NAME}: destroyed"], [])
    assert life.state.life == "free"


@pytest.mark.parametrize("problem", [OSError(30, "read-only"), PartitiondError("files.mounted", "in use")])
def test_cleaning_that_fails_is_tried_again_later_and_its_own_destroy_is_not(
    life, said, monkeypatch, problem
):
    life.program("sbin", "destroy", text=f"echo destroy >> {said}")
    life.wants()
    life.wants(state="destroyed")

    def fails(*_):
        raise problem

    with monkeypatch.context() as patch:
        patch.setattr(instance_cleanup.storage, "empty", fails)
        assert len(life.finish()[1]) == 1
        assert life.finish() == ([], ["instances.not_destroyed"]), "tried again at once"
        life.context.store.save_instance(dataclasses.replace(life.state, next_try=0.0))
        assert len(life.finish()[1]) == 1
        assert life.state.failures == 2
        assert life.master.words().count("error") == 1
        assert len(life.finish(force=True)[1]) == 1
    assert life.finish(force=True) == ([f"{NAME}: destroyed"], [])
    assert said.read_text() == "destroy\n"


def test_its_own_destroy_that_cannot_be_tried_does_not_stand_in_the_way_of_force(life, monkeypatch):
    life.program("sbin", "destroy", text="true")
    life.wants()
    life.wants(state="destroyed")

    def fails(*_):
        raise OSError(5, "no access")

    with monkeypatch.context() as patch:
        patch.setattr(destruction.usage_scripts, "heard", fails)
        assert len(life.finish()[1]) == 1
        assert life.finish(force=True) == ([f"{NAME}: destroyed"], [])


# --- what its user leaves ---------------------------------------------------------------------------------------------

_LEAVE = """
import ctypes, os
libc = ctypes.CDLL(None)
private, create = 0, 0o1000
print(libc.shmget(private, 4096, create | 0o600), libc.semget(private, 1, create | 0o600), libc.msgget(private, create | 0o600))
for top in ("/tmp", "/var/tmp", "/dev/shm"):
    os.makedirs(f"{top}/left-%d/below/and below" % os.getuid())
    os.symlink("/etc", f"{top}/left-%d/link" % os.getuid())
    open(f"{top}/file-%d" % os.getuid(), "w").close()
"""
OTHER = 61998


def ipc(uid):
    return sorted((kind, number) for kind in ("shm", "sem", "msg") for number in remains._objects(kind, uid))


def leave(uid):
    subprocess.run(
        [sys.executable, "-I", "-c", _LEAVE],
        user=uid,
        group=uid,
        extra_groups=[],
        check=True,
        capture_output=True,
    )


def left(uid):
    return sorted(
        str(path)
        for top in ("/tmp", "/var/tmp", "/dev/shm")
        for path in Path(top).iterdir()
        if path.lstat().st_uid == uid
    )


@pytest.fixture
def spools():
    """The directories of cron and at, as Debian's packages make them."""
    made = []
    for name, mode in (("crontabs", 0o1730), ("atjobs", 0o1770), ("atspool", 0o1770)):
        path = Path("/var/spool/cron", name)
        if not path.exists():
            path.mkdir(parents=True)
            path.chmod(mode)
            made.append(path)
    yield Path("/var/spool/cron")
    for path in made:
        for one in path.iterdir():
            one.unlink()
        path.rmdir()


def test_nothing_of_its_user_stays_on_the_node(life, spools):
    user = life.partition.user
    life.wants()
    for uid, name in ((life.uid, user), (OTHER, "somebody")):
        leave(uid)
        for path in (
            spools / "crontabs" / name,
            spools / "atjobs" / f"a0000{uid}",
            spools / "atspool" / f"a{uid}",
        ):
            path.write_text("* * * * * true\n")
            os.chown(path, uid, uid)
    assert len(ipc(life.uid)) == len(ipc(OTHER)) == 3
    assert len(left(life.uid)) == len(left(OTHER)) == 6
    before = ipc(OTHER), left(OTHER)
    life.wants(state="destroyed")
    assert life.finish() == ([f"{NAME}: destroyed"], [])
    assert (ipc(life.uid), left(life.uid)) == ([], [])
    assert (ipc(OTHER), left(OTHER)) == before
    jobs = [path for kind in ("crontabs", "atjobs", "atspool") for path in (spools / kind).iterdir()]
    assert {path.stat().st_uid for path in jobs} == {OTHER}
    assert Path("/etc/passwd").exists()
    remains.remove_jobs("somebody", OTHER)
    remains.remove("somebody", OTHER)
    assert (ipc(OTHER), left(OTHER)) == ([], [])
    # again, as by one who was killed after it
    remains.remove_jobs(user, life.uid)
    remains.remove(user, life.uid)


def test_a_stop_waits_for_no_release(life):
    life.program("etc", "run", "sleeper", text="exec sleep 1000")
    assert life.wants() == []
    assert len(pids(life)) == 1
    missing = hostile_node.URL + "?not-built"
    later = PartitionDocument(NAME, "stopped", software_release=missing, instance_guid=GUID, timestamp="2")
    for _ in range(2):
        assert life.take(later) == []
        assert pids(life) == []
        assert (life.state.life, life.state.wanted, life.state.software_release) == (
            "stopped",
            "stopped",
            hostile_node.URL,
        )
        assert (life.master.words(), life.builds()) == (["started", "stopped"], 1)
    # wanted started again it still waits, and the new release is configured when it is there
    assert life.take(dataclasses.replace(later, requested_state="started")) == []
    assert (pids(life), life.builds()) == ([], 1)
    assert life.wants(stamp="3") == []
    assert (len(pids(life)), life.builds()) == (1, 2)


# --- a state that cannot be read --------------------------------------------------------------------------------------


def test_one_damaged_state_stops_nobody_and_loses_nothing(life, monkeypatch):
    life.program("etc", "run", "sleeper", text="exec sleep 1000")
    assert life.wants() == []
    (pid,) = pids(life)
    file = life.scene.config.state_dir / "instances" / f"{NAME}.json"
    good = file.read_bytes()
    file.write_text(good.decode().replace('"keep_until": 0.0', '"keep_until": "0"'))
    try:
        outcome = verbs.apply(life.context, [])
        assert (outcome["failures"], outcome["left"]) == ([], [])
        (refused,) = outcome["refused"]
        assert (refused["partition"], refused["code"], refused["file"]) == (NAME, "state.damaged", str(file))
        shown = status.node(life.context)
        assert [case for case in shown["node"]["open_cases"] if str(file) in case]
        assert (shown["partitions"][0]["state"], shown["partitions"][1]["state"]) == ("failed", "free")
        ours = PartitionDocument(NAME, "destroyed", software_release=hostile_node.URL, instance_guid=GUID)
        answers = [ComputerDocument("COMP-1", (ours, entry_of_other()))]
        monkeypatch.setattr(lanes, "knock", lambda _: answers[-1])
        result = lanes.instance(life.context)
        assert [(name, error.code) for name, error in result.failures] == [(NAME, "state.damaged")]
        assert [one.partition(":")[0] for one in result.done] == ["slappart1"]
        # nobody knows what it uses
        assert not softwares._remove(life.context, hostile_node.URL + "?another")
        result = lanes.software(life.context, Wish(collect=True))
        assert [error.code for _, error in result.failures] == ["state.damaged", "software.not_collected"]
        answers.append(ComputerDocument("COMP-1", ()))
        with pytest.raises(PartitiondError) as caught:
            lanes.ask(life.context)
        assert caught.value.code == "instances.empty_answer"
        assert f'partition_up{{partition="{NAME}"}} 1'.encode() in metrics.everything(life.context, Tally())
        assert pids(life) == [pid]
        # as after a boot, when supervisord has begun anew and has started nothing
        life.context.supervisor.stop_group(NAME)
        life.context.supervisor.shutdown()
        assert verbs.apply(life.context, [])["failures"] == []
        assert len(pids(life)) == 1
    finally:
        file.write_bytes(good)
        life.context.store.save_instance(InstanceState("slappart1"))


def test_what_the_kernel_refuses_of_one_partition_ends_no_pass(life, monkeypatch, caplog):
    other = life.scene.other.path
    away = other.with_name("away")
    other.rename(away)
    other.touch()
    free = PartitionDocument("slappart1", "destroyed")
    try:
        for _ in range(2):
            result = instances.run_pass(
                life.context, life.context.node, ComputerDocument("COMP-1", (free,)), known={}
            )
            assert (result.done, result.failures) == ([], [])
        assert caplog.text.count("slappart1 is free and cannot be looked at: Not a directory") == 1
    finally:
        other.unlink()
        away.rename(other)
    ours = PartitionDocument(NAME, "destroyed", software_release=hostile_node.URL, instance_guid=GUID)
    document = ComputerDocument("COMP-1", (ours, entry_of_other()))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(running, "stop", refuse)
            result = instances.run_pass(life.context, life.context.node, document, known={})
        assert [(name, type(error)) for name, error in result.failures] == [(NAME, OSError)]
        assert [one.partition(":")[0] for one in result.done] == ["slappart1"]
    finally:
        life.context.store.save_instance(InstanceState("slappart1"))


def refuse(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def entry_of_other():
    return PartitionDocument(
        "slappart1", "started", software_release=hostile_node.URL, instance_guid="SOFTINST-2"
    )


def pids(life):
    return [one.pid for one in life.context.supervisor.processes() if one.group == NAME and one.pid]


@pytest.mark.full
def test_however_many_names_others_have_made_nothing_is_overlooked(life, tmp_path):
    """A tenant may make any number in a directory of everybody, before or after those of who goes."""
    own = []
    for name in ("first", "last"):
        own += [tmp_path / f"{name}-{number}" for number in range(5)]
        for path in own[-5:]:
            path.mkdir() if path.name.endswith("4") else path.touch()
            os.chown(path, OTHER, OTHER)
        if name == "first":
            for number in range(100_001):
                os.mknod(tmp_path / str(number))
    remains._remove_owned(tmp_path, OTHER, trees=True)
    assert not [path.name for path in own if path.exists()]
    assert len(list(tmp_path.iterdir())) == 100_001
    shutil.rmtree(tmp_path)


# --- exchanged --------------------------------------------------------------------------------------------------------


STUBBORN = "trap '' TERM\nwhile :; do sleep 0.1; done"


def started(life, name):
    end = time.monotonic() + 20
    while not (found := [one for one in life.context.supervisor.processes() if one.name == name and one.pid]):
        assert time.monotonic() < end, f"{name} does not run"
        time.sleep(0.05)
    return found[0].pid


def waits_for(life, name):
    """Until supervisord waits for a program to end."""
    end = time.monotonic() + 20
    while not any(
        one.name == name and one.state == "STOPPING" for one in life.context.supervisor.processes()
    ):
        assert time.monotonic() < end, f"{name} is not stopped"
        time.sleep(0.05)


def test_a_program_that_does_not_end_keeps_only_its_own_partition_waiting(life):
    life.program("etc", "run", "stubborn", text=STUBBORN)
    assert life.wants() == []
    pid = started(life, "stubborn")
    time.sleep(0.3)  # until it has its trap
    for name in ("stubborn", "other"):
        life.program("etc", "run", name, text="exec sleep 1000")
    failed = []
    exchange = threading.Thread(target=lambda: failed.extend(life.wants(stamp="2")))
    exchange.start()
    try:
        waits_for(life, "stubborn")
        assert life.context.applying.acquire(timeout=5), "the whole node waits"
        # neither does who tells supervisord of something else meanwhile
        life.context.supervisor.update(only=("slappart1",))
        life.context.applying.release()
        assert procfs.is_alive(pid)
        assert exchange.is_alive()
    finally:
        os.kill(pid, signal.SIGKILL)
        exchange.join(30)
    assert failed == []
    assert started(life, "other")
    assert started(life, "stubborn") != pid


def test_an_exchange_that_was_cut_off_is_finished_by_the_plan_and_a_stop_by_hand_is_left(life):
    life.program("etc", "run", "first", text="exec sleep 1000")
    assert life.wants() == []
    started(life, "first")
    life.context.supervisor.stop_group(NAME)
    assert verbs.plan(life.context)["operations"] == [], "somebody stopped it by hand"
    life.program("etc", "run", "second", text="exec sleep 1000")
    # as far as one gets who is killed before the start
    life.context.supervisor.write_group(programs.group(life.context, life.partition))
    assert [one["id"] for one in verbs.plan(life.context)["operations"]] == [f"processes/{NAME}"]
    assert verbs.apply(life.context, [])["failures"] == []
    assert started(life, "first")
    assert started(life, "second")
    assert verbs.plan(life.context)["operations"] == []


def test_what_a_buildout_leaves_running_writes_no_log(life):
    endless = "setsid sh -c 'while echo more; do sleep 0.01; done' & head -c 6000000 /dev/zero"
    (life.scene.software / "bin" / "buildout").write_text(f"#!/bin/sh\n{endless}\nsleep 0.1\n")
    assert life.wants() == []
    logs = life.scene.config.log_dir / NAME

    def size():
        return sum(one.stat().st_size for one in logs.iterdir())

    before = size()
    assert before < 11 * 1024 * 1024
    time.sleep(0.3)
    assert size() == before


def test_one_that_is_configured_for_long_is_an_open_case(life, monkeypatch):
    monkeypatch.setattr(instance_build, "LONG_SECONDS", 0.1)
    told = []
    (life.scene.software / "bin" / "buildout").write_text("#!/bin/sh\nsleep 1\n")
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(life.wants)
        while not taken.done():
            told.append(instance_build.trouble(life.context))
            time.sleep(0.02)
    assert taken.result() == []
    assert told[0] == ""
    assert [one for one in told if one.startswith(f"{NAME} has been configuring since")]
    assert instance_build.trouble(life.context) == ""
