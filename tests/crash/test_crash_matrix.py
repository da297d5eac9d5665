"""Killed at any point, a command leaves nothing that the next one does not put right.

Whatever is cut off: one ``apply`` (or ``teardown``) more and the machine is as if nothing had happened: users, links,
addresses, routes, rules, packet filter, kernel settings, files, what supervisord runs; the next plan is empty. Or the operator
turns back: the command before it, and the machine is as it was. Or the system refuses a step (no space, an I/O error, a no of
the kernel): that is told with a code, and one command more heals it.
"""

import pytest
from crash_chosen import every, refusable, some, thinned
from crash_matrix import KILLED, REFUSED, TAKEN_BACK
from crash_scene import rounds

# at any number of partitions; the others cost the same at each
ROUNDS = ("create, remove", "grow, shrink", "change, change back")
# what such a node remembers of addresses hangs on what it was before, so going back is not compared
MOVED = "bridge, route, remove"


@pytest.mark.parametrize("name", [*ROUNDS, "tunnel"])
def test_one_partition(matrix, name):
    points = every if name == "create, remove" else some(15)
    matrix(rounds(1)[name], 1, {KILLED: points, TAKEN_BACK: some(4), REFUSED: some(6)})


def test_partitions_that_are_limited(matrix):
    """Who has used up a quota: two of three."""
    matrix(rounds(3)["limit, lift"], 3, {KILLED: some(12), TAKEN_BACK: some(3), REFUSED: some(4)})


def test_a_mesh(matrix):
    matrix(rounds(2)["join, leave"], 2, {KILLED: some(25), TAKEN_BACK: some(3), REFUSED: some(6)})


def test_an_uplink_that_moves(matrix):
    matrix(rounds(1)[MOVED], 1, {KILLED: some(15), REFUSED: some(6)})


def test_one_partition_whose_data_stays(matrix):
    matrix(rounds(1)["take down, set up"], 1, {KILLED: some(8), TAKEN_BACK: some(4), REFUSED: some(4)})


@pytest.mark.parametrize("name", ROUNDS)
def test_ten_partitions(matrix, name):
    matrix(rounds(10)[name], 10, {KILLED: some(5)})


def test_a_hundred_partitions(matrix):
    matrix(rounds(100)["grow, shrink"], 100, {KILLED: some(3)}, lanes=2)


@pytest.mark.full
@pytest.mark.parametrize("name", [*ROUNDS, "tunnel", "take down, set up"])
def test_one_partition_whole(matrix, name):
    matrix(rounds(1)[name], 1, {KILLED: every, TAKEN_BACK: every, REFUSED: every})


@pytest.mark.full
def test_partitions_that_are_limited_whole(matrix):
    matrix(rounds(3)["limit, lift"], 3, {KILLED: every, TAKEN_BACK: every, REFUSED: every})


@pytest.mark.full
def test_a_mesh_whole(matrix):
    matrix(rounds(10)["join, leave"], 10, {KILLED: every, TAKEN_BACK: every, REFUSED: every})


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 10])
def test_an_uplink_that_moves_whole(matrix, count):
    matrix(rounds(count)[MOVED], count, {KILLED: every, REFUSED: every})


@pytest.mark.full
@pytest.mark.parametrize("name", ROUNDS)
def test_ten_partitions_at_the_network(matrix, name):
    matrix(rounds(10)[name], 10, {KILLED: thinned, REFUSED: refusable})


@pytest.mark.full
@pytest.mark.parametrize("name", ROUNDS)
def test_ten_partitions_whole(matrix, name):
    matrix(rounds(10)[name], 10, {KILLED: every, TAKEN_BACK: every, REFUSED: every})


@pytest.mark.full
@pytest.mark.parametrize("name", ROUNDS)
def test_a_hundred_partitions_whole(matrix, name):
    matrix(rounds(100)[name], 100, {KILLED: every, TAKEN_BACK: some(50), REFUSED: some(50)})
