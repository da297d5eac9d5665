"""The master's wishes are asked for once for all lanes, and its absence is found out by one of them."""

import random
import threading

import production_master
import pytest

from partitiond import lanes, polling
from partitiond.context import Context
from partitiond.passes import Wish
from partitiond.polling import Pace
from partitiond.wishes import SHARED_SECONDS, Wishes
from slap_client.client import SlapClient
from slap_client.errors import SlapError

RELEASE = "/srv/software.cfg"


def dice(seed=1):
    return random.Random(seed)  # noqa: S311 - the same each time


@pytest.fixture
def master():
    with production_master.running("COMP-1") as made:
        made.offer("slappart0", "slappart1")
        yield made


@pytest.fixture
def client(master):
    with SlapClient(
        master.url,
        "COMP-1",
        cert_file=master.cert_file,
        key_file=master.key_file,
        fingerprint=master.fingerprint,
    ) as slap:
        yield slap


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def wishes():
    return Wishes(clock=Clock())


def test_lanes_share_an_answer_once_each(master, client, wishes):
    woken = []
    wishes.answered = woken.append
    first = wishes.ask(client, "software", 5)
    assert wishes.ask(client, "instances", 5) is first
    assert (len(master.asked), woken) == (1, ["software"])
    # both had it: the next question is a new one
    wishes.ask(client, "instances", 5)
    wishes.ask(client, "software", 5)
    assert (len(master.asked), woken) == (2, ["software", "instances"])
    # whoever asks by hand asks the master, and wakes nobody
    wishes.ask(client, "", 5)
    wishes.ask(client, "", 5)
    assert (len(master.asked), len(woken)) == (4, 2)
    assert wishes.ask(client, "software", 5) is first  # unchanged by its tag
    assert [one.status for one in master.asked] == [200, 304, 304, 304]


def test_an_old_answer_is_nobodys(master, client, wishes):
    wishes.ask(client, "software", 5)
    wishes.clock.now += SHARED_SECONDS + 1
    wishes.ask(client, "instances", 5)
    assert len(master.asked) == 2


def test_an_answer_from_before_a_report_is_nobodys(master, client, wishes):
    master.want("slappart0", RELEASE)
    before = wishes.ask(client, "software", 5)
    client.instance_started("slappart0")
    after = wishes.ask(client, "instances", 5)
    assert before.partitions != after.partitions
    # also when nobody knows whether it arrived
    wishes.ask(client, "software", 5)
    count = len(master.asked)
    wishes.ask(client, "software", 5)
    master.override("startedComputerPartition", 500)
    with pytest.raises(SlapError):
        client.instance_started("slappart0")
    wishes.ask(client, "instances", 5)
    assert len(master.asked) == count + 3


def test_who_comes_meanwhile_waits_for_that_answer(master, client, wishes):
    master.slow("*", 0.3)
    found = []
    threads = [
        threading.Thread(target=lambda name=name: found.append(wishes.ask(client, name, 5)))
        for name in ("software", "instances")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]
    assert len(master.asked) == 1


def test_one_lane_finds_out_that_the_master_is_away(master, client, wishes):
    master.override("*", 503, headers={"Retry-After": "60"})
    with pytest.raises(SlapError) as first:
        wishes.ask(client, "software", 5)
    assert first.value.retry_after == 60
    wishes.clock.now += 1
    with pytest.raises(SlapError) as second:
        wishes.ask(client, "instances", 5)
    assert second.value.code == "slap.unavailable"
    assert second.value.retry_after == 59
    assert second.value.unsent
    assert "asked 1 s ago" in second.value.message
    assert second.value.hint
    with pytest.raises(SlapError):
        wishes.spare(client, "capacity")
    assert len(master.asked) == 1
    # by hand, at once
    with pytest.raises(SlapError):
        wishes.ask(client, "", 5)
    assert len(master.asked) == 2
    wishes.spare(client, "")
    master.clear()
    wishes.ask(client, "", 5)
    wishes.spare(client, "capacity")
    wishes.ask(client, "instances", 5)
    assert len(master.asked) == 4 - 1  # the answer that somebody asked for by hand serves the lanes, too


