"""What the ledger answers: sums, owners, intervals, gaps, gauges."""

import json
import os

import pytest
from accounting_world import a_pass, bytes_in, count, gauge, process, traffic

from accounting import AccountingError, Gap, Ledger

A, B = {"slappart0": "SOFTINST-A"}, {"slappart0": "SOFTINST-B"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger(path) as opened:
        yield opened


def test_the_file_is_roots_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            ledger.record(a_pass(1, traffic(value=1)))
            modes = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()}
    finally:
        os.umask(before)
    names = ("ledger.begun", "ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm")
    assert modes == dict.fromkeys(names, "0o600")


def test_a_file_with_open_rights_is_closed(path):
    Ledger(path).close()
    path.chmod(0o644)
    Ledger(path).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_syncs_each_pass_and_can_shrink_later(ledger):
    pragmas = {
        name: ledger._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "auto_vacuum", "user_version")
    }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "auto_vacuum": 2, "user_version": 2}


def test_nothing_recorded_is_an_empty_report(ledger):
    assert ledger.usage(None, None).as_json() == {"from": None, "to": None, "partitions": [], "gaps": []}


def test_the_contracts_object(ledger):
    ledger.record(
        a_pass(
            1_700_000_000.25,
            traffic(value=100),
            traffic(value=20, scope="local"),
            traffic(value=30, address="slaptap0", family="tap"),
            count("denied_packets", 4),
            gauge("memory_bytes", 4096),
            gauge("disk_bytes", 512),
            gauge("processes", 1),
            owners=A,
            processes=[process(1, 1_500_000, io=(8192, 4096))],
        )
    )
    report = json.loads(json.dumps(ledger.usage(1_600_000_000, 1_700_000_001).as_json()))
    assert report == {
        "from": "2020-09-13T12:26:40.000000Z",
        "to": "2023-11-14T22:13:21.000000Z",
        "partitions": [
            {
                "id": "slappart0",
                "instance_guid": "SOFTINST-A",
                "addresses": [
                    {
                        "address": address,
                        "family": family,
                        "scope": scope,
                        "bytes_in": value,
                        "bytes_out": 2 * value,
                        "packets_in": value // 10,
                        "packets_out": value // 5,
                    }
                    for address, family, scope, value in (
                        ("2001:db8::1", "ipv6", "remote", 100),
                        ("2001:db8::1", "ipv6", "local", 20),
                        ("slaptap0", "tap", "remote", 30),
                    )
                ],
                "denied_packets": 4,
                "cpu_seconds": 1.5,
                "memory_bytes": 4096,
                "disk_bytes": 512,
                "io_read_bytes": 8192,
                "io_write_bytes": 4096,
                "processes": 1,
            }
        ],
        "gaps": [],
    }


def test_without_an_end_the_report_ends_with_the_last_pass(ledger):
    ledger.record(a_pass(10, traffic(value=1)))
    assert (ledger.usage(None, None).start, ledger.usage(None, None).end) == (None, 10)
    assert ledger.usage(20, None).end == 20


def test_recording_a_pass_twice_adds_nothing(ledger):
    for _ in range(3):
        ledger.record(a_pass(1, traffic(value=100), processes=[process(1, 5)]))
    assert bytes_in(ledger) == {("slappart0", None): 100}
    assert ledger._connection.execute("SELECT count(*) FROM sample").fetchone() == (2,)


def test_usage_goes_to_the_owner_of_its_time_and_never_to_two(ledger):
    ledger.record(a_pass(1, traffic(value=10)))
    ledger.record(a_pass(2, traffic(value=110), owners=A))
    ledger.record(a_pass(3, traffic(value=1110), owners=B))
    ledger.record(a_pass(4, traffic(value=1110), owners=B))
    ledger.record(a_pass(5, traffic(value=11110)))
    ledger.record(a_pass(6, traffic(value=111110), owners=A))
    assert bytes_in(ledger) == {
        ("slappart0", "SOFTINST-A"): 100 + 100_000,
        ("slappart0", "SOFTINST-B"): 1000,
        ("slappart0", None): 10 + 10_000,
    }
    assert sum(bytes_in(ledger).values()) == 111110
    assert ledger.usage(None, None).gaps == ()


