"""Builds of releases that outlive the daemon, and all that may end them: never two at once, nothing left, nothing lost."""

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from life_front import WISHES, always
from life_node import COMPUTER, alive, parent, processes_of

from partitiond import build_keeper, config


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(partitions=2, software_interval=1, instances_interval=1, meter_interval=5)
    node.start()
    node.offer()
    return node


@dataclass(frozen=True)
class Building:
    """A release whose build waits in a process of its own: ``waiting``; ``runner`` is the one that builds."""

    url: str
    fifo: Path
    waiting: int
    runner: build_keeper.Runner

    def go_on(self):
        os.close(os.open(self.fifo, os.O_WRONLY))


@pytest.fixture
def building(node, request):
    name = request.node.name.removeprefix("test_")
    fifo = node.base / f"{name}.fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o644)
    url = node.release(name, build=f"cat {fifo}")
    node.supply(url)
    return Building(url, fifo, busy(node, fifo), runner(node))


def uid(node):
    return Path(node.base, "software").stat().st_uid


def busy(node, fifo):
    def one():
        found = [pid for pid, line in processes_of(uid(node)).items() if line == f"/bin/cat {fifo}"]
        assert len(found) <= 1, "two builds at once"
        return found

    return node.wait(one, "the build to be busy")[0]


def runner(node):
    return build_keeper.running(config.load(node.configuration))


def nothing_builds(node):
    node.wait(lambda: runner(node) is None, "the build to be over", 5)
    node.wait(lambda: not processes_of(uid(node)), "what was left of the build to be ended", 5)


def built(node, url):
    node.wait((node.software(url) / ".completed").exists, "the release to be whole")
    node.wait(lambda: told(node, "availableSoftwareRelease", url), "the master to be told")


def told(node, endpoint, url):
    return [one for one in node.front.seen if one.endpoint == endpoint and one.fields["url"] == url]


def test_it_outlives_a_killed_daemon_and_ends_while_there_is_none(node, building):
    assert parent(building.runner.pid) == 1, "it is the child of somebody who may be waited for"
    (shown,) = node.cli("status").value["software"]
    assert (shown["url"], shown["state"]) == (building.url, "building")
    logs = subprocess.run(
        node.line("logs", "software", building.url),
        env=node.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"building {building.url}" in logs.stdout
    node.kill()
    node.start()
    assert busy(node, building.fifo) == building.waiting
    assert runner(node) == building.runner
    assert len(told(node, "buildingSoftwareRelease", building.url)) == 1
    node.kill()
    building.go_on()
    node.wait((node.software(building.url) / ".completed").exists, "it to be built without a daemon")
    nothing_builds(node)
    node.start()
    built(node, building.url)
    assert len(told(node, "buildingSoftwareRelease", building.url)) == 1
    (event,) = node.wait(lambda: events_of(node, building.url), "its end to be recorded")
    assert event["event"] == "software.available"


def test_sigterm_leaves_it_running_and_sync_waits_for_it(node, building):
    assert node.terminate() < 12
    assert runner(node) == building.runner
    waiting = node.begin_cli("sync", "software")
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1.5)
    assert busy(node, building.fifo) == building.waiting
    building.go_on()
    assert f"{building.url}: available" in node.end_cli(waiting, 0).value["done"]
    built(node, building.url)
    nothing_builds(node)
    node.start()


def test_a_killed_runner_is_ended_whole_and_its_build_gone_on_with(node, building):
    url = building.url
    node.build_says(url, "sleep 1")
    os.kill(building.runner.pid, signal.SIGKILL)
    built(node, url)
    assert not alive(building.waiting), "what a killed build left goes on beside the next one"
    nothing_builds(node)
    assert not told(node, "softwareReleaseError", url), "nothing was wrong with the release"


@pytest.mark.full
def test_all_killed_at_once(node, building):
    os.kill(building.runner.pid, signal.SIGKILL)
    node.kill()
    node.build_says(building.url, "")
    node.start()
    built(node, building.url)
    assert not alive(building.waiting)
    nothing_builds(node)


def test_a_wish_to_destroy_it_ends_it(node, building):
    url = building.url
    node.slapos("remove", url, COMPUTER)
    node.wait(lambda: told(node, "destroyedSoftwareRelease", url), "its removal to be told")
    assert not alive(building.runner.pid)
    assert not alive(building.waiting)
    nothing_builds(node)
    assert not node.software(url).exists()
    assert not told(node, "softwareReleaseError", url)
    (event,) = node.wait(lambda: events_of(node, url), "its removal to be recorded")
    assert event["event"] == "software.removed", "its end was taken for a failure"


def events_of(node, url):
    lines = (node.base / "log" / "events.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["resource"] == f"software/{url}"]


def test_why_a_build_failed_is_the_first_thing_said(node):
    url = node.release("broken", build="fail no such compiler: pcc")
    node.supply(url)
    (report,) = node.wait(lambda: told(node, "softwareReleaseError", url), "the failure to be told")
    first, *_, last = report.fields["error_log"].splitlines()
    assert first == "no such compiler: pcc (initializing section instance-profile)"
    assert last == first


def test_a_release_that_vanished_from_the_list_is_kept(node):
    name = "it_outlives_a_killed_daemon_and_ends_while_there_is_none"
    url = str(node.base / name / "software.cfg")
    real = node.front.wishes(COMPUTER)
    # the master lists it under the name of one that waits for its next try: its own is gone
    changed = real.replace(name.encode(), b"broken")
    node.front.answers[WISHES] = always(changed, 200)
    try:
        state = node.base / "state" / "software" / f"{node.software(url).name}.json"
        node.wait(lambda: not json.loads(state.read_text())["listed"], "it to be missed")
        assert (node.software(url) / ".completed").exists()
        (item,) = [one for one in node.cli("status").value["software"] if one["url"] == url]
        assert (item["state"], item["listed"]) == ("available", False)
    finally:
        del node.front.answers[WISHES]
    node.wait(lambda: json.loads(state.read_text())["listed"], "it to be listed again")


def test_a_build_without_room_is_refused(node):
    url = node.release("large")
    text = node.configuration.read_text()
    node.configuration.write_text(text.replace("[slapos]\n", "[slapos]\nsoftware_min_free_space = 900000T\n"))
    try:
        node.cli("apply")
        node.supply(url)
        (report,) = node.wait(lambda: told(node, "softwareReleaseError", url), "the refusal to be told")
        assert "free at" in report.fields["error_log"]
        assert not node.software(url).exists()
    finally:
        node.configuration.write_text(text)
        node.cli("apply")
    node.slapos("remove", url, COMPUTER)


def test_teardown_ends_it(node, building):
    node.cli("teardown")
    node.daemon.wait(30)
    assert not alive(building.runner.pid)
    assert not alive(building.waiting)
    nothing_builds(node)