def test_the_pauses_grow_while_it_is_away(master, client, wishes):
    master.override("*", 503)
    pauses = []
    for _ in range(12):
        with pytest.raises(SlapError) as caught:
            wishes.ask(client, "software", 5)
        pauses.append(caught.value.retry_after)
        wishes.clock.now += caught.value.retry_after
    assert len(master.asked) == 12
    assert 2.5 <= pauses[0] <= 5
    assert all(150 <= pause <= 300 for pause in pauses[-4:])
    master.clear()
    wishes.ask(client, "software", 5)
    master.override("*", 503)
    with pytest.raises(SlapError) as caught:
        wishes.ask(client, "software", 5)
    assert caught.value.retry_after <= 5


def test_what_must_be_mended_is_a_trouble(master, client, wishes):
    assert wishes.trouble == ""
    master.override("*", 503)
    with pytest.raises(SlapError):
        wishes.ask(client, "", 5)
    assert wishes.trouble == ""
    with SlapClient(master.url, "COMP-1") as stranger, pytest.raises(SlapError):
        wishes.ask(stranger, "", 5)
    assert master.fingerprint in wishes.trouble
    master.clear()
    wishes.ask(client, "", 5)
    assert wishes.trouble == ""


def test_a_refused_report_is_no_absence(master, client, wishes):
    for status in (400, 404, 500):
        master.override("*", status)
        with pytest.raises(SlapError), wishes.telling(client, "", 5):
            client.post_capacity("<marshal/>")
        wishes.spare(client, "software")
    master.down()
    with pytest.raises(SlapError), wishes.telling(client, "", 5):
        client.post_capacity("<marshal/>")
    with pytest.raises(SlapError):
        wishes.spare(client, "software")


def test_a_master_that_does_not_know_the_computer_can_be_told_of_it(master, client, wishes):
    """slapproxy has but an error until then: whoever could tell it must not be kept from that by the others' questions."""
    woken = []
    wishes.answered = woken.append
    master.override("*", 503)
    with pytest.raises(SlapError):
        wishes.ask(client, "software", 5)
    with pytest.raises(SlapError) as spared, wishes.telling(client, "capacity", 5):
        pytest.fail("it is away")
    assert spared.value.unsent
    wishes.clock.now += 10
    master.clear()
    master.override("getFullComputerInformation", 500)
    master.override("loadComputerConfigurationFromXML", 200)
    for _ in range(2):
        with pytest.raises(SlapError):
            wishes.ask(client, "software", 5)
        assert woken == [""], "who waits to tell it goes along, once"
    with pytest.raises(SlapError):
        wishes.spare(client, "instances")
    with wishes.telling(client, "capacity", 5):
        client.post_capacity("<marshal/>")
    assert master.count("loadComputerConfigurationFromXML") == 1
    wishes.spare(client, "instances")


@pytest.fixture
def other():
    with (
        production_master.running("COMP-1") as made,
        SlapClient(
            made.url,
            "COMP-1",
            cert_file=made.cert_file,
            key_file=made.key_file,
            fingerprint=made.fingerprint,
        ) as slap,
    ):
        yield slap


def test_the_outage_of_a_master_is_no_other_s(master, client, other, wishes):
    master.override("*", 503, headers={"Retry-After": "3600"})
    with pytest.raises(SlapError):
        wishes.ask(client, "software", 5)
    # the configuration names another one now: no lane waits for what the old one asked for
    wishes.ask(other, "instances", 5)
    with pytest.raises(SlapError, match="503"):
        wishes.ask(client, "software", 5)
    with wishes.telling(other, "capacity", 5):
        pass
    wishes.spare(other, "software")


def test_a_question_from_before_a_reload_says_nothing_of_the_master_of_now(master, client, other, wishes):
    master.slow("*", 0.5)
    master.override("*", 503)
    errors = []

    def ask():
        with pytest.raises(SlapError) as caught:
            wishes.ask(client, "", 5)
        errors.append(caught.value)

    asking = threading.Thread(target=ask)
    asking.start()
    while not master.asked:
        asking.join(0.01)
    wishes.ask(other, "", 5)
    asking.join()
    assert errors
    wishes.spare(other, "software")
    assert wishes.trouble == ""


