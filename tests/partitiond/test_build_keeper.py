"""The process that builds, without a daemon: killed anywhere, begun twice at once, ended; one build at a time, nothing left."""

import json
import os
import pwd
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from partitiond import (
    build_keeper,
    buildout,
    config,
    destroy_guard,
    execute,
    files,
    lanes,
    procfs,
    software_build,
    software_status,
    softwares,
)
from partitiond.build_keeper import Outcome, Places
from partitiond.context import Context
from partitiond.errors import PartitiondError
from partitiond.state import InstanceState, SoftwareState, software_name
from slap_client.documents import ComputerDocument, PartitionDocument, SoftwareDocument

RELEASE = Path(__file__).resolve().parents[1] / "lifecycle" / "release"
USER = "daemon"


@pytest.fixture
def scene():
    base = Path("/srv/keeper")
    base.mkdir(mode=0o755)
    for name in ("software", "log", "log/software", "run", "state"):
        (base / name).mkdir(mode=0o755)
    shutil.chown(base / "software", USER, USER)
    shutil.copytree(RELEASE, base / "release")
    (base / "slapos.cfg").write_text(
        f"[slapos]\ncomputer_id = C\nmaster_url = http://[::1]/\nsoftware_root = {base}/software\n"
        f"instance_root = {base}/instance\n[slapformat]\ninterface_name = lo\npartition_amount = 1\n"
        f"software_user = {USER}\n[partitiond]\noffline_builds = true\nlog_dir = {base}/log\n"
        f"state_dir = {base}/state\nrun_dir = {base}/run\n"
    )
    found = config.load(base / "slapos.cfg")
    yield SimpleNamespace(
        base=base, url=f"{base}/release/software.cfg", config=found, places=Places.of(found)
    )
    build_keeper.end(found)
    shutil.rmtree(base)


def says(scene, words):
    (scene.base / "release" / "build").write_text(words)


def fifo(scene):
    path = scene.base / "fifo"
    os.mkfifo(path)
    path.chmod(0o644)
    says(scene, f"cat {path}")
    return path


def busy(scene, path):
    wanted = f"/bin/cat\0{path}\0".encode()
    deadline = time.monotonic() + 60
    while True:
        found = [pid for pid in procfs.pids() if b"\0".join(procfs.words(pid, "cmdline")) == wanted]
        assert len(found) <= 1
        if found:
            return found[0]
        assert time.monotonic() < deadline, tail(scene)
        time.sleep(0.02)


def tail(scene):
    log = scene.places.directory / "runner.log"
    return buildout.tail(buildout.software_log(scene.config, scene.url)) + (
        log.read_text() if log.exists() else ""
    )


def ended(scene):
    """Wait for the end; what came of it."""
    while (runner := build_keeper.running(scene.config)) is not None:
        build_keeper.wait(runner, 1)
    found = list(build_keeper.outcomes(scene.config))
    build_keeper.forget_outcome(scene.config, scene.url)
    return found


def of_builds():
    uid = pwd.getpwnam(USER).pw_uid
    return [pid for pid in procfs.pids() if procfs.user_of(pid) == uid]


def test_killed_at_any_moment_it_is_gone_on_with(scene):
    for delay in (0.0, 0.3, 0.8, 1.6):
        build_keeper.start(scene.config, scene.url, force=False)
        time.sleep(delay)
        runner = build_keeper.running(scene.config)
        if runner is None:
            break
        os.kill(runner.pid, signal.SIGKILL)
        assert build_keeper.wait(runner, 10)
        build_keeper.end_cut_off(scene.config)
        assert not of_builds(), "something of it goes on"
        assert build_keeper.running(scene.config) is None
    build_keeper.start(scene.config, scene.url, force=False)
    assert ended(scene) == [Outcome(scene.url)], tail(scene)
    assert buildout.completed(scene.config, scene.url)
    assert not of_builds()


