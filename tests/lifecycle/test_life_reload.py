"""An edited configuration under a running daemon: taken with the next apply or SIGHUP, or refused as a whole."""

import json
import signal
import socket
import time

import pytest
from life_eyes import events, metric, passes, settle

from partitiond import control
from partitiond.errors import PartitiondError

SOON = 15.0


@pytest.fixture(scope="module")
def manager(make_node):
    """A node, and what its daemon tells the service manager."""
    node = make_node(partitions=2, meter_interval=3600)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(node.base / "notify.sock"))
        channel.settimeout(SOON)
        node.start(NOTIFY_SOCKET=str(node.base / "notify.sock"))
        assert channel.recv(1000) == b"READY=1\n"
        node.offer()
        settle(node)
        yield node, channel


@pytest.fixture
def node(manager):
    """The node; its configuration is put back afterwards."""
    node, _ = manager
    text = node.configuration.read_text()
    yield node
    node.configuration.write_text(text)
    node.cli("apply")


def edit(node, old, new):
    text = node.configuration.read_text()
    assert old in text
    node.configuration.write_text(text.replace(old, new))


def taps():
    return {name for _, name in socket.if_nameindex() if name.startswith("slaptap")}


def names(node):
    return set(node.partitions())


def test_apply_takes_an_edited_file(node):
    posted = node.front.count("loadComputerConfigurationFromXML")
    drift = metric(node, "partitiond_drift_total", resource="tap")
    edit(node, "partition_amount = 2", "partition_amount = 4")
    value = node.cli("apply").value
    assert (value["failures"], value["left"]) == ([], [])
    assert value["done"]
    assert taps() == {f"slaptap{index}" for index in range(4)}
    assert names(node) == {f"slappart{index}" for index in range(4)}
    assert events(node, "config.reloaded")[-1]["resource"] == str(node.configuration)
    # the master is told of what is offered now
    node.wait(
        lambda: node.front.count("loadComputerConfigurationFromXML") > posted,
        "the capacity to be posted",
        SOON,
    )
    settle(node)
    node.settled()
    assert metric(node, "partitiond_drift_total", resource="tap") == drift, "what is new is no drift"
    # the kernel is listened to about the new ones, too
    done = len(events(node, "drift.repaired"))
    from life_node import ip

    ip("link delete slaptap3")
    node.wait(lambda: events(node, "drift.repaired")[done:], "the new tap to be watched", SOON)


def test_a_look_at_everything_follows(node):
    """What the others have on disk is not looked at for one more; it is right after."""
    directory = node.base / "instance" / "slappart0"
    wanted = directory.stat().st_mode
    directory.chmod(0o700)
    edit(node, "partition_amount = 2", "partition_amount = 3")
    node.cli("apply")
    node.wait(lambda: directory.stat().st_mode == wanted, "the directory to be repaired", SOON)


def test_what_a_partition_is_told_follows_the_file(node):
    """Also where nothing of the partition itself is another: what was right by the old file is not by the new one."""
    time.sleep(0.2)  # files that were just written are not remembered yet
    node.cli("apply")
    edit(node, "partition_amount = 2", "partition_amount = 2\nsoftware_user = othersoft")
    assert node.cli("apply").value["failures"] == []
    told = json.loads((node.base / "instance" / "slappart0" / ".slapos-resource").read_text())
    assert told["user"]["additional_group_list"] == ["othersoft"]


def test_an_apply_without_an_edit_changes_nothing(node):
    reloads = len(events(node, "config.reloaded"))
    assert node.cli("apply").value["done"] == 0
    assert len(events(node, "config.reloaded")) == reloads


def test_sighup_takes_an_edited_file_and_tells_the_manager(node, manager):
    _, channel = manager
    edit(node, "partition_amount = 2", "partition_amount = 3")
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    node.daemon.send_signal(signal.SIGHUP)
    first, second = channel.recv(1000), channel.recv(1000)
    reloading, stamp = first.decode().split()
    assert reloading == "RELOADING=1"
    assert (
        before
        <= int(stamp.removeprefix("MONOTONIC_USEC="))
        <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    )
    assert second == b"READY=1\n"
    assert taps() == {"slaptap0", "slaptap1", "slaptap2"}


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("partition_amount = 2", "partition_amount = many", "config.value", "a whole number"),
        ("[slapformat]", "[slapformat", "config.syntax", "is no setting"),
        ("{base}/state", "{base}/elsewhere", "config.needs_restart", "state_dir cannot change"),
        (
            "computer_id = COMP-LIFE",
            "computer_id = COMP-2",
            "config.needs_restart",
            "computer_id cannot change",
        ),
        ("interface_name = br-life", "interface_name = nowhere", "network.no_interface", "nowhere"),
    ],
)
@pytest.mark.parametrize("by", ["apply", "SIGHUP"])
def test_what_cannot_be_used_is_refused_and_nothing_changes(manager, node, by, old, new, code, words):
    _, channel = manager
    before, refused = names(node), len(events(node, "config.refused"))
    edit(node, old.format(base=node.base), new.format(base=node.base))
    if by == "apply":
        # as the command line does, which would refuse some of these by itself
        with pytest.raises(PartitiondError) as caught:
            control.call(node.socket, "POST", "/1/apply", {})
        assert (caught.value.code, words in str(caught.value)) == (code, True)
        assert str(node.configuration) in caught.value.resource or code == "network.no_interface"
        assert caught.value.hint
    else:
        node.daemon.send_signal(signal.SIGHUP)
        assert channel.recv(1000).startswith(b"RELOADING=1\n")
        assert channel.recv(1000) == b"READY=1\n"
    (event,) = events(node, "config.refused")[refused:]
    assert (event["code"], words in event["message"]) == (code, True)
    assert code in node.log_tail()
    # the daemon goes on with what it had
    (answer,) = [control.call(node.socket, "GET", "/1/status")]
    assert {item["id"] for item in answer["partitions"]} == before
    assert (answer["node"]["interface"], answer["node"]["bridge"]) == ("br-life", "br-life")


def test_a_new_rhythm_holds_at_once(node):
    def measured():
        return metric(node, "partitiond_lane_duration_seconds_count", lane="usage")

    edit(node, "meter_interval = 3600", "meter_interval = 1")
    node.cli("apply")
    before = measured()
    node.wait(lambda: measured() >= before + 3, "the meters to be read each second", SOON)


def test_another_master_is_asked_from_then_on(node):
    asked = node.front.count("getFullComputerInformation")
    edit(node, node.front.url, node.front.master)  # past the front
    node.cli("apply")
    assert node.cli("sync", "instances").value["failures"] == []
    assert node.front.count("getFullComputerInformation") == asked
    assert node.partition("slappart0")["state"] == "free"


def test_a_wish_that_is_refused_is_told(node, manager):
    _, channel = manager
    edit(node, "[slapformat]", "[block_devices]\nslappart1 = /dev/nowhere\n\n[slapformat]")
    node.daemon.send_signal(signal.SIGHUP)
    assert channel.recv(1000).startswith(b"RELOADING=1\n")
    assert channel.recv(1000) == b"READY=1\n"
    (event,) = events(node, "block-device.refused")
    assert event["partition"] == "slappart1"
    assert event["resource"].startswith("block-device/")
    assert event["code"]


def test_shrinking_by_reload_takes_back_what_is_ours(node):
    edit(node, "partition_amount = 2", "partition_amount = 1")
    node.cli("apply")
    assert taps() == {"slaptap0"}
    before = passes(node)
    assert settle(node) <= before + 1
    node.settled()
