"""``[quota]``: what each partition may exchange in a month; every mistake with its place."""

import pytest
from test_accounting_config import GOOD

from accounting.allowance import Quota
from partitiond import config
from partitiond.errors import PartitiondError


@pytest.fixture
def load(tmp_path):
    def read(section):
        path = tmp_path / "slapos.cfg"
        path.write_text(f"{GOOD}{section}")
        return config.load(path)

    return read


@pytest.mark.parametrize("section", ["", "[quota]\n", "[quota]\ndefault = none\n"])
def test_off_unless_somebody_has_one(load, section):
    found = load(section)
    assert (found.quotas, found.warnings) == ({}, ())


def test_each_form(load):
    found = load("[quota]\nslappart0 = 100 GB\nslappart1 = 1.5TiB warn\nslappart2 = 500 GiB limit 1 Mbit/s\n")
    assert found.quotas == {
        "slappart0": Quota(100 * 10**9),
        "slappart1": Quota(3 * 2**39),
        "slappart2": Quota(500 * 2**30, 10**6),
    }
    assert [one.action for one in found.quotas.values()] == ["warn", "warn", "limit"]
    assert found.warnings == ()


def test_all_others_and_exceptions(load):
    found = load("[quota]\ndefault = 1 TB limit 8 kbit/s\nslappart1 = none\nslappart2 = 5 B\n").quotas
    assert found == {"slappart0": Quota(10**12, 8000), "slappart2": Quota(5)}


def test_partitions_to_come_are_no_mistake(load):
    found = load("[quota]\nslappart7 = 5 GB\n")
    assert found.quotas == {}
    assert len(found.warnings) == 1
    assert "partition_amount = 3" in found.warnings[0]


BAD = [
    *("", "0 GB", "-1 GB", "100", "100 GBit", "1e3 GB", "many", "100 GB stop", "none warn", "5000 PiB"),
    *("0.1 B", "100 GB limit", "100 GB limit 1", "100 GB limit 7999 bit/s", "100 GB limit 101 Gbit/s"),
    *("100 GB limit 1 MB/s", "100 GB warn 1 Mbit/s", "100 GB a month"),
]


@pytest.mark.parametrize("key", ["default", "slappart2"])
@pytest.mark.parametrize("value", BAD)
def test_bad_values_are_named_with_their_place(load, tmp_path, key, value):
    with pytest.raises(PartitiondError) as caught:
        load(f"[quota]\n{key} = {value}\n")
    (line,) = str(caught.value).splitlines()
    number = GOOD.count("\n") + 2
    assert line.startswith(
        f"{tmp_path}/slapos.cfg:{number}: {key} = {value!r}; allowed: none, or a number of B,"
    )
    assert "Mbit/s" in line


@pytest.mark.parametrize("name", ["slappart03", "slappart", "other0", "slappart1x"])
def test_names_that_no_partition_can_have(load, name):
    with pytest.raises(
        PartitiondError, match=f"'{name}' is no partition; allowed: default, slappart0 to slappart2"
    ):
        load(f"[quota]\n{name} = 1 GB\n")


def test_mistakes_are_told_together(load):
    with pytest.raises(PartitiondError) as caught:
        load("[quota]\ndefault = x\nslappart0 = y\nz = 1 GB\n")
    assert len(str(caught.value).splitlines()) == 3
