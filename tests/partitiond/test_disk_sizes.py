"""Sizes of many trees: each walked in turn, within a share of the time."""

import os

import pytest

from accounting.disk import DiskMeter
from accounting.quota import CountedSpace
from partitiond.disk_sizes import DiskSizes, Tree

USER = 5000


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Slow(DiskMeter):
    """One that is given no time, so that each call finishes a tree or a piece; it notes what it was given."""

    def __init__(self, clock):
        super().__init__(entries_per_pass=10)
        self.given = []
        self.clock = clock

    def measure(self, trees, seconds=None):
        self.given.append(seconds)
        self.clock.now += seconds
        return super().measure(trees, 3600)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sizes(clock):
    found = DiskSizes(clock=clock, _walker=Slow(clock))
    yield found
    found.close()


@pytest.fixture
def trees(tmp_path):
    found = {}
    for partition in ("slappart0", "slappart1"):
        for suffix in ("", " data"):
            path = tmp_path / f"{partition}{suffix}"
            path.mkdir()
            for number in range(8):
                (path / str(number)).write_bytes(os.urandom(4096))
            found[partition + suffix] = Tree(partition, path, USER)
    return found


def rounds(sizes, clock, trees, number, seconds=10.0):
    found = []
    for _ in range(number):
        found += ((one.partition, one.value) for one in sizes.measure(trees))
        clock.now += seconds
    return found


def test_a_partition_has_a_size_once_all_of_its_trees_were_walked(sizes, clock, trees):
    assert rounds(sizes, clock, trees, 1) == []
    assert not sizes.knows(trees)
    found = dict(rounds(sizes, clock, trees, 10))
    assert sizes.knows(trees)
    assert set(found) == {"slappart0", "slappart1"}
    assert all(16 * 4096 <= size < 20 * 4096 for size in found.values())


def test_walks_take_a_fiftieth_of_the_time_and_never_long_at_once(sizes, clock, trees):
    began = clock.now
    rounds(sizes, clock, trees, 8)
    given = sizes._walker.given
    assert len(given) >= 5
    assert given[0] == 0.5
    assert sum(given[1:]) <= 0.02 * (clock.now - began) * 1.001
    clock.now += 10**6  # a node that was asleep
    rounds(sizes, clock, trees, 1)
    assert given[-1] == 0.5


def test_a_round_starts_every_five_minutes_and_nothing_is_walked_between(sizes, clock, trees):
    rounds(sizes, clock, trees, 10)
    number = len(sizes._walker.given)
    rounds(sizes, clock, trees, 19)
    assert len(sizes._walker.given) == number
    (trees["slappart0"].path / "more").write_bytes(os.urandom(2**20))
    found = dict(rounds(sizes, clock, trees, 15))
    assert found["slappart0"] >= 2**20


def test_a_new_tree_and_a_forgotten_one_wait_for_no_round(sizes, clock, trees):
    late = {"slappart1 data": trees.pop("slappart1 data")}
    rounds(sizes, clock, trees, 10)
    assert {name for name, _ in rounds(sizes, clock, trees | late, 4)} == {"slappart1"}
    sizes.forget("slappart0")
    assert not sizes.knows(trees)
    assert {name for name, _ in rounds(sizes, clock, trees | late, 6)} == {"slappart0"}


def test_what_is_gone_is_no_partitions_any_more(sizes, clock, trees):
    rounds(sizes, clock, trees, 10)
    assert sizes.measure({}) == ()
    assert sizes._sizes == {}


def test_what_a_file_system_counts_is_not_walked_and_counts_once(clock, trees):
    """Both trees of slappart0 lie on one file system that counts by user; of slappart1, one on another."""
    asked = []
    counts = {"slappart0": 100, "slappart0 data": 100, "slappart1": 7}

    def counted(path, uid):
        asked.append(path.name)
        if path.name not in counts:
            raise FileNotFoundError(path)
        return CountedSpace(counts[path.name], ("user", 1, 1 if path.name.startswith("slappart0") else 2))

    sizes = DiskSizes(clock=clock, counted=counted, _walker=Slow(clock))
    found = rounds(sizes, clock, trees, 4)
    assert found[0] == ("slappart0", 100)
    size = dict(found)["slappart1"]
    assert 7 + 8 * 4096 <= size < 7 + 10 * 4096
    assert len(asked) == len(trees)
    clock.now += 60
    counts["slappart0"] = 250
    assert dict(rounds(sizes, clock, trees, 1))["slappart0"] == 250
    assert len(asked) == 2 * len(trees)
    # where it stops counting, what it said last stands until the tree was walked
    del counts["slappart0"], counts["slappart0 data"]
    clock.now += 400
    found = dict(rounds(sizes, clock, trees, 8))
    assert 16 * 4096 <= found["slappart0"] < 20 * 4096
    sizes.close()
