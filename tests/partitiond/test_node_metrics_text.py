"""Metrics as text, judged by the official parsers of both formats; the textfile; what is kept from pass to pass."""

import math
import os
import stat
import threading
from types import SimpleNamespace

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as of_0_0_4

from accounting.errors import AccountingError
from accounting.model import AddressUsage, PartitionUsage
from partitiond import metrics, metrics_text, node_metrics, textfile, usage_metrics
from partitiond.metering import Recorded
from partitiond.metrics_text import Family, family, labels
from partitiond.rising_counts import RisingCounts


def values(families):
    return {(one.name, *sorted(one.labels.items())): one.value for found in families for one in found.samples}


def usage(name, octets):
    address = AddressUsage("2001:db8::1", "ipv6", "remote", octets, 2 * octets, 3, 4)
    tap = AddressUsage("slaptap0", "tap", "remote", 7, 8, 9, 10)
    return PartitionUsage(name, "SOFTINST-1", (address, tap), 5, 1.25, 4096, 8192)


def everything():
    tally = metrics.Tally()
    tally.lane("usage", 0.02, good=True)
    return [
        *tally.families(),
        *usage_metrics.families(
            [usage("slappart0", 2**53), usage("slappart1", 6)], {("slappart0", "private"): 3}
        ),
        family("partitiond_odd", "info", "Odd labels.", [(labels(("name", 'a"b\\c\nd')), 1)]),
    ]


def test_both_formats_say_the_same():
    told = everything()
    new = values(openmetrics.text_string_to_metric_families(metrics_text.openmetrics(told).decode()))
    old = values(of_0_0_4(metrics_text.prometheus(told)))
    assert new == old
    where = (
        ("address", "2001:db8::1"),
        ("family", "ipv6"),
        ("partition", "slappart0"),
        ("scope", "remote"),
    )
    assert new["partitiond_partition_network_receive_bytes_total", *where] == 2**53
    assert new["partitiond_partition_network_transmit_bytes_total", *where] == 2**54
    assert new["partitiond_partition_network_receive_packets_total", *where] == 3
    assert new["partitiond_partition_network_transmit_packets_total", *where] == 4
    own = ("partition", "slappart1")
    assert new["partitiond_partition_cpu_seconds_total", own] == 1.25
    assert new["partitiond_partition_memory_bytes", own] == 4096
    assert new["partitiond_partition_disk_bytes", own] == 8192
    refused = (("partition", "slappart0"), ("rule", "private"))
    assert new["partitiond_partition_denied_packets_total", *refused] == 3
    assert new["partitiond_odd_info", ("name", 'a"b\\c\nd')] == 1


def test_the_old_format_has_no_types_that_it_does_not_know():
    text = metrics_text.prometheus(everything())
    assert "# EOF" not in text
    assert "# UNIT" not in text
    kinds = {line.split()[3] for line in text.splitlines() if line.startswith("# TYPE")}
    assert kinds <= {"counter", "gauge", "histogram"}


def test_what_cannot_be_a_family():
    with pytest.raises(ValueError, match="unit"):
        Family("partitiond_x", "gauge", "x", unit="bytes")
    assert metrics_text.number(math.inf) == "+Inf"


def test_counts_never_fall():
    counts = RisingCounts()
    for value, expected in ((5, 5), (7, 7), (0, 7), (2, 9), (None, 9), (3, 12)):
        counts.take({} if value is None else {("slappart0", "address"): value})
        assert counts.now() == {("slappart0", "address"): expected}


class Meters:
    """As the meters of a node, with passes that the test takes."""

    def __init__(self):
        self.passes, self.reads, self.refuse = 0, 0, False

    def recorded(self):
        if self.refuse:
            raise AccountingError("accounting.ledger_busy", "busy")
        self.reads += 1
        return Recorded((usage("slappart0", self.passes),))


def test_text_is_made_once_a_pass_and_for_who_scrapes():
    meters, kept = Meters(), usage_metrics.UsageText()
    kept.prepare(meters)
    assert meters.reads == 0, "nobody ever asked"
    first = kept.families(meters)
    assert kept.families(meters) is first
    assert meters.reads == 1
    meters.passes += 1
    kept.prepare(meters)
    assert meters.reads == 2
    assert kept.families(meters) is not first
    assert meters.reads == 2, "the pass had made it already"
    meters.passes += 1
    kept.prepare(meters)
    kept.prepare(meters)
    meters.passes += 1
    kept.prepare(meters)
    assert meters.reads == 3, "nobody asked since"
    assert "} 3\n" in kept.families(meters)[0].samples