def test_processor_time_changes_owner_likewise(ledger):
    ledger.record(a_pass(1, owners=A, processes=[process(1, 1_000_000)]))
    ledger.record(a_pass(2, owners=B, processes=[process(1, 3_500_000)]))
    used = {entry.instance_guid: entry.cpu_seconds for entry in ledger.usage(None, None).partitions}
    assert used == {"SOFTINST-A": 1.0, "SOFTINST-B": 2.5}


def test_the_present_owner_comes_last_and_partitions_in_their_order(ledger):
    names = ("slappart10", "slappart2", "other")
    ledger.record(a_pass(1, *(traffic(name, 10) for name in names), owners=dict.fromkeys(names, "X")))
    ledger.record(a_pass(2, *(traffic(name, 20) for name in names), owners=dict.fromkeys(names, "A")))
    listed = [(entry.id, entry.instance_guid) for entry in ledger.usage(None, None).partitions]
    assert listed == [(name, guid) for name in ("other", "slappart2", "slappart10") for guid in ("X", "A")]


def test_a_partition_that_was_free_and_idle_is_not_listed_beside_its_owner(ledger):
    ledger.record(a_pass(1, traffic(value=0)))
    assert [entry.instance_guid for entry in ledger.usage(None, None).partitions] == [None]
    ledger.record(a_pass(2, traffic(value=0), owners=A))
    assert [entry.instance_guid for entry in ledger.usage(None, None).partitions] == ["SOFTINST-A"]


def test_a_reading_of_a_partition_without_an_owner_entry_is_nobodys(ledger):
    ledger.record(a_pass(1, traffic("slappart9", 5), owners={}))
    assert bytes_in(ledger) == {("slappart9", None): 5}


def test_a_meter_that_failed_in_one_pass_is_made_up_for_in_the_next(ledger):
    ledger.record(a_pass(1, traffic(value=100)))
    ledger.record(a_pass(2))
    ledger.record(a_pass(3, traffic(value=300)))
    assert bytes_in(ledger) == {("slappart0", None): 300}
    assert bytes_in(ledger, 2, 3) == {("slappart0", None): 200}
    assert ledger.usage(None, None).gaps == ()


def test_a_restart_counts_wholly_and_leaves_a_gap(ledger):
    ledger.record(a_pass(10, traffic(value=100), traffic("slappart1", 100)))
    found = ledger.record(a_pass(20, traffic(value=7, epoch="e2"), traffic("slappart1", 100)))
    gap = Gap(10, 20, "counters restarted (ipv6)")
    assert found == (gap,)
    assert bytes_in(ledger) == {("slappart0", None): 107, ("slappart1", None): 100}
    assert ledger.usage(None, None).gaps == (gap,)
    assert ledger.usage(None, None, "slappart0").gaps == (gap,)
    assert ledger.usage(None, None, "slappart1").gaps == ()
    assert ledger.usage(20, None).gaps == ledger.usage(None, 10).gaps == ()
    assert ledger.usage(19, None).gaps == ledger.usage(None, 11).gaps == (gap,)


def test_a_reboot_is_one_gap_and_not_one_per_partition(ledger):
    names = [f"slappart{index}" for index in range(50)]
    for at, epoch in ((10, "e1"), (20, "e2")):
        found = ledger.record(a_pass(at, *(traffic(name, 5, epoch=epoch) for name in names)))
    assert len(found) == 1
    assert len(ledger.usage(None, None).gaps) == 1


def test_intervals_that_touch_share_nothing_and_miss_nothing(ledger):
    for at, value in ((10, 1), (20, 11), (30, 111), (40, 111), (50, 1111)):
        ledger.record(a_pass(at, traffic(value=value)))
    key = ("slappart0", None)
    assert bytes_in(ledger, 10, 30) == {key: 110}  # the pass at 10 belongs to what ends at 10
    assert bytes_in(ledger, 30, 50) == {key: 1000}
    assert bytes_in(ledger, None, 10) == {key: 1}
    assert bytes_in(ledger, None, 29.999) == {key: 11}
    assert bytes_in(ledger, 25, None) == {key: 1100}
    assert bytes_in(ledger, 31, 49) == {}
    assert bytes_in(ledger, 12, 18) == {}  # what straddles counts where it ends


