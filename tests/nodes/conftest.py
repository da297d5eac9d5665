"""Worlds of several nodes; what they leave behind would be found by the fixture of all tests."""

import contextlib

import pytest
from nodes_world import standing


@pytest.fixture
def make_world():
    """Make a world, as ``nodes_world.standing`` does, that ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda nodes=3, **options: stack.enter_context(standing(nodes, **options))


@pytest.fixture(scope="module")
def module_world():
    """The same, for all tests of a file."""
    with contextlib.ExitStack() as stack:
        yield lambda nodes=3, **options: stack.enter_context(standing(nodes, **options))
