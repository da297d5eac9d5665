"""``[accounting]``: what the master is told of each meter; every mistake with its place."""

from decimal import Decimal
from pathlib import Path

import pytest

from accounting.tariff import METERS, Rate
from partitiond import config
from partitiond.errors import PartitiondError

GOOD = """\
[slapos]
computer_id = COMP-1
master_url = https://master.example/
software_root = /srv/t/software
instance_root = /srv/t/instance

[slapformat]
interface_name = br0
partition_amount = 3
"""


@pytest.fixture
def load(tmp_path):
    """Read the good text with an ``[accounting]`` section behind it."""

    def read(section, own=""):
        path = tmp_path / "slapos.cfg"
        path.write_text(f"{GOOD}[partitiond]\n{own}[accounting]\n{section}")
        return config.load(path)

    return read


def test_without_the_section_nothing_is_named(load):
    found = load("").accounting
    assert (found.tariff.rates, found.tariff.resources, found.textfile) == ({}, frozenset(), None)
    assert not found.resend


def test_resources_units_and_prices(load):
    found = load(
        "network_in = network_in per GB ; of the master\n"
        "network_out = service_module/slapos net out per GiB\n"
        "price_network_out = 0.05\n"
        "cpu = CPU Consumption per h\n"
        "packets_in = packets per thousand\n"
        "outage = outage\n"
        "partition_resources = CPU Consumption, service_module/users\n\tdisk per user\n"
        "textfile = /var/lib/prometheus/node-exporter/partitiond.prom\n"
    )
    assert found.warnings == ()
    assert found.accounting.tariff.rates == {
        "network_in": Rate("network_in", 10**9),
        "network_out": Rate("service_module/slapos net out", 2**30, Decimal("0.05")),
        "cpu": Rate("CPU Consumption", 3600),
        "packets_in": Rate("packets", 1000),
        "outage": Rate("outage"),
    }
    assert found.accounting.tariff.partition_resources == {
        "CPU Consumption",
        "service_module/users",
        "disk per user",
    }
    assert found.accounting.tariff.resources >= {"network_in", "outage", "disk per user"}
    assert found.accounting.textfile == Path("/var/lib/prometheus/node-exporter/partitiond.prom")


def test_every_meter_can_be_named(load):
    found = load("".join(f"{name} = of {name}\n" for name in METERS))
    assert found.warnings == ()
    assert {rate.resource for rate in found.accounting.tariff.rates.values()} == {
        f"of {name}" for name in METERS
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("network_in = x per furlong", "per B or kB"),
        ("cpu = x per GB", "per s or min or h or d"),
        ("cpu = per h", "the reference of a service"),
        ("cpu = x\x07y", "printable ASCII"),
        (f"cpu = {'x' * 201}", "at most 200"),
        ("cpu = x\nprice_cpu = -1", "a number such as 0.05"),
        ("cpu = x\nprice_cpu = 1e5", "a number such as 0.05"),
        ("cpu = x\nprice_cpu = nan", "a number such as 0.05"),
        ("partition_resources = a, b\u00e4", "printable ASCII"),
        ("textfile = relative.prom", "an absolute path"),
        ("textfile = /srv/t/instance/slappart0/x.prom", "outside of instance_root"),
        ("textfile = /srv/t/software/x.prom", "outside of software_root"),
    ],
)
def test_bad_values_are_named(load, line, words):
    with pytest.raises(PartitiondError) as caught:
        load(line + "\n")
    key = line.splitlines()[-1].partition(" ")[0]
    number = GOOD.count("\n") + 3 + line.count("\n")
    assert f"slapos.cfg:{number}: {key} = " in str(caught.value)
    assert words in str(caught.value)


def test_unknown_keys_and_prices_of_nothing_are_warned_of(load):
    found = load("network_inn = x\nfoo = y\nprice_cpu = 1\n")
    assert "unknown key 'network_inn', did you mean 'network_in'?" in found.warnings[0]
    assert "unknown key 'foo'; meters are network_in, " in found.warnings[1]
    assert "price_cpu has no effect without cpu" in found.warnings[2]


def test_what_becomes_of_answers_that_got_lost(load):
    assert load("", "report_ambiguous = resend\n").accounting.resend
    assert not load("", "report_ambiguous = hold\n").accounting.resend
    with pytest.raises(PartitiondError, match="allowed: hold or resend"):
        load("", "report_ambiguous = guess\n")