def test_what_ends_an_outage_by_hand_wakes_the_lanes(master, client, wishes):
    woken = []
    wishes.answered = woken.append
    master.override("*", 503)
    with pytest.raises(SlapError):
        wishes.ask(client, "software", 5)
    master.clear()
    wishes.ask(client, "", 5)
    wishes.ask(client, "", 5)
    assert woken == [""]
    master.override("*", 503)
    with pytest.raises(SlapError):
        wishes.ask(client, "", 5)
    master.clear()
    with wishes.telling(client, "", 5):
        pass
    assert woken == ["", ""]


# --- pauses


def test_pauses_after_good_passes_are_jittered():
    pace = Pace(300, dice())
    found = [pace.good() for _ in range(1000)]
    assert 270 <= min(found) < 280
    assert 320 < max(found) <= 330
    assert pace.failures == 0


def test_the_lanes_of_a_node_begin_together_and_apart_from_other_nodes():
    one, two = Pace(300, dice(1), 0.5), Pace(300, dice(2), 0.5)
    assert one.good() == two.good() == pytest.approx(180)
    assert one.good() != two.good()
    assert 30 <= Pace(300, dice(), 0.0).good() <= Pace(300, dice(), 1.0).good() <= 330


def test_pauses_after_failures():
    pace = Pace(86400, dice())
    found = [pace.bad() for _ in range(10)]
    assert 2.5 <= found[0] <= 5
    assert 150 <= found[-1] <= 300
    assert pace.joins(10**6), "what failed is tried as soon as the master answers"
    assert 600 <= pace.bad(600) <= 720
    assert pace.good() > 70000
    assert Pace(1, dice()).bad() <= 1


def test_what_is_due_soon_joins_in():
    pace = Pace(300, dice())
    pace.good()
    assert pace.joins(60)
    assert not pace.joins(61)


def test_the_first_question_after_boot():
    found = [polling.first_pause(20.0, dice(seed)) for seed in range(200)]
    assert max(found) > 25
    assert min(found) < 5
    assert polling.first_pause(3600.0) == 0


# --- the lanes


def test_a_pass_over_an_unchanged_node_is_one_request(master, node_config):
    node = node_config(
        2,
        interface="lo",
        slapos={
            "master_url": master.url,
            "master_ca_file": master.ca_file,
            "cert_file": master.cert_file,
            "key_file": master.key_file,
            "certificate_repository_path": master.directory / "pki",
        },
        partitiond={"address_ownership": "off"},
    )
    context = Context.of(node.load())
    node.state.mkdir(mode=0o700)
    try:
        for _ in range(3):
            since = len(master.asked)
            for name in ("software", "instances"):
                with context.steady(), context.in_lane(name):
                    result = lanes.run(context, name, Wish())
                assert result.done == result.failures == []
            assert master.counts(since) == {"getFullComputerInformation": 1}
        assert [one.status for one in master.asked] == [200, 304, 304]
        assert master.connections == 1
        lanes.run(context, "software", Wish())
        lanes.run(context, "instances", Wish())
        assert len(master.asked) == 5, "by hand, each asks"
        assert not master.violations
    finally:
        context.connection.close()
        context.meters.close()


def test_a_long_pass_asks_the_master_of_the_configuration_in_force(master, node_config, monkeypatch):
    node = node_config(2, interface="lo", partitiond={"address_ownership": "off"})
    context = Context.of(node.load())
    node.state.mkdir(mode=0o700)
    good = {
        "master_url": master.url,
        "master_ca_file": master.ca_file,
        "cert_file": master.cert_file,
        "key_file": master.key_file,
    }
    asked = []

    def run_pass(context, document, *, force, ask, only):
        node.write(slapos={"master_url": "http://127.0.0.1:1/", **dict.fromkeys(list(good)[1:])})
        context.adopt(node.load())
        with pytest.raises(SlapError):
            ask()
        node.write(slapos=good)
        context.adopt(node.load())
        asked.append(ask())
        return lanes.Result([], [])

    monkeypatch.setattr(lanes.softwares, "run_pass", run_pass)
    node.write(slapos=good)
    context.adopt(node.load())
    try:
        with context.steady():
            lanes.run(context, "software", Wish())
        assert len(asked) == 1
    finally:
        context.connection.close()
        context.meters.close()