def test_a_step_that_is_killed_is_a_failure_that_is_told(scene):
    path = fifo(scene)
    build_keeper.start(scene.config, scene.url, force=False)
    os.kill(busy(scene, path), signal.SIGKILL)
    (outcome,) = ended(scene)
    assert outcome.code == "software.build"
    assert "SIGKILL" in outcome.message.partition("\n")[0]
    assert not buildout.completed(scene.config, scene.url)
    assert not of_builds()


def test_begun_twice_at_once_there_is_one(scene):
    path = fifo(scene)
    begin = threading.Barrier(3)

    def start():
        begin.wait()
        build_keeper.start(scene.config, scene.url, force=False)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runner = build_keeper.running(scene.config)
    assert runner.url == scene.url
    busy(scene, path)
    assert build_keeper.end(scene.config, "another") is False
    assert build_keeper.running(scene.config) == runner
    assert build_keeper.end(scene.config, scene.url)
    assert not list(build_keeper.outcomes(scene.config)), "its end was taken for a failure"
    assert not of_builds()
    assert build_keeper.end(scene.config) is False


def test_one_that_does_not_end_when_asked_is_killed(scene, monkeypatch):
    monkeypatch.setattr(build_keeper, "_GRACE", 1.0)
    path = fifo(scene)
    build_keeper.start(scene.config, scene.url, force=False)
    busy(scene, path)
    runner = build_keeper.running(scene.config)
    os.kill(runner.pid, signal.SIGSTOP)
    assert build_keeper.end(scene.config)
    assert not of_builds()


def test_a_number_that_is_somebody_else_s_is_left_alone(scene):
    """After a restart of the machine a record may name any process; and a lock without a holder says that nobody builds."""
    own = build_keeper.Runner(scene.url, os.getpid(), procfs.started(os.getpid()), procfs.boot())
    assert own.lives()
    for other in (replace(own, started=own.started + 1), replace(own, boot="another")):
        assert not other.lives()
        assert build_keeper.wait(other, 0)
    assert not build_keeper.wait(own, 0)
    assert build_keeper.running(scene.config) is None


def test_after_a_restart_of_the_machine_a_session_is_somebody_else_s(scene):
    """The record of the step names the session that this test itself leads: it must not be ended."""
    scene.places.directory.mkdir()
    record = build_keeper.Runner(scene.url, 1, 1, "another")
    with subprocess.Popen(
        [execute.SETPRIV, "--reuid", USER, "--regid", USER, "--clear-groups", "--", "/bin/sleep", "60"],
        start_new_session=True,
    ) as sleeper:
        try:
            for boot, alive in (("another", True), (procfs.boot(), False)):
                files.write_path(scene.places.record, json.dumps(asdict(replace(record, boot=boot))).encode())
                deadline = time.monotonic() + 10
                while procfs.user_of(sleeper.pid) == 0 and time.monotonic() < deadline:
                    time.sleep(0.01)
                scene.places.session.write_text(f"{sleeper.pid} {pwd.getpwnam(USER).pw_uid}\n")
                assert build_keeper.end_cut_off(scene.config)
                assert not scene.places.session.exists()
                if alive:
                    assert sleeper.poll() is None
                else:
                    assert sleeper.wait(10) == -signal.SIGKILL
        finally:
            sleeper.kill()


def test_an_outcome_that_cannot_be_read_is_none(scene):
    places = scene.places
    places.outcomes.mkdir()
    for number, content in enumerate((b"", b"{", b"[]", b'{"url": "x", "other": 1}')):
        (places.outcomes / f"{number}.json").write_bytes(content)
    build_keeper.save_outcome(places, Outcome("http://r", code="software.build", message="m"))
    assert [one.url for one in build_keeper.outcomes(scene.config)] == ["http://r"]
    assert len(list(places.outcomes.iterdir())) == 1


def test_a_runner_that_cannot_start_is_told(scene):
    scene.places.directory.mkdir()
    scene.places.lock.mkdir()
    with pytest.raises(PartitiondError) as caught:
        build_keeper.start(scene.config, scene.url, force=False)
    assert caught.value.code == "software.runner"
    scene.places.lock.rmdir()


