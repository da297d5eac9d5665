"""One configuration from begin to end of a pass, and the next one afterwards."""

import threading

import pytest

from partitiond import converge, status
from partitiond.context import Context
from partitiond.state import InstanceState


@pytest.fixture
def node(node_config):
    return node_config(2, interface="lo")


def edited(node, **settings):
    node.write(**settings)
    return node.load()


def test_a_steady_block_keeps_what_was_in_force_at_its_begin(node):
    context = Context.of(node.load())
    first = context.config
    with context.steady():
        held = context.current
        context.adopt(edited(node, slapformat={"partition_amount": 3}))
        assert context.config is first
        assert (context.supervisor, context.events) == (held.supervisor, held.events)
        with context.steady():
            assert context.config.partition_amount == 3, "what begins now sees the new one"
        assert context.config is first
    assert context.config.partition_amount == 3


def test_other_threads_see_the_new_one_at_once(node):
    context = Context.of(node.load())
    seen = []
    with context.steady():
        context.adopt(edited(node, slapformat={"partition_amount": 3}))
        other = threading.Thread(target=lambda: seen.append(context.config.partition_amount))
        other.start()
        other.join()
    assert seen == [3]


def test_the_connection_to_the_master_follows(node):
    context = Context.of(node.load())
    first = context.client
    others = []
    thread = threading.Thread(target=lambda: others.append(context.client))
    thread.start()
    thread.join()
    assert others == [first], "all threads have one connection"
    context.adopt(edited(node, slapformat={"partition_amount": 3}))
    assert context.client is first, "what says nothing of the master changes nothing"
    with context.steady():
        context.adopt(edited(node, slapos={"master_url": "http://127.0.0.1:2/"}))
        assert context.client is first, "a pass ends with the one that it began with"
    second = context.client
    assert second is not first
    pin = f"sha256:{'0' * 64}"
    context.adopt(
        edited(node, slapos={"master_url": "https://127.0.0.1:2/"}, partitiond={"master_fingerprint": pin})
    )
    assert context.client is not second
    context.connection.close()


def test_processes_that_are_shown_are_never_older_than_the_state(node, monkeypatch):
    """Whoever waits for an instance to be started relies on its processes then."""
    context = Context.of(node.load())
    context.config.state_dir.mkdir(mode=0o700)
    name = "slappart0"
    look = converge.observe

    def meanwhile(*args, **options):
        seen = look(*args, **options)
        context.store.save_instance(InstanceState(name, "started", "started"))
        return seen

    monkeypatch.setattr(converge, "observe", meanwhile)
    assert status.partition(context, name)["state"] == "free"
    monkeypatch.setattr(converge, "observe", look)
    assert status.partition(context, name)["state"] == "started"
