"""What becomes of an instance whose partition the master gives to another one: it stays, and nobody else gets its data."""

from types import SimpleNamespace

import production_master
import pytest

from partitiond import instances
from partitiond.context import Context
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


def test_another_instance_is_not_let_in(master, context):
    """Also where the guard is off: that says how much is believed of what is to go, and not who is to have its data."""
    url = "https://releases.test/one.cfg"
    master.supply(url)
    instance = master.want(NAME, url)
    state = InstanceState(NAME, "started", "started", "SOFTINST-before", url, timestamp="1")
    context.store.save_instance(state)
    node = SimpleNamespace(partitions=[SimpleNamespace(id=NAME)])

    def one_pass():
        with context.steady(), context.in_lane("instances"):
            known = context.store.readable()[0]
            return instances.run_pass(context, node, context.client.computer(), known=known)

    for _ in range(3):
        ((name, error),) = one_pass().failures
        assert (name, error.code) == (NAME, "instances.dropped")
    kept = context.store.instance(NAME)
    assert (kept.life, kept.instance_guid, kept.dropped) == ("started", "SOFTINST-before", True)
    assert instance.guid in kept.rival
    # whoever asked for the other one is told, once
    assert master.words(NAME) == ["error"]
