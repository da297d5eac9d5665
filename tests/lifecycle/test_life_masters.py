"""A master that is away, slow or wrong: what runs keeps running, the message is clear, and the daemon finds back."""

import time

import pytest
from life_front import WISHES, all_free, always, drip, send, without_partitions
from life_node import COMPUTER


@pytest.fixture(scope="module")
def node(make_node):
    node = make_node(software_interval=1, instances_interval=1, meter_interval=5)
    node.start()
    node.offer()
    url = node.release()
    node.supply(url)
    for title in ("one", "two"):
        node.request(title, url, text=title)
    for title in ("one", "two"):
        node.wait_for_state(node.holder(title), "started")
    node.url = url
    return node


@pytest.fixture(scope="module")
def beside(node):
    """An ``apply`` on the same state that finds no way to hand it over; it waits long, so it is started early."""
    other = node.base / "other.cfg"
    text = node.configuration.read_text()
    other.write_text(text.replace(f"run_dir = {node.base}/run", f"run_dir = {node.base}/elsewhere"))
    process = node.begin_cli("apply", configuration=other)
    yield process
    process.kill()
    process.communicate()


def test_second_daemon(node, beside):
    before = node.tenants()
    second = node.begin_cli("run")
    out, text = second.communicate(timeout=60)
    assert second.returncode == 1, out + text
    assert "[node.busy]" in text
    assert f"process {node.daemon.pid}" in text
    assert "Traceback" not in text
    # what can be handed to the daemon is done by it, at once
    assert node.cli("apply").value["done"] == 0
    assert beside.poll() is None
    assert node.daemon.poll() is None
    unharmed(node, before)


def damaged(node, kind):
    """What the master answers to everything, and the code by which that is called."""
    good = node.front.wishes(COMPUTER)
    answers = {
        "500": (always(b"<html><h1>boom</h1></html>", 500), "slap.unavailable"),
        "503": (always(b"", 503), "slap.unavailable"),
        "404": (always(b"no such page", 404), "slap.not_found"),
        "garbage": (always(b"\x00\xff\x1b[2J no XML at all"), "slap.garbage"),
        "empty body": (always(b""), "slap.garbage"),
        "truncated": (always(good[: len(good) // 2]), "slap.garbage"),
        "another computer": (always(good.replace(COMPUTER.encode(), b"COMP-OTHER")), "slap.garbage"),
        "no partition": (always(without_partitions(good)), "instances.empty_answer"),
    }
    return answers[kind]


def refused(node, code):
    """What must hold while the master is no good."""
    said = node.cli("sync", "instances", expect=1)
    error = said.value["error"]
    assert error["code"] == code
    assert error["message"]
    assert error["hint"]
    assert f"partitiond: [{code}]" in said.text
    assert "\x1b" not in said.text, "the answer of a master could steer the terminal"
    assert node.cli("sync", "software", expect=1).value["error"]["code"] == code


def unharmed(node, before):
    assert node.tenants() == before
    node.settled()
    assert set(node.states().values()) == {"started", "free"}


def recovers(node, since):
    """The daemon comes back by itself once the master is good again."""
    reachable = lambda: node.cli("status").value["node"]["master"]["reachable"]  # noqa: E731 - a word for it
    node.wait(lambda: node.front.count(WISHES, since) >= 2 and reachable(), "the daemon to find back", 30)


@pytest.mark.parametrize(
    "kind",
    [
        *("503", "404", "truncated"),
        *(
            # ten thousand others are in tests/masters
            pytest.param(kind, marks=pytest.mark.full)
            for kind in ("500", "garbage", "empty body", "another computer", "no partition")
        ),
    ],
)
def test_wrong_answers(node, kind):
    before, (answer, code) = node.tenants(), damaged(node, kind)
    node.front.answers["*"] = answer
    try:
        refused(node, code)
        node.wait(lambda: f"instances: [{code}]" in node.log_tail(100_000), "the daemon to complain")
        if code.startswith("slap"):
            assert node.cli("status").value["node"]["master"]["reachable"] is False
        unharmed(node, before)
    finally:
        node.front.answers.clear()
    recovers(node, len(node.front.seen))


def test_master_that_is_down(node):
    before = node.tenants()
    node.front.close()
    try:
        refused(node, "slap.unreachable")
        assert node.cli("status").value["node"]["master"]["reachable"] is False
        unharmed(node, before)
    finally:
        node.front.open()
    recovers(node, len(node.front.seen))
    # and it does what is wanted again
    name = node.holder("one")
    node.request("one", node.url, text="after")
    node.wait(lambda: node.page(node.partition(name)) == "after", "the daemon to do its work again")
    node.wait_for_state(name, "started")


def test_master_that_never_ends_its_answer(node):
    before = node.tenants()
    node.front.answers["*"] = drip(node.front)
    try:
        node.wait(lambda: node.front.held_up >= 1, "the lanes to hang on the master")
        waiting = node.begin_cli("sync", "instances")
        unharmed(node, before)
        time.sleep(0.5)
        assert waiting.poll() is None
    finally:
        node.front.answers.clear()
    # the answers break off half-way; whoever asked after that has a good one
    out, _ = waiting.communicate(timeout=60)
    assert waiting.returncode in (0, 1), out
    recovers(node, len(node.front.seen))
    unharmed(node, before)


def test_one_answer_that_lists_everything_as_free(node):
    """The guard: what is only no longer listed waits for a second answer that says the same."""
    before, front = node.tenants(), node.front
    free = all_free(front.wishes(COMPUTER))
    held = lambda: node.log_tail(100_000).count("instances.held")  # noqa: E731 - a word for it

    def answer(handler, body):
        # the daemon says what it holds before it asks again
        if held():
            front.forward(handler, body)
        else:
            send(handler, 200, free)

    front.answers[WISHES] = answer
    try:
        node.wait(held, "the guard")
    finally:
        front.answers.clear()
    recovers(node, len(front.seen))
    unharmed(node, before)
    assert not node.front.count("destroyedComputerPartition")
    assert not node.front.count("stoppedComputerPartition")


def test_apply_beside_the_daemon_gives_up(node, beside):
    error = node.end_cli(beside, expect=1).value["error"]
    assert error["code"] == "node.busy"
    assert f"process {node.daemon.pid}" in error["message"]


def test_daemon_ends_while_the_master_hangs(node):
    before = node.tenants()
    node.front.answers["*"] = drip(node.front)
    try:
        node.wait(lambda: node.front.held_up >= 1, "the lanes to hang on the master")
        assert node.terminate() < 15
    finally:
        node.front.answers.clear()
    assert node.tenants() == before
    node.start()
    recovers(node, len(node.front.seen))
    unharmed(node, before)
