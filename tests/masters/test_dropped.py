"""What a node does not give up on the master's word, or before it can be judged: an instance for another, its addresses."""

import time
from types import SimpleNamespace

import production_master
import pytest

from partitiond import instances, lanes
from partitiond.context import Context
from partitiond.errors import PartitiondError
from partitiond.state import InstanceState

NAME = "slappart0"


@pytest.fixture
def master():
    with production_master.running("COMP-1") as made:
        made.offer(NAME, "slappart1")
        yield made


@pytest.fixture(params=["", "off"], ids=["guarded", "unguarded"])
def context(request, master, node_config):
    node = node_config(
        2,
        interface="lo",
        partitiond={"destroy_guard": request.param} if request.param else {},
        slapos={
            "master_url": master.url,
            "master_ca_file": master.ca_file,
            "cert_file": master.cert_file,
            "key_file": master.key_file,
        },
    )
    node.state.mkdir(mode=0o700)
    made = Context.of(node.load())
    yield made
    made.connection.close()
    made.meters.close()


def one_pass(context):
    node = SimpleNamespace(partitions=[SimpleNamespace(id=NAME)])
    with context.steady(), context.in_lane("instances"):
        known = context.store.readable()[0]
        return instances.run_pass(context, node, context.client.computer(), known=known)


def test_another_instance_is_not_let_in(master, context):
    """Also where the guard is off: that says how much is believed of what is to go, and not who is to have its data."""
    url = "https://releases.test/one.cfg"
    master.supply(url)
    instance = master.want(NAME, url)
    state = InstanceState(NAME, "started", "started", "SOFTINST-before", url, timestamp="1")
    context.store.save_instance(state)
    for _ in range(3):
        ((name, error),) = one_pass(context).failures
        assert (name, error.code) == (NAME, "instances.dropped")
    kept = context.store.instance(NAME)
    assert (kept.life, kept.instance_guid, kept.dropped) == ("started", "SOFTINST-before", True)
    assert instance.guid in kept.rival
    # whoever asked for the other one is told, once
    assert master.words(NAME) == ["error"]


def test_another_instance_waits_for_one_that_is_kept(master, context, caplog):
    """For days, it may be: it is said once, to the operator and to whoever asked for it."""
    url = "https://releases.test/one.cfg"
    master.want(NAME, url)
    state = InstanceState(
        NAME, "destroying", "destroyed", "SOFTINST-before", url, keep_until=time.time() + 9e5
    )
    context.store.save_instance(state)
    for _ in range(3):
        ((name, error),) = one_pass(context).failures
        assert (name, error.code) == (NAME, "instances.kept")
    assert master.words(NAME) == ["error"]
    assert caplog.text.count("is kept until") == 1


def test_a_node_without_an_address_does_not_begin(master, context):
    """What the master has of its partitions fits in nowhere then, and would be lost for good by the first word."""
    master.want(NAME, "https://releases.test/one.cfg")
    with context.steady(), context.in_lane("capacity"), pytest.raises(PartitiondError) as caught:
        lanes.capacity(context)
    assert caught.value.code == "capacity.no_ipv6"
    assert not context.offers.read().told
