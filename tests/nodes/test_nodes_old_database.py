"""A master that is started with an older copy of its database: nothing that runs is lost, and it is said what is the matter.

One node, and the stock slapproxy: what it knew of instances that were requested, or destroyed, since the copy is gone.
"""

import json
import shutil
import time

import nodes_life
import pytest
from life_eyes import events, fetch
from life_node import Node, processes_of

make_node, no_leaks = nodes_life.make_node, nodes_life.no_leaks


class World(Node):
    """A node whose master can be put back."""

    def keep(self):
        """Copy the database, as a backup does it."""
        self._master.terminate()
        self._master.wait(20)
        shutil.copy(self.base / "proxy.db", self.base / "older.db")
        self._start_master()
        self.wait(self._master_answers, "the master to answer")

    def put_back(self):
        self._master.terminate()
        self._master.wait(20)
        shutil.copy(self.base / "older.db", self.base / "proxy.db")
        self._start_master()
        self.wait(self._master_answers, "the master to answer")

    def partition(self, name):
        """As the daemon tells it, which takes no interpreter's start."""
        status, _, text = fetch(self, f"/1/partitions/{name}")
        assert status == 200, text
        value = json.loads(text)
        return value.get("partition", value)

    def partitions(self):
        status, _, text = fetch(self, "/1/status")
        assert status == 200, text
        return {item["id"]: item for item in json.loads(text)["partitions"]}

    def cases(self):
        return json.loads(fetch(self, "/1/status")[2])["node"]["open_cases"]

    def runs(self, name, text):
        """That an instance serves what it was told to, with the data that it had."""
        item = self.partition(name)
        assert item["state"] == "started", item
        assert self.page(item) == text
        assert (self.base / "instance" / name / "srv" / "data").read_text() == text

    def give_data(self, name, text):
        """What the instance alone has."""
        directory = self.base / "instance" / name / "srv"
        (directory / "data").write_text(text)


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(World, partitions=4, software_interval=1, instances_interval=1, meter_interval=5)
    node.start()
    node.offer()
    node.url = node.release()
    node.supply(node.url)
    node.homes = {}
    for title in ("early", "gone"):
        put(node, title)
    node.keep()
    # since then: one more, and one less
    put(node, "late")
    node.request("gone", node.url, state="destroyed")
    node.cli("sync", "instances")
    node.wait(lambda: node.cli("sync", "report", expect=None).status == 0, "the end to be told")
    node.wait(lambda: node.partition(node.homes["gone"])["state"] == "free", "the end")
    return node


def put(node, title):
    node.request(title, node.url, text=title)
    name = node.homes[title] = node.holder(title)
    node.wait_for_state(name, "started")
    node.wait(lambda: node.page(node.partition(name)) == title, "the service to answer")
    node.give_data(name, title)


def passes(node, count=4):
    """Let the daemon ask so often."""
    seen = len(node.front.seen)
    node.wait(lambda: node.front.count("getFullComputerInformation", seen) >= count, "the daemon to ask", 60)


def test_what_it_does_not_know_runs_on(node, capsys):
    late, gone = node.homes["late"], node.homes["gone"]
    before = {key: pid for key, pid in node.tenants().items() if key[0] != gone}
    seen = len(node.front.seen)
    node.put_back()
    began = time.monotonic()
    node.wait(lambda: events(node, "instance.dropped"), "the daemon to tell")
    told = time.monotonic() - began
    # the one that it thinks is there is an instance that it wants: it begins empty
    node.wait_for_state(gone, "started")
    passes(node)
    after = node.tenants()
    assert {key: after.get(key) for key in before} == before, "something was stopped, or started anew"
    node.runs(late, "late")
    node.runs(node.homes["early"], "early")
    for endpoint in ("stoppedComputerPartition", "destroyedComputerPartition"):
        assert not node.front.count(endpoint, seen)
    (event,) = events(node, "instance.dropped")
    assert event["partition"] == late
    (case,) = (case for case in node.cases() if case.startswith(f"{late}: "))
    assert "never asked for the end of late" in case
    assert f"--force --partition {late}" in case
    said = node.cli("sync", "instances", expect=3)
    assert [(one["resource"], one["code"]) for one in said.value["failures"]] == [(late, "instances.dropped")]
    with capsys.disabled():
        print(
            f"\n  an older database: told after {told:.1f} s; {len(before)} programs kept, 0 stopped: {case}"
        )