def test_what_a_build_prints_is_bounded_while_it_prints(tmp_path):
    path, limit = tmp_path / "x.log", 300_000
    path.write_bytes(b"earlier\n")
    with buildout.Log(path, "building x", limit) as log:
        # faster than anybody could copy, without an end, and one more that leaves its session
        with subprocess.Popen(["/bin/sh", "-c", "setsid yes & exec yes"], stdout=log) as writer:
            deadline = time.monotonic() + 20
            while not path.with_name("x.log.1").exists():
                assert time.monotonic() < deadline, "it never was put aside"
                time.sleep(0.005)
            sizes = [file.stat().st_size for _ in range(50) for file in tmp_path.iterdir()]
            writer.kill()
        buildout.note(log, "the end")
    assert max(sizes) <= limit
    assert {file.name for file in tmp_path.iterdir()} == {"x.log", "x.log.1"}
    assert path.read_bytes().startswith(b"--- ")
    # nobody listens any more to what goes on
    deadline = time.monotonic() + 10
    while any(procfs.words(pid, "cmdline")[:1] == [b"yes"] for pid in procfs.pids()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2 * limit


def test_a_log_begins_anew_after_a_long_one_and_keeps_the_order(tmp_path):
    path = tmp_path / "x.log"
    path.write_bytes(b"a" * 2000)
    with buildout.Log(path, "building x", 1000) as log:
        os.set_blocking(log, False)  # as whoever builds could do
        for number in range(3):
            os.write(log, f"step {number}\n".encode())
            buildout.note(log, f"note {number}")
    text = path.read_text().splitlines()
    assert text[1:] == ["step 0", "--- note 0", "step 1", "--- note 1", "step 2", "--- note 2"]
    assert path.with_name("x.log.1").read_bytes() == b"a" * 2000


def test_credentials_of_the_software_user_go_along(scene, monkeypatch):
    owner = pwd.getpwnam(USER)
    home = scene.base / "home"
    home.mkdir()
    monkeypatch.setattr(
        software_build.pwd, "getpwuid", lambda uid: SimpleNamespace(pw_dir=str(home), pw_uid=uid)
    )
    numbers = (owner.pw_uid, owner.pw_gid)
    path = buildout.software_directory(scene.config, scene.url) / ".netrc"
    software_build._prepare(scene.config, scene.url, numbers)
    assert not path.exists()
    (home / ".netrc").write_text("machine x\n")
    (home / ".netrc").chmod(0o600)
    shutil.chown(home / ".netrc", USER)
    software_build._prepare(scene.config, scene.url, numbers)
    assert (path.read_text(), path.stat().st_mode & 0o777, path.stat().st_uid) == (
        "machine x\n",
        0o600,
        owner.pw_uid,
    )
    (home / ".netrc").unlink()
    (home / ".netrc").symlink_to("/etc/shadow")
    with pytest.raises(PartitiondError, match="plain file"):
        software_build._prepare(scene.config, scene.url, numbers)
    (home / ".netrc").unlink()
    software_build._prepare(scene.config, scene.url, numbers)
    assert not files.there(str(path)), "what was copied before stays"
    # users can make hard links to root's secrets where fs.protected_hardlinks is 0 (proc_sys_fs(5))
    secret = scene.base / "secret"
    secret.write_text("root's own\n")
    secret.chmod(0o600)
    os.link(secret, home / ".netrc")
    with pytest.raises(PartitiondError, match="belongs to uid 0"):
        software_build._prepare(scene.config, scene.url, numbers)
    assert not files.there(str(path))


def test_what_is_remembered_of_one_release_is_damaged(scene):
    """That one alone fails: the lane, the guard, what is remembered of the others and status go on."""
    context = Context.of(scene.config)
    urls = [f"http://{number}/" for number in range(9)]
    for url in urls:
        (scene.base / "software" / software_name(url)).mkdir()
        context.store.save_software(SoftwareState(url, available=True, failures=1, next_try=9e9))
    damaged = scene.base / "state" / "software" / f"{software_name(urls[0])}.json"
    damaged.write_text('{"url": "http')
    scene.places.outcomes.mkdir()
    for url in urls[:2]:
        build_keeper.save_outcome(scene.places, Outcome(url, code="software.build", message="m"))
    states = ["destroyed"] * 3 + ["available"] * 6
    wished = tuple(SoftwareDocument(url, state) for url, state in zip(urls, states, strict=True))
    document = ComputerDocument("C", software=wished)
    spared, held = destroy_guard.spare_software(context, document)
    assert [url for url, _ in held] == urls[:3], "what cannot be read is there all the same"
    assert [one.url for one in spared.software] == urls[3:]
    softwares.note_listed(context, document.software[:8])
    assert [one.url for one in context.store.softwares() if not one.listed] == [urls[8]]
    lanes._forgive(context)
    assert not any(one.next_try for one in context.store.softwares())
    result = softwares.run_pass(context, replace(document, software=document.software[:2]))
    assert (urls[0], "state.damaged") in [(url, error.code) for url, error in result.failures]
    assert not (scene.base / "software" / software_name(urls[1])).exists()
    assert (scene.base / "software" / software_name(urls[0])).exists()
    assert not list(build_keeper.outcomes(scene.config))
    rows = software_status.releases(context)
    assert {row["url"]: row["state"] for row in rows}[str(damaged)] == "unknown"
    assert len(rows) == 8
    context.meters.close()


def test_what_is_collected(scene, monkeypatch):
    """Of the releases that are not listed: none that an instance has or is about to have, and never many at one answer."""
    context = Context.of(scene.config)
    urls = [f"http://{number}/" for number in range(6)]
    for url in urls:
        (scene.base / "software" / software_name(url)).mkdir()
        context.store.save_software(SoftwareState(url, available=True))
    context.store.save_instance(InstanceState("slappart0", "started", software_release=urls[0]))
    soon = PartitionDocument("slappart1", "started", software_release=urls[1])
    answers = []
    monkeypatch.setattr(lanes, "ask", lambda _: answers[0])

    def collect(answer):
        answers[:] = [answer]
        result = lanes.Result([], [])
        lanes._collect(context, result)
        left = {one.url for one in context.store.softwares()}
        return [error.code for _, error in result.failures], sorted(left)

    # one that lists nothing, as of a master restored from a backup, takes nothing at once
    answer = ComputerDocument("C", partitions=(soon,))
    assert collect(answer) == (["software.held"] * 4, urls)
    assert collect(replace(answer, rejected_software=("x",))) == (["software.not_collected"], urls)
    listed = SoftwareDocument(urls[2], "available"), SoftwareDocument(urls[3], "available")
    assert collect(replace(answer, software=listed)) == ([], urls[:4])
    assert collect(answer) == ([], urls[:2])
    context.meters.close()


def test_a_pass_is_limited_to_what_was_asked_for(scene):
    context = Context.of(scene.config)
    urls = ("http://one/", "http://two/", "http://three/")
    for url in urls:
        (scene.base / "software" / software_name(url)).mkdir()
        context.store.save_software(SoftwareState(url, available=True))
    entries = [SimpleNamespace(url=url, requested_state="destroyed") for url in urls]
    document = SimpleNamespace(software=entries)
    softwares.note_listed(context, entries[1:])
    assert [one.url for one in context.store.softwares() if not one.listed] == ["http://one/"]
    result = softwares.run_pass(context, document, only=frozenset((urls[0], software_name(urls[2]))))
    # nobody listens at the master's address: all that fails is to tell it
    assert [(url, error.code) for url, error in result.failures] == [
        (urls[0], "slap.unreachable"),
        (urls[2], "slap.unreachable"),
    ]
    assert [one.url for one in context.store.softwares()] == [urls[1]]
    context.meters.close()