def test_an_idle_owner_is_still_listed_in_an_interval(ledger):
    ledger.record(a_pass(10, traffic(value=5), owners=A))
    ledger.record(a_pass(20, traffic(value=5), owners=A))
    ledger.record(a_pass(30, traffic(value=5), owners=B))
    ledger.record(a_pass(40, traffic(value=5), owners=B))

    def listed(start, end):
        return [entry.instance_guid for entry in ledger.usage(start, end).partitions]

    assert listed(11, 19) == listed(11, 20) == ["SOFTINST-A"]
    assert listed(11, 30) == ["SOFTINST-A", "SOFTINST-B"]
    assert listed(31, 50) == ["SOFTINST-B"]
    assert listed(0, 5) == []


def test_the_text_of_a_report_leads_back_to_the_same_moment(ledger):
    """So `--from` the `to` of the last report continues exactly."""
    from datetime import datetime

    at = 1_723_456_789.1234567
    ledger.record(a_pass(at, traffic(value=5)))
    again = datetime.fromisoformat(ledger.usage(None, None).as_json()["to"]).timestamp()
    assert bytes_in(ledger, again, None) == {}
    assert bytes_in(ledger, None, again) == {("slappart0", None): 5}


def test_an_interval_that_ends_before_it_starts_is_refused(ledger):
    with pytest.raises(AccountingError) as caught:
        ledger.usage(2, 1)
    assert caught.value.code == "accounting.interval"


def test_a_clock_that_is_set_back_loses_and_doubles_nothing(ledger):
    ledger.record(a_pass(1000, traffic(value=1)))
    ledger.record(a_pass(500, traffic(value=11)))
    found = ledger.record(a_pass(400, traffic(value=5, epoch="e2")))
    ledger.record(a_pass(1100, traffic(value=105, epoch="e2")))
    key = ("slappart0", None)
    assert bytes_in(ledger) == {key: 116}
    assert bytes_in(ledger, None, 600) == {key: 15}
    assert bytes_in(ledger, 600, None) == {key: 101}
    assert found == (Gap(400, 400, "counters restarted (ipv6)"),)


def test_gauges_are_the_latest_value_up_to_the_end(ledger):
    def record(at, memory, disk=None, owners=A):
        disks = [] if disk is None else [gauge("disk_bytes", disk)]
        ledger.record(a_pass(at, gauge("memory_bytes", memory), *disks, owners=owners))

    record(10, 100, 7)
    record(20, 300)
    record(30, 200)
    record(40, 200, owners=B)

    def seen(start, end):
        return [
            (entry.instance_guid, entry.memory_bytes, entry.disk_bytes)
            for entry in ledger.usage(start, end).partitions
        ]

    assert seen(None, None) == [("SOFTINST-A", 200, 7), ("SOFTINST-B", 200, 0)]
    assert seen(None, 20) == [("SOFTINST-A", 300, 7)]
    assert seen(11, 29) == [("SOFTINST-A", 300, 7)]
    assert seen(31, 39) == [("SOFTINST-A", 200, 7)]
    assert seen(0, 5) == []


def test_an_unchanged_gauge_writes_no_row(ledger):
    for at in range(5):
        ledger.record(a_pass(at, gauge("memory_bytes", 100)))
    assert ledger._connection.execute("SELECT count(*) FROM gauge_sample").fetchone() == (1,)


def test_one_partition_is_reported_alone(ledger):
    ledger.record(a_pass(1, traffic(value=1), traffic("slappart1", 2)))
    ledger.record(a_pass(2, traffic(value=11), traffic("slappart1", 22)))
    assert bytes_in(ledger, None, None, "slappart1") == {("slappart1", None): 22}
    assert bytes_in(ledger, 1, 2, "slappart1") == {("slappart1", None): 20}
    assert ledger.usage(None, None, "nobody").partitions == ()