def test_forcing_all_is_no_word_about_it(node):
    late = node.homes["late"]
    said = node.cli("sync", "instances", "--force", expect=3).value
    assert not any(line.startswith(f"{late}: ") for line in said["done"])
    node.runs(late, "late")


def test_an_explicit_end_of_another_does_not_wait_for_it(node):
    gone = node.homes["gone"]
    node.request("gone", node.url, state="destroyed")
    node.wait(lambda: node.partition(gone)["state"] in ("destroying", "free"), "the end of the other")
    node.wait(lambda: node.cli("sync", "report", expect=None).status == 0, "the end to be told")
    node.runs(node.homes["late"], "late")


def test_a_restart_of_the_daemon_and_of_its_programs_changes_nothing(node):
    late = node.homes["late"]
    node.kill()
    node.start()
    passes(node)
    node.cli("apply")
    node.runs(late, "late")
    assert len(events(node, "instance.dropped")) == 1, "told again"


def test_another_instance_is_not_let_in(node):
    """The master gives the partition away: with slapproxy's guids, which name partitions, the title alone tells."""
    late = node.homes["late"]
    seen = len(node.front.seen)
    for number in range(4):
        try:
            node.holder(f"other{number}")
        except AssertionError:
            node.request(f"other{number}", node.url, text="other")
        if node.holder(f"other{number}") == late:
            break
    other = f"other{number}"
    node.wait(lambda: len(events(node, "instance.dropped")) == 2, "it to be told")
    passes(node)
    node.runs(late, "late")
    assert any("gives it to another instance" in case and other in case for case in node.cases())
    assert node.front.count("softwareInstanceError", seen) == 1
    # and back: the other gives way, and the one that is there is requested anew
    node.request(other, node.url, state="destroyed")
    # slapproxy forgets what is asked of an instance whose end is not told yet
    node.wait(lambda: node.wishes()[late].free, "the end of the other to be told")
    node.other = other


def test_the_operator_ends_it_by_name(node):
    late = node.homes["late"]
    uid = node.partition(late)["user"]["uid"]
    node.request(node.other, node.url, state="started", text="other")
    passes(node)
    node.runs(late, "late")
    assert processes_of(uid)
    said = node.cli("sync", "instances", "--force", "--partition", late).value
    assert said["done"] == [f"{late}: stopped, to be destroyed"]
    node.wait(lambda: (node.page(node.partition(late)) or "") == "other", "the other to run there")
    assert not (node.base / "instance" / late / "srv" / "data").exists()
    assert not any(case.startswith(f"{late}: ") for case in node.cases())


def test_requested_anew_it_has_its_partition_and_its_data_again(node):
    """In the order of before, slapproxy gives the same partitions."""
    node.keep()
    put(node, "again")
    name = node.homes["again"]
    before = node.tenants()
    node.put_back()
    node.wait(lambda: events(node, "instance.dropped")[-1]["partition"] == name, "it to be told")
    node.request("again", node.url, text="again")
    assert node.holder("again") == name
    node.wait(lambda: events(node, "instance.wanted_back"), "it to be known again")
    passes(node)
    node.runs(name, "again")
    kept = {key: pid for key, pid in before.items() if key[0] == name and "http" in key[1]}
    after = node.tenants()
    assert {key: after[key] for key in kept} == kept
    assert node.cli("sync", "instances").status == 0


def test_a_computer_that_it_does_not_know_at_all(node, capsys):
    """A master that knows nothing: the node is offered again by itself, and what runs runs on."""
    before = node.tenants()
    seen = len(node.front.seen)
    node.renew_master()
    node.wait(
        lambda: node.front.count("loadComputerConfigurationFromXML", seen), "the capacity to be posted", 60
    )
    passes(node)
    assert node.tenants() == before
    busy = {name for name, _ in before}
    told = {one["partition"] for one in events(node, "instance.dropped")}
    assert busy <= told
    assert not node.front.count("stoppedComputerPartition", seen)
    cases = [case for case in node.cases() if case.partition(":")[0] in busy]
    assert len(cases) == len(busy)
    posted = node.front.count("loadComputerConfigurationFromXML", seen)
    assert posted <= 2, "it is offered again and again"
    with capsys.disabled():
        print(f"\n  a master that knows nothing: offered again {posted} times, {len(before)} programs kept")
