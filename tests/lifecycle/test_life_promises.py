"""Promises in the life of an instance: the daemon finds what fails between two passes of the master's lane, and tells it."""

import os
from pathlib import Path

import pytest
from promise_scene import PLUGIN, SLAPOS_CORE

ERROR, STARTED = "softwareInstanceError", "startedComputerPartition"


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(partitions=3, software_interval=1, instances_interval=1, promise_interval=1)
    node.start()
    node.offer()
    return node


@pytest.fixture(scope="module")
def url(node):
    found = node.release()
    node.supply(found)
    return found


def plugin(item, sense):
    """As the instance's own buildout would write it; asked every second. It does not bang, so nothing is processed anew."""
    init = "    self.setPeriodicity(0.02)\n    self.allowBang(False)"
    text = PLUGIN.format(core=SLAPOS_CORE, config={}, init=init, sense=f"    {sense}", more="")
    directory = Path(item["path"], "etc", "plugin")
    directory.mkdir(exist_ok=True)
    new = directory / "new"
    new.write_text(text)
    for path in (directory, new):
        os.chown(path, item["user"]["uid"], item["user"]["uid"])
    new.rename(directory / "flag.py")


def test_a_failure_is_told_and_so_is_its_end(node, url):
    node.request("one", url, text="one")
    name = node.holder("one")
    item = node.wait_for_state(name, "started")
    node.wait(lambda: node.front.count(STARTED), "the instance to be told of")
    flag = Path(item["path"], "flag")
    flag.write_text("")
    plugin(item, "import os; (self.logger.info if os.path.exists('flag') else self.logger.error)('flag?')")
    promises = node.wait(lambda: node.partition(name)["promises"], "the promise to be asked")
    assert [(one["name"], one["state"]) for one in promises] == [("flag.py", "ok")]
    before, buildouts = len(node.front.seen), node.buildouts(name)
    flag.unlink()
    node.wait(lambda: node.front.count(ERROR, before), "the failure to be told")
    told = [one.fields["error_log"] for one in node.front.seen[before:] if one.endpoint == ERROR]
    assert "Promise 'flag.py' failed with output: flag?" in told[0]
    (one,) = node.partition(name)["promises"]
    assert (one["state"], one["message"]) == ("failed", "flag?")
    assert node.partition(name)["state"] == "started"
    before = len(node.front.seen)
    flag.write_text("")
    node.wait(lambda: node.front.count(STARTED, before), "the end of it to be told")
    node.wait(lambda: node.partition(name)["promises"][0]["state"] == "ok", "it to be shown")
    assert node.front.count(ERROR, before) == 0
    assert node.buildouts(name) == buildouts


def test_a_promise_that_looks_through_a_tunnel_does_not_fail_for_the_first_time(node, url):
    """The tunnel is declared by the very buildout after which the promise is asked."""
    before = len(node.front.seen)
    look = "exec /usr/bin/python3 -c 'import socket, sys; socket.create_connection((sys.argv[1], 8443), 1)' $PUBLIC"
    node.request("two", url, text="two", tunnel="8443", promise=look)
    name = node.holder("two")
    node.wait_for_state(name, "started")
    node.wait(lambda: node.front.count(STARTED, before), "the instance to be told of")
    told = [
        one for one in node.front.seen[before:] if one.endpoint == ERROR and "two" not in one.fields.values()
    ]
    assert [one.fields for one in told] == []
    assert [one["state"] for one in node.partition(name)["promises"]] == ["ok"]


def test_who_is_cut_short_between_the_two_times_asks_again(node, url):
    """The daemon is killed while the promise is asked for the second time, which is as if it had been asked but once."""
    before = len(node.front.seen)
    promise = "n=$(cat asked)x; echo $n > asked; test $n != xx || exec sleep 60; echo no luck; exit 1"
    node.request("three", url, text="three", tunnel="8443", promise=promise)
    name = node.holder("three")
    asked = Path(node.partition(name)["path"], "asked")
    node.wait(lambda: asked.exists() and asked.read_text() == "xx\n", "the promise to be asked twice")
    assert node.front.count(ERROR, before) == 0
    node.kill()
    node.start()
    node.wait(lambda: node.front.count(ERROR, before), "the failure to be told")
    assert asked.read_text().startswith("xxx")
    assert node.partition(name)["state"] == "failed"