def test_who_scrapes_while_it_is_made_has_the_one_before():
    meters, kept = Meters(), usage_metrics.UsageText()
    before = kept.families(meters)
    meters.passes += 1
    inside, go_on = threading.Event(), threading.Event()
    read = meters.recorded

    def slowly():
        inside.set()
        assert go_on.wait(20)
        return read()

    meters.recorded = slowly
    lane = threading.Thread(target=kept.prepare, args=(meters,))
    lane.start()
    assert inside.wait(20)
    assert kept.families(meters) is before
    go_on.set()
    lane.join()
    assert kept.families(meters) is not before


def test_a_ledger_that_cannot_be_read_leaves_the_rest(node_config, monkeypatch):
    from partitiond.context import Context

    node = node_config(1, interface="lo")
    node.state.mkdir()
    context = Context.of(node.load())

    def refuse(_):
        raise AccountingError("accounting.ledger_busy", "busy")

    monkeypatch.setattr(type(context.meters), "recorded", refuse)
    tally = metrics.Tally()
    tally.lane("usage", 0.1, good=True)
    names = values(openmetrics.text_string_to_metric_families(metrics.everything(context, tally).decode()))
    assert any(name.startswith("partitiond_lane") for name, *_ in names)
    assert metrics.of_partition(context, "slappart0").endswith(b"# EOF\n")
    metrics.after_pass(context, tally)


# --- the node's hardware


@pytest.fixture
def config(node_config):
    node = node_config(1, interface="lo")
    node.instance.mkdir()
    return node.load()


def test_hardware(config):
    found = values(
        openmetrics.text_string_to_metric_families(
            metrics_text.openmetrics(node_metrics.families(config)).decode()
        )
    )
    assert found["partitiond_node_memory_total_bytes",] > found["partitiond_node_memory_available_bytes",] > 0
    assert found["partitiond_node_cpu_seconds_total", ("mode", "user")] > 0
    assert found["partitiond_node_boot_time_seconds",] > 1e9
    assert {f"partitiond_node_load{minutes}" for minutes in (1, 5, 15)} <= {name for name, *_ in found}
    sizes = {
        key[1]: value for key, value in found.items() if key[0] == "partitiond_node_filesystem_size_bytes"
    }
    space = os.statvfs(config.instance_root)
    assert space.f_blocks * space.f_frsize in sizes.values()
    assert ("interface", "lo") in {key[1] for key in found if "network" in key[0]}


def test_hardware_that_fails_is_left_out(config, monkeypatch):
    import psutil

    def fail(*_, **__):
        raise RuntimeError("odd hardware")

    for name in ("cpu_times", "sensors_temperatures", "disk_io_counters", "virtual_memory"):
        monkeypatch.setattr(psutil, name, fail)
    found = node_metrics.read(config)
    assert (found.temperatures, found.disks, found.cpu_seconds, found.memory) == ((), {}, {}, {})
    assert found.load
    monkeypatch.setattr(node_metrics, "_kept", SimpleNamespace(get=lambda _: found))
    text = metrics_text.openmetrics(node_metrics.families(config)).decode()
    assert "partitiond_node_load1" in text
    assert "cpu_seconds" not in text
    assert values(openmetrics.text_string_to_metric_families(text))


def test_temperatures(config, monkeypatch):
    import psutil

    sensors = [
        SimpleNamespace(label="core", current=41.5),
        SimpleNamespace(label="core", current=42),
        SimpleNamespace(label="", current=43),
        SimpleNamespace(label="broken", current=None),
        SimpleNamespace(label="nonsense", current=65261.85),
    ]
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: {"k10temp": sensors}, raising=False)
    found = node_metrics.read(config)
    expected = (("k10temp", "core", 41.5), ("k10temp", "core 1", 42.0), ("k10temp", "2", 43.0))
    assert found.temperatures == expected
    monkeypatch.setattr(node_metrics, "_kept", SimpleNamespace(get=lambda _: found))
    text = metrics_text.openmetrics(node_metrics.families(config)).decode()
    named = values(openmetrics.text_string_to_metric_families(text))
    assert named["partitiond_node_temperature_celsius", ("chip", "k10temp"), ("sensor", "core")] == 41.5


# --- the textfile


