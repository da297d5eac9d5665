"""That something was destroyed is told until the master takes it: not each pass, and not while the master is away."""

import production_master
import pytest

from partitiond.context import Context
from partitiond.told_ends import ToldEnds
from slap_client.errors import SlapError

ENDPOINT = "destroyedComputerPartition"


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def master():
    with production_master.running("COMP-1") as made:
        made.offer("slappart0", "slappart1")
        yield made


@pytest.fixture
def context(master, node_config):
    node = node_config(
        2,
        interface="lo",
        slapos={
            "master_url": master.url,
            "master_ca_file": master.ca_file,
            "cert_file": master.cert_file,
            "key_file": master.key_file,
        },
    )
    node.state.mkdir(mode=0o700)
    made = Context.of(node.load())
    made.ends = ToldEnds(clock=Clock())
    made.wishes.clock = Clock()
    yield made
    made.connection.close()
    made.meters.close()


@pytest.fixture
def tell(context, master):
    """Tell of an end as the report lane does; gives how many requests that took and what was raised."""

    def told(name="slappart0", lane="report"):
        since, caught = len(master.asked), None
        with context.steady(), context.in_lane(lane):
            try:
                context.ends.tell(context, name, lambda client: client.instance_destroyed(name))
            except SlapError as error:
                caught = error
        return master.counts(since).get(ENDPOINT, 0), caught

    return told


def test_a_refusal_makes_the_pause_of_one_longer(master, context, tell):
    master.override(ENDPOINT, 400)
    posts = []
    for _ in range(480):  # a pass in 30 s, for four hours
        sent, error = tell()
        assert error is not None
        assert error.unsent is not bool(sent)
        posts.append(sent)
        context.ends.clock.now += 30
    assert 8 <= sum(posts) <= 12
    context.wishes.spare(context.client, "report")  # the master is not away for that
    sent, error = tell(lane="")
    assert (sent, error.unsent) == (1, False), "by hand, at once"
    master.clear()
    master.want("slappart0", "/srv/software.cfg")
    master.want("slappart0", state="destroyed")
    context.ends.clock.now += 3600
    assert tell() == (1, None)


def test_it_is_told_nothing_while_it_is_away(master, context, tell):
    master.override(ENDPOINT, 503)
    sent, error = tell()
    assert (sent, error.status) == (1, 503)
    for name in ("slappart0", "slappart1"):
        sent, error = tell(name)
        assert (sent, error.unsent) == (0, True)
        assert error.retry_after
    context.wishes.clock.now += 300
    assert tell("slappart1")[0] == 1


def test_what_another_waited_for_is_tried_next(context, tell, monkeypatch):
    objects = {"slappart0"}

    def destroyed(_client, name):
        if name in objects:
            raise SlapError("slap.destroy_refused", "it has others", retryable=True, status=200)

    monkeypatch.setattr("slap_client.client.SlapClient.instance_destroyed", destroyed)
    assert not tell()[1].unsent
    assert tell()[1].unsent
    assert tell("slappart1")[1] is None
    assert not tell()[1].unsent
    objects.clear()
    assert tell()[1].unsent
    assert tell("slappart1")[1] is None
    assert tell()[1] is None


def test_another_master_has_refused_nothing(master, context, tell):
    master.override(ENDPOINT, 400)
    assert tell()[0] == 1
    assert tell()[0] == 0
    master.clear()
    master.want("slappart0", "/srv/software.cfg")
    master.want("slappart0", state="destroyed")
    context.connection.close()  # as a reload to other settings does
    assert tell() == (1, None)