def test_totals_for_metrics_are_per_partition_and_never_fall(ledger):
    everyone = {"slappart0": "SOFTINST-A", "slappart1": None}
    ledger.record(
        a_pass(1, traffic(value=10), count("denied_packets", 1), gauge("memory_bytes", 9), owners=everyone)
    )
    ledger.record(
        a_pass(2, traffic(value=15), traffic(value=3, scope="local"), count("denied_packets", 4), owners=B)
    )
    ledger.record(a_pass(3, owners=B, processes=[process(1, 300_000)]))
    (entry,) = ledger.totals()
    assert (entry.id, entry.instance_guid) == ("slappart0", "SOFTINST-B")
    assert {address.scope: address.bytes_in for address in entry.addresses} == {"remote": 15, "local": 3}
    assert (entry.denied_packets, entry.cpu_seconds, entry.memory_bytes) == (4, 0.3, 0)


def test_a_refused_reading_records_nothing_of_its_pass(ledger):
    with pytest.raises(AccountingError):
        ledger.record(a_pass(1, traffic(value=1), gauge("disk_bytes", -1)))
    assert ledger.usage(None, None).end is None


def test_all_survives_being_closed_and_opened(path):
    for value in (10, 20, 30):
        with Ledger(path) as ledger:
            ledger.record(a_pass(value, traffic(value=value), owners=A, processes=[process(1, value)]))
            assert ledger.recovered is None
    with Ledger(path) as ledger:
        (entry,) = ledger.usage(None, None).partitions
        assert (entry.addresses[0].bytes_in, entry.cpu_seconds) == (30, 30e-6)


def denied(value, rule, name="denied_packets", **more):
    return count(name, value, part=rule, **more)


def denied_of(ledger):
    report = ledger.usage(None, None)
    return {one.id: one.denied_packets for one in report.partitions}, report.gaps


def test_a_rule_that_goes_takes_no_others_denials_along(ledger):
    """Nor does it come back as one that began again, unless it did."""
    ledger.record(a_pass(1, denied(100, "spoofed"), denied(10, "metrics")))
    ledger.record(a_pass(2, denied(100, "spoofed")))
    assert denied_of(ledger) == ({"slappart0": 110}, ())
    ledger.record(a_pass(3, denied(101, "spoofed"), denied(10, "metrics"), denied(7, "quota")))
    assert denied_of(ledger) == ({"slappart0": 118}, ())
    ledger.record(a_pass(4, denied(101, "spoofed"), denied(2, "metrics")))
    found, (gap,) = denied_of(ledger)
    assert (found, gap.reason) == ({"slappart0": 120}, "counters restarted (denied_packets)")


def test_a_rule_that_is_given_twice_is_refused(ledger):
    ledger.record(
        a_pass(1, denied(1, "spoofed"), denied(1, "spoofed", "denied_frames"), denied(1, "metrics"))
    )
    with pytest.raises(AccountingError, match="twice") as caught:
        ledger.record(a_pass(2, denied(1, "spoofed"), denied(1, "spoofed")))
    assert caught.value.resource == "slappart0/denied_packets/spoofed"


@pytest.mark.parametrize(
    ("epoch", "expected"), [("e1", 50 + 3 + 4), ("e2", 50 + 43 + 14)], ids=["goes on", "began again"]
)
def test_denials_that_were_kept_as_one_sum_are_not_counted_again(ledger, epoch, expected):
    """The release before had one level for all rules of a partition."""
    ledger.record(a_pass(1, count("denied_packets", 50), count("denied_packets", 0, partition="slappart1")))
    ledger.record(a_pass(2, denied(43, "spoofed", epoch=epoch), denied(14, "metrics", epoch=epoch)))
    ledger.record(a_pass(3, denied(43, "spoofed", epoch=epoch), denied(14, "metrics", epoch=epoch)))
    found, gaps = denied_of(ledger)
    assert (found["slappart0"], gaps) == (expected, ())
    ledger.record(a_pass(4, denied(43, "spoofed", epoch=epoch), denied(9, "private", epoch=epoch)))
    assert denied_of(ledger)[0]["slappart0"] == expected + 9