def test_the_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "partitiond.prom"
    textfile.write(path, "a 1\n")
    assert path.read_text() == "a 1\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    monkeypatch.setattr(textfile.os, "fchmod", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        textfile.write(path, "a 2\n")
    assert path.read_text() == "a 1\n"
    assert [one.name for one in tmp_path.iterdir()] == ["partitiond.prom"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    other, path = tmp_path / "other", tmp_path / "partitiond.prom"
    other.write_text("mine")
    path.symlink_to(other)
    textfile.write(path, "a 1\n")
    assert (other.read_text(), path.is_symlink(), path.read_text()) == ("mine", False, "a 1\n")


def test_failures_are_said_once_and_old_values_go(tmp_path, caplog):
    (tmp_path / "state").mkdir()
    memory, kept = tmp_path / "state" / "memory", textfile.Textfile()
    path, missing = tmp_path / "partitiond.prom", tmp_path / "none" / "partitiond.prom"
    for _ in range(3):
        kept.update(memory, missing, "a 1\n")
    assert sum("[metrics.textfile]" in one.message for one in caplog.records) == 1
    kept.update(memory, path, "a 1\n")
    kept.update(memory, missing, "a 1\n")
    assert not path.exists(), "what is not written any more would tell old values"
    kept.update(memory, path, "a 2\n")
    kept.update(memory, None, "")
    assert [one.name for one in tmp_path.iterdir()] == ["state"]
    assert list(memory.parent.iterdir()) == []


def test_a_file_is_remembered_also_by_who_comes_after_a_kill(tmp_path):
    memory, path, other = tmp_path / "memory", tmp_path / "a.prom", tmp_path / "b.prom"
    textfile.Textfile().update(memory, path, "a 1\n")
    textfile.Textfile().update(memory, other, "a 1\n")
    assert (path.exists(), other.exists()) == (False, True)
    textfile.remove(memory)
    assert list(tmp_path.iterdir()) == []
    textfile.remove(memory)
    memory.write_text("nonsense")
    textfile.Textfile().update(memory, path, "a 1\n")
    assert textfile.remembered(memory) == {path}


def test_one_that_cannot_be_removed_harms_no_pass_and_is_tried_again(tmp_path, caplog):
    memory, other = tmp_path / "memory", tmp_path / "a.prom"
    memory.write_text(f'["{tmp_path}/directory"]')
    (tmp_path / "directory").mkdir()
    kept = textfile.Textfile()
    for _ in range(2):
        kept.update(memory, other, "a 1\n")
        assert other.exists()
    assert sum(f"{tmp_path}/directory" in one.message for one in caplog.records) == 1
    (tmp_path / "directory").rmdir()
    kept.update(memory, other, "a 1\n")
    assert textfile.remembered(memory) == {other}


def test_a_pass_that_fails_leaves_the_file_up_to_date(node_config, monkeypatch):
    from partitiond import daemon
    from partitiond.context import Context

    node = node_config(1, interface="lo")
    node.state.mkdir()
    path = node.root / "partitiond.prom"
    node.write(accounting={"textfile": path})
    context, tally = Context.of(node.load()), metrics.Tally()
    tally.drift({"tap": 3})

    def fail(_):
        raise AccountingError("accounting.ledger_full", "full")

    monkeypatch.setattr(daemon.lanes, "usage", fail)
    with pytest.raises(AccountingError, match="full"):
        daemon.Daemon._meter(SimpleNamespace(_tally=tally), context)
    assert values(of_0_0_4(path.read_text()))["partitiond_drift_total", ("resource", "tap")] == 3


def test_the_daemons_file(bridge, node_config):
    """From a node's own meters to what node_exporter reads."""
    from partitiond import converge, lanes, verbs
    from partitiond.context import Context

    node = node_config(2)
    path = node.root / "partitiond.prom"
    node.write(accounting={"textfile": path})
    context = Context.of(node.load())
    converge.apply(context)
    tally = metrics.Tally()
    for _ in range(2):
        lanes.usage(context)
        metrics.after_pass(context, tally)
    found = values(of_0_0_4(path.read_text()))
    assert found["partitiond_partition_memory_bytes", ("partition", "slappart1")] == 0
    assert {key[0] for key in found} >= {
        "partitiond_partition_info",
        "partitiond_partition_network_receive_bytes_total",
    }
    assert not any(key[0].startswith("partitiond_node_") for key in found), "node_exporter knows the node"
    assert verbs.tear_down(context, purge=False)["failures"] == []
    assert not path.exists()
    context.meters.close()
